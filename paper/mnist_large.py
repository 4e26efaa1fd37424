"""The headline flow of MNIST networks 784-10-10 on a zoo of four times as many runs."""

from dataclasses import replace

from experiment import Finish, FlowSettings, main, repeated
from mnist import HEADLINE, ZOO

import symflow


def rows() -> dict[str, FlowSettings]:
    """Return every flow by its row's name: drawn along the drift, and with the path's noise."""
    found: dict[str, FlowSettings] = {}
    for bridge in (0.15, 0.05):
        one = replace(HEADLINE, bridge=bridge)
        name = f"Geometric, path noise {bridge}"
        found |= {name: one, f"{name}, drawn with it": replace(one, noisy=1.0)}
    # As far apart as trained networks are.
    end = Finish(steps=1500, lr=0.003, behaviour=1.0, bridge=0.15)
    apart = replace(HEADLINE, finish=end, noisy=1.0)
    found["Geometric, finished with less behaviour loss"] = apart
    for steps in (4, 8):  # in 4 held-out runs' own ends are nearest (by_steps)
        name = f"Geometric, finished with less behaviour loss, in {steps} steps"
        found[name] = replace(apart, sampling=steps)
    # Twice the steps, or more directions of the inputs, change little: what holds averages back are
    # errors that all samples share. To compare the means of predictions, too, takes those away.
    found["Geometric, 40,000 steps"] = replace(HEADLINE, steps=40_000)
    wide = replace(HEADLINE, rank=320, width=68, behaviour=2.0, steps=24_000)
    found["Geometric, 320 directions"] = wide
    means = Finish(steps=1500, lr=0.003, behaviour=10.0, bridge=0.15, consensus=100.0)
    found["Geometric, consensus"] = replace(HEADLINE, finish=means)
    for steps in (8, 4, 3, 2):
        name = f"Geometric, consensus, drawn with noise in {steps} steps"
        found[name] = replace(HEADLINE, finish=means, noisy=1.0, sampling=steps)
    # The row that is the best, and the one whose samples are as far apart as runs are.
    for name in ("Geometric, consensus", "Geometric, consensus, drawn with noise in 3 steps"):
        found |= repeated(name, found[name])
    return found


if __name__ == "__main__":
    main("mnist-large", symflow.zoo.mnist, replace(ZOO, runs=16_384), rows(), __doc__ or "")
