"""Functions of single elements, and pooling, which acts alike on every channel."""

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from symflow.arch.labels import FIXED
from symflow.arch.rules.registry import LINEAR, ODD, PLAIN, RELU, Activation, Value, rule

if TYPE_CHECKING:
    from symflow.arch.trace import Call

for _target in (
    *(nn.ReLU, F.relu, torch.relu, torch.relu_, "relu", "relu_", nn.LeakyReLU, F.leaky_relu),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d),
    *(torch.max_pool1d, torch.max_pool2d, "leaky_relu", "max_pool2d", torch.abs, "abs"),
    *("max_pool1d", "max_pool3d", nn.RReLU, F.rrelu, "adaptive_max_pool1d", "adaptive_max_pool2d"),
):
    rule(_target, RELU)
for _target in (
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
    *(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, F.interpolate),
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad2d),
    *(torch.neg, "neg", operator.neg, "adaptive_avg_pool2d", "avg_pool2d", "upsample_nearest2d"),
    *("avg_pool1d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool3d"),
    *(nn.ZeroPad3d, nn.ReflectionPad3d, nn.ReplicationPad1d, nn.ReplicationPad3d, nn.CircularPad1d),
    *(nn.CircularPad2d, nn.CircularPad3d),
):
    rule(_target, LINEAR)
for _target in (
    *(nn.Tanh, torch.tanh, F.tanh, "tanh", torch.sin, "sin", torch.erf, "erf"),
    *(nn.Softsign, F.softsign, nn.Tanhshrink, torch.arctan, torch.reciprocal, "reciprocal"),
    *(torch.sinh, "sinh", torch.asinh, "asinh", torch.tan, "tan", torch.atan, "atan", F.tanhshrink),
    *(nn.Softshrink, F.softshrink, "softshrink", torch.round, "round", torch.trunc, "trunc"),
):
    rule(_target, ODD)
for _target in (
    *(nn.GELU, F.gelu, nn.SiLU, F.silu, nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid"),
    *(nn.Softplus, F.softplus, nn.ELU, F.elu, nn.Mish, F.mish, nn.SELU, F.selu, nn.CELU),
    *(nn.Softmax, F.softmax, "softmax", nn.LogSoftmax, F.log_softmax, "log_softmax"),
    *(nn.ReLU6, F.relu6, nn.Hardswish, F.hardswish, nn.Hardsigmoid, F.hardsigmoid),
    *(torch.exp, "exp", torch.cos, "cos", torch.softmax, torch.log_softmax, "gelu", "silu"),
    *(torch.rsqrt, "rsqrt", torch.sqrt, "sqrt", "elu", "softplus", "mish", "hardswish", "silu_"),
    *(torch.log, "log", torch.log1p, "log1p", torch.expm1, "expm1", torch.cosh, "cosh"),
    *(nn.LogSigmoid, F.logsigmoid, "log_sigmoid", nn.Threshold, F.threshold, "threshold"),
    *(torch.floor, "floor", torch.ceil, "ceil", nn.Softmin, F.softmin, torch.sign, "sign"),
    *(torch.isnan, "isnan", torch.nan_to_num, "nan_to_num", torch.frac, "frac"),
):
    rule(_target, PLAIN)


@rule(torch.square)
@rule("square")
def _square(call: "Call", x: Value) -> Value:
    return call.elementwise(x, Activation(odd=True, homogeneous=2))


@rule(nn.Hardtanh)
def _hardtanh_module(call: "Call", x: Value) -> Value:
    return _hardtanh(call, x, call.module.min_val, call.module.max_val)


@rule(F.hardtanh)
def _hardtanh(
    call: "Call", x: Value, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Value:
    return call.elementwise(x, ODD if min_val == -max_val else PLAIN)


@rule(nn.Identity)
@rule(nn.Dropout)
@rule(nn.Dropout1d)
@rule(nn.Dropout2d)
@rule(nn.Dropout3d)
@rule(F.dropout)
@rule("contiguous")
@rule("dropout")
@rule("clone")
@rule("detach")
@rule("detach_")
@rule("to")
@rule("float")
@rule("double")
@rule("half")
@rule("type_as")
@rule("_to_copy")
@rule("lift_fresh_copy")
@rule("alias")
def _unchanged(call: "Call", x: Value, *_args: Any, **_options: Any) -> Value:
    return x


@rule(nn.PReLU)
def _prelu(call: "Call", x: Value) -> Value:
    channel = x.dims[1] if len(x.dims) > 1 and call.module.num_parameters > 1 else FIXED
    call.label("weight", call.permuted(channel))
    return call.elementwise(x, RELU)
