"""What a flow over MNIST networks 784-10-10 is good for elsewhere: other widths, another task.

Everything is drawn from flows of mnist.py: the headline or the shorter one, or a Euclidean one
where gradients of another task guide it; nothing is trained again. Fashion-MNIST is its first 3,600
training images, 2,600 to train on and 1,000 to test (set SYMFLOW_DATA to a folder with
fashion-mnist-head). Strengths of guidance and step sizes are chosen on 600 of the 2,600.
"""

import itertools
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
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

import symflow
from symflow import flows
from symflow.arch import Architecture, Leaf
from symflow.evaluate import accuracy, loss
from symflow.flows import Guidance, Source
from symflow.zoo import Task, Zoo, train

WIDTHS = (10, 16, 32, 64)
NETWORKS = 32
GUIDED_STEPS, MORE_STEPS = 512, 2048
STRENGTHS = (10.0, 30.0, 100.0, 200.0)
RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
# With more steps of the same size the task counts more beside the flow.
MORE_STRENGTHS, MORE_RATES = (200.0, 400.0, 800.0), (0.1, 0.3)
# With a loss that decays weights: it counts the sum of their squares so many times.
DECAYS, DECAYED_STRENGTHS = (0.003, 0.01), (150.0, 400.0)
# How much the hidden and the last layers of samples are cooled before another task.
HIDDEN, LAST = (1.0, 0.3, 0.1), (0.03, 0.06, 0.08, 0.1, 0.12, 0.15, 0.3, 1.0)
WATCHES = 4  # looks at held-out examples in each epoch
SHORT = (1, 2, 4, 8)  # epochs of training from scratch whose losses are also waited for
EPOCHS = 40
VALIDATION, FEW = 600, 8  # training examples, and networks, to choose by
MANY = 192  # networks whose least loss is waited for: with 32, noise says where it is

Chosen: TypeAlias = float | tuple[float, float]
Strengths: TypeAlias = tuple[float, ...] | tuple[tuple[float, float], ...]


@final
@dataclass(frozen=True)
class Recipe:
    """How networks are trained on another task; the step size is the same throughout."""

    batch: int
    options: dict[str, Any]

    def an_epoch(self, task: Task) -> int:
        """Return the steps of an epoch."""
        return len(task.x_train) // self.batch

    def between(self, task: Task) -> int:
        """Return the steps from one look at held-out examples to the next."""
        return self.an_epoch(task) // WATCHES


ADAM = Recipe(50, {"optimizer": "adam", "lr": 0.001})
# As the networks that the flow has learned were trained, but for the schedule: how long training
# goes on is what is asked.
ZOOS = Recipe(ZOO.batch_size, {k: v for k, v in ZOO.options.items() if k != "schedule"})


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


def decayed(arch: Architecture, w: Tensor, task: Task, decay: float) -> Tensor:
    """Return the training loss of each network and its weight decay, differentiable."""
    return losses(arch, w, task) + decay * (w**2).sum(1)


def guided(flow: flows.Flow, steps: int, task: Task, how: Chosen, starts: Tensor) -> Tensor:
    """Draw networks that are bent towards low loss on a task, from these initial weights."""
    strength, decay = how if isinstance(how, tuple) else (how, 0.0)
    guide = Guidance(lambda w: decayed(flow.arch, w, task, decay), strength)
    return flow.sample(len(starts), steps=steps, guidance=guide, start=starts)


def descended(arch: Architecture, steps: int, task: Task, how: Chosen, starts: Tensor) -> Tensor:
    """Spend as many full-batch gradients on plain descent from the same initial weights."""
    rate, decay = how if isinstance(how, tuple) else (how, 0.0)
    w = starts.clone()
    for _ in range(steps):
        w.requires_grad_(True)
        (gradient,) = torch.autograd.grad(decayed(arch, w, task, decay).sum(), w)
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
    draw: Callable[[int, Task, Chosen, Tensor], Tensor],
    among: Strengths,
    w: Tensor,
    steps: int,
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


def trained(
    arch: Architecture, starts: Tensor, task: Task, recipe: Recipe = ADAM, **options: Any
) -> Zoo:
    """Train from initial weights."""
    return train(
        arch,
        task,
        runs=len(starts),
        epochs=EPOCHS,
        batch_size=recipe.batch,
        init=Given(iter(starts)),
        progress=False,
        **recipe.options,
        **options,
    )


def training_row(arch: Architecture, starts: Tensor) -> dict[str, Any]:
    """Train from initial weights; keep the curve of the training loss."""
    task = fashion()
    zoo = trained(arch, starts, task)
    return {
        **figures(arch, zoo.final, task),
        "curve": zoo.metrics["history"].mean(0).tolist(),
        "steps_an_epoch": ADAM.an_epoch(task),
    }


def matched(arch: Architecture, w: Tensor, task: Task, cooled: tuple[float, float]) -> Tensor:
    """Give outputs to another task's classes, and cool the hidden layers and the last.

    Which output becomes which class is told by the mean log-probabilities on the training examples
    of each class: their best assignment, found without a gradient.
    """
    parts = arch.unflatten(w)
    with torch.no_grad():
        log_p = arch.apply(w, task.x_train.flatten(1)).log_softmax(-1)
    labels = task.y_train.flatten()
    by_class = [log_p[:, labels == c].mean(1) for c in range(log_p.shape[-1])]
    orders = [linear_sum_assignment(-x.numpy())[1] for x in torch.stack(by_class, 1)]
    order = torch.stack([torch.as_tensor(order) for order in orders])
    for key, x in parts.items():
        if key not in arch.output:
            parts[key] = cooled[0] * x
            continue
        index = order.view(*order.shape, *[1] * (x.dim() - 2)).expand_as(x)
        parts[key] = cooled[1] * x.gather(1, index)
    return arch.flatten(parts)


def watched(
    arch: Architecture, starts: Tensor, task: Task, recipe: Recipe
) -> tuple[Tensor, list[float]]:
    """Train from initial weights; return states, and their mean losses on test data."""
    # What shared mini-batches do to all curves alike would hide what initial weights do.
    zoo = trained(arch, starts, task, recipe, batches="own", snapshot_every=recipe.between(task))
    states = torch.as_tensor(zoo.snapshots)
    return states, [float(loss(arch, x, task).mean()) for x in states.unbind(1)]


def reached(curve: list[float], wanted: float) -> int:
    """Return after how many looks a loss was at most the one that is wanted; -1 if never."""
    return next((k + 1 for k, x in enumerate(curve) if x <= wanted), -1)


def initialised(
    arch: Architecture,
    starts: Tensor,
    recipe: Recipe,
    initial: Callable[[Task, tuple[float, float], int], Tensor],
) -> dict[str, Any]:
    """Train from matched networks until losses on test data that training from scratch reaches.

    Those are its least loss, and its losses after a few numbers of epochs. How much layers are
    cooled is chosen for each by held-out training examples, on the first of the networks.
    """
    choose, task = without(fashion(), VALIDATION), fashion()
    known = watched(arch, starts[:NETWORKS], choose, recipe)[1]
    cooled = tuple(itertools.product(HIDDEN, LAST))
    tried = {t: watched(arch, initial(choose, t, NETWORKS), choose, recipe)[1] for t in cooled}
    scratch = watched(arch, starts, task, recipe)[1]
    found = cache(lambda t: watched(arch, initial(task, t, len(starts)), task, recipe))
    every = recipe.between(task)

    def until(told: int, shown: int) -> dict[str, Any]:
        looks = {t: reached(curve, known[told]) for t, curve in tried.items()}
        best = min(looks, key=lambda t: looks[t] if looks[t] > 0 else len(known) + 1)
        states, curve = found(best)
        look = reached(curve, scratch[shown])
        return {
            **figures(arch, states[:, look - 1 if look > 0 else -1], task),
            "gradient_evaluations": every * look if look > 0 else -1,
            "from_scratch": every * (shown + 1),
            "cooled": best,
        }

    return {
        **until(known.index(min(known)), scratch.index(min(scratch))),
        "epochs": {n: until(WATCHES * n - 1, WATCHES * n - 1) for n in SHORT},
        "tried": {str(t): reached(curve, min(known)) for t, curve in tried.items()},
        "curve_from_scratch": scratch,
    }


def least(arch: Architecture, starts: Tensor, recipe: Recipe) -> dict[str, Any]:
    """Train from scratch to the least loss on test data: what initial weights are compared by."""
    task = fashion()
    states, curve = watched(arch, starts, task, recipe)
    look, every = curve.index(min(curve)), recipe.between(task)
    return {
        **figures(arch, states[:, look], task),
        "gradient_evaluations": every * (look + 1),
        "curve": curve,
        "every": every,
    }


def run(*, fast: bool, only: str = "") -> None:
    """Run or resume every row whose name holds ``only``."""
    zoo, cells = reduced(ZOO, rows()) if fast else (ZOO, rows())
    flow_settings = cells["Geometric, headline"]
    few, more = (n // (10 if fast else 1) for n in (GUIDED_STEPS, MORE_STEPS))
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
        lambda: chosen(own, partial(descended, own), RATES, starts, few),
    )
    adam = {"batch": ADAM.batch, "rate": ADAM.options["lr"]}
    told |= {"epochs": EPOCHS} | adam
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
        lambda: chosen(own, partial(guided, plain()), STRENGTHS, starts, few),
    )
    told |= {"strengths": MORE_STRENGTHS, "rates": MORE_RATES, "guided_steps": MORE_STEPS}
    ledger.row(
        Row(f"Fashion, guided by {MORE_STEPS} gradients", told),
        lambda: chosen(own, partial(guided, plain()), MORE_STRENGTHS, starts, more),
    )
    ledger.row(
        Row(f"Fashion, plain descent by {MORE_STEPS} gradients", told),
        lambda: chosen(own, partial(descended, own), MORE_RATES, starts, more),
    )

    told |= {"strengths": DECAYED_STRENGTHS, "rates": MORE_RATES, "decays": DECAYS}
    pairs = tuple(itertools.product(DECAYED_STRENGTHS, DECAYS))
    for name in ("Euclidean, run, behaviour", "Euclidean, run, behaviour, velocity"):
        end = ", velocity" if name.endswith("velocity") else ""
        ledger.row(
            Row(f"Fashion, guided by {MORE_STEPS} gradients, weight decay{end}", told),
            lambda name=name: chosen(
                own, partial(guided, experiment.fitted(cells[name])[0]), pairs, starts, more
            ),
        )
    pairs = tuple(itertools.product(MORE_RATES, DECAYS))
    ledger.row(
        Row(f"Fashion, plain descent by {MORE_STEPS} gradients, weight decay", told),
        lambda: chosen(own, partial(descended, own), pairs, starts, more),
    )

    many = zoo.source.sample(own, MANY, generator=torch.Generator().manual_seed(13))
    told = {"networks": MANY, "chosen_by": NETWORKS, "epochs": EPOCHS}
    told |= {"hidden": HIDDEN, "last": LAST, "watches": WATCHES, "batches": "own", "short": SHORT}

    @cache
    def shorter() -> flows.Flow:
        return experiment.fitted(cells["Geometric, 8,000 steps"])[0]

    samples = cache(lambda: shorter().sample(MANY, steps=32, start=many))

    def drawn(task: Task, cooled: tuple[float, float], n: int) -> Tensor:
        return matched(own, samples()[:n], task, cooled)

    def moved(task: Task, cooled: tuple[float, float], n: int) -> Tensor:
        return matched(own, shorter().decode(shorter().encode(many[:n])), task, cooled)

    # The control: what the section and the classes' order do without what the flow has learned.
    controlled = (("flow samples", drawn), ("Gaussian weights on the section", moved))
    # Two recipes: the zoo's, and one whose least loss is lower, which is harder to come before.
    for recipe, end, how in (
        (ADAM, "", adam),
        (ZOOS, ", as the zoo was trained", {"batch": ZOOS.batch, **ZOOS.options}),
    ):
        ledger.row(
            Row(f"Fashion, from scratch to its least loss{end}", told | how),
            lambda recipe=recipe: least(own, many, recipe),
        )
        for name, initial in controlled:
            ledger.row(
                Row(f"Fashion, from {name} with classes matched, to that loss{end}", told | how),
                lambda initial=initial, recipe=recipe: initialised(own, many, recipe, initial),
            )


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="reduced sizes: to try the machinery")
    parser.add_argument("--only", default="", help="rows whose names hold this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    run(fast=options.fast, only=options.only)
