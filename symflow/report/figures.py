"""The pictures of the study, drawn from its results alone."""

import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from symflow.report.study import HELD_OUT, NETWORKS, PATHS, PRESETS, TRAINING

# Okabe and Ito (2008): told apart by colour-blind readers too.
_ORANGE, _SKY, _GREEN, _PINK, _RED, _BLUE = (
    *("#e69f00", "#56b4e9", "#009e73"),
    *("#cc79a7", "#d55e00", "#0072b2"),
)
COLOURS = dict(
    zip(
        NETWORKS,
        ("#9a9a9a", "#222222", _ORANGE, _SKY, _GREEN, _PINK, _RED, _BLUE),
        strict=True,
    )
)
_PATH_COLOURS = dict(zip(PATHS, (_RED, _SKY, _PINK, _GREEN), strict=True))
_DPI = 150
_BOXES: dict[str, Any] = {
    "orientation": "horizontal",
    "patch_artist": True,
    "widths": 0.6,
    "whis": (5, 95),
    "showfliers": False,
    "showmeans": True,
    "medianprops": {"color": "black"},
    "meanprops": {"marker": "D", "markerfacecolor": "white", "markeredgecolor": "black"},
}


def draw(results: dict[str, Any]) -> dict[str, bytes]:
    """Return PNG images by name.

    Parameters
    ----------
    results
        What :func:`symflow.report.study` returned.

    Examples
    --------
    >>> from symflow.report import StudySettings, study
    >>> sorted(draw(study(StudySettings.small())))                           # doctest: +SKIP
    ['barriers', 'novelty', 'plane', 'samples', 'steps', 'training']
    """
    networks = results["networks"]
    pictures = {
        "barriers": _barriers(results["barriers"]),
        "samples": _samples(networks),
        "novelty": _novelty(networks),
        "plane": _plane(networks),
        "training": _training(networks),
        "steps": _steps(networks),
    }
    return {name: _png(figure) for name, figure in pictures.items()}


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without the date, the same results give the same bytes.
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def _figure(columns: int, height: float = 3.4, **options: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9.6 if columns > 1 else 6.4, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, **options)[0]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.25, linewidth=0.6)
        one.set_axisbelow(True)
    return figure, list(axes)


def _barriers(barriers: dict[str, Any]) -> Figure:
    figure, (left, right) = _figure(2)
    for name, colour in _PATH_COLOURS.items():
        curve = barriers[name]
        left.plot(curve["times"], curve["mean"], color=colour, label=name, linewidth=2)
        left.fill_between(curve["times"], curve["low"], curve["high"], color=colour, alpha=0.15)
    left.set(xlabel="time along the path", ylabel="training loss", yscale="log")
    left.legend(frameon=False, fontsize=8)
    left.set_title("Between two networks (mean, 10 to 90 %)", fontsize=10)
    values = [barriers[name]["train midpoint"] for name in PATHS]
    boxes = right.boxplot(values, showfliers=False, patch_artist=True, widths=0.6)
    for box, colour in zip(boxes["boxes"], _PATH_COLOURS.values(), strict=True):
        box.set(facecolor=colour, alpha=0.6)
    right.set_xticks(range(1, len(values) + 1), [name.replace(" ", "\n") for name in PATHS])
    right.tick_params(axis="x", labelsize=8)
    right.set_ylabel("midpoint barrier of the training loss")
    right.set_title(f"{len(values[0])} random pairs", fontsize=10)
    return figure


def _samples(networks: dict[str, Any]) -> Figure:
    """Accuracy and loss of every network, one row for each set."""
    figure, (left, right) = _figure(2, height=3.8, sharey=True)
    names = NETWORKS[::-1]
    for axes, key in ((left, "accuracy"), (right, "loss")):
        values = [networks[name][key] for name in names]
        boxes = axes.boxplot(values, **_BOXES)
        for box, name in zip(boxes["boxes"], names, strict=True):
            box.set(facecolor=COLOURS[name], alpha=0.6)
        axes.set_yticks(range(1, len(names) + 1), names)
        axes.set_xlabel(f"test {key}")
    left.set_title("Box: quartiles; whiskers: 5 to 95 %; diamond: mean", fontsize=9)
    return figure


def _novelty(networks: dict[str, Any]) -> Figure:
    """Draw how good networks are, and how far from the nearest one that flows were trained on."""
    figure, (axes,) = _figure(1, height=4.2)
    for name in NETWORKS[1:]:
        found = networks[name]
        dots = {"s": 16, "alpha": 0.55, "linewidths": 0, "color": COLOURS[name], "label": name}
        axes.scatter(found["nearest"], found["loss"], **dots)
    axes.set_xlabel("quotient distance to the nearest training network")
    axes.set_ylabel("test loss")
    axes.legend(frameon=False, fontsize=8, ncols=2)
    axes.set_title("Copies would be at the left, good networks at the bottom", fontsize=10)
    return figure


def _plane(networks: dict[str, Any]) -> Figure:
    """Aligned networks in the plane in which the training networks differ most."""
    figure, panels = _figure(4, height=2.9, sharex=True, sharey=True)
    for axes, name in zip(panels, PRESETS, strict=True):
        for other, size in ((TRAINING, 7), (HELD_OUT, 7), (name, 11)):
            points = networks[other]["plane"]
            x, y = ([p[k] for p in points] for k in (0, 1))
            axes.scatter(x, y, s=size, color=COLOURS[other], alpha=0.7, linewidths=0)
        axes.set_title(name, fontsize=10)
        axes.tick_params(labelsize=7)
    figure.supxlabel("first principal component", fontsize=8)
    figure.supylabel("second principal component", fontsize=8)
    return figure


def _training(networks: dict[str, Any]) -> Figure:
    figure, (axes,) = _figure(1)
    for name in PRESETS:
        history = networks[name]["history"]
        steps = [record["step"] for record in history]
        axes.plot(steps, [r["loss"] for r in history], color=COLOURS[name], alpha=0.35)
        axes.plot(
            steps, [r["validation"] for r in history], color=COLOURS[name], label=name, linewidth=2
        )
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend(frameon=False, fontsize=8)
    axes.set_title("Thick: on held-out runs; thin: on training runs", fontsize=10)
    return figure


def _steps(networks: dict[str, Any]) -> Figure:
    figure, panels = _figure(2)
    steps = sorted(map(int, networks["Geometric"]["by steps"]))
    for axes, key in zip(panels, ("accuracy", "loss"), strict=True):
        for name in PRESETS:
            values = [networks[name]["by steps"][str(n)][key] for n in steps]
            axes.plot(steps, values, color=COLOURS[name], marker="o", label=name)
        level = networks[HELD_OUT][key]
        axes.axhline(sum(level) / len(level), color=COLOURS[HELD_OUT], linestyle="--", linewidth=1)
        axes.set(xlabel="Euler steps", ylabel=f"mean test {key}", xscale="log")
        axes.set_xticks(steps, [str(n) for n in steps])
        axes.minorticks_off()
    panels[0].legend(frameon=False, fontsize=8)
    panels[1].set_title("Dashed: held-out trained networks", fontsize=10)
    return figure
