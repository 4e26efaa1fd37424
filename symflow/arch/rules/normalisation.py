"""Normalisation layers: what comes in loses its scale, what goes out has one of its own."""

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn import functional as F

from symflow.arch.labels import Atom, Label
from symflow.arch.rules.elementwise import PLAIN
from symflow.arch.rules.registry import RELU, Activation, Value, rule

if TYPE_CHECKING:
    from symflow.arch.trace import Call


@rule(nn.BatchNorm1d)
@rule(nn.BatchNorm2d)
@rule(nn.BatchNorm3d)
@rule(nn.InstanceNorm1d)
@rule(nn.InstanceNorm2d)
@rule(nn.InstanceNorm3d)
def _channels(call: "Call", x: Value) -> Value:
    # The normalisation hides the scale of what comes in; gain and bias give a new one to what goes
    # out. What is before it can be scaled with the running statistics, as far as epsilon is nothing
    # beside the variance.
    seen = _normalised(call, x, scaled=call.tracing.limit)
    before = call.tracing.permuted(seen)
    after = _rescaled(call, x, before, call.module.affine)
    if call.module.track_running_stats:
        call.label("running_mean", seen)
        call.label("running_var", seen.each(partial(Atom.power, k=2)))
    return x.with_dim(1, after, x.shape[1])


def _normalised(call: "Call", x: Value, *, scaled: bool = False) -> Label:
    """Label what comes in, without scales unless these are to be kept."""
    for k, dim in enumerate(x.dims):  # positions are normalised together
        call.tracing.weaken(dim, RELU if scaled and k == 1 else PLAIN, call.name)
    if not scaled:
        return call.tracing.permuted(x.dims[1])
    label = call.tracing.resolve(x.dims[1])
    call.tracing.unmix(label)
    return label


@rule(F.batch_norm)
@rule("batch_norm")
@rule("_native_batch_norm_legit_no_training")
def _batch_norm(
    call: "Call",
    x: Value,
    weight: Value | None,
    bias: Value | None,
    running_mean: Value | None,
    running_var: Value | None,
    *_args: Any,
    **_options: Any,
) -> Value:
    before = _normalised(call, x)
    for value in (running_mean, running_var):
        if value is not None:
            call.tracing.unify(value.dims[0], before, f"normalised at {call.path}")
    return x.with_dim(1, _gained(call, before, (weight, bias)), x.shape[1])


@rule(nn.GroupNorm)
def _groups(call: "Call", x: Value) -> Value:
    before = _grouped(call, x, call.module.num_groups)
    after = _rescaled(call, x, before, call.module.affine)
    return x.with_dim(1, after, x.shape[1])


@rule(F.group_norm)
@rule("group_norm")
def _group_norm(
    call: "Call",
    x: Value,
    num_groups: int,
    weight: Value | None = None,
    bias: Value | None = None,
    *_args: Any,
    **_options: Any,
) -> Value:
    before = _grouped(call, x, num_groups)
    return x.with_dim(1, _gained(call, before, (weight, bias)), x.shape[1])


def _grouped(call: "Call", x: Value, groups: int) -> Label:
    """Label channels normalised in groups: these are permuted, and the channels in each."""
    channels = x.shape[1]
    before = _normalised(call, x)
    if groups in (1, channels):
        return before
    if call.tracing.split(before, (groups, channels // groups)) is None:
        call.tracing.fix(before, f"normalised in {groups} groups of channels at {call.path}")
    return call.tracing.resolve(before)


def _rescaled(call: "Call", x: Value, before: Label, affine: bool) -> Label:
    """Label what comes out: gain and bias, where there are any, give it a scale of its own."""
    if not affine:
        return before
    after = call.tracing.new_fibre(before, call.path)
    call.label("weight", after)
    call.label("bias", after)
    return after


def _gained(call: "Call", before: Label, gains: tuple[Value | None, ...]) -> Label:
    if all(gain is None for gain in gains):
        return before
    after = call.tracing.new_fibre(before, call.path)
    for gain in gains:
        if gain is not None:
            after = call.tracing.unify(gain.dims[-1], after, f"normalised at {call.path}")
    return after


@rule(nn.LayerNorm)
def _layer_norm(call: "Call", x: Value) -> Value:
    count = len(call.module.normalized_shape)
    for dim in x.dims:  # every position is divided by a number of its own
        call.tracing.weaken(dim, PLAIN, call.name)
    normalised = [call.tracing.permuted(dim) for dim in x.dims[-count:]]
    leaves = [leaf for leaf, _ in call.module.named_parameters(recurse=False)]
    if leaves and count == 1:
        normalised = [call.tracing.new_fibre(normalised[0], call.path)]
    for leaf in leaves:
        call.label(leaf, *normalised)
    return Value(x.shape, (*x.dims[:-count], *normalised))


@rule(F.layer_norm)
@rule("layer_norm")
def _functional_layer_norm(
    call: "Call",
    x: Value,
    normalized_shape: Any,
    weight: Value | None = None,
    bias: Value | None = None,
    *_args: Any,
    **_options: Any,
) -> Value:
    for dim in x.dims:
        call.tracing.weaken(dim, PLAIN, call.name)
    if len(normalized_shape) > 1:
        raise TypeError("layer_norm over several dimensions has a rule as nn.LayerNorm only")
    before = call.tracing.permuted(x.dims[-1])
    return x.with_dim(-1, _gained(call, before, (weight, bias)), x.shape[-1])


@rule(nn.RMSNorm)
def _rms_norm(call: "Call", x: Value) -> Value:
    weight = call.module.weight
    value = None
    if weight is not None:
        shape = tuple(weight.shape)
        value = Value(shape, tuple(call.new_axis(n) for n in shape))
        call.label("weight", *value.dims)
    return _functional_rms_norm(call, x, call.module.normalized_shape, value)


@rule(F.rms_norm)
@rule("rms_norm")
def _functional_rms_norm(
    call: "Call",
    x: Value,
    normalized_shape: Any,
    weight: Value | None = None,
    *_args: Any,
    **_options: Any,
) -> Value:
    # The root mean square sees neither signs nor rotations of what it is taken over.
    count = len(normalized_shape)
    for dim in x.dims[:-count]:
        call.tracing.weaken(dim, PLAIN, call.name)
    for dim in x.dims[-count:]:
        if count == 1:
            call.tracing.keep_rotations(dim, call.name)
        else:
            call.tracing.weaken(dim, Activation(odd=True), call.name)
    if weight is None:
        return x
    dims = [
        call.tracing.multiplied(a, b, f"multiplied at {call.path}")
        for a, b in zip(x.dims[-count:], weight.dims, strict=True)
    ]
    return Value(x.shape, (*x.dims[:-count], *dims))
