"""What the average of ten aligned networks is worth. Writes average.json.

Sets of ten networks are trained on digits, from different seeds with mini-batches of their own,
aligned to a common centre, and averaged: the centre itself, the Frechet mean, and the average after
one alignment with the first network. Each is measured as it is and repaired: its units rescaled to
vary over the training inputs as those of the networks (symflow.evaluate.repair); judged is the
repaired centre. Beside them the average without alignment and the average of predictions. And the
elements between pairs, which go through the centre, are composed around all
cycles of three; those of pairs aligned by themselves are the control.

Three ways of training: that of barriers.py; a wider network with more weight decay, which was
chosen among eight by examples held out of the training data; and the widths of the first, trained
at a constant rate, chosen in the same way among 24: of those whose average gained anything, the one
whose average was best. At a constant rate networks stop anywhere around their minimum and are about
one point less accurate than at a falling one: most of what their average gains is that noise. At a
falling rate no average was better than the mean network on all splits of the training data. The
benchmark was written while looking at networks of seed 0; those measured are of another seed.
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
from symflow.evaluate import accuracy, averaged, repair, weight_average
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
        Passes over the training data.
    options
        Of :func:`symflow.zoo.train`.
    schedule
        Of the learning rate.
    """

    name: str
    widths: tuple[int, ...]
    epochs: int
    options: dict[str, Any]
    schedule: str = "cosine"


SETTINGS = (
    Setting("MLP 64-128-128-10, Adam", (64, 128, 128, 10), 20, {"lr": 1e-3}),
    Setting(
        "MLP 64-256-10, SGD with weight decay 0.01",
        (64, 256, 10),
        60,
        {"optimizer": "sgd", "lr": 0.1, "weight_decay": 0.01},
    ),
    Setting(
        "MLP 64-128-128-10, SGD with weight decay 0.01 at a constant rate",
        (64, 128, 128, 10),
        60,
        {"optimizer": "sgd", "lr": 0.1, "weight_decay": 0.01},
        schedule="constant",
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
    # Each average with the networks as they were averaged: unit by unit, at the same scales.
    to_first = quotient.align(ws[:1], ws).weights
    aligned = {
        "centre": (centred.centre, centred.weights),
        "frechet_mean": (mean, quotient.align(mean, ws).weights),
        "aligned_with_the_first": (to_first.mean(0), to_first),
        "not_aligned": (ws.mean(0), ws),
    }
    repaired = {
        f"{name}_repaired": repair(arch, w, networks, task.x_train)
        for name, (w, networks) in aligned.items()
    }
    singles = share_right(arch, ws, task)
    return {
        "mean_single": float(singles.mean()),
        "best_single": float(singles.max()),
        **{name: float(share_right(arch, w, task)) for name, w in (averages | repaired).items()},
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
        schedule=setting.schedule,
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
    gains = [f["centre_repaired"] - f["mean_single"] for f in found]
    plain = [f["centre"] - f["mean_single"] for f in found]
    told = f"{MEMBERS} digits networks, {setting.name}, {SETS} sets"
    return [
        record.judged(
            f"{told}: test accuracy of their aligned and repaired average less that of the "
            "mean one",
            "accuracy_gain",
            gains,
            at_least=0,
            mean_gain=round(statistics.mean(gains), 5),
            unrepaired=record.spread(plain),
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
