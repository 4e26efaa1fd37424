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
from symflow.align.costs import Contraction, oracle, where
from symflow.arch import Axis, Element, Symmetry
from symflow.errors import ShapeError
from symflow.groups import map_element
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
        return self._result(symmetry, w0, w1, best, batch, began)

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
        batch = torch.broadcast_shapes(w0.shape[:-1], w1.shape[:-1])
        left, right = (
            w.detach().expand(*batch, w.shape[-1]).reshape(-1, w.shape[-1]) for w in (w0, w1)
        )
        flat = {
            a.name: map_element(
                lambda part, own=len(symmetry.batch_shape(a, element[a.name])): part.expand(
                    *batch, *part.shape[own:]
                ).reshape(-1, *part.shape[own:]),
                element[a.name],
            )
            for a in symmetry.axes
        }
        found = self._climb(Contraction(symmetry, left, right), symmetry, left, right, flat)
        return self._result(symmetry, w0, w1, found, batch, began)

    def _result(
        self,
        symmetry: Symmetry,
        w0: Tensor,
        w1: Tensor,
        best: "_Ascent",
        batch: torch.Size,
        began: float,
    ) -> Alignment:
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
        return self._climb(problem, symmetry, w0, w1, element)

    def _climb(
        self, problem: Contraction, symmetry: Symmetry, w0: Tensor, w1: Tensor, element: Element
    ) -> "_Ascent":
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
                trial, after = _step(problem, symmetry, axis, w0, w1, element, value, rows)
                # Exact steps never lose; linearised ones (an axis twice in a leaf) and ties may.
                rise = after - value > tolerance(w1.dtype).gain * value.abs()
                if not bool(rise.any()):
                    continue
                element = element | {
                    name: where(rise, g, element[name]) for name, g in trial.items()
                }
                value = torch.where(rise, after, value)
                for other in problem.neighbours(axis.name):
                    stale[other] = stale[other] | rise
                if not problem.is_linear(axis.name) or problem.solved_with(axis.name):
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
            name: map_element(lambda part: part.expand(len(w1), *part.shape).clone(), g)
            for name, g in symmetry.identity(like=w1).items()
        }
        if start == "identity":
            return element
        weights = self._factors(problem, k) if start == "random" else None
        known: set[str] = set()
        rows = torch.arange(len(w1))
        for axis in symmetry.axes:
            element |= problem.best(axis.name, element, rows, known, weights)
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


def _step(
    problem: Contraction,
    symmetry: Symmetry,
    axis: Axis,
    w0: Tensor,
    w1: Tensor,
    element: Element,
    value: Tensor,
    rows: Tensor,
) -> tuple[Element, Tensor]:
    """Solve for one axis; return its new elements and the objective with them."""

    def spread(name: str, part: Any) -> Any:
        if len(rows) == len(w1):
            return part
        return map_element(
            lambda old, new: old.index_copy(0, rows, new.to(old.dtype)), element[name], part
        )

    plain = axis.over is None and not problem.solved_with(axis.name)
    if plain and problem.is_linear(axis.name):  # what a step gains, its costs tell
        costs = problem.costs(axis.name, element, rows)
        if not costs:
            return {}, value
        new = oracle(axis.group).nearest_by_degree(costs)
        old = map_element(lambda part: part[rows], element[axis.name])
        gain = problem.gain(axis.name, costs, new, old).to(value.dtype)
        return {axis.name: spread(axis.name, new)}, value.index_add(0, rows, gain)
    found = problem.best(axis.name, element, rows)
    trial = {name: spread(name, part) for name, part in found.items()}
    return trial, objective(symmetry, w0, symmetry.act(element | trial, w1))


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
