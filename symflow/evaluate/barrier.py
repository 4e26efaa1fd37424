"""Loss barriers between networks, along any path."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.arch import Architecture, Weights
from symflow.errors import ShapeError
from symflow.evaluate.predict import LabelledData, Split, loss
from symflow.evaluate.weights import flat_weights


@final
@dataclass(frozen=True, eq=False)
class Barrier:
    """The loss along paths between networks.

    Attributes
    ----------
    times
        Times (points,) from 0 to 1.
    losses
        Loss at each time (points, *batch).

    Examples
    --------
    >>> b = Barrier(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([1.0, 5.0, 3.0]))
    >>> b.midpoint, b.height
    (tensor(3.), tensor(3.))
    """

    times: Float[Tensor, " points"]
    losses: Float[Tensor, "points *batch"]

    @property
    def excess(self) -> Float[Tensor, "points *batch"]:
        """Loss above the straight line between the losses of the ends; zero at the ends."""
        t = self.times.reshape(-1, *(1,) * (self.losses.ndim - 1))
        return self.losses - (1 - t) * self.losses[0] - t * self.losses[-1]

    @property
    def height(self) -> Float[Tensor, "*batch"]:
        """The largest excess on the way, never negative (Frankle et al., 2020)."""
        return self.excess.amax(0)

    @property
    def midpoint(self) -> Float[Tensor, "*batch"]:
        """The excess half way; negative where the middle is better than the ends."""
        return self.excess[len(self.times) // 2]


def barrier(
    arch: Architecture,
    path: tuple[Weights, Weights] | Callable[[float], Tensor],
    task: LabelledData,
    split: Split = "train",
    *,
    points: int = 11,
) -> Barrier:
    """Measure the loss along paths between networks, for many pairs at once.

    Parameters
    ----------
    arch
        A classifier.
    path
        Two ends, for the straight line between them (their batch dimensions broadcast); or
        anything that takes a time and returns weights (*batch, D), such as a
        :class:`~symflow.quotient.Geodesic`.
    task
        Labelled data.
    split
        On training data a barrier is about the landscape that was descended; on test data it may
        be negative, since averages of overconfident networks do better than they.
    points
        Number of times, ends included; odd, so that the middle is one. 3 is the midpoint alone.

    Raises
    ------
    ShapeError
        If ``points`` is even or less than 3, or ``path`` is neither.
    LeafError
        If weights are NaN or infinite.

    Notes
    -----
    ``points`` passes over all pairs and examples; memory for one time at a time.

    Examples
    --------
    >>> import symflow
    >>> arch, task = symflow.mlp([30, 4, 2]), symflow.zoo.breast_cancer()
    >>> w0, w1 = symflow.zoo.train(arch, task, runs=2, epochs=2, progress=False).final
    >>> bool(barrier(arch, (w0, w1), task).midpoint > barrier(arch, (w0, w0), task).midpoint)
    True
    >>> barrier(arch, symflow.Quotient(arch).geodesic(w0, w1), task).losses.shape
    torch.Size([11])
    """
    if points < 3 or points % 2 == 0:
        raise ShapeError(f"points must be odd and at least 3, got {points}")
    if isinstance(path, tuple) and len(path) == 2:
        at = _line(arch, *path)
    elif callable(path):
        at = path
    else:
        raise ShapeError(
            "path must be two ends (w0, w1), or take a time and return weights as a Geodesic does; "
            f"got {type(path).__name__}"
        )
    times = torch.linspace(0, 1, points, dtype=torch.float64)
    rows = [loss(arch, at(float(t)), task, split) for t in times]
    losses = torch.stack(rows)
    return Barrier(times.to(losses), losses)


def _line(arch: Architecture, w0: Weights, w1: Weights) -> Callable[[float], Tensor]:
    a, b = flat_weights(arch, w0, "w0"), flat_weights(arch, w1, "w1")
    try:
        torch.broadcast_shapes(a.shape, b.shape)
    except RuntimeError:
        raise ShapeError(
            f"the ends of a path must have equal or broadcasting shapes, got {tuple(a.shape)} and "
            f"{tuple(b.shape)}"
        ) from None
    return lambda t: (1 - t) * a + t * b
