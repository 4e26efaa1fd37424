"""Coordinate ascent over permutations: a few operations for each step, whatever the leaves.

The same ascent as with :class:`symflow.align.costs.Contraction`, for one pair of networks under the
symmetry met most often. For many pairs together it is no faster: there solving takes the time.
"""

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from symflow.align.base import Found, Status, objective
from symflow.align.stacks import Layout, Rows
from symflow.arch import Symmetry
from symflow.groups import Permutation
from symflow.numerics import tolerance

# From this size on, and where at most this part of the places is the best for any unit, so many
# rounds of prices go before an assignment.
_WIDE, _CROWDED, _ROUNDS = 48, 0.3, 6


@final
class Ascent:
    """Coordinate ascent for one pair of networks.

    Parameters
    ----------
    symmetry, layout
        A symmetry, and how its leaves are laid out.
    w0, w1
        Flat weights (1, D).
    max_sweeps
        Give up after so many passes over all axes.
    """

    def __init__(
        self, symmetry: Symmetry, layout: Layout, w0: Tensor, w1: Tensor, max_sweeps: int
    ) -> None:
        self.symmetry, self.layout, self.max_sweeps = symmetry, layout, max_sweeps
        self.w0, self.w1 = w0, w1
        left, right = (
            w[0].index_select(0, layout.index).split_with_sizes(layout.sizes) for w in (w0, w1)
        )
        # Rows of w0 and w1, those that no other axis moves and the others; products of the first.
        pieces = [
            (x.view(-1, n), y.view(-1, n))
            for x, y, n in zip(left, right, layout.columns, strict=True)
        ]
        self._free, self._others = pieces[::2], pieces[1::2]
        self._fixed = [x.T @ y for x, y in self._free]
        # The last product of each axis, and the rows of w1 that are in it.
        self._last: list[tuple[Tensor, Tensor | None]] = []

    def run(self, start: str, generator: torch.Generator) -> Found:
        """Ascend from one of the starts of :class:`symflow.WeightMatching`."""
        stacks = self.layout.stacks
        self._last = [(c, None) for c in self._fixed]
        g, stale = self.layout.identity.clone(), set(range(len(stacks)))
        parts = g.split_with_sizes(self.layout.units)
        for k, s in enumerate(stacks):
            if start == "identity" or not (s.widths or s.known.count):
                continue
            c = self._costs(k, g, s.known)
            if start == "random":
                c = c + self._redrawn(k, generator)
            elif s.known is s.rows:
                stale.remove(k)  # all that this axis depends on was there
            parts[k].copy_(best(s.group, c))
        return self._climb(g, parts, stale)

    def _climb(self, g: Tensor, parts: Sequence[Tensor], stale: set[int]) -> Found:
        """Solve for each axis that is ``stale``: something has moved since it was solved for."""
        stacks, gain_at_least = self.layout.stacks, tolerance(self.w1.dtype).gain
        gained = self.w1.new_zeros(1)
        gains, status = [gained], Status.SWEEP_LIMIT
        for _ in range(self.max_sweeps):
            for k, s in enumerate(stacks):
                if k not in stale:
                    continue
                stale.remove(k)
                c, old = self._costs(k, g, s.rows), parts[k]
                new = best(s.group, c, old)
                if torch.equal(new, old):
                    continue
                after, before = (c.gather(1, x[:, None]).sum(0) for x in (new, old))
                if not bool(after - before > gain_at_least * after.abs()):
                    continue
                old.copy_(new)
                gained = gained + (after - before)
                stale |= s.neighbours
            gains.append(gained)
            if not stale:
                status = Status.CONVERGED
                break
        weights = self._moved(g, parts)
        end = objective(self.symmetry, self.w0, weights)
        element = {s.name: part[None] for s, part in zip(stacks, parts, strict=True)}
        return Found(element, end - (gained - torch.stack(gains)), status, weights=weights)

    def _costs(self, k: int, g: Tensor, rows: Rows) -> Float[Tensor, "n n"]:
        """Contract an axis over these rows, beside those that are fixed.

        Only rows are multiplied that were not there the last time, or have moved since.
        """
        left, right = self._others[k]
        at = rows.of(g)
        c, before = self._last[k]
        done = 0
        if before is not None:
            done = before.shape[0]
            moved = (at[:done] != before).nonzero().squeeze(1)
            if 2 * moved.shape[0] > done:
                c, done = self._fixed[k], 0
            elif moved.shape[0]:
                new = right.index_select(0, at[moved]).sub_(right.index_select(0, before[moved]))
                c = c.addmm(left.index_select(0, moved).T, new)
        if done < rows.count:
            c = c.addmm(left[done : rows.count].T, right.index_select(0, at[done:]))
        self._last[k] = c, at
        return c

    def _redrawn(self, k: int, generator: torch.Generator) -> Tensor:
        """Return what random factors on the coordinates of fixed axes change in the costs."""
        left, right = self._free[k]
        factors = [torch.rand(n, generator=generator) for n in self.layout.stacks[k].widths]
        if not factors:
            return self._fixed[k].new_zeros(())
        factor = torch.cat(factors).to(left)[:, None] * 2 - 1
        return (left * factor).T @ right

    def _moved(self, g: Tensor, parts: Sequence[Tensor]) -> Float[Tensor, "1 D"]:
        """Return the second network where the element takes it."""
        w, found = self.w1[0], self.w1.clone()
        place, begin, unit = self.layout.vectors
        found[0].index_copy_(0, place, w.index_select(0, g.index_select(0, unit).add_(begin)))
        sources, targets = (x.split_with_sizes(self.layout.leaves) for x in (w, found[0]))
        for number, shape, dims in self.layout.arrays:
            x = sources[number].view(shape)
            for dim, k in dims[:-1]:
                x = x.index_select(dim, parts[k])
            dim, k = dims[-1]  # straight to its place
            torch.index_select(x, dim, parts[k], out=targets[number].view(shape))
        return found


def best(
    group: Permutation,
    c: Float[Tensor, "n n"],
    g: Int[Tensor, " n"] | None = None,
) -> Int[Tensor, " n"]:
    """Solve the assignment problem exactly from a guess ``g`` at its solution.

    Where a few places are the best for nearly all units, as where rows and columns are larger than
    one another by factors, places get prices: what others would gain there (shortest paths, by
    Bellman and Ford), from g or, if None, from large units to large ones. They leave the solution
    as it is, and the solver little to do; if no price rises any more, g is the solution.

    Examples
    --------
    >>> large = torch.arange(64.0)
    >>> found = best(Permutation(64), large[:, None] * large.flip(0))
    >>> bool((found == torch.arange(63, -1, -1)).all())
    True
    """
    if group.size < _WIDE:
        return group.nearest(c)
    liked = torch.zeros_like(c[0]).scatter_(0, c.argmax(1), 1)
    if float(liked.mean()) > _CROWDED:
        return group.nearest(c)
    start = _by_size(c) if g is None else g
    gain = c - c.gather(1, start[:, None])
    prices, room = torch.zeros_like(gain[0]), torch.empty_like(gain)
    for _ in range(_ROUNDS):
        before, prices = prices, torch.add(gain, prices[start, None], out=room).amax(0)
        if torch.equal(before, prices):
            return start
    return group.nearest(c.double() - prices.double())


def _by_size(c: Tensor) -> Tensor:
    """Give the unit with the largest row the one with the largest column, and so on."""
    rows, columns = c.sum(1).argsort(), c.sum(0).argsort()
    return torch.empty_like(rows).scatter_(0, rows, columns)
