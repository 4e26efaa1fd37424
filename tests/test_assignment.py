"""Assignments, by lapx and by SciPy: the same best sums, in threads or not."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from symflow.errors import ShapeError
from symflow.groups import assignment, permutation


@pytest.fixture(params=["lapx", "SciPy"])
def solver(request, monkeypatch):
    if request.param == "lapx":
        pytest.importorskip("lap")
    monkeypatch.setattr(permutation, "has_lapx", lambda: request.param == "lapx")
    return request.param


def total(c, g):
    return c.double().gather(-1, g[..., None]).squeeze(-1).sum(-1)


def exhaustive(c):
    n, m = c.shape[-2:]
    choices = torch.tensor(list(itertools.permutations(range(m), n)))
    return total(c[:, None].expand(-1, len(choices), -1, -1), choices.expand(len(c), -1, -1)).amax(
        -1
    )


@pytest.mark.parametrize("shape", [(3, 1, 1), (4, 5, 5), (4, 3, 5), (1, 6, 6)])
def test_it_is_the_best_of_all(solver, shape, dtype, generator):
    c = torch.randn(shape, generator=generator, dtype=dtype)
    for matrix in (c, c.round(), c * 1e4, torch.zeros_like(c)):
        found = assignment(matrix)
        assert all(len(set(g.tolist())) == len(g) for g in found)
        torch.testing.assert_close(total(matrix, found), exhaustive(matrix))


@given(st.integers(0, 10_000), st.integers(2, 80), st.booleans())
def test_both_solvers_reach_the_same_sum(seed, n, ties):
    """Many sizes, on either side of where SciPy's matrices are reduced first."""
    pytest.importorskip("lap")
    c = torch.randn(3, n, n, generator=torch.Generator().manual_seed(seed))
    c = c.round() if ties else c
    one, other = permutation._by_lapx(c), permutation._by_scipy(c)
    sums = [total(c, torch.stack([torch.from_numpy(g).long() for g in x])) for x in (one, other)]
    torch.testing.assert_close(*sums, rtol=1e-12, atol=1e-9)


def test_threads_change_nothing(solver, generator):
    c = torch.randn(64, 40, 40, generator=generator)
    alone = torch.stack([assignment(x) for x in c])
    torch.set_num_threads(2)
    try:
        assert torch.equal(assignment(c), alone)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_kinds_of_numbers(solver, dtype, generator):
    c = torch.randn(5, 7, 7, generator=generator).mul(20).to(dtype)
    torch.testing.assert_close(total(c, assignment(c)), total(c, assignment(c.double())))


def test_no_matrices(solver):
    assert assignment(torch.zeros(0, 4, 4)).shape == (0, 4)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused(solver, bad):
    c = torch.zeros(2, 3, 3)
    c[1, 0, 2] = bad
    with pytest.raises(ShapeError, match="got 1 NaN or infinite entries of 18: leave out"):
        assignment(c)
    large = torch.full((3, 3), torch.finfo(torch.float32).max)  # its sum overflows, and may
    assert sorted(assignment(large).tolist()) == [0, 1, 2]
