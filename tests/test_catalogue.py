"""Every architecture of the catalogue has the symmetry that was worked out by hand."""

import importlib

import pytest
import torch
from catalogue import CATALOGUE, told
from torch import nn
from torch_geometric.nn import GATv2Conv

import symflow
from symflow.groups import map_element


@pytest.fixture(scope="module", params=CATALOGUE, ids=lambda entry: entry.name)
def entry(request):
    torch.manual_seed(0)
    return request.param


@pytest.fixture(scope="module")
def arch(entry):
    return symflow.Architecture.from_module(entry.make(), *entry.inputs)


def test_groups_are_those_expected(entry, arch):
    assert [told(axis) for axis in arch.axes] == list(entry.axes)


def test_the_function_stays_and_the_weights_move(entry, arch):
    generator = torch.Generator().manual_seed(1)
    w = arch.flatten(entry.make().double())
    w[: arch.num_parameters] += torch.randn(arch.num_parameters, generator=generator).double() / 3
    inputs = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64)
        if x.is_floating_point()
        else x
        for x in entry.inputs
    ]
    before = arch.apply(w, *inputs)
    moved = arch.symmetry.act(arch.symmetry.random(generator=generator, like=w, batch=(5,)), w)
    assert not torch.allclose(moved, w.expand_as(moved))
    assert (arch.apply(moved, *inputs) - before).abs().max() <= entry.rounding * before.abs().max()


def test_weights_survive_the_round_trip(entry, arch):
    module = entry.make()
    w = arch.flatten(module)
    state = arch.state_dict(w)
    for key, value in module.state_dict().items():
        assert torch.equal(state[key].to(value), value), key
    assert torch.equal(arch.flatten(arch.load_into(entry.make(), w)), w)


def test_distances_do_not_depend_on_the_place_on_the_orbit(entry, arch):
    generator = torch.Generator().manual_seed(2)
    w0, w1 = (arch.flatten(entry.make().double()) for _ in range(2))
    q = symflow.Quotient(arch)
    d = q.distance(w0, w1)
    g, h = (arch.symmetry.random(generator=generator, like=w0, batch=(3,)) for _ in range(2))
    ends = arch.symmetry.act(g, w0), arch.symmetry.act(h, w1)
    assert torch.allclose(q.distance(*ends), d, rtol=1e-8)
    assert float(q.distance(w0, ends[0]).max()) <= 1e-6 * float(d)


def test_elements_multiply_as_they_act(entry, arch):
    """A group on every axis, and on axes over axes, whose elements move along with those."""
    generator = torch.Generator().manual_seed(3)
    symmetry = arch.symmetry
    w = torch.randn(2, arch.dimension, generator=generator, dtype=torch.float64)
    g, h = (symmetry.random(generator=generator, like=w, batch=(2,)) for _ in range(2))
    both = symmetry.act(g, symmetry.act(h, w))
    assert torch.allclose(symmetry.act(symmetry.compose(g, h), w), both, rtol=1e-9, atol=1e-9)
    back = symmetry.act(symmetry.inverse(g), symmetry.act(g, w))
    assert torch.allclose(back, w, rtol=1e-9, atol=1e-9)
    one = {name: map_element(lambda part: part[1], part) for name, part in g.items()}
    assert torch.allclose(symmetry.act(g, w)[1], symmetry.act(one, w[1]), rtol=1e-12, atol=1e-12)
    assert torch.allclose(
        symmetry.act(symmetry.compose(one, h), w)[0],
        symmetry.act(one, symmetry.act(h, w)[0]),
        rtol=1e-9,
        atol=1e-9,
    )


def test_the_order_of_elements_over_an_axis_is_seen():
    """If those were multiplied where they stand, and not where they are carried, it would show."""
    entry = next(e for e in CATALOGUE if e.name == "transformer, attention written out")
    symmetry = symflow.Architecture.from_module(entry.make(), *entry.inputs).symmetry
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(sum(x.size for x in symmetry.leaves), generator=generator, dtype=torch.float64)
    g, h = (symmetry.random(generator=generator, like=w) for _ in range(2))
    h |= {"h2": torch.tensor([1, 0])}  # the heads change places
    apart = {a.name: a.group.compose(g[a.name], h[a.name]) for a in symmetry.axes}
    both = symmetry.act(g, symmetry.act(h, w))
    assert torch.allclose(symmetry.act(symmetry.compose(g, h), w), both, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(symmetry.act(apart, w), both, rtol=0.1, atol=0.1)


def attention():
    entry = next(e for e in CATALOGUE if e.name == "transformer, attention written out")
    return symflow.Architecture.from_module(entry.make(), *entry.inputs)


class Convolutions(nn.Module):
    """Three rounds: from units to their head, back, and out of what they heard."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(GATv2Conv(8, 8, edge_dim=8) for _ in range(3))

    def forward(self, x, edge_index, edge_attr):
        for layer in self.layers:
            x = x + torch.tanh(layer(x, edge_index, edge_attr))
        return x


def tokens(arch):
    field = symflow.nn.RelationalTransformer(arch, width=8, depth=2, groups="permutation")
    return shaken(field.double())


def graph_field(arch):
    graph = importlib.import_module("symflow.nn.graph")
    network = Convolutions()
    field = graph.GraphField(network, arch, channels=8, edge_channels=8, groups="permutation")
    return shaken(field.double())


def shaken(field):
    """Give all parameters values, the last layer's zeros too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in field.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) / 3)
    return field


def test_fields_commute_with_every_architecture(entry, arch):
    """Axes over others too: each unit inside a head is a token, whatever the leaves."""
    field, generator = tokens(arch), torch.Generator().manual_seed(4)
    assert torch.equal(field.layout.order.sort().values, torch.arange(arch.dimension))
    w = torch.randn(2, arch.dimension, generator=generator, dtype=torch.float64)
    t = torch.rand(2, generator=generator, dtype=torch.float64)
    g = field.symmetry.random(generator=generator, like=w)
    out = field(w, t).detach()
    moved = field(field.symmetry.act(g, w), t).detach()
    assert (moved - field.symmetry.act(g, out)).abs().max() <= 1e-9 * out.abs().max()


@pytest.mark.parametrize("make", [tokens, graph_field])
def test_fields_see_which_units_are_in_a_head(make):
    """If all pairs of a head and a unit inside were alike, units could move between heads."""
    arch = attention()
    field, generator = make(arch), torch.Generator().manual_seed(5)
    w = torch.randn(1, arch.dimension, generator=generator, dtype=torch.float64)
    t = torch.full((1,), 0.5, dtype=torch.float64)

    def exchanged(w, axis):
        """Exchange units of two heads: an element of the permutations of all pairs."""
        found = w.clone()
        for leaf in arch.leaves:
            dims = [k for k, dim in enumerate(leaf.dims) if dim.axis == axis]
            if dims:
                x = found[0, leaf.span].view(leaf.shape)
                x = x.movedim((leaf.dims[dims[0]].within, dims[0]), (0, 1))
                one, two = x[0, 0].clone(), x[1, 0].clone()
                x[0, 0], x[1, 0] = two, one
        return found

    out = field(w, t).detach()
    for axis in ("h2.1", "h2.2"):  # queries and keys, values
        moved = exchanged(w, axis)
        assert not torch.equal(moved, w)
        assert not torch.allclose(field(moved, t).detach(), exchanged(out, axis), rtol=1e-6)
    g = field.symmetry.random(generator=generator, like=w)
    moved = field(field.symmetry.act(g, w), t).detach()
    assert torch.allclose(moved, field.symmetry.act(g, out), rtol=1e-9)


def test_units_inside_heads_are_nodes_of_graphs():
    arch = attention()
    w = torch.randn(arch.dimension, generator=torch.Generator().manual_seed(0))
    graph = arch.to_graph(w)
    assert graph["h2 x h2.1"].x.shape[0] == 8
    assert graph["h2", "has", "h2 x h2.1"].edge_index[0].tolist() == [0] * 4 + [1] * 4
    assert torch.equal(importlib.import_module("symflow.nn.graph").from_graph(arch, graph), w)


def test_no_unit_is_left_out():
    """Every hidden channel of a ResNet-20 moves, shortcuts included."""
    entry = next(e for e in CATALOGUE if e.name == "ResNet-20")
    arch = symflow.Architecture.from_module(entry.make(), *entry.inputs)
    for leaf in arch.leaves:
        if len(leaf.shape) == 4:
            outward, inward, *_ = leaf.dims
            assert outward.axis is not None, leaf.name
            assert (inward.axis is None) == (leaf.shape[1] == 3), leaf.name
    assert isinstance(arch.module, nn.Module)
