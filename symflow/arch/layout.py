"""What a point of weight space is made of: leaves, their dimensions, the axes these run over."""

import math
from dataclasses import dataclass, replace
from typing import Any, final

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

    Attributes
    ----------
    name
        Its key in the state dict.
    shape
        Its shape.
    dims
        One :class:`Dim` for each of its dimensions.
    offset
        Index of its first coordinate in the flat vector.
    learnable
        True for parameters. Buffers move along with the axes but never count in a norm.

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
