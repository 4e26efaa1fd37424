"""Weights in and out of an architecture, and what is refused at the door."""

import copy

import pytest
import torch

import symflow
from symflow import Permutation
from symflow.errors import FileFormatError, LeafError, ShapeError


def draw(arch, generator, *batch):
    w = torch.randn(*batch, arch.dimension, generator=generator, dtype=torch.float64)
    for leaf in arch.leaves:
        if leaf.name.endswith("running_var"):
            w[..., leaf.span] = w[..., leaf.span].exp()
    return w


@pytest.fixture
def small():
    return symflow.mlp([2, 3, 1], "tanh", batch_norm=True)


def test_apply_runs_every_network_on_the_same_inputs(small, generator):
    w, x = draw(small, generator, 2, 3), torch.randn(5, 2, generator=generator).double()
    outputs = small.apply(w, x)
    assert outputs.shape == (2, 3, 5, 1)
    alone = small.load_into(copy.deepcopy(small.module).double(), w[1, 2])
    assert torch.allclose(outputs[1, 2], alone.eval()(x))
    (slope,) = torch.autograd.grad(small.apply(w.requires_grad_(), x).sum(), w)
    assert slope[..., small.leaf("0.weight").span].all()
    assert not slope[..., small.num_parameters :].any()  # running statistics are not learned


def test_apply_paired_runs_every_network_on_its_own_inputs(small, generator):
    w, x = draw(small, generator, 2, 3), torch.randn(2, 3, 5, 2, generator=generator).double()
    outputs = small.apply_paired(w, x)
    assert outputs.shape == (2, 3, 5, 1)
    assert torch.allclose(outputs[1, 2], small.apply(w[1, 2], x[1, 2]))
    with pytest.raises(ShapeError, match=r"begin with the batch shape \(2, 3\) of w, got \(3, 5"):
        small.apply_paired(w, x[0])


def test_weights_go_round(small, generator):
    w = draw(small, generator, 4)
    named = small.unflatten(w)
    assert named["0.weight"].shape == (4, 3, 2)
    assert named["0.weight"].data_ptr() == w.data_ptr()  # a view
    assert torch.equal(small.flatten(named), w)
    assert torch.equal(small.as_weights(named), w)
    assert torch.equal(small.as_weights([small.unflatten(row) for row in w]), w)
    net = small.load_into(copy.deepcopy(small.module).double(), w[0])
    assert torch.equal(small.flatten(net), w[0])
    assert torch.equal(small.as_weights([net, net]), w[:1].expand(2, -1))
    assert set(small.state_dict(w[0])) == set(net.state_dict())  # with num_batches_tracked


def test_flattening_copies(small):
    net = copy.deepcopy(small.module)
    w = small.flatten(net)
    w.zero_()
    assert bool(small.flatten(net).any())


def test_configurations_and_fingerprints():
    arch = symflow.mlp([2, 3, 1], "tanh", bias=False)
    again = symflow.arch.from_config(arch.config)
    assert again.fingerprint == arch.fingerprint
    assert symflow.mlp([2, 3, 1], "gelu", bias=False).fingerprint != arch.fingerprint
    assert arch.with_groups({"h1": Permutation(3)}).config is None
    with pytest.raises(FileFormatError, match="unknown kind of architecture: 'cnn'"):
        symflow.arch.from_config({"kind": "cnn"})
    with pytest.raises(FileFormatError, match="not a description of an MLP"):
        symflow.arch.from_config({"kind": "mlp", "size": 3})


def edited(arch, **leaves):
    """The state dict of the module, entries replaced (``_`` for ``.``) or left out (None)."""
    state = dict(arch.module.state_dict())
    state.update({name.replace("_", "."): value for name, value in leaves.items()})
    return {name: value for name, value in state.items() if value is not None}


BAD_STATES = {
    "missing": ({"0_bias": None}, r"missing leaves \['0.bias'\]; .*Pass the whole state dict"),
    "unknown": ({"x_bias": torch.zeros(3)}, r"unknown leaves \['x.bias'\]; .*Drop them, or trace"),
    "misshapen": ({"0_bias": torch.zeros(4)}, r"'0.bias' must have shape \(3,\), got \(4,\)"),
    "dtypes": ({"0_bias": torch.zeros(3).double()}, r"'0.bias' is torch.float64 on cpu; convert"),
    "devices": ({"0_bias": torch.zeros(3, device="meta")}, r"float32 on meta; convert the network"),
    "batches": ({"0_bias": torch.zeros(2, 3)}, r"must have shape \(3,\), got \(2, 3\)"),
    "nan": ({"2_bias": torch.tensor([torch.nan])}, r"w: leaf '2.bias' holds 1 NaN or infinite"),
    "infinite": ({"0_bias": torch.tensor([1.0, torch.inf, -torch.inf])}, r"'0.bias' holds 2 NaN"),
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_bad_state_dicts_are_refused_by_leaf(name):
    leaves, message = BAD_STATES[name]
    arch = symflow.mlp([2, 3, 1])
    with pytest.raises(LeafError, match=message):
        arch.as_weights(edited(arch, **leaves))


def test_bad_tensors_are_refused_by_shape():
    arch = symflow.mlp([2, 3, 1])
    for w in (torch.zeros(12), torch.zeros(()), torch.zeros(13, 2)):
        with pytest.raises(ShapeError, match=r"flat weights \(\*batch, D = 13\), got shape"):
            arch.as_weights(w)
    with pytest.raises(ShapeError, match="w must hold one network or more"):
        arch.as_weights([])
    with pytest.raises(ShapeError, match=r"must be floating point .* got torch.int64"):
        arch.as_weights(torch.zeros(13, dtype=torch.long))
    with pytest.raises(LeafError, match=r"w\[1\]: missing leaves"):
        arch.as_weights([arch.module, {}])
    with pytest.raises(ShapeError, match="end with D = 13"):
        arch.unflatten(torch.zeros(12))
    with pytest.raises(LeafError, match=r"no leaf 'x'; the leaves are \['0.weight'"):
        arch.leaf("x")


@pytest.mark.parametrize("widths", [[3], [3, 0], []])
def test_mlps_want_sizes_and_a_known_activation(widths):
    with pytest.raises(ShapeError, match="two or more positive"):
        symflow.mlp(widths)
    with pytest.raises(ShapeError, match=r"one of \['gelu', .* got 'swish'"):
        symflow.mlp([2, 1], "swish")
