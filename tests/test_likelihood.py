"""Densities of flows, against fields whose flow is known in closed form."""

import itertools
import math
from typing import ClassVar

import pytest
import torch
from scipy.special import kve
from torch import nn

import symflow
from symflow.errors import LeafError, ShapeError, StateError
from symflow.flows import FanIn, Flow, Gaussian, GeodesicPath, Independent, Recipe, load
from symflow.flows.likelihood import beside, divergence
from symflow.flows.prior import source_log_prob
from symflow.flows.solve import integrate
from symflow.manifolds import Flat, SphereProduct
from symflow.nn import VectorField

STD = 0.7


class Given(VectorField):
    """A field that is a function which a test gives."""

    function: ClassVar[dict] = {}

    def __init__(self, arch, act, extra=0):
        VectorField.__init__(self, arch, arch.symmetry.compact, extra=extra)
        self.act = act
        self.idle = nn.Parameter(torch.zeros(()))
        self.double()

    def forward(self, x, t):
        return self.act(x, t[:, None])


def hand_made(arch, act, *, predicts="velocity", section="flat", preserves="function", std=STD):
    recipe = Recipe(
        section=section,
        preserves=preserves,
        path=GeodesicPath(),
        coupling=Independent(),
        source=Gaussian(std),
        predicts=predicts,
        project_end=section != "flat",
    )
    flow = Flow(arch, recipe, Given(arch, act, int(preserves == "argmax")))
    flow.history = [{"step": 1.0, "loss": 0.0}]
    return flow


def normal(x, mean, std):
    return torch.distributions.Normal(mean, std).log_prob(x).sum(-1)


def weights(arch, n=5, std=STD, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Gaussian(std).sample(arch, n, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def arch():
    return symflow.mlp([2, 3, 2])


# -------------------------------------------------------------------- flat space


def test_a_constant_field_moves_the_density(arch):
    flow = hand_made(arch, lambda x, t: torch.full_like(x, 0.3))
    w = weights(arch)
    assert torch.allclose(flow.log_prob(w, steps=3), normal(w, 0.3, STD), atol=1e-10)
    assert torch.allclose(flow.log_prob(w, steps=3, until=0.5), normal(w, 0.15, STD), atol=1e-10)
    one = flow.log_prob(w[0], steps=3)
    assert one.shape == () and torch.allclose(one, flow.log_prob(w, steps=3)[0])


@pytest.mark.parametrize("solver", ["rk4", "heun", "dopri5"])
@pytest.mark.parametrize("kind", ["exact", "hutchinson"])
def test_a_linear_field_scales_the_density(solver, kind, arch):
    """x' = a x: Hutchinson's estimate with signs is exact for a diagonal Jacobian."""
    a = torch.linspace(-1, 1, arch.dimension, dtype=torch.float64)
    flow = hand_made(arch, lambda x, t: a * x)
    w = weights(arch)
    found = flow.log_prob(w, steps=40, solver=solver, divergence=kind, probes=2)
    close = {"rk4": 1e-6, "heun": 5e-3, "dopri5": 5e-3}[solver]
    assert torch.allclose(found, normal(w, 0.0, STD * a.exp()), atol=close)


def test_an_end_prediction_between_gaussians(arch):
    """Starts N(0, s^2), ends N(m, r^2): p_t is N(t m, (1 - t)^2 s^2 + t^2 r^2)."""
    m, r = 0.4, 0.2

    def act(x, t):
        variance = (1 - t) ** 2 * STD**2 + t**2 * r**2
        end = m + t * r**2 / variance * (x - t * m)
        return x + (end - x) / (1 - t)  # end predictions are x + (1 - t)(output - x)

    flow = hand_made(arch, act, predicts="end")
    w = m + r * weights(arch, std=1.0)
    for t, options in ((1 - 1 / 64, {}), (0.5, {"until": 0.5})):
        spread = math.sqrt((1 - t) ** 2 * STD**2 + t**2 * r**2)
        found = flow.log_prob(w, steps=64, solver="rk4", **options)
        assert torch.allclose(found, normal(w, t * m, spread), atol=1e-5)
    with pytest.raises(ShapeError, match="below 1, where a predicted end"):
        flow.log_prob(w, until=1.0)
    with pytest.raises(ShapeError, match="steps must be at least 2, got 1"):
        flow.log_prob(w, steps=1)


def test_hutchinson_has_no_bias_and_is_seeded(arch):
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(17, 17, generator=generator, dtype=torch.float64) / 8
    flow = hand_made(arch, lambda x, t: x @ matrix)
    w = weights(arch, 3)
    exact = flow.log_prob(w, steps=6, solver="rk4")
    options = {"steps": 6, "solver": "rk4", "divergence": "hutchinson"}
    few, many = (
        torch.stack([flow.log_prob(w, probes=n, seed=k, **options) for k in range(4)])
        for n in (4, 1000)
    )
    assert torch.equal(few[0], flow.log_prob(w, probes=4, seed=0, **options))
    assert (few[0] != few[1]).all()
    assert (many - exact).abs().max() < 0.3 < (few - exact).abs().max()
    assert (many.mean(0) - exact).abs().max() < 0.15


# -------------------------------------------------------------------- the sphere


def chi_product(radius, m, n, s):
    """Log-density of the product of s chi_m and s chi_n (Springer, 1979), by Bessel functions."""
    z = radius.numpy() / s**2
    order = (m - n) / 2
    bessel = torch.as_tensor(kve(order, z)).log() - torch.as_tensor(z)
    half = (m + n) / 2
    return (
        (half - 1) * torch.as_tensor(z).log()
        + bessel
        - (half - 2) * math.log(2)
        - math.lgamma(m / 2)
        - math.lgamma(n / 2)
        - 2 * math.log(s)
    )


def area(n):
    """Log of the area of the unit sphere in R^n."""
    return math.log(2) + n / 2 * math.log(math.pi) - math.lgamma(n / 2)


def sphere_source(flow, w):
    """Directions are uniform; outgoing columns too, with lengths chi times chi."""
    arch = flow.arch
    leaves = {k: v.double() for k, v in arch.unflatten(flow.section.project(w)).items()}
    columns, bias = leaves["2.weight"].mT, leaves["2.bias"]
    c, n = columns.shape[-1], columns.shape[-2]
    m = arch.leaf("0.weight").shape[1] + 1
    length = columns.norm(dim=-1)
    each = chi_product(length, m, c, STD) - area(c) - (c - 1) * length.log()
    return each.sum(-1) - n * area(m) + normal(bias, 0.0, STD)


@pytest.mark.parametrize("sizes", [(2, 3, 2), (4, 3, 1), (1, 2, 5)])
def test_the_source_on_the_sphere_section_by_bessel_functions(sizes):
    arch = symflow.mlp(list(sizes))
    flow = hand_made(arch, lambda x, t: 0 * x, section="sphere")
    w = weights(arch)
    found = source_log_prob(flow, flow.encode(w))
    assert torch.allclose(found, sphere_source(flow, w), atol=1e-9)


def test_rayleigh_times_normal_is_laplace():
    """The one case that is elementary: f(c) = exp(-|c| / s^2) / (2 s^2)."""
    arch = symflow.mlp([1, 1, 1])
    flow = hand_made(arch, lambda x, t: 0 * x, section="sphere")
    x = flow.encode(weights(arch, 6))
    truth = -math.log(2 * math.pi) - x[:, 2].abs() / STD**2 - math.log(2 * STD**2)
    assert torch.allclose(source_log_prob(flow, x), truth + normal(x[:, 3:], 0.0, STD), atol=1e-10)


def test_the_temperature_is_part_of_the_density():
    """Last layer and its scale: the state's density times the change of volume, numerically."""
    arch = symflow.mlp([2, 3, 2])
    plain = hand_made(arch, lambda x, t: 0 * x, section="sphere")
    flow = hand_made(arch, lambda x, t: 0 * x, section="sphere", preserves="argmax")
    w = weights(arch, 3)
    x = flow.encode(w)
    found = source_log_prob(flow, x) - source_log_prob(plain, plain.encode(w))
    last = torch.cat([torch.arange(arch.leaf(n).span.start, arch.leaf(n).span.stop)
                      for n in arch.output])  # fmt: skip

    def join(y):
        return flow.section.join(y[:-1], y[-1:])[last]

    for state, change in zip(x, found, strict=True):
        jacobian = torch.autograd.functional.jacobian(join, state)
        theta = state[last] / state[last].norm()
        basis = torch.linalg.svd(theta[None], full_matrices=True).Vh[1:]
        columns = torch.cat([jacobian[:, last] @ basis.T, jacobian[:, -1:]], dim=1)
        assert torch.allclose(torch.linalg.det(columns).abs().log(), change, atol=1e-8)


def test_the_source_integrates_to_one():
    """The mean of q / p over samples of p is one: the quadrature has the right normalisation."""
    arch = symflow.mlp([2, 2, 1])
    flow = hand_made(arch, lambda x, t: 0 * x, section="sphere", preserves="argmax", std=STD)
    other = hand_made(arch, lambda x, t: 0 * x, section="sphere", preserves="argmax", std=0.6)
    x = flow.encode(weights(arch, 20_000))
    ratio = (source_log_prob(other, x) - source_log_prob(flow, x)).exp()
    assert abs(float(ratio.mean()) - 1) < 0.02 and ratio.std() > 0.1


def test_a_rotation_keeps_the_density(arch):
    """A Killing field has no divergence: p_1(x) = p_0(x rotated back), uniform in the rows."""
    skew = torch.tensor([[0.0, 1.0, -0.5], [-1.0, 0.0, 2.0], [0.5, -2.0, 0.0]]).double()
    rows = symflow.sections.unit_coordinates(arch, "h1", 1)

    def act(x, t):
        v = torch.zeros_like(x)
        v[:, rows] = x[:, rows] @ skew
        return v

    flow = hand_made(arch, act, section="sphere")
    w = weights(arch)
    before = source_log_prob(flow, flow.encode(w))
    for kind in ("exact", "hutchinson"):
        found = flow.log_prob(w, steps=20, solver="rk4", divergence=kind)
        assert torch.allclose(found, before, atol=1e-7)


@pytest.mark.parametrize("solver", ["euler", "heun", "rk4"])
def test_a_gradient_field_on_the_sphere(solver, arch):
    """v = P a flows x to the pole: tan(theta / 2) shrinks by e^-|a|, areas by (sin / sin)^(n-1)."""
    a = 1.3 * torch.nn.functional.normalize(torch.tensor([1.0, 2.0, -1.0]).double(), dim=0)
    rows = symflow.sections.unit_coordinates(arch, "h1", 1)

    def act(x, t):
        v = torch.zeros_like(x)
        v[:, rows] = a.expand(len(x), 3, 3)
        return v

    flow = hand_made(arch, act, section="sphere")
    w = weights(arch)
    theta = (flow.encode(w)[:, rows] @ a / 1.3).acos()
    start = 2 * torch.atan((theta / 2).tan() * math.exp(1.3))
    gain = 2 * (start.sin() / theta.sin()).log().sum(-1)  # rows are on S^2: n - 1 = 2
    truth = source_log_prob(flow, flow.encode(w)) + gain
    steps = 600 if solver == "euler" else 60
    found = flow.log_prob(w, steps=steps, solver=solver)
    assert gain.abs().min() > 0.05
    assert torch.allclose(found, truth, atol={"euler": 0.02, "heun": 2e-3, "rk4": 1e-6}[solver])


def test_the_divergence_is_the_one_of_the_manifold():
    """Of x -> P A x on S^2 it is tr A - 3 <x, A x>; in ambient space it would be tr A."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    space = SphereProduct(5, [torch.tensor([[0, 1, 2]])], [2.0])
    x = space.projx(torch.randn(4, 5, generator=generator, dtype=torch.float64))

    def act(t, x):
        return space.proju(x, torch.cat([x[:, :3] @ matrix.T, 2 * x[:, 3:]], dim=-1))

    v, found = divergence(act, space, torch.zeros(()), x)
    p = x[:, :3]
    truth = matrix.trace() - 3 * ((p @ matrix.T) * p).sum(-1) / 4 + 4
    assert torch.allclose(v, act(None, x)) and torch.allclose(found, truth)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=5))).double()
    mean = divergence(act, space, torch.zeros(()), x, signs[:, None].expand(-1, 4, -1))[1]
    assert torch.allclose(mean, truth)  # all probes at once: the expectation


def test_beside_appends_a_flat_coordinate(generator):
    space = SphereProduct(7, [torch.tensor([[0, 2], [3, 5]])], [1.5], counted=6)
    x, u = (torch.randn(3, 7, generator=generator) for _ in range(2))
    x = space.projx(x)
    more = beside(space)
    one = torch.ones(3, 1)
    together = more.retr(torch.cat([x, one], -1), more.proju(torch.cat([x, one], -1),
                                                             torch.cat([u, one], -1)))  # fmt: skip
    assert torch.allclose(together[:, :-1], space.retr(x, space.proju(x, u)))
    assert torch.equal(together[:, -1:], 2 * one)
    cone = symflow.Quotient(symflow.mlp([2, 3, 2]), section="balanced").manifold
    with pytest.raises(ShapeError, match="flat space and spheres, got BalancedCone"):
        beside(cone)


@pytest.mark.parametrize("space", [Flat(3), SphereProduct(3, [torch.tensor([[0, 1, 2]])])])
@pytest.mark.parametrize(
    ("solver", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2), ("rk4", 4)]
)
def test_solvers_have_their_order(solver, order, space):
    """Of a field that changes with the time: halving the step divides the error by 2^order."""
    a = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    x = space.projx(torch.tensor([[0.5, 1.0, 0.2]], dtype=torch.float64))

    def act(t, x):
        return space.proju(x, (1 + t) * a + x.roll(1, -1).sin())

    def run(n, solver):
        *_, last = integrate(space, act, x, torch.linspace(0, 1, n + 1).double(), solver)
        return last

    truth = run(512, "rk4")
    errors = [float((run(n, solver) - truth).norm()) for n in (16, 32, 64)]
    for coarse, fine in itertools.pairwise(errors):
        assert abs(math.log2(coarse / fine) - order) < 0.25


# -------------------------------------------------------------------- trained flows


SMALL = {"width": 16, "depth": 1, "heads": 2, "edge_width": 8}


@pytest.mark.parametrize("preset", ["euclidean", "geometric"])
def test_trained_flows_prefer_their_own_networks(preset, arch, tmp_path):
    generator = torch.Generator().manual_seed(0)
    zoo = 0.1 * torch.randn(64, arch.dimension, generator=generator) + torch.linspace(0.5, 1, 17)
    flow = getattr(symflow.flows, preset)(
        arch, source=Gaussian(0.5), coupling=Independent(), **SMALL
    )
    with pytest.raises(StateError, match="not trained"):
        flow.log_prob(zoo)
    flow.fit(zoo, steps=300, lr=0.01, ema=0.9)
    with torch.no_grad():
        own, foreign = flow.sample(6, steps=8), Gaussian(0.5).sample(arch, 6, generator=generator)
    found = flow.log_prob(own, steps=8), flow.log_prob(foreign, steps=8)
    assert found[0].dtype == torch.float32
    assert found[0].min() > found[1].max() + 5
    # Neither the order of the neurons nor a file changes it.
    order = torch.tensor([2, 0, 1])
    leaves = arch.unflatten(own)
    leaves["0.weight"], leaves["0.bias"] = leaves["0.weight"][:, order], leaves["0.bias"][:, order]
    leaves["2.weight"] = leaves["2.weight"][..., order]
    moved = torch.cat([leaves[x.name].flatten(1) for x in arch.leaves], dim=-1)
    assert not torch.equal(moved, own)
    assert torch.allclose(flow.log_prob(moved, steps=8), found[0], atol=1e-2)
    flow.save(tmp_path / "flow.safetensors")
    again = load(tmp_path / "flow.safetensors")
    assert torch.equal(again.log_prob(own, steps=8), found[0])


def test_trained_densities_integrate_to_one():
    """The mean of p / q over draws of q, the source itself, whose density is known."""
    arch = symflow.mlp([1, 2, 1])
    generator = torch.Generator().manual_seed(0)
    w = 0.4 * torch.randn(64, arch.dimension, generator=generator)
    w = w + torch.tensor([0.3, -0.2, 0.4, 0.0, -0.3, 0.2, 0.1])
    field = symflow.nn.RelationalTransformer(arch, **SMALL).double()
    parts = {"source": Gaussian(0.5), "coupling": Independent(), "field": field}
    flow = symflow.flows.euclidean(arch, **parts).fit(w, steps=60, lr=0.01, ema=0.9)
    draws = Gaussian(0.5).sample(arch, 1000, generator=generator, dtype=torch.float64)
    found = flow.log_prob(draws, steps=8, until=0.5) - source_log_prob(flow, draws)
    ratio = found.exp()
    error = float(ratio.std() / len(ratio) ** 0.5)
    assert ratio.std() > 1 and error < 0.1  # far from the source
    assert abs(float(ratio.mean()) - 1) < 3 * error


def test_unknown_densities_are_refused(arch):
    deep, normed = symflow.mlp([2, 3, 3, 2]), symflow.mlp([2, 3, 2], batch_norm=True)
    coordinates = symflow.arch.InputCoordinates.of_inputs(arch, torch.randn(9, 2), rank=1)
    cases = [
        (symflow.flows.euclidean(arch, source=FanIn(), **SMALL), r"got FanIn\(\): use source=G"),
        (symflow.flows.geometric(deep, **SMALL), r"leaf '2.weight' lies between two layers"),
        (symflow.flows.balanced(arch, **SMALL), "section 'balanced' is not known in Flat"),
        (symflow.flows.normalized(arch, **SMALL), "section 'sphere' is not known in Flat"),
        (symflow.flows.euclidean(normed, **SMALL), "leaf '1.weight' at fixed values"),
        (
            symflow.flows.euclidean(arch, coordinates=coordinates, **SMALL),
            "without coordinates=",
        ),
    ]
    for flow, message in cases:
        flow.history = [{}]
        with pytest.raises(StateError, match=message):
            flow.log_prob(torch.randn(2, flow.arch.dimension))
    # Without scales the balanced section is flat space.
    tanh = symflow.mlp([2, 3, 2], "tanh")
    flow = symflow.flows.balanced(tanh, source=Gaussian(STD), groups="permutation", **SMALL)
    flow.history = [{}]
    w = weights(tanh).float()
    assert torch.allclose(flow.log_prob(w, steps=3), normal(w, 0.0, STD), atol=1e-4)


def test_log_prob_says_which_argument_is_wrong(arch):
    flow = hand_made(arch, lambda x, t: x)
    w = weights(arch)
    cases = [
        ({"divergence": "none"}, r"divergence must be one of \('exact', 'hutchinson'\), got"),
        ({"solver": "leapfrog"}, "solver must be one of"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"probes": 0}, "probes must be at least 1"),
        ({"until": 1.5}, "until must be a time above 0 and at most 1, got 1.5"),
        ({"until": 0.0}, "until must be a time above 0"),
    ]
    for wrong, message in cases:
        with pytest.raises(ShapeError, match=message):
            flow.log_prob(w, **wrong)
    dead = hand_made(arch, lambda x, t: x, section="sphere")
    w = w.clone()
    w[1, symflow.sections.unit_coordinates(arch, "h1", 1)[2]] = 0
    with (
        pytest.warns(symflow.errors.DeadNeuronWarning),
        pytest.raises(LeafError, match=r"1 unit\(s\) have no incoming"),
    ):
        dead.log_prob(w, steps=2)
