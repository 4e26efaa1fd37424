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
    assert atom == Atom(5, parts=()) or label_of([(atom,)]) == FIXED
    assert Label(((Atom(2, "#0"), nested([(Atom(1, "#1"),), (Atom(3),)])),)).size == 8
