"""``symflow demo``: the study, its pictures and its page."""

import os
from pathlib import Path
from typing import Any

from tqdm import tqdm

from symflow.files import save_json, write_atomic
from symflow.report.figures import draw
from symflow.report.measure import mean, median
from symflow.report.page import page
from symflow.report.study import NETWORKS, StudySettings, study


def demo(
    out: str | os.PathLike[str] = "report.html",
    *,
    folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
    fast: bool = False,
    progress: bool = True,
) -> Path:
    """Train a zoo on breast cancer, align it, train four flows on it, and write a report.

    Parameters
    ----------
    out
        The page to write; it holds its pictures and needs no other file.
    folder
        Where zoo, flows, ``results.json`` and the pictures are stored, so that an interrupted demo
        goes on where it was; by default a folder beside the page, named after it.
    seed
        Of everything random.
    fast
        A miniature that ends within seconds: for trying whether everything works.
    progress
        Whether to say what is being done.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    FileFormatError
        If ``folder`` holds the results of other settings, or a damaged file.

    Examples
    --------
    >>> demo("report.html", fast=True)                                       # doctest: +SKIP
    PosixPath('report.html')
    """
    page_file = Path(out)
    settings = StudySettings.small(seed) if fast else StudySettings(seed=seed)
    stem = page_file.with_name(f"{page_file.stem}-data") if folder is None else Path(folder)
    place = stem / f"{'fast-' if fast else ''}seed-{seed}"

    def say(text: str) -> None:
        if progress:
            tqdm.write(text)

    results = study(settings, folder=place, progress=progress, say=say)
    save_json(place / "results.json", results)
    pictures = draw(results)
    for name, data in pictures.items():
        write_atomic(place / f"{name}.png", data)
    write_atomic(page_file, page(results, pictures).encode())
    say(summary(results))
    say(f"report: {page_file}\nresults and pictures: {place}")
    return page_file


def summary(results: dict[str, Any]) -> str:
    """Return the main figures as lines of text.

    Examples
    --------
    >>> found = {"accuracy": [0.9], "loss": [0.3], "nearest": [2.0]}
    >>> print(summary({"networks": {"held out": found}, "checks": []}))
    networks              accuracy    loss  nearest
    held out                0.9000  0.3000    2.000
    """
    lines = [f"{'networks':<20}{'accuracy':>10}{'loss':>8}{'nearest':>9}"]
    lines += [
        f"{name:<20}{mean(x['accuracy']):>10.4f}{mean(x['loss']):>8.4f}{median(x['nearest']):>9.3f}"
        for name, x in sorted(results["networks"].items(), key=lambda x: NETWORKS.index(x[0]))
    ]
    for c in results["checks"]:
        limit = f"{c['side']} {c['limit']:.3g}"
        lines.append(f"{'met   ' if c['met'] else 'MISSED'}  {c['what']}: {c['got']:.3g} ({limit})")
    return "\n".join(lines)
