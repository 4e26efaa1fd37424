"""Loss barriers between trained networks, by aligner. Writes barriers.json and barriers.svg.

Networks of three kinds are trained on digits from different seeds and with different mini-batches.
Between the two of each pair the loss and the accuracy are measured: on the straight line between
them as they are (naive), between their balanced points without alignment (a control: what scales
alone do), and along the geodesic of the quotient with each aligner. Each again with a temperature,
fitted on training data at the midpoint (a control: what confidence alone does), and, for networks
with BatchNorm, with running statistics measured again on training inputs. Aligners, temperatures
and statistics see training data only; the figures that count are those of the test data.

The benchmark was written while looking at networks of seed 0; those measured are of another seed.

What has been measured is kept in build/ until the end: after an interruption the run goes on there.
"""

import json
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import record
import torch
from matplotlib.patches import Patch
from recovery import VisionTransformer
from scipy.stats import t as student
from torch import Tensor, nn
from torch.nn import functional as F

import symflow
from symflow import align
from symflow.arch import Architecture
from symflow.errors import UnsupportedModuleError
from symflow.evaluate import Barrier, Split, barrier
from symflow.files import save_json
from symflow.flows import FanIn

SEED = 1
PAIRS = 8
POINTS = 7
# What aligners with data, and a reset of statistics, see of the training inputs.
SEEN = 512
BATCH = 64
THREADS = 1
PLACE = record.ROOT / "build" / "barriers"
DEFAULT = "WeightMatching"
NAIVE, PROJECTED = "naive", "balanced, not aligned"


class Mean(nn.Module):
    """Mean over positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def cnn() -> nn.Module:
    """Three convolutions with BatchNorm."""
    layers: list[nn.Module] = []
    for n_in, n_out, pool in ((1, 16, True), (16, 32, True), (32, 32, False)):
        layers += [nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)] if pool else [nn.ReLU()]
    return nn.Sequential(*layers, Mean(), nn.Linear(32, 10))


def traced(module: nn.Module) -> Architecture:
    """Return the architecture of a module that takes digits as images."""
    return Architecture.from_module(module, torch.zeros(2, 1, 8, 8))


@dataclass(frozen=True)
class Subject:
    """An architecture, and how it is trained.

    Attributes
    ----------
    name
        What it is.
    arch
        Builds the architecture.
    epochs, lr
        Of Adam, to zero by half a cosine.
    statistics
        Whether it has running statistics.
    """

    name: str
    arch: Callable[[], Architecture]
    epochs: int
    lr: float
    statistics: bool = False


SUBJECTS = (
    Subject("MLP 64-128-128-10", lambda: symflow.mlp([64, 128, 128, 10]), 20, 1e-3),
    Subject("CNN, BatchNorm", lambda: traced(cnn()), 20, 3e-3, statistics=True),
    Subject("ViT, width 32", lambda: traced(VisionTransformer(1, 8, 2)), 30, 2e-3),
)

_Loss = Callable[[Tensor], Tensor]
ALIGNERS: dict[str, Callable[[Architecture, _Loss, Tensor], align.Aligner]] = {
    DEFAULT: lambda arch, loss, x: align.WeightMatching(),
    "FrankWolfe": lambda arch, loss, x: align.FrankWolfe(),
    "ActivationMatching": lambda arch, loss, x: align.ActivationMatching(arch, x),
    "Polished(Activation-, WeightMatching)": lambda arch, loss, x: align.Polished(
        align.ActivationMatching(arch, x), align.WeightMatching()
    ),
    "Sinkhorn, distance": lambda arch, loss, x: align.Sinkhorn(),
    "Sinkhorn, loss": lambda arch, loss, x: align.Sinkhorn(loss),
    "StraightThrough, loss": lambda arch, loss, x: align.StraightThrough(loss),
}


def variants(subject: Subject) -> Iterator[tuple[str, Split, bool, bool]]:
    """Yield the name, the split, and whether statistics are reset and a temperature is fitted."""
    splits: tuple[Split, ...] = ("test", "train")
    for split in splits:
        for reset in (False, True)[: 1 + subject.statistics]:
            yield f"{split}{', reset' if reset else ''}", split, reset, False
    for reset in (False, True)[: 1 + subject.statistics]:
        yield f"test{', reset' if reset else ''}, temperature", "test", reset, True


def interval(values: list[float]) -> dict[str, Any]:
    """Return the mean over pairs and its 95 % interval (Student's t)."""
    mean, n = statistics.mean(values), len(values)
    half = float(student.ppf(0.975, n - 1)) * statistics.stdev(values) / n**0.5
    figures = {"mean": mean, "low": mean - half, "high": mean + half}
    pairs = [float(f"{v:.4g}") for v in values]
    return {k: float(f"{v:.4g}") for k, v in figures.items()} | {"pairs": pairs}


def accuracy_height(b: Barrier) -> Tensor:
    """Return how far accuracy falls below the straight line between the ends, at most."""
    assert b.accuracies is not None  # asked for by the caller
    t = b.times.reshape(-1, 1).to(b.accuracies)
    line = (1 - t) * b.accuracies[0] + t * b.accuracies[-1]
    return (line - b.accuracies).amax(0)


class Measurement:
    """Trained networks in pairs, and what lies between them."""

    def __init__(self, subject: Subject, task: symflow.zoo.Task):
        self.subject, self.task, self.arch = subject, task, subject.arch()
        self.place = PLACE / subject.name.replace(" ", "-").replace(",", "")
        self.zoo = symflow.zoo.train(
            self.arch,
            task,
            runs=2 * PAIRS,
            epochs=subject.epochs,
            batch_size=BATCH,
            lr=subject.lr,
            schedule="cosine",
            batches=PAIRS,  # the two of a pair, r and r + PAIRS, see other mini-batches
            init=FanIn(),
            seed=SEED,
            folder=self.place,
            progress=False,
        )
        shape = self.arch.inputs[0].shape[1:]
        self.x, self.y = task.x_train[:SEEN].reshape(-1, *shape), task.y_train[:SEEN]

    def loss(self, w: Tensor) -> Tensor:
        """Return the training loss of networks (N, D), on what aligners may see."""
        z = self.arch.apply(w, self.x)
        labels = self.y.expand(len(w), -1)
        return F.cross_entropy(z.movedim(-1, 1), labels, reduction="none").mean(-1)

    def path(self, method: str) -> tuple[Any, float | None]:
        """Return the path between the networks, and seconds for a pair."""
        w0, w1 = self.zoo.final[:PAIRS], self.zoo.final[PAIRS:]
        if method == NAIVE:
            return (w0, w1), None
        if method == PROJECTED:
            quotient = symflow.Quotient(self.arch)
            return (quotient.project(w0), quotient.project(w1)), None
        aligner = ALIGNERS[method](self.arch, self.loss, self.x)
        path = symflow.Quotient(self.arch, aligner=aligner).geodesic(w0, w1)
        return path, path.alignment.seconds / PAIRS

    def measure(self, method: str) -> dict[str, Any]:
        """Measure all variants of one method, unless that has been done."""
        kept = self.place / f"{method.replace(' ', '-')}.json"
        if kept.is_file():
            return json.loads(kept.read_text())
        try:
            path, seconds = self.path(method)
        except UnsupportedModuleError as error:
            return {"refused": str(error)}
        found: dict[str, Any] = {}
        for name, split, reset, tempered in variants(self.subject):
            b = barrier(
                self.arch,
                path,
                self.task,
                split,
                points=POINTS,
                reset=self.x if reset else None,
                temperature="midpoint" if tempered else None,
                accuracies=True,
            )
            found[name] = {
                "loss_barrier": interval(b.height.tolist()),
                "accuracy_barrier": interval(accuracy_height(b).tolist()),
            }
            if b.temperature is not None:
                found[name]["temperature"] = interval(b.temperature.tolist())
        result = {"seconds_a_pair": seconds, "barriers": found}
        save_json(kept, result)
        return result


def rows_of(subject: Subject, task: symflow.zoo.Task) -> list[dict[str, Any]]:
    """Measure one architecture with all aligners and controls."""
    measurement = Measurement(subject, task)
    found = {}
    for method in (NAIVE, PROJECTED, *ALIGNERS):
        found[method] = measurement.measure(method)
        told = {k: v["loss_barrier"]["mean"] for k, v in found[method].get("barriers", {}).items()}
        print(f"{subject.name}, {method}: {told or found[method]}", flush=True)
    # Like is compared with like: naive, too, is reset where there are statistics.
    counts = "test, reset" if subject.statistics else "test"
    metrics = {
        key: record.spread(measurement.zoo.metrics[key].tolist())
        for key in ("test_accuracy", "test_loss", "train_accuracy", "train_loss")
    }

    def mean(method: str, variant: str = counts) -> float:
        return found[method]["barriers"][variant]["loss_barrier"]["mean"]

    told = f"{subject.name} on digits, mean of {PAIRS} pairs"
    told += ", statistics reset" if subject.statistics else ""
    naive = f"{mean(NAIVE):.3g} nats"
    rows = [
        record.judged(
            f"{told}: test loss barrier after weight matching, as a share of the naive {naive}",
            "share",
            [mean(DEFAULT) / mean(NAIVE)],
            at_most=0.5,
            subject=subject.name,
            counts=counts,
            parameters=measurement.arch.num_parameters,
            networks=metrics,
            controls={method: found[method]["barriers"] for method in (NAIVE, PROJECTED)},
        ),
        record.judged(
            f"{told}: the same as a share of what a fitted temperature alone leaves",
            "share",
            [mean(DEFAULT) / mean(NAIVE, f"{counts}, temperature")],
            at_most=1,
            subject=subject.name,
        ),
    ]
    for method in ALIGNERS:
        if "refused" in found[method]:
            rows[0].setdefault("refused", {})[method] = found[method]["refused"]
            continue
        row = record.judged(
            f"{told}: {method}, share of the naive barrier",
            "share",
            [mean(method) / mean(NAIVE)],
            at_most=1,
            subject=subject.name,
            aligner=method,
            in_readme=False,
        )
        rows.append(row | found[method])
    return rows


def draw(report: dict[str, Any]) -> None:
    """Draw all barriers with their intervals."""
    from matplotlib import pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "symflow"  # the same results give the same file
    subjects = list(dict.fromkeys(row["subject"] for row in report["rows"]))
    figure, axes = plt.subplots(
        2, len(subjects), figsize=(5 * len(subjects), 9), sharey="col", layout="constrained"
    )
    colours = {
        "test": "C0",
        "test, temperature": "C1",
        "test, reset": "C2",
        "test, reset, temperature": "C3",
    }
    for column, subject in zip(axes.T, subjects, strict=True):
        rows = [row for row in report["rows"] if row["subject"] == subject]
        found = {name: rows[0]["controls"][name] for name in (NAIVE, PROJECTED)}
        found |= {row["aligner"]: row["barriers"] for row in rows if "aligner" in row}
        shown = [name for name in colours if name in found[NAIVE]]
        for ax, figure_name in zip(column, ("loss_barrier", "accuracy_barrier"), strict=True):
            height = 0.8 / len(shown)
            for k, variant in enumerate(shown):
                cells = [b[variant][figure_name] for b in found.values()]
                ax.barh(
                    [n + (k - (len(shown) - 1) / 2) * height for n in range(len(found))],
                    [cell["mean"] for cell in cells],
                    height,
                    xerr=[
                        [cell["mean"] - cell["low"] for cell in cells],
                        [cell["high"] - cell["mean"] for cell in cells],
                    ],
                    color=colours[variant],
                    error_kw={"elinewidth": 0.8},
                )
            ax.set_yticks(range(len(found)), list(found))
            ax.set_xlim(left=0)
            ax.set_xlabel(
                "loss barrier, nats" if figure_name == "loss_barrier" else "accuracy barrier"
            )
        column[0].invert_yaxis()  # the columns share it
        column[0].set_title(subject)
    bars = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=bars, loc="outside lower center", ncols=len(bars))
    figure.suptitle(f"Test data, mean of {PAIRS} pairs of networks and its 95 % interval")
    figure.savefig(record.RESULTS / "barriers.svg", metadata={"Date": None})


def run() -> None:
    """Measure, store and draw everything."""
    torch.set_num_threads(THREADS)
    task = symflow.zoo.digits()
    rows = [row for subject in SUBJECTS for row in rows_of(subject, task)]
    path: Path = record.record("barriers", rows, SEED)
    print(path)
    print(record.table({"rows": rows}))
    draw(record.load("barriers"))
    shutil.rmtree(PLACE)


if __name__ == "__main__":
    if sys.argv[1:] == ["draw"]:
        draw(record.load("barriers"))
    else:
        run()
