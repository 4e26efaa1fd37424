"""Distances between all pairs of networks, in pieces, on several processes if wanted."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from symflow.errors import ShapeError

# So many coordinates of pairs are held at a time, by each process.
_COORDINATES = 2**22
# So many pieces for each process, or the last ones to end are waited for.
_PIECES = 4
# A bar is shown for what takes longer (seconds).
_PATIENCE = 1.0


def pairwise(
    distance: Callable[[Tensor, Tensor], Tensor],
    points: Float[Tensor, "N D"],
    *,
    workers: int = 1,
    progress: bool = False,
) -> Float[Tensor, "N N"]:
    """Return all distances of points, of which one triangle is computed.

    Parameters
    ----------
    distance
        Takes two batches (pairs, D) and returns (pairs,); with several workers, one that can be
        pickled.
    points
        The points.
    workers
        Number of joblib's jobs; 1 stays in this process. The backend is the active one: processes
        on this machine, or what ``joblib.parallel_config`` names, such as Dask or Ray.
    progress
        Whether to show a bar where the output is a terminal.

    Raises
    ------
    ShapeError
        If there is no worker.

    Examples
    --------
    >>> pairwise(lambda a, b: (a - b).norm(dim=-1), torch.tensor([[0.0], [3.0], [1.0]]))
    tensor([[0., 3., 1.],
            [3., 0., 2.],
            [1., 2., 0.]])
    """
    if workers < 1:
        raise ShapeError(f"workers must be 1 or more, got {workers}")
    n = len(points)
    pairs = n * (n - 1) // 2
    step = max(1, _COORDINATES // max(1, 2 * points.shape[-1]))
    if workers > 1:
        step = max(1, min(step, -(-pairs // (_PIECES * workers))))
    pieces = [torch.arange(k, min(k + step, pairs)) for k in range(0, pairs, step)]
    found = points.new_zeros(n, n)
    with tqdm(
        desc="pairs", total=pairs, delay=_PATIENCE, disable=None if progress else True
    ) as bar:
        for piece, d in zip(pieces, _distances(distance, points, pieces, workers), strict=True):
            i, j = (at.to(points.device) for at in pair(piece, n))
            found[i, j] = found[j, i] = d.to(found)
            bar.update(len(piece))
    return found


def pair(k: Int[Tensor, " K"], n: int) -> tuple[Int[Tensor, " K"], Int[Tensor, " K"]]:
    """Return the k-th pairs i < j of n, counted row by row.

    Examples
    --------
    >>> pair(torch.arange(3), 3)    # 01, 02, 12
    (tensor([0, 0, 1]), tensor([1, 2, 2]))
    """
    rows = torch.arange(n)
    before = rows * n - rows * (rows + 1) // 2
    i = torch.searchsorted(before, k, right=True) - 1
    # The last row has no pair of its own, and begins where the pairs end.
    return i, k - before[i] + i + 1


def _distances(
    distance: Callable[[Tensor, Tensor], Tensor],
    points: Tensor,
    pieces: list[Tensor],
    workers: int,
) -> Iterator[Tensor]:
    ends = (
        tuple(points[at.to(points.device)] for at in pair(piece, len(points))) for piece in pieces
    )
    if workers == 1:
        return (distance(a, b) for a, b in ends)
    import joblib  # deferred: only this needs it

    run: Any = joblib.Parallel(n_jobs=workers, return_as="generator")
    return iter(run(joblib.delayed(distance)(a, b) for a, b in ends))
