"""Couplings: which start is paired with which end during training."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from symflow.errors import ShapeError, StateError
from symflow.groups import assignment

States = Float[Tensor, "B size"]


class Coupling(ABC):
    """A joint law of starts and ends whose marginals are the source and the trained networks."""

    @abstractmethod
    def pair(
        self,
        draw: Callable[[int], States],
        starts: States | None,
        ends: States,
        align: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[States, States]:
        """Pair a batch of ends.

        Parameters
        ----------
        draw
            Draws fresh starts from the source.
        starts
            The initial weights of the runs that the ends come from, if they were recorded.
        ends
            Trained networks of the batch.
        align
            ``align(x0, x1)`` moves each x1 next to its x0 along its orbit (broadcasts).

        Returns
        -------
        tuple
            Starts and ends, pair by pair, in the order of the ends given (others derive from
            :class:`Reordering`).
        """

    @abstractmethod
    def keeps_runs(self) -> bool:
        """Whether each end always meets its own recorded start, so that pairs never change."""


class Reordering(Coupling, ABC):
    """A coupling that returns the ends in another order than it is given them, and says in which.

    What belongs to an end (its condition) must find it again.
    """

    @abstractmethod
    def match(
        self,
        draw: Callable[[int], States],
        starts: States | None,
        ends: States,
        align: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[States, States, Int[Tensor, " B"]]:
        """Return the pairs, as :meth:`pair` does, and which of the ends given each end is."""

    def pair(
        self,
        draw: Callable[[int], States],
        starts: States | None,
        ends: States,
        align: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[States, States]:
        """Return the pairs of :meth:`match`."""
        return self.match(draw, starts, ends, align)[:2]


@final
@dataclass(frozen=True)
class Independent(Coupling):
    """Every end with a fresh draw from the source.

    Examples
    --------
    >>> ends = torch.ones(2, 3)
    >>> x0, x1 = Independent().pair(lambda n: torch.zeros(n, 3), None, ends, lambda a, b: b)
    >>> x0.sum(), x1.sum()
    (tensor(0.), tensor(6.))
    """

    def pair(
        self,
        draw: Callable[[int], States],
        starts: States | None,
        ends: States,
        align: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[States, States]:
        """Draw as many starts as there are ends."""
        return draw(len(ends)), ends

    def keeps_runs(self) -> bool:
        """Return False."""
        return False


@final
@dataclass(frozen=True)
class RunCoupling(Coupling):
    """Each run's recorded initial weights with its own trained weights.

    Training moves weights little, and a run keeps its own order of neurons: the pairs need no
    alignment, and the path to learn is the short one that training took.

    Examples
    --------
    >>> ends, starts = torch.ones(2, 3), torch.zeros(2, 3)
    >>> RunCoupling().pair(torch.zeros, starts, ends, lambda a, b: b)[0] is starts
    True
    """

    def pair(
        self,
        draw: Callable[[int], States],
        starts: States | None,
        ends: States,
        align: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[States, States]:
        """Return the recorded starts."""
        if starts is None:
            raise StateError(
                "run coupling needs the initial weights of every run: train the zoo with "
                "symflow.zoo.train, or use coupling=Independent()"
            )
        return starts, ends

    def keeps_runs(self) -> bool:
        """Return True."""
        return True


@final
@dataclass(frozen=True)
class MiniBatchOT(Reordering):
    """Optimal transport within the batch: the assignment of least squared distance, no repeats.

    Parameters
    ----------
    metric
        ``"ambient"``: squared distance of the states. ``"quotient"``: after aligning every end to
        every start; the end is moved by the minimising element (equivariant optimal transport:
        Klein et al., 2023, for molecules). The latter costs B^2 alignments.

    Examples
    --------
    >>> starts, ends = torch.tensor([[0.0], [10.0]]), torch.tensor([[9.0], [1.0]])
    >>> MiniBatchOT().pair(lambda n: starts, None, ends, lambda a, b: b)[1].squeeze(-1)
    tensor([1., 9.])
    """

    metric: str = "ambient"

    def __post_init__(self) -> None:
        if self.metric not in ("ambient", "quotient"):
            raise ShapeError(f"metric must be 'ambient' or 'quotient', got {self.metric!r}")

    def match(
        self,
        draw: Callable[[int], States],
        starts: States | None,
        ends: States,
        align: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[States, States, Int[Tensor, " B"]]:
        """Solve the assignment exactly, O(B^3)."""
        x0 = draw(len(ends))
        if self.metric == "ambient":
            columns = torch.as_tensor(assignment(-torch.cdist(x0, ends).square()))
            return x0, ends[columns], columns
        moved = align(x0[:, None], ends[None])
        columns = torch.as_tensor(assignment(-(x0[:, None] - moved).square().sum(-1)))
        return x0, moved[torch.arange(len(ends)), columns], columns

    def keeps_runs(self) -> bool:
        """Return False."""
        return False
