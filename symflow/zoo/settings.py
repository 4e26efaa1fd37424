"""How a zoo is trained, as a value: checked once, compared when a training is resumed."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, final

import torch
from jaxtyping import Int
from torch import Tensor

from symflow.errors import ShapeError
from symflow.flows.require import number, whole
from symflow.flows.source import Source


def _adam(p: Sequence[Tensor], s: "Settings", fused: bool) -> torch.optim.Optimizer:
    return torch.optim.Adam(p, lr=s.lr, weight_decay=s.weight_decay, fused=fused)


def _adamw(p: Sequence[Tensor], s: "Settings", fused: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(p, lr=s.lr, weight_decay=s.weight_decay, fused=fused)


def _sgd(p: Sequence[Tensor], s: "Settings", fused: bool) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        p, lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay, fused=fused
    )


# Each of these updates every coordinate by itself, so one optimiser over the leaves of all runs
# is the same as one for each run. An optimiser that takes norms over its parameters is not.
OPTIMIZERS: dict[str, Callable[[Sequence[Tensor], "Settings", bool], torch.optim.Optimizer]] = {
    "adam": _adam,
    "adamw": _adamw,
    "sgd": _sgd,
}
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}
DTYPES = (torch.float32, torch.float64)
# Their fused step updates all leaves in one call: it saves half of the time of a small step.
_FUSED = ("cpu", "cuda")


@final
@dataclass(frozen=True)
class Settings:
    """The arguments of :func:`symflow.zoo.train` that its result depends on.

    Raises
    ------
    ShapeError
        If one is out of range or unknown; it names the argument.
    """

    runs: int
    epochs: int
    batch_size: int
    optimizer: str
    lr: float
    momentum: float
    weight_decay: float
    schedule: str
    batches: str | int
    init: Source
    burn_in: int
    snapshot_every: int | None
    seed: int
    dtype: torch.dtype
    device: torch.device

    def __post_init__(self) -> None:
        # Set as plain numbers: NumPy's cannot be written as JSON.
        counts = {"runs": 1, "epochs": 1, "batch_size": 1, "snapshot_every": 1, "burn_in": 0}
        for name, least in counts.items():
            if name != "snapshot_every" or self.snapshot_every is not None:
                object.__setattr__(self, name, whole(name, getattr(self, name), least))
        object.__setattr__(self, "seed", whole("seed", self.seed))
        for name, below in (("lr", math.inf), ("momentum", 1.0), ("weight_decay", math.inf)):
            object.__setattr__(self, name, number(name, getattr(self, name), below=below))
        if not isinstance(self.init, Source):
            raise ShapeError(
                "init must be a source such as symflow.flows.Gaussian(0.1) or FanIn(), got "
                f"{type(self.init).__name__}"
            )
        known = {"optimizer": OPTIMIZERS, "schedule": SCHEDULES, "dtype": DTYPES}
        for name, choices in known.items():
            if getattr(self, name) not in tuple(choices):
                raise ShapeError(
                    f"{name} must be one of {', '.join(map(str, choices))}, got "
                    f"{getattr(self, name)!r}"
                )
        size = {"shared": self.runs, "own": 1}.get(str(self.batches), self.batches)
        if not isinstance(size, int) or size is True or size < 1 or self.runs % size:
            raise ShapeError(
                "batches must be 'shared', 'own', or the number of runs that share an order, a "
                f"divisor of runs = {self.runs}; got {self.batches!r}"
            )

    @property
    def groups(self) -> int:
        """Number of groups of runs that see the same mini-batches."""
        if isinstance(self.batches, int):
            return self.runs // self.batches
        return {"shared": 1, "own": self.runs}[self.batches]

    def optimizer_over(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """Make the optimiser of all runs."""
        return OPTIMIZERS[self.optimizer](parameters, self, self.device.type in _FUSED)

    def learning_rate(self, done: float) -> float:
        """Return the rate of a step, from the share of all steps done before it."""
        return self.lr * SCHEDULES[self.schedule](done)

    def snapshot_index(self, step: int, per_epoch: int) -> int | None:
        """Return where the weights after ``step`` steps go among the snapshots, if anywhere."""
        if self.snapshot_every is None:
            return None
        count, rest = divmod(step - self.burn_in * per_epoch, self.snapshot_every)
        return count - 1 if rest == 0 and count > 0 else None

    def snapshot_count(self, steps: int, per_epoch: int) -> int:
        """Return how many snapshots there are after ``steps`` steps."""
        if self.snapshot_every is None:
            return 0
        return max(0, steps - self.burn_in * per_epoch) // self.snapshot_every

    def describe(self) -> dict[str, Any]:
        """Return the settings as JSON."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        text = {"init": repr(self.init), "device": self.device.type}
        return plain | text | {"dtype": str(self.dtype).removeprefix("torch.")}


def stream(seed: int, purpose: str, index: int) -> int:
    """Seed of the generator for one run (or group of runs) and one purpose.

    Streams of one purpose never coincide: PyTorch's generator takes 32 bits of its seed, and with
    hashed seeds 4,000 runs would hold a pair of twins once in 500 zoos.

    Examples
    --------
    >>> len({stream(0, "initial weights", r) for r in range(4000)})
    4000
    """
    start = int.from_bytes(hashlib.sha256(f"{purpose} {seed}".encode()).digest()[:4])
    return (start + index) * 2654435769 % 2**32  # odd, so one-to-one: neighbours end far apart


def batch_order(seed: int, epoch: int, group: int, n: int) -> Int[Tensor, " n"]:
    """Order in which a group of runs sees the ``n`` training examples in one epoch.

    Mini-batches are consecutive pieces of it. With the initial weights this is all the randomness
    of a run (of a module without dropout), so a plain training loop can repeat it.

    Examples
    --------
    >>> batch_order(0, 0, 0, 4).sort().values
    tensor([0, 1, 2, 3])
    """
    generator = torch.Generator().manual_seed(stream(seed, f"order {epoch}", group))
    return torch.randperm(n, generator=generator)
