"""What a transformer does with the states of all edges, with hand-written gradients.

These states are by far its largest tensors, and plain automatic differentiation reads and writes
them several dozen times a layer. Here the networks of a batch are taken a few at a time, so that
intermediate values stay in the cache, and little but the states themselves is kept for the backward
pass. Where the gradients themselves are to be differentiated, the plain formulas take over.

Edges between n and m nodes are (B, n, m, 2, d): state 0 is the edge seen from its earlier node i,
state 1 the edge seen from its later node j.
"""

from collections.abc import Callable, Iterator
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function

_CHUNK = 2**16  # numbers: a handful of such tensors fit into the second cache


@final
class EdgeScores(Function):
    """Scores e . (M e + a_i + b_j) of edges, from e, M transposed (d, d) and the terms of nodes."""

    @staticmethod
    def forward(
        ctx: Any,
        e: Float[Tensor, "B n m 2 d"],
        form: Float[Tensor, "d d"],
        a: Float[Tensor, "B n 2 d"],
        b: Float[Tensor, "B m 2 d"],
    ) -> Float[Tensor, "B n m 2"]:
        """Return one number for each state."""
        ctx.save_for_backward(e, form, a, b)
        scores = e.new_empty(e.shape[:-1])
        for x, p, q, out in _chunks(e, a, b, scores):
            relation = (x @ form).add_(p[:, :, None]).add_(q[:, None])
            out.copy_(relation.mul_(x).sum(-1))
        return scores

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the gradients; that of e . M e is (M + M') e."""
        if torch.is_grad_enabled():
            return _differentiable(plain_scores, ctx, grads)
        e, form, a, b = ctx.saved_tensors
        to_e, to_a, to_b = (torch.empty_like(x) for x in (e, a, b))
        to_form, twice = torch.zeros_like(form), form + form.T
        for x, p, q, grad, x_, p_, q_ in _chunks(e, a, b, grads[0][..., None], to_e, to_a, to_b):
            relation = (x @ twice).add_(p[:, :, None]).add_(q[:, None])
            torch.mul(relation, grad, out=x_)
            weighted = torch.mul(x, grad, out=relation)
            p_.copy_(weighted.sum(2))
            q_.copy_(weighted.sum(1))
            to_form.addmm_(_rows(x).T, _rows(weighted))
        return to_e, to_form, to_a, to_b


@final
class EdgeSums(Function):
    """Sums over a node's edges of alpha (G e * v) and of alpha e, v being the value at the far end.

    From e, G (d, d), alpha (B, n, m, 2), and the values of both layers, (B, n, d) and (B, m, d).
    """

    @staticmethod
    def forward(
        ctx: Any,
        e: Float[Tensor, "B n m 2 d"],
        gate: Float[Tensor, "d d"],
        alpha: Float[Tensor, "B n m 2"],
        v: Float[Tensor, "B n d"],
        w: Float[Tensor, "B m d"],
    ) -> tuple[Tensor, ...]:
        """Return both sums at the earlier nodes, then both at the later ones."""
        ctx.save_for_backward(e, gate, alpha, v, w)
        found = tuple(torch.empty_like(x) for x in (v, v, w, w))
        for x, share, p, q, *out in _chunks(e, alpha[..., None], v, w, *found):
            y = (x @ gate.T).mul_(share)
            ahead, back = y.unbind(-2)
            out[0].copy_(ahead.mul_(q[:, None]).sum(2))
            out[2].copy_(back.mul_(p[:, :, None]).sum(1))
            ahead, back = torch.mul(x, share, out=y).unbind(-2)
            out[1].copy_(ahead.sum(2))
            out[3].copy_(back.sum(1))
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the gradients.

        With r = G' (v * grad of the first sum) + grad of the second, that of e is alpha r, and that
        of alpha is e . r.
        """
        if torch.is_grad_enabled():
            return _differentiable(plain_sums, ctx, grads)
        e, gate, alpha, v, w = ctx.saved_tensors
        to_e, to_alpha, to_v, to_w = (torch.empty_like(x) for x in (e, alpha, v, w))
        to_gate, share = torch.zeros_like(gate), alpha[..., None]
        for x, part, p, q, *given, x_, part_, p_, q_ in _chunks(
            e, share, v, w, *grads, to_e, to_alpha, to_v, to_w
        ):
            values, mixed = given[0][:, :, None], given[1][:, :, None]  # at the earlier nodes
            values_, mixed_ = given[2][:, None], given[3][:, None]  # at the later ones
            passed = torch.stack([q[:, None] * values, p[:, :, None] * values_], dim=-2)
            r = torch.matmul(passed, gate)
            r[..., 0, :] += mixed
            r[..., 1, :] += mixed_
            torch.mul(r, part, out=x_)
            part_.copy_(r.mul_(x).sum(-1))
            to_gate.addmm_(_rows(passed.mul_(part)).T, _rows(x))
            ahead, back = torch.matmul(x, gate.T, out=r).mul_(part).unbind(-2)
            q_.copy_(ahead.mul_(values).sum(1))
            p_.copy_(back.mul_(values_).sum(2))
        return to_e, to_gate, to_alpha, to_v, to_w


def plain_scores(e: Tensor, form: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """What :class:`EdgeScores` computes, in one line."""
    return (e * (e @ form + a[:, :, None] + b[:, None])).sum(-1)


def plain_sums(e: Tensor, gate: Tensor, alpha: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """What :class:`EdgeSums` computes, in a few lines."""
    (y, y_), (x, x_) = ((z * alpha[..., None]).unbind(-2) for z in (e @ gate.T, e))
    return (y * w[:, None]).sum(2), x.sum(2), (y_ * v[:, :, None]).sum(1), x_.sum(1)


def _differentiable(plain: Callable[..., Any], ctx: Any, grads: tuple[Any, ...]) -> Any:
    """Gradients by automatic differentiation, for those who differentiate them again."""
    needed = ctx.needs_input_grad
    inputs = [x for x, need in zip(ctx.saved_tensors, needed, strict=True) if need]
    outputs = plain(*ctx.saved_tensors)
    found = iter(torch.autograd.grad(outputs, inputs, grads, create_graph=True))
    return tuple(next(found) if need else None for need in needed)


def _chunks(e: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors along the batch so that edge states of a chunk stay in the cache."""
    size = max(1, _CHUNK * len(e) // max(1, e.numel()))
    return zip(*(x.split(size) for x in (e, *others)), strict=True)


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2)
