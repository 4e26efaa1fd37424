"""Flows over MNIST networks 784-10-10: the source thesis' table, its zoo size, and beyond.

A zoo of runs from Gaussian initial weights is trained once; flows map fresh Gaussian initial weights
to trained ones. Labels are used to train the zoo and to score samples, never by a flow: the
behaviour loss compares the predictions of networks on unlabelled training inputs. Test data is
touched by the final figures alone.
"""

import time
from dataclasses import asdict, dataclass, replace
from typing import Any, final

import torch
from ledger import Ledger, Row
from measured import Audit, novelty, quality
from torch import Tensor

import symflow
from symflow import flows
from symflow.arch import InputCoordinates
from symflow.evaluate import weight_average
from symflow.zoo import Task, Zoo, train

WIDTHS = [784, 10, 10]
PRESETS = {
    "Euclidean": flows.euclidean,
    "Normalized": flows.normalized,
    "Geometric": flows.geometric,
    "Balanced": flows.balanced,
}
COUPLINGS = {
    "run": flows.RunCoupling(),
    "independent": flows.Independent(),
    "OT": flows.MiniBatchOT(),
    "quotient OT": flows.MiniBatchOT(metric="quotient"),
}


@final
@dataclass(frozen=True)
class ZooSettings:
    """How base networks are trained: SGD with momentum and a cosine schedule, shared batches."""

    runs: int = 4096
    held_out: int = 128
    epochs: int = 4
    batch_size: int = 128
    lr: float = 0.05
    momentum: float = 0.9
    std: float = 0.1
    seed: int = 0


@final
@dataclass(frozen=True)
class FlowSettings:
    """One flow.

    Attributes
    ----------
    preset, coupling, runs
        What is learned, and on how many runs of the zoo (all if None).
    rank
        Directions of the inputs that are kept.
    width, depth, time_width
        The field.
    bridge, behaviour
        Path noise, and weight of the behaviour loss.
    steps, batch_size, lr, ema
        Training, with Muon.
    sampling, samples
        Euler steps, and networks drawn.
    seed
        Of the field, its training and its samples.
    """

    preset: str = "Balanced"
    coupling: str = "run"
    runs: int | None = None
    rank: int = 128
    width: int = 64
    depth: int = 3
    time_width: int = 16
    bridge: float = 0.15
    behaviour: float = 10.0
    steps: int = 2500
    batch_size: int = 128
    lr: float = 0.004
    ema: float = 0.999
    sampling: int = 32
    samples: int = 128
    seed: int = 0


def zoo_of(task: Task, settings: ZooSettings, ledger: Ledger) -> tuple[Zoo, Zoo]:
    """Train the zoo, or read it; return training and held-out runs."""
    zoo = train(
        symflow.mlp(WIDTHS),
        task,
        runs=settings.runs + settings.held_out,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        optimizer="sgd",
        lr=settings.lr,
        momentum=settings.momentum,
        schedule="cosine",
        init=flows.Gaussian(settings.std),
        seed=settings.seed,
        folder=ledger.folder / "zoo",
        checkpoint_every=1,
    )
    return zoo.select(slice(0, settings.runs)), zoo.select(slice(settings.runs, None))


def fitted(
    name: str, settings: FlowSettings, task: Task, training: Zoo, held_out: Zoo, ledger: Ledger
) -> tuple[flows.Flow, float]:
    """Train a flow, or go on with it; return it and the seconds of this call."""
    arch = symflow.mlp(WIDTHS)
    chart = InputCoordinates.of_inputs(arch, task.x_train, rank=settings.rank)
    flow = PRESETS[settings.preset](
        arch,
        coupling=COUPLINGS[settings.coupling],
        bridge=settings.bridge,
        coordinates=chart,
        width=settings.width,
        depth=settings.depth,
        time_width=settings.time_width,
        seed=settings.seed,
    )
    start = time.perf_counter()
    flow.fit(
        training if settings.runs is None else training.select(slice(0, settings.runs)),
        inputs=task.x_train,
        validation=held_out,
        folder=ledger.folder / "flows" / name.replace(" ", "-").replace(",", ""),
        progress=True,
        steps=settings.steps,
        batch_size=settings.batch_size,
        optimizer="muon",
        lr=settings.lr,
        ema=settings.ema,
        behaviour=settings.behaviour,
        seed=settings.seed,
        log_every=max(1, settings.steps // 40),
        checkpoint_every=max(1, settings.steps // 20),
    )
    return flow, time.perf_counter() - start


def flow_row(
    name: str,
    settings: FlowSettings,
    task: Task,
    training: Zoo,
    held_out: Zoo,
    audit: Audit,
    ledger: Ledger,
) -> dict[str, Any]:
    """Train, draw and measure."""
    arch = symflow.mlp(WIDTHS)
    flow, seconds = fitted(name, settings, task, training, held_out, ledger)
    start = time.perf_counter()
    drawn = flow.sample(settings.samples, steps=settings.sampling, seed=settings.seed + 1000)
    sampling = time.perf_counter() - start
    one = flow.sample(settings.samples, steps=1, seed=settings.seed + 1000)
    return {
        **quality(arch, drawn, task),
        **novelty(arch, drawn[:64], task, audit),
        "one_step": quality(arch, one, task)["accuracy"],
        "parameters": sum(p.numel() for p in flow.field.parameters()),
        "coordinates": audit_size(flow),
        "seconds": seconds,
        "sampling_seconds": sampling,
        "history": flow.history,
    }


def audit_size(flow: flows.Flow) -> int:
    """Numbers of the chart: data, counted apart from parameters."""
    chart = flow.coordinates
    return 0 if chart is None else sum(x.numel() for x in chart.tensors().values())


def baselines(training: Zoo, count: int, seed: int) -> dict[str, Tensor]:
    """What needs no flow: noise on copies, interpolation, averages, independent coordinates."""
    generator = torch.Generator().manual_seed(seed)
    arch = symflow.mlp(WIDTHS)
    quotient = symflow.Quotient(arch)
    ws = training.final
    rows = torch.randint(len(ws), (16, count), generator=generator)
    noise = torch.randn(count, arch.dimension, generator=generator) * 0.3 * ws.std()
    middle = quotient.geodesic(ws[rows[0]], ws[rows[1]])(0.5)
    mean, deviation = ws.mean(0), ws.std(0)
    normal = torch.randn(count, arch.dimension, generator=generator)
    return {
        "training + noise": ws[rows[0]] + noise,
        "middle of two aligned": middle,
        "average of 16 aligned": weight_average(quotient, ws[rows.T]),
        "independent coordinates": mean + deviation * normal,
    }


def settings_of(fast: bool) -> tuple[ZooSettings, dict[str, FlowSettings]]:
    """Return the zoo, and every flow by its row's name."""
    found: dict[str, FlowSettings] = {}
    found["Balanced, headline"] = FlowSettings(steps=24_000, ema=0.9995, width=72)
    for preset in PRESETS:
        for coupling in ("run", "independent"):
            for behaviour in (10.0, 0.0):
                name = f"{preset}, {coupling}{', behaviour' if behaviour else ''}"
                found[name] = FlowSettings(preset=preset, coupling=coupling, behaviour=behaviour)
    for runs in (25, 50, 100, 400, 1600):
        found[f"Balanced, {runs} runs"] = FlowSettings(runs=runs)
    if not fast:
        return ZooSettings(), found
    zoo = ZooSettings(runs=96, held_out=16, epochs=1)
    small = {"steps": 20, "samples": 8, "sampling": 4}
    return zoo, {
        name: replace(one, **small, runs=one.runs and min(one.runs, 48))
        for name, one in found.items()
    }


def run(fast: bool = False, only: str = "") -> Ledger:
    """Run or resume every row whose name holds ``only``."""
    ledger = Ledger("mnist", fast)
    task = symflow.zoo.mnist()
    zoo_settings, rows = settings_of(fast)
    training, held_out = zoo_of(task, zoo_settings, ledger)
    audit = Audit.of(symflow.mlp(WIDTHS), task, training.final)
    arch = symflow.mlp(WIDTHS)
    zoo = asdict(zoo_settings)

    def measured(ws: Tensor) -> dict[str, Any]:
        return {**quality(arch, ws, task), **novelty(arch, ws[:64], task, audit)}

    ledger.row(Row("trained, held out", zoo), lambda: measured(held_out.final))
    for name, ws in baselines(training, 64, 1).items():
        ledger.row(Row(name, zoo), lambda ws=ws: measured(ws))
    for name, one in rows.items():
        if only in name:
            ledger.row(
                Row(name, {"zoo": zoo, **asdict(one)}),
                lambda name=name, one=one: flow_row(
                    name, one, task, training, held_out, audit, ledger
                ),
            )
    return ledger


if __name__ == "__main__":
    from argparse import ArgumentParser

    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="reduced sizes: to try the machinery")
    parser.add_argument("--only", default="", help="rows whose names hold this")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run(options.fast, options.only)
