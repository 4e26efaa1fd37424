"""Integrating a flow from time 0 to time 1. The only file that imports torchdyn."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.errors import ShapeError
from symflow.manifolds import WeightManifold

SOLVERS = ("euler", "heun", "midpoint", "rk4", "dopri5", "tsit5")
States = Float[Tensor, "B size"]
ADAPTIVE = ("dopri5", "tsit5")
Kick = Callable[[Tensor, Tensor, States], States]


def solve(
    space: WeightManifold,
    velocity: Callable[[Tensor, States], States],
    finish: Callable[[Tensor, States], States],
    x: States,
    *,
    steps: int,
    solver: str = "euler",
    kick: Kick | None = None,
    tolerance: float = 0.001,
) -> Iterator[States]:
    """Yield the state after each step; the last one is the sample.

    The interval [0, 1] is cut into ``steps`` pieces. The last one is never integrated numerically:
    the velocity of an end prediction grows like 1 / (1 - t), and ``finish`` knows where it leads.

    Parameters
    ----------
    space
        Steps of ``euler`` and ``heun`` are geodesic steps of this manifold; after each step of the
        other fixed-step solvers the state is projected on it.
    velocity
        ``velocity(t, x)`` for a scalar time.
    finish
        Takes the state at the beginning of the last piece to time one.
    x
        Start.
    steps
        Number of pieces, at least one.
    solver
        ``euler``; ``heun``, ``midpoint`` or ``rk4`` (2, 2 or 4 evaluations a step); ``dopri5`` or
        ``tsit5`` (adaptive over all but the last piece).
    kick
        ``kick(t, next, x)`` disturbs the state after the step between two times, the last one
        excepted (stochastic sampling); with fixed steps only.
    tolerance
        Absolute and relative error of the adaptive solvers.

    Raises
    ------
    ShapeError
        If ``steps`` is not positive, the solver is unknown, or noise meets an adaptive solver.
    """
    if steps < 1:
        raise ShapeError(f"steps must be at least 1, got {steps}")
    if kick is not None and solver in ADAPTIVE:
        raise ShapeError(f"stochastic steps need a fixed-step solver, got {solver!r}")
    grid = torch.linspace(0, 1, steps + 1, dtype=x.dtype, device=x.device)
    for state in integrate(space, velocity, x, grid[:-1], solver, kick=kick, tolerance=tolerance):
        x = state
        yield x
    yield finish(grid[steps - 1], x)


def integrate(
    space: WeightManifold,
    velocity: Callable[[Tensor, States], States],
    x: States,
    grid: Float[Tensor, " times"],
    solver: str = "euler",
    *,
    kick: Kick | None = None,
    tolerance: float = 0.001,
) -> Iterator[States]:
    """Yield the state at each time of the grid but the first (adaptive solvers: at the last only).

    Parameters are those of :func:`solve`. Euler's and Heun's steps are geodesic: Heun's method
    walks along the mean of the velocity at ``x`` and the one at the end of Euler's step, carried
    back to ``x`` in parallel, and is of second order on flat space and on spheres.

    Raises
    ------
    ShapeError
        If the solver is unknown.
    """
    if solver not in SOLVERS:
        raise ShapeError(f"solver must be one of {SOLVERS}, got {solver!r}")
    if solver in ADAPTIVE:
        if len(grid) > 1:
            yield space.projx(_odeint(velocity, space, x, grid[[0, -1]], solver, tolerance))
        return
    for k in range(len(grid) - 1):
        step = grid[k + 1] - grid[k]
        if solver == "euler":
            x = space.retr(x, step * velocity(grid[k], x))
        elif solver == "heun":
            first = velocity(grid[k], x)
            ahead = space.retr(x, step * first)
            second = space.transp(ahead, x, velocity(grid[k + 1], ahead))
            x = space.retr(x, step * (first + second) / 2)
        else:
            x = space.projx(_odeint(velocity, space, x, grid[k : k + 2], solver, tolerance))
        x = x if kick is None else kick(grid[k], grid[k + 1], x)
        yield x


def _odeint(
    velocity: Callable[[Tensor, States], States],
    space: WeightManifold,
    x: States,
    times: Tensor,
    solver: str,
    tolerance: float,
) -> States:
    from torchdyn.numerics import odeint

    def field(t: Tensor, x: Tensor) -> Tensor:
        return velocity(t, space.projx(x))

    if solver == "rk4":  # torchdyn (1.0.6) takes the stages of its own at wrong times
        t, step = times[0], times[1] - times[0]
        first = field(t, x)
        second = field(t + step / 2, x + step / 2 * first)
        third = field(t + step / 2, x + step / 2 * second)
        fourth = field(times[1], x + step * third)
        return x + step / 6 * (first + 2 * second + 2 * third + fourth)
    if solver in ADAPTIVE:
        _, path = odeint(field, x, times, solver, atol=tolerance, rtol=tolerance)
    else:
        _, path = odeint(field, x, times, solver)
    return path[-1]
