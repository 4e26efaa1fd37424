"""Tables and figures of the manuscript, from the stored results: no number is typed by hand."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from ledger import BUILD
from ledger import RESULTS as STORED

from symflow.report.measure import mean, median, standard_error
from symflow.report.study import HELD_OUT, NETWORKS, PATHS

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
GENERATED = Path(__file__).parent / "generated"


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Return a LaTeX table; the first column is text, the others numbers."""
    lines = [rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}", r"\toprule"]
    lines += [" & ".join(heads) + r" \\", r"\midrule"]
    lines += [" & ".join(row) + r" \\" for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def plus_minus(values: list[float], digits: int) -> str:
    """Mean and standard error."""
    return rf"${mean(values):.{digits}f} \pm {standard_error(values):.{digits}f}$"


def networks(study: dict[str, Any]) -> str:
    """Compare trained, generated and baseline networks."""
    reference = median(study["networks"][HELD_OUT]["nearest"])
    rows = []
    for name in NETWORKS:
        found = study["networks"][name]
        rows.append(
            [
                name,
                plus_minus(found["accuracy"], 4),
                plus_minus(found["loss"], 3),
                f"{found['averaged accuracy']:.4f}",
                f"{found['diversity']:.4f}",
                f"{median(found['nearest']) / reference:.2f}",
            ]
        )
    return table(["networks", "accuracy", "loss", "averaged", "diversity", "nearest"], rows)


def barriers(study: dict[str, Any]) -> str:
    """Compare midpoint barriers of paths."""
    rows = []
    for name in PATHS:
        found = study["barriers"][name]
        rows.append([name, *(plus_minus(found[f"{x} midpoint"], 4) for x in ("train", "test"))])
    return table(["path", "training loss", "test loss"], rows)


def benchmarks() -> str:
    """List every line that the benchmarks have to meet."""
    rows = []
    for file in sorted(RESULTS.glob("*.json")):
        for row in json.loads(file.read_text())["rows"]:
            if not row.get("in_readme", True):
                continue
            rows.append([_plain(row["what"]), _plain(row["wanted"]), "yes" if row["met"] else "no"])
    return table(["what", "wanted", "met"], rows).replace("{lrr}", "{p{8cm}p{4.5cm}l}")


# What the source thesis reports (accuracy, loss of samples), beside ours.
THESIS = {
    "uci": {
        "Euclidean, plain": (0.998, 0.101),
        "Euclidean, aligned": (0.998, 0.070),
        "Euclidean, aligned + OT": (0.993, 0.053),
        "Normalized, plain": (0.993, 0.027),
        "Normalized, aligned": (0.989, 0.030),
        "Normalized, aligned + OT": (0.988, 0.044),
        "Geometric, plain": (0.992, 0.019),
        "Geometric, aligned": (0.993, 0.018),
        "Geometric, aligned + OT": (0.991, 0.020),
        "trained, held out": (0.992, 0.048),
    },
    "mnist": {
        "Euclidean, independent": (0.737, 0.814),
        "Normalized, independent": (0.753, 1.537),
        "Geometric, independent": (0.737, 1.457),
        "trained, held out": (0.933, 0.231),
    },
    "mnist-large": {},
    "deepweight": {},
    "digits": {},
    "digits-limit": {},
}


QUALITY = ("accuracy", "loss", "averaged", "diversity", "calibration", "calibration_averaged")


def over_seeds(stored: dict[str, Any]) -> dict[str, Any]:
    """Put the rows of one flow with several seeds together: means, and their standard errors."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, found in stored.items():
        groups.setdefault(name.partition(", seed ")[0], []).append(found)
    together = {}
    for name, group in groups.items():
        if len(group) == 1:
            together[name] = group[0]
            continue
        one = dict(group[0])  # seconds, too: others may have run on other machines
        for key in (*QUALITY, "nearest", "overlap"):
            one[key] = mean([found[key] for found in group])
        for key in ("accuracy", "loss"):
            one[f"{key}_error"] = standard_error([found[key] for found in group])
        together[f"{name} ({len(group)} seeds)"] = one
    return together


def flows(experiment: str, *, fast: bool) -> str:
    """List every row of an experiment on a zoo: quality, averages, copies, cost."""
    stored = ledger(experiment, fast=fast)
    reference = stored["trained, held out"]["nearest"] if stored else 1.0
    rows = []
    for name, found in over_seeds(stored).items():
        theirs = THESIS[experiment].get(name.partition(" (")[0])
        rows.append(
            [
                _plain(name),
                rf"${found['accuracy']:.4f} \pm {found['accuracy_error']:.4f}$",
                rf"${found['loss']:.4f} \pm {found['loss_error']:.4f}$",
                f"{found['averaged']:.4f}",
                f"{found['diversity']:.4f}",
                f"{found['calibration']:.3f} / {found['calibration_averaged']:.3f}",
                f"{found['nearest'] / reference:.2f}",
                f"{found['overlap']:.2f}",
                f"{found['seconds'] / 60:.1f}" if "seconds" in found else "",
                f"{found['parameters'] / 1000:.0f}k" if "parameters" in found else "",
                f"{theirs[0]:.3f} / {theirs[1]:.3f}" if theirs else "",
            ]
        )
    heads = ["networks", "accuracy", "loss", "averaged", "diversity", "calibration"]
    heads += ["nearest", "overlap"]
    return table([*heads, "minutes", "parameters", "thesis"], rows)


def transfer(*, fast: bool) -> str:
    """List what the flows are good for elsewhere."""
    rows = [
        [
            _plain(name),
            rf"${found['accuracy']:.4f} \pm {found['accuracy_error']:.4f}$",
            f"{found['loss']:.3f}",
            str(found.get("gradient_evaluations", "")),
        ]
        for name, found in ledger("transfer", fast=fast).items()
    ]
    return table(["networks", "accuracy", "loss", "gradients"], rows)


def initial(*, fast: bool) -> str:
    """List how soon other initial weights reach the losses of training from scratch."""
    rows, heads = [], [""]
    for name, found in ledger("transfer", fast=fast).items():
        if "epochs" not in found:
            continue
        looks = {f"{n} epochs": one for n, one in found["epochs"].items()} | {"least": found}
        rows.append(
            [
                _plain(name.removeprefix("Fashion, from ").replace(", to that loss", "")),
                *(f"{x['gradient_evaluations']} of {x['from_scratch']}" for x in looks.values()),
            ]
        )
        heads = ["initial weights", *looks]
    return table(heads, rows)


def toy(*, fast: bool) -> str:
    """List the spreads of the Gaussian toy, relative to those of the target's law."""
    keys = ("mean", "spread_of_means", "spread_of_coordinates")
    rows = [
        [_plain(name), *(f"{found[key]:.3f}" for key in keys)]
        for name, found in ledger("toy", fast=fast).items()
    ]
    return table(["samples", *(key.replace("_", " ") for key in keys)], rows)


def ledger(experiment: str, *, fast: bool) -> dict[str, Any]:
    """Return the figures of every stored row by its name."""
    file = BUILD / f"{experiment}-fast.json" if fast else STORED / f"{experiment}.json"
    if not file.exists():
        return {}
    rows = json.loads(file.read_text())["rows"]
    return {name: row["figures"] for name, row in rows.items()}


def sizes(*, fast: bool) -> None:
    """Draw how quality grows with the number of training runs."""
    from matplotlib.figure import Figure

    stored = ledger("mnist", fast=fast)
    found = sorted(
        (row["runs"], row["accuracy"], row["averaged"])
        for name, row in stored.items()
        if name.endswith(" runs") or name == "Geometric, run, behaviour"
    )
    if not found:
        return
    runs, accuracy, averaged = zip(*found, strict=True)
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.semilogx(runs, accuracy, "o-", label="single samples")
    axes.semilogx(runs, averaged, "s-", label="average of 64")
    for key, style in (("accuracy", ":"), ("averaged", "--")):
        axes.axhline(stored["trained, held out"][key], color="grey", linestyle=style)
    axes.set(xlabel="training runs", ylabel="test accuracy (trained: grey)")
    axes.legend()
    figure.savefig(GENERATED / "runs.png", dpi=200)


def steps(*, fast: bool) -> None:
    """Draw how far samples are from where held-out runs ended, against the steps of sampling."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, experiment in zip(figure.subplots(1, 2), ("uci", "mnist-large"), strict=True):
        for name, found in ledger(experiment, fast=fast).items():
            told = {int(k): one.get("divergence") for k, one in found.get("by_steps", {}).items()}
            if None not in told.values() and told and not name.endswith(" steps"):
                at, values = zip(*told.items(), strict=True)
                axes.semilogx(at, values, "o-", label=name, base=2)
        axes.set(xlabel="steps", ylabel="divergence from own ends (nats)", title=experiment)
        if axes.lines:
            axes.legend(fontsize="x-small")
    figure.savefig(GENERATED / "own_ends.png", dpi=200)


def _plain(text: str) -> str:
    return text.replace("_", r"\_").replace("%", r"\%").replace("&", r"\&")


def run(*, fast: bool = False) -> None:
    """Write everything that symflow.tex includes."""
    GENERATED.mkdir(exist_ok=True)
    study = json.loads((RESULTS / "demo" / "results.json").read_text())
    parts = {"networks": networks(study), "barriers": barriers(study), "benchmarks": benchmarks()}
    parts |= {experiment: flows(experiment, fast=fast) for experiment in THESIS}
    parts |= {"transfer": transfer(fast=fast), "initial": initial(fast=fast)}
    parts |= {"toy": toy(fast=fast)}
    sizes(fast=fast)
    steps(fast=fast)
    for name, text in parts.items():
        (GENERATED / f"{name}.tex").write_text(text)
    for picture in (RESULTS / "demo").glob("*.png"):
        shutil.copy(picture, GENERATED / picture.name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="from results at reduced size")
    run(fast=parser.parse_args().fast)
