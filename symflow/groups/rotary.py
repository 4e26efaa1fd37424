"""What commutes with rotary position embeddings: a rotation and a scale for each pair of units."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.errors import DegreeError, ShapeError
from symflow.groups.base import CompactGroup, Group, ScalingGroup, along
from symflow.groups.diagonal import PositiveScale

# A complex number for each pair of units: its real and its imaginary part.
Pairs = Float[Tensor, "*#batch m 2"]


class PairGroup(Group[Tensor]):
    """A group that multiplies pairs of units, read as complex numbers (*batch, n / 2, 2).

    ``pairing`` says which: ``"half"`` unit i with i + n / 2 (Llama), ``"interleaved"`` unit 2 i
    with 2 i + 1 (GPT-J).
    """

    pairing: str

    def __post_init__(self) -> None:
        if self.size % 2 or self.pairing not in ("half", "interleaved"):
            raise ShapeError(
                "pairs need an even size and pairing 'half' or 'interleaved', got "
                f"{self.size} and {self.pairing!r}"
            )

    @property
    def log_components(self) -> float:
        """One component."""
        return 0.0

    def identity(self, *, like: Tensor) -> Pairs:
        """Return ones."""
        one = torch.zeros(self.size // 2, 2, dtype=like.dtype, device=like.device)
        one[:, 0] = 1
        return one

    def compose(self, g: Pairs, h: Pairs) -> Pairs:
        """Multiply complex numbers."""
        (a, b), (c, d) = g.unbind(-1), h.unbind(-1)
        return torch.stack([a * c - b * d, a * d + b * c], -1)

    def inverse(self, g: Pairs) -> Pairs:
        """Return the conjugates, divided by the squared lengths."""
        a, b = g.unbind(-1)
        return torch.stack([a, -b], -1) / g.square().sum(-1, keepdim=True)

    def act(self, g: Pairs, x: Tensor, *, dim: int = -1, degree: int = 1) -> Tensor:
        """Turn and scale each pair; with degree -1 turn as much and scale inversely.

        Raises
        ------
        DegreeError
            If the degree is neither 1 nor -1.
        """
        if degree not in (1, -1):
            raise DegreeError(f"{self} acts with degree 1 or -1, got {degree}")
        if degree == -1:
            g = g / g.square().sum(-1, keepdim=True)
        if dim >= 0 or x.shape[dim] != self.size:
            raise ShapeError(f"{self} acts on size {self.size}, dim {dim} of {tuple(x.shape)}")
        a, b = (along(part.to(x.dtype), self._halves(x, dim)[0], dim) for part in g.unbind(-1))
        first, second = self._halves(x, dim)
        return self._joined(a * first - b * second, b * first + a * second, dim)

    def _halves(self, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        shape = (2, -1) if self.pairing == "half" else (-1, 2)
        at = dim - 1 if self.pairing == "half" else dim
        first, second = x.unflatten(dim, shape).unbind(at)
        return first, second

    def _joined(self, first: Tensor, second: Tensor, dim: int) -> Tensor:
        if self.pairing == "half":
            return torch.cat([first, second], dim)
        return torch.stack([first, second], dim).flatten(dim - 1, dim)


@final
@dataclass(frozen=True)
class Phases(PairGroup, CompactGroup[Tensor]):
    """Rotations of pairs of units, U(1)^(n/2): what is left of :class:`Rotary` when balanced.

    Examples
    --------
    >>> Phases(2).nearest(torch.tensor([[0.0, -3.0], [3.0, 0.0]]))
    tensor([[0., 1.]])
    """

    size: int
    pairing: str = "half"

    def random(
        self, *, generator: torch.Generator, like: Tensor, batch: tuple[int, ...] = ()
    ) -> Pairs:
        """Draw uniform angles (Haar)."""
        drawn = torch.rand(
            *batch,
            self.size // 2,
            generator=generator,
            device=generator.device,
            dtype=torch.float64,
        )
        angle = 2 * torch.pi * drawn
        return torch.stack([angle.cos(), angle.sin()], -1).to(like)

    @property
    def dimension(self) -> int:
        """One angle for each pair."""
        return self.size // 2

    def nearest(self, c: Float[Tensor, "*batch n n"]) -> Pairs:
        """Return the angle of each pair's own 2 x 2 block."""
        z = self._blocks(c)
        length = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
        one = torch.zeros_like(z)
        one[..., 0] = 1
        return torch.where(length > 0, z / torch.where(length > 0, length, 1), one)

    def support(self, c: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch"]:
        """Return the sum of the lengths."""
        return torch.linalg.vector_norm(self._blocks(c), dim=-1).sum(-1)

    def _blocks(self, c: Tensor) -> Tensor:
        places = torch.arange(self.size, device=c.device)
        first, second = self._halves(places, -1)
        real = c[..., first, first] + c[..., second, second]
        imaginary = c[..., second, first] - c[..., first, second]
        return torch.stack([real, imaginary], -1)


@final
@dataclass(frozen=True)
class Rotary(PairGroup, ScalingGroup[Tensor]):
    """A rotation and a positive scale for each pair of units, (C^*)^(n/2).

    What commutes with rotary position embeddings (Su et al., 2021), and so acts on the queries and,
    inversely scaled, on the keys of a head.

    Examples
    --------
    >>> Rotary(4).residual
    Phases(size=4, pairing='half')
    """

    size: int
    pairing: str = "half"

    def random(
        self, *, generator: torch.Generator, like: Tensor, batch: tuple[int, ...] = ()
    ) -> Pairs:
        """Draw uniform angles and scales exp(N(0, 1/4))."""
        phases = self.residual.random(generator=generator, like=like, batch=batch)
        scales = PositiveScale(self.size // 2).random(generator=generator, like=like, batch=batch)
        return phases * scales[..., None]

    @property
    def dimension(self) -> int:
        """One angle and one scale for each pair."""
        return self.size

    @property
    def residual(self) -> Phases:
        """The rotations."""
        return Phases(self.size, self.pairing)

    def balance(self, energy: Mapping[int, Float[Tensor, "*batch n"]]) -> Pairs:
        """Scale both units of a pair alike, as :class:`PositiveScale` does one."""
        sums = {p: sum(self._halves(e, -1), torch.zeros(())) for p, e in energy.items()}
        s = PositiveScale(self.size // 2).balance(sums)
        return torch.stack([s, torch.zeros_like(s)], -1)

    def noncompact(self, g: Pairs) -> Float[Tensor, "*batch n"]:
        """Return the lengths, once for each unit of a pair."""
        length = torch.linalg.vector_norm(g, dim=-1)
        return self._joined(length, length, -1)
