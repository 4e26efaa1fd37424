"""Operations that move dimensions about."""

import math
import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from symflow.arch.labels import FIXED, Atom, Label, label_of
from symflow.arch.rules.registry import Value, rule
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
@rule(torch.unflatten)
@rule("view")
@rule("_unsafe_view")
@rule("reshape")
@rule(torch.reshape)
def _reshape(call: "Call", x: Value, *_shape: Any, **_options: Any) -> Value:
    return _regroup(call, x)


def _regroup(call: "Call", x: Value) -> Value:
    """Label a reshape: dimensions are matched in the smallest groups of equal size."""
    if call.unstacked is not None:
        found = _stack(call, x, call.unstacked)
        if found is not None:
            return found
    dims: list[Label] = []
    for old, new in _groups(x.shape, call.shape):
        labels = [x.dims[k] for k in old]
        sizes = tuple(call.shape[k] for k in new)
        if len(old) == len(new) == 1:
            dims += labels
            continue
        if not new:  # single units, which are those of the dimension before now
            if dims:
                dims[-1] = _merged(call, [dims[-1], *labels], [call.shape[len(dims) - 1], 1])
            continue
        merged = _merged(call, labels, [x.shape[k] for k in old])
        pieces = [merged] if len(new) == 1 else call.tracing.split(merged, sizes)
        if pieces is None:
            call.tracing.fix(merged, f"reshaped to {sizes} at {call.path}")
            pieces = [FIXED] * len(sizes)
        dims += pieces
    made_by = x.made_by if call.shape == x.shape else ()
    return Value(call.shape, tuple(dims), made_by)


def _stack(call: "Call", x: Value, at: int) -> Value | None:
    """Label a reshape one of whose dimensions is taken apart later: cut what runs over it.

    It may stand behind others of the same dimension: queries, keys and values of each head.
    """
    for old, new in _groups(x.shape, call.shape):
        if at not in new or len(old) != 1:
            continue
        label, tracing = x.dims[old[0]], call.tracing
        outer, inner = new[: new.index(at)], new[new.index(at) + 1 :]
        before: list[Label] = []
        if outer:
            lengths = [call.shape[k] for k in outer]
            split = tracing.split(label, (*lengths, x.shape[old[0]] // math.prod(lengths)))
            if split is None:
                return None
            *before, label = split
        sizes = tuple(call.shape[k] for k in inner)
        pieces = tracing.cut(label, (math.prod(sizes),) * call.shape[at])
        shape = (*call.shape[:at], *call.shape[at + 1 :])
        places: list[Value] = []
        for piece in pieces or ():
            if not sizes:
                tracing.fix(piece, f"single units are read at {call.path}")
            found = tracing.split(piece, sizes)
            if found is None:
                return None
            dims = (*x.dims[: old[0]], *before, *found, *x.dims[old[0] + 1 :])
            places.append(Value(shape, dims))
        if pieces is None or len(places[0].dims) != len(shape):
            return None
        whole = (FIXED,) * len(call.shape)
        return Value(call.shape, whole, stacked=(at, tuple(places)))
    return None


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
    """Label several dimensions as one, the last of which runs fastest."""
    found: list[tuple[Atom, ...]] = [()]
    for label, size in zip(map(call.tracing.resolve, labels), sizes, strict=True):
        parts = label.parts or ((Atom(size),),)
        if len(parts) == 1:
            found = [(*before, *parts[0]) for before in found]
            continue
        before = Label(tuple(found))
        call.tracing.fix(before, f"flattened together with a concatenation at {call.path}")
        times = before.size if found != [()] else 1
        found = list(parts) * times
    return call.tracing.resolve(label_of(found))


@rule("expand")
@rule("expand_as")
@rule("broadcast_to")
@rule(torch.broadcast_to)
def _expand(call: "Call", x: Value, *_sizes: Any, **_options: Any) -> Value:
    new = len(call.shape) - len(x.dims)
    dims: list[Label] = []
    for k, size in enumerate(call.shape):
        before = x.shape[k - new] if k >= new else 1
        if before != size:
            dims.append(Label(((Atom(size, copied=True),),)))
        else:
            dims.append(x.dims[k - new] if k >= new else FIXED)
    return Value(call.shape, tuple(dims))


@rule(torch.repeat_interleave)
@rule("repeat_interleave")
def _repeat(call: "Call", x: Value, repeats: Any, dim: Any = None, **_options: Any) -> Value:
    if not isinstance(repeats, int) or dim is None:
        raise UnsupportedModuleError(
            f"{call.path!r}: repeat_interleave wants a number and a dimension"
        )
    before = call.tracing.resolve(x.dims[dim]).parts or ((Atom(x.shape[dim]),),)
    label = label_of([(*part, Atom(repeats, copied=True)) for part in before])
    return x.with_dim(dim, label, call.shape[dim])


@rule(operator.getitem)
def _index(call: "Call", x: Value, key: Any) -> Value:
    keys = list(key) if isinstance(key, tuple) else [key]
    if Ellipsis in keys:
        at = keys.index(Ellipsis)
        shown = len([k for k in keys if k is not None and k is not Ellipsis])
        keys[at : at + 1] = [slice(None)] * (len(x.dims) - shown)
    if x.stacked is not None:
        at, places = x.stacked
        rest = keys[:at] + keys[at + 1 :]
        if at < len(keys) and isinstance(keys[at], int) and all(k == slice(None) for k in rest):
            return places[keys[at]]
    return _looked_up(call, x, keys)


@rule("index")
def _aten_index(call: "Call", x: Value, keys: Any) -> Value:
    return _looked_up(call, x, [slice(None) if one is None else one for one in keys])


def _looked_up(call: "Call", x: Value, keys: list[Any]) -> Value:
    """Label what is read at places: single units are told apart there, slices are cut out.

    What several tensors tell stands where they stood, in front if something was between them.
    """
    before: list[Label] = []
    after: list[Label] = []
    places = [k for k, one in enumerate(keys) if isinstance(one, Value | int)] or [len(keys)]
    apart = places != list(range(places[0], places[-1] + 1))
    source = iter(zip(x.dims, x.shape, strict=True))
    for k, one in enumerate(keys):
        side = before if not apart and k < places[0] else after
        if one is None:
            side.append(FIXED)
            continue
        label, size = next(source)
        if isinstance(one, slice):
            side.append(_sliced(call, label, size, one))
            continue
        for index in one.dims if isinstance(one, Value) else ():
            call.tracing.fix(index, f"used as places at {call.path}")
        call.tracing.fix(label, f"single units are read at {call.path}")
        taken = len(x.dims) + len(one.dims) - len(call.shape) if isinstance(one, Value) else 1
        if len(keys) == 1 and taken > 1:  # a mask takes as many dimensions as it has
            for label, _ in zip(x.dims[1:], one.dims[1:], strict=False):
                call.tracing.fix(label, f"masked at {call.path}")
                next(source)
    after += [label for label, _ in source]
    middle = (FIXED,) * (len(call.shape) - len(before) - len(after))
    return Value(call.shape, (*before, *middle, *after))


def _sliced(call: "Call", label: Label, size: int, key: slice) -> Label:
    begin, end, step = key.indices(size)
    if label == FIXED or (begin, end, step) == (0, size, 1):
        return label
    if begin >= end:  # nothing of it is left
        return FIXED
    sizes = tuple(n for n in (begin, end - begin, size - end) if n)
    pieces = call.tracing.cut(label, sizes) if step == 1 else None
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
@rule("split_with_sizes")
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


@rule("mT")
def _swapped(call: "Call", x: Value) -> Value:
    return _transpose(call, x, -2, -1)


@rule("permute")
@rule(torch.permute)
def _permute(call: "Call", x: Value, *order: Any) -> Value:
    if len(order) == 1 and not isinstance(order[0], int):
        order = tuple(order[0])
    order = tuple(k % len(x.dims) for k in order)
    if x.stacked is not None:
        at, places = x.stacked
        inner = [k - (k > at) for k in order if k != at]
        moved = tuple(
            Value(tuple(v.shape[k] for k in inner), tuple(v.dims[k] for k in inner)) for v in places
        )
        whole = (FIXED,) * len(order)
        return Value(call.shape, whole, stacked=(order.index(at), moved))
    return Value(call.shape, tuple(x.dims[k] for k in order))


@rule("movedim")
@rule(torch.movedim)
def _moved(call: "Call", x: Value, source: Any, destination: Any) -> Value:
    n = len(x.dims)
    ends = [[k % n for k in ([e] if isinstance(e, int) else e)] for e in (source, destination)]
    order = [k for k in range(n) if k not in ends[0]]
    for to, k in sorted(zip(ends[1], ends[0], strict=True)):
        order.insert(to, k)
    return _permute(call, x, *order)


@rule("transpose")
@rule(torch.transpose)
@rule("swapaxes")
@rule(torch.swapaxes)
@rule("swapdims")
@rule(torch.swapdims)
def _transpose(call: "Call", x: Value, dim0: int, dim1: int) -> Value:
    order = list(range(len(x.dims)))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(call, x, *order)


@rule("unbind")
@rule(torch.unbind)
def _unbind(call: "Call", x: Value, dim: int = 0) -> tuple[Value, ...]:
    at = dim % len(x.dims)
    if x.stacked is not None and x.stacked[0] == at:
        return x.stacked[1]
    call.tracing.fix(x.dims[at], f"single units are read at {call.path}")
    rest = Value((*x.shape[:at], *x.shape[at + 1 :]), (*x.dims[:at], *x.dims[at + 1 :]))
    return (rest,) * x.shape[at]


@rule("select")
def _select(call: "Call", x: Value, dim: int, index: int) -> Value:
    at = dim % len(x.dims)
    if x.stacked is not None and x.stacked[0] == at:
        return x.stacked[1][index]
    call.tracing.fix(x.dims[at], f"single units are read at {call.path}")
    return Value(call.shape, (*x.dims[:at], *x.dims[at + 1 :]))


@rule("slice")
def _slice(
    call: "Call",
    x: Value,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Value:
    label = _sliced(call, x.dims[dim], x.shape[dim], slice(start, end, step))
    return x.with_dim(dim, label, call.shape[dim])


@rule(getattr)
def _attribute(call: "Call", x: Any, name: str) -> Any:
    if isinstance(x, tuple) and name in ("values", "indices"):  # of a maximum, or sorted
        part: Any = x[1 if name == "indices" else 0]
        return part(used=True) if callable(part) else part
    if name == "mT":
        return _transpose(call, x, -2, -1)
    if name == "T":
        return _t(call, x)
    raise UnsupportedModuleError(
        f"{call.path!r}: the attribute {name!r} of a tensor has no rule. Call a method instead, as "
        "in x.transpose(-2, -1), or register a rule for builtins.getattr with symflow.arch.rule"
    )


@rule("t")
@rule(torch.t)
@rule("numpy_T")
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


@rule(torch.cat)
@rule(torch.concat)
@rule("cat")
def _concatenate(call: "Call", tensors: Any, dim: int = 0) -> Value:
    tensors = [x for x in tensors if math.prod(x.shape) or len(x.dims) > 1]  # torch skips (0,)
    at = dim % len(tensors[0].dims)
    first, *others = [x for x in tensors if x.shape[at]] or tensors
    tensors = [first, *others]
    dims = list(first.dims)
    for other in others:
        for k, label in enumerate(other.dims):
            if k != at:
                reason = f"concatenated with something that stays, at {call.path}"
                dims[k] = call.tracing.unify(dims[k], label, reason)
    parts: list[tuple[Atom, ...]] = []
    for x in tensors:
        parts += call.tracing.resolve(x.dims[at]).parts or ((Atom(x.shape[at]),),)
    dims[at] = label_of(parts)
    return Value(call.shape, tuple(dims))


@rule(torch.stack)
@rule("stack")
def _stacked(call: "Call", tensors: Any, dim: int = 0) -> Value:
    first, *others = tensors
    dims = list(first.dims)
    for other in others:
        for k, label in enumerate(other.dims):
            reason = f"stacked on something that stays, at {call.path}"
            dims[k] = call.tracing.unify(dims[k], label, reason)
    dims.insert(dim % (len(dims) + 1), FIXED)
    return Value(call.shape, tuple(dims))
