"""Where axes are in leaves, and leaves seen by the units of an axis."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from symflow.arch import Element, Leaf
from symflow.groups import Group, monomial

Costs = dict[int, Tensor]


@final
@dataclass(frozen=True)
class Place:
    """One dimension of a learnable leaf that runs over an axis."""

    leaf: Leaf
    dim: int

    @cached_property
    def others(self) -> tuple[str, ...]:
        """The axes of the leaf's other dimensions."""
        return tuple(
            d.axis for k, d in enumerate(self.leaf.dims) if k != self.dim and d.axis is not None
        )

    @property
    def degree(self) -> int:
        """How the axis acts there."""
        return self.leaf.dims[self.dim].degree


def ready(place: Place, known: set[str], solved: set[str]) -> bool:
    """Whether all other axes of a leaf are known, but for one that is solved at the same time."""
    return len(set(place.others) & solved) < 2 and set(place.others) <= known | solved


def permutations(plain: set[str], leaf: Leaf) -> tuple[tuple[int, str], ...] | None:
    """Return the dimensions of a leaf, with their axes, if nothing but permutations move it."""
    found = tuple((k, d.axis) for k, d in enumerate(leaf.dims) if d.axis is not None)
    simple = plain.issuperset(axis for _, axis in found)
    return found if simple and not any(d.within is not None for d in leaf.dims) else None


def permute(x: Tensor, dim: int, index: Tensor, rows: Tensor | None = None) -> Tensor:
    """Pick along a dimension of x (N, ...) by an index (N, n): whole rows where that can be.

    Or of the networks ``rows`` of x, which the index is for.
    """
    if x.shape[0] == 1 == index.shape[0]:
        return x.index_select(dim, index[0])
    if dim == 1 and (rows is not None or len(x) == len(index)):
        start = torch.arange(len(x), device=x.device) if rows is None else rows
        at = (index + start[:, None] * x.shape[1]).flatten()
        return x.flatten(0, 1).index_select(0, at).view(len(index), *x.shape[1:])
    if rows is not None and len(rows) < len(x):
        x = x[rows]
    at = index.reshape(len(index), *(1,) * (dim - 1), -1, *(1,) * (x.ndim - dim - 1))
    return torch.take_along_dim(x, at, dim)


def differ(before: Element, now: Element, found: Tensor) -> Tensor:
    """Which networks' elements are others than before, or are ``found`` to be already (N,)."""
    for name, g in now.items():
        for old, new in zip(_tensors(before[name]), _tensors(g), strict=True):
            if old is not new:
                found = found | (old != new)[:, None].flatten(1).any(1)
    return found


def _tensors(g: Any) -> list[Tensor]:
    """Return the tensors of an element."""
    return [x for part in g for x in _tensors(part)] if isinstance(g, tuple) else [g]


def rows_of(x: Tensor, k: int) -> Tensor:
    """View a leaf (N, ...) as (N, n, coordinates of one unit)."""
    rest = math.prod(x.shape[1:]) // max(1, x.shape[k + 1])  # -1 has no meaning without networks
    return x.movedim(k + 1, 1).reshape(len(x), x.shape[k + 1], rest)


def units_of(x: Tensor, place: Place, *, flat: bool) -> Tensor:
    """View a leaf by the units of an axis and of the one it is over: (N, m, n, rest)."""
    within = place.leaf.dims[place.dim].within or 0
    moved = x.movedim([within + 1, place.dim + 1], [1, 2])
    moved = moved.reshape(*moved.shape[:3], math.prod(moved.shape[3:]))
    return moved.flatten(1, 2) if flat else moved


def chosen(c: Tensor, index: Tensor) -> Tensor:
    """Pick from (N, n, n, m, m) the blocks of units i and index_i."""
    at = index[..., None, None, None].expand(*index.shape, 1, *c.shape[-2:])
    return c.gather(2, at).squeeze(2)


def index_of(group: Group[Any], g: Any) -> Tensor:
    """Where an element takes each unit from; each from itself if it permutes none."""
    found = monomial(group, g)
    if found is None or found[0] is None:
        size = group.size
        return torch.arange(size).expand(*group.batch_shape(g), size)
    return found[0]


def added(a: Costs, b: Costs) -> Costs:
    """Add costs degree by degree."""
    total = dict(a)
    for degree, c in b.items():
        total[degree] = total[degree] + c if degree in total else c
    return total
