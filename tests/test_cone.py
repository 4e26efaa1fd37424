"""The intrinsic metric of balanced weights: against calculus, brute force, and plain curves."""

import itertools
import math
import warnings

import pytest
import torch
from catalogue import CATALOGUE
from torch.func import jvp

import symflow
from symflow.errors import AntipodalWarning, LeafError, ShapeError
from symflow.groups import GeneralLinear
from symflow.manifolds import ConeProduct
from symflow.numerics import angle, pairwise_angle, tolerance
from symflow.sections import BalancedSection


def space(ratio=1.0):
    """Three units with four incoming and five outgoing weights, and three flat coordinates."""
    index = torch.randperm(30, generator=torch.Generator().manual_seed(7))
    return ConeProduct(30, [index[:12].reshape(3, 4)], [index[12:27].reshape(3, 5)], [ratio])


def points(on, n, *, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return on.projx(torch.randn(n, on.dimension, generator=generator, dtype=dtype))


def squared_relu():
    entry = next(entry for entry in CATALOGUE if entry.name == "MLP, squared ReLU")
    return symflow.Architecture.from_module(entry.make(), *entry.inputs)


def networks(arch, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, arch.dimension, generator=generator, dtype=torch.float64)


# ---------------------------------------------------------------- against calculus


@pytest.mark.parametrize("ratio", [1.0, 2.0, 0.5])
def test_paths_do_not_accelerate_within_the_cone(ratio):
    """The equation of geodesics: what turns them is normal to the cone."""
    on = space(ratio)
    x, y = points(on, 6), points(on, 6, seed=1)
    v, t, one = on.logmap(x, y), torch.tensor(0.37).double(), torch.tensor(1.0).double()

    def path(t):
        return on.geodesic(x, v, t.expand(6))

    def slope(t):
        return jvp(path, (t,), (one,))[1]

    assert on.check_point_on_manifold(path(t))
    torch.testing.assert_close(slope(t), on.geodesic_velocity(x, v, t.expand(6)))
    bent = jvp(slope, (t,), (one,))[1]
    assert bent.norm() > 1
    torch.testing.assert_close(on.proju(path(t), bent), torch.zeros_like(bent), atol=1e-12, rtol=0)


@pytest.mark.parametrize("ratio", [1.0, 2.0])
def test_what_is_carried_does_not_turn_within_the_cone(ratio):
    on = space(ratio)
    x, y = points(on, 6), points(on, 6, seed=1)
    v, w = on.logmap(x, y), on.proju(x, torch.randn(6, 30, dtype=torch.float64))
    t = torch.tensor(0.6).double()
    moved = jvp(lambda t: on.carry(x, t * v, w), (t,), (torch.ones_like(t),))[1]
    here = on.geodesic(x, v, t.expand(6))
    torch.testing.assert_close(on.proju(here, moved), torch.zeros_like(w), atol=1e-12, rtol=0)
    there = on.transp(x, y, w)
    torch.testing.assert_close(on.norm(y, there), on.norm(x, w))
    torch.testing.assert_close(on.transp(y, x, there), w)


def test_no_curve_of_balanced_points_is_shorter():
    on = space()
    x, y = points(on, 5), points(on, 5, seed=1)
    t = torch.linspace(0, 1, 201).double()[:, None]
    lengths = []
    for bend in (0.0, 0.1, 0.3):
        straight = on.geodesic(x, on.logmap(x, y), t)
        bump = bend * (math.pi * t[..., None]).sin() * points(on, 5, seed=2)
        steps = on.projx(straight + bump).diff(dim=0)
        lengths.append(steps.norm(dim=-1).sum(0))
    torch.testing.assert_close(lengths[0], on.dist(x, y), rtol=1e-3, atol=0)
    assert (lengths[1] > lengths[0]).all() and (lengths[2] > lengths[1]).all()
    assert (on.dist(x, y) > (x - y).norm(dim=-1)).all()


def test_slopes_are_those_of_the_squared_distance():
    """Where both sides turn by an isometry, the distance changes by the slopes it is told."""
    on = space(2.0)
    x, y = points(on, 4), points(on, 4, seed=1)
    skew = torch.randn(5, 5, dtype=torch.float64)
    skew, index = skew - skew.mT, on.rows[0][:, 4:]

    def turned(t):
        rows = y[:, index] @ torch.linalg.matrix_exp(t * skew)
        return y.index_copy(1, index.flatten(), rows.flatten(1))

    t = torch.tensor(0.0).double()
    change = jvp(turned, (t,), (torch.ones_like(t),))[1]
    wanted = jvp(lambda t: -on.dist2(x, turned(t)), (t,), (torch.ones_like(t),))[1]
    slopes = on.join(on.slopes(x, y), torch.zeros_like(on.split(x)[1]))
    torch.testing.assert_close((slopes * x * change).sum(-1), wanted)


# ---------------------------------------------------------------- delicate places


def test_equal_points_are_at_distance_zero_and_close_ones_keep_their_digits(dtype):
    on = space()
    x = points(on, 50, dtype=dtype)
    assert (on.dist(x, x) == 0).all()
    step = 1e3 * tolerance(dtype).eps * on.proju(x, points(on, 50, seed=1, dtype=dtype))
    y = on.expmap(x, step)
    torch.testing.assert_close(on.dist(x, y), on.norm(x, step), rtol=0.05, atol=0)


def test_dead_units_move_straight():
    on = space()
    x, y = points(on, 2), points(on, 2, seed=1)
    dead = on.rows[0][1]
    for a, b in ((x.index_fill(1, dead, 0), y), (x, y.index_fill(1, dead, 0))):
        v = on.logmap(a, b)
        torch.testing.assert_close(v[:, dead], (b - a)[:, dead])
        half = on.geodesic(a, v, torch.full((2,), 0.5, dtype=torch.float64))
        torch.testing.assert_close(half[:, dead], (a + b)[:, dead] / 2)
        torch.testing.assert_close(on.expmap(a, v), b)
        assert on.check_point_on_manifold(half)


def test_opposite_units_are_joined_through_the_tip():
    on = space()
    x = points(on, 1)
    y = x.index_copy(1, on.rows[0][0], -2 * x[:, on.rows[0][0]])
    with pytest.warns(AntipodalWarning):
        v = on.logmap(x, y)
    row = x[:, on.rows[0][0]].norm()
    torch.testing.assert_close(on.norm(x, v), 3 * row[None])
    torch.testing.assert_close(on.expmap(x, v), y)
    assert (
        on.geodesic(x, v, torch.tensor([1 / 3], dtype=torch.float64))[:, on.rows[0][0]].norm()
        < 1e-12
    )


@pytest.mark.parametrize("pair", ["equal", "far", "opposite", "dead"])
def test_gradients_are_finite_everywhere(dtype, pair):
    on = space()
    x = points(on, 1, dtype=dtype).requires_grad_()
    y = {"equal": x.detach(), "far": points(on, 1, seed=1, dtype=dtype)}.get(pair, -x.detach())
    if pair == "dead":
        y = y.index_fill(1, on.rows[0][0], 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AntipodalWarning)
        v = on.logmap(x, y)
        half = on.geodesic(x, v, torch.full((1,), 0.5, dtype=dtype))
        (half.sum() + on.dist(x, y).sum() + on.carry(x, v, y).sum()).backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_angles_of_all_pairs_are_those_of_each(dtype):
    generator = torch.Generator().manual_seed(0)
    u, v = (3 * torch.randn(2, 5, 4, generator=generator, dtype=dtype) for _ in range(2))
    u[0, 0], v[0, 1] = 0, u[0, 2]
    wanted = angle(
        *(x / x.norm(dim=-1, keepdim=True).clamp_min(0.1) for x in (u[:, :, None], v[:, None]))
    )
    torch.testing.assert_close(
        pairwise_angle(u, v).square(), wanted.square(), rtol=1e-5, atol=1e-12
    )
    assert pairwise_angle(u[:1, :1], u[:1, :1]) == 0  # a zero row from itself


# ---------------------------------------------------------------- the quotient


@pytest.mark.parametrize("case", ["relu", "identity", "squared ReLU"])
def test_distance_is_the_least_of_the_whole_group(case):
    """With one hidden layer the assignment of squared distances is exact."""
    arch = squared_relu() if case == "squared ReLU" else symflow.mlp([3, 4, 2], case)
    q = symflow.Quotient(arch, metric="intrinsic")
    axis = q.symmetry.axes[0]
    n = axis.size
    x0, x1 = q.project(networks(arch, 5)), q.project(networks(arch, 5, seed=1))
    best = torch.full((5,), torch.inf, dtype=torch.float64)
    signs = itertools.product([1.0, -1.0], repeat=n) if case == "identity" else [None]
    for s, p in itertools.product(list(signs), itertools.permutations(range(n))):
        index = torch.tensor(p)
        g = index if s is None else (index, torch.tensor(s, dtype=torch.float64))
        best = torch.minimum(best, q.manifold.dist(x0, q.symmetry.act({axis.name: g}, x1)))
    torch.testing.assert_close(q.distance(x0, x1), best)
    chords = symflow.Quotient(arch).distance(x0, x1)
    assert (best > chords).all()
    lower, upper = q.distance_bounds(x0, x1)
    assert (lower <= chords * (1 + 1e-9)).all()
    torch.testing.assert_close(upper, best)


def test_paths_stay_balanced_and_distances_are_the_same_everywhere_on_the_orbits():
    """BatchNorm takes the scales from incoming weights: two layers have cones of their own."""
    arch = symflow.mlp([3, 5, 4, 2], batch_norm=True)
    q, section = symflow.Quotient(arch, metric="intrinsic"), BalancedSection(arch)
    assert isinstance(q.manifold, ConeProduct) and q.dimension == symflow.Quotient(arch).dimension
    w0, w1 = networks(arch).abs(), networks(arch, seed=1).abs()
    group, generator = arch.symmetry, torch.Generator().manual_seed(2)
    g, h = (group.random(generator=generator, like=w0, batch=(10,)) for _ in range(2))
    moved = q.distance(group.act(g, w0), group.act(h, w1))
    torch.testing.assert_close(moved, q.distance(w0, w1).expand(10))
    path = q.geodesic(w0, w1)
    inner = path(torch.linspace(0, 1, 7))
    torch.testing.assert_close(section.project(inner), inner)
    torch.testing.assert_close(path(1.0), path.end)
    torch.testing.assert_close(path.length, q.distance(w0, w1))
    chord = symflow.Quotient(arch).geodesic(w0, w1)(0.5)
    assert not torch.allclose(section.project(chord), chord)


def test_means_and_directions_go_by_it():
    arch = symflow.mlp([3, 4, 2])
    q = symflow.Quotient(arch, metric="intrinsic")
    w = networks(arch, 1) + 0.3 * networks(arch, 6, seed=1)
    mean = q.mean(w)
    assert q.manifold.check_point_on_manifold(mean)
    spread = q.distance(mean, w).square().sum()
    assert spread < q.distance(symflow.Quotient(arch).mean(w), w).square().sum() - 1e-6
    torch.testing.assert_close(q.log(mean, w).mean(0), torch.zeros_like(mean), atol=1e-4, rtol=0)
    found = q.principal(w, 6)
    torch.testing.assert_close(found.variances.sum(), found.total)
    torch.testing.assert_close(found.reconstruct(found.coordinates), q.geodesic(mean, w).end)


def test_where_no_closed_form_is_known_the_weight_is_named():
    with pytest.raises(LeafError, match=r"'2.weight' stands between units of h2 and h1"):
        symflow.Quotient(symflow.mlp([3, 4, 4, 2]), metric="intrinsic")
    low_rank = symflow.mlp([3, 4, 2], "identity")
    groups = {"h1": GeneralLinear(4)}
    with pytest.raises(LeafError, match=r"not for the linear maps of axis h1"):
        symflow.Quotient(low_rank, groups=groups, metric="intrinsic")
    with pytest.raises(ShapeError, match=r"those of a FlatSection are intrinsic as they are"):
        symflow.Quotient(symflow.mlp([3, 4, 2], "tanh"), metric="intrinsic")
    with pytest.raises(ShapeError, match=r"None, 'intrinsic' or a dict .* got 'chordal'"):
        symflow.Quotient(symflow.mlp([3, 4, 2]), metric="chordal")
    with pytest.raises(ShapeError, match="rows of a ConeProduct overlap"):
        ConeProduct(3, [torch.tensor([[0, 1]])], [torch.tensor([[1, 2]])])


def test_a_single_weight_cannot_turn():
    """Between two signs lies zero: no path of balanced weights leads from one to the other."""
    for widths in ([3, 4, 1], [1, 4, 2]):
        arch = symflow.mlp(widths, bias=False)
        with pytest.raises(LeafError, match=r"units of axis h1 have a single one on a side"):
            symflow.Quotient(arch, metric="intrinsic")
    with pytest.raises(ShapeError, match="two weights or more on both sides"):
        ConeProduct(3, [torch.tensor([[0, 1]])], [torch.tensor([[2]])])
