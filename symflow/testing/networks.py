"""Hypothesis strategies: architectures and weights.

Networks shrink to narrower and shallower ones, weights to zero.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor, nn

from symflow.arch import Architecture, mlp
from symflow.testing.strategies import MAX_SIZE, generator, seeds, tensors

ACTIVATIONS = (
    "identity",
    "relu",
    "leaky_relu",
    "tanh",
    "sin",
    "gelu",
    "silu",
    "sigmoid",
    "softplus",
)
# One for each group that activations leave: all, scales, signs, permutations alone.
KINDS = ("identity", "relu", "tanh", "gelu")


class _Nested(nn.Module):
    """A user's module: blocks inside blocks, dropout, a method call, a reused activation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.act = nn.Tanh()
        self.body = nn.Sequential(
            nn.Sequential(nn.Linear(2, width), self.act, nn.Dropout(0.5)),
            nn.Linear(width, 3),
        )
        self.head = nn.Linear(3, 2)

    def forward(self, x: Any) -> Any:
        return self.head(torch.relu(self.body(x)))


def _flatten_repeats(width: int) -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(
        nn.Linear(2, width), nn.ReLU(), nn.Flatten(), nn.Linear(3 * width, 2), nn.Tanh()
    )
    return nn.Sequential(net, nn.Linear(2, 2)), torch.zeros(2, 3, 2)


def _prelu(width: int) -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(
        *(nn.Linear(3, width), nn.PReLU(width), nn.Linear(width, 2), nn.PReLU(), nn.Linear(2, 1))
    )
    return net, torch.zeros(2, 3)


def _shared(width: int) -> tuple[nn.Module, Tensor]:
    again = nn.Linear(width, width)
    net = nn.Sequential(
        *(nn.Linear(2, width), nn.ReLU(), again, nn.ReLU(), again, nn.ReLU(), nn.Linear(width, 2))
    )
    return net, torch.zeros(2, 2)


def _norm_after(width: int) -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(
        nn.Linear(2, width), nn.Tanh(), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 2)
    )
    return net, torch.zeros(2, 2)


_MODULES: dict[str, Callable[[int], tuple[nn.Module, Tensor]]] = {
    "nested": lambda width: (_Nested(width), torch.zeros(2, 2)),
    "flatten": _flatten_repeats,
    "prelu": _prelu,
    "shared": _shared,
    "norm_after": _norm_after,
}


@functools.cache
def _mlp(widths: tuple[int, ...], activation: str, bias: bool, norm: bool) -> Architecture:
    return mlp(widths, activation, bias=bias, batch_norm=norm)


@functools.cache
def _traced(kind: str, width: int) -> Architecture:
    module, x = _MODULES[kind](width)
    return Architecture.from_module(module, x)


def mlps(
    *, width: int = MAX_SIZE, layers: int = 4, activations: tuple[str, ...] = ACTIVATIONS
) -> SearchStrategy[Architecture]:
    """Fully connected networks, with and without biases and BatchNorm1d.

    Parameters
    ----------
    width
        Greatest size of a layer.
    layers
        Greatest number of linear maps.
    activations
        Names of which one is drawn for all layers.

    Examples
    --------
    >>> from hypothesis import find
    >>> find(mlps(width=1, layers=1), lambda arch: True).dimension
    1
    """
    sizes = st.integers(1, width)
    widths = st.lists(sizes, min_size=2, max_size=layers + 1).map(tuple)
    return st.builds(_mlp, widths, st.sampled_from(activations), st.booleans(), st.booleans())


def architectures(
    *, width: int = MAX_SIZE, layers: int = 4, activations: tuple[str, ...] = ACTIVATIONS
) -> SearchStrategy[Architecture]:
    """MLPs and a few modules: flatten with repeats, PReLU, shared layers, nested blocks.

    Parameters
    ----------
    width, layers, activations
        Of the MLPs, as for :func:`mlps`.

    Examples
    --------
    >>> from hypothesis import find
    >>> find(architectures(width=1, layers=2), lambda arch: len(arch.axes) == 1).axes[0].name
    'h1'
    """
    widths = st.integers(1, min(width, 4))
    modules = st.builds(_traced, st.sampled_from(sorted(_MODULES)), widths)
    return mlps(width=width, layers=layers, activations=activations) | modules


def small_architectures() -> SearchStrategy[Architecture]:
    """Small networks for every group that activations leave, few enough to be traced once each.

    Examples
    --------
    >>> from hypothesis import find
    >>> find(small_architectures(), lambda arch: True).dimension < 20
    True
    """
    hidden = st.integers(2, 3)
    widths = st.tuples(st.just(2), hidden, hidden, st.just(1))
    deep = st.builds(_mlp, widths, st.sampled_from(KINDS), st.just(True), st.just(False))
    return architectures(width=3, layers=2, activations=KINDS) | deep


def weights(
    arch: Architecture, *, batch: tuple[int, ...] = (), dtype: torch.dtype = torch.float64
) -> SearchStrategy[Tensor]:
    """Flat weights with small integer entries, variances positive, and awkward ones among them.

    Awkward are dead neurons (zero rows), twin neurons, and leaves on a large scale.

    Examples
    --------
    >>> from hypothesis import find
    >>> arch = mlp([1, 1, 1])
    >>> find(weights(arch), lambda w: bool((w > 1).all()))
    tensor([2., 2., 2., 2.], dtype=torch.float64)
    """
    drawn = tensors(*batch, arch.dimension, low=-3, high=3)
    spoilers = st.lists(st.sampled_from(sorted(_SPOILERS)), max_size=2, unique=True)
    # Not a partial: Hypothesis would print all of the architecture to describe it.
    return st.builds(_spoilt, st.just(arch), st.just(dtype), drawn, spoilers, seeds())


def _spoilt(
    arch: Architecture, dtype: torch.dtype, w: Tensor, kinds: list[str], seed: int
) -> Tensor:
    w = w.clone()
    for kind in kinds:
        _SPOILERS[kind](arch, w, generator(seed))
    _make_variances_positive(arch, w)
    return w.to(dtype)


def generic_weights(
    arch: Architecture, *, batch: tuple[int, ...] = (), dtype: torch.dtype = torch.float64
) -> SearchStrategy[Tensor]:
    """Weights that are normally distributed, from a seed: no ties, no dead neurons.

    Examples
    --------
    >>> from hypothesis import find
    >>> find(generic_weights(mlp([1, 1, 1]), batch=(2,)), lambda w: True).shape
    torch.Size([2, 4])
    """
    return st.builds(_normal, st.just(arch), st.just(batch), st.just(dtype), seeds())


def _normal(arch: Architecture, batch: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    shape = (*batch, arch.dimension)
    w = torch.randn(shape, generator=generator(seed), dtype=torch.float64)
    _make_variances_positive(arch, w)
    return w.to(dtype)


def _unit_of(arch: Architecture, g: torch.Generator) -> tuple[str, int, int] | None:
    """Choose an axis and two of its units."""
    if not arch.axes:
        return None
    axis = arch.axes[int(torch.randint(len(arch.axes), (), generator=g))]
    one, two = torch.randint(axis.size, (2,), generator=g).tolist()
    return axis.name, one, two


def _slices(arch: Architecture, w: Tensor, axis: str, unit: int) -> list[tuple[int, Tensor]]:
    """Return views of all coordinates that belong to one unit, with their degrees."""
    found: list[tuple[int, Tensor]] = []
    for leaf in arch.leaves:
        x = w[..., leaf.span].view(*w.shape[:-1], *leaf.shape)
        for k, dim in enumerate(leaf.dims):
            if dim.axis == axis:
                found.append((dim.degree, x.select(k - len(leaf.dims), unit)))
    return found


def _kill(arch: Architecture, w: Tensor, g: torch.Generator) -> None:
    if (chosen := _unit_of(arch, g)) is not None:
        for degree, part in _slices(arch, w, chosen[0], chosen[1]):
            if degree >= 0:
                part.zero_()


def _twin(arch: Architecture, w: Tensor, g: torch.Generator) -> None:
    if (chosen := _unit_of(arch, g)) is not None:
        axis, one, two = chosen
        pairs = zip(_slices(arch, w, axis, one), _slices(arch, w, axis, two), strict=True)
        for (_, source), (_, target) in pairs:
            target.copy_(source.clone())


def _enlarge(arch: Architecture, w: Tensor, g: torch.Generator) -> None:
    leaf = arch.leaves[int(torch.randint(len(arch.leaves), (), generator=g))]
    w[..., leaf.span] *= 64


_SPOILERS: dict[str, Callable[[Architecture, Tensor, torch.Generator], None]] = {
    "dead": _kill,
    "large": _enlarge,
    "twin": _twin,
}


def _make_variances_positive(arch: Architecture, w: Tensor) -> None:
    """Keep positive what is positive in a fresh module: a running variance."""
    fresh = arch.module.state_dict()
    for leaf in arch.leaves:
        if not leaf.learnable and bool((leaf.of(fresh[leaf.key]) > 0).all()):
            w[..., leaf.span] = w[..., leaf.span].abs() + 1
