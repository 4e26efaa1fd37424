"""The training loop of a flow: resumable, and the same with or without an interruption."""

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor
from torch.nn import functional as F

from symflow.arch import by_batch
from symflow.errors import ShapeError, StateError, SymflowWarning
from symflow.files import digest, load_tensors, require_same, save_tensors
from symflow.flows.condition import Conditioned
from symflow.flows.coupling import MiniBatchOT, Reordering
from symflow.flows.descent import Descent, Processes
from symflow.flows.path import interpolate, velocity_to
from symflow.flows.settings import FitSettings
from symflow.nn import ConditionalField, RelationalTransformer, VectorField
from symflow.nn.probes import Probes

if TYPE_CHECKING:
    from symflow.flows.flow import Flow

_UNIT_PAIRS = 256
_VALIDATION_DRAWS = 256
_ALL = slice(None)


@final
class Trainer:
    """One training run of a flow."""

    def __init__(
        self,
        flow: "Flow",
        settings: FitSettings,
        starts: Tensor | None,
        ends: Tensor,
        inputs: Tensor | None,
        validation: tuple[Tensor | None, Tensor] | None,
        conditions: Tensor | None = None,
        dropout: float = 0.0,
        processes: Processes | None = None,
    ) -> None:
        if settings.compares and inputs is None:
            raise StateError(
                "the behaviour and consensus losses compare predictions on data: pass inputs=, as "
                "in flow.fit(zoo, inputs=task.x_train, behaviour=10.0)"
            )
        if settings.keep == "best" and validation is None:
            raise StateError(
                "keep='best' goes by held-out networks: pass validation=, as in "
                "flow.fit(zoo.select(slice(0, 90)), validation=zoo.select(slice(90, None)))"
            )
        if not any(p.requires_grad for p in flow.field.parameters()):
            raise StateError(
                f"the field ({type(flow.field).__name__}) has no parameters that are trained: give "
                "the flow a field with some, or call field.requires_grad_(True)"
            )
        if processes is not None and settings.batch_size % processes.world_size:
            raise ShapeError(
                f"batch_size = {settings.batch_size} cannot be shared by {processes.world_size} "
                "processes: choose a multiple"
            )
        if processes is not None and processes.world_size > 1 and settings.consensus > 0:
            raise StateError(
                "consensus= compares the means of a whole batch, of which each process sees a "
                "share: train with one process, or leave it out"
            )
        self.flow = flow
        self.settings = settings
        self.processes = processes
        self.first = processes is None or processes.global_rank == 0
        self.inputs: Tensor | None = None
        if inputs is not None and (settings.compares or _probes(flow.field) is not None):
            self.inputs = _network_inputs(flow, inputs, ends)
            if flow.coordinates is not None:
                self.inputs = flow.coordinates.features(self.inputs)
            self.inputs = self.inputs.to(flow.device)
        self.network = by_batch(flow.inner) if settings.compares else flow.inner
        # What the result depends on beside the settings: a checkpoint belongs to it.
        self.data = {
            "zoo": digest(starts, ends),
            "inputs": digest(self.inputs),
            "validation": digest(*(validation or (None,))),
        }
        self.conditions, self.dropout = conditions, dropout
        if conditions is not None and isinstance(flow.field, ConditionalField):
            flow.field.standardise_conditions(conditions)
            self.data["conditions"] = f"{digest(conditions)}, dropout {dropout:g}"
        self.dtype = next(flow.field.parameters()).dtype
        self.starts, self.ends = self._states(starts, ends)
        self.validation = None if validation is None else self._states(*validation)
        self._check_source(starts)
        self._set_floor(ends)
        x0, x1, _ = self._pairs(
            self._generator(-1), self.starts, self.ends, self._at_most(_UNIT_PAIRS)
        )
        flow.field.standardise(torch.cat([x0, x1]))
        self._look()
        flow.unit = _leaf_rms(flow, x1 - x0)
        self.descent = Descent(flow.field, flow.average, settings, "the flow", processes)
        flow.average.load_state_dict(flow.field.state_dict())
        flow.history = []
        self.step = 0
        self.best: dict[str, Tensor] = {}
        self.best_loss = math.inf
        # Of other architectures, whose fields have the same parameters: see fit_together.
        self.companions: tuple[Trainer, ...] = ()

    def run(self, folder: Path | None, progress: bool) -> None:
        """Train to the end, from the checkpoint in ``folder`` if there is one."""
        from tqdm import tqdm

        file = None if folder is None else folder / "flow.safetensors"
        if file is not None and file.exists():
            self._resume(file)
        bar = tqdm(
            total=self.settings.steps,
            initial=self.step,
            # None: where the output is no terminal.
            disable=None if progress and self.first else True,
            desc=f"flow ({self.flow.recipe.section})",
        )
        with bar:
            while self.step < self.settings.steps:
                loss = self._advance()
                bar.update()
                last = self.step == self.settings.steps
                if last or self.step % self.settings.log_every == 0:
                    record = {"step": float(self.step), "loss": loss} | self._validate()
                    self.flow.history.append(record)
                    self._keep(record, last=last)
                    bar.set_postfix({k: f"{v:.4g}" for k, v in record.items() if k != "step"})
                due = last or self.step % self.settings.checkpoint_every == 0
                if file is not None and due and self.first:
                    self._save(file)
        if self.processes is not None:
            self.processes.barrier()  # nobody goes on before the file is whole

    # ---------------------------------------------------------------- one step

    def _advance(self) -> float:
        every = (self, *self.companions)
        loss = torch.stack([one.batch_loss(self.step) for one in every]).mean()
        value = self.descent.step(loss, self.step)
        self.step += 1
        return value

    def batch_loss(self, step: int) -> Tensor:
        """Return the loss of a step's batch."""
        size = self.settings.batch_size
        share, generator = self._share(size), self._generator(step)
        return self._loss(
            generator, self.starts, self.ends, size, self.flow.field, self.conditions, share
        )

    def _loss(
        self,
        generator: torch.Generator,
        starts: Tensor | None,
        ends: Tensor,
        size: int,
        field: Any,
        conditions: Tensor | None = None,
        share: slice = _ALL,
    ) -> Tensor:
        """Return the loss of a batch, or of this process' share of one that all draw alike."""
        flow = self.flow
        x0, x1, rows = self._pairs(generator, starts, ends, size)
        t = flow.recipe.time.sample(len(x1), generator=generator).to(x1)
        x = interpolate(flow.space, flow.recipe.path, x0, x1, t, flow.unit, generator)
        if conditions is not None:
            keep = torch.rand(len(rows), generator=generator) >= self.dropout
            field = Conditioned(field, conditions[rows[share]], keep[share])
        x, x1, t = x[share], x1[share], t[share]
        if self.settings.precision == "bfloat16":
            field = partial(_in_half, field)
        if flow.recipe.predicts == "velocity":
            error = flow.space.proju(x, field(x, t)) - velocity_to(flow.space, x, x1, t)
            end = flow.predict(field, x, t) if self.settings.compares else x1
        else:
            end = flow.predict(field, x, t)
            error = end - x1
        loss = (error / flow.unit).square().mean()
        if self.settings.compares:
            loss = loss + self._behaviour(x1, end, generator)
        return loss

    def _behaviour(self, end: Tensor, predicted: Tensor, generator: torch.Generator) -> Tensor:
        """Divergence between the predictions of two batches: of each pair, and of their means."""
        if self.inputs is None:
            raise StateError("the behaviour loss needs inputs")
        count = min(self.settings.behaviour_inputs, len(self.inputs))
        rows = torch.randint(len(self.inputs), (count,), generator=generator)
        x, network = self.inputs[rows].to(end), self.network
        with torch.no_grad():
            # A copy: the first step of a network may change its input in place.
            truth = F.log_softmax(network.apply(self.flow.decode_inner(end), x.clone()), dim=-1)
        guess = F.log_softmax(network.apply(self.flow.decode_inner(predicted), x), dim=-1)
        loss = self.settings.behaviour * _divergence(guess, truth)
        if self.settings.consensus > 0:
            means = (x.logsumexp(0) - math.log(len(x)) for x in (guess, truth))
            loss = loss + self.settings.consensus * _divergence(*means)
        return loss

    def _pairs(
        self, generator: torch.Generator, starts: Tensor | None, ends: Tensor, size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw a batch and pair it; return starts, ends, and which row each end is."""
        flow, coupling = self.flow, self.flow.recipe.coupling
        rows = torch.randint(len(ends), (size,), generator=generator)
        batch = (
            lambda n: flow.draw(n, generator, self.dtype),
            None if starts is None else starts[rows],
            ends[rows],
            flow.align,
        )
        if isinstance(coupling, Reordering):
            x0, x1, order = coupling.match(*batch)
            rows = rows[order.to(rows.device)]
        else:
            x0, x1 = coupling.pair(*batch)
        aligned = coupling.keeps_runs() or flow.recipe.alignment != "pair"
        return x0, (x1 if aligned else flow.align(x0, x1)), rows

    # ---------------------------------------------------------------- preparation

    def _states(self, starts: Tensor | None, ends: Tensor) -> tuple[Tensor | None, Tensor]:
        """Encode, and do once what would be the same at every step: align fixed pairs."""
        recipe = self.flow.recipe
        there = {"device": self.flow.device, "dtype": self.dtype}
        x0 = None if starts is None else self.flow.encode(starts.to(**there))
        x1 = self.flow.encode(ends.to(**there))
        if recipe.alignment == "reference":
            x1 = self.flow.align(x1[0], x1)
        if recipe.alignment == "pair" and recipe.coupling.keeps_runs() and x0 is not None:
            x1 = self.flow.align(x0, x1)
        return x0, x1

    def _look(self) -> None:
        """Give a field with probes some of the inputs."""
        probes = _probes(self.flow.field)
        if probes is None:
            return
        if self.inputs is None:
            raise StateError(
                f"the field looks at the network on {probes.count} inputs: pass inputs=, as in "
                "flow.fit(zoo, inputs=task.x_train)"
            )
        rows = torch.randperm(len(self.inputs), generator=self._generator(-4))
        probes.look_at(self.inputs[rows[: probes.count]])

    def _check_source(self, starts: Tensor | None) -> None:
        """Warn if the source, where samples start, is unlike the recorded initial weights."""
        if starts is None:
            return
        drawn = self.flow.recipe.source.sample(
            self.flow.arch, 64, generator=self._generator(-2), dtype=starts.dtype
        )
        ratio = float(starts.std() / drawn.std().clamp_min(torch.finfo(starts.dtype).tiny))
        if not 0.8 < ratio < 1.25:
            warnings.warn(
                f"the zoo's initial weights have {ratio:.2g} times the deviation of the flow's "
                f"source {self.flow.recipe.source}: pass the source= the zoo was trained from",
                SymflowWarning,
                stacklevel=4,
            )

    def _set_floor(self, ends: Tensor) -> None:
        """Remember which buffers are positive (variances): samples must keep them so."""
        floor = torch.full((self.flow.arch.dimension,), -torch.inf)
        for leaf in self.flow.arch.leaves:
            values = ends[:, leaf.span]
            if not leaf.learnable and bool((values > 0).all()):
                floor[leaf.span] = float(values.min()) / 2
        self.flow.floor = floor

    def _at_most(self, draws: int) -> int:
        """Return how many pairs to draw at once, for no step but to measure something.

        Transport within a batch depends on its size, and grows with its square or worse.
        """
        small = isinstance(self.flow.recipe.coupling, MiniBatchOT)
        return min(draws, self.settings.batch_size) if small else draws

    def _share(self, size: int) -> slice:
        """Return the rows of a batch that are this process'."""
        if self.processes is None:
            return _ALL
        rows = size // self.processes.world_size
        return slice(self.processes.global_rank * rows, (self.processes.global_rank + 1) * rows)

    def _generator(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.settings.seed + 1) * 1_000_003 + step)

    def _validate(self) -> dict[str, float]:
        found = [one.held_out_loss() for one in (self, *self.companions)]
        known = [loss for loss in found if loss is not None]
        return {"validation": sum(known) / len(known)} if known else {}

    def held_out_loss(self) -> float | None:
        """Return the loss of the running average on held-out networks, if there are any."""
        if self.validation is None:
            return None
        with torch.no_grad():
            loss = self._loss(
                self._generator(-3),
                *self.validation,
                self._at_most(_VALIDATION_DRAWS),
                self.flow.average,
            )
        return float(loss)

    def _keep(self, record: dict[str, float], *, last: bool) -> None:
        """Remember the running average of the least held-out loss; at the end, go back to it."""
        if self.settings.keep != "best":
            return
        average = self.flow.average
        if record["validation"] < self.best_loss:
            self.best_loss = record["validation"]
            self.best = {k: v.detach().clone() for k, v in average.state_dict().items()}
        if last and self.best:  # not where all held-out losses are NaN
            average.load_state_dict(self.best)

    # ---------------------------------------------------------------- checkpoints

    def _save(self, file: Path) -> None:
        moments = self.descent.tensors() | {f"best.{k}": v for k, v in self.best.items()}
        meta = {
            **self.flow.describe(),
            **({"best": self.best_loss} if self.best else {}),
            "history": self.flow.history,
            "settings": asdict(self.settings),
            "data": self.data,
            "step": self.step,
        }
        save_tensors(file, self.flow.tensors() | moments, meta)

    def _resume(self, file: Path) -> None:
        tensors, meta = load_tensors(file)
        told = {k: meta.get(k) for k in self.flow.describe()}
        require_same(file, told, self.flow.describe())
        # Settings that are newer than the file had their defaults.
        stored = asdict(FitSettings()) | meta.get("settings", {})
        require_same(file, stored, asdict(self.settings))
        require_same(file, meta.get("data", {}), self.data)
        self.flow.restore(tensors, meta["history"])
        self.descent.restore(tensors)
        self.best = {k.removeprefix("best."): v for k, v in tensors.items() if k[:5] == "best."}
        self.best_loss = float(meta.get("best", math.inf))
        self.step = int(meta["step"])


def _divergence(guess: Tensor, truth: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence of guesses from the truth, both log-probabilities."""
    return F.kl_div(guess, truth, log_target=True, reduction="none").sum(-1).mean()


def _in_half(field: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor:
    """Evaluate a field with matrix products in bfloat16."""
    with torch.autocast(x.device.type, torch.bfloat16):
        return field(x, t).to(x)


def _probes(field: VectorField) -> Probes | None:
    return field.probes if isinstance(field, RelationalTransformer) else None


def _network_inputs(flow: "Flow", inputs: Any, ends: Tensor) -> Tensor:
    """Check the inputs of the behaviour loss, in the shape that the network was made for."""
    wanted = ", ".join(str(("n", *x.shape[1:])) for x in flow.arch.inputs if isinstance(x, Tensor))
    if not isinstance(inputs, Tensor) or inputs.ndim == 0 or len(inputs) == 0:
        came = f"shape {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs)
        raise ShapeError(
            f"inputs must be a tensor of inputs of the network, {wanted} with n at least 1, got "
            f"{came}: pass task.x_train"
        )
    if not bool(inputs.isfinite().all()):
        bad = int((~inputs.isfinite()).sum())
        raise ShapeError(f"inputs hold {bad} NaN or infinite value(s): drop those examples")
    made_for = flow.arch.inputs[0]
    if isinstance(made_for, Tensor) and inputs[0].numel() == made_for[0].numel():
        inputs = inputs.reshape(-1, *made_for.shape[1:])
    try:
        with torch.no_grad():
            flow.arch.apply(ends[:1], inputs[:1].to(ends, copy=True))
    except (RuntimeError, TypeError) as error:
        raise ShapeError(
            f"inputs must be inputs of the network, {wanted}, got shape {tuple(inputs.shape)}: it "
            f"does not run on them ({error})"
        ) from error
    return inputs


def _leaf_rms(flow: "Flow", change: Tensor) -> Tensor:
    """Root mean square of a change, one number for each leaf, spread over its coordinates."""
    unit = torch.ones(change.shape[-1], dtype=change.dtype, device=change.device)
    for leaf in flow.inner.leaves:
        size = change[:, leaf.span].square().mean().sqrt()
        unit[leaf.span] = size if float(size) > 0 else 1.0
    extra = change[:, flow.inner.dimension :].square().mean(0).sqrt()
    unit[flow.inner.dimension :] = torch.where(extra > 0, extra, torch.ones_like(extra))
    return unit
