"""How a flow is trained, as a value that can be written to a file and compared."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, final

import torch
from torch import nn

from symflow.errors import ShapeError
from symflow.flows.require import number, whole

_CHOICES = {
    "optimizer": ("adam", "adamw", "muon"),
    "schedule": ("cosine", "constant"),
    "keep": ("last", "best"),
    "precision": ("float32", "bfloat16"),
}


@final
@dataclass(frozen=True)
class FitSettings:
    """How a flow is trained.

    Attributes
    ----------
    steps, batch_size
        Number of optimiser steps, and pairs in each.
    optimizer
        ``"adam"``, ``"adamw"``, or ``"muon"``: orthogonalised momentum for matrices (Jordan et al.,
        2024) with steps of the size of Adam's, and AdamW for the rest; try it with lr=0.003.
    lr, weight_decay, schedule, warmup, clip
        Peak step size; decay; ``"cosine"`` to zero or ``"constant"`` after a linear warm-up of so
        many steps; largest gradient norm.
    ema
        Decay of the running average of the network's weights, which samples are drawn with.
    keep
        ``"best"``: at the end the running average goes back to where, among the recorded steps, the
        loss of the held-out networks was least. With few runs a flow learns them by heart.
    behaviour, behaviour_inputs
        Weight of the behaviour loss, the mean KL divergence between the predictions of the true end
        and of the predicted one on so many random inputs. Errors that change the function count,
        others do not.
    consensus
        Weight of the divergence between the mean predictions of the batch's true ends and those of
        its predicted ones, beside the behaviour loss. Errors that all samples share, which no
        average takes away, are in it, and little of what each has by itself.
    precision
        ``"bfloat16"``: the field's matrix products are in half precision (parameters, states and
        losses are not); faster where the processor has such products.
    seed
        Of everything random. Each step has its own generator, so that a resumed run draws the same.
    checkpoint_every, log_every
        Steps between checkpoints (with a folder) and between records in ``flow.history``.

    Raises
    ------
    ShapeError
        If one is out of range or unknown; it names the setting.

    Examples
    --------
    >>> FitSettings(steps=100).rate(99) < FitSettings(steps=100).rate(50)
    True
    """

    steps: int = 10_000
    batch_size: int = 32
    optimizer: str = "adam"
    lr: float = 0.001
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup: int = 50
    clip: float = 1.0
    ema: float = 0.999
    keep: str = "last"
    behaviour: float = 0.0
    consensus: float = 0.0
    behaviour_inputs: int = 128
    precision: str = "float32"
    seed: int = 0
    checkpoint_every: int = 1000
    log_every: int = 100

    def __post_init__(self) -> None:
        # Set as plain numbers: NumPy's cannot be written as JSON.
        for name in ("steps", "batch_size", "checkpoint_every", "log_every", "behaviour_inputs"):
            object.__setattr__(self, name, whole(name, getattr(self, name), 1))
        object.__setattr__(self, "warmup", whole("warmup", self.warmup, 0))
        object.__setattr__(self, "seed", whole("seed", self.seed, -(2**32), 2**32))
        for name in ("lr", "weight_decay", "behaviour", "consensus"):
            object.__setattr__(self, name, number(name, getattr(self, name)))
        object.__setattr__(self, "ema", number("ema", self.ema, below=1.0))
        object.__setattr__(self, "clip", number("clip", self.clip))
        if self.clip == 0:
            raise ShapeError("clip must be positive, got 0: no gradient is that small")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ShapeError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )

    @staticmethod
    def of(settings: dict[str, Any]) -> "FitSettings":
        """Make settings of keyword arguments, and say which there are if one is unknown."""
        known = [f.name for f in fields(FitSettings)]
        unknown = [name for name in settings if name not in known]
        if unknown:
            raise ShapeError(
                f"unknown setting(s) {', '.join(unknown)}: the settings of a fit are "
                f"{', '.join(known)}"
            )
        return FitSettings(**settings)

    def optimizers_over(self, parameters: Sequence[nn.Parameter]) -> list[torch.optim.Optimizer]:
        """Make the optimizers of a field's parameters, which share their step sizes."""
        if self.optimizer == "adam":
            return [torch.optim.Adam(parameters, lr=self.lr, weight_decay=self.weight_decay)]
        if self.optimizer == "adamw":
            return [torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)]
        groups = (
            [p for p in parameters if p.ndim == 2],
            [p for p in parameters if p.ndim != 2],
        )
        options: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay}
        made = (
            lambda group: torch.optim.Muon(group, adjust_lr_fn="match_rms_adamw", **options),
            lambda group: torch.optim.AdamW(group, **options),
        )
        return [make(group) for make, group in zip(made, groups, strict=True) if group]

    @property
    def compares(self) -> bool:
        """Whether predictions of networks are compared."""
        return self.behaviour > 0 or self.consensus > 0

    def rate(self, step: int) -> float:
        """Return the step size of a step."""
        rate = self.lr * min(1.0, (step + 1) / max(1, self.warmup))
        if self.schedule == "constant":
            return rate
        return rate * (1 + math.cos(math.pi * step / self.steps)) / 2
