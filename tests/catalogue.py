"""Architectures that people have, and the symmetry that each must be found to have, by hand.

What is expected is written from the mathematics (geometry of each layer), not from what the tracer
says: one line for each axis, from the input to the output, as ``size kinds``. Kinds: ``perm``
(permutations), ``sign``, ``scale`` (positive), ``linear`` (invertible), ``orthogonal``, ``rotary``;
``each`` follows if there is one element for each unit of the axis before.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from catalogue_attention import ATTENTION
from torch import Tensor, nn
from torch.nn import functional as F

from symflow.arch import Axis
from symflow.groups import (
    CompactProduct,
    GeneralLinear,
    NoncompactProduct,
    Orthogonal,
    Permutation,
    PositiveScale,
    Rotary,
    Sign,
    Trivial,
)

KINDS = {
    GeneralLinear: "linear",
    Orthogonal: "orthogonal",
    Permutation: "perm",
    PositiveScale: "scale",
    Rotary: "rotary",
    Sign: "sign",
    Trivial: "trivial",
}


@dataclass(frozen=True)
class Entry:
    """One architecture.

    Attributes
    ----------
    name
        What it is.
    make
        Builds the module.
    inputs
        Example inputs.
    axes
        What must be found, in order.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: tuple[Any, ...]
    axes: tuple[str, ...]

    @property
    def rounding(self) -> float:
        """Relative change of outputs by rounding: Llama casts to float32 inside its norms."""
        return 1e-5 if self.name.startswith("Llama") else 1e-9


def told(axis: Axis) -> str:
    """An axis in the words of the catalogue."""
    left, kinds = [axis.group], []
    while left:
        group = left.pop(0)
        if isinstance(group, CompactProduct | NoncompactProduct):
            left = [group.outer, group.inner, *left]
        else:
            kinds.append(KINDS[type(group)])
    over = "" if axis.over is None else " each"
    return f"{axis.size} {' '.join(kinds)}{over}"


class Residual(nn.Module):
    """x + f(x), with another map on the shortcut if given."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None, after: Any = None):
        super().__init__()
        self.body, self.shortcut, self.after = body, shortcut or nn.Identity(), after

    def forward(self, x: Any) -> Any:
        y = self.body(x) + self.shortcut(x)
        return y if self.after is None else self.after(y)


class Mean(nn.Module):
    """Mean over dimensions."""

    def __init__(self, *dims: int):
        super().__init__()
        self.dims = dims

    def forward(self, x: Any) -> Any:
        return x.mean(self.dims)


def conv_bn(n_in: int, n_out: int, stride: int = 1, size: int = 3) -> nn.Sequential:
    """Convolution and batch normalisation."""
    conv = nn.Conv2d(n_in, n_out, size, stride, size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(n_out))


def basic_block(n_in: int, n_out: int, stride: int) -> nn.Module:
    """Residual block of He et al. (2016), with a projection where the shape changes."""
    body = nn.Sequential(conv_bn(n_in, n_out, stride), nn.ReLU(), conv_bn(n_out, n_out))
    same = stride == 1 and n_in == n_out
    return Residual(body, None if same else conv_bn(n_in, n_out, stride, 1), F.relu)


def resnet20(width: int = 4) -> nn.Module:
    """Three stages of three blocks, as on CIFAR-10."""
    layers: list[nn.Module] = [conv_bn(3, width), nn.ReLU()]
    n = width
    for k, n_out in enumerate((width, 2 * width, 4 * width)):
        for j in range(3):
            layers.append(basic_block(n, n_out, 2 if k and j == 0 else 1))
            n = n_out
    return nn.Sequential(*layers, Mean(2, 3), nn.Linear(n, 10))


class DenseNet(nn.Module):
    """Huang et al. (2017): every block sees what all before it made."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(6 + 4 * k), nn.ReLU(), nn.Conv2d(6 + 4 * k, 4, 3, padding=1)
            )
            for k in range(3)
        )
        self.last = nn.Sequential(nn.BatchNorm2d(18), nn.ReLU(), Mean(2, 3), nn.Linear(18, 5))

    def forward(self, x: Any) -> Any:
        x = self.first(x)
        for block in self.blocks:
            x = torch.cat([x, block(x)], 1)
        return self.last(x)


class UNet(nn.Module):
    """Ronneberger et al. (2015), two levels."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 8, 3, 2, 1)
        self.middle = nn.Conv2d(8, 9, 3, padding=1)
        self.up = nn.ConvTranspose2d(9, 5, 2, 2)
        self.out = nn.Sequential(nn.Conv2d(9, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 1, 1))

    def forward(self, x: Any) -> Any:
        a = F.relu(self.down1(x))
        b = F.relu(self.middle(F.relu(self.down2(a))))
        return self.out(torch.cat([a, F.relu(self.up(b))], dim=1))


class SqueezeExcite(nn.Module):
    """Channels times a gate made of their means (Hu et al., 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)
        self.gate = nn.Sequential(
            *(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.ReLU()),
            *(nn.Conv2d(4, 8, 1), nn.Sigmoid()),
        )

    def forward(self, x: Any) -> Any:
        x = F.relu(self.conv(x))
        return self.head((x * self.gate(x)).mean((2, 3)))


class SwiGLU(nn.Module):
    """Down(silu(gate(x)) * up(x)); ``fused``: gate and up are one map, cut in two."""

    def __init__(self, width: int, hidden: int, fused: bool = False):
        super().__init__()
        self.fused = fused
        if fused:
            self.both = nn.Linear(width, 2 * hidden)
        else:
            self.gate, self.up = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Any) -> Any:
        gate, up = self.both(x).chunk(2, -1) if self.fused else (self.gate(x), self.up(x))
        return self.down(F.silu(gate) * up)


class Mixer(nn.Module):
    """Tolstikhin et al. (2021): maps over positions and maps over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 4, 4)
        self.norm1, self.norm2, self.norm = (nn.LayerNorm(6) for _ in range(3))
        self.tokens = nn.Sequential(nn.Linear(4, 9), nn.GELU(), nn.Linear(9, 4))
        self.channels = nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Any) -> Any:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norm2(x))
        return self.head(self.norm(x).mean(1))


class Recurrent(nn.Module):
    """The last output of a recurrent layer, read by a linear map."""

    def __init__(self, kind: type[nn.Module], **options: Any):
        super().__init__()
        self.layer = kind(3, 5, batch_first=True, **options)
        self.head = nn.Linear(5 * (1 + options.get("bidirectional", False)), 2)

    def forward(self, x: Any) -> Any:
        outputs, _ = self.layer(x)
        return self.head(outputs[:, -1])


class Text(nn.Module):
    """Word embeddings and positions as bare parameters, two gated blocks, mean."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.positions = nn.Parameter(torch.randn(1, 5, 6))
        self.blocks = nn.Sequential(
            *(Residual(nn.Sequential(nn.LayerNorm(6), SwiGLU(6, n))) for n in (7, 8))
        )
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Any) -> Any:
        return self.head(self.norm(self.blocks(self.words(x) + self.positions)).mean(1))


class TiedAutoencoder(nn.Module):
    """The decoder's weight is the encoder's, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(5, 4)
        self.bias = nn.Parameter(torch.randn(5))

    def forward(self, x: Any) -> Any:
        return F.linear(torch.tanh(self.encode(x)), self.encode.weight.t(), self.bias)


def _image(channels: int, size: int = 8) -> tuple[Tensor, ...]:
    return (torch.zeros(2, channels, size, size),)


def _mlp(activation: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(3, 5), activation, nn.Linear(5, 2))


_ROW = (torch.zeros(2, 3),)
_GAIN = "1 sign scale each"
_SEQUENCE = (torch.zeros(2, 4, 3),)

CATALOGUE = (
    Entry("MLP, ReLU", _mlp(nn.ReLU()), _ROW, ("5 perm scale",)),
    Entry("MLP, tanh", _mlp(nn.Tanh()), _ROW, ("5 perm sign",)),
    Entry("MLP, GELU", _mlp(nn.GELU()), _ROW, ("5 perm",)),
    Entry(
        "MLP, squared ReLU",
        lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(), Square(), nn.Linear(5, 2)),
        _ROW,
        ("5 perm scale",),
    ),
    Entry(
        "MLP, BatchNorm",
        lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)),
        _ROW,
        ("5 perm scale",),
    ),
    Entry(
        "VGG-style CNN",
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(24, 7), nn.ReLU(), nn.Linear(7, 3)),
        ),
        _image(3),
        ("4 perm scale", "6 perm scale", "7 perm scale"),
    ),
    Entry(
        "1-d CNN, tanh, average pooling",
        lambda: nn.Sequential(
            *(nn.Conv1d(2, 4, 3), nn.Tanh(), nn.AvgPool1d(2), nn.Conv1d(4, 5, 2), nn.Tanh()),
            *(nn.Flatten(), nn.Linear(10, 2)),
        ),
        (torch.zeros(2, 2, 8),),
        ("4 perm sign", "5 perm sign"),
    ),
    Entry(
        "3-d CNN",
        lambda: nn.Sequential(
            nn.Conv3d(1, 3, 2), nn.BatchNorm3d(3), nn.ReLU(), Mean(2, 3, 4), nn.Linear(3, 2)
        ),
        (torch.zeros(2, 1, 4, 4, 4),),
        ("3 perm scale",),
    ),
    Entry(
        "decoder of transposed convolutions",
        lambda: nn.Sequential(
            *(nn.Linear(3, 32), nn.ReLU(), nn.Unflatten(1, (8, 2, 2))),
            *(nn.ConvTranspose2d(8, 5, 2, 2), nn.ReLU(), nn.ConvTranspose2d(5, 1, 2, 2)),
        ),
        _ROW,
        ("8 perm scale", "5 perm scale"),
    ),
    Entry(
        "MobileNet block: depthwise and pointwise",
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()),
            *(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6()),
            *(nn.Conv2d(8, 5, 1, bias=False), nn.BatchNorm2d(5), Mean(2, 3), nn.Linear(5, 2)),
        ),
        _image(3),
        ("8 perm", "5 perm sign scale"),
    ),
    Entry(
        "ResNet-20",
        resnet20,
        _image(3, 16),
        (
            *("4 perm scale",) * 4,
            *("8 perm scale",) * 4,
            *("16 perm scale",) * 4,
        ),
    ),
    # Each norm on the growing concatenation has gains of its own for what came before it.
    Entry(
        "DenseNet",
        DenseNet,
        _image(3),
        (
            *("6 perm", *("1 scale each",) * 4, "4 perm", *("1 scale each",) * 3),
            *("4 perm", *("1 scale each",) * 2, "4 perm scale"),
        ),
    ),
    Entry(
        "U-Net",
        UNet,
        _image(1),
        tuple(f"{n} perm scale" for n in (4, 8, 9, 5, 6)),
    ),
    Entry("squeeze and excite", SqueezeExcite, _image(3), ("8 perm scale", "4 perm scale")),
    Entry(
        "GroupNorm with one group",
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.GroupNorm(1, 4), nn.SiLU(), Mean(2, 3), nn.Linear(4, 2)
        ),
        _image(3),
        ("4 perm",),
    ),
    Entry(
        "InstanceNorm",
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4), nn.GELU(), Mean(2, 3), nn.Linear(4, 2)
        ),
        _image(3),
        ("4 perm",),
    ),
    Entry(
        "residual MLP, LayerNorm first",
        lambda: nn.Sequential(
            nn.Linear(3, 6),
            *(
                Residual(
                    nn.Sequential(nn.LayerNorm(6), nn.Linear(6, n), nn.GELU(), nn.Linear(n, 6))
                )
                for n in (7, 8)
            ),
            *(nn.LayerNorm(6), nn.Linear(6, 2)),
        ),
        _ROW,
        ("6 perm", *(_GAIN,) * 3, "7 perm", "8 perm"),
    ),
    Entry(
        "residual MLP, RMSNorm first",
        lambda: nn.Sequential(
            nn.Linear(3, 6),
            Residual(nn.Sequential(nn.RMSNorm(6), SwiGLU(6, 7))),
            *(nn.RMSNorm(6), nn.Linear(6, 2)),
        ),
        _ROW,
        ("6 perm", "1 sign each", _GAIN, _GAIN, "7 perm sign scale"),
    ),
    Entry(
        "SwiGLU, fused",
        lambda: nn.Sequential(nn.Linear(3, 4), nn.GELU(), SwiGLU(4, 6, fused=True)),
        _ROW,
        ("4 perm", "6 perm sign scale"),
    ),
    # The gain of the first norm ends at the GELU between maps over positions.
    Entry("MLP-Mixer", Mixer, _image(3), ("6 perm", *(_GAIN,) * 2, "9 perm", "7 perm")),
    Entry(
        "text, embeddings and bare parameters",
        Text,
        (torch.randint(11, (2, 5)),),
        (
            *("6 perm", *(_GAIN,) * 3),
            *("7 perm sign scale", "8 perm sign scale"),
        ),
    ),
    Entry("tied autoencoder", TiedAutoencoder, (torch.zeros(2, 5),), ("4 perm sign",)),
    Entry("RNN", lambda: Recurrent(nn.RNN), _SEQUENCE, ("5 perm sign",)),
    Entry("LSTM", lambda: Recurrent(nn.LSTM), _SEQUENCE, ("5 perm sign",)),
    Entry(
        "LSTM, two layers, both directions",
        lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True),
        _SEQUENCE,
        ("5 perm sign",) * 4,
    ),
    Entry("GRU", lambda: Recurrent(nn.GRU), _SEQUENCE, ("5 perm sign",)),
    Entry("SIREN", lambda: Siren(), _ROW, ("5 perm sign", "6 perm sign")),
    *(Entry(*row) for row in ATTENTION),
)


class Square(nn.Module):
    """The square of each element."""

    def forward(self, x: Any) -> Any:
        return torch.square(x)


class Siren(nn.Module):
    """Sitzmann et al. (2020): sines of linear maps."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 5), nn.Linear(5, 6)])
        self.last = nn.Linear(6, 1)

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = torch.sin(30 * layer(x))
        return self.last(x)
