"""Cyclic shifts of an axis."""

import math
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from symflow.groups.permutation import PermutingGroup

Shift = Int[Tensor, "*#batch 1"]


@final
@dataclass(frozen=True)
class CyclicShift(PermutingGroup):
    """Shifts modulo n, Z/n: an element is a shift s (*batch, 1), with (g x)_i = x_{(i + s) mod n}.

    A symmetry of periodic axes: positions under circular convolution, angles.

    Examples
    --------
    >>> CyclicShift(3).act(torch.tensor([1]), torch.tensor([10.0, 20.0, 30.0]))
    tensor([20., 30., 10.])
    """

    size: int

    def identity(self, *, like: Tensor) -> Shift:
        """Return the shift by zero."""
        return torch.zeros(1, dtype=torch.long, device=like.device)

    def compose(self, g: Shift, h: Shift) -> Shift:
        """Add the shifts."""
        return (g + h) % self.size

    def inverse(self, g: Shift) -> Shift:
        """Return the opposite shift."""
        return -g % self.size

    def random(
        self, *, generator: torch.Generator, like: Tensor, batch: tuple[int, ...] = ()
    ) -> Shift:
        """Draw uniformly (Haar)."""
        drawn = torch.randint(self.size, (*batch, 1), generator=generator, device=generator.device)
        return drawn.to(like.device)

    @property
    def log_components(self) -> float:
        """The logarithm of n."""
        return math.log(self.size)

    def indices(self, g: Shift) -> Int[Tensor, "*#batch n"]:
        """Return, for each place, the place it is taken from."""
        return (torch.arange(self.size, device=g.device) + g) % self.size

    def nearest(self, c: Float[Tensor, "*batch n n"]) -> Shift:
        """Return the shift whose (wrapped) diagonal has the greatest sum, O(n^2).

        Examples
        --------
        >>> CyclicShift(2).nearest(torch.tensor([[0.0, 5.0], [1.0, 0.0]]))
        tensor([1])
        """
        return self._sums(c).argmax(-1, keepdim=True)

    def support(self, c: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch"]:
        """Return the greatest such sum."""
        return self._sums(c).amax(-1)

    def _sums(self, c: Tensor) -> Tensor:
        places = torch.arange(self.size, device=c.device)
        wrapped = (places[:, None] + places) % self.size  # row: shift, column: place
        return c[..., places.expand_as(wrapped), wrapped].sum(-1)
