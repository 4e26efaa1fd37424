"""Results that are added row by row, so that an experiment stopped anywhere goes on from there."""

import fcntl
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch

HERE = Path(__file__).parent
RESULTS = HERE / "results"
BUILD = HERE / "build"  # zoos and checkpoints: large, and made again where they are missing


@final
@dataclass(frozen=True)
class Row:
    """What a row of a table is made from; its results are kept as long as none of it changes.

    Attributes
    ----------
    name
        What the table calls it.
    settings
        Everything that its figures depend on, JSON-able.
    """

    name: str
    settings: dict[str, Any]


@final
class Ledger:
    """The stored rows of one experiment.

    Parameters
    ----------
    experiment
        Its name; the file is ``results/<experiment>.json``, or ``-fast.json`` at reduced size.
    fast
        Whether sizes are reduced: such results are never shown.
    only
        Rows whose names do not hold this are passed over.
    devices
        Where flows, and the zoo, are trained; their names are stored with each row.
    """

    def __init__(
        self, experiment: str, fast: bool, only: str = "", devices: tuple[str, str] = ("cpu", "cpu")
    ) -> None:
        self.only = only
        self.devices = devices
        self.experiment = experiment + ("-fast" if fast else "")
        self.folder = BUILD / self.experiment
        self.file = (BUILD if fast else RESULTS) / f"{self.experiment}.json"
        self.rows = self._stored()
        # Now, when the code is read: a row may take an hour, and others commit meanwhile.
        self.code = {
            "commit": _git("rev-parse", "HEAD"),
            "changed": bool(_git("status", "--porcelain", "--", "symflow", "paper/*.py")),
        }

    def row(self, row: Row, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a row's figures: those stored for the same settings, or the work's."""
        if self.only not in row.name:
            return {}
        plain = json.loads(json.dumps(asdict(row)))
        stored = self.rows.get(row.name)
        if stored is not None and stored["settings"] == plain["settings"]:
            return stored["figures"]
        print(f"{self.experiment}: {row.name}", flush=True)
        figures = work()
        found = {
            "settings": plain["settings"],
            "figures": figures,
            **self.code,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": _name(self.devices[0]),
            "zoo_device": _name(self.devices[1]),
        }
        with self._alone():  # other processes add rows, too
            self.rows = self._stored() | {row.name: found}
            self._write()
        print(f"{self.experiment}: {row.name}: {json.dumps(_short(figures))}", flush=True)
        return figures

    @contextmanager
    def _alone(self) -> Generator[None]:
        """Keep other processes from writing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _stored(self) -> dict[str, Any]:
        return json.loads(self.file.read_text())["rows"] if self.file.exists() else {}

    def _write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"experiment": self.experiment, "rows": self.rows}, indent=1)
        handle, name = tempfile.mkstemp(dir=self.file.parent, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            file.write(text + "\n")
        Path(name).replace(self.file)


def _short(figures: dict[str, Any]) -> dict[str, Any]:
    return {
        k: round(v, 4) if isinstance(v, float) else v
        for k, v in figures.items()
        if isinstance(v, int | float | str)
    }


def _name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def _git(*arguments: str) -> str:
    found = subprocess.run(["git", *arguments], cwd=HERE.parent, capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else ""
