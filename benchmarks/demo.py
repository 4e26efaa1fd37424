"""The study of ``symflow demo`` at full size, from several seeds. Writes demo.json and demo/."""

import tempfile
from pathlib import Path
from typing import Any

import record

from symflow.files import save_json, write_atomic
from symflow.report import StudySettings, draw, study

SEEDS = (0, 1, 2)


def run() -> dict[str, Any]:
    """Measure and store everything; the pictures are those of the first seed."""
    found = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            settings = StudySettings(seed=seed)
            found.append(study(settings, folder=Path(folder), progress=True, say=print))
    place = record.RESULTS / "demo"
    save_json(place / "results.json", found[0])
    for name, picture in draw(found[0]).items():
        write_atomic(place / f"{name}.png", picture)
    rows = []
    for checks in zip(*(f["checks"] for f in found), strict=True):
        bound = {checks[0]["side"].replace(" ", "_"): checks[0]["limit"]}
        rows.append(record.judged(checks[0]["what"], "value", [c["got"] for c in checks], **bound))
    seconds = [sum(f["seconds"].values()) for f in found]
    rows.append(record.judged("the study, all of it", "seconds", seconds, at_most=360))
    print(record.record("demo", rows, SEEDS[0]))
    print(record.table(record.load("demo")))
    return {"rows": rows}


if __name__ == "__main__":
    run()
