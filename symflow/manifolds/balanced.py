r"""The balanced cone: weights of least norm on their scaling orbits.

A scale vector s multiplies coordinate d by :math:`\prod_i s_i^{E_{di}}`. At the point of least norm
of an orbit the *moment map* :math:`m_i(x) = \sum_d E_{di} x_d^2` vanishes (Kempf and Ness, 1979):
every unit's incoming norm equals its outgoing one, weighted by degree.
"""

from collections.abc import Callable
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from symflow.manifolds.base import WeightManifold
from symflow.numerics import norm, tolerance

_PROJECTION_STEPS = 50
# PyTorch solves no linear equations in these formats.
_HALF = (torch.float16, torch.bfloat16)


@final
class BalancedCone(WeightManifold):
    """The set where the moment map is zero, with the chordal metric of R^D.

    ``dist``, ``logmap`` and ``geodesic`` are those of the ambient space: a straight chord, whose
    inner points are not balanced. Positive scales are no isometries, so a chord is not a geodesic
    of the quotient by them; it is a shortest path of the quotient by the compact group.
    ``retr`` and ``expmap`` return to the cone by rebalancing, which does not change the function
    that the weights stand for; ``projx`` is the metric projection (the nearest balanced point).

    Parameters
    ----------
    dimension
        Number of coordinates.
    coordinates, units, degrees
        The non-zero entries of E: coordinate ``coordinates[k]`` scales with unit ``units[k]`` to
        the power ``degrees[k]``.
    num_units
        Number of scaled units.
    rebalance
        Moves weights along their scaling orbit to the balanced point.
    counted
        How many coordinates, from the first, count in norms; all if None.
    weights
        Positive factors (D,) of the coordinates in squared lengths; one if None. They do not change
        which points are balanced.

    Examples
    --------
    >>> import symflow
    >>> space = symflow.Quotient(symflow.mlp([2, 3, 1]), section="balanced").manifold
    >>> space.moment(space.projx(torch.randn(space.dimension))).abs().max() < 1e-4
    tensor(True)
    """

    name = "BalancedCone"

    def __init__(
        self,
        dimension: int,
        coordinates: Int[Tensor, " k"],
        units: Int[Tensor, " k"],
        degrees: Int[Tensor, " k"],
        num_units: int,
        rebalance: Callable[[Tensor], Tensor],
        counted: int | None = None,
        weights: Float[Tensor, " D"] | None = None,
    ) -> None:
        WeightManifold.__init__(self, dimension, counted, weights)
        self.num_units = num_units
        self.rebalance = rebalance
        self.coordinates: Tensor
        self.units: Tensor
        self.degrees: Tensor
        self.register_buffer("coordinates", coordinates)
        self.register_buffer("units", units)
        self.register_buffer("degrees", degrees)
        first, second = _pairs(coordinates)
        self.first: Tensor
        self.second: Tensor
        self.register_buffer("first", first)
        self.register_buffer("second", second)

    def weighted(self, weights: Float[Tensor, " D"]) -> "BalancedCone":
        entries = (self.coordinates, self.units, self.degrees)
        return BalancedCone(
            self.dimension, *entries, self.num_units, self.rebalance, self.counted, weights
        )

    def moment(self, x: Float[Tensor, "*#batch D"]) -> Float[Tensor, "*batch S"]:
        """Return the moment map; zero exactly on the cone."""
        return self._to_units(x * x)

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the chord y - x."""
        return y - x

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Rebalance x + u."""
        return self.rebalance(x + u)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Rebalance x + u (a retraction of first order; see the class)."""
        return self.rebalance(x + u)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Project the vector on the tangent space at ``y``."""
        return self.proju(y, v)

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the tangent part: sum_d E_di x_d u_d = 0 for every unit. O(S^3) for S units."""
        x, u = torch.broadcast_tensors(x, u)
        if x.dtype in _HALF:
            return self.proju(x.float(), u.float()).to(x.dtype)
        normal = self._raised(x)
        shift = self._solve(x * normal, self._to_units(x * u))
        return u - normal * self._to_coordinates(shift)

    def projx(self, x: Tensor) -> Tensor:
        r"""Return the nearest balanced point, by Newton's method.

        It is :math:`x_d / (1 + (E \mu)_d / c_d)` for weights c.
        """
        if x.dtype in _HALF:
            return self.projx(x.float()).to(x.dtype)
        mu = x.new_zeros(*x.shape[:-1], self.num_units)
        scale = torch.ones_like(x)
        for _ in range(_PROJECTION_STEPS):
            point = x / scale
            off = self.moment(point)
            size = (point * point).sum(-1, keepdim=True)
            if bool((off.abs() <= tolerance(x.dtype).converged * size).all()):
                break
            step = self._solve(self._raised(point * point / scale), off) / 2
            change = self._raised(self._to_coordinates(step))
            # The multipliers must stay positive: never go more than half of the way to zero.
            worst = (-change / scale).amax(-1, keepdim=True)
            step = step * (0.5 / worst.clamp_min(0.5))
            mu = mu + step
            scale = 1 + self._raised(self._to_coordinates(mu))
        return self.rebalance(x / scale)

    def geodesic(self, x: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """Return the point x + t v of the chord."""
        return x + t[..., None] * v

    def geodesic_velocity(self, x: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """Return v at all times."""
        return v.expand(torch.broadcast_shapes(x.shape, v.shape, t[..., None].shape))

    def _raised(self, y: Tensor) -> Tensor:
        """Divide by the weights: what differentials become as vectors."""
        return y if self.weights is None else y / self.weights.to(y)

    def _to_units(self, y: Tensor) -> Tensor:
        picked = y.index_select(-1, self.coordinates.to(y.device)) * self.degrees.to(y)
        zeros = y.new_zeros(*y.shape[:-1], self.num_units)
        return zeros.index_add(-1, self.units.to(y.device), picked)

    def _to_coordinates(self, mu: Tensor) -> Tensor:
        picked = mu.index_select(-1, self.units.to(mu.device)) * self.degrees.to(mu)
        zeros = mu.new_zeros(*mu.shape[:-1], self.dimension)
        return zeros.index_add(-1, self.coordinates.to(mu.device), picked)

    def _solve(self, weights: Tensor, right: Tensor) -> Tensor:
        """Solve (E^T diag(weights) E) mu = right; units without weight keep mu = 0."""
        n = self.num_units
        products = (self.degrees[self.first] * self.degrees[self.second]).to(weights)
        at = self.coordinates[self.first].to(weights.device)
        entries = weights.index_select(-1, at) * products
        place = (self.units[self.first] * n + self.units[self.second]).to(weights.device)
        matrix = weights.new_zeros(*weights.shape[:-1], n * n).index_add(-1, place, entries)
        matrix = matrix.unflatten(-1, (n, n))
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        ridge = torch.where(
            diagonal > 0, diagonal * tolerance(weights.dtype).eps, torch.ones_like(diagonal)
        )
        return torch.linalg.solve(matrix + torch.diag_embed(ridge), right[..., None]).squeeze(-1)

    def _check_point_on_manifold(
        self, x: Tensor, *, atol: float = 0.0, rtol: float = 0.0
    ) -> tuple[bool, str | None]:
        off = norm(self.moment(x))  # a maximum would not exist without units
        size = (x * x).sum(-1)
        if self._close(off, size, atol, max(rtol, tolerance(x.dtype).close)):
            return True, None
        return False, f"the moment map is {float(off.max()):.3g}, not zero"

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 0.0, rtol: float = 0.0
    ) -> tuple[bool, str | None]:
        off = norm(self._to_units(x * u))
        size = torch.linalg.vector_norm(x, dim=-1) * torch.linalg.vector_norm(u, dim=-1)
        if self._close(off, size, atol, max(rtol, tolerance(x.dtype).close)):
            return True, None
        return False, f"the vector changes the moment map by {float(off.max()):.3g}"


def _pairs(coordinates: Tensor) -> tuple[Tensor, Tensor]:
    """All ordered pairs of entries of E in the same row (each row has a handful at most)."""
    order = coordinates.argsort(stable=True)
    rows = coordinates[order]
    counts = torch.bincount(rows) if len(rows) else rows
    counts = counts[counts > 0]
    starts = counts.cumsum(0) - counts
    repeat = counts.repeat_interleave(counts)  # how many partners each entry has, itself included
    first = torch.arange(len(rows)).repeat_interleave(repeat)
    begin = starts.repeat_interleave(counts).repeat_interleave(repeat)
    within = torch.arange(len(first)) - (repeat.cumsum(0) - repeat).repeat_interleave(repeat)
    return order[first], order[begin + within]
