"""All leaves of an axis as one matrix, where plain permutations are all that moves them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from operator import itemgetter
from typing import final

import torch
from jaxtyping import Int
from torch import Tensor

from symflow.arch import Leaf, Symmetry
from symflow.groups import Permutation

# Networks of more learnable weights are not laid out a second time.
_MOST = 2**21


@final
@dataclass(frozen=True, eq=False)
class Rows:
    """Where rows of w0 meet those of w1: row k meets ``base[k] + stride[k] * g[unit[k]]``.

    ``g`` holds the elements of all axes, one behind the other.

    Attributes
    ----------
    base, stride, unit
        As above.
    """

    base: Int[Tensor, " M"]
    stride: Int[Tensor, " M"]
    unit: Int[Tensor, " M"]

    def of(self, g: Int[Tensor, " units"]) -> Int[Tensor, " M"]:
        """Return the row of w1 for each row of w0."""
        return torch.addcmul(self.base, self.stride, g.index_select(0, self.unit))

    def first(self, count: int) -> "Rows":
        """Return the first rows; these themselves if that is all of them."""
        if count == self.count:
            return self
        return Rows(self.base[:count], self.stride[:count], self.unit[:count])

    @cached_property
    def count(self) -> int:
        """How many rows there are."""
        return len(self.base)


@final
@dataclass(frozen=True, eq=False)
class Stack:
    """One axis in the learnable leaves: a row for each coordinate that all its units have.

    First come the rows that no other axis moves, ``widths`` many for each leaf, then the others.

    Attributes
    ----------
    name, group
        Of the axis.
    widths, rows
        As above.
    known
        Those of the rows that depend on axes before this one.
    neighbours
        The other axes in these leaves, by number.
    """

    name: str
    group: Permutation
    widths: tuple[int, ...]
    rows: Rows
    known: Rows
    neighbours: frozenset[int]


@final
@dataclass(frozen=True, eq=False)
class Layout:
    """The stacks of all axes of a symmetry, and how leaves are moved.

    Attributes
    ----------
    stacks
        One for each axis.
    index
        Flat coordinate of each entry of all stacks, one after the other.
    sizes, columns
        The pieces of ``index``, two for each stack, its free rows and its others: how many entries
        they have, and how many units stand in a row.
    identity, units
        The identity of all axes, in one vector, and the size of each.
    vectors
        Flat coordinates of all leaves with a single dimension: where such a leaf begins, and where
        in the vector of all axes' elements the unit stands that is taken.
    leaves, arrays
        The sizes of all leaves; the number and shape of those with more dimensions, and for each
        dimension that has an axis its number.
    """

    stacks: tuple[Stack, ...]
    index: Int[Tensor, " entries"]
    sizes: list[int]
    columns: list[int]
    identity: Int[Tensor, " units"]
    units: list[int]
    vectors: tuple[Int[Tensor, " V"], Int[Tensor, " V"], Int[Tensor, " V"]]
    leaves: list[int]
    arrays: tuple[tuple[int, tuple[int, ...], tuple[tuple[int, int], ...]], ...]


@lru_cache(maxsize=4)
def layout(symmetry: Symmetry) -> Layout | None:
    """Lay out the leaves by axes, in O(learnable weights); None where this does not serve.

    It does where each axis has plain permutations, each leaf at most two axes, not the same, and
    there are at most 2,097,152 learnable weights. The last few layouts are kept.

    Examples
    --------
    >>> import symflow
    >>> found = layout(symflow.mlp([3, 4, 5, 2]).symmetry.compact)
    >>> [(x.name, x.widths, x.rows.count) for x in found.stacks]
    [('h1', (3, 1), 5), ('h2', (1, 2), 4)]
    >>> layout(symflow.mlp([3, 4, 2], "tanh").symmetry) is None    # signs, too
    True
    """
    leaves = [x for x in symmetry.leaves if x.axes]
    groups = [a.group for a in symmetry.axes if a.over is None and isinstance(a.group, Permutation)]
    small = sum(x.size for x in leaves if x.learnable) <= _MOST
    simple = all(len(x.axes) == len(set(x.axes)) <= 2 for x in leaves)
    if not (leaves and small and simple and len(groups) == len(symmetry.axes)):
        return None
    order = [axis.name for axis in symmetry.axes]
    spans: dict[str, slice] = {}
    for axis in symmetry.axes:
        begin = next(reversed(spans.values())).stop if spans else 0
        spans[axis.name] = slice(begin, begin + axis.size)
    found = [_stack(a.name, g, leaves, spans) for a, g in zip(symmetry.axes, groups, strict=True)]
    stacks = tuple(stack for stack, _ in found)
    counts = [(sum(x.widths) * x.group.size, x.rows.count * x.group.size) for x in stacks]
    flat = [x for x in leaves if len(x.dims) == 1]
    return Layout(
        stacks,
        torch.cat([index for _, index in found]),
        [n for pair in counts for n in pair],
        [x.group.size for x in stacks for _ in range(2)],
        torch.cat([torch.arange(group.size) for group in groups]),
        [group.size for group in groups],
        (
            _joined([torch.arange(x.offset, x.offset + x.size) for x in flat]),
            _joined([torch.full((x.size,), x.offset) for x in flat]),
            _joined([_range(spans[x.axes[0]]) for x in flat]),
        ),
        [x.size for x in symmetry.leaves],
        tuple(
            (
                number,
                x.shape,
                tuple((k, order.index(d.axis)) for k, d in enumerate(x.dims) if d.axis is not None),
            )
            for number, x in enumerate(symmetry.leaves)
            if x.axes and len(x.dims) > 1
        ),
    )


def _stack(
    name: str, group: Permutation, leaves: Sequence[Leaf], spans: dict[str, slice]
) -> tuple[Stack, Tensor]:
    """Lay out one axis."""
    order = list(spans)
    here = [x for x in leaves if x.learnable and name in x.axes]
    alone = [x for x in here if len(x.axes) == 1]
    pairs = [(next(a for a in x.axes if a != name), x) for x in here if len(x.axes) == 2]
    shared = sorted(((order.index(a), x) for a, x in pairs), key=itemgetter(0))
    first, known = 0, 0
    base, stride, unit = [], [], []
    for other, leaf in shared:
        units = _range(spans[order[other]])
        width = leaf.size // group.size // len(units)
        base.append(first + torch.arange(width).repeat(len(units)))
        stride.append(torch.full((width * len(units),), width))
        unit.append(units.repeat_interleave(width))
        first += width * len(units)
        known = first if other < order.index(name) else known
    index = [_entries(x, (name,)) for x in alone]
    index += [_entries(x, (name, order[other])) for other, x in shared]
    rows = Rows(_joined(base), _joined(stride), _joined(unit))
    widths = tuple(x.size // group.size for x in alone)
    others = frozenset(other for other, _ in shared)
    return Stack(name, group, widths, rows, rows.first(known), others), _joined(index)


def _entries(leaf: Leaf, axes: tuple[str, ...]) -> Tensor:
    """Flat coordinates of a leaf: the last axis named first, the first one last."""
    at = [next(k for k, d in enumerate(leaf.dims) if d.axis == axis) for axis in axes]
    rest = [k for k in range(len(leaf.dims)) if k not in at]
    index = leaf.offset + torch.arange(leaf.size).reshape(leaf.shape)
    return index.permute(*at[1:], *rest, at[0]).flatten()


def _range(units: slice) -> Tensor:
    return torch.arange(units.start, units.stop)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([torch.empty(0, dtype=torch.long), *parts])
