"""What the average of ten aligned networks is worth. Writes average.json.

Sets of ten networks are trained on digits, from different seeds with mini-batches of their own,
aligned to a common centre, and averaged: the centre itself, the Frechet mean, and the average after
one alignment with the first network. Beside them the average without alignment and the average of
predictions. And the elements between pairs, which go through the centre, are composed around all
cycles of three; those of pairs aligned by themselves are the control.

Two ways of training: that of barriers.py, and a wider network with more weight decay, which was
chosen among eight by examples held out of the training data. The benchmark was written while
looking at networks of seed 0; those measured are of another seed.
"""

import statistics
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import record
import torch
from torch import Tensor

import symflow
from symflow.align import WeightMatching, align_to_centre
from symflow.arch import Architecture, Element, Symmetry
from symflow.evaluate import accuracy, averaged, weight_average
from symflow.flows import FanIn
from symflow.groups import map_element
from symflow.zoo import Task, digits, train

SEED = 1
SETS, MEMBERS = 5, 10
BATCH = 64
THREADS = 1


@dataclass(frozen=True)
class Setting:
    """How networks are made.

    Attributes
    ----------
    name
        What they are.
    widths
        Of a ReLU MLP.
    epochs
        Passes over the training data, with a cosine schedule.
    options
        Of :func:`symflow.zoo.train`.
    """

    name: str
    widths: tuple[int, ...]
    epochs: int
    options: dict[str, Any]


SETTINGS = (
    Setting("MLP 64-128-128-10, Adam", (64, 128, 128, 10), 20, {"lr": 1e-3}),
    Setting(
        "MLP 64-256-10, SGD with weight decay 0.01",
        (64, 256, 10),
        60,
        {"optimizer": "sgd", "lr": 0.1, "weight_decay": 0.01},
    ),
)


def share_right(arch: Architecture, w: Tensor, task: Task) -> Tensor:
    """Return test accuracies in float64: shares of whole examples."""
    n = len(task.y_test)
    return (accuracy(arch, w, task).double() * n).round() / n


def one(g: Element, k: int) -> Element:
    """Return the element of one network."""
    return {name: map_element(lambda part: part[k], parts) for name, parts in g.items()}


def is_identity(g: Element) -> bool:
    """Whether an element of permutations moves nothing."""
    return all(bool((part == torch.arange(len(part))).all()) for part in g.values())


def consistent(symmetry: Symmetry, between: dict[tuple[int, int], Element]) -> float:
    """Return the share of all cycles of three around which elements compose to the identity."""
    cycles = list(permutations(range(MEMBERS), 3))
    found = 0
    for i, j, k in cycles:
        around = symmetry.compose(between[j, k], between[k, i])
        found += is_identity(symmetry.compose(between[i, j], around))
    return found / len(cycles)


def measure(arch: Architecture, task: Task, ws: Tensor) -> dict[str, float]:
    """Average one set in all ways."""
    quotient = symflow.Quotient(arch)
    points = quotient.project(ws)
    centred = align_to_centre(WeightMatching(), quotient.symmetry, points)
    pairs = list(permutations(range(MEMBERS), 2))
    through = {(i, j): centred.between(i, j) for i, j in pairs}
    alone = quotient.align_points(points[[i for i, _ in pairs]], points[[j for _, j in pairs]])
    by_itself = {pair: one(alone.element, k) for k, pair in enumerate(pairs)}
    mean = quotient.mean(ws)
    spreads = {
        "centre": float(centred.history[-1]) / MEMBERS,
        "frechet_mean": float(quotient.distance(mean, ws).square().mean()),
    }
    averages = {
        "centre": centred.centre,
        "frechet_mean": mean,
        "aligned_with_the_first": weight_average(quotient, ws),
        "not_aligned": ws.mean(0),
    }
    singles = share_right(arch, ws, task)
    return {
        "mean_single": float(singles.mean()),
        "best_single": float(singles.max()),
        **{name: float(share_right(arch, w, task)) for name, w in averages.items()},
        "predictions_averaged": float(averaged(arch, ws, task).accuracy),
        "consistent_through_the_centre": consistent(quotient.symmetry, through),
        "consistent_by_pairs": consistent(quotient.symmetry, by_itself),
        **{f"mean_square_distance_to_{name}": x for name, x in spreads.items()},
        "seconds": centred.seconds,
        "rounds": float(len(centred.history)),
    }


def rows_of(setting: Setting, task: Task) -> list[dict[str, Any]]:
    """Measure one way of training."""
    arch = symflow.mlp(list(setting.widths))
    zoo = train(
        arch,
        task,
        runs=SETS * MEMBERS,
        epochs=setting.epochs,
        batch_size=BATCH,
        schedule="cosine",
        batches="own",
        init=FanIn(),
        seed=SEED,
        progress=False,
        **setting.options,
    )
    found = []
    for ws in zoo.final.unflatten(0, (SETS, MEMBERS)):
        found.append(measure(arch, task, ws))
        print(setting.name, found[-1], flush=True)
    figures = {name: record.spread([f[name] for f in found]) for name in found[0]}
    gains = [f["centre"] - f["mean_single"] for f in found]
    told = f"{MEMBERS} digits networks, {setting.name}, {SETS} sets"
    return [
        record.judged(
            f"{told}: test accuracy of their aligned average less that of the mean one",
            "accuracy_gain",
            gains,
            at_least=0,
            mean_gain=round(statistics.mean(gains), 5),
            figures=figures,
        ),
        record.judged(
            f"{told}: cycles of three that compose to the identity, through the centre",
            "share",
            [f["consistent_through_the_centre"] for f in found],
            at_least=1,
            by_pairs=figures["consistent_by_pairs"],
        ),
    ]


def run() -> None:
    """Measure and store everything."""
    torch.set_num_threads(THREADS)
    task = digits()
    rows = [row for setting in SETTINGS for row in rows_of(setting, task)]
    print(record.record("average", rows, SEED))
    print(record.table({"rows": rows}))


if __name__ == "__main__":
    run()
