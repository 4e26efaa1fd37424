"""Weight matching: coordinate ascent over axes with each group's exact oracle.

Ainsworth, Hayase and Srinivasa (Git Re-Basin, 2023), for any compact group, batched over networks,
with starts that make the result the same wherever on their orbits the networks lie.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.align.ascent import Ascent
from symflow.align.base import (
    Aligner,
    Alignment,
    Found,
    Status,
    better,
    broadcast,
    objective,
    require_compact,
)
from symflow.align.costs import Contraction, inner_product, nearest
from symflow.align.stacks import layout
from symflow.arch import Axis, Element, Symmetry
from symflow.errors import ShapeError
from symflow.groups import map_element, repeated
from symflow.numerics import tolerance

# Up to so many learnable weights a second start is tried by default.
_FEW = 2**16


@final
@dataclass(frozen=True)
class WeightMatching(Aligner):
    """Maximise the inner product of two networks over the compact group, axis by axis.

    Each step contracts everything on one axis and solves for that axis exactly (assignment for
    permutations, with signs chosen inside); the objective never falls, and the end is a fixed point
    where no single axis can be improved. The problem as a whole is NP-hard: the result is a lower
    bound of the greatest objective.

    Parameters
    ----------
    starts
        Where ascents begin; the best result is kept, the first among equals.
        ``"sequential"``: match each axis on its incoming weights, given the axes before it.
        ``"random"``: the same with random factors on the coordinates of fixed axes.
        ``"identity"``: the networks as they are; *not* the same everywhere on an orbit, so
        ``Quotient.distance`` never uses it. By default the first two, but for networks of more than
        65,536 learnable weights the first alone: to begin again costs as much there, and gained
        nothing between networks as initialised (``benchmarks/align.py``). Between trained ones it
        may gain: then give both.
    max_sweeps
        Give up improving after so many passes over all axes.
    seed
        Of the random factors.

    Examples
    --------
    >>> import symflow
    >>> arch = symflow.mlp([3, 8, 2], "tanh")
    >>> generator = torch.Generator().manual_seed(0)
    >>> w = torch.randn(arch.dimension, generator=generator)
    >>> moved = arch.symmetry.act(arch.symmetry.random(generator=generator, like=w), w)
    >>> torch.allclose(WeightMatching()(arch.symmetry, w, moved).weights, w)
    True
    """

    starts: Sequence[str] | None = None
    max_sweeps: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.starts is None:
            return
        if not self.starts or set(self.starts) - {"sequential", "random", "identity"}:
            raise ShapeError(
                "starts must be one or more of 'sequential', 'random', 'identity'; got "
                f"{self.starts!r}"
            )

    def __call__(
        self, symmetry: Symmetry, w0: Float[Tensor, "*#batch D"], w1: Float[Tensor, "*#batch D"]
    ) -> Alignment:
        """Align every pair of the broadcast batch; O(sweeps x (weights x width + width^3)) each."""
        require_compact(symmetry)
        began = time.perf_counter()
        batch = broadcast(w0.shape[:-1], w1.shape[:-1])
        right = w1.detach().expand(*batch, w1.shape[-1]).reshape(-1, w1.shape[-1])
        left = w0.detach().reshape(-1, w0.shape[-1])
        if left.shape[0] > 1:
            left = w0.detach().expand(*batch, w0.shape[-1]).reshape(-1, w0.shape[-1])
        found = self._search(symmetry, left, right)
        return found.reshape(symmetry, w0, w1, seconds=time.perf_counter() - began)

    def _search(self, symmetry: Symmetry, w0: Tensor, w1: Tensor) -> Found:
        """Ascend from every start; ``w0`` may be one network for all."""
        if not len(w1):
            return _nothing(symmetry, w1)
        starts = self._starts(symmetry)
        plan = layout(symmetry) if len(w0) == len(w1) == 1 and w1.device.type == "cpu" else None
        if plan is not None:
            ascent = Ascent(symmetry, plan, w0, w1, self.max_sweeps)
            return _best([ascent.run(start, self._generator(k)) for k, start in enumerate(starts)])
        problem = Contraction(symmetry, w0, w1)
        return _best([self._ascend(problem, w0, w1, k) for k in range(len(starts))])

    def _starts(self, symmetry: Symmetry) -> Sequence[str]:
        if self.starts is not None:
            return self.starts
        few = symmetry.num_parameters <= _FEW
        return ("sequential", "random") if few else ("sequential",)

    def ascend_from(
        self,
        symmetry: Symmetry,
        w0: Float[Tensor, "*#batch D"],
        w1: Float[Tensor, "*#batch D"],
        element: Element,
    ) -> Alignment:
        """Ascend from a given element (*batch) instead of the starts: polish what another found."""
        require_compact(symmetry)
        began = time.perf_counter()
        batch = broadcast(w0.shape[:-1], w1.shape[:-1])
        left, right = (
            w.detach().expand(*batch, w.shape[-1]).reshape(-1, w.shape[-1]) for w in (w0, w1)
        )
        flat = {
            a.name: map_element(
                partial(_rows, batch, len(symmetry.batch_shape(a, element[a.name]))),
                element[a.name],
            )
            for a in symmetry.axes
        }
        found = self._climb(Contraction(symmetry, left, right), left, right, flat)
        return found.reshape(symmetry, w0, w1, seconds=time.perf_counter() - began)

    def _ascend(self, problem: Contraction, w0: Tensor, w1: Tensor, k: int) -> Found:
        return self._climb(problem, w0, w1, *self._start(problem, w1, k))

    def _climb(
        self,
        problem: Contraction,
        w0: Tensor,
        w1: Tensor,
        element: Element,
        settled: frozenset[str] = frozenset(),
    ) -> Found:
        """Ascend from an element; the axes ``settled`` are best there, given the others."""
        symmetry = problem.symmetry
        gained = w1.new_zeros(len(w1))
        gains = [gained]
        every = torch.arange(len(w1), device=w1.device)
        stale = {a.name: every for a in symmetry.axes if a.name not in settled}
        status = Status.CONVERGED if not symmetry.axes else Status.SWEEP_LIMIT
        for _ in range(self.max_sweeps):
            for axis in symmetry.axes:
                rows = stale.pop(axis.name, every[:0])
                if len(rows) == 0:
                    continue
                found, gain, scale = _step(problem, axis, element, rows)
                # Exact steps never lose; linearised ones (an axis twice in a leaf) and ties may.
                rise = gain > tolerance(w1.dtype).gain * scale
                if not bool(rise.any()):
                    continue
                moved = rows[rise]
                element = element | {
                    name: map_element(partial(_put, moved, rise), element[name], g)
                    for name, g in found.items()
                }
                gained = gained.index_add(0, moved, gain[rise])
                touched = set(problem.neighbours(axis.name))
                if not problem.is_linear(axis.name) or problem.solved_with(axis.name):
                    touched.add(axis.name)
                for other in touched:
                    stale[other] = _union(stale[other], moved) if other in stale else moved
            gains.append(gained)
            if not stale:
                status = Status.CONVERGED
                break
        weights = problem.moved(element, w1)
        end = objective(symmetry, w0, weights)
        history = end - (gained - torch.stack(gains))
        return Found(element, history, status, weights=weights)

    def _start(self, problem: Contraction, w1: Tensor, k: int) -> tuple[Element, frozenset[str]]:
        """Return where an ascent begins, and the axes that are best there, given the others."""
        symmetry = problem.symmetry
        start = self._starts(symmetry)[k]
        element = {name: repeated(g, len(w1)) for name, g in symmetry.identity(like=w1).items()}
        if start == "identity":
            return element, frozenset()
        weights = self._factors(problem, k) if start == "random" else None
        known: set[str] = set()
        settled: set[str] = set()
        rows = torch.arange(len(w1), device=w1.device)
        for axis in symmetry.axes:
            element |= problem.best(axis.name, element, rows, known, weights)
            if (
                weights is None
                and _is_exact(problem, axis)
                and problem.neighbours(axis.name) <= known
            ):
                settled.add(axis.name)
            known.add(axis.name)
        return element, frozenset(settled)

    def _factors(self, problem: Contraction, k: int) -> dict[str, Tensor]:
        """Draw one positive factor for each fixed coordinate: the same for all units."""
        generator = self._generator(k)
        return {
            place.leaf.name: torch.rand(problem.width(place), generator=generator) * 2
            for places in problem.places.values()
            for place in places
            if not place.others
        }

    def _generator(self, k: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1009 + k)


def _rows(batch: tuple[int, ...], own: int, part: Tensor) -> Tensor:
    shape = part.shape[own:]
    return part.expand(*batch, *shape).reshape(-1, *shape)


def _best(ends: Sequence[Found]) -> Found:
    """Keep the best of several ascents; converged only if every one is, whichever is kept."""
    limited = [x.status for x in ends if x.status is not Status.CONVERGED]
    return replace(reduce(better, ends), status=(limited or [Status.CONVERGED])[0])


def _is_exact(problem: Contraction, axis: Axis) -> bool:
    """Whether a step of this axis alone finds its best, and its costs tell what that gains."""
    return axis.over is None and not problem.solved_with(axis.name) and problem.is_linear(axis.name)


def _union(a: Tensor, b: Tensor) -> Tensor:
    return a if a is b or len(a) == 1 == len(b) else torch.cat([a, b]).unique()


def _put(moved: Tensor, rise: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Replace the elements of some networks; ``rise`` is which of the new ones."""
    if len(moved) == len(old) == len(new):
        return new.to(old.dtype)
    return old.index_copy(0, moved, new[rise].to(old.dtype))


def _step(
    problem: Contraction, axis: Axis, element: Element, rows: Tensor
) -> tuple[Element, Tensor, Tensor]:
    """Solve for one axis: its new elements for ``rows``, their gain, and the size of what gains."""
    whole = len(rows) == problem.pairs
    zeros = torch.zeros(len(rows), device=rows.device)
    nothing: tuple[Element, Tensor, Tensor] = ({}, zeros, zeros)
    if _is_exact(problem, axis):
        costs = problem.costs(axis.name, element, rows)
        if not costs:
            return nothing
        new, old = nearest(axis.group, costs), element[axis.name]
        old = old if whole else map_element(lambda part: part[rows], old)
        if isinstance(new, Tensor) and torch.equal(new, old):
            return nothing
        after = inner_product(axis.group, costs, new)
        gain = after - inner_product(axis.group, costs, old)
        return {axis.name: new}, gain, after.abs()
    found = problem.best(axis.name, element, rows)
    names = {axis.name, *found}
    before = problem.value(names, element, rows)
    trial = element | {
        name: map_element(partial(_put, rows, torch.ones_like(rows).bool()), element[name], g)
        for name, g in found.items()
    }
    after = problem.value(names, trial, rows)
    return found, after - before, after.abs()


def _nothing(symmetry: Symmetry, w: Tensor) -> Found:
    """Return the result for no networks."""
    element = {name: repeated(g, 0) for name, g in symmetry.identity(like=w).items()}
    return Found(element, w[None, :, 0], Status.CONVERGED, weights=w)
