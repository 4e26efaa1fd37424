"""How a flow moves states from its source to its end, and how starts are chosen for it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from symflow.errors import ShapeError, StateError
from symflow.flows.condition import conditions_for
from symflow.flows.dynamics import Dynamics
from symflow.flows.guidance import Guidance, losses_of
from symflow.flows.require import number, whole
from symflow.flows.solve import ADAPTIVE, solve

States = Float[Tensor, "B size"]


@final
class Motion:
    """The velocity of a flow with all that was asked for: a condition, guidance, noise.

    Parameters
    ----------
    flow
        The flow.
    condition
        One condition (n, k) for each network, or None.
    scale
        Of classifier-free guidance: the velocity is the one without the condition plus so many
        times what the condition changes (Ho and Salimans, 2022), in the tangent space.
    guidance
        Bends samples towards low values of a loss.
    noise, bridge
        Standard deviation of the tangent noise that :meth:`kick` adds to each coordinate, and the
        share of the path's noise in it.
    generator
        Of the noise.
    """

    def __init__(
        self,
        flow: Dynamics,
        *,
        condition: Tensor | None = None,
        scale: float = 1.0,
        guidance: Guidance | None = None,
        noise: float = 0.0,
        bridge: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        self.flow = flow
        self.condition = condition
        self.scale = scale
        self.guidance = guidance
        self.noise = noise
        self.bridge = bridge
        self.generator = generator

    def velocity(self, t: Tensor, x: States) -> States:
        """Return the velocity of all states at one time."""
        v = self.flow.velocity(x, t.expand(len(x)), self.condition, self.scale)
        if self.guidance is None:
            return v
        chart = self.flow.coordinates
        decode = self.flow.decode if chart is None else self.flow.decode_inner
        return v + self.flow.space.proju(x, self.guidance.push(x, decode, chart))

    def finish(self, t: Tensor, x: States) -> States:
        """Take the last step, from a time to one: to the end that the field predicts."""
        if self.guidance is not None or (self.condition is not None and self.scale != 1):
            return self.flow.space.retr(x, (1 - t) * self.velocity(t, x))
        field = self.flow.told(self.flow.average, self.condition)
        return self.flow.predict(field, x, t.expand(len(x)))

    def kick(self, t: Tensor, ahead: Tensor, x: States) -> States:
        """Add noise at the end of the step from the time ``t`` to ``ahead``.

        That of the path is a Brownian bridge to the end, of diffusion 2 b: what a step adds has the
        variance (2 b)^2 (s - t) (1 - s) / (1 - t) at its end s.
        """
        width = 2 * self.bridge * self.flow.recipe.path.bridge
        size = width * ((ahead - t) * (1 - ahead) / (1 - t)).sqrt() * self.flow.unit.to(x)
        normal = torch.randn(x.shape, generator=self.generator).to(x)
        kick = (self.noise**2 + size**2).sqrt() * normal
        return self.flow.space.retr(x, self.flow.space.proju(x, kick))

    def states(self, x: States, steps: int, solver: str) -> Iterator[States]:
        """Yield the state after each step; the last one is on the section.

        A flow in ambient space gets there only at the end.
        """
        space = self.flow.space
        noisy = self.noise > 0 or self.bridge * self.flow.recipe.path.bridge > 0
        kick = self.kick if noisy else None
        last = 0 if solver in ADAPTIVE and steps > 1 else steps - 1
        found = solve(space, self.velocity, self.finish, x, steps=steps, solver=solver, kick=kick)
        for k, state in enumerate(found):
            done = k >= last
            yield self.flow.settle(state) if done else state


def require_trained(flow: Dynamics) -> None:
    """Refuse a flow that was not trained.

    Raises
    ------
    StateError
        If so.
    """
    if not flow.history:
        raise StateError("the flow is not trained: call flow.fit(zoo) or load one first")


def starts_of(
    flow: Dynamics, n: int, start: "Tensor | Sequence[Any] | None", generator: torch.Generator
) -> States:
    """Return the states of n networks to start from: those given, or draws from the source.

    Raises
    ------
    ShapeError
        If ``start`` does not hold n networks.
    """
    dtype = next(flow.average.parameters()).dtype
    if start is None:
        return flow.draw(n, generator, dtype)
    w = flow.arch.as_weights(start, name="start").detach()
    if w.shape != (n, flow.arch.dimension):
        raise ShapeError(
            f"start must hold n = {n} networks (n, D) = {(n, flow.arch.dimension)}, got "
            f"shape {tuple(w.shape)}"
        )
    return flow.encode(w.to(flow.device, dtype))


@final
@dataclass(frozen=True, eq=False)
class Optimised:
    """Networks whose starts were optimised through the flow.

    Attributes
    ----------
    weights
        For each network the sample of least loss (n, D).
    start
        The start (n, D) that it was drawn from; ``flow.sample(n, start=...)`` draws it again.
    history
        The losses (iterations + 1, n) before each change, and after the last.

    Examples
    --------
    >>> Optimised(torch.zeros(1, 3), torch.ones(1, 3), torch.ones(2, 1)).history.shape
    torch.Size([2, 1])
    """

    weights: Float[Tensor, "n D"]
    start: Float[Tensor, "n D"]
    history: Float[Tensor, "more n"]


def optimise_start(
    flow: Dynamics,
    motion: Motion,
    x: States,
    loss: Callable[[Tensor], Tensor],
    *,
    iterations: int,
    lr: float,
    steps: int,
    solver: str,
) -> Optimised:
    """Descend the loss of samples by their starts; see :meth:`Flow.optimise_start`.

    Each evaluation of the velocity is a checkpoint: memory holds the states of all steps and the
    inside of one, and everything is computed twice.
    """
    iterations, steps = whole("iterations", iterations, 1), whole("steps", steps, 1)
    lr = number("lr", lr)
    if solver in ADAPTIVE:
        raise ShapeError(
            f"optimised starts need a fixed-step solver, got {solver!r}: use 'euler' or 'heun'"
        )
    held = Checkpointed(motion)
    leaf = torch.nn.Parameter(x.detach().clone())
    optimizer = torch.optim.Adam([leaf], lr=lr)
    history: list[Tensor] = []
    best, start = torch.full_like(x[:, 0], torch.inf), x.detach().clone()
    weights = flow.decode(start)
    for k in range(iterations + 1):
        state: Tensor = leaf
        for moved in solve(
            flow.space, held.velocity, held.finish, leaf, steps=steps, solver=solver
        ):
            state = moved
        w = flow.decode(flow.settle(state))
        losses = losses_of(loss, w, "the loss")
        history.append(losses.detach().clone())
        with torch.no_grad():
            better = history[-1] < best
            best = torch.where(better, history[-1], best)
            start = torch.where(better[:, None], leaf, start)
            weights = torch.where(better[:, None], w, weights)
        if k == iterations:
            break
        optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()
        with torch.no_grad():
            leaf.grad = flow.space.egrad2rgrad(leaf, torch.as_tensor(leaf.grad))
            if not bool(leaf.grad.isfinite().all()):
                raise StateError(
                    f"the gradient of the loss is not finite at iteration {k}: lower lr (now {lr})"
                )
            optimizer.step()
            leaf.copy_(flow.settle(leaf))
    return Optimised(weights, flow.decode(start), torch.stack(history))


@final
class Checkpointed:
    """A motion that computes its inside again on the way back, instead of keeping it."""

    def __init__(self, motion: Motion) -> None:
        self.motion = motion

    def velocity(self, t: Tensor, x: States) -> States:
        """Return the velocity."""
        return torch.as_tensor(
            checkpoint(self.motion.velocity, t, x, use_reentrant=False, preserve_rng_state=False)
        )

    def finish(self, t: Tensor, x: States) -> States:
        """Take the last step."""
        return torch.as_tensor(
            checkpoint(self.motion.finish, t, x, use_reentrant=False, preserve_rng_state=False)
        )


def prepared(
    flow: Dynamics, condition: Any, n: int, scale: float, name: str = "condition"
) -> tuple[Tensor | None, float]:
    """Check a condition and the scale of its guidance.

    Raises
    ------
    ShapeError
        If the scale is no number of at least 0, or 1 is not meant and there is no condition.
    """
    values, scale = (
        conditions_for(flow.average, condition, n, name),
        number("guidance_scale", scale),
    )
    if values is None and scale != 1:
        raise ShapeError(
            f"guidance_scale is how much a condition counts, got {scale:g} without one: pass "
            "condition="
        )
    return values, scale
