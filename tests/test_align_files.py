"""Aligning files leaf by leaf, claims that a twin bears, and products that are kept."""

import itertools

import pytest
import torch
from torch import nn

import symflow
from symflow.align import Aligner, Alignment, WeightMatching, align_files
from symflow.align.costs import Contraction
from symflow.align.streaming import parts
from symflow.errors import FileFormatError, LeafError, SymmetryError, UnsupportedModuleError
from symflow.files import TensorFile, load_tensors, save_tensors


def networks(arch, seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, arch.dimension, generator=generator, dtype=torch.float64)


class Attending(nn.Module):
    """Two transformer-like layers on one stream that stays: heads, and units of an MLP."""

    def __init__(self, width=8, heads=2, hidden=12):
        super().__init__()
        self.heads = heads
        self.maps = nn.ModuleList(
            nn.ModuleDict(
                {
                    **{name: nn.Linear(width, width) for name in ("q", "k", "v", "o")},
                    "up": nn.Linear(width, hidden),
                    "down": nn.Linear(hidden, width),
                }
            )
            for _ in range(2)
        )

    def forward(self, x):
        for m in self.maps:
            q, k, v = (
                m[name](x).reshape(*x.shape[:-1], self.heads, -1).transpose(1, 2) for name in "qkv"
            )
            y = nn.functional.scaled_dot_product_attention(q, k, v)
            x = x + m["o"](y.transpose(1, 2).flatten(2))
            x = x + m["down"](torch.nn.functional.gelu(m["up"](x)))
        return x


def stored(folder, arch, w, meta=None):
    paths = [folder / f"{k}.safetensors" for k in range(len(w))]
    for path, one in zip(paths, w, strict=True):
        save_tensors(path, arch.state_dict(one), meta)
    return paths


def test_the_function_stays_and_layers_are_independent(tmp_path):
    x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    arch = symflow.Architecture.from_module(Attending(), x)
    symmetry = arch.symmetry.compact
    assert len(parts(symmetry)) == 4  # heads with what is in them, and units, of both layers
    assert {a.name for part in parts(symmetry) for a in part.axes} == {
        a.name for a in symmetry.axes
    }
    w = networks(arch, 0, 2)
    a, b = stored(tmp_path, arch, w)
    found = align_files(arch, a, b, tmp_path / "out")
    state, _ = load_tensors(tmp_path / "out")
    moved = arch.flatten(state)
    assert torch.allclose(arch.apply(moved, x.double()), arch.apply(w[1], x.double()))
    assert torch.allclose(moved, symmetry.act(found.element, w[1]))
    together = WeightMatching()(symmetry, w[0], w[1])
    assert found.objective > found.before
    fixed = sum(
        float(w[0][leaf.span] @ w[1][leaf.span]) for leaf in symmetry.leaves if not leaf.axes
    )
    assert found.objective + fixed == pytest.approx(float(together.objective), rel=1e-6)


def test_layout_dtypes_counters_and_metadata_are_those_of_the_second_file(tmp_path):
    arch = symflow.mlp([3, 6, 5, 2], "tanh", batch_norm=True)
    a, b = (
        {
            key: x.bfloat16() if x.is_floating_point() else x + 7
            for key, x in arch.state_dict(w.abs()).items()
        }
        for w in networks(arch, 0, 2)
    )
    for name, state in {"a": a, "b": b}.items():
        save_tensors(tmp_path / name, state, {"trained on": name})
    found = align_files(arch, tmp_path / "a", tmp_path / "b", tmp_path / "b")  # in its place
    state, meta = load_tensors(tmp_path / "b")
    assert meta == {"trained on": "b"}
    assert {k: (v.dtype, v.shape) for k, v in state.items()} == {
        k: (v.dtype, v.shape) for k, v in b.items()
    }
    counters = [k for k, v in b.items() if not v.is_floating_point()]
    assert counters and all(torch.equal(state[k], b[k]) for k in counters)
    w1 = arch.flatten({k: v.float() for k, v in b.items() if v.is_floating_point()})
    expected = arch.symmetry.compact.act(found.element, w1)
    moved = arch.flatten({k: v.float() for k, v in state.items() if v.is_floating_point()})
    assert torch.equal(moved, expected)


def test_what_fails_leaves_no_file(tmp_path):
    class Broken(Aligner):
        def __call__(self, symmetry, w0, w1) -> Alignment:
            raise RuntimeError("in the middle")

    arch = symflow.mlp([3, 4, 2])
    a, b = stored(tmp_path, arch, networks(arch, 0, 2))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="in the middle"):
        align_files(arch, a, b, tmp_path / "out", Broken())
    assert sorted(tmp_path.iterdir()) == before


def test_bad_files_are_refused(tmp_path):
    arch, other = symflow.mlp([3, 4, 2]), symflow.mlp([3, 4, 2, 2])
    a, b = stored(tmp_path, arch, networks(arch, 0, 2))
    with pytest.raises(LeafError, match="lacks the leaf"):
        align_files(other, a, b, tmp_path / "out")
    with pytest.raises(LeafError, match="has shape"):
        align_files(symflow.mlp([4, 4, 2]), a, b, tmp_path / "out")
    w = networks(arch, 0, 1)
    w[0, 0] = torch.nan
    save_tensors(tmp_path / "nan", arch.state_dict(w[0]))
    with pytest.raises(LeafError, match="NaN or infinite"):
        align_files(arch, a, tmp_path / "nan", tmp_path / "out")
    (tmp_path / "half").write_bytes(b.read_bytes()[:-8])
    with pytest.raises(FileFormatError, match="no complete safetensors file"):
        align_files(arch, a, tmp_path / "half", tmp_path / "out")
    (tmp_path / "text").write_text("this is something else")
    with pytest.raises(FileFormatError, match="no safetensors file"):
        TensorFile(tmp_path / "text")
    save_tensors(tmp_path / "whole", {"n": torch.arange(3)})
    with pytest.raises(FileFormatError, match="not floating point"):
        TensorFile(tmp_path / "whole").read("n")


# ---------------------------------------------------------------- twins


def test_a_module_without_values_is_believed_by_its_twin(tmp_path):
    small = symflow.Architecture.from_module(Attending(), torch.zeros(2, 4, 8))
    with torch.device("meta"):
        net, x = Attending(32, 2, 50), torch.zeros(2, 4, 32)
    with pytest.raises(UnsupportedModuleError, match="meta device"):
        symflow.Architecture.from_module(net, x)
    arch = symflow.Architecture.from_module(net, x, twin=small)
    direct = symflow.Architecture.from_module(Attending(32, 2, 50), torch.zeros(2, 4, 32))
    assert arch.fingerprint == direct.fingerprint
    w = networks(arch, 0, 2)
    a, b = (tmp_path / name for name in "ab")
    for path, one in zip((a, b), w, strict=True):
        save_tensors(path, arch.unflatten(one))
    assert align_files(arch, a, b, tmp_path / "out").objective > 0


def test_another_structure_is_no_twin():
    def net(*widths, activation=nn.Tanh):
        layers = [nn.Linear(n, m) for n, m in itertools.pairwise(widths)]
        return nn.Sequential(*(part for x in layers for part in (x, activation())), nn.Flatten())

    class Other(nn.Sequential):
        pass

    x = torch.zeros(2, 3)
    small = symflow.Architecture.from_module(net(3, 4, 2), x)
    symflow.Architecture.from_module(net(3, 9, 2), x, twin=small)
    with pytest.raises(SymmetryError, match=r"leaf .* is "):
        symflow.Architecture.from_module(net(3, 9, 9, 2), x, twin=small)
    with pytest.raises(SymmetryError, match="axis 'h1' is"):
        symflow.Architecture.from_module(net(3, 9, 2, activation=nn.GELU), x, twin=small)
    with pytest.raises(SymmetryError, match="says nothing about a Other"):
        symflow.Architecture.from_module(Other(*net(3, 9, 2)), x, twin=small)


# ---------------------------------------------------------------- products that are kept


ARCHITECTURES = {
    "mlp": lambda: symflow.mlp([5, 24, 20, 3], "gelu"),
    "signed": lambda: symflow.mlp([5, 12, 10, 3], "tanh"),
    "cyclic": lambda: symflow.mlp([5, 12, 10, 3], "gelu").with_groups(
        {"h1": symflow.groups.CyclicShift(12)}
    ),
    "attention": lambda: symflow.Architecture.from_module(Attending(), torch.zeros(2, 4, 8)),
    "cnn": lambda: symflow.Architecture.from_module(
        nn.Sequential(
            *(nn.Conv2d(2, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 20, 3), nn.ReLU()),
            *(nn.Conv2d(20, 12, 1), nn.GELU(), nn.Flatten(), nn.Linear(12 * 4, 3)),
        ),
        torch.zeros(2, 2, 6, 6),
    ),
}


@pytest.mark.parametrize("pairs", [1, 3])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_kept_products_are_those_of_the_elements_now(name, pairs):
    """Few units moved, all moved, some networks only: the costs are as if contracted anew."""
    arch = ARCHITECTURES[name]()
    symmetry, w0 = arch.symmetry.compact, networks(arch, 0, 1)
    w1 = networks(arch, 1, pairs)
    generator = torch.Generator().manual_seed(2)
    kept = Contraction(symmetry, w0, w1)
    every = torch.arange(pairs)
    element = symmetry.random(generator=generator, like=w1, batch=(pairs,))
    for k in range(12):
        axis = symmetry.axes[k % len(symmetry.axes)]
        g = symmetry.random(generator=generator, like=w1, batch=(pairs,))[axis.name]
        indices = isinstance(g, torch.Tensor) and g.shape == (pairs, axis.size)
        if k % 3 == 0 and indices:  # two units change places
            g = element[axis.name].clone()
            g[:, :2] = g[:, :2].flip(1)
        if k % 3 == 1 and indices:  # in the first network alone
            g[1:] = element[axis.name][1:]
        element = element | {axis.name: g}
        rows = every if k % 2 else every[:1]
        for other in symmetry.axes:
            costs = kept.costs(other.name, element, rows)
            anew = Contraction(symmetry, w0, w1).costs(other.name, element, rows)
            assert costs.keys() == anew.keys()
            for degree, c in costs.items():
                assert torch.allclose(c, anew[degree], rtol=1e-10, atol=1e-10)
        moved = kept.moved(element, w1)
        assert torch.allclose(moved, symmetry.act(element, w1), rtol=1e-12, atol=1e-12)


def test_large_networks_are_started_once():
    few, many = symflow.mlp([4, 8, 2], "gelu"), symflow.mlp([300, 220, 2], "gelu")
    for arch, starts in ((few, ("sequential", "random")), (many, ("sequential",))):
        w0, w1 = networks(arch, 0), networks(arch, 1)
        default, chosen = (WeightMatching(s)(arch.symmetry, w0, w1) for s in (None, starts))
        assert torch.equal(default.weights, chosen.weights)
