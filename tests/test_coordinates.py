"""Coordinates of the first map: the same function, distances of functions, flows in them."""

import pytest
import torch
from torch import nn

import symflow
from symflow.arch import InputCoordinates
from symflow.errors import ShapeError, UnsupportedModuleError
from symflow.flows import Gaussian, load

RANK = 5


def inputs(n=12, rows=200, rank=RANK, seed=0):
    """Inputs that excite so many directions, with a mean of their own."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(rank, n, generator=generator, dtype=torch.float64)
    return torch.randn(rows, rank, generator=generator, dtype=torch.float64) @ spread + 0.7


def module_with_flatten():
    """A network of the user's, for images."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 3))
    return symflow.Architecture.from_module(net, torch.zeros(2, 3, 4))


ARCHITECTURES = {
    "mlp": lambda: symflow.mlp([12, 6, 6, 3]),
    "no bias": lambda: symflow.mlp([12, 6, 3], bias=False),
    "linear": lambda: symflow.mlp([12, 3]),
    "flatten": module_with_flatten,
}


@pytest.fixture(params=ARCHITECTURES)
def arch(request):
    return ARCHITECTURES[request.param]()


def weights(arch, n=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return Gaussian(0.5).sample(arch, n, generator=generator, dtype=torch.float64)


def outputs(arch, w, x):
    return arch.apply(w, x.reshape(-1, *arch.inputs[0].shape[1:]))


def test_the_twin_is_the_same_function(arch):
    """On inputs that excite the kept directions alone; and so are the weights decoded again."""
    x, w = inputs(), weights(arch)
    chart = InputCoordinates.of_inputs(arch, x)
    there = chart.arch.apply(chart.encode(w), chart.features(x))
    torch.testing.assert_close(there, outputs(arch, w, x), atol=1e-9, rtol=1e-9)
    again = outputs(arch, chart.decode(chart.encode(w)), x)
    torch.testing.assert_close(again, there, atol=1e-9, rtol=1e-9)


def test_encode_inverts_decode(arch):
    chart = InputCoordinates.of_inputs(arch, inputs(), rank=3)
    c = weights(chart.arch)
    torch.testing.assert_close(chart.encode(chart.decode(c)), c, atol=1e-9, rtol=1e-9)


def test_distances_are_those_of_pre_activations():
    """|dC|^2 + |db'|^2 is the mean square change of the first map's outputs."""
    arch, x = symflow.mlp([12, 3]), inputs()
    chart = InputCoordinates.of_inputs(arch, x)
    w0, w1 = weights(arch, 2)
    change = (arch.apply(w0, x) - arch.apply(w1, x)).square().sum(-1).mean()
    distance = (chart.encode(w0) - chart.encode(w1)).square().sum()
    torch.testing.assert_close(distance, change, atol=1e-9, rtol=1e-9)


def test_symmetries_move_both_alike(arch):
    """The chart commutes with what acts on hidden units."""
    chart = InputCoordinates.of_inputs(arch, inputs(), rank=4)
    w = weights(arch)
    element = arch.symmetry.random(generator=torch.Generator().manual_seed(3), like=w)
    moved = chart.encode(arch.symmetry.act(element, w))
    torch.testing.assert_close(moved, chart.arch.symmetry.act(element, chart.encode(w)))


def test_the_best_directions_come_first():
    arch, x = symflow.mlp([12, 3]), inputs()
    chart = InputCoordinates.of_inputs(arch, x, rank=3)
    assert (chart.deviations.diff() < 0).all()
    z = chart.features(x)
    eye = torch.eye(3, dtype=z.dtype)
    torch.testing.assert_close(z.T @ z / len(z), eye, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    ("x", "rank", "message"),
    [
        (torch.ones(5, 7), None, "inputs of the network"),
        (torch.full((5, 12), torch.nan), None, "finite"),
        (inputs(), RANK + 1, f"1 to {RANK}"),
        (inputs(), 0, f"1 to {RANK}"),
    ],
)
def test_bad_input_is_refused(x, rank, message):
    with pytest.raises(ShapeError, match=message):
        InputCoordinates.of_inputs(symflow.mlp([12, 3]), x, rank=rank)


def test_a_network_must_begin_with_a_linear_map():
    net = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(4, 2))
    arch = symflow.Architecture.from_module(net, torch.zeros(2, 1, 4))
    with pytest.raises(UnsupportedModuleError, match="begin with a linear map"):
        InputCoordinates.of_inputs(arch, torch.zeros(4, 1, 4))


@pytest.mark.parametrize("preset", ["euclidean", "normalized", "geometric", "balanced"])
def test_flows_work_in_coordinates_and_return_weights(preset, tmp_path):
    """Trained, saved and loaded; the behaviour loss sees the features."""
    arch, x = symflow.mlp([12, 6, 3]), inputs().float()
    chart = InputCoordinates.of_inputs(arch, x, rank=3)
    w = weights(arch, 16).float()
    zoo = type("Runs", (), {"initial": w, "final": 2 * w})()
    make = getattr(symflow.flows, preset)
    flow = make(arch, source=Gaussian(0.5), coordinates=chart, width=8, depth=1, heads=1)
    flow.fit(zoo, steps=3, inputs=x, behaviour=1.0)
    drawn = flow.sample(4, steps=2)
    assert drawn.shape == (4, arch.dimension)
    again = chart.decode(chart.encode(drawn))
    torch.testing.assert_close(again, drawn, atol=1e-4, rtol=1e-4)
    flow.save(tmp_path / "flow.safetensors")
    torch.testing.assert_close(load(tmp_path / "flow.safetensors").sample(4, steps=2), drawn)


def test_coordinates_belong_to_an_architecture():
    other = InputCoordinates.of_inputs(symflow.mlp([12, 4, 3]), inputs())
    with pytest.raises(ShapeError, match="made for"):
        symflow.flows.euclidean(symflow.mlp([12, 6, 3]), coordinates=other)
