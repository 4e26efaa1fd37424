"""The study behind ``symflow demo``: from breast cancer to new networks. Every number, no picture.

What comes back is plain JSON, so that a report can be drawn again from stored results.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.arch import Architecture, mlp
from symflow.evaluate import (
    accuracy,
    barrier,
    loss,
    weight_average,
)
from symflow.flows import Flow, Gaussian, balanced, euclidean, geometric, normalized
from symflow.quotient import Quotient
from symflow.report.measure import Measure, mean, median
from symflow.zoo import Task, Zoo, breast_cancer, train
from symflow.zoo.store import versions

PRESETS: dict[str, Callable[..., Flow]] = {
    "Euclidean": euclidean,
    "Normalized": normalized,
    "Geometric": geometric,
    "Balanced": balanced,
}
HELD_OUT, TRAINING = "held out", "training"
NOISE, AVERAGE = "training + noise", "average of aligned"
NETWORKS = (TRAINING, HELD_OUT, *PRESETS, NOISE, AVERAGE)
PATHS = ("as trained", "aligned", "balanced geodesic", "sphere geodesic")


@final
@dataclass(frozen=True)
class StudySettings:
    """Sizes of the study; :meth:`small` is for trying the machinery, not for results.

    Attributes
    ----------
    widths
        Of the base networks.
    runs, held_out, epochs, batch_size, lr, std
        The zoo: networks that flows are trained on, networks that they never see, and how all of
        them are trained (Adam), from N(0, std^2).
    pairs
        Pairs of networks whose barriers are measured.
    width, depth, steps, flow_lr, bridge
        The flows: their network, optimiser steps, peak rate, and path noise.
    samples, sampling_steps
        Networks drawn from each flow, and Euler steps to draw them.
    other_steps
        Further numbers of Euler steps, for the curve of steps against quality.
    merged
        Training networks in each aligned average.
    seed
        Of everything random.

    Examples
    --------
    >>> StudySettings().runs, StudySettings.small(seed=3).runs
    (100, 12)
    """

    widths: tuple[int, ...] = (30, 16, 16, 2)
    runs: int = 100
    held_out: int = 100
    epochs: int = 50
    batch_size: int = 16
    lr: float = 0.001
    std: float = 0.1
    pairs: int = 200
    width: int = 64
    depth: int = 3
    steps: int = 800
    flow_lr: float = 0.002
    bridge: float = 0.1
    samples: int = 100
    sampling_steps: int = 32
    other_steps: tuple[int, ...] = (1, 2, 4, 8, 16)
    merged: int = 16
    seed: int = 0

    @staticmethod
    def small(seed: int = 0) -> "StudySettings":
        """Return sizes that end within seconds."""
        return StudySettings(
            **{"runs": 12, "held_out": 8, "epochs": 4, "pairs": 10, "width": 16, "depth": 1},
            **{"steps": 20, "samples": 8, "sampling_steps": 4, "other_steps": (1, 2), "merged": 4},
            seed=seed,
        )


def study(
    settings: StudySettings,
    *,
    folder: Path | None = None,
    progress: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train a zoo, align it, train the flows on it, and compare what they draw.

    Parameters
    ----------
    settings
        Sizes and seed.
    folder
        Where zoo and flows are stored. What an earlier call with the same settings left there is
        not done again, and what it left half done goes on.
    progress
        Show progress bars.
    say
        Told what begins, in words.

    Returns
    -------
    dict
        ``settings``, ``provenance``, ``architecture``, ``seconds``, ``barriers``, ``networks`` and
        ``checks``, all JSON.

    Examples
    --------
    >>> found = study(StudySettings.small(), progress=True, say=print)       # doctest: +SKIP
    >>> found["checks"][0]["what"]                                           # doctest: +SKIP
    'mean midpoint barrier of the training loss, aligned'
    """
    with _one_thread():
        return _study(settings, folder, progress, say)


def _study(
    settings: StudySettings, folder: Path | None, progress: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    arch, task = mlp(settings.widths, "relu"), breast_cancer()
    clock = _Clock()
    say(f"training {settings.runs + settings.held_out} networks {_name(settings)} at once")
    zoo = _zoo(arch, task, settings, folder, progress)
    clock.lap("zoo")
    known, unseen = zoo.select(slice(settings.runs)), zoo.select(slice(settings.runs, None))
    quotient = Quotient(arch)
    say(f"loss barriers of {settings.pairs} pairs")
    barriers = _barriers(arch, task, known.final, settings)
    clock.lap("barriers")
    measure = Measure(arch, task, quotient, known.final)
    networks = {TRAINING: measure(known.final, "trained", exclude_self=True)}
    networks[HELD_OUT] = measure(unseen.final, "trained")
    clock.lap("trained networks")
    for name, preset in PRESETS.items():
        say(f"flow {name}: {settings.steps} steps, then {settings.samples} networks")
        place = None if folder is None else folder / name.lower()
        networks[name] = _flow(preset, known, unseen, measure, settings, place, progress)
        clock.lap(name)
    say("baselines")
    typical = median(networks[HELD_OUT]["nearest"])
    for name, weights in _baselines(quotient, known.final, typical, settings).items():
        networks[name] = measure(weights, "baseline")
    clock.lap("baselines")
    return {
        "settings": asdict(settings),
        "provenance": versions() | {"threads": torch.get_num_threads()},
        "architecture": {
            "name": _name(settings),
            "parameters": arch.num_parameters,
            "symmetry": str(arch.symmetry),
            "task": repr(task),
        },
        "seconds": clock.seconds,
        "barriers": barriers,
        "networks": networks,
        "checks": _checks(barriers, networks),
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread.

    The tensors are small: a second thread saves a quarter of the time on an idle machine, but on a
    busy one a step takes up to twenty times as long, since each small operation waits for both.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Clock:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = round(now - self._last, 2)
        self._last = now


def _name(settings: StudySettings) -> str:
    return "-".join(map(str, settings.widths))


def _zoo(
    arch: Architecture, task: Task, settings: StudySettings, folder: Path | None, progress: bool
) -> Zoo:
    return train(
        arch,
        task,
        runs=settings.runs + settings.held_out,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        lr=settings.lr,
        batches="own",
        init=Gaussian(settings.std),
        seed=settings.seed,
        folder=None if folder is None else folder / "zoo",
        progress=progress,
    )


def _barriers(
    arch: Architecture, task: Task, ws: Float[Tensor, "N D"], settings: StudySettings
) -> dict[str, Any]:
    """Loss along four paths between the networks of random pairs."""
    generator = torch.Generator().manual_seed(settings.seed)
    first = torch.randint(len(ws), (settings.pairs,), generator=generator)
    other = torch.randint(len(ws) - 1, (settings.pairs,), generator=generator)
    a, b = ws[first], ws[(first + 1 + other) % len(ws)]
    quotient = Quotient(arch)
    element = quotient.align(a, b).element
    paths = (
        (a, b),
        (a, quotient.symmetry.act(element, b)),
        quotient.geodesic(a, b),
        Quotient(arch, "sphere").geodesic(a, b),
    )
    found: dict[str, Any] = {}
    for name, path in zip(PATHS, paths, strict=True):
        on_train, on_test = (barrier(arch, path, task, split) for split in ("train", "test"))
        curves = on_train.losses.double()
        found[name] = {
            "times": on_train.times.tolist(),
            "mean": curves.mean(1).tolist(),
            "low": curves.quantile(0.1, dim=1).tolist(),
            "high": curves.quantile(0.9, dim=1).tolist(),
            "train midpoint": on_train.midpoint.tolist(),
            "test midpoint": on_test.midpoint.tolist(),
        }
    return found


def _flow(
    preset: Callable[..., Flow],
    known: Zoo,
    unseen: Zoo,
    measure: Measure,
    settings: StudySettings,
    folder: Path | None,
    progress: bool,
) -> dict[str, Any]:
    began = time.perf_counter()
    flow = preset(
        known.arch,
        source=Gaussian(settings.std),
        bridge=settings.bridge,
        width=settings.width,
        depth=settings.depth,
        seed=settings.seed,
    ).fit(
        known,
        validation=unseen,
        steps=settings.steps,
        lr=settings.flow_lr,
        log_every=max(1, settings.steps // 20),
        checkpoint_every=max(1, settings.steps // 4),
        seed=settings.seed,
        folder=folder,
        progress=progress,
    )
    trained = time.perf_counter()
    draws = {
        steps: flow.sample(settings.samples, steps=steps, seed=settings.seed + 1)
        for steps in (*settings.other_steps, settings.sampling_steps)
    }
    return measure(draws[settings.sampling_steps], "flow") | {
        "parameters": sum(p.numel() for p in flow.field.parameters()),
        "training seconds": round(trained - began, 2),
        "history": flow.history,
        "by steps": {
            str(steps): {
                "accuracy": mean(accuracy(known.arch, ws, measure.task).tolist()),
                "loss": mean(loss(known.arch, ws, measure.task).tolist()),
            }
            for steps, ws in draws.items()
        },
    }


def _baselines(
    quotient: Quotient, known: Float[Tensor, "N D"], typical: float, settings: StudySettings
) -> dict[str, Tensor]:
    """Make copies with noise of the size that parts independent networks, and aligned averages."""
    generator = torch.Generator().manual_seed(settings.seed)
    n, count = settings.samples, quotient.arch.num_parameters
    rows = torch.randint(len(known), (n,), generator=generator)
    noise = torch.randn(n, count, generator=generator).to(known)
    copies = quotient.project(known[rows]).clone()
    copies[:, :count] += noise * typical / count**0.5
    order = torch.rand(n, len(known), generator=generator).argsort(-1)
    return {
        NOISE: copies,
        AVERAGE: weight_average(quotient, known[order[:, : settings.merged]]),
    }


def _checks(barriers: dict[str, Any], networks: dict[str, Any]) -> list[dict[str, Any]]:
    """List what the study has to show, with the figures it shows."""
    raw, aligned = (mean(barriers[name]["train midpoint"]) for name in PATHS[:2])
    trained, ours = networks[HELD_OUT], networks["Geometric"]
    gap = abs(mean(trained["accuracy"]) - mean(ours["accuracy"]))
    ratio = mean(ours["loss"]) / mean(trained["loss"])
    far = median(ours["nearest"]) / median(trained["nearest"])
    rows = [
        ("mean midpoint barrier of the training loss, aligned", aligned, "at most", 0.02),
        ("the same, as a share of the unaligned one", aligned / raw, "at most", 1 / 3),
        ("Geometric: accuracy, difference from held-out trained networks", gap, "at most", 0.02),
        ("Geometric: loss, as a multiple of theirs", ratio, "at most", 1.5),
        (
            "Geometric: distance to the nearest training network, against theirs",
            far,
            "at least",
            0.8,
        ),
    ]
    return [
        {
            "what": what,
            "got": got,
            "side": side,
            "limit": limit,
            "met": bool(got <= limit if side == "at most" else got >= limit),
        }
        for what, got, side, limit in rows
    ]
