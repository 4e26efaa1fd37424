"""Polishing where units have curved spaces of their own: from the least chord to the least arc."""

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.align.base import where
from symflow.align.costs import Contraction
from symflow.arch import Element, Symmetry
from symflow.groups import CompactGroup
from symflow.manifolds import RowManifold
from symflow.numerics import tolerance

_SWEEPS = 20


def polish_arcs(
    symmetry: Symmetry,
    manifold: RowManifold,
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


def _families(symmetry: Symmetry, manifold: RowManifold) -> dict[str, int]:
    """Return which family has the rows of the units of an axis, for each axis that has any."""
    owner: dict[str, int] = {}
    for axis in symmetry.axes:
        units = _unit_of(symmetry, axis.name, manifold.dimension)
        for k, rows in enumerate(manifold.rows):
            if len(rows) == axis.size and torch.equal(
                units[rows], torch.arange(axis.size)[:, None].expand_as(rows)
            ):
                owner[axis.name] = k
    return owner


def _unit_of(symmetry: Symmetry, axis: str, dimension: int) -> Tensor:
    """Return which unit of an axis each coordinate belongs to; -1 if to none."""
    units = torch.full((dimension,), -1)
    for leaf in symmetry.leaves:
        degrees = [d.degree if d.axis == axis else 0 for d in leaf.dims]
        # A weight of a unit on another one of its axis is in the row of the one that receives.
        k = next((k for p in (1, None) for k, q in enumerate(degrees) if q and p in (q, None)), -1)
        if k >= 0:
            index = torch.arange(leaf.span.start, leaf.span.stop).reshape(leaf.shape)
            rows = index.movedim(k, 0).reshape(leaf.shape[k], -1)
            units[rows] = torch.arange(len(rows))[:, None].expand_as(rows)
    return units


def _costs(
    symmetry: Symmetry,
    manifold: RowManifold,
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
        square, turned = manifold.between(families[axis], w0, symmetry.act(still, w1))
        for degree, c in ((0, -(square + turned) / 2), (1, -(square - turned) / 2)):
            costs[degree] = costs[degree] + c if degree in costs else c
    return costs


def _slopes(manifold: RowManifold, x: Tensor, y: Tensor, skip: int | None) -> Tensor:
    """Differentiate minus the squared distance by the inner product of each coordinate."""
    parts = manifold.slopes(x, y)
    if skip is not None:
        parts[skip] = torch.zeros_like(parts[skip])
    return manifold.join(parts, torch.full_like(manifold.split(x)[1], 2.0))
