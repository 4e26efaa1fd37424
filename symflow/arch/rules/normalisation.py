"""Normalisation layers: what comes in loses its scale, what goes out has one of its own."""

from typing import TYPE_CHECKING

from torch import nn

from symflow.arch.layout import FIXED, Label
from symflow.arch.rules.elementwise import PLAIN
from symflow.arch.rules.registry import Activation, Value, rule

if TYPE_CHECKING:
    from symflow.arch.trace import Call


@rule(nn.BatchNorm1d)
@rule(nn.BatchNorm2d)
@rule(nn.BatchNorm3d)
@rule(nn.InstanceNorm1d)
@rule(nn.InstanceNorm2d)
@rule(nn.InstanceNorm3d)
def _channels(call: "Call", x: Value) -> Value:
    # The normalisation hides the scale of what comes in, so two axes meet here: they share their
    # permutation, but only the new one (gain, bias, next map) can be scaled.
    before = x.dims[1]
    for dim in (x.dims[0], *x.dims[2:]):  # positions are normalised together
        call.tracing.weaken(dim, PLAIN, call.name)
    after = _rescaled(call, x, before, call.module.affine)
    if call.module.track_running_stats:
        call.label("running_mean", call.permuted(before))
        call.label("running_var", call.permuted(before))
    return x.with_dim(1, after, x.shape[1])


@rule(nn.GroupNorm)
def _groups(call: "Call", x: Value) -> Value:
    before = x.dims[1]
    if call.module.num_groups not in (1, call.module.num_channels):
        call.tracing.fix(
            before, f"normalised in {call.module.num_groups} groups of channels at {call.path}"
        )
        before = FIXED
    after = _rescaled(call, x, before, call.module.affine)
    return x.with_dim(1, after, x.shape[1])


def _rescaled(call: "Call", x: Value, before: Label, affine: bool) -> Label:
    """Label what comes out: gain and bias, where there are any, give it a scale of its own."""
    if before == FIXED:
        after: Label = FIXED
    elif affine:
        after = call.follow_axis(before)
    else:
        after = call.elementwise(x, PLAIN).dims[1]
    if affine:
        call.label("weight", after)
        call.label("bias", after)
    return after


@rule(nn.LayerNorm)
def _layer_norm(call: "Call", x: Value) -> Value:
    count = len(call.module.normalized_shape)
    for dim in x.dims[:-count]:  # every position is divided by a number of its own
        call.tracing.weaken(dim, PLAIN, call.name)
    *others, before = x.dims[-count:]
    if others or before == FIXED or not call.module.elementwise_affine:
        dims = tuple(call.permuted(dim) for dim in x.dims[-count:])
        for dim in x.dims[-count:]:
            call.tracing.weaken(dim, PLAIN, call.name)
        for leaf, _ in call.module.named_parameters(recurse=False):
            call.label(leaf, *dims)
        return x
    after = call.follow_axis(before)
    for leaf, _ in call.module.named_parameters(recurse=False):
        call.label(leaf, after)
    return x.with_dim(-1, after, x.shape[-1])


@rule(nn.RMSNorm)
def _rms_norm(call: "Call", x: Value) -> Value:
    # Root mean squares do not see signs, so these pass; a scale of single units does not.
    for dim in x.dims[: -len(call.module.normalized_shape)]:
        call.tracing.weaken(dim, PLAIN, call.name)
    for dim in x.dims[-len(call.module.normalized_shape) :]:
        call.tracing.weaken(dim, Activation(odd=True), call.name)
    if call.module.weight is not None:
        normalised = x.dims[-len(call.module.normalized_shape) :]
        call.label("weight", *(call.permuted(dim) for dim in normalised))
    return x
