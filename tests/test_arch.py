"""From modules to axes and groups; rules, chosen groups, and what cannot be traced."""

import copy
import re

import pytest
import torch
from torch import nn

import symflow
from symflow import Architecture, Permutation, PositiveScale, Sign
from symflow.arch import Activation, rule
from symflow.arch.rules.registry import _RULES
from symflow.errors import (
    LeafError,
    ShapeError,
    SymmetryError,
    UnsupportedModuleError,
)
from symflow.groups import GeneralLinear
from symflow.testing import architectures, symmetry_laws


@pytest.mark.parametrize("law", symmetry_laws(architectures()), ids=str)
def test_law(law):
    law.check()


@pytest.fixture
def rules():
    """What a test registers is forgotten after it."""
    before = dict(_RULES)
    yield
    _RULES.clear()
    _RULES.update(before)


def between(*layers, width=3, inputs=2):
    """A network with some layers between two linear maps."""
    return nn.Sequential(nn.Linear(inputs, width), *layers, nn.Linear(width, 1))


def traced(*layers, **sizes):
    return Architecture.from_module(between(*layers, **sizes), torch.zeros(2, 2))


def draw(arch, generator, *batch):
    w = torch.randn(*batch, arch.dimension, generator=generator, dtype=torch.float64)
    for leaf in arch.leaves:
        if leaf.name.endswith("running_var"):
            w[..., leaf.span] = w[..., leaf.span].exp()
    return w


# ---------------------------------------------------------------- which group acts where

PLAIN, SIGNS, SCALES = (
    lambda n: Permutation(n),
    lambda n: Permutation(n) @ Sign(n),
    lambda n: Permutation(n) @ PositiveScale(n),
)


def cubic(n):
    return Permutation(n) @ Sign(n) @ PositiveScale(n)


class Call(nn.Module):
    """Calls a function or a tensor method in ``forward``."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


# Written down by hand, from the table of intertwiner groups (Godfrey et al., 2022).
BY_NAME = {
    "identity": GeneralLinear,
    "relu": SCALES,
    "leaky_relu": SCALES,
    "tanh": SIGNS,
    "sin": SIGNS,
    "gelu": PLAIN,
    "silu": PLAIN,
    "sigmoid": PLAIN,
    "softplus": PLAIN,
}
BY_LAYER = [
    (nn.Identity(), cubic),
    (nn.Dropout(0.5), cubic),
    (nn.ReLU(), SCALES),
    (nn.LeakyReLU(0.3), SCALES),
    (nn.PReLU(), SCALES),
    (nn.PReLU(3), SCALES),
    (Call(torch.relu), SCALES),
    (Call(lambda x: x.relu()), SCALES),
    (Call(lambda x: 2 * torch.relu(x) / 3), SCALES),
    (Call(lambda x: 1 / (x + 5)), PLAIN),
    (Call(lambda x: x * x * x), cubic),
    (nn.Tanh(), SIGNS),
    (nn.Hardtanh(), SIGNS),
    (nn.Softsign(), SIGNS),
    (nn.Tanhshrink(), SIGNS),
    (Call(torch.erf), SIGNS),
    (Call(torch.sin), SIGNS),
    (Call(lambda x: x.tanh()), SIGNS),
    (nn.GELU(), PLAIN),
    (nn.SiLU(), PLAIN),
    (nn.ELU(), PLAIN),
    (nn.Mish(), PLAIN),
    (nn.ReLU6(), PLAIN),
    (nn.Softmax(-1), PLAIN),
    (Call(torch.sigmoid), PLAIN),
    (Call(torch.cos), PLAIN),
    (nn.BatchNorm1d(3), cubic),
    (nn.BatchNorm1d(3, affine=False), PLAIN),
]


@pytest.mark.parametrize("activation", BY_NAME)
def test_groups_of_mlps(activation):
    arch = symflow.mlp([2, 3, 4, 1], activation)
    group = BY_NAME[activation]
    # One row reads the four last units: no point of least norm under all linear maps of these.
    last = cubic if activation == "identity" else group
    assert [(a.name, a.size, a.group) for a in arch.axes] == [
        ("h1", 3, group(3)),
        ("h2", 4, last(4)),
    ]


@pytest.mark.parametrize("layer, group", BY_LAYER, ids=lambda x: type(x).__name__)
def test_groups_of_layers(layer, group):
    assert [a.group for a in traced(layer).axes] == [group(3)]


def test_one_even_function_leaves_only_permutations():
    assert traced(nn.Tanh(), nn.ReLU()).axes[0].group == Permutation(3)
    assert traced(nn.ReLU(), nn.LeakyReLU()).axes[0].group == SCALES(3)


def test_the_symmetry_prints_as_a_table():
    printed = str(symflow.mlp([2, 3, 1], "tanh").symmetry)
    header, line, *rows = printed.splitlines()
    assert header.split() == ["axis", "size", "group", "why"]
    assert set(line) == {"-"}
    tanh = "out of 0; Tanh commutes with permutations and signs"
    assert [re.split(r"\s{2,}", row) for row in rows] == [
        ["h1", "3", "Permutation(size=3) @ Sign(size=3)", tanh],
        ["output", "1", "fixed", "2: read out: the order and sign of the outputs have a meaning"],
    ]


# ---------------------------------------------------------------- leaves and their labels


def labels(arch, name):
    return [(d.axis, d.degree) for d in arch.leaf(name).dims]


def test_leaves_of_an_mlp_run_over_their_axes():
    arch = symflow.mlp([2, 3, 4, 1])
    assert [(x.name, x.shape, x.offset) for x in arch.leaves] == [
        ("0.weight", (3, 2), 0),
        ("0.bias", (3,), 6),
        ("2.weight", (4, 3), 9),
        ("2.bias", (4,), 21),
        ("4.weight", (1, 4), 25),
        ("4.bias", (1,), 29),
    ]
    assert arch.dimension == arch.num_parameters == 30
    assert labels(arch, "0.weight") == [("h1", 1), (None, 0)]
    assert labels(arch, "2.weight") == [("h2", 1), ("h1", -1)]
    assert labels(arch, "4.weight") == [(None, 0), ("h2", -1)]
    assert labels(arch, "2.bias") == [("h2", 1)]
    assert arch.output == ("4.weight", "4.bias")


class Nested(nn.Module):
    """A user's module with blocks, dropout between training runs, and a reused activation."""

    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()
        block = nn.Sequential(nn.Linear(2, 3), self.act, nn.Dropout(0.5))
        self.blocks = nn.Sequential(block, nn.Sequential(nn.Linear(3, 4), self.act))
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.blocks(x))


def test_nesting_makes_no_difference():
    arch = Architecture.from_module(Nested(), torch.zeros(1, 2))
    assert labels(arch, "blocks.1.0.weight") == [("h2", 1), ("h1", -1)]
    assert [a.group for a in arch.axes] == [SCALES(3), SCALES(4)]
    assert "blocks.0.0" in arch.axes[0].reason
    assert arch.output == ("head.weight", "head.bias")


@pytest.mark.parametrize("flatten", [nn.Flatten(), Call(lambda x: x.view(x.shape[0], -1))])
def test_flatten_repeats_an_axis(flatten):
    """Positions lie outside of units: coordinate o * n + i of 3 x 4 belongs to unit i."""
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), flatten, nn.Linear(12, 1))
    arch = Architecture.from_module(net, torch.zeros(1, 3, 2))
    dim = arch.leaf("3.weight").dims[1]
    assert (dim.axis, dim.degree) == (None, 0)
    assert arch.leaf("3.weight").shape == (1, 3, 4)
    assert labels(arch, "3.weight") == [(None, 0), (None, 0), ("h1", -1)]
    g = {"h1": (torch.tensor([1, 0, 2, 3]), torch.tensor([2.0, 1.0, 1.0, 1.0]))}
    w = torch.zeros(arch.dimension)
    w[arch.leaf("3.weight").span] = torch.arange(12.0)
    wanted = torch.tensor([1, 0, 2, 3, 5, 2, 6, 7, 9, 4, 10, 11])  # unit 0 sends half as much
    assert torch.equal(arch.symmetry.act(g, w)[arch.leaf("3.weight").span], wanted.float())


def test_batch_norm_shares_its_permutation_and_scales_only_behind_it(generator):
    net = between(nn.BatchNorm1d(3), nn.ReLU())
    arch = Architecture.from_module(net, torch.zeros(2, 2))
    assert [(x.name, x.learnable) for x in arch.leaves][-2:] == [
        ("1.running_mean", False),
        ("1.running_var", False),
    ]
    assert arch.num_parameters == arch.dimension - 6
    assert labels(arch, "0.weight") == [("h1", 0), (None, 0)]
    assert labels(arch, "1.weight") == labels(arch, "1.bias") == [("h1", 1)]
    assert labels(arch, "1.running_var") == [("h1", 0)]
    assert labels(arch, "3.weight") == [(None, 0), ("h1", -1)]
    w, x = draw(arch, generator), torch.randn(5, 2, generator=generator).double()
    g = {"h1": (torch.tensor([2, 0, 1]), torch.tensor([2.0, 3.0, 5.0]).double())}
    before, after = arch.unflatten(w), arch.unflatten(arch.symmetry.act(g, w))
    assert torch.equal(after["1.running_mean"], before["1.running_mean"][[2, 0, 1]])
    assert torch.equal(after["1.weight"], (before["1.weight"] * g["h1"][1])[[2, 0, 1]])
    assert torch.allclose(arch.apply(w, x), arch.apply(arch.symmetry.act(g, w), x))


def test_batch_norm_without_statistics_has_no_buffers():
    arch = traced(nn.BatchNorm1d(3, track_running_stats=False), nn.ReLU())
    assert all(leaf.learnable for leaf in arch.leaves)


class Tied(nn.Module):
    """Two layers with one weight, and the biases of their own."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.out(torch.tanh(self.b(torch.tanh(self.a(x)))))


def shared():
    again = nn.Linear(3, 3)
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), again, nn.Tanh(), again, nn.Tanh())


@pytest.mark.parametrize("net, alias", [(Tied(), "b.weight"), (shared(), "4.weight")])
def test_tied_weights_are_one_leaf_and_the_module_stays_as_it_was(net, alias, generator):
    arch = Architecture.from_module(net, torch.zeros(1, 3))
    w, x = draw(arch, generator, 2), torch.randn(5, 3, generator=generator).double()
    (name,) = [name for key, name in arch.aliases if key == alias]
    assert alias not in [leaf.name for leaf in arch.leaves]
    before = {k: v.clone() for k, v in arch.module.state_dict().items()}
    outputs = arch.apply(w, x)
    for k in range(2):
        state = arch.state_dict(w[k])
        assert torch.equal(state[alias], state[name])
        alone = copy.deepcopy(net).double()
        alone.load_state_dict(state)
        assert torch.allclose(outputs[k], alone(x))
    for key, value in arch.module.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_weight_tied_to_the_input_fixes_its_axis():
    arch = Architecture.from_module(Tied(), torch.zeros(1, 3))
    assert arch.axes == ()
    assert arch.symmetry.fixed[0].reason == "a: a.weight is used more than once"


# ---------------------------------------------------------------- groups chosen, rules registered


def test_groups_of_the_users_go_through_the_gate():
    arch = symflow.mlp([2, 3, 1], "tanh")
    chosen = arch.with_groups({"h1": Sign(3)})
    assert (chosen.axes[0].group, chosen.axes[0].reason) == (Sign(3), "chosen by the user")
    with pytest.raises(ShapeError, match=r"axis h1 has 3 units, Sign\(size=4\) acts on 4"):
        arch.with_groups({"h1": Sign(4)})
    with pytest.raises(ShapeError, match=r"no axis 'h7'; the axes are \['h1'\]"):
        arch.with_groups({"h7": Sign(3)})
    false = r"Permutation\(size=3\) @ PositiveScale\(size=3\) on axis h1 .* by [0-9.]+ of its size"
    with pytest.raises(SymmetryError, match=false):
        arch.with_groups({"h1": SCALES(3)})


class Twice(nn.Module):
    """A layer of PyTorch's that has no rule, and that torch.export cannot take apart."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Bilinear(3, 3, 3)

    def forward(self, x):
        return self.inner(x, x)


def test_a_module_without_a_rule_says_where_and_what_to_register():
    message = r"Bilinear .* at '1\.inner'\. Register one: symflow\.arch\.rule\(nn\.Bilinear, "
    with pytest.raises(UnsupportedModuleError, match=message):
        Architecture.from_module(between(Twice()), torch.zeros(1, 2))


def test_a_function_without_a_rule_is_named_as_it_is_called(rules):
    net = between(Call(lambda x: torch.erfinv(0.1 * torch.tanh(x))))
    with pytest.raises(UnsupportedModuleError, match=r"symflow\.arch\.rule\(torch\.erfinv, "):
        Architecture.from_module(net, torch.zeros(1, 2))
    rule(torch.erfinv, Activation(odd=True))
    assert Architecture.from_module(net, torch.zeros(1, 2)).axes[0].group == SIGNS(3)


def test_what_has_no_rule_is_taken_apart_and_a_rule_tells_more(rules):
    """torch.export writes it as comparisons, which do not know that it is odd."""
    net = between(nn.Sequential(nn.Hardshrink()))
    assert Architecture.from_module(net, torch.zeros(1, 2)).axes[0].group == Permutation(3)
    rule(nn.Hardshrink, Activation(odd=True))
    assert Architecture.from_module(net, torch.zeros(1, 2)).axes[0].group == SIGNS(3)


def test_a_false_rule_is_refused_with_axis_group_and_size(rules):
    rule(nn.Hardshrink, Activation(homogeneous=1))
    message = (
        r"Permutation\(size=3\) @ PositiveScale\(size=3\) on axis h1 \(out of 0; Hardshrink "
        r"commutes .*changes the output by [0-9.e-]+ of its size\. If a rule was registered"
    )
    with pytest.raises(SymmetryError, match=message):
        traced(nn.Hardshrink())


def test_a_rule_with_weights_labels_its_leaves(rules):
    class Gain(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.gain * x

    @rule(Gain)
    def gain(call, x):
        call.label("gain", call.permuted(x.dims[-1]))
        return call.elementwise(x, Activation(odd=True, homogeneous=1))

    arch = traced(Gain(), nn.ReLU())
    assert labels(arch, "1.gain") == [("h1", 0)]


class Branches(nn.Module):
    """Control flow on values, which cannot be traced."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 1)

    def forward(self, x):
        if x.sum() > 0:
            return self.inner(x)
        return -self.inner(x)


class NoOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 1)

    def forward(self, x):
        self.inner(x)
        return x.shape


class TwoOutputs(NoOutput):
    def forward(self, x):
        h = torch.relu(x)
        return self.inner(h), {"hidden": h}


UNTRACEABLE = [
    (Branches(), r"test_arch\.py:\d+: if x\.sum\(\) > 0.*submodule and register a rule"),
    (NoOutput(), "must return tensors, it returns Size"),
    (nn.Linear(2, 1), r"Linear is a single layer: wrap it, as in nn\.Sequential\(layer\)"),
    (
        between(Call(lambda x: x.erfinv())),
        r"no symmetry rule for 'erfinv' .*symflow\.arch\.rule\('erfinv', ",
    ),
]


def test_inputs_that_do_not_fit_are_named():
    with pytest.raises(ShapeError, match=r"does not run on the example inputs \[\(1, 5\)\]"):
        Architecture.from_module(between(nn.ReLU()), torch.zeros(1, 5))


@pytest.mark.parametrize("net, message", UNTRACEABLE)
def test_what_cannot_be_traced_says_why(net, message):
    with pytest.raises(UnsupportedModuleError, match=message):
        Architecture.from_module(net, torch.zeros(2, 2))


def test_everything_that_is_returned_is_read_out():
    """The units of a hidden layer that is returned too must stay where they are."""
    net = nn.Sequential(nn.Linear(3, 2), TwoOutputs())
    arch = Architecture.from_module(net, torch.zeros(1, 3))
    assert arch.axes == ()
    assert arch.apply(torch.zeros(4, arch.dimension), torch.zeros(5, 3)).shape == (4, 5, 1)


def test_frozen_leaves_stay():
    net = nn.Sequential(
        *(nn.Linear(3, 4), nn.ReLU()), *(nn.Linear(4, 5), nn.ReLU()), nn.Linear(5, 2)
    )
    x = torch.zeros(1, 3)
    assert [a.size for a in Architecture.from_module(net, x, frozen=["0.weight"]).axes] == [5]
    net[2].weight.requires_grad_(False)
    arch = Architecture.from_module(net, x)
    assert arch.axes == ()
    assert any("2.weight is frozen" in axis.reason for axis in arch.symmetry.fixed)
    assert len(Architecture.from_module(net, x, frozen=()).axes) == 2
    with pytest.raises(LeafError, match=r"no leaves \['9.weight'\]"):
        Architecture.from_module(net, x, frozen=["9.weight"])
    # Where nothing requires gradients (a module used for its shape), nothing is frozen.
    assert len(Architecture.from_module(net.requires_grad_(False), x).axes) == 2
