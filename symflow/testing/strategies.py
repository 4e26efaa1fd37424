"""Hypothesis strategies: tensors, groups and their elements.

What is drawn shrinks: tensors have small integer entries, elements come from an integer seed (seed
0 is the identity).
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
from torch import Tensor

from symflow.arch import Symmetry
from symflow.groups import (
    CompactProduct,
    Group,
    Heads,
    NoncompactProduct,
    Orthogonal,
    Permutation,
    Phases,
    PositiveScale,
    Rotary,
    Sign,
)

T = TypeVar("T")

MAX_SIZE = 6
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

    Up to 16 entries are drawn one by one and shrink; more come from a seed, which is far faster.

    Examples
    --------
    >>> from hypothesis import find
    >>> find(tensors(2), lambda x: bool(x.sum() > 4), )
    tensor([1., 4.], dtype=torch.float64)
    """
    size = functools.reduce(lambda a, b: a * b, shape, 1)

    if size > 16:
        return seeds().map(functools.partial(_whole_numbers, shape, low, high, dtype))
    entries = st.lists(st.integers(low, high), min_size=size, max_size=size)
    return entries.map(lambda values: torch.tensor(values, dtype=dtype).reshape(shape))


def _whole_numbers(
    shape: tuple[int, ...], low: int, high: int, dtype: torch.dtype, seed: int
) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=generator(seed)).to(dtype)


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
    return g.expand((*batch, *g.shape))


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


for _kind in (Phases, Rotary):
    register(
        _kind,
        st.builds(
            _kind,
            st.integers(1, MAX_SIZE // 2).map(lambda n: 2 * n),
            st.sampled_from(["half", "interleaved"]),
        ),
    )
register(
    Heads,
    st.builds(
        lambda m, inner: Heads(m * inner.size, inner),
        st.integers(1, 3),
        st.sampled_from([Orthogonal(2), Sign(2), Permutation(2), Permutation(2) @ Sign(2)]),
    ),
)
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
