"""Sums, extremes and other numbers that stand for many; sorted ones, and their places."""

from typing import TYPE_CHECKING, Any

import torch

from symflow.arch.labels import FIXED
from symflow.arch.rules.arithmetic import add
from symflow.arch.rules.elementwise import ODD, PLAIN, RELU
from symflow.arch.rules.registry import Activation, Value, rule

if TYPE_CHECKING:
    from symflow.arch.trace import Call


@rule("mean")
@rule(torch.mean)
@rule("sum")
@rule(torch.sum)
def reduce(
    call: "Call",
    x: Value,
    dim: Any = None,
    keepdim: bool = False,
    *,
    seen: Activation = PLAIN,
    **_options: Any,
) -> Value:
    """Sum over dimensions: what is left moves as it did; ``seen`` is what the sum does not see."""
    every = range(len(x.dims)) if dim is None else (dim,) if isinstance(dim, int) else dim
    gone = [k % len(x.dims) for k in every]
    for k in gone:  # a sum over units does not see their order, but each one's sign and scale
        call.tracing.weaken(x.dims[k], seen, call.name)
        call.tracing.share(x.dims[k], [dim for j, dim in enumerate(x.dims) if j not in gone])
    left = [
        (1, FIXED) if k in gone else one for k, one in enumerate(zip(x.shape, x.dims, strict=True))
    ]
    left = [one for k, one in enumerate(left) if keepdim or k not in gone]
    return Value(tuple(n for n, _ in left), tuple(d for _, d in left))


@rule("std")
@rule(torch.std)
def _deviation(call: "Call", x: Value, *options: Any, **named: Any) -> Value:
    return call.elementwise(_spread(call, x, *options, **named), RELU)


@rule("var")
@rule(torch.var)
def _variance(call: "Call", x: Value, *options: Any, **named: Any) -> Value:
    squares = Activation(odd=True, homogeneous=2)
    return call.elementwise(_spread(call, x, *options, **named), squares)


@rule("var_mean")
@rule(torch.var_mean)
def _moments(call: "Call", x: Value, *options: Any, **named: Any) -> tuple[Value, Value]:
    mean = _spread(call, x, *options, **named)
    squares = Activation(odd=True, homogeneous=2)
    return call.elementwise(mean, squares), mean


def _spread(
    call: "Call", x: Value, dim: Any = None, _unbiased: Any = True, keepdim: bool = False, **_: Any
) -> Value:
    if isinstance(dim, bool):  # no dimension, but the second option
        return reduce(call, x)
    return reduce(call, x, dim, keepdim)


@rule("amax")
@rule("amin")
@rule(torch.amax)
@rule(torch.amin)
@rule("linalg_vector_norm")
def _extreme(
    call: "Call", x: Value, *options: Any, dim: Any = None, keepdim: bool = False
) -> Value:
    """Label the greatest of some numbers, or their norm: positive scales of the rest pass."""
    of_sizes = kind(call) == "linalg_vector_norm"
    given = dict(zip(("dim", "keepdim"), options[1:] if of_sizes else options, strict=False))
    at, keep = given.get("dim", dim), given.get("keepdim", keepdim)
    seen = ODD if of_sizes else PLAIN  # norms do not see signs
    return call.elementwise(reduce(call, x, at if at != [] else None, keep, seen=seen), RELU)


@rule("max")
@rule("min")
@rule(torch.max)
@rule(torch.min)
def _most(call: "Call", x: Value, dim: Any = None, keepdim: bool = False, **options: Any) -> Any:
    """Label the greatest along a dimension and where it is, or the greater of two tensors."""
    other = options.get("other", dim)
    if isinstance(other, Value):
        return greater(call, x, other)
    values = _extreme(call, x, dim=dim, keepdim=keepdim)
    return values if dim is None else (values, _places_of(call, x, dim, values.shape))


@rule("maximum")
@rule("minimum")
@rule("fmax")
@rule("fmin")
@rule(torch.maximum)
@rule(torch.minimum)
@rule(torch.fmax)
@rule(torch.fmin)
def greater(call: "Call", x: Value, y: Value) -> Value:
    """Label the greater of two numbers, one by one: both are scaled alike."""
    return call.elementwise(add(call, x, y), RELU)


@rule("clamp_min")
@rule("clamp_max")
@rule(torch.clamp_min)
@rule(torch.clamp_max)
def _clamp_end(call: "Call", x: Value, end: Any = 0, **named: Any) -> Value:
    for other in (end, *named.values()):
        if isinstance(other, Value):
            return greater(call, x, other)
    return call.elementwise(x, RELU if end == 0 and not any(named.values()) else PLAIN)


@rule("clamp")
@rule("clamp_")
@rule("clip")
@rule(torch.clamp)
@rule(torch.clip)
def _clamp(call: "Call", x: Value, min: Any = None, max: Any = None) -> Value:
    ends = [end for end in (min, max) if end is not None]
    if any(isinstance(end, Value) for end in ends):
        for end in ends:
            x = _clamp_end(call, x, end)
        return x
    if ends == [0]:
        return call.elementwise(x, RELU)
    return call.elementwise(x, ODD if len(ends) == 2 and min == -max else PLAIN)


@rule("any")
@rule("all")
@rule(torch.any)
@rule(torch.all)
@rule("prod")
@rule(torch.prod)
@rule("logsumexp")
@rule(torch.logsumexp)
def _reduce_plainly(
    call: "Call", x: Value, dim: Any = None, keepdim: bool = False, **_options: Any
) -> Value:
    return reduce(call, Value(x.shape, call.elementwise(x, PLAIN).dims), dim, keepdim)


@rule("sort")
@rule(torch.sort)
@rule("topk")
@rule(torch.topk)
def _sorted(call: "Call", x: Value, *options: Any, **named: Any) -> tuple[Value, Any]:
    """Label sorted numbers and their places: the order of units is not seen, single ones are."""
    names = ("k", "dim") if kind(call) == "topk" else ("dim", "descending")
    given = {"dim": -1} | dict(zip(names, options, strict=False)) | named
    at = given["dim"] % len(x.dims)
    call.tracing.weaken(x.dims[at], PLAIN, call.name)
    call.tracing.share(x.dims[at], [d for k, d in enumerate(x.dims) if k != at])
    found = x.with_dim(at, FIXED, given.get("k", x.shape[at]))
    return call.elementwise(found, RELU), _places_of(call, x, at, found.shape)


def _places_of(call: "Call", x: Value, dim: int, shape: tuple[int, ...]) -> Any:
    """Return the label of places along a dimension, whose units are told apart if it is used."""

    def label(*, used: bool) -> Value:
        if used:
            call.tracing.fix(x.dims[dim], f"its places are told apart at {call.path}")
        return plain(shape)

    return label


@rule("argmax")
@rule("argmin")
@rule("argsort")
@rule(torch.argmax)
@rule(torch.argmin)
@rule(torch.argsort)
def _places(call: "Call", x: Value, *_options: Any, **_named: Any) -> Value:
    for label in x.dims:
        call.tracing.fix(label, f"its places are told apart at {call.path}")
    return plain(call.shape)


def plain(shape: tuple[int, ...]) -> Value:
    """Label a tensor on which nothing acts."""
    return Value(shape, (FIXED,) * len(shape))


def kind(call: "Call") -> str:
    """Return what an operation is called, without its overload."""
    return call.name.partition(".")[0]
