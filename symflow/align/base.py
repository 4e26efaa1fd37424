"""What every aligner takes and returns."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.arch import Element, Symmetry
from symflow.errors import NotIsometricError
from symflow.groups import CompactGroup


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


class Aligner(ABC):
    """Searches the compact group for the element that brings ``w1`` closest to ``w0``."""

    @abstractmethod
    def __call__(
        self, symmetry: Symmetry, w0: Float[Tensor, "*#batch D"], w1: Float[Tensor, "*#batch D"]
    ) -> Alignment:
        """Align ``w1`` to ``w0``; batch dimensions broadcast, and every pair is solved."""


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
    counted = sum(leaf.size for leaf in symmetry.leaves if leaf.learnable)
    return torch.linalg.vecdot(w0[..., :counted], w1[..., :counted])
