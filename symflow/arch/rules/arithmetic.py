"""Sums and products of tensors: residual connections and gates tie axes together."""

import operator
from typing import TYPE_CHECKING, Any

import torch

from symflow.arch.layout import FIXED, Label
from symflow.arch.rules.elementwise import LINEAR, PLAIN
from symflow.arch.rules.registry import Value, rule

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
def _add(call: "Call", x: Any, y: Any) -> Value:
    if not (isinstance(x, Value) and isinstance(y, Value)):
        return call.elementwise(x if isinstance(x, Value) else y, PLAIN)
    dims: list[Label] = []
    for a, b, m, n in _aligned(x, y):
        if m == n:
            call.tracing.unify(a, b, f"added to something that stays, at {call.path}")
            dims.append(a)
            continue
        dims.append(a if n == 1 else b)  # one number is added to all units
        call.tracing.weaken(dims[-1], PLAIN, call.name)
    return Value(call.shape, tuple(dims))


@rule(operator.mul)
@rule(operator.imul)
@rule(torch.mul)
@rule("mul")
def _multiply(call: "Call", x: Any, y: Any) -> Value:
    if not (isinstance(x, Value) and isinstance(y, Value)):
        return call.elementwise(x if isinstance(x, Value) else y, LINEAR)
    dims: list[Label] = []
    for a, b, m, n in _aligned(x, y):
        dims.append(_gated(call, a, b) if m == n else a if n == 1 else b)
    return Value(call.shape, tuple(dims))


def _gated(call: "Call", a: Label, b: Label) -> Label:
    """Label the product of two factors: permuted together, scaled with one of them."""
    first, second = call.tracing.resolve(a), call.tracing.resolve(b)
    reason = f"multiplied by something that stays, at {call.path}"
    if FIXED in (first, second) or first == second or _same_axes(call, a, b):
        call.tracing.unify(call.permuted(a), call.permuted(b), reason)
        if FIXED not in (first, second):
            call.tracing.weaken(a, PLAIN, call.name)
            call.tracing.weaken(b, PLAIN, call.name)
        return FIXED if FIXED in (first, second) else call.permuted(a)
    kept, other = (b, a) if call.tracing.is_scaled(b) else (a, b)
    call.tracing.share_permutation(kept, other, reason)
    return kept


@rule(operator.truediv)
@rule(torch.div)
@rule("div")
def _divide(call: "Call", x: Any, y: Any) -> Value:
    if isinstance(y, Value):
        return _multiply(call, x, call.elementwise(y, PLAIN))
    return call.elementwise(x, LINEAR)


def _same_axes(call: "Call", a: Label, b: Label) -> bool:
    one, two = ([dim.axis for dim in call.tracing.roots(label)] for label in (a, b))
    return bool(set(one) & set(two))


def _aligned(x: Value, y: Value) -> list[tuple[Label, Label, int, int]]:
    """Dimensions of both with their sizes, from the left, after broadcasting."""
    n = max(len(x.dims), len(y.dims))
    (a, k), (b, m) = (
        ((FIXED,) * (n - len(v.dims)) + v.dims, (1,) * (n - len(v.shape)) + v.shape) for v in (x, y)
    )
    return list(zip(a, b, k, m, strict=True))
