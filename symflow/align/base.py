"""What every aligner takes and returns."""

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.arch import Element, Symmetry
from symflow.errors import NotIsometricError
from symflow.groups import CompactGroup, map_element
from symflow.numerics import tolerance


@final
class Status(Enum):
    """How a solver ended; the value is the message.

    Examples
    --------
    >>> Status.CONVERGED.value
    'a fixed point: no single axis can be improved'
    """

    CONVERGED = "a fixed point: no single axis can be improved"
    SWEEP_LIMIT = "the sweep limit was reached before a fixed point"
    NOT_POLISHED = "found by another criterion: a single axis may still be improved"


@final
@dataclass(frozen=True, eq=False)
class Alignment:
    """The element that brings one network close to another, and how it was found.

    Attributes
    ----------
    element
        One element for each axis; it acts on the second network.
    weights
        The second network moved by it (*batch, D).
    objective
        Inner product of the learnable coordinates of the first network with ``weights`` (*batch,).
    history
        Objective after each sweep (sweeps, *batch), of the best start.
    status
        How the solver ended, over the whole batch.
    seconds
        Wall-clock time.
    objective_bound
        No element has a greater objective than this (*batch,), or None if not asked for.
    losses
        For aligners that descend on a loss, what it was at each step (steps, *batch); else None.

    Examples
    --------
    >>> import symflow
    >>> arch = symflow.mlp([3, 4, 2], "tanh")
    >>> w = torch.randn(2, arch.dimension, generator=torch.Generator().manual_seed(0))
    >>> symflow.WeightMatching()(arch.symmetry.compact, w[0], w[1]).status.name
    'CONVERGED'
    """

    element: Element
    weights: Float[Tensor, "*#batch D"]
    objective: Float[Tensor, "*#batch"]
    history: Float[Tensor, "sweeps *batch"]
    status: Status
    seconds: float
    objective_bound: Float[Tensor, "*#batch"] | None = None
    losses: Float[Tensor, "steps *batch"] | None = None


class Aligner(ABC):
    """Searches the compact group for the element that brings ``w1`` closest to ``w0``."""

    @abstractmethod
    def __call__(
        self, symmetry: Symmetry, w0: Float[Tensor, "*#batch D"], w1: Float[Tensor, "*#batch D"]
    ) -> Alignment:
        """Align ``w1`` to ``w0``; batch dimensions broadcast, and every pair is solved."""


@final
@dataclass(frozen=True, eq=False)
class Found:
    """What a search over N pairs ends with, before it gets the shape of the batch.

    Attributes
    ----------
    element
        One element for each axis (N).
    history
        Objective after each sweep (sweeps, N); the last is that of ``element``.
    status
        How the search ended, over all pairs.
    losses
        What was descended on (steps, N), or None.
    weights
        The second networks moved by the element, if the search has them.
    """

    element: Element
    history: Float[Tensor, "sweeps N"]
    status: Status
    losses: Float[Tensor, "steps N"] | None = None
    weights: Float[Tensor, "N D"] | None = None

    def reshape(self, symmetry: Symmetry, w0: Tensor, w1: Tensor, *, seconds: float) -> "Alignment":
        """Return the result for weights (*batch, D) whose pairs, in order, are the N rows."""
        batch = broadcast(w0.shape[:-1], w1.shape[:-1])
        shaped = partial(_shaped, batch)
        element = {name: map_element(shaped, g) for name, g in self.element.items()}
        if self.weights is None or w1.requires_grad:
            weights = symmetry.act(element, w1.expand(*batch, w1.shape[-1]))
        else:
            weights = shaped(self.weights)
        losses = self.losses
        return Alignment(
            element=element,
            weights=weights,
            objective=objective(symmetry, w0, weights),
            history=self.history.reshape(len(self.history), *batch),
            status=self.status,
            seconds=seconds,
            losses=None if losses is None else losses.reshape(len(losses), *batch),
        )


def broadcast(a: torch.Size, b: torch.Size) -> torch.Size:
    """Return the common shape of two batches: at once where one is a part of the other.

    Examples
    --------
    >>> broadcast(torch.Size([]), torch.Size([3])), broadcast(torch.Size([2, 1]), torch.Size([3]))
    (torch.Size([3]), torch.Size([2, 3]))
    """
    return b if a in (b, ()) else torch.broadcast_shapes(a, b)


def _shaped(batch: torch.Size, part: Tensor) -> Tensor:
    return part.reshape((*batch, *part.shape[1:]))


class PairedAligner(Aligner):
    """An aligner that sees a batch as N pairs, one row each: it only has to ``search``."""

    @abstractmethod
    def search(
        self, symmetry: Symmetry, w0: Float[Tensor, "N D"], w1: Float[Tensor, "N D"]
    ) -> Found:
        """Align row by row; the symmetry is compact, the weights carry no gradient."""

    def __call__(
        self, symmetry: Symmetry, w0: Float[Tensor, "*#batch D"], w1: Float[Tensor, "*#batch D"]
    ) -> Alignment:
        """Align every pair of the broadcast batch."""
        require_compact(symmetry)
        began = time.perf_counter()
        batch = broadcast(w0.shape[:-1], w1.shape[:-1])
        left, right = (
            w.detach().expand(*batch, w.shape[-1]).reshape(-1, w.shape[-1]) for w in (w0, w1)
        )
        found = self.search(symmetry, left, right)
        return found.reshape(symmetry, w0, w1, seconds=time.perf_counter() - began)


def require_compact(symmetry: Symmetry) -> None:
    """Refuse groups over which a linear function has no maximum.

    Raises
    ------
    NotIsometricError
        If an axis has a non-compact group.
    """
    for axis in symmetry.axes:
        if not isinstance(axis.group, CompactGroup):
            raise NotIsometricError(
                f"axis {axis.name} has {axis.group}, over which alignment has no maximum: project "
                "on a section first and align under symmetry.compact, as symflow.Quotient does"
            )


def objective(
    symmetry: Symmetry, w0: Float[Tensor, "*#batch D"], w1: Float[Tensor, "*#batch D"]
) -> Float[Tensor, "*#batch"]:
    """Return the inner product of the learnable coordinates.

    Examples
    --------
    >>> import symflow
    >>> arch = symflow.mlp([1, 1, 1])
    >>> objective(arch.symmetry, torch.ones(4), torch.arange(4.0))
    tensor(6.)
    """
    counted = symmetry.num_parameters
    w0, w1 = w0[..., :counted], w1[..., :counted]
    if w0[..., 0].numel() == 1 and w0.dtype == w1.dtype and w1.ndim >= w0.ndim:
        return w1 @ w0.flatten()  # one network against all: no products are written down
    return torch.linalg.vecdot(w0, w1)


def where(keep: Tensor, element: Any, other: Any) -> Any:
    """Choose between two batched elements entry by entry; ``keep`` is (N,)."""
    return map_element(
        lambda e, o: torch.where(keep.reshape(-1, *(1,) * (e.ndim - 1)), e, o), element, other
    )


def better(first: Found, second: Found) -> Found:
    """Keep the better of two searches for each pair; the first unless the second really is.

    Examples
    --------
    >>> one = Found({}, torch.tensor([[1.0, 4.0]]), Status.CONVERGED)
    >>> better(one, Found({}, torch.tensor([[2.0, 3.0]]), Status.CONVERGED)).history
    tensor([[2., 4.]])
    """
    a, b = first.history, second.history
    keep = b[-1] - a[-1] <= tolerance(a.dtype).gain * a[-1].abs()
    length = max(len(a), len(b))
    a, b = (torch.cat([x, x[-1:].expand(length - len(x), -1)]) for x in (a, b))
    ends = [x.status for x, kept in ((first, keep), (second, ~keep)) if bool(kept.any())]
    worse = [s for s in ends if s is not Status.CONVERGED]
    moved = None
    if first.weights is not None and second.weights is not None:
        moved = where(keep, first.weights, second.weights)
    return Found(
        {name: where(keep, g, second.element[name]) for name, g in first.element.items()},
        torch.where(keep, a, b),
        worse[0] if worse else Status.CONVERGED,
        weights=moved,
    )
