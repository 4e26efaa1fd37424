"""Groups that act by permuting the coordinates of an axis."""

import importlib.util
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from symflow.errors import ShapeError
from symflow.groups.base import CompactGroup, along

Index = Int[Tensor, "*#batch n"]

# From this size on it pays to reduce a matrix before SciPy assigns it.
_WIDE = 48


class PermutingGroup(CompactGroup[Tensor]):
    """A subgroup of the permutations of ``size`` coordinates: (g x)_i = x_{indices(g)_i}."""

    @abstractmethod
    def indices(self, g: Tensor) -> Index:
        """Return, for each coordinate i of the result, the coordinate it is taken from."""

    def act(self, g: Tensor, x: Tensor, *, dim: int = -1, degree: int = 1) -> Tensor:
        """Permute ``x`` along ``dim``; every degree acts alike, as A^-T = A.

        Examples
        --------
        >>> from symflow import Permutation
        >>> Permutation(3).act(torch.tensor([2, 0, 1]), torch.tensor([10.0, 20.0, 30.0]))
        tensor([30., 10., 20.])
        """
        index = self.indices(g)
        if index.ndim == 1:
            along(index, x, dim)
            return x.index_select(dim, index)
        return torch.take_along_dim(x, along(index, x, dim), dim)


@final
@dataclass(frozen=True)
class Permutation(PermutingGroup):
    """The symmetric group S_n: an element is an index tensor (*batch, n).

    A symmetry of every hidden axis whose non-linearity acts on each unit alone.

    Examples
    --------
    >>> group = Permutation(3)
    >>> g = torch.tensor([2, 0, 1])
    >>> group.compose(g, group.inverse(g))
    tensor([0, 1, 2])
    """

    size: int

    def identity(self, *, like: Tensor) -> Index:
        """Return 0, 1, ..., n - 1."""
        return torch.arange(self.size, device=like.device)

    def compose(self, g: Index, h: Index) -> Index:
        """Return x -> g (h x): the index h[g]."""
        shape = torch.broadcast_shapes(g.shape, h.shape)
        return torch.take_along_dim(h.expand(shape), g.expand(shape), -1)

    def inverse(self, g: Index) -> Index:
        """Return the inverse permutation, in O(n)."""
        return invert(g)

    def random(
        self, *, generator: torch.Generator, like: Tensor, batch: tuple[int, ...] = ()
    ) -> Index:
        """Draw uniformly (Haar)."""
        keys = torch.rand(*batch, self.size, generator=generator, device=generator.device)
        return keys.argsort(-1).to(like.device)

    @property
    def log_components(self) -> float:
        """The logarithm of n!."""
        return math.lgamma(self.size + 1)

    def indices(self, g: Index) -> Index:
        """Return the element itself."""
        return g

    def nearest(self, c: Float[Tensor, "*batch n n"]) -> Index:
        """Solve the assignment problem exactly (Hungarian method), O(n^3) for each matrix.

        Examples
        --------
        >>> Permutation(2).nearest(torch.tensor([[0.0, 5.0], [1.0, 0.0]]))
        tensor([1, 0])
        """
        return assignment(c)

    def support(self, c: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch"]:
        """Return the value of the best assignment without forming a permutation matrix."""
        return c.gather(-1, assignment(c)[..., None]).squeeze(-1).sum(-1)


def invert(g: Index) -> Index:
    """Invert index permutations (*batch, n).

    Examples
    --------
    >>> invert(torch.tensor([2, 0, 1]))
    tensor([1, 2, 0])
    """
    positions = torch.arange(g.shape[-1], device=g.device).expand(g.shape)
    return torch.empty_like(g).scatter_(-1, g, positions)


def assignment(c: Float[Tensor, "*batch n m"]) -> Int[Tensor, "*batch n"]:
    """Choose for each row another column, with the greatest sum (``n <= m``).

    Square matrices go to lapx where it is installed (``pip install symflow[fast]``): Jonker and
    Volgenant's method (1987), faster than SciPy's ``linear_sum_assignment`` (Crouse, 2016), over a
    batch in as many threads as PyTorch has. SciPy takes the rest, one matrix after the other, and
    holds the interpreter lock. Both are exact; where several assignments are the best they may
    choose different ones.

    Raises
    ------
    ShapeError
        If an entry is NaN or infinite.

    Examples
    --------
    >>> assignment(torch.tensor([[1.0, 2.0, 9.0], [8.0, 3.0, 10.0]]))
    tensor([2, 0])
    """
    n, m = c.shape[-2:]
    matrices = c.detach().to("cpu")
    if c.ndim == 2 and n == m and has_lapx() and math.isfinite(float(matrices.sum())):
        return torch.from_numpy(_by_lapx(matrices[None])[0].astype(np.int64)).to(c.device)
    matrices = matrices.reshape(-1, n, m)
    # The sum tells, but where it overflows.
    if not (math.isfinite(float(matrices.sum())) or bool(matrices.isfinite().all())):
        bad = int((~matrices.isfinite()).sum())
        raise ShapeError(
            f"c must be finite, got {bad} NaN or infinite entries of {matrices.numel()}: leave out "
            "the networks they come from, as zoo.finite() does"
        )
    columns = (_by_lapx if n == m and has_lapx() else _by_scipy)(matrices)
    found = columns[0] if len(columns) == 1 else np.stack(columns or [np.zeros((0, n))])
    return torch.from_numpy(found.astype(np.int64)).reshape(c.shape[:-1]).to(c.device)


@cache
def has_lapx() -> bool:
    """Whether lapx is there: looked for once."""
    return importlib.util.find_spec("lap") is not None


@cache
def _lapx() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the solvers for one matrix and for many: lap looks them up anew at each import."""
    from lap import lapjvr, lapjvr_batch

    return lapjvr, lapjvr_batch


def _by_lapx(c: Float[Tensor, "N n n"]) -> Sequence[NDArray[np.int64]]:
    lapjvr, lapjvr_batch = _lapx()
    costs = (-c if c.dtype in (torch.float32, torch.float64) else -c.double()).numpy()
    if len(costs) == 1:
        return [lapjvr(costs[0], return_cost=False)[1]]
    return lapjvr_batch(costs, return_cost=False, n_threads=torch.get_num_threads())[1]


def _by_scipy(c: Float[Tensor, "N n m"]) -> Sequence[NDArray[np.int64]]:
    from scipy.optimize import linear_sum_assignment  # deferred: keeps `import symflow` light

    wide = c.shape[-2] == c.shape[-1] and c.shape[-1] >= _WIDE
    return [
        linear_sum_assignment((_reduced(x) if wide else x.double()).numpy(), maximize=True)[1]
        for x in c
    ]


def _reduced(c: Tensor) -> Tensor:
    """Take from each row, then from each column, its greatest entry.

    The same assignments are the best, and SciPy finds them with a third less work: most of its
    shortest paths have length zero.
    """
    x = c.to(torch.float64)
    x = x - x.amax(-1, keepdim=True)
    return x.sub_(x.amax(-2, keepdim=True))
