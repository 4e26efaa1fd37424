"""Flows trained by several processes, in half precision, and in less memory."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import symflow
from symflow.errors import ShapeError
from symflow.files import load_tensors
from symflow.flows import Gaussian, load
from symflow.nn import RelationalTransformer

TRAIN = """
import sys, torch
from types import SimpleNamespace
import symflow
from symflow.flows import Gaussian, Independent
torch.set_num_threads(1)
fabric = None
if sys.argv[2] == "together":
    from lightning_fabric import Fabric
    fabric = Fabric(accelerator="cpu", strategy="ddp", devices=2, num_nodes=1)
    fabric.launch()
arch = symflow.mlp([3, 4, 2])
w = Gaussian(0.3).sample(arch, 32, generator=torch.Generator().manual_seed(0))
x = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
flow = symflow.flows.geometric(arch, source=Gaussian(0.3), width=8, depth=1, heads=1,
                               edge_width=4, conditions=1, bridge=0.1)
flow.fit(SimpleNamespace(initial=w, final=2 * w + 0.5), inputs=x, behaviour=1.0, fabric=fabric,
         conditions=w[:, :1], steps=20, batch_size=8, log_every=5, checkpoint_every=10,
         optimizer="muon", folder=sys.argv[1])
"""


@pytest.fixture(scope="module")
def arch():
    return symflow.mlp([3, 4, 2])


@pytest.mark.slow  # three interpreters
def test_processes_train_what_one_trains(tmp_path):
    """The same global batch: the same weights, losses and checkpoint, up to the order of sums."""
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    commands = {
        "alone": [sys.executable, str(script)],
        "together": [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node=2", str(script)),
        ],
    }
    found = {}
    for name, command in commands.items():
        done = subprocess.run(
            [*command, str(tmp_path / name), name], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found[name] = load_tensors(tmp_path / name / "flow.safetensors")
    (alone, meta), (together, other) = found["alone"], found["together"]
    assert alone.keys() == together.keys()
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=1e-3, atol=1e-4, msg=name)
    losses = [[h["loss"] for h in m["history"]] for m in (meta, other)]
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert meta["step"] == other["step"] == 20
    assert load(tmp_path / "together" / "flow.safetensors").sample(2, steps=2).shape == (2, 26)


class Halves:
    """Two processes, this being one of them; the other's gradients are not there."""

    world_size, global_rank = 2, 1

    def all_reduce(self, data, *, reduce_op="mean"):
        return data

    def barrier(self):
        pass


def zoo(arch):
    w = Gaussian(0.3).sample(arch, 16, generator=torch.Generator().manual_seed(0))
    return SimpleNamespace(initial=w, final=2 * w + 0.5)


def make(arch, **options):
    return symflow.flows.euclidean(
        arch, source=Gaussian(0.3), width=8, depth=2, heads=1, edge_width=4, **options
    )


def test_a_share_is_no_whole(arch):
    """What the test above relies on: without the other half the result is another one."""
    half = make(arch).fit(zoo(arch), steps=3, batch_size=8, fabric=Halves())
    whole = make(arch).fit(zoo(arch), steps=3, batch_size=8)
    assert half.history[-1]["loss"] != pytest.approx(whole.history[-1]["loss"], rel=1e-3)
    with pytest.raises(ShapeError, match="batch_size = 7 cannot be shared by 2"):
        make(arch).fit(zoo(arch), steps=3, batch_size=7, fabric=Halves())


def test_half_precision_is_near_and_stays_in_the_field(arch):
    flows = {
        precision: make(arch).fit(zoo(arch), steps=60, lr=0.01, precision=precision)
        for precision in ("float32", "bfloat16")
    }
    losses = {k: f.history[-1]["loss"] for k, f in flows.items()}
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.1)
    assert {p.dtype for p in flows["bfloat16"].field.parameters()} == {torch.float32}
    assert flows["bfloat16"].sample(3, steps=2).dtype == torch.float32
    with pytest.raises(ShapeError, match="precision must be one of float32, bfloat16"):
        make(arch).fit(zoo(arch), steps=1, precision="float16")


def test_what_is_computed_again_has_the_same_gradients(arch):
    x = torch.randn(5, arch.dimension, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0, 1, 5)
    gradients, kept = [], []
    for recompute in (False, True):
        field = RelationalTransformer(arch, width=8, depth=4, heads=2, recompute=recompute)
        with torch.no_grad():
            for p in field.parameters():
                p.add_(0.1 * torch.ones_like(p))
        field(x, t).square().sum().backward()
        gradients.append([p.grad for p in field.parameters()])
        kept.append(field.training_bytes(256))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert kept[1] < 0.5 * kept[0]
    with pytest.raises(ShapeError, match="recompute"):
        RelationalTransformer(arch, nodes="all", recompute=True)


@pytest.mark.parametrize("kind", ["symmetric", "all"])
def test_memory_is_told_before_a_run(arch, kind):
    """What is kept grows in proportion to the batch, as was said."""
    field = RelationalTransformer(arch, nodes=kind)
    parameters = 5 * sum(p.numel() * p.element_size() for p in field.parameters())
    for n in (1, 7, 32):
        assert field.training_bytes(n) - parameters == pytest.approx(field._kept(n), rel=0.02)
    with pytest.raises(ShapeError, match="at least 1"):
        field.training_bytes(0)
