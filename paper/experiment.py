"""Experiments on zoos: train runs, fit flows on them, draw networks, measure all alike.

A flow maps fresh initial weights to trained ones. Labels are used to train the zoo and to score
samples, never by a flow: the behaviour loss compares the predictions of networks on unlabelled
training inputs. Test data is touched by the final figures alone.
"""

import hashlib
import json
import time
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any, final

import torch
from ledger import Ledger, Row
from measured import Audit, divergence, novelty, quality
from torch import Tensor

import symflow
from symflow import flows
from symflow.arch import Architecture, InputCoordinates
from symflow.evaluate import accuracy, loss, reset_normalisation, weight_average
from symflow.zoo import Task, Zoo, train

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
STEPS = (1, 2, 4, 8, 16, 32, 64)
COMPARED = 2000  # training inputs on which samples are compared with runs
AUDITED = 64  # samples that are compared with every training network
# Settings that the first rows lack.
NEWER = {"noisy": 0.0, "finish": None, "predicts": "end", "snapshots": 0}


@final
@dataclass(frozen=True)
class ZooSettings:
    """How base networks are trained; all runs see the same mini-batches.

    Attributes
    ----------
    widths
        Of ReLU networks; of others, whatever tells them apart.
    runs, held_out
        Networks that flows are trained on, and others of the same kind.
    std
        Deviation of the Gaussian initial weights; PyTorch's own initialisation if None.
    epochs, batch_size, options
        Of :func:`symflow.zoo.train`.
    seed
        Of everything.
    """

    widths: tuple[int, ...]
    runs: int
    held_out: int
    epochs: int
    batch_size: int
    options: dict[str, Any]
    std: float | None = 0.1
    seed: int = 0

    @property
    def source(self) -> flows.Source:
        """Return the law of the initial weights."""
        return flows.FanIn() if self.std is None else flows.Gaussian(self.std)


@final
@dataclass(frozen=True)
class Finish:
    """A second stage of training, from the first one's running average.

    The behaviour loss is least where logits are as small as the blurred predictions of early times
    are sure: with much of it networks are good, less apart than they should be, and share errors
    that no average takes away. The last steps have less of it, or compare mean predictions, too.
    """

    steps: int
    lr: float
    behaviour: float
    bridge: float
    consensus: float = 0.0


@final
@dataclass(frozen=True)
class FlowSettings:
    """One flow.

    Attributes
    ----------
    preset, coupling, alignment, runs
        What is learned (``alignment`` as in a recipe, the preset's own if None), and on how many
        runs of the zoo (all if None).
    rank
        Directions of the inputs that are kept, in the metric of functions; all raw inputs if None.
    width, depth, time_width, edge_width
        The field.
    bridge, behaviour, inputs
        Path noise; weight of the behaviour loss and inputs in it at each step.
    steps, batch_size, lr, ema
        Training, with Muon.
    sampling, samples, noisy
        Euler steps, networks drawn, and how much of the path noise is added while they are.
    seed
        Of the field, its training and its samples.
    finish
        A second stage of training, or none.
    predicts
        What the field gives: the end of a path, or its velocity.
    snapshots
        Weights along the second half of each run's training are ends too, every so many steps.
    """

    preset: str = "Geometric"
    coupling: str = "run"
    alignment: str | None = None
    runs: int | None = None
    rank: int | None = 128
    width: int = 64
    depth: int = 3
    time_width: int = 16
    edge_width: int = 16
    bridge: float = 0.15
    behaviour: float = 10.0
    inputs: int = 128
    steps: int = 3000
    batch_size: int = 64
    lr: float = 0.004
    ema: float = 0.999
    sampling: int = 32
    samples: int = 128
    seed: int = 0
    noisy: float = 0.0
    finish: Finish | None = None
    predicts: str = "end"
    snapshots: int = 0

    def told(self) -> dict[str, Any]:
        """Return what a row depends on."""
        told = {k: v for k, v in asdict(self).items() if v != NEWER.get(k, ())}
        if self.finish is not None and not self.finish.consensus:
            told["finish"].pop("consensus")
        return told

    def trained(self) -> dict[str, Any]:
        """Return what the trained flow depends on."""
        return {k: v for k, v in self.told().items() if k not in ("sampling", "samples", "noisy")}


@final
class Experiment:
    """A zoo, flows on it, and the ledger of their figures."""

    def __init__(
        self,
        name: str,
        task: Task,
        settings: ZooSettings,
        *,
        fast: bool,
        only: str = "",
        device: str = "cpu",
        zoo_device: str | None = None,
        audited: int = AUDITED,
        arch: Architecture | None = None,
    ) -> None:
        self.audited = audited
        self.ledger = Ledger(name, fast, only, (device, zoo_device or device))
        self.task, self.settings = task, settings
        self.arch = symflow.mlp(list(settings.widths)) if arch is None else arch
        zoo = self.zoo(settings.runs + settings.held_out, "zoo")
        self.training = zoo.select(slice(0, settings.runs))
        self.held_out = zoo.select(slice(settings.runs, None))

    @cached_property
    def audit(self) -> Audit:
        """What samples are compared with."""
        return Audit.of(self.arch, self.task, self.settled(self.training.final))

    def run(self, rows: dict[str, FlowSettings]) -> None:
        """Run or resume the trained networks, the baselines, and every flow."""
        zoo = asdict(self.settings)
        self.ledger.row(Row("trained, held out", zoo), lambda: self.measured(self.held_out.final))
        for name, make in self.baselines().items():
            self.ledger.row(Row(name, zoo), lambda make=make: self.measured(make()))
        for name, one in rows.items():
            row = Row(name, {"zoo": zoo, **one.told()})
            self.ledger.row(row, lambda one=one: self.flow(one))

    def measured(self, ws: Tensor) -> dict[str, Any]:
        """Measure any set of networks."""
        ws = self.settled(ws)
        return {
            **quality(self.arch, ws, self.task),
            **novelty(self.arch, ws[: self.audited], self.task, self.audit),
        }

    def settled(self, ws: Tensor) -> Tensor:
        """Measure running statistics, if there are any, on training inputs."""
        return reset_normalisation(self.arch, ws, self.task.x_train)

    def flow(self, settings: FlowSettings) -> dict[str, Any]:
        """Train a flow, draw networks, and measure them."""
        flow, seconds = self.fitted(settings)
        seed = settings.seed + 1000
        start = time.perf_counter()
        drawn = flow.sample(
            settings.samples, steps=settings.sampling, bridge=settings.noisy, seed=seed
        ).cpu()
        sampling = time.perf_counter() - start
        chart = flow.coordinates
        return {
            **self.measured(drawn),
            "by_steps": self.by_steps(flow, settings),
            "parameters": sum(p.numel() for p in flow.field.parameters()),
            # The chart is data, not parameters: counted apart.
            "chart": 0 if chart is None else sum(x.numel() for x in chart.tensors().values()),
            "runs": settings.runs or self.settings.runs,
            "seconds": seconds,
            "sampling_seconds": sampling,
            "history": flow.history,
        }

    def by_steps(self, flow: flows.Flow, settings: FlowSettings) -> dict[str, Any]:
        """Return the quality of samples in few and in many steps.

        Beside it, for runs, how far held-out runs' own ends are from samples that start where they
        did: the divergence of predictions on training inputs. It tells how many steps to take, and
        needs neither labels nor test data.
        """
        found = {}
        starts = self.held_out.initial if settings.coupling == "run" else None
        for steps in STEPS:
            seed = settings.seed + 1000
            draw = partial(flow.sample, steps=steps, bridge=settings.noisy, seed=seed)
            ws = self.settled(draw(min(settings.samples, AUDITED)).cpu())
            found[str(steps)] = {
                f"{split} {name}": float(score(self.arch, ws, self.task, split=split).mean())
                for split in ("train", "test")
                for name, score in (("accuracy", accuracy), ("loss", loss))
            }
            if starts is not None:
                ends = self.settled(draw(len(starts), start=starts).cpu())
                found[str(steps)]["divergence"] = divergence(
                    self.arch,
                    self.settled(self.held_out.final),
                    ends,
                    self.task.x_train[:COMPARED],
                )
        return found

    def fitted(self, settings: FlowSettings) -> tuple[flows.Flow, float]:
        """Train a flow, or go on with it; return it and the seconds it has taken, all calls."""
        if settings.finish is None:
            return self._trained(self._untrained(settings), settings, settings)
        end = settings.finish
        first, before = self.fitted(replace(settings, finish=None))
        flow = self._untrained(replace(settings, bridge=end.bridge))
        flow.field.load_state_dict(first.average.state_dict())
        stage = replace(settings, steps=end.steps, lr=end.lr, behaviour=end.behaviour)
        stage = replace(stage, seed=settings.seed + 1)
        flow, seconds = self._trained(flow, stage, settings, end.consensus)
        return flow, before + seconds

    def _untrained(self, settings: FlowSettings) -> flows.Flow:
        chart = None
        if settings.rank is not None:
            chart = InputCoordinates.of_inputs(self.arch, self.task.x_train, rank=settings.rank)
        make = PRESETS[settings.preset]
        recipe = make(
            self.arch,
            source=self.settings.source,
            coupling=COUPLINGS[settings.coupling],
            bridge=settings.bridge,
        ).recipe
        alignment = settings.alignment or recipe.alignment
        recipe = replace(recipe, predicts=settings.predicts, alignment=alignment)
        return flows.Flow(
            self.arch,
            recipe,
            coordinates=chart,
            width=settings.width,
            depth=settings.depth,
            time_width=settings.time_width,
            edge_width=settings.edge_width,
            seed=settings.seed,
        ).to(self.ledger.devices[0])

    def _trained(
        self, flow: flows.Flow, stage: FlowSettings, whole: FlowSettings, consensus: float = 0.0
    ) -> tuple[flows.Flow, float]:
        """Train one stage, in a folder of the whole training."""
        folder = self.ledger.folder / "flows" / _folder(whole)
        training = self._ends(stage)
        start = time.perf_counter()
        flow.fit(
            training,
            inputs=self.task.x_train,
            validation=self.held_out,
            folder=folder,
            progress=True,
            steps=stage.steps,
            batch_size=stage.batch_size,
            optimizer="muon",
            lr=stage.lr,
            ema=stage.ema,
            behaviour=stage.behaviour,
            consensus=consensus,
            behaviour_inputs=stage.inputs,
            seed=stage.seed,
            log_every=max(1, stage.steps // 40),
            checkpoint_every=max(1, stage.steps // 20),
        )
        clock = folder / "seconds.json"
        before = json.loads(clock.read_text()) if clock.exists() else 0.0
        seconds = before + time.perf_counter() - start
        clock.write_text(json.dumps(seconds))
        return flow, seconds

    def _ends(self, settings: FlowSettings) -> Any:
        """Return the runs that a flow is trained on, with snapshots of them if it has any."""
        runs, every = settings.runs or self.settings.runs, settings.snapshots
        if not every:
            return self.training.select(slice(0, runs))
        half = self.settings.epochs // 2
        again = self.zoo(runs, f"zoo-{runs}-{every}", snapshot_every=every, burn_in=half)
        along = torch.as_tensor(again.snapshots)
        # Each run with all of its weights, from the initial ones of the same run.
        return SimpleNamespace(
            initial=again.initial.repeat_interleave(along.shape[1], 0), final=along.flatten(0, 1)
        )

    def zoo(self, runs: int, folder: str, **options: Any) -> Zoo:
        """Train the first runs, or read them; the same, whatever their number."""
        settings = self.settings
        return train(
            self.arch,
            self.task,
            runs=runs,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            init=settings.source,
            seed=settings.seed,
            folder=self.ledger.folder / folder,
            checkpoint_every=1 if settings.epochs < 5 else 10,
            device=self.ledger.devices[1],
            **options,
            **settings.options,
        )

    def baselines(self) -> dict[str, Callable[[], Tensor]]:
        """Return what needs no flow: noise on copies, middles, averages, independent numbers."""
        generator = torch.Generator().manual_seed(1)
        quotient, ws = symflow.Quotient(self.arch), self.training.final
        rows = torch.randint(len(ws), (16, AUDITED), generator=generator)
        normal = torch.randn(AUDITED, self.arch.dimension, generator=generator)
        return {
            "training + noise": lambda: ws[rows[0]] + 0.3 * ws.std() * normal,
            "middle of two aligned": lambda: quotient.geodesic(ws[rows[0]], ws[rows[1]])(0.5),
            "average of 16 aligned": lambda: weight_average(quotient, ws[rows.T]),
            "independent coordinates": lambda: ws.mean(0) + ws.std(0) * normal,
        }


def _folder(settings: FlowSettings) -> str:
    """Name a folder of checkpoints: of what is trained alike, whatever is drawn from it."""
    told = json.dumps(settings.trained(), sort_keys=True).encode()
    return f"{settings.preset}-{hashlib.sha256(told).hexdigest()[:12]}"


def repeated(name: str, settings: FlowSettings) -> dict[str, FlowSettings]:
    """Return the same flow with other seeds: of its field, its training and its samples."""
    return {f"{name}, seed {seed}": replace(settings, seed=seed) for seed in (1, 2)}


def reduced(
    zoo: ZooSettings, rows: dict[str, FlowSettings]
) -> tuple[ZooSettings, dict[str, FlowSettings]]:
    """Make everything small: to try the machinery, not for results."""
    small = {"steps": 20, "samples": 8, "sampling": 4, "batch_size": 8}
    return replace(zoo, runs=96, held_out=16, epochs=min(zoo.epochs, 2)), {
        name: replace(
            one,
            **small,
            runs=one.runs and min(one.runs, 48),
            finish=one.finish and replace(one.finish, steps=20),
        )
        for name, one in rows.items()
    }


def asked(told: str) -> dict[str, Any]:
    """Read the command line: options of an :class:`Experiment`; threads are set at once."""
    parser = ArgumentParser(description=told)
    parser.add_argument("--fast", action="store_true", help="reduced sizes: to try the machinery")
    parser.add_argument("--only", default="", help="rows whose names hold this")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="where flows are trained")
    parser.add_argument("--zoo-device", help="where the zoo is, if not there, too")
    options = vars(parser.parse_args())
    torch.set_num_threads(options.pop("threads"))
    return options


def main(
    name: str, task: Callable[[], Task], zoo: ZooSettings, rows: dict[str, FlowSettings], told: str
) -> None:
    """Run one experiment from the command line."""
    options = asked(told)
    if options["fast"]:
        zoo, rows = reduced(zoo, rows)
    Experiment(name, task(), zoo, **options).run(rows)
