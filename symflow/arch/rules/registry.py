"""Which group acts where, as data: rules from modules and functions to axes.

A rule says what one operation does to the labels of its input: which axis each dimension runs over
and with which degree. An activation needs no code, only its properties (:class:`Activation`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, final

import torch
from torch import nn
from torch._ops import OpOverload, OpOverloadPacket  # what the nodes of torch.export call
from torch.nn import functional

from symflow.arch.labels import Label
from symflow.errors import UnsupportedModuleError


@final
@dataclass(frozen=True)
class Activation:
    """What an element-wise function commutes with, beside permutations (Godfrey et al., 2022).

    Attributes
    ----------
    odd
        sigma(-z) = -sigma(z), or (-1)^k sigma(z) if homogeneous of degree k: sign flips pass.
    homogeneous
        The k with sigma(s z) = s^k sigma(z) for all s > 0, or None: positive scales pass through.

    Examples
    --------
    >>> Activation(odd=True)                # tanh, sin, erf
    Activation(odd=True, homogeneous=None)
    >>> Activation(homogeneous=1)           # ReLU
    Activation(odd=False, homogeneous=1)
    """

    odd: bool = False
    homogeneous: int | None = None

    @property
    def linear(self) -> bool:
        """Whether it multiplies by a constant: all that is odd and homogeneous of degree one."""
        return self.odd and self.homogeneous == 1

    def __str__(self) -> str:
        kinds = ["permutations"]
        kinds += ["signs"] if self.odd else []
        kinds += ["positive scales"] if self.homogeneous is not None else []
        return " and ".join([", ".join(kinds[:-1]), kinds[-1]] if kinds[1:] else kinds)


LINEAR = Activation(odd=True, homogeneous=1)
RELU = Activation(homogeneous=1)
ODD = Activation(odd=True)
PLAIN = Activation()


@final
@dataclass(frozen=True)
class Value:
    """The label of a tensor inside the network.

    Attributes
    ----------
    shape
        Its shape on the example inputs.
    dims
        One label for each dimension; the first one is the batch and always fixed.
    made_by
        Leaves of the linear map whose result this is, if nothing has happened to it since.
    stacked
        A dimension that is taken apart later on, and what the value is at each of its places:
        queries, keys and values made by one map, say. They share no axis.

    Examples
    --------
    >>> from symflow.arch import FIXED
    >>> Value((8, 3), (FIXED, FIXED)).with_dim(-1, FIXED, 5).shape
    (8, 5)
    """

    shape: tuple[int, ...]
    dims: tuple[Label, ...]
    made_by: tuple[str, ...] = ()
    stacked: "tuple[int, tuple[Value, ...]] | None" = None

    def with_dim(self, dim: int, label: Label, size: int) -> "Value":
        """Replace one dimension: its label and its size."""
        shape, dims = list(self.shape), list(self.dims)
        shape[dim], dims[dim] = size, label
        return Value(tuple(shape), tuple(dims))


Rule: TypeAlias = "Callable[..., Value]"
_R = TypeVar("_R", bound=Callable[..., Any])
_RULES: dict[Any, Activation | Callable[..., Value]] = {}


def rule(target: Any, activation: Activation | None = None) -> Any:
    """Register what a module class, a function or a tensor method does to the axes.

    Parameters
    ----------
    target
        A subclass of ``nn.Module``, a function (``torch.tanh``), or the name of a tensor method.
    activation
        For an element-wise function: what it commutes with. Leave it out to decorate a rule
        ``rule(call, *inputs) -> Value`` for an operation with weights.

    Returns
    -------
    Callable
        The decorator, where no activation is given.

    Notes
    -----
    A rule is a claim, and no more: ``Architecture.from_module`` tries every claim on the module in
    float64 and refuses a false one with :class:`~symflow.errors.SymmetryError`.

    Examples
    --------
    >>> import symflow
    >>> from torch import nn
    >>> symflow.arch.rule(nn.Hardshrink, symflow.arch.Activation(odd=True))
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.Hardshrink(), nn.Linear(3, 1))
    >>> symflow.Architecture.from_module(net, torch.zeros(1, 2)).axes[0].group
    Permutation(size=3) @ Sign(size=3)
    """
    if isinstance(target, OpOverload):
        target = target.overloadpacket
    if isinstance(target, OpOverloadPacket):
        target = target.__name__
    if activation is not None:
        _RULES[target] = activation
        return None

    def register(function: _R) -> _R:
        _RULES[target] = function
        return function

    return register


def find_rule(target: Any) -> Activation | Callable[..., Value] | None:
    """Return the rule of a module class (or its nearest base class), function or method name.

    Examples
    --------
    >>> from torch import nn
    >>> find_rule(nn.Tanh)
    Activation(odd=True, homogeneous=None)
    """
    if isinstance(target, type):
        return next((_RULES[c] for c in target.__mro__ if c in _RULES), None)
    if isinstance(target, OpOverload):  # as torch.export writes them
        return _RULES.get(target.overloadpacket.__name__)
    return _RULES.get(target)


def require_rule(target: Any, path: str) -> Activation | Callable[..., Value]:
    """Return the rule, or say how to write it.

    Raises
    ------
    UnsupportedModuleError
        If there is none.

    Examples
    --------
    >>> from torch import nn
    >>> require_rule(nn.ReLU, "0")
    Activation(odd=False, homogeneous=1)
    """
    found = find_rule(target)
    if found is None:
        name, kind = _spelled(target)
        raise UnsupportedModuleError(
            f"no symmetry rule for {name} ({kind}) at {path!r}. Register one: "
            f"symflow.arch.rule({name}, symflow.arch.Activation(odd=..., homogeneous=...)) if it "
            "acts on each element alone, else decorate a function (call, *inputs) -> Value with "
            f"@symflow.arch.rule({name}); symflow/arch/rules/linear.py shows the one of nn.Linear"
        )
    return found


def _spelled(target: Any) -> tuple[str, str]:
    """Write a target as code would, and say what it is."""
    if isinstance(target, OpOverload):
        return repr(target.overloadpacket.__name__), "an ATen operation"
    if isinstance(target, str):
        return repr(target), "a method of tensors"
    name = getattr(target, "__name__", str(target))
    for short, module in (("nn", nn), ("F", functional), ("torch", torch)):
        if getattr(module, name, None) is target:
            return f"{short}.{name}", "PyTorch"
    return name, str(getattr(target, "__module__", "your code"))
