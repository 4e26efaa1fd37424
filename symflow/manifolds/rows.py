"""Weight vectors of which some coordinates are the rows of units, each with a space of its own."""

from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from symflow.errors import ShapeError
from symflow.manifolds.base import WeightManifold


class RowManifold(WeightManifold):
    """A product: every row of some families of rows in a curved space, the rest Euclidean.

    Subclasses say how far rows are from each other, so that units can be assigned.

    Parameters
    ----------
    dimension
        Number of coordinates.
    rows
        For each family of rows, an index tensor (n, d): coordinate d of row n in the flat vector.
        No coordinate may occur twice.
    counted
        How many coordinates, from the first, count in norms; all if None.
    """

    def __init__(
        self, dimension: int, rows: Sequence[Int[Tensor, "_ _"]], counted: int | None = None
    ) -> None:
        WeightManifold.__init__(self, dimension, counted)
        self.shapes = [tuple(index.shape) for index in rows]
        taken = torch.cat([torch.zeros(0, dtype=torch.long), *(i.reshape(-1) for i in rows)])
        free = torch.ones(dimension, dtype=torch.bool).index_fill_(0, taken, False)
        order = torch.cat([taken, free.nonzero().squeeze(-1)])
        if len(order) != dimension:
            raise ShapeError(f"rows of a {self.name} overlap: a coordinate occurs twice")
        self.order: Tensor
        self.back: Tensor
        self.register_buffer("order", order)
        self.register_buffer("back", order.argsort())
        self._spans = _contiguous(rows)
        self._places, self._lengths = _in_flat_order(self._spans or [], self.shapes, free)

    @property
    def rows(self) -> list[Int[Tensor, "n d"]]:
        """The coordinates of the rows of each family."""
        sizes = [n * d for n, d in self.shapes]
        parts = self.order[: sum(sizes)].split(sizes)
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    @abstractmethod
    def between(
        self, k: int, x: Float[Tensor, "*#batch D"], y: Float[Tensor, "*#batch D"]
    ) -> tuple[Float[Tensor, "*batch n n"], Float[Tensor, "*batch n n"]]:
        """Return squared distances of all rows of family ``k`` of ``x`` to all those of ``y``.

        The second are those to the rows of ``y`` with the signs that a sign of their unit gives.
        """

    @abstractmethod
    def slopes(self, x: Float[Tensor, "*batch D"], y: Float[Tensor, "*batch D"]) -> list[Tensor]:
        """Return minus the slopes of squared distances by inner products of rows, by family.

        Each (*batch, n, d): coordinates of one row may belong to different inner products.
        """

    def split(self, x: Float[Tensor, "*#batch D"]) -> tuple[list[Tensor], Tensor]:
        """Return the families of rows (*batch, n, d) and the Euclidean rest (*batch, m)."""
        if self._spans is None:
            packed = x.index_select(-1, self.order.to(x.device))
            sizes = [n * d for n, d in self.shapes]
            *parts, rest = packed.split([*sizes, self.dimension - sum(sizes)], dim=-1)
            return [p.unflatten(-1, s) for p, s in zip(parts, self.shapes, strict=True)], rest
        pieces = dict(zip(self._places, x.split(self._lengths, dim=-1), strict=True))
        rows = [
            torch.cat([pieces[k, j].unflatten(-1, (n, -1)) for j in range(len(spans))], dim=-1)
            for k, (spans, (n, _)) in enumerate(zip(self._spans, self.shapes, strict=True))
        ]
        rest = [pieces[place] for place in self._places if place[0] == len(rows)]
        return rows, torch.cat(rest, dim=-1) if rest else x[..., :0]

    def join(self, rows: Sequence[Tensor], rest: Tensor) -> Float[Tensor, "*#batch D"]:
        """Put rows and rest back into flat vectors."""
        if self._spans is None:
            packed = torch.cat([*(r.flatten(-2) for r in rows), rest], dim=-1)
            return packed.index_select(-1, self.back.to(packed.device))
        pieces: dict[tuple[int, int], Tensor] = {}
        for k, (spans, r) in enumerate(zip(self._spans, rows, strict=True)):
            for j, part in enumerate(r.split([width for _, width in spans], dim=-1)):
                pieces[k, j] = part.flatten(-2)
        own = [place for place in self._places if place[0] == len(rows)]
        lengths = [m for place, m in zip(self._places, self._lengths, strict=True) if place in own]
        pieces |= zip(own, rest.split(lengths, dim=-1) if own else (), strict=True)
        return torch.cat([pieces[place] for place in self._places], dim=-1)

    def _split_like(self, x: Tensor, y: Tensor) -> tuple[tuple[list[Tensor], Tensor], ...]:
        x, y = torch.broadcast_tensors(x, y)
        return self.split(x), self.split(y)


def _contiguous(rows: Sequence[Tensor]) -> list[list[tuple[int, int]]] | None:
    """Cut the columns of every family into runs that lie in the flat vector as one block each.

    A run (start, width) of n rows takes up ``start`` to ``start + n * width``, as the rows of a
    linear map do. Blocks are copied, not gathered: thirty times faster on the CPU. None if a
    family has a column that is in no such run.
    """
    found: list[list[tuple[int, int]]] = []
    for index in rows:
        n, d = index.shape
        ahead = index[:, 1:] - index[:, :-1] == 1
        cuts = [0, *((~ahead.all(0)).nonzero().squeeze(-1) + 1).tolist(), d]
        runs = [(int(index[0, a]), b - a) for a, b in pairwise(cuts)]
        for (start, width), a in zip(runs, cuts, strict=False):
            block = torch.arange(start, start + n * width).reshape(n, width)
            if not torch.equal(index[:, a : a + width].cpu(), block):
                return None
        found.append(runs)
    return found


def _in_flat_order(
    spans: list[list[tuple[int, int]]], shapes: Sequence[tuple[int, ...]], free: Tensor
) -> tuple[list[tuple[int, int]], list[int]]:
    """List all blocks as (family, run) in the order of the flat vector, with their lengths.

    Runs of free coordinates count as those of one more family.
    """
    blocks = [
        (start, (k, j), shapes[k][0] * width)
        for k, runs in enumerate(spans)
        for j, (start, width) in enumerate(runs)
    ]
    at = free.nonzero().squeeze(-1).tolist()
    begins = [i for i, c in enumerate(at) if i == 0 or c != at[i - 1] + 1]
    for j, (a, b) in enumerate(pairwise([*begins, len(at)])):
        blocks.append((at[a], (len(spans), j), b - a))
    blocks.sort()
    return [place for _, place, _ in blocks], [length for *_, length in blocks]
