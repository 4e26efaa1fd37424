"""Units repaired: their statistics, against plain loops over one network at a time."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

import symflow
from symflow.errors import LeafError, ShapeError, UnsupportedModuleError
from symflow.evaluate import accuracy, predict, repair, reset_normalisation, weight_average


class Backwards(nn.Module):
    """Layers that run in another order than they are defined in; one never does."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.last, self.never, self.first = nn.Linear(5, 3), nn.Linear(5, 5), nn.Linear(4, 5)

    def forward(self, x):
        return self.last(self.first(x).relu())


NETS = {
    "dense": (lambda: symflow.mlp([4, 6, 5, 3]).module, (4,)),
    "tanh": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), (4,)),
    "convolution": (
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 3, groups=2), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(24, 3)),
        ),
        (2, 6, 6),
    ),
    "tokens": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3)),
        (5, 4),
    ),
    "groups": (
        lambda: nn.Sequential(
            *(nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
        ),
        (2, 6),
    ),
    "backwards": (Backwards, (4,)),
}


def made(name: str, *batch: int, dtype=torch.float64, n: int = 40):
    """An architecture, sets of three random networks, and inputs far from standardised."""
    make, shape = NETS[name]
    torch.manual_seed(0)
    arch = symflow.Architecture.from_module(make(), torch.zeros(2, *shape))
    generator = torch.Generator().manual_seed(1)
    ends = torch.randn(*batch, 3, arch.dimension, generator=generator, dtype=dtype)
    x = 2 * torch.randn(n, *shape, generator=generator, dtype=dtype) + 1
    return arch, ends, x


def by_hand(arch: symflow.Architecture, w: Tensor, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """By layer the mean and the standard deviation of each unit of one network."""
    net = arch.load_into(copy.deepcopy(arch.module).to(w.dtype), w).eval()
    found = {}
    for path, part in net.named_modules():
        if getattr(part, "bias", None) is not None:
            dim = -1 if isinstance(part, nn.Linear | nn.LayerNorm) else 1

            def measure(_, inputs, z, path=path, dim=dim):
                units = z.detach().transpose(0, dim).flatten(1)
                found[path] = units.mean(1), units.std(1, correction=0)

            part.register_forward_hook(measure)
    with torch.no_grad():
        net(x.to(w.dtype))
    return found


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("size", [2**22, 200])
def test_afterwards_units_vary_as_those_of_the_networks(monkeypatch, name, size):
    monkeypatch.setattr(predict, "_ACTIVATIONS", size)
    arch, ends, x = made(name, 2)
    shares = torch.tensor([[1.0, 1.0, 2.0], [0.0, 3.0, 1.0]], dtype=torch.float64)
    w = (ends * (shares / shares.sum(-1, keepdim=True))[..., None]).sum(-2)
    done = repair(arch, w, ends, x, shares=shares)
    assert done.shape == w.shape
    for i in range(2):
        each = [by_hand(arch, end, x) for end in ends[i]]
        found, before = by_hand(arch, done[i], x), by_hand(arch, w[i], x)
        assert found
        for path in found:
            for k in range(2):
                wanted = sum(s * e[path][k] for s, e in zip(shares[i], each, strict=True))
                wanted = wanted / shares[i].sum()
                torch.testing.assert_close(found[path][k], wanted, rtol=1e-5, atol=1e-5)
                # The first layer is linear in what was averaged: its means were right before.
                assert k == 0 or (before[path][k] - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("name", NETS)
def test_the_average_of_equal_networks_keeps_its_function(name):
    arch, ends, x = made(name)
    w = ends[0]
    done = repair(arch, w, w.expand(3, -1), x)
    torch.testing.assert_close(arch.apply(done, x), arch.apply(w, x))
    # The check bites: one network that is another one changes it.
    other = repair(arch, w, torch.stack([w, ends[1]]), x)
    assert not torch.allclose(arch.apply(other, x), arch.apply(w, x), rtol=0.01)


@pytest.mark.parametrize("name", NETS)
def test_a_symmetry_moves_the_result_along(name):
    arch, ends, x = made(name)
    for symmetry in (arch.symmetry, arch.symmetry.compact):
        g = symmetry.random(generator=torch.Generator().manual_seed(0), like=ends)
        wanted = symmetry.act(g, repair(arch, ends.mean(0), ends, x))
        moved = symmetry.act(g, ends)
        found = repair(arch, symmetry.act(g, ends.mean(0)), moved, x)
        torch.testing.assert_close(found, wanted)
        left = repair(arch, ends.mean(0), moved, x)  # networks that are not aligned
        assert not torch.allclose(left, wanted) or torch.equal(moved, ends)


def test_points_of_one_path_with_its_ends(dtype):
    arch, ends, x = made("dense", dtype=dtype)
    t = torch.linspace(0, 1, 5, dtype=dtype)
    shares = torch.stack([1 - t, t], -1)
    points = shares @ ends[:2]
    found = repair(arch, points, ends[:2], x, shares=shares)
    assert found.shape == points.shape and found.dtype == dtype
    torch.testing.assert_close(found[[0, -1]], ends[:2])  # they are themselves
    alone = repair(arch, points[2], ends[:2], x)
    torch.testing.assert_close(found[2], alone)
    torch.testing.assert_close(repair(arch, found[2], ends[:2], x), alone)  # idempotent
    torch.testing.assert_close(repair(arch, points[2], ends[:2], x, shares=7 * shares[2]), alone)


def test_units_that_do_not_vary_stay():
    arch, ends, x = made("dense")
    state = {key: value.clone() for key, value in arch.unflatten(ends.mean(0)).items()}
    first, second, third = (key[:-7] for key in state if key.endswith(".weight"))
    state[f"{first}.weight"][2] = 0  # one unit gives its bias
    state[f"{second}.bias"][:] = -1e3  # all are dead after the activation
    done = arch.unflatten(repair(arch, arch.flatten(state), ends, x))
    for key in (f"{first}.weight", f"{first}.bias"):
        assert torch.equal(done[key][2], state[key][2])
        assert not torch.isclose(done[key][1], state[key][1]).any()
    assert all(value.isfinite().all() for value in done.values())
    # Dead by their shift alone, they live again; those behind a layer of zeros do not.
    state[f"{second}.weight"][:] = 0
    done = arch.unflatten(repair(arch, arch.flatten(state), ends, x))
    for layer in (second, third):
        for part in ("weight", "bias"):
            assert torch.equal(done[f"{layer}.{part}"], state[f"{layer}.{part}"])


def test_in_front_of_batch_norm_layers_stay_and_statistics_are_measured_again():
    layers = [(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()) for a, b in ((4, 6), (6, 5))]
    net = nn.Sequential(*itertools.chain(*layers), nn.Linear(5, 3))
    arch = symflow.Architecture.from_module(net, torch.zeros(2, 4))
    ends = torch.rand(3, arch.dimension, dtype=torch.float64)
    x = torch.randn(30, 4, dtype=torch.float64)
    w = ends.mean(0)
    done = arch.unflatten(repair(arch, w, ends, x))
    reset = arch.unflatten(reset_normalisation(arch, w, x))
    for key in done:
        assert torch.allclose(done[key], reset[key]) == (not key.startswith("6."))
    each = [by_hand(arch, end, x)["6"] for end in ends]
    for k, found in enumerate(by_hand(arch, arch.flatten(done), x)["6"]):
        torch.testing.assert_close(found, sum(e[k] for e in each) / 3)


class Twice(nn.Module):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.map = nn.Linear(4, 4)

    def forward(self, x):
        return self.map(self.map(x).relu())


class Tied(nn.Module):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(self.one(x).relu())


def test_what_cannot_be_repaired_is_refused():
    arch, ends, x = made("dense")
    w = ends.mean(0)
    for networks in (w, ends[:0]):
        with pytest.raises(ShapeError, match=r"networks must be those .* stack them"):
            repair(arch, w, networks, x)
    with pytest.raises(ShapeError, match="networks must be flat weights"):
        repair(arch, w, ends[:, 1:], x)
    with pytest.raises(ShapeError, match="w holds no network"):
        repair(arch, ends[:0], ends, x)
    with pytest.raises(ShapeError, match=r"must broadcast, got \(3, 83\), \(2, 3, 83\)"):
        repair(arch, ends, torch.stack([ends, ends]), x)
    for shares in ([1.0, 1.0], [1.0, 1.0, -1.0], [0.0, 0.0, 0.0], [1.0, 1.0, torch.nan]):
        with pytest.raises(ShapeError, match="shares must be one number for each of 3 networks"):
            repair(arch, w, ends, x, shares=torch.tensor(shares))
    with pytest.raises(ShapeError, match=r"two values or more .* got one input"):
        repair(arch, w, ends, x[:1])
    with pytest.raises(ShapeError, match="x holds no inputs"):
        repair(arch, w, ends, x[:0])
    with pytest.raises(ShapeError, match=r"does not run on inputs of shape \(3,\)"):
        repair(arch, w, ends, x[:, :3])
    with pytest.raises(LeafError, match="networks must have the dtype and device of w"):
        repair(arch, w, ends.float(), x)
    with pytest.raises(LeafError, match="NaN"):
        repair(arch, w, ends * torch.nan, x)
    plain = nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False))
    for net, told in (
        (Twice(), "map runs 2 times in one pass"),
        (Tied(), r"one\.weight is shared with another layer"),
        (plain, "nothing to repair: no linear layer or convolution of Sequential has a bias"),
    ):
        arch = symflow.Architecture.from_module(net, torch.zeros(2, 4))
        ends = torch.rand(3, arch.dimension)
        with pytest.raises(UnsupportedModuleError, match=told):
            repair(arch, ends[0], ends, torch.randn(9, 4))


@pytest.mark.slow
def test_repair_raises_the_accuracy_of_averages():
    task = symflow.zoo.digits()
    arch = symflow.mlp([64, 64, 64, 10])
    ws = symflow.zoo.train(arch, task, runs=6, epochs=10, progress=False).final
    q = symflow.Quotient(arch)
    ends = q.align(ws[:1], ws).weights
    mean = weight_average(q, ws)
    assert accuracy(arch, repair(arch, mean, ends, task), task) > accuracy(arch, mean, task)
