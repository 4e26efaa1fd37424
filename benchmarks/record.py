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


def record(name: str, rows: Sequence[dict[str, Any]], seed: int) -> Path:
    """Write ``results/<name>.json``: rows of one run, all measured in this process."""
    target = RESULTS / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "benchmark": name,
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
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
