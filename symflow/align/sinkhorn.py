"""Sinkhorn re-basin: descend on any loss over doubly stochastic matrices, then round."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.align import hull
from symflow.align.base import Found, PairedAligner, Status, objective, where
from symflow.align.descent import CovariantAdam, mixes
from symflow.align.doubly_stochastic import sinkhorn
from symflow.align.hull import EVEN, ODD, Point
from symflow.arch import Element, Symmetry
from symflow.errors import ShapeError
from symflow.groups import CompactProduct, Permutation, Sign
from symflow.numerics import VARIANCE_FLOOR, tolerance

Loss: TypeAlias = Callable[[Tensor], Tensor]


@final
@dataclass(frozen=True)
class Sinkhorn(PairedAligner):
    """Learn a doubly stochastic matrix for each axis by gradient descent, then round it.

    Sinkhorn re-basin (Pena et al., 2023). Permutations are softened by Sinkhorn's iteration,
    differentiated at its fixed point; signs by a hyperbolic tangent on top, which stays in the hull
    of the signed permutations; any other compact group by its nearest element with a straight-
    through gradient. Adam descends on the logits.

    Parameters
    ----------
    loss
        Takes weights (N, D), gives (N,), differentiable, and does not change along orbits. None:
        the squared distance of the moved second network to the first.
    at
        Where on the segment between the networks ``loss`` is taken: ``"midpoint"``, or
        ``"random"``, uniform on the segment and new at each step.
    start
        ``"sequential"``: logits that lean towards matching each axis on its incoming weights.
        ``"uniform"``: the matrix of 1/n.
    polish
        Whether weight matching ascends from the rounded point; with a ``loss``, the end is kept
        where the loss is not greater for it.
    temperature, iterations
        Of Sinkhorn's iteration.
    steps, learning_rate
        Of Adam.
    seed
        Of the random points.

    Notes
    -----
    The start is kept where the rounded end has a greater loss. ``Alignment.losses`` has the loss of
    the soft matrices at each step.

    Examples
    --------
    >>> import symflow
    >>> arch = symflow.mlp([3, 8, 2], "tanh")
    >>> generator = torch.Generator().manual_seed(0)
    >>> w = torch.randn(arch.dimension, generator=generator)
    >>> moved = arch.symmetry.act(arch.symmetry.random(generator=generator, like=w), w)
    >>> torch.allclose(Sinkhorn(steps=20)(arch.symmetry, w, moved).weights, w)
    True
    """

    loss: Loss | None = None
    at: str = "midpoint"
    start: str = "sequential"
    polish: bool = True
    temperature: float = 0.1
    iterations: int = 20
    steps: int = 100
    learning_rate: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, options in (("at", ("midpoint", "random")), ("start", ("sequential", "uniform"))):
            if getattr(self, name) not in options:
                raise ShapeError(f"{name} must be one of {options}, got {getattr(self, name)!r}")
        if self.temperature <= 0 or self.iterations < 1 or self.steps < 0:
            raise ShapeError(
                "temperature must be positive, iterations at least 1, steps at least 0; got "
                f"{self.temperature}, {self.iterations}, {self.steps}"
            )

    def search(
        self, symmetry: Symmetry, w0: Float[Tensor, "N D"], w1: Float[Tensor, "N D"]
    ) -> Found:
        """Descend, round, polish; O(steps x (weights x width + iterations x width^2)) each."""
        first = hull.sequential(symmetry, w0, w1)
        logits = self._logits(symmetry, first, w1)
        element, losses = self._descend(symmetry, w0, w1, logits)
        if self.start == "sequential":
            element = self._least(symmetry, w0, w1, first, element)
        reached = objective(symmetry, w0, symmetry.act(element, w1))
        if not self.polish:
            return Found(element, reached[None], Status.NOT_POLISHED, losses)
        end = hull.polish(symmetry, w0, w1, element)
        if self.loss is None:
            return Found(end.element, end.history, end.status, losses)
        element = self._least(symmetry, w0, w1, end.element, element)
        reached = objective(symmetry, w0, symmetry.act(element, w1))
        return Found(element, reached[None], Status.NOT_POLISHED, losses)

    def _descend(
        self, symmetry: Symmetry, w0: Tensor, w1: Tensor, logits: Point
    ) -> tuple[Element, Tensor]:
        if not logits:
            return {}, w1.new_zeros(0, len(w1))
        generator = torch.Generator().manual_seed(self.seed)
        losses = w1.new_zeros(self.steps, len(w1))
        with torch.enable_grad():
            logits = {key: m.clone().requires_grad_() for key, m in logits.items()}
            turned = {a.name for a in symmetry.axes if mixes(a.group)}
            descent = CovariantAdam(
                [m for (name, _), m in logits.items() if name not in turned],
                [(m, 2) for (name, _), m in logits.items() if name in turned],
                self.learning_rate,
            )
            for k in range(self.steps):
                moved = hull.act(symmetry, self._soften(symmetry, logits), w1)
                t = 0.5 if self.at == "midpoint" else float(torch.rand((), generator=generator))
                loss = self._loss(symmetry, w0, moved, t)
                losses[k] = loss.detach()
                loss.sum().backward()
                descent.step()
        point = {key: m.detach() for key, m in self._soften(symmetry, logits).items()}
        return hull.nearest(symmetry, point), losses

    def _loss(self, symmetry: Symmetry, w0: Tensor, moved: Tensor, t: float) -> Tensor:
        if self.loss is not None:
            return evaluate(self.loss, torch.lerp(w0, moved, t))
        counted = symmetry.num_parameters
        a, b = w0[:, :counted], moved[:, :counted]
        return (a - b).square().sum(1) / a.square().sum(1).clamp_min(VARIANCE_FLOOR)

    def _least(
        self, symmetry: Symmetry, w0: Tensor, w1: Tensor, first: Element, second: Element
    ) -> Element:
        """Keep the element with the lesser loss for each pair, the first among equals."""
        points = (0.5,) if self.at == "midpoint" or self.loss is None else (0.25, 0.5, 0.75)
        with torch.no_grad():
            a, b = (
                sum((self._loss(symmetry, w0, moved, t) for t in points), w1.new_zeros(()))
                for moved in (symmetry.act(first, w1), symmetry.act(second, w1))
            )
        keep = torch.as_tensor(a - b <= tolerance(w1.dtype).gain * torch.as_tensor(a).abs())
        return {name: where(keep, g, second[name]) for name, g in first.items()}

    # ---------------------------------------------------------------- soft matrices

    def _logits(self, symmetry: Symmetry, element: Element, like: Tensor) -> Point:
        """Give the start half of the mass: odd logits are of signs, even ones of places."""
        logits: Point = {}
        start = hull.vertex(symmetry, element, like)
        for axis in symmetry.axes:
            seen = hull.parities(symmetry, axis.name, buffers=True)
            some = start[axis.name, seen[0]]
            lean = self.temperature * math.log(axis.size + 1), 0.5
            lean = lean if self.start == "sequential" else (0.0, 0.0)
            logits[axis.name, EVEN] = start.get((axis.name, EVEN), some.abs()) * lean[0]
            logits[axis.name, ODD] = start.get((axis.name, ODD), some) * lean[1]
        return logits

    def _soften(self, symmetry: Symmetry, logits: Point) -> Point:
        point: Point = {}
        for axis in symmetry.axes:
            own = {p: logits[axis.name, p] for p in (ODD, EVEN)}
            seen = hull.parities(symmetry, axis.name, buffers=True)
            if _is_signed_permutation(axis.group):
                p = sinkhorn(own[EVEN] / self.temperature, self.iterations)
                signs = isinstance(axis.group, CompactProduct)
                soft = {ODD: p * own[ODD].tanh() if signs else p, EVEN: p}
            elif isinstance(axis.group, Sign):
                eye = torch.eye(axis.size, dtype=own[ODD].dtype, device=own[ODD].device)
                soft = {ODD: eye * own[ODD].tanh(), EVEN: eye.expand_as(own[EVEN])}
            else:
                costs = {parity: own[parity].detach() for parity in seen}
                hard = {axis.name: hull.oracle(symmetry, axis.name, costs)}
                ends = hull.vertex(symmetry, hard, own[ODD].detach())
                soft = {k: ends[axis.name, k] + (own[k] - own[k].detach()) for k in seen}
            point |= {(axis.name, parity): soft[parity] for parity in seen}
        return point


def _is_signed_permutation(group: Any) -> bool:
    if isinstance(group, CompactProduct):
        return isinstance(group.outer, Permutation) and isinstance(group.inner, Sign)
    return isinstance(group, Permutation)


def evaluate(loss: Loss, w: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
    """Call a loss of the user's and check that it gives one number for each network.

    Raises
    ------
    ShapeError
        If it does not.

    Examples
    --------
    >>> evaluate(lambda w: w.square().sum(-1), torch.ones(2, 3))
    tensor([3., 3.])
    """
    found = loss(w)
    if not isinstance(found, Tensor) or found.shape != w.shape[:1]:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ShapeError(
            f"loss must take weights (N, D) and give one number for each network, ({len(w)},); got "
            f"{got}: do not average over networks"
        )
    return found
