"""Running statistics of BatchNorm, measured again: what interpolation makes of them is not true."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap

from symflow.arch import Architecture, Weights
from symflow.arch.running import has_recurrence, mappable
from symflow.arch.template import ties_across_modules
from symflow.errors import ShapeError, UnsupportedModuleError
from symflow.evaluate.predict import LabelledData, at_once, inputs_for, networks

_BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


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
    layers = {
        path: part
        for path, part in module.named_modules()
        if isinstance(part, _BATCH_NORM) and part.running_mean is not None
    }
    if not layers:
        return flat.reshape(*batch, -1)
    x = inputs_for(arch, inputs if isinstance(inputs, Tensor) else inputs.x_train)
    order, width = _order(arch, module, layers, flat[0], x[:1])
    networks_at_once, size = at_once(width, len(x))
    groups = flat.split(networks_at_once)
    rows = [_reset(arch, module, [(p, layers[p]) for p in order], g, x, size) for g in groups]
    return torch.cat(rows).reshape(*batch, -1)


class _ReachedError(Exception):
    """The layer that is being measured has its input: nothing after it is needed."""


@dataclass(eq=False)
class _Moments:
    """Count, mean and sum of squared deviations of each unit, of all that came so far."""

    count: int
    mean: Tensor
    squares: Tensor

    def add(self, count: int, mean: Tensor, squares: Tensor) -> None:
        """Pool with more values (Chan, Golub and LeVeque, 1983)."""
        total, gap = self.count + count, mean - self.mean
        self.mean = self.mean + gap * (count / total)
        self.squares = self.squares + squares + gap.square() * (self.count * count / total)
        self.count = total


def _order(
    arch: Architecture, module: nn.Module, layers: dict[str, Any], w: Tensor, x: Tensor
) -> tuple[list[str], int]:
    """Return the layers in the order in which they run, and how much the widest sees of an input.

    Positions of an image count: a convolution has more activations than units.
    """
    seen: list[str] = []
    widths = [1]

    def see(path: str, inputs: tuple[Tensor, ...]) -> None:
        seen.append(path)
        widths.append(inputs[0].numel())

    hooks = [
        part.register_forward_pre_hook(lambda _, inputs, path=path: see(path, inputs))
        for path, part in layers.items()
    ]
    try:
        _run(arch, module, arch.unflatten(w), x.to(w, copy=True))
    finally:
        for hook in hooks:
            hook.remove()
    twice = [path for path in layers if seen.count(path) > 1]
    if twice:
        raise UnsupportedModuleError(
            f"{twice[0]} runs {seen.count(twice[0])} times in one pass: its statistics would "
            "depend on themselves. Use a layer of its own at each place"
        )
    return seen, max(widths)


def _reset(
    arch: Architecture,
    module: nn.Module,
    layers: list[tuple[str, Any]],
    w: Float[Tensor, "N D"],
    x: Tensor,
    size: int,
) -> Float[Tensor, "N D"]:
    first = dict(arch.aliases)
    state = {key: value.clone() for key, value in arch.unflatten(w).items()}
    for path, layer in layers:
        found: _Moments | None = None
        for piece in x.split(size):
            count, mean, squares = _moments_at(arch, module, layer, state, piece)
            if found is None:
                found = _Moments(count, mean, squares)
            else:
                found.add(count, mean, squares)
        if found is None or found.count < 2:
            raise ShapeError(
                f"inputs must give {path} two values or more for each unit, or there is no "
                "variance; got one input"
            )
        for name, value in (
            ("running_mean", found.mean),
            ("running_var", found.squares / (found.count - 1)),
        ):
            key = first.get(f"{path}.{name}", f"{path}.{name}")
            state[key] = value.to(w)
    return arch.flatten(state)


@torch.no_grad()
def _moments_at(
    arch: Architecture, module: nn.Module, layer: Any, state: dict[str, Tensor], x: Tensor
) -> tuple[int, Tensor, Tensor]:
    """Return the moments (N, units) of what each network's layer sees."""
    counts: list[int] = []
    means: list[Tensor] = []
    squares: list[Tensor] = []

    def measure(_: Any, inputs: tuple[Tensor, ...]) -> None:
        units = inputs[0].double().movedim(1, 0).flatten(1)
        counts.append(units.shape[1])
        means.append(units.mean(1))
        squares.append((units - means[-1][:, None]).square().sum(1))
        raise _ReachedError

    def one(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        try:
            _run(arch, module, leaves, x.to(like, copy=True))  # a first step may be in place
        except _ReachedError:
            pass
        return means.pop(), squares.pop()

    like = next(iter(state.values()))
    hook = layer.register_forward_pre_hook(measure)
    try:
        if has_recurrence(module):
            rows = [one({k: v[n] for k, v in state.items()}) for n in range(len(like))]
            mean, square = (torch.stack(part) for part in zip(*rows, strict=True))
        else:
            with mappable():
                mean, square = vmap(one)(state)
    finally:
        hook.remove()
    return counts[0], mean, square


@torch.no_grad()
def _run(arch: Architecture, module: nn.Module, leaves: dict[str, Tensor], x: Tensor) -> None:
    ties = {alias: leaves[name] for alias, name in ties_across_modules(module, arch.aliases)}
    try:
        functional_call(module, leaves | ties, (x,), tie_weights=False)
    except RuntimeError as error:
        raise ShapeError(
            f"the network does not run on inputs of shape {tuple(x.shape[1:])} ({error})"
        ) from error
