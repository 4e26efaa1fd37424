"""Frank-Wolfe on the convex hull of the group, over all axes at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.align import hull
from symflow.align.base import Found, PairedAligner, Status, better, objective
from symflow.align.hull import Point
from symflow.arch import Symmetry
from symflow.errors import ShapeError
from symflow.numerics import norm, tolerance

_GRID, _NEWTON = 257, 4


@final
@dataclass(frozen=True)
class FrankWolfe(PairedAligner):
    """Maximise the inner product over the convex hull of the group, then round and polish.

    All axes move at once: each step solves the linear problem of every axis where it stands, and
    goes along the segment to that vertex as far as the objective, a polynomial there, is greatest.
    C2M3 (Crisostomi et al., 2024), for any compact group.

    Parameters
    ----------
    starts
        Where to begin; the best result is kept, the first among equals. ``"barycentre"``: the Haar
        mean (for permutations the matrix of 1/n), which prefers no element. ``"sequential"``: the
        vertex found by matching each axis on its incoming weights, given the axes before it. Both
        move along when the networks move on their orbits.
    max_steps
        Give up improving the relaxed objective after so many steps.
    polish
        Whether weight matching ascends from the rounded point. The result never has a lower
        objective than that point.

    Examples
    --------
    >>> import symflow
    >>> arch = symflow.mlp([3, 8, 2], "tanh")
    >>> generator = torch.Generator().manual_seed(0)
    >>> w = torch.randn(arch.dimension, generator=generator)
    >>> moved = arch.symmetry.act(arch.symmetry.random(generator=generator, like=w), w)
    >>> torch.allclose(FrankWolfe()(arch.symmetry, w, moved).weights, w)
    True
    """

    starts: Sequence[str] = ("barycentre", "sequential")
    max_steps: int = 100
    polish: bool = True

    def __post_init__(self) -> None:
        if not self.starts or set(self.starts) - {"barycentre", "sequential"}:
            raise ShapeError(
                f"starts must be one or both of 'barycentre', 'sequential'; got {self.starts!r}"
            )

    def search(
        self, symmetry: Symmetry, w0: Float[Tensor, "N D"], w1: Float[Tensor, "N D"]
    ) -> Found:
        """Ascend, round and polish from each start; O(steps x (weights x width + width^3))."""
        best = self._from(symmetry, w0, w1, self.starts[0])
        for start in self.starts[1:]:
            best = better(best, self._from(symmetry, w0, w1, start))
        return best

    def _from(self, symmetry: Symmetry, w0: Tensor, w1: Tensor, start: str) -> Found:
        if start == "barycentre":
            point = hull.barycentre(symmetry, w1)
        else:
            point = hull.vertex(symmetry, hull.sequential(symmetry, w0, w1), w1)
        element = hull.nearest(symmetry, self._ascend(symmetry, w0, w1, point))
        if self.polish:
            return hull.polish(symmetry, w0, w1, element)
        reached = objective(symmetry, w0, symmetry.act(element, w1))
        return Found(element, reached[None], Status.NOT_POLISHED)

    def _ascend(self, symmetry: Symmetry, w0: Tensor, w1: Tensor, point: Point) -> Point:
        degree = max((len(x.axes) for x in symmetry.leaves if x.learnable), default=0)
        enough = tolerance(w1.dtype).close * norm(w0) * norm(w1)
        for _ in range(self.max_steps):
            reached, slopes = _slopes(symmetry, w0, w1, point)
            ahead = _vertex_ahead(symmetry, slopes, point)
            step = {key: ahead[key] - point[key] for key in point}
            gap = sum(
                ((slopes[key] * step[key]).flatten(1).sum(1) for key in slopes), w1.new_zeros(())
            )
            active = gap > enough
            if not bool(active.any()):
                break
            line = [reached, torch.as_tensor(gap)]
            for k in range(1, degree):
                t = k / (degree - 1)
                here = {key: point[key] + t * step[key] for key in point}
                line.append(hull.value(symmetry, here, w0, w1))
            t = greatest(torch.stack(line).double()).to(w1.dtype)
            t = torch.where(active, t, torch.zeros_like(t))
            point = {
                key: m + t.reshape(-1, *(1,) * (m.ndim - 1)) * step[key] for key, m in point.items()
            }
        return point


def _slopes(
    symmetry: Symmetry, w0: Tensor, w1: Tensor, point: Point
) -> tuple[Tensor, dict[tuple[str, int], Tensor]]:
    """Return the relaxed objective (N) and its derivative by every matrix that it depends on."""
    names = [(a.name, parity) for a in symmetry.axes for parity in hull.parities(symmetry, a.name)]
    with torch.enable_grad():
        inputs = {key: point[key].detach().clone().requires_grad_() for key in names}
        reached = hull.value(symmetry, point | inputs, w0, w1)
        slopes = torch.autograd.grad(reached.sum(), list(inputs.values())) if names else ()
    return reached.detach(), dict(zip(names, slopes, strict=True))


def _vertex_ahead(symmetry: Symmetry, slopes: dict[tuple[str, int], Tensor], point: Point) -> Point:
    """Return the best vertex of the linear problem; an axis whose slope is zero stays."""
    ahead: Point = {}
    for axis in symmetry.axes:
        costs = {p: slopes[axis.name, p] for p in hull.parities(symmetry, axis.name)}
        part = {axis.name: hull.oracle(symmetry, axis.name, costs)}
        flat = torch.stack([c.abs().amax((-2, -1)) for c in costs.values()]).amax(0) == 0
        for key, m in hull.vertex(symmetry, part, flat.to(next(iter(costs.values())))).items():
            ahead[key] = torch.where(flat[..., None, None], point[key], m)
    return ahead


def greatest(line: Float[Tensor, "k N"]) -> Float[Tensor, " N"]:
    """Return where in [0, 1] a polynomial of degree k - 1 is greatest.

    Parameters
    ----------
    line
        Value and derivative at 0, then values at 1 / (k - 2), ..., 1.

    Examples
    --------
    >>> greatest(torch.tensor([[0.0], [1.0], [0.0]]).double())  # t - t^2
    tensor([0.5000], dtype=torch.float64)
    """
    at, slope, further = line[0], line[1], line[2:]
    nodes = torch.linspace(0, 1, len(further) + 1, dtype=line.dtype, device=line.device)[1:, None]
    rest = (further - at - slope * nodes) / nodes.square()
    powers = nodes ** torch.arange(len(further), dtype=line.dtype, device=line.device)
    higher = torch.linalg.solve(powers, rest) if len(further) else rest
    coefficients = torch.cat([line[:2], higher])

    def evaluate(t: Tensor, order: int = 0) -> Tensor:
        total = torch.zeros_like(t)
        for k in range(len(coefficients) - 1, order - 1, -1):
            factor = 1
            for j in range(order):
                factor *= k - j
            total = total * t + factor * coefficients[k]
        return total

    grid = torch.linspace(0, 1, _GRID, dtype=line.dtype, device=line.device)[:, None]
    t = grid[evaluate(grid.expand(_GRID, line.shape[1])).argmax(0), 0]
    for _ in range(_NEWTON):
        bend = evaluate(t, 2)
        curved = torch.where(bend < 0, bend, -torch.ones_like(bend))
        finer = torch.where(bend < 0, t - evaluate(t, 1) / curved, t).clamp(0, 1)
        t = torch.where(evaluate(finer) > evaluate(t), finer, t)
    return t
