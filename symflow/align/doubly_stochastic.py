"""Doubly stochastic matrices by Sinkhorn's iteration, differentiated at its fixed point."""

from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor


def sinkhorn(logits: Float[Tensor, "*batch n n"], iterations: int = 50) -> Float[Tensor, "*#b n n"]:
    """Scale rows and columns of exp(logits) until all sum to one, in the log domain.

    Sinkhorn and Knopp (1967). The derivative is that of the fixed point (Eisenberger et al., 2022):
    its adjoint equations are solved by the same number of alternating steps, so that memory does
    not grow with ``iterations``. Columns sum to one exactly, rows as far as the iteration got.

    Examples
    --------
    >>> sinkhorn(torch.zeros(2, 2))
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]])
    """
    return _Sinkhorn.apply(logits, iterations)


@final
class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, iterations: int) -> Tensor:
        scaled = logits
        for _ in range(iterations):
            scaled = scaled - scaled.logsumexp(-1, keepdim=True)
            scaled = scaled - scaled.logsumexp(-2, keepdim=True)
        p = scaled.exp()
        ctx.save_for_backward(p)
        ctx.iterations = iterations
        return p

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Project on the tangent space of the polytope: p * (grad - a - b), a and b multipliers.

        The sums of p * (grad - a_i - b_j) over rows and over columns vanish: p b + a = r and
        p^T a + b = c, with r and c the sums of p * grad.
        """
        (p,), (grad,) = ctx.saved_tensors, grads
        weighted = p * grad
        r, c = weighted.sum(-1, keepdim=True), weighted.sum(-2)[..., None]
        b = torch.zeros_like(c)
        for _ in range(ctx.iterations):
            a = r - p @ b
            b = c - p.mT @ a
        a = r - p @ b
        return weighted - p * (a + b.mT), None
