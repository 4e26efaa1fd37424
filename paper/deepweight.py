"""DeepWeightFlow's networks 784-32-32-10: its plain velocity, and ours with a fraction of the size.

Their recipe (Gupta et al., 2026): networks aligned to the first one, flattened; a perceptron of
three hidden layers (h, h/2, h) on weights and 64 features of the time predicts x1 - x0; x0 is
Gaussian of deviation 0.01, paths have noise 0.001; AdamW at 5e-4, batches of 8, 30,000 steps; RK4
in 100 steps. It runs here in our engine, on an architecture whose neurons may not be permuted.
"""

import itertools
import time
from dataclasses import asdict, dataclass, replace
from typing import Any, final

import torch
from experiment import (
    Experiment,
    Finish,
    FlowSettings,
    ZooSettings,
    asked,
    reduced,
    repeated,
)
from ledger import Row
from torch import Tensor, nn

import symflow
from symflow import flows
from symflow.arch import Architecture
from symflow.nn import VectorField

ZOO = ZooSettings(
    widths=(784, 32, 32, 10),
    runs=2048,
    held_out=64,
    epochs=5,
    batch_size=128,
    options={"optimizer": "adam", "lr": 1e-3},
    std=None,
)
THEIRS = 100  # runs
OURS = FlowSettings(rank=128, lr=0.01, steps=12_000, samples=64)
AUDITED = 32  # pairs of networks take longer to align than those of 784-10-10
TIMES = 64  # features of the time


@final
class PlainVelocity(VectorField):
    """A perceptron on the flat vector: it knows nothing of neurons.

    It takes raw weights, as theirs does. On standardised ones, which are larger, Adam's steps on
    26,506 inputs move hidden units far at once.
    """

    def __init__(self, arch: Architecture, hidden: int, *, seed: int = 0) -> None:
        VectorField.__init__(self, arch, arch.symmetry)
        half = max(1, hidden // 2)
        widths = (arch.dimension + TIMES, hidden, half, hidden, arch.dimension)
        self.register_buffer("frequencies", torch.linspace(0, 5, TIMES // 2).exp())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers: list[nn.Module] = []
            for n, m in itertools.pairwise(widths):
                layers += [nn.Linear(n, m), nn.GELU()]
        self.network = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the velocity."""
        at = t[:, None] * torch.as_tensor(self.frequencies)
        return self.network(torch.cat([x, at.sin(), at.cos()], dim=-1))


@final
@dataclass(frozen=True)
class PlainSettings:
    """One of their flows.

    Attributes
    ----------
    hidden
        Of the perceptron.
    aligned
        Whether networks are aligned to the first one before training.
    runs, steps, batch_size, lr, samples, seed
        Training and samples.
    """

    hidden: int
    aligned: bool
    runs: int = THEIRS
    steps: int = 30_000
    batch_size: int = 8
    lr: float = 0.0005
    samples: int = 64
    seed: int = 0


def plain(experiment: Experiment, settings: PlainSettings) -> dict[str, Any]:
    """Train a plain velocity, draw networks, and measure them."""
    arch, device = experiment.arch, experiment.ledger.devices[0]
    fixed = arch.with_groups({a.name: symflow.Trivial(a.size) for a in arch.axes})
    ws = experiment.training.final[: settings.runs]
    if settings.aligned:
        permuted = arch.with_groups({a.name: symflow.Permutation(a.size) for a in arch.axes})
        ws = symflow.WeightMatching()(permuted.symmetry, ws[0], ws).weights
    recipe = flows.Recipe(
        section="flat",
        path=flows.Straight(noise=0.001),
        coupling=flows.Independent(),
        time=flows.BetaTime(1.0),  # uniform
        source=flows.Gaussian(0.01),
        predicts="velocity",
        project_end=False,
    )
    field = PlainVelocity(fixed, settings.hidden, seed=settings.seed)
    flow = flows.Flow(fixed, recipe, field).to(device)
    start = time.perf_counter()
    flow.fit(
        ws,
        steps=settings.steps,
        batch_size=settings.batch_size,
        optimizer="adamw",
        lr=settings.lr,
        schedule="constant",
        ema=0.0,
        seed=settings.seed,
        log_every=max(1, settings.steps // 20),
        progress=True,
    )
    seconds = time.perf_counter() - start
    steps = 100 if settings.steps > 100 else 2
    drawn = flow.sample(settings.samples, steps=steps, solver="rk4", seed=settings.seed + 1000)
    return {
        **experiment.measured(drawn.cpu()),
        "parameters": sum(p.numel() for p in flow.field.parameters()),
        "runs": settings.runs,
        "seconds": seconds,
        "history": flow.history,
    }


def rows() -> dict[str, FlowSettings]:
    """Return our flows by their rows' names."""
    found = {}
    few = replace(OURS, runs=THEIRS, steps=2000)
    for one, name in ((OURS, "all runs"), (few, f"{THEIRS} runs")):
        found[f"Geometric, {name}"] = one
        found[f"Geometric, {name}, in 8 steps with noise"] = replace(one, sampling=8, noisy=1.0)
    # Consensus spreads samples: fewer steps, or less of it, keep each one nearer to trained ones.
    for weight, name in ((100.0, "consensus"), (20.0, "consensus 20")):
        means = Finish(steps=1500, lr=0.003, behaviour=10.0, bridge=0.15, consensus=weight)
        for steps in (32, 4):
            row = f"Geometric, all runs, {name}" + (f", in {steps} steps" if steps < 32 else "")
            found[row] = replace(OURS, finish=means, sampling=steps)
    # The row that is the best, and the one on as many runs as theirs.
    for name in ("Geometric, all runs, consensus, in 4 steps", f"Geometric, {THEIRS} runs"):
        found |= repeated(name, found[name])
    return found


def plain_rows() -> dict[str, PlainSettings]:
    """Return their flows: as small as ours, one size between, and the one of their table."""
    found = {}
    for hidden, name in ((3, "0.2M"), (64, "3.4M"), (512, "27.5M")):
        for aligned in (True, False):
            kind = "aligned" if aligned else "raw"
            found[f"plain velocity, {name}, {kind}"] = PlainSettings(hidden, aligned)
    found["plain velocity, 27.5M, aligned, all runs"] = PlainSettings(512, True, runs=ZOO.runs)
    return found


def main() -> None:
    """Run from the command line."""
    options = asked(__doc__ or "")
    zoo, ours, theirs = ZOO, rows(), plain_rows()
    if options["fast"]:
        zoo, ours = reduced(zoo, ours)
        small = {"steps": 20, "runs": 48, "samples": 8}
        theirs = {name: replace(one, **small) for name, one in theirs.items()}
    experiment = Experiment("deepweight", symflow.zoo.mnist(), zoo, audited=AUDITED, **options)
    experiment.run(ours)
    for name, one in theirs.items():
        row = Row(name, {"zoo": asdict(zoo), **asdict(one), "inputs": "raw"})
        experiment.ledger.row(row, lambda one=one: plain(experiment, one))


if __name__ == "__main__":
    main()
