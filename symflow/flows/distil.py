"""Distillation: a flow that goes in a few steps where another one goes in many."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.errors import ShapeError
from symflow.flows.descent import Descent
from symflow.flows.require import whole
from symflow.flows.sampling import Motion, prepared, require_trained, starts_of
from symflow.flows.settings import FitSettings

if TYPE_CHECKING:
    from symflow.flows.flow import Flow

# Teachers' paths are drawn so many at once.
_BATCH = 256


def distil(
    teacher: "Flow",
    *,
    steps: int,
    teacher_steps: int,
    starts: int,
    start: "Tensor | Sequence[Any] | None",
    conditions: "Tensor | Sequence[Any] | None",
    guidance_scale: float,
    settings: FitSettings,
) -> "Flow":
    """Train a copy of a flow on its paths; see :meth:`symflow.flows.Flow.distil`."""
    require_trained(teacher)
    steps, teacher_steps = whole("steps", steps, 1), whole("teacher_steps", teacher_steps, 1)
    if teacher_steps <= steps or teacher_steps % steps:
        raise ShapeError(
            f"teacher_steps must be a multiple of steps = {steps}, and more, got {teacher_steps}: "
            "the student is shown the teacher's states at its own times"
        )
    n = whole("starts", starts, 1) if start is None else len(start)
    told, scale = prepared(teacher, conditions, n, guidance_scale, "conditions")
    x = starts_of(teacher, n, start, torch.Generator().manual_seed(settings.seed))
    path = teacher_path(teacher, x, told, scale, steps, teacher_steps)
    student = copy.copy(teacher)
    student.field, student.average = copy.deepcopy(teacher.average), copy.deepcopy(teacher.average)
    for own, other in zip(student.field.parameters(), teacher.field.parameters(), strict=True):
        own.requires_grad_(other.requires_grad)
    student.history = []
    _train(student, path, told, settings)
    return student


def teacher_path(
    teacher: "Flow",
    x: Float[Tensor, "n size"],
    condition: Tensor | None,
    scale: float,
    steps: int,
    teacher_steps: int,
) -> Float[Tensor, "more n size"]:
    """Return the states of Euler's method in many steps at the times of few, start included."""
    stride = teacher_steps // steps
    pieces: list[Tensor] = []
    for rows in torch.arange(len(x)).split(_BATCH):
        motion = Motion(
            teacher, condition=None if condition is None else condition[rows], scale=scale
        )
        with torch.no_grad():
            states = list(motion.states(x[rows], teacher_steps, "euler"))
        pieces.append(torch.stack([x[rows], *states[stride - 1 :: stride]]))
    return torch.cat(pieces, dim=1)


def _train(
    student: "Flow",
    path: Float[Tensor, "more n size"],
    condition: Tensor | None,
    settings: FitSettings,
) -> None:
    """Descend the distance of the student's states from the teacher's at each of its times."""
    descent = Descent(student.field, student.average, settings, "the distillation")
    for step in range(settings.steps):
        generator = torch.Generator().manual_seed((settings.seed + 1) * 1_000_003 + step)
        rows = torch.randint(path.shape[1], (settings.batch_size,), generator=generator)
        loss = _loss(student, path[:, rows], None if condition is None else condition[rows])
        value = descent.step(loss, step)
        if step + 1 == settings.steps or (step + 1) % settings.log_every == 0:
            student.history.append({"step": step + 1.0, "loss": value})


def _loss(student: "Flow", path: Float[Tensor, "more n size"], condition: Tensor | None) -> Tensor:
    """Mean squared distance of the student's own states, in the field's units for each leaf."""
    steps = len(path) - 1
    field = student.told(student.field, condition)
    x, errors = path[0], []
    for k, target in enumerate(path[1:]):
        t = torch.full_like(x[:, 0], k / steps)
        if k < steps - 1:
            x = student.space.retr(x, student.velocity_of(field, x, t) / steps)
        else:
            x = student.settle(student.predict(field, x, t))
        errors.append((x - target) / student.field.scale)
    return torch.stack(errors).square().mean()
