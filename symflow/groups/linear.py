"""Groups that mix the units of an axis: rotations, and all invertible linear maps."""

import math
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.errors import DegreeError, ShapeError
from symflow.groups.base import CompactGroup, Group, NoncompactGroup
from symflow.numerics import tolerance

Matrix = Float[Tensor, "*#batch n n"]


class MatrixGroup(Group[Tensor]):
    """A group whose elements are their own matrices (*batch, n, n)."""

    def identity(self, *, like: Tensor) -> Matrix:
        """Return the unit matrix."""
        return torch.eye(self.size, dtype=like.dtype, device=like.device)

    def compose(self, g: Matrix, h: Matrix) -> Matrix:
        """Return the matrix product."""
        return g @ h

    def act(self, g: Matrix, x: Tensor, *, dim: int = -1, degree: int = 1) -> Tensor:
        """Multiply ``x`` along ``dim`` by A (degree 1) or its inverse transpose (-1).

        Raises
        ------
        DegreeError
            For any other degree: a matrix that is not diagonal has no powers that nets see.

        Examples
        --------
        >>> Orthogonal(2).act(torch.tensor([[0.0, -1.0], [1.0, 0.0]]), torch.tensor([1.0, 0.0]))
        tensor([0., 1.])
        """
        if degree not in (-1, 1):
            raise DegreeError(f"{self} acts with degree 1 or -1, got {degree}")
        matrix = g.to(x.dtype) if degree == 1 else self.inverse(g).to(x.dtype).mT
        return multiply(matrix, x, dim)


def multiply(matrix: Tensor, x: Tensor, dim: int) -> Tensor:
    """Multiply ``x`` along ``dim`` by matrices; their batch dimensions are its leading ones.

    Examples
    --------
    >>> multiply(2 * torch.eye(3), torch.ones(3, 4), -2).sum()
    tensor(24.)
    """
    batch = matrix.ndim - 2
    fits = dim < 0 and x.ndim + dim >= batch and x.shape[dim] == matrix.shape[-1]
    pairs = zip(matrix.shape[:batch], x.shape, strict=False)
    if not fits or any(1 not in (m, n) and m != n for m, n in pairs):
        raise ShapeError(
            f"matrices {tuple(matrix.shape)} act on a dimension of their size, counted from the "
            f"end and behind their batch dimensions; got dim {dim} of {tuple(x.shape)}"
        )
    moved = x.movedim(dim, -1)
    lead, inner = moved.shape[:batch], moved.shape[batch:-1]
    out = moved.reshape(*lead, inner.numel(), x.shape[dim]) @ matrix.mT
    return out.reshape(*out.shape[:-2], *inner, x.shape[dim]).movedim(-1, dim)


@final
@dataclass(frozen=True)
class Orthogonal(MatrixGroup, CompactGroup[Tensor]):
    """Rotations and reflections O(n); a symmetry where only norms and linear maps see the units.

    Residual streams under RMSNorm without gain have it, and what is left of balanced linear pairs.

    Examples
    --------
    >>> Orthogonal(2).nearest(torch.tensor([[0.0, -3.0], [2.0, 0.0]]))
    tensor([[ 0., -1.],
            [ 1.,  0.]])
    """

    size: int

    def inverse(self, g: Matrix) -> Matrix:
        """Return the transpose."""
        return g.mT

    def random(
        self, *, generator: torch.Generator, like: Tensor, batch: tuple[int, ...] = ()
    ) -> Matrix:
        """Draw from the Haar measure: QR with a positive diagonal (Mezzadri, 2007)."""
        shape = (*batch, self.size, self.size)
        drawn = torch.randn(
            shape, generator=generator, device=generator.device, dtype=torch.float64
        )
        q, r = torch.linalg.qr(drawn)
        signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q)
        return (q * signs[..., None, :]).to(like)

    @property
    def dimension(self) -> int:
        """N (n - 1) / 2."""
        return self.size * (self.size - 1) // 2

    @property
    def log_components(self) -> float:
        """Rotations and reflections."""
        return math.log(2)

    def nearest(self, c: Float[Tensor, "*batch n n"]) -> Matrix:
        """Solve the orthogonal Procrustes problem (Schoenemann, 1966): U V^T of the SVD."""
        u, _, v = torch.linalg.svd(c)
        return u @ v + 0.0

    def support(self, c: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch"]:
        """Return the nuclear norm."""
        return torch.linalg.svdvals(c).sum(-1)


@final
@dataclass(frozen=True)
class GeneralLinear(MatrixGroup, NoncompactGroup[Tensor]):
    """Invertible matrices GL(n); a symmetry where two linear maps follow each other.

    Queries and keys of a head, its values and outputs, low-rank factors (LoRA), linear networks.

    Examples
    --------
    >>> GeneralLinear(4).residual
    Orthogonal(size=4)
    """

    size: int

    def inverse(self, g: Matrix) -> Matrix:
        """Return the inverse matrix."""
        return torch.linalg.inv(g.double()).to(g.dtype)

    def random(
        self, *, generator: torch.Generator, like: Tensor, batch: tuple[int, ...] = ()
    ) -> Matrix:
        """Draw Q exp(N(0, 1/4)) Q' with Haar rotations: singular values around one."""
        rotations = Orthogonal(self.size)
        double = torch.zeros((), dtype=torch.float64)
        left, right = (
            rotations.random(generator=generator, like=double, batch=batch) for _ in range(2)
        )
        logs = torch.randn(
            *batch, self.size, generator=generator, device=generator.device, dtype=torch.float64
        )
        return (left * (logs / 2).exp()[..., None, :] @ right).to(like)

    @property
    def dimension(self) -> int:
        """n^2."""
        return self.size**2

    @property
    def log_components(self) -> float:
        """Matrices of positive and of negative determinant."""
        return math.log(2)

    @property
    def residual(self) -> Orthogonal:
        """The rotations: they keep both norms."""
        return Orthogonal(self.size)

    def balance_factors(
        self, up: Float[Tensor, "*batch n a"], down: Float[Tensor, "*batch n b"]
    ) -> tuple[Float[Tensor, "*batch n a"], Float[Tensor, "*batch n b"]]:
        r"""Return (A U, A^-T V) of least norm, for the A next to the identity.

        :math:`U^T V` keeps its value; balanced factors have equal Gram matrices,
        :math:`U U^T = V V^T`. QR of both and an SVD of the n x n core: the a x b product is never
        formed. Directions that the product does not see are put to zero, the limit of the orbit.

        Examples
        --------
        >>> one = torch.ones(1, 1)
        >>> GeneralLinear(1).balance_factors(one, 16 * one)
        (tensor([[4.]]), tensor([[4.]]))
        """
        n = self.size
        q_up, r_up = torch.linalg.qr(_padded(up, n).mT)
        q_down, r_down = torch.linalg.qr(_padded(down, n).mT)
        x, s, y = torch.linalg.svd(r_up @ r_down.mT)
        floor = tolerance(up.dtype).eps * n * s[..., :1]
        seen = s > floor
        root = torch.where(seen, s, torch.ones_like(s)).sqrt() * seen
        left, right = x * root[..., None, :], y.mT * root[..., None, :]
        # Of all balanced factors the ones closest to what was given: idempotent, no jumps.
        back = r_up.mT @ left + r_down.mT @ right
        u, _, v = torch.linalg.svd(back)
        turn = u @ v
        new_up = turn @ left.mT @ q_up.mT
        new_down = turn @ right.mT @ q_down.mT
        return new_up[..., : up.shape[-1]], new_down[..., : down.shape[-1]]


def _padded(x: Tensor, n: int) -> Tensor:
    """Append columns of zeros until there are n: QR then gives square factors."""
    missing = n - x.shape[-1]
    return x if missing <= 0 else torch.nn.functional.pad(x, (0, missing))
