"""What a quotient says about sets of networks, and about its own size."""

import itertools
import math

import joblib
import pytest
import torch

import symflow
from symflow.errors import LeafError, ShapeError
from symflow.groups import PermutingGroup
from symflow.quotient import pairs

QUOTIENTS = {
    "balanced": lambda: symflow.Quotient(symflow.mlp([4, 5, 3])),
    "sphere": lambda: symflow.Quotient(symflow.mlp([4, 5, 3]), "sphere"),
    "argmax": lambda: symflow.Quotient(symflow.mlp([4, 5, 3]), preserves="argmax"),
    "signs": lambda: symflow.Quotient(symflow.mlp([4, 5, 4, 3], "tanh")),
}


def networks(q, *shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, q.arch.dimension, generator=generator, dtype=dtype)


# ---------------------------------------------------------------- all pairs


@pytest.mark.parametrize("name", QUOTIENTS)
@pytest.mark.parametrize("size", [1, 300, 2**22])
def test_pairwise_distances_are_those_of_each_pair(monkeypatch, name, size):
    monkeypatch.setattr(pairs, "_COORDINATES", size)
    q = QUOTIENTS[name]()
    w = networks(q, 6)
    found = q.pairwise(w, progress=False)
    assert torch.equal(found, found.T) and not found.diagonal().any()
    for i, j in itertools.combinations(range(6), 2):
        torch.testing.assert_close(found[i, j], q.distance(w[i], w[j]))


@pytest.mark.parametrize("n", range(1, 8))
def test_pairs_are_counted_row_by_row(n):
    wanted = list(itertools.combinations(range(n), 2))
    i, j = pairs.pair(torch.arange(len(wanted)), n)
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == wanted


def test_pairwise_takes_the_active_backend():
    q = QUOTIENTS["balanced"]()
    w = networks(q, 7)
    with joblib.parallel_config(backend="threading"):
        assert torch.equal(q.pairwise(w, workers=2), q.pairwise(w))


@pytest.mark.slow
def test_pairwise_on_two_processes():
    q = QUOTIENTS["sphere"]()
    w = networks(q, 5)
    torch.testing.assert_close(q.pairwise(w, workers=2), q.pairwise(w), rtol=1e-14, atol=0)


def test_the_medoid_has_the_least_sum_of_distances():
    q = QUOTIENTS["signs"]()
    w = networks(q, 1) + 0.2 * networks(q, 9, seed=1)
    w[4] = networks(q, 1)[0]  # the centre of the others
    g = q.arch.symmetry.random(generator=torch.Generator().manual_seed(2), like=w, batch=(9,))
    assert q.medoid(q.arch.symmetry.act(g, w)) == 4
    sums = q.distance(w[:, None], w).sum(1)
    assert int(sums.argmin()) == 4


def test_one_network_is_its_own_medoid():
    q = QUOTIENTS["balanced"]()
    assert q.pairwise(networks(q, 1)).tolist() == [[0.0]]
    assert q.medoid(networks(q, 1)) == 0


def test_sets_are_batches_of_finite_networks():
    q = QUOTIENTS["balanced"]()
    w = networks(q, 3)
    for measure in (q.pairwise, q.medoid):
        with pytest.raises(ShapeError, match=r"ws must be a batch \(N, D\)"):
            measure(w[0])
        with pytest.raises(ShapeError, match="one network or more"):
            measure(w[:0])
        with pytest.raises(LeafError, match="NaN"):
            measure(w * torch.nan)
        with pytest.raises(ShapeError, match="workers must be 1 or more, got 0"):
            measure(w, workers=0)


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize("name", ["balanced", "sphere", "argmax"])
def test_dimension_is_the_rank_of_the_projection(name):
    """Near a generic point the section space has as many directions as the projection keeps."""
    q = QUOTIENTS[name]()
    slope = torch.autograd.functional.jacobian(q.project, networks(q))
    rank = int(torch.linalg.matrix_rank(slope, rtol=1e-8))
    assert q.dimension == rank == q.arch.dimension - 5 - (name == "argmax")


def test_compact_groups_and_statistics_have_no_dimension():
    assert QUOTIENTS["signs"]().dimension == 4 * 5 + 5 + 5 * 4 + 4 + 4 * 3 + 3
    arch = symflow.mlp([3, 4, 2], batch_norm=True)
    q = symflow.Quotient(arch)
    assert q.dimension == arch.num_parameters - 4 == arch.dimension - 8 - 4


def test_orbits_are_counted():
    q = symflow.Quotient(symflow.mlp([4, 3, 2, 3], "tanh"))
    wanted = math.factorial(3) * 2**3 * math.factorial(2) * 2**2
    assert q.log_orbit_size == pytest.approx(math.log(wanted))
    assert symflow.Quotient(symflow.mlp([4, 3])).log_orbit_size == 0
    # As many points as there are: every one of them is another one.
    w = networks(q)
    group = q.symmetry
    seen = set()
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        g = group.random(generator=generator, like=w, batch=(1000,))
        seen |= {tuple(row) for row in group.act(g, w).tolist()}
    assert len(seen) == wanted


class Swap(PermutingGroup):
    """The two halves of an axis change places, or do not."""

    def __init__(self, size):
        self.size = size

    def identity(self, *, like):
        return torch.zeros((), dtype=torch.long)

    def compose(self, g, h):
        return (g + h) % 2

    def inverse(self, g):
        return g

    def random(self, *, generator, like, batch=()):
        return torch.randint(2, batch, generator=generator)

    def indices(self, g):
        return (torch.arange(self.size) + g[..., None] * (self.size // 2)) % self.size

    def nearest(self, c):
        shifts = self.indices(torch.arange(2)).expand(*c.shape[:-2], -1, -1)
        return torch.stack([c.gather(-1, s[..., None]).sum((-2, -1)) for s in shifts]).argmax(0)


def test_the_size_of_a_group_of_ones_own_is_not_made_up():
    q = symflow.Quotient(symflow.mlp([3, 4, 2], "gelu"), groups={"h1": Swap(4)})
    assert q.dimension == 26
    with pytest.raises(ShapeError, match=r"the number of elements of .*Swap.* is not known"):
        _ = q.log_orbit_size


# ---------------------------------------------------------------- principal directions


def spread(q, n=12, size=0.2):
    """Networks around one, each at another place of its orbit."""
    w = networks(q).abs() + size * networks(q, n, seed=1)
    g = q.arch.symmetry.random(generator=torch.Generator().manual_seed(2), like=w, batch=(n,))
    return q.arch.symmetry.act(g, w)


@pytest.mark.parametrize("name", QUOTIENTS)
def test_all_directions_lead_to_the_networks_themselves(name):
    q = QUOTIENTS[name]()
    w = spread(q)
    found = q.principal(w, 12)
    mean = q.mean(w)
    assert torch.equal(found.mean, mean)
    ends = q.geodesic(mean, w).end
    torch.testing.assert_close(found.reconstruct(found.coordinates), ends)
    torch.testing.assert_close(found.variances.sum(), found.total)
    torch.testing.assert_close(found.total, q.distance(mean, w).square().mean())
    assert (found.variances.diff() <= 0).all()
    torch.testing.assert_close(found.variances, found.coordinates.square().mean(0))


def test_few_directions_are_the_first_of_many_and_the_best():
    q = QUOTIENTS["signs"]()
    w = spread(q)
    few, many = q.principal(w, 3), q.principal(w, 12)
    torch.testing.assert_close(few.components, many.components[:3])
    torch.testing.assert_close(few.coordinates, many.coordinates[:, :3])
    eye = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(few.components @ few.components.T, eye)
    # Their plane leaves out as little as the least eigenvalues say (Eckart and Young).
    logs = q.log(few.mean, w)
    left_out = (logs - few.coordinates @ few.components).square().sum() / 12
    eigenvalues = torch.linalg.eigvalsh(logs @ logs.T / 12)
    torch.testing.assert_close(left_out, eigenvalues[:-3].sum())
    assert left_out < 0.9 * few.total


def test_statistics_move_along_without_a_length():
    q = symflow.Quotient(symflow.mlp([3, 4, 2], batch_norm=True))
    w = spread(q, 6)
    found = q.principal(w, 6)
    torch.testing.assert_close(found.reconstruct(found.coordinates), q.geodesic(found.mean, w).end)
    own = found.components[:, : q.arch.num_parameters]
    torch.testing.assert_close(own @ own.T, torch.eye(6, dtype=torch.float64))


def test_as_many_directions_as_there_are():
    q = QUOTIENTS["balanced"]()
    w = networks(q, 4)
    for k in (0, 5):
        with pytest.raises(ShapeError, match=f"k must be from 1 to 4, for 4 networks .* got {k}"):
            q.principal(w, k)
    same = q.principal(w[:1].expand(3, -1), 2)
    assert same.components.isfinite().all() and same.total < 1e-20
    assert q.principal(w.bfloat16(), 2).components.dtype == torch.float32
