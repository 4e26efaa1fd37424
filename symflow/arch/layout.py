"""What a point of weight space is made of: leaves, their dimensions, the axes these run over."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from symflow.groups import Group


@final
@dataclass(frozen=True)
class Dim:
    """One dimension of a leaf.

    Attributes
    ----------
    axis
        Name of the axis it runs over; None if nothing acts on it.
    degree
        How the axis' group acts: +1 by A, -1 by A^-T, p by the p-th power of a diagonal A (so 0
        means: permuted, not scaled).
    within
        For an axis over another one: which dimension of the leaf that other one runs over.

    Examples
    --------
    >>> Dim("h1", -1)
    Dim(axis='h1', degree=-1, within=None)
    """

    axis: str | None = None
    degree: int = 0
    within: int | None = None


@final
@dataclass(frozen=True)
class Axis:
    """Units that a group moves together.

    Attributes
    ----------
    name
        ``h1``, ``h2``, ... from the input to the output; ``h1.1``, ``h1.2`` for axes over ``h1``.
    size
        Number of units.
    group
        What acts on them without changing the network's function.
    reason
        Where the axis comes from and why this group acts, in words.
    over
        Name of another axis each of whose units has an element of ``group`` of its own: the units
        inside each attention head, say, over the heads. Together they are a wreath product. An
        element then has the units of that axis as its last batch dimension.

    Examples
    --------
    >>> import symflow
    >>> symflow.mlp([2, 3, 1]).axes[0].reason
    'out of 0; ReLU commutes with permutations and positive scales'
    """

    name: str
    size: int
    group: Group[Any]
    reason: str
    over: str | None = None


@final
@dataclass(frozen=True)
class Leaf:
    """A parameter or floating point buffer, and where it stands in the flat vector.

    A parameter that takes a concatenation of several axes in (or gives one out) is cut into one
    leaf for each of them; a dimension that runs over several axes at once (heads, and the units in
    each) is unflattened: so each dimension of a leaf runs over one axis.

    Attributes
    ----------
    name
        Its key in the state dict; for a part of a parameter with its region (in the ``grid``, if
        there is one), as in ``conv.weight[:, 0:64]``.
    shape
        Its shape, one size for each of its dimensions.
    dims
        One :class:`Dim` for each of its dimensions.
    offset
        Index of its first coordinate in the flat vector.
    learnable
        True for parameters. Buffers move along with the axes but never count in a norm.
    region
        For a part of a parameter: where it begins and ends in each dimension.
    stored
        Shape of this part in the state dict, where that is another than ``shape``.
    grid
        How its parameter is viewed before it is cut into regions, and ``stored`` with it, where
        some dimension is taken apart: queries, keys and values behind each of the heads.
    whole
        Shape of the parameter, where there is a ``grid``.

    Examples
    --------
    >>> Leaf("0.bias", (3,), (Dim("h1", 1),), offset=0).size
    3
    """

    name: str
    shape: tuple[int, ...]
    dims: tuple[Dim, ...]
    offset: int
    learnable: bool = True
    region: tuple[tuple[int, int], ...] = ()
    stored: tuple[int, ...] = ()
    grid: tuple[int, ...] = ()
    whole: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """Its key in the state dict, or that of the parameter that it is a part of."""
        return self.name.partition("[")[0] if self.region else self.name

    def of(self, parameter: Tensor) -> Tensor:
        """View this leaf (*batch, *shape) in its parameter (*batch, *parameter.shape)."""
        if self.grid:
            batch = parameter.shape[: parameter.ndim - len(self.whole)]
            parameter = parameter.reshape(*batch, *self.grid)
        for k, (begin, end) in enumerate(self.region):
            parameter = parameter.narrow(k - len(self.region), begin, end - begin)
        if not self.stored:
            return parameter
        batch = parameter.shape[: parameter.ndim - len(self.stored)]
        return parameter.reshape(*batch, *self.shape)

    @property
    def size(self) -> int:
        """Number of coordinates."""
        return math.prod(self.shape)

    @property
    def span(self) -> slice:
        """Where the leaf's coordinates lie in the flat vector."""
        return slice(self.offset, self.offset + self.size)

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes it carries, in order of its dimensions, repeats included."""
        return tuple(d.axis for d in self.dims if d.axis is not None)


# One dimension of a parameter as its parts, one after the other; each part as its factors
# (size, what runs over it), the last one running fastest.
Factors = tuple[tuple[int, Dim], ...]


def cut(name: str, parts: Sequence[Sequence[Factors]]) -> list[Leaf]:
    """Cut a parameter into leaves each of whose dimensions runs over one axis.

    Offsets, dimensions ``within`` others and whether it is learnable are left to the caller.

    Examples
    --------
    >>> rows, columns = [((4, Dim()),)], [((2, Dim("h1", -1)),), ((3, Dim("h2", -1)),)]
    >>> [leaf.name for leaf in cut("w", [rows, columns])]
    ['w[:, 0:2]', 'w[:, 2:5]']
    """
    choices: list[list[tuple[Factors, int, int]]] = []
    for dimension in parts:
        at, found = 0, []
        for factors in dimension:
            n = math.prod(size for size, _ in factors)
            found.append((factors, at, at + n))
            at += n
        choices.append(found)
    whole = all(len(found) == 1 for found in choices)
    leaves: list[Leaf] = []
    for chosen in itertools.product(*choices):
        spans = [
            ":" if len(found) == 1 else f"{begin}:{end}"
            for found, (_, begin, end) in zip(choices, chosen, strict=True)
        ]
        stored = tuple(end - begin for _, begin, end in chosen)
        flat = [factor for factors, *_ in chosen for factor in factors]
        logical = tuple(size for size, _ in flat)
        leaves.append(
            Leaf(
                name if whole else f"{name}[{', '.join(spans)}]",
                logical,
                tuple(dim for _, dim in flat),
                0,
                region=() if whole else tuple((begin, end) for _, begin, end in chosen),
                stored=() if stored == logical else stored,
            )
        )
    return leaves


def assemble(parts: Sequence[tuple[Leaf, Tensor]]) -> Tensor:
    """Put the parts of a parameter (*batch, *leaf.shape) together again, in its stored shape.

    Examples
    --------
    >>> columns = [((2, Dim("h1", -1)),), ((3, Dim("h2", -1)),)]
    >>> leaves = cut("w", [[((4, Dim()),)], columns])
    >>> w = torch.arange(20).reshape(4, 5)
    >>> torch.equal(assemble([(leaf, leaf.of(w)) for leaf in leaves]), w)
    True
    """
    found = _assemble([(leaf, _as_stored(leaf, value)) for leaf, value in parts], 0)
    first = parts[0][0]
    if not first.grid:
        return found
    return found.reshape(*found.shape[: found.ndim - len(first.grid)], *first.whole)


def _as_stored(leaf: Leaf, value: Tensor) -> Tensor:
    if not leaf.stored:
        return value
    return value.reshape(*value.shape[: value.ndim - len(leaf.shape)], *leaf.stored)


def _assemble(parts: Sequence[tuple[Leaf, Tensor]], dim: int) -> Tensor:
    leaf, value = parts[0]
    if len(parts) == 1:
        return value
    begins = sorted({part.region[dim][0] for part, _ in parts})
    rows = [_assemble([p for p in parts if p[0].region[dim][0] == b], dim + 1) for b in begins]
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=dim - len(leaf.region))
