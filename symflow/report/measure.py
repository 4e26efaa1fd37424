"""What is measured of a set of networks, and the statistics that are shown of it."""

from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.arch import Architecture
from symflow.evaluate import accuracy, averaged, diversity, loss, nearest
from symflow.quotient import Quotient
from symflow.zoo import Task


def median(values: list[float]) -> float:
    """Return the median.

    Examples
    --------
    >>> median([3.0, 1.0, 2.0])
    2.0
    """
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))


def mean(values: list[float]) -> float:
    """Return the mean.

    Examples
    --------
    >>> mean([1.0, 3.0])
    2.0
    """
    return float(torch.tensor(values, dtype=torch.float64).mean())


def standard_error(values: list[float]) -> float:
    """Return the standard error of the mean; zero for a single value.

    Examples
    --------
    >>> standard_error([1.0, 3.0])
    1.0
    """
    found = torch.tensor(values, dtype=torch.float64)
    return float(found.std() / len(found) ** 0.5) if len(found) > 1 else 0.0


@final
class Measure:
    """What is measured of every set of networks."""

    def __init__(
        self,
        arch: Architecture,
        task: Task,
        quotient: Quotient,
        known: Float[Tensor, "N D"],
    ) -> None:
        self.arch, self.task, self.quotient, self.known = arch, task, quotient, known
        self._centre = known[:1]
        aligned = quotient.align(self._centre, known).weights.double()
        self._origin = aligned.mean(0)
        # The two directions in which the aligned training networks differ most.
        self._axes = torch.linalg.svd(aligned - self._origin, full_matrices=False).Vh[:2]

    def __call__(
        self, ws: Float[Tensor, "N D"], kind: str, *, exclude_self: bool = False
    ) -> dict[str, Any]:
        arch, task = self.arch, self.task
        together = averaged(arch, ws, task)
        aligned = self.quotient.align(self._centre, ws).weights.double()
        distance = nearest(self.quotient, ws, self.known, exclude_self=exclude_self).distance
        return {
            "kind": kind,
            "accuracy": accuracy(arch, ws, task).tolist(),
            "loss": loss(arch, ws, task).tolist(),
            "train loss": loss(arch, ws, task, "train").tolist(),
            "averaged accuracy": float(together.accuracy),
            "averaged loss": float(together.loss),
            "diversity": float(diversity(arch, ws, task)),
            "nearest": distance.tolist(),
            "plane": ((aligned - self._origin) @ self._axes.T).tolist(),
        }
