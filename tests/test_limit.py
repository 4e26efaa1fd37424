"""Scales before a BatchNorm: exact only as its eps goes to zero, so they are asked for."""

import pytest
import torch
from catalogue import CATALOGUE, told
from torch import nn

import symflow
from symflow.errors import LeafError, ShapeError
from symflow.sections import BalancedSection, SphereSection


def small_cnn():
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(80, 3)),
    )


def traced(preserves="limit"):
    torch.manual_seed(0)
    return symflow.Architecture.from_module(
        small_cnn(), torch.zeros(2, 1, 8, 8), preserves=preserves
    )


def weights(arch, *batch):
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(*batch, arch.dimension, generator=generator, dtype=torch.float64)
    w[..., arch.num_parameters :] = w[..., arch.num_parameters :].abs() + 1
    return w


X = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def without_eps(arch):
    for part in arch.module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eps = 0.0
    return arch


def test_units_have_one_scale_before_and_one_behind():
    arch = traced()
    assert [told(a) for a in arch.axes] == [
        *("4 perm", "1 scale each", "1 scale each"),
        *("5 perm", "1 scale each", "1 scale each"),
    ]
    degrees = {x.name: {d.axis: d.degree for d in x.dims if d.degree} for x in arch.leaves}
    assert degrees["0.weight"] == degrees["0.bias"] == {"h1.1": 1}
    assert degrees["1.weight"] == degrees["1.bias"] == {"h1.2": 1}
    assert degrees["3.weight"] == {"h2.1": 1, "h1.2": -1}
    assert degrees["4.running_mean"] == {"h2.1": 1}
    assert degrees["4.running_var"] == {"h2.1": 2}
    plain = traced("function")
    assert [told(a) for a in plain.axes] == ["4 perm scale", "5 perm scale"]


def test_the_function_stays_as_far_as_eps_allows_and_exactly_without():
    arch = traced()
    w = weights(arch)
    g = arch.symmetry.random(generator=torch.Generator().manual_seed(3), like=w, batch=(4,))
    moved = arch.symmetry.act(g, w)
    before, after = arch.apply(w, X), arch.apply(moved, X)
    change = (after - before).abs().max() / before.abs().max()
    assert 1e-12 < change < 1e-3
    exact = without_eps(traced())
    before, after = exact.apply(w, X), exact.apply(moved, X)
    assert (after - before).abs().max() < 1e-12 * before.abs().max()


def test_spheres_take_the_scales_away():
    arch = without_eps(traced())
    section, w = SphereSection(arch), weights(arch, 3)
    x = section.project(w)
    for key in ("0.weight", "3.weight"):
        rows = arch.unflatten(x)[key].flatten(2)
        if key == "0.weight":
            rows = torch.cat([rows, arch.unflatten(x)["0.bias"][..., None]], dim=-1)
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones_like(rows[..., 0]))
    torch.testing.assert_close(section.project(x), x)
    torch.testing.assert_close(arch.apply(x, X), arch.apply(w, X))
    scales = arch.symmetry.random(generator=torch.Generator().manual_seed(4), like=w, batch=(3,))
    scales |= {name: arch.symmetry.identity(like=w)[name].expand(3, -1) for name in ("h1", "h2")}
    torch.testing.assert_close(section.project(arch.symmetry.act(scales, w)), x)
    quotient = symflow.Quotient(arch, section="sphere")
    g = arch.symmetry.random(generator=torch.Generator().manual_seed(5), like=w, batch=(3,))
    assert quotient.distance(w, arch.symmetry.act(g, w)).max() < 1e-6
    plain = symflow.Quotient(traced("function"), section="sphere")
    assert plain.distance(w, arch.symmetry.act(g, w)).min() > 0.1


def test_nothing_balances_them():
    arch = traced()
    with pytest.raises(LeafError, match=r"nothing compensates the scales of axis h1\.1"):
        BalancedSection(arch)
    with pytest.raises(LeafError, match="section='sphere'"):
        symflow.Quotient(arch, section="balanced")
    assert isinstance(symflow.Quotient(arch).section, SphereSection)
    # What the error tells to do, axis by axis.
    with pytest.raises(LeafError, match=r"with_groups\(\{'h1\.1': symflow\.Trivial\(1\)\}\)"):
        BalancedSection(arch)
    fixed = {name: symflow.Trivial(1) for name in ("h1.1", "h2.1")}
    section = BalancedSection(arch.with_groups(fixed))
    w = weights(arch)
    torch.testing.assert_close(arch.apply(section.project(w), X), arch.apply(w, X))


def test_scales_of_a_residual_stream_are_taken_away_where_they_are_made():
    """A ResNet's stream has a scale before each BatchNorm on it, in blocks far apart."""
    entry = next(e for e in CATALOGUE if e.name == "ResNet-20")
    torch.manual_seed(0)
    arch = symflow.Architecture.from_module(entry.make(), *entry.inputs, preserves="limit")
    assert (
        arch.symmetry.dimension
        > symflow.Architecture.from_module(entry.make(), *entry.inputs).symmetry.dimension
    )
    w = weights(arch, 2)
    scales = arch.symmetry.random(generator=torch.Generator().manual_seed(6), like=w, batch=(2,))
    identity = arch.symmetry.identity(like=w)
    scales |= {a.name: identity[a.name].expand(2, -1) for a in arch.axes if a.over is None}
    section = SphereSection(arch)
    torch.testing.assert_close(section.project(arch.symmetry.act(scales, w)), section.project(w))


def test_other_words_are_refused():
    with pytest.raises(ShapeError, match="preserves must be 'function' or 'limit', got 'argmax'"):
        traced("argmax")


@pytest.mark.parametrize("options", [{"track_running_stats": False}, {"affine": False}])
def test_norms_without_statistics_or_gains(options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, **options), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(6, 3, dtype=torch.float64)
    arch = symflow.Architecture.from_module(net, x.float(), preserves="limit")
    w = weights(arch)
    g = arch.symmetry.random(generator=torch.Generator().manual_seed(3), like=w)
    before, after = arch.apply(w, x), arch.apply(arch.symmetry.act(g, w), x)
    assert (after - before).abs().max() < 1e-3 * before.abs().max()


def test_units_that_nothing_reads_are_not_compensated_either():
    class Unread(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(2, 2)

        def forward(self, x):
            return self.b(self.a(x)[..., :2].relu())

    arch = symflow.Architecture.from_module(Unread(), torch.zeros(2, 3))
    with pytest.raises(LeafError, match="with_groups"):
        BalancedSection(arch)
    w = weights(arch)
    assert isinstance(symflow.Quotient(arch).section, SphereSection)
    assert symflow.Quotient(arch).distance(w, w) == 0
