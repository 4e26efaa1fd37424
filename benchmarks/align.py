"""How long weight matching takes and what it reaches, beside plain coordinate descent and rebasin.

Networks are initialised as PyTorch does it by default, after ``torch.manual_seed`` of 2r and 2r + 1
for r = 0, 1, 2; gains and shifts of normalisation layers, which that leaves alike, are drawn after.
All in float32 on one thread. ``rebasin`` is measured where ``SYMFLOW_REBASIN`` names a folder that
has it (``pip install --no-deps --target FOLDER rebasin==0.0.47 torchview tqdm graphviz``).
Writes align.json and align_scaling.svg.
"""

import contextlib
import importlib
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import plain
import record
import torch
from matplotlib import pyplot as plt
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import symflow

sys.path.append(str(record.ROOT / "tests"))
resnet20 = importlib.import_module("catalogue").resnet20

SEED = 0
THREADS = 1  # two of them spin for each other when the machine is shared
PAIRS = 3
REBASIN = os.environ.get("SYMFLOW_REBASIN", "")

Make = Callable[[], nn.Module]


def mlp(*widths: int) -> Make:
    """Linear layers with ReLU in between."""

    def make() -> nn.Module:
        layers: list[nn.Module] = []
        for n, m in itertools.pairwise(widths):
            layers += [nn.Linear(n, m), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    return make


def drawn(make: Make, seed: int) -> nn.Module:
    """Initialise a network by its seed, normalisation layers too."""
    torch.manual_seed(seed)
    net = make()
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0, 0.1)
    return net


def permuted_alone(make: Make, example: Tensor) -> symflow.Architecture:
    """Trace a network; permutations are all that acts, as in what it is compared with."""
    arch = symflow.Architecture.from_module(drawn(make, SEED), example)
    return arch.with_groups({axis.name: symflow.Permutation(axis.size) for axis in arch.axes})


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Swallow progress bars."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


def rebasin(a: nn.Module, b: nn.Module, example: Tensor) -> tuple[float, float] | None:
    """Seconds that rebasin takes and the objective it reaches; None if it is not there."""
    if not REBASIN:
        return None
    sys.path.append(REBASIN)
    try:
        package = importlib.import_module("rebasin")
    except ImportError:
        return None
    finally:
        sys.path.remove(REBASIN)
    with silent():
        began = time.perf_counter()
        found = package.PermutationCoordinateDescent(a, b, example)
        found.calculate_permutations()
        found.apply_permutations()
        seconds = time.perf_counter() - began
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return seconds, sum(float((p.double() * q.double()).sum().detach()) for p, q in pairs)


# name, how to make it, example, what the reference loop reaches, times of the plain descent allowed
ROW, IMAGE = torch.zeros(2, 784), torch.zeros(2, 3, 32, 32)
CELLS = (
    ("MLP 784-512x3-10", mlp(784, 512, 512, 512, 10), ROW, (61.50, 61.48, 61.42), 0.25),
    ("MLP 784-256x3-10", mlp(784, 256, 256, 256, 10), ROW, (37.29, 37.19, 37.26), 0.5),
    ("ResNet-20 width 16", lambda: resnet20(16), IMAGE, (847.9, 873.8, 869.9), 1 / 3),
    ("ResNet-20 width 32", lambda: resnet20(32), IMAGE, (1737.0, 1706.9, 1707.8), 1 / 3),
)


def cell(
    name: str, make: Make, example: Tensor, reference: tuple[float, ...], at_most: float
) -> list[dict[str, Any]]:
    """Three pairs of one kind of network: time against the plain descent, objectives."""
    arch = permuted_alone(make, example)
    digits = 2 if reference[0] < 100 else 1
    ratios, margins, peers, gains = [], [], [], []
    seconds: dict[str, list[float]] = {"symflow": [], "plain": [], "rebasin": []}
    values: dict[str, list[float]] = {"symflow": [], "plain": [], "rebasin": []}
    for r in range(PAIRS):
        a, b = drawn(make, 2 * r), drawn(make, 2 * r + 1)
        w0, w1 = arch.flatten(a), arch.flatten(b)
        x, y = arch.unflatten(w0), arch.unflatten(w1)
        found = symflow.WeightMatching()(arch.symmetry, w0, w1)
        for k in range(5):  # in turn, so that both see the same machine
            began = time.perf_counter()
            found = symflow.WeightMatching()(arch.symmetry, w0, w1)
            middle = time.perf_counter()
            other = plain.coordinate_descent(arch, x, y, seed=k)
            end = time.perf_counter()
            seconds["symflow"].append(middle - began)
            seconds["plain"].append(end - middle)
            ratios.append((middle - began) / (end - middle))
            values["plain"].append(plain.value(arch, x, y, other))
        value = symflow.align.objective(arch.symmetry, w0.double(), found.weights.double())
        values["symflow"].append(float(value))
        both = symflow.WeightMatching(("sequential", "random"))(arch.symmetry, w0, w1)
        gains.append(float(both.objective / found.objective) - 1)
        margins.append(round(round(float(value), digits) - reference[r], digits))
        best = max(values["plain"][-5:])
        measured = rebasin(a, b, example)
        if measured is not None:
            seconds["rebasin"].append(measured[0])
            values["rebasin"].append(measured[1])
            best = max(best, measured[1])
        peers.append(float(value) / best)
    stored = {
        "seconds": {k: record.spread(v) for k, v in seconds.items() if v},
        "objectives": {k: [round(v, 3) for v in found] for k, found in values.items()},
        "rebasin": _version(),
    }
    return [
        record.judged(
            f"weight matching, {name}: time of plain coordinate descent",
            "ratio",
            ratios,
            at_most=round(at_most, 3),
            **stored,
        ),
        record.judged(
            f"{name}: objective above the reference loop (least of {PAIRS} pairs)",
            "difference",
            [min(margins)],
            at_least=0,
            reference=reference,
            in_readme=False,
        ),
        record.judged(
            f"{name}: objective against the best of plain descent (5 runs) and rebasin",
            "ratio",
            [min(peers)],
            at_least=1,
        ),
        record.judged(
            f"{name}: what a second, random start would add (most of {PAIRS} pairs)",
            "relative_gain",
            [max(gains)],
            at_most=0.001,
            in_readme=False,
        ),
    ]


def _version() -> str:
    metadata = sorted(Path(REBASIN).glob("rebasin-*.dist-info")) if REBASIN else []
    return metadata[-1].name.removesuffix(".dist-info") if metadata else "not installed: not run"


# ---------------------------------------------------------------- many networks, large networks


def many() -> list[dict[str, Any]]:
    """100 networks 784-128-128-10 to one reference: together, one by one, and by rebasin."""
    make, example = mlp(784, 128, 128, 10), torch.zeros(2, 784)
    arch = permuted_alone(make, example)
    nets = [drawn(make, seed) for seed in range(101)]
    w = arch.as_weights(nets)
    matching = symflow.WeightMatching()
    together, alone = [], []
    for _ in range(5):
        alone += record.timed(lambda: [matching(arch.symmetry, w[0], x) for x in w[1:]], 1)
        together += record.timed(lambda: matching(arch.symmetry, w[0], w[1:]), 1)
    what = "100 networks 784-128-128-10 to one reference, together against"
    rows = [
        record.judged(
            f"{what} one by one",
            "times_faster",
            [a / b for a, b in zip(alone, together, strict=True)],
            at_least=5,
            seconds_together=record.spread(together),
            seconds_alone=record.spread(alone),
        )
    ]
    other = [rebasin(nets[0], b, example) for b in nets[1:]]
    seconds = [found[0] for found in other if found is not None]
    if seconds:
        rows.append(
            record.judged(
                f"{what} rebasin one by one",
                "times_faster",
                [sum(seconds) / b for b in together],
                at_least=20,
                seconds_rebasin=sum(seconds),
                rebasin=_version(),
            )
        )
    return rows


def large() -> list[dict[str, Any]]:
    """ResNet-50 and BERT-base of the transformers package, each in a process of its own."""
    rows = []
    for name, limits in {
        "ResNet-50 in memory": {"seconds": 30, "times_the_weights": 3},
        "ResNet-50 in files": {"seconds": 30},
        "BERT-base in files": {"seconds": 180, "gigabytes": 2},
    }.items():
        script = Path(__file__).with_name("large.py")
        result = subprocess.run(
            [sys.executable, str(script), name], capture_output=True, text=True, check=True
        )
        found = json.loads(result.stdout.splitlines()[-1])
        for figure, limit in limits.items():
            what = f"{name}, {found['parameters'] / 1e6:.1f} M parameters, pair aligned: {figure}"
            rows.append(
                record.judged(
                    what.replace("_", " "), figure, [found[figure]], at_most=limit, measured=found
                )
            )
    return rows


# ---------------------------------------------------------------- scaling


def floor(arch: symflow.Architecture, w0: Tensor, w1: Tensor) -> float:
    """Seconds of the products and assignments of a sequential pass and a verifying sweep.

    ``w1`` is aligned already, so these are the matrices that such a search would meet at its end.
    """
    a, b = arch.unflatten(w0), arch.unflatten(w1)
    weights = [key for key, x in a.items() if x.ndim == 2]
    began = time.perf_counter()
    for key, after in itertools.pairwise(weights):
        incoming = a[key] @ b[key].T
        linear_sum_assignment(incoming.double().numpy(), maximize=True)
        whole = incoming + a[after].T @ b[after]
        linear_sum_assignment(whole.double().numpy(), maximize=True)
    return time.perf_counter() - began


def scaling() -> list[dict[str, Any]]:
    """Time against width and depth, beside the floor measured in the same run."""
    points: list[dict[str, Any]] = []
    for kind, hidden in (
        *(("width", (n,) * 3) for n in (64, 128, 256, 512, 1024, 2048)),
        *(("depth", (256,) * depth) for depth in (1, 2, 4, 8, 16)),
    ):
        make = mlp(784, *hidden, 10)
        arch = permuted_alone(make, torch.zeros(2, 784))
        w0, w1 = (arch.flatten(drawn(make, seed)) for seed in (0, 1))
        times, floors = [], []
        for _ in range(3 if hidden[0] <= 1024 else 1):
            began = time.perf_counter()
            found = symflow.WeightMatching()(arch.symmetry, w0, w1)
            times.append(time.perf_counter() - began)
            floors.append(floor(arch, w0, found.weights))
        points.append(
            {
                "kind": kind,
                "at": hidden[0] if kind == "width" else len(hidden),
                "seconds": statistics.median(times),
                "floor": statistics.median(floors),
            }
        )
    _draw(points)
    wide = [p["seconds"] / p["floor"] for p in points if p["kind"] == "width" and p["at"] >= 512]
    return [
        record.judged(
            "weight matching of 784-nx3-10, n = 512, 1024, 2048: time of its products and "
            "assignments (a pass and a sweep)",
            "ratio",
            wide,
            at_most=2,
            points=points,
        )
    ]


def _draw(points: list[dict[str, Any]]) -> None:
    mpl.rcParams["svg.hashsalt"] = "symflow"
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for ax, kind in zip(axes, ("width", "depth"), strict=True):
        own = [p for p in points if p["kind"] == kind]
        for what, label in (("seconds", "weight matching"), ("floor", "its products, assignments")):
            ax.plot([p["at"] for p in own], [p[what] for p in own], "o-", label=label)
        ax.set(xscale="log", yscale="log", xlabel=kind, ylabel="seconds")
        ax.set_xticks([p["at"] for p in own], [str(p["at"]) for p in own])
        ax.minorticks_off()
        ax.legend()
    axes[0].set_title("784-n-n-n-10")
    axes[1].set_title("784-256-...-256-10")
    figure.savefig(record.RESULTS / "align_scaling.svg", metadata={"Date": None})


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    rows = [row for one in CELLS for row in cell(*one)]
    rows += [*many(), *large(), *scaling()]
    print(record.record("align", rows, SEED))
