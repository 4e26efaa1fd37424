"""The density of a source on the states of a flow, where it is known."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.arch import Architecture, scale_coordinates
from symflow.errors import LeafError, StateError
from symflow.flows.dynamics import Dynamics
from symflow.flows.source import Gaussian
from symflow.manifolds import Flat, SphereProduct
from symflow.sections import SphereSection, noncompact_axes, scaled_axes
from symflow.sections.base import unit_shape

# The integrals over log-scales: where they end (relative to the greatest value, in logarithms),
# how far they are looked for, halvings of the search, and nodes of the trapezoidal rule. It
# converges faster than any power for integrands that vanish at both ends with all derivatives.
_DEPTH = 45.0
_FAR = 150.0
_HALVINGS = 70
_NODES = 401


def source_log_prob(flow: Dynamics, x: Float[Tensor, "B size"]) -> Float[Tensor, " B"]:
    r"""Return the log-density of a flow's source at states, by the volume of their manifold.

    The source must be :class:`~symflow.flows.Gaussian` with deviation s and reach every weight.

    *Flat states*: the normal density of the weights.

    *Sphere section*: a state holds what is left of weights w when each unit's row is divided by its
    length and the outgoing weights are multiplied by it. With the log-lengths :math:`\tau` of the
    rows, :math:`w_d = x_d \exp((E\tau)_d)` for the degrees E, the volume of R^D is
    :math:`\exp(\sum_d (E\tau)_d)` times those of the section and of :math:`\tau`, and

    .. math:: p(x) = \int N(x \exp(E\tau); 0, s^2 I)\, \exp(\textstyle\sum_d (E\tau)_d)\,
        d\tau.

    For a row alone this says that its direction is uniform and its length has the law of s times
    chi. Where no weight lies between two scaled units the integral is a product of one for each
    unit (a Bessel function; its logarithm is found by the trapezoidal rule, to rounding). Where one
    does, the scales are coupled, and the density is not known. With ``preserves="argmax"`` the last
    layer, N weights z, is :math:`z = R e^\rho \theta / R` for a point :math:`\theta` on the sphere
    of radius R and the log-scale :math:`\rho`: a factor :math:`R e^{N\rho}`.

    Raises
    ------
    StateError
        If the density is not known; it says why.
    LeafError
        If a row of a state is zero.

    Examples
    --------
    >>> import symflow
    >>> flow = symflow.flows.euclidean(symflow.mlp([2, 3, 2]), width=8, depth=1)
    >>> source_log_prob(flow, torch.zeros(1, 17))  # 17 times -log(0.1 sqrt(2 pi))
    tensor([23.5220])
    """
    require_known(flow)
    s = flow.recipe.source.spread(flow.arch.leaves[0], 1)
    if isinstance(flow.space, Flat):
        return _normal(x, s)
    space = _spheres(flow)
    rows, _ = space.split(x)
    dead = sum(int((r == 0).all(-1).sum()) for r in rows)
    if dead:
        raise LeafError(
            f"w: {dead} unit(s) have no incoming weights (or a last layer is zero): such states "
            "have no direction and no density. Leave these networks out"
        )
    w = flow.decode_inner(x)
    out = _over_scales(flow.arch, w.double(), s)
    if flow.extra:
        radius, size = space.radii[-1], space.shapes[-1][1]
        out = out + math.log(radius) + size * x[:, -1].double()
    return out.to(x)


def require_known(flow: Dynamics) -> None:
    """Refuse a flow whose source has no known density on its states.

    Raises
    ------
    StateError
        If so; it says why and what to take instead.

    Examples
    --------
    >>> import symflow
    >>> require_known(symflow.flows.geometric(symflow.mlp([2, 3, 2]), width=8, depth=1))
    """
    arch, source = flow.arch, flow.recipe.source
    if not isinstance(source, Gaussian):
        raise StateError(
            f"log_prob needs a source whose density on the states is known, got {source}: use "
            "source=Gaussian(std)"
        )
    if flow.coordinates is not None:
        raise StateError(
            "log_prob needs a source whose density on the states is known, and in coordinates of "
            "the inputs it is not: make the flow without coordinates="
        )
    one, two = source.sample(arch, 2, generator=torch.Generator().manual_seed(0))
    for leaf in arch.leaves:
        if bool((one[leaf.span] == two[leaf.span]).any()):
            raise StateError(
                f"log_prob needs a source that spreads over all weights, but {source} starts leaf "
                f"{leaf.name!r} at fixed values: there the flow has no density"
            )
    plain = not noncompact_axes(arch) and flow.extra == 0
    if isinstance(flow.space, Flat) and (flow.recipe.section == "flat" or plain):
        return
    _spheres(flow)
    twice = (_degrees(arch) != 0).sum(0) > 1
    if bool(twice.any()):
        place = int(twice.nonzero()[0])
        leaf = next(x for x in arch.leaves if x.span.start <= place < x.span.stop)
        raise StateError(
            f"log_prob needs a source whose density on the states is known, but leaf {leaf.name!r} "
            "lies between two layers of scaled units, whose scales are coupled: use "
            "flows.euclidean, or a network with one hidden layer"
        )


def _spheres(flow: Dynamics) -> SphereProduct:
    """Return the space of a flow on the sphere section."""
    if not (isinstance(flow.space, SphereProduct) and isinstance(flow.section, SphereSection)):
        raise StateError(
            f"log_prob needs states whose source has a density, but the one of the section "
            f"{flow.recipe.section!r} is not known in {flow.space.name} (a source of measure zero, "
            "or scales that are not integrated out): use flows.geometric or flows.euclidean"
        )
    return flow.space


def _normal(w: Tensor, s: float) -> Tensor:
    return -(w / s).square().sum(-1) / 2 - w.shape[-1] * math.log(s * math.sqrt(2 * math.pi))


def _degrees(arch: Architecture) -> Tensor:
    """Return with which power each unit's scale multiplies each coordinate, (units, D)."""
    found = [torch.zeros(0, arch.dimension, dtype=torch.float64)]
    for name in scaled_axes(arch):
        shape = unit_shape(arch, name)
        n = math.prod(shape)
        scales = torch.eye(n, dtype=torch.float64).exp().unflatten(-1, shape)
        factors = scale_coordinates(arch.leaves, {name: scales})
        found += [] if factors is None else [factors.log().round()]
    return torch.cat(found)


def _over_scales(arch: Architecture, w: Tensor, s: float) -> Tensor:
    """Log of the normal density integrated over the scales of all units, in float64."""
    degrees = _degrees(arch).to(w.device)
    square = w.square() / (2 * s * s)
    free = square[:, (degrees == 0).all(0)].sum(-1)
    out = -free - arch.dimension * math.log(s * math.sqrt(2 * math.pi))
    if not len(degrees):
        return out
    powers = degrees[degrees != 0].unique()
    sizes = torch.stack([square @ (degrees == k).to(w).T for k in powers], dim=-1).log()
    return out + _log_integral(degrees.sum(-1), powers, sizes).sum(-1)


def _log_integral(
    slope: Float[Tensor, " S"], powers: Float[Tensor, " K"], sizes: Float[Tensor, "B S K"]
) -> Float[Tensor, "B S"]:
    r"""Log of the integral over t of exp(m t - sum_k exp(l_k + 2 k t)), whose log is concave."""
    far = torch.full(sizes.shape[:-1], _FAR / float(powers.abs().max()), dtype=sizes.dtype)
    far = far.to(sizes.device)
    low, high = -far, far
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        pull = (2 * powers * (sizes + 2 * powers * middle[..., None]).exp()).sum(-1)
        rises = slope > pull
        low, high = torch.where(rises, middle, low), torch.where(rises, high, middle)
    mode = (low + high) / 2
    top = _log_integrand(slope, powers, sizes, mode[..., None])
    ends: list[Tensor] = []
    for edge in (-far, far):
        inside, outside = mode, edge
        for _ in range(_HALVINGS):
            middle = (inside + outside) / 2
            deep = _log_integrand(slope, powers, sizes, middle[..., None]) < top - _DEPTH
            deep = deep[..., 0]
            inside = torch.where(deep, inside, middle)
            outside = torch.where(deep, middle, outside)
        ends.append(outside)
    share = torch.linspace(0, 1, _NODES, dtype=sizes.dtype, device=sizes.device)
    t = ends[0][..., None] + (ends[1] - ends[0])[..., None] * share
    width = (ends[1] - ends[0]) / (_NODES - 1)
    return _log_integrand(slope, powers, sizes, t).logsumexp(-1) + width.log()


def _log_integrand(slope: Tensor, powers: Tensor, sizes: Tensor, t: Tensor) -> Tensor:
    decay = (sizes[..., None, :] + 2 * powers * t[..., None]).exp().sum(-1)
    return slope[:, None] * t - decay
