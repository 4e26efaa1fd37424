"""What a transformer does with the states of all edges, with hand-written gradients.

These states are by far its largest tensors, and plain automatic differentiation reads and writes
them several dozen times a layer. Here the networks of a batch are taken a few at a time, so that
intermediate values stay in the cache, and little but the states themselves is kept for the backward
pass. Where the gradients themselves are to be differentiated, the plain formulas take over.

Edges between n and m nodes are (B, n, m, 2, d): state 0 is the edge seen from its earlier node i,
state 1 the edge seen from its later node j.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

_CHUNK = 2**17  # numbers: a handful of such tensors fit into the second cache


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


@final
class EdgeUpdate(Function):
    """New states of edges: two residual maps with a LayerNorm behind each.

    The first map sees z = A (e_ij, e_ji) + s_i + t_j and is a linear one of its GELU; the second
    is a perceptron. A is (k d, 2 d), s (B, n, k d), t (B, m, k d); k = 1 gives states 0 alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        eps: float,
        e: Float[Tensor, "B n m 2 d"],
        both: Float[Tensor, "out twice"],
        s: Float[Tensor, "B n out"],
        t: Float[Tensor, "B m out"],
        *maps: Tensor,
    ) -> Float[Tensor, "B n m k d"]:
        """Return the new states; ``maps`` are weights and biases in the order of their use."""
        mix, mix_0, norm, norm_0, first, first_0, second, second_0, last, last_0 = maps
        d = e.shape[-1]
        k = len(both) // d
        new, z, y, u, w = (e.new_empty(*e.shape[:3], k, d) for _ in range(5))
        scales = e.new_empty(2, *e.shape[:3], k, 1)
        for x, p, q, new_, z_, y_, u_, w_, a, b in _chunks(e, s, t, new, z, y, u, w, *scales):
            torch.matmul(x.flatten(-2), both.T, out=z_.flatten(-2))
            z_.flatten(-2).add_(p[:, :, None]).add_(q[:, None])
            torch.add(x[..., :k, :], mix_0, out=y_)
            _rows(y_).addmm_(_rows(F.gelu(z_)), mix.T)
            a.copy_(_normalise(y_, eps))
            state = torch.addcmul(norm_0, y_, norm)
            torch.addmm(first_0, _rows(state), first.T, out=_rows(u_))
            torch.add(state, second_0, out=w_)
            _rows(w_).addmm_(_rows(F.gelu(u_)), second.T)
            b.copy_(_normalise(w_, eps))
            torch.addcmul(last_0, w_, last, out=new_)
        ctx.save_for_backward(e, both, s, t, *maps, z, y, u, w, scales)
        ctx.eps = eps
        return new

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the gradients, from the inputs of both GELUs and the normalised states."""
        if torch.is_grad_enabled():
            return None, *_differentiable(partial(plain_update, ctx.eps), ctx, grads, skip=1)
        e, both, s, t, *maps, z, y, u, w, scales = ctx.saved_tensors
        mix, _, norm, norm_0, first, _, second, _, last, _ = maps
        to_e, to_s, to_t = (torch.empty_like(x) for x in (e, s, t))
        to_both, to = torch.zeros_like(both), [torch.zeros_like(x) for x in maps]
        k = len(both) // e.shape[-1]
        for g, x, z_, y_, u_, w_, a, b, x_, s_, t_ in _chunks(
            grads[0], e, z, y, u, w, *scales, to_e, to_s, to_t
        ):
            g = _through_norm(g, w_, b, last, to[8], to[9])
            state = torch.addcmul(norm_0, y_, norm)
            gu = _through_linear(g, F.gelu(u_), second, to[6], to[7])
            gu = torch.ops.aten.gelu_backward(gu, u_)
            g = g.add_(_through_linear(gu, state, first, to[4], to[5]))
            g = _through_norm(g, y_, a, norm, to[2], to[3])
            gz = _through_linear(g, F.gelu(z_), mix, to[0], to[1])
            gz = torch.ops.aten.gelu_backward(gz, z_).flatten(-2)
            to_both.addmm_(_rows(gz).T, _rows(x.flatten(-2)))
            s_.copy_(gz.sum(2))
            t_.copy_(gz.sum(1))
            torch.matmul(gz, both, out=x_.flatten(-2))
            x_[..., :k, :] += g
        return None, to_e, to_both, to_s, to_t, *to


def plain_scores(e: Tensor, form: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Compute what :class:`EdgeScores` does, as it is written on paper."""
    return (e * (e @ form + a[:, :, None] + b[:, None])).sum(-1)


def plain_sums(e: Tensor, gate: Tensor, alpha: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Compute what :class:`EdgeSums` does, as it is written on paper."""
    (y, y_), (x, x_) = ((z * alpha[..., None]).unbind(-2) for z in (e @ gate.T, e))
    return (y * w[:, None]).sum(2), x.sum(2), (y_ * v[:, :, None]).sum(1), x_.sum(1)


def plain_update(
    eps: float, e: Tensor, both: Tensor, s: Tensor, t: Tensor, *maps: Tensor
) -> Tensor:
    """Compute what :class:`EdgeUpdate` does, as it is written on paper."""
    mix, mix_0, norm, norm_0, first, first_0, second, second_0, last, last_0 = maps
    z = e.flatten(-2) @ both.T + s[:, :, None] + t[:, None]
    z = z.unflatten(-1, (-1, e.shape[-1]))
    y = e[..., : z.shape[-2], :] + F.linear(F.gelu(z), mix, mix_0)
    y = F.layer_norm(y, norm.shape, norm, norm_0, eps)
    y = y + F.linear(F.gelu(F.linear(y, first, first_0)), second, second_0)
    return F.layer_norm(y, last.shape, last, last_0, eps)


def _differentiable(
    plain: Callable[..., Any], ctx: Any, grads: tuple[Any, ...], *, skip: int = 0
) -> Any:
    """Gradients by automatic differentiation, for those who differentiate them again."""
    needed = ctx.needs_input_grad[skip:]
    tensors = ctx.saved_tensors[: len(needed)]
    inputs = [x for x, need in zip(tensors, needed, strict=True) if need]
    outputs = plain(*tensors)
    found = iter(torch.autograd.grad(outputs, inputs, grads, create_graph=True))
    return tuple(next(found) if need else None for need in needed)


def _chunks(e: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors along the batch so that edge states of a chunk stay in the cache."""
    size = max(1, _CHUNK * len(e) // max(1, e.numel()))
    return zip(*(x.split(size) for x in (e, *others)), strict=True)


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2)


def _normalise(y: Tensor, eps: float) -> Tensor:
    """Make mean 0 and variance 1 of each state, in place; return what the deviations became."""
    y -= y.mean(-1, keepdim=True)
    scale = y.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    y *= scale
    return scale


def _through_norm(
    g: Tensor, y: Tensor, scale: Tensor, weight: Tensor, to_weight: Tensor, to_bias: Tensor
) -> Tensor:
    """Pass a gradient from behind a LayerNorm to before it; y are the normalised states."""
    # PyTorch's own function, told that its input has mean 0 and deviation 1 already.
    one = torch.ones_like(scale)
    g, on_weight, on_bias = torch.ops.aten.native_layer_norm_backward(
        g, y, list(weight.shape), torch.zeros_like(scale), one, weight, weight, [True, True, True]
    )
    to_weight += on_weight
    to_bias += on_bias
    return g.mul_(scale)


def _through_linear(
    g: Tensor, x: Tensor, weight: Tensor, to_weight: Tensor, to_bias: Tensor
) -> Tensor:
    """Pass a gradient from behind a linear map of x to before it."""
    to_weight.addmm_(_rows(g).T, _rows(x))
    to_bias += _rows(g).sum(0)
    return g @ weight
