"""Vector fields: equivariance, the dense reference, graphs."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import symflow
from symflow.errors import EquivarianceError, ShapeError, UnsupportedModuleError
from symflow.nn import GraphField, RelationalTransformer, VectorField
from symflow.nn.base import permutations
from symflow.nn.layout import symmetric_layout
from symflow.nn.pairs import (
    EdgeScores,
    EdgeSums,
    EdgeUpdate,
    plain_scores,
    plain_sums,
    plain_update,
)
from symflow.testing import architectures, concrete_classes, mlps
from symflow.testing.equivariance import check_equivariant
from tests.dense_reference import dense_forward


def stirred(field, seed=0):
    """Give every parameter a value: a fresh field is the identity and hides mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in field.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return field.double()


def points(arch, seed, n=3, extra=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, arch.dimension + extra, generator=generator, dtype=torch.float64)
    return x, torch.rand(n, generator=generator, dtype=torch.float64), generator


def graph_field(arch, **options):
    from torch_geometric.nn import GATv2Conv

    torch.manual_seed(0)
    return GraphField(GATv2Conv(8, 8, edge_dim=4), arch, channels=8, edge_channels=4, **options)


def tokens(arch, **options):
    return RelationalTransformer(arch, width=8, depth=2, heads=2, edge_width=4, **options)


def probing(arch, **options):
    """Tokens that see what the network does on a few inputs."""
    field = tokens(arch, probes=5, probe_kinds=2, **options)
    generator = torch.Generator().manual_seed(4)
    return field.look_at(torch.randn(5, *arch.inputs[0].shape[1:], generator=generator))


def layered(arch, **options):
    return RelationalTransformer(arch, width=8, depth=2, nodes="all", heads=1, **options)


def moves(field, x, t, g):
    """Largest difference between moving before and after the field."""
    d = field.arch.dimension

    def act(v):
        return torch.cat([field.symmetry.act(g, v[:, :d]), v[:, d:]], dim=-1)

    with torch.no_grad():
        out = field(x, t)
        return float((field(act(x), t) - act(out)).abs().max() / out.abs().max())


@given(arch=architectures(), seed=st.integers(0, 1000), extra=st.integers(0, 1))
def test_default_layout_commutes_with_every_hidden_permutation(arch, seed, extra):
    field = stirred(tokens(arch, extra=extra, groups="permutation"), seed)
    x, t, generator = points(arch, seed, extra=extra)
    g = field.symmetry.random(generator=generator, like=x)
    assert moves(field, x, t, g) < 1e-10


@given(arch=mlps(), seed=st.integers(0, 1000), extra=st.integers(0, 1))
def test_all_nodes_commute_with_every_hidden_permutation(arch, seed, extra):
    if any(leaf.name.endswith("running_mean") for leaf in arch.leaves):
        with pytest.raises(UnsupportedModuleError):
            layered(arch, groups="permutation")
        return
    field = stirred(layered(arch, extra=extra, groups="permutation"), seed)
    x, t, generator = points(arch, seed, extra=extra)
    g = field.symmetry.random(generator=generator, like=x)
    assert moves(field, x, t, g) < 1e-10


@pytest.mark.parametrize("make", [tokens, probing, layered, graph_field])
def test_fields_are_equivariant_and_see_other_permutations(make):
    """The broken twin: permuting inputs or outputs, which is no symmetry, must show."""
    arch = symflow.mlp([4, 5, 3, 2])
    field = stirred(make(arch, extra=1))
    x, t, generator = points(arch, 0, extra=1)
    g = field.symmetry.random(generator=generator, like=x)
    assert moves(field, x, t, g) < 1e-10
    leaves = {leaf.name: leaf for leaf in arch.leaves}

    def turned(v):  # inputs in reverse order
        v = v.clone()
        w = v[:, leaves["0.weight"].span].reshape(-1, 5, 4).flip(-1)
        v[:, leaves["0.weight"].span] = w.flatten(1)
        return v

    with torch.no_grad():
        assert (field(turned(x), t) - turned(field(x, t))).abs().max() > 1e-3


# How each vector field of symflow is made, in its variants. A new one has to be added here.
MAKERS = {RelationalTransformer: (tokens, probing, layered), GraphField: (graph_field,)}


@pytest.mark.parametrize("cls", concrete_classes(VectorField, "symflow.nn"))
@pytest.mark.parametrize("extra", [0, 1])
def test_every_vector_field_is_equivariant(cls, extra):
    assert cls in MAKERS, f"add a maker of {cls.__name__} to MAKERS"
    arch = symflow.mlp([3, 4, 3, 2])
    for make in MAKERS[cls]:
        field = stirred(make(arch, extra=extra))
        check_equivariant(field, arch, symmetry=field.symmetry, extra=extra)


def test_a_field_that_tells_units_apart_fails(unshrunk):
    """The broken twin of the test above: it knows the unit by its number."""
    arch = symflow.mlp([1, 2, 1])
    numbered = torch.arange(arch.dimension, dtype=torch.float64)
    with pytest.raises(AssertionError, match="equivariant"):
        check_equivariant(lambda x, t: x + numbered * t[:, None], arch)


@pytest.mark.parametrize("make", [tokens, probing, layered, graph_field])
def test_batch_mates_and_time(make):
    arch = symflow.mlp([4, 5, 3, 2])
    field = stirred(make(arch))
    x, t, _ = points(arch, 0, n=4)
    with torch.no_grad():
        whole = field(x, t)
        alone = torch.cat([field(x[k : k + 1], t[k : k + 1]) for k in range(4)])
        later = field(x, t + 0.1)
    assert torch.allclose(whole, alone, rtol=1e-12, atol=1e-12)
    assert (whole - later).abs().max() > 1e-4


@pytest.mark.parametrize("make", [tokens, layered])
def test_training_starts_at_the_identity_and_reaches_every_parameter(make):
    arch = symflow.mlp([4, 5, 3, 2])
    x, t, _ = points(arch, 0, extra=1)
    assert torch.equal(make(arch, extra=1).double()(x, t), x)
    assert (make(arch, extra=1, residual=False).double()(x, t) == 0).all()
    field = stirred(make(arch, extra=1))
    field(x, t).square().sum().backward()
    idle = [
        k for k, p in field.named_parameters() if p.numel() and (p.grad is None or not p.grad.any())
    ]
    # The last layer's updates of what is not read out are skipped, parameters are per layer.
    assert idle == []


@given(seed=st.integers(0, 1000), extra=st.integers(0, 2), arch=mlps())
def test_blocks_agree_with_the_dense_reference(seed, extra, arch):
    if any(leaf.name.endswith("running_mean") for leaf in arch.leaves):
        return
    field = stirred(layered(arch, extra=extra, groups="permutation"), seed)
    x, t, _ = points(arch, seed, extra=extra)
    field.standardise(3 * x + 1)
    blocks, dense = field(x, t), dense_forward(field, x, t)
    assert torch.allclose(blocks, dense, rtol=1e-9, atol=1e-9)
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()
    names, parameters = zip(*field.named_parameters(), strict=True)
    grads = [
        torch.autograd.grad((out * weights).sum(), parameters, allow_unused=True)
        for out in (blocks, dense)
    ]
    for name, a, b in zip(names, *grads, strict=True):
        a, b = (torch.zeros(()).double() if v is None else v for v in (a, b))
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-7), name


def kept(field, x, t, forward=None):
    """Count the numbers that are kept for the backward pass: in all, and in the largest tensor."""
    seen = {}

    def pack(v):
        storage = v.untyped_storage()
        seen[storage.data_ptr()] = (storage.nbytes() // v.element_size(), v)  # v keeps it alive
        return v

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        (forward or field)(x, t)
    own = {p.untyped_storage().data_ptr() for p in field.parameters()}
    sizes = [size for where, (size, _) in seen.items() if where not in own]
    return sum(sizes), max(sizes)


@pytest.mark.parametrize("make", [tokens, probing, layered, graph_field])
def test_memory_is_linear_in_the_weights(make):
    """12 times the weights keep about 12 times the numbers, and not 144 times.

    Attention among units is quadratic in the width, as the weights are.
    """
    small, large = (symflow.mlp([4, width, width, 2]) for width in (16, 64))
    growth = large.dimension / small.dimension
    totals, largest = zip(
        *(kept(make(arch).double(), *points(arch, 0, n=1)[:2]) for arch in (small, large)),
        strict=True,
    )
    assert totals[1] < 1.5 * growth * totals[0]
    assert largest[1] < 1.5 * growth * largest[0]


def test_the_dense_reference_keeps_a_state_for_every_pair():
    """The broken twin: what is measured above shows a network that has N x N states."""
    totals = []
    for width in (16, 64):
        arch = symflow.mlp([width, 4, 4, width])
        field = layered(arch).double()
        x, t, _ = points(arch, 0, n=1)
        dense = kept(field, x, t, lambda *v, field=field: dense_forward(field, *v))
        totals.append(dense[0] / kept(field, x, t)[0])
    assert totals[1] > 2 * totals[0]


# Shapes of what the functions of edges (3, 4, 2, 2, 5) take, and how they are written on paper.
MAPS = [(5, 5), (5,), (5,), (5,), (5, 5), (5,), (5, 5), (5,), (5,), (5,)]
EDGE_FUNCTIONS = {
    "scores": (EdgeScores.apply, plain_scores, [(5, 5), (3, 4, 2, 5), (3, 2, 2, 5)]),
    "sums": (EdgeSums.apply, plain_sums, [(5, 5), (3, 4, 2, 2), (3, 4, 5), (3, 2, 5)]),
    "both": (
        partial(EdgeUpdate.apply, 0.01),
        partial(plain_update, 0.01),
        [(10, 10), (3, 4, 10), (3, 2, 10), *MAPS],
    ),
    "ahead": (
        partial(EdgeUpdate.apply, 0.01),
        partial(plain_update, 0.01),
        [(5, 10), (3, 4, 5), (3, 2, 5), *MAPS],
    ),
}


@pytest.mark.parametrize("name", EDGE_FUNCTIONS)
def test_handwritten_gradients(name, monkeypatch):
    fused, plain, shapes = EDGE_FUNCTIONS[name]
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in [(3, 4, 2, 2, 5), *shapes]
    ]
    for chunk in (1, 2**16):  # one network after another, and all at once
        monkeypatch.setattr("symflow.nn.pairs._CHUNK", chunk)
        outputs = [f(*inputs) for f in (fused, plain)]
        outputs = [(out,) if isinstance(out, torch.Tensor) else out for out in outputs]
        for a, b in zip(*outputs, strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
        assert torch.autograd.gradcheck(fused, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(fused, inputs, fast_mode=True)
    weights = [torch.randn(out.shape, generator=generator).double() for out in outputs[0]]
    grads = [torch.autograd.grad(out, inputs, weights) for out in outputs]
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


def test_standardised_weights_have_unit_variance(generator):
    arch = symflow.mlp([4, 5, 3, 2])
    samples = 2 + 3 * torch.randn(500, arch.dimension + 1, generator=generator)
    field = tokens(arch, extra=1).standardise(samples)
    seen = field.standardised(samples)
    for leaf in arch.leaves:
        assert abs(float(seen[:, leaf.span].mean())) < 1e-3
        assert abs(float(seen[:, leaf.span].var()) - 1) < 0.01
    assert abs(float(seen[:, -1].std()) - 1) < 0.01


def test_graphs_round_trip_and_batch(generator):
    from torch_geometric.data import Batch, HeteroData

    from symflow.nn.graph import from_graph

    arch = symflow.mlp([4, 5, 3, 2], batch_norm=True)
    w = torch.randn(3, arch.dimension, generator=generator)
    graphs = arch.to_graph(w)
    assert all(isinstance(graph, HeteroData) for graph in graphs)
    for row, graph in zip(w, graphs, strict=True):
        assert torch.equal(from_graph(arch, graph), row)
        i, j = graph["h1", "weight", "h2"].edge_index
        middle = arch.unflatten(row)["3.weight"]
        assert torch.equal(graph["h1", "weight", "h2"].edge_attr[:, 0], middle[j, i])
    assert Batch.from_data_list(graphs)["h1"].x.shape[0] == 15
    # Moving the network permutes the nodes of its graph.
    g = permutations(arch.symmetry).random(generator=generator, like=w)
    moved = arch.to_graph(permutations(arch.symmetry).act(g, w[0]))
    assert torch.equal(moved["h1"].x, graphs[0]["h1"].x[g["h1"]])
    with pytest.raises(ShapeError, match="one network"):
        arch.to_graph(w[None])


def test_signs_need_consent():
    arch = symflow.mlp([4, 5, 2], "tanh")
    for make in (tokens, layered, graph_field):
        with pytest.raises(EquivarianceError, match="Sign"):
            make(arch)
        assert make(arch, groups="permutation").groups == "permutation"
    x, t, generator = points(arch, 0)
    field = stirred(tokens(arch, groups="permutation"))
    g = arch.symmetry.random(generator=generator, like=x)
    with torch.no_grad():  # and rightly so
        moved = field(arch.symmetry.act(g, x), t) - arch.symmetry.act(g, field(x, t))
    assert moved.abs().max() > 1e-3


def test_three_symmetric_axes_are_refused():
    class Bilinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.out = nn.Linear(3, 4), nn.Linear(5, 2)
            self.mix = Mix()

        def forward(self, x):
            return self.out(torch.relu(self.mix(torch.relu(self.into(x)))))

    class Mix(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 4, 4))

        def forward(self, x):
            return torch.einsum("oij,bi,bj->bo", self.weight, x, x)

    @symflow.arch.rule(Mix)
    def mix(call, x):
        out = call.new_axis(5)
        call.label("weight", out, x.dims[-1].dual(), x.dims[-1].dual())
        call.elementwise(x, symflow.arch.Activation())
        return x.with_dim(-1, out, 5)

    arch = symflow.Architecture.from_module(Bilinear(), torch.zeros(1, 3))
    with pytest.raises(UnsupportedModuleError, match="3 symmetric axes"):
        tokens(arch, groups="permutation")


def test_probes_show_what_weights_do_together():
    """Gradients of the function, by autograd through the whole network: of root mean square one."""
    arch = symflow.mlp([4, 5, 2])
    field = probing(arch).double()
    w = torch.randn(3, arch.dimension, dtype=torch.float64).requires_grad_()
    gradients, sizes = field.probes(w)
    logs = arch.apply(w, field.probes.inputs).log_softmax(-1)
    wanted = -(field.probes.targets[1].softmax(-1) * logs).sum() / 5
    (by_hand,) = torch.autograd.grad(wanted, w)
    for k, leaf in enumerate(arch.leaves):
        size = sizes.unflatten(-1, (2, -1))[:, 1, k].exp()
        close = {"rtol": 1e-6, "atol": 1e-6}
        torch.testing.assert_close(
            gradients[:, 1, leaf.span] * size[:, None], by_hand[:, leaf.span], **close
        )
    other = field.look_at(torch.ones(5, 4)).probes(w)[0]
    assert not torch.allclose(other, gradients)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"probes": -1}, "0 or more"), ({"probes": 2, "probe_kinds": 0}, "at least 1")],
)
def test_numbers_of_probes_are_checked(options, message):
    with pytest.raises(ShapeError, match=message):
        tokens(symflow.mlp([4, 5, 2]), **options)
    with pytest.raises(ShapeError, match="nodes='all'"):
        layered(symflow.mlp([4, 5, 2]), probes=3)


def test_probes_must_be_inputs_of_the_network():
    arch = symflow.mlp([4, 5, 2])
    with pytest.raises(ShapeError, match="at least 5 inputs"):
        probing(arch).look_at(torch.zeros(4, 4))
    with pytest.raises(ShapeError, match="at least 5 inputs"):
        probing(arch).look_at(torch.zeros(5, 3))
    with pytest.raises(ShapeError, match="probes=n"):
        tokens(arch).look_at(torch.zeros(5, 4))


def test_bad_input_says_what_to_do():
    arch = symflow.mlp([4, 5, 2])
    field = tokens(arch)
    with pytest.raises(ShapeError, match="D \\+ extra"):
        field(torch.zeros(2, 5), torch.zeros(2))
    with pytest.raises(ShapeError, match="'symmetric' or 'all'"):
        RelationalTransformer(arch, nodes="hidden")
    with pytest.raises(ShapeError, match="heads divide width"):
        RelationalTransformer(arch, width=10, heads=4)
    assert issubclass(RelationalTransformer, VectorField)
    assert symmetric_layout(arch).features == 2


def test_construction_leaves_the_global_generator_alone():
    arch = symflow.mlp([4, 5, 2])
    torch.manual_seed(3)
    before = torch.get_rng_state()
    a, b, c = tokens(arch, seed=1), tokens(arch, seed=1), tokens(arch, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    same = [torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True)]
    other = [torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters(), strict=True)]
    assert all(same) and not all(other)
