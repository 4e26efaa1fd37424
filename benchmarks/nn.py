"""How long a training step of a vector field takes, and what memory. Writes nn.json.

Forward, backward and Adam, against the dense N x N reference of tests/dense_reference.py: the same
function as ``nodes="all"`` (that is checked first), with a state for every pair of nodes. Each
measurement is a process of its own; the systems take turns, so that all see the same machine.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record
import torch
from torch import Tensor

import symflow
from symflow.nn import RelationalTransformer

sys.path.insert(0, str(record.ROOT))
from tests.dense_reference import dense_forward

SEED = 0
THREADS = 1  # the machine is shared
# Page faults of a heap that is returned and fetched anew cost 2 to 3 times on some machines.
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**36),
    "MALLOC_TOP_PAD_": str(2**28),
}
SYSTEMS = ("dense", "all", "symmetric")
MEMORY = (
    "largest resident memory of a new process (ru_maxrss) beyond that with interpreter, torch, "
    "model, optimiser and data before the first step"
)


@dataclass(frozen=True)
class Case:
    """A task for all systems. ``steps``: uncounted and counted ones of each system."""

    widths: tuple[int, ...]
    width: int
    depth: int
    batch: int
    rounds: int
    steps: dict[str, tuple[int, int]]
    gibibytes: float  # what the dense reference needs

    def __str__(self) -> str:
        sizes = "-".join(map(str, self.widths))
        return f"{sizes}, width {self.width}, {self.depth} layers, batch {self.batch}, float32"


CASES = {
    "breast-cancer": Case(
        (30, 16, 16, 2), 64, 5, 32, 5, {"dense": (2, 4), "all": (3, 10), "symmetric": (5, 20)}, 5
    ),
    "mnist": Case(
        (784, 10, 10), 32, 5, 1, 2, {"dense": (2, 2), "all": (3, 12), "symmetric": (10, 60)}, 16
    ),
}


def main() -> None:
    """Measure and store everything, or one system in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, metavar=("CASE", "SYSTEM"), help="print one measurement")
    one = parser.parse_args().one
    torch.set_num_threads(THREADS)
    if one:
        print(json.dumps(measure(CASES[one[0]], one[1])))
    else:
        run()


def run() -> None:
    """Measure and store everything."""
    rows = [agreement()]
    for name, case in CASES.items():
        found: dict[str, list[dict[str, Any]]] = {system: [] for system in SYSTEMS}
        for turn in range(case.rounds):
            for system in SYSTEMS:
                found[system].append(in_new_process(name, system))
                print(case, system, turn, found[system][-1], flush=True)
        rows += judge(name, case, found)
    print(record.record("nn", rows, SEED))
    print(record.table({"rows": rows}))


def judge(name: str, case: Case, found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the rows of a case: ratios of the medians of each round."""
    seconds = {s: [statistics.median(one["seconds"]) for one in found[s]] for s in SYSTEMS}
    cpu = {s: [one["cpu_seconds"] for one in found[s]] for s in SYSTEMS}
    memory = {s: [one["mebibytes"] for one in found[s]] for s in SYSTEMS}
    wanted = {"breast-cancer": {"all": 3, "symmetric": 10}, "mnist": {"all": 25, "symmetric": 500}}
    rows = []
    for system, least in wanted[name].items():
        ratios, cpu_ratios = (
            [a / b for a, b in zip(found["dense"], found[system], strict=True)]
            for found in (seconds, cpu)
        )
        rows.append(
            record.judged(
                f'training step of nodes="{system}" against the dense reference: {case}',
                "times_faster",
                ratios,
                at_least=least,
                dense_seconds=record.spread(seconds["dense"]),
                seconds=record.spread(seconds[system]),
                times_less_processor_time=record.spread(cpu_ratios),
                dense_processor_seconds=record.spread(cpu["dense"]),
                processor_seconds=record.spread(cpu[system]),
                rounds=case.rounds,
                malloc=MALLOC,
            )
        )
    for system in ("all", "symmetric"):
        ratios = [a / b for a, b in zip(memory[system], memory["dense"], strict=True)]
        rows.append(
            record.judged(
                f'memory of nodes="{system}" against the dense reference: {case}',
                "share",
                ratios,
                at_most=0.1 if name == "mnist" else 1,
                dense_mebibytes=record.spread(memory["dense"]),
                mebibytes=record.spread(memory[system]),
                measured_as=MEMORY,
            )
        )
    return rows


def in_new_process(name: str, system: str) -> dict[str, Any]:
    """Measure one system in a process with the malloc settings of all."""
    need = CASES[name].gibibytes if system == "dense" else 2
    if _available_gibibytes() < need:
        raise MemoryError(f"{name}, {system} needs {need} GiB of memory that is free")
    done = subprocess.run(
        [sys.executable, __file__, "--one", name, system],
        env={**os.environ, **MALLOC, "OMP_NUM_THREADS": str(THREADS)},
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout)


def measure(case: Case, system: str) -> dict[str, Any]:
    """Train one system for some steps; seconds of each and the memory beyond that before."""
    field = RelationalTransformer(
        symflow.mlp(list(case.widths)),
        width=case.width,
        depth=case.depth,
        nodes="symmetric" if system == "symmetric" else "all",
        seed=SEED,
    )
    optimizer = torch.optim.Adam(field.parameters())
    generator = torch.Generator().manual_seed(SEED)
    x, target = torch.randn(2, case.batch, field.arch.dimension, generator=generator)
    t = torch.rand(case.batch, generator=generator)

    def step() -> None:
        optimizer.zero_grad()
        out = dense_forward(field, x, t) if system == "dense" else field(x, t)
        (out - target).square().mean().backward()
        optimizer.step()

    before = peak_mebibytes()
    warm_up, repeats = case.steps[system]
    record.timed(step, warm_up, warm_up=0)
    start = time.process_time()
    seconds = record.timed(step, repeats, warm_up=0)
    cpu = (time.process_time() - start) / repeats
    return {"seconds": seconds, "cpu_seconds": cpu, "mebibytes": peak_mebibytes() - before}


def agreement() -> dict[str, Any]:
    """Check on a small case in float64 that the dense reference is the same function."""
    arch = symflow.mlp([6, 5, 4, 2])
    field = RelationalTransformer(arch, width=16, depth=3, nodes="all", seed=SEED).double()
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for p in field.parameters():  # a fresh field is the identity
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    x, weights = torch.randn(2, 3, arch.dimension, generator=generator, dtype=torch.float64)
    t = torch.rand(3, generator=generator, dtype=torch.float64)
    blocks, dense = (
        _output_and_gradients(out, weights, field)
        for out in (field(x, t), dense_forward(field, x, t))
    )
    return record.judged(
        'nodes="all" against the dense reference in float64: output and gradients',
        "largest_relative_difference",
        [float((blocks - dense).abs().max() / dense.abs().max())],
        at_most=1e-12,
    )


def _output_and_gradients(out: Tensor, weights: Tensor, field: RelationalTransformer) -> Tensor:
    parameters = [p for p in field.parameters() if p.numel()]
    grads = torch.autograd.grad(
        (out * weights).sum(), parameters, allow_unused=True, materialize_grads=True
    )
    return torch.cat([x.detach().flatten() for x in (out, *grads)])


def peak_mebibytes() -> float:
    """Return the largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _available_gibibytes() -> float:
    info = Path("/proc/meminfo")
    if not info.exists():
        return float("inf")
    line = next(x for x in info.read_text().splitlines() if x.startswith("MemAvailable"))
    return int(line.split()[1]) / 2**20


if __name__ == "__main__":
    main()
