"""The table of tolerances, and the few numerically delicate functions everything else uses.

This is the only place in symflow with small literal constants: a tolerance is looked up here by
dtype, never typed where it is used.
"""

import math
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.errors import ShapeError


@final
@dataclass(frozen=True)
class Tolerance:
    """What "equal" means in one floating point format.

    Attributes
    ----------
    eps
        Unit roundoff of the format (spacing of the numbers around one).
    close
        Relative error allowed between two routes to the same number.
    symmetry
        Relative change of a network's output that a true symmetry may cause by rounding.
    angle
        Angle (radians) below which ``sin(x) / x`` is replaced by its series.
    antipodal
        Distance of an angle from pi below which two directions count as antipodal.
    converged
        Relative change at which an iteration stops.
    gain
        Relative rise of an objective that counts as progress and not as rounding.

    Examples
    --------
    >>> tolerance(torch.float64).close < tolerance(torch.float32).close
    True
    """

    eps: float
    close: float
    symmetry: float
    angle: float
    antipodal: float
    converged: float
    gain: float


_TABLE = {
    torch.float64: Tolerance(2.3e-16, 1e-9, 1e-8, 1e-8, 1e-7, 1e-13, 1e-12),
    torch.float32: Tolerance(1.2e-7, 1e-4, 1e-3, 1e-6, 1e-3, 1e-6, 1e-6),
    torch.bfloat16: Tolerance(7.9e-3, 3e-2, 1e-1, 1e-2, 1e-1, 1e-2, 1e-2),
    torch.float16: Tolerance(9.8e-4, 5e-3, 2e-2, 1e-3, 3e-2, 1e-3, 1e-3),
}

# A variance is taken away from zero by this before its root divides (as in BatchNorm and Adam).
VARIANCE_FLOOR = 1e-8


def tolerance(dtype: torch.dtype) -> Tolerance:
    """Look up the tolerances of a floating point format.

    Parameters
    ----------
    dtype
        ``torch.float64``, ``float32``, ``bfloat16`` or ``float16``.

    Raises
    ------
    ShapeError
        If ``dtype`` is not one of these.

    Examples
    --------
    >>> tolerance(torch.float32).angle
    1e-06
    """
    if dtype not in _TABLE:
        raise ShapeError(
            f"weights must be floating point ({', '.join(map(str, _TABLE))}); got {dtype}"
        )
    return _TABLE[dtype]


def norm(x: Float[Tensor, "*#shape n"], *, keepdim: bool = False) -> Tensor:
    """Euclidean norm of the last dimension; its gradient at zero is zero, not NaN.

    Right wherever it can be represented: where the squares would leave the range of the format, the
    row is multiplied by a power of two before, which rounds nothing.

    Examples
    --------
    >>> norm(torch.tensor([3.0, 4.0])), norm(torch.tensor([3e-30, 4e-30]))
    (tensor(5.), tensor(5.0000e-30))
    """
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=keepdim)
    if _in_range(length) or x.shape[-1] == 0:
        return length
    factor = power_of_two(x)
    length = torch.linalg.vector_norm(x * factor, dim=-1, keepdim=True) / factor
    return length if keepdim else length.squeeze(-1)


def unit(x: Float[Tensor, "*#shape n"]) -> Float[Tensor, "*#shape n"]:
    """Divide by the norm of the last dimension; a zero row stays zero.

    Examples
    --------
    >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    if x.shape[-1] > 0 and not _in_range(length):
        x = x * power_of_two(x)  # the direction stays, and so does its gradient
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(length > 0, length, torch.ones_like(length))


def _in_range(length: Tensor) -> bool:
    """Whether norms come from squares that neither overflowed nor lost digits to underflow.

    It is asked of the norms, of which there are few, so that the usual case costs nothing.
    """
    info = torch.finfo(length.dtype)
    least, greatest = (info.tiny / info.eps) ** 0.5, info.max**0.5
    length = length.detach()
    return bool(((length >= least) & (length <= greatest)).all())


def power_of_two(x: Tensor) -> Tensor:
    """Return the power of two, for each row, that brings its greatest entry next to one.

    To multiply by it rounds nothing; afterwards the squares of what matters can be represented.

    Examples
    --------
    >>> power_of_two(torch.tensor([[3.0, 0.1], [0.0, 0.0]]))
    tensor([[0.2500],
            [1.0000]])
    """
    greatest = x.detach().abs().amax(-1, keepdim=True)
    exponent = torch.frexp(greatest.double()).exponent
    limit = -math.frexp(torch.finfo(x.dtype).tiny)[1]  # both the power and its inverse are normal
    return torch.pow(2.0, -exponent.clamp(-limit, limit).double()).to(x.dtype)


def angle(u: Float[Tensor, "*#shape n"], v: Float[Tensor, "*#shape n"]) -> Float[Tensor, "*#shape"]:
    r"""Angle between unit vectors, :math:`2\,\mathrm{atan2}(|u - v|, |u + v|)`.

    Accurate at every angle (Kahan, 2006): ``acos(<u, v>)`` loses half of the digits near 0 and pi,
    and ``angle(u, u)`` is exactly 0 here. Zero vectors are at angle zero from each other.

    Examples
    --------
    >>> u = torch.tensor([1.0, 0.0])
    >>> angle(u, u), angle(u, -u)
    (tensor(0.), tensor(3.1416))
    """
    return 2 * torch.atan2(norm(u - v), norm(u + v))


def pairwise_angle(
    u: Float[Tensor, "*#batch n d"], v: Float[Tensor, "*#batch m d"]
) -> Float[Tensor, "*#batch n m"]:
    r"""Angles of all pairs of rows, of any lengths; zero rows are at angle zero from each other.

    Chords come from inner products in float64, so nothing of size n m d is made. Squares of angles
    are right to a few units of roundoff, angles near zero to the root of float64's.

    Examples
    --------
    >>> pairwise_angle(torch.eye(2), torch.tensor([[2.0, 0.0]]))
    tensor([[0.0000],
            [1.5708]])
    """
    a, b = unit(u.to(torch.float64)), unit(v.to(torch.float64))
    twice = 2 * a @ b.mT
    squares = a.square().sum(-1)[..., :, None] + b.square().sum(-1)[..., None, :]
    near, far = (squares - twice).clamp_min(0), (squares + twice).clamp_min(0)
    return (2 * torch.atan2(near.sqrt(), far.sqrt())).to(u.dtype)


def stretched_arc(theta: Tensor) -> Tensor:
    """Compute ``theta / sin(theta)``, and one at zero; large, but finite, near pi.

    Examples
    --------
    >>> stretched_arc(torch.tensor([0.0, torch.pi / 2]))
    tensor([1.0000, 1.5708])
    """
    least = tolerance(theta.dtype).angle
    return torch.where(theta < least, torch.ones_like(theta), theta / theta.sin().clamp_min(least))


def sinc(x: Tensor) -> Tensor:
    """Compute ``sin(x) / x``, and one at zero, with finite gradients everywhere.

    Examples
    --------
    >>> sinc(torch.tensor(0.0))
    tensor(1.)
    """
    small = x.abs() < tolerance(x.dtype).angle
    safe = torch.where(small, torch.ones_like(x), x)
    return torch.where(small, 1 - x * x / 6, torch.sin(safe) / safe)
