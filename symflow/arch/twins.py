"""Claims about networks too large to run: believed where a small one of the class bears them."""

import re
from typing import Any

from torch import nn

from symflow.arch.layout import Axis, Leaf
from symflow.arch.symmetry import Symmetry
from symflow.errors import SymmetryError, UnsupportedModuleError


def require_twin(
    module: nn.Module, symmetry: Symmetry, twin: nn.Module, verified: Symmetry
) -> None:
    """Compare the structure of a claim with one that was tried on a small network.

    The leaves must have the same names and dimensions: the axis, how it acts, what it is within.
    The axes must have groups of the same kind; sizes may differ.

    Parameters
    ----------
    module, symmetry
        The large network, perhaps on the meta device, and the claim about it.
    twin, verified
        The small network, and the symmetry that was tried on it.

    Raises
    ------
    SymmetryError
        If the structures differ; it names the first difference.
    """
    if type(module) is not type(twin):
        raise SymmetryError(
            f"twin: a {type(twin).__name__} says nothing about a {type(module).__name__}; trace a "
            "smaller one of the same class"
        )
    first, second = ({x.name: _of_leaf(x) for x in s.leaves} for s in (symmetry, verified))
    _require_same("leaf", first, second)
    first, second = ({a.name: _of_axis(a) for a in s.axes} for s in (symmetry, verified))
    _require_same("axis", first, second)


def require_material(module: nn.Module) -> None:
    """Refuse a module without values: nothing can be tried on it.

    Raises
    ------
    UnsupportedModuleError
        If it has a leaf on the meta device.
    """
    if any(value.is_meta for value in module.state_dict().values()):
        raise UnsupportedModuleError(
            f"{type(module).__name__} is on the meta device, so no symmetry can be tried on it: "
            "give Architecture.from_module a smaller one of the same class, traced, as twin="
        )


def _of_leaf(leaf: Leaf) -> tuple[Any, ...]:
    return leaf.learnable, tuple((d.axis, d.degree, d.within) for d in leaf.dims)


def _of_axis(axis: Axis) -> tuple[Any, ...]:
    return re.sub(r"size=\d+", "size", str(axis.group)), axis.over


def _require_same(kind: str, first: dict[str, Any], second: dict[str, Any]) -> None:
    for name in dict.fromkeys([*first, *second]):
        here, there = first.get(name), second.get(name)
        if here != there:
            raise SymmetryError(
                f"twin: {kind} {name!r} is {there} in the small network and {here} in the large "
                "one, so what was tried there says nothing here: give both the same depth, and "
                "widths that are one (or equal) in both or in neither"
            )
