"""Flows over breast-cancer networks 30-16-16-2: the nine cells of the source thesis, and ours.

The thesis does not give the batch size of its zoo: 128 is a choice of ours.
"""

from dataclasses import replace

from experiment import PRESETS, FlowSettings, ZooSettings, main, repeated

import symflow

ZOO = ZooSettings(
    widths=(30, 16, 16, 2),
    runs=1920,
    held_out=128,
    epochs=50,
    batch_size=128,
    options={"optimizer": "adam", "lr": 1e-3},
)
CELL = FlowSettings(rank=30, bridge=0.1, lr=0.01, steps=2000, batch_size=32, samples=256)
THESIS = {
    "plain": {"coupling": "independent", "alignment": "none"},
    "aligned": {"coupling": "independent", "alignment": "reference"},
    "aligned + OT": {"coupling": "OT", "alignment": "reference"},
}


def rows() -> dict[str, FlowSettings]:
    """Return every flow by its row's name."""
    found: dict[str, FlowSettings] = {}
    for preset in PRESETS:
        found[f"{preset}, run"] = replace(CELL, preset=preset, coupling="run")
        for name, cell in THESIS.items():
            found[f"{preset}, {name}"] = replace(CELL, preset=preset, **cell)
    for preset in PRESETS:
        wide = replace(CELL, preset=preset, bridge=0.3, steps=4000, noisy=1.0)
        found[f"{preset}, path noise 0.3"] = wide
        # In two steps samples of three presets end nearest to where runs did from the same starts
        # (by_steps; Euclidean ones in a single step, one layer in eight): the same for all.
        found[f"{preset}, path noise 0.3, in 2 steps"] = replace(wide, sampling=2)
        light = replace(wide, depth=1, edge_width=8, steps=8000)
        found[f"{preset}, one layer"] = light
        found[f"{preset}, one layer, in 2 steps"] = replace(light, sampling=2)
        longer = replace(light, steps=16_000, sampling=2)
        name = f"{preset}, one layer, 16,000 steps, in 2 steps"
        found |= {name: longer} | repeated(name, longer)
    for preset in ("Geometric", "Balanced"):
        found[f"{preset}, quotient OT"] = replace(
            CELL, preset=preset, coupling="quotient OT", alignment="none", batch_size=16, steps=1000
        )
    return found


if __name__ == "__main__":
    main("uci", symflow.zoo.breast_cancer, ZOO, rows(), __doc__ or "")
