"""Sums and products of tensors: residual connections, gates and attention tie axes together."""

import operator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from symflow.arch.labels import FIXED, Label
from symflow.arch.rules.elementwise import LINEAR, PLAIN
from symflow.arch.rules.registry import Activation, Value, rule

if TYPE_CHECKING:
    from symflow.arch.trace import Call


@rule(operator.add)
@rule(operator.iadd)
@rule(operator.sub)
@rule(operator.isub)
@rule(torch.add)
@rule(torch.sub)
@rule("add")
@rule("add_")
@rule("sub")
def add(call: "Call", x: Any, y: Any, **_options: Any) -> Value:
    """Add two tensors, or a number to a tensor: all units are scaled alike."""
    if not (isinstance(x, Value) and isinstance(y, Value)):
        value, number = (x, y) if isinstance(x, Value) else (y, x)
        return call.elementwise(value, LINEAR if number == 0 else PLAIN)
    dims: list[Label] = []
    for a, b, m, n in aligned(x, y):
        if m == n:
            dims.append(call.tracing.unify(a, b, f"added to something that stays, at {call.path}"))
            continue
        dims.append(spread(call, a, b, n))  # one number is added to all units
        call.tracing.weaken(dims[-1], PLAIN, call.name)
    return Value(call.shape, tuple(dims))


@rule(operator.mul)
@rule(operator.imul)
@rule(torch.mul)
@rule("mul")
@rule("mul_")
def multiply(call: "Call", x: Any, y: Any) -> Value:
    """Multiply two tensors, or a tensor by a number."""
    if not (isinstance(x, Value) and isinstance(y, Value)):
        return call.elementwise(x if isinstance(x, Value) else y, LINEAR)
    dims = [gated(call, a, b) if m == n else spread(call, a, b, n) for a, b, m, n in aligned(x, y)]
    return Value(call.shape, tuple(dims))


def gated(call: "Call", a: Label, b: Label) -> Label:
    """Label the product of two factors: permuted together, scaled with both."""
    return call.tracing.multiplied(a, b, f"multiplied by something that stays, at {call.path}")


@rule(F.glu)
@rule("glu")
def _glu(call: "Call", x: Value, dim: int = -1) -> Value:
    at = dim % len(x.dims)
    half = x.shape[at] // 2
    pieces = call.tracing.cut(x.dims[at], (half, half))
    if pieces is None:
        call.tracing.fix(x.dims[at], f"cut through at {call.path}")
        return call.elementwise(x.with_dim(at, FIXED, half), PLAIN)
    kept, gate = (x.with_dim(at, piece, half) for piece in pieces)
    return multiply(replace(call, shape=kept.shape), kept, call.elementwise(gate, PLAIN))


@rule(nn.GLU)
def _glu_module(call: "Call", x: Value) -> Value:
    return _glu(call, x, call.module.dim)


@rule(operator.truediv)
@rule(torch.div)
@rule("div")
def _divide(call: "Call", x: Any, y: Any, *, rounding_mode: str | None = None) -> Value:
    if rounding_mode is not None:
        values = [
            replace(call, shape=v.shape).elementwise(v, PLAIN)
            for v in (x, y)
            if isinstance(v, Value)
        ]
        return values[0] if len(values) == 1 else multiply(call, *values)
    if not isinstance(x, Value):
        return call.elementwise(y, PLAIN)
    if not isinstance(y, Value):
        return call.elementwise(x, LINEAR)
    # One over it is odd, as it is; scales of degree -1 are not followed.
    below = replace(call, shape=y.shape)  # it may be broadcast
    return multiply(call, x, below.elementwise(y, Activation(odd=True)))


@rule(operator.pow)
@rule(torch.pow)
@rule("pow")
def _power(call: "Call", x: Any, exponent: Any) -> Value:
    if isinstance(exponent, Value):
        power = replace(call, shape=exponent.shape).elementwise(exponent, PLAIN)
        if not isinstance(x, Value):
            return power
        return multiply(call, replace(call, shape=x.shape).elementwise(x, PLAIN), power)
    whole = int(exponent) if float(exponent).is_integer() and exponent > 0 else None
    if whole is None:
        return call.elementwise(x, PLAIN)
    return call.elementwise(x, Activation(odd=True, homogeneous=whole))


@rule(operator.matmul)
@rule(torch.matmul)
@rule(torch.bmm)
@rule("matmul")
@rule("bmm")
@rule("mm")
def matmul(call: "Call", x: Value, y: Value) -> Value:
    """Contract the last dimension of one tensor with the last but one of another."""
    if len(x.dims) == 1:
        found = matmul(call, Value((1, *x.shape), (FIXED, *x.dims)), y)
        return Value(call.shape, (*found.dims[:-2], found.dims[-1]))
    if len(y.dims) == 1:
        found = matmul(call, x, Value((*y.shape, 1), (*y.dims, FIXED)))
        return Value(call.shape, found.dims[:-1])
    # What the units are over comes first: each of those may have an element of its own.
    batch = [
        gated(call, a, b) if m == n else spread(call, a, b, n)
        for a, b, m, n in aligned(
            Value(x.shape[:-2], x.dims[:-2]), Value(y.shape[:-2], y.dims[:-2])
        )
    ]
    call.contract(x.dims[-1], y.dims[-2], [*x.dims[:-1], *y.dims[:-2], y.dims[-1]])
    return Value(call.shape, (*batch, x.dims[-2], y.dims[-1]))


@rule(operator.floordiv)
@rule(torch.floor_divide)
@rule("floor_divide")
@rule(operator.mod)
@rule(torch.remainder)
@rule("remainder")
@rule(torch.fmod)
@rule("fmod")
def _floor(call: "Call", x: Any, y: Any) -> Value:
    return _divide(call, x, y, rounding_mode="floor")


@rule(torch.addmm)
@rule(torch.baddbmm)
@rule("addmm")
@rule("baddbmm")
def _addmm(call: "Call", bias: Value, x: Value, y: Value, **_options: Any) -> Value:
    return add(call, matmul(call, x, y), bias)


def spread(call: "Call", a: Label, b: Label, n: int) -> Label:
    """Meet one unit (of ``b`` if ``n`` is one, else of ``a``) with all of another dimension."""
    single, many = (b, a) if n == 1 else (a, b)
    call.tracing.weaken(single, PLAIN, call.name)
    return many


def aligned(x: Value, y: Value) -> list[tuple[Label, Label, int, int]]:
    """Dimensions of both with their sizes, from the left, after broadcasting."""
    n = max(len(x.dims), len(y.dims))
    (a, k), (b, m) = (
        ((FIXED,) * (n - len(v.dims)) + v.dims, (1,) * (n - len(v.shape)) + v.shape) for v in (x, y)
    )
    return list(zip(a, b, k, m, strict=True))
