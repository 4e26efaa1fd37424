"""The group with one element."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.groups.base import CompactGroup
from symflow.groups.diagonal import DiagonalGroup


@final
@dataclass(frozen=True)
class Trivial(DiagonalGroup, CompactGroup[Tensor]):
    """Only the identity; what acts on an axis that must stay as it is.

    Examples
    --------
    >>> Trivial(2).random(generator=torch.Generator(), like=torch.zeros(1))
    tensor([1., 1.])
    """

    size: int

    def inverse(self, g: Tensor) -> Tensor:
        """Return the element itself."""
        return g

    def random(
        self, *, generator: torch.Generator, like: Tensor, batch: tuple[int, ...] = ()
    ) -> Tensor:
        """Return identities."""
        return torch.ones(*batch, self.size, dtype=like.dtype, device=like.device)

    @property
    def log_components(self) -> float:
        """One component."""
        return 0.0

    def nearest(self, c: Float[Tensor, "*batch n n"]) -> Tensor:
        """Return the identity."""
        return torch.ones(c.shape[:-1], dtype=c.dtype, device=c.device)

    def support(self, c: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch"]:
        """Return the trace."""
        return c.diagonal(dim1=-2, dim2=-1).sum(-1)

    def unit(self) -> "Trivial":
        """Return ``Trivial(1)``."""
        return Trivial(1)
