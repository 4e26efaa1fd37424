"""Distances, geodesics and means of orbits."""

import pytest
import torch
from torch import nn

import symflow
from symflow.errors import (
    AntipodalWarning,
    DeadNeuronWarning,
    LeafError,
    ShapeError,
    SymmetryError,
)
from symflow.testing import quotient_laws, quotients

# Each section's own laws are tried in test_sections.py.
LAWS = [law for law in quotient_laws(quotients()) if not law.name.startswith("section")]


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_law(law):
    law.check()


CASES = {
    "balanced": ("relu", "balanced", "function"),
    "sphere": ("relu", "sphere", "function"),
    "argmax": ("relu", "sphere", "argmax"),
    "signs": ("tanh", None, "function"),
    "linear": ("identity", "balanced", "function"),
}


def quotient(case, widths=(6, 8, 7, 3), **options):
    activation, section, preserves = CASES[case]
    arch = symflow.mlp(widths, activation, **options)
    return symflow.Quotient(arch, section, preserves=preserves)


def networks(q, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, q.arch.dimension, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("case", CASES)
def test_geodesic_laws(case):
    q = quotient(case)
    w0, w1 = networks(q, 4), networks(q, 4, seed=1)
    path = q.geodesic(w0, w1)
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    points, velocities = path(t), path.velocity(t)
    assert points.shape == (9, 4, q.arch.dimension)
    assert torch.allclose(points[0], q.project(w0), rtol=0, atol=1e-14)
    assert torch.allclose(points[-1], path.end, rtol=1e-12, atol=1e-12)
    assert torch.allclose(path.length, q.distance(w0, w1), rtol=1e-14)
    speeds = q.manifold.norm(points, velocities)
    assert torch.allclose(speeds, path.length.expand(9, 4), rtol=1e-10)
    # The velocity is the derivative of the point: compare with central differences.
    h = 1e-6
    slope = (path(0.5 + h) - path(0.5 - h)) / (2 * h)
    assert torch.allclose(slope, path.velocity(0.5), rtol=1e-6, atol=1e-7)
    # The length of the curve, measured in small pieces, is the distance.
    fine = path(torch.linspace(0, 1, 2001, dtype=torch.float64))
    pieces = (fine[1:] - fine[:-1]).norm(dim=-1).sum(0)
    assert torch.allclose(pieces, path.length, rtol=1e-5)
    assert torch.allclose(q.exp(w0, q.log(w0, w1)), path.end, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_distance_laws(case):
    q = quotient(case)
    w0, w1 = networks(q), networks(q, seed=1)
    distance = q.distance(w0, w1)
    generator = torch.Generator().manual_seed(0)
    group = q.arch.symmetry
    g, h = (group.random(generator=generator, like=w0, batch=(20,)) for _ in range(2))
    moved = q.distance(group.act(g, w0), group.act(h, w1))
    assert torch.allclose(moved, distance.expand(20), rtol=1e-8)
    assert (q.distance(w0, group.act(g, w0)) <= 1e-6 * q.project(w0).norm()).all()
    assert torch.allclose(q.distance(w1, w0), distance, rtol=1e-10)
    lower, upper = q.distance_bounds(w0, w1)
    assert 0 <= lower <= upper == distance
    # No longer than the way to any other element of the orbit that we try.
    many = q.symmetry.random(generator=generator, like=w1, batch=(200,))
    others = q.symmetry.act(many, q.project(w1))
    assert (q.manifold.dist(q.project(w0), others) >= distance - 1e-12).all()


def test_the_arc_is_polished_beyond_the_chord():
    """Matching on the chord is not always least on the arc."""
    q = quotient("sphere", (3, 4, 4, 2))
    w0, w1 = networks(q, 60), networks(q, 60, seed=1)
    chord = q.aligner(q.symmetry, q.project(w0), q.project(w1)).weights
    plain = q.manifold.dist(q.project(w0), chord)
    polished = q.distance(w0, w1)
    assert (polished <= plain + 1e-12).all()
    assert (polished < plain - 1e-6).any()


def test_the_mean_has_less_spread_than_any_member():
    for case in CASES:
        q = quotient(case, (4, 5, 4, 2))
        centre = networks(q)
        generator = torch.Generator().manual_seed(3)
        noise = 0.1 * torch.randn(5, q.arch.dimension, generator=generator, dtype=torch.float64)
        g = q.arch.symmetry.random(generator=generator, like=centre, batch=(5,))
        ws = q.arch.symmetry.act(g, centre + noise)
        mean = q.mean(ws)
        spread = q.distance(mean, ws).square().sum()
        best = q.distance(ws[:, None], ws).square().sum(1).min()
        assert spread < best, case
        assert q.distance(mean, centre) < q.distance(centre, ws).mean(), case


def test_the_mean_of_a_flat_space_is_the_aligned_average():
    q = quotient("signs", (3, 4, 2))
    w = networks(q, 2)
    path = q.geodesic(w[0], w[1])
    assert torch.allclose(q.mean(w), path(0.5), rtol=1e-9, atol=1e-10)


def test_state_dicts_modules_and_lists_are_weights():
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)) for _ in range(2)]
    arch = symflow.Architecture.from_module(nets[0], torch.zeros(1, 3))
    q = symflow.Quotient(arch)
    flat = [arch.flatten(net) for net in nets]
    distance = q.distance(*flat)
    assert torch.equal(q.distance(*nets), distance)
    assert torch.equal(q.distance(*(net.state_dict() for net in nets)), distance)
    assert torch.equal(q.distance(nets[0], nets)[1], distance)
    assert q.mean(nets).shape == (arch.dimension,)


def test_running_statistics_move_but_have_no_length():
    q = quotient("balanced", batch_norm=True)
    w = networks(q, 2).abs()
    other = w.clone()
    other[1, q.arch.num_parameters :] += 5
    assert torch.allclose(q.distance(w[0], w[1]), q.distance(w[0], other[1]))
    halfway = q.geodesic(w[0], w[1])(0.5)[q.arch.num_parameters :]
    assert (halfway > 0).all()


def test_rebalanced_points_keep_the_function():
    q = quotient("balanced")
    w = networks(q, 2)
    path = q.geodesic(w[0], w[1])
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain, moved = path(0.5), path(0.5, rebalance=True)
    assert torch.allclose(q.arch.apply(plain, x), q.arch.apply(moved, x))
    assert q.manifold.check_point_on_manifold(moved)
    assert not q.manifold.check_point_on_manifold(plain)


def test_distances_are_differentiable():
    for case in CASES:
        q = quotient(case, (3, 4, 2))
        w = networks(q).requires_grad_(True)
        assert torch.autograd.gradcheck(
            lambda w, q=q: q.distance(w, networks(q, seed=1)), (w,), atol=1e-4
        )


def test_antipodal_rows_warn_and_still_have_a_path():
    q = quotient("sphere", (2, 1, 1))
    w0 = torch.tensor([0.6, 0.8, 0.0, 1.0, 0.0], dtype=torch.float64)
    w1 = torch.tensor([-0.6, -0.8, 0.0, 1.0, 0.0], dtype=torch.float64)
    with pytest.warns(AntipodalWarning):
        path = q.geodesic(w0, w1)
    assert path(0.5).isfinite().all()
    assert torch.allclose(path.length, torch.tensor(torch.pi).double())


def test_dead_neurons_are_left_out_of_the_interpolation():
    q = quotient("sphere", (2, 2, 1))
    w0, w1 = networks(q), networks(q, seed=1)
    dead = symflow.sections.unit_coordinates(q.arch, "h1", 1)[0]
    w0[dead] = 0
    with pytest.warns(DeadNeuronWarning):
        path = q.geodesic(w0, w1)
    assert path(torch.linspace(0, 1, 5)).isfinite().all()
    with pytest.warns(DeadNeuronWarning):  # and the other way round: the row fades to zero
        back = q.geodesic(w1, w0)
    assert torch.allclose(back(1.0), back.end)


def test_groups_of_the_users_pass_the_gate_first():
    arch = symflow.mlp([3, 4, 2], "gelu")
    q = symflow.Quotient(arch, groups={"h1": symflow.Trivial(4)})
    w = networks(q, 2)
    plain = (w[0] - w[1])[: arch.num_parameters].norm()
    assert torch.allclose(q.distance(w[0], w[1]), plain)
    with pytest.raises(SymmetryError, match="h1"):
        symflow.Quotient(arch, groups={"h1": symflow.Permutation(4) @ symflow.Sign(4)})


def test_bad_input_is_named():
    q = quotient("balanced")
    w = networks(q)
    bad = w.clone()
    bad[q.arch.leaf("2.bias").span.start] = torch.nan
    with pytest.raises(LeafError, match=r"w1: leaf '2.bias' holds 1 NaN"):
        q.distance(w, bad)
    with pytest.raises(LeafError, match=r"float64 on cpu, w1 is torch\.float32"):
        q.distance(w, w.float())
    with pytest.raises(ShapeError, match=r"\*batch, D = "):
        q.distance(w, w[:-1])
    with pytest.raises(ShapeError, match="needs section='sphere'"):
        symflow.Quotient(q.arch, "balanced", preserves="argmax")
    with pytest.raises(ShapeError, match="section must be"):
        symflow.Quotient(q.arch, "ball")
    with pytest.raises(ShapeError, match="preserves must be"):
        symflow.Quotient(q.arch, preserves="loss")
    with pytest.raises(ShapeError, match="batch"):
        q.mean(w)
    with pytest.raises(ShapeError, match="one network or more"):
        q.mean([])


def test_trained_networks_meet_the_acceptance():
    """Two digits networks: ends, speed, length, and the same distance anywhere on the orbits."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    nets = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)
        )
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
        assert float((net(x).argmax(-1) == y).float().mean()) > 0.9
        nets.append({k: v.double() for k, v in net.state_dict().items()})
    arch = symflow.Architecture.from_module(net, x[:2])
    q = symflow.Quotient(arch)
    path = q.geodesic(*nets)
    start, end = q.project(nets[0]), path.alignment.weights
    assert (path(0) - start).norm() <= 1e-6 * start.norm()
    assert (path(1) - end).norm() <= 1e-6 * end.norm()
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    speeds = q.manifold.norm(path(t), path.velocity(t))
    assert (speeds / path.length - 1).abs().max() <= 1e-4
    distance = q.distance(*nets)
    assert torch.equal(path.length, distance)
    w = [arch.flatten(net) for net in nets]
    generator = torch.Generator().manual_seed(0)
    g, h = (arch.symmetry.random(generator=generator, like=w[0], batch=(20,)) for _ in range(2))
    moved = q.distance(arch.symmetry.act(g, w[0]), arch.symmetry.act(h, w[1]))
    assert (moved / distance - 1).abs().max() <= 1e-8
