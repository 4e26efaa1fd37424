"""A flow on networks of other widths, and guidance in coordinates of the inputs."""

from types import SimpleNamespace

import pytest
import torch

import symflow
from symflow.arch import InputCoordinates
from symflow.errors import ShapeError
from symflow.flows import Gaussian, Guidance, transfer

FIELD = {"width": 8, "depth": 1, "heads": 2, "edge_width": 4}


def trained(preset="geometric", widths=(6, 4, 4, 3), rank=None):
    arch = symflow.mlp(list(widths))
    generator = torch.Generator().manual_seed(0)
    w = Gaussian(0.3).sample(arch, 32, generator=generator)
    x = torch.randn(50, widths[0], generator=generator) * torch.arange(1.0, widths[0] + 1)
    chart = None if rank is None else InputCoordinates.of_inputs(arch, x, rank=rank)
    make = getattr(symflow.flows, preset)
    flow = make(arch, source=Gaussian(0.3), coordinates=chart, **FIELD)
    return flow.fit(SimpleNamespace(initial=w, final=2 * w + 0.1), steps=20, lr=0.01)


@pytest.mark.parametrize("preset", ["euclidean", "normalized", "geometric", "balanced"])
@pytest.mark.parametrize("rank", [None, 3])
def test_the_same_widths_give_the_same_samples(preset, rank):
    flow = trained(preset, rank=rank)
    same = transfer(flow, symflow.mlp([6, 4, 4, 3]))
    torch.testing.assert_close(same.sample(3, steps=3), flow.sample(3, steps=3))


@pytest.mark.parametrize("preset", ["geometric", "balanced"])
def test_wider_networks_are_sampled_and_stay_equivariant(preset):
    flow = trained(preset, rank=3)
    arch = symflow.mlp([6, 9, 5, 3])
    wide = transfer(flow, arch)
    generator = torch.Generator().manual_seed(1)
    start = Gaussian(0.3).sample(arch, 4, generator=generator)
    group = arch.symmetry.compact
    element = group.random(generator=generator, like=start)
    drawn = wide.sample(4, steps=3, start=start)
    moved = wide.sample(4, steps=3, start=group.act(element, start))
    torch.testing.assert_close(moved, group.act(element, drawn), atol=1e-4, rtol=1e-4)


def test_units_of_duplicated_neurons_stay_alike():
    """A network whose hidden units come twice: so do those of the sample, one beside the other."""
    flow = trained("euclidean", widths=(6, 4, 3))
    narrow, arch = flow.arch, symflow.mlp([6, 8, 3])
    w = Gaussian(0.3).sample(narrow, 2, generator=torch.Generator().manual_seed(2))
    parts = narrow.unflatten(w)
    twice = {
        "0.weight": torch.cat([parts["0.weight"]] * 2, dim=1),
        "0.bias": torch.cat([parts["0.bias"]] * 2, dim=1),
        "2.weight": torch.cat([parts["2.weight"]] * 2, dim=2),
        "2.bias": parts["2.bias"],
    }
    drawn = arch.unflatten(transfer(flow, arch).sample(2, steps=3, start=arch.flatten(twice)))
    first, second = drawn["0.weight"].chunk(2, dim=1)
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)
    # Nothing but the number of units has changed for attention: the means over them are the same.
    alone = narrow.unflatten(flow.sample(2, steps=3, start=w))
    torch.testing.assert_close(first, alone["0.weight"], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("widths", [[5, 4, 4, 3], [6, 4, 4, 2], [6, 4, 3]])
def test_other_leaves_are_refused(widths):
    with pytest.raises(ShapeError, match="leaves of the flow's"):
        transfer(trained(), symflow.mlp(widths))


def test_fields_with_nodes_for_all_neurons_are_refused():
    arch = symflow.mlp([6, 4, 3])
    flow = symflow.flows.euclidean(arch, width=8, depth=1, nodes="all")
    with pytest.raises(ShapeError, match="symmetric"):
        transfer(flow, symflow.mlp([6, 8, 3]))


def test_guidance_in_coordinates_is_descent_on_the_weights():
    """What the kept directions see of a plain gradient step, whatever the chart's scales."""
    flow = trained("euclidean", widths=(6, 4, 3), rank=6)
    target = torch.randn(flow.arch.dimension, generator=torch.Generator().manual_seed(3))
    guide = Guidance(lambda w: 0.5 * (w - target).square().sum(-1), 0.1)
    w = flow.sample(4, steps=2)
    push = guide.push(flow.encode(w), flow.decode_inner, flow.coordinates)
    torch.testing.assert_close(push, flow.encode(w - 0.1 * (w - target)) - flow.encode(w))
