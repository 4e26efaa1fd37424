"""Running statistics of BatchNorm, measured again: what interpolation makes of them is not true."""

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from symflow.arch import Architecture, Weights
from symflow.arch.batches import BATCH_NORM
from symflow.evaluate.moments import Moments, Probe, State, changed_in_order, in_order
from symflow.evaluate.predict import LabelledData, at_once, inputs_for, networks


def reset_normalisation(
    arch: Architecture, w: Weights, inputs: Tensor | LabelledData
) -> Float[Tensor, "*batch D"]:
    r"""Return the weights with the running statistics of every BatchNorm measured on data.

    Between two networks, and after averaging, units vary less than in either end, and the
    interpolated statistics are those of no data: measured again, most of the barrier of networks
    with BatchNorm goes (REPAIR; Jordan et al., 2023).

    Parameters
    ----------
    arch
        The architecture.
    w
        Weights (*batch, D), state dicts or modules.
    inputs
        Inputs (n, *features), or labelled data, whose training inputs are taken. Not test inputs:
        statistics are part of the network.

    Returns
    -------
    Tensor
        The same weights with other ``running_mean`` and ``running_var``; unchanged if no layer has
        any. InstanceNorm keeps what it has.

    Raises
    ------
    ShapeError
        If there is no network or no input, the network does not run on the inputs, or a layer sees
        a single number for each of its units, of which there is no variance.
    LeafError
        If weights are NaN or infinite.
    UnsupportedModuleError
        If a layer runs twice in one pass: its inputs would depend on its own statistics.

    Notes
    -----
    Exact, not a moving average: the mean and the unbiased variance over all inputs pooled, in
    float64, of what the layer sees in evaluation mode when the layers before it are reset already.
    One pass over the inputs for each layer, up to that layer, for all networks at once, in pieces
    of bounded memory. (One pass in training mode would normalise by the biased variance of each
    piece.)

    Examples
    --------
    >>> import symflow
    >>> arch = symflow.mlp([1, 1, 1], batch_norm=True)
    >>> w = torch.tensor([2.0, 0.0, 1.0, 0.0, 1.0, 0.0, 9.0, 9.0])    # x -> 2 x, then BatchNorm
    >>> reset_normalisation(arch, w, torch.tensor([[1.0], [3.0]]))[-2:]    # of 2 and 6
    tensor([4., 8.])
    """
    flat, batch = networks(arch, w)
    module = copy.deepcopy(arch.module).eval()
    layers = batch_norms(module)
    if not layers:
        return flat.reshape(*batch, -1)
    x = inputs_for(arch, inputs if isinstance(inputs, Tensor) else inputs.x_train)
    order, width = in_order(arch, module, layers, flat[0], x[:1])
    networks_at_once, size = at_once(width, len(x))
    rows = [
        changed_in_order(arch, module, order, group, x, size, running_statistics)
        for group in flat.split(networks_at_once)
    ]
    return torch.cat(rows).reshape(*batch, -1)


def batch_norms(module: nn.Module) -> list[Probe]:
    """Return every BatchNorm with running statistics, which are those of what it sees."""
    return [
        Probe(path, part)
        for path, part in module.named_modules()
        if isinstance(part, BATCH_NORM) and part.running_mean is not None
    ]


def running_statistics(probe: Probe, found: Moments, leaves: State) -> State:
    """Return what BatchNorm keeps of moments: the mean, and the unbiased variance."""
    return {"running_mean": found.mean, "running_var": found.squares / (found.count - 1)}
