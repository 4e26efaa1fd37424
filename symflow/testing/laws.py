"""The laws of a group, each on its own: what every group must obey, checked on drawn examples.

A law is checked against dense matrices, in float64, on tensors of small integers. It raises an
``AssertionError`` that names the law, the group, and the smallest example found.
"""

import copy
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from symflow.errors import ShapeError
from symflow.groups import CompactGroup, GeneralLinear, Group, NoncompactGroup, ScalingGroup
from symflow.numerics import tolerance
from symflow.testing.contracts import COMPACT, MIXING, NONCOMPACT, SCALING, degrees, matrix, power
from symflow.testing.law import Body, Draws, Law, agree, demand, law, size_of
from symflow.testing.strategies import (
    element,
    elements,
    expand,
    generator,
    pick,
    seeds,
    tensors,
    values,
)


def laws(subject: Group[Any] | type[Group[Any]]) -> tuple[Law, ...]:
    """List the laws that a group (or, over drawn sizes, a class of groups) has to obey.

    Parameters
    ----------
    subject
        A group such as ``Sign(5)``, or a class with a strategy (:func:`symflow.testing.register`).

    Raises
    ------
    LookupError
        If ``subject`` is a class that no strategy draws.

    Examples
    --------
    >>> from symflow.groups import PositiveScale
    >>> [str(law) for law in laws(PositiveScale(3))][-4:]
    ['balance', 'balance again', 'balance anywhere', 'stretch']

    Use it with pytest::

        @pytest.mark.parametrize("law", laws(Cyclic(5)), ids=str)
        def test_cyclic(law):
            law.check()
    """
    if isinstance(subject, type):
        drawn, kind = values(subject), subject
    else:
        drawn, kind = st.just(subject), type(subject)
    found = dict(_LAWS)
    found |= COMPACT if issubclass(kind, CompactGroup) else {}
    found |= NONCOMPACT if issubclass(kind, NoncompactGroup) else {}
    found |= SCALING if issubclass(kind, ScalingGroup) else {}
    found |= MIXING if issubclass(kind, GeneralLinear) else {}
    return tuple(law(name, drawn, body) for name, body in found.items())


def check_group(group: Group[Any], *, max_examples: int | None = None) -> None:
    """Try every law on a group.

    Parameters
    ----------
    group
        The group.
    max_examples
        How many examples to draw for each law; as many as the active Hypothesis profile says by
        default.

    Raises
    ------
    AssertionError
        Naming the law that is broken, the group, and the smallest example found.

    Examples
    --------
    >>> from symflow.groups import Trivial
    >>> check_group(Trivial(2), max_examples=5)
    """
    for one in laws(group):
        one.check(max_examples)


def _some_degree(group: Group[Any], draw: Draws) -> int:
    return draw("degree", st.sampled_from(degrees(group)))


def _value(group: Group[Any], draw: Draws) -> None:
    twin = copy.deepcopy(group)
    demand(twin == group and hash(twin) == hash(group), "a copy is not equal: freeze the class")
    try:
        setattr(group, "size", group.size + 1)  # noqa: B010 (a frozen class refuses it)
    except AttributeError:
        return
    raise AssertionError("its size can be changed: make it a frozen dataclass")


def _identity(group: Group[Any], draw: Draws) -> None:
    g = draw("g", elements(group))
    x = draw("x", tensors(group.size, 2))
    e, p = group.identity(like=x), _some_degree(group, draw)
    agree(group.act(e, x, dim=-2, degree=p), x, f"e x at degree {p}")
    a = matrix(group, g)
    agree(matrix(group, group.compose(e, g)), a, "e g against g")
    agree(matrix(group, group.compose(g, e)), a, "g e against g")


def _inverse(group: Group[Any], draw: Draws) -> None:
    g = draw("g", elements(group))
    x = draw("x", tensors(group.size))
    back, p = group.inverse(g), _some_degree(group, draw)
    moved = group.act(g, x, degree=p)
    agree(group.act(back, moved, degree=p), x, f"g^-1 g x against x at degree {p}")
    eye = torch.eye(group.size, dtype=torch.float64)
    agree(matrix(group, group.compose(g, back)), eye, "g g^-1 against e")
    agree(matrix(group, group.compose(back, g)), eye, "g^-1 g against e")


def _associativity(group: Group[Any], draw: Draws) -> None:
    g, h, k = (draw(name, elements(group)) for name in "ghk")
    one = group.compose(group.compose(g, h), k)
    two = group.compose(g, group.compose(h, k))
    agree(matrix(group, one), matrix(group, two), "(g h) k against g (h k)")


def _homomorphism(group: Group[Any], draw: Draws) -> None:
    g, h = (draw(name, elements(group)) for name in "gh")
    x = draw("x", tensors(group.size))
    both = group.compose(g, h)
    for p in degrees(group):
        wanted = group.act(g, group.act(h, x, degree=p), degree=p)
        agree(group.act(both, x, degree=p), wanted, f"(g h) x against g (h x) at degree {p}")


def _linear(group: Group[Any], draw: Draws) -> None:
    n, g = group.size, draw("g", elements(group))
    x, y = draw("x", tensors(2, n)), draw("y", tensors(2, n))
    a = matrix(group, g)
    agree(group.act(g, 2 * x - y), 2 * x @ a.mT - y @ a.mT, "g (2 x - y) against A (2 x - y)")
    agree(group.act(g, x.mT, dim=-2), a @ x.mT, "g x along dim -2 against A x")
    cube = x[:, :, None, None].expand(2, n, 1, 2)
    wanted = torch.einsum("ij,bjkl->bikl", a, cube)
    agree(group.act(g, cube, dim=-3), wanted, "g x along dim -3 against A x")


def _degree(group: Group[Any], draw: Draws) -> None:
    g = draw("g", elements(group))
    x = draw("x", tensors(group.size))
    a = matrix(group, g)
    for p in degrees(group):
        agree(group.act(g, x, degree=p), power(a, p) @ x, f"g x at degree {p} against A^({p}) x")


def _pairing(group: Group[Any], draw: Draws) -> None:
    g = draw("g", elements(group))
    x, y = draw("x", tensors(group.size)), draw("y", tensors(group.size))
    after = group.act(g, y, degree=-1) @ group.act(g, x)
    agree(after, y @ x, "<act(y, -1), act(x, +1)> against <y, x>", scale=float(x.norm() * y.norm()))


def _batch(group: Group[Any], draw: Draws) -> None:
    n, seed, k = group.size, draw("seed", seeds()), draw("network", st.integers(0, 2))
    g, h = element(group, seed, batch=(3,)), element(group, seed + 1, batch=(3,))
    x = draw("x", tensors(3, n))
    cube, gk, hk = torch.stack([x, 2 * x], dim=-1), pick(g, k), pick(h, k)
    a, b = matrix(group, gk), matrix(group, hk)
    agree(group.act(g, x)[k], group.act(gk, x[k]), f"act, network {k}")
    moved, wanted = (group.act(*v, dim=-2, degree=-1) for v in ((g, cube), (gk, cube[k])))
    agree(moved[k], wanted, f"act on matrices, network {k}")
    agree(group.act(gk, x)[k], group.act(gk, x[k]), "one element on a batch")
    agree(matrix(group, g)[k], a, f"matrix, network {k}")
    agree(matrix(group, pick(group.compose(g, h), k)), a @ b, f"compose, network {k}")
    agree(matrix(group, pick(group.compose(gk, h), k)), a @ b, "compose one with a batch")
    agree(matrix(group, pick(group.inverse(g), k)), torch.linalg.inv(a), f"inverse, network {k}")
    if isinstance(group, CompactGroup):
        c = draw("c", tensors(3, n, n))
        chosen, one = matrix(group, group.nearest(c)), matrix(group, group.nearest(c[k]))
        agree((chosen[k] * c[k]).sum(), (one * c[k]).sum(), f"nearest, matrix {k}")
        agree(group.support(c)[k], group.support(c[k]), f"support, matrix {k}")


def _precision(group: Group[Any], draw: Draws) -> None:
    n, seed = group.size, draw("seed", seeds())
    x, double, single = draw("x", tensors(n)), torch.float64, torch.float32
    g, low = (element(group, seed, dtype=dtype) for dtype in (double, single))
    p = _some_degree(group, draw)
    moved = group.act(low, x.float(), degree=p)
    demand(moved.dtype == single, f"act returns {moved.dtype} for a float32 tensor")
    agree(moved, group.act(g, x, degree=p), f"act in float32 against float64 at degree {p}")
    a = matrix(group, g)
    agree(matrix(group, group.inverse(low), single), torch.linalg.inv(a), "inverse in float32")
    agree(matrix(group, group.compose(low, low), single), a @ a, "compose in float32")
    if isinstance(group, CompactGroup):
        c = draw("c", tensors(n, n))
        chosen = matrix(group, group.nearest(c.float()), single)
        wanted = (matrix(group, group.nearest(c)) * c).sum()
        agree((chosen * c.float()).sum(), wanted, "value of nearest in float32")


def _generator(group: Group[Any], draw: Draws) -> None:
    seed, like = draw("seed", seeds()), torch.zeros((), dtype=torch.float64)
    state = torch.get_rng_state()
    one = group.random(generator=generator(seed), like=like, batch=(4,))
    demand(bool((torch.get_rng_state() == state).all()), "random draws from the global generator")
    two = group.random(generator=generator(seed), like=like, batch=(4,))
    agree(matrix(group, one), matrix(group, two), "two draws with the same seed")


def _random(group: Group[Any], draw: Draws) -> None:
    seed, like = draw("seed", seeds()), torch.zeros((), dtype=torch.float64)
    for batch in ((), (2, 3)):
        a = matrix(group, group.random(generator=generator(seed), like=like, batch=batch))
        demand(a.shape == (*batch, group.size, group.size), f"batch {batch} gives {size_of(a)}")
        demand(bool(a.isfinite().all()), "a random element is not finite")
        smallest = torch.linalg.svdvals(a)[..., -1].min()
        demand(float(smallest) > tolerance(a.dtype).close, "a random element has no inverse")
        if isinstance(group, CompactGroup):
            again = matrix(group, group.nearest(a))
            agree(again, a, "a random element against the nearest one of the group")


def _purity(group: Group[Any], draw: Draws) -> None:
    n, g = group.size, expand(draw("g", elements(group)), (2,))
    x = draw("x", tensors(2, n))
    before, g_before = x.clone(), copy.deepcopy(g)
    p = _some_degree(group, draw)
    group.act(g, x, degree=p)
    demand(torch.equal(x, before), f"act changes its argument x at degree {p}")
    group.compose(g, g)
    group.inverse(g)
    demand(_parts_equal(g, g_before), "an operation changes the element it is given")
    if isinstance(group, CompactGroup):
        c = draw("c", tensors(n, n))
        kept = c.clone()
        group.support(c)
        group.nearest_by_degree({1: c, -1: c})
        demand(torch.equal(c, kept), "nearest or support changes its argument")


def _gradient(group: Group[Any], draw: Draws) -> None:
    g = draw("g", elements(group))
    x = draw("x", tensors(group.size)).requires_grad_()
    p = _some_degree(group, draw)
    torch.autograd.gradcheck(lambda v: group.act(g, v, degree=p), (x,), fast_mode=True)
    if isinstance(group, NoncompactGroup):
        parts = [part.clone().requires_grad_() for part in _floats(g)]
        demand(bool(parts), "a continuous group has floating point elements")

        def moved(*parts: Tensor) -> Tensor:
            return group.act(_replace(g, list(parts)), x.detach(), degree=-1)

        torch.autograd.gradcheck(moved, tuple(parts), fast_mode=True)


def _shapes(group: Group[Any], draw: Draws) -> None:
    n, g = group.size, draw("g", elements(group))
    many = expand(g, (2,))
    wrong = {
        "dim 0, which does not count from the end": (g, torch.zeros(n, dtype=torch.float64), 0),
        "a dimension of the wrong size": (g, torch.zeros(n + 1, dtype=torch.float64), -1),
        "two elements on one vector": (many, torch.zeros(n, dtype=torch.float64), -1),
        "two elements on three vectors": (many, torch.zeros(3, n, dtype=torch.float64), -1),
    }
    for what, (h, x, dim) in wrong.items():
        try:
            group.act(h, x, dim=dim)
        except ShapeError:
            continue
        raise AssertionError(f"act takes {what} without a ShapeError")


_LAWS: dict[str, Body] = {
    "value": _value,
    "identity": _identity,
    "inverse": _inverse,
    "associativity": _associativity,
    "homomorphism": _homomorphism,
    "linear": _linear,
    "degree": _degree,
    "pairing": _pairing,
    "batch": _batch,
    "precision": _precision,
    "generator": _generator,
    "random": _random,
    "purity": _purity,
    "gradient": _gradient,
    "shapes": _shapes,
}


# ---------------------------------------------------------------- parts of elements


def _floats(g: Any) -> list[Tensor]:
    if isinstance(g, tuple):
        return [part for item in g for part in _floats(item)]
    return [g] if g.is_floating_point() else []


def _replace(g: Any, parts: list[Tensor]) -> Any:
    """Put new floating point parts into an element, in the order of ``_floats``."""
    if isinstance(g, tuple):
        return tuple(_replace(item, parts) for item in g)
    return parts.pop(0) if g.is_floating_point() else g


def _parts_equal(g: Any, h: Any) -> bool:
    if isinstance(g, tuple):
        return all(_parts_equal(a, b) for a, b in zip(g, h, strict=True))
    return torch.equal(g, h)
