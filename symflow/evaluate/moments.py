"""Mean and variance of what layers see or give on data, and layers changed by them in order."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap

from symflow.arch import Architecture
from symflow.arch.running import has_recurrence, mappable
from symflow.arch.template import ties_across_modules
from symflow.errors import ShapeError, UnsupportedModuleError


@final
@dataclass(frozen=True, eq=False)
class Probe:
    """A layer, and where its units are measured.

    Attributes
    ----------
    path, layer
        Which.
    dim
        The dimension of its units; all others are samples.
    output
        Whether what it gives is measured, or what it sees.
    """

    path: str
    layer: Any
    dim: int = 1
    output: bool = False


@final
@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and sum of squared deviations of each unit, in float64."""

    count: int
    mean: Float[Tensor, "N units"]
    squares: Float[Tensor, "N units"]

    @property
    def deviation(self) -> Float[Tensor, "N units"]:
        """Standard deviation over what was counted."""
        return (self.squares / self.count).sqrt()

    def with_more(self, more: "Moments") -> "Moments":
        """Pool two samples (Chan, Golub and LeVeque, 1983)."""
        total, gap = self.count + more.count, more.mean - self.mean
        return Moments(
            total,
            self.mean + gap * (more.count / total),
            self.squares + more.squares + gap.square() * (self.count * more.count / total),
        )


State: TypeAlias = dict[str, Tensor]
# From a layer, its moments, and its own leaves by name (N, ...): those that change.
Change: TypeAlias = Callable[[Probe, Moments, State], Mapping[str, Tensor]]


def in_order(
    arch: Architecture, module: nn.Module, probes: Sequence[Probe], w: Tensor, x: Tensor
) -> tuple[list[Probe], int]:
    """Return the probes in the order in which they run, and how much the widest meets of an input.

    Positions of an image count: a convolution has more activations than units. A layer that does
    not run is left out, and so is an output that another probe sees as its input.

    Raises
    ------
    UnsupportedModuleError
        If a layer runs twice in one pass.
    ShapeError
        If the network does not run on the inputs.
    """
    seen: list[Probe] = []
    given: dict[str, Tensor] = {}
    again: set[str] = set()
    widths = [1]

    def see(probe: Probe, values: tuple[Tensor, ...]) -> None:
        seen.append(probe)
        widths.extend(value.numel() for value in values)
        if probe.output:
            given[probe.path] = values[-1]
        else:
            again.update(path for path, value in given.items() if value is values[0])

    hooks = [
        probe.layer.register_forward_hook(lambda _, i, o, probe=probe: see(probe, (i[0], o)))
        if probe.output
        else probe.layer.register_forward_pre_hook(lambda _, i, probe=probe: see(probe, i[:1]))
        for probe in probes
    ]
    try:
        _run(arch, module, arch.unflatten(w), x.to(w, copy=True))
    finally:
        for hook in hooks:
            hook.remove()
    for probe in probes:
        times = seen.count(probe)
        if times > 1:
            raise UnsupportedModuleError(
                f"{probe.path} runs {times} times in one pass: its statistics would depend on "
                "themselves. Use a layer of its own at each place"
            )
    return [probe for probe in seen if probe.path not in again], max(widths)


def changed_in_order(
    arch: Architecture,
    module: nn.Module,
    probes: Sequence[Probe],
    w: Float[Tensor, "N D"],
    x: Tensor,
    size: int,
    change: Change,
) -> Float[Tensor, "N D"]:
    """Change each layer by its moments, those of layers before it being changed already.

    One pass over the inputs for each layer, up to that layer, in pieces of ``size`` inputs.

    Raises
    ------
    ShapeError
        If a layer has a single number for each of its units.
    """
    first = dict(arch.aliases)
    state = {key: value.clone() for key, value in arch.unflatten(w).items()}
    for probe in probes:
        (found,) = moments(arch, module, [probe], state, x, size)
        names = [name for name, _ in probe.layer.named_parameters(recurse=False)]
        keys = {name: f"{probe.path}.{name}" for name in names}
        own = {name: state[first.get(key, key)] for name, key in keys.items()}
        for name, value in change(probe, found, own).items():
            key = f"{probe.path}.{name}"
            state[first.get(key, key)] = value.to(w)
    return arch.flatten(state)


def moments(
    arch: Architecture,
    module: nn.Module,
    probes: Sequence[Probe],
    state: State,
    x: Tensor,
    size: int,
) -> list[Moments]:
    """Return the moments at each probe, given in order, of all networks of a state (N, ...).

    Raises
    ------
    ShapeError
        If a layer has a single number for each of its units.
    """
    first, *rest = (_of_piece(arch, module, probes, state, piece) for piece in x.split(size))
    for more in rest:
        first = [one.with_more(two) for one, two in zip(first, more, strict=True)]
    for probe, found in zip(probes, first, strict=True):
        if found.count < 2:
            raise ShapeError(
                f"inputs must give {probe.path} two values or more for each unit, or there is no "
                "variance; got one input"
            )
    return first


class _ReachedError(Exception):
    """The last layer that is measured has its values: nothing after it is needed."""


@torch.no_grad()
def _of_piece(
    arch: Architecture, module: nn.Module, probes: Sequence[Probe], state: State, x: Tensor
) -> list[Moments]:
    counts: list[int] = []
    met: list[Tensor] = []

    def measure(probe: Probe, value: Tensor) -> None:
        units = value.double().movedim(probe.dim, 0).flatten(1)
        mean = units.mean(1)
        counts.append(units.shape[1])
        met.extend((mean, (units - mean[:, None]).square().sum(1)))
        if probe is probes[-1]:
            raise _ReachedError

    def one(leaves: State) -> tuple[Tensor, ...]:
        counts.clear()
        met.clear()
        try:
            _run(arch, module, leaves, x.to(like, copy=True))  # a first step may be in place
        except _ReachedError:
            pass
        return tuple(met)

    like = next(iter(state.values()))
    hooks = [
        probe.layer.register_forward_hook(lambda _, i, o, probe=probe: measure(probe, o))
        if probe.output
        else probe.layer.register_forward_pre_hook(lambda _, i, probe=probe: measure(probe, i[0]))
        for probe in probes
    ]
    try:
        if has_recurrence(module):
            rows = [one({k: v[n] for k, v in state.items()}) for n in range(len(like))]
            found = [torch.stack(part) for part in zip(*rows, strict=True)]
        else:
            with mappable():
                found = list(vmap(one)(state))
    finally:
        for hook in hooks:
            hook.remove()
    return [Moments(*row) for row in zip(counts, found[::2], found[1::2], strict=True)]


@torch.no_grad()
def _run(arch: Architecture, module: nn.Module, leaves: State, x: Tensor) -> None:
    ties = {alias: leaves[name] for alias, name in ties_across_modules(module, arch.aliases)}
    try:
        functional_call(module, leaves | ties, (x,), tie_weights=False)
    except RuntimeError as error:
        raise ShapeError(
            f"the network does not run on inputs of shape {tuple(x.shape[1:])} ({error})"
        ) from error
