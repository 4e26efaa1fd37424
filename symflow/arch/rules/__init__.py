"""What operations do to axes: the registry, and the rules that symflow brings, by kind."""

from symflow.arch.rules import (
    arithmetic,
    attention,
    choice,
    elementwise,
    linear,
    normalisation,
    recurrent,
    reduction,
    shape,
)
from symflow.arch.rules.registry import Activation, Value, find_rule, require_rule, rule

__all__ = [
    "Activation",
    "Value",
    "arithmetic",
    "attention",
    "choice",
    "elementwise",
    "find_rule",
    "linear",
    "normalisation",
    "recurrent",
    "reduction",
    "require_rule",
    "rule",
    "shape",
]
