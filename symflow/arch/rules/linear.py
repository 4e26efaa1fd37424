"""Linear maps: dense, convolutional, and look-ups in a table."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn import functional as F

from symflow.arch.labels import FIXED, Atom, Label, label_of
from symflow.arch.rules.elementwise import LINEAR, PLAIN
from symflow.arch.rules.registry import Value, rule

if TYPE_CHECKING:
    from symflow.arch.trace import Call


@rule(nn.Linear)
def dense(call: "Call", x: Value) -> Value:
    """Map the last dimension by a matrix of the module."""
    out = call.new_axis(call.module.out_features)
    before = _incoming(call, x.dims[-1], x.shape[-1])
    call.tracing.share(before, list(x.dims[:-1]))
    leaves = [call.label("weight", out, before.dual())]
    if call.module.bias is not None:
        _biased(call, x.dims[:-1])
        leaves.append(call.label("bias", out))
    moved = x.with_dim(-1, out, call.module.out_features)
    return replace(moved, made_by=tuple(leaves))


@rule(F.linear)
@rule("linear")
def linear(call: "Call", x: Value, weight: Value, bias: Value | None = None) -> Value:
    """Map the last dimension by a matrix that is a value too."""
    before = _incoming(call, x.dims[-1], x.shape[-1])
    call.contract(before, weight.dims[1], list(x.dims[:-1]))
    out = weight.dims[0]
    made_by = weight.made_by
    if bias is not None:
        _biased(call, x.dims[:-1])
        out = call.tracing.unify(out, bias.dims[0], f"added at {call.path}")
        made_by += bias.made_by
    return replace(x.with_dim(-1, out, weight.shape[0]), made_by=made_by)


def _incoming(call: "Call", label: Label, size: int) -> Label:
    """Label what comes in: one number for all units has columns of its own, in any order."""
    parts = call.tracing.resolve(label).parts
    if not parts or not all(atom.copied for part in parts for atom in part):
        return label
    own = call.new_axis(size)
    call.tracing.weaken(own, PLAIN, "one number for all of it")
    return own


def _biased(call: "Call", others: tuple[Label, ...]) -> None:
    """Let dimensions stand beside a bias, which is one number for all their units."""
    for label in others:
        call.tracing.weaken(label, PLAIN, call.name)


@rule(nn.Conv1d)
@rule(nn.Conv2d)
@rule(nn.Conv3d)
@rule(nn.ConvTranspose1d)
@rule(nn.ConvTranspose2d)
@rule(nn.ConvTranspose3d)
def _convolution(call: "Call", x: Value) -> Value:
    conv = call.module
    spatial = (FIXED,) * len(conv.kernel_size)
    channel = len(x.dims) - len(spatial) - 1
    out, ends = _channels(
        call, x.dims[channel], conv.groups, conv.in_channels, conv.out_channels, conv.transposed
    )
    call.label("weight", *ends, *spatial)
    if conv.bias is not None:
        call.label("bias", out)
    return _convolved(call, x, channel, out)


@rule(F.conv1d)
@rule(F.conv2d)
@rule(F.conv3d)
@rule("conv1d")
@rule("conv2d")
@rule("conv3d")
def _functional_convolution(
    call: "Call",
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Value:
    channel = len(x.dims) - len(weight.dims) + 1
    out, ends = _channels(call, x.dims[channel], groups, x.shape[channel], weight.shape[0], False)
    for own, wanted in zip(weight.dims, ends, strict=False):
        call.tracing.unify(own, wanted, f"grouped at {call.path}")
    for own in weight.dims[2:]:
        call.tracing.fix(own, f"positions of a kernel, at {call.path}")
    if bias is not None:
        out = call.tracing.unify(out, bias.dims[0], f"added at {call.path}")
    return _convolved(call, x, channel, call.tracing.resolve(out))


def _convolved(call: "Call", x: Value, channel: int, out: Label) -> Value:
    dims: list[Label] = [FIXED] * len(x.dims)
    dims[channel] = out
    for k, dim in enumerate(x.dims):
        if k != channel:
            call.tracing.fix(dim, f"a spatial dimension of the convolution at {call.path}")
    return Value(call.shape, tuple(dims))


def _channels(
    call: "Call", before: Label, groups: int, size: int, made: int, transposed: bool
) -> tuple[Label, tuple[Label, Label]]:
    """Label what goes out, and the first two dimensions of the kernel.

    In a grouped convolution each group of channels sees only its own: groups are permuted together
    with all that is in them, and channels within each group.
    """
    if groups == 1:
        out = call.new_axis(made)
        ends = (before.dual(), out) if transposed else (out, before.dual())
        return out, ends
    out = call.new_axis(made)
    incoming = call.tracing.split(before, (groups, size // groups))
    outgoing = call.tracing.split(out, (groups, made // groups))
    reason = f"cut into {groups} groups of channels at {call.path}"
    if incoming is None or outgoing is None:
        call.tracing.fix(before, reason)
        call.tracing.fix(out, reason)
        return FIXED, (FIXED, FIXED)
    call.tracing.share_permutation(outgoing[0], incoming[0], reason)
    kernel = call.tracing.scaled(out, incoming[0].dual())
    return out, (kernel, incoming[1].dual())


@rule(nn.Embedding)
def _embedding(call: "Call", indices: Value) -> Value:
    out = call.new_axis(call.module.embedding_dim)
    call.label("weight", FIXED, out)
    return Value(call.shape, (*(FIXED,) * (len(call.shape) - 1), out))


@rule(F.embedding)
def _functional_embedding(
    call: "Call", indices: Value, weight: Value, *_args: Any, **_options: Any
) -> Value:
    call.tracing.fix(weight.dims[0], f"looked up by its number at {call.path}")
    return Value(call.shape, (*(FIXED,) * (len(call.shape) - 1), weight.dims[1]))


@rule("embedding")
def _aten_embedding(call: "Call", weight: Value, indices: Value, *_args: Any) -> Value:
    return _functional_embedding(call, indices, weight)


@rule(nn.Unfold)
@rule(F.unfold)
@rule("im2col")
def _unfold(call: "Call", x: Value, *_options: Any, **_named: Any) -> Value:
    """Label patches: the places of one are behind the units of its channel."""
    label, places = call.tracing.resolve(x.dims[1]), call.shape[1] // x.shape[1]
    parts = label.parts or ((Atom(x.shape[1]),),)
    patches = label_of([(*part, Atom(places)) for part in parts])
    return Value(call.shape, (x.dims[0], patches, FIXED))


@rule(F.pad)
@rule("pad")
@rule("constant_pad_nd")
def _pad(call: "Call", x: Value, pad: Any, mode: str = "constant", value: Any = None) -> Value:
    for k, (dim, before, after) in enumerate(zip(x.dims, x.shape, call.shape, strict=True)):
        if before != after:
            call.tracing.fix(dim, f"dimension {k} is padded at {call.path}")
    return call.elementwise(x, PLAIN if value else LINEAR)
