"""Leaves that count more or less: against weights that are multiplied by hand, and brute force."""

import itertools

import pytest
import torch
from scipy.optimize import minimize

import symflow
from symflow.errors import LeafError, ShapeError

METRIC = {"0.weight": 0.1, "2.weight": 5, "2.bias": 0.01}
CASES = {"signs": ("tanh", None), "balanced": ("relu", "balanced")}


def quotient(case, widths=(3, 4, 2), metric=METRIC, **options):
    activation, section = CASES[case]
    return symflow.Quotient(symflow.mlp(widths, activation, **options), section, metric=metric)


def networks(q, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, q.arch.dimension, generator=generator, dtype=torch.float64)


def stretched(q, x):
    """Coordinates in which the metric is the Euclidean one."""
    parts = [x[..., leaf.span] * METRIC.get(leaf.name, 1) ** 0.5 for leaf in q.arch.leaves]
    return torch.cat(parts, -1)


@pytest.mark.parametrize("case", CASES)
def test_distance_is_the_least_weighted_one_of_the_whole_group(case):
    q = quotient(case)
    x0, x1 = q.project(networks(q, 5)), q.project(networks(q, 5, seed=1))
    best = torch.full((5,), torch.inf, dtype=torch.float64)
    signs = itertools.product([1.0, -1.0], repeat=4) if case == "signs" else [None]
    for s, p in itertools.product(list(signs), itertools.permutations(range(4))):
        index = torch.tensor(p)
        g = {"h1": index if s is None else (index, torch.tensor(s, dtype=torch.float64))}
        best = torch.minimum(best, stretched(q, x0 - q.symmetry.act(g, x1)).norm(dim=-1))
    torch.testing.assert_close(q.distance(x0, x1), best)  # one axis: the assignment is exact
    lower, upper = q.distance_bounds(x0, x1)
    torch.testing.assert_close(lower, upper)
    plain = quotient(case, metric=None)
    k = plain.align(x0, x1).weights
    assert (stretched(q, x0 - k).norm(dim=-1) > best + 1e-9).any()


@pytest.mark.parametrize("case", CASES)
def test_the_metric_is_the_same_everywhere_on_the_orbits(case):
    q = quotient(case, (3, 5, 4, 2))
    w0, w1 = networks(q), networks(q, seed=1)
    generator, group = torch.Generator().manual_seed(2), q.arch.symmetry
    g, h = (group.random(generator=generator, like=w0, batch=(10,)) for _ in range(2))
    moved = q.distance(group.act(g, w0), group.act(h, w1))
    torch.testing.assert_close(moved, q.distance(w0, w1).expand(10))
    path = q.geodesic(w0, w1)
    torch.testing.assert_close(path.length, q.distance(w0, w1))
    torch.testing.assert_close(path.length, stretched(q, path.end - path.start).norm())
    torch.testing.assert_close(q.transport(w1, w0, q.transport(w0, w1, w0)), w0)


def test_means_and_directions_go_by_the_metric():
    for case in CASES:
        q = quotient(case)
        w = networks(q, 1).abs() + 0.1 * networks(q, 6, seed=1)
        mean, plain = q.mean(w), quotient(case, metric=None).mean(w)
        spread = q.distance(mean, w).square().sum()
        assert spread <= q.distance(plain, w).square().sum() * (1 + 1e-9)
        found = q.principal(w, 6)
        eye = torch.eye(6, dtype=torch.float64)
        own = stretched(q, found.components)
        torch.testing.assert_close(own @ own.T, eye)
        torch.testing.assert_close(found.total, q.distance(mean, w).square().mean())
        torch.testing.assert_close(found.variances.sum(), found.total)
        torch.testing.assert_close(found.reconstruct(found.coordinates), q.geodesic(mean, w).end)


def test_the_nearest_balanced_point_is_nearest_in_the_metric():
    q = quotient("balanced", (2, 2, 1))
    x = networks(q)
    found = q.manifold.projx(x)
    assert q.manifold.check_point_on_manifold(found)

    def off(free):
        y = q.project(torch.tensor(free))
        return float(stretched(q, x - y).square().sum())

    searched = minimize(off, found.numpy(), method="Nelder-Mead", options={"maxiter": 4000})
    assert searched.fun == pytest.approx(float(stretched(q, x - found).square().sum()), rel=1e-4)
    other = quotient("balanced", (2, 2, 1), metric=None).manifold.projx(x)
    assert stretched(q, x - found).norm() < stretched(q, x - other).norm() - 1e-6


def test_tangent_parts_are_orthogonal_in_the_metric():
    q = quotient("balanced", (3, 4, 4, 2))
    x, u = q.project(networks(q)), networks(q, seed=1)
    tangent = q.manifold.proju(x, u)
    assert q.manifold.check_vector_on_tangent(x, tangent)
    others = q.manifold.proju(x, networks(q, 7, seed=2))
    inner = q.manifold.inner(x, others, u - tangent)
    torch.testing.assert_close(inner, torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-12)
    # A gradient pairs with vectors by the metric as the differential does without.
    slope = q.manifold.inner(x, others, q.manifold.egrad2rgrad(x, u))
    torch.testing.assert_close(slope, others @ u)


def test_factors_of_one_change_nothing_and_statistics_do_not_count():
    q, plain = (quotient("balanced", batch_norm=True, metric=m) for m in ({"0.weight": 1}, None))
    w = networks(q, 2).abs()
    torch.testing.assert_close(q.distance(w[0], w[1]), plain.distance(w[0], w[1]))
    other = w[1].clone()
    other[q.arch.num_parameters :] += 5
    assert torch.equal(q.distance(w[0], w[1]), q.distance(w[0], other))


def test_bad_metrics_are_named():
    arch = symflow.mlp([3, 4, 2], batch_norm=True)
    with pytest.raises(LeafError, match=r"metric names \['9.bias'\]; the parameters are"):
        symflow.Quotient(arch, metric={"9.bias": 1.0})
    with pytest.raises(LeafError, match=r"metric names \['1.running_mean'\]"):
        symflow.Quotient(arch, metric={"1.running_mean": 1.0})
    for factor in (0, -1.0, float("nan"), float("inf"), True):
        with pytest.raises(ShapeError, match=r"metric\['0.weight'\] must be a positive number"):
            symflow.Quotient(arch, metric={"0.weight": factor})
    with pytest.raises(ShapeError, match="SphereProduct has no weighted metric"):
        symflow.Quotient(arch, "sphere", metric={"0.weight": 2.0})
