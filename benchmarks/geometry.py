"""How long the geometry takes: group action, alignment, geodesics, import. Writes geometry.json."""

import subprocess
import sys
import time
from typing import Any

import record
import torch

import symflow

SEED = 0
THREADS = 1  # two of them spin for each other when the machine is shared


def act() -> dict[str, Any]:
    """One monomial element on 1,000 flat networks, against copying them."""
    arch = symflow.mlp([784, 32, 32, 10])
    generator = torch.Generator().manual_seed(SEED)
    w = torch.randn(1000, arch.dimension, generator=generator)
    g = arch.symmetry.random(generator=generator, like=w)
    copies, moves = [], []
    for _ in range(15):  # in turn, so that both see the same machine
        copies += record.timed(w.clone, 1, warm_up=0)
        moves += record.timed(lambda: arch.symmetry.act(g, w), 1, warm_up=0)
    ratios = [b / a for a, b in zip(copies, moves, strict=True)]
    return record.judged(
        f"act on 1,000 networks of {arch.dimension} parameters, against copying them",
        "ratio",
        ratios,
        at_most=2,
        copy_seconds=record.spread(copies),
        act_seconds=record.spread(moves),
    )


def align() -> dict[str, Any]:
    """100 networks 30-16-16-2 to one reference, balanced section, default starts."""
    arch = symflow.mlp([30, 16, 16, 2])
    generator = torch.Generator().manual_seed(SEED)
    w = symflow.flows.FanIn().sample(arch, 101, generator=generator)
    q = symflow.Quotient(arch)
    seconds = record.timed(lambda: q.align(w[0], w[1:]), 9)
    return record.judged(
        "align 100 networks 30-16-16-2 to a reference (project, two starts, float32)",
        "seconds",
        seconds,
        at_most=0.2,
    )


def geodesic() -> list[dict[str, Any]]:
    """64 times of 100 geodesics, on both sections."""
    arch = symflow.mlp([30, 16, 16, 2])
    generator = torch.Generator().manual_seed(SEED)
    w = symflow.flows.FanIn().sample(arch, 200, generator=generator)
    t = torch.linspace(0, 1, 64)
    rows = []
    for section in ("balanced", "sphere"):
        path = symflow.Quotient(arch, section).geodesic(w[:100], w[100:])
        seconds = record.timed(lambda path=path: path(t), 15)
        what = f"64 points of each of 100 geodesics 30-16-16-2, {section} section"
        rows.append(record.judged(what, "seconds", seconds, at_most=0.1))
    return rows


def imports() -> dict[str, Any]:
    """`import symflow` in new interpreters, against `import torch`, in turn."""
    extra, alone = [], []
    for _ in range(7):
        base, full = (_import_seconds(f"import {name}") for name in ("torch", "symflow"))
        alone.append(base)
        extra.append(full - base)
    return record.judged(
        "import symflow, beyond import torch",
        "extra_seconds",
        extra,
        at_most=0.3,
        torch_seconds=record.spread(alone),
    )


def _import_seconds(statement: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def run() -> None:
    """Measure and store everything."""
    torch.set_num_threads(THREADS)
    rows = [act(), align(), *geodesic(), imports()]
    print(record.record("geometry", rows, SEED))
    print(record.table({"rows": rows}))


if __name__ == "__main__":
    run()
