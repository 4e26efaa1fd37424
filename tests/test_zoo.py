"""Zoos: tasks and their files, training against plain PyTorch loops, folders and interruptions."""

import copy
import gzip
import io
import json
import math
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_breast_cancer, load_digits
from torch import nn

import symflow
from symflow.errors import (
    DataNotFoundError,
    FileFormatError,
    ShapeError,
    StateError,
    UnknownTaskError,
)
from symflow.files import digest, load_tensors, save_tensors
from symflow.flows.source import FanIn, Gaussian
from symflow.zoo import (
    Task,
    Zoo,
    batch_order,
    breast_cancer,
    digits,
    idx,
    mnist,
    stacked,
    task,
    train,
)
from symflow.zoo.stacked import Stacked

ROOT = Path(__file__).parent.parent


def toy(n: int = 21, features: int = 3, classes: int = 3, seed: int = 0) -> Task:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n + 8, features, generator=generator)
    y = torch.arange(n + 8) % classes
    return Task("toy", x[:n], y[:n], x[n:], y[n:], classes)


def same(one: Zoo, two: Zoo) -> bool:
    """Equal bit for bit, NaN included."""
    names = ("initial", "final", "snapshots")
    pairs = [(getattr(one, n), getattr(two, n)) for n in names]
    pairs += [(one.metrics[n], two.metrics.get(n)) for n in one.metrics]
    return (one.seeds, one.settings) == (two.seeds, two.settings) and all(
        a is b is None or torch.equal(a.double().nan_to_num(9.9), b.double().nan_to_num(9.9))
        for a, b in pairs
    )


@pytest.fixture
def unchecked(monkeypatch):
    """Call symflow as users do: without the checks of annotations that run in tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


# ---------------------------------------------------------------- tasks


def test_breast_cancer_is_split_by_class_and_standardised_by_training_statistics():
    found = breast_cancer()
    assert found.classes == 2 and found.x_train.dtype == torch.float32
    assert found.y_train.bincount().tolist() == [212 - 42, 357 - 71]
    assert found.y_test.bincount().tolist() == [42, 71]
    mean, std = found.x_train.double().mean(0), found.x_train.double().std(0, correction=0)
    assert mean.abs().max() < 1e-6 and (std - 1).abs().max() < 1e-6
    # No row is lost and one map standardised all: sorted columns are affine in the raw ones.
    columns = np.sort(np.concatenate([found.x_train, found.x_test]).astype(np.float64), axis=0)
    raw = np.sort(load_breast_cancer().data, axis=0)
    for a, b in zip(columns.T, raw.T, strict=True):
        assert np.corrcoef(a, b)[0, 1] > 1 - 1e-9


def test_the_split_depends_on_the_seed_alone():
    one, two, other = breast_cancer(seed=1), breast_cancer(seed=1), breast_cancer(seed=2)
    assert torch.equal(one.x_test, two.x_test) and one.digest == two.digest
    assert not torch.equal(one.x_test, other.x_test) and one.digest != other.digest


def test_digits_are_standardised_by_one_number_each():
    found = digits(test_fraction=0.5)
    assert abs(float(found.x_train.double().mean())) < 1e-6
    assert abs(float(found.x_train.double().std(correction=0)) - 1) < 1e-6
    # Differences between pixels are those of the raw images up to one factor.
    raw = load_digits().data
    values = np.unique(np.concatenate([found.x_train, found.x_test]))
    assert len(values) == len(np.unique(raw)) == 17
    assert np.ptp(np.diff(values)) < 1e-5


@pytest.mark.parametrize("fraction", [0.0, 1.0, 0.001])
def test_a_split_must_leave_examples_on_both_sides(fraction):
    with pytest.raises(ShapeError, match=r"test_fraction.*class 0"):
        breast_cancer(test_fraction=fraction)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"test_fraction": math.nan}, "test_fraction must be a finite number .* got nan"),
        ({"test_fraction": "half"}, "test_fraction must be a finite number .* got 'half'"),
        ({"seed": None}, "seed must be a whole number, got None"),
    ],
)
def test_a_split_needs_numbers(wrong, message, unchecked):
    for load in (breast_cancer, digits):
        with pytest.raises(ShapeError, match=message):
            load(**wrong)


def test_data_are_told_apart_by_values_shapes_and_types():
    """The digest of files of before is that of now: finished zoos stay finished."""
    x, y = torch.eye(4), torch.tensor([0, 1, 0, 1])
    assert Task("t", x, y, x, y, 2).digest == "f94a081927f50924"
    tensors = [x, x + 1, x[:2], x.reshape(2, 8), x.double(), x.bfloat16(), None, x[:0]]
    assert len({digest(t) for t in tensors}) == len(tensors)
    assert digest(x, y) != digest(y, x) and digest(x[:, :2]) == digest(x[:, :2].clone())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_train": torch.zeros(4)}, r"x_train must be floating point inputs .* shape \(4,\)"),
        ({"x_train": torch.zeros(4, 2, dtype=torch.int64)}, "x_train.*int64"),
        ({"x_train": torch.zeros(0, 2)}, "x_train.*n >= 1"),
        ({"x_test": torch.zeros(4, 3)}, "same features"),
        ({"y_test": torch.zeros(3, dtype=torch.int64)}, "y_test must be 4 int64 labels"),
        ({"y_test": torch.zeros(4)}, r"y_test.*float32"),
        ({"x_test": torch.full((4, 2), math.nan)}, r"x_test holds 8 NaN or infinite"),
        ({"y_train": torch.tensor([0, 1, 2, 3])}, "y_train.*from 0 to 2, got labels from 0 to 3"),
        ({"y_train": torch.tensor([0, 1, 2, -1])}, "labels from -1 to 2"),
        ({"classes": 1}, "classes must be at least 2"),
    ],
)
def test_a_task_checks_what_it_is_given(change, message):
    x, y = torch.zeros(4, 2), torch.tensor([0, 1, 2, 0])
    good = {"name": "t", "x_train": x, "y_train": y, "x_test": x, "y_test": y, "classes": 3}
    assert Task(**good).classes == 3
    with pytest.raises(ShapeError, match=message):
        Task(**(good | change))


# ---------------------------------------------------------------- IDX files

NAMES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"]
NAMES += ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]


def idx_bytes(array: np.ndarray, code: int = 8) -> bytes:
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    return head + array.astype(np.uint8).tobytes()


def write_idx(folder: Path, *, dot: bool = False, packed: bool = False) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (6, 2, 3)), np.array([0, 1, 2, 3, 0, 1])]
    arrays += [rng.integers(0, 256, (4, 2, 3)), np.array([3, 2, 1, 0])]
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip(NAMES, arrays, strict=True):
        name = name.replace("-idx", ".idx") if dot else name
        data = idx_bytes(array)
        path = folder / (name + ".gz" if packed else name)
        path.write_bytes(gzip.compress(data) if packed else data)
    return arrays


@pytest.mark.parametrize("dot", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_are_read_under_each_spelling(tmp_path, dot, packed):
    train_x, train_y, test_x, test_y = write_idx(tmp_path / "shapes", dot=dot, packed=packed)
    found = idx(tmp_path / "shapes")
    assert (found.name, found.classes) == ("shapes", 4)
    mean, std = train_x.mean(), train_x.std()
    np.testing.assert_allclose(found.x_train, (train_x.reshape(6, 6) - mean) / std, atol=1e-5)
    np.testing.assert_allclose(found.x_test, (test_x.reshape(4, 6) - mean) / std, atol=1e-5)
    assert found.y_train.tolist() == train_y.tolist() and found.y_test.tolist() == test_y.tolist()


def test_mnist_and_other_folders_are_found_through_the_environment(tmp_path, monkeypatch):
    write_idx(tmp_path / "mnist")
    write_idx(tmp_path / "fashion")
    monkeypatch.setenv("SYMFLOW_DATA", str(tmp_path))
    found = mnist()
    assert found.name == "mnist" and found.digest == mnist(tmp_path / "fashion").digest
    assert task("mnist").digest == task("fashion").digest == found.digest
    assert task("fashion").name == task(tmp_path / "fashion").name == "fashion"
    assert task(str(tmp_path / "fashion")).name == "fashion"


def test_a_missing_folder_or_file_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.delenv("SYMFLOW_DATA", raising=False)
    with pytest.raises(DataNotFoundError, match=r"SYMFLOW_DATA is not set: put .*train-images"):
        mnist()
    with pytest.raises(DataNotFoundError, match=rf"{tmp_path} lacks {NAMES[0]}, .*{NAMES[3]}"):
        idx(tmp_path)
    write_idx(tmp_path)
    (tmp_path / NAMES[2]).unlink()
    with pytest.raises(DataNotFoundError, match=rf"lacks {NAMES[2]}: put"):
        mnist(tmp_path)
    with pytest.raises(DataNotFoundError, match="nowhere lacks"):
        task(tmp_path / "nowhere")


def test_an_unknown_task_lists_the_known_ones(tmp_path, monkeypatch):
    monkeypatch.setenv("SYMFLOW_DATA", str(tmp_path))
    with pytest.raises(UnknownTaskError, match=r"'cancer'.*breast_cancer, digits, mnist"):
        task("cancer")


def damaged(data: list[bytes], arrays: list[np.ndarray]) -> dict[str, tuple[int, bytes, str]]:
    """Kinds of damage: which file, its new contents, what the message says."""
    return {
        "truncated": (0, data[0][:-1], r"wanted 52 bytes for shape \(6, 2, 3\), got 51"),
        "too long": (1, data[1] + b"x", "wanted 14 bytes"),
        "empty": (1, b"", "it has 0 bytes"),
        "head only": (0, data[0][:9], "wanted an IDX file"),
        "foreign": (2, b"\x89PNG" + data[2][4:], "begins with 89 50 4e 47"),
        "labels as images": (0, data[1], "3 dimension"),
        "floats": (1, idx_bytes(arrays[1], code=0x0D), "unsigned bytes with 1 dimension"),
        "counts": (1, idx_bytes(arrays[1][:5]), "6 images and .* 5 labels"),
        "pixels": (2, idx_bytes(arrays[2][:, :, :2]), r"wanted images of \(2, 3\) pixels"),
        "no height": (0, idx_bytes(arrays[0][:, :0]), "at least one pixel, got 6 of 0 x 3"),
        "no width": (2, idx_bytes(arrays[2][:, :, :0]), "at least one pixel, got 4 of 2 x 0"),
        "classes": (3, idx_bytes(np.array([3, 2, 1, 4])), "label 4 has no training example"),
    }


@pytest.mark.parametrize("kind", list(damaged([b""] * 4, [np.zeros((1, 1, 3), int)] * 4)))
def test_a_damaged_idx_file_is_named(tmp_path, kind):
    arrays = write_idx(tmp_path)
    file, data, message = damaged([(tmp_path / n).read_bytes() for n in NAMES], arrays)[kind]
    (tmp_path / NAMES[file]).write_bytes(data)
    with pytest.raises(FileFormatError, match=message) as caught:
        idx(tmp_path)
    assert NAMES[file] in str(caught.value)


@pytest.mark.parametrize("cut", [slice(-5), slice(4, None), slice(0, 15)])
def test_a_damaged_gzip_file_is_named(tmp_path, cut):
    write_idx(tmp_path, packed=True)
    path = tmp_path / f"{NAMES[0]}.gz"
    path.write_bytes(path.read_bytes()[cut])
    with pytest.raises(FileFormatError, match=f"{NAMES[0]}.gz is no complete gzip file"):
        idx(tmp_path)


# ---------------------------------------------------------------- many networks as one


class Residual(nn.Module):
    """A forward that is no chain, with normalisation: it must be mapped."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        # A bias here would have no gradient but rounding, which Adam takes for a gradient.
        self.first, self.norm = nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5, momentum=0.3)
        self.last = nn.Linear(5, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.first(x))))


class Recurrent(nn.Module):
    """One module under two names, or two that share a leaf."""

    def __init__(self, *, twice: bool) -> None:
        nn.Module.__init__(self)
        self.inner, self.last = nn.Linear(3, 3), nn.Linear(3, 3)
        self.again = self.inner if twice else nn.Linear(3, 3)
        self.again.weight = self.inner.weight

    def forward(self, x):
        return self.last(torch.tanh(self.again(torch.tanh(self.inner(x)))))


class Doubled(nn.Linear):
    """Looks like a linear map, and computes something else."""

    def forward(self, x):
        return nn.Linear.forward(self, 2 * x)


def chain() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4, bias=False), nn.Tanh())


def tied() -> nn.Module:
    again = nn.Linear(3, 3)
    return nn.Sequential(again, nn.Tanh(), again, nn.Tanh(), nn.Linear(3, 3))


NETWORKS = {
    "chain": lambda: nn.Sequential(chain(), nn.Linear(4, 3)),
    "normalised": Residual,
    "counted": lambda: nn.Sequential(
        nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4, momentum=None), nn.ReLU(), nn.Linear(4, 3)
    ),
    "flat": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 3)),
    "tied": tied,
    "module twice": lambda: Recurrent(twice=True),
    "leaf twice": lambda: Recurrent(twice=False),
    "subclass": lambda: nn.Sequential(Doubled(3, 4), nn.ReLU(), nn.Linear(4, 3)),
}
symflow.arch.rule(Doubled)(symflow.arch.rules.find_rule(nn.Linear))


def architecture(kind: str) -> symflow.Architecture:
    return symflow.Architecture.from_module(NETWORKS[kind](), torch.zeros(2, 3))


@pytest.mark.parametrize("kind", NETWORKS)
@given(
    groups=st.integers(1, 3), size=st.integers(1, 3), batch=st.integers(1, 4), seed=st.integers(0)
)
def test_stacked_networks_are_the_networks(kind, groups, size, batch, seed):
    arch = architecture(kind)
    generator = torch.Generator().manual_seed(seed % 2**63)
    w = FanIn().sample(arch, groups * size, generator=generator, dtype=torch.float64)
    x = torch.randn(groups, batch, 3, generator=generator, dtype=torch.float64)
    out = Stacked(arch, training=False, like=w)(arch.unflatten(w), x)
    assert out.shape == (groups * size, 3, batch)
    for r, row in enumerate(w):
        net = arch.load_into(copy.deepcopy(arch.module).double(), row)
        torch.testing.assert_close(out[r].mT, net(x[r // size]))


def test_chains_are_recognised():
    """Else every case above would only try vmap."""
    chained = {
        kind
        for kind in NETWORKS
        if Stacked(architecture(kind), training=True, like=torch.zeros(0)).chained
    }
    assert chained == {"chain", "flat", "tied"}


def sequences(features: int = 3, length: int = 1, n: int = 21) -> Task:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, length, features, generator=generator), torch.arange(n) % 3
    return Task("sequences", x, y, x.clone(), y, 3)


@pytest.mark.parametrize("bias", [False, True])
def test_linear_maps_of_sequences_are_no_chain(bias):
    """A chain puts the batch where a sequence has its length."""
    net = nn.Sequential(nn.Linear(3, 5, bias=bias), nn.Tanh(), nn.Linear(5, 3, bias=bias))
    arch = symflow.Architecture.from_module(net, torch.zeros(2, 1, 3))
    assert not Stacked(arch, training=True, like=torch.zeros(0)).chained
    with pytest.raises(ShapeError, match=r"must give 3 numbers .* it gives shape \(1, 3\)"):
        train(arch, sequences(), runs=2, epochs=1)


@pytest.mark.parametrize("first", [True, False])
def test_flattened_sequences_train_as_plain_vectors(first):
    """With the flattening in front a chain again, with it behind the maps not."""
    maps = [nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)]
    net = nn.Sequential(*([nn.Flatten(), *maps] if first else [*maps, nn.Flatten()]))
    arch = symflow.Architecture.from_module(net, torch.zeros(2, 1, 3))
    assert Stacked(arch, training=True, like=torch.zeros(0)).chained is first
    plain = symflow.Architecture.from_module(nn.Sequential(*maps), torch.zeros(2, 3))
    options = {"runs": 2, "epochs": 2, "lr": 0.01, "dtype": torch.float64}
    data = sequences()
    flat = Task("flat", data.x_train[:, 0], data.y_train, data.x_test[:, 0], data.y_test, 3)
    wanted = train(plain, flat, **options)
    torch.testing.assert_close(train(arch, data, **options).final, wanted.final)


def test_a_wrong_fast_path_is_caught(monkeypatch):
    """A twin whose chain scrambles the outputs: it trained before without a word."""
    good = stacked._chained
    monkeypatch.setattr(stacked, "_chained", lambda *args: good(*args).flip(1))
    with pytest.raises(StateError, match="do not compute what each computes by itself"):
        train(symflow.mlp([3, 4, 3]), toy(), runs=2, epochs=1)
    train(architecture("normalised"), toy(), runs=2, epochs=1)  # no chain


def test_training_leaves_the_data_as_they_are():
    net = nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True), nn.Linear(3, 3))
    chained = symflow.Architecture.from_module(net, torch.zeros(2, 1, 3))
    net = nn.Sequential(nn.ReLU(inplace=True), nn.LayerNorm(3), nn.Linear(3, 3))
    mapped = symflow.Architecture.from_module(net, torch.zeros(2, 3))
    data, before = toy(), toy()
    assert (before.x_train[:2] < 0).any() and (before.x_test < 0).any()  # so that it could show
    for arch, fast in ((chained, True), (mapped, False)):
        assert Stacked(arch, training=True, like=torch.zeros(0)).chained is fast
        train(arch, data, runs=2, epochs=1, batch_size=5)
        for name in ("x_train", "x_test"):
            assert torch.equal(getattr(data, name), getattr(before, name))


# ---------------------------------------------------------------- training = plain PyTorch

PLAIN = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.7, weight_decay=0.1),
}
EPOCHS, BATCH = 3, 6


def plain_loop(net: nn.Module, data: Task, optimizer: str, schedule: str, seed: int, group: int):
    """One network by itself, as one would write it; returns the mean loss of each epoch."""
    steps = EPOCHS * math.ceil(len(data.x_train) / BATCH)
    opt = PLAIN[optimizer](net.parameters())
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    history = []
    for epoch in range(EPOCHS):
        total = 0.0
        for rows in batch_order(seed, epoch, group, len(data.x_train)).split(BATCH):
            opt.zero_grad()
            loss = nn.CrossEntropyLoss()(net(data.x_train[rows].double()), data.y_train[rows])
            loss.backward()
            opt.step()
            if schedule == "cosine":
                rate.step()
            total += loss.item() * len(rows)
        history.append(total / len(data.x_train))
    return history


@pytest.mark.parametrize(
    ("kind", "optimizer", "batches", "schedule"),
    [
        ("chain", "adam", "shared", "constant"),
        ("chain", "adam", "own", "cosine"),
        ("chain", "adamw", 2, "cosine"),
        ("chain", "sgd", "shared", "cosine"),
        ("chain", "sgd", "own", "constant"),
        ("normalised", "adam", "own", "constant"),
        ("normalised", "sgd", "shared", "cosine"),
        ("normalised", "adamw", 2, "constant"),
        ("counted", "adam", "shared", "constant"),
        ("tied", "adamw", 2, "constant"),
        ("module twice", "adam", "shared", "constant"),
        ("leaf twice", "adam", "own", "cosine"),
        ("flat", "adam", "shared", "constant"),
        ("subclass", "sgd", 2, "cosine"),
    ],
)
def test_each_run_ends_where_a_plain_loop_ends(kind, optimizer, batches, schedule):
    arch, data, runs = architecture(kind), toy(), 4
    zoo = train(
        *(arch, data),
        runs=runs,
        epochs=EPOCHS,
        batch_size=BATCH,
        optimizer=optimizer,
        lr=0.02,
        momentum=0.7,
        weight_decay=0.1,
        schedule=schedule,
        batches=batches,
        init=FanIn(),
        seed=5,
        dtype=torch.float64,
    )
    for r in range(runs):
        net = arch.load_into(NETWORKS[kind]().double(), zoo.initial[r])
        group = r // {"shared": runs, "own": 1}.get(batches, batches)
        history = plain_loop(net.train(), data, optimizer, schedule, 5, group)
        torch.testing.assert_close(arch.flatten(net), zoo.final[r], rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(zoo.metrics["history"][r].tolist(), history)
        net.eval()
        for split in ("train", "test"):
            x, y = (getattr(data, f"{name}_{split}") for name in "xy")
            out = net(x.double()).detach()
            loss = nn.CrossEntropyLoss()(out, y).item()
            assert math.isclose(zoo.metrics[f"{split}_loss"][r], loss, rel_tol=1e-8)
            accuracy = (out.argmax(-1) == y).double().mean().item()
            assert math.isclose(zoo.metrics[f"{split}_accuracy"][r], accuracy)


@pytest.mark.parametrize("broken", [{"seed": 6}, {"lr": 0.021}, {"weight_decay": 0.0}])
def test_another_setting_ends_elsewhere(broken):
    """The comparison above bites: none of these would pass it."""
    options = {"runs": 2, "epochs": EPOCHS, "batch_size": BATCH, "lr": 0.02, "weight_decay": 0.1}
    one, two = (
        train(architecture("chain"), toy(), dtype=torch.float64, **(options | change))
        for change in ({"seed": 5}, {"seed": 5} | broken)
    )
    start = one.initial if "seed" not in broken else two.initial
    assert torch.equal(start, two.initial)
    assert (one.final - two.final).abs().max() > 1e-4


@pytest.mark.parametrize("batches", ["shared", "own", 2])
def test_a_run_is_the_same_however_many_there_are(batches, dtype):
    arch = symflow.mlp([3, 4, 3])
    options = {"epochs": 2, "batch_size": 5, "batches": batches, "seed": 3, "dtype": dtype}
    few, many = (train(arch, toy(), runs=n, **options) for n in (2, 6))
    assert torch.equal(few.initial, many.initial[:2]) and few.seeds == many.seeds[:2]
    close = symflow.numerics.tolerance(dtype).close
    torch.testing.assert_close(few.final, many.final[:2], rtol=close, atol=close)
    assert len({tuple(row.tolist()) for row in many.initial}) == 6
    again = Gaussian(0.1).sample(
        arch, 1, generator=torch.Generator().manual_seed(many.seeds[4]), dtype=dtype
    )
    assert torch.equal(again[0], many.initial[4])


@given(seed=st.integers(-5, 2**64), epoch=st.integers(0, 9), group=st.integers(0, 9))
def test_batch_orders_are_orders_and_differ(seed, epoch, group):
    order = batch_order(seed, epoch, group, 40)
    assert sorted(order.tolist()) == list(range(40))
    assert torch.equal(order, batch_order(seed, epoch, group, 40))
    others = [(seed + 1, epoch, group), (seed, epoch + 1, group), (seed, epoch, group + 1)]
    assert not any(torch.equal(order, batch_order(*other, 40)) for other in others)


def test_snapshots_lie_on_the_trajectory():
    arch, data = symflow.mlp([3, 4, 3]), toy()  # four steps an epoch
    options = {"runs": 3, "batch_size": 6, "seed": 1}
    zoo = train(arch, data, epochs=4, burn_in=1, snapshot_every=3, **options)
    assert zoo.snapshots.shape == (3, 4, arch.dimension)  # after steps 7, 10, 13, 16
    assert torch.equal(zoo.snapshots[:, -1], zoo.final)
    every = train(arch, data, epochs=4, snapshot_every=1, **options)
    assert torch.equal(every.snapshots[:, [6, 9, 12, 15]], zoo.snapshots)
    for epoch in (1, 2, 3):
        shorter = train(arch, data, epochs=epoch, **options)
        assert torch.equal(every.snapshots[:, 4 * epoch - 1], shorter.final)
    assert (
        train(arch, data, epochs=1, burn_in=3, snapshot_every=1, **options).snapshots.numel() == 0
    )


# ---------------------------------------------------------------- what goes wrong in training


def exploding(seed: int) -> symflow.flows.Source:
    """N(0, 0.1^2), but from the generator with this seed weights whose products overflow."""

    class Exploding(symflow.flows.Source):
        def spread(self, leaf, fan_in):
            return 0.1

        def draw(self, shape, generator):
            w = Gaussian().draw(shape, generator)
            return w * 1e30 if generator.initial_seed() == seed else w

    return Exploding()


@pytest.mark.parametrize("kind", ["chain", "normalised"])
def test_a_run_that_diverges_stays_alone_and_is_told(tmp_path, kind):
    arch, data = architecture(kind), toy()
    options = {"runs": 4, "epochs": 2, "batch_size": 6, "optimizer": "sgd", "lr": 0.1}
    good = train(arch, data, **options)
    bad = train(arch, data, init=exploding(good.seeds[1]), folder=tmp_path, **options)
    if kind == "normalised":  # normalisation forgives the first scale, the last map does not
        assert bad.initial[1].abs().max() > 1e20
    rest = [0, 2, 3]
    assert bad.metrics["diverged"].tolist() == [False, True, False, False]
    assert torch.equal(bad.final[rest], good.final[rest])
    assert all(bad.metrics[name][1].isnan() for name in ("train_loss", "test_accuracy"))
    finite = bad.finite()
    assert len(finite) == 3 and finite.seeds == tuple(good.seeds[r] for r in rest)
    assert torch.equal(finite.weights, good.final[rest]) and len(good.finite()) == 4
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["metrics"]["test_loss"][1] is None and same(bad, Zoo.load(tmp_path, arch))


def test_dropout_drops_and_leaves_the_global_generator_alone():
    def network(p: float) -> symflow.Architecture:
        net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(p), nn.ReLU(), nn.Linear(8, 3))
        return symflow.Architecture.from_module(net, torch.zeros(1, 3))

    options = {"runs": 3, "epochs": 2, "batch_size": 6, "init": FanIn()}
    arch, before = network(0.5), torch.random.get_rng_state()
    wet = train(arch, toy(), **options)
    assert torch.equal(before, torch.random.get_rng_state())
    dry = train(network(0.0), toy(), **options)
    assert same(wet, train(network(0.5), toy(), **options))
    assert (wet.metrics["history"] - dry.metrics["history"]).abs().max() > 0.01
    torch.testing.assert_close(dry.final, train(network(0.0), toy(), **options).final)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runs": 0}, "runs must be at least 1, got 0"),
        ({"epochs": 0}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"snapshot_every": 0}, "snapshot_every"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"burn_in": -1}, "burn_in"),
        ({"lr": -0.1}, "lr must be a finite number"),
        ({"lr": math.nan}, "lr must be a finite number"),
        ({"weight_decay": math.inf}, "weight_decay"),
        ({"optimizer": "lbfgs"}, "optimizer must be one of adam, adamw, sgd, got 'lbfgs'"),
        ({"schedule": "step"}, "schedule must be one of constant, cosine"),
        ({"dtype": torch.float16}, "dtype must be one of torch.float32, torch.float64"),
        ({"batches": "mine"}, "batches must be 'shared', 'own', or .* got 'mine'"),
        ({"batches": 3}, "divisor of runs = 4; got 3"),
        ({"batches": True}, "batches must be 'shared', 'own', or .* got True"),
        ({"momentum": 1.0}, "momentum must be a finite number of at least 0 and below 1, got 1.0"),
        ({"runs": 2.0}, "runs must be a whole number, got 2.0"),
        ({"epochs": "3"}, "epochs must be a whole number, got '3'"),
        ({"batch_size": True}, "batch_size must be a whole number, got True"),
        ({"snapshot_every": 1.5}, "snapshot_every must be a whole number, got 1.5"),
        ({"burn_in": 0.5}, "burn_in must be a whole number, got 0.5"),
        ({"checkpoint_every": 2.5}, "checkpoint_every must be a whole number, got 2.5"),
        ({"seed": None}, "seed must be a whole number, got None"),
        ({"lr": "fast"}, "lr must be a finite number of at least 0, got 'fast'"),
        ({"lr": None}, "lr must be a finite number of at least 0, got None"),
        ({"optimizer": ["adam"]}, r"optimizer must be one of adam, adamw, sgd, got \['adam'\]"),
        ({"init": 0.1}, r"init must be a source such as .*Gaussian\(0.1\) .* got float"),
        ({"device": "gpu"}, r"device must be one that this machine has.* got 'gpu' \("),
        ({"device": "cuda:99"}, "device must be one that this machine has.* got 'cuda:99'"),
    ],
)
def test_a_setting_out_of_range_is_named(change, message, unchecked):
    with pytest.raises(ShapeError, match=message):
        train(symflow.mlp([3, 4, 3]), toy(), **({"runs": 4, "epochs": 1} | change))


def test_task_and_architecture_must_fit():
    with pytest.raises(ShapeError, match=r"inputs of shape \(4,\), .* 'toy' have shape \(3,\)"):
        train(symflow.mlp([4, 4, 3]), toy(), runs=1)
    with pytest.raises(ShapeError, match=r"must give 3 numbers .* gives shape \(2,\)"):
        train(symflow.mlp([3, 4, 2]), toy(), runs=1)
    with pytest.raises(ShapeError, match="batch_size = 4 leaves a mini-batch of one of the 21"):
        train(symflow.mlp([3, 4, 3], batch_norm=True), toy(), runs=1, batch_size=4)


def test_images_are_shaped_as_the_architecture_takes_them():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    arch = symflow.Architecture.from_module(net, torch.zeros(1, 2, 2))
    flat = train(symflow.mlp([4, 3]), toy(features=4), runs=2, epochs=1)
    torch.testing.assert_close(train(arch, toy(features=4), runs=2, epochs=1).final, flat.final)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_shows_on_a_terminal_only(capsys, monkeypatch):
    options = {"runs": 2, "epochs": 2}
    train(symflow.mlp([3, 4, 3]), toy(), **options)
    assert capsys.readouterr() == ("", "")
    for progress in (True, False):
        monkeypatch.setattr(sys, "stderr", Terminal())
        train(symflow.mlp([3, 4, 3]), toy(), progress=progress, **options)
        assert ("4/4" in sys.stderr.getvalue()) is progress


# ---------------------------------------------------------------- a zoo and its folder


@pytest.fixture(scope="module")
def small() -> Zoo:
    return train(symflow.mlp([3, 4, 3]), toy(), runs=3, epochs=2, snapshot_every=1)


def test_a_zoo_comes_back_from_its_folder(tmp_path, small):
    small.save(tmp_path)
    found = Zoo.load(tmp_path)
    assert same(small, found) and found.provenance == small.provenance
    assert found.arch.fingerprint == small.arch.fingerprint
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["settings"]["task"] == "toy" and meta["settings"]["lr"] == 0.001
    assert meta["provenance"]["torch"] == torch.__version__ and meta["runs"] == 3
    np.testing.assert_allclose(meta["metrics"]["test_loss"], small.metrics["test_loss"])


def test_runs_can_be_selected(small):
    part = small.select([2, 0])
    assert torch.equal(part.final, small.final[[2, 0]])
    assert torch.equal(part.snapshots, small.snapshots[[2, 0]])
    assert part.seeds == (small.seeds[2], small.seeds[0])
    assert torch.equal(part.metrics["history"], small.metrics["history"][[2, 0]])
    assert len(small.select(small.metrics["test_loss"] < 0)) == 0
    assert "3 runs" in repr(small) and "4 snapshots" in repr(small)


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, np.array])
def test_masks_select_and_are_no_indices(small, kind, unchecked):
    part = small.select(kind([True, False, True]))
    assert torch.equal(part.final, small.final[[0, 2]])
    assert torch.equal(small.select(kind([1, 0, 1])).final, small.final[[1, 0, 1]])
    assert torch.equal(small.select(kind([-1])).final, small.final[[2]])
    assert len(small.select(kind([False] * 3))) == 0


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([0, 3], "indices from -3 to 2 for 3 runs, got some from 0 to 3"),
        (torch.tensor([-4, 1]), "indices from -3 to 2 for 3 runs, got some from -4 to 1"),
        ([True, False], "a boolean mask, must have one entry for each of 3 runs, got 2"),
        (torch.ones(4, dtype=torch.bool), "one entry for each of 3 runs, got 4"),
        ([0.5], r"runs must be indices .* got torch.float32 of shape \(1,\)"),
        (torch.tensor([[0, 1]]), r"runs must be indices .* of shape \(1, 2\)"),
        ("all", "runs must be indices .* got a str"),
        (1, r"runs must be indices .* of shape \(\)"),
    ],
)
def test_a_selection_out_of_range_is_refused(small, runs, message, unchecked):
    with pytest.raises(ShapeError, match=message):
        small.select(runs)
    assert len(small.select([])) == len(small.select(slice(3, 9))) == 0


def test_an_architecture_of_the_users_must_be_given_and_must_be_the_same(tmp_path, small):
    small.save(tmp_path / "mlp")
    other = symflow.mlp([3, 5, 3])
    with pytest.raises(FileFormatError) as caught:
        Zoo.load(tmp_path / "mlp", other)
    assert small.arch.fingerprint in str(caught.value) and other.fingerprint in str(caught.value)
    arch = architecture("normalised")
    w = torch.zeros(2, arch.dimension)
    Zoo(arch, w, w).save(tmp_path / "traced")
    with pytest.raises(FileFormatError, match="give the architecture"):
        Zoo.load(tmp_path / "traced")
    assert Zoo.load(tmp_path / "traced", arch).arch is arch


def test_a_folder_without_a_zoo_or_with_a_damaged_one_is_refused(tmp_path, small):
    with pytest.raises(DataNotFoundError, match="holds no zoo"):
        Zoo.load(tmp_path)
    small.save(tmp_path)
    path = tmp_path / "weights.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(FileFormatError, match="no complete safetensors file"):
        Zoo.load(tmp_path)
    save_tensors(path, {"initial": small.initial})
    with pytest.raises(FileFormatError, match="wanted the format 'symflow zoo 1', got None"):
        Zoo.load(tmp_path)
    path.write_bytes(whole)
    tensors, meta = load_tensors(path)
    for broken in ({"final": small.final[:2]}, {"seeds": [1]}):
        save_tensors(
            path,
            tensors | {k: v for k, v in broken.items() if k == "final"},
            meta | {k: v for k, v in broken.items() if k == "seeds"},
        )
        with pytest.raises(FileFormatError, match="no complete zoo"):
            Zoo.load(tmp_path)
    del tensors["initial"]
    save_tensors(path, tensors, meta)
    with pytest.raises(FileFormatError, match="no complete zoo: 'initial'"):
        Zoo.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"initial": torch.zeros(2, 31)}, "initial must have shape"),
        ({"final": torch.zeros(3, 30)}, "must have shape"),
        ({"snapshots": torch.zeros(3, 31)}, "snapshots must have shape"),
        ({"seeds": (1, 2)}, "seeds must have one entry for each of 3 runs, got 2"),
        ({"metrics": {"test_loss": torch.zeros(4)}}, "test_loss must have one entry"),
    ],
)
def test_a_zoo_checks_its_shapes(change, message):
    w = torch.zeros(3, 31)
    with pytest.raises(ShapeError, match=message):
        Zoo(**({"arch": symflow.mlp([3, 4, 3]), "initial": w, "final": w} | change))


# ---------------------------------------------------------------- interruptions

RESUMED = {"runs": 3, "epochs": 5, "batch_size": 6, "snapshot_every": 3, "lr": 0.01}


class Interrupted(Exception):
    pass


def interrupt(monkeypatch, call: int, *, after: bool) -> None:
    """Break off at a certain write, before or after the file gets its name."""
    replace, count = os.replace, 0

    def broken(source, target):
        nonlocal count
        count += 1
        if count == call and not after:
            raise Interrupted
        replace(source, target)
        if count == call:
            raise Interrupted

    monkeypatch.setattr("symflow.files.os.replace", broken)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("kind", ["chain", "counted"])
def test_interrupted_at_any_write_a_training_ends_the_same(tmp_path, monkeypatch, kind, optimizer):
    arch, data = architecture(kind), toy()
    options = RESUMED | {"optimizer": optimizer, "momentum": 0.9 * (kind == "chain")}
    whole = train(arch, data, **options)
    broken = 0
    for call in range(1, 7):  # snapshots, state, snapshots, state, zoo, its description
        for after in (False, True):
            folder = tmp_path / f"{call}{after}"
            with monkeypatch.context() as patch:
                interrupt(patch, call, after=after)
                with pytest.raises(Interrupted):
                    train(arch, data, folder=folder, checkpoint_every=2, **options)
            broken += (folder / "checkpoint.safetensors").exists()
            if not (folder / "weights.safetensors").exists():
                with pytest.raises(DataNotFoundError, match="holds"):
                    Zoo.load(folder, arch)
            assert same(whole, train(arch, data, folder=folder, checkpoint_every=2, **options))
            assert same(whole, Zoo.load(folder, arch))
            names = {path.name for path in folder.iterdir()}
            assert names == {"weights.safetensors", "meta.json"}
    assert broken == 9  # all but those before the first state was there


def test_a_resumed_training_starts_from_its_state(tmp_path, monkeypatch):
    """The twin: with another state in the file it ends elsewhere, so the state is what counts."""
    arch, data = symflow.mlp([3, 4, 3]), toy()
    whole = train(arch, data, **RESUMED)
    interrupt(monkeypatch, 5, after=False)
    with pytest.raises(Interrupted):
        train(arch, data, folder=tmp_path, checkpoint_every=2, **RESUMED)
    monkeypatch.undo()
    path = tmp_path / "checkpoint.safetensors"
    tensors, meta = load_tensors(path)
    assert meta["epoch"] == 4
    for name in ("weights", "optimizer.0.exp_avg", "optimizer.0.step"):
        save_tensors(path, tensors | {name: tensors[name] + 1}, meta)
        (tmp_path / name).mkdir()
        for file in tmp_path.glob("*.safetensors"):
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
        assert not same(whole, train(arch, data, folder=tmp_path / name, **RESUMED))
    save_tensors(path, tensors, meta)
    assert same(whole, train(arch, data, folder=tmp_path, **RESUMED))


KILLED = """
import os, signal, sys, torch
torch.set_num_threads(1)
import symflow, symflow.files
from symflow.zoo import breast_cancer, train
replace, count, (call, after) = os.replace, 0, map(int, sys.argv[2:])
def deadly(source, target):
    global count
    count += 1
    if count == call and not after: os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
    if count == call: os.kill(os.getpid(), signal.SIGKILL)
symflow.files.os.replace = deadly
train(symflow.mlp([30, 8, 2]), breast_cancer(), runs=5, epochs=4, snapshot_every=10,
      batches="own", folder=sys.argv[1], checkpoint_every=1)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("call", "after"), [(4, 0), (5, 1)])
def test_killed_with_sigkill_a_training_goes_on_and_ends_the_same(tmp_path, call, after):
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(call), str(after)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    # Two files an epoch: at most the epoch that was going on is lost.
    assert load_tensors(tmp_path / "checkpoint.safetensors")[1]["epoch"] == (call - 1) // 2
    assert bool(list(tmp_path.glob(".*.part"))) is not bool(after)
    options = {"runs": 5, "epochs": 4, "snapshot_every": 10, "batches": "own"}
    arch, data = symflow.mlp([30, 8, 2]), breast_cancer()
    resumed = train(arch, data, folder=tmp_path, checkpoint_every=1, **options)
    assert same(resumed, train(arch, data, **options))


def test_other_settings_are_refused_by_name(tmp_path, monkeypatch):
    arch, data = symflow.mlp([3, 4, 3]), toy()
    interrupt(monkeypatch, 3, after=False)
    with pytest.raises(Interrupted):
        train(arch, data, folder=tmp_path, checkpoint_every=2, **RESUMED)
    monkeypatch.undo()
    changes = [
        ({"lr": 0.02}, r"\(lr: there 0.01, now 0.02\)"),
        ({"epochs": 9, "seed": 4}, r"\(epochs: there 5, now 9; seed: there 0, now 4\)"),
        ({"init": FanIn()}, r"init: there 'Gaussian\(std=0.1\)', now 'FanIn\(\)'"),
        ({"dtype": torch.float64}, "dtype: there 'float32', now 'float64'"),
    ]
    for stage in ("interrupted", "finished"):
        for change, message in changes:
            with pytest.raises(FileFormatError, match=message):
                train(arch, data, folder=tmp_path, **(RESUMED | change))
        with pytest.raises(FileFormatError, match="data: there"):
            train(arch, toy(seed=1), folder=tmp_path, **RESUMED)
        with pytest.raises(FileFormatError, match=arch.fingerprint):
            train(symflow.mlp([3, 5, 3]), data, folder=tmp_path, **RESUMED)
        if stage == "interrupted":
            done = train(arch, data, folder=tmp_path, **RESUMED)
    # A finished folder is read, not trained again: even the seconds are those of then.
    again = train(arch, data, folder=tmp_path, **RESUMED)
    assert same(done, again) and done.provenance == again.provenance


def test_a_damaged_state_is_refused(tmp_path, monkeypatch):
    arch, data = symflow.mlp([3, 4, 3]), toy()
    interrupt(monkeypatch, 5, after=False)
    with pytest.raises(Interrupted):
        train(arch, data, folder=tmp_path, checkpoint_every=2, **RESUMED)
    monkeypatch.undo()
    state, snapshots = (
        tmp_path / "checkpoint.safetensors",
        tmp_path / "snapshots-000004.safetensors",
    )
    contents = {path: path.read_bytes() for path in (state, snapshots)}
    for path, whole in contents.items():
        path.write_bytes(whole[:-3])
        with pytest.raises(FileFormatError, match=f"{path.name} is no complete"):
            train(arch, data, folder=tmp_path, **RESUMED)
        path.write_bytes(whole)
    snapshots.unlink()
    with pytest.raises(FileFormatError, match=r"snapshots-000004.safetensors, which is missing"):
        train(arch, data, folder=tmp_path, **RESUMED)
    save_tensors(state, {"w": torch.zeros(2)})
    with pytest.raises(FileFormatError, match=r"checkpoint.safetensors: wanted the format"):
        train(arch, data, folder=tmp_path, **RESUMED)
