"""What the tracer refuses, and claims that only look true on small numbers."""

import jaxtyping
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import symflow
from symflow.errors import LeafError, ShapeError, UnsupportedModuleError


@pytest.fixture(autouse=True)
def _annotations_unchecked(monkeypatch):
    """What users meet, who run without the checks that would name a wrong type first."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def groups(net: nn.Module, *inputs: torch.Tensor) -> list[str]:
    return [str(axis.group) for axis in symflow.Architecture.from_module(net, *inputs).axes]


def after(function, width: int = 4) -> nn.Module:
    """A hidden layer with a function behind it."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, width), nn.Linear(width, 2)
            self.middle = function if isinstance(function, nn.Module) else nn.Identity()

        def forward(self, x):
            x = self.middle(self.first(x))
            return self.last(x if isinstance(function, nn.Module) else function(x))

    return Net()


X = torch.zeros(2, 3)
PERM, SIGN, SCALE = "Permutation(size=4)", " @ Sign(size=4)", " @ PositiveScale(size=4)"


@pytest.mark.parametrize(
    "function, expected",
    [
        (nn.Hardtanh(), PERM + SIGN),
        (nn.Hardtanh(-10, 8), PERM),  # odd only on numbers below eight
        (nn.Hardtanh(0, 6), PERM),
        (lambda x: F.hardtanh(x, -2.0, 2.0), PERM + SIGN),
        (lambda x: F.hardtanh(x, 0.0, 1.0), PERM),
        (lambda x: x.clamp(min=0), PERM + SCALE),
        (lambda x: torch.clamp(x, -1, 1), PERM + SIGN),
        (lambda x: x.clamp(max=1), PERM),
        (torch.relu_, PERM + SCALE),
        (lambda x: torch.softmax(x, -1), PERM),
        (lambda x: 2 * x + 1, PERM),
        (lambda x: x**3, PERM + SIGN + SCALE),
        (lambda x: -x / 3, PERM + SIGN + SCALE),
    ],
)
def test_functions_have_the_groups_they_commute_with(function, expected):
    assert groups(after(function), X) == [expected]


def test_the_gate_tries_large_numbers():
    class Saturating(nn.Module):
        def forward(self, x):
            return x.clamp(-30, 25)

    @symflow.arch.rule(Saturating)
    def claim(call, x):
        return call.elementwise(x, symflow.arch.Activation(odd=True))

    with pytest.raises(symflow.errors.SymmetryError, match=r"Sign.*changes the output"):
        symflow.Architecture.from_module(after(Saturating()), X)


def test_positions_that_are_normalised_together_lose_their_scales():
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(8, 2))
    assert groups(net, torch.zeros(2, 5, 4)) == ["Permutation(size=8)"]


def test_a_first_layer_in_place_leaves_the_example_alone():
    x = -torch.ones(2, 3)
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    arch = symflow.Architecture.from_module(net, x)
    assert str(arch.axes[0].group) == PERM + SIGN
    assert torch.equal(x, -torch.ones(2, 3))


class Twice(nn.Module):
    def forward(self, a, b):
        return a + b


@pytest.mark.parametrize(
    "make, inputs, error, message",
    [
        (lambda: nn.Linear, (X,), UnsupportedModuleError, "an instance, not its class"),
        (lambda: nn.Sequential(nn.ReLU()), (X,), UnsupportedModuleError, "has no weights"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), (X,), UnsupportedModuleError, "run the module"),
        (
            lambda: nn.Sequential(weight_norm(nn.Linear(3, 2))),
            (X,),
            UnsupportedModuleError,
            r"0 \(ParametrizedLinear\) has a parametrisation",
        ),
        (
            lambda: after(lambda x: F.dropout(x, 0.5)),
            (X,),
            UnsupportedModuleError,
            "without training=self.training",
        ),
        (lambda: after(torch.tanh), (), ShapeError, "does not run on the example inputs"),
        (lambda: after(torch.tanh), (X, X), ShapeError, "does not run"),
        (lambda: after(torch.tanh), (torch.zeros(2, 4),), ShapeError, r"\(2, 4\)"),
        (lambda: after(torch.tanh).double(), (X,), ShapeError, "in the module's dtype"),
        (lambda: after(torch.cumsum), (X,), ShapeError, "cumsum"),
    ],
)
def test_what_cannot_be_traced_says_what_to_do(make, inputs, error, message):
    with pytest.raises(error, match=message):
        symflow.Architecture.from_module(make(), *inputs)


def test_hooks_are_refused_by_name():
    net = after(torch.tanh)
    net.first.register_forward_hook(lambda module, given, out: out + 1)
    with pytest.raises(UnsupportedModuleError, match=r"first \(Linear\) has .*hooks"):
        symflow.Architecture.from_module(net, X)


def test_tied_weights_that_differ_are_refused():
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    arch = symflow.Architecture.from_module(net, X)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    arch.flatten(state)
    state["2.weight"] += 5
    with pytest.raises(LeafError, match=r"'2.weight' is tied to '0.weight'.*differ"):
        arch.flatten(state)


@pytest.mark.parametrize(
    "weights, message",
    [
        ("net.pt", "must be a flat tensor.*got str"),
        (None, "got NoneType"),
        (torch.zeros(26).numpy(), "got ndarray"),
        ([torch.zeros(26), torch.zeros(2, 26)], "all of one shape"),
    ],
)
def test_what_is_no_weights_is_named(weights, message):
    arch = symflow.mlp([3, 4, 2])
    with pytest.raises(ShapeError, match=message):
        arch.as_weights(weights)


def test_a_zoo_where_weights_are_wanted_is_pointed_to_its_networks():
    arch = symflow.mlp([3, 4, 2])
    zoo = symflow.zoo.Zoo(arch, torch.zeros(2, 26), torch.zeros(2, 26))
    with pytest.raises(ShapeError, match=r"got Zoo.*its \.final"):
        arch.as_weights(zoo)


def test_building_an_mlp_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    symflow.mlp([3, 4, 2])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("widths", [[3, 4.7, 2], "342", [3], [3, 0, 2]])
def test_widths_are_positive_integers(widths):
    with pytest.raises(ShapeError, match="two or more positive integers"):
        symflow.mlp(widths)
