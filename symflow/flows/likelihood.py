"""The density of what a flow generates, by integrating its divergence along the flow."""

from collections.abc import Callable, Iterator
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.errors import ShapeError
from symflow.flows.dynamics import Dynamics
from symflow.flows.prior import require_known, source_log_prob
from symflow.flows.require import number, whole
from symflow.flows.solve import SOLVERS, integrate
from symflow.manifolds import Flat, SphereProduct, WeightManifold

DIVERGENCES = ("exact", "hutchinson")
# Rows that the network is given at once while directions stand beside each other in the batch.
_ROWS = 4096


def log_prob(
    flow: Dynamics,
    x: Float[Tensor, "B size"],
    velocity: Callable[[Tensor, Tensor], Tensor],
    *,
    steps: int,
    solver: str,
    divergence: str,
    probes: int,
    until: float | None,
    seed: int,
) -> Float[Tensor, " B"]:
    """Return the log-density of a flow at states; see :meth:`symflow.flows.Flow.log_prob`.

    Parameters
    ----------
    flow
        The flow.
    x
        States.
    velocity
        ``velocity(t, x)`` for a scalar time.
    steps, solver, divergence, probes, until, seed
        As for the method.
    """
    steps, probes = whole("steps", steps, 1), whole("probes", probes, 1)
    generator = torch.Generator().manual_seed(whole("seed", seed))
    if solver not in SOLVERS:
        raise ShapeError(f"solver must be one of {SOLVERS}, got {solver!r}")
    if divergence not in DIVERGENCES:
        raise ShapeError(f"divergence must be one of {DIVERGENCES}, got {divergence!r}")
    end = _end_time(flow, steps, until)
    require_known(flow)
    normal = None
    if divergence == "hutchinson":
        shape = (probes, *x.shape)
        normal = 2 * torch.randint(2, shape, generator=generator).to(x) - 1
    backward = Backward(flow.space, velocity, end, normal)
    grid = torch.linspace(0, end, steps + 1, dtype=x.dtype, device=x.device)
    state = torch.cat([x, torch.zeros_like(x[:, :1])], dim=-1)
    for moved in integrate(beside(flow.space), backward.velocity, state, grid, solver):
        state = moved
    return (source_log_prob(flow, state[:, :-1]) + state[:, -1]).detach()


def _end_time(flow: Dynamics, steps: int, until: float | None) -> float:
    """Return the time whose density is asked for; end predictions have no velocity at one."""
    ends = flow.recipe.predicts == "end"
    if until is None:
        if ends and steps < 2:
            raise ShapeError(
                "steps must be at least 2, got 1: the last step of sampling jumps to the predicted "
                "end, and the density is that of the state before it"
            )
        return 1 - 1 / steps if ends else 1.0
    end = number("until", until)
    if end > 1 or end == 0 or (ends and end == 1):
        bound = "below 1, where a predicted end has no velocity" if ends else "at most 1"
        raise ShapeError(f"until must be a time above 0 and {bound}, got {until!r}")
    return end


@final
class Backward:
    """A flow from its end to its start, with the log of the volume it has gained beside the state.

    Parameters
    ----------
    space
        The manifold of the states.
    forward
        ``forward(t, x)``, the velocity of the flow.
    end
        The time that it starts at.
    probes
        Directions (probes, B, size) for Hutchinson's estimate of the divergence: the same at all
        times, so that the integral of one is. None for all directions, the exact one.
    """

    def __init__(
        self,
        space: WeightManifold,
        forward: Callable[[Tensor, Tensor], Tensor],
        end: float,
        probes: Tensor | None = None,
    ) -> None:
        self.space = space
        self.forward = forward
        self.end = end
        self.probes = probes

    def velocity(self, s: Tensor, state: Float[Tensor, "B more"]) -> Float[Tensor, "B more"]:
        """Return minus the velocity and minus the divergence, at the time ``end - s``."""
        x, t = state[:, :-1], self.end - s
        if self.probes is None:
            v, change = divergence(self.forward, self.space, t, x)
        else:
            v, change = divergence(self.forward, self.space, t, x, self.probes)
        return -torch.cat([v, change[:, None]], dim=-1)


def divergence(
    velocity: Callable[[Tensor, Tensor], Tensor],
    space: WeightManifold,
    t: Tensor,
    x: Float[Tensor, "B size"],
    probes: Float[Tensor, "K B size"] | None = None,
) -> tuple[Float[Tensor, "B size"], Float[Tensor, " B"]]:
    r"""Return a tangent vector field at points, and its divergence on the manifold.

    It is :math:`\operatorname{tr}(P J P)` for the Jacobian J of the field and the projection P on
    the tangent space: with all directions :math:`\sum_d \langle P e_d, J P e_d\rangle`, with probes
    of independent signs the mean of :math:`\langle P z, J P z\rangle` (Hutchinson, 1990), whose
    expectation it is.

    Parameters
    ----------
    velocity
        ``velocity(t, x)`` for a scalar time, tangent at each x; rows must not see each other.
    space
        The manifold.
    t
        The time.
    x
        Points of it.
    probes
        Directions (K, B, size); all of them, exactly, if None.

    Notes
    -----
    Directions stand beside each other in the batch (some thousand rows at once) and are taken
    backward: the fused attention of PyTorch has no forward derivative, and numerically delicate
    functions look at their values, which ``vmap`` does not let them. O(size) evaluations of the
    field for each point exactly, O(K) with probes.

    Examples
    --------
    >>> x = torch.tensor([[1.0, 2.0, 3.0]])
    >>> v, change = divergence(lambda t, x: t * x**2, Flat(3), torch.tensor(0.5), x)
    >>> change  # 2 t (1 + 2 + 3)
    tensor([6.])
    """
    b, size = x.shape
    total, v = torch.zeros_like(x[:, 0]), None
    count = max(1, _ROWS // max(1, b))
    for directions in _blocks(x, probes, count):
        k = len(directions)
        with torch.enable_grad():
            leaf = x.detach().repeat(k, 1).requires_grad_(True)
            out = velocity(t, leaf)
            with torch.no_grad():
                e = space.proju(leaf, directions.reshape(k * b, size))
            v = out[:b].detach() if v is None else v
            if not out.requires_grad:  # the same everywhere
                continue
            found = torch.autograd.grad((out * e).sum(), leaf, materialize_grads=True)[0]
        total = total + (found * e).sum(-1).view(k, b).sum(0)
    share = 1 if probes is None else len(probes)
    return torch.zeros_like(x) if v is None else v, total / share


def _blocks(x: Tensor, probes: Tensor | None, count: int) -> Iterator[Tensor]:
    """Yield directions (k, B, size), ``count`` at a time."""
    if probes is not None:
        yield from probes.split(count)
        return
    axes = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    for block in axes.split(count):
        yield block[:, None].expand(-1, *x.shape)


def beside(space: WeightManifold) -> WeightManifold:
    """Return the space with one more Euclidean coordinate, the last.

    Raises
    ------
    ShapeError
        If it is neither flat nor a product of spheres.

    Examples
    --------
    >>> beside(SphereProduct(4, [torch.tensor([[0, 1]])])).dimension
    5
    """
    if isinstance(space, Flat):
        return Flat(space.dimension + 1, space.counted)
    if not isinstance(space, SphereProduct):
        raise ShapeError(f"densities are for flat space and spheres, got {space.name}")
    sizes: list[Any] = [n * d for n, d in space.shapes]
    parts = space.order[: sum(sizes)].split(sizes)
    rows = [p.view(n, d) for p, (n, d) in zip(parts, space.shapes, strict=True)]
    return SphereProduct(space.dimension + 1, rows, space.radii, space.counted)
