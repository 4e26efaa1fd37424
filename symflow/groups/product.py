"""Products of groups on one axis: ``Permutation(n) @ Sign(n)`` and its like.

An element of ``A @ B`` is a pair (a, b) standing for the matrix a b. The pairs are a group when A
*normalises* B: a^-1 b a is in B again. That holds where A permutes coordinates and B is diagonal
(a semidirect product: the monomial groups) and where all factors are diagonal (they commute).
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.errors import ShapeError
from symflow.groups.base import CompactGroup, Group, NoncompactGroup, ScalingGroup, map_element
from symflow.groups.diagonal import DiagonalGroup
from symflow.groups.permutation import PermutingGroup, invert
from symflow.groups.trivial import Trivial

Pair = tuple[Any, Any]


def product(outer: Group[Any], inner: Group[Any]) -> Group[Any]:
    """Build ``outer @ inner``; trivial factors vanish.

    Raises
    ------
    ShapeError
        If the sizes differ.
    TypeError
        If ``outer`` does not normalise ``inner``.

    Examples
    --------
    >>> from symflow import Permutation, PositiveScale, Trivial
    >>> product(Permutation(3), Trivial(3))
    Permutation(size=3)
    >>> type(Permutation(3) @ PositiveScale(3)).__name__
    'NoncompactProduct'
    """
    if outer.size != inner.size:
        raise ShapeError(
            f"both factors must act on the same axis; got sizes {outer.size} and {inner.size}"
        )
    if isinstance(inner, Trivial):
        return outer
    if isinstance(outer, Trivial):
        return inner
    _check_normalises(outer, inner)
    if isinstance(outer, CompactGroup) and isinstance(inner, CompactGroup):
        if not isinstance(inner, DiagonalGroup):
            raise TypeError(
                f"the inner factor of a compact product must be one diagonal group, got {inner}: "
                "write (A @ B) @ C, not A @ (B @ C)"
            )
        return CompactProduct(outer.size, outer, inner)
    return NoncompactProduct(outer.size, outer, inner)


def conjugate(outer: Group[Any], a: Any, inner: Group[Any], b: Any) -> Any:
    """Return a^-1 b a, an element of ``inner``."""
    if isinstance(inner, (CompactProduct, NoncompactProduct)):
        return (
            conjugate(outer, a, inner.outer, b[0]),
            conjugate(outer, a, inner.inner, b[1]),
        )
    if isinstance(outer, (CompactProduct, NoncompactProduct)):
        return conjugate(outer.inner, a[1], inner, conjugate(outer.outer, a[0], inner, b))
    if isinstance(outer, PermutingGroup):
        back = invert(outer.indices(a))
        shape = torch.broadcast_shapes(back.shape, b.shape)
        return torch.take_along_dim(b.expand(shape), back.expand(shape), -1)
    return b  # diagonal matrices commute


def monomial(group: Group[Any], g: Any) -> tuple[Tensor | None, Tensor | None] | None:
    """Write an element as (index, scales) with (g x)_i = scales_i x_{index_i}.

    Either part is None where it is the identity; the whole is None where the group does not act by
    monomial matrices (orthogonal groups, say) and the caller has to go through ``act``.

    Examples
    --------
    >>> from symflow import Permutation, Sign
    >>> monomial(Permutation(2) @ Sign(2), (torch.tensor([1, 0]), torch.tensor([-1.0, 1.0])))
    (tensor([1, 0]), tensor([ 1., -1.]))
    """
    if isinstance(group, (CompactProduct, NoncompactProduct)):
        outer, inner = monomial(group.outer, g[0]), monomial(group.inner, g[1])
        return None if outer is None or inner is None else _after(outer, inner)
    if isinstance(group, PermutingGroup):
        return group.indices(g), None
    if isinstance(group, DiagonalGroup):
        return None, (None if isinstance(group, Trivial) else g)
    return None


def _after(
    outer: tuple[Tensor | None, Tensor | None], inner: tuple[Tensor | None, Tensor | None]
) -> tuple[Tensor | None, Tensor | None]:
    (index, scales), (index_in, scales_in) = outer, inner
    if index is not None:
        scales_in = None if scales_in is None else _gather(scales_in, index)
        index_in = index if index_in is None else _gather(index_in, index)
    if scales is not None and scales_in is not None:
        return index_in, scales * scales_in
    return index_in, scales if scales_in is None else scales_in


def _gather(v: Tensor, index: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(v.shape, index.shape)
    return torch.take_along_dim(v.expand(shape), index.expand(shape), -1)


def _check_normalises(outer: Group[Any], inner: Group[Any]) -> None:
    if isinstance(inner, (CompactProduct, NoncompactProduct)):
        _check_normalises(outer, inner.outer)
        _check_normalises(outer, inner.inner)
    elif isinstance(outer, (CompactProduct, NoncompactProduct)):
        _check_normalises(outer.outer, inner)
        _check_normalises(outer.inner, inner)
    elif not (
        isinstance(inner, DiagonalGroup) and isinstance(outer, (PermutingGroup, DiagonalGroup))
    ):
        raise TypeError(
            f"{outer} @ {inner} is not a group: the right factor must be diagonal and the left one "
            "a group of permutations (a PermutingGroup) or diagonal"
        )


class _Product(Group[Pair]):
    """What both products share; the final classes hold the factors as fields."""

    @property
    @abstractmethod
    def factors(self) -> tuple[Group[Any], Group[Any]]:
        """The outer and the inner factor."""

    @property
    def dimension(self) -> int:
        """The sum of both."""
        return sum(factor.dimension for factor in self.factors)

    @property
    def log_components(self) -> float:
        """The sum of both: components of a product are pairs of them."""
        return sum(factor.log_components for factor in self.factors)

    def identity(self, *, like: Tensor) -> Pair:
        """Return the pair of identities."""
        outer, inner = self.factors
        return outer.identity(like=like), inner.identity(like=like)

    def compose(self, g: Pair, h: Pair) -> Pair:
        """Multiply: (a b)(c d) = (a c)(c^-1 b c d)."""
        outer, inner = self.factors
        moved = conjugate(outer, h[0], inner, g[1])
        return outer.compose(g[0], h[0]), inner.compose(moved, h[1])

    def inverse(self, g: Pair) -> Pair:
        """Invert: (a b)^-1 = a^-1 (a b^-1 a^-1)."""
        outer, inner = self.factors
        back = outer.inverse(g[0])
        return back, conjugate(outer, back, inner, inner.inverse(g[1]))

    def random(
        self, *, generator: torch.Generator, like: Tensor, batch: tuple[int, ...] = ()
    ) -> Pair:
        """Draw both factors independently."""
        outer, inner = self.factors
        return (
            outer.random(generator=generator, like=like, batch=batch),
            inner.random(generator=generator, like=like, batch=batch),
        )

    def act(self, g: Pair, x: Tensor, *, dim: int = -1, degree: int = 1) -> Tensor:
        """Act with the inner factor, then with the outer one."""
        outer, inner = self.factors
        moved = inner.act(g[1], x, dim=dim, degree=degree)
        return outer.act(g[0], moved, dim=dim, degree=degree)

    def __repr__(self) -> str:
        outer, inner = self.factors
        right = f"({inner})" if isinstance(inner, _Product) else f"{inner}"
        return f"{outer} @ {right}"


@final
@dataclass(frozen=True, repr=False)
class CompactProduct(_Product, CompactGroup[Pair]):
    """A product of compact factors, such as the signed permutations ``Permutation(n) @ Sign(n)``.

    Examples
    --------
    >>> from symflow import Permutation, Sign
    >>> group = Permutation(2) @ Sign(2)
    >>> group.nearest(torch.tensor([[0.0, -3.0], [1.0, 0.0]]))
    (tensor([1, 0]), tensor([ 1., -1.]))
    """

    size: int
    outer: CompactGroup[Any]
    inner: DiagonalGroup

    @property
    def factors(self) -> tuple[Group[Any], Group[Any]]:
        """The outer and the inner factor."""
        return self.outer, self.inner

    def nearest(self, c: Float[Tensor, "*batch n n"]) -> Pair:
        """Solve for the outer factor on the inner one's supports, then the inner one in place."""
        return self.nearest_by_degree({1: c})

    def nearest_by_degree(self, costs: Mapping[int, Float[Tensor, "*batch n n"]]) -> Pair:
        """Solve the outer problem whose cost of an entry is the inner group's best on it."""
        a = self.outer.nearest(self._supports(costs))
        back = self.outer.inverse(a)
        inner = _compact(self.inner)
        moved = {p: self.outer.act(back, c, dim=-2) for p, c in costs.items()}
        return a, inner.nearest_by_degree(moved)

    def support_by_degree(
        self, costs: Mapping[int, Float[Tensor, "*batch n n"]]
    ) -> Float[Tensor, "*batch"]:
        """Return the outer support of the inner supports."""
        return self.outer.support(self._supports(costs))

    def support(self, c: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch"]:
        """Return the greatest <A, c> without choosing an element."""
        return self.support_by_degree({1: c})

    def _supports(self, costs: Mapping[int, Tensor]) -> Tensor:
        one = _compact(self.inner.unit())
        return one.support_by_degree({p: c[..., None, None] for p, c in costs.items()})


@final
@dataclass(frozen=True, repr=False)
class NoncompactProduct(_Product, ScalingGroup[Pair]):
    """A product with a non-compact factor, such as ``Permutation(n) @ PositiveScale(n)``.

    Examples
    --------
    >>> from symflow import Permutation, PositiveScale
    >>> (Permutation(2) @ PositiveScale(2)).residual
    Permutation(size=2)
    """

    size: int
    outer: Group[Any]
    inner: Group[Any]

    @property
    def factors(self) -> tuple[Group[Any], Group[Any]]:
        """The outer and the inner factor."""
        return self.outer, self.inner

    @property
    def residual(self) -> CompactGroup[Any]:
        """The product of what remains of both factors."""
        left, right = _residual(self.outer), _residual(self.inner)
        both = product(left, right)
        if not isinstance(both, CompactGroup):
            raise TypeError(f"{both} is not compact")  # excluded by the factors' own contracts
        return both

    def balance(self, energy: Mapping[int, Float[Tensor, "*batch n"]]) -> Pair:
        """Balance the non-compact factor; the compact one does not change norms."""
        return _balanced(self.outer, energy), _balanced(self.inner, energy)

    def noncompact(self, g: Pair) -> Tensor:
        """Return the scales, as they act before the compact factor."""
        if isinstance(self.inner, ScalingGroup):
            return self.inner.noncompact(g[1])
        if isinstance(self.outer, ScalingGroup):
            return self.outer.noncompact(g[0])
        raise TypeError(f"{self} has no non-compact factor")


def _residual(group: Group[Any]) -> CompactGroup[Any]:
    if isinstance(group, NoncompactGroup):
        return group.residual
    if isinstance(group, CompactGroup):
        return group
    raise TypeError(f"{group} is neither a CompactGroup nor a NoncompactGroup: derive it from one")


def _compact(group: DiagonalGroup) -> CompactGroup[Any]:
    if isinstance(group, CompactGroup):
        return group
    raise TypeError(f"{group} is not compact")


def _balanced(group: Group[Any], energy: Mapping[int, Tensor]) -> Any:
    """Balance a factor; a compact one stays as it is."""
    if isinstance(group, ScalingGroup):
        return group.balance(energy)
    like = next(iter(energy.values()))
    return map_element(partial(_spread, like.shape[:-1]), group.identity(like=like))


def _spread(batch: torch.Size, part: Tensor) -> Tensor:
    return part.expand((*batch, *part.shape))
