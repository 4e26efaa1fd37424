"""A zoo, and its folder: one safetensors file that is complete in itself, and JSON for people."""

import importlib.metadata
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.arch import Architecture, from_config
from symflow.errors import DataNotFoundError, FileFormatError, ShapeError
from symflow.files import load_tensors, save_json, save_tensors

FORMAT = "symflow zoo 1"
WEIGHTS = "weights.safetensors"
META = "meta.json"
CHECKPOINT = "checkpoint.safetensors"
_METRIC = "metrics."


@final
@dataclass(frozen=True, eq=False, repr=False)
class Zoo:
    """Networks of one architecture, each trained by itself from its own initial weights.

    :func:`symflow.zoo.train` makes one, :meth:`load` reads one. Every tensor has the runs in front.

    Attributes
    ----------
    arch
        The architecture.
    initial
        Initial weights (R, D).
    final
        Weights after the last step (R, D). A run that diverged holds NaN or infinity here, as
        ``metrics["diverged"]`` says; :meth:`finite` leaves it out.
    snapshots
        Weights along the trajectories (R, S, D), or None if none were asked for.
    metrics
        ``train_loss``, ``train_accuracy``, ``test_loss``, ``test_accuracy`` of the final weights
        in evaluation mode, ``diverged``, each (R,); and ``history`` (R, epochs), the mean loss of
        the mini-batches of each epoch. Of a diverged run all but ``diverged`` is NaN.
    seeds
        For each run the seed of the generator from which its initial weights were drawn.
    settings
        What the runs were trained on and how; JSON-able.
    provenance
        Versions of symflow and torch, and seconds of training.

    Raises
    ------
    ShapeError
        If the tensors do not fit together or to the architecture.

    Examples
    --------
    >>> import symflow
    >>> w = torch.zeros(5, 26)
    >>> zoo = Zoo(symflow.mlp([3, 4, 2]), w, w, seeds=range(5))
    >>> len(zoo), zoo.select([0, 3]).seeds
    (5, (0, 3))
    """

    arch: Architecture
    initial: Tensor
    final: Tensor
    snapshots: Tensor | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)
    seeds: Sequence[int] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        runs, dimension = len(self.final), self.arch.dimension
        wanted = {"initial": (runs, dimension), "final": (runs, dimension)}
        for name, shape in wanted.items():
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise ShapeError(f"{name} must have shape (R, D) = {shape}, got {found}")
        s = self.snapshots
        if s is not None and (s.ndim != 3 or (len(s), s.shape[-1]) != (runs, dimension)):
            raise ShapeError(
                f"snapshots must have shape ({runs}, S, {dimension}), got {tuple(s.shape)}"
            )
        counts = {"seeds": len(self.seeds)} | {k: len(v) for k, v in self.metrics.items()}
        for name, count in counts.items():
            if count != runs and (name, count) != ("seeds", 0):
                raise ShapeError(f"{name} must have one entry for each of {runs} runs, got {count}")
        object.__setattr__(self, "seeds", tuple(self.seeds))

    @property
    def weights(self) -> Float[Tensor, "R D"]:
        """The final weights."""
        return self.final

    def __len__(self) -> int:
        return len(self.final)

    def __repr__(self) -> str:
        count = 0 if self.snapshots is None else self.snapshots.shape[1]
        text = f"Zoo({len(self)} runs of {self.arch!r}, {count} snapshots each"
        if "test_accuracy" in self.metrics:
            text += f", test accuracy {float(self.metrics['test_accuracy'].nanmean()):.4f}"
        return text + ")"

    def select(self, runs: "Sequence[int] | slice | Tensor") -> "Zoo":
        """Return some of the runs: to hold some out, or to leave some out.

        Parameters
        ----------
        runs
            Indices, a slice, or a boolean mask (R,), as a tensor or a sequence.

        Raises
        ------
        ShapeError
            If an index is out of range, or a mask has not one entry for each run.

        Examples
        --------
        >>> import symflow
        >>> zoo = Zoo(symflow.mlp([3, 4, 2]), torch.zeros(5, 26), torch.zeros(5, 26))
        >>> len(zoo.select(slice(3))), len(zoo.select(torch.arange(5) > 2))
        (3, 2)
        """
        index = torch.arange(len(self))
        index = index[runs] if isinstance(runs, slice) else index[self._rows(runs)]
        here = index.to(self.final.device)
        return replace(
            self,
            initial=self.initial[here],
            final=self.final[here],
            snapshots=None if self.snapshots is None else self.snapshots[here],
            metrics={name: value[here] for name, value in self.metrics.items()},
            seeds=[self.seeds[k] for k in index.tolist()] if self.seeds else (),
        )

    def _rows(self, runs: "Sequence[int] | Tensor") -> Tensor:
        """Check indices or a mask."""
        try:
            rows = torch.as_tensor(runs).detach().cpu()
            came = f"{rows.dtype} of shape {tuple(rows.shape)}"
        except (TypeError, ValueError, RuntimeError):
            rows, came = torch.zeros(()), f"a {type(runs).__name__}"
        if not isinstance(runs, Tensor) and rows.shape == (0,):
            rows = rows.long()  # an empty list has no type
        if rows.ndim != 1 or rows.is_floating_point() or rows.is_complex():
            raise ShapeError(
                "runs must be indices (n,), a slice, or a boolean mask with one entry for each of "
                f"{len(self)} runs, got {came}"
            )
        if rows.dtype == torch.bool:
            if len(rows) != len(self):
                raise ShapeError(
                    f"runs, a boolean mask, must have one entry for each of {len(self)} runs, got "
                    f"{len(rows)}"
                )
            return rows
        rows = rows.long()
        if rows.numel() and not -len(self) <= int(rows.min()) <= int(rows.max()) < len(self):
            raise ShapeError(
                f"runs must be indices from {-len(self)} to {len(self) - 1} for {len(self)} runs, "
                f"got some from {int(rows.min())} to {int(rows.max())}"
            )
        return rows

    def finite(self) -> "Zoo":
        """Return the runs all of whose weights are finite: those that did not diverge.

        Examples
        --------
        >>> import symflow
        >>> w = torch.zeros(2, 26)
        >>> final = torch.stack([w[0], w[1] / 0])
        >>> len(Zoo(symflow.mlp([3, 4, 2]), w, final).finite())
        1
        """
        return self.select(self.final.isfinite().all(-1).cpu())

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the zoo to a folder; whoever reads sees this zoo or the one before, never a half.

        ``weights.safetensors`` holds everything; ``meta.json`` repeats, for people and other
        tools, all but the weights.

        Examples
        --------
        >>> import symflow, tempfile
        >>> folder, w = tempfile.mkdtemp(), torch.zeros(2, 26)
        >>> Zoo(symflow.mlp([3, 4, 2]), w, w).save(folder)
        >>> len(Zoo.load(folder))
        2
        """
        tensors = {"initial": self.initial, "final": self.final}
        tensors |= {} if self.snapshots is None else {"snapshots": self.snapshots}
        tensors |= {_METRIC + name: value for name, value in self.metrics.items()}
        meta = {
            "format": FORMAT,
            "arch": {"config": self.arch.config, "fingerprint": self.arch.fingerprint},
            "seeds": list(self.seeds),
            "settings": self.settings,
            "provenance": versions() | self.provenance,
        }
        save_tensors(Path(folder) / WEIGHTS, tensors, meta)
        metrics = {k: _readable(v) for k, v in self.metrics.items() if v.ndim == 1}
        save_json(Path(folder) / META, meta | {"runs": len(self), "metrics": metrics})

    @staticmethod
    def load(folder: str | os.PathLike[str], arch: Architecture | None = None) -> "Zoo":
        """Read a zoo from its folder.

        Parameters
        ----------
        folder
            Where :meth:`save` or :func:`symflow.zoo.train` wrote it.
        arch
            The architecture; needed where it was traced from a module. By default it is built
            from its description.

        Raises
        ------
        DataNotFoundError
            If there is no zoo, or one that is not finished.
        FileFormatError
            If a file is truncated or foreign, or the zoo is one of another architecture.
        """
        path = Path(folder) / WEIGHTS
        if not path.is_file():
            unfinished = (Path(folder) / CHECKPOINT).is_file()
            raise DataNotFoundError(
                f"{folder} holds a zoo whose training was interrupted: call symflow.zoo.train with "
                "the same settings and this folder to finish it"
                if unfinished
                else f"{folder} holds no zoo: there is no {WEIGHTS}; symflow.zoo.train(..., "
                "folder=...) or zoo.save(folder) writes one"
            )
        tensors, meta = load_tensors(path)
        if meta.get("format") != FORMAT:
            raise FileFormatError(
                f"{path}: wanted the format {FORMAT!r}, got {meta.get('format')!r}; another "
                "program or another version of symflow wrote it"
            )
        arch = _architecture(path, meta["arch"], arch)
        metrics = {
            name.removeprefix(_METRIC): value
            for name, value in tensors.items()
            if name.startswith(_METRIC)
        }
        try:
            initial, final = tensors["initial"], tensors["final"]
            more = {key: meta[key] for key in ("seeds", "settings", "provenance")}
            return Zoo(arch, initial, final, tensors.get("snapshots"), metrics, **more)
        except (KeyError, ShapeError) as error:
            raise FileFormatError(f"{path} is no complete zoo: {error}") from error


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    try:
        own = importlib.metadata.version("symflow")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
        own = "not installed"
    return {"symflow": own, "torch": torch.__version__}


def _architecture(path: Path, stored: dict[str, Any], arch: Architecture | None) -> Architecture:
    if arch is None:
        if stored["config"] is None:
            raise FileFormatError(
                f"{path} holds networks of a module that was traced: give the architecture, as in "
                "Zoo.load(folder, arch=Architecture.from_module(net, example))"
            )
        arch = from_config(stored["config"])
    if arch.fingerprint != stored["fingerprint"]:
        raise FileFormatError(
            f"{path} holds networks of the architecture {stored['fingerprint']} "
            f"({stored['config'] or 'traced from a module'}), but this one is {arch.fingerprint} "
            f"({arch!r})"
        )
    return arch


def _readable(values: Tensor) -> list[Any]:
    """Numbers for JSON, which knows neither NaN nor infinity: they become null."""
    finite = values.isfinite().tolist()
    return [v if ok else None for v, ok in zip(values.tolist(), finite, strict=True)]
