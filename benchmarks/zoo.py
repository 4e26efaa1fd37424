"""Whether training all runs at once is faster than one after another. Writes zoo.json."""

import statistics
import time
from itertools import pairwise
from typing import Any

import record
import torch
from torch import nn

import symflow
from symflow.zoo import Task, batch_order, breast_cancer, train

SEED = 0
RUNS, EPOCHS, BATCH, RATE = 100, 50, 16, 0.001
WIDTHS = [30, 16, 16, 2]
REPEATS = 5
PLAIN_EACH = 4  # plain runs before each repeat, so that both sides see the same machine
THREADS = 1  # what is best for both: the products are small


def plain_run(task: Task, start: torch.Tensor) -> nn.Module:
    """One network in the loop that one would write for it, on tensors in memory."""
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(WIDTHS):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    net = symflow.mlp(WIDTHS).load_into(nn.Sequential(*layers[:-1]), start)
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
    criterion = nn.CrossEntropyLoss()
    for epoch in range(EPOCHS):
        for rows in batch_order(SEED, epoch, 0, len(task.x_train)).split(BATCH):
            optimizer.zero_grad()
            criterion(net(task.x_train[rows]), task.y_train[rows]).backward()
            optimizer.step()
    return net


def measure(task: Task, batches: str, plain: list[float]) -> dict[str, Any]:
    """All runs at once, whole call: initial weights, training, and accuracies at the end."""
    arch = symflow.mlp(WIDTHS)
    options = {"runs": RUNS, "epochs": EPOCHS, "batch_size": BATCH, "lr": RATE, "seed": SEED}
    zoo = train(arch, task, batches=batches, **options)
    at_once, ratios, worst = [], [], 0.0
    for repeat in range(REPEATS):
        seconds = []
        for r in range(repeat * PLAIN_EACH, (repeat + 1) * PLAIN_EACH):
            start = time.perf_counter()
            net = plain_run(task, zoo.initial[r])
            seconds.append(time.perf_counter() - start)
            if batches == "shared":  # the order that the plain runs see
                worst = max(worst, float((arch.flatten(net) - zoo.final[r]).abs().max()))
        at_once += record.timed(
            lambda: train(arch, task, batches=batches, progress=False, **options), 1, warm_up=0
        )
        plain += seconds
        ratios.append(RUNS * statistics.mean(seconds) / at_once[-1])
    more = {"largest_difference_of_a_weight": worst} if batches == "shared" else {}
    return record.judged(
        f"{RUNS} breast-cancer runs of {EPOCHS} epochs at batch {BATCH}, {batches} batches",
        "times_faster",
        ratios,
        at_least=20,
        one_plain_run_seconds=record.spread(plain[-REPEATS * PLAIN_EACH :]),
        all_plain_runs=f"{RUNS} times the mean of the {PLAIN_EACH} timed before each repeat",
        all_at_once_seconds=record.spread(at_once),
        **more,
    )


def run() -> None:
    """Measure and store everything."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    task = breast_cancer()
    plain_run(task, torch.zeros(symflow.mlp(WIDTHS).dimension))  # warm up
    rows = [measure(task, batches, []) for batches in ("shared", "own")]
    print(record.record("zoo", rows, SEED))
    torch.set_num_threads(before)
    print(record.table({"rows": rows}))


if __name__ == "__main__":
    run()
