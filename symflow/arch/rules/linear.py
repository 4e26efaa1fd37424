"""Linear maps: dense, convolutional, and look-ups in a table."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn import functional as F

from symflow.arch.layout import FIXED, Dim, Label, each
from symflow.arch.rules.registry import Value, rule

if TYPE_CHECKING:
    from symflow.arch.trace import Call


@rule(nn.Linear)
def _linear(call: "Call", x: Value) -> Value:
    out = call.new_axis(call.module.out_features)
    leaves = [call.label("weight", out, each(Dim.dual, x.dims[-1]))]
    if call.module.bias is not None:
        leaves.append(call.label("bias", out))
    moved = x.with_dim(-1, out, call.module.out_features)
    return replace(moved, made_by=tuple(leaves))


@rule(F.linear)
def _functional_linear(call: "Call", x: Value, weight: Value, bias: Value | None = None) -> Value:
    call.contract(x.dims[-1], weight.dims[1])
    if bias is not None:
        call.tracing.unify(weight.dims[0], bias.dims[0], f"added at {call.path}")
    return x.with_dim(-1, weight.dims[0], weight.shape[0])


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
    before = x.dims[channel]
    if conv.groups == 1:
        out = call.new_axis(conv.out_channels)
        ends = (each(Dim.dual, before), out) if conv.transposed else (out, each(Dim.dual, before))
        call.label("weight", *ends, *spatial)
    else:
        out = _channelwise(call, before)
        call.label("weight", call.permuted(out), FIXED, *spatial)
    if conv.bias is not None:
        call.label("bias", out)
    dims: list[Label] = [FIXED] * len(x.dims)
    dims[channel] = out
    for k, dim in enumerate(x.dims):
        if k != channel:
            call.tracing.fix(dim, f"a spatial dimension of the convolution at {call.path}")
    return Value(call.shape, tuple(dims))


def _channelwise(call: "Call", before: Label) -> Label:
    """Label the outputs of a grouped convolution: the units of ``before``, each with a multiple."""
    conv = call.module
    if conv.groups != conv.in_channels or not isinstance(before, Dim) or before == FIXED:
        call.tracing.fix(before, f"split into {conv.groups} groups by {call.path}")
        return FIXED
    return replace(before, inner=before.inner * (conv.out_channels // conv.in_channels))


@rule(nn.Embedding)
def _embedding(call: "Call", indices: Value) -> Value:
    out = call.new_axis(call.module.embedding_dim)
    call.label("weight", FIXED, out)
    return Value(call.shape, (*(FIXED,) * (len(call.shape) - 1), out))


@rule(F.pad)
def _pad(call: "Call", x: Value, pad: Any, mode: str = "constant", value: Any = None) -> Value:
    from symflow.arch.rules.elementwise import LINEAR, PLAIN

    for k, (dim, before, after) in enumerate(zip(x.dims, x.shape, call.shape, strict=True)):
        if before != after:
            call.tracing.fix(dim, f"dimension {k} is padded at {call.path}")
    return call.elementwise(x, PLAIN if value else LINEAR)
