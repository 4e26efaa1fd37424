"""Extreme scales, empty batches, and what is refused: what an adversarial reading of it found."""

import warnings

import jaxtyping
import pytest
import torch
from torch import nn

import symflow
from symflow.arch import scale_coordinates
from symflow.errors import DeadNeuronWarning, LeafError, ShapeError, SymflowWarning
from symflow.manifolds import Flat, SphereProduct
from symflow.numerics import angle, norm, power_of_two, tolerance, unit
from symflow.quotient import frechet_mean
from symflow.sections import BalancedSection, FlatSection, SphereSection

ARCH = symflow.mlp([3, 5, 4, 2])
SECTIONS = {"sphere": SphereSection, "balanced": BalancedSection}


def weights(arch=ARCH, n=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, arch.dimension, generator=generator, dtype=torch.float64).to(dtype)


def scaled(w, factor, *axes):
    """Move ``w`` along its orbit: the units of some axes times ``factor``, computed in float64."""
    scales = {a: torch.full((ARCH.symmetry[a].size,), factor, dtype=torch.float64) for a in axes}
    factors = scale_coordinates(ARCH.leaves, scales)
    assert factors is not None
    return (w.double() * factors).to(w.dtype)


@pytest.fixture
def unchecked(monkeypatch):
    """Without the annotations' check, as users run it: the library's own errors are seen."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


# ---------------------------------------------------------------- norms


# Far outside of where squares can be represented, subnormal numbers included.
EXTREMES = {
    torch.float32: [1e-42, 1e-25, 1.0, 1e20, 5e37],
    torch.float64: [1e-310, 1e-170, 1.0, 1e160, 1e307],
}


def test_norms_are_right_wherever_they_can_be_represented(dtype):
    rows = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0]], dtype=dtype)
    for factor in EXTREMES[dtype]:
        length = norm(rows * factor)
        wanted = torch.tensor([5.0, 0.0], dtype=dtype) * factor
        near = 1e-2 if factor in (1e-42, 1e-310) else 4 * tolerance(dtype).eps  # few digits left
        assert torch.allclose(length, wanted, rtol=near, atol=0)
        assert torch.allclose(unit(rows * factor)[0], rows[0] / 5, rtol=near)
        assert (unit(rows * factor)[1] == 0).all()
        assert torch.equal(norm(rows * factor, keepdim=True), length[:, None])
        if factor != 1:  # the broken twin: the plain norm over- or underflows
            plain = torch.linalg.vector_norm(rows[0] * factor)
            assert not torch.allclose(plain, wanted[0], rtol=near, atol=0)


def test_gradients_of_norms_are_finite_and_zero_at_zero(dtype):
    for factor in EXTREMES[dtype][1:]:
        x = (torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=dtype) * factor).requires_grad_()
        (slope,) = torch.autograd.grad(norm(x).sum(), x)
        assert torch.allclose(slope, torch.tensor([[0.6, 0.8], [0.0, 0.0]], dtype=dtype))
        turn = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=dtype) * min(factor, 1)
        (slope,) = torch.autograd.grad((unit(x) * turn).sum(), x)
        wanted = torch.tensor([0.64, -0.48], dtype=dtype) / 5  # its tangent part over the norm
        assert torch.allclose(slope[0] * max(factor, 1), wanted)


def test_a_power_of_two_rounds_nothing(dtype, generator):
    x = torch.randn(50, 7, generator=generator, dtype=dtype) * 1e-3
    factor = power_of_two(x)
    assert torch.equal(x * factor / factor, x)
    assert (torch.frexp(factor).mantissa == 0.5).all()
    top = (x * factor).abs().amax(-1)
    assert ((top >= 0.5) & (top < 1)).all()


def test_norms_of_no_numbers_and_of_none(dtype):
    assert norm(torch.zeros(4, 0, dtype=dtype)).tolist() == [0] * 4
    assert unit(torch.zeros(0, 4, dtype=dtype)).shape == (0, 4)
    assert not norm(torch.tensor([[torch.nan, 1.0]], dtype=dtype)).isfinite().any()


# ---------------------------------------------------------------- scales of units


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.parametrize("axes", [("h1",), ("h2",), ("h1", "h2")], ids=" ".join)
def test_sections_are_constant_over_hundreds_of_orders_of_magnitude(name, axes, dtype):
    section, w = SECTIONS[name](ARCH), weights(dtype=dtype)
    wanted = section.project(w)
    for factor in (1e-25, 1e20) if dtype == torch.float32 else (1e-170, 1e160):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # no unit is dead
            found = section.project(scaled(w, factor, *axes))
        assert torch.allclose(found, wanted, rtol=tolerance(dtype).close, atol=1e-6)
        assert found.dtype == dtype


@pytest.mark.parametrize("name", SECTIONS)
def test_gradients_go_through_extreme_scales(name):
    """The gradient at s . w is that at w, divided by s (chain rule on a constant function)."""
    section, w = SECTIONS[name](ARCH), weights()
    weighting = weights(seed=1)
    slopes = []
    for x in (w, scaled(w, 1e160, "h1")):
        x = x.clone().requires_grad_()
        slopes.append(torch.autograd.grad((section.project(x) * weighting).sum(), x)[0])
    assert torch.allclose(scaled(slopes[1], 1e160, "h1"), slopes[0], rtol=1e-6, atol=1e-9)


def test_a_whole_network_of_tiny_weights_is_balanced():
    """All weights times c: so is the balanced point, in spite of squares that underflow."""
    arch = symflow.mlp([3, 5, 2], bias=False)
    section, w = BalancedSection(arch), weights(arch)
    assert torch.allclose(section.project(w * 1e-200) * 1e200, section.project(w))


def test_a_unit_much_smaller_than_others_is_not_dead():
    arch = symflow.mlp([1, 2, 1], bias=False)
    w = torch.tensor([1.0, 1e-250, 1.0, 1e-250], dtype=torch.float64)  # two rows, two columns
    assert torch.equal(BalancedSection(arch).project(w), w)
    w[1] = 0
    with pytest.warns(DeadNeuronWarning, match="1 dead"):
        assert BalancedSection(arch).project(w).tolist() == [1, 0, 1, 0]


def test_other_scales_in_between_may_be_out_of_range():
    """Rows of norm 1e30 twice: float32 holds the ends, but not their product on the way."""
    arch = symflow.mlp([1, 1, 1, 1], bias=False)
    w = torch.tensor([1e30, 1e30, 1e-30])
    assert torch.allclose(SphereSection(arch).project(w), torch.tensor([1.0, 1.0, 1e30]))


@pytest.mark.parametrize("preserves", ["function", "argmax"])
def test_a_point_that_cannot_be_represented_is_an_error(preserves):
    arch = symflow.mlp([1, 1, 1], bias=False)
    section = SphereSection(arch, preserves=preserves)
    w = torch.tensor([1e30, 1e30])
    if preserves == "argmax":  # its point can: the last layer has norm one
        x, removed = section.split(w)
        assert x.tolist() == [1, 1] and float(removed) == pytest.approx(60 * 2.302585, rel=1e-5)
        return
    message = (
        r"leaf '2.weight' of its point on the section is not finite: .* so far apart that "
        r"torch.float32 cannot represent the point. Leave the network out, or convert it to float64"
    )
    with pytest.raises(LeafError, match=message):
        section.project(w)
    assert torch.allclose(
        section.project(w.double()), torch.tensor([1.0, 1e60], dtype=torch.float64)
    )


@pytest.mark.parametrize("name", SECTIONS)
def test_no_section_passes_infinities_on(name):
    w = weights()
    w[1, 0] = torch.inf
    with pytest.raises(LeafError, match="is not finite: w holds NaN or infinite values"):
        SECTIONS[name](ARCH).project(w)


def test_a_zero_last_layer_is_symflows_own_warning():
    w = weights()
    w[:, ARCH.leaf("4.weight").span] = w[:, ARCH.leaf("4.bias").span] = 0
    with pytest.warns(SymflowWarning, match="the last layer of a network is zero"):
        x, removed = SphereSection(ARCH, preserves="argmax").split(w)
    assert (x[:, ARCH.leaf("4.weight").span] == 0).all() and (removed == 0).all()


@pytest.mark.parametrize("name", SECTIONS)
def test_backward_passes_warn_of_nothing(name, dtype):
    w = weights(dtype=dtype).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SECTIONS[name](ARCH).project(w).square().sum().backward()
    assert w.grad is not None and w.grad.isfinite().all()


# ---------------------------------------------------------------- the scale of the outputs


class Twice(nn.Module):
    """Its last layer is used inside too: out = o(relu(o(x)))."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.o = nn.Linear(4, 4)

    def forward(self, x):
        return self.o(torch.relu(self.o(x)))


class Tied(nn.Module):
    """Its last weight is that of the first layer; that layer need not be used."""

    def __init__(self, used: bool) -> None:
        nn.Module.__init__(self)
        self.used = used
        self.a, self.o = nn.Linear(4, 4), nn.Linear(4, 4)
        self.o.weight = self.a.weight

    def forward(self, x):
        return self.o(torch.relu(self.a(x) if self.used else x))


class Joined(nn.Module):
    """Its last weight takes two axes in, and is two leaves."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.a, self.b, self.o = nn.Linear(4, 3), nn.Linear(4, 5), nn.Linear(8, 2)

    def forward(self, x):
        return self.o(torch.cat([torch.relu(self.a(x)), torch.relu(self.b(x))], dim=-1))


@pytest.mark.parametrize("module", [Twice(), Tied(used=True)], ids=["twice", "tied"])
def test_a_last_layer_used_elsewhere_has_no_scale_of_its_own(module):
    arch = symflow.Architecture.from_module(module, torch.zeros(1, 4))
    w, x = weights(arch, 1)[0], torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)
    keys = [dict(arch.aliases).get(key, key) for key in arch.output]
    moved = w.clone()
    for key in keys:
        moved[arch.leaf(key).span] *= 3
    ratio = arch.apply(moved, x) / arch.apply(w, x)
    assert ratio.max() - ratio.min() > 0.1  # scaling it is no scaling of the outputs
    with pytest.raises(LeafError, match=r"\['o.weight', 'o.bias'\], but scaling .* another place"):
        symflow.Quotient(arch, "sphere", preserves="argmax")
    assert symflow.Quotient(arch, "sphere").project(w).shape == w.shape


@pytest.mark.parametrize("module", [Tied(used=False), Joined()], ids=["alias", "cut"])
def test_last_layers_are_found_by_alias_and_in_parts(module):
    arch = symflow.Architecture.from_module(module, torch.zeros(1, 4))
    section = SphereSection(arch, preserves="argmax")
    w, x = weights(arch), torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)
    point, removed = section.split(w)
    assert torch.allclose(arch.apply(section.join(point, removed), x), arch.apply(w, x))
    ratio = arch.apply(w, x) / arch.apply(point, x)
    assert torch.allclose(ratio, removed.exp()[..., None].expand_as(ratio))
    keys = [dict(arch.aliases).get(key, key) for key in arch.output]
    last = [point[:, leaf.span] for leaf in arch.leaves if leaf.key in keys]
    square = torch.cat(last, -1).square().sum(-1)  # that of the radius: the number of outputs
    assert torch.allclose(square, torch.full_like(square, arch.apply(w, x).shape[-1]))


# ---------------------------------------------------------------- what a quotient is made of


def test_a_section_belongs_to_the_architecture():
    other = symflow.mlp([3, 4, 2])
    with pytest.raises(
        ShapeError, match=r"section must be one .* got a BalancedSection of .*D = 26"
    ):
        symflow.Quotient(ARCH, BalancedSection(other))
    groups = {"h1": symflow.Permutation(5)}
    with pytest.raises(ShapeError, match=r"BalancedSection\(arch.with_groups\(groups\), ...\)"):
        symflow.Quotient(ARCH, BalancedSection(ARCH), groups=groups)
    made = symflow.Quotient(ARCH, BalancedSection(ARCH.with_groups(groups)), groups=groups)
    assert made.symmetry["h1"].group == symflow.Permutation(5)
    same = BalancedSection(symflow.mlp([3, 5, 4, 2]))
    assert symflow.Quotient(ARCH, same).section is same


def test_a_section_that_preserves_the_argmax_may_be_given():
    section = SphereSection(ARCH, preserves="argmax")
    assert symflow.Quotient(ARCH, section, preserves="argmax").section is section
    for other in (SphereSection(ARCH), BalancedSection(ARCH)):
        message = f"got a {type(other).__name__} that preserves the function"
        with pytest.raises(ShapeError, match=message):
            symflow.Quotient(ARCH, other, preserves="argmax")
    flat = FlatSection(ARCH, isometric_only=False)
    with pytest.raises(ShapeError, match="got a FlatSection"):
        symflow.Quotient(ARCH, flat, preserves="argmax")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((nn.Linear(3, 2),), {}, "arch must be an Architecture, got an object of type Linear"),
        ((ARCH,), {"groups": {"h1": "x"}}, r"groups\['h1'\] must be a Group, .* got 'x'"),
        ((ARCH,), {"groups": ["h1"]}, "groups must be a dict .* got an object of type list"),
        ((ARCH,), {"aligner": "wm"}, "aligner must be an Aligner, .* got 'wm'"),
        ((ARCH, nn.ReLU()), {}, "section must be 'auto', .* got an object of type ReLU"),
        ((ARCH, "round"), {}, "section must be 'auto', .* got 'round'"),
        ((ARCH, nn.ReLU()), {"preserves": "argmax"}, "needs section='sphere', got an object of"),
        ((ARCH,), {"preserves": object()}, "preserves must be .* got an object of type object"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_of_the_wrong_type_is_named_without_an_address(args, options, message):
    with pytest.raises(ShapeError, match=message) as caught:
        symflow.Quotient(*args, **options)
    assert "0x" not in str(caught.value)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("section", ["balanced", "sphere"])
def test_batches_that_do_not_broadcast_are_named(section):
    q, w = symflow.Quotient(ARCH, section), weights()
    message = r"w0 of shape \(2, 54\) and w1 of shape \(3, 54\): for all pairs, give w0\[:, None\]"
    for method in (q.distance, q.align, q.geodesic, q.log, q.distance_bounds):
        with pytest.raises(ShapeError, match=message):
            method(w[:2], w)
    with pytest.raises(ShapeError, match=r"w of shape \(2, 54\) and v of shape \(3, 54\)"):
        q.exp(w[:2], w)
    with pytest.raises(ShapeError, match=r"v must end with D = 54 coordinates, got \(\)"):
        q.exp(w, torch.tensor(1.0))


@pytest.mark.parametrize("section", ["balanced", "sphere"])
def test_empty_batches_have_empty_results(section):
    q, w = symflow.Quotient(ARCH, section), weights()
    empty = w[:0]
    assert q.project(empty).shape == empty.shape
    assert q.exp(empty, empty).shape == empty.shape
    for other in (empty, w[0]):
        assert q.distance(empty, other).shape == (0,)
        assert [x.shape for x in q.distance_bounds(empty, other)] == [(0,), (0,)]
        assert q.align(empty, other).weights.shape == empty.shape
        assert q.geodesic(empty, other)(torch.linspace(0, 1, 4)).shape == (4, 0, 54)
    with pytest.raises(ShapeError, match=r"one network or more, got shape \(0, 54\)"):
        q.mean(empty)


def test_a_parameter_without_dimensions_has_bounds():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.a, self.o = nn.Linear(2, 3), nn.Linear(3, 2)
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.o(torch.tanh(self.a(x))) * self.scale

    arch = symflow.Architecture.from_module(Scaled(), torch.zeros(1, 2))
    assert arch.leaf("scale").shape == ()
    w = weights(arch, 2)
    lower, upper = symflow.Quotient(arch).distance_bounds(w[0], w[1])
    assert 0 < lower <= upper
    alone = torch.zeros(2, arch.dimension, dtype=torch.float64)
    alone[1, arch.leaf("scale").span] = 3
    assert [float(x) for x in symflow.Quotient(arch).distance_bounds(*alone)] == [3, 3]


# ---------------------------------------------------------------- walking


def test_exp_stays_on_the_spheres_whatever_the_vector(dtype):
    q = symflow.Quotient(ARCH, "sphere")
    w, v = weights(dtype=dtype), weights(dtype=dtype, seed=1)
    x, end = q.project(w), q.exp(w, v)
    assert q.manifold.check_point_on_manifold(end)
    assert torch.allclose(end, q.exp(w, q.manifold.proju(x, v)), atol=1e-5)
    # The broken twin: without the projection the geodesic leaves the spheres.
    one = torch.ones((), dtype=dtype)
    assert not q.manifold.check_point_on_manifold(q.manifold.geodesic(x, v, one))


@pytest.mark.parametrize("section", ["balanced", "sphere"])
def test_exp_inverts_log_also_towards_a_dead_unit(section):
    q, w = symflow.Quotient(ARCH, section), weights()
    row, bias = ARCH.leaf("0.weight"), ARCH.leaf("0.bias")
    w[1, row.offset : row.offset + 3] = w[1, bias.offset] = 0
    with pytest.warns(DeadNeuronWarning):
        path = q.geodesic(w[0], w[1])
    assert torch.allclose(q.exp(w[0], path.direction), path.end, atol=1e-9)


@pytest.mark.parametrize("step", [1e-4, 0.1, 0.9, 1.0])
def test_short_steps_towards_a_dead_unit_are_straight(dtype, step):
    space = SphereProduct(3, [torch.arange(3)[None]])
    x = torch.tensor([0.6, 0.8, 0.0], dtype=dtype)
    toward = space.logmap(x, torch.zeros_like(x))
    assert torch.equal(toward, -x)
    for end in (
        space.expmap(x, step * toward),
        space.geodesic(x, step * toward, torch.ones((), dtype=dtype)),
        space.geodesic(x, toward, torch.tensor(step, dtype=dtype)),
    ):
        assert torch.allclose(end, (1 - step) * x, atol=1e-6)
    velocity = space.geodesic_velocity(x, step * toward, torch.tensor(0.5, dtype=dtype))
    assert torch.allclose(velocity, -step * x)


def test_a_large_vector_that_is_not_quite_tangent_stays_on_the_sphere(dtype):
    """Its product with the point, -0.6, is small beside its length."""
    space = SphereProduct(3, [torch.arange(3)[None]])
    x, v = (torch.tensor(y, dtype=dtype) for y in ([1.0, 0.0, 0.0], [-0.6, 30.0, 0.0]))
    assert abs(float(norm(space.expmap(x, v))) - 1) < 1e-5


def test_projections_on_the_balanced_cone_have_finite_gradients():
    space = BalancedSection(ARCH).manifold
    for seed in range(50):
        w = weights(ARCH, 2, torch.float32, seed).requires_grad_()
        space.projx(w).sum().backward()
        assert w.grad is not None and w.grad.isfinite().all()


def test_a_projection_in_a_batch_with_one_that_is_done_has_finite_gradients(dtype):
    """Of (1, 1) and (3, 1) the first stays while Newton's method runs for the second."""
    space = BalancedSection(symflow.mlp([1, 1, 1], bias=False)).manifold
    w = torch.tensor([[1.0, 1.0], [3.0, 1.0]], dtype=dtype, requires_grad=True)
    x = space.projx(w)
    assert torch.allclose(x, torch.tensor([[1.0, 1.0], [2.0, 2.0]], dtype=dtype))
    x[:, 0].sum().backward()
    assert w.grad is not None  # the nearest point is the mean of both, twice
    assert torch.allclose(w.grad, torch.full_like(w, 0.5), atol=1e-3)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("section", ["balanced", "sphere"])
def test_means_in_half_precision(section, half):
    q, w = symflow.Quotient(ARCH, section), weights(dtype=half)
    mean = q.mean(w)
    assert mean.dtype == half
    wanted = q.mean(w.double())
    far = q.distance(wanted, w[:1].double()).max()
    assert q.distance(wanted, mean.double()) < 0.2 * far


# ---------------------------------------------------------------- means


def test_the_mean_of_the_best_round_is_returned():
    """An aligner that gives up after the second round makes the third one worse."""
    rounds = []

    def align(mean, points):
        rounds.append(mean)
        return points if len(rounds) < 3 else points + 10

    points = torch.tensor([[0.0], [2.0]])
    assert frechet_mean(Flat(1), align, points).tolist() == [1.0]
    # First to the first point, then each of them to the other one.
    assert [m.flatten().tolist() for m in rounds] == [[0.0], [2.0, 0.0], [2.0, 0.0]]

    rounds.clear()

    def worse(mean, points):
        rounds.append(mean)
        return points + 100.0 * (len(rounds) - 1)

    assert frechet_mean(Flat(1), worse, points).tolist() == [0.0]  # where it began
    assert [m.flatten().tolist() for m in rounds] == [[0.0], [2.0, 0.0]]


def test_angles_of_the_smallest_chords(dtype):
    tiny = 1e-30 if dtype == torch.float32 else 1e-200
    u = torch.tensor([1.0, 0.0], dtype=dtype)
    v = torch.tensor([1.0, tiny], dtype=dtype)
    assert float(angle(u, v)) == pytest.approx(tiny, rel=1e-5)
