"""The gate: a claimed symmetry is tried on the network before it is believed."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from symflow.arch.layout import Leaf, assemble
from symflow.arch.running import tensors_of
from symflow.arch.symmetry import Symmetry
from symflow.arch.twins import require_material
from symflow.errors import SymmetryError, UnsupportedModuleError
from symflow.numerics import tolerance

# Inputs of several sizes: a function that saturates is odd, or linear, on small ones.
_SCALES = (1.0, 1.0, 10.0, 100.0)
_SEED = 0


def verify(
    module: nn.Module, inputs: tuple[Any, ...], leaves: tuple[Leaf, ...], symmetry: Symmetry
) -> float:
    """Move random weights by random elements and compare the outputs in float64.

    All axes are moved at once; only when that changes the output, each axis is tried alone, so
    that the error can name it. The weights tried are random, not the module's own: freshly
    initialised normalisation layers (gain one, shift zero) would hide a wrong claim.

    Parameters
    ----------
    module
        The network in evaluation mode; it is copied, not changed.
    inputs
        Example inputs; floating point ones are replaced by normal draws of several sizes.
    leaves
        Leaves in flat order.
    symmetry
        The claim.

    Returns
    -------
    float
        Largest change of an output relative to the largest output, over the draws.

    Raises
    ------
    SymmetryError
        If the function changes; it names axis, group and size of the change.
    UnsupportedModuleError
        If the same weights and inputs give different outputs, or the weights have no values.
    """
    if not symmetry.axes:
        return 0.0
    worst = 0.0
    for trial in trials(module, inputs, leaves):
        g = symmetry.random(generator=trial.generator, like=trial.w)
        change = trial.change(symmetry.act(g, trial.w))
        if not change <= trial.allowed:
            raise SymmetryError(_blame(trial, symmetry, g))
        worst = max(worst, change)
    return worst


@final
@dataclass(frozen=True, eq=False)
class Trial:
    """A network in float64 at random weights and inputs, where claims are tried.

    Attributes
    ----------
    run
        Outputs at weights (D,).
    w
        The weights.
    before
        Outputs there.
    allowed
        Relative change of an output that rounding may cause: more if the module casts inside.
    generator
        Where the weights came from, for whatever else is random.
    """

    run: Callable[[Tensor], list[Tensor]]
    w: Tensor
    before: list[Tensor]
    allowed: float
    generator: torch.Generator

    def change(self, w: Tensor, look: Callable[[Tensor], Tensor] | None = None) -> float:
        """Return the greatest relative change of an output (seen through ``look``) at ``w``."""
        pair = (self.before, self.run(w))
        if look is not None:
            pair = tuple([look(x) for x in outputs] for outputs in pair)
        return _change(*pair)


def trials(module: nn.Module, inputs: tuple[Any, ...], leaves: tuple[Leaf, ...]) -> Iterator[Trial]:
    """Yield a few networks to try claims on; inputs and weights are random.

    Raises
    ------
    UnsupportedModuleError
        If the same weights and inputs give different outputs, or the weights have no values.
    """
    require_material(module)
    double = copy.deepcopy(module).double().eval()
    generator = torch.Generator().manual_seed(_SEED)
    for scale in _SCALES:
        given = tuple(_random_input(x, scale, generator) for x in inputs)
        run = partial(_run, double, leaves, given)
        w = _random_weights(leaves, dict(double.state_dict()), generator)
        try:
            before = run(w)
        except RuntimeError as error:
            raise UnsupportedModuleError(
                f"{type(module).__name__} does not run in float64, where its symmetries are tried: "
                f"{error}. A cast inside, as in x.float(), should follow what it meets: "
                "x.to(weight.dtype)"
            ) from error
        if not _finite(before):
            own = double.state_dict()
            w = torch.cat([leaf.of(own[leaf.key]).reshape(-1) for leaf in leaves])
            before = run(w)
        if not _finite(before):
            continue
        if _change(before, run(w)) > 0:
            raise UnsupportedModuleError(
                f"{type(module).__name__} gives different outputs for the same weights and inputs "
                "in evaluation mode, so no symmetry can be tried: is dropout called as "
                "F.dropout(x) without training=self.training?"
            )
        watch = Rounding()
        with watch:
            run(w)
        yield Trial(run, w, before, tolerance(watch.dtype).symmetry, generator)


def _blame(trial: Trial, symmetry: Symmetry, g: dict[str, Any]) -> str:
    changes = {
        axis.name: trial.change(symmetry.act({axis.name: g[axis.name]}, trial.w))
        for axis in symmetry.axes
    }
    name = max(changes, key=lambda key: changes[key])
    axis = symmetry[name]
    return (
        f"{axis.group} on axis {name} ({axis.reason}) is not a symmetry: it changes the output by "
        f"{changes[name]:.2g} of its size. If a rule was registered for this network, its claim is "
        "wrong; else choose a smaller group for the axis"
    )


@final
class Rounding(TorchDispatchMode):
    """Watches for results in a shorter format than float64: a module may cast inside.

    Examples
    --------
    >>> with Rounding() as watch:
    ...     _ = torch.zeros(1, dtype=torch.float64).float()
    >>> watch.dtype
    torch.float32
    """

    def __init__(self) -> None:
        super().__init__()
        self.dtype = torch.float64

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what goes in and comes out."""
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            given = [x.dtype for x in args if isinstance(x, Tensor)]
            if result.dtype != torch.float64 and torch.float64 in given:
                self.dtype = result.dtype
        return result


def _finite(outputs: list[Tensor]) -> bool:
    return all(bool(x.isfinite().all()) for x in outputs)


def _change(before: list[Tensor], after: list[Tensor]) -> float:
    """Return the greatest change of an output, relative to its largest number."""
    worst = 0.0
    for x, y in zip(before, after, strict=True):
        scale = x.abs().max().clamp_min(tolerance(x.dtype).eps)
        change = float((y - x).abs().max() / scale)
        worst = max(worst, change) if change == change else float("inf")
    return worst


def _run(
    module: nn.Module, leaves: tuple[Leaf, ...], inputs: tuple[Any, ...], w: Tensor
) -> list[Tensor]:
    parts: dict[str, list[tuple[Leaf, Tensor]]] = {}
    for leaf in leaves:
        parts.setdefault(leaf.key, []).append((leaf, w[leaf.span].reshape(leaf.shape)))
    state = {key: assemble(found) for key, found in parts.items()}
    # Clones: a first layer may work in place.
    given = tuple(x.clone() if isinstance(x, Tensor) else x for x in inputs)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # for tensors that it makes, such as torch.zeros(4, 6)
    try:
        with torch.no_grad():
            return list(tensors_of(functional_call(module, state, given)))
    finally:
        torch.set_default_dtype(default)


def _random_input(x: Any, scale: float, generator: torch.Generator) -> Any:
    if isinstance(x, Tensor) and x.is_floating_point():
        return scale * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return x


def _random_weights(
    leaves: tuple[Leaf, ...], own: dict[str, Tensor], generator: torch.Generator
) -> Tensor:
    """Weights at which non-linearities are at work and no two units are alike."""
    pieces: list[Tensor] = []
    for leaf in leaves:
        noise = torch.randn(leaf.size, generator=generator, dtype=torch.float64)
        value = leaf.of(own[leaf.key]).reshape(-1)
        if leaf.learnable:
            fan_in = max(1, leaf.size // max(1, leaf.shape[0])) if len(leaf.shape) > 1 else 1
            pieces.append(noise * 1.5 / fan_in**0.5)
        elif bool((value > 0).all()):  # variances must stay positive
            pieces.append(value * (noise / 2).exp())
        else:
            pieces.append(value + noise / 2)
    return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.float64)
