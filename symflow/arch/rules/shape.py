"""Operations that move dimensions about."""

import math
import operator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from symflow.arch.layout import FIXED, Dim, Label, Segments
from symflow.arch.rules.elementwise import PLAIN
from symflow.arch.rules.registry import Value, rule
from symflow.arch.tracing import concatenated
from symflow.errors import UnsupportedModuleError

if TYPE_CHECKING:
    from symflow.arch.trace import Call


@rule(nn.Flatten)
def _flatten_module(call: "Call", x: Value) -> Value:
    return _regroup(call, x)


@rule(nn.Unflatten)
@rule(torch.flatten)
@rule("flatten")
@rule("unflatten")
@rule("view")
@rule("reshape")
@rule(torch.reshape)
def _reshape(call: "Call", x: Value, *_shape: Any, **_options: Any) -> Value:
    return _regroup(call, x)


def _regroup(call: "Call", x: Value) -> Value:
    """Label a reshape: dimensions are matched in the smallest groups of equal size."""
    dims: list[Label] = []
    for old, new in _groups(x.shape, call.shape):
        labels = [x.dims[k] for k in old]
        sizes = [call.shape[k] for k in new]
        if len(old) == len(new) == 1:
            dims += labels
        elif len(new) == 1:
            dims.append(_merged(call, labels, [x.shape[k] for k in old]))
        else:
            dims += _unmerged(call, labels, sizes)
    made_by = x.made_by if call.shape == x.shape else ()
    return Value(call.shape, tuple(dims), made_by)


def _groups(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Match consecutive dimensions of two shapes of the same size.

    Dimensions of size one are matched with each other where they can be.
    """
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        a, b = [i] if i < len(old) else [], [j] if j < len(new) else []
        i, j = i + len(a), j + len(b)
        while (m := math.prod(old[k] for k in a)) != (n := math.prod(new[k] for k in b)):
            if m < n:
                a.append(i)
                i += 1
            else:
                b.append(j)
                j += 1
        found.append((a, b))
    return found


def _merged(call: "Call", labels: list[Label], sizes: list[int]) -> Label:
    """Label several dimensions as one; an axis among them is repeated."""
    moving = [k for k, label in enumerate(labels) if label != FIXED]
    if len(moving) > 1:
        for k in moving:
            call.tracing.fix(labels[k], f"flattened together with another axis at {call.path}")
    if len(moving) != 1:
        return FIXED
    k = moving[0]
    before, behind = math.prod(sizes[:k]), math.prod(sizes[k + 1 :])
    label = call.tracing.resolve(labels[k])
    if isinstance(label, Segments):
        parts = [(replace(d, inner=d.inner * behind), n * behind) for d, n in label.parts]
        return concatenated([(d if d.axis else FIXED, n) for d, n in parts] * before)
    return replace(label, outer=before * label.outer, inner=label.inner * behind)


def _unmerged(call: "Call", labels: list[Label], sizes: list[int]) -> list[Label]:
    """Label one dimension (or several) as several: what a flatten merged comes apart again."""
    found: list[Label] = [FIXED] * len(sizes)
    label = call.tracing.resolve(labels[0]) if len(labels) == 1 else FIXED
    if isinstance(label, Dim) and label.axis is not None:
        units = call.tracing.axes[label.axis].size
        for k, size in enumerate(sizes):
            before, behind = math.prod(sizes[:k]), math.prod(sizes[k + 1 :])
            # The units are one of the new dimensions, or (still repeated) part of one.
            outer, inner = label.outer // before, label.inner // behind
            if size == outer * units * inner and before * outer == label.outer:
                found[k] = replace(label, outer=outer, inner=inner)
                return found
    for one in labels:
        call.tracing.fix(one, f"reshaped to {tuple(sizes)} at {call.path}")
    return found


@rule(operator.getitem)
def _index(call: "Call", x: Value, key: Any) -> Value:
    keys = list(key) if isinstance(key, tuple) else [key]
    if Ellipsis in keys:
        at = keys.index(Ellipsis)
        shown = len([k for k in keys if k is not None and k is not Ellipsis])
        keys[at : at + 1] = [slice(None)] * (len(x.dims) - shown)
    dims: list[Label] = []
    source = iter(zip(x.dims, x.shape, strict=True))
    for one in keys:
        if one is None:
            dims.append(FIXED)
            continue
        label, size = next(source)
        if isinstance(one, slice):
            dims.append(_sliced(call, label, size, one))
        else:
            call.tracing.fix(label, f"single units are read at {call.path}")
            if isinstance(one, Value):
                raise UnsupportedModuleError(
                    f"{call.path!r}: indexing with a tensor has no rule; register one for "
                    "operator.getitem, or use an nn.Embedding"
                )
    dims += [label for label, _ in source]
    return Value(call.shape, tuple(dims))


def _sliced(call: "Call", label: Label, size: int, key: slice) -> Label:
    begin, end, step = key.indices(size)
    if label == FIXED or (begin, end, step) == (0, size, 1):
        return label
    sizes = tuple(n for n in (begin, end - begin, size - end) if n)
    pieces = call.tracing.cut(label, sizes) if step == 1 and begin < end else None
    if pieces is None:
        call.tracing.fix(label, f"cut through at {call.path}")
        return FIXED
    return pieces[1 if begin else 0]


@rule("chunk")
@rule(torch.chunk)
def _chunk(call: "Call", x: Value, chunks: int, dim: int = 0) -> tuple[Value, ...]:
    size = -(-x.shape[dim] // chunks)
    return _split(call, x, size, dim)


@rule("split")
@rule(torch.split)
def _split(call: "Call", x: Value, split_size: Any, dim: int = 0) -> tuple[Value, ...]:
    n = x.shape[dim]
    sizes = split_size
    if isinstance(split_size, int):
        sizes = [min(split_size, n - k) for k in range(0, n, split_size)]
    pieces = call.tracing.cut(x.dims[dim], tuple(sizes))
    if pieces is None:
        call.tracing.fix(x.dims[dim], f"cut through at {call.path}")
        pieces = (FIXED,) * len(sizes)
    return tuple(x.with_dim(dim, piece, m) for piece, m in zip(pieces, sizes, strict=True))


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


@rule("t")
@rule(torch.t)
def _t(call: "Call", x: Value) -> Value:
    return Value(call.shape, x.dims[::-1])


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
