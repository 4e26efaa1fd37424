"""The same work on a GPU and on one thread of its machine's processor. Writes accelerator.json.

Nothing of symflow needs a GPU; this tells who has one what to expect. Where there is none the
script says so and stores nothing.
"""

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import align
import flows
import nn
import record
import torch

import symflow
from symflow.flows import Gaussian
from symflow.nn import RelationalTransformer

SEED = 0
CPU, GPU = "cpu", "cuda"
MANY = 4096  # samples of a step that keeps a GPU busy: a small batch waits for its launches


def seconds(work: Callable[[], Any], repeats: int, *, warm_up: int = 1) -> list[float]:
    """Time calls until the GPU has done what they asked for."""

    def done() -> None:
        work()
        torch.cuda.synchronize()

    return record.timed(done, repeats, warm_up=warm_up)


def aligned() -> list[dict[str, Any]]:
    """100 networks 784-128-128-10 to one reference, on both devices, together and one by one."""
    make = align.mlp(784, 128, 128, 10)
    arch = align.permuted_alone(make, torch.zeros(2, 784))
    there = arch.as_weights([align.drawn(make, seed) for seed in range(101)])
    matching = symflow.WeightMatching()
    found: dict[str, list[float]] = {}
    for device in (CPU, GPU):
        w = there.to(device)
        for name, work in {
            "together": lambda w=w: matching(arch.symmetry, w[0], w[1:]),
            "alone": lambda w=w: [matching(arch.symmetry, w[0], x) for x in w[1:]],
        }.items():
            found[f"{device} {name}"] = seconds(work, 3)
            print(device, name, found[f"{device} {name}"], flush=True)
    what = "100 networks 784-128-128-10 to one reference on a GPU, together against"
    times = {f"seconds_{k.replace(' ', '_')}": record.spread(v) for k, v in found.items()}
    return [
        record.judged(
            f"{what} one by one there",
            "times_faster",
            [a / b for a, b in zip(found["cuda alone"], found["cuda together"], strict=True)],
            at_least=5,
            **times,
        ),
        record.judged(
            f"{what} one by one on one thread of the processor",
            "times_faster",
            [a / b for a, b in zip(found["cpu alone"], found["cuda together"], strict=True)],
            at_least=5,
        ),
    ]


def fitted(device: str, batch: int, steps: int) -> float:
    """Seconds of a training step of the paper's flow over 784-10-10."""
    case = flows.CASES["mnist"]
    flow, x = flows.flow_of(case.widths, case.rank)
    flow.to(device)
    starts = Gaussian(0.1).sample(flow.arch, 256, generator=torch.Generator().manual_seed(SEED))
    zoo = SimpleNamespace(initial=starts, final=starts + 0.05)

    def fit(count: int) -> float:
        start = time.perf_counter()
        options = {"behaviour": 10.0, "batch_size": batch, "optimizer": "muon", "lr": 0.01}
        flow.fit(zoo, inputs=x, steps=count, **options)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    fit(3)
    few = fit(3)
    return (fit(3 + steps) - few) / steps


def dense() -> list[float]:
    """Seconds of a training step of the thesis' field on one network 784-10-10, on the GPU."""
    case = nn.CASES["mnist"]
    arch = symflow.mlp(list(case.widths))
    field = RelationalTransformer(
        arch, width=case.width, depth=case.depth, nodes="all", seed=SEED
    ).to(GPU)
    optimizer = torch.optim.Adam(field.parameters())
    x = torch.randn(1, arch.dimension, generator=torch.Generator().manual_seed(SEED)).to(GPU)
    t = torch.full((1,), 0.5, device=GPU)

    def step() -> None:
        optimizer.zero_grad()
        (nn.dense_forward(field, x, t) - x).square().mean().backward()
        optimizer.step()

    return seconds(step, 5, warm_up=2)


def trained() -> list[dict[str, Any]]:
    """Time training steps."""
    ours = {batch: [fitted(GPU, batch, 40) for _ in range(3)] for batch in (64, MANY)}
    here = [fitted(CPU, 64, 10) for _ in range(3)]
    theirs = dense()
    print(ours, here, theirs, flush=True)
    per_sample = statistics.median(ours[MANY]) / MANY
    return [
        record.judged(
            "training step of the paper's flow on 784-10-10, batch 64: a GPU against one thread",
            "times_faster",
            [a / b for a, b in zip(here, ours[64], strict=True)],
            at_least=1,
            seconds_cpu=record.spread(here),
            seconds=record.spread(ours[64]),
        ),
        record.judged(
            f"the same, a sample (batch {MANY}), against the thesis' field, both on a GPU",
            "times_faster",
            [s / per_sample for s in theirs],
            at_least=3000,
            seconds=record.spread(ours[MANY]),
            dense_seconds=record.spread(theirs),
        ),
    ]


def drawn() -> dict[str, Any]:
    """Time drawing networks."""
    case = flows.CASES["mnist"]
    flow, x = flows.flow_of(case.widths, case.rank)
    flow.to(GPU)
    starts = Gaussian(0.1).sample(flow.arch, 64, generator=torch.Generator().manual_seed(SEED))
    flow.fit(SimpleNamespace(initial=starts, final=starts + 0.05), inputs=x, steps=2)
    n = 10_000
    return record.judged(
        f"drawing {n:,} networks 784-10-10 with {flows.SAMPLING_STEPS} steps on a GPU",
        "seconds",
        seconds(lambda: flow.sample(n, steps=flows.SAMPLING_STEPS, seed=SEED), 3),
        at_most=30,
    )


def zoo() -> dict[str, Any]:
    """Time a zoo of MNIST's size; its examples are noise, which costs the same."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(60_000, 784, generator=generator)
    y = torch.randint(10, (60_000,), generator=generator)
    task = symflow.zoo.Task("noise of MNIST's size", x, y, x[:10_000], y[:10_000], classes=10)
    options: dict[str, Any] = {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "device": GPU}
    runs, epochs = flows.ZOO_RUNS, flows.ZOO_EPOCHS
    start = time.perf_counter()
    symflow.zoo.train(
        symflow.mlp([784, 10, 10]), task, runs=runs, epochs=epochs, batch_size=128, **options
    )
    return record.judged(
        f"a zoo of {runs} networks 784-10-10, {epochs} epochs of 60,000 examples each, on a GPU",
        "seconds",
        [time.perf_counter() - start],
        at_most=300,
    )


def main() -> None:
    """Measure and store everything."""
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        print("no GPU here: nothing is measured")
        return
    rows = [*aligned(), *trained(), drawn(), zoo()]
    rows = [{**row, "device": torch.cuda.get_device_name(), "in_readme": False} for row in rows]
    print(record.record("accelerator", rows, SEED))
    print(record.table({"rows": rows}))


if __name__ == "__main__":
    main()
