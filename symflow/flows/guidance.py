"""Guidance: bending samples towards networks of low loss."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.errors import ShapeError


@final
@dataclass(frozen=True)
class Guidance:
    """Adds minus ``strength`` times the gradient of a loss to the velocity.

    Parameters
    ----------
    loss
        A differentiable function of weights (B, D) that returns one number for each network (B,).
    strength
        The factor lambda.

    Examples
    --------
    >>> guide = Guidance(lambda w: (w**2).sum(-1), 0.5)
    >>> guide.push(torch.ones(1, 3), lambda x: x)
    tensor([[-1., -1., -1.]])
    """

    loss: Callable[[Tensor], Tensor]
    strength: float = 0.1

    def push(
        self, x: Float[Tensor, "B size"], decode: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "B size"]:
        """Return the additional velocity at states ``x``; ``decode`` makes weights of them.

        Raises
        ------
        ShapeError
            If the loss is not one number for each network.
        """
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            losses = self.loss(decode(leaf))
            found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            if found != (len(x),):
                raise ShapeError(
                    "the loss of a guidance must return one number for each network, shape "
                    f"(B,) = ({len(x)},), got {found}: do not average over the networks"
                )
            (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        return -self.strength * gradient
