"""The one ready-made architecture: fully connected networks."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from operator import index
from typing import Any

import torch
from torch import nn

from symflow.arch.architecture import Architecture
from symflow.errors import FileFormatError, ShapeError


class _Sine(nn.Module):
    def forward(self, x: Any) -> Any:  # a tensor, or torch.fx's stand-in for one
        return torch.sin(x)


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "sin": _Sine,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "identity": nn.Identity,
}


def mlp(
    widths: Sequence[int],
    activation: str = "relu",
    *,
    bias: bool = True,
    batch_norm: bool = False,
) -> Architecture:
    """Build the architecture of a fully connected network.

    Parameters
    ----------
    widths
        Sizes from input to output, such as ``[30, 16, 16, 2]``.
    activation
        One of relu, leaky_relu, tanh, sin, gelu, silu, sigmoid, softplus, identity; between
        layers, not after the last.
    bias
        Whether the linear maps have one.
    batch_norm
        Whether ``BatchNorm1d`` stands before each activation.

    Raises
    ------
    ShapeError
        If there are fewer than two widths, one is not positive, or the activation is unknown.

    Examples
    --------
    >>> arch = mlp([784, 10, 10])
    >>> arch.dimension, str(arch.axes[0].group)
    (7960, 'Permutation(size=10) @ PositiveScale(size=10)')
    """
    try:
        sizes = [index(n) for n in widths]
    except TypeError:
        sizes = []
    if len(sizes) < 2 or min(sizes) < 1:
        raise ShapeError(f"widths must be two or more positive integers, got {widths!r}")
    if activation not in ACTIVATIONS:
        raise ShapeError(f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}")
    with torch.random.fork_rng(devices=[]):  # the template's weights are nobody's business
        layers: list[nn.Module] = []
        for k, (n_in, n_out) in enumerate(pairwise(sizes)):
            layers.append(nn.Linear(n_in, n_out, bias=bias))
            if k < len(sizes) - 2:
                layers += [nn.BatchNorm1d(n_out)] if batch_norm else []
                layers.append(ACTIVATIONS[activation]())
    arch = Architecture.from_module(nn.Sequential(*layers), torch.zeros(2, sizes[0]))
    config = {"kind": "mlp", "widths": sizes, "activation": activation}
    return replace(arch, config=config | {"bias": bias, "batch_norm": batch_norm})


def from_config(config: dict[str, Any]) -> Architecture:
    """Build an architecture again from ``arch.config``.

    Raises
    ------
    FileFormatError
        If the description is none that :func:`mlp` makes.

    Examples
    --------
    >>> from_config(mlp([3, 4, 2], "tanh").config).dimension
    26
    """
    if config.get("kind") != "mlp":
        raise FileFormatError(f"unknown kind of architecture: {config.get('kind')!r}")
    try:
        options = {k: v for k, v in config.items() if k not in ("kind", "widths")}
        return mlp(config["widths"], **options)
    except (KeyError, TypeError) as error:
        raise FileFormatError(f"not a description of an MLP: {config}") from error
