"""Vectors and optimisers' states carried along: against training itself, and plain geometry."""

import copy

import pytest
import torch
from torch import nn

import symflow
from symflow.errors import LeafError, ShapeError
from symflow.manifolds import RowManifold, SphereProduct
from symflow.quotient import transport_state

QUOTIENTS = {
    "balanced": lambda: symflow.Quotient(symflow.mlp([4, 5, 3], batch_norm=True)),
    "cone": lambda: symflow.Quotient(symflow.mlp([4, 5, 3]), metric="intrinsic"),
    "sphere": lambda: symflow.Quotient(symflow.mlp([4, 5, 4, 3]), "sphere"),
    "argmax": lambda: symflow.Quotient(symflow.mlp([4, 5, 3]), preserves="argmax"),
    "signs": lambda: symflow.Quotient(symflow.mlp([4, 5, 4, 3], "tanh")),
}


def networks(q, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, q.arch.dimension, generator=generator, dtype=torch.float64)


# ---------------------------------------------------------------- tangent vectors


@pytest.mark.parametrize("name", QUOTIENTS)
def test_a_path_carries_its_own_velocity(name):
    q = QUOTIENTS[name]()
    path = q.geodesic(networks(q, 3), networks(q, 3, seed=1))
    torch.testing.assert_close(path.transport(path.direction), path.velocity(1.0))


@pytest.mark.parametrize("name", QUOTIENTS)
def test_transport_keeps_angles_and_is_undone_by_the_way_back(name):
    q = QUOTIENTS[name]()
    w0, w1 = networks(q, 3), networks(q, 3, seed=1)
    x0, x1 = q.project(w0), q.project(w1)
    u, v = (q.manifold.proju(x0, networks(q, 3, seed=s)) for s in (2, 3))
    carried = [q.transport(w0, w1, x) for x in (u, v)]
    torch.testing.assert_close(q.manifold.inner(x1, *carried), q.manifold.inner(x0, u, v))
    torch.testing.assert_close(q.transport(w1, w0, carried[0]), u)
    if isinstance(q.manifold, RowManifold):
        assert q.manifold.check_vector_on_tangent(x1[0], carried[0][0])
        assert not torch.allclose(carried[0], u)


def test_transport_ends_at_the_second_network_wherever_it_lies():
    """Moving w1 by k moves what arrives there by k."""
    q = QUOTIENTS["signs"]()
    w0, w1, v = networks(q), networks(q, seed=1), networks(q, seed=2)
    k = q.symmetry.random(generator=torch.Generator().manual_seed(0), like=w0)
    moved = q.transport(w0, q.symmetry.act(k, w1), v)
    torch.testing.assert_close(moved, q.symmetry.act(k, q.transport(w0, w1, v)))


@pytest.mark.filterwarnings("ignore::symflow.errors.AntipodalWarning")
@pytest.mark.parametrize("angle", [0.0, 1.0, torch.pi / 2, torch.pi])
def test_a_sphere_is_turned_in_the_plane_of_the_path(angle):
    space = SphereProduct(4, [torch.tensor([[0, 1, 2]])], radii=[2.0])
    x = torch.tensor([2.0, 0.0, 0.0, 7.0], dtype=torch.float64)
    v = torch.tensor([0.0, 2 * angle, 0.0, 1.0], dtype=torch.float64)
    t = torch.tensor(angle, dtype=torch.float64)
    for u, wanted in (
        ([0.0, 1.0, 0.0, 5.0], [-t.sin(), t.cos(), 0.0, 5.0]),
        ([0.0, 0.0, 3.0, 0.0], [0.0, 0.0, 3.0, 0.0]),
        ([9.0, 0.0, 3.0, 0.0], [0.0, 0.0, 3.0, 0.0]),  # only the tangent part counts
    ):
        found = space.carry(x, v, torch.tensor(u, dtype=torch.float64))
        torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))
    if 0 < angle < 3:  # what geoopt's contract offers knows the ends, and agrees
        u = torch.tensor([0.0, 1.0, -2.0, 5.0], dtype=torch.float64)
        torch.testing.assert_close(space.carry(x, v, u), space.transp(x, space.expmap(x, v), u))


def test_bad_vectors_are_named():
    q = QUOTIENTS["sphere"]()
    w = networks(q, 2)
    with pytest.raises(ShapeError, match="v must end with D"):
        q.transport(w[0], w[1], w[0, :-1])
    with pytest.raises(ShapeError, match=r"w0 and w1 and v must broadcast"):
        q.transport(w, w, networks(q, 3))


# ---------------------------------------------------------------- optimisers

X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(40) % 3
OPTIMISERS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AMSGrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
}


class Merged(nn.Module):
    """A concatenation cuts the last weight into two leaves."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.a, self.b, self.last = nn.Linear(4, 3), nn.Linear(4, 5), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(torch.cat([torch.tanh(self.a(x)), torch.tanh(self.b(x))], 1))


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def train(net, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(X), Y).backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("make", [dense, Merged])
def test_training_goes_on_from_moved_weights_as_if_moved_at_the_end(name, make):
    torch.manual_seed(0)
    net = make().double()
    arch = symflow.Architecture.from_module(net, X[:2])
    g = arch.symmetry.random(generator=torch.Generator().manual_seed(1), like=X)
    optimizer = OPTIMISERS[name](net.parameters())
    train(net, optimizer, 20)
    state = copy.deepcopy(optimizer.state_dict())
    w = arch.symmetry.act(g, arch.flatten(net))
    twin = arch.load_into(copy.deepcopy(net), w)
    forgetful = copy.deepcopy(twin)
    other = OPTIMISERS[name](twin.parameters())
    other.load_state_dict(symflow.Quotient(arch).transport_state(g, state))
    wrong = OPTIMISERS[name](forgetful.parameters())
    wrong.load_state_dict(state)
    train(net, optimizer, 20)
    train(twin, other, 20)
    train(forgetful, wrong, 20)
    wanted = arch.symmetry.act(g, arch.flatten(net))
    torch.testing.assert_close(arch.flatten(twin), wanted, rtol=1e-9, atol=1e-11)
    assert not torch.allclose(arch.flatten(forgetful), wanted, rtol=1e-3)


def gradient(arch, w):
    w = w.clone().requires_grad_(True)
    loss = nn.functional.cross_entropy(arch.apply(w, X), Y)
    return torch.autograd.grad(loss, w)[0]


@pytest.mark.parametrize("batch_norm", [False, True])
def test_gradients_and_their_squares_move_with_scales(batch_norm):
    arch = symflow.mlp([4, 6, 5, 3], batch_norm=batch_norm)
    w = torch.rand(arch.dimension, generator=torch.Generator().manual_seed(0)).double() - 0.3
    w[arch.num_parameters :] = 1
    g = arch.symmetry.random(generator=torch.Generator().manual_seed(1), like=w)
    here, there = gradient(arch, w), gradient(arch, arch.symmetry.act(g, w))
    state = {"step": 3, "exp_avg": here, "exp_avg_sq": here.square()}
    found = transport_state(arch, g, state)
    p = arch.num_parameters
    assert found["step"] == 3 and torch.equal(state["exp_avg"], gradient(arch, w))
    torch.testing.assert_close(found["exp_avg"][:p], there[:p])
    torch.testing.assert_close(found["exp_avg_sq"][:p], there[:p].square())
    cut = transport_state(arch, g, {k: v[:p] for k, v in state.items() if k != "step"})
    assert torch.equal(cut["exp_avg"], found["exp_avg"][:p])
    named = {k: v for k, v in arch.unflatten(here).items() if "running" not in k}
    by_name = transport_state(arch, g, {"exp_avg": named})["exp_avg"]
    assert by_name.keys() == named.keys()
    for key, value in arch.unflatten(found["exp_avg"]).items():
        assert key not in named or torch.equal(by_name[key], value)
    some = transport_state(arch, g, {"exp_avg": {"0.bias": named["0.bias"]}})["exp_avg"]
    assert list(some) == ["0.bias"] and torch.equal(some["0.bias"], by_name["0.bias"])


def test_states_of_many_networks_move_each_by_its_own_element():
    arch = symflow.mlp([4, 6, 3])
    x = torch.randn(5, arch.dimension, generator=torch.Generator().manual_seed(0))
    g = arch.symmetry.random(generator=torch.Generator().manual_seed(1), like=x, batch=(5,))
    found = transport_state(arch, g, {"exp_avg": x})["exp_avg"]
    # The pairing of vectors and covectors is what a symmetry keeps.
    moved = arch.symmetry.act(g, x)
    torch.testing.assert_close((found * moved).sum(-1), (x * x).sum(-1))


def test_named_parameters_may_come_in_any_order():
    net = dense().double()
    arch = symflow.Architecture.from_module(net, X[:2])
    g = arch.symmetry.random(generator=torch.Generator().manual_seed(1), like=X)
    plain = torch.optim.Adam(net.parameters())
    train(net, plain, 1)
    state = plain.state_dict()
    names = [key for key, _ in net.named_parameters()]
    back = {
        "state": {len(names) - 1 - k: row for k, row in state["state"].items()},
        "param_groups": [
            {"params": [0, 1], "param_names": [names[-1], names[-2]]},
            {"params": [2, 3, 4, 5], "param_names": names[-3::-1]},
        ],
    }
    found, wanted = transport_state(arch, g, back), transport_state(arch, g, state)
    for k, row in wanted["state"].items():
        assert torch.equal(found["state"][len(names) - 1 - k]["exp_avg"], row["exp_avg"])


def test_bad_states_are_named():
    net = dense()
    arch = symflow.Architecture.from_module(net, X[:2].float())
    g = arch.symmetry.identity(like=X)
    with pytest.raises(ShapeError, match="how 'exp_inf' moves is not known"):
        transport_state(arch, g, {"exp_inf": torch.zeros(arch.dimension)})
    with pytest.raises(ShapeError, match=r"exp_avg must be flat .* got \(3,\)"):
        transport_state(arch, g, {"exp_avg": torch.zeros(3)})
    with pytest.raises(LeafError, match=r"exp_avg: '9.weight' is no parameter"):
        transport_state(arch, g, {"exp_avg": {"9.weight": torch.zeros(3)}})
    with pytest.raises(ShapeError, match=r"'0.bias' must have shape \(6,\), got \(3,\)"):
        transport_state(arch, g, {"exp_avg": {"0.bias": torch.zeros(3)}})
    optimizer = torch.optim.Adam(list(net.parameters())[:2])
    with pytest.raises(LeafError, match=r"optimiser has 2 parameters, the architecture 6"):
        transport_state(arch, g, optimizer.state_dict())
    optimizer = torch.optim.Adam(reversed(list(net.parameters())))
    net(X.float()).sum().backward()
    optimizer.step()
    with pytest.raises(ShapeError, match="all parameters of the module in their order"):
        transport_state(arch, g, optimizer.state_dict())
