r"""The balanced cone with its own metric, where no two units share a weight: a product of cones.

A unit with incoming weights u and outgoing weights v is balanced where :math:`|u|^2 = k |v|^2`
(k is one for ReLU). With the length :math:`\rho^2 = |u|^2 + |v|^2` and the angles of both sides,
:math:`d\varphi^2 = (k\, d\alpha^2 + d\beta^2) / (1 + k)`, the metric of R^D is
:math:`d\rho^2 + \rho^2 d\varphi^2` there: a cone over a product of spheres. Two points and the tip
lie in a flat sector of angle :math:`\varphi \le \pi`, and so does the shortest path between them
(Bridson and Haefliger, 1999, I.5).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from symflow.errors import ShapeError
from symflow.manifolds.base import no_rows
from symflow.manifolds.rows import RowManifold
from symflow.manifolds.sphere import sphere_log
from symflow.numerics import angle, norm, pairwise_angle, sinc, stretched_arc, tolerance, unit


@dataclass(frozen=True)
class _Side:
    """Incoming or outgoing weights of the units of a family, and where they turn."""

    root: float  # their share of a unit's length
    here: Tensor  # their direction (*batch, n, d)
    toward: Tensor  # in which they turn
    share: Tensor  # of the sector's angle, by which they turn (*batch, n, 1)

    def turned(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        """Return both directions where the sector's angle is ``phi``."""
        c, s = (phi * self.share).cos(), (phi * self.share).sin()
        return c * self.here + s * self.toward, c * self.toward - s * self.here


@dataclass(frozen=True)
class _Sector:
    """The plane in which each unit of a family moves with some velocity.

    ``along`` and ``across`` the unit are the components of the velocity. ``straight`` marks units
    that move on a line through the tip, or have no direction.
    """

    length: Tensor
    along: Tensor
    across: Tensor
    sides: tuple[_Side, _Side]
    straight: Tensor

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the length and the angle of the point at time ``t``; 1 and 0 for straight ones."""
        x, y = self.length + t * self.along, t * self.across
        x = torch.where(self.straight, torch.ones_like(x), x)
        y = torch.where(self.straight, torch.zeros_like(y), y)
        return norm(torch.cat([x, y], -1), keepdim=True), torch.atan2(y, x)

    def joined(self, parts: Sequence[Tensor], otherwise: Tensor) -> Tensor:
        """Put both sides together; units that move straight are elsewhere."""
        return torch.where(self.straight, otherwise, torch.cat([*parts], -1))


@final
class ConeProduct(RowManifold):
    """Some units of a weight vector on cones |u|^2 = k |v|^2, every other coordinate Euclidean.

    Distances, geodesics and transport are those of the set of balanced weights itself: paths stay
    there, where those of :class:`BalancedCone` are chords. As on every section, distances depend on
    the choice of weights that it is: positive scales are no isometries.

    Parameters
    ----------
    dimension
        Number of coordinates.
    incoming, outgoing
        For each family of units, index tensors (n, d) and (n, e): the coordinates of u and v of
        each unit in the flat vector. No coordinate may occur twice.
    ratios
        k of each family; one by default.
    odd
        Whether a sign of a unit turns u, and v, for each family; both by default.
    counted
        How many coordinates, from the first, count in norms; all if None.

    Notes
    -----
    A unit without weights is the tip of its cone and has no direction: there, its space is treated
    as flat. Where both sides of two units point in opposite directions the shortest path goes
    through the tip, which is the straight line between them.

    Examples
    --------
    >>> space = ConeProduct(4, [torch.tensor([[0, 1]])], [torch.tensor([[2, 3]])])
    >>> x, y = torch.tensor([3.0, 0.0, 3.0, 0.0]), torch.tensor([0.0, 3.0, 3.0, 0.0])
    >>> round(float(space.dist(x, y)), 4)    # a sector of pi / 2 sqrt(2); the chord is 4.2426
    4.4739
    """

    name = "ConeProduct"

    def __init__(
        self,
        dimension: int,
        incoming: Sequence[Int[Tensor, "_ _"]],
        outgoing: Sequence[Int[Tensor, "_ _"]],
        ratios: Sequence[float] | None = None,
        odd: Sequence[tuple[bool, bool]] | None = None,
        counted: int | None = None,
    ) -> None:
        pairs = list(zip(incoming, outgoing, strict=True))
        if any(1 in (u.shape[1], v.shape[1]) for u, v in pairs):
            raise ShapeError(
                "the units of a ConeProduct have two weights or more on both sides: the sign of a "
                "single one cannot turn without going through zero"
            )
        RowManifold.__init__(self, dimension, [torch.cat(pair, 1) for pair in pairs], counted)
        self.sizes = [int(u.shape[1]) for u, _ in pairs]
        self.ratios = [1.0] * len(pairs) if ratios is None else [float(k) for k in ratios]
        self.odd = [(True, True)] * len(pairs) if odd is None else list(odd)

    # ---------------------------------------------------------------- distances

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the velocity at ``x`` of the shortest path to ``y``."""
        (xs, a), (ys, b) = self._split_like(x, y)
        rows: list[Tensor] = []
        for k, (p, q) in enumerate(zip(xs, ys, strict=True)):
            here, there = self._directions(k, p), self._directions(k, q)
            turns = [sphere_log(d, e) for d, e in zip(here, there, strict=True)]
            phi = self._angle(k, [norm(turn, keepdim=True) for turn in turns])
            length = norm(q, keepdim=True)
            along, across = length * phi.cos() - norm(p, keepdim=True), length * sinc(phi)
            parts = [
                root * (along * d + across * turn)
                for root, d, turn in zip(self._roots(k), here, turns, strict=True)
            ]
            rows.append(torch.where(no_rows(p) | no_rows(q), q - p, torch.cat(parts, -1)))
        return self.join(rows, b - a)

    def between(self, k: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return squared distances of all pairs of units, and with those of ``y`` turned round."""
        p, q = self.split(x)[0][k], self.split(y)[0][k]
        a, b = norm(p)[..., :, None], norm(q)[..., None, :]
        sides = zip(self._parted(k, p), self._parted(k, q), strict=True)
        thetas = [pairwise_angle(u, v) for u, v in sides]
        turned = [torch.pi - t if odd else t for t, odd in zip(thetas, self.odd[k], strict=True)]
        found: list[Tensor] = []
        for angles in (thetas, turned):
            half = self._angle(k, [t[..., None] for t in angles])[..., 0] / 2
            # This keeps its digits where a^2 + b^2 - 2 a b cos(phi) would lose them.
            found.append((a - b).square() + 4 * a * b * half.sin().square())
        return found[0], found[1]

    def slopes(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Return minus the slopes of squared distances by the inner products of both sides."""
        found: list[Tensor] = []
        for k, (p, q) in enumerate(zip(self.split(x)[0], self.split(y)[0], strict=True)):
            here, there = self._directions(k, p), self._directions(k, q)
            thetas = [angle(d, e)[..., None] for d, e in zip(here, there, strict=True)]
            slope = 2 * sinc(self._angle(k, thetas))
            both = [slope * stretched_arc(theta) for theta in thetas]
            found.append(torch.cat([s.expand_as(d) for s, d in zip(both, here, strict=True)], -1))
        return found

    # ---------------------------------------------------------------- geodesics

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Walk along the geodesic that leaves ``x`` with velocity ``u`` for a time of one."""
        return self.geodesic(x, u, torch.ones((), dtype=x.dtype, device=x.device))

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the same as :meth:`expmap`: it is cheap enough here."""
        return self.expmap(x, u)

    def geodesic(self, x: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """Return exp_x(t v): a straight line in the sector of each unit."""
        (xs, a), (vs, b) = self._split_like(x, v)
        rows: list[Tensor] = []
        times = t[..., None, None]
        for k, (p, u) in enumerate(zip(xs, vs, strict=True)):
            sector = self._sector(k, p, u)
            length, phi = sector.at(times)
            parts = [side.root * length * side.turned(phi)[0] for side in sector.sides]
            rows.append(sector.joined(parts, p + times * u))
        return self.join(rows, a + t[..., None] * b)

    def geodesic_velocity(self, x: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """Return the velocity at time ``t``: constant in length, turning with the point."""
        (xs, a), (vs, b) = self._split_like(x, v)
        rows: list[Tensor] = []
        for k, (p, u) in enumerate(zip(xs, vs, strict=True)):
            sector = self._sector(k, p, u)
            _, phi = sector.at(t[..., None, None])
            along = sector.along * phi.cos() + sector.across * phi.sin()
            across = sector.across * phi.cos() - sector.along * phi.sin()
            parts: list[Tensor] = []
            for side in sector.sides:
                here, toward = side.turned(phi)
                parts.append(side.root * (along * here + across * side.share * toward))
            rows.append(sector.joined(parts, u))
        return self.join(rows, b.expand(torch.broadcast_shapes(a.shape, t[..., None].shape)))

    def carry(
        self, x: Float[Tensor, "*#batch D"], v: Float[Tensor, "*#batch D"], u: Tensor
    ) -> Float[Tensor, "*#batch D"]:
        """Turn the tangent part of ``u``: in the plane of each sector, and with both spheres."""
        x, v, u = torch.broadcast_tensors(x, v, u)
        (xs, _), (vs, _) = self._split_like(x, v)
        us, rest = self.split(self.proju(x, u))
        rows: list[Tensor] = []
        for k, (p, w, e) in enumerate(zip(xs, vs, us, strict=True)):
            sector, parts = self._sector(k, p, w), self._parted(k, e)
            _, phi = sector.at(torch.ones_like(sector.length))
            # Components of the vector along the unit and, in the sector, across it.
            along = _inner((side.root * side.here for side in sector.sides), parts)
            across = _inner((side.root * side.share * side.toward for side in sector.sides), parts)
            new_along = along * phi.cos() + across * phi.sin()
            gain = across * phi.cos() - along * phi.sin() - across
            moved: list[Tensor] = []
            for side, part in zip(sector.sides, parts, strict=True):
                here, toward = side.turned(phi)
                ahead = (part * side.toward).sum(-1, keepdim=True)
                still = part - side.root * along * side.here - ahead * side.toward
                ahead = ahead + side.root * side.share * gain
                moved.append(still + ahead * toward + side.root * new_along * here)
            rows.append(sector.joined(moved, e))
        return self.join(rows, rest)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Carry a tangent vector in parallel along the shortest path."""
        return self.carry(x, self.logmap(x, y), v)

    # ---------------------------------------------------------------- projections

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the tangent part of an ambient vector: <u, du> = k <v, dv> for every unit."""
        (xs, _), (us, rest) = self._split_like(x, u)
        rows: list[Tensor] = []
        for k, (p, w) in enumerate(zip(xs, us, strict=True)):
            (a, b), (first, second) = self._directions(k, p), self._roots(k)
            normal = torch.cat([second * a, -first * b], -1)
            rows.append(w - (w * normal).sum(-1, keepdim=True) * normal)
        return self.join(rows, rest)

    def velocity(
        self, x: Float[Tensor, "*#batch D"], v: Float[Tensor, "*#batch D"]
    ) -> Float[Tensor, "*#batch D"]:
        """Return the tangent part."""
        return self.proju(x, v)

    def projx(self, x: Tensor) -> Tensor:
        """Return the nearest balanced point: directions stay, both lengths meet in between.

        A unit with nothing on one side has no direction there, and becomes the tip.
        """
        xs, rest = self.split(x)
        rows: list[Tensor] = []
        for k, p in enumerate(xs):
            (u, v), (first, second) = self._parted(k, p), self._roots(k)
            a, b = norm(u, keepdim=True), norm(v, keepdim=True)
            length = torch.where((a > 0) & (b > 0), first * a + second * b, torch.zeros_like(a))
            rows.append(length * torch.cat([first * unit(u), second * unit(v)], -1))
        return self.join(rows, rest)

    # ---------------------------------------------------------------- one family

    def _roots(self, k: int) -> tuple[float, float]:
        """Return |u| and |v| of a unit of length one."""
        ratio = self.ratios[k]
        return (ratio / (1 + ratio)) ** 0.5, (1 / (1 + ratio)) ** 0.5

    def _parted(self, k: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        return rows[..., : self.sizes[k]], rows[..., self.sizes[k] :]

    def _directions(self, k: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        u, v = self._parted(k, rows)
        return unit(u), unit(v)

    def _angle(self, k: int, thetas: Sequence[Tensor]) -> Tensor:
        """Return the angle of the sector, from those of both sides (*batch, 1)."""
        parts = [root * theta for root, theta in zip(self._roots(k), thetas, strict=True)]
        return norm(torch.cat(parts, -1), keepdim=True)

    def _sector(self, k: int, rows: Tensor, velocity: Tensor) -> _Sector:
        here, roots, parts = self._directions(k, rows), self._roots(k), self._parted(k, velocity)
        along = _inner((root * d for root, d in zip(roots, here, strict=True)), parts)
        turns = [w - (w * d).sum(-1, keepdim=True) * d for w, d in zip(parts, here, strict=True)]
        across = norm(torch.cat(turns, -1), keepdim=True)
        least = tolerance(rows.dtype).converged * norm(velocity, keepdim=True)
        straight = no_rows(rows) | (across <= least)
        safe = torch.where(straight, torch.ones_like(across), across)
        first, second = (
            _Side(root, d, unit(w), norm(w, keepdim=True) / (root * safe))
            for root, d, w in zip(roots, here, turns, strict=True)
        )
        return _Sector(norm(rows, keepdim=True), along, across, (first, second), straight)

    # ---------------------------------------------------------------- checks

    def _check_point_on_manifold(
        self, x: Tensor, *, atol: float = 0.0, rtol: float = 0.0
    ) -> tuple[bool, str | None]:
        rtol = max(rtol, tolerance(x.dtype).close)
        for k, p in enumerate(self.split(x)[0]):
            u, v = (norm(part) for part in self._parted(k, p))
            off = (u - self.ratios[k] ** 0.5 * v).abs()
            if not self._close(off, norm(p), atol, rtol):
                return False, f"a unit's two sides differ in length by {float(off.max()):.3g}"
        return True, None

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 0.0, rtol: float = 0.0
    ) -> tuple[bool, str | None]:
        rtol = max(rtol, tolerance(x.dtype).close)
        (xs, _), (us, _) = self._split_like(x, u)
        for k, (p, w) in enumerate(zip(xs, us, strict=True)):
            (a, b), (da, db) = self._parted(k, p), self._parted(k, w)
            off = ((a * da).sum(-1) - self.ratios[k] * (b * db).sum(-1)).abs()
            if not self._close(off, norm(p) * norm(w), atol, rtol):
                return False, f"a unit's vector leaves its cone by {float(off.max()):.3g}"
        return True, None


def _inner(some: Iterable[Tensor], others: Iterable[Tensor]) -> Tensor:
    """Inner product of vectors in parts, with a last dimension of one."""
    return (torch.cat([*some], -1) * torch.cat([*others], -1)).sum(-1, keepdim=True)
