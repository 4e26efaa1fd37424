"""What the tables say of networks: quality, averages, calibration, and whether they are copies."""

import math
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F

import symflow
from symflow.arch import Architecture, InputCoordinates
from symflow.errors import UnsupportedModuleError
from symflow.evaluate import accuracy, diversity, loss, nearest, probabilities
from symflow.zoo import Task

BINS = 15
TINY = 1e-30
AVERAGED = (1, 2, 4, 8, 16, 32, 64)
_AT_ONCE = 256  # networks whose predictions are held together


@final
@dataclass(frozen=True)
class Audit:
    """What samples are compared with: the training networks, in the metric of functions.

    Attributes
    ----------
    chart
        Coordinates in which distances of first layers are those of their outputs on training data;
        none where a network does not begin with a linear map, as convolutions do not.
    quotient
        Of the chart's architecture.
    known
        Training networks in the chart (N, R).
    wrong
        Which test examples each of them misclassifies (N, n).
    """

    chart: InputCoordinates | None
    quotient: symflow.Quotient
    known: Tensor
    wrong: Tensor

    @staticmethod
    def of(arch: Architecture, task: Task, training: Tensor) -> "Audit":
        """Prepare everything once."""
        try:
            chart = InputCoordinates.of_inputs(arch, task.x_train.flatten(1))
        except UnsupportedModuleError:
            chart = None
        quotient = symflow.Quotient(arch if chart is None else chart.arch)
        known = training if chart is None else chart.encode(training)
        return Audit(chart, quotient, known, misclassified(arch, training, task))

    def distances(self, ws: Tensor) -> list[float]:
        """Return the distance of each network to the nearest training network."""
        here = ws if self.chart is None else self.chart.encode(ws)
        return nearest(self.quotient, here, self.known).distance.tolist()

    def overlaps(self, arch: Architecture, ws: Tensor, task: Task) -> list[float]:
        """Return the largest intersection over union of mistakes with a training network."""
        mine, theirs = misclassified(arch, ws, task).float(), self.wrong.float()
        both = mine @ theirs.T
        either = mine.sum(1)[:, None] + theirs.sum(1) - both
        return (both / either.clamp_min(1)).amax(1).tolist()


def misclassified(arch: Architecture, ws: Tensor, task: Task) -> Tensor:
    """Return which test examples each network gets wrong (N, n)."""
    parts = [
        probabilities(arch, part, task.x_test).argmax(-1) != task.y_test
        for part in ws.split(_AT_ONCE)
    ]
    return torch.cat(parts)


def calibration_error(p: Tensor, y: Tensor) -> float:
    """Return the expected calibration error over 15 bins of confidence (Guo et al., 2017)."""
    confidence, chosen = p.max(-1)
    right = (chosen == y).double()
    bins = (confidence * BINS).long().clamp_max(BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, right - confidence.double())
    return float(gaps.abs().sum() / len(y))


def divergence(arch: Architecture, ws: Tensor, others: Tensor, x: Tensor) -> float:
    """Return the mean Kullback-Leibler divergence of predictions from others', in nats."""
    p, q = (probabilities(arch, w.float(), x).double().clamp_min(TINY).log() for w in (ws, others))
    return float(F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean())


def quality(arch: Architecture, ws: Tensor, task: Task) -> dict[str, Any]:
    """Measure single networks and averages of their predictions on the test data."""
    ws = ws.float()
    singles, losses = accuracy(arch, ws, task).tolist(), loss(arch, ws, task).tolist()
    p = probabilities(arch, ws[: max(AVERAGED)], task.x_test)
    averages = {}
    for k in AVERAGED:
        groups = p[: len(p) // k * k].unflatten(0, (-1, k)).mean(1)
        averages[str(k)] = float((groups.argmax(-1) == task.y_test).double().mean())
    alone = [calibration_error(one, task.y_test) for one in p]
    return {
        "accuracy": _mean(singles),
        "accuracy_error": _error(singles),
        "loss": _mean(losses),
        "loss_error": _error(losses),
        "networks": len(ws),
        "averages": averages,
        "averaged": averages[str(max(k for k in AVERAGED if k <= len(p)))],
        "averaged_of": max(k for k in AVERAGED if k <= len(p)),
        "calibration": _mean(alone),
        "calibration_averaged": calibration_error(p.mean(0), task.y_test),
        "diversity": float(diversity(arch, ws[: max(AVERAGED)], task)),
        "accuracies": [round(x, 5) for x in singles],
    }


def novelty(arch: Architecture, ws: Tensor, task: Task, audit: Audit) -> dict[str, Any]:
    """Measure whether networks are copies of training networks."""
    distances, overlaps = audit.distances(ws), audit.overlaps(arch, ws, task)
    return {
        "nearest": float(torch.tensor(distances).median()),
        "nearest_all": [round(x, 5) for x in distances],
        "overlap": float(torch.tensor(overlaps).median()),
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _error(values: list[float]) -> float:
    """Return the standard error of the mean."""
    m = _mean(values)
    spread = math.sqrt(sum((v - m) ** 2 for v in values) / max(1, len(values) - 1))
    return spread / math.sqrt(len(values))
