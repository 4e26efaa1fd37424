"""Gradient descent whose steps move along when the networks move on their orbits."""

from collections.abc import Iterable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from symflow.groups import Group, monomial
from symflow.numerics import tolerance

_DECAY = (0.9, 0.999)


def mixes(group: Group[Any]) -> bool:
    """Whether a group mixes coordinates, and does not only permute, flip and scale them.

    Examples
    --------
    >>> from symflow.groups import Orthogonal, Permutation
    >>> mixes(Orthogonal(2)), mixes(Permutation(2))
    (True, False)
    """
    return monomial(group, group.identity(like=torch.zeros(()))) is None


@final
class CovariantAdam:
    """Adam (Kingma and Ba, 2015), coordinate by coordinate only where these do not mix.

    Adam divides every coordinate by the size of its own gradient: after a rotation it takes another
    way. Tensors whose coordinates are mixed are divided by the root mean square of theirs together,
    which a rotation does not change.

    Parameters
    ----------
    plain
        Tensors to descend on with Adam.
    mixed
        Tensors to descend on whose coordinates mix, and how many dimensions, from the last, do.
    learning_rate
        Length of a step.

    Examples
    --------
    >>> x = torch.tensor([[3.0, 4.0]], requires_grad=True)
    >>> descent = CovariantAdam([], [(x, 1)], 0.5)
    >>> x.square().sum().backward()
    >>> descent.step()
    >>> x.detach() / x.norm().detach()    # straight towards zero
    tensor([[0.6000, 0.8000]])
    """

    def __init__(
        self, plain: Iterable[Tensor], mixed: Sequence[tuple[Tensor, int]], learning_rate: float
    ) -> None:
        plain = list(plain)
        self.adam = torch.optim.Adam(plain, learning_rate) if plain else None
        self.mixed = mixed
        self.learning_rate = learning_rate
        self.count = 0
        self.moments = [(torch.zeros_like(x), torch.zeros((), dtype=x.dtype)) for x, _ in mixed]

    def step(self) -> None:
        """Take a step against the gradients, and forget them."""
        if self.adam is not None:
            self.adam.step()
            self.adam.zero_grad()
        self.count += 1
        for k, (x, dims) in enumerate(self.mixed):
            if x.grad is None:
                continue
            first, second = self.moments[k]
            together = x.grad.square().mean(tuple(range(-dims, 0)), keepdim=True)
            first = _DECAY[0] * first + (1 - _DECAY[0]) * x.grad
            second = _DECAY[1] * second + (1 - _DECAY[1]) * together
            self.moments[k] = first, second
            size = (second / (1 - _DECAY[1] ** self.count)).sqrt() + tolerance(x.dtype).eps
            with torch.no_grad():
                x -= self.learning_rate * first / (1 - _DECAY[0] ** self.count) / size
            x.grad = None
