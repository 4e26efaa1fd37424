"""Laws of the two contracts, compact and non-compact, against dense matrices."""

from collections.abc import Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from symflow.groups import (
    CompactGroup,
    GeneralLinear,
    Group,
    NoncompactGroup,
    ScalingGroup,
    monomial,
)
from symflow.numerics import tolerance
from symflow.testing.law import Body, Draws, agree, demand
from symflow.testing.strategies import elements, tensors

MONOMIAL_DEGREES = (1, -1, 0, 2, -2, 3)
LINEAR_DEGREES = (1, -1)


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


def matrix(group: Group[Any], g: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the dense matrix of an element.

    Examples
    --------
    >>> from symflow.groups import Sign
    >>> matrix(Sign(1), torch.tensor([-1.0]), torch.float32)
    tensor([[-1.]])
    """
    return group.matrix(g, like=torch.zeros((), dtype=dtype))


# ---------------------------------------------------------------- compact groups


def _isometry(group: CompactGroup[Any], draw: Draws) -> None:
    g = draw("g", elements(group))
    x = draw("x", tensors(group.size))
    for p in LINEAR_DEGREES:
        agree(group.act(g, x, degree=p).norm(), x.norm(), f"norm of g x against x at degree {p}")


def _nearest(group: CompactGroup[Any], draw: Draws) -> None:
    c = draw("c", tensors(group.size, group.size))
    rivals = matrix(group, draw("rivals", elements(group, batch=(24,))))
    best = (matrix(group, group.nearest(c)) * c).sum()
    reached = (rivals * c).sum((-2, -1)).max()
    _no_better(best, reached, "<A, c> of nearest")


def _recovery(group: CompactGroup[Any], draw: Draws) -> None:
    a = matrix(group, draw("g", elements(group)))
    agree(matrix(group, group.nearest(a)), a, "nearest(A) against A, for A in the group")


def _support(group: CompactGroup[Any], draw: Draws) -> None:
    c = draw("c", tensors(group.size, group.size))
    wanted = (matrix(group, group.nearest(c)) * c).sum()
    agree(group.support(c), wanted, "support against <A, c> of nearest")


def _mixed(group: CompactGroup[Any], draw: Draws) -> None:
    n = group.size
    chosen = draw("degrees", st.sets(st.sampled_from(degrees(group)), min_size=1, max_size=3))
    costs = {p: draw(f"c[{p}]", tensors(n, n)) for p in sorted(chosen)}
    rivals = draw("rivals", elements(group, batch=(24,)))

    def total(g: Any) -> Tensor:
        a = matrix(group, g)
        return torch.stack([(power(a, p) * c).sum((-2, -1)) for p, c in costs.items()]).sum(0)

    best = total(group.nearest_by_degree(costs))
    _no_better(best, total(rivals).max(), "sum of <A^(p), c_p> of nearest_by_degree")
    agree(group.support_by_degree(costs), best, "support_by_degree against what is reached")


def _no_better(best: Tensor, rival: Tensor, what: str) -> None:
    slack = tolerance(torch.float64).close * max(1.0, float(best.abs()))
    demand(float(rival) <= float(best) + slack, f"{what} is {best:.6g}, a rival has {rival:.6g}")


# ---------------------------------------------------------------- non-compact groups


def _energies(group: Group[Any], *, low: int = 0) -> SearchStrategy[dict[int, Tensor]]:
    """Squared norms that coordinates carry, for one upward and one downward degree.

    The same for coordinates that are always scaled alike: no others say what their pairs carry.
    """
    entries = tensors(group.size, low=low, high=9)
    scales = st.sampled_from((1.0, 4.0**9, 4.0**-9))
    powers = st.sampled_from([p for p in (1, 2) if p in degrees(group)])
    alike = tied(group)

    def drawn(
        up: int, down: int, a: Tensor, b: Tensor, zero: Tensor, scale: float
    ) -> dict[int, Tensor]:
        energy = {up: alike @ a * scale, -down: alike @ b, 0: alike @ zero}
        return {p: e for p, e in energy.items() if p in degrees(group)}

    return st.builds(drawn, powers, powers, entries, entries, entries, scales)


def tied(group: Group[Any]) -> Tensor:
    """Return the averages over coordinates that a scaling group always scales alike, as a matrix.

    Examples
    --------
    >>> from symflow.groups import PositiveScale
    >>> tied(PositiveScale(2))
    tensor([[1., 0.],
            [0., 1.]], dtype=torch.float64)
    """
    if not isinstance(group, ScalingGroup):
        return torch.eye(group.size, dtype=torch.float64)
    like = torch.zeros((), dtype=torch.float64)
    drawn = group.noncompact(group.random(generator=torch.Generator().manual_seed(0), like=like))
    alike = torch.isclose(drawn[:, None], drawn[None], rtol=tolerance(drawn.dtype).close).double()
    return alike / alike.sum(1, keepdim=True)


def _energy(a: Tensor, energy: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Squared norms after acting with the matrix ``a``."""
    return {p: power(a, p).square() @ e for p, e in energy.items()}


def _balance(group: ScalingGroup[Any], draw: Draws) -> None:
    n = group.size
    energy = draw("energy", _energies(group))
    factors = draw(
        "factors", st.lists(st.sampled_from((0.5, 0.9, 1.0, 1.1)), min_size=n, max_size=n)
    )
    g = group.balance(energy)
    s, t = group.noncompact(g), tied(group) @ torch.tensor(factors, dtype=torch.float64)
    closed = torch.stack([e > 0 for p, e in energy.items() if p]).all(0)
    agree(s[~closed], torch.ones_like(s)[~closed], "scales where no minimum exists, against one")

    def cost(scales: Tensor) -> Tensor:
        terms = [scales ** (2 * p) * e for p, e in energy.items() if p]
        return torch.stack(terms).sum(0)[closed]

    for rival in (s * t, s / t):
        slack = tolerance(s.dtype).close * cost(s)
        demand(bool((cost(s) <= cost(rival) + slack).all()), "nearby scales have less energy")
    total = sum(float(e.sum()) for e in _energy(matrix(group, g), energy).values())
    wanted = sum(float((s ** (2 * p) * e).sum()) for p, e in energy.items())
    agree(torch.tensor(total), torch.tensor(wanted), "energy after acting against the scales' own")


def _balance_again(group: ScalingGroup[Any], draw: Draws) -> None:
    energy = draw("energy", _energies(group))
    balanced = _energy(matrix(group, group.balance(energy)), energy)
    s = group.noncompact(group.balance(balanced))
    agree(s, torch.ones_like(s), "scales of what is balanced already")


def _balance_anywhere(group: ScalingGroup[Any], draw: Draws) -> None:
    energy, h = draw("energy", _energies(group, low=1)), draw("h", elements(group))

    def least(start: Mapping[int, Tensor]) -> Tensor:
        reached = _energy(matrix(group, group.balance(start)), start)
        return torch.stack([e.sum() for e in reached.values()])

    agree(least(_energy(matrix(group, h), energy)), least(energy), "least energy along an orbit")


def _residual(group: NoncompactGroup[Any], draw: Draws) -> None:
    left = group.residual
    demand(isinstance(left, CompactGroup), f"the residual {left} is no CompactGroup")
    demand(left.size == group.size, f"the residual {left} acts on another size")


def _stretch(group: ScalingGroup[Any], draw: Draws) -> None:
    left = group.residual
    g = draw("g", elements(group, batch=(2,)))
    s = group.noncompact(g)
    demand(s.shape == (2, group.size) and bool((s > 0).all()), "noncompact(g) is no positive scale")
    compact = matrix(group, g) / s[:, None, :]
    agree(matrix(left, left.nearest(compact)), compact, "what the scales leave, in the residual")


def _factors(group: GeneralLinear, draw: Draws) -> None:
    n = group.size
    up, down = draw("up", tensors(n, 2 * n + 1)), draw("down", tensors(n, n + 1))
    h = draw("h", elements(group))
    one, two = group.balance_factors(up, down)
    agree(one.mT @ two, up.mT @ down, "the product of balanced factors")
    agree(one @ one.mT, two @ two.mT, "Gram matrices of balanced factors")
    agree(torch.cat(group.balance_factors(one, two), -1), torch.cat([one, two], -1), "again")
    k, left = draw("k", elements(group.residual)), group.residual
    turned = [left.act(k, x, dim=-2) for x in (up, down)]
    wanted = left.act(k, torch.cat([one, two], -1), dim=-2)
    agree(torch.cat(group.balance_factors(*turned), -1), wanted, "turned factors, balanced")
    moved = group.act(h, up, dim=-2), group.act(h, down, dim=-2, degree=-1)
    agree(_total(*group.balance_factors(*moved)), _total(one, two), "least norm along an orbit")
    demand(float(_total(one, two)) <= float(_total(*moved)) * (1 + _slack()), "another has less")


def _total(up: Tensor, down: Tensor) -> Tensor:
    return up.square().sum() + down.square().sum()


def _slack() -> float:
    return tolerance(torch.float64).close


COMPACT: dict[str, Body] = {
    "isometry": _isometry,
    "nearest": _nearest,
    "recovery": _recovery,
    "support": _support,
    "mixed degrees": _mixed,
}
NONCOMPACT: dict[str, Body] = {"residual": _residual}
SCALING: dict[str, Body] = {
    "balance": _balance,
    "balance again": _balance_again,
    "balance anywhere": _balance_anywhere,
    "stretch": _stretch,
}
MIXING: dict[str, Body] = {"factors": _factors}
