"""Weight matching: coordinate ascent over axes with each group's exact oracle.

Ainsworth, Hayase and Srinivasa (Git Re-Basin, 2023), for any compact group, batched over networks,
with starts that make the result the same wherever on their orbits the networks lie.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.align.base import Aligner, Alignment, Status, objective, require_compact
from symflow.align.costs import Contraction, where
from symflow.arch import Element, Symmetry
from symflow.errors import ShapeError
from symflow.groups import CompactGroup, map_element
from symflow.numerics import tolerance


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
        ``Quotient.distance`` never uses it.
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

    starts: Sequence[str] = ("sequential", "random")
    max_sweeps: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
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
        batch = torch.broadcast_shapes(w0.shape[:-1], w1.shape[:-1])
        right = w1.detach().expand(*batch, w1.shape[-1]).reshape(-1, w1.shape[-1])
        left = w0.detach().reshape(-1, w0.shape[-1])
        if left.shape[0] > 1:
            left = w0.detach().expand(*batch, w0.shape[-1]).reshape(-1, w0.shape[-1])
        problem = Contraction(symmetry, left, right)
        best = self._ascend(problem, symmetry, left, right, 0)
        for k in range(1, len(self.starts)):
            best = _better(best, self._ascend(problem, symmetry, left, right, k), right.dtype)
        element = {
            k: map_element(lambda part: part.reshape((*batch, *part.shape[1:])), g)
            for k, g in best.element.items()
        }
        weights = symmetry.act(element, w1.expand(*batch, w1.shape[-1]))
        value = objective(symmetry, w0, weights)
        return Alignment(
            element=element,
            weights=weights,
            objective=value,
            history=best.history.reshape(len(best.history), *batch),
            status=best.status,
            seconds=time.perf_counter() - began,
        )

    def _ascend(
        self, problem: Contraction, symmetry: Symmetry, w0: Tensor, w1: Tensor, k: int
    ) -> "_Ascent":
        element = self._start(problem, symmetry, w1, self.starts[k], k)
        value = objective(symmetry, w0, symmetry.act(element, w1))
        history = [value]
        stale = {a.name: torch.ones(len(w1), dtype=torch.bool) for a in symmetry.axes}
        status = Status.CONVERGED if not symmetry.axes else Status.SWEEP_LIMIT
        for _ in range(self.max_sweeps):
            for axis in symmetry.axes:
                rows = stale[axis.name].nonzero().squeeze(-1)
                if len(rows) == 0:
                    continue
                stale[axis.name] = torch.zeros_like(stale[axis.name])
                costs = problem.costs(axis.name, element, rows)
                new = _oracle(axis.group).nearest_by_degree(costs)
                trial = element | {
                    axis.name: map_element(
                        lambda old, part, rows=rows: old.index_copy(0, rows, part.to(old.dtype)),
                        element[axis.name],
                        new,
                    )
                }
                after = objective(symmetry, w0, symmetry.act(trial, w1))
                # Exact steps never lose; linearised ones (an axis twice in a leaf) and ties may.
                rise = after - value > tolerance(w1.dtype).gain * value.abs()
                element = {name: where(rise, trial[name], element[name]) for name in element}
                value = torch.where(rise, after, value)
                for other in problem.neighbours(axis.name):
                    stale[other] = stale[other] | rise
                if problem.is_quadratic(axis.name):
                    stale[axis.name] = stale[axis.name] | rise
            history.append(value)
            if not any(bool(s.any()) for s in stale.values()):
                status = Status.CONVERGED
                break
        return _Ascent(element, value, torch.stack(history), status)

    def _start(
        self, problem: Contraction, symmetry: Symmetry, w1: Tensor, start: str, k: int
    ) -> Element:
        element = {
            a.name: map_element(
                lambda part: part.expand(len(w1), *part.shape).clone(), a.group.identity(like=w1)
            )
            for a in symmetry.axes
        }
        if start == "identity":
            return element
        weights = self._factors(problem, k) if start == "random" else None
        known: set[str] = set()
        for axis in symmetry.axes:
            costs = problem.incoming(axis.name, element, known, weights)
            if costs:
                element[axis.name] = _oracle(axis.group).nearest_by_degree(costs)
            known.add(axis.name)
        return element

    def _factors(self, problem: Contraction, k: int) -> dict[str, Tensor]:
        """Draw one positive factor for each fixed coordinate: the same for all units."""
        generator = torch.Generator().manual_seed(self.seed * 1009 + k)
        return {
            place.leaf.name: torch.rand(problem.width(place), generator=generator) * 2
            for places in problem.places.values()
            for place in places
            if not place.others
        }


@dataclass(frozen=True)
class _Ascent:
    element: Element
    value: Tensor
    history: Tensor
    status: Status


def _better(a: _Ascent, b: _Ascent, dtype: torch.dtype) -> _Ascent:
    """Keep the better of two ascents for each pair; the first unless the second really is."""
    first = b.value - a.value <= tolerance(dtype).gain * a.value.abs()
    length = max(len(a.history), len(b.history))
    histories = [
        torch.cat([x.history, x.history[-1:].expand(length - len(x.history), -1)]) for x in (a, b)
    ]
    both = {a.status, b.status}
    return _Ascent(
        {name: where(first, a.element[name], b.element[name]) for name in a.element},
        torch.where(first, a.value, b.value),
        torch.where(first, *histories),
        Status.SWEEP_LIMIT if Status.SWEEP_LIMIT in both else Status.CONVERGED,
    )


def _oracle(group: Any) -> CompactGroup[Any]:
    if isinstance(group, CompactGroup):
        return group
    raise TypeError(f"{group} is not compact")  # excluded by require_compact
