"""Spheres, with numerics that hold at every angle, and products of them inside a weight vector.

The functions work on the last dimension of rows on the unit sphere. A zero row (a dead neuron) has
no direction: there, the row's space is treated as flat, so that nothing divides by zero.
"""

import warnings
from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from symflow.errors import AntipodalWarning, ShapeError
from symflow.manifolds.base import no_rows
from symflow.manifolds.rows import RowManifold
from symflow.numerics import angle, norm, pairwise_angle, sinc, stretched_arc, tolerance, unit

Rows = Float[Tensor, "*#batch n"]


def sphere_exp(x: Rows, v: Rows) -> Rows:
    """Walk from ``x`` along the tangent vector ``v``: cos|v| x + sin|v| v / |v|.

    Examples
    --------
    >>> quarter = torch.pi / 2 * torch.tensor([0.0, 1.0])
    >>> sphere_exp(torch.tensor([1.0, 0.0]), quarter).round(decimals=6).abs()
    tensor([0., 1.])
    """
    theta = norm(v, keepdim=True)
    arc = theta.cos() * x + sinc(theta) * v
    # Renormalise: rounding must not accumulate over the steps of a solver.
    return torch.where(no_rows(x) | _fades(x, v), x + v, unit(arc))


def sphere_log(x: Rows, y: Rows) -> Rows:
    """Return the tangent vector at ``x`` that leads to ``y`` along the shortest arc.

    For antipodal rows every direction is shortest; the one chosen is the tangent part of the axis
    on which ``x`` is least, with an :class:`~symflow.errors.AntipodalWarning`.

    Examples
    --------
    >>> sphere_log(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    tensor([0.0000, 1.5708])
    """
    theta = angle(x, y)[..., None]
    # y - x has the same tangent part as y and keeps its digits when y is close to x.
    chord = y - x
    toward = chord - (chord * x).sum(-1, keepdim=True) * x
    flat = no_rows(x) | no_rows(y)
    antipodal = (torch.pi - theta < tolerance(x.dtype).antipodal) & ~flat
    if bool(antipodal.any()):
        warnings.warn(
            f"{int(antipodal.sum())} antipodal pair(s) of rows: the shortest path is not unique",
            AntipodalWarning,
            stacklevel=2,
        )
        toward = torch.where(antipodal, _any_tangent(x), toward)
    return torch.where(flat, chord, unit(toward) * theta)


def sphere_transport(x: Rows, y: Rows, v: Rows) -> Rows:
    """Carry a tangent vector from ``x`` to ``y`` in parallel along the shortest arc.

    Examples
    --------
    >>> x, y = torch.eye(2)
    >>> sphere_transport(x, y, y)
    tensor([-1.,  0.])
    """
    both = x + y
    square = (both * both).sum(-1, keepdim=True)
    flat = no_rows(x) | no_rows(y) | no_rows(both)
    share = (v * y).sum(-1, keepdim=True) * 2 / torch.where(flat, torch.ones_like(square), square)
    return torch.where(flat, v, v - share * both)


def _fades(x: Rows, v: Rows) -> Tensor:
    """Mark vectors that lead to the zero row: straight against ``x``, to which tangents are normal.

    It is a question of the angle: a short step on the way leads there too.
    """
    most = norm(x, keepdim=True) * norm(v, keepdim=True)
    return (x * v).sum(-1, keepdim=True) < (tolerance(x.dtype).close - 1) * most


def _any_tangent(x: Rows) -> Rows:
    axis = torch.zeros_like(x).scatter_(-1, x.abs().argmin(-1, keepdim=True), 1)
    return axis - (axis * x).sum(-1, keepdim=True) * x


@final
class SphereProduct(RowManifold):
    """Some rows of a weight vector on spheres, every other coordinate Euclidean.

    Parameters
    ----------
    dimension
        Number of coordinates.
    rows
        For each family of rows, an index tensor (n, d): coordinate d of row n in the flat vector.
        No coordinate may occur twice.
    radii
        The radius of each family; one by default.
    counted
        How many coordinates, from the first, count in norms; all if None.

    Notes
    -----
    Repairs geoopt's ``Sphere`` (0.5.1), whose ``dist(x, x)`` is 0.014 in float32: angles come from
    ``2 atan2(|u - v|, |u + v|)``.

    Examples
    --------
    >>> space = SphereProduct(4, [torch.tensor([[0, 1]])])
    >>> x, y = torch.tensor([1.0, 0.0, 3.0, 0.0]), torch.tensor([0.0, 1.0, 3.0, 2.0])
    >>> space.dist(x, x), space.dist(x, y)  # sqrt((pi / 2)^2 + 2^2)
    (tensor(0.), tensor(2.5430))
    """

    name = "SphereProduct"

    def __init__(
        self,
        dimension: int,
        rows: Sequence[Int[Tensor, "_ _"]],
        radii: Sequence[float] | None = None,
        counted: int | None = None,
    ) -> None:
        RowManifold.__init__(self, dimension, rows, counted)
        self.radii = [1.0] * len(rows) if radii is None else [float(r) for r in radii]
        if len(self.radii) != len(rows) or any(r <= 0 for r in self.radii):
            raise ShapeError(f"one positive radius for each of {len(rows)} families, got {radii}")

    def between(self, k: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return squared arcs of all pairs of rows, and with those of ``y`` turned round."""
        r = self.radii[k]
        theta = pairwise_angle(self.split(x)[0][k], self.split(y)[0][k])
        return (r * theta).square(), (r * (torch.pi - theta)).square()

    def slopes(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Return minus the slopes of squared arcs by the inner products of rows."""
        found: list[Tensor] = []
        for p, q, r in zip(self.split(x)[0], self.split(y)[0], self.radii, strict=True):
            found.append((2 * stretched_arc(angle(p / r, q / r))[..., None]).expand_as(p))
        return found

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Walk along great circles; the rest moves straight."""
        (xs, a), (us, b) = self._split_like(x, u)
        rows = [r * sphere_exp(p / r, v / r) for p, v, r in zip(xs, us, self.radii, strict=True)]
        return self.join(rows, a + b)

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the same as :meth:`expmap`: it is cheap enough here."""
        return self.expmap(x, u)

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the tangent vector at ``x`` whose exponential is ``y``."""
        (xs, a), (ys, b) = self._split_like(x, y)
        rows = [r * sphere_log(p / r, q / r) for p, q, r in zip(xs, ys, self.radii, strict=True)]
        return self.join(rows, b - a)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Carry a tangent vector in parallel along the shortest path."""
        (xs, _), (ys, _) = self._split_like(x, y)
        x, v = torch.broadcast_tensors(x, v)
        vs, rest = self.split(v)
        rows = [
            sphere_transport(p / r, q / r, u)
            for p, q, u, r in zip(xs, ys, vs, self.radii, strict=True)
        ]
        return self.join(rows, rest.expand(*rows[0].shape[:-2], rest.shape[-1]) if rows else rest)

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the tangent part of an ambient vector."""
        (xs, _), (us, rest) = self._split_like(x, u)
        rows = [
            v - (v * p).sum(-1, keepdim=True) * p / r**2
            for p, v, r in zip(xs, us, self.radii, strict=True)
        ]
        return self.join(rows, rest)

    def projx(self, x: Tensor) -> Tensor:
        """Return the nearest point: rows are normalised, zero rows stay zero."""
        xs, rest = self.split(x)
        return self.join([r * unit(p) for p, r in zip(xs, self.radii, strict=True)], rest)

    def velocity(
        self, x: Float[Tensor, "*#batch D"], v: Float[Tensor, "*#batch D"]
    ) -> Float[Tensor, "*#batch D"]:
        """Return the tangent part; rows that lead straight to zero, to a dead unit, stay."""
        (xs, _), (vs, rest) = self._split_like(x, v)
        tangent = self.split(self.proju(x, v))[0]
        rows = [torch.where(_fades(p, u), u, t) for p, u, t in zip(xs, vs, tangent, strict=True)]
        return self.join(rows, rest)

    def geodesic(self, x: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """Return exp_x(t v); directions and angles are taken once for all times."""
        (xs, a), (vs, b) = self._split_like(x, v)
        rows: list[Tensor] = []
        for p, u, r in zip(xs, vs, self.radii, strict=True):
            theta = norm(u, keepdim=True) / r
            angles = t[..., None, None] * theta
            curved = angles.cos() * p + angles.sin() * (r * unit(u))
            straight = no_rows(p) | _fades(p / r, u / r)
            rows.append(torch.where(straight, p + t[..., None, None] * u, curved))
        return self.join(rows, a + t[..., None] * b)

    def geodesic_velocity(self, x: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """Return the velocity at time ``t``: constant in length, turning with the point."""
        (xs, a), (vs, b) = self._split_like(x, v)
        rows: list[Tensor] = []
        for p, u, r in zip(xs, vs, self.radii, strict=True):
            theta = norm(u, keepdim=True) / r
            angles = t[..., None, None] * theta
            turned = angles.cos() * u - angles.sin() * theta * p
            straight = no_rows(p) | _fades(p / r, u / r)
            rows.append(torch.where(straight, u.expand_as(turned), turned))
        return self.join(rows, b.expand(torch.broadcast_shapes(a.shape, t[..., None].shape)))

    def carry(
        self, x: Float[Tensor, "*#batch D"], v: Float[Tensor, "*#batch D"], u: Tensor
    ) -> Float[Tensor, "*#batch D"]:
        """Turn the tangent part of ``u`` along great circles, at any angle.

        :meth:`transp` knows the ends alone, which do not tell the way between antipodal rows.
        """
        x, v, u = torch.broadcast_tensors(x, v, u)
        (xs, _), (vs, _) = self._split_like(x, v)
        us, rest = self.split(self.velocity(x, u))
        rows: list[Tensor] = []
        for p, d, e, r in zip(xs, vs, us, self.radii, strict=True):
            theta, toward = norm(d, keepdim=True) / r, unit(d)
            share = (e * toward).sum(-1, keepdim=True)
            turned = e + share * ((theta.cos() - 1) * toward - theta.sin() * p / r)
            rows.append(torch.where(no_rows(p) | _fades(p / r, d / r), e, turned))
        return self.join(rows, rest)

    def _check_point_on_manifold(
        self, x: Tensor, *, atol: float = 0.0, rtol: float = 0.0
    ) -> tuple[bool, str | None]:
        rtol = max(rtol, tolerance(x.dtype).close)
        for p, r in zip(self.split(x)[0], self.radii, strict=True):
            length = norm(p)
            off = torch.where(length == 0, length, (length - r).abs())
            if not self._close(off, torch.full_like(off, r), atol, rtol):
                return False, f"a row has norm {float(length.min()):.3g}, not {r:.3g} (or zero)"
        return True, None

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 0.0, rtol: float = 0.0
    ) -> tuple[bool, str | None]:
        rtol = max(rtol, tolerance(x.dtype).close)
        (xs, _), (us, _) = self._split_like(x, u)
        for p, v in zip(xs, us, strict=True):
            off = (p * v).sum(-1).abs()
            if not self._close(off, norm(p) * norm(v), atol, rtol):
                return False, f"a row's vector leaves the sphere by {float(off.max()):.3g}"
        return True, None
