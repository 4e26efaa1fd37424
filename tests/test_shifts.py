"""Translations that change nothing: found, tried, and taken away before distances are measured."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import symflow
from symflow.arch import Shift, Shifts
from symflow.errors import LeafError, ShapeError, SymmetryError
from symflow.groups import PositiveScale
from symflow.sections import BalancedSection, CentredSection, FlatSection
from symflow.testing import check_section


@pytest.fixture(scope="module")
def encoder():
    """A pre-LayerNorm transformer: every map writes to a stream that norms centre."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=True, dropout=0.0)
    net = nn.Sequential(nn.Linear(5, 8), layer, nn.LayerNorm(8), nn.Flatten(), nn.Linear(24, 3))
    return symflow.Architecture.from_module(net, torch.zeros(2, 3, 5))


def drawn(arch, count=3, dtype=torch.float64):
    return torch.randn(
        count, arch.dimension, generator=torch.Generator().manual_seed(0), dtype=dtype
    )


WRITES = {
    Shift("0.weight", 0),
    Shift("0.bias", 0),
    Shift("1.self_attn.in_proj_bias[8:16]"),
    Shift("1.self_attn.out_proj.weight", 0),
    Shift("1.self_attn.out_proj.bias", 0),
    Shift("1.linear2.weight", 0),
    Shift("1.linear2.bias", 0),
}


def test_what_is_found_is_what_theory_says(encoder):
    """The key bias is free, each map to the stream up to a constant over its units, no more."""
    found = Shifts.find(encoder)
    assert set(found.shifts) == WRITES
    assert found.dimension == 5 + 1 + 8 + 8 + 1 + 12 + 1
    logits = Shifts.find(encoder, preserves="probabilities")
    assert set(logits.shifts) == WRITES | {Shift("4.weight", 0), Shift("4.bias", 0)}
    assert logits.dimension == found.dimension + 24 + 1
    assert str(found).splitlines()[2] == "1.self_attn.in_proj_bias[8:16]: any vector"


def test_functions_stay(encoder):
    """What the shifts promise, on inputs and weights that finding them has not seen."""
    w, x = drawn(encoder), torch.randn(7, 3, 5, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for preserves, look in (("function", lambda y: y), ("probabilities", lambda y: y.softmax(-1))):
        shifts = Shifts.find(encoder, preserves=preserves)
        moved = w + shifts.random(generator=generator, like=w, batch=(3,))
        before, after = (look(encoder.apply(v, x)) for v in (w, moved))
        torch.testing.assert_close(after, before, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(look(encoder.apply(shifts.centre(w), x)), before)
    assert (encoder.apply(moved, x) - encoder.apply(w, x)).abs().max() > 0.01


def test_centring_is_the_orthogonal_projection(encoder):
    """Idempotent, constant on orbits, at a right angle to V, whose dimension is what it says."""
    shifts, w = Shifts.find(encoder, preserves="probabilities"), drawn(encoder)
    centre = shifts.centre(w)
    v = shifts.random(generator=torch.Generator().manual_seed(1), like=w, batch=(500,))
    torch.testing.assert_close(shifts.centre(centre), centre)
    torch.testing.assert_close(shifts.centre(w[0] + v), centre[:1].expand(500, -1))
    assert (v @ centre.T).abs().max() < 1e-9
    assert int(torch.linalg.matrix_rank(v)) == shifts.dimension
    g = encoder.symmetry.random(generator=torch.Generator().manual_seed(2), like=w)
    act = encoder.symmetry.act
    torch.testing.assert_close(shifts.centre(act(g, w)), act(g, shifts.centre(w)))


def test_two_dimensions_of_one_leaf():
    """Constants along rows and along columns overlap in one number."""
    arch = symflow.mlp([3, 4, 2])
    shifts = Shifts(arch, (Shift("0.weight", 0), Shift("0.weight", 1)))
    v = shifts.random(generator=torch.Generator().manual_seed(0), like=drawn(arch), batch=(50,))
    assert int(torch.linalg.matrix_rank(v)) == shifts.dimension == 3 + 4 - 1


def test_false_claims_are_refused(encoder):
    """By name; and so is a shift that the groups turn into something else."""
    with pytest.raises(SymmetryError, match=r"linear1\.weight: the same along dimension 0"):
        Shifts.of(encoder, [Shift("1.linear1.weight", 0)])
    with pytest.raises(SymmetryError, match="changes the function"):
        Shifts.of(encoder, [Shift("4.bias", 0)])
    assert Shifts.of(encoder, [Shift("4.bias", 0)], preserves="probabilities").dimension == 1
    with pytest.raises(LeafError, match="no leaf 'nothing'"):
        Shifts.of(encoder, [Shift("nothing")])
    with pytest.raises(ShapeError, match=r"shape \(3,\), no dimension 1"):
        Shifts.of(encoder, [Shift("4.bias", 1)])
    with pytest.raises(ShapeError, match="preserves must be 'function' or 'probabilities'"):
        Shifts.find(encoder, preserves="argmax")
    free = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    arch = symflow.Architecture.from_module(free, torch.zeros(1, 3))
    claim = [Shift("0.weight", 0)]
    assert Shifts.of(arch, claim).dimension == 3
    wrong = arch.symmetry.axes[0].name
    scaled = replace(arch, symmetry=_with_scales(arch.symmetry, wrong))
    with pytest.raises(SymmetryError, match="turn what it adds into something else"):
        Shifts.of(scaled, claim)


def _with_scales(symmetry, name):
    """Claim scales where none are: what a shift along that axis would not go with."""
    axes = tuple(
        replace(a, group=a.group @ PositiveScale(a.size)) if a.name == name else a
        for a in symmetry.axes
    )
    leaves = tuple(
        replace(x, dims=tuple(replace(d, degree=1) if d.axis == name else d for d in x.dims))
        for x in symmetry.leaves
    )
    return replace(symmetry, leaves=leaves, axes=axes)


def test_a_quotient_does_not_see_shifts(encoder):
    """Distances of orbits under both groups; a whole dimension less for each shift."""
    w = drawn(encoder, 2)
    plain = symflow.Quotient(encoder)
    quotient = symflow.Quotient(encoder, shifts="function")
    shifts = quotient.section.shifts
    v = shifts.random(generator=torch.Generator().manual_seed(3), like=w, batch=(2,))
    g = encoder.symmetry.random(generator=torch.Generator().manual_seed(4), like=w)
    moved = encoder.symmetry.act(g, w) + v
    found, wanted = quotient.distance(moved[0], w[1]), quotient.distance(w[0], w[1])
    torch.testing.assert_close(found, wanted)
    assert quotient.distance(w[0] + v[0], w[0]) < 1e-6 < plain.distance(w[0] + v[0], w[0])
    assert quotient.dimension == plain.dimension - shifts.dimension
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    middle = quotient.geodesic(moved[0], w[1])
    torch.testing.assert_close(encoder.apply(middle(0.0), x), encoder.apply(w[0], x))
    with pytest.raises(ShapeError, match="preserves must be 'function' or 'probabilities'"):
        symflow.Quotient(encoder, shifts="argmax")
    other = Shifts.find(symflow.mlp([3, 4, 2]))
    with pytest.raises(ShapeError, match="find them for the architecture of the section"):
        symflow.Quotient(encoder, shifts=other)


def test_classifiers_by_their_probabilities():
    """The softmax shift: networks whose logits differ by one number are one point."""
    arch = symflow.mlp([4, 6, 3], "tanh")
    w, x = drawn(arch, 2), torch.randn(9, 4, dtype=torch.float64)
    last = arch.unflatten(w[0])
    moved = arch.flatten(
        last | {"2.weight": last["2.weight"] + torch.randn(6), "2.bias": last["2.bias"] + 2.0}
    )
    quotient = symflow.Quotient(arch, shifts="probabilities")
    assert isinstance(quotient.section, CentredSection)
    assert isinstance(quotient.section.inside, FlatSection)
    assert quotient.distance(moved, w[0]) < 1e-6
    point = quotient.project(moved)
    before, after = (arch.apply(v, x).log_softmax(-1) for v in (moved, point))
    torch.testing.assert_close(after, before)
    assert point.norm() < moved.norm()


def test_the_laws_of_sections_catch_one_that_forgets_shifts(unshrunk):
    """A broken twin: it says that it takes them away."""
    net = nn.Sequential(nn.Linear(1, 2), nn.LayerNorm(2, elementwise_affine=False))
    arch = symflow.Architecture.from_module(net, torch.zeros(1, 1))
    section = CentredSection(FlatSection(arch), Shifts.find(arch))
    check_section(section, max_examples=5)
    section.split = section.inside.split
    with pytest.raises(AssertionError, match="the point after scaling and adding"):
        check_section(section, max_examples=5)


def test_flows_and_balance_go_with_them(encoder):
    """The centred point is balanced where the balanced one is."""
    section = CentredSection(BalancedSection(encoder), Shifts.find(encoder))
    x = section.project(drawn(encoder))
    section.manifold.assert_check_point_on_manifold(x)
    torch.testing.assert_close(section.shifts.centre(x), x)
