"""Permutations of blocks of units, with a group inside each block: a wreath product."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.errors import ShapeError
from symflow.groups.base import CompactGroup, map_element, reorder, repeated
from symflow.groups.permutation import assignment, invert

Pair = tuple[Tensor, Any]


@final
@dataclass(frozen=True)
class Heads(CompactGroup[Pair]):
    """Equal blocks of an axis change places, and ``inner`` acts in each of them on its own.

    An element is a pair: an index of blocks (*batch, m), and elements of ``inner`` (*batch, m, ...)
    that act before the blocks are moved. What tracing finds has an axis for the blocks and others
    over it instead; this is the same as one group, for axes of the user's own.

    Parameters
    ----------
    size
        Number of units, of all blocks together.
    inner
        Acts on the units of one block; its size divides ``size``.

    Examples
    --------
    >>> from symflow.groups import Sign
    >>> group = Heads(4, Sign(2))
    >>> g = torch.tensor([1, 0]), torch.tensor([[1.0, 1.0], [-1.0, 1.0]])
    >>> group.act(g, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    tensor([-3.,  4.,  1.,  2.])
    """

    size: int
    inner: CompactGroup[Any]

    def __post_init__(self) -> None:
        if self.size % self.inner.size:
            raise ShapeError(f"blocks of {self.inner} do not fill an axis of {self.size} units")

    @property
    def count(self) -> int:
        """Number of blocks."""
        return self.size // self.inner.size

    @property
    def dimension(self) -> int:
        """That of the inner group, for each block."""
        return self.count * self.inner.dimension

    @property
    def log_components(self) -> float:
        """The logarithm of m! times those of the inner group, for each block."""
        return math.lgamma(self.count + 1) + self.count * self.inner.log_components

    def identity(self, *, like: Tensor) -> Pair:
        """Return blocks in place, each as it is."""
        index = torch.arange(self.count, device=like.device)
        return index, repeated(self.inner.identity(like=like), self.count)

    def compose(self, g: Pair, h: Pair) -> Pair:
        """Multiply: the blocks of ``h`` move before the inner elements of ``g`` act."""
        shape = torch.broadcast_shapes(g[0].shape, h[0].shape)
        first, second = g[0].expand(shape), h[0].expand(shape)
        moved = reorder(self._lifted(g[1], shape), invert(second))
        return second.gather(-1, first), self.inner.compose(moved, h[1])

    def inverse(self, g: Pair) -> Pair:
        """Invert the inner elements, carried to where their blocks have gone."""
        return invert(g[0]), reorder(self.inner.inverse(g[1]), g[0])

    def random(
        self, *, generator: torch.Generator, like: Tensor, batch: tuple[int, ...] = ()
    ) -> Pair:
        """Draw blocks and inner elements independently (Haar)."""
        keys = torch.rand(*batch, self.count, generator=generator, device=generator.device)
        inner = self.inner.random(generator=generator, like=like, batch=(*batch, self.count))
        return keys.argsort(-1).to(like.device), inner

    def act(self, g: Pair, x: Tensor, *, dim: int = -1, degree: int = 1) -> Tensor:
        """Act in each block, then move the blocks."""
        batch = g[0].ndim - 1
        pairs = zip(g[0].shape[:-1], x.shape, strict=False)
        if (
            dim >= 0
            or x.ndim + dim < batch
            or x.shape[dim] != self.size
            or any(1 not in (m, n) and m != n for m, n in pairs)
        ):
            raise ShapeError(
                f"{self} with batch shape {tuple(g[0].shape[:-1])} does not act on dim {dim} of a "
                f"tensor of shape {tuple(x.shape)}"
            )
        blocks = x.unflatten(dim, (self.count, self.inner.size)).movedim(dim - 1, batch)
        blocks = self.inner.act(g[1], blocks, dim=dim, degree=degree)
        index = g[0].reshape(*g[0].shape, *(1,) * (blocks.ndim - batch - 1))
        return (
            torch.take_along_dim(blocks, index, batch).movedim(batch, dim - 1).flatten(dim - 1, dim)
        )

    def nearest(self, c: Float[Tensor, "*batch n n"]) -> Pair:
        """Assign blocks at the supports of the inner group, then solve inside of those chosen."""
        return self.nearest_by_degree({1: c})

    def nearest_by_degree(self, costs: Mapping[int, Float[Tensor, "*batch n n"]]) -> Pair:
        """Do the same for costs of several degrees, which the inner group may tell apart."""
        blocks = {p: self._blocks(c) for p, c in costs.items()}
        index = assignment(self.inner.support_by_degree(blocks))
        at = index[..., None, None, None]
        chosen = {p: torch.take_along_dim(b, at, -3).squeeze(-3) for p, b in blocks.items()}
        # Solved where the blocks have come to; elements stand where they come from.
        return index, reorder(self.inner.nearest_by_degree(chosen), invert(index))

    def support(self, c: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch"]:
        """Return the value of the best assignment of blocks."""
        return self.support_by_degree({1: c})

    def support_by_degree(
        self, costs: Mapping[int, Float[Tensor, "*batch n n"]]
    ) -> Float[Tensor, "*batch"]:
        """Do the same for costs of several degrees."""
        values = self.inner.support_by_degree({p: self._blocks(c) for p, c in costs.items()})
        return values.gather(-1, assignment(values)[..., None]).squeeze(-1).sum(-1)

    def _blocks(self, c: Tensor) -> Tensor:
        """View costs (*batch, n, n) by pairs of blocks (*batch, m, m, d, d)."""
        shape = (self.count, self.inner.size)
        return c.unflatten(-1, shape).unflatten(-3, shape).transpose(-3, -2)

    def _lifted(self, inner: Any, shape: torch.Size) -> Any:
        """Give inner elements the batch dimensions of an index."""
        own = len(self.inner.batch_shape(inner))

        def lift(part: Tensor) -> Tensor:
            return part.expand(*shape, *part.shape[own:])

        return map_element(lift, inner)
