"""Architectures: leaves, axes, and the symmetry of a network's weights."""

from symflow.arch.architecture import Architecture, StateDict, Weights
from symflow.arch.layout import FIXED, Axis, Dim, Leaf
from symflow.arch.mlp import from_config, mlp
from symflow.arch.rules import Activation, Value, rule
from symflow.arch.symmetry import Element, Symmetry, repeat_along, scale_coordinates
from symflow.arch.trace import Call

__all__ = [
    "FIXED",
    "Activation",
    "Architecture",
    "Axis",
    "Call",
    "Dim",
    "Element",
    "Leaf",
    "StateDict",
    "Symmetry",
    "Value",
    "Weights",
    "from_config",
    "mlp",
    "repeat_along",
    "rule",
    "scale_coordinates",
]
