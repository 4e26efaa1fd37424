"""Weight matching and its certificates."""

import functools
import itertools

import pytest
import torch
from catalogue import resnet20
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import nn

import symflow
from symflow.align import (
    Aligner,
    Status,
    WeightMatching,
    ascent,
    objective,
    objective_bound,
    stacks,
    weight_matching,
)
from symflow.errors import NotIsometricError, ShapeError
from symflow.testing import aligner_laws, concrete_classes

# Every aligner of symflow, found by walking subclasses; one without a strategy fails here.
CLASSES = concrete_classes(Aligner, "symflow.align")
LAWS = [pytest.param(x, id=f"{cls.__name__}-{x}") for cls in CLASSES for x in aligner_laws(cls)]


@pytest.mark.parametrize("law", LAWS)
def test_law(law):
    law.check()


def networks(arch, seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, arch.dimension, generator=generator, dtype=torch.float64)


@functools.cache
def every_element(arch):
    """All elements of the compact group of a small network, as one batch."""
    choices = []
    for axis in arch.symmetry.compact.axes:
        permutations = [torch.tensor(p) for p in itertools.permutations(range(axis.size))]
        if isinstance(axis.group, symflow.groups.CompactProduct):
            signs = itertools.product([1.0, -1.0], repeat=axis.size)
            choices.append(list(itertools.product(permutations, map(torch.tensor, signs))))
        else:
            choices.append([(p,) for p in permutations])
    columns = list(zip(*itertools.product(*choices), strict=True))
    stacked = [tuple(map(torch.stack, zip(*column, strict=True))) for column in columns]
    names = [axis.name for axis in arch.axes]
    return {k: g if len(g) > 1 else g[0] for k, g in zip(names, stacked, strict=True)}


def greatest_objective(arch, w0, w1):
    symmetry = arch.symmetry.compact
    return float(objective(symmetry, w0, symmetry.act(every_element(arch), w1)).max())


TINY = {name: symflow.mlp([2, 3, 2, 2], name) for name in ("gelu", "tanh")}


@pytest.mark.parametrize("activation, order", [("gelu", 6 * 2), ("tanh", 6 * 8 * 2 * 4)])
def test_every_element_is_there_once(activation, order):
    arch = TINY[activation]
    moved = arch.symmetry.act(every_element(arch), networks(arch, 0))
    assert len({tuple(w) for w in moved.tolist()}) == order


@given(seed=st.integers(0, 10_000), activation=st.sampled_from(["gelu", "tanh"]))
def test_bracketed_by_the_exhaustive_truth(seed, activation):
    arch = TINY[activation]
    w0, w1 = networks(arch, seed, 2)
    symmetry, truth = arch.symmetry.compact, greatest_objective(arch, w0, w1)
    found = WeightMatching()(symmetry, w0, w1)
    assert float(found.objective) <= truth + 1e-9
    assert truth <= float(objective_bound(symmetry, w0, w1)) + 1e-9


def test_one_hidden_layer_is_solved_exactly():
    arch = symflow.mlp([2, 4, 2], "tanh")
    for seed in range(5):
        w0, w1 = networks(arch, seed, 2)
        truth = greatest_objective(arch, w0, w1)
        found = WeightMatching(("sequential",))(arch.symmetry, w0, w1)
        assert float(found.objective) == pytest.approx(truth, rel=1e-12)
        assert float(objective_bound(arch.symmetry, w0, w1)) == pytest.approx(truth, rel=1e-12)


def test_a_covariant_search_may_end_below_the_identity():
    """Why no law forbids it: never below the identity, everywhere on the orbits, would be exact."""
    arch = symflow.mlp([1, 2, 2, 1], "gelu")
    w0, w1 = networks(arch, 0, 400), networks(arch, 1, 400)
    still = objective(arch.symmetry, w0, w1)
    covariant = WeightMatching()(arch.symmetry, w0, w1).objective
    assert 0 < (covariant < still - 1e-6).sum() < 20
    with_identity = WeightMatching(("sequential", "random", "identity"))
    assert (with_identity(arch.symmetry, w0, w1).objective >= still - 1e-12).all()


@pytest.mark.parametrize("activation", ["gelu", "tanh"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_objective_never_falls_and_no_single_axis_can_rise(activation, batch_norm):
    arch = symflow.mlp([5, 7, 6, 3], activation, batch_norm=batch_norm)
    w0, w1 = networks(arch, 0), networks(arch, 1, 6)
    symmetry = arch.symmetry.compact
    found = WeightMatching()(symmetry, w0, w1)
    assert found.status is Status.CONVERGED
    assert (found.history.diff(dim=0) >= 0).all()
    assert torch.allclose(found.history[-1], found.objective)
    assert torch.allclose(symmetry.act(found.element, w1), found.weights)
    generator = torch.Generator().manual_seed(2)
    for axis in symmetry.axes:
        for _ in range(50):  # any change of one axis alone is no gain
            g = dict(found.element)
            step = axis.group.random(generator=generator, like=w1, batch=(6,))
            g[axis.name] = axis.group.compose(step, g[axis.name])
            assert (objective(symmetry, w0, symmetry.act(g, w1)) <= found.objective + 1e-9).all()


def test_batch_equals_loop_and_references_broadcast():
    arch = symflow.mlp([5, 7, 6, 3], "tanh")
    w0, w1 = networks(arch, 0, 4), networks(arch, 1, 4)
    together = WeightMatching()(arch.symmetry, w0, w1)
    for k in range(4):
        alone = WeightMatching()(arch.symmetry, w0[k], w1[k])
        assert torch.equal(alone.weights, together.weights[k])
    grid = WeightMatching()(arch.symmetry, w0[:, None], w1[None])
    assert grid.weights.shape == (4, 4, arch.dimension)
    assert torch.allclose(grid.objective.diagonal(), together.objective)


def test_buffers_move_along_but_do_not_count():
    arch = symflow.mlp([5, 7, 3], "gelu", batch_norm=True)
    w0, w1 = networks(arch, 0), networks(arch, 1)
    other = w0.clone()
    other[arch.num_parameters :] = 100.0
    a, b = (WeightMatching()(arch.symmetry, x, w1) for x in (w0, other))
    assert torch.equal(a.weights, b.weights)
    assert float(a.objective) == float(b.objective)


def test_starts_are_covariant_but_for_the_identity():
    arch = symflow.mlp([8, 12, 12, 4], "gelu")
    w0, w1 = networks(arch, 0), networks(arch, 1, 8)
    generator = torch.Generator().manual_seed(0)
    g = arch.symmetry.random(generator=generator, like=w1, batch=(8,))
    moved = arch.symmetry.act(g, w1)

    def spread(*starts):
        a, b = (WeightMatching(starts)(arch.symmetry, w0, w).objective for w in (w1, moved))
        return float(((a - b) / a).abs().max())

    assert spread("sequential") < 1e-12
    assert spread("random") < 1e-12
    assert spread("identity") > 1e-4  # the broken twin


def test_more_starts_are_never_worse():
    arch = symflow.mlp([8, 12, 12, 4], "gelu")
    w0, w1 = networks(arch, 0), networks(arch, 1, 8)
    few, many = (
        WeightMatching(starts)(arch.symmetry, w0, w1).objective
        for starts in (("sequential",), ("sequential", "random", "random", "identity"))
    )
    assert (many >= few).all()


def test_an_axis_twice_in_a_leaf_never_loses():
    class Twice(nn.Module):
        """One map used twice: its rows and columns run over the same axis."""

        def __init__(self):
            super().__init__()
            self.into, self.again, self.out = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            x = torch.tanh(self.into(x))
            return self.out(torch.tanh(self.again(torch.tanh(self.again(x)))))

    arch = symflow.Architecture.from_module(Twice(), torch.zeros(1, 3))
    assert arch.leaf("again.weight").axes == ("h1", "h1")
    w0, w1 = networks(arch, 0), networks(arch, 1, 20)
    found = WeightMatching()(arch.symmetry, w0, w1)
    assert (found.history.diff(dim=0) >= 0).all()
    assert (found.objective <= objective_bound(arch.symmetry, w0, w1) + 1e-9).all()


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("widths", [[7, 9, 4], [5, 16, 12, 3], [6, 8, 10, 9, 2]])
def test_planted_elements_are_recovered(activation, widths):
    """w1 = g . (w0 + 1 % noise): permutation and signs exactly, weights within 2 %, 20 of 20."""
    arch = symflow.mlp(widths, activation)
    q, n = symflow.Quotient(arch), 20
    generator = torch.Generator().manual_seed(0)
    w0, noise = torch.randn(2, n, arch.dimension, generator=generator, dtype=torch.float64)
    sizes = [
        w0[:, x.span].square().mean(1, keepdim=True).sqrt().expand(n, x.size) for x in arch.leaves
    ]
    g = arch.symmetry.random(generator=generator, like=w0, batch=(n,))
    w1 = arch.symmetry.act(g, w0 + 0.01 * torch.cat(sizes, dim=1) * noise)
    found = q.align(w0, w1)
    compact = {a.name: g[a.name] if activation == "tanh" else g[a.name][0] for a in arch.axes}
    both = q.symmetry.compose(found.element, compact)
    still = q.symmetry.identity(like=w0)
    for axis in arch.axes:
        for x, y in zip(_flat(both[axis.name]), _flat(still[axis.name]), strict=True):
            assert torch.equal(x, y.expand_as(x)), axis.name
    target = q.project(w0)
    assert ((found.weights - target).norm(dim=1) <= 0.02 * target.norm(dim=1)).all()


def _flat(element):
    return element if isinstance(element, tuple) else (element,)


def test_bad_input_says_what_to_do():
    relu = symflow.mlp([2, 3, 2])
    w = networks(relu, 0)
    with pytest.raises(NotIsometricError, match=r"project on a section first"):
        WeightMatching()(relu.symmetry, w, w)
    with pytest.raises(NotIsometricError):
        objective_bound(relu.symmetry, w, w)
    linear = symflow.mlp([2, 1])  # no axis at all: pairs broadcast all the same
    pairs = WeightMatching()(linear.symmetry, networks(linear, 0, 3, 1), networks(linear, 1, 4))
    assert pairs.weights.shape == (3, 4, 3)
    with pytest.raises(ShapeError, match="'sequential', 'random', 'identity'"):
        WeightMatching(("best",))


def test_aligned_weights_are_differentiable():
    """The element is chosen; where it takes the weights depends on them smoothly."""
    arch = symflow.mlp([3, 4, 2], "tanh")
    generator = torch.Generator().manual_seed(0)
    w0, w1 = torch.randn(2, arch.dimension, generator=generator, dtype=torch.float64)
    found = WeightMatching()(arch.symmetry, w0, w1.requires_grad_())
    (slope,) = torch.autograd.grad(found.objective, w1)
    back = arch.symmetry.act(arch.symmetry.inverse(found.element), w0)
    assert torch.allclose(slope, back)
    assert not WeightMatching()(arch.symmetry, w0, w1.detach()).weights.requires_grad


def residual():
    """A ResNet that only permutations move."""
    arch = symflow.Architecture.from_module(resnet20(4), torch.zeros(2, 3, 16, 16))
    return arch.with_groups({axis.name: symflow.Permutation(axis.size) for axis in arch.axes})


@pytest.mark.parametrize("starts", [("sequential",), ("random",), ("identity",)])
@pytest.mark.parametrize("net", [residual, lambda: symflow.mlp([5, 16, 12, 3], "gelu")])
def test_stacks_find_what_the_contraction_of_each_leaf_finds(monkeypatch, net, starts):
    arch = net()
    w0, w1 = networks(arch, 0), networks(arch, 1)
    matching = WeightMatching(starts)
    assert stacks.layout(arch.symmetry) is not None
    fast = matching(arch.symmetry, w0, w1)
    monkeypatch.setattr(weight_matching, "layout", lambda symmetry: None)
    slow = matching(arch.symmetry, w0, w1)
    assert fast.status is slow.status
    torch.testing.assert_close(fast.history, slow.history)
    assert torch.equal(fast.weights, slow.weights)
    assert all(torch.equal(g, slow.element[name]) for name, g in fast.element.items())


@pytest.mark.parametrize("guess", ["none", "near", "solution"])
def test_prices_leave_the_best_assignment_as_it_is(generator, dtype, guess):
    n = 60
    a, b = torch.randn(2, n, generator=generator, dtype=dtype)
    c = 3 * a[:, None] * b + 20 * b + torch.rand(n, n, generator=generator, dtype=dtype) / 10
    assert len(c.argmax(1).unique()) < n / 4  # places that all units want: prices are used
    truth = torch.from_numpy(linear_sum_assignment(c, maximize=True)[1])
    g = {"none": None, "near": truth[[1, 0, *range(2, n)]], "solution": truth}[guess]
    found = ascent.best(symflow.Permutation(n), c, g)
    value, greatest = (c.double().gather(1, x[:, None]).sum() for x in (found, truth))
    torch.testing.assert_close(value, greatest)
