"""What single operations do to the units of a layer: each against an expectation by hand.

That no claim is false is tried by ``from_module`` itself; here, none must be smaller than it is.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import symflow
from symflow.errors import SymmetryError, UnsupportedModuleError

P, S = "Permutation(size=6)", "Permutation(size=6) @ Sign(size=6)"
SCALED = "Permutation(size=6) @ PositiveScale(size=6)"


class Net(nn.Module):
    """A layer, its activation, an operation on (4, 6) or (4, 6, 5, 5), and a linear read-out."""

    def __init__(self, activation, operation, inputs, *, images):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 2) if images else nn.Linear(3, 6)
        self.last = nn.Linear(inputs, 2)
        self.activation, self.operation = activation, operation

    def forward(self, x):
        return self.last(self.operation(self.activation(self.first(x))))


def groups(activation, operation, inputs=6, *, images=False):
    x = torch.zeros(4, 3, 6, 6) if images else torch.zeros(4, 3)
    arch = symflow.Architecture.from_module(Net(activation, operation, inputs, images=images), x)
    return [str(axis.group) for axis in arch.axes if axis.name.startswith("h")]


# What is left after ReLU, and after tanh: by hand.
UNITS = {
    "broadcast": (lambda h: torch.broadcast_to(h[:, None], (4, 3, 6)).sum(1), SCALED, S),
    "method broadcast_to": (lambda h: h[:, None].broadcast_to(4, 3, 6).sum(1), SCALED, S),
    "movedim": (lambda h: torch.movedim(h[:, None], 1, 2)[..., 0], SCALED, S),
    "swapaxes": (lambda h: h[:, None].swapaxes(1, 2)[..., 0], SCALED, S),
    "lerp": (lambda h: torch.lerp(h, 2 * h, 0.5), SCALED, S),
    "einsum": (lambda h: torch.einsum("bi,kj->bi", h, torch.ones(2, 2, dtype=h.dtype)), SCALED, S),
    "maximum": (lambda h: torch.maximum(h, 0.5 * h), SCALED, P),
    "minimum": (lambda h: torch.min(h, 2 * h), SCALED, P),
    "greatest of a stack": (lambda h: torch.stack([h, -h]).max(0).values, SCALED, P),
    "cumulative, elsewhere": (lambda h: h[:, None].cumsum(1)[:, 0], SCALED, S),
    "where": (lambda h: torch.where(h > 0, h, 0.5 * h), SCALED, P),
    "where a number": (lambda h: torch.where(h > 0.1, h, 0.0), P, P),
    "masked fill": (lambda h: h.masked_fill(h < 0, 0.0), SCALED, P),
    "truths": (lambda h: ((h > 0) & ~(h > 1)).to(h.dtype), P, P),
    "normalize": (lambda h: F.normalize(h, dim=-1), P, P),
    "norm": (lambda h: h / (1 + h.norm(dim=-1, keepdim=True)), P, P),
    "root mean square": (lambda h: h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1), P, S),
    "sort": (lambda h: torch.sort(h, -1).values, P, P),
    "topk": (lambda h: h.topk(6, -1).values, P, P),
    "log-sum-exp": (lambda h: h - torch.logsumexp(h, 1, keepdim=True), P, P),
    "addcmul": (lambda h: torch.addcmul(h, h, h), P, P),
    "sinh": (torch.sinh, P, S),
    "log1p": (lambda h: torch.log1p(h.abs()), P, P),
}
ENDED = {
    "flip": lambda h: torch.flip(h, [1]),
    "roll": lambda h: torch.roll(h, 1, 1),
    "cumulative, over units": lambda h: torch.cumsum(h, 1),
    "index_select": lambda h: h.index_select(1, torch.tensor([5, 4, 3, 2, 1, 0])),
    "gather": lambda h: h.gather(1, torch.zeros(4, 6, dtype=torch.int64)),
    "argmax": lambda h: h + h.argmax(1, keepdim=True),
}
COPIES = {
    "repeat": lambda h: h.repeat(1, 2),
    "tile": lambda h: torch.tile(h, (1, 2)),
    "hstack": lambda h: torch.hstack([h, h]),
}
IMAGES = {
    "greatest": (lambda h: h.flatten(2).max(-1).values, 6, SCALED, P),
    "least": (lambda h: torch.amin(h, (2, 3)), 6, SCALED, P),
    "deviation": (lambda h: torch.std(h, (2, 3)), 6, SCALED, P),
    "variance": (lambda h: h.var((2, 3)), 6, SCALED, S),
    "moments": (lambda h: torch.var_mean(h, (2, 3))[1], 6, SCALED, S),
    "product": (lambda h: h.prod(-1).mean(-1), 6, P, P),
    "patches": (lambda h: F.unfold(h, 2).mean(-1), 24, SCALED, S),
    "patches, module": (lambda h: nn.Unfold(2)(h).mean(-1), 24, SCALED, S),
    "padding": (lambda h: nn.ZeroPad2d(1)(h).mean((2, 3)), 6, SCALED, S),
    "summed by einsum": (lambda h: torch.einsum("bchw->bc", h), 6, SCALED, S),
    "energy by einsum": (lambda h: torch.einsum("bchw,bchw->bc", h, h), 6, SCALED, S),
}


@pytest.mark.parametrize("name", UNITS)
def test_operations_on_units(name):
    operation, relu, tanh = UNITS[name]
    assert groups(torch.relu, operation) == [relu]
    assert groups(torch.tanh, operation) == [tanh]


@pytest.mark.parametrize("name", ENDED)
def test_what_tells_the_places_of_units_apart_ends_all(name):
    assert groups(torch.relu, ENDED[name]) == []


@pytest.mark.parametrize("name", COPIES)
def test_copies_move_alike(name):
    assert groups(torch.relu, COPIES[name], 12) == [SCALED]
    assert groups(torch.tanh, COPIES[name], 12) == [S]


@pytest.mark.parametrize("name", IMAGES)
def test_operations_on_channels(name):
    operation, inputs, relu, tanh = IMAGES[name]
    assert groups(torch.relu, operation, inputs, images=True) == [relu]
    assert groups(torch.tanh, operation, inputs, images=True) == [tanh]


def test_channels_that_are_shuffled_keep_what_blocks_allow():
    """Two groups of three, written as three of two: as reshapes and transposes they are known."""
    shuffled = groups(torch.relu, lambda h: F.channel_shuffle(h, 2).mean((2, 3)), images=True)
    assert shuffled == ["Permutation(size=2)", "Permutation(size=3) @ PositiveScale(size=3)"]


def test_the_place_of_a_maximum_must_not_be_used_as_a_number():
    with pytest.raises(SymmetryError, match="is not a symmetry"):
        groups(torch.tanh, lambda h: h + h.max(-1, keepdim=True).indices)


def test_casts_that_leave_no_float64_to_try_in_are_named():
    with pytest.raises(UnsupportedModuleError, match=r"does not run in float64.*x\.float\(\)"):
        groups(torch.tanh, lambda h: h.sign().float())
