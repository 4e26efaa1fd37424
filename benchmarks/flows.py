"""What flows cost: training steps, sampling, growth with the weights, zoos. Writes flows.json.

The flow is that of the paper's experiments (coordinates of the inputs, behaviour loss, Muon), and a
step is all of it: drawing pairs and times, paths, field, both losses, backward, optimiser, running
average. The baseline is the field of the source thesis as it stands there, a dense N x N relational
transformer (tests/dense_reference.py), with forward, backward and Adam alone. Each measurement is a
process of its own; both take turns.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nn
import record
import torch

import symflow
from symflow.arch import InputCoordinates
from symflow.flows import Gaussian
from symflow.nn import RelationalTransformer
from symflow.zoo import Task

SEED = 0
THREADS = 1
SAMPLED, SAMPLING_STEPS = 100, 32
ZOO_RUNS, ZOO_EPOCHS = 1000, 4
VARIANT_ROUNDS = 15
SIDES = (16, 45, 90, 180, 350, 1000)  # hidden units of 30-n-n-2: from 1k to 1M weights


@dataclass(frozen=True)
class Case:
    """A flow, and the dense step it is compared with.

    ``per_sample``: whether each step is divided by its batch: the dense reference takes one network
    of 784-10-10 at a time, more do not fit in memory.
    """

    widths: tuple[int, ...]
    rank: int
    batch: int
    least: float
    per_sample: bool
    rounds: int
    field: dict[str, int]


CASES = {
    "breast-cancer": Case((30, 16, 16, 2), 30, 32, 100, per_sample=False, rounds=3, field={}),
    "breast-cancer, one layer": Case(
        (30, 16, 16, 2),
        30,
        32,
        100,
        per_sample=False,
        rounds=3,
        field={"depth": 1, "edge_width": 8},
    ),
    "mnist": Case((784, 10, 10), 128, 64, 3000, per_sample=True, rounds=2, field={}),
}


def flow_of(
    widths: tuple[int, ...], rank: int, **field: int
) -> tuple[symflow.flows.Flow, torch.Tensor]:
    """Make a flow of the paper's kind on inputs of the task's shape."""
    generator = torch.Generator().manual_seed(SEED)
    arch = symflow.mlp(list(widths))
    x = torch.randn(2000, widths[0], generator=generator)
    chart = InputCoordinates.of_inputs(arch, x, rank=rank)
    flow = symflow.flows.geometric(
        arch, coordinates=chart, bridge=0.15, time_width=16, seed=SEED, **field
    )
    return flow, x


def measure(name: str) -> dict[str, Any]:
    """Seconds of a training step, and the memory beyond that before the first."""
    case = CASES[name]
    flow, x = flow_of(case.widths, case.rank, **case.field)
    generator = torch.Generator().manual_seed(SEED)
    starts = Gaussian(0.1).sample(flow.arch, 256, generator=generator)
    zoo = SimpleNamespace(initial=starts, final=starts + 0.05)
    before = nn.peak_mebibytes()

    def fit(steps: int) -> float:
        start = time.perf_counter()
        flow.fit(
            zoo,
            inputs=x,
            behaviour=10.0,
            steps=steps,
            batch_size=case.batch,
            optimizer="muon",
            lr=0.01,
        )
        return time.perf_counter() - start

    fit(5)
    few, many = fit(5), fit(45)
    return {"seconds": (many - few) / 40, "mebibytes": nn.peak_mebibytes() - before}


def in_new_process(name: str) -> dict[str, Any]:
    """Measure in a process with the malloc settings of the dense reference."""
    done = subprocess.run(
        [sys.executable, __file__, "--one", name],
        env={**os.environ, **nn.MALLOC, "OMP_NUM_THREADS": str(THREADS)},
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout)


def steps(name: str) -> list[dict[str, Any]]:
    """Compare training steps."""
    case = CASES[name]
    ratios, ours, dense, memory = [], [], [], []
    for _ in range(case.rounds):
        theirs = statistics.median(nn.in_new_process(name.partition(",")[0], "dense")["seconds"])
        found = in_new_process(name)
        share = case.batch if case.per_sample else 1
        dense.append(theirs)
        ours.append(found["seconds"])
        memory.append(found["mebibytes"])
        ratios.append(theirs / (found["seconds"] / share))
        print(name, theirs, found, flush=True)
    sizes = "-".join(map(str, case.widths))
    unit = "a sample" if case.per_sample else f"batch {case.batch}"
    # Both fields that the paper has on breast cancer, and what each reaches, are in paper/results.
    field = f"{case.field['depth']} layer" if "depth" in case.field else "3 layers"
    rows = [
        record.judged(
            f"training step of the paper's flow ({field}) on {sizes}, {unit}, against the thesis'",
            "times_faster",
            ratios,
            at_least=case.least,
            dense_seconds=record.spread(dense),
            seconds=record.spread(ours),
            batch=case.batch,
            malloc=nn.MALLOC,
        )
    ]
    if name == "mnist":
        rows.append(
            record.judged(
                f"memory of training the paper's flow on {sizes}, batch {case.batch}",
                "mebibytes",
                memory,
                at_most=300,
                measured_as=nn.MEMORY,
            )
        )
    return rows


def sampling() -> dict[str, Any]:
    """Time drawing networks."""
    case = CASES["mnist"]
    flow, x = flow_of(case.widths, case.rank, **case.field)
    starts = Gaussian(0.1).sample(flow.arch, 64, generator=torch.Generator().manual_seed(SEED))
    flow.fit(SimpleNamespace(initial=starts, final=starts + 0.05), inputs=x, steps=2)
    seconds = record.timed(lambda: flow.sample(SAMPLED, steps=SAMPLING_STEPS, seed=SEED), 5)
    return record.judged(
        f"drawing {SAMPLED} networks 784-10-10 with {SAMPLING_STEPS} steps",
        "seconds",
        seconds,
        at_most=3,
    )


def growth() -> dict[str, Any]:
    """Time forward and backward of the field against the number of weights."""
    points = []
    for n in SIDES:
        arch = symflow.mlp([30, n, n, 2])
        field = RelationalTransformer(arch, time_width=16, seed=SEED)
        x = torch.randn(1, arch.dimension, generator=torch.Generator().manual_seed(SEED))

        def step(field: RelationalTransformer = field, x: torch.Tensor = x) -> None:
            field(x, torch.full((1,), 0.5)).square().mean().backward()

        seconds = statistics.median(record.timed(step, 5))
        points.append({"weights": arch.dimension, "seconds": seconds})
        print(points[-1], flush=True)
    (a, b) = points[-3], points[-1]
    exponent = math.log(b["seconds"] / a["seconds"]) / math.log(b["weights"] / a["weights"])
    return record.judged(
        "growth of a step of the field with the weights, 30-n-n-2, at the largest sizes",
        "exponent",
        [exponent],
        at_most=1.1,
        points=points,
    )


def zoo() -> dict[str, Any]:
    """Time a zoo of MNIST's size; its examples are noise, which costs the same."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(60_000, 784, generator=generator)
    y = torch.randint(10, (60_000,), generator=generator)
    task = Task("noise of MNIST's size", x, y, x[:10_000], y[:10_000], classes=10)
    options: dict[str, Any] = {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        symflow.zoo.train(
            symflow.mlp([784, 10, 10]),
            task,
            runs=ZOO_RUNS,
            epochs=ZOO_EPOCHS,
            batch_size=128,
            schedule="cosine",
            folder=Path(folder) / "zoo",
            **options,
        )
        seconds = time.perf_counter() - start
    return record.judged(
        f"a zoo of {ZOO_RUNS} networks 784-10-10, {ZOO_EPOCHS} epochs of 60,000 examples each",
        "seconds",
        [seconds],
        at_most=300,
        threads=torch.get_num_threads(),
    )


def variants() -> list[dict[str, Any]]:
    """Compare the field's own step, forward and backward, with a compiled one and in bfloat16.

    Compiling takes a C++ compiler; where there is none that row is left out.
    """
    case = CASES["mnist"]
    flow, _ = flow_of(case.widths, case.rank, **case.field)
    field = flow.field
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(case.batch, len(field.shift), generator=generator)
    t = torch.rand(case.batch, generator=generator)

    def step(run: Callable[..., torch.Tensor], *, half: bool = False) -> float:
        began = time.perf_counter()
        field.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            value = run(x, t)
        value.float().square().mean().backward()
        return time.perf_counter() - began

    compiled: Callable[..., torch.Tensor] = torch.compile(field, dynamic=False)
    runs: dict[str, Callable[[], float]] = {"in bfloat16": partial(step, field, half=True)}
    compiling = None
    if shutil.which("g++") or shutil.which("clang++"):
        compiling = step(compiled)
        runs["compiled"] = partial(step, compiled)
    ratios: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(VARIANT_ROUNDS):
        for name, one in runs.items():
            plain = step(field)
            ratios[name].append(plain / one())
    return [
        record.judged(
            f"forward and backward of the paper's field on 784-10-10, {name}, against plain",
            "times_faster",
            found,
            at_least=1,
            compiling_seconds=compiling if name == "compiled" else None,
        )
        for name, found in ratios.items()
    ]


def run() -> None:
    """Measure and store everything."""
    rows = [row for name in CASES for row in steps(name)]
    rows += [sampling(), growth(), *variants()]
    torch.set_num_threads(2)
    rows.append(zoo())
    print(record.record("flows", rows, SEED))
    print(record.table({"rows": rows}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", choices=CASES, help="print one measurement")
    one = parser.parse_args().one
    if any(os.environ.get(key) != value for key, value in nn.MALLOC.items()):
        # Read when a process starts: page faults of large buffers would be most of a large step.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **nn.MALLOC})
    torch.set_num_threads(THREADS)
    if one:
        print(json.dumps(measure(one)))
    else:
        run()
