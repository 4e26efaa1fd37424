"""Straight-through estimation: gradient descent on weights, evaluated at their matching."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.align import hull
from symflow.align.base import Found, PairedAligner, Status, objective, where
from symflow.align.descent import CovariantAdam, mixes
from symflow.align.sinkhorn import Loss, evaluate
from symflow.align.weight_matching import WeightMatching
from symflow.arch import Symmetry


@final
@dataclass(frozen=True)
class StraightThrough(PairedAligner):
    """Seek the element for which a loss in the middle of both networks is least.

    A copy of the first network's weights is trained. In the forward pass it is projected on the
    second network's orbit by weight matching; the gradient of the loss at the midpoint goes back to
    the copy as if nothing had been projected (Ainsworth et al., 2023; Bengio et al., 2013). The
    element with the least loss is kept.

    Parameters
    ----------
    loss
        Takes weights (N, D), gives (N,), differentiable, and does not change along orbits: the loss
        of the networks on data, say.
    steps, learning_rate
        Of gradient descent with Adam; rates are relative to the root mean square of the weights.

    Notes
    -----
    The first step is weight matching itself, so the loss is never greater than there. The inner
    product is reported but not maximised.

    Examples
    --------
    >>> import symflow
    >>> arch, generator = symflow.mlp([3, 8, 2], "gelu"), torch.Generator().manual_seed(0)
    >>> w, x = torch.randn(2, arch.dimension, generator=generator), torch.eye(3)
    >>> aligner = StraightThrough(lambda w: arch.apply(w, x).square().sum((1, 2)), steps=5)
    >>> aligner(arch.symmetry, w[0], w[1]).losses.shape
    torch.Size([5])
    """

    loss: Loss
    steps: int = 40
    learning_rate: float = 0.05

    def search(
        self, symmetry: Symmetry, w0: Float[Tensor, "N D"], w1: Float[Tensor, "N D"]
    ) -> Found:
        """Match, take a step, match again from there; O(steps) of weight matching and the loss."""
        element = WeightMatching()(symmetry, w0, w1).element
        kept, least = element, w1.new_full((len(w1),), torch.inf)
        size = w0.square().mean(1, keepdim=True).sqrt()
        turned = {a.name for a in symmetry.axes if mixes(a.group)}
        losses: list[Tensor] = []
        with torch.enable_grad():
            drifts = [w0.new_zeros(len(w0), x.size).requires_grad_() for x in symmetry.leaves]
            pairs = list(zip(symmetry.leaves, drifts, strict=True))
            descent = CovariantAdam(
                [drift for leaf, drift in pairs if not turned & set(leaf.axes)],
                [(drift, 1) for leaf, drift in pairs if turned & set(leaf.axes)],
                self.learning_rate,
            )
            for k in range(max(self.steps, 1)):
                copy = w0 + size * torch.cat(drifts, 1)
                if k > 0:
                    element = hull.polish(symmetry, copy.detach(), w1, element).element
                projected = copy + (symmetry.act(element, w1) - copy.detach())
                loss = evaluate(self.loss, (w0 + projected) / 2)
                losses.append(loss.detach())
                falls = losses[-1] < least
                kept = {name: where(falls, g, kept[name]) for name, g in element.items()}
                least = torch.where(falls, losses[-1], least)
                loss.sum().backward()
                descent.step()
        reached = objective(symmetry, w0, symmetry.act(kept, w1))
        return Found(kept, reached[None], Status.NOT_POLISHED, torch.stack(losses))
