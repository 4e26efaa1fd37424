"""Gains folded into linear maps: the same function, rotations as symmetry, and back again."""

import pytest
import torch
from torch import nn

import symflow
from symflow.arch import fold_gains
from symflow.errors import LeafError, UnsupportedModuleError
from symflow.groups import Orthogonal


class Stream(nn.Module):
    def __init__(self, last=None):
        super().__init__()
        self.first, self.last = nn.Linear(3, 6), last or nn.Linear(6, 2)
        self.norm1, self.norm2 = nn.RMSNorm(6), nn.RMSNorm(6)
        self.up, self.gate, self.down = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 6)
        for norm in (self.norm1, self.norm2):
            nn.init.normal_(norm.weight, 1.0, 0.3)

    def forward(self, x):
        x = self.first(x)
        y = self.norm1(x)
        x = x + self.down(torch.nn.functional.silu(self.gate(y)) * self.up(y))
        return self.last(self.norm2(x))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Stream().double()


def test_folding_keeps_the_function_and_frees_rotations(net):
    x = torch.randn(7, 3, dtype=torch.float64)
    folded = fold_gains(net, x)
    assert torch.allclose(folded.module(x), net(x), rtol=1e-12)
    arch = symflow.Architecture.from_module(folded.module, x)
    assert arch.symmetry["h1"].group == Orthogonal(6)
    assert folded.readers == {"norm1": ("gate", "up"), "norm2": ("last",)}
    # Rotate the stream, then put the gains back: the same function once more.
    w = arch.flatten(folded.module)
    g = arch.symmetry.random(generator=torch.Generator().manual_seed(1), like=w)
    turned = arch.load_into(fold_gains(net, x).module, arch.symmetry.act(g, w))
    again = folded.unfold(turned)
    assert isinstance(again.norm1.weight, nn.Parameter)
    assert torch.allclose(again(x), net(x), rtol=1e-9)
    assert not torch.allclose(again.first.weight, net.first.weight)


def test_networks_apart_by_a_rotation_are_one(net):
    x = torch.zeros(1, 3, dtype=torch.float64)
    module = fold_gains(net, x).module
    arch = symflow.Architecture.from_module(module, x)
    w = arch.flatten(module)
    moved = arch.symmetry.act(
        arch.symmetry.random(generator=torch.Generator().manual_seed(1), like=w), w
    )
    q = symflow.Quotient(arch)
    assert q.distance(w, moved) < 1e-6 * (w - moved).norm()


def test_what_cannot_be_folded_says_why(net):
    x = torch.zeros(1, 3, dtype=torch.float64)
    with pytest.raises(UnsupportedModuleError, match=r"'norm2' is read by 'last'.*no nn\.Linear"):
        fold_gains(Stream(nn.Tanh()).double(), x)
    with torch.no_grad():
        net.norm1.weight[2] = 0
    with pytest.raises(LeafError, match="gain of 'norm1' is zero"):
        fold_gains(net, x)
    with pytest.raises(LeafError, match="give what fold_gains made"):
        fold_gains(Stream().double(), x).unfold(net)
