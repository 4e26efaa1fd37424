"""What benchmarks store, and that the stored results are whole and judge themselves rightly."""

import importlib
import json
import re
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
STORED = sorted((BENCHMARKS / "results").glob("*.json"))


@pytest.fixture
def benchmark_module(monkeypatch):
    """Import a module of benchmarks/, which is a folder of scripts and no package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def report(*rows, commit="a" * 40):
    return {"benchmark": "x", "commit": commit, "machine": {"cores": 2}, "seed": 0, "rows": rows}


def test_spread(benchmark_module):
    record = benchmark_module("record")
    assert record.spread([3, 1.00004, 2]) == {"median": 2.0, "min": 1.0, "max": 3.0, "repeats": 3}


def test_rows_are_judged_by_their_median(benchmark_module):
    record = benchmark_module("record")
    row = record.judged("work", "ratio", [1.0, 2.0, 9.0], at_most=2, note="x")
    assert (row["met"], row["wanted"], row["note"]) == (True, "ratio at most 2", "x")
    assert not record.judged("work", "ratio", [2.1], at_most=2)["met"]
    assert not record.judged("work", "times_faster", [2.9], at_least=3)["met"]
    assert record.judged("work", "times_faster", [3.0], at_least=3)["met"]


def test_record_stores_where_and_when(benchmark_module, tmp_path, monkeypatch):
    record = benchmark_module("record")
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(record, "_git", lambda *arguments: f"said {arguments[0]}")
    path = record.record("x", [record.judged("work", "seconds", [0.1], at_most=1)], 7)
    stored = json.loads(path.read_text())
    assert (stored["benchmark"], stored["seed"], stored["commit"]) == ("x", 7, "said rev-parse")
    assert stored["changed"] is True and stored["machine"]["threads"] >= 1
    assert record.load("x") == stored
    assert "met" in record.table(stored) and "work" in record.table(stored)
    monkeypatch.setattr(record, "_git", lambda *arguments: "")
    assert json.loads(record.record("x", [], 7).read_text())["changed"] is False
    with pytest.raises(FileNotFoundError, match="not in commit"):
        record.load("x", "HEAD")


def test_changed_asks_git_about_code_alone(benchmark_module, tmp_path, monkeypatch):
    record = benchmark_module("record")
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    asked = []
    monkeypatch.setattr(record, "_git", lambda *arguments: asked.append(arguments) or "")
    record.record("x", [], 0)
    status = next(a for a in asked if a[0] == "status")
    assert {"symflow", "benchmarks", ":!benchmarks/results"} <= set(status)


def test_compare(benchmark_module):
    record, compare = benchmark_module("record"), benchmark_module("compare")
    old = report(record.judged("work", "seconds", [2.0], at_most=3), {"what": "gone", "met": True})
    new = report(record.judged("work", "seconds", [3.0], at_most=3), {"what": "fresh", "met": True})
    lines = compare.compare(old, new).splitlines()
    assert lines[1].split()[:3] == ["2", "3", "1.5"] and lines[1].endswith("seconds: work")
    assert lines[2:] == ["only old: gone", "only new: fresh"]
    other = {**new, "machine": {"cores": 4}}
    assert "machines differ" in compare.compare(old, other)


@pytest.mark.parametrize("path", STORED, ids=[path.stem for path in STORED])
def test_stored_results_are_whole(path):
    stored = json.loads(path.read_text())
    assert stored["benchmark"] == path.stem
    assert re.fullmatch("[0-9a-f]{40}", stored["commit"]) and isinstance(stored["changed"], bool)
    assert {"cpu", "cores", "threads", "torch", "python"} <= set(stored["machine"])
    assert isinstance(stored["seed"], int) and stored["rows"]
    for row in stored["rows"]:
        median = row[row["figure"]]["median"]
        good = median <= row.get("at_most", median) and median >= row.get("at_least", median)
        assert {"at_most", "at_least"} & set(row) and row["met"] is good, row["what"]


def test_every_benchmark_is_run(benchmark_module):
    run = benchmark_module("run")
    tools = {"record", "run", "compare", "draw", "readme", "plain", "large"}
    elsewhere = {"accelerator"}  # needs a GPU
    assert set(run.BENCHMARKS) == {p.stem for p in BENCHMARKS.glob("*.py")} - tools - elsewhere
    assert set(run.BENCHMARKS) | elsewhere >= {path.stem for path in STORED}
    assert STORED


def test_the_readme_holds_the_stored_figures(benchmark_module):
    readme = benchmark_module("readme")
    text = readme.README.read_text()
    assert readme.written(text) == text, "run python benchmarks/readme.py"
    assert readme.written(text.replace("median", "mode")) != text.replace("median", "mode")
