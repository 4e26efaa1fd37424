"""Hypothesis strategies: architectures, weights, groups and their elements.

What is drawn shrinks: tensors have small integer entries, elements come from an integer seed (seed
0 is the identity), networks get narrower and shallower.
"""

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor, nn

from symflow.arch import Architecture, Symmetry, mlp
from symflow.groups import (
    CompactProduct,
    Group,
    NoncompactProduct,
    Permutation,
    PositiveScale,
    Sign,
)

T = TypeVar("T")

MAX_SIZE = 6
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
_REGISTERED: dict[type, SearchStrategy[Any]] = {}


# ---------------------------------------------------------------- numbers and tensors


def seeds() -> SearchStrategy[int]:
    """Integer seeds, for what Hypothesis cannot draw itself.

    Examples
    --------
    >>> from hypothesis import find
    >>> find(seeds(), lambda seed: seed > 3)
    4
    """
    return st.integers(0, 2**31 - 1)


def generator(seed: int) -> torch.Generator:
    """Return a generator with a seed.

    Examples
    --------
    >>> generator(3).initial_seed()
    3
    """
    return torch.Generator().manual_seed(seed)


def tensors(
    *shape: int, low: int = -4, high: int = 4, dtype: torch.dtype = torch.float64
) -> SearchStrategy[Tensor]:
    """Tensors with small integer entries: sums and products of them are exact.

    Examples
    --------
    >>> from hypothesis import find
    >>> find(tensors(2), lambda x: bool(x.sum() > 4), )
    tensor([1., 4.], dtype=torch.float64)
    """
    size = functools.reduce(lambda a, b: a * b, shape, 1)
    entries = st.lists(st.integers(low, high), min_size=size, max_size=size)
    return entries.map(lambda values: torch.tensor(values, dtype=dtype).reshape(shape))


# ---------------------------------------------------------------- groups and elements


def register(cls: type[T], strategy: SearchStrategy[T]) -> None:
    """Say how values of a class are drawn (groups with other fields than ``size`` need it).

    Examples
    --------
    >>> from symflow.groups import Trivial
    >>> register(Trivial, st.builds(Trivial, st.just(2)))
    >>> from hypothesis import find
    >>> find(values(Trivial), lambda group: True)
    Trivial(size=2)
    >>> forget(Trivial)
    """
    _REGISTERED[cls] = strategy


def forget(cls: type) -> None:
    """Undo :func:`register`.

    Examples
    --------
    >>> from symflow.groups import Trivial
    >>> forget(Trivial)
    """
    _REGISTERED.pop(cls, None)


def values(cls: type[T]) -> SearchStrategy[T]:
    """Values of a class: what was registered for it, else ``cls(size)`` for sizes 1 to 6.

    Raises
    ------
    LookupError
        If nothing is registered and the class has other fields than ``size``.

    Examples
    --------
    >>> from hypothesis import find
    >>> find(values(Permutation), lambda group: group.size > 2)
    Permutation(size=3)
    """
    if cls in _REGISTERED:
        return _REGISTERED[cls]
    if is_dataclass(cls) and [f.name for f in fields(cls)] == ["size"]:
        return st.integers(1, MAX_SIZE).map(cls)
    raise LookupError(
        f"no strategy draws {cls.__module__}.{cls.__qualname__}: register one with "
        f"symflow.testing.register({cls.__name__}, strategy)"
    )


def concrete_classes(base: type[T], package: str) -> list[type[T]]:
    """Find every public, concrete subclass of ``base`` that lives in a package.

    The package's modules are imported first. Classes that are abstract, private, or defined
    elsewhere (in a test, say) are left out.

    Examples
    --------
    >>> Permutation in concrete_classes(Group, "symflow.groups")
    True
    """
    root = importlib.import_module(package)
    for module in pkgutil.walk_packages(getattr(root, "__path__", []), f"{package}."):
        importlib.import_module(module.name)
    found: list[type[T]] = []
    pending = [base]
    while pending:
        cls = pending.pop()
        pending += cls.__subclasses__()
        inside = f"{cls.__module__}.".startswith(f"{package}.")
        if inside and not inspect.isabstract(cls) and not cls.__name__.startswith("_"):
            found.append(cls)
    return sorted(dict.fromkeys(found), key=lambda cls: (cls.__module__, cls.__name__))


def groups() -> SearchStrategy[Group[Any]]:
    """Every kind of group that symflow has, products included, of sizes 1 to 6.

    Examples
    --------
    >>> from hypothesis import find
    >>> find(groups(), lambda group: group.size > 1).size
    2
    """
    return st.one_of([values(cls) for cls in concrete_classes(Group, "symflow.groups")])


def elements(
    group: Group[Any] | Symmetry,
    *,
    batch: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float64,
) -> SearchStrategy[Any]:
    """Elements of a group, or of the symmetry of an architecture; they shrink to the identity.

    Examples
    --------
    >>> from hypothesis import find
    >>> find(elements(Permutation(3)), lambda g: True)
    tensor([0, 1, 2])
    """
    return seeds().map(lambda seed: element(group, seed, batch=batch, dtype=dtype))


def element(
    group: Group[Any] | Symmetry,
    seed: int,
    *,
    batch: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float64,
) -> Any:
    """Return the identity for seed 0, else a random element.

    Examples
    --------
    >>> element(Sign(2), 0, batch=(2,), dtype=torch.float32)
    tensor([[1., 1.],
            [1., 1.]])
    """
    like = torch.zeros((), dtype=dtype)
    if seed == 0:
        return expand(group.identity(like=like), batch)
    return group.random(generator=generator(seed), like=like, batch=batch)


def expand(g: Any, batch: tuple[int, ...]) -> Any:
    """Repeat an element over batch dimensions put in front.

    Examples
    --------
    >>> expand((torch.tensor([1, 0]),), (2,))
    (tensor([[1, 0],
            [1, 0]]),)
    """
    if isinstance(g, dict):
        return {key: expand(value, batch) for key, value in g.items()}
    if isinstance(g, tuple):
        return tuple(expand(part, batch) for part in g)
    return g.expand(*batch, *g.shape)


def pick(g: Any, index: int | tuple[int, ...]) -> Any:
    """Take one element (or a sub-batch) out of a batch of elements.

    Examples
    --------
    >>> pick((torch.tensor([[1, 0], [0, 1]]),), 0)
    (tensor([1, 0]),)
    """
    if isinstance(g, dict):
        return {key: pick(value, index) for key, value in g.items()}
    if isinstance(g, tuple):
        return tuple(pick(part, index) for part in g)
    return g[index]


def _sized(*kinds: Callable[[int], Group[Any]]) -> SearchStrategy[Any]:
    return st.builds(lambda kind, n: kind(n), st.sampled_from(kinds), st.integers(1, MAX_SIZE))


register(CompactProduct, _sized(lambda n: Permutation(n) @ Sign(n)))
register(
    NoncompactProduct,
    _sized(
        lambda n: Permutation(n) @ PositiveScale(n),
        lambda n: Sign(n) @ PositiveScale(n),
        lambda n: Permutation(n) @ Sign(n) @ PositiveScale(n),
        lambda n: Permutation(n) @ (Sign(n) @ PositiveScale(n)),
        lambda n: Permutation(n) @ PositiveScale(n) @ Sign(n),
    ),
)


# ---------------------------------------------------------------- architectures and weights


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

    def forward(self, x: Tensor) -> Tensor:
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


def mlps() -> SearchStrategy[Architecture]:
    """Fully connected networks: widths 1 to 6, up to three hidden layers, all activations.

    Examples
    --------
    >>> from hypothesis import find
    >>> [axis.size for axis in find(mlps(), lambda arch: len(arch.axes) == 2).axes]
    [1, 1]
    """
    widths = st.lists(st.integers(1, MAX_SIZE), min_size=2, max_size=5).map(tuple)
    return st.builds(_mlp, widths, st.sampled_from(ACTIVATIONS), st.booleans(), st.booleans())


def architectures() -> SearchStrategy[Architecture]:
    """MLPs and a few modules: flatten with repeats, PReLU, shared layers, nested blocks.

    Examples
    --------
    >>> from hypothesis import find
    >>> find(architectures(), lambda arch: arch.dimension > 2).dimension
    3
    """
    modules = st.builds(_traced, st.sampled_from(sorted(_MODULES)), st.integers(1, 4))
    return mlps() | modules


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
    size = arch.dimension * functools.reduce(lambda a, b: a * b, batch, 1)
    if size <= 16:
        drawn = tensors(*batch, arch.dimension, low=-3, high=3)
    else:
        drawn = seeds().map(lambda seed: _random_entries((*batch, arch.dimension), seed))
    spoilers = st.lists(st.sampled_from(sorted(_SPOILERS)), max_size=2, unique=True)

    def finish(w: Tensor, kinds: list[str], seed: int) -> Tensor:
        w = w.clone()
        for kind in kinds:
            _SPOILERS[kind](arch, w, generator(seed))
        _make_variances_positive(arch, w)
        return w.to(dtype)

    return st.builds(finish, drawn, spoilers, seeds())


def _random_entries(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randint(-3, 4, shape, generator=generator(seed)).to(torch.float64)


def _unit_of(arch: Architecture, g: torch.Generator) -> tuple[str, int, int] | None:
    """A random axis and two of its units."""
    if not arch.axes:
        return None
    axis = arch.axes[int(torch.randint(len(arch.axes), (), generator=g))]
    one, two = torch.randint(axis.size, (2,), generator=g).tolist()
    return axis.name, one, two


def _slices(arch: Architecture, w: Tensor, axis: str, unit: int) -> list[tuple[int, Tensor]]:
    """Views of all coordinates that belong to one unit, with their degrees."""
    found: list[tuple[int, Tensor]] = []
    for leaf in arch.leaves:
        x = w[..., leaf.span].view(*w.shape[:-1], *leaf.shape)
        for k, dim in enumerate(leaf.dims):
            if dim.axis == axis:
                n = leaf.shape[k] // (dim.outer * dim.inner)
                parts = x.unflatten(k - len(leaf.dims), (dim.outer, n, dim.inner))
                found.append((dim.degree, parts.select(k - len(leaf.dims) - 1, unit)))
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
    """A buffer that is positive in a fresh module (a running variance) must stay positive."""
    fresh = arch.module.state_dict()
    for leaf in arch.leaves:
        if not leaf.learnable and bool((fresh[leaf.name] > 0).all()):
            w[..., leaf.span] = w[..., leaf.span].abs() + 1
