"""Tables and figures of the manuscript, from the stored results: no number is typed by hand."""

import json
import shutil
from pathlib import Path
from typing import Any

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


def _plain(text: str) -> str:
    return text.replace("_", r"\_").replace("%", r"\%").replace("&", r"\&")


def run() -> None:
    """Write everything that symflow.tex includes."""
    GENERATED.mkdir(exist_ok=True)
    study = json.loads((RESULTS / "demo" / "results.json").read_text())
    parts = {"networks": networks(study), "barriers": barriers(study), "benchmarks": benchmarks()}
    for name, text in parts.items():
        (GENERATED / f"{name}.tex").write_text(text)
    for picture in (RESULTS / "demo").glob("*.png"):
        shutil.copy(picture, GENERATED / picture.name)


if __name__ == "__main__":
    run()
