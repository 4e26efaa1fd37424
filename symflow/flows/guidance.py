"""Guidance: bending samples towards networks of low loss."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.arch import InputCoordinates
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
        self,
        x: Float[Tensor, "B size"],
        decode: Callable[[Tensor], Tensor],
        chart: InputCoordinates | None = None,
    ) -> Float[Tensor, "B size"]:
        """Return the additional velocity at states ``x``; ``decode`` makes weights of them.

        With a chart, ``decode`` makes its coordinates, and steps are those of gradient descent on
        the weights, seen in the chart. Its own gradient would be stiff on data unlike its inputs:
        directions that these hardly excite are stretched.

        Raises
        ------
        ShapeError
            If the loss is not one number for each network.
        """
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            c = decode(leaf)
            w = c if chart is None else chart.decode(c)
            losses = losses_of(self.loss, w, "the loss of a guidance")
            if chart is None:
                (gradient,) = torch.autograd.grad(losses.sum(), leaf)
            else:
                (by_weights,) = torch.autograd.grad(losses.sum(), w, retain_graph=True)
                (gradient,) = torch.autograd.grad(c, leaf, chart.encode(by_weights))
        return -self.strength * gradient


def losses_of(
    loss: Callable[[Tensor], Tensor], w: Float[Tensor, "B D"], name: str
) -> Float[Tensor, " B"]:
    """Return the loss of each network.

    Raises
    ------
    ShapeError
        If it is not one number for each.

    Examples
    --------
    >>> losses_of(lambda w: (w**2).sum(-1), torch.ones(2, 3), "the loss")
    tensor([3., 3.])
    """
    losses = loss(w)
    found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
    if found != (len(w),):
        raise ShapeError(
            f"{name} must return one number for each network, shape (B,) = ({len(w)},), got "
            f"{found}: do not average over the networks"
        )
    return losses
