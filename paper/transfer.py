"""What a flow over MNIST networks 784-10-10 is good for elsewhere: other widths, another task.

Everything is drawn from flows of mnist.py: the headline, or the Euclidean one where gradients of
another task guide it; nothing is trained again. Fashion-MNIST is its first 3,600 training images,
2,600 to train on and 1,000 to test (set SYMFLOW_DATA to a folder with fashion-mnist-head).
Strengths of guidance and step sizes are chosen on 600 of the 2,600.
"""

import os
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeAlias, final

import torch
from experiment import Experiment, reduced
from ledger import Ledger, Row
from measured import quality
from mnist import ZOO, rows
from torch import Tensor
from torch.nn import functional as F

import symflow
from symflow import flows
from symflow.arch import Architecture, Leaf
from symflow.evaluate import accuracy, loss
from symflow.flows import Guidance, Source
from symflow.zoo import Task, train

WIDTHS = (10, 16, 32, 64)
NETWORKS = 32
GUIDED_STEPS, MORE_STEPS = 512, 2048
STRENGTHS = (10.0, 30.0, 100.0, 200.0)
RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
# With more steps of the same size the task counts more beside the flow.
MORE_STRENGTHS, MORE_RATES = (200.0, 400.0, 800.0), (0.1, 0.3)
EPOCHS, BATCH, RATE = 40, 50, 0.001
VALIDATION, FEW = 600, 8  # training examples, and networks, to choose by

Strengths: TypeAlias = tuple[float, ...]


@final
@dataclass(frozen=True, eq=False)
class Given(Source):
    """Initial weights that are there already, such as samples of a flow.

    They are handed out one after another: a zoo asks for those of each run by itself.
    """

    weights: Iterator[Tensor]

    def spread(self, leaf: Leaf, fan_in: int) -> float:
        """Return nothing: no leaf is drawn."""
        raise NotImplementedError

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return nothing: no leaf is drawn."""
        raise NotImplementedError

    def sample(
        self,
        arch: Architecture,
        n: int,
        *,
        generator: torch.Generator,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Return the next ``n`` of the weights."""
        return torch.stack([next(self.weights) for _ in range(n)]).to(dtype)


def fashion() -> Task:
    """Read the head of Fashion-MNIST."""
    return symflow.zoo.idx(Path(os.environ.get("SYMFLOW_DATA", ".")) / "fashion-mnist-head")


def without(task: Task, held: int) -> Task:
    """Return the training examples alone, the last of them as the test split: to choose by."""
    n = len(task.x_train) - held
    return replace(
        task,
        name=f"{task.name}, to choose by",
        x_train=task.x_train[:n],
        y_train=task.y_train[:n],
        x_test=task.x_train[n:],
        y_test=task.y_train[n:],
    )


def losses(arch: Architecture, w: Tensor, task: Task) -> Tensor:
    """Return the training loss of each network, differentiable."""
    out = arch.apply(w, task.x_train.flatten(1))
    wanted = task.y_train.expand(len(w), -1)
    return (
        F.cross_entropy(out.flatten(0, 1), wanted.flatten(), reduction="none")
        .view(len(w), -1)
        .mean(1)
    )


def guided(flow: flows.Flow, steps: int, task: Task, strength: float, starts: Tensor) -> Tensor:
    """Draw networks that are bent towards low loss on a task, from these initial weights."""
    guide = Guidance(lambda w: losses(flow.arch, w, task), strength)
    return flow.sample(len(starts), steps=steps, guidance=guide, start=starts)


def descended(arch: Architecture, steps: int, task: Task, rate: float, starts: Tensor) -> Tensor:
    """Spend as many full-batch gradients on plain descent from the same initial weights."""
    w = starts.clone()
    for _ in range(steps):
        w.requires_grad_(True)
        (gradient,) = torch.autograd.grad(losses(arch, w, task).sum(), w)
        w = (w - rate * gradient).detach()
    return w


def figures(arch: Architecture, ws: Tensor, task: Task) -> dict[str, Any]:
    """Return test accuracy and loss."""
    found = {"accuracy": accuracy(arch, ws, task), "loss": loss(arch, ws, task)}
    return {
        **{name: float(x.mean()) for name, x in found.items()},
        **{f"{name}_error": float(x.std() / len(x) ** 0.5) for name, x in found.items()},
        "networks": len(ws),
    }


def chosen(
    arch: Architecture,
    draw: Callable[[int, Task, float, Tensor], Tensor],
    among: Strengths,
    w: Tensor,
    steps: int = GUIDED_STEPS,
) -> dict[str, Any]:
    """Choose a strength on held-out training examples, then measure on the test data."""
    one = partial(draw, steps)
    task = fashion()
    choose = without(task, VALIDATION)
    tried = {s: figures(arch, one(choose, s, w[:FEW]), choose)["accuracy"] for s in among}
    best = max(tried, key=lambda s: tried[s])
    return {
        **figures(arch, one(task, best, w), task),
        "strength": best,
        "gradient_evaluations": steps,
        "tried": {str(k): v for k, v in tried.items()},
    }


def training_row(arch: Architecture, starts: Tensor) -> dict[str, Any]:
    """Train from initial weights with Adam; keep the curve of the training loss."""
    task = fashion()
    zoo = train(
        arch,
        task,
        runs=len(starts),
        epochs=EPOCHS,
        batch_size=BATCH,
        optimizer="adam",
        lr=RATE,
        init=Given(iter(starts)),
        progress=False,
    )
    steps = len(task.x_train) // BATCH
    return {
        **figures(arch, zoo.final, task),
        "curve": zoo.metrics["history"].mean(0).tolist(),
        "steps_an_epoch": steps,
    }


def run(*, fast: bool, only: str = "") -> None:
    """Run or resume every row whose name holds ``only``."""
    zoo, cells = reduced(ZOO, rows()) if fast else (ZOO, rows())
    flow_settings = cells["Geometric, headline"]
    ledger = Ledger("transfer", fast, only)
    experiment = Experiment("mnist", symflow.zoo.mnist(), zoo, fast=fast)

    @cache
    def headline() -> flows.Flow:
        return experiment.fitted(flow_settings)[0]

    @cache
    def plain() -> flows.Flow:
        return experiment.fitted(cells["Euclidean, run, behaviour"])[0]

    own = experiment.arch
    told = {"steps": flow_settings.steps, "rank": flow_settings.rank, "networks": NETWORKS}
    for n in WIDTHS:
        arch = symflow.mlp([784, n, 10])

        def wide(arch: Architecture = arch) -> dict[str, Any]:
            drawn = flows.transfer(headline(), arch).sample(NETWORKS, steps=32, seed=7)
            return quality(arch, drawn, experiment.task)

        ledger.row(Row(f"width {n}", told), wide)
    generator = torch.Generator().manual_seed(11)
    starts = zoo.source.sample(own, NETWORKS, generator=generator)
    told |= {"strengths": STRENGTHS, "rates": RATES, "guided_steps": GUIDED_STEPS}
    ledger.row(
        Row("Fashion, plain descent", told),
        lambda: chosen(own, partial(descended, own), RATES, starts),
    )
    told |= {"epochs": EPOCHS, "batch": BATCH, "rate": RATE}
    ledger.row(Row("Fashion, from scratch", told), lambda: training_row(own, starts))
    ledger.row(
        Row("Fashion, from flow samples", told),
        lambda: training_row(own, headline().sample(NETWORKS, steps=32, start=starts)),
    )

    def hidden_alone() -> dict[str, Any]:
        parts = own.unflatten(headline().sample(NETWORKS, steps=32, start=starts))
        fresh = own.unflatten(starts)
        parts |= {key: fresh[key] for key in own.output}
        return training_row(own, own.flatten(parts))

    ledger.row(Row("Fashion, from flow samples with a fresh last layer", told), hidden_alone)
    ledger.row(
        Row("Fashion, guided", told),
        lambda: chosen(own, partial(guided, plain()), STRENGTHS, starts),
    )
    told |= {"strengths": MORE_STRENGTHS, "rates": MORE_RATES, "guided_steps": MORE_STEPS}
    ledger.row(
        Row(f"Fashion, guided by {MORE_STEPS} gradients", told),
        lambda: chosen(own, partial(guided, plain()), MORE_STRENGTHS, starts, MORE_STEPS),
    )
    ledger.row(
        Row(f"Fashion, plain descent by {MORE_STEPS} gradients", told),
        lambda: chosen(own, partial(descended, own), MORE_RATES, starts, MORE_STEPS),
    )


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="reduced sizes: to try the machinery")
    parser.add_argument("--only", default="", help="rows whose names hold this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    run(fast=options.fast, only=options.only)
