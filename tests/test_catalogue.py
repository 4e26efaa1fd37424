"""Every architecture of the catalogue has the symmetry that was worked out by hand."""

import pytest
import torch
from catalogue import CATALOGUE, told
from torch import nn

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


def test_axes_over_axes_can_be_fixed_for_graphs():
    entry = next(e for e in CATALOGUE if e.name == "transformer, attention written out")
    arch = symflow.Architecture.from_module(entry.make(), *entry.inputs)
    w = torch.zeros(arch.dimension)
    with pytest.raises(symflow.errors.UnsupportedModuleError, match=r"with_groups\(\{'h1\.1'"):
        arch.to_graph(w)
    over = {a.name: symflow.Trivial(a.size) for a in arch.axes if a.over is not None}
    assert arch.with_groups(over).to_graph(w)["h1"].x.shape[0] == 8


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
