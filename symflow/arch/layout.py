"""What a point of weight space is made of: leaves, their dimensions, the axes these run over."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from symflow.groups import Group


@final
@dataclass(frozen=True)
class Dim:
    """One dimension of a leaf (or of a value inside the network).

    Attributes
    ----------
    axis
        Name of the axis it runs over; None if nothing acts on it.
    degree
        How the axis' group acts: +1 by A, -1 by A^-T, p by the p-th power of a diagonal A (so 0
        means: permuted, not scaled).
    outer, inner
        The axis is repeated: the dimension has size ``outer * n * inner`` and its coordinate
        ``(o * n + i) * inner + k`` belongs to unit i. A flatten makes such dimensions.

    Examples
    --------
    >>> Dim("h1", 1).dual()
    Dim(axis='h1', degree=-1, outer=1, inner=1)
    """

    axis: str | None = None
    degree: int = 0
    outer: int = 1
    inner: int = 1

    def dual(self) -> "Dim":
        """Return the dimension that is contracted with this one: the degree changes its sign."""
        return replace(self, degree=-self.degree)


FIXED = Dim()


@final
@dataclass(frozen=True)
class Segments:
    """A dimension made of several, one after the other, as a concatenation makes it.

    Attributes
    ----------
    parts
        What each part runs over, and how many coordinates it has.

    Examples
    --------
    >>> Segments(((Dim("h1", 1), 4), (Dim("h2", 1), 3))).size
    7
    """

    parts: tuple[tuple[Dim, int], ...]

    @property
    def size(self) -> int:
        """Number of coordinates."""
        return sum(size for _, size in self.parts)


Label: TypeAlias = "Dim | Segments"


def each(function: Callable[[Dim], Dim], label: Label) -> Label:
    """Apply a function to a dimension, or to all parts of one.

    Examples
    --------
    >>> each(Dim.dual, Segments(((Dim("h1", 1), 4),))).parts[0][0].degree
    -1
    """
    if isinstance(label, Segments):
        return Segments(tuple((function(dim), size) for dim, size in label.parts))
    return function(label)


@final
@dataclass(frozen=True)
class Axis:
    """Units that a group moves together.

    Attributes
    ----------
    name
        ``h1``, ``h2``, ... from the input to the output.
    size
        Number of units.
    group
        What acts on them without changing the network's function.
    reason
        Where the axis comes from and why this group acts, in words.

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


@final
@dataclass(frozen=True)
class Leaf:
    """A parameter or floating point buffer, and where it stands in the flat vector.

    A parameter that takes a concatenation of several axes in (or gives one out) is cut into one
    leaf for each of them, so that each dimension of a leaf runs over one axis.

    Attributes
    ----------
    name
        Its key in the state dict; for a part of a parameter with its region, as in
        ``conv.weight[:, 0:64]``.
    shape
        Its shape.
    dims
        One :class:`Dim` for each of its dimensions.
    offset
        Index of its first coordinate in the flat vector.
    learnable
        True for parameters. Buffers move along with the axes but never count in a norm.
    region
        For a part of a parameter: where it begins and ends in each dimension.

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

    @property
    def key(self) -> str:
        """Its key in the state dict, or that of the parameter that it is a part of."""
        return self.name.partition("[")[0] if self.region else self.name

    def of(self, parameter: Tensor) -> Tensor:
        """View this leaf in its parameter (*batch, *parameter.shape)."""
        for k, (begin, end) in enumerate(self.region):
            parameter = parameter.narrow(k - len(self.region), begin, end - begin)
        return parameter

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


def cut(name: str, shape: tuple[int, ...], labels: tuple[Label, ...]) -> list[Leaf]:
    """Cut a parameter into leaves each of whose dimensions runs over one axis.

    Offsets and whether it is learnable are left to the caller.

    Examples
    --------
    >>> label = Segments(((Dim("h1", -1), 2), (Dim("h2", -1), 3)))
    >>> [leaf.name for leaf in cut("w", (4, 5), (FIXED, label))]
    ['w[:, 0:2]', 'w[:, 2:5]']
    """
    choices: list[list[tuple[Dim, int, int]]] = []
    for size, label in zip(shape, labels, strict=True):
        at, parts = 0, []
        for dim, n in label.parts if isinstance(label, Segments) else ((label, size),):
            parts.append((dim, at, at + n))
            at += n
        choices.append(parts)
    whole = all(len(parts) == 1 for parts in choices)
    found: list[Leaf] = []
    for chosen in itertools.product(*choices):
        spans = [
            ":" if len(parts) == 1 else f"{begin}:{end}"
            for parts, (_, begin, end) in zip(choices, chosen, strict=True)
        ]
        found.append(
            Leaf(
                name if whole else f"{name}[{', '.join(spans)}]",
                tuple(end - begin for _, begin, end in chosen),
                tuple(dim for dim, *_ in chosen),
                0,
                region=() if whole else tuple((begin, end) for _, begin, end in chosen),
            )
        )
    return found


def assemble(parts: Sequence[tuple[Leaf, Tensor]], dim: int = 0) -> Tensor:
    """Put the parts of a parameter together again; a whole one is returned as it is.

    Examples
    --------
    >>> label = Segments(((Dim("h1", -1), 2), (Dim("h2", -1), 3)))
    >>> leaves = cut("w", (4, 5), (FIXED, label))
    >>> w = torch.arange(20).reshape(4, 5)
    >>> torch.equal(assemble([(leaf, leaf.of(w)) for leaf in leaves]), w)
    True
    """
    leaf, value = parts[0]
    if len(parts) == 1:
        return value
    begins = sorted({part.region[dim][0] for part, _ in parts})
    rows = [assemble([p for p in parts if p[0].region[dim][0] == b], dim + 1) for b in begins]
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=dim - len(leaf.region))
