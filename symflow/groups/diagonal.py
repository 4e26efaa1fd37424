"""Groups that act by multiplying each coordinate of an axis: signs and positive scales."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.errors import DegreeError
from symflow.groups.base import CompactGroup, Group, ScalingGroup, along

Scales = Float[Tensor, "*#batch n"]


class DiagonalGroup(Group[Tensor]):
    """A group of diagonal matrices; an element is its diagonal (*batch, n).

    Coordinates are independent: the group is the n-fold power of the one of size 1 (``unit``).
    """

    def identity(self, *, like: Tensor) -> Scales:
        """Return ones."""
        return torch.ones(self.size, dtype=like.dtype, device=like.device)

    def compose(self, g: Scales, h: Scales) -> Scales:
        """Return the product of the diagonals."""
        return g * h

    def act(self, g: Scales, x: Tensor, *, dim: int = -1, degree: int = 1) -> Tensor:
        """Multiply ``x`` along ``dim`` by the diagonal to the power ``degree``.

        Examples
        --------
        >>> PositiveScale(2).act(torch.tensor([2.0, 4.0]), torch.ones(2), degree=-1)
        tensor([0.5000, 0.2500])
        """
        return x * along(g.to(x.dtype) ** degree, x, dim)

    @abstractmethod
    def unit(self) -> "DiagonalGroup":
        """Return the group of the same kind on one coordinate."""


@final
@dataclass(frozen=True)
class Sign(DiagonalGroup, CompactGroup[Tensor]):
    """Sign flips (Z/2)^n; a symmetry where the activation on the axis is odd.

    Examples
    --------
    >>> Sign(3).nearest(torch.diag(torch.tensor([2.0, -1.0, 0.5])))
    tensor([ 1., -1.,  1.])
    """

    size: int

    def inverse(self, g: Scales) -> Scales:
        """Return the element itself."""
        return g

    def random(
        self, *, generator: torch.Generator, like: Tensor, batch: tuple[int, ...] = ()
    ) -> Scales:
        """Draw fair signs (Haar)."""
        bits = torch.randint(2, (*batch, self.size), generator=generator, device=generator.device)
        return (2 * bits - 1).to(like)

    @property
    def log_components(self) -> float:
        """The logarithm of 2^n."""
        return self.size * math.log(2)

    def nearest(self, c: Float[Tensor, "*batch n n"]) -> Scales:
        """Return the sign of the diagonal of ``c`` (plus at zero)."""
        diagonal = c.diagonal(dim1=-2, dim2=-1)
        return torch.where(diagonal < 0, -torch.ones_like(diagonal), torch.ones_like(diagonal))

    def support(self, c: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch"]:
        """Return the sum of the absolute diagonal."""
        return c.diagonal(dim1=-2, dim2=-1).abs().sum(-1)

    def nearest_by_degree(self, costs: Mapping[int, Float[Tensor, "*batch n n"]]) -> Scales:
        """Only odd degrees see a sign: even ones are ignored."""
        odd = [c for degree, c in costs.items() if degree % 2]
        return self.nearest(sum(odd, torch.zeros_like(next(iter(costs.values())))))

    def support_by_degree(
        self, costs: Mapping[int, Float[Tensor, "*batch n n"]]
    ) -> Float[Tensor, "*batch"]:
        """Return |odd part| + even part, summed over the diagonal."""
        zero = torch.zeros_like(next(iter(costs.values())))
        odd = sum((c for degree, c in costs.items() if degree % 2), zero)
        even = sum((c for degree, c in costs.items() if degree % 2 == 0), zero)
        return self.support(odd) + even.diagonal(dim1=-2, dim2=-1).sum(-1)

    def unit(self) -> "Sign":
        """Return ``Sign(1)``."""
        return Sign(1)


@final
@dataclass(frozen=True)
class PositiveScale(DiagonalGroup, ScalingGroup[Tensor]):
    """Positive scales (R_{>0})^n; a symmetry where the activation is positively homogeneous.

    Examples
    --------
    >>> PositiveScale(2).inverse(torch.tensor([2.0, 4.0]))
    tensor([0.5000, 0.2500])
    """

    size: int

    def inverse(self, g: Scales) -> Scales:
        """Return the reciprocals."""
        return 1 / g

    def random(
        self, *, generator: torch.Generator, like: Tensor, batch: tuple[int, ...] = ()
    ) -> Scales:
        """Draw exp(N(0, 1/4)): scales around one (a non-compact group has no uniform law)."""
        logs = torch.randn(*batch, self.size, generator=generator, device=generator.device)
        return (logs / 2).exp().to(like)

    @property
    def residual(self) -> CompactGroup[Tensor]:
        """Trivial: the balanced scale is unique."""
        from symflow.groups.trivial import Trivial

        return Trivial(self.size)

    def balance(self, energy: Mapping[int, Float[Tensor, "*batch n"]]) -> Scales:
        r"""Minimise :math:`s^2 a + s^{-2k} b`: :math:`s = (k b / a)^{1 / (2 + 2k)}`.

        Equi-normalisation (Stock et al., 2019) for k = 1.

        Raises
        ------
        DegreeError
            Unless one degree is positive and one negative.

        Examples
        --------
        >>> PositiveScale(1).balance({1: torch.tensor([1.0]), -1: torch.tensor([16.0])})
        tensor([2.])
        """
        ups = [p for p in energy if p > 0]
        downs = [p for p in energy if p < 0]
        if len(ups) != 1 or len(downs) != 1:
            raise DegreeError(
                "balancing wants one positive and one negative degree on the axis; "
                f"got degrees {sorted(energy)}. Choose section='sphere' or None here"
            )
        up, down = ups[0], -downs[0]
        incoming, outgoing = up * energy[up], down * energy[-down]
        closed = (incoming > 0) & (outgoing > 0)
        one = torch.ones_like(incoming)
        ratio = torch.where(closed, outgoing, one) / torch.where(closed, incoming, one)
        return ratio ** (1 / (2 * (up + down)))

    @property
    def dimension(self) -> int:
        """One for each coordinate."""
        return self.size

    @property
    def log_components(self) -> float:
        """One component."""
        return 0.0

    def noncompact(self, g: Scales) -> Scales:
        """Return the element itself."""
        return g

    def unit(self) -> "PositiveScale":
        """Return ``PositiveScale(1)``."""
        return PositiveScale(1)
