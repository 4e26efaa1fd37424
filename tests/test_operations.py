"""What single operations do to the units of a layer: each against an expectation by hand.

That no claim is false is tried by ``from_module`` itself; here, none must be smaller than it is.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import symflow
from symflow.arch.rules import registry
from symflow.errors import UnsupportedModuleError

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
    "normalize": (lambda h: F.normalize(h, dim=-1), P, S),
    "norm": (lambda h: h / (1 + h.norm(dim=-1, keepdim=True)), P, S),
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


def test_places_of_extremes_end_all_where_they_are_used_and_nothing_elsewhere():
    assert groups(torch.tanh, lambda h: h + h.max(-1, keepdim=True).indices) == []
    assert groups(torch.tanh, lambda h: h + h.topk(2)[1].sum(-1, keepdim=True)) == []

    def values_alone(h):
        values, _ = h.max(-1, keepdim=True)
        return h - values

    assert groups(torch.tanh, values_alone) == [P]


class Applied(nn.Module):
    """A function of a module with these parts."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


def found(function, x, **parts):
    arch = symflow.Architecture.from_module(Applied(function, **parts), x)
    return [str(axis.group) for axis in arch.axes if axis.name.startswith("h")]


L, X, T = nn.Linear, torch.zeros(4, 3), torch.zeros(2, 5, 8)


def recurrent(zeros):
    def run(net, x):
        h = zeros(x)
        for k in range(5):
            h = torch.tanh(net.w(x[:, k]) + net.u(h))
        return net.c(h)

    return run


def mixture(net, x):
    weights, chosen = net.gate(x).topk(2)
    out = 0
    for k, expert in enumerate(net.experts):
        share = (weights.softmax(-1) * (chosen == k)).sum(-1, keepdim=True)
        out = out + share * expert(x)
    return out


def set_in_place(net, x):
    h = net.a(x)
    h[h < 0] = 0
    return net.c(h)


def multiplied_in_place(net, x):
    h = torch.tanh(net.a(x))
    h.mul_(torch.tanh(net.b(x)))
    return net.c(h)


def experts():
    return nn.ModuleList(nn.Sequential(L(3, 6), nn.ReLU(), L(6, 2)) for _ in range(3))


WRITTEN = {
    "sum over an axis": (lambda n, x: n.c(torch.relu(n.a(x)).sum(axis=1)), T, SCALED),
    "loop from new zeros": (recurrent(lambda x: x.new_zeros(2, 6)), T, P),
    "loop from zeros": (recurrent(lambda x: torch.zeros(x.size(0), 6)), T, P),
    "tokens mixed": (
        lambda n, x: n.e(n.p(torch.relu(n.a(x)).transpose(1, 2)).transpose(1, 2)),
        T,
        P,
    ),
    "set in place": (set_in_place, X, P),
    "looked up": (
        lambda n, x: n.c(torch.tanh(n.a(x))[torch.arange(2), (x[:, :, 0] > 0).sum(1)]),
        T,
        S,
    ),
    "method where": (lambda n, x: n.c((h := torch.relu(n.a(x))).where(h > 0, 0.0)), X, SCALED),
    "sum of a list": (lambda n, x: n.c(torch.relu(sum([n.a(x), n.b(x)]))), X, SCALED),
    "chosen numbers": (lambda n, x: n.c((h := n.a(x)) * torch.where(h >= 0, 1.0, 0.1)), X, SCALED),
    "clamped above": (lambda n, x: n.c(torch.clamp(n.a(x), max=0)), X, SCALED),
    "clamped by a parameter": (lambda n, x: n.c(torch.clamp(n.a(x), max=n.v)), X, SCALED),
    "attention by a vector": (
        lambda n, x: n.c((torch.softmax((h := torch.tanh(n.a(x))) @ n.v, 1)[..., None] * h).sum(1)),
        T,
        S,
    ),
    "rounded division": (lambda n, x: n.c(torch.relu(n.a(x)) // 1), X, P),
    "rounding mode": (lambda n, x: n.c(torch.div(n.a(x), 2, rounding_mode="floor")), X, P),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_networks_as_people_write_them(name):
    function, x, wanted = WRITTEN[name]
    parts = {"a": L(x.shape[-1], 6), "b": L(x.shape[-1], 6), "c": L(6, 2), "e": L(6, 2)}
    parts |= {"w": L(8, 6), "u": L(6, 6), "p": L(5, 5), "v": nn.Parameter(torch.randn(6))}
    assert wanted in found(function, x, **parts)


def test_the_places_of_experts_are_told_apart_and_what_is_in_them_is_not():
    assert found(mixture, X, gate=L(3, 3), experts=experts()) == [SCALED] * 3


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_may_start_from_zeros(kind):
    def run(net, x):
        state = torch.zeros(1, x.size(0), 6)
        return net.c(net.w(x, (state, state) if kind is nn.LSTM else state)[0][:, -1])

    assert found(run, T, w=kind(8, 6, batch_first=True), c=L(6, 2)) == [P]


def test_what_changes_a_tensor_in_place_changes_its_label():
    """The product of two odd factors has the signs of both: what is read is labelled anew."""
    parts = {name: L(3, 6) for name in "ab"}
    assert P in found(multiplied_in_place, X, c=L(6, 2), **parts)


@pytest.mark.parametrize("name", ["erfinv", torch.ops.aten.erfinv, torch.ops.aten.erfinv.default])
def test_exported_operations_are_told_by_their_name(name, monkeypatch):
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))

    def exported(net, x):  # torch.fx cannot follow a choice
        return net.c(torch.erfinv(0.1 * torch.tanh(net.a(x)))) if len(x) > 1 else x

    parts = {"a": L(3, 6), "c": L(6, 2)}
    with pytest.raises(UnsupportedModuleError, match=r"symflow\.arch\.rule\('erfinv', "):
        found(exported, X, **parts)
    symflow.arch.rule(name, symflow.arch.Activation(odd=True))
    assert found(exported, X, **parts) == [S]


def test_casts_that_leave_no_float64_to_try_in_are_named():
    with pytest.raises(UnsupportedModuleError, match=r"does not run in float64.*x\.float\(\)"):
        groups(torch.tanh, lambda h: h.sign().float())
