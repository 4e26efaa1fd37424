"""What every benchmark stores: where, when and how it was measured, and its rows."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
MEASURED = ("symflow", "benchmarks", "tests/dense_reference.py", ":!benchmarks/results")


def machine() -> dict[str, Any]:
    """The processor, its cores, and the versions that a time depends on."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def timed(work: Callable[[], Any], repeats: int, *, warm_up: int = 1) -> list[float]:
    """Seconds of each of ``repeats`` calls, after some that are not counted."""
    for _ in range(warm_up):
        work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return seconds


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and range of repeated measurements, rounded to four digits."""
    low, middle, high = (float(f"{f(values):.4g}") for f in (min, statistics.median, max))
    return {"median": middle, "min": low, "max": high, "repeats": len(values)}


def judged(
    what: str,
    figure: str,
    values: Sequence[float],
    *,
    at_most: float | None = None,
    at_least: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Make a row: what was measured, the figure that counts, and whether its median will do."""
    middle = spread(values)["median"]
    bounds = {"at_most": at_most, "at_least": at_least}
    bounds = {side: bound for side, bound in bounds.items() if bound is not None}
    wanted = [f"{side.replace('_', ' ')} {bound:g}" for side, bound in bounds.items()]
    return {
        "what": what,
        "figure": figure,
        figure: spread(values),
        **bounds,
        "wanted": f"{figure.replace('_', ' ')} {' and '.join(wanted)}",
        "met": middle <= bounds.get("at_most", middle) and middle >= bounds.get("at_least", middle),
        **more,
    }


def table(report: dict[str, Any]) -> str:
    """Return one line for each row of a report: met or not, measured, wanted, what."""
    lines = [
        f"{'met' if row['met'] else 'MISSED':<7}{row[row['figure']]['median']:>10.4g}  "
        f"{row['wanted']:<44}{row['what']}"
        for row in report["rows"]
    ]
    return "\n".join(lines)


def load(name: str, commit: str | None = None) -> dict[str, Any]:
    """Read a stored report, as it is here or as it was at a commit."""
    if commit is None:
        return json.loads((RESULTS / f"{name}.json").read_text())
    stored = _git("show", f"{commit}:benchmarks/results/{name}.json")
    if not stored:
        raise FileNotFoundError(f"benchmarks/results/{name}.json is not in commit {commit}")
    return json.loads(stored)


def record(name: str, rows: Sequence[dict[str, Any]], seed: int) -> Path:
    """Write ``results/<name>.json``.

    ``changed`` tells that the code which was measured is not that of ``commit``: the package, the
    benchmarks or the dense reference. Results, documents and other tests do not count.
    """
    target = RESULTS / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "benchmark": name,
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=all", "--", *MEASURED)),
        "machine": machine(),
        "seed": seed,
        "rows": list(rows),
    }
    target.write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")
    return target


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else ""
