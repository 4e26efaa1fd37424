"""The Frechet mean of networks: alternate alignment and averaging."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from symflow.manifolds import WeightManifold
from symflow.numerics import tolerance

_ROUNDS = 100
# A bar is shown for what takes longer (seconds).
_PATIENCE = 1.0


def frechet_mean(
    manifold: WeightManifold,
    align: Callable[[Tensor, Tensor], Tensor],
    points: Float[Tensor, "N D"],
    *,
    progress: bool = False,
) -> Float[Tensor, " D"]:
    """Minimise the sum of squared quotient distances to ``points``.

    Generalised Procrustes analysis (Gower, 1975): align each point to the current mean of the
    others, average them in the tangent space there, go to the nearest point of the section. Starts
    at the first point and ends as soon as the sum of squares does not fall any more: neither the
    alignment, which is a heuristic, nor the average in a tangent space promises that it does. What
    is returned is the mean of the best round; a local minimum at most.

    Parameters
    ----------
    manifold
        The section space.
    align
        ``align(means, points)`` moves each point next to a mean, the same for all or its own.
    points
        Points of the section.
    progress
        Whether rounds are counted where the output is a terminal and it takes a while.

    Examples
    --------
    >>> from symflow.manifolds import Flat
    >>> frechet_mean(Flat(2), lambda m, x: x, torch.tensor([[0.0, 2.0], [2.0, 4.0]]))
    tensor([1., 3.])
    """
    one = torch.ones((), dtype=points.dtype, device=points.device)
    mean = points[0]
    moved = align(mean, points)
    found, best = mean, torch.full_like(one, torch.inf)
    silent = None if progress else True  # None: where the output is no terminal
    for _ in tqdm(range(_ROUNDS), desc="mean", unit="round", delay=_PATIENCE, disable=silent):
        spread = manifold.dist2(mean, moved).mean()
        falls = bool(best - spread > tolerance(points.dtype).close * spread)
        if bool(spread < best):
            found, best = mean, spread
        if not falls:
            break
        step = manifold.logmap(mean, moved).mean(0)
        mean = manifold.projx(manifold.geodesic(mean, step, one))
        if len(points) > 1:
            # Each point has a share in the mean, which would keep it where it is.
            shares = manifold.logmap(mean.expand_as(moved), moved) / (1 - len(points))
            moved = align(manifold.geodesic(mean.expand_as(moved), shares, one), points)
    return found
