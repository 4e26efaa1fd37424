"""Write the figures of the README from the stored results: no number there is typed by hand."""

import sys
from typing import Any

import record
from run import BENCHMARKS

README = record.ROOT / "README.md"
BEGIN, END = "<!-- results: benchmarks/readme.py -->", "<!-- end of results -->"


def block() -> str:
    """Return the table of all benchmarks as Markdown, with the machines they ran on."""
    lines = ["| measured | median | wanted | stored in |", "|---|---|---|---|"]
    places = []
    for name in BENCHMARKS:
        report = record.load(name)
        machine = report["machine"]
        places.append(f"{name}: {machine['cpu']}, torch {machine['torch']}")
        for row in report["rows"]:
            if not row.get("in_readme", True):
                continue
            stored = f"`benchmarks/results/{name}.json`"
            lines.append(" | ".join(["", *_cells(row), stored, ""]).strip())
    return "\n".join([*lines, "", f"Two shared cores; {'; '.join(places)}.", "", *gpu()])


def gpu() -> list[str]:
    """Return the table of what a GPU does, in lines."""
    report = record.load("accelerator")
    lines = [
        f"On a GPU ({report['rows'][0]['device']}, torch {report['machine']['torch']}; "
        "`benchmarks/results/accelerator.json`):",
        "",
        "| measured | median | wanted |",
        "|---|---|---|",
    ]
    return [*lines, *(" | ".join(["", *_cells(row), ""]).strip() for row in report["rows"])]


def _cells(row: dict[str, Any]) -> tuple[str, str, str]:
    """Return what was measured, its median, and what was wanted."""
    figure = row["figure"].replace("_", " ").removesuffix("value").strip()
    median = f"{row[row['figure']]['median']:.3g} {figure}".strip()
    missed = "" if row["met"] else " **(missed)**"
    wanted = row["wanted"].removeprefix(row["figure"].replace("_", " ")).strip()
    return row["what"], f"{median}{missed}", wanted


def written(text: str) -> str:
    """Return the README with the block in its place."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{block()}\n{END}{after}"


if __name__ == "__main__":
    text = README.read_text()
    if BEGIN not in text or END not in text:
        sys.exit(f"{README} lacks the markers {BEGIN} and {END}")
    README.write_text(written(text))
