"""Alignment of points that are on the section already."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.align import Aligner, Alignment, objective, objective_bound
from symflow.align.arcs import polish_arcs
from symflow.arch import Symmetry
from symflow.errors import ShapeError
from symflow.groups import map_element
from symflow.manifolds import RowManifold, WeightManifold


def align_points(
    symmetry: Symmetry,
    manifold: WeightManifold,
    aligner: Aligner,
    x0: Float[Tensor, "*#batch D"],
    x1: Float[Tensor, "*#batch D"],
    *,
    bounds: bool = False,
) -> Alignment:
    """Align with the aligner; where units have curved spaces, improve arcs after chords.

    Where coordinates have weights, the aligner sees them multiplied by their roots, and objective
    and bound are those of the metric.
    """
    found = aligner(symmetry, manifold.stretch(x0), manifold.stretch(x1))
    if manifold.weights is not None:
        found = replace(found, weights=symmetry.act(found.element, x1))
    if isinstance(manifold, RowManifold):
        found = _polish(symmetry, manifold, found, x0, x1)
    if bounds:
        found = replace(
            found, objective_bound=objective_bound(symmetry, *map(manifold.stretch, (x0, x1)))
        )
    return found


def _polish(
    symmetry: Symmetry, manifold: RowManifold, found: Alignment, x0: Tensor, x1: Tensor
) -> Alignment:
    batch, d = found.weights.shape[:-1], x1.shape[-1]
    left, right = (x.detach().expand(*batch, d).reshape(-1, d) for x in (x0, x1))
    flat = {
        k: map_element(lambda part: part.reshape(-1, *part.shape[len(batch) :]), g)
        for k, g in found.element.items()
    }
    better = polish_arcs(symmetry, manifold, left, right, flat)
    element = {
        k: map_element(lambda part: part.reshape((*batch, *part.shape[1:])), g)
        for k, g in better.items()
    }
    weights = symmetry.act(element, x1.expand(*batch, d))
    value = objective(symmetry, x0, weights)
    return replace(found, element=element, weights=weights, objective=value)


def require_broadcast(first: tuple[str, Tensor], second: tuple[str, Tensor]) -> None:
    """Refuse batches that do not broadcast; each comes with the name of its argument.

    Raises
    ------
    ShapeError
        If they do not.
    """
    (a, x), (b, y) = first, second
    try:
        torch.broadcast_shapes(x.shape[:-1], y.shape[:-1])
    except RuntimeError:
        raise ShapeError(
            f"the batch dimensions of {a} and {b} must broadcast, got {a} of shape "
            f"{tuple(x.shape)} and {b} of shape {tuple(y.shape)}: for all pairs, give "
            f"{a}[:, None] and {b}[None]"
        ) from None
