"""Flows: parts, training, resume, sampling, files."""

import dataclasses
import itertools
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import symflow
from symflow.errors import (
    EquivarianceError,
    FileFormatError,
    ShapeError,
    StateError,
    SymflowWarning,
)
from symflow.files import load_tensors, save_tensors
from symflow.flows import (
    BetaTime,
    Coupling,
    FanIn,
    FitSettings,
    Flow,
    Gaussian,
    GeodesicPath,
    Guidance,
    MiniBatchOT,
    Path,
    Recipe,
    Source,
    TimeLaw,
    load,
)
from symflow.flows.path import interpolate
from symflow.testing import concrete_classes

PRESETS = ["euclidean", "normalized", "geometric", "balanced"]
SMALL = {"width": 16, "depth": 1, "heads": 2, "edge_width": 8}


def toy_zoo(arch, n=24, seed=0):
    """Runs whose ends are a function of the start that moves along with the neurons."""
    generator = torch.Generator().manual_seed(seed)
    initial = Gaussian(0.3).sample(arch, n, generator=generator)
    return SimpleNamespace(initial=initial, final=2 * initial + 0.5)


@pytest.fixture(scope="module")
def arch():
    return symflow.mlp([3, 4, 4, 2])


def make(preset, arch, **options):
    return getattr(symflow.flows, preset)(arch, source=Gaussian(0.3), **SMALL, **options)


# -------------------------------------------------------------------- parts


def test_sources_have_the_deviation_they_say(arch):
    generator = torch.Generator().manual_seed(0)
    w = Gaussian(0.3).sample(arch, 2000, generator=generator, dtype=torch.float64)
    assert w.shape == (2000, arch.dimension) and abs(float(w.std()) - 0.3) < 0.005
    w = FanIn().sample(arch, 2000, generator=generator)
    for layer, fan_in in (("0", 3), ("2", 4), ("4", 4)):
        for kind in ("weight", "bias"):
            part = w[:, arch.leaf(f"{layer}.{kind}").span]
            assert part.abs().max() <= fan_in**-0.5
            assert abs(float(part.std()) - (3 * fan_in) ** -0.5) < 0.02
    with pytest.raises(ShapeError, match="at least 1"):
        Gaussian().sample(arch, 0, generator=generator)


def test_sources_reset_normalisation_layers():
    arch = symflow.mlp([3, 4, 2], batch_norm=True)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    w = Gaussian(0.3).sample(arch, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)  # no hidden randomness
    leaves = arch.unflatten(w)
    assert (leaves["1.weight"] == 1).all() and (leaves["1.bias"] == 0).all()
    assert (leaves["1.running_mean"] == 0).all() and (leaves["1.running_var"] == 1).all()


@pytest.mark.parametrize("b", [1.0, 2.0, 5.0])
def test_beta_time_has_its_moments(b):
    t = BetaTime(b).sample(20000, generator=torch.Generator().manual_seed(0))
    beta = torch.distributions.Beta(1.0, b)
    assert abs(float(t.mean() - beta.mean)) < 0.01
    assert abs(float(t.var() - beta.variance)) < 0.01
    assert t.min() >= 0 and t.max() < 1


def test_optimal_transport_is_exact_and_repeats_nobody():
    generator = torch.Generator().manual_seed(0)
    starts, ends = (torch.randn(12, 5, generator=generator) for _ in range(2))
    x0, x1 = MiniBatchOT().pair(lambda n: starts, None, ends, lambda a, b: b)
    assert torch.equal(x0, starts)
    assert sorted(map(tuple, x1.tolist())) == sorted(map(tuple, ends.tolist()))
    cost = (x0 - x1).square().sum()
    for _ in range(200):
        other = ends[torch.randperm(12, generator=generator)]
        assert cost <= (starts - other).square().sum() + 1e-4


def test_quotient_transport_moves_ends_and_costs_less(arch):
    flow = make("euclidean", arch)
    generator = torch.Generator().manual_seed(0)
    starts = torch.randn(6, arch.dimension, generator=generator)
    ends = torch.randn(6, arch.dimension, generator=generator)
    plain = MiniBatchOT().pair(lambda n: starts, None, ends, flow.align)
    moved = MiniBatchOT("quotient").pair(lambda n: starts, None, ends, flow.align)
    cost = [(a - b).square().sum() for a, b in (plain, moved)]
    assert cost[1] < cost[0]
    # Every end is in the orbit of one of the given ones, and each is used once.
    q = flow.quotient
    with torch.no_grad():
        near = torch.stack([q.manifold.dist(flow.align(e, moved[1]), e) for e in ends])
    assert sorted(near.argmin(0).tolist()) == list(range(6))
    assert near.amin(0).max() < 1e-3


def test_run_coupling_needs_runs(arch):
    with pytest.raises(StateError, match="initial weights of every run"):
        make("geometric", arch).fit(toy_zoo(arch).final, steps=1)


def test_noise_is_tangent_and_vanishes_at_the_ends_of_a_bridge(arch):
    flow = make("geometric", arch)
    zoo = toy_zoo(arch)
    x0, x1 = flow.encode(zoo.initial), flow.encode(zoo.final)
    unit = torch.ones(x0.shape[1])
    generator = torch.Generator().manual_seed(0)
    path = GeodesicPath(bridge=0.3)
    for time_, noisy in ((0.0, False), (0.5, True), (1.0, False)):
        t = torch.full((len(x0),), time_)
        clean = interpolate(flow.space, GeodesicPath(), x0, x1, t, unit, generator)
        x = interpolate(flow.space, path, x0, x1, t, unit, generator)
        assert flow.space.check_point_on_manifold(x)
        assert bool(torch.allclose(x, clean, atol=1e-5)) is not noisy


@pytest.mark.parametrize("base", [Source, Coupling, TimeLaw, Path])
def test_every_part_survives_json(base):
    field = {Source: "source", Coupling: "coupling", TimeLaw: "time", Path: "path"}[base]
    found = concrete_classes(base, "symflow")
    assert found
    for part in found:
        recipe = dataclasses.replace(Recipe(), **{field: part()})
        assert Recipe.from_json(recipe.to_json()) == recipe
    with pytest.raises(FileFormatError, match="unknown"):
        Recipe.from_json(Recipe().to_json() | {field: {"class": "Nothing"}})


# -------------------------------------------------------------------- states


@pytest.mark.parametrize("preset", PRESETS)
def test_decode_inverts_encode_as_a_function(preset, arch):
    flow = make(preset, arch)
    w = toy_zoo(arch).final
    x = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    state = flow.encode(w)
    assert state.shape[1] == arch.dimension + flow.extra
    assert torch.allclose(arch.apply(flow.decode(state), x), arch.apply(w, x), atol=1e-5)


def test_the_temperature_is_a_coordinate(arch):
    flow = make("geometric", arch)
    w = toy_zoo(arch).final
    hotter = w.clone()
    for name in arch.output:
        hotter[:, arch.leaf(name).span] *= 3
    a, b = flow.encode(w), flow.encode(hotter)
    assert torch.allclose(a[:, :-1], b[:, :-1], atol=1e-5)
    assert torch.allclose(b[:, -1] - a[:, -1], torch.tensor(3.0).log().expand(len(a)), atol=1e-5)


# -------------------------------------------------------------------- training


@pytest.mark.parametrize("preset", PRESETS)
def test_training_reaches_the_ends_it_is_shown(preset, arch):
    """On a zoo whose ends are start + constant, samples land on start + constant."""
    zoo = toy_zoo(arch, 64)
    flow = make(preset, arch).fit(zoo, steps=400, lr=0.01, ema=0.9)
    losses = [record["loss"] for record in flow.history]
    assert losses[-1] < 0.5 * losses[0]
    fresh = toy_zoo(arch, 16, seed=5)
    found = flow.sample(16, steps=8, start=fresh.initial)
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        truth, got, start = (arch.apply(w, x) for w in (fresh.final, found, fresh.initial))
    assert (got - truth).square().mean() < 0.2 * (start - truth).square().mean()


@pytest.mark.parametrize("preset", PRESETS)
def test_same_seed_same_flow_same_samples(preset, arch):
    zoo = toy_zoo(arch)
    a, b = (make(preset, arch).fit(zoo, steps=5).sample(3, steps=3) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, make(preset, arch).fit(zoo, steps=5, seed=1).sample(3, steps=3))


def test_the_behaviour_loss_needs_inputs_and_falls(arch):
    zoo = toy_zoo(arch)
    with pytest.raises(StateError, match="inputs="):
        make("geometric", arch).fit(zoo, steps=1, behaviour=1.0)
    inputs = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    settings = {"steps": 150, "lr": 0.01, "ema": 0.9, "inputs": inputs}

    def divergence(**more):
        flow = make("geometric", arch).fit(zoo, **settings, **more)
        fresh = toy_zoo(arch, 16, seed=5)
        w = flow.sample(16, steps=1, start=fresh.initial)
        with torch.no_grad():
            p, q = (F.log_softmax(arch.apply(v, inputs), -1) for v in (fresh.final, w))
        return float(F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean())

    assert divergence(behaviour=100.0) < divergence()


def test_held_out_networks_are_watched(arch):
    flow = make("balanced", arch).fit(
        toy_zoo(arch), steps=4, log_every=2, validation=toy_zoo(arch, 8, seed=1)
    )
    assert [set(r) for r in flow.history] == [{"step", "loss", "validation"}] * 2


def test_velocity_prediction_trains_and_samples(arch):
    recipe = Recipe(section="sphere", predicts="velocity", source=Gaussian(0.3))
    field = symflow.nn.RelationalTransformer(arch, **SMALL, residual=False)
    flow = Flow(arch, recipe, field).fit(toy_zoo(arch, 64), steps=300, lr=0.01, ema=0.9)
    assert flow.history[-1]["loss"] < 0.5 * flow.history[0]["loss"]
    assert flow.section.manifold.check_point_on_manifold(flow.sample(4, steps=4), atol=1e-3)


def test_a_source_unlike_the_zoos_is_pointed_out(arch):
    with pytest.warns(SymflowWarning, match="times the deviation"):
        symflow.flows.euclidean(arch, source=Gaussian(1.0), **SMALL).fit(toy_zoo(arch), steps=1)


def test_signs_are_refused_by_a_field_that_ignores_them():
    tanh = symflow.mlp([3, 4, 2], "tanh")
    with pytest.raises(EquivarianceError, match="groups='permutation'"):
        make("euclidean", tanh)
    assert make("euclidean", tanh, groups="permutation").arch is tanh


def test_variances_stay_positive():
    arch = symflow.mlp([3, 4, 2], batch_norm=True)
    zoo = toy_zoo(arch)
    for leaf in arch.leaves:
        if leaf.name.endswith("running_var"):
            zoo.final[:, leaf.span] = zoo.final[:, leaf.span].exp()
    flow = make("balanced", arch).fit(zoo, steps=2)
    state = flow.encode(zoo.final)
    state[:, arch.leaf("1.running_var").span] = -5.0
    assert (arch.unflatten(flow.decode(state))["1.running_var"] > 0).all()


def test_a_divergent_fit_says_so(arch):
    with pytest.raises(StateError, match="lower lr"):
        make("euclidean", arch).fit(toy_zoo(arch), steps=50, lr=1e20, clip=1e30, warmup=0)


# -------------------------------------------------------------------- sampling


@pytest.fixture(scope="module")
def trained(arch):
    return {p: make(p, arch).fit(toy_zoo(arch, 64), steps=200, lr=0.01, ema=0.9) for p in PRESETS}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("solver", ["euler", "midpoint", "rk4", "dopri5", "tsit5"])
def test_solvers_agree_on_fine_grids(preset, solver, trained):
    flow = trained[preset]
    truth = flow.sample(6, steps=200, solver="euler")
    found = flow.sample(6, steps=50, solver=solver)
    scale = (truth - truth.mean(0)).norm(dim=-1).mean()
    assert (found - truth).norm(dim=-1).mean() < 0.2 * scale
    if flow.recipe.section != "flat":
        again = flow.section.project(found)
        if preset == "balanced":
            assert torch.allclose(again, found, atol=1e-4)


def test_euler_converges_at_first_order(trained):
    """Halving the step halves the error: a theorem about the method, not about the code."""
    flow = trained["balanced"]
    truth = flow.sample(8, steps=512)
    errors = [(flow.sample(8, steps=n) - truth).norm() for n in (16, 32, 64)]
    for coarse, fine in itertools.pairwise(errors):
        assert 1.5 < float(coarse / fine) < 3.0


def test_every_state_of_the_geometric_flow_is_on_the_section(trained):
    """Only the geometric preset keeps intermediate states on its manifold."""
    on = {}
    for preset in ("normalized", "geometric"):
        flow = trained[preset]
        rows = symflow.sections.unit_coordinates(flow.arch, "h1", 1)
        states = list(flow.trajectory(5, steps=6))
        assert len(states) == 7
        lengths = torch.stack([w[:, rows].norm(dim=-1) for w in states[1:-1]])
        on[preset] = bool(torch.allclose(lengths, torch.ones(()), atol=1e-4))
        assert torch.allclose(states[-1][:, rows].norm(dim=-1), torch.ones(()), atol=1e-4)
    assert on == {"normalized": False, "geometric": True}


def test_noise_makes_samples_differ_and_is_seeded(trained):
    flow = trained["geometric"]
    plain = flow.sample(4, steps=8)
    noisy = flow.sample(4, steps=8, noise=0.05)
    assert not torch.allclose(plain, noisy, atol=1e-3)
    assert torch.equal(noisy, flow.sample(4, steps=8, noise=0.05))
    with pytest.raises(ShapeError, match="fixed-step"):
        flow.sample(4, steps=8, noise=0.05, solver="dopri5")


@pytest.mark.parametrize("preset", PRESETS)
def test_guidance_lowers_the_loss_it_is_given(preset, trained):
    flow = trained[preset]
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()

    def loss(w):
        logits = flow.arch.apply(w, x)
        return (
            F.cross_entropy(logits.flatten(0, 1), y.repeat(len(w)), reduction="none")
            .view(len(w), -1)
            .mean(1)
        )

    plain = flow.sample(6, steps=16)
    bent = flow.sample(6, steps=16, guidance=Guidance(loss, 2.0))
    away = flow.sample(6, steps=16, guidance=Guidance(loss, -2.0))  # the broken twin
    with torch.no_grad():
        assert loss(bent).mean() < loss(plain).mean() < loss(away).mean()


def test_sampling_refuses_bad_input(trained, arch):
    flow = trained["geometric"]
    with pytest.raises(StateError, match=r"call flow.fit"):
        make("geometric", arch).sample(1)
    with pytest.raises(ShapeError, match="at least 1"):
        flow.sample(2, steps=0)
    with pytest.raises(ShapeError, match="solver must be one of"):
        flow.sample(2, solver="heun")
    with pytest.raises(ShapeError, match="n = 2"):
        flow.sample(2, start=torch.zeros(3, arch.dimension))
    with pytest.raises(ShapeError, match="at least 1"):
        FitSettings(steps=0)
    with pytest.raises(ShapeError, match="'adam' or 'adamw'"):
        FitSettings(optimizer="lion")


# -------------------------------------------------------------------- files


def test_saved_flows_give_the_same_samples(trained, tmp_path):
    for preset, flow in trained.items():
        flow.save(tmp_path / f"{preset}.safetensors")
        again = load(tmp_path / f"{preset}.safetensors")
        assert torch.equal(again.sample(3, steps=4), flow.sample(3, steps=4))
        assert again.recipe == flow.recipe and again.history == flow.history


def test_files_of_others_are_refused(trained, tmp_path, arch):
    file = tmp_path / "flow.safetensors"
    trained["geometric"].save(file)
    with pytest.raises(FileFormatError, match="fingerprint"):
        load(file, symflow.mlp([3, 5, 4, 2]))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(FileFormatError, match="no complete safetensors"):
        load(file)
    save_tensors(file, {"w": torch.zeros(1)})
    with pytest.raises(FileFormatError, match="holds no flow"):
        load(file)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "missing.safetensors")


@pytest.mark.parametrize("preset", ["geometric", "balanced"])
def test_resumed_training_equals_uninterrupted(preset, arch, tmp_path):
    zoo = toy_zoo(arch)
    settings = {"steps": 10, "checkpoint_every": 4, "log_every": 3}
    whole = make(preset, arch).fit(zoo, **settings)

    class Stop(Exception):
        pass

    partial = make(preset, arch)
    original, calls = partial.predict, []

    def predict(*args):
        calls.append(1)
        if len(calls) == 7:
            raise Stop
        return original(*args)

    partial.predict = predict
    with pytest.raises(Stop):
        partial.fit(zoo, folder=tmp_path, **settings)
    resumed = make(preset, arch).fit(zoo, folder=tmp_path, **settings)
    assert torch.equal(resumed.sample(3, steps=3), whole.sample(3, steps=3))
    assert resumed.history == whole.history
    finished = make(preset, arch).fit(zoo, folder=tmp_path, **settings)
    assert torch.equal(finished.sample(3, steps=3), whole.sample(3, steps=3))
    with pytest.raises(FileFormatError, match="settings"):
        make(preset, arch).fit(zoo, folder=tmp_path, **(settings | {"lr": 0.5}))


KILLED = """
import sys, torch
from types import SimpleNamespace
import symflow
from symflow.flows import Gaussian
torch.set_num_threads(1)
arch = symflow.mlp([3, 4, 4, 2])
w = Gaussian(0.1).sample(arch, 24, generator=torch.Generator().manual_seed(0))
flow = symflow.flows.balanced(arch, width=8, depth=1, heads=1)
flow.fit(SimpleNamespace(initial=w, final=w + 0.5), steps=int(sys.argv[2]), folder=sys.argv[1],
         checkpoint_every=5, schedule="constant")
"""


def test_killed_at_any_moment_loses_one_interval_at_most(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path), "1000000"])
    file = tmp_path / "flow.safetensors"
    deadline = time.monotonic() + 120
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)
    process.kill()
    process.wait()
    tensors, meta = load_tensors(file)  # whole, whenever the kill came
    assert meta["step"] % 5 == 0 and meta["step"] > 0
    assert all(value.isfinite().all() for key, value in tensors.items() if key != "floor")
