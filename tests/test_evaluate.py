"""What networks do on data: against single networks in plain loops, closed forms, brute force."""

import copy
import itertools
import math
import sys
from dataclasses import dataclass

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.spatial.distance import jensenshannon
from torch import Tensor, nn
from torch.nn import functional as F

import symflow
from symflow.errors import LeafError, ShapeError
from symflow.evaluate import (
    Barrier,
    LabelledData,
    accuracy,
    averaged,
    barrier,
    diversity,
    fit_temperature,
    loss,
    nearest,
    predict,
    probabilities,
    sets,
    weight_average,
)

# The function of the same name hides its module.
nearest_module = sys.modules[nearest.__module__]


@dataclass
class Data:
    """Labelled data of a user's: nothing but the four tensors."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


def data(n: int = 13, features: int = 4, classes: int = 3, seed: int = 0) -> Data:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n + 8, features, generator=generator)
    y = torch.randint(classes, (n + 8,), generator=generator)
    return Data(x[:n], y[:n], x[n:], y[n:])


ARCH = symflow.mlp([4, 5, 3])
ODD = symflow.mlp([4, 3, 3], "tanh")
# Logits (a, b) on the input 1, for weights (a, b): everything has a closed form.
BINARY = symflow.mlp([1, 2], bias=False)


def weights(arch: symflow.Architecture, *shape: int, seed: int = 0, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, arch.dimension, generator=generator, dtype=dtype)


def ones(*labels: int) -> Data:
    """Inputs that are all 1, in both splits."""
    x, y = torch.ones(len(labels), 1), torch.tensor(labels)
    return Data(x, y, x, y)


def alone(arch: symflow.Architecture, w: Tensor, x: Tensor) -> Tensor:
    """Logits of one network, run by itself as one runs a module."""
    net = arch.load_into(copy.deepcopy(arch.module).to(w.dtype), w)
    with torch.no_grad():
        return net(x.to(w.dtype))


@pytest.fixture
def unchecked(monkeypatch):
    """Call symflow as users do: without the checks of annotations that run in tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def test_a_zoo_is_told_which_weights_are_wanted(unchecked):
    task = data()
    w = weights(ARCH, 2, dtype=torch.float32)
    zoo = symflow.zoo.Zoo(ARCH, w, w)
    wanted = "ws? must be weights .* got a Zoo: pass its trained weights, zoo.final"
    quotient = symflow.Quotient(ARCH)
    for measure in (
        lambda ws: accuracy(ARCH, ws, task),
        lambda ws: probabilities(ARCH, ws, task.x_test),
        lambda ws: averaged(ARCH, ws, task),
        lambda ws: diversity(ARCH, ws, task),
        lambda ws: weight_average(quotient, ws),
        lambda ws: nearest(quotient, ws, w),
    ):
        with pytest.raises(ShapeError, match=wanted):
            measure(zoo)
        measure(zoo.final)
    with pytest.raises(ShapeError, match=r"zoo_ws must be weights .* zoo\.final"):
        nearest(quotient, w, zoo)
    with pytest.raises(ShapeError, match=r"w0 must be weights .* zoo\.final"):
        barrier(ARCH, (zoo, w), task)


def test_measuring_leaves_the_data_as_they_are():
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3))
    arch, task = symflow.Architecture.from_module(net, torch.zeros(1, 4)), data()
    before = task.x_test.clone()
    assert (before < 0).any()  # so that the network would change them
    accuracy(arch, weights(arch, 2, dtype=torch.float32), task)
    assert torch.equal(task.x_test, before)


# ---------------------------------------------------------------- predictions


def test_predictions_are_those_of_each_network_alone(dtype):
    w, task = weights(ARCH, 2, 3, dtype=dtype), data()
    temperature = torch.rand(2, 3, dtype=dtype) + 0.5
    p = probabilities(ARCH, w, task.x_test, temperature=temperature)
    assert p.shape == (2, 3, 8, 3) and p.dtype == dtype
    for k in np.ndindex(2, 3):
        scaled = alone(ARCH, w[k], task.x_test) / temperature[k]
        torch.testing.assert_close(p[k], scaled.exp() / scaled.exp().sum(-1, keepdim=True))


@pytest.mark.parametrize("split", ["train", "test"])
def test_accuracy_and_loss_are_those_of_each_network_alone(dtype, split):
    w, task = weights(ARCH, 2, 3, dtype=dtype), data()
    x, y = (getattr(task, f"{name}_{split}") for name in "xy")
    share, found = accuracy(ARCH, w, task, split), loss(ARCH, w, task, split)
    cold = loss(ARCH, w, task, split, temperature=0.5)
    assert share.shape == found.shape == (2, 3) and share.dtype == found.dtype == dtype
    assert share.unique().numel() > 1  # else any constant would pass
    for k in np.ndindex(2, 3):
        z = alone(ARCH, w[k], x)
        assert float(share[k]) == pytest.approx(float((z.argmax(-1) == y).double().mean()))
        torch.testing.assert_close(found[k], F.cross_entropy(z, y))
        torch.testing.assert_close(cold[k], F.cross_entropy(2 * z, y))


def test_the_test_split_is_the_default_of_measures_and_training_that_of_fits():
    w, task = weights(ARCH, 3), data()
    for measure in (accuracy, loss, diversity):
        assert torch.equal(measure(ARCH, w, task), measure(ARCH, w, task, "test"))
        assert not torch.equal(measure(ARCH, w, task), measure(ARCH, w, task, "train"))
    for fit in (fit_temperature, lambda *a: barrier(ARCH, (w[0], w[1]), *a[2:], points=3).losses):
        assert torch.equal(fit(ARCH, w, task), fit(ARCH, w, task, "train"))
        assert not torch.equal(fit(ARCH, w, task), fit(ARCH, w, task, "test"))


def test_modules_state_dicts_and_lists_are_networks_too():
    w, task = weights(ARCH, 2, dtype=torch.float32), data()
    nets = [ARCH.load_into(copy.deepcopy(ARCH.module), row) for row in w]
    assert torch.equal(loss(ARCH, nets, task), loss(ARCH, w, task))
    assert torch.equal(loss(ARCH, nets[1].state_dict(), task), loss(ARCH, w[1], task))
    assert accuracy(ARCH, nets[0], task).shape == ()


def test_a_loss_by_hand():
    w = torch.tensor([[math.log(3), 0.0], [0.0, math.log(3)]])
    task = ones(0, 0, 0, 1)
    assert accuracy(BINARY, w, task).tolist() == [0.75, 0.25]
    quarter, three_quarters = math.log(4), math.log(4 / 3)
    wanted = [(3 * three_quarters + quarter) / 4, (3 * quarter + three_quarters) / 4]
    assert loss(BINARY, w, task).tolist() == pytest.approx(wanted)


def test_a_network_that_is_sure_and_wrong_has_a_finite_loss():
    w = torch.tensor([1e4, -1e4])  # float32 has no number for exp(-20000)
    assert float(loss(BINARY, w, ones(1))) == 2e4
    assert float(averaged(BINARY, [w, w], ones(1)).loss) == 2e4


def test_flat_examples_are_shaped_as_the_network_wants_them():
    rows = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3))
    arch = symflow.Architecture.from_module(rows, torch.zeros(2, 3, 2))
    w, task = weights(arch, 2), data(features=6)
    for k, found in enumerate(loss(arch, w, task)):
        z = alone(arch, w[k], task.x_test.reshape(8, 3, 2))
        torch.testing.assert_close(found, F.cross_entropy(z, task.y_test))


@pytest.mark.parametrize("size", [1, 20, 7 * 13 * 5])
def test_pieces_change_nothing(monkeypatch, size):
    w, task = weights(ARCH, 7), data()

    def measure() -> list[Tensor]:
        found = averaged(ARCH, w, task, "train")
        return [
            probabilities(ARCH, w, task.x_train),
            accuracy(ARCH, w, task),
            loss(ARCH, w, task, temperature=torch.arange(1.0, 8)),
            fit_temperature(ARCH, w, task),
            diversity(ARCH, w, task, "train"),
            found.accuracy,
            found.loss,
        ]

    whole = measure()
    sizes: list[tuple[int, ...]] = []
    forward = symflow.Architecture.apply

    def spy(arch, w, x):
        sizes.append((len(w), len(x)))
        return forward(arch, w, x)

    monkeypatch.setattr(symflow.Architecture, "apply", spy)
    monkeypatch.setattr(predict, "_ACTIVATIONS", size)
    monkeypatch.setattr(sets, "_PROBABILITIES", size)
    for a, b in zip(whole, measure(), strict=True):
        torch.testing.assert_close(a, b)
    assert max(n * m for n, m in sizes) <= max(1, size // 5)  # the widest layer has 5 units


# ---------------------------------------------------------------- temperature


@pytest.mark.parametrize("scale", [0.3, 1.0, 40.0])
def test_a_temperature_by_hand(dtype, scale):
    """Three of four examples say class 0: the best logit is log 3, whatever logit there is."""
    w = torch.tensor([[scale, 0.0], [scale, 2 * scale]], dtype=dtype)
    found = fit_temperature(BINARY, w, ones(0, 0, 1, 0))
    torch.testing.assert_close(found[0], torch.tensor(scale / math.log(3), dtype=dtype))
    assert float(found[1]) == pytest.approx(1000)  # worse than chance: better not to say anything


@pytest.mark.parametrize("margin", [0.01, 1.0, 7.3])
@pytest.mark.parametrize("offset", [0.0, -5.0])
def test_a_network_that_is_right_everywhere_gets_the_least_temperature(margin, offset):
    w = torch.tensor([margin + offset, offset])
    assert float(fit_temperature(BINARY, w, ones(0, 0))) == pytest.approx(0.001)


def test_no_temperature_is_better_than_the_fitted_one():
    w, task = 3 * weights(ARCH, 2, 6), data(n=60)
    found = fit_temperature(ARCH, w, task)
    assert found.shape == (2, 6)
    for k in np.ndindex(2, 6):
        z = alone(ARCH, w[k], task.x_train)

        def at(log_t: float, z=z) -> float:
            return float(F.cross_entropy(z / math.exp(log_t), task.y_train))

        best = minimize_scalar(at, bounds=(-math.log(1000), math.log(1000)), method="bounded")
        assert at(float(found[k].log())) <= best.fun + 1e-12


def test_a_temperature_does_not_depend_on_the_company(monkeypatch):
    """Whoever has arrived stays there: all together need the passes of the slowest."""
    passes = 0
    forward = symflow.Architecture.apply

    def count(arch, w, x):
        nonlocal passes
        passes += 1
        return forward(arch, w, x)

    def fit(w: Tensor) -> tuple[Tensor, int]:
        before = passes
        return fit_temperature(BINARY, w, ones(0, 0, 1, 0)), passes - before

    monkeypatch.setattr(symflow.Architecture, "apply", count)
    w = 9 * torch.rand(40, 1, generator=torch.Generator().manual_seed(0)).double()
    w = torch.cat([w, torch.zeros_like(w)], dim=1)
    together, needed = fit(w)
    alone_, passes_alone = zip(*(fit(row) for row in w), strict=True)
    torch.testing.assert_close(together, torch.stack(alone_))
    assert min(passes_alone) < max(passes_alone) == needed < 20


def test_a_shared_temperature_is_best_for_all_together():
    w, task = weights(ARCH) + weights(ARCH, 2, 3, seed=1) / 5, data(n=60)
    w = w * torch.tensor([[[1.0]], [[3.0]]])
    noise = task.y_train[::6].clone()
    task.y_train = alone(ARCH, weights(ARCH), task.x_train).argmax(-1)
    task.y_train[::6] = noise
    found = fit_temperature(ARCH, w, task, shared=True)
    assert found.shape == ()
    z = torch.stack([alone(ARCH, row, task.x_train) for row in w.reshape(-1, ARCH.dimension)])
    y = task.y_train.expand(6, -1)

    def at(t: float) -> float:
        return float(F.cross_entropy((z / t).movedim(-1, 1), y))

    assert at(float(found)) <= min(at(float(found) * factor) for factor in (0.99, 1.01))
    own = fit_temperature(ARCH, w, task)
    assert float(own.min()) < float(found) < float(own.max())


# ---------------------------------------------------------------- barriers


def test_height_and_midpoint_by_hand():
    losses = torch.tensor([[1.0, 2.0], [5.0, 1.0], [2.0, 1.0], [0.0, 1.0], [3.0, 2.0]])
    found = Barrier(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]), losses)
    assert found.excess[:, 0].tolist() == [0.0, 3.5, 0.0, -2.5, 0.0]
    assert found.height.tolist() == [3.5, 0.0]  # never negative: the ends count
    assert found.midpoint.tolist() == [0.0, -1.0]


def test_a_barrier_by_hand():
    """From logit a to -a: log(1 + exp(-a (1 - 2t))), convex, so the middle is below the line."""
    a = 3.0
    ends = torch.tensor([a, 0.0], dtype=torch.float64), torch.tensor([-a, 0.0]).double()
    found = barrier(BINARY, ends, ones(0), points=5)
    wanted = [math.log1p(math.exp(-a * (1 - 2 * t))) for t in (0, 0.25, 0.5, 0.75, 1)]
    assert found.times.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert found.losses.tolist() == pytest.approx(wanted)
    assert float(found.midpoint) == pytest.approx(math.log(2) - (wanted[0] + wanted[-1]) / 2)
    assert float(found.height) == 0


def test_barriers_of_many_pairs_are_those_of_each(generator):
    w0, w1, task = weights(ARCH, 3, 1), weights(ARCH, 2, seed=1), data()
    found = barrier(ARCH, (w0, w1), task, "test", points=3)
    assert found.losses.shape == (3, 3, 2) and found.height.shape == (3, 2)
    for i, j in np.ndindex(3, 2):
        for row, t in zip(found.losses, (0, 0.5, 1), strict=True):
            z = alone(ARCH, (1 - t) * w0[i, 0] + t * w1[j], task.x_test)
            torch.testing.assert_close(row[i, j], F.cross_entropy(z, task.y_test))


@pytest.mark.parametrize(("arch", "section"), [(ARCH, "balanced"), (ARCH, "sphere"), (ODD, None)])
def test_a_geodesic_has_no_barrier_to_a_copy_and_a_line_has(generator, arch, section):
    w, task = 2 * weights(arch), data()
    # Labels that the network gives: it has learnt its task, and anything else is worse.
    task.y_train = alone(arch, w, task.x_train).argmax(-1)
    copied = arch.symmetry.act(arch.symmetry.random(generator=generator, like=w), w)
    straight = barrier(arch, (w, copied), task)
    bent = barrier(arch, symflow.Quotient(arch, section).geodesic(w, copied), task)
    torch.testing.assert_close(straight.losses[-1], straight.losses[0])
    assert float(straight.height) > 0.1
    assert len(bent.times) == 11 and bool((bent.excess.abs() < 1e-6).all())
    torch.testing.assert_close(bent.losses[0], straight.losses[0])


def test_along_a_geodesic_the_losses_are_those_of_its_points():
    q, task = symflow.Quotient(ARCH), data()
    path = q.geodesic(weights(ARCH, 2), weights(ARCH, 2, seed=1))
    found = barrier(ARCH, path, task, points=5)
    for t, row in zip((0, 0.25, 0.5, 0.75, 1), found.losses, strict=True):
        for k in range(2):
            wanted = F.cross_entropy(alone(ARCH, path(t)[k], task.x_train), task.y_train)
            torch.testing.assert_close(row[k], wanted)


# ---------------------------------------------------------------- sets of networks


def test_diversity_of_two_is_the_divergence_of_scipy(dtype):
    w, task = weights(ARCH, 2, 2, dtype=dtype), data()
    found = diversity(ARCH, w, task, temperature=2.0)
    assert found.shape == (2,) and found.dtype == dtype
    for pair, value in zip(w, found, strict=True):
        p, q = ((alone(ARCH, v, task.x_test) / 2).double().softmax(-1) for v in pair)
        wanted = (jensenshannon(p.numpy(), q.numpy(), axis=1) ** 2).mean()  # its root, by name
        assert float(value) == pytest.approx(wanted, rel=1e-4 if dtype == torch.float32 else 1e-9)


def test_diversity_of_many_is_the_mean_divergence_from_the_mixture():
    w, task = weights(ARCH, 5), data()
    p = torch.stack([alone(ARCH, v, task.x_test).softmax(-1) for v in w])
    wanted = (p * (p / p.mean(0)).log()).sum(-1).mean()
    torch.testing.assert_close(diversity(ARCH, w, task), wanted)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_networks_that_agree_have_no_diversity(scale, generator):
    w, task = scale * weights(ARCH), data()
    moved = ARCH.symmetry.act(
        ARCH.symmetry.random(generator=generator, like=w, batch=(4,)), w
    )  # other weights, same function
    assert 0 <= float(diversity(ARCH, moved, task)) < 1e-9
    assert 0 <= float(diversity(ARCH, w.expand(7, -1), task)) < 1e-14
    assert float(diversity(ARCH, w[None], task)) == 0


@given(
    size=st.integers(1, 6), classes=st.integers(2, 4), scale=st.floats(0, 1e3), seed=st.integers(0)
)
def test_diversity_is_at_most_the_logarithm_of_networks_and_of_classes(size, classes, scale, seed):
    arch = symflow.mlp([2, classes])
    w = scale * weights(arch, size, seed=seed % 2**63)
    found = float(diversity(arch, w, data(features=2, classes=classes)))
    assert 0 <= found <= math.log(min(size, classes)) + 1e-12


@pytest.mark.parametrize(("size", "classes"), [(2, 3), (3, 3), (6, 3), (2, 2)])
def test_networks_that_are_sure_of_different_classes_reach_the_bound(size, classes):
    arch = symflow.mlp([1, classes], bias=False)
    w = 1e4 * F.one_hot(torch.arange(size) % classes, classes).double()
    assert float(diversity(arch, w, ones(0))) == pytest.approx(math.log(min(size, classes)))


def test_averaged_predictions_are_the_mean_of_the_probabilities(dtype):
    w, task = weights(ARCH, 2, 3, dtype=dtype), data()
    temperature = torch.tensor([[0.5, 1.0, 2.0]], dtype=dtype)
    found = averaged(ARCH, w, task, "train", temperature=temperature)
    assert found.loss.shape == found.accuracy.shape == (2,) and found.loss.dtype == dtype
    for row, nets in enumerate(w):
        p = torch.zeros(13, 3, dtype=torch.float64)
        for t, v in zip(temperature[0], nets, strict=True):
            p += (alone(ARCH, v, task.x_train) / t).double().softmax(-1) / 3
        right = (p.argmax(-1) == task.y_train).double().mean()
        assert float(found.accuracy[row]) == pytest.approx(float(right))
        wanted = -p[range(13), task.y_train].log().mean()
        torch.testing.assert_close(found.loss[row], wanted.to(dtype))


def test_an_average_is_never_worse_than_the_networks_on_average():
    w, task = 5 * weights(ARCH, 20, 4), data()
    gap = loss(ARCH, w, task).mean(-1) - averaged(ARCH, w, task).loss
    assert bool((gap > 0).all())  # Jensen: equal only where all agree
    one = averaged(ARCH, w[:, :1], task)
    torch.testing.assert_close(one.loss, loss(ARCH, w[:, 0], task))
    torch.testing.assert_close(one.accuracy, accuracy(ARCH, w[:, 0], task))


def orbit(w: Tensor) -> Tensor:
    """All 48 copies of one network of ODD, by its matrices: rows moved, columns with them."""
    first, bias, last, end = w[:12].reshape(3, 4), w[12:15], w[15:24].reshape(3, 3), w[24:]
    return torch.stack(
        [
            torch.cat([*(s * first[p]), (s[:, 0] * bias[p]), (last[:, p] * s[:, 0]).ravel(), end])
            for p in map(list, itertools.permutations(range(3)))
            for s in (
                torch.tensor(signs, dtype=w.dtype)[:, None]
                for signs in itertools.product((1.0, -1.0), repeat=3)
            )
        ]
    )


def test_a_weight_average_is_that_of_the_closest_copies():
    assert [leaf.name for leaf in ODD.leaves] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    w = weights(ODD, 2, 3)
    found = weight_average(symflow.Quotient(ODD), w)
    assert found.shape == (2, ODD.dimension)
    for nets, value in zip(w, found, strict=True):
        copies = [orbit(v) for v in nets]
        closest = [c[(c - nets[0]).square().sum(-1).argmin()] for c in copies]
        torch.testing.assert_close(value, torch.stack(closest).mean(0))


def test_the_weight_average_of_copies_is_the_network_on_the_section(generator):
    q, w = symflow.Quotient(ARCH), weights(ARCH)
    copies = ARCH.symmetry.act(ARCH.symmetry.random(generator=generator, like=w, batch=(5,)), w)
    nets = torch.cat([w[None], copies])
    found = weight_average(q, nets)
    torch.testing.assert_close(found, q.project(w))
    task = data()
    torch.testing.assert_close(loss(ARCH, found, task), loss(ARCH, w, task))
    # The average of the weights as they are is another function.
    assert float((loss(ARCH, nets.mean(0), task) - loss(ARCH, w, task)).abs()) > 0.01


def test_a_weight_average_is_on_the_section():
    q = symflow.Quotient(ARCH)
    found = weight_average(q, weights(ARCH, 3))
    torch.testing.assert_close(found, q.project(found))
    task = data()
    # And it is the average of points on the section, up to the scales of its units.
    w0, *others = weights(ARCH, 3)
    mean = torch.stack([q.project(w0), *(q.align(w0, w).weights for w in others)]).mean(0)
    torch.testing.assert_close(loss(ARCH, found, task), loss(ARCH, mean, task))
    assert not torch.allclose(found, mean)


# ---------------------------------------------------------------- nearest networks


@pytest.mark.parametrize("section", ["balanced", "sphere"])
def test_planted_copies_are_found_under_symmetries(generator, section):
    q, zoo = symflow.Quotient(ARCH, section), weights(ARCH, 9)
    copied = torch.tensor([[4, 0, 8], [2, 2, 5]])
    g = ARCH.symmetry.random(generator=generator, like=zoo, batch=(2, 3))
    found = nearest(q, ARCH.symmetry.act(g, zoo[copied]), zoo)
    assert torch.equal(found.index, copied)
    assert found.distance.shape == (2, 3) and float(found.distance.max()) < 1e-6
    assert float(nearest(q, weights(ARCH, 1, seed=1), zoo).distance) > 0.1


def test_the_nearest_is_that_of_brute_force():
    w, zoo = weights(ODD, 4), weights(ODD, 6, seed=1)
    found = nearest(symflow.Quotient(ODD), w, zoo)
    table = torch.stack([torch.cdist(w, orbit(v)).amin(-1) for v in zoo], dim=1)
    torch.testing.assert_close(found.distance, table.amin(1))
    assert torch.equal(found.index, table.argmin(1))
    assert found.index.unique().numel() > 1
    one = nearest(symflow.Quotient(ODD), w[2], zoo)
    assert one.index.shape == () and torch.equal(one.index, found.index[2])


def test_a_network_is_not_its_own_neighbour():
    zoo, q = weights(ODD, 6), symflow.Quotient(ODD)
    table = torch.stack([torch.cdist(zoo, orbit(v)).amin(-1) for v in zoo], dim=1)
    assert torch.equal(nearest(q, zoo, zoo).index, torch.arange(6))
    found = nearest(q, zoo, zoo, exclude_self=True)
    table.fill_diagonal_(math.inf)
    assert torch.equal(found.index, table.argmin(1))
    torch.testing.assert_close(found.distance, table.amin(1))


@pytest.mark.parametrize("size", [1, 2 * 7 * ODD.dimension])
@pytest.mark.parametrize("exclude_self", [False, True])
def test_pieces_find_the_same_neighbours(monkeypatch, size, exclude_self):
    q, w = symflow.Quotient(ODD), weights(ODD, 7)
    zoo = w if exclude_self else weights(ODD, 7, seed=1)
    whole = nearest(q, w, zoo, exclude_self=exclude_self)
    pieces: list[int] = []
    distance = symflow.Quotient.distance

    def spy(q, w0, w1):
        pieces.append(len(w0))
        return distance(q, w0, w1)

    monkeypatch.setattr(symflow.Quotient, "distance", spy)
    monkeypatch.setattr(nearest_module, "_COORDINATES", size)
    found = nearest(q, w, zoo, exclude_self=exclude_self)
    assert pieces == ([1] * 7 if size == 1 else [2, 2, 2, 1])
    assert torch.equal(found.index, whole.index)
    torch.testing.assert_close(found.distance, whole.distance)


# ---------------------------------------------------------------- what is refused

MEASURES = {
    "accuracy": lambda w, task: accuracy(ARCH, w, task),
    "loss": lambda w, task: loss(ARCH, w, task),
    "probabilities": lambda w, task: probabilities(ARCH, w, task.x_test),
    "fit_temperature": lambda w, task: fit_temperature(ARCH, w, task, "test"),
    "barrier": lambda w, task: barrier(ARCH, (w, w), task, "test"),
    "diversity": lambda w, task: diversity(ARCH, w, task),
    "averaged": lambda w, task: averaged(ARCH, w, task),
    "weight_average": lambda w, task: weight_average(symflow.Quotient(ARCH), w),
    "nearest": lambda w, task: nearest(symflow.Quotient(ARCH), w, w),
}
OF_DATA = ["accuracy", "loss", "fit_temperature", "barrier", "diversity", "averaged"]


@pytest.mark.parametrize("name", MEASURES)
def test_bad_weights_are_refused_by_every_measure(name):
    measure, w, task = MEASURES[name], weights(ARCH, 2), data()
    measure(w, task)
    nan = w.clone()
    nan[1, 26] = math.nan
    with pytest.raises(LeafError, match=r"leaf '2.weight' holds 1 NaN .* diverged; leave it out"):
        measure(nan, task)
    with pytest.raises(ShapeError, match=r"flat weights \(\*batch, D = 43\), got shape \(2, 42\)"):
        measure(w[:, 1:], task)
    with pytest.raises(ShapeError, match=r"holds no network|at least 1, got \(0, 43\)"):
        measure(w[:0], task)
    with pytest.raises(LeafError, match=r"missing leaves \['2.bias'\]"):
        measure([{k: v for k, v in ARCH.state_dict(w[0]).items() if k != "2.bias"}], task)


@pytest.mark.parametrize("name", ["diversity", "averaged", "weight_average"])
def test_one_network_is_no_set(name):
    with pytest.raises(ShapeError, match=r"a set of networks \(\*batch, N, D\).*got \(43,\)"):
        MEASURES[name](weights(ARCH), data())


@pytest.mark.parametrize("name", OF_DATA)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y_test": torch.zeros(7, dtype=torch.int64)}, r"as many integer labels.*shape \(7,\)"),
        ({"y_test": torch.zeros(8)}, "integer labels.*float32"),
        (
            {"x_test": torch.zeros(0, 4), "y_test": torch.zeros(0).long()},
            "the test split.*at least one",
        ),
        (
            {"x_test": torch.zeros(8, 5)},
            r"does not run on inputs of shape \(5,\): it was made for \(4,\)",
        ),
    ],
    ids=["too few labels", "floating point labels", "empty split", "other features"],
)
def test_data_that_does_not_fit_is_refused(name, change, message):
    task = data()
    for key, value in change.items():
        setattr(task, key, value)
    with pytest.raises(ShapeError, match=message):
        MEASURES[name](weights(ARCH, 2), task)


@pytest.mark.parametrize("name", [n for n in OF_DATA if n != "diversity"])
@pytest.mark.parametrize("label", [3, -1])
def test_labels_out_of_range_are_refused(name, label):
    task = data()
    task.y_test[5] = label
    with pytest.raises(ShapeError, match=rf"from 0 to 2, one for each of 3 outputs.*{label}"):
        MEASURES[name](weights(ARCH, 2), task)


@pytest.mark.parametrize("measure", [accuracy, loss, fit_temperature, diversity, averaged])
@pytest.mark.usefixtures("unchecked")
def test_an_unknown_split_is_refused(measure):
    with pytest.raises(ShapeError, match="split must be 'train' or 'test', got 'val'"):
        measure(ARCH, weights(ARCH, 2), data(), "val")


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, torch.tensor([1.0, 0.0])])
def test_a_temperature_must_be_positive_and_finite(bad):
    w, task = weights(ARCH, 2), data()
    for measure in (loss, diversity, averaged):
        with pytest.raises(ShapeError, match="temperature must be positive and finite"):
            measure(ARCH, w, task, temperature=bad)
    with pytest.raises(ShapeError, match="temperature must be positive and finite"):
        probabilities(ARCH, w, task.x_test, temperature=bad)


def test_temperatures_must_be_as_many_as_networks():
    with pytest.raises(ShapeError, match=r"one number or have the batch shape \(2,\), got \(3,\)"):
        loss(ARCH, weights(ARCH, 2), data(), temperature=torch.ones(3))


def test_probabilities_need_inputs():
    with pytest.raises(ShapeError, match="x holds no inputs: at least one is needed"):
        probabilities(ARCH, weights(ARCH, 2), torch.zeros(0, 4))


def test_a_network_that_is_no_classifier_is_refused():
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
    arch = symflow.Architecture.from_module(net, torch.zeros(2, 5, 2))
    task = Data(torch.zeros(6, 5, 2), torch.zeros(6).long(), torch.zeros(0), torch.zeros(0).long())
    with pytest.raises(ShapeError, match=r"outputs \(n, C\) for n inputs; .* \(6, 5, 3\) for 6"):
        loss(arch, weights(arch), task, "train")


@pytest.mark.parametrize("points", [1, 2, 10, 0, -3])
def test_a_path_has_a_middle(points):
    w = weights(ARCH)
    with pytest.raises(ShapeError, match=f"points must be odd and at least 3, got {points}"):
        barrier(ARCH, (w, w), data(), points=points)


@pytest.mark.usefixtures("unchecked")
def test_a_path_is_two_ends_or_a_function_of_time():
    w = weights(ARCH)
    for path, got in (([w, w], "list"), ((w, w, w), "tuple"), (w, "Tensor")):
        with pytest.raises(ShapeError, match=rf"two ends \(w0, w1\), or take a time.*got {got}"):
            barrier(ARCH, path, data())
    with pytest.raises(ShapeError, match=r"broadcasting shapes, got \(2, 43\) and \(3, 43\)"):
        barrier(ARCH, (weights(ARCH, 2), weights(ARCH, 3)), data())
    with pytest.raises(ShapeError, match=r"D = 43"):
        barrier(ARCH, lambda t: w[:-1], data())


def test_neighbours_need_a_list_of_training_networks():
    q, w = symflow.Quotient(ARCH), weights(ARCH, 3)
    with pytest.raises(ShapeError, match=r"zoo_ws must be networks \(M, D\).*\(1, 3\)"):
        nearest(q, w, w[None])
    with pytest.raises(ShapeError, match=r"zoo_ws must be networks.*shape \(\)"):
        nearest(q, w, w[0])
    with pytest.raises(ShapeError, match="zoo_ws holds no network"):
        nearest(q, w, w[:0])
    with pytest.raises(ShapeError, match="same two or more networks, got 2 and 3"):
        nearest(q, w[:2], w, exclude_self=True)
    with pytest.raises(ShapeError, match="same two or more networks, got 1 and 1"):
        nearest(q, w[:1], w[:1], exclude_self=True)
    with pytest.raises(LeafError, match=r"float64.*float32.*convert"):
        nearest(q, w, w.float())


def test_any_four_tensors_are_labelled_data():
    assert isinstance(data(), LabelledData)
    assert isinstance(symflow.zoo.Task("t", *vars(data()).values(), 3), LabelledData)
    assert not isinstance(object(), LabelledData)
