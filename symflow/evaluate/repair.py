"""Units of an average that vary as those of the networks it is an average of."""

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from symflow.arch import Architecture, Weights
from symflow.arch.template import ties_across_modules
from symflow.errors import LeafError, ShapeError, UnsupportedModuleError
from symflow.evaluate.moments import (
    Moments,
    Probe,
    State,
    changed_in_order,
    in_order,
    moments,
)
from symflow.evaluate.normalisation import batch_norms, running_statistics
from symflow.evaluate.predict import LabelledData, at_once, inputs_for
from symflow.evaluate.weights import flat_weights
from symflow.numerics import tolerance

# What gives W x + b, with the units along dimension 0 of both, and the dimension of its units.
_AFFINE: dict[type[nn.Module], int] = {
    nn.Linear: -1,
    nn.LayerNorm: -1,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.GroupNorm), 1),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), 1),
}


def repair(
    arch: Architecture,
    w: Weights,
    networks: Weights,
    inputs: Tensor | LabelledData,
    *,
    shares: Float[Tensor, "*batch N"] | None = None,
) -> Float[Tensor, "*batch D"]:
    r"""Rescale and shift the units of an average until they vary as in the networks.

    Units of an average are sums of units that do not quite agree: they vary less than these, layer
    after layer (Jordan et al., 2023, REPAIR). A layer gives each unit the value
    :math:`z = \langle w, x \rangle + b`. With mean :math:`m` and deviation :math:`s` over the
    inputs, and the mean over the networks of their means and deviations :math:`\bar m, \bar s`,

    .. math:: w \mapsto \tfrac{\bar s}{s} w, \qquad b \mapsto \tfrac{\bar s}{s} (b - m) + \bar m.

    Parameters
    ----------
    arch
        The architecture; the result is of the same.
    w
        What is repaired: averages or points of paths (*batch, D), state dicts or modules.
    networks
        The networks (*batch, N, D), aligned with ``w`` already: unit by unit. Batch dimensions
        broadcast, those of several points of one path with its two ends, say.
    inputs
        Inputs (n, *features), or labelled data, whose training inputs are taken. Not test inputs:
        statistics are part of the network.
    shares
        The share (*batch, N) of each network in the average; equal ones by default. They are
        divided by their sum.

    Returns
    -------
    Tensor
        Repaired weights (*batch, D).

    Raises
    ------
    ShapeError
        If there is no network or no input, shapes do not fit, a share is negative or all are zero,
        the network does not run on the inputs, or a layer sees a single number for each unit.
    LeafError
        If weights are NaN or infinite, or of another dtype or device than each other.
    UnsupportedModuleError
        If no layer has a bias, or one runs twice in one pass or has its weight in common with
        another: what repairs it here would break it there.

    Notes
    -----
    Exact up to rounding, in float64 and over all inputs and positions pooled, when the layers
    before are repaired already: afterwards every unit has the wanted mean and deviation. Networks
    that are all equal to ``w`` leave its function as it is. The symmetries of the architecture are
    kept: with ``w`` and the networks moved by the same element, the result is moved by it.

    Repaired are linear layers and convolutions with a bias, the output layer as well (of the
    logits, some classes would lose more than others; Jordan et al. stop before it), and per unit
    the affine part of LayerNorm (over one dimension), GroupNorm and InstanceNorm. In front of a
    BatchNorm they stay, and its statistics are measured again, by the same pass, as by
    :func:`~symflow.evaluate.reset_normalisation`. All else stays as it is: layers without bias,
    transposed convolutions, the inside of attention and recurrence; and each unit that does not
    vary, since all before it are dead.

    One pass of each network, and one of each average for each layer, up to that layer, in pieces of
    bounded memory.

    Examples
    --------
    >>> import symflow
    >>> arch = symflow.mlp([1, 1])
    >>> ends = torch.tensor([[2.0, 0.0], [-1.0, 0.0]])              # x -> 2 x and -x
    >>> repair(arch, ends.mean(0), ends, torch.tensor([[-1.0], [1.0]]))    # of deviations 2 and 1
    tensor([1.5000, 0.0000])
    """
    flat, ends, share = _together(arch, w, networks, shares)
    module = copy.deepcopy(arch.module).eval()
    probes = [*_affine(module), *batch_norms(module)]
    x = inputs_for(arch, inputs if isinstance(inputs, Tensor) else inputs.x_train)
    order, width = in_order(arch, module, probes, flat.reshape(-1, flat.shape[-1])[0], x[:1])
    repaired = [probe for probe in order if probe.output]
    _require_own(arch, module, repaired)
    if not repaired:
        raise UnsupportedModuleError(
            f"nothing to repair: no linear layer or convolution of {type(module).__name__} has a "
            "bias and no BatchNorm behind it. Make layers with bias=True; statistics of BatchNorm "
            "alone are measured again by reset_normalisation"
        )
    together, size = at_once(width, len(x))
    wanted = _wanted(arch, module, repaired, ends, share, x, (together, size))
    batch = flat.shape[:-1]
    means, deviations = (
        {path: value.expand(*batch, -1).reshape(batch.numel(), -1) for path, value in part.items()}
        for part in wanted
    )
    done: list[Tensor] = []
    for rows in torch.arange(batch.numel(), device=flat.device).split(together):

        def change(probe: Probe, found: Moments, leaves: State, rows: Tensor = rows) -> State:
            if not probe.output:
                return running_statistics(probe, found, leaves)
            path = probe.path
            return _repaired(found, leaves, means[path][rows], deviations[path][rows])

        group = flat.reshape(batch.numel(), -1)[rows]
        done.append(changed_in_order(arch, module, order, group, x, size, change))
    return torch.cat(done).reshape(*batch, -1)


def _together(
    arch: Architecture, w: Weights, networks: Weights, shares: Tensor | None
) -> tuple[Float[Tensor, "*batch D"], Float[Tensor, "*sets N D"], Float[Tensor, "*some N"]]:
    """Return what is repaired, of the shape of the result, the networks, and their shares."""
    flat, ends = flat_weights(arch, w, "w"), flat_weights(arch, networks, "networks")
    if ends.ndim < 2 or ends.shape[:-1].numel() == 0:
        raise ShapeError(
            "networks must be those that w is an average of, (*batch, N, D) with N at least 1, got "
            f"{tuple(ends.shape)}; stack them"
        )
    if (flat.dtype, flat.device) != (ends.dtype, ends.device):
        raise LeafError(
            f"networks must have the dtype and device of w, {flat.dtype} on {flat.device}, got "
            f"{ends.dtype} on {ends.device}: take them there with .to(w)"
        )
    n = ends.shape[-2]
    given = torch.ones(n) if shares is None else shares
    share = given.to(ends.device, torch.float64)
    good = bool(((share >= 0) & share.isfinite()).all()) and bool((share.sum(-1) > 0).all())
    if share.ndim == 0 or share.shape[-1] != n or not good:
        raise ShapeError(
            f"shares must be one number for each of {n} networks (*batch, {n}), none negative and "
            f"not all zero, got shape {tuple(share.shape)}"
        )
    try:
        batch = torch.broadcast_shapes(flat.shape[:-1], ends.shape[:-2], share.shape[:-1])
    except RuntimeError:
        raise ShapeError(
            "the batch dimensions of w (*batch, D), networks (*batch, N, D) and shares (*batch, N) "
            f"must broadcast, got {tuple(flat.shape)}, {tuple(ends.shape)} and "
            f"{tuple(share.shape)}"
        ) from None
    if batch.numel() == 0:
        raise ShapeError(f"w holds no network: its shape is {tuple(flat.shape)}")
    share = share / share.sum(-1, keepdim=True)
    return flat.expand(*batch, flat.shape[-1]), ends, share


def _affine(module: nn.Module) -> list[Probe]:
    """Return the layers with a weight and a bias for each unit.

    Not those derived from them, which may do something else with their weights.
    """
    return [
        Probe(path, part, _AFFINE[type(part)], output=True)
        for path, part in module.named_modules()
        if type(part) in _AFFINE
        and part.bias is not None
        and not (isinstance(part, nn.LayerNorm) and part.weight.ndim > 1)
    ]


def _require_own(arch: Architecture, module: nn.Module, probes: list[Probe]) -> None:
    shared = {key for pair in ties_across_modules(module, arch.aliases) for key in pair}
    for probe in probes:
        for key in (f"{probe.path}.weight", f"{probe.path}.bias"):
            if key in shared:
                raise UnsupportedModuleError(
                    f"{key} is shared with another layer, which repairing {probe.path} would "
                    "change. Give each a weight of its own"
                )


def _wanted(
    arch: Architecture,
    module: nn.Module,
    probes: list[Probe],
    ends: Float[Tensor, "*sets N D"],
    share: Float[Tensor, "*some N"],
    x: Tensor,
    at_a_time: tuple[int, int],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return by path the mean over the networks of their units' means, and of the deviations."""
    together, size = at_a_time
    rows = ends.reshape(-1, ends.shape[-1]).split(together)
    found = [moments(arch, module, probes, arch.unflatten(row), x, size) for row in rows]

    def mean(parts: list[Tensor]) -> Tensor:
        by_network = torch.cat(parts).unflatten(0, ends.shape[:-1])
        return (by_network * share[..., None]).sum(-2)

    return (
        {p.path: mean([part[k].mean for part in found]) for k, p in enumerate(probes)},
        {p.path: mean([part[k].deviation for part in found]) for k, p in enumerate(probes)},
    )


def _repaired(found: Moments, leaves: State, mean: Tensor, deviation: Tensor) -> State:
    """Fold the change of each unit into weight and bias, in float64."""
    weight, bias = (leaves[name] for name in ("weight", "bias"))
    # Of a unit that does not vary, what seems to be variance is rounding.
    size = (found.mean.square() + found.deviation.square()).sqrt()
    varies = found.deviation > tolerance(weight.dtype).close * size
    ratio = torch.where(varies, deviation / found.deviation, 1.0)
    moved = (bias.double() - found.mean) * ratio + mean
    stretched = weight.double() * ratio.reshape(*ratio.shape, *(1,) * (weight.ndim - ratio.ndim))
    return {"weight": stretched, "bias": torch.where(varies, moved, bias.double())}
