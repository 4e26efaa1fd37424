"""Sampling beyond the plain: optimised starts, conditions, distilled flows."""

from types import SimpleNamespace

import pytest
import torch

import symflow
from symflow.errors import ShapeError, StateError
from symflow.flows import Gaussian, Independent, MiniBatchOT, Optimised, load
from symflow.flows.condition import Conditioned
from symflow.flows.distil import teacher_path
from symflow.flows.sampling import Motion
from symflow.flows.solve import solve
from symflow.nn import RelationalTransformer
from symflow.sections import unit_coordinates
from symflow.testing import check_equivariant

SMALL = {"width": 16, "depth": 1, "heads": 2, "edge_width": 8}
PRESETS = ["euclidean", "normalized", "geometric", "balanced"]


@pytest.fixture(scope="module")
def arch():
    return symflow.mlp([2, 3, 2])


def make(preset, arch, **options):
    options = {"source": Gaussian(0.3), "coupling": Independent(), **SMALL, **options}
    return getattr(symflow.flows, preset)(arch, **options)


def runs(arch, n=48, seed=0):
    initial = Gaussian(0.3).sample(arch, n, generator=torch.Generator().manual_seed(seed))
    return SimpleNamespace(initial=initial, final=2 * initial + 0.5)


@pytest.fixture(scope="module")
def trained(arch):
    zoo = runs(arch).final
    return {p: make(p, arch).fit(zoo, steps=100, lr=0.01, ema=0.9) for p in PRESETS}


def energy(w):
    return (w - 0.7).square().sum(-1)


# -------------------------------------------------------------------- optimised starts


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_optimised_starts_lower_the_loss(preset, solver, trained):
    flow = trained[preset]
    options = {"iterations": 8, "steps": 4, "solver": solver, "seed": 3}
    found = flow.optimise_start(energy, 3, **options)
    assert found.history.shape == (9, 3)
    assert not found.weights.requires_grad and not found.history.requires_grad
    # It begins at the plain sample, gets better, and what it returns is a sample of its start.
    plain = flow.sample(3, steps=4, solver=solver, seed=3)
    assert torch.allclose(energy(plain), found.history[0], rtol=1e-4)
    assert (energy(found.weights) < 0.9 * found.history[0]).all()
    assert torch.allclose(energy(found.weights), found.history.amin(0), rtol=1e-4)
    again = flow.sample(3, steps=4, solver=solver, start=found.start)
    assert torch.allclose(again, found.weights, atol=1e-4)
    # Uphill with the sign turned: the gradient has the sign that it should.
    away = flow.optimise_start(lambda w: -energy(w), 3, **options)
    assert (energy(away.weights) > found.history[0]).all()


def test_optimised_starts_are_seeded_and_stay_on_their_manifold(trained, arch):
    flow = trained["geometric"]
    a, b = (flow.optimise_start(energy, 2, iterations=2, steps=2, seed=1) for _ in range(2))
    assert isinstance(a, Optimised)
    assert torch.equal(a.weights, b.weights) and torch.equal(a.history, b.history)
    other = flow.optimise_start(energy, 2, iterations=2, steps=2, seed=2)
    assert not torch.equal(a.weights, other.weights)
    assert flow.space.check_point_on_manifold(flow.encode(a.start))
    start = runs(arch, 2).initial
    given = flow.optimise_start(energy, 2, iterations=1, steps=2, start=start)
    assert torch.allclose(given.history[0], energy(flow.sample(2, steps=2, start=start)), rtol=1e-5)


def test_the_gradient_through_the_flow_is_right(arch):
    """Against differences of the loss, in float64."""
    flow = make("geometric", arch, field=RelationalTransformer(arch, extra=1, **SMALL).double())
    flow.fit(runs(arch).final, steps=30, lr=0.01, ema=0.9)
    start = runs(arch, 1).initial.double()
    found = flow.optimise_start(energy, 1, iterations=1, lr=1e-6, steps=3, start=start)
    move = flow.encode(found.start) - flow.encode(start)
    assert 0 < move.abs().max() < 1e-5
    assert found.history[1] < found.history[0]  # however small the step is


def test_optimised_starts_say_what_is_wrong(trained, arch):
    flow = trained["euclidean"]
    for wrong, message in [
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"n": 0}, "n must be at least 1"),
        ({"lr": -1.0}, "lr must be a finite number"),
        ({"solver": "dopri5"}, "need a fixed-step solver, got 'dopri5'"),
        ({"loss": lambda w: w.sum()}, r"the loss must return one number for each network"),
        ({"start": torch.zeros(3, 17)}, "start must hold n = 2 networks"),
    ]:
        with pytest.raises(ShapeError, match=message):
            flow.optimise_start(**({"loss": energy, "n": 2, "steps": 2} | wrong))
    with pytest.raises(StateError, match="not trained"):
        make("euclidean", arch).optimise_start(energy, 2)
    with pytest.raises(StateError, match="gradient of the loss is not finite"):
        flow.optimise_start(lambda w: (w - w.detach()).norm(dim=-1) ** 0.5, 2, steps=2)


# -------------------------------------------------------------------- conditions


def two_kinds(arch, n=64):
    """Networks around +1 or around -1, and which."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.arange(n) % 2
    w = 0.1 * torch.randn(n, arch.dimension, generator=generator)
    return w + (2 * kind[:, None] - 1), kind[:, None].float()


@pytest.fixture(scope="module")
def told(arch):
    w, kind = two_kinds(arch)
    flow = make("euclidean", arch, conditions=1)
    return flow.fit(w, conditions=100 + 3 * kind, steps=400, lr=0.01, ema=0.9)


def test_samples_are_what_they_are_asked_to_be(told):
    high, low = (told.sample(32, steps=16, condition=[c]).mean(-1) for c in (103.0, 100.0))
    assert (high > 0.5).float().mean() > 0.9 and (low < -0.5).float().mean() > 0.9
    mixed = told.sample(2, steps=16, condition=torch.tensor([[103.0], [100.0]])).mean(-1)
    assert mixed[0] > 0 > mixed[1]
    # Without a condition there are both.
    plain = told.sample(64, steps=16).mean(-1)
    assert 0.1 < (plain > 0).float().mean() < 0.9


def test_guidance_without_a_classifier(told):
    """Scale 0 is the flow without the condition, 1 the one with it, and more goes further."""
    means = [
        told.sample(16, steps=8, condition=[103.0], guidance_scale=scale, seed=1)
        for scale in (0.0, 1.0, 2.0)
    ]
    assert torch.allclose(means[0], told.sample(16, steps=8, seed=1), atol=1e-4)
    assert torch.equal(means[1], told.sample(16, steps=8, condition=[103.0], seed=1))
    assert means[0].mean() < means[1].mean() < means[2].mean()


def test_conditions_take_part_in_the_density_and_in_optimised_starts(told, arch):
    w, kind = two_kinds(arch, 8)
    options = {"steps": 6, "solver": "midpoint"}
    right = told.log_prob(w, condition=100 + 3 * kind, **options)
    wrong = told.log_prob(w, condition=103 - 3 * kind, **options)
    assert (right > wrong + 10).all()
    for scale in (1.0, 2.0):
        found = told.optimise_start(
            energy, 2, condition=[103.0], guidance_scale=scale, iterations=3, steps=4
        )
        assert (found.history.amin(0) < found.history[0]).all()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("coupling", [Independent(), MiniBatchOT(), MiniBatchOT("quotient")])
def test_a_condition_finds_its_end_again(preset, coupling, arch, monkeypatch):
    """Couplings change the order of ends; each must keep the condition of its own row."""
    w, _ = two_kinds(arch, 12)
    w = w + 0.01 * torch.arange(12)[:, None]
    flow = make(preset, arch, coupling=coupling, conditions=1)
    seen = []

    def watch(field, values, keep=None):
        seen.append((values, keep))
        return Conditioned(field, values, keep)

    monkeypatch.setattr("symflow.flows.fit.Conditioned", watch)
    key = flow.encode(w).square().sum(-1)  # permutations do not change it
    ends = []
    original = flow.space.geodesic
    logmap = flow.space.logmap

    def end_of(x0, x1):
        ends.append(x1)
        return logmap(x0, x1)

    monkeypatch.setattr(flow.space, "logmap", end_of)
    monkeypatch.setattr(flow.space, "geodesic", original)
    flow.fit(w, conditions=key[:, None], steps=1, condition_dropout=0.5)
    values, keep = seen[0]
    assert torch.allclose(ends[0].square().sum(-1), values[:, 0], rtol=1e-4)
    assert keep.any() and not keep.all()


def test_conditions_survive_files_and_interruptions(told, arch, tmp_path):
    told.save(tmp_path / "told.safetensors")
    again = load(tmp_path / "told.safetensors")
    sample = {"steps": 3, "condition": [100.0]}
    assert torch.equal(again.sample(2, **sample), told.sample(2, **sample))
    w, kind = two_kinds(arch)
    flows = [
        make("euclidean", arch, conditions=1).fit(
            w, conditions=kind, steps=4, folder=tmp_path / str(n), checkpoint_every=2
        )
        for n in (0, 1, 1)
    ]
    assert torch.equal(flows[0].sample(2, steps=2), flows[2].sample(2, steps=2))
    with pytest.raises(symflow.errors.FileFormatError, match="conditions: there"):
        make("euclidean", arch, conditions=1).fit(
            w, conditions=1 - kind, steps=4, folder=tmp_path / "0", checkpoint_every=2
        )


def test_fields_with_conditions_stay_equivariant_and_begin_without(generator, unshrunk):
    arch = symflow.mlp([2, 3, 3, 1])
    plain, told = (
        RelationalTransformer(arch, **SMALL, seed=1, conditions=k).double() for k in (0, 2)
    )
    x, t = torch.randn(4, arch.dimension, generator=generator).double(), torch.rand(4).double()
    c = torch.randn(4, 2, generator=generator).double()
    # Zero before training, and no trace in fields that take none: their files stay as they were.
    assert torch.equal(told(x, t, c), told(x, t)) and torch.equal(told(x, t), plain(x, t))
    assert not hasattr(plain, "condition") and "conditions" not in vars(plain)
    assert set(plain.state_dict()) < set(told.state_dict())
    for key, value in plain.state_dict().items():
        assert torch.equal(value, told.state_dict()[key])
    with torch.no_grad():
        for p in told.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 4)
    keep = torch.tensor([True, False, True, False])
    out = told(x, t, c, keep)
    assert torch.equal(out[keep], told(x, t, c)[keep])
    assert torch.allclose(out[~keep], told(x, t)[~keep])
    assert not torch.allclose(told(x, t, c), told(x, t), atol=1e-3)

    check_equivariant(lambda y, s: told(y, s, c[:3]), arch, symmetry=told.symmetry)
    with pytest.raises(AssertionError):  # were the condition a number of each weight
        check_equivariant(
            lambda y, s: told(y, s, c[:3]) + y[:, :1] * torch.arange(arch.dimension),
            arch,
            symmetry=told.symmetry,
        )
    told.standardise_conditions(5 + 2 * torch.randn(1000, 2, generator=generator))
    assert torch.allclose(told.network.condition.shift, torch.full((2,), 5.0).double(), atol=0.3)
    assert torch.allclose(told.network.condition.scale, torch.full((2,), 2.0).double(), atol=0.2)


def test_conditions_say_what_is_wrong(told, arch):
    w, kind = two_kinds(arch)
    plain = make("euclidean", arch)
    with pytest.raises(StateError, match=r"takes none: make the flow with conditions=k"):
        plain.fit(w, conditions=kind, steps=1)
    with pytest.raises(StateError, match="made with conditions=1: pass conditions="):
        make("euclidean", arch, conditions=1).fit(w, steps=1)
    cases = [
        (kind[:-1], r"conditions must have shape \(n, k\) = \(64, 1\), or \(1,\)"),
        (kind / 0, "conditions hold 64 NaN or infinite"),
        ("many", "conditions must be numbers"),
    ]
    for wrong, message in cases:
        with pytest.raises(ShapeError, match=message):
            make("euclidean", arch, conditions=1).fit(w, conditions=wrong, steps=1)
    with pytest.raises(ShapeError, match=r"condition_dropout must be .* below 1"):
        make("euclidean", arch, conditions=1).fit(w, conditions=kind, condition_dropout=1.0)
    with pytest.raises(ShapeError, match=r"condition must have shape \(n, k\) = \(2, 1\)"):
        told.sample(2, condition=torch.ones(3, 1))
    with pytest.raises(ShapeError, match=r"got 2 without one: pass condition="):
        told.sample(2, guidance_scale=2.0)
    with pytest.raises(ShapeError, match="0 with nodes='all', got 1 with"):
        RelationalTransformer(arch, nodes="all", conditions=1)
    with pytest.raises(ShapeError, match=r"condition must be \(B, conditions\) = \(2, 1\), got"):
        told.field(torch.zeros(2, 17), torch.zeros(2), torch.zeros(2, 3))


# -------------------------------------------------------------------- distillation


@pytest.fixture(scope="module")
def teachers(arch):
    """Ends independent of the starts: paths that bend, and whose first predictions are means."""
    w = 1 + 0.3 * torch.randn(256, 17, generator=torch.Generator().manual_seed(0))
    return {p: make(p, arch).fit(w, steps=200, lr=0.01, ema=0.9) for p in PRESETS}


def off(flow, other, steps, start):
    """Mean squared distance of the states of samples from another flow's in 32 steps."""
    n = len(start)
    truth = flow.encode(flow.sample(n, steps=32, start=start))
    return float((other.encode(other.sample(n, steps=steps, start=start)) - truth).square().mean())


@pytest.mark.parametrize("preset", PRESETS)
def test_distilled_flows_meet_their_teacher(preset, teachers, arch, tmp_path):
    """From starts that they have not seen."""
    flow = teachers[preset]
    before = flow.sample(4, steps=8)
    start = Gaussian(0.3).sample(arch, 64, generator=torch.Generator().manual_seed(9))
    for steps in (1, 2):
        student = flow.distil(
            steps, teacher_steps=16, iterations=150, starts=512, lr=0.003, ema=0.9
        )
        assert off(flow, student, steps, start) < 0.4 * off(flow, flow, steps, start)
        assert student.history[-1]["loss"] < 0.1
        student.save(tmp_path / "student.safetensors")
        again = load(tmp_path / "student.safetensors")
        assert torch.equal(again.sample(3, steps=2), student.sample(3, steps=2))
    assert torch.equal(flow.sample(4, steps=8), before)  # the teacher stays as it is


def test_distillation_is_seeded_and_takes_starts(teachers, arch):
    flow = teachers["geometric"]
    options = {"teacher_steps": 4, "iterations": 3, "starts": 8}
    a, b, c = (flow.distil(2, seed=k, **options).sample(2, steps=2) for k in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    start = runs(arch, 300).initial  # more than go into one batch of teachers
    path = teacher_path(flow, flow.encode(start), None, 1.0, 2, 4)
    assert path.shape == (3, 300, 18) and torch.equal(path[0], flow.encode(start))
    states = list(flow.trajectory(300, steps=4, start=start))
    assert torch.allclose(flow.decode(path[1]), states[2], atol=1e-5)
    assert torch.allclose(flow.decode(path[2]), states[4], atol=1e-5)
    one = flow.distil(1, start=start, teacher_steps=4, iterations=2)
    assert one.sample(2, steps=1).shape == (2, 17)


def test_guidance_is_distilled_into_the_condition(told, arch):
    kind = 100 + 3 * two_kinds(arch, 128)[1]
    student = told.distil(
        2, teacher_steps=16, iterations=200, starts=128, lr=0.003, ema=0.9,
        conditions=kind, guidance_scale=2.0,
    )  # fmt: skip
    options = {"condition": [103.0], "seed": 5}
    truth = told.sample(32, steps=16, guidance_scale=2.0, **options)
    plain = told.sample(32, steps=2, **options)
    found = student.sample(32, steps=2, **options)
    assert (found - truth).square().mean() < 0.6 * (plain - truth).square().mean()


def test_distillation_says_what_is_wrong(teachers, arch):
    flow = teachers["euclidean"]
    for wrong, message in [
        ({"teacher_steps": 5}, "teacher_steps must be a multiple of steps = 2, and more, got 5"),
        ({"teacher_steps": 2}, "and more, got 2"),
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"starts": 0}, "starts must be at least 1"),
        ({"lr": -1.0}, "lr must be a finite number"),
        ({"guidance_scale": 2.0}, "got 2 without one"),
    ]:
        with pytest.raises(ShapeError, match=message):
            flow.distil(2, **wrong)
    with pytest.raises(StateError, match="not trained"):
        make("euclidean", arch).distil()
    with pytest.raises(StateError, match="takes none: make the flow"):
        flow.distil(2, conditions=[1.0])
    with pytest.raises(StateError, match="the distillation diverged at step"):
        flow.distil(2, teacher_steps=4, starts=8, iterations=500, lr=1e25)


# ---------------------------------------------------------------- the path's own noise


def test_states_have_the_law_of_the_path(arch):
    """To an end that is known the process is a Brownian bridge: its spread at each time is known.

    And without the bridge's noise, the same drift leads straight there.
    """
    flow, n, steps = make("euclidean", arch, bridge=0.4), 4096, 8
    flow.unit = torch.linspace(0.5, 2.0, arch.dimension)
    end = torch.ones(n, arch.dimension)
    spreads = {}
    for bridge in (0.0, 1.0):
        motion = Motion(flow, bridge=bridge, generator=torch.Generator().manual_seed(0))
        found = solve(
            flow.space,
            lambda t, x: (end - x) / (1 - t),
            lambda t, x: end,
            torch.zeros_like(end),
            steps=steps,
            kick=motion.kick,
        )
        spreads[bridge] = torch.stack([x.std(0) for x in found])
    t = torch.arange(1, steps + 1)[:, None] / steps
    law = 2 * 0.4 * (t * (1 - t)).sqrt() * flow.unit
    torch.testing.assert_close(spreads[1.0], law, rtol=0.05, atol=1e-6)
    assert float(spreads[0.0].max()) < 1e-6


@pytest.mark.parametrize("preset", ["geometric", "normalized"])
def test_noisy_states_stay_on_their_manifold_and_are_seeded(preset, arch, tmp_path):
    flow = make(preset, arch, bridge=0.2).fit(runs(arch), steps=3)
    drawn = flow.sample(6, steps=4, bridge=1.0)
    rows = drawn[:, unit_coordinates(arch, "h1", 1)]
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(rows.shape[:-1]))
    assert torch.equal(drawn, flow.sample(6, steps=4, bridge=1.0))
    assert not torch.allclose(drawn, flow.sample(6, steps=4), atol=1e-3)
    flow.save(tmp_path / "flow")
    assert torch.equal(drawn, load(tmp_path / "flow").sample(6, steps=4, bridge=1.0))
    with pytest.raises(ShapeError, match="bridge"):
        flow.sample(6, bridge=-1.0)
    with pytest.raises(ShapeError, match="fixed-step"):
        flow.sample(6, bridge=1.0, solver="dopri5")


def test_paths_without_noise_have_none_to_add(trained):
    flow = trained["geometric"]
    assert torch.equal(flow.sample(4, steps=4), flow.sample(4, steps=4, bridge=1.0))
