"""The laws of a group, each on its own: what every group must obey, checked on drawn examples.

A law is checked against dense matrices, in float64, on tensors of small integers. It raises an
``AssertionError`` that names the law, the group, and the smallest example found.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException
from hypothesis.strategies import DataObject, SearchStrategy
from torch import Tensor

from symflow.errors import ShapeError
from symflow.groups import CompactGroup, Group, NoncompactGroup, monomial
from symflow.numerics import tolerance
from symflow.testing.strategies import element, elements, expand, generator, pick, seeds
from symflow.testing.strategies import tensors, values

MONOMIAL_DEGREES = (1, -1, 0, 2, -2, 3)
LINEAR_DEGREES = (1, -1)


# ---------------------------------------------------------------- what a law is


@final
@dataclass(frozen=True)
class Law:
    """A statement that can be tried.

    Attributes
    ----------
    name
        Its name, which the failure repeats.
    check
        Tries it on drawn examples; raises ``AssertionError`` where it does not hold.

    Examples
    --------
    >>> from symflow.groups import Permutation
    >>> law = laws(Permutation(3))[1]
    >>> print(law)
    identity
    >>> law.check()
    """

    name: str
    check: Callable[[], None]

    def __str__(self) -> str:
        return self.name


@final
class Draws:
    """What was drawn for one example, by name, so that a failure can show it."""

    def __init__(self, data: DataObject) -> None:
        self._data = data
        self.seen: dict[str, Any] = {}

    def __call__(self, name: str, strategy: SearchStrategy[Any]) -> Any:
        """Draw a value and remember it under a name."""
        self.seen[name] = self._data.draw(strategy)
        return self.seen[name]

    def __str__(self) -> str:
        return "".join(f"\n  {name} = {_shown(value)}" for name, value in self.seen.items())


Body = Callable[[Any, Draws], None]


def law(name: str, subject: SearchStrategy[Any], body: Body) -> Law:
    """Make a law out of a body that raises on a counterexample.

    The number of examples and whether they are derandomised come from the active Hypothesis
    profile.

    Parameters
    ----------
    name
        Name of the law.
    subject
        Strategy for what the law is about, such as ``st.just(group)``.
    body
        Called with the subject and the draws.

    Examples
    --------
    >>> def even(n, draw):
    ...     demand(n % 2 == 0, f"{n} is odd")
    >>> try: law("even", st.integers(0, 9), even).check()
    ... except AssertionError as error: print(error)
    law 'even' is broken by 1: 1 is odd
    """

    def example(data: DataObject) -> None:
        draws = Draws(data)
        about = data.draw(subject)
        try:
            body(about, draws)
        except HypothesisException:
            raise
        except Exception as error:
            message = str(error) if type(error) is AssertionError else _told(error)
            failure = AssertionError(f"law {name!r} is broken by {about}: {message}{draws}")
            raise failure from error

    def check() -> None:
        options = settings(
            deadline=None,
            database=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        )
        options(given(st.data())(example))()

    return Law(name, check)


def demand(holds: bool, message: str) -> None:
    """Raise ``AssertionError`` with a message unless ``holds``.

    Examples
    --------
    >>> demand(True, "never said")
    """
    if not holds:
        raise AssertionError(message)


def agree(
    got: Tensor, wanted: Tensor, what: str, *, factor: float = 1.0, scale: float = 1.0
) -> None:
    """Demand that two tensors are equal up to rounding.

    Parameters
    ----------
    got, wanted
        Tensors; the coarser dtype of the two says what rounding is.
    what
        What is being compared, in words.
    factor
        Multiple of the table's tolerance.
    scale
        Magnitude of intermediate results, where that is greater than what comes out.

    Examples
    --------
    >>> agree(torch.ones(2), torch.ones(2), "ones")
    """
    demand(got.shape == wanted.shape, f"{what}: shape {_size(got)}, wanted {_size(wanted)}")
    if not got.numel():
        return
    coarse = min((got.dtype, wanted.dtype), key=lambda dtype: torch.finfo(dtype).bits)
    got, wanted = got.detach().double(), wanted.detach().double()
    size = max(scale, float(got.abs().max()), float(wanted.abs().max()))
    error = float((got - wanted).abs().max())
    limit = factor * tolerance(coarse).close * size
    demand(error <= limit, f"{what}: off by {error:.3g}, allowed {limit:.3g}")


# ---------------------------------------------------------------- laws of groups


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
    ['balance', 'balance again', 'balance anywhere', 'residual']

    Use it with pytest::

        @pytest.mark.parametrize("law", laws(Cyclic(5)), ids=str)
        def test_cyclic(law):
            law.check()
    """
    if isinstance(subject, type):
        drawn, kind = values(subject), subject
    else:
        drawn, kind = st.just(subject), type(subject)
    found = dict(_LAWS[Group])
    for contract in (CompactGroup, NoncompactGroup):
        found |= _LAWS[contract] if issubclass(kind, contract) else {}
    return tuple(law(name, drawn, body) for name, body in found.items())


def check_group(group: Group[Any]) -> None:
    """Try every law on a group.

    Raises
    ------
    AssertionError
        Naming the law that is broken, the group, and the smallest example found.

    Examples
    --------
    >>> from symflow.groups import Trivial
    >>> check_group(Trivial(2))
    """
    for one in laws(group):
        one.check()


def degrees(group: Group[Any]) -> tuple[int, ...]:
    """Return the degrees with which a group must be able to act: all for monomial groups.

    Examples
    --------
    >>> from symflow.groups import Sign
    >>> degrees(Sign(2))
    (1, -1, 0, 2, -2, 3)
    """
    like = torch.zeros((), dtype=torch.float64)
    known = monomial(group, group.identity(like=like)) is not None
    return MONOMIAL_DEGREES if known else LINEAR_DEGREES


def power(a: Tensor, degree: int) -> Tensor:
    """Return the dense matrix by which degree p acts, from the matrix A (*batch, n, n) itself.

    Examples
    --------
    >>> power(torch.tensor([[0.0, 2.0], [4.0, 0.0]]), -1)
    tensor([[0.0000, 0.5000],
            [0.2500, 0.0000]])
    """
    if degree == 1:
        return a
    if degree == -1:
        return torch.linalg.inv(a).mT
    return torch.where(a != 0, torch.where(a != 0, a, 1) ** degree, 0)


def _matrix(group: Group[Any], g: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    return group.matrix(g, like=torch.zeros((), dtype=dtype))


def _value(law_body: Group[Any], draw: Draws) -> None:
    group = law_body
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
    e = group.identity(like=x)
    for p in degrees(group):
        agree(group.act(e, x, dim=-2, degree=p), x, f"e x at degree {p}")
    a = _matrix(group, g)
    agree(_matrix(group, group.compose(e, g)), a, "e g against g")
    agree(_matrix(group, group.compose(g, e)), a, "g e against g")


def _inverse(group: Group[Any], draw: Draws) -> None:
    g = draw("g", elements(group))
    x = draw("x", tensors(group.size))
    back = group.inverse(g)
    for p in degrees(group):
        moved = group.act(g, x, degree=p)
        agree(group.act(back, moved, degree=p), x, f"g^-1 g x against x at degree {p}")
    eye = torch.eye(group.size, dtype=torch.float64)
    agree(_matrix(group, group.compose(g, back)), eye, "g g^-1 against e")
    agree(_matrix(group, group.compose(back, g)), eye, "g^-1 g against e")


def _associativity(group: Group[Any], draw: Draws) -> None:
    g, h, k = (draw(name, elements(group)) for name in "ghk")
    one = group.compose(group.compose(g, h), k)
    two = group.compose(g, group.compose(h, k))
    agree(_matrix(group, one), _matrix(group, two), "(g h) k against g (h k)")


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
    a = _matrix(group, g)
    agree(group.act(g, 2 * x - y), 2 * x @ a.mT - y @ a.mT, "g (2 x - y) against A (2 x - y)")
    agree(group.act(g, x.mT, dim=-2), a @ x.mT, "g x along dim -2 against A x")
    cube = x[:, :, None, None].expand(2, n, 1, 2)
    wanted = torch.einsum("ij,bjkl->bikl", a, cube)
    agree(group.act(g, cube, dim=-3), wanted, "g x along dim -3 against A x")


def _degree(group: Group[Any], draw: Draws) -> None:
    g = draw("g", elements(group))
    x = draw("x", tensors(group.size))
    a = _matrix(group, g)
    for p in degrees(group):
        agree(group.act(g, x, degree=p), power(a, p) @ x, f"g x at degree {p} against A^({p}) x")


def _pairing(group: Group[Any], draw: Draws) -> None:
    g = draw("g", elements(group))
    x, y = draw("x", tensors(group.size)), draw("y", tensors(group.size))
    after = group.act(g, y, degree=-1) @ group.act(g, x)
    agree(after, y @ x, "<act(y, -1), act(x, +1)> against <y, x>", scale=float(x.norm() * y.norm()))


def _batch(group: Group[Any], draw: Draws) -> None:
    n, seed = group.size, draw("seed", seeds())
    g, h = element(group, seed, batch=(3,)), element(group, seed + 1, batch=(3,))
    x = draw("x", tensors(3, n))
    cube = torch.stack([x, 2 * x], dim=-1)
    both, back = group.compose(g, h), group.inverse(g)
    first, moved = group.compose(pick(g, 0), h), group.act(g, cube, dim=-2, degree=-1)
    for k in range(3):
        gk, hk = pick(g, k), pick(h, k)
        agree(group.act(g, x)[k], group.act(gk, x[k]), f"act, network {k}")
        agree(moved[k], group.act(gk, cube[k], dim=-2, degree=-1), f"act on matrices, network {k}")
        agree(group.act(gk, x)[k], group.act(gk, x[k]), "one element on a batch")
        a, b = _matrix(group, gk), _matrix(group, hk)
        agree(_matrix(group, g)[k], a, f"matrix, network {k}")
        agree(_matrix(group, pick(both, k)), a @ b, f"compose, network {k}")
        agree(_matrix(group, pick(first, k)), _matrix(group, pick(g, 0)) @ b, "compose one with a batch")
        agree(_matrix(group, pick(back, k)), torch.linalg.inv(a), f"inverse, network {k}")
    if isinstance(group, CompactGroup):
        c = draw("c", tensors(3, n, n))
        chosen, value = _matrix(group, group.nearest(c)), group.support(c)
        for k in range(3):
            one = _matrix(group, group.nearest(c[k]))
            agree((chosen[k] * c[k]).sum(), (one * c[k]).sum(), f"nearest, matrix {k}")
            agree(value[k], group.support(c[k]), f"support, matrix {k}")


def _precision(group: Group[Any], draw: Draws) -> None:
    n, seed = group.size, draw("seed", seeds())
    x, double, single = draw("x", tensors(n)), torch.float64, torch.float32
    g, low = (element(group, seed, dtype=dtype) for dtype in (double, single))
    for p in degrees(group):
        moved = group.act(low, x.float(), degree=p)
        demand(moved.dtype == single, f"act returns {moved.dtype} for a float32 tensor")
        agree(moved, group.act(g, x, degree=p), f"act in float32 against float64 at degree {p}")
    a = _matrix(group, g)
    agree(_matrix(group, group.inverse(low), single), torch.linalg.inv(a), "inverse in float32")
    agree(_matrix(group, group.compose(low, low), single), a @ a, "compose in float32")
    if isinstance(group, CompactGroup):
        c = draw("c", tensors(n, n))
        chosen = _matrix(group, group.nearest(c.float()), single)
        wanted = (_matrix(group, group.nearest(c)) * c).sum()
        agree((chosen * c.float()).sum(), wanted, "value of nearest in float32")


def _generator(group: Group[Any], draw: Draws) -> None:
    seed, like = draw("seed", seeds()), torch.zeros((), dtype=torch.float64)
    state = torch.get_rng_state()
    one = group.random(generator=generator(seed), like=like, batch=(4,))
    demand(bool((torch.get_rng_state() == state).all()), "random draws from the global generator")
    two = group.random(generator=generator(seed), like=like, batch=(4,))
    agree(_matrix(group, one), _matrix(group, two), "two draws with the same seed")


def _random(group: Group[Any], draw: Draws) -> None:
    seed, like = draw("seed", seeds()), torch.zeros((), dtype=torch.float64)
    for batch in ((), (2, 3)):
        a = _matrix(group, group.random(generator=generator(seed), like=like, batch=batch))
        demand(a.shape == (*batch, group.size, group.size), f"batch {batch} gives {_size(a)}")
        demand(bool(a.isfinite().all()), "a random element is not finite")
        smallest = torch.linalg.svdvals(a)[..., -1].min()
        demand(float(smallest) > tolerance(a.dtype).close, "a random element has no inverse")
        if isinstance(group, CompactGroup):
            again = _matrix(group, group.nearest(a))
            agree(again, a, "a random element against the nearest one of the group")


def _purity(group: Group[Any], draw: Draws) -> None:
    n, g = group.size, expand(draw("g", elements(group)), (2,))
    x = draw("x", tensors(2, n))
    before, g_before = x.clone(), copy.deepcopy(g)
    for p in degrees(group):
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
    for p in degrees(group):
        torch.autograd.gradcheck(lambda v, p=p: group.act(g, v, degree=p), (x,), fast_mode=True)
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


# ---------------------------------------------------------------- compact groups


def _isometry(group: CompactGroup[Any], draw: Draws) -> None:
    g = draw("g", elements(group))
    x = draw("x", tensors(group.size))
    for p in LINEAR_DEGREES:
        agree(group.act(g, x, degree=p).norm(), x.norm(), f"norm of g x against x at degree {p}")


def _nearest(group: CompactGroup[Any], draw: Draws) -> None:
    c = draw("c", tensors(group.size, group.size))
    rivals = _matrix(group, draw("rivals", elements(group, batch=(24,))))
    best = (_matrix(group, group.nearest(c)) * c).sum()
    reached = (rivals * c).sum((-2, -1)).max()
    _no_better(best, reached, "<A, c> of nearest")


def _recovery(group: CompactGroup[Any], draw: Draws) -> None:
    a = _matrix(group, draw("g", elements(group)))
    agree(_matrix(group, group.nearest(a)), a, "nearest(A) against A, for A in the group")


def _support(group: CompactGroup[Any], draw: Draws) -> None:
    c = draw("c", tensors(group.size, group.size))
    wanted = (_matrix(group, group.nearest(c)) * c).sum()
    agree(group.support(c), wanted, "support against <A, c> of nearest")


def _mixed(group: CompactGroup[Any], draw: Draws) -> None:
    n = group.size
    chosen = draw("degrees", st.sets(st.sampled_from(degrees(group)), min_size=1, max_size=3))
    costs = {p: draw(f"c[{p}]", tensors(n, n)) for p in sorted(chosen)}
    rivals = draw("rivals", elements(group, batch=(24,)))

    def total(g: Any) -> Tensor:
        a = _matrix(group, g)
        return torch.stack([(power(a, p) * c).sum((-2, -1)) for p, c in costs.items()]).sum(0)

    best = total(group.nearest_by_degree(costs))
    _no_better(best, total(rivals).max(), "sum of <A^(p), c_p> of nearest_by_degree")
    agree(group.support_by_degree(costs), best, "support_by_degree against what is reached")


def _no_better(best: Tensor, rival: Tensor, what: str) -> None:
    slack = tolerance(torch.float64).close * max(1.0, float(best.abs()))
    demand(float(rival) <= float(best) + slack, f"{what} is {best:.6g}, a rival has {rival:.6g}")


# ---------------------------------------------------------------- non-compact groups


def _energies(n: int, *, low: int = 0) -> SearchStrategy[dict[int, Tensor]]:
    """Squared norms that coordinates carry, for one upward and one downward degree."""
    entries = tensors(n, low=low, high=9)
    scales = st.sampled_from((1.0, 4.0**9, 4.0**-9))
    return st.builds(
        lambda up, down, a, b, zero, scale: {up: a * scale, -down: b, 0: zero},
        *(st.sampled_from((1, 2)), st.sampled_from((1, 2))),
        *(entries, entries, entries, scales),
    )


def _energy(a: Tensor, energy: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Squared norms after acting with the matrix ``a``."""
    return {p: power(a, p).square() @ e for p, e in energy.items()}


def _balance(group: NoncompactGroup[Any], draw: Draws) -> None:
    n = group.size
    energy = draw("energy", _energies(n))
    factors = draw("factors", st.lists(st.sampled_from((0.5, 0.9, 1.0, 1.1)), min_size=n, max_size=n))
    g = group.balance(energy)
    s, t = group.noncompact(g), torch.tensor(factors, dtype=torch.float64)
    closed = torch.stack([e > 0 for p, e in energy.items() if p]).all(0)
    agree(s[~closed], torch.ones_like(s)[~closed], "scales where no minimum exists, against one")

    def cost(scales: Tensor) -> Tensor:
        terms = [scales ** (2 * p) * e for p, e in energy.items() if p]
        return torch.stack(terms).sum(0)[closed]

    for rival in (s * t, s / t):
        slack = tolerance(s.dtype).close * cost(s)
        demand(bool((cost(s) <= cost(rival) + slack).all()), "nearby scales have less energy")
    total = sum(float(e.sum()) for e in _energy(_matrix(group, g), energy).values())
    wanted = sum(float((s ** (2 * p) * e).sum()) for p, e in energy.items())
    agree(torch.tensor(total), torch.tensor(wanted), "energy after acting against the scales' own")


def _balance_again(group: NoncompactGroup[Any], draw: Draws) -> None:
    energy = draw("energy", _energies(group.size))
    balanced = _energy(_matrix(group, group.balance(energy)), energy)
    s = group.noncompact(group.balance(balanced))
    agree(s, torch.ones_like(s), "scales of what is balanced already")


def _balance_anywhere(group: NoncompactGroup[Any], draw: Draws) -> None:
    energy, h = draw("energy", _energies(group.size, low=1)), draw("h", elements(group))

    def least(start: Mapping[int, Tensor]) -> Tensor:
        reached = _energy(_matrix(group, group.balance(start)), start)
        return torch.stack([e.sum() for e in reached.values()])

    agree(least(_energy(_matrix(group, h), energy)), least(energy), "least energy along an orbit")


def _residual(group: NoncompactGroup[Any], draw: Draws) -> None:
    left = group.residual
    demand(isinstance(left, CompactGroup), f"the residual {left} is no CompactGroup")
    demand(left.size == group.size, f"the residual {left} acts on another size")
    g = draw("g", elements(group, batch=(2,)))
    s = group.noncompact(g)
    demand(s.shape == (2, group.size) and bool((s > 0).all()), "noncompact(g) is no positive scale")
    compact = _matrix(group, g) / s[:, None, :]
    agree(_matrix(left, left.nearest(compact)), compact, "what the scales leave, in the residual")


_LAWS: dict[type, dict[str, Body]] = {
    Group: {
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
    },
    CompactGroup: {
        "isometry": _isometry,
        "nearest": _nearest,
        "recovery": _recovery,
        "support": _support,
        "mixed degrees": _mixed,
    },
    NoncompactGroup: {
        "balance": _balance,
        "balance again": _balance_again,
        "balance anywhere": _balance_anywhere,
        "residual": _residual,
    },
}


# ---------------------------------------------------------------- elements and messages


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


def _size(x: Tensor) -> str:
    return str(tuple(x.shape))


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(value.tolist()) if value.numel() <= 64 else f"tensor of shape {_size(value)}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_shown, value))})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_shown(item)}' for key, item in value.items())}}}"
    return str(value)
