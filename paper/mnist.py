"""Flows over MNIST networks 784-10-10: the source thesis' table, its zoo size, and beyond."""

from dataclasses import replace

from experiment import PRESETS, FlowSettings, ZooSettings, main

import symflow

ZOO = ZooSettings(
    widths=(784, 10, 10),
    runs=4096,
    held_out=128,
    epochs=4,
    batch_size=128,
    options={"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "schedule": "cosine"},
)
CELL = FlowSettings(lr=0.01)
HEADLINE = replace(CELL, rank=192, width=72, steps=20_000, batch_size=96, ema=0.9995)
# Held-out loss is least at 13,000 of the headline's steps: fewer of them, and more noise.
SHORTER = replace(HEADLINE, steps=8_000, width=64, bridge=0.2)
SIZES = (25, 50, 100, 400, 1600)


def rows() -> dict[str, FlowSettings]:
    """Return every flow by its row's name."""
    found = {"Geometric, headline": HEADLINE, "Geometric, 8,000 steps": SHORTER}
    # Path noise makes samples better and more alike: less of it for averages, and against copies.
    for bridge in (0.05, 0.1):
        found[f"Geometric, 8,000 steps, path noise {bridge}"] = replace(SHORTER, bridge=bridge)
    for preset in PRESETS:
        for coupling in ("run", "independent"):
            for behaviour in (CELL.behaviour, 0.0):
                name = f"{preset}, {coupling}{', behaviour' if behaviour else ''}"
                found[name] = replace(CELL, preset=preset, coupling=coupling, behaviour=behaviour)
    # A predicted end takes states back to the zoo; a velocity leaves what another task has pulled.
    found["Euclidean, run, behaviour, velocity"] = replace(
        CELL, preset="Euclidean", predicts="velocity"
    )
    # As the source thesis has it: 50 runs, and weights along the training of each.
    found["Geometric, 50 runs with snapshots"] = replace(CELL, runs=50, snapshots=10)
    return found | {f"Geometric, {n} runs": replace(CELL, runs=n) for n in SIZES}


if __name__ == "__main__":
    main("mnist", symflow.zoo.mnist, ZOO, rows(), __doc__ or "")
