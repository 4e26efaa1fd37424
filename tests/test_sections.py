"""One point on each orbit: sphere and balanced sections."""

import pytest
import torch
from torch import nn

import symflow
from symflow.errors import (
    ConvergenceError,
    DeadNeuronWarning,
    LeafError,
    NotIsometricError,
    ShapeError,
)
from symflow.sections import (
    BalancedSection,
    FlatSection,
    Section,
    SphereSection,
    unit_coordinates,
)
from symflow.testing import concrete_classes, section_laws

# Every section of symflow, found by walking subclasses; one without a strategy fails here.
CLASSES = concrete_classes(Section, "symflow.sections")
LAWS = [pytest.param(x, id=f"{cls.__name__}-{x}") for cls in CLASSES for x in section_laws(cls)]

SECTIONS = {
    "balanced": BalancedSection,
    "sphere": SphereSection,
    "apart": lambda arch: SphereSection(arch, bias="apart"),
}


@pytest.mark.parametrize("law", LAWS)
def test_law(law):
    law.check()


def scales_only(arch, generator, like, batch=()):
    g = arch.symmetry.random(generator=generator, like=like, batch=batch)
    still = arch.symmetry.compact.identity(like=like)
    return {
        k: (_batched(still[k], batch), v[1]) if isinstance(v, tuple) else v for k, v in g.items()
    }


def _batched(element, batch):
    if isinstance(element, tuple):
        return tuple(_batched(e, batch) for e in element)
    return element.expand(*batch, *element.shape)


def networks(arch, generator, n=5):
    w = torch.randn(n, arch.dimension, generator=generator, dtype=torch.float64)
    for leaf in arch.leaves:
        if leaf.name.endswith("running_var"):
            w[:, leaf.span] = w[:, leaf.span].exp()
    return w


ARCHITECTURES = {
    "mlp": lambda: symflow.mlp([3, 5, 4, 4, 2]),
    "leaky": lambda: symflow.mlp([3, 5, 2], "leaky_relu"),
    "linear": lambda: symflow.mlp([3, 4, 3, 2], "identity"),
    "norm": lambda: symflow.mlp([3, 5, 4, 2], batch_norm=True),
    "no bias": lambda: symflow.mlp([3, 5, 4, 2], bias=False),
    "prelu": lambda: symflow.Architecture.from_module(
        nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 2)), torch.zeros(1, 3)
    ),
    "repeat": lambda: symflow.Architecture.from_module(
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)),
        torch.zeros(1, 2, 3),
    ),
}


def inputs(name, generator):
    shape = (7, 2, 3) if name == "repeat" else (7, 3)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kind", SECTIONS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_section_laws(kind, name, generator):
    """Function kept, idempotent, constant on scaling orbits, covariant under permutations."""
    arch = ARCHITECTURES[name]()
    section = SECTIONS[kind](arch)
    w, x = networks(arch, generator), inputs(name, generator)
    point = section.project(w)
    before = arch.apply(w, x)
    assert torch.allclose(arch.apply(point, x), before, rtol=1e-9, atol=1e-9 * before.abs().max())
    assert torch.allclose(section.project(point), point, rtol=1e-9, atol=1e-10)
    g = scales_only(arch, generator, w, (5,))
    assert torch.allclose(section.project(arch.symmetry.act(g, w)), point, rtol=1e-8, atol=1e-10)
    k = section.symmetry.random(generator=generator, like=w)
    moved = section.project(section.symmetry.act(k, w))
    assert torch.allclose(moved, section.symmetry.act(k, point), rtol=1e-9, atol=1e-10)
    assert section.manifold.check_point_on_manifold(point)


def test_a_scale_that_is_no_symmetry_moves_the_section(generator):
    """The broken twin of the orbit law: scaling only the incoming weights must show."""
    arch = symflow.mlp([3, 5, 2])
    w = networks(arch, generator)
    rows = unit_coordinates(arch, "h1", 1)
    broken = w.clone()
    broken[:, rows.reshape(-1)] *= 2
    for kind in SECTIONS.values():
        assert not torch.allclose(kind(arch).project(broken), kind(arch).project(w), rtol=0.01)


def test_balanced_has_least_norm(generator):
    arch = symflow.mlp([3, 5, 4, 2])
    w = networks(arch, generator, 1)
    best = BalancedSection(arch).project(w).norm()
    rivals = arch.symmetry.act(scales_only(arch, generator, w, (200,)), w[0])
    assert (rivals.norm(dim=-1) >= best).all()


def test_balanced_norms_agree_unit_by_unit(generator):
    arch = symflow.mlp([3, 5, 4, 2])
    w = BalancedSection(arch).project(networks(arch, generator))
    for axis in ("h1", "h2"):
        into = w[:, unit_coordinates(arch, axis, 1)].norm(dim=-1)
        out = w[:, unit_coordinates(arch, axis, -1)].norm(dim=-1)
        assert torch.allclose(into, out, rtol=1e-10)


def test_squared_relu_balances_with_its_degree(generator):
    class Squared(nn.Module):
        def forward(self, x):
            return torch.relu(x) ** 2

    symflow.arch.rule(Squared, symflow.arch.Activation(homogeneous=2))
    arch = symflow.Architecture.from_module(
        nn.Sequential(nn.Linear(3, 4), Squared(), nn.Linear(4, 2)), torch.zeros(1, 3)
    )
    w = BalancedSection(arch).project(networks(arch, generator))
    into = w[:, unit_coordinates(arch, "h1", 1)].norm(dim=-1)
    out = w[:, unit_coordinates(arch, "h1", -2)].norm(dim=-1)
    assert torch.allclose(into, 2**0.5 * out, rtol=1e-10)


def test_sphere_rows_are_unit_and_the_last_layer_has_radius_root_c(generator):
    arch = symflow.mlp([3, 5, 4, 10])
    section = SphereSection(arch, preserves="argmax")
    w = networks(arch, generator)
    point, removed = section.split(w)
    for axis in ("h1", "h2"):
        assert torch.allclose(
            point[:, unit_coordinates(arch, axis, 1)].norm(dim=-1), torch.ones(()).double()
        )
    last = torch.cat([point[:, arch.leaf(name).span] for name in arch.output], dim=-1)
    assert torch.allclose(last.norm(dim=-1), torch.full((5,), 10**0.5).double())
    x = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    logits, scaled = arch.apply(w, x), arch.apply(point, x)
    assert torch.equal(logits.argmax(-1), scaled.argmax(-1))
    assert not torch.allclose(logits, scaled)
    assert torch.allclose(scaled * removed.exp()[..., None], logits)
    assert torch.allclose(arch.apply(section.join(point, removed), x), logits)


@pytest.mark.parametrize("kind", SECTIONS)
def test_dead_neurons_are_counted_and_put_to_zero(kind, generator):
    arch = symflow.mlp([3, 5, 2])
    w = networks(arch, generator, 1)[0]
    w[unit_coordinates(arch, "h1", 1)[2]] = 0  # nothing comes in
    x = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    section = SECTIONS[kind](arch)
    with pytest.warns(DeadNeuronWarning, match="1 dead") as caught:
        point = section.project(w)
    assert caught[0].message.count == 1
    assert point.isfinite().all()
    assert (point[unit_coordinates(arch, "h1", -1)[2]] == 0).all()
    assert torch.allclose(arch.apply(point, x), arch.apply(w, x))


def test_a_unit_that_sends_nothing_kills_the_units_that_only_feed_it():
    arch = symflow.mlp([1, 1, 1, 1], bias=False)
    w = torch.tensor([2.0, 3.0, 0.0])
    with pytest.warns(DeadNeuronWarning, match="2 dead"):
        assert torch.equal(BalancedSection(arch).project(w), torch.zeros(3))


def test_a_zero_row_with_a_bias_is_harmless_jointly():
    arch = symflow.mlp([2, 1, 1])
    w = torch.tensor([0.0, 0.0, 2.0, 3.0, 1.0], dtype=torch.float64)  # rows, bias, out, bias
    wanted = torch.tensor([0.0, 0.0, 1.0, 6.0, 1.0], dtype=torch.float64)
    order = torch.cat([torch.arange(arch.dimension)[leaf.span] for leaf in arch.leaves])
    assert torch.equal(order, torch.arange(5))
    assert torch.allclose(SphereSection(arch).project(w), wanted)


def test_a_zero_row_with_a_bias_keeps_its_function_apart():
    """The unit is the constant relu(2) = 2: its bias goes to norm one, its outgoing weight to 6."""
    section = SphereSection(symflow.mlp([1, 1, 1]), bias="apart")
    w = torch.tensor([0.0, 2.0, 3.0, 1.0], dtype=torch.float64)  # row, bias, out, bias
    wanted = torch.tensor([0.0, 1.0, 6.0, 1.0], dtype=torch.float64)
    assert torch.equal(section.project(w), wanted)
    assert section.manifold.check_point_on_manifold(wanted)


def tied():
    again = nn.Linear(3, 3)
    net = nn.Sequential(
        *(nn.Linear(2, 3), nn.ReLU(), again, nn.ReLU(), again, nn.ReLU(), nn.Linear(3, 2))
    )
    return symflow.Architecture.from_module(net, torch.zeros(1, 2))


def test_an_axis_that_leads_to_itself_balances_but_has_no_sphere_section(generator):
    arch = tied()
    section, w = BalancedSection(arch), networks(arch, generator)
    x, point = torch.randn(7, 2, generator=generator, dtype=torch.float64), section.project(w)
    assert torch.allclose(arch.apply(point, x), arch.apply(w, x))
    assert torch.allclose(section.project(point), point)
    moved = arch.symmetry.act(scales_only(arch, generator, w, (5,)), w)
    assert torch.allclose(section.project(moved), point)
    with pytest.raises(LeafError, match=r"'2.weight' leads from axis h1 to h1.*'balanced'"):
        SphereSection(arch)


def test_without_scales_every_point_is_balanced(generator):
    arch = symflow.mlp([2, 3, 2], "tanh")
    section, w = BalancedSection(arch), networks(arch, generator)
    assert torch.equal(section.project(w), w)
    assert section.manifold.check_point_on_manifold(w)


@pytest.mark.parametrize("kind", SECTIONS)
def test_gradients_reach_the_weights(kind, generator):
    arch = symflow.mlp([2, 3, 2])
    w = torch.randn(arch.dimension, generator=generator, dtype=torch.float64, requires_grad=True)
    section = SECTIONS[kind](arch)
    assert torch.autograd.gradcheck(lambda w: section.project(w)[:4], (w,), atol=1e-4)


def test_scales_far_apart_still_balance():
    arch = symflow.mlp([2, 3, 3, 2])
    w = torch.randn(arch.dimension, generator=torch.Generator().manual_seed(0)).double()
    w[arch.leaf("0.weight").span] *= 1e12
    point = BalancedSection(arch).project(w)
    assert point.isfinite().all()
    assert BalancedSection(arch).manifold.check_point_on_manifold(point)
    assert issubclass(ConvergenceError, RuntimeError)


def test_bad_choices_say_what_to_do():
    relu = symflow.mlp([2, 3, 2])
    with pytest.raises(NotIsometricError, match="choose section='balanced'"):
        FlatSection(relu)
    assert FlatSection(relu, isometric_only=False).manifold.name == "Flat"
    with pytest.raises(ShapeError, match="'joint' or 'apart'"):
        SphereSection(relu, bias="none")
    soft = symflow.Architecture.from_module(
        nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2), nn.Softmax(-1)),
        torch.zeros(1, 2),
    )
    with pytest.raises(LeafError, match="does not end with a linear map"):
        SphereSection(soft, preserves="argmax")
