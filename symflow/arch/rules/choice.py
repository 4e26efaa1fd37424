"""Comparisons and choices, what goes by the order of places, copies and constants."""

import math
import operator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from symflow.arch.labels import FIXED, Atom, Label, label_of
from symflow.arch.rules.arithmetic import add
from symflow.arch.rules.elementwise import PLAIN, RELU
from symflow.arch.rules.reduction import greater, kind
from symflow.arch.rules.registry import Value, rule

if TYPE_CHECKING:
    from symflow.arch.trace import Call


@rule(operator.gt)
@rule(operator.lt)
@rule(operator.ge)
@rule(operator.le)
@rule(operator.eq)
@rule(operator.ne)
@rule(torch.gt)
@rule(torch.lt)
@rule(torch.ge)
@rule(torch.le)
@rule("gt")
@rule("lt")
@rule("ge")
@rule("le")
@rule("eq")
@rule("ne")
def _compared(call: "Call", x: Any, y: Any) -> Value:
    """Label truths: they are permuted with what they are about, but not scaled."""
    if isinstance(x, Value) and isinstance(y, Value):
        found = greater(call, x, y)
    else:
        number, value = (y, x) if isinstance(x, Value) else (x, y)
        found = call.elementwise(value, RELU if number == 0 else PLAIN)
    return Value(call.shape, tuple(call.permuted(d) for d in found.dims))


@rule(operator.and_)
@rule(operator.or_)
@rule("logical_and")
@rule("logical_or")
@rule("bitwise_and")
@rule("bitwise_or")
@rule(torch.logical_and)
@rule(torch.logical_or)
def _both(call: "Call", x: Value, y: Value) -> Value:
    return add(call, x, y)


@rule(operator.invert)
@rule("logical_not")
@rule("bitwise_not")
@rule(torch.logical_not)
def _not(call: "Call", x: Value) -> Value:
    return x


@rule("where")
@rule(torch.where)
def _where(call: "Call", condition: Value, x: Any, y: Any) -> Value:
    """Label a choice of two: both are scaled alike, the condition is permuted with them."""
    if isinstance(call.target, str):  # as a method: x.where(condition, y)
        condition, x = x, condition
    return chosen(call, condition, x, y)


def chosen(call: "Call", condition: Value, x: Any, y: Any) -> Value:
    """Label what is ``x`` where a condition holds, ``y`` elsewhere."""
    values = [v for v in (x, y) if isinstance(v, Value)]
    if len(values) == 2:
        found = add(replace(call, shape=torch.broadcast_shapes(x.shape, y.shape)), *values)
    elif values:
        number = y if isinstance(x, Value) else x
        still = number in (0, math.inf, -math.inf)  # scales leave these where they are
        found = call.elementwise(values[0], RELU if still else PLAIN)
    else:
        return Value(call.shape, condition.dims)
    n = len(call.shape)
    dims, sizes = (FIXED,) * (n - len(found.dims)), (1,) * (n - len(found.dims))
    merged = list(zip(dims + found.dims, sizes + found.shape, strict=True))
    for k, label in enumerate(condition.dims, n - len(condition.dims)):
        label_of_it, size = merged[k]
        if condition.shape[k - n + len(condition.dims)] == size:
            reason = f"chosen by something that stays, at {call.path}"
            call.tracing.share_permutation(label_of_it, label, reason)
        elif size == 1:
            merged[k] = label, call.shape[k]
    return Value(call.shape, tuple(label for label, _ in merged))


@rule("masked_fill")
def _masked(call: "Call", x: Value, mask: Value, value: Any) -> Value:
    return chosen(call, mask, value, x)


@rule("index_put")
@rule("index_put_")
def _put(call: "Call", x: Value, indices: Any, value: Any, *_options: Any) -> Value:
    """Label what is set where a mask holds; what is set at places ends all."""
    mask = indices[0] if len(indices) == 1 else None
    if isinstance(mask, Value) and mask.shape == x.shape and not getattr(value, "shape", ()):
        return chosen(call, mask, value, x)
    for one in (x, *indices, value):
        for label in one.dims if isinstance(one, Value) else ():
            call.tracing.fix(label, f"set at places at {call.path}")
    return Value(x.shape, (FIXED,) * len(x.dims))


@rule("gather")
@rule(torch.gather)
@rule("index_select")
@rule(torch.index_select)
def _picked(call: "Call", x: Value, dim: int, index: Value, **_options: Any) -> Value:
    """Label units that are picked by their places, along one dimension."""
    at = dim % len(x.dims)
    for k, label in enumerate(x.dims):
        if k == at or x.shape[k] != call.shape[k]:
            call.tracing.fix(label, f"single units are read at {call.path}")
    for label in index.dims:
        call.tracing.fix(label, f"used as places at {call.path}")
    dims = (FIXED if k == at else label for k, label in enumerate(x.dims))
    return Value(call.shape, tuple(dims))


@rule("cumprod")
@rule(torch.cumprod)
def _product_in_order(call: "Call", x: Value, dim: int, **_options: Any) -> Value:
    return _in_order(call, Value(x.shape, call.elementwise(x, PLAIN).dims), dim)


@rule("cumsum")
@rule(torch.cumsum)
@rule("flip")
@rule(torch.flip)
@rule("roll")
@rule(torch.roll)
def _in_order(call: "Call", x: Value, *options: Any, **named: Any) -> Value:
    """Keep what the order of places decides where it is: sums up to a place, turned tensors."""
    given = dict(
        zip(("shifts", "dims") if kind(call) == "roll" else ("dims",), options, strict=False)
    )
    places = (given | named).get("dims", named.get("dim", range(len(x.dims))))
    for k in (places,) if isinstance(places, int) else places:
        call.tracing.fix(x.dims[k], f"its places are in order at {call.path}")
    return x


# ---------------------------------------------------------------- copies and constants


@rule("repeat")
@rule("tile")
@rule(torch.tile)
def _repeated(call: "Call", x: Value, *times: Any) -> Value:
    """Label copies behind each other: every one is moved alike."""
    flat = times[0] if len(times) == 1 and not isinstance(times[0], int) else times
    n = len(call.shape)
    counts = (1,) * (n - len(flat)) + tuple(flat)
    new = n - len(x.dims)
    dims = [FIXED] * new
    for k, (label, size) in enumerate(zip(x.dims, x.shape, strict=True)):
        parts = call.tracing.resolve(label).parts or ((Atom(size),),)
        dims.append(label if counts[new + k] == 1 else label_of([*parts] * counts[new + k]))
    return Value(call.shape, tuple(dims))


@rule("ones_like")
@rule("zeros_like")
@rule("full_like")
@rule("empty_like")
@rule("new_zeros")
@rule("new_ones")
@rule("new_full")
@rule("zeros")
@rule("ones")
@rule("full")
@rule(torch.ones_like)
@rule(torch.zeros_like)
@rule(torch.full_like)
@rule(torch.zeros)
@rule(torch.ones)
@rule(torch.full)
def _constant(call: "Call", *_options: Any, **_named: Any) -> Value:
    """Label one number for all units: it does not see their order."""
    copied = (Label(((Atom(n, copied=True),),)) if n > 1 else FIXED for n in call.shape)
    return Value(call.shape, tuple(copied))
