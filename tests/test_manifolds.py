"""The section spaces as geoopt manifolds."""

import math
import warnings

import geoopt
import pytest
import torch

import symflow
from symflow.errors import AntipodalWarning, ShapeError
from symflow.manifolds import BalancedCone, Flat, SphereProduct, sphere_exp, sphere_log
from symflow.manifolds.sphere import sphere_transport
from symflow.numerics import tolerance


def unit_rows(generator, dtype, n=50, d=7):
    x = torch.randn(n, d, generator=generator, dtype=dtype)
    return x / x.norm(dim=-1, keepdim=True)


def test_geoopts_sphere_is_not_exact_and_ours_is(dtype, generator):
    x = unit_rows(generator, dtype)
    ours = SphereProduct(7, [torch.arange(7)[None]])
    assert (ours.dist(x, x) == 0).all()
    if dtype == torch.float32:  # the reason why geoopt's own sphere is not used
        assert geoopt.Sphere().dist(x, x).max() > 0.01


@pytest.mark.parametrize("scale", [1e-7, 1e-4, 1e-2, 0.5, 1.5, 3.0])
def test_log_inverts_exp_at_every_angle(dtype, generator, scale):
    x = unit_rows(generator, dtype)
    v = torch.randn(x.shape, generator=generator, dtype=dtype)
    v = v - (v * x).sum(-1, keepdim=True) * x
    v = scale * v / v.norm(dim=-1, keepdim=True)
    back = sphere_log(x, sphere_exp(x, v))
    assert (back - v).norm(dim=-1).max() < 100 * tolerance(dtype).eps * max(
        1, 1 / (math.pi - scale)
    )


def test_arcs_agree_with_the_arccosine_in_higher_precision(generator):
    x, y = unit_rows(generator, torch.float32), unit_rows(generator, torch.float32)
    truth = (x.double() * y.double()).sum(-1).div(x.double().norm(dim=-1) * y.double().norm(dim=-1))
    space = SphereProduct(7, [torch.arange(7)[None]])
    assert torch.allclose(space.dist(x, y).double(), truth.acos(), atol=1e-6)


def test_antipodal_rows_have_a_documented_path_and_a_warning(dtype):
    x = torch.tensor([[0.6, 0.8, 0.0]], dtype=dtype)
    with pytest.warns(AntipodalWarning, match="1 antipodal"):
        v = sphere_log(x, -x)
    assert v.isfinite().all()
    assert abs(float(v.norm()) - math.pi) < 1e-5
    assert torch.equal(v[0].sign(), torch.tensor([0, 0, 1], dtype=dtype))  # where x is least
    assert torch.allclose(sphere_exp(x, v), -x, atol=1e-5)


@pytest.mark.parametrize("pair", ["equal", "close", "far", "antipodal", "dead"])
def test_gradients_are_finite_everywhere(dtype, pair):
    x = torch.tensor([[0.6, 0.8, 0.0]], dtype=dtype, requires_grad=True)
    other = {
        "equal": [[0.6, 0.8, 0.0]],
        "close": [[0.6, 0.8, 1e-9]],
        "far": [[0.0, 0.0, 1.0]],
        "antipodal": [[-0.6, -0.8, 0.0]],
        "dead": [[0.0, 0.0, 0.0]],
    }[pair]
    space = SphereProduct(3, [torch.arange(3)[None]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AntipodalWarning)
        v = space.logmap(x, torch.tensor(other, dtype=dtype))
        (space.geodesic(x, v, torch.tensor([0.3], dtype=dtype)).sum() + v.sum()).backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_dead_rows_stay_flat():
    zero, row = torch.zeros(1, 3), torch.tensor([[0.0, 1.0, 0.0]])
    assert torch.equal(sphere_log(zero, row), row)
    assert torch.equal(sphere_exp(zero, zero), zero)
    assert torch.equal(sphere_transport(zero, row, row), row)


def test_rows_may_not_overlap():
    with pytest.raises(ShapeError, match="occurs twice"):
        SphereProduct(3, [torch.tensor([[0, 1]]), torch.tensor([[1, 2]])])


def spaces():
    arch = symflow.mlp([4, 5, 3, 2])
    return {
        "Flat": symflow.Quotient(symflow.mlp([4, 5, 3, 2], "tanh")).manifold,
        "SphereProduct": symflow.Quotient(arch, "sphere").manifold,
        "BalancedCone": symflow.Quotient(arch, "balanced").manifold,
        "ConeProduct": symflow.Quotient(symflow.mlp([4, 5, 2]), metric="intrinsic").manifold,
    }


@pytest.mark.parametrize("name", ["Flat", "SphereProduct", "BalancedCone", "ConeProduct"])
def test_manifold_laws(name, dtype, generator):
    """What geoopt expects of any manifold, in both precisions."""
    space = spaces()[name]
    close = 20 * tolerance(dtype).close
    x, y = (
        space.projx(torch.randn(6, space.dimension, generator=generator, dtype=dtype))
        for _ in range(2)
    )
    u = torch.randn(x.shape, generator=generator, dtype=dtype)
    assert space.check_point_on_manifold(x)
    assert torch.allclose(space.projx(x), x, atol=close)
    assert not space.check_point_on_manifold(2 * x + 1) or name == "Flat"
    v = space.proju(x, u)
    assert torch.allclose(space.proju(x, v), v, atol=close)
    # The projection is orthogonal: what it removes is normal to everything tangent.
    assert space.inner(x, u - v, space.proju(x, u.flip(-1))).abs().max() < close * 10
    assert space.check_point_on_manifold(space.retr(x, 0.01 * v), atol=close)
    # A retraction leaves in the direction of the vector (first order).
    h = 0.001
    ahead = (space.retr(x, h * v) - x) / h
    assert (ahead - v)[..., : space.counted].norm() < 0.2 * v.norm()
    assert (space.dist(x, x) == 0).all()
    assert torch.allclose(space.dist(x, y), space.dist(y, x), rtol=close)
    end = space.geodesic(x, space.logmap(x, y), torch.ones(6, dtype=dtype))
    assert torch.allclose(end, y, atol=close)
    moved = space.transp(x, y, v)
    assert torch.allclose(space.proju(y, moved), moved, atol=close)


@pytest.mark.parametrize("name", ["SphereProduct", "ConeProduct"])
def test_transport_keeps_lengths_and_turns_geodesics_into_themselves(name, dtype, generator):
    space = spaces()[name]
    x, y = (
        space.projx(torch.randn(6, space.dimension, generator=generator, dtype=dtype))
        for _ in range(2)
    )
    close = 20 * tolerance(dtype).close
    v = space.proju(x, torch.randn(x.shape, generator=generator, dtype=dtype))
    assert torch.allclose(space.norm(y, space.transp(x, y, v)), space.norm(x, v), rtol=close)
    along = space.transp(x, y, space.logmap(x, y))
    assert torch.allclose(along, -space.logmap(y, x), atol=close)


def test_balanced_projection_is_nearest(generator):
    """For one hidden unit the nearest balanced point has the mean of both norms."""
    space = symflow.Quotient(symflow.mlp([2, 1, 1], bias=False), "balanced").manifold
    assert isinstance(space, BalancedCone)
    x = torch.tensor([3.0, 4.0, 2.0], dtype=torch.float64)  # incoming norm 5, outgoing 2
    wanted = torch.tensor([3.0 * 3.5 / 5, 4.0 * 3.5 / 5, 3.5], dtype=torch.float64)
    assert torch.allclose(space.projx(x), wanted)


def test_buffers_have_no_length():
    space = Flat(3, counted=2)
    assert space.dist(torch.zeros(3), torch.tensor([0.0, 0.0, 5.0])) == 0


@pytest.mark.parametrize("options", [{"section": "sphere"}, {"metric": "intrinsic"}], ids=str)
def test_geoopts_optimiser_stays_on_the_section(options):
    torch.manual_seed(0)
    arch = symflow.mlp([4, 8, 2])
    space = symflow.Quotient(arch, **options).manifold
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=generator)
    y = (x[:, 0] + x[:, 1].abs() > 0.5).long()
    w = geoopt.ManifoldParameter(
        space.projx(torch.randn(arch.dimension, generator=generator)), manifold=space
    )
    optimizer = geoopt.optim.RiemannianAdam([w], lr=0.05)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(arch.apply(w, x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert space.check_point_on_manifold(w.detach(), atol=1e-4)


@pytest.mark.parametrize(
    "rows",
    [
        [torch.tensor([[2, 3, 9], [4, 5, 10]])],  # a linear map with its bias: blocks
        [torch.tensor([[2, 4], [3, 5]])],  # columns of a map: no blocks
        [torch.tensor([[0], [1], [2]]), torch.tensor([[5, 6, 7]])],
        [torch.tensor([[3, 2], [5, 4]])],  # backwards
        [],
    ],
    ids=["blocks", "columns", "two families", "backwards", "none"],
)
def test_rows_are_cut_out_and_put_back(rows):
    space = SphereProduct(12, rows)
    x = torch.arange(24.0).reshape(2, 12)
    families, rest = space.split(x)
    taken = [c for index in rows for c in index.flatten().tolist()]
    assert torch.equal(rest, x[:, [c for c in range(12) if c not in taken]])
    for index, family in zip(rows, families, strict=True):
        assert torch.equal(family, x[:, index])
    assert torch.equal(space.join(families, rest), x)
