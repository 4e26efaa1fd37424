"""Train many networks at once: one forward pass, one backward pass, one optimiser for all runs."""

import math
import os
import time
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from symflow.arch import Architecture
from symflow.errors import ShapeError, StateError
from symflow.files import require_same
from symflow.flows.require import device_of, whole
from symflow.flows.source import FanIn, Gaussian, Source
from symflow.numerics import tolerance
from symflow.zoo import checkpoint
from symflow.zoo.settings import Settings, batch_order, stream
from symflow.zoo.stacked import Stacked
from symflow.zoo.store import META, WEIGHTS, Zoo, versions
from symflow.zoo.tasks import Task

# So many activations of the widest layer are held in evaluation mode: they should fit in a cache.
_EVALUATED_AT_ONCE = 2**20
_GAUSSIAN = Gaussian(0.1)


def train(
    arch: Architecture,
    task: Task,
    *,
    runs: int = 100,
    epochs: int = 50,
    batch_size: int = 16,
    optimizer: str = "adam",
    lr: float = 0.001,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    schedule: str = "constant",
    batches: str | int = "shared",
    init: Source = _GAUSSIAN,
    burn_in: int = 0,
    snapshot_every: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    folder: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 5,
    progress: bool = True,
) -> Zoo:
    """Train many networks of one architecture on a task, all at once, each by itself.

    The loss is the cross-entropy; run r ends where a plain PyTorch loop over that one network
    ends, up to rounding. Its initial weights, and with ``batches="own"`` its mini-batches, depend
    on ``seed`` and r and not on how many other runs there are. A run that diverges to NaN does not
    disturb the others: it stays in the zoo, ``metrics["diverged"]`` tells, and ``zoo.finite()``
    leaves it out.

    Parameters
    ----------
    arch
        The architecture; modules are in training mode, running statistics are those of each run.
    task
        Data; inputs are reshaped to what the architecture takes.
    runs, epochs, batch_size
        Number of networks, of passes over the training data, and of examples in a mini-batch (the
        last one of an epoch has what is left).
    optimizer
        ``"adam"``, ``"adamw"`` or ``"sgd"``, with PyTorch's settings.
    lr, momentum, weight_decay
        Learning rate; momentum of ``"sgd"``; weight decay, decoupled in ``"adamw"``.
    schedule
        ``"constant"``, or ``"cosine"`` from ``lr`` to zero, changed at each step.
    batches
        Who sees the same mini-batches: ``"shared"`` all runs, ``"own"`` nobody, or a number n:
        runs 0 to n - 1, n to 2n - 1, and so on. Shared ones are cheapest: the first layer of all
        runs is one matrix product.
    init
        Distribution of the initial weights.
    burn_in, snapshot_every
        Snapshots are taken each ``snapshot_every`` steps after ``burn_in`` epochs; none if None.
    seed
        Of everything random.
    dtype, device
        In which, and where, training runs; the zoo comes back in main memory.
    folder
        Where the zoo is stored. If it holds an interrupted training with the same settings that
        goes on, and ends bit for bit where it would have (same machine, versions and number of
        threads); a finished zoo is loaded.
    checkpoint_every
        Epochs between states written to ``folder``: what an interruption can cost. Ctrl-C is one.
    progress
        Whether a terminal shows a progress bar.

    Raises
    ------
    ShapeError
        If a setting is out of range or unknown, the device is not there, or task and architecture
        do not fit.
    StateError
        If many networks at once compute something else than each by itself.
    FileFormatError
        If ``folder`` holds a zoo with other settings (each is named), or a damaged file.

    Notes
    -----
    A step costs the arithmetic of R forward and backward passes and the overhead of one. Memory is
    that of weights, gradients and optimiser, O(R D), one batch of activations, and the snapshots.
    With dropout, what is dropped depends on ``runs`` too.

    Examples
    --------
    >>> import symflow
    >>> from symflow.zoo import breast_cancer
    >>> zoo = train(symflow.mlp([30, 4, 2]), breast_cancer(), runs=3, epochs=1)
    >>> zoo.final.shape, sorted(zoo.metrics)[-2:]
    (torch.Size([3, 134]), ['train_accuracy', 'train_loss'])
    """
    settings = Settings(
        *(runs, epochs, batch_size, optimizer, lr, momentum, weight_decay, schedule, batches, init),
        *(burn_in, snapshot_every, seed, dtype, device_of(device)),
    )
    checkpoint_every = whole("checkpoint_every", checkpoint_every, 1)
    _check_fit(arch, task, settings)
    told = settings.describe()
    told |= {"arch": arch.fingerprint, "task": task.name, "data": task.digest}
    place = None if folder is None else Path(folder)
    if place is not None and (place / WEIGHTS).is_file():
        zoo = Zoo.load(place, arch)
        require_same(place, zoo.settings, told)
        if not (place / META).is_file():  # killed between the two
            zoo.save(place)
        checkpoint.clear(place)
        return zoo
    training = _Training(arch, task, settings)
    seconds = _run(training, told, place, checkpoint_every, progress)
    zoo = training.finish(told, seconds)
    if place is not None:
        zoo.save(place)
        checkpoint.clear(place)
    return zoo


def _check_fit(arch: Architecture, task: Task, settings: Settings) -> None:
    if len(arch.inputs) != 1 or math.prod(arch.inputs[0].shape[1:]) != task.x_train[0].numel():
        shapes = [tuple(x.shape[1:]) for x in arch.inputs]
        raise ShapeError(
            f"the architecture takes inputs of shape {', '.join(map(str, shapes))}, the examples "
            f"of {task.name!r} have shape {tuple(task.x_train.shape[1:])}"
        )
    # A copy, as in all that follows: a first step may change its input in place.
    x = task.x_train[:2].reshape(1, -1, *arch.inputs[0].shape[1:]).to(settings.dtype, copy=True)
    w = FanIn().sample(arch, 2, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    with torch.no_grad():
        alone = arch.apply(w, x[0].clone())
    if alone.shape != (2, x.shape[1], task.classes):
        raise ShapeError(
            f"the architecture must give {task.classes} numbers for each example of {task.name!r}, "
            f"one for each class; it gives shape {tuple(alone.shape[2:])}"
        )
    with torch.no_grad():
        out = Stacked(arch, training=False, like=x)(arch.unflatten(w), x).mT
    close = tolerance(x.dtype).close * max(1.0, float(alone.abs().max()))
    if not bool(((out - alone).abs() <= close).all()):
        raise StateError(
            "the networks of this architecture, run at once, do not compute what each computes by "
            f"itself ({arch!r}): train them one by one, and report the module to symflow"
        )
    last = len(task.x_train) % settings.batch_size or settings.batch_size
    if last == 1 and arch.num_parameters < arch.dimension:
        raise ShapeError(
            f"batch_size = {settings.batch_size} leaves a mini-batch of one of the "
            f"{len(task.x_train)} training examples: running statistics need two; choose another"
        )


def _run(
    training: "_Training", told: dict[str, Any], place: Path | None, every: int, progress: bool
) -> float:
    """Train to the end, from the last checkpoint if there is one; return seconds."""
    settings = training.settings
    meta: dict[str, Any] = {"settings": told, "seconds": 0.0}
    found = None if place is None else checkpoint.read(place)
    if place is not None and found is not None:
        tensors, meta, snapshots = found
        require_same(place, meta["settings"], told)
        training.restore(meta["epoch"], tensors, snapshots)
    start, saved = time.perf_counter() - meta["seconds"], training.epoch
    with tqdm(
        desc="zoo",
        unit="step",
        total=settings.epochs * training.per_epoch,
        initial=training.epoch * training.per_epoch,
        disable=None if progress else True,  # None: where the output is no terminal
    ) as bar:
        while training.epoch < settings.epochs:
            training.run_epoch(bar)
            if place is not None and training.epoch % every == 0:
                meta |= {"seconds": time.perf_counter() - start}
                new = training.snapshots_since(saved)
                meta = checkpoint.write(place, training.epoch, training.state(), meta, new)
                saved = training.epoch
    return time.perf_counter() - start


@final
class _Training:
    """All runs while they are trained."""

    def __init__(self, arch: Architecture, task: Task, settings: Settings) -> None:
        s = settings
        self.arch, self.task, self.settings = arch, task, s
        like = torch.empty(0, dtype=s.dtype, device=s.device)
        self.x = self._inputs(task.x_train)
        self.y = task.y_train.to(s.device)
        self.per_epoch = -(-len(self.x) // s.batch_size)
        self.epoch = 0
        self.seeds = [stream(s.seed, "initial weights", r) for r in range(s.runs)]
        self.initial = torch.cat(
            [
                s.init.sample(arch, 1, generator=torch.Generator().manual_seed(k), dtype=s.dtype)
                for k in self.seeds
            ]
        )
        self.network = Stacked(arch, training=True, like=like)
        # Leaves by themselves, contiguous, and not one flat tensor: else each step copies all
        # weights apart before its products, and all gradients together after them.
        self.leaves = {
            name: leaf.to(s.device).clone(memory_format=torch.contiguous_format)
            for name, leaf in arch.unflatten(self.initial).items()
        }
        names = dict.fromkeys(leaf.key for leaf in arch.leaves if leaf.learnable)
        self.parameters = [self.leaves[name].requires_grad_() for name in names]
        self.optimizer = s.optimizer_over(self.parameters)
        self.history = torch.full((s.runs, s.epochs), math.nan, dtype=s.dtype)
        count = s.snapshot_count(s.epochs * self.per_epoch, self.per_epoch)
        self.snapshots: Tensor | None = None
        if s.snapshot_every is not None:
            self.snapshots = torch.empty(s.runs, count, arch.dimension, dtype=s.dtype)

    def _inputs(self, x: Tensor) -> Tensor:
        shape = self.arch.inputs[0].shape[1:]
        return x.reshape(-1, *shape).to(self.settings.device, self.settings.dtype)

    def weights(self) -> Float[Tensor, "R D"]:
        """Return all coordinates as they are now, in main memory."""
        rows = [leaf.of(self.leaves[leaf.key].detach()).flatten(1) for leaf in self.arch.leaves]
        return torch.cat(rows, dim=1).cpu()

    def run_epoch(self, bar: "tqdm[Any]") -> None:
        """See every training example once."""
        s, n = self.settings, len(self.x)
        orders = [batch_order(s.seed, self.epoch, g, n) for g in range(s.groups)]
        losses = torch.zeros(s.runs, dtype=s.dtype, device=s.device)
        # Dropout draws from the global generator: it gets a seed of its own, and its state back.
        with torch.random.fork_rng(devices=[s.device] if s.device.type == "cuda" else []):
            torch.manual_seed(stream(s.seed, f"dropout {self.epoch}", 0))
            batches = torch.stack(orders).to(s.device).split(s.batch_size, dim=1)
            for step, rows in enumerate(batches, start=self.epoch * self.per_epoch):
                losses += self.step(step, rows) * rows.shape[1]
                index = s.snapshot_index(step + 1, self.per_epoch)
                if self.snapshots is not None and index is not None:
                    self.snapshots[:, index] = self.weights()
                bar.update()
        self.history[:, self.epoch] = (losses / n).cpu()
        self.epoch += 1
        if not bar.disable:
            finite = losses.isfinite()
            bar.set_postfix(loss=float(losses[finite].mean() / n), diverged=int((~finite).sum()))

    def step(self, step: int, rows: Int[Tensor, "G B"]) -> Float[Tensor, " R"]:
        """Move all runs by one step on the mini-batches of their groups; return the losses."""
        s = self.settings
        outputs = self.network(self.leaves, self.x[rows])
        labels = self.y[rows].unsqueeze(1).expand(-1, s.runs // s.groups, -1).flatten(0, 1)
        losses = F.cross_entropy(outputs, labels, reduction="none").mean(1)
        # The sum, so that the gradient of each run is that of its own loss.
        gradients = torch.autograd.grad(losses.sum(), self.parameters)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            # Fused optimisers on the CPU read a transposed gradient as if it were not.
            parameter.grad = gradient.contiguous()
        for group in self.optimizer.param_groups:
            group["lr"] = s.learning_rate(step / (s.epochs * self.per_epoch))
        self.optimizer.step()
        return losses.detach()

    def snapshots_since(self, epoch: int) -> Tensor | None:
        """Return the snapshots that were taken after ``epoch`` epochs."""
        if self.snapshots is None:
            return None
        counts = (
            self.settings.snapshot_count(e * self.per_epoch, self.per_epoch)
            for e in (epoch, self.epoch)
        )
        return self.snapshots[:, slice(*counts)]

    def state(self) -> dict[str, Tensor]:
        """Return everything that the next epochs depend on, but the settings."""
        tensors = {"initial": self.initial, "weights": self.weights(), "history": self.history}
        tensors |= {f"counter.{name}": b for name, b in self.network.counters().items()}
        return tensors | checkpoint.pack_optimizer(self.optimizer)

    def restore(self, epoch: int, tensors: dict[str, Tensor], snapshots: list[Tensor]) -> None:
        """Go back to a :meth:`state`."""
        self.epoch, self.initial, self.history = epoch, tensors["initial"], tensors["history"]
        for name, leaf in self.arch.unflatten(tensors["weights"]).items():
            self.leaves[name].data.copy_(leaf)
        for name, counter in self.network.counters().items():
            counter.copy_(tensors[f"counter.{name}"])
        checkpoint.unpack_optimizer(self.optimizer, tensors)
        if self.snapshots is not None and snapshots:
            done = torch.cat(snapshots, dim=1)
            self.snapshots[:, : done.shape[1]] = done

    def finish(self, told: dict[str, Any], seconds: float) -> Zoo:
        """Measure the final weights and make the zoo."""
        final = self.weights()
        metrics = {"history": self.history, "diverged": ~final.isfinite().all(-1)}
        for split in ("train", "test"):
            x, y = (getattr(self.task, f"{name}_{split}") for name in "xy")
            loss, accuracy = self._measure(self._inputs(x), y.to(self.settings.device))
            metrics[f"{split}_loss"] = loss.masked_fill(metrics["diverged"], math.nan)
            metrics[f"{split}_accuracy"] = accuracy.masked_fill(metrics["diverged"], math.nan)
        provenance = versions() | {"seconds": round(seconds, 3)}
        return Zoo(
            *(self.arch, self.initial, final, self.snapshots, metrics, self.seeds),
            settings=told,
            provenance=provenance,
        )

    @torch.no_grad()
    def _measure(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        network = Stacked(self.arch, training=False, like=x)
        units = max(leaf.shape[0] for leaf in self.arch.leaves if leaf.shape)
        size = max(32, _EVALUATED_AT_ONCE // (self.settings.runs * units))
        loss, right = torch.zeros(2, self.settings.runs, dtype=x.dtype, device=x.device)
        for inputs, labels in zip(x.split(size), y.split(size), strict=True):
            outputs = network(self.leaves, inputs.clone().unsqueeze(0))  # may change in place
            wanted = labels.expand(len(outputs), -1)
            loss += F.cross_entropy(outputs, wanted, reduction="none").sum(1)
            # argmax(1) would do, at several times the cost.
            right += (outputs.max(1).indices == wanted).sum(1)
        return (loss / len(x)).cpu(), (right / len(x)).cpu()
