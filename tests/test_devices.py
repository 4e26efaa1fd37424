"""What runs on another device than the processor gives what it gives there."""

from types import SimpleNamespace

import pytest
import torch

import symflow
from symflow import flows
from symflow.errors import ShapeError
from symflow.flows import Gaussian, Guidance, load

CUDA = pytest.param(
    "cuda",
    marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU"),
)
DEVICES = ["cpu", CUDA]
PRESETS = [flows.euclidean, flows.normalized, flows.geometric, flows.balanced]
COUPLINGS = [
    flows.RunCoupling(),
    flows.Independent(),
    flows.MiniBatchOT(),
    flows.MiniBatchOT(metric="quotient"),
]


@pytest.fixture(scope="module")
def arch():
    return symflow.mlp([5, 6, 4, 3])


@pytest.fixture(scope="module")
def zoo(arch):
    w = Gaussian(0.3).sample(arch, 32, generator=torch.Generator().manual_seed(0))
    return SimpleNamespace(initial=w, final=1.5 * w + 0.1)


def trained(arch, zoo, device, preset, coupling, **more):
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(1))
    chart = symflow.arch.InputCoordinates.of_inputs(arch, x, rank=4)
    parts = {"source": Gaussian(0.3), "coupling": coupling, "coordinates": chart, "bridge": 0.1}
    flow = preset(arch, width=8, depth=1, heads=1, edge_width=4, **parts).to(device)
    return flow.fit(
        zoo, inputs=x, behaviour=1.0, steps=4, batch_size=8, validation=zoo, lr=0.01, **more
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("preset", PRESETS, ids=lambda f: f.__name__)
def test_a_flow_learns_and_draws_the_same_everywhere(arch, zoo, device, preset, tmp_path):
    """Random numbers are those of main memory: only roundings differ; a file fits everywhere."""
    here = trained(arch, zoo, "cpu", preset, flows.RunCoupling())
    there = trained(arch, zoo, device, preset, flows.RunCoupling(), folder=tmp_path / "fit")
    assert there.device.type == device
    ends = here.sample(5, steps=3, bridge=1.0, seed=3)
    found = there.sample(5, steps=3, bridge=1.0, seed=3)
    assert found.device.type == device
    torch.testing.assert_close(found.cpu(), ends, atol=0.002, rtol=0.002)
    there.save(tmp_path / "flow.safetensors")
    back = load(tmp_path / "flow.safetensors")
    torch.testing.assert_close(back.sample(2, steps=2), there.sample(2, steps=2).cpu())
    again = trained(arch, zoo, device, preset, flows.RunCoupling(), folder=tmp_path / "fit")
    assert again.history == there.history


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("coupling", COUPLINGS, ids=str)
def test_couplings_guidance_and_densities(arch, zoo, device, coupling):
    """Each coupling trains, and what a flow is asked for comes from its device."""
    flow = trained(arch, zoo, device, flows.euclidean, coupling)
    guide = Guidance(lambda w: (w**2).sum(-1), 0.1)
    assert flow.sample(3, steps=2, guidance=guide).isfinite().all()
    assert flow.sample(2, steps=2, solver="heun", start=zoo.initial[:2]).device.type == device
    assert (
        flow.distil(1, teacher_steps=2, iterations=1, starts=4).sample(2, steps=1).isfinite().all()
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
def test_alignment_and_quotient(device, activation):
    """The same elements, distances and geodesics."""
    arch = symflow.mlp([4, 9, 7, 3], activation)
    w = torch.randn(6, arch.dimension, generator=torch.Generator().manual_seed(0))
    quotient = symflow.Quotient(arch)
    here = quotient.distance(w[:1], w[1:])
    there = quotient.distance(w[:1].to(device), w[1:].to(device))
    assert there.device.type == device
    torch.testing.assert_close(there.cpu(), here)
    middle = quotient.geodesic(w[0].to(device), w[1].to(device))(0.5)
    torch.testing.assert_close(middle.cpu(), quotient.geodesic(w[0], w[1])(0.5))
    mean = quotient.mean(w.to(device))
    torch.testing.assert_close(mean.cpu(), quotient.mean(w), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_a_convolutional_network_is_aligned(device):
    """Leaves with more dimensions, one pair and several."""
    net = torch.nn.Sequential(
        torch.nn.Conv2d(2, 6, 3), torch.nn.ReLU(), torch.nn.Conv2d(6, 5, 3), torch.nn.Flatten()
    )
    arch = symflow.Architecture.from_module(net, torch.zeros(1, 2, 6, 6))
    w = torch.randn(4, arch.dimension, generator=torch.Generator().manual_seed(0))
    symmetry = arch.symmetry.compact
    for right in (w[1], w[1:]):
        here = symflow.WeightMatching()(symmetry, w[0], right)
        there = symflow.WeightMatching()(symmetry, w[0].to(device), right.to(device))
        torch.testing.assert_close(there.objective.cpu(), here.objective)
        torch.testing.assert_close(there.weights.cpu(), here.weights)


def test_a_device_that_is_not_there(arch):
    """The error names the argument and what came."""
    with pytest.raises(ShapeError, match=r"device must be one that this machine has.*'cuda:99'"):
        flows.euclidean(arch, width=8, depth=1).to("cuda:99")
