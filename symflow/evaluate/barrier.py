"""Loss barriers between networks, along any path."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from symflow.arch import Architecture, Weights
from symflow.errors import ShapeError
from symflow.evaluate.normalisation import reset_normalisation
from symflow.evaluate.predict import LabelledData, Split, accuracy, fit_temperature, loss
from symflow.evaluate.weights import flat_weights
from symflow.quotient import Quotient

# A bar is shown for what takes longer (seconds).
_PATIENCE = 1.0

Tempering: TypeAlias = 'Literal["midpoint"] | None'


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
    reset
        Whether the inner points' running statistics were measured again.
    temperature
        What the inner points' logits were divided by (*batch,), or None.
    accuracies
        Accuracy at each time (points, *batch), or None if not asked for.

    Examples
    --------
    >>> b = Barrier(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([1.0, 5.0, 3.0]))
    >>> b.midpoint, b.height
    (tensor(3.), tensor(3.))
    """

    times: Float[Tensor, " points"]
    losses: Float[Tensor, "points *batch"]
    reset: bool = False
    temperature: Float[Tensor, "*batch"] | None = None
    accuracies: Float[Tensor, "points *batch"] | None = None

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
    reset: Tensor | LabelledData | None = None,
    temperature: Tempering = None,
    accuracies: bool = False,
    progress: bool = False,
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
    reset
        Inputs, or data whose training inputs are taken, on which the running statistics of the
        inner points are measured again (:func:`~symflow.evaluate.reset_normalisation`). The ends
        stay as they are.
    temperature
        ``"midpoint"``: the logits of all inner points are divided by the temperature that makes
        the middle's training loss least, one for each pair. The ends stay as they are. A barrier
        that this removes was one of confidence: a temperature alone, without any alignment, can
        connect wide networks. Compare with it before a permutation gets the credit.
    accuracies
        Also measure the accuracy at each time, by further passes.
    progress
        Whether a bar is shown where the output is a terminal and it takes a while.

    Raises
    ------
    ShapeError
        If ``points`` is even or less than 3, ``path`` is neither, or ``temperature`` is unknown.
    LeafError
        If weights are NaN or infinite.

    Notes
    -----
    ``points`` passes over all pairs and examples; memory for one time at a time. A reset costs one
    more pass for each layer with statistics, a temperature ten to forty.

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
    if temperature not in (None, "midpoint"):
        raise ShapeError(f"temperature must be 'midpoint' or None, got {temperature!r}")

    def inner(t: float) -> Tensor:
        return at(t) if reset is None else reset_normalisation(arch, at(t), reset)

    fitted = None if temperature is None else fit_temperature(arch, inner(0.5), task)
    times = torch.linspace(0, 1, points, dtype=torch.float64)
    rows: list[Tensor] = []
    shares: list[Tensor] = []
    silent = None if progress else True  # None: where the output is no terminal
    for t in tqdm(times.tolist(), desc="path", unit="point", delay=_PATIENCE, disable=silent):
        between = 0 < t < 1
        w = inner(t) if between else at(t)
        rows.append(loss(arch, w, task, split, temperature=fitted if between else None))
        if accuracies:
            shares.append(accuracy(arch, w, task, split))
    losses = torch.stack(rows)
    found = torch.stack(shares) if shares else None
    return Barrier(times.to(losses), losses, reset is not None, fitted, found)


@final
@dataclass(frozen=True, eq=False)
class Compared:
    """The loss between networks with and without alignment.

    Attributes
    ----------
    naive
        Along the straight line between the networks as they are.
    aligned
        Along the geodesic of the quotient.

    Examples
    --------
    >>> line = Barrier(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([1.0, 5.0, 3.0]))
    >>> Compared(line, line).share
    tensor(1.)
    """

    naive: Barrier
    aligned: Barrier

    @property
    def share(self) -> Float[Tensor, "*batch"]:
        """What is left of the naive barrier's height; NaN where there is none."""
        height = self.naive.height
        return torch.where(height > 0, self.aligned.height / height, torch.nan)


def compared(
    quotient: Quotient,
    w0: Weights,
    w1: Weights,
    task: LabelledData,
    split: Split = "train",
    *,
    points: int = 11,
    reset: Tensor | LabelledData | None = None,
    temperature: Tempering = None,
    accuracies: bool = False,
    progress: bool = False,
) -> Compared:
    """Measure barriers with and without alignment, everything else alike.

    Parameters
    ----------
    quotient
        Whose geodesic is the aligned path.
    w0, w1
        Weights; batch dimensions broadcast.
    task, split, points, reset, temperature, accuracies, progress
        As for :func:`barrier`, for both paths.

    Raises
    ------
    ShapeError, LeafError
        As :func:`barrier` and :meth:`symflow.Quotient.geodesic`.

    Examples
    --------
    >>> import symflow
    >>> arch, task = symflow.mlp([30, 4, 2]), symflow.zoo.breast_cancer()
    >>> w = symflow.zoo.train(arch, task, runs=2, epochs=2, progress=False).final
    >>> found = compared(symflow.Quotient(arch), w[0], w[1], task, points=3, temperature="midpoint")
    >>> bool(found.aligned.height <= found.naive.height)
    True
    """
    first, last = (flat_weights(quotient.arch, w, n) for w, n in ((w0, "w0"), (w1, "w1")))
    options: dict[str, Any] = {"points": points, "reset": reset, "temperature": temperature}
    options |= {"accuracies": accuracies, "progress": progress}
    paths = (first, last), quotient.geodesic(first, last)
    return Compared(*(barrier(quotient.arch, p, task, split, **options) for p in paths))


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
