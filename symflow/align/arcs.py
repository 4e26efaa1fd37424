"""Polishing on a product of spheres: from the least chord to the least arc."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.align.base import where
from symflow.align.costs import Contraction
from symflow.arch import Element, Symmetry
from symflow.groups import CompactGroup
from symflow.manifolds import SphereProduct
from symflow.numerics import angle, tolerance

_SWEEPS = 20


def polish_arcs(
    symmetry: Symmetry,
    manifold: SphereProduct,
    w0: Float[Tensor, "N D"],
    w1: Float[Tensor, "N D"],
    element: Element,
) -> Element:
    """Lower the sum of squared arcs by assignment steps; each is accepted only if it does.

    Alignment on inner products minimises the chord, which need not minimise the arc. For one axis
    the arcs of its own rows are assigned exactly; rows of other families, which see the axis in
    their coordinates, enter to first order.

    Parameters
    ----------
    symmetry
        A compact group.
    manifold
        The section space.
    w0, w1
        Points of the section (N, D), pair by pair.
    element
        Where to start (N).

    Returns
    -------
    Element
        An element at which the distance is at most that of ``element``.
    """
    if not len(w1):
        return element
    families = _families(symmetry, manifold)
    distance = manifold.dist2(w0, symmetry.act(element, w1))
    rows = torch.arange(len(w1))
    for _ in range(_SWEEPS):
        any_rise = False
        for axis in symmetry.axes:
            group = axis.group
            if not isinstance(group, CompactGroup) or axis.over or symmetry.over(axis.name):
                continue
            costs = _costs(symmetry, manifold, w0, w1, element, axis.name, families, rows)
            if not costs:
                continue
            trial = element | {axis.name: group.nearest_by_degree(costs)}
            after = manifold.dist2(w0, symmetry.act(trial, w1))
            fall = distance - after > tolerance(w1.dtype).gain * distance
            element = {k: where(fall, trial[k], g) for k, g in element.items()}
            distance = torch.where(fall, after, distance)
            any_rise = any_rise or bool(fall.any())
        if not any_rise:
            break
    return element


def _families(symmetry: Symmetry, manifold: SphereProduct) -> dict[str, int]:
    """Which axis' units the rows of each family are: the axis of its coordinates' first place."""
    owner: dict[str, int] = {}
    starts = torch.tensor([0, *(n * d for n, d in manifold.shapes)]).cumsum(0)
    for k, (n, d) in enumerate(manifold.shapes):
        coordinates = set(manifold.order[int(starts[k]) : int(starts[k]) + n * d].tolist())
        for axis in symmetry.axes:
            leaves = [x for x in symmetry.leaves if _is_row_of(x, axis.name)]
            mine = {c for x in leaves for c in range(x.span.start, x.span.stop)}
            if axis.size == n and coordinates <= mine:
                owner[axis.name] = k
    return owner


def _is_row_of(leaf: Any, axis: str) -> bool:
    return any(d.axis == axis and d.degree == 1 for d in leaf.dims)


def _costs(
    symmetry: Symmetry,
    manifold: SphereProduct,
    w0: Tensor,
    w1: Tensor,
    element: Element,
    axis: str,
    families: dict[str, int],
    rows: Tensor,
) -> dict[int, Tensor]:
    moved = symmetry.act(element, w1)
    slopes = _slopes(manifold, w0, moved, skip=families.get(axis))
    problem = Contraction(symmetry, w0 * slopes, w1)
    costs = problem.costs(axis, element, rows)
    if axis in families:
        still = element | {axis: symmetry[axis].group.identity(like=w1)}
        k, others = families[axis], symmetry.act(still, w1)
        p, q = manifold.split(w0)[0][k], manifold.split(others)[0][k]
        theta = angle((p / manifold.radii[k])[:, :, None], (q / manifold.radii[k])[:, None])
        square, flipped = theta.square(), (torch.pi - theta).square()
        scale = manifold.radii[k] ** 2 / 2
        for degree, c in ((0, -scale * (square + flipped)), (1, -scale * (square - flipped))):
            costs[degree] = costs[degree] + c if degree in costs else c
    return costs


def _slopes(manifold: SphereProduct, x: Tensor, y: Tensor, skip: int | None) -> Tensor:
    """Differentiate minus the squared distance by the inner product of each coordinate."""
    xs, rest = manifold.split(x)
    ys, _ = manifold.split(y)
    parts: list[Tensor] = []
    for k, (p, q, r) in enumerate(zip(xs, ys, manifold.radii, strict=True)):
        theta = angle(p / r, q / r)[..., None]
        sine = theta.sin().clamp_min(tolerance(x.dtype).angle)
        slope = torch.where(theta < tolerance(x.dtype).angle, torch.ones_like(theta), theta / sine)
        parts.append((2 * slope).expand_as(p) * (0 if k == skip else 1))
    return manifold.join(parts, torch.full_like(rest, 2.0))
