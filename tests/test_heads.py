"""Leaves that are cut inside each head: its queries, keys and values side by side."""

import pytest
import torch
from catalogue import told
from catalogue_attention import Attention
from torch import nn

import symflow
from symflow.align import WeightMatching, align_files
from symflow.arch.labels import FIXED, Atom, Label, label_of, nested
from symflow.arch.tracing import Tracing
from symflow.files import load_tensors, save_tensors

HEADS, WIDTH = 2, 4


class SideBySide(Attention):
    """One map whose units are, for each head, its queries, its keys and its values."""

    def __init__(self, how):
        super().__init__(HEADS * WIDTH, HEADS)
        self.qkv, self.how = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH), how
        del self.q, self.k, self.v

    def forward(self, x):
        batch, positions, width = x.shape
        if self.how == "chunk":
            y = self.qkv(x).view(batch, positions, HEADS, 3 * WIDTH).transpose(1, 2)
            q, k, v = y.chunk(3, dim=-1)
        elif self.how == "unbind":
            y = self.qkv(x).view(batch, positions, HEADS, 3, WIDTH)
            q, k, v = (part.transpose(1, 2) for part in y.unbind(3))
        else:
            y = self.qkv(x).view(batch, positions, HEADS, 3, WIDTH)
            q, k, v = (y[..., n, :].transpose(1, 2) for n in range(3))
        weights = (q @ k.transpose(-2, -1) / 2).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, positions, width))


def traced(how):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), SideBySide(how), nn.Linear(8, 2))
    return net, symflow.Architecture.from_module(net, torch.zeros(2, 4, 3))


@pytest.mark.parametrize("how", ["chunk", "unbind", "select"])
def test_each_part_of_a_head_has_its_own_group(how):
    """As if there were three maps: heads, queries with keys, values with outputs."""
    net, arch = traced(how)
    apart = nn.Sequential(nn.Linear(3, 8), Attention(8, HEADS), nn.Linear(8, 2))
    plain = symflow.Architecture.from_module(apart, torch.zeros(2, 4, 3))
    assert sorted(map(told, arch.axes)) == sorted(map(told, plain.axes))
    assert arch.symmetry.dimension == plain.symmetry.dimension
    parts = [leaf for leaf in arch.leaves if leaf.key == "1.qkv.weight"]
    assert [leaf.shape for leaf in parts] == [(HEADS, WIDTH, 8)] * 3
    whole = net[1].qkv.weight.detach().reshape(HEADS, 3, WIDTH, 8)
    for n, leaf in enumerate(parts):
        assert torch.equal(leaf.of(net[1].qkv.weight.detach()), whole[:, n])


def test_batches_of_networks_are_put_together_again():
    _, arch = traced("chunk")
    w = torch.randn(2, 3, arch.dimension, generator=torch.Generator().manual_seed(1))
    state = arch.unflatten(w)
    assert state["1.qkv.weight"].shape == (2, 3, 24, 8)
    assert torch.equal(arch.flatten(state), w)


def test_files_are_aligned_in_their_own_layout(tmp_path):
    net, arch = traced("chunk")
    generator = torch.Generator().manual_seed(2)
    symmetry = arch.symmetry.compact
    w = arch.flatten(net.double())
    moved = symmetry.act(symmetry.random(generator=generator, like=w), w)
    paths = [tmp_path / name for name in ("a.safetensors", "b.safetensors", "out.safetensors")]
    for path, one in zip(paths, (w, moved), strict=False):
        save_tensors(path, arch.state_dict(one))
    align_files(arch.with_groups({a.name: a.group for a in symmetry.axes}), *paths)
    found = load_tensors(paths[2])[0]
    assert found["1.qkv.weight"].shape == (24, 8)
    torch.testing.assert_close(arch.flatten(found), w)
    torch.testing.assert_close(WeightMatching()(symmetry, w, moved).weights, w)


def test_what_takes_a_nested_concatenation_apart_otherwise_ends_it():
    """Cut through, added to something else, multiplied, or renewed: it stays, nothing breaks."""
    for last in ("cut", "split", "added", "multiplied", "renewed"):
        tracing = Tracing({})
        label = tracing.new_axis(24, "map")
        heads, inside = tracing.split(label, (2, 12))
        parts = tracing.cut(inside, (4, 4, 4))
        assert [part.size for part in parts] == [4, 4, 4]
        whole = tracing.resolve(label)
        assert whole.is_nested and whole.is_grid and whole.size == 24
        assert [atom.size for atom in whole.atoms] == [2, 4, 4, 4]
        assert whole.each(Atom.dual).each(Atom.dual) == whole
        if last == "cut":
            assert tracing.cut(whole, (5, 19)) is None
            continue
        if last == "split":
            assert tracing.split(whole, (8, 3)) is None
            continue
        if last == "added":
            tracing.unify(whole, tracing.new_axis(24, "other"), "added")
        elif last == "multiplied":
            assert tracing.multiplied(whole, tracing.new_axis(24, "other"), "gated") == FIXED
        else:
            assert tracing.new_fibre(whole, "gain") == FIXED
        if last != "added":
            assert tracing.resolve(label) == FIXED
            assert tracing.resolve(heads) == FIXED


def test_two_nested_concatenations_are_tied_part_by_part():
    tracing = Tracing({})
    labels = [tracing.new_axis(24, name) for name in "ab"]
    for label in labels:
        tracing.cut(tracing.split(label, (2, 12))[1], (4, 8))
    tied = tracing.unify(*labels, "added")
    assert tied.is_nested and [atom.size for atom in tied.atoms] == [2, 4, 8]
    assert tracing.resolve(labels[0]) == tracing.resolve(labels[1])


def test_a_concatenation_of_fixed_parts_is_fixed():
    atom = nested([(Atom(2),), (Atom(3),)])
    assert atom == Atom(5)
    assert label_of([(atom,)]) == FIXED
    assert Label(((Atom(2, "#0"), nested([(Atom(1, "#1"),), (Atom(3),)])),)).size == 8


class Run(nn.Module):
    """A forward pass written as a function of the module and its input."""

    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.run(self, x)


def interleaved(net, x):
    q, k, v = (part.transpose(1, 2) for part in net.a(x).view(2, 5, 2, 4, 3).unbind(-1))
    return net.b(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).reshape(2, 5, 8))


def cut_where_it_comes_twice(net, x):
    y = net.a(x)
    return net.b(torch.cat([y, y], -1)[..., 5:9])


def unflattened_where_it_comes_twice(net, x):
    y = net.a(x)
    g = (y.transpose(1, 2) @ y).reshape(-1, 64).reshape(-1, 2, 4, 2, 4)
    return net.b(g.reshape(-1, 64))


def single_units_of_heads(net, x):
    parts = list(net.a(x).view(2, 5, 2, 3).split([1, 1, 1], -1))
    return net.b(parts[2].reshape(2, 5, 2))


def outer_units_cut_later(net, x):
    y = net.a(x).view(2, 5, 3, 6).transpose(1, 2)
    y = ((y @ y.mT).softmax(-1) @ y).transpose(1, 2)
    return net.b(y.split([1, 1, 1], 2)[1].reshape(2, 5, 6))


def one_number_times_all(net, x):
    return net.c(net.b(x) * net.a(x))


def one_number_added_to_all(net, x):
    return net.c(net.b(x) + net.a(x))


@pytest.mark.parametrize(
    ("run", "layers"),
    [
        (interleaved, {"a": (3, 24), "b": (8, 2)}),
        (cut_where_it_comes_twice, {"a": (3, 6), "b": (4, 2)}),
        (unflattened_where_it_comes_twice, {"a": (3, 8), "b": (64, 2)}),
        (single_units_of_heads, {"a": (3, 6), "b": (2, 2)}),
        (outer_units_cut_later, {"a": (3, 18), "b": (6, 2)}),
        (one_number_times_all, {"a": (3, 1), "b": (3, 5), "c": (5, 2)}),
        (one_number_added_to_all, {"a": (3, 1), "b": (3, 5), "c": (5, 2)}),
    ],
)
def test_units_taken_apart_in_odd_ways_keep_what_is_true(run, layers):
    """Claims hold at other weights than those they were tried at; round trips are exact."""
    torch.manual_seed(0)
    net = Run(run, **{name: nn.Linear(*sizes) for name, sizes in layers.items()})
    x = torch.randn(2, 5, 3)
    arch = symflow.Architecture.from_module(net, x)
    w = arch.flatten(net.double())
    assert torch.equal(arch.flatten(arch.unflatten(w)), w)
    g = arch.symmetry.random(generator=torch.Generator().manual_seed(1), like=w)
    moved = arch.symmetry.act(g, w)
    assert not torch.equal(moved, w)
    torch.testing.assert_close(arch.apply(moved, x.double()), arch.apply(w, x.double()))


def test_groups_of_channels_behind_larger_groups():
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(2, 4, 1, groups=2), nn.ReLU(), nn.Conv2d(4, 4, 1, groups=4)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
    )
    arch = symflow.Architecture.from_module(net, torch.zeros(2, 2, 3, 3))
    assert arch.symmetry.dimension == 4  # of two channels, alike in both groups, which stay
