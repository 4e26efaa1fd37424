"""All leaves of an axis as one matrix, where plain permutations are all that moves them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
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
class Stack:
    """One axis in the learnable leaves: a row for each coordinate that all its units have.

    First come the rows that no other axis moves, ``widths`` many for each leaf. Behind them row k
    of w0 meets row ``base[k] + stride[k] * g[unit[k]]`` of w1, g being the elements of all axes in
    one vector; the first ``known`` of these depend on axes before this one.

    Attributes
    ----------
    name, group
        Of the axis.
    span
        Its units in g.
    entries, rows
        Its part of the layout of all axes, and how many rows that is.
    widths, known, base, stride, unit
        As above.
    neighbours
        The other axes in these leaves, by number.
    """

    name: str
    group: Permutation
    span: slice
    entries: slice
    rows: int
    widths: tuple[int, ...]
    known: int
    base: Int[Tensor, " M"]
    stride: Int[Tensor, " M"]
    unit: Int[Tensor, " M"]
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
    identity
        The identity of all axes, in one vector.
    vectors
        Flat coordinates of all leaves with a single dimension: where such a leaf begins, and where
        in the vector of all axes' elements the unit stands that is taken.
    arrays
        The other leaves, with the units of the axis of each dimension that has one.
    """

    stacks: tuple[Stack, ...]
    index: Int[Tensor, " entries"]
    identity: Int[Tensor, " units"]
    vectors: tuple[Int[Tensor, " V"], Int[Tensor, " V"], Int[Tensor, " V"]]
    arrays: tuple[tuple[Leaf, tuple[tuple[int, slice], ...]], ...]


@lru_cache(maxsize=4)
def layout(symmetry: Symmetry) -> Layout | None:
    """Lay out the leaves by axes, in O(learnable weights); None where this does not serve.

    It does where each axis has plain permutations, each leaf at most two axes, not the same, and
    there are at most 2,097,152 learnable weights. The last few layouts are kept.

    Examples
    --------
    >>> import symflow
    >>> found = layout(symflow.mlp([3, 4, 5, 2]).symmetry.compact)
    >>> [(x.name, x.widths, x.rows) for x in found.stacks]
    [('h1', (3, 1), 9), ('h2', (1, 2), 7)]
    >>> layout(symflow.mlp([3, 4, 2], "tanh").symmetry) is None    # signs, too
    True
    """
    leaves = [x for x in symmetry.leaves if x.axes]
    groups = [a.group for a in symmetry.axes if a.over is None and isinstance(a.group, Permutation)]
    small = sum(x.size for x in leaves if x.learnable) <= _MOST
    simple = all(len(x.axes) == len(set(x.axes)) <= 2 for x in leaves)
    if not (leaves and small and simple and len(groups) == len(symmetry.axes)):
        return None
    spans: dict[str, slice] = {}
    for axis in symmetry.axes:
        begin = next(reversed(spans.values())).stop if spans else 0
        spans[axis.name] = slice(begin, begin + axis.size)
    stacks: list[Stack] = []
    indices: list[Tensor] = []
    for axis, group in zip(symmetry.axes, groups, strict=True):
        begin = stacks[-1].entries.stop if stacks else 0
        stack, index = _stack(axis.name, group, leaves, spans, begin)
        stacks.append(stack)
        indices.append(index)
    flat = [x for x in leaves if len(x.dims) == 1]
    return Layout(
        tuple(stacks),
        torch.cat(indices).int(),
        torch.cat([torch.arange(group.size) for group in groups]),
        (
            _joined([torch.arange(x.offset, x.offset + x.size) for x in flat]),
            _joined([torch.full((x.size,), x.offset) for x in flat]),
            _joined([_range(spans[x.axes[0]]) for x in flat]),
        ),
        tuple(
            (x, tuple((k, spans[d.axis]) for k, d in enumerate(x.dims) if d.axis is not None))
            for x in leaves
            if len(x.dims) > 1
        ),
    )


def _stack(
    name: str, group: Permutation, leaves: Sequence[Leaf], spans: dict[str, slice], begin: int
) -> tuple[Stack, Tensor]:
    """Lay out one axis; its entries begin at ``begin``."""
    order = list(spans)
    here = [x for x in leaves if x.learnable and name in x.axes]
    alone = [x for x in here if len(x.axes) == 1]
    pairs = [(next(a for a in x.axes if a != name), x) for x in here if len(x.axes) == 2]
    shared = sorted(((order.index(a), x) for a, x in pairs), key=itemgetter(0))
    n, first, known = group.size, 0, 0
    base, stride, unit = [], [], []
    for other, leaf in shared:
        units = _range(spans[order[other]])
        width = leaf.size // n // len(units)
        base.append(first + torch.arange(width).repeat(len(units)))
        stride.append(torch.full((width * len(units),), width))
        unit.append(units.repeat_interleave(width))
        first += width * len(units)
        known = first if other < order.index(name) else known
    widths = tuple(x.size // n for x in alone)
    index = [_entries(x, (name,)) for x in alone]
    index += [_entries(x, (name, order[other])) for other, x in shared]
    rows = sum(widths) + first
    stack = Stack(
        name,
        group,
        spans[name],
        slice(begin, begin + rows * n),
        rows,
        widths,
        known,
        _joined(base),
        _joined(stride),
        _joined(unit),
        frozenset(other for other, _ in shared),
    )
    return stack, _joined(index)


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
