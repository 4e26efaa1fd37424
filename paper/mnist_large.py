"""The headline flow of MNIST networks 784-10-10 on a zoo of four times as many runs."""

from dataclasses import replace

from experiment import Finish, FlowSettings, main
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
    # Twice the steps change nothing; what holds averages back is that networks are too much alike.
    found["Geometric, 40,000 steps"] = replace(HEADLINE, steps=40_000)
    # Trained networks themselves lose a part of what averages gain in 192 directions, little in
    # 320; and less of the behaviour loss leaves samples further apart.
    wide = replace(HEADLINE, rank=320, width=68, behaviour=2.0, steps=24_000)
    found["Geometric, 320 directions"] = wide
    found["Geometric, 320 directions, drawn with noise"] = replace(wide, noisy=1.0)
    return found


if __name__ == "__main__":
    main("mnist-large", symflow.zoo.mnist, replace(ZOO, runs=16_384), rows(), __doc__ or "")
