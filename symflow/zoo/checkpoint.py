"""An interrupted training in a folder: a state file, replaced in one step, and snapshot files.

The state file names the snapshot files that belong to it and is written after them: whatever is
killed when, the folder holds a state that is complete, the last one or the one before.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from symflow.errors import FileFormatError
from symflow.files import load_tensors, save_tensors
from symflow.zoo.store import CHECKPOINT

FORMAT = "symflow zoo checkpoint 1"
_SNAPSHOTS = "snapshots"


def write(
    folder: Path,
    epoch: int,
    tensors: dict[str, Tensor],
    meta: dict[str, Any],
    snapshots: Tensor | None,
) -> dict[str, Any]:
    """Write the state after an epoch, and the snapshots taken since the last state.

    Parameters
    ----------
    folder
        Where to.
    epoch
        Epochs done.
    tensors, meta
        The state; ``meta`` as the last call or :func:`read` returned it, updated.
    snapshots
        New ones (R, S, D), or None.

    Returns
    -------
    dict
        ``meta`` as written, for the next call.
    """
    files = list(meta.get("files", []))
    if snapshots is not None and snapshots.shape[1]:
        files.append(f"{_SNAPSHOTS}-{epoch:06d}.safetensors")
        save_tensors(folder / files[-1], {_SNAPSHOTS: snapshots})
    meta = meta | {"format": FORMAT, "epoch": epoch, "files": files}
    save_tensors(folder / CHECKPOINT, tensors, meta)
    return meta


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], list[Tensor]] | None:
    """Read the state and the list of its snapshots (R, S, D); None if there is no state.

    Raises
    ------
    FileFormatError
        If a file is truncated, foreign or missing.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        return None
    tensors, meta = load_tensors(path)
    if meta.get("format") != FORMAT:
        raise FileFormatError(
            f"{path}: wanted the format {FORMAT!r}, got {meta.get('format')!r}; choose another "
            "folder, or delete the file to begin again"
        )
    snapshots: list[Tensor] = []
    for name in meta["files"]:
        if not (folder / name).is_file():
            raise FileFormatError(f"{path} belongs with {name}, which is missing: copy it too")
        snapshots.append(load_tensors(folder / name)[0][_SNAPSHOTS])
    return tensors, meta, snapshots


def clear(folder: Path) -> None:
    """Delete the state and its snapshots, and what a killed process has left half written."""
    (folder / CHECKPOINT).unlink(missing_ok=True)
    for pattern in (f"{_SNAPSHOTS}-*.safetensors", ".*.safetensors.*.part", ".*.json.*.part"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def pack_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the tensors of an optimiser's state by the names of :func:`unpack_optimizer`."""
    return {
        f"optimizer.{k}.{name}": value
        for k, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put the tensors of :func:`pack_optimizer` back into an optimiser like the one they are of."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, rest = key.partition(".")
        if kind == "optimizer":
            k, _, name = rest.partition(".")
            state.setdefault(int(k), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
