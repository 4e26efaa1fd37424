"""The paper's experiments: rows are kept, resumed and never mixed up; what is measured is right."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import symflow
from symflow.files import load_tensors

sys.path.insert(0, str(Path(__file__).parent.parent / "paper"))
import experiment
import ledger
import measured
import tables
from ledger import Ledger, Row


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Stored results of the repository stay as they are."""
    monkeypatch.setattr(ledger, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(ledger, "BUILD", tmp_path / "build")


def test_a_row_is_worked_out_once():
    calls = []
    row = Row("a", {"steps": 3, "sizes": (1, 2)})

    def work():
        calls.append(1)
        return {"accuracy": 0.5}

    assert Ledger("toy", fast=False).row(row, work) == {"accuracy": 0.5}
    again = Ledger("toy", fast=False)
    assert again.row(row, work) == {"accuracy": 0.5}
    assert len(calls) == 1
    again.row(Row("a", {"steps": 4, "sizes": (1, 2)}), work)
    assert len(calls) == 2


def test_an_interruption_loses_no_other_row():
    first = Ledger("toy", fast=False)
    second = Ledger("toy", fast=False)  # another process, started at the same time
    first.row(Row("a", {}), lambda: {"x": 1})
    second.row(Row("b", {}), lambda: {"x": 2})

    def stopped():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.row(Row("c", {}), stopped)
    assert set(Ledger("toy", fast=False).rows) == {"a", "b"}
    assert not list(first.file.parent.glob("*.tmp"))


def test_reduced_results_are_kept_apart():
    Ledger("toy", fast=True).row(Row("a", {}), lambda: {"x": 1})
    assert Ledger("toy", fast=False).rows == {}


def test_calibration_error_of_known_predictions():
    p = torch.tensor([[0.8, 0.2]] * 10)
    y = torch.tensor([0] * 8 + [1] * 2)
    assert measured.calibration_error(p, y) == pytest.approx(0, abs=1e-6)
    assert measured.calibration_error(p, torch.zeros(10).long()) == pytest.approx(0.2, abs=1e-6)


def test_an_experiment_runs_resumes_and_knows_copies():
    """End to end at a small size; a training network is its own copy, a permuted one too."""
    zoo = experiment.ZooSettings((30, 4, 2), 12, 4, 2, 64, {"optimizer": "adam", "lr": 0.01})
    settings = experiment.FlowSettings(
        rank=8, width=8, depth=1, steps=4, batch_size=4, samples=4, sampling=2, inputs=8
    )
    task = symflow.zoo.breast_cancer()
    found = experiment.Experiment("toy", task, zoo, fast=False, only="flow")
    found.run({"flow": settings, "other": replace(settings, preset="Balanced")})
    assert set(found.ledger.rows) == {"flow"}
    figures = found.ledger.rows["flow"]["figures"]
    assert figures["parameters"] > 0 and figures["chart"] == 30 + 30 * 8 + 8
    again = experiment.Experiment("toy", task, zoo, fast=False)
    again.run({"flow": settings})
    assert again.ledger.rows["flow"] == json.loads(json.dumps(found.ledger.rows["flow"]))
    # A second stage goes on from the first one's, which is not trained again.
    end = experiment.Finish(steps=2, lr=0.01, behaviour=0.0, bridge=0.05)
    first, before = again.fitted(settings)
    last, seconds = again.fitted(replace(settings, finish=end))
    assert [h["step"] for h in first.history][-1] == 4 and last.history[-1]["step"] == 2
    assert last.recipe.path.bridge == 0.05 and seconds > before > 0
    known = found.training.final
    element = found.arch.symmetry.random(generator=torch.Generator().manual_seed(0), like=known)
    for ws in (known, found.arch.symmetry.act(element, known)):
        audit = found.measured(ws)
        assert audit["nearest"] < 0.01 * found.measured(found.held_out.final)["nearest"]
        assert audit["overlap"] == pytest.approx(1)


def test_tables_hold_every_stored_row(monkeypatch):
    monkeypatch.setattr(tables, "STORED", ledger.RESULTS)
    figures = {"accuracy": 0.9, "accuracy_error": 0.01, "loss": 0.2, "loss_error": 0.01}
    figures |= {"averaged": 0.95, "diversity": 0.01, "nearest": 2.0, "overlap": 0.5}
    figures |= {"calibration": 0.02, "calibration_averaged": 0.03}
    stored = Ledger("mnist", fast=False)
    stored.row(Row("trained, held out", {}), lambda: figures)
    stored.row(Row("Geometric, run", {}), lambda: figures | {"nearest": 1.0, "seconds": 120.0})
    text = tables.flows("mnist", fast=False)
    assert "Geometric, run" in text and "& 0.50 &" in text and "& 2.0 &" in text
    stored.row(Row("Geometric, run, seed 1", {}), lambda: figures | {"accuracy": 0.94})
    assert r"Geometric, run (2 seeds) & $0.9200 \pm 0.0200$" in tables.flows("mnist", fast=False)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import experiment, ledger
import symflow, symflow.files
ledger.RESULTS = ledger.BUILD = Path(sys.argv[2])
replace, count, call = os.replace, 0, int(sys.argv[3])
def deadly(source, target):
    global count
    count += 1
    replace(source, target)
    if count == call: os.kill(os.getpid(), signal.SIGKILL)
symflow.files.os.replace = deadly
zoo = experiment.ZooSettings((30, 4, 2), 12, 4, 2, 64, {"optimizer": "adam", "lr": 0.01})
flow = experiment.FlowSettings(
    rank=8, width=8, depth=1, steps=20, batch_size=4, samples=4, sampling=2, inputs=8
)
task = symflow.zoo.breast_cancer()
experiment.Experiment("toy", task, zoo, fast=False).run({"flow": flow})
"""


@pytest.mark.slow  # a new interpreter each time
def test_killed_with_sigkill_an_experiment_goes_on_and_ends_the_same(tmp_path):
    """Killed while a flow is trained: the same figures, the same weights."""

    def run(folder, call):
        command = [sys.executable, "-c", KILLED, str(Path(experiment.__file__).parent)]
        return subprocess.run(
            [*command, str(tmp_path / folder), str(call)], capture_output=True, text=True
        )

    def results(folder):
        rows = json.loads((tmp_path / folder / "toy.json").read_text())["rows"]
        timed = ("seconds", "sampling_seconds")
        figures = {name: row["figures"] for name, row in rows.items()}
        figures["flow"] = {k: v for k, v in figures["flow"].items() if k not in timed}
        (file,) = (tmp_path / folder).glob("toy/flows/*/flow.safetensors")
        return figures, load_tensors(file)[0]

    assert run("whole", 0).returncode == 0
    assert run("killed", 12).returncode == -signal.SIGKILL
    step = load_tensors(next((tmp_path / "killed").glob("toy/flows/*/flow.safetensors")))[1]["step"]
    assert 0 < step < 20
    assert run("killed", 0).returncode == 0
    (figures, tensors), (again, resumed) = results("whole"), results("killed")
    assert figures == again
    assert all(torch.equal(tensors[name], resumed[name]) for name in tensors)
