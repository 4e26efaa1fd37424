"""Flows over other networks than perceptrons: BatchNorm and convolutions, attention, recurrence."""

import itertools

import pytest
import torch
from catalogue import CATALOGUE

import symflow
from symflow import flows

SUBJECTS = ("ResNet-20", "vision transformer", "GroupNorm with four groups", "LSTM")
PRESETS = (flows.euclidean, flows.normalized, flows.geometric, flows.balanced)
# Heads mix their units: they have no sphere section, see the test of its refusal below.
CASES = tuple(
    (name, preset)
    for name, preset in itertools.product(SUBJECTS, PRESETS)
    if name != "vision transformer" or preset in (flows.euclidean, flows.balanced)
)


def traced(name):
    entry = next(e for e in CATALOGUE if e.name == name)
    torch.manual_seed(0)
    return symflow.Architecture.from_module(entry.make(), *entry.inputs)


@pytest.mark.parametrize(("name", "preset"), CASES)
def test_samples_move_along_with_their_starts(name, preset):
    arch = traced(name)
    generator = torch.Generator().manual_seed(0)
    w = flows.FanIn().sample(arch, 12, generator=generator)
    w[:, : arch.num_parameters] *= 1 + torch.rand(arch.num_parameters, generator=generator)
    flow = preset(
        arch,
        source=flows.FanIn(),
        coupling=flows.Independent(),
        width=8,
        depth=1,
        groups="permutation",
    )
    flow.fit(w, steps=3, batch_size=4, lr=0.01)
    start = flows.FanIn().sample(arch, 2, generator=generator)
    group = flow.field.symmetry
    element = group.random(generator=generator, like=start)
    drawn = flow.sample(2, steps=3, start=start)
    moved = flow.sample(2, steps=3, start=group.act(element, start))
    assert drawn.isfinite().all()
    assert not torch.allclose(moved, drawn, atol=1e-2)
    torch.testing.assert_close(moved, group.act(element, drawn), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("preset", [flows.normalized, flows.geometric])
def test_spheres_need_rows_of_their_own(preset):
    with pytest.raises(symflow.errors.LeafError, match="Use section='balanced'"):
        preset(traced("vision transformer"), groups="permutation")


def test_a_flow_of_attention_learns_what_runs_have_in_common():
    """Runs that shrink their starts by a half: so does the flow, of starts it has not seen."""
    arch = traced("vision transformer")
    generator = torch.Generator().manual_seed(1)
    start = flows.FanIn().sample(arch, 64, generator=generator)
    end = start.clone()
    end[:, : arch.num_parameters] *= 0.5
    flow = flows.euclidean(arch, source=flows.FanIn(), width=16, depth=1, groups="permutation")

    class Runs:
        initial, final = start[:48], end[:48]

    flow.fit(Runs(), steps=150, batch_size=16, lr=0.02, ema=0.9)
    drawn = flow.sample(16, steps=4, start=start[48:])
    for leaf in arch.leaves:
        if len(leaf.axes) > 2:  # of heads: these, the units inside, and the stream
            parts = drawn - end[48:], (start - end)[48:]
            error, change = (x[:, leaf.span].norm() for x in parts)
            assert error < 0.6 * change, leaf.name
