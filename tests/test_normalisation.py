"""Statistics measured again, and barriers that use them: against plain loops over one network."""

import copy
import itertools
from types import SimpleNamespace

import jaxtyping
import pytest
import torch
from torch import Tensor, nn

import symflow
from symflow.arch import by_batch
from symflow.errors import LeafError, ShapeError, UnsupportedModuleError
from symflow.evaluate import (
    accuracy,
    barrier,
    compared,
    fit_temperature,
    loss,
    moments,
    predict,
    reset_normalisation,
)


class Backwards(nn.Module):
    """Layers that run in another order than they are defined in, and side by side."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.late, self.second, self.first = nn.BatchNorm1d(9), nn.BatchNorm1d(4), nn.BatchNorm1d(5)
        self.last, self.b, self.a = nn.Linear(9, 3), nn.Linear(4, 4), nn.Linear(4, 5)

    def forward(self, x):
        y = torch.cat([self.first(self.a(x)).relu(), self.second(self.b(x)).relu()], 1)
        return self.last(self.late(y).relu())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.cell, self.norm, self.last = (
            nn.RNN(4, 5, batch_first=True),
            nn.BatchNorm1d(5),
            nn.Linear(5, 3),
        )

    def forward(self, x):
        return self.last(self.norm(self.cell(x)[0][:, -1]))


def stack(*widths: int) -> nn.Sequential:
    pairs = itertools.pairwise(widths)
    layers = [(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()) for a, b in pairs]
    return nn.Sequential(*(part for layer in layers for part in layer), nn.Linear(widths[-1], 3))


NETS = {
    "dense": (lambda: stack(4, 6, 5), (4,)),
    "convolution": (
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3)),
            *(nn.BatchNorm2d(3, affine=False), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)),
        ),
        (1, 6, 6),
    ),
    "branches": (Backwards, (4,)),
    "recurrent": (Recurrent, (3, 4)),
}


def made(name: str, *batch: int, dtype=torch.float64, n: int = 23):
    """An architecture, a batch of random networks, and inputs far from standardised."""
    make, shape = NETS[name]
    torch.manual_seed(0)
    arch = symflow.Architecture.from_module(make(), torch.zeros(2, *shape))
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(*batch, arch.dimension, generator=generator, dtype=dtype).abs()
    w = w - 0.4 * (torch.arange(arch.dimension) < arch.num_parameters)
    return arch, w, 3 * torch.randn(n, *shape, generator=generator) + 1


def by_hand(arch: symflow.Architecture, w: Tensor, x: Tensor) -> dict[str, Tensor]:
    """One network in evaluation mode; each layer's statistics are set to what arrives there."""
    net = arch.load_into(copy.deepcopy(arch.module).to(w.dtype), w).eval()

    def measure(layer, inputs):
        units = inputs[0].transpose(0, 1).flatten(1)
        layer.running_mean.copy_(units.mean(1))
        layer.running_var.copy_(units.var(1, unbiased=True))

    for part in net.modules():
        if hasattr(part, "running_var"):
            part.register_forward_pre_hook(measure)
    with torch.no_grad():
        net(x.to(w.dtype))
    return net.state_dict()


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("size", [2**22, 40])
def test_statistics_are_those_of_all_inputs_layer_by_layer(monkeypatch, name, size):
    monkeypatch.setattr(predict, "_ACTIVATIONS", size)
    arch, w, x = made(name, 2, 3)
    found = reset_normalisation(arch, w, x)
    assert found.shape == w.shape and torch.equal(
        found[..., : arch.num_parameters], w[..., : arch.num_parameters]
    )
    for i in range(2):
        for j in range(3):
            wanted = arch.flatten(by_hand(arch, w[i, j], x))
            torch.testing.assert_close(found[i, j], wanted)
    assert not torch.allclose(found, w)


def test_the_first_layer_is_what_training_mode_sees(dtype):
    arch, w, x = made("dense", dtype=dtype)
    net = arch.load_into(copy.deepcopy(arch.module).to(dtype), w).train()
    for part in net.modules():
        if isinstance(part, nn.BatchNorm1d):
            part.momentum = 1.0
    net(x.to(dtype))
    found = arch.unflatten(reset_normalisation(arch, w, x))
    for key in ("1.running_mean", "1.running_var"):
        torch.testing.assert_close(found[key], net.state_dict()[key])
    # Later layers see inputs normalised by the unbiased variance, as they will when it is used.
    assert not torch.allclose(found["4.running_var"], net.state_dict()["4.running_var"])


def test_a_second_time_changes_nothing_and_no_input_is_changed():
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    arch = symflow.Architecture.from_module(net, torch.zeros(2, 4))
    w = torch.rand(arch.dimension, dtype=torch.float64)
    x = torch.randn(9, 4, dtype=torch.float64)
    before = x.clone()
    once = reset_normalisation(arch, w, x)
    torch.testing.assert_close(reset_normalisation(arch, once, x), once)
    assert torch.equal(x, before)


def test_a_symmetry_moves_the_statistics_along():
    arch, w, x = made("dense", 2)
    g = arch.symmetry.random(generator=torch.Generator().manual_seed(0), like=w)
    moved = reset_normalisation(arch, arch.symmetry.act(g, w), x)
    torch.testing.assert_close(moved, arch.symmetry.act(g, reset_normalisation(arch, w, x)))


def test_without_statistics_nothing_changes():
    arch = symflow.mlp([4, 5, 3])
    w = torch.randn(2, arch.dimension)
    assert torch.equal(reset_normalisation(arch, w, torch.randn(3, 4)), w)
    norm = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False))
    arch = symflow.Architecture.from_module(norm, torch.randn(2, 4))
    w = torch.randn(arch.dimension)
    assert torch.equal(reset_normalisation(arch, w, torch.randn(3, 4)), w)


class Twice(nn.Module):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.map, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.map(self.norm(x)))


def test_what_cannot_be_measured_is_refused():
    arch, w, x = made("dense", 2)
    with pytest.raises(ShapeError, match=r"two values or more .* got one input"):
        reset_normalisation(arch, w, x[:1])
    with pytest.raises(ShapeError, match="x holds no inputs"):
        reset_normalisation(arch, w, x[:0])
    with pytest.raises(ShapeError, match=r"does not run on inputs of shape \(3,\)"):
        reset_normalisation(arch, w, x[:, :3])
    with pytest.raises(LeafError, match="NaN"):
        reset_normalisation(arch, w * torch.nan, x)
    shared = symflow.Architecture.from_module(Twice(), torch.zeros(2, 4))
    w = torch.rand(shared.dimension)
    with pytest.raises(UnsupportedModuleError, match="norm runs 2 times in one pass"):
        reset_normalisation(shared, w, x)


# ---------------------------------------------------------------- barriers


def labelled(x: Tensor) -> SimpleNamespace:
    y = torch.arange(len(x)) % 3
    half = len(x) // 2
    return SimpleNamespace(x_train=x[:half], y_train=y[:half], x_test=x[half:], y_test=y[half:])


def test_inner_points_are_reset_and_ends_are_not():
    arch, w, x = made("dense", 2, n=40)
    task = labelled(x)
    found = barrier(arch, (w[0], w[1]), task, "test", points=5, reset=task)
    assert found.reset and not barrier(arch, (w[0], w[1]), task).reset
    for t, value in zip(found.times, found.losses, strict=True):
        point = (1 - t) * w[0] + t * w[1]
        if 0 < t < 1:
            point = reset_normalisation(arch, point, task.x_train)
        torch.testing.assert_close(value, loss(arch, point, task, "test"))
    again = barrier(arch, (w[0], w[1]), task, "test", points=5, reset=task.x_train)
    assert torch.equal(again.losses, found.losses)


def test_one_temperature_for_the_inner_points(monkeypatch):
    arch, w, x = made("dense", 2, 3, n=40)
    task = labelled(x)
    found = barrier(arch, (w[0], w[1]), task, "test", points=5, reset=task, temperature="midpoint")
    middle = reset_normalisation(arch, (w[0] + w[1]) / 2, task)
    wanted = fit_temperature(arch, middle, task, "train")
    torch.testing.assert_close(found.temperature, wanted)
    torch.testing.assert_close(
        found.losses[2], loss(arch, middle, task, "test", temperature=wanted)
    )
    torch.testing.assert_close(found.losses[-1], loss(arch, w[1], task, "test"))
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ShapeError, match="temperature must be 'midpoint' or None, got 'ends'"):
        barrier(arch, (w[0], w[1]), task, temperature="ends")


def test_with_and_without_alignment():
    arch, w, x = made("dense", n=40)
    task, q = labelled(x), symflow.Quotient(arch)
    g = arch.symmetry.random(generator=torch.Generator().manual_seed(3), like=w)
    w = torch.stack([w, arch.symmetry.act(g, w)])
    task.y_train = arch.apply(w[0], task.x_train.double()).argmax(-1)  # it has learnt its task
    found = compared(q, w[0], w[1], task, points=3, reset=task)
    naive = barrier(arch, (w[0], w[1]), task, points=3, reset=task)
    aligned = barrier(arch, q.geodesic(w[0], w[1]), task, points=3, reset=task)
    assert torch.equal(found.naive.losses, naive.losses)
    assert torch.equal(found.aligned.losses, aligned.losses)
    assert naive.height > 0.1
    torch.testing.assert_close(found.share, aligned.height / naive.height)
    flat = compared(q, w[0], w[0], task, points=3)
    assert flat.share.isnan()
    assert found.aligned.reset


@pytest.mark.slow
def test_resetting_repairs_the_middle_of_trained_networks():
    task = symflow.zoo.digits()
    arch = symflow.mlp([64, 32, 32, 32, 10], batch_norm=True)
    w = symflow.zoo.train(arch, task, runs=2, epochs=10, progress=False).final
    path = symflow.Quotient(arch).geodesic(w[0], w[1])
    plain, repaired = (barrier(arch, path, task, points=3, reset=r) for r in (None, task))
    assert repaired.midpoint < plain.midpoint
    middle = reset_normalisation(arch, path(0.5), task)
    assert accuracy(arch, middle, task) > accuracy(arch, path(0.5), task)


def test_images_are_taken_in_pieces_of_bounded_size(monkeypatch):
    """A layer of 4 units at 4 x 4 positions sees 64 numbers of an image."""
    monkeypatch.setattr(predict, "_ACTIVATIONS", 64 * 6)
    arch, w, x = made("convolution", 5, n=4)
    seen: list[int] = []
    run = moments.functional_call

    def spy(module, leaves, inputs, **options):
        seen.append(len(inputs[0]))
        return run(module, leaves, inputs, **options)

    monkeypatch.setattr(moments, "functional_call", spy)
    reset_normalisation(arch, w, x)
    # One network at a time sees all four inputs; then two layers, five networks.
    assert seen == [1, *[4] * 10]


def small_cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5, affine=False), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(80, 3)),
    )


def test_by_batch_is_training_mode_without_dropout_for_each_network():
    torch.manual_seed(0)
    nets, x = [small_cnn() for _ in range(3)], torch.randn(6, 1, 8, 8)
    arch = symflow.Architecture.from_module(small_cnn(), x)
    w = arch.as_weights(nets)
    kept = w.clone()
    found = by_batch(arch).apply(w, x)
    for net, out in zip(nets, found, strict=True):
        net.train()[3].p = 0.0
        torch.testing.assert_close(out, net(x), atol=1e-5, rtol=1e-5)
    assert torch.equal(w, kept)  # no running statistics are written
    assert not torch.allclose(found, arch.apply(w, x), atol=0.1)


def test_an_architecture_without_batch_norm_stays_as_it_is():
    arch = symflow.mlp([2, 3, 1])
    assert by_batch(arch) is arch


def test_the_behaviour_loss_needs_no_true_statistics():
    """Predicted running variances may be negative: the loss does not look at them."""
    torch.manual_seed(1)
    x = torch.randn(40, 1, 8, 8)
    arch = symflow.Architecture.from_module(small_cnn(), x[:2])
    generator = torch.Generator().manual_seed(0)
    w = symflow.flows.FanIn().sample(arch, 12, generator=generator)
    w[:, arch.num_parameters :] *= 100 * torch.randn(
        12, arch.dimension - arch.num_parameters, generator=generator
    )
    flow = symflow.flows.geometric(
        arch, coupling=symflow.flows.Independent(), source=symflow.flows.FanIn(), width=8, depth=1
    )
    assert not arch.apply(w, x).isfinite().all()
    flow.fit(w, inputs=x, behaviour=10.0, behaviour_inputs=8, steps=4, log_every=1, lr=0.01)
    assert torch.tensor([h["loss"] for h in flow.history]).isfinite().all()


def test_by_batch_of_a_norm_at_two_places():
    torch.manual_seed(0)
    norm, x = nn.BatchNorm1d(4), torch.randn(6, 3)
    net = nn.Sequential(nn.Linear(3, 4), norm, nn.ReLU(), nn.Linear(4, 4), norm, nn.Linear(4, 2))
    arch = symflow.Architecture.from_module(net, x)
    w = arch.flatten(net)
    found = by_batch(arch).apply(w, x)
    torch.testing.assert_close(found, copy.deepcopy(net).train()(x), atol=1e-5, rtol=1e-5)
    assert torch.equal(by_batch(arch).flatten(net), w)
    assert torch.equal(arch.flatten(arch.load_into(copy.deepcopy(net), w)), w)
