"""Operations that move dimensions about."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from symflow.arch.layout import FIXED, Dim, Segments
from symflow.arch.rules.elementwise import PLAIN
from symflow.arch.rules.registry import Value, rule
from symflow.arch.tracing import concatenated
from symflow.errors import UnsupportedModuleError

if TYPE_CHECKING:
    from symflow.arch.trace import Call


@rule(nn.Flatten)
def _flatten_module(call: "Call", x: Value) -> Value:
    return call.flatten(x, call.module.start_dim, call.module.end_dim)


@rule(torch.flatten)
@rule("flatten")
def _flatten(call: "Call", x: Value, start_dim: int = 0, end_dim: int = -1) -> Value:
    return call.flatten(x, start_dim, end_dim)


@rule("view")
@rule("reshape")
@rule(torch.reshape)
def _reshape(call: "Call", x: Value, *_shape: Any) -> Value:
    if call.shape == x.shape:
        return x
    if len(call.shape) == 2 and call.shape[0] == x.shape[0]:
        return call.flatten(x, 1, -1)
    raise UnsupportedModuleError(
        f"{call.path!r}: a reshape from {x.shape} to {call.shape} has no rule (only flattening all "
        "but the batch has); use nn.Flatten, or register a rule"
    )


@rule("permute")
@rule(torch.permute)
def _permute(call: "Call", x: Value, *order: Any) -> Value:
    if len(order) == 1 and not isinstance(order[0], int):
        order = tuple(order[0])
    return Value(call.shape, tuple(x.dims[k] for k in order))


@rule("transpose")
@rule(torch.transpose)
def _transpose(call: "Call", x: Value, dim0: int, dim1: int) -> Value:
    dims = list(x.dims)
    dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
    return Value(call.shape, tuple(dims))


@rule("unsqueeze")
@rule(torch.unsqueeze)
def _unsqueeze(call: "Call", x: Value, dim: int) -> Value:
    dims = list(x.dims)
    dims.insert(dim % (len(dims) + 1), FIXED)
    return Value(call.shape, tuple(dims))


@rule("squeeze")
@rule(torch.squeeze)
def _squeeze(call: "Call", x: Value, dim: int | None = None) -> Value:
    gone = range(len(x.dims)) if dim is None else [dim % len(x.dims)]
    gone = [k for k in gone if x.shape[k] == 1]
    for k in gone:
        call.tracing.fix(x.dims[k], f"squeezed away at {call.path}")
    return Value(call.shape, tuple(d for k, d in enumerate(x.dims) if k not in gone))


@rule("mean")
@rule(torch.mean)
@rule("sum")
@rule(torch.sum)
def _reduce(call: "Call", x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    every = range(len(x.dims)) if dim is None else (dim,) if isinstance(dim, int) else dim
    gone = [k % len(x.dims) for k in every]
    for k in gone:  # a sum over units does not see their order, but each one's sign and scale
        call.tracing.weaken(x.dims[k], PLAIN, call.name)
    if keepdim:
        dims = tuple(FIXED if k in gone else d for k, d in enumerate(x.dims))
    else:
        dims = tuple(d for k, d in enumerate(x.dims) if k not in gone)
    return Value(call.shape, dims)


@rule(torch.cat)
@rule(torch.concat)
def _concatenate(call: "Call", tensors: Any, dim: int = 0) -> Value:
    first, *others = tensors
    at = dim % len(first.dims)
    for other in others:
        for k, (a, b) in enumerate(zip(first.dims, other.dims, strict=True)):
            if k != at:
                call.tracing.unify(a, b, f"concatenated with something that stays, at {call.path}")
    parts: list[tuple[Dim, int]] = []
    for x in tensors:
        found = call.tracing.resolve(x.dims[at])
        parts += found.parts if isinstance(found, Segments) else [(found, x.shape[at])]
    return Value(call.shape, (*first.dims[:at], concatenated(parts), *first.dims[at + 1 :]))
