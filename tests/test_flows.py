"""Flows: parts, training, resume, sampling, files."""

import copy
import dataclasses
import itertools
import math
import subprocess
import sys
import time
from types import SimpleNamespace

import jaxtyping
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import symflow
from symflow.errors import (
    EquivarianceError,
    FileFormatError,
    LeafError,
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
from symflow.flows.fit import Trainer
from symflow.flows.path import interpolate
from symflow.nn import RelationalTransformer, VectorField
from symflow.testing import concrete_classes
from symflow.zoo import Zoo

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


@pytest.fixture
def unchecked(monkeypatch):
    """Call symflow as users do: without the checks of annotations that run in tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


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
    found = concrete_classes(base, "symflow.flows")
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
        w = flow.sample(len(zoo.final), steps=1, start=zoo.initial)
        with torch.no_grad():
            p, q = (F.log_softmax(arch.apply(v, inputs), -1) for v in (zoo.final, w))
        return float(F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean())

    assert divergence(behaviour=100.0) < 0.3 * divergence()


def test_the_consensus_loss_is_that_of_mean_predictions(arch):
    """It does not ask which end belongs to which start, and is zero where the means agree."""
    zoo = toy_zoo(arch)
    with pytest.raises(StateError, match="inputs="):
        make("geometric", arch).fit(zoo, steps=1, consensus=1.0)
    two = SimpleNamespace(world_size=2, global_rank=0, all_reduce=max, barrier=max)
    with pytest.raises(StateError, match="train with one process, or leave it out"):
        shared = FitSettings(consensus=1.0)
        Trainer(make("geometric", arch), shared, None, zoo.final, zoo.final, None, processes=two)
    inputs = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    flow = make("geometric", arch)
    settings = FitSettings(consensus=2.0, behaviour_inputs=len(inputs))
    trainer = Trainer(flow, settings, zoo.initial, zoo.final, inputs, None)
    ends = trainer.ends[:6]

    def loss(guess):
        return float(trainer._behaviour(ends, guess, torch.Generator().manual_seed(0)))

    def mean(states):
        rows = torch.randint(40, (40,), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            out = arch.apply(flow.decode_inner(states), inputs[rows])
        return F.softmax(out, -1).mean(0)

    p, q = mean(ends), mean(ends + 0.1)
    assert loss(ends + 0.1) == pytest.approx(
        2 * float((p * (p / q).log()).sum(-1).mean()), rel=1e-3
    )
    assert loss(ends.flip(0) + 0.1) == pytest.approx(loss(ends + 0.1), rel=1e-4)
    assert abs(loss(ends.flip(0))) < 1e-6 < loss(ends + 0.1)
    flow.fit(zoo, inputs=inputs, steps=2, consensus=1.0)
    assert flow.history


def test_held_out_networks_are_watched(arch):
    flow = make("balanced", arch).fit(
        toy_zoo(arch), steps=4, log_every=2, validation=toy_zoo(arch, 8, seed=1)
    )
    assert [set(r) for r in flow.history] == [{"step", "loss", "validation"}] * 2


def test_the_best_on_held_out_networks_is_kept(arch, tmp_path):
    """Also over an interruption; the network goes on, its running average goes back."""
    generator = torch.Generator().manual_seed(3)
    zoo, other = (
        SimpleNamespace(
            initial=Gaussian(0.3).sample(arch, n, generator=generator),
            final=torch.randn(n, arch.dimension, generator=generator),
        )
        for n in (2, 16)
    )  # nothing but these two can be learned
    settings = {"steps": 60, "lr": 0.01, "log_every": 5, "ema": 0.0, "schedule": "constant"}
    last = make("euclidean", arch).fit(zoo, validation=other, **settings)
    best = make("euclidean", arch).fit(zoo, validation=other, keep="best", **settings)
    assert best.history == last.history
    losses = [record["validation"] for record in best.history]
    assert min(losses) < losses[-1]
    # Stopped where the least loss was recorded, training gives the same.
    least = int(best.history[losses.index(min(losses))]["step"])
    short = make("euclidean", arch).fit(zoo, validation=other, **settings | {"steps": least})
    assert torch.equal(best.sample(3, steps=2), short.sample(3, steps=2))
    assert not torch.equal(best.sample(3, steps=2), last.sample(3, steps=2))
    folder = {"folder": tmp_path, "keep": "best", "checkpoint_every": 5}
    broken, advance = make("euclidean", arch), Trainer._advance
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_advance", lambda t: advance(t) if t.step < 52 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            broken.fit(zoo, validation=other, **settings, **folder)
    resumed = make("euclidean", arch).fit(zoo, validation=other, **settings, **folder)
    assert torch.equal(best.sample(3, steps=2), resumed.sample(3, steps=2))
    with pytest.raises(StateError, match="held-out"):
        make("euclidean", arch).fit(zoo, keep="best", steps=2)


def test_velocity_prediction_trains_and_samples(arch):
    recipe = Recipe(section="sphere", predicts="velocity", source=Gaussian(0.3))
    field = symflow.nn.RelationalTransformer(arch, **SMALL, residual=False)
    flow = Flow(arch, recipe, field)
    flow.fit(toy_zoo(arch, 64), steps=300, lr=0.01, ema=0.9, log_every=1)
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


class Still(VectorField):
    """A field of the user's without parameters."""

    def forward(self, x, t):
        return x


def test_a_field_must_be_one_for_the_architecture(unchecked):
    tanh, relu = symflow.mlp([2, 3, 2], "tanh"), symflow.mlp([2, 3, 2])
    with pytest.raises(EquivarianceError, match=r"same leaves but another symmetry.*\(arch\)"):
        symflow.flows.euclidean(tanh, field=RelationalTransformer(relu, **SMALL))
    with pytest.raises(ShapeError, match=r"other leaves or axes. Make the field of the flow's"):
        symflow.flows.euclidean(relu, field=RelationalTransformer(symflow.mlp([2, 4, 2]), **SMALL))
    with pytest.raises(ShapeError, match="VectorField, got a Linear"):
        symflow.flows.euclidean(relu, field=nn.Linear(2, 2))
    with pytest.raises(ShapeError, match=r"extra=0 .* got 1"):
        symflow.flows.euclidean(relu, field=RelationalTransformer(relu, extra=1, **SMALL))
    # One that does not say that it leaves the signs out, and one that does.
    field = RelationalTransformer(tanh, groups="permutation", **SMALL)
    assert symflow.flows.euclidean(tanh, field=field).field is field
    field.groups = None
    with pytest.raises(EquivarianceError, match="groups='permutation'"):
        symflow.flows.euclidean(tanh, field=field)


def test_a_field_without_parameters_cannot_be_trained(arch):
    flow = symflow.flows.euclidean(arch, field=Still(arch, arch.symmetry))
    with pytest.raises(StateError, match=r"the field \(Still\) has no parameters"):
        flow.fit(toy_zoo(arch), steps=1)


def test_what_is_fitted_may_be_a_sequence_of_networks(arch):
    zoo = toy_zoo(arch)
    nets = [arch.load_into(copy.deepcopy(arch.module), w) for w in zoo.final]
    for networks in (nets, [net.state_dict() for net in nets]):
        flows = [
            make("euclidean", arch, coupling=symflow.flows.Independent()).fit(w, steps=2)
            for w in (networks, zoo.final)
        ]
        assert torch.equal(*(flow.sample(2, steps=2) for flow in flows))


def test_what_is_fitted_must_be_networks(arch, unchecked):
    zoo, d = toy_zoo(arch), arch.dimension
    lost = Zoo(arch, zoo.initial, torch.full_like(zoo.final, math.nan))
    half = Zoo(arch, zoo.initial, zoo.final.index_fill(0, torch.tensor([1, 4]), math.inf))
    cases = [
        (zoo.final[0], ShapeError, rf"zoo must be a batch .* one network of shape \({d},\)"),
        (zoo.final[None], ShapeError, r"zoo must be .* got shape \(1, 24, .* or all, \w+.flatten"),
        (lost.finite(), ShapeError, r"zoo.final holds no networks.*zoo.finite\(\) is empty if"),
        (zoo.final[:0], ShapeError, "zoo holds no networks"),
        ([], ShapeError, "zoo is an empty sequence"),
        ("runs/zoo", ShapeError, r"zoo must be a zoo .* got 'runs/zoo'"),
        (None, ShapeError, "zoo must be a zoo .* got None"),
        (half, LeafError, r"zoo.final: 2 of 24 networks .* pass \w+.finite\(\)"),
        (
            SimpleNamespace(initial=zoo.initial[1:], final=zoo.final),
            ShapeError,
            r"zoo.initial \(23, .* one row for each run",
        ),
    ]
    flow = make("euclidean", arch)
    for wrong, error, message in cases:
        with pytest.raises(error, match=message):
            flow.fit(wrong, steps=1)
        if wrong is not None:  # no validation is asked for
            with pytest.raises(error, match=message.replace("zoo", "validation", 1)):
                flow.fit(zoo, steps=1, validation=wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 1.5}, "steps must be a whole number, got 1.5"),
        ({"steps": True}, "steps must be a whole number, got True"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": "8"}, "batch_size must be a whole number, got '8'"),
        ({"log_every": torch.ones(2)}, "log_every must be a whole number, got a Tensor"),
        ({"warmup": -1}, "warmup must be at least 0, got -1"),
        ({"seed": None}, "seed must be a whole number, got None"),
        ({"seed": 2**60}, "seed must be at most"),
        ({"lr": -1.0}, "lr must be a finite number of at least 0, got -1.0"),
        ({"lr": math.nan}, "lr must be a finite number of at least 0, got nan"),
        ({"lr": "0.1"}, "lr must be a finite number of at least 0, got '0.1'"),
        ({"weight_decay": math.inf}, "weight_decay must be a finite number"),
        ({"ema": 1.0}, "ema must be a finite number of at least 0 and below 1, got 1.0"),
        ({"ema": -0.1}, "ema must be a finite number of at least 0 and below 1, got -0.1"),
        ({"clip": 0.0}, "clip must be positive, got 0"),
        ({"clip": -1.0}, "clip must be a finite number of at least 0, got -1"),
        ({"behaviour": -1.0}, "behaviour must be a finite number of at least 0, got -1"),
        ({"optimizer": "lion"}, "optimizer must be one of adam, adamw, muon"),
        (
            {"step": 3, "rate": 1},
            r"unknown setting\(s\) step, rate: .* are steps, batch_size",
        ),
    ],
)
def test_a_setting_out_of_range_is_named(change, message, arch, unchecked):
    with pytest.raises(ShapeError, match=message):
        make("euclidean", arch).fit(toy_zoo(arch), **change)


def test_numbers_of_numpy_are_settings(unchecked):
    settings = FitSettings(steps=np.int64(3), lr=np.float32(0.5), clip=1)
    assert settings == FitSettings(steps=3, lr=0.5, clip=1.0)
    assert type(settings.steps) is int and type(settings.lr) is float


def test_inputs_of_the_behaviour_loss_must_be_inputs(arch, unchecked):
    good = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    flow = make("euclidean", arch)
    cases = [
        (good[:0], r"\('n', 3\) with n at least 1, got shape \(0, 3\)"),
        ([[0.0, 1.0, 2.0]], "inputs must be a tensor .* got <class 'list'>"),
        (good[:, :2], r"inputs must be inputs .*\('n', 3\), got shape \(8, 2\): it does not run"),
        (good / 0, "inputs hold 24 NaN or infinite"),
    ]
    for inputs, message in cases:
        with pytest.raises(ShapeError, match=message):
            flow.fit(toy_zoo(arch), steps=1, behaviour=1.0, inputs=inputs)
    # Stored with another shape, the inputs are what the network takes: the same flow.
    flows = [
        make("euclidean", arch).fit(toy_zoo(arch), steps=2, behaviour=1.0, inputs=x)
        for x in (good, good[:, None])
    ]
    assert flows[0].history == flows[1].history


def test_networks_that_change_their_inputs_are_given_copies():
    """A first step in place, which would do more when done twice, is as good as any other."""
    inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    before, histories = inputs.clone(), []
    for inplace in (True, False):
        first = nn.LeakyReLU(0.5, inplace=inplace)
        net = nn.Sequential(first, nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        arch = symflow.Architecture.from_module(net, torch.zeros(1, 3))
        flow = make("euclidean", arch)
        flow.fit(toy_zoo(arch), steps=2, log_every=1, behaviour=1.0, inputs=inputs)
        histories.append(flow.history)
        assert torch.equal(inputs, before)
    assert histories[0] == histories[1]


# -------------------------------------------------------------------- sampling


@pytest.fixture(scope="module")
def trained(arch):
    return {p: make(p, arch).fit(toy_zoo(arch, 64), steps=200, lr=0.01, ema=0.9) for p in PRESETS}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("solver", ["euler", "heun", "midpoint", "rk4", "dopri5", "tsit5"])
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
    away = flow.sample(6, steps=16, guidance=Guidance(loss, -0.1))  # the broken twin
    with torch.no_grad():
        assert loss(bent).mean() < loss(plain).mean() < loss(away).mean()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n": 2.0}, "n must be a whole number, got 2.0"),
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"steps": 1.5}, "steps must be a whole number, got 1.5"),
        ({"seed": None}, "seed must be a whole number, got None"),
        ({"noise": -0.1}, "noise must be a finite number of at least 0, got -0.1"),
        ({"noise": math.nan}, "noise must be a finite number of at least 0, got nan"),
        (
            {"start": torch.ones(46)},
            r"start must hold n = 2 networks \(n, D\) = \(2, 46\), got",
        ),
        ({"start": torch.ones(1, 2, 46)}, r"start must hold n = 2 .* got shape \(1, 2, 46\)"),
        ({"guidance": Guidance(lambda w: w.square().mean())}, r"\(B,\) = \(2,\), got \(\)"),
        ({"guidance": Guidance(lambda w: w[:, :1])}, r"\(B,\) = \(2,\), got \(2, 1\)"),
        ({"guidance": Guidance(lambda w: 0.5)}, r"\(B,\) = \(2,\), got float"),
    ],
)
def test_sampling_says_which_argument_is_wrong(wrong, message, trained, unchecked):
    assert trained["euclidean"].arch.dimension == 46
    with pytest.raises(ShapeError, match=message):
        trained["euclidean"].sample(**({"n": 2, "steps": 2} | wrong))


def test_samples_may_start_at_modules(trained, arch):
    start = toy_zoo(arch, 2, seed=3).initial
    nets = [arch.load_into(copy.deepcopy(arch.module), w) for w in start]
    flow = trained["euclidean"]
    assert torch.equal(flow.sample(2, steps=2, start=nets), flow.sample(2, steps=2, start=start))


def test_sampling_refuses_bad_input(trained, arch):
    flow = trained["geometric"]
    with pytest.raises(StateError, match=r"call flow.fit"):
        make("geometric", arch).sample(1)
    with pytest.raises(ShapeError, match="at least 1"):
        flow.sample(2, steps=0)
    with pytest.raises(ShapeError, match="solver must be one of"):
        flow.sample(2, solver="leapfrog")
    with pytest.raises(ShapeError, match="n = 2"):
        flow.sample(2, start=torch.ones(3, arch.dimension))
    with pytest.raises(ShapeError, match="at least 1"):
        FitSettings(steps=0)
    with pytest.raises(ShapeError, match="one of adam, adamw, muon"):
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


@pytest.mark.parametrize(
    ("preset", "optimizer"), [("geometric", "adam"), ("balanced", "adam"), ("balanced", "muon")]
)
def test_resumed_training_equals_uninterrupted(preset, optimizer, arch, tmp_path):
    zoo = toy_zoo(arch)
    settings = {"optimizer": optimizer, "steps": 10, "checkpoint_every": 4, "log_every": 3}
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


def test_a_checkpoint_belongs_to_its_data(arch, tmp_path):
    """Training on other data must not give back the flow of the first."""
    inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    good = {"zoo": toy_zoo(arch), "inputs": inputs, "validation": toy_zoo(arch, 8, seed=1)}
    other = {
        "zoo": SimpleNamespace(initial=good["zoo"].initial, final=good["zoo"].final + 1),
        "inputs": inputs + 1,
        "validation": None,
    }

    def fit(**data):
        return make("euclidean", arch).fit(**data, steps=2, behaviour=1.0, folder=tmp_path)

    first = fit(**good)
    assert torch.equal(fit(**good).sample(2, steps=2), first.sample(2, steps=2))
    for name, data in other.items():
        with pytest.raises(FileFormatError, match=rf"\({name}: there '\w+', now '\w+'\): .*folder"):
            fit(**good | {name: data})
    starts = SimpleNamespace(initial=good["zoo"].initial + 1, final=good["zoo"].final)
    with pytest.raises(FileFormatError, match="zoo: there"):
        fit(**good | {"zoo": starts})


def test_checkpoints_from_before_a_setting_are_read(arch, tmp_path):
    """Settings that are newer than a file had their defaults."""
    zoo, file = toy_zoo(arch), tmp_path / "flow.safetensors"
    first = make("euclidean", arch).fit(zoo, steps=3, folder=tmp_path)
    tensors, meta = load_tensors(file)
    assert meta["settings"].pop("keep") == "last"
    save_tensors(file, tensors, meta)
    again = make("euclidean", arch).fit(zoo, steps=3, folder=tmp_path)
    assert torch.equal(again.sample(2, steps=2), first.sample(2, steps=2))
    save_tensors(file, tensors, meta)
    with pytest.raises(FileFormatError, match="settings"):
        make("euclidean", arch).fit(zoo, steps=3, ema=0.5, folder=tmp_path)


@pytest.mark.parametrize("behaviour", [0.0, 1.0])
def test_probes_come_from_the_inputs_and_belong_to_the_flow(behaviour, arch, tmp_path):
    """With or without a behaviour loss: kept in the file, and no others are resumed with."""
    inputs = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    settings = {"steps": 3, "behaviour": behaviour, "folder": tmp_path / "fit"}
    flow = make("balanced", arch, probes=4).fit(toy_zoo(arch), inputs=inputs, **settings)
    seen = flow.average.probes.inputs
    assert len(seen) == 4 and all((row == inputs).all(1).any() for row in seen)
    flow.save(tmp_path / "flow.safetensors")
    again = load(tmp_path / "flow.safetensors")
    assert torch.equal(again.sample(2, steps=2), flow.sample(2, steps=2))
    with pytest.raises(FileFormatError, match="inputs"):
        make("balanced", arch, probes=4).fit(toy_zoo(arch), inputs=inputs + 1, **settings)
    with pytest.raises(StateError, match="pass inputs="):
        make("balanced", arch, probes=4).fit(toy_zoo(arch), steps=3)


def test_a_checkpoint_belongs_to_its_field(arch, tmp_path):
    """Weights of the same shapes do not make the same field: heads do not show in them."""
    one, two = (RelationalTransformer(arch, **(SMALL | {"heads": n})) for n in (1, 2))
    shapes = [{k: v.shape for k, v in field.state_dict().items()} for field in (one, two)]
    assert shapes[0] == shapes[1]
    flow = symflow.flows.euclidean(arch, source=Gaussian(0.3), field=one)
    flow.fit(toy_zoo(arch), steps=2, folder=tmp_path)
    with pytest.raises(FileFormatError, match=r"structure: there '\w+', now '\w+'"):
        symflow.flows.euclidean(arch, source=Gaussian(0.3), field=two).fit(
            toy_zoo(arch), steps=2, folder=tmp_path
        )
    flow.save(tmp_path / "saved.safetensors")
    again = RelationalTransformer(arch, **(SMALL | {"heads": 1}))
    loaded = load(tmp_path / "saved.safetensors", field=again)
    assert torch.equal(loaded.sample(2, steps=2), flow.sample(2, steps=2))
    with pytest.raises(FileFormatError, match=r"another RelationalTransformer .*\(such as heads\)"):
        load(tmp_path / "saved.safetensors", field=two)
    with pytest.raises(FileFormatError, match="pass field="):
        load(tmp_path / "saved.safetensors")
    # Files from before fields were told apart are read as they were.
    tensors, meta = load_tensors(tmp_path / "saved.safetensors")
    del meta["structure"]
    save_tensors(tmp_path / "old.safetensors", tensors, meta)
    old = load(tmp_path / "old.safetensors", field=again)
    assert torch.equal(old.sample(2, steps=2), flow.sample(2, steps=2))


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
