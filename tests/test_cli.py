"""The command symflow, end to end: what it prints against the library, what it writes, refusals."""

import copy
import importlib.metadata
import re
import subprocess
import sys
import types
from pathlib import Path

import jaxtyping
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import symflow
from symflow.cli import main

ARCH = symflow.mlp([5, 4, 4, 3])
RELU = ("--activation", "relu")


def weights(arch: symflow.Architecture, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(arch.dimension, generator=generator)


def save(path: Path, arch: symflow.Architecture, w: Tensor) -> Path:
    save_file({k: v.clone() for k, v in arch.state_dict(w).items()}, path)
    return path


@pytest.fixture(autouse=True)
def as_users_run_it(monkeypatch):
    """Each command traces an architecture; with annotations checked that takes a second, not 10 ms.

    The library's own tests check them.
    """
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def two(tmp_path) -> tuple[Path, Path]:
    """Two networks of ARCH in files."""
    return tuple(
        save(tmp_path / f"{n}.safetensors", ARCH, weights(ARCH, k)) for k, n in enumerate("ab")
    )


@pytest.fixture
def run(capsys):
    """Run the command; return what it prints, once it has ended as expected."""

    def call(*args: object, code: int = 0) -> str:
        try:
            found = main([str(a) for a in args])
        except SystemExit as stop:
            found = stop.code
        out, err = capsys.readouterr()
        assert found == code, err
        if code == 0:
            assert err == ""
            return out
        assert out == "" and err.startswith("symflow: error: ") and err.count("\n") == 1
        return err

    return call


def facts(out: str) -> dict[str, str]:
    """The lines ``name  value`` of what was printed."""
    rows = [re.split(r"\s{2,}", line) for line in out.splitlines()]
    return {row[0]: row[1] for row in rows if len(row) == 2}


def shown(x: float) -> object:
    """A number as it is printed, with six digits."""
    return pytest.approx(float(x), rel=1e-5, abs=1e-12)


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A user's module in the working directory; the path of imports is put back afterwards."""
    (tmp_path / "mynets.py").write_text(
        "import torch\n"
        "import symflow\n"
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)\n"
        "    def forward(self, x):\n"
        "        return self.last(torch.tanh(self.first(x)))\n"
        "def pair():\n"
        "    return Net(), torch.zeros(1, 4)\n"
        "def arch():\n"
        "    return symflow.Architecture.from_module(*pair())\n"
        "def nothing():\n"
        "    return None\n"
        "def opaque():\n"
        "    return nn.LSTM(4, 6), torch.zeros(1, 4)\n"
        "class Twice(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.inner = nn.Bilinear(4, 4, 4)\n"
        "    def forward(self, x):\n"
        "        return self.inner(x, x)\n"
        "def bilinear():\n"
        "    return nn.Sequential(nn.Linear(4, 4), Twice()), torch.zeros(1, 4)\n"
        "def failing():\n"
        "    raise OverflowError('too\\nmany')\n"
        "number = 3\n"
    )
    (tmp_path / "broken.py").write_text("import no_such_library\n")
    (tmp_path / "wrong.py").write_text("def net(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield
    for name in ("mynets", "broken"):
        sys.modules.pop(name, None)


class Net(nn.Module):
    """What mynets.Net is."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


NET = symflow.Architecture.from_module(Net(), torch.zeros(1, 4))


# ---------------------------------------------------------------- inspect


def test_inspect_recognises_an_mlp_and_says_so(run, two):
    out = run("inspect", two[0])
    w = weights(ARCH, 0).double()
    assert out.startswith("MLP 5-4-4-3, relu, recognised by its leaves (the activation is assumed")
    assert str(ARCH.symmetry) in out
    found = facts(out)
    assert found["parameters"] == str(5 * 4 + 4 + 4 * 4 + 4 + 4 * 3 + 3)
    assert float(found["norm"]) == shown(w.norm())
    assert float(found["norm, balanced"]) == shown(symflow.Quotient(ARCH).project(w).norm())
    assert float(found["norm, balanced"]) < float(found["norm"])
    rows = {line.split()[0]: re.split(r"\s{2,}", line) for line in out.splitlines() if "." in line}
    assert rows["2.weight"][:4] == ["2.weight", "4 x 4", "float32", "h2 x h1"]
    assert float(rows["2.weight"][4]) == shown(w[24:40].norm())  # after 4 x 5 and 4 others
    assert rows["4.bias"][:4] == ["4.bias", "3", "float32", "-"]


def test_inspect_takes_another_activation(run, two):
    out = run("inspect", two[0], "--activation", "tanh")
    assert out.startswith("MLP 5-4-4-3, tanh, recognised by its leaves\n")
    assert str(symflow.mlp([5, 4, 4, 3], "tanh").symmetry) in out
    found = facts(out)
    assert found["norm, balanced"] == found["norm"]  # nothing to balance


@pytest.mark.parametrize("options", [{"bias": False}, {"batch_norm": True}], ids=str)
@pytest.mark.parametrize("explicit", [False, True])
def test_inspect_sees_biases_and_normalisations(run, tmp_path, options, explicit):
    arch = symflow.mlp([5, 4, 3], **options)
    file = save(tmp_path / "w.safetensors", arch, weights(arch, 0).abs())
    out = run("inspect", file, *(["--mlp", "5,4,3"] if explicit else []))
    assert ("recognised" in out) is not explicit
    assert str(arch.symmetry) in out
    assert facts(out)["parameters"] == str(arch.num_parameters)


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize("how", [["pair"], ["arch"], ["Net", "--input", "1,4"]], ids=lambda x: x[0])
def test_inspect_imports_a_module_from_the_working_directory(run, tmp_path, how):
    file = save(tmp_path / "net.safetensors", NET, weights(NET, 0))
    out = run("inspect", file, "--module", f"mynets:{how[0]}", *how[1:])
    assert out.startswith("Net, traced\n") and str(NET.symmetry) in out
    assert facts(out)["parameters"] == str(NET.num_parameters)


def test_inspect_lists_the_tensors_of_what_it_does_not_know(run, tmp_path):
    file = tmp_path / "w.safetensors"
    save_file({"body.weight": torch.zeros(2, 3).half(), "steps": torch.tensor(5)}, file)
    lines = run("inspect", file).splitlines()
    assert [line.split() for line in lines[:1] + lines[2:4]] == [
        ["tensor", "shape", "dtype"],
        ["body.weight", "2", "x", "3", "float16"],
        ["steps", "-", "int64"],
    ]
    assert "--module package:factory" in lines[-1]


@pytest.mark.parametrize(
    "shapes",
    [
        {"0.weight": (4, 5), "2.weight": (3, 3)},
        {"0.weight": (4, 5), "1.weight": (3, 4)},
        {"0.weight": (4, 5), "0.bias": (5,)},
        {"0.weight": (0, 5)},
        {"0.weight": (4, 5), "mask": (4,)},
        {},
    ],
    ids=str,
)
def test_what_is_no_chain_is_not_taken_for_one(run, tmp_path, shapes):
    file = tmp_path / "w.safetensors"
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, file)
    assert "the leaves are not 0.weight, 0.bias, 2.weight" in run("inspect", file)
    assert "the leaves are not" in run("distance", file, file, code=2)


# ---------------------------------------------------------------- align and distance


@pytest.mark.parametrize("section", ["auto", "balanced", "sphere"])
def test_align_writes_b_as_the_library_aligns_it(run, two, tmp_path, section):
    out = tmp_path / "new" / "out.safetensors"
    found = facts(run("align", *two, *RELU, "-o", out, "--section", section))
    q = symflow.Quotient(ARCH, section)
    w0, w1 = weights(ARCH, 0).double(), weights(ARCH, 1).double()
    wanted = q.align(w0, w1, bounds=True)
    torch.testing.assert_close(
        ARCH.flatten(load_file(out)).double(), wanted.weights, atol=1e-6, rtol=1e-6
    )
    x0, x1 = q.project(w0), q.project(w1)
    lower, upper = q.distance_bounds(w0, w1)
    assert float(found["objective before"]) == shown(x0 @ x1)
    assert float(found["objective"]) == shown(x0 @ wanted.weights)
    assert float(found["objective is at most"]) == shown(wanted.objective_bound)
    assert float(found["distance before"]) == shown(q.manifold.dist(x0, x1))
    assert float(found["distance"]) == shown(upper) and float(upper) < float(
        found["distance before"]
    )
    assert float(found["distance is at least"]) == shown(lower)
    assert found["section"] == {"auto": "balanced"}.get(section, section)
    assert found["search ended at"].startswith("a fixed point")


def test_an_aligned_network_is_the_same_function(run, two, tmp_path):
    out = tmp_path / "out.safetensors"
    run("align", *two, *RELU, "-o", out)
    x, net = (
        torch.randn(9, 5, generator=torch.Generator().manual_seed(2)),
        copy.deepcopy(ARCH.module),
    )
    outputs = [net(x) for file in (two[1], out) if net.load_state_dict(load_file(file))]
    torch.testing.assert_close(outputs[0], outputs[1])
    assert not torch.equal(load_file(out)["0.weight"], load_file(two[1])["0.weight"])


def test_without_a_section_only_isometries_are_left(run, two, tmp_path):
    out, arch = tmp_path / "out.safetensors", symflow.mlp([5, 4, 4, 3], "tanh")
    found = facts(run("align", *two, "-o", out, "--section", "none", "--activation", "tanh"))
    assert found["section"] == "none"
    moved, w = arch.flatten(load_file(out)), weights(arch, 1)
    assert torch.equal(moved.abs().sort().values, w.abs().sort().values)  # to the last bit
    assert "choose section='balanced'" in run("distance", *two, *RELU, "--section", "none", code=2)


def test_distance_shows_bounds_and_the_raw_distance(run, two):
    q = symflow.Quotient(ARCH)
    w0, w1 = weights(ARCH, 0).double(), weights(ARCH, 1).double()
    lower, upper = q.distance_bounds(w0, w1)
    found = facts(run("distance", *two, *RELU))
    assert float(found["distance"]) == shown(upper)
    assert float(found["distance is at least"]) == shown(lower)
    gap = (upper - lower) / upper
    assert float(found["relative gap"].rstrip("%")) == pytest.approx(100 * float(gap), abs=0.005)
    assert float(found["raw distance"]) == shown((w0 - w1).norm())


def test_a_copy_is_at_distance_zero(run, two, generator):
    w = weights(ARCH, 0)
    g = ARCH.symmetry.random(generator=generator, like=w)
    save(two[1], ARCH, ARCH.symmetry.act(g, w))
    found = facts(run("distance", *two, *RELU))
    assert float(found["distance"]) < 1e-5 < 0.1 < float(found["raw distance"])
    same = facts(run("distance", two[0], two[0], *RELU))
    assert (same["raw distance"], same["relative gap"]) == ("0", "0.00%")


def test_keys_dtypes_and_counters_stay_and_statistics_do_not_count(run, tmp_path):
    arch = symflow.mlp([3, 4, 2], batch_norm=True)
    files = [tmp_path / f"{n}.safetensors" for n in "ab"]
    for k, file in enumerate(files):
        state = arch.state_dict(weights(arch, k).abs())
        state["1.num_batches_tracked"] = torch.tensor(100 + k)
        state["3.weight"] = state["3.weight"].bfloat16()  # mixed precision
        save_file({key: value.clone() for key, value in state.items()}, file)
    out = tmp_path / "out.safetensors"
    found = facts(run("align", *files, "-o", out, *RELU))
    old, new = load_file(files[1]), load_file(out)
    assert {k: (v.dtype, v.shape) for k, v in new.items()} == {
        k: (v.dtype, v.shape) for k, v in old.items()
    }
    assert int(new["1.num_batches_tracked"]) == 101
    parameters = ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"]
    first = load_file(files[0])
    squares = [(first[k].double() - old[k].double()).square().sum() for k in parameters]
    assert float(found["raw distance"]) == shown(torch.stack(squares).sum().sqrt())


@pytest.mark.usefixtures("modules")
def test_distance_of_a_users_modules(run, tmp_path):
    files = [save(tmp_path / f"{k}.safetensors", NET, weights(NET, k)) for k in range(2)]
    found = facts(run("distance", *files, "--module", "mynets:pair"))
    w0, w1 = (weights(NET, k).double() for k in range(2))
    assert float(found["distance"]) == shown(symflow.Quotient(NET).distance(w0, w1))


@pytest.mark.parametrize("command", ["align", "interpolate"])
def test_no_network_is_written_with_an_activation_that_is_assumed(run, two, tmp_path, command):
    out = tmp_path / "out.safetensors"
    message = run(command, *two, "-o", out, code=2)
    assert f"{two[0]} does not tell its activation" in message
    assert "give --activation, such as --activation relu (or --module)" in message
    assert not out.exists()
    run(command, *two, "-o", out, "--activation", "tanh")
    tanh, x = symflow.mlp([5, 4, 4, 3], "tanh"), torch.linspace(-1, 1, 5)[None]
    if command == "align":  # the function that ReLU's scales would have changed
        before, after = (ARCH.flatten(load_file(file)) for file in (two[1], out))
        torch.testing.assert_close(tanh.apply(after, x), tanh.apply(before, x))


@pytest.mark.parametrize("command", ["align", "distance", "interpolate"])
def test_what_is_assumed_is_said_on_standard_error(capsys, two, tmp_path, command):
    out = [] if command == "distance" else ["-o", str(tmp_path / "out.safetensors")]
    files = [str(file) for file in two]
    assert main([command, *files, *out, "--mlp", "5,4,4,3"]) == 0
    note = "symflow: note: MLP 5-4-4-3, relu (the activation is assumed: --activation changes it)\n"
    assert capsys.readouterr().err == note
    if command == "distance":
        assert main([command, *files]) == 0
        assert capsys.readouterr().err == note.replace("relu", "relu, recognised by its leaves")
    assert main([command, *files, *out, *RELU]) == 0
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- interpolate


def points(*times: float, section: str = "auto") -> list[Tensor]:
    w0, w1 = weights(ARCH, 0).double(), weights(ARCH, 1).double()
    return [symflow.Quotient(ARCH, section).geodesic(w0, w1)(t).float() for t in times]


def assert_files(files: list[Path], wanted: list[Tensor]) -> None:
    for file, w in zip(files, wanted, strict=True):
        torch.testing.assert_close(ARCH.flatten(load_file(file)), w)


@pytest.mark.parametrize("section", ["balanced", "sphere"])
def test_interpolate_writes_the_middle(run, two, tmp_path, section):
    out = tmp_path / "out.safetensors"
    printed = run("interpolate", *two, *RELU, "-o", out, "--section", section)
    assert_files([out], points(0.5, section=section))
    assert printed.splitlines()[0] == f"wrote {out}"
    length = facts(run("distance", *two, *RELU, "--section", section))["distance"]
    assert printed.splitlines()[1] == f"length {length}"


def test_interpolate_writes_several_points(run, two, tmp_path):
    out = tmp_path / "at-{t}.safetensors"
    times = ["0.25", "1", "-0", "0", "1.0"]
    printed = run("interpolate", *two, "-o", out, *RELU, *(x for t in times for x in ("-t", t)))
    assert printed.count("wrote ") == 3
    names = ["at-0.0.safetensors", "at-0.25.safetensors", "at-1.0.safetensors"]
    assert sorted(p.name for p in tmp_path.glob("at-*")) == names
    assert_files([tmp_path / n for n in names], points(0, 0.25, 1))


@pytest.mark.parametrize("exists", [False, True])
def test_interpolate_writes_into_a_folder(run, two, tmp_path, exists):
    out = tmp_path / "path"
    if exists:
        out.mkdir()
    run("interpolate", *two, *RELU, "-o", out, "-t", 0, "-t", 0.5)
    assert_files([out / "0.0.safetensors", out / "0.5.safetensors"], points(0, 0.5))
    run("interpolate", *two, *RELU, "-o", out, "-t", 0.75)
    assert_files([out / "0.75.safetensors"], points(0.75))


# ---------------------------------------------------------------- files


def test_an_old_file_is_replaced_as_a_whole_or_not_at_all(run, two, tmp_path):
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"old")
    bad = ARCH.state_dict(weights(ARCH, 1))
    bad["2.bias"] = bad["2.bias"] / 0
    save_file(bad, tmp_path / "bad.safetensors")
    run("align", two[0], tmp_path / "bad.safetensors", *RELU, "-o", out, code=2)
    assert out.read_bytes() == b"old"
    run("align", *two, *RELU, "-o", out)
    assert set(load_file(out)) == set(ARCH.module.state_dict())
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_a_file_that_would_hold_infinities_is_not_written(run, tmp_path, half):
    """The outgoing weight 2**15 of a unit is multiplied by the norm of its row: 2**30."""
    arch = symflow.mlp([1, 1, 1], bias=False)
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in files:
        save(file, arch, torch.full((2,), 2.0**15, dtype=half))
    out = [tmp_path / "{t}.safetensors"]
    interpolated = ("interpolate", *files, "-o", *out, "-t", 0, "-t", 1, "--section", "sphere")
    if half == torch.bfloat16:  # it has the range
        run(*interpolated, *RELU)
        w = arch.flatten(load_file(tmp_path / "0.0.safetensors"))
        assert w.tolist() == [1, 2.0**30]
        return
    for command in (interpolated, ("align", *files, "-o", *out, "--section", "sphere")):
        message = run(*command, *RELU, code=2)
        assert "leaf '2.weight' is torch.float16, which cannot represent its new values" in message
        assert "(up to 1.07e+09): nothing is written" in message
    assert sorted(tmp_path.iterdir()) == files


def test_inputs_are_never_overwritten(run, two, tmp_path):
    before = [file.read_bytes() for file in two]
    (tmp_path / "link.safetensors").symlink_to(two[1])
    around = tmp_path / "nowhere" / ".." / "a.safetensors"
    (tmp_path / "nowhere").mkdir()
    for out in (*two, around, tmp_path / "link.safetensors"):
        for command in ("align", "interpolate"):
            assert f"{out} is an input and stays" in run(command, *two, "-o", out, code=2)
    (tmp_path / "0.5.safetensors").write_bytes(before[0])
    message = run("interpolate", tmp_path / "0.5.safetensors", two[1], "-o", tmp_path, code=2)
    assert "0.5.safetensors is an input" in message
    assert [file.read_bytes() for file in two] == before


# ---------------------------------------------------------------- barrier and merge

BATCH_NORM = symflow.mlp([30, 6, 2], batch_norm=True)


@pytest.fixture
def three(tmp_path) -> list[Path]:
    """Networks for breast cancer, with running statistics."""
    found = []
    for k, name in enumerate("uvw"):
        w = weights(BATCH_NORM, k).abs() - 0.1 * k
        found.append(save(tmp_path / f"{name}.safetensors", BATCH_NORM, w))
    return found


def cells(out: str) -> list[list[str]]:
    """The rows of the table at the top, its head first."""
    lines = out.split("\n\n")[0].splitlines()
    return [re.split(r"\s{2,}", line) for line in lines if not line.startswith("--")]


@pytest.mark.parametrize("options", [[], ["--reset", "--temperature", "--split", "test"]], ids=len)
def test_barrier_shows_both_paths_as_the_library_measures_them(run, three, options):
    out = run("barrier", *three[:2], *RELU, "--task", "breast_cancer", "--points", 5, *options)
    task, q = symflow.zoo.breast_cancer(), symflow.Quotient(BATCH_NORM)
    w0, w1 = (BATCH_NORM.flatten(load_file(f)).double() for f in three[:2])
    kind = {"reset": task, "temperature": "midpoint"} if options else {}
    split = "test" if options else "train"
    wanted = symflow.evaluate.compared(q, w0, w1, task, split, points=5, accuracies=True, **kind)
    head, *rows = cells(out)
    assert head == ["t", "loss, raw", "accuracy, raw", "loss, aligned", "accuracy, aligned"]
    assert [row[0] for row in rows] == ["0", "0.25", "0.5", "0.75", "1"]
    for k, row in enumerate(rows):
        for at, path in ((1, wanted.naive), (3, wanted.aligned)):
            assert float(row[at]) == shown(path.losses[k])
            assert float(row[at + 1]) == shown(path.accuracies[k])
    found = facts(out.split("\n\n")[1])
    assert float(found["barrier, raw"]) == shown(wanted.naive.height)
    assert float(found["excess half way, aligned"]) == shown(wanted.aligned.midpoint)
    assert found["data"] == f"{split} split of breast_cancer"
    assert found["statistics"] == ("reset on training inputs" if options else "interpolated")
    assert ("temperature, raw" in found) is bool(options)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_barrier_draws_the_paths(run, three, tmp_path, suffix):
    file = tmp_path / "new" / f"paths.{suffix}"
    args = ("barrier", *three[:2], *RELU, "--task", "breast_cancer", "--points", 3)
    assert run(*args, "--plot", file).endswith(f"wrote {file}\n")
    assert file.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")
    message = run(*args, "--plot", tmp_path / "paths.xyz", code=2)
    assert "paths.xyz: pictures are" in message and "png" in message
    assert "is an input and stays" in run(*args, "--plot", three[0], code=2)


def test_barrier_refuses_what_is_no_number_of_points_and_no_task(run, three):
    args = ("barrier", *three[:2], *RELU, "--task")
    for points in ("4", "1", "x", "-3"):
        message = run(*args, "digits", "--points", points, code=2)
        assert "wanted an odd number from 3 on" in message
    assert "unknown task 'cancer': the known ones are" in run(*args, "cancer", code=2)
    assert "does not run on inputs of shape (64,)" in run(*args, "digits", code=2)
    assert "required: --task" in run("barrier", *three[:2], *RELU, code=2)


@pytest.mark.parametrize("task", [None, "breast_cancer"])
def test_merge_writes_the_mean(run, three, tmp_path, task):
    out = tmp_path / "new" / "mean.safetensors"
    printed = run("merge", *three, *RELU, "-o", out, *([] if task is None else ["--task", task]))
    q = symflow.Quotient(BATCH_NORM)
    w = torch.stack([BATCH_NORM.flatten(load_file(f)).double() for f in three])
    wanted = q.mean(w)
    if task is not None:
        data = symflow.zoo.breast_cancer()
        wanted = symflow.evaluate.reset_normalisation(BATCH_NORM, wanted, data)
    state = load_file(out)
    found = BATCH_NORM.flatten(state)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-6)
    assert state.keys() == load_file(three[0]).keys()
    head, *rows = cells(printed)
    assert head[:2] == ["network", "distance to the mean"]
    assert [row[0] for row in rows] == [*map(str, three), "mean"]
    for row, one in zip(rows, w, strict=False):
        assert float(row[1]) == shown(q.distance(q.mean(w), one))
    if task is not None:
        assert head[2:] == ["test loss", "test accuracy"]
        assert float(rows[-1][2]) == shown(symflow.evaluate.loss(BATCH_NORM, wanted, data))
        assert float(rows[1][3]) == shown(symflow.evaluate.accuracy(BATCH_NORM, w[1], data))
    told = facts(printed.split("\n\n")[1])
    assert told["networks"] == "3"
    assert told["statistics"] == ("averaged" if task is None else "reset on training inputs")


def test_merging_copies_gives_the_network_back(run, two, tmp_path, generator):
    w = weights(ARCH, 0)
    g = ARCH.symmetry.random(generator=generator, like=w)
    save(two[1], ARCH, ARCH.symmetry.act(g, w))
    out = tmp_path / "mean.safetensors"
    assert "statistics" not in run("merge", *two, *RELU, "-o", out)
    x = torch.randn(9, 5, generator=generator)
    torch.testing.assert_close(
        ARCH.apply(ARCH.flatten(load_file(out)), x), ARCH.apply(w, x), rtol=1e-4, atol=1e-4
    )


def test_merge_refuses(run, two, three, tmp_path):
    out = tmp_path / "mean.safetensors"
    assert "give two networks or more" in run("merge", two[0], *RELU, "-o", out, code=2)
    assert "is an input and stays" in run("merge", *two, *RELU, "-o", two[1], code=2)
    assert "give --activation" in run("merge", *two, "-o", out, code=2)
    assert f"{three[2]}: missing leaves" in run("merge", *two, three[2], *RELU, "-o", out, code=2)
    assert "unknown task" in run("merge", *three, *RELU, "-o", out, "--task", "x", code=2)
    assert "required: -o/--out" in run("merge", *two, *RELU, code=2)
    assert not out.exists()


# ---------------------------------------------------------------- what is refused


def replaced(path: Path, **leaves: Tensor) -> Path:
    """Write ARCH's weights with other leaves; underscores in names stand for dots."""
    state = ARCH.state_dict(weights(ARCH, 0))
    state |= {name.replace("_", "."): x for name, x in leaves.items()}
    save_file({key: value.clone() for key, value in state.items()}, path)
    return path


@pytest.mark.parametrize("command", ["align", "distance", "interpolate"])
def test_bad_files_are_named(run, two, tmp_path, command):
    a, b = two
    out = [] if command == "distance" else ["-o", tmp_path / "out.safetensors"]
    bad = tmp_path / "bad.safetensors"

    def refusal(*args: object) -> str:
        return run(command, *args, *out, *RELU, code=2)

    assert "bad.safetensors: No such file" in refusal(a, bad)
    assert "bad.safetensors: No such file" in refusal(bad, b)
    bad.write_bytes(a.read_bytes()[:-7])
    assert "bad.safetensors is no complete safetensors file" in refusal(a, bad)
    bad.write_bytes(b"PK\x03\x04 what torch.save writes")
    assert "bad.safetensors is no complete safetensors file" in refusal(bad, b)
    assert f"{tmp_path}: Is a directory" in refusal(tmp_path, b)
    replaced(bad, **{"2_weight": torch.full((4, 4), torch.nan)})
    for pair in ((a, bad), (bad, b)):
        assert "bad.safetensors: leaf '2.weight' holds 16 NaN" in refusal(*pair)
    replaced(bad, **{"2_weight": torch.zeros(4, 5)})
    assert "bad.safetensors: leaf '2.weight' must have shape (4, 4), got (4, 5)" in refusal(a, bad)
    replaced(bad, extra_weight=torch.zeros(2))
    assert "bad.safetensors: unknown leaves ['extra.weight']" in refusal(a, bad)
    assert "bad.safetensors: the leaves are not 0.weight" in refusal(bad, b)
    replaced(bad, **{"2_weight": torch.zeros(4, 4, dtype=torch.int8)})
    assert "'2.weight' is torch.int8" in refusal(a, bad)
    assert not (tmp_path / "out.safetensors").exists()


def test_inspect_refuses_what_it_cannot_show(run, tmp_path):
    assert "gone.safetensors: No such file" in run("inspect", tmp_path / "gone.safetensors", code=2)
    nan = replaced(tmp_path / "nan.safetensors", **{"0_bias": torch.full((4,), torch.inf)})
    assert "leaf '0.bias' holds 4 NaN or infinite" in run("inspect", nan, code=2)
    assert "missing leaves ['6.bias', '6.weight']" in run(
        "inspect", nan, "--mlp", "5,4,4,3,3", code=2
    )


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--module", "mynets"], "wanted package.module:factory, got 'mynets'"),
        (["--module", ":pair"], "wanted package.module:factory"),
        (["--module", "no.such:net"], "cannot import 'no.such' (No module named 'no')"),
        (["--module", "broken:net"], "cannot import 'broken' (No module named 'no_such_library')"),
        (["--module", "mynets:missing"], "'mynets' has no callable 'missing'"),
        (["--module", "mynets:number"], "'mynets' has no callable 'number'"),
        (["--module", "mynets:nothing"], "or an Architecture; it returns NoneType"),
        (["--module", "mynets:Net"], "such as --input 1,784"),
        (["--module", "mynets:pair"], "missing leaves ['first.bias'"),
        (["--module", "mynets:bilinear"], "no symmetry rule for nn.Bilinear"),
        (["--module", "mynets:failing"], "failing() failed with OverflowError: too. Name a"),
        (["--module", "torch.nn:Linear"], "Linear() failed with TypeError: "),
        (["--module", "mynets:Net", "--input", "1,9"], "example inputs [(1, 9)]"),
        (["--module", "wrong:net"], "cannot import 'wrong' ("),
        (["--module", "mynets:pair", "--mlp", "5,3"], "not allowed with argument"),
        (["--module", "mynets:pair", "--activation", "tanh"], "--activation is for an MLP"),
        (["--input", "1,5"], "give --module with it"),
        (["--mlp", "5,x"], "wanted positive sizes such as 30,16,2, got '5,x'"),
        (["--mlp", "5,0,3"], "wanted positive sizes"),
        (["--mlp", "5"], "two or more positive"),
        (["--activation", "swish"], "invalid choice: 'swish'"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_an_architecture_that_cannot_be_made_is_refused(run, two, options, message):
    assert message in run("inspect", two[0], *options, code=2)
    assert message in run("distance", *two, *options, code=2)


@pytest.mark.parametrize("t", ["1.5", "-0.1", "nan", "inf", "half", ""])
def test_times_are_from_zero_to_one(run, two, tmp_path, t):
    message = run("interpolate", *two, "-o", tmp_path / "o.safetensors", "-t", t, code=2)
    assert f"wanted a time from 0 to 1, got {t!r}" in message


def test_several_points_need_several_names(run, two, tmp_path):
    out = tmp_path / "out.safetensors"
    message = run("interpolate", *two, "-o", out, "-t", 0, "-t", 1, code=2)
    assert "put {t} into" in message and not out.exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "COMMAND"),
        (["explain"], "invalid choice: 'explain'"),
        (["align", "a", "b"], "required: -o/--out"),
        (["distance", "a"], "required: B"),
        (["distance", "a", "b", "--section", "round"], "invalid choice: 'round'"),
        (["demo", "--seed", "x"], "invalid int value: 'x'"),
    ],
    ids=" ".join,
)
def test_a_command_that_is_none_is_refused_in_one_line(run, args, message):
    found = run(*args, code=2)
    assert message in found and re.search(r"; see symflow.* --help$", found.strip())


# ---------------------------------------------------------------- the command as a whole


def test_warnings_are_one_line_each(capsys, two):
    replaced(two[0], **{"0_weight": torch.zeros(4, 5), "0_bias": torch.zeros(4)})
    assert main(["inspect", str(two[0])]) == 0
    out, err = capsys.readouterr()
    assert "parameters" in out
    lines = err.splitlines()
    assert lines and all(line.startswith("symflow: warning: ") for line in lines)
    assert "dead neuron" in lines[0]


@pytest.fixture
def report(monkeypatch):
    """In place of symflow.report: remembers how it was called."""
    calls: list[dict] = []

    def demo(out, **options):
        calls.append({"out": out} | options)
        if options["seed"] < 0:
            raise KeyboardInterrupt
        return out

    monkeypatch.setitem(sys.modules, "symflow.report", types.SimpleNamespace(demo=demo))
    return calls


def test_demo_passes_on_what_was_asked(run, report):
    run("demo")
    run("demo", "-o", "x.html", "--seed", 7, "--fast", "--folder", "zoo")
    default = {"folder": None, "seed": 0, "fast": False}
    chosen = {"folder": Path("zoo"), "seed": 7, "fast": True}
    assert report == [{"out": Path("report.html")} | default, {"out": Path("x.html")} | chosen]


@pytest.mark.usefixtures("report")
def test_an_interruption_ends_with_130(capsys):
    assert main(["demo", "--seed", "-1"]) == 130
    assert capsys.readouterr() == ("", "")


def test_version_and_help(run):
    assert run("--version") == f"symflow {symflow.__version__}\n"
    for command in ("inspect", "align", "distance", "interpolate", "barrier", "merge", "demo"):
        assert f"    {command}" in run("--help")
        assert run(command, "--help").startswith(f"usage: symflow {command} ")


def test_the_entry_point_is_main():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="symflow")
    assert script.load() is main


def process(*args: object) -> "subprocess.Popen[str]":
    code = "import sys; from symflow.cli import main; sys.exit(main())"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], **pipes)


def test_a_process_ends_with_the_exit_code(tmp_path):
    child = process("inspect", tmp_path / "gone.safetensors")
    out, err = child.communicate()
    assert (child.returncode, out) == (2, "")
    assert err == f"symflow: error: {tmp_path / 'gone.safetensors'}: No such file or directory\n"


def test_a_reader_that_leaves_is_no_error(two):
    child = process("inspect", two[0])
    assert child.stdout is not None and child.stderr is not None
    child.stdout.close()
    assert child.stderr.read() == ""
    child.stderr.close()
    assert child.wait() == 0
