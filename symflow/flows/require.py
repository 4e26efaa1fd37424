"""Checks of what a user passes: numbers, a field, and the networks that a flow learns from."""

import hashlib
import json
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from symflow.arch import Architecture, InputCoordinates
from symflow.errors import EquivarianceError, LeafError, ShapeError
from symflow.nn import VectorField


def whole(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """Return a whole number as an int.

    Raises
    ------
    ShapeError
        If it is none (a bool is none), or out of range.

    Examples
    --------
    >>> whole("steps", 3, least=1)
    3
    """
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    if found is None:
        raise ShapeError(f"{name} must be a whole number, got {_shown(value)}")
    if least is not None and found < least:
        raise ShapeError(f"{name} must be at least {least}, got {found}")
    if most is not None and found > most:
        raise ShapeError(f"{name} must be at most {most}, got {found}")
    return found


def number(name: str, value: Any, least: float = 0.0, below: float = math.inf) -> float:
    """Return a number as a float.

    Raises
    ------
    ShapeError
        If it is none (NaN is none), less than ``least``, or not below ``below``.

    Examples
    --------
    >>> number("lr", 1)
    1.0
    """
    try:
        found = math.nan if isinstance(value, bool | str | bytes) else float(value)
    except (TypeError, ValueError, RuntimeError):
        found = math.nan
    if not least <= found < below:
        bound = "" if below == math.inf else f" and below {below:g}"
        raise ShapeError(
            f"{name} must be a finite number of at least {least:g}{bound}, got {_shown(value)}"
        )
    return found


def networks(arch: Architecture, zoo: Any, name: str) -> tuple[Tensor | None, Tensor]:
    """Return recorded initial weights (R, D), if there are any, and trained weights (R, D).

    Raises
    ------
    ShapeError
        If it is neither a zoo nor weights, not a batch of networks, or empty.
    LeafError
        If weights are NaN or infinite.
    """
    plain = isinstance(zoo, Tensor | nn.Module | Mapping | Sequence)
    if plain and not isinstance(zoo, str | bytes):
        if isinstance(zoo, Sequence) and len(zoo) == 0:
            raise ShapeError(f"{name} is an empty sequence: at least one network is needed")
        return None, _rows(arch.as_weights(zoo, name=name), name)
    if plain or not hasattr(zoo, "initial") or not hasattr(zoo, "final"):
        raise ShapeError(
            f"{name} must be a zoo (of symflow.zoo.train or Zoo.load), flat weights (R, "
            f"D = {arch.dimension}), or a sequence of modules or state dicts; got {_shown(zoo)}"
        )
    if isinstance(zoo.final, Tensor):
        bad = int((~zoo.final.isfinite()).flatten(1).any(-1).sum()) if zoo.final.ndim > 1 else 0
        if bad:
            raise LeafError(
                f"{name}.final: {bad} of {len(zoo.final)} networks hold NaN or infinite weights, "
                f"their training diverged: leave them out, pass {name}.finite()"
            )
    final = _rows(arch.as_weights(zoo.final, name=f"{name}.final"), f"{name}.final")
    initial = arch.as_weights(zoo.initial, name=f"{name}.initial").detach()
    if final.shape != initial.shape:
        raise ShapeError(
            f"{name}.initial {tuple(initial.shape)} and {name}.final {tuple(final.shape)} must "
            "have one row for each run"
        )
    return initial, final


def coordinates_for(arch: Architecture, coordinates: Any) -> InputCoordinates | None:
    """Check that coordinates belong to an architecture.

    Raises
    ------
    ShapeError
        If they are none, or of another architecture.
    """
    if coordinates is None:
        return None
    if not isinstance(coordinates, InputCoordinates):
        raise ShapeError(
            f"coordinates must be InputCoordinates, got {_shown(coordinates)}: make them by "
            "InputCoordinates.of_inputs(arch, task.x_train, rank=...)"
        )
    if coordinates.outer.fingerprint != arch.fingerprint:
        raise ShapeError(
            f"the coordinates were made for {coordinates.outer!r}, the flow is for {arch!r}"
        )
    return coordinates


def field_for(arch: Architecture, field: Any, extra: int) -> VectorField:
    """Check that a field moves the states of a flow and respects their symmetry.

    Raises
    ------
    ShapeError
        If it is no field, or one for another architecture or other extra coordinates.
    EquivarianceError
        If it respects less symmetry than the architecture has, and does not say so.
    """
    if not isinstance(field, VectorField):
        raise ShapeError(
            f"field must be a symflow.nn.VectorField, got {_shown(field)}: derive from it"
        )
    if field.extra != extra:
        raise ShapeError(
            f"the field must have extra={extra} (removed scales of the section), got {field.extra}"
        )
    if field.arch.fingerprint != arch.fingerprint:
        same = field.arch.leaves == arch.leaves
        kind, what = (
            (EquivarianceError, "the same leaves but another symmetry")
            if same
            else (ShapeError, "other leaves or axes")
        )
        raise kind(
            f"the field was made for {field.arch!r}, the flow is for {arch!r}: they have {what}. "
            f"Make the field of the flow's architecture, as in {type(field).__name__}(arch)"
        )
    if field.groups != "permutation":
        field.require_equivariance(arch.symmetry)
    return field


def structure(field: VectorField) -> str:
    """Hash what a field is beside its weights: its modules and their options.

    Fields may have weights of the same shapes and compute different things, as with another number
    of attention heads.

    Examples
    --------
    >>> import symflow
    >>> arch = symflow.mlp([2, 3, 2])
    >>> one, two = (symflow.nn.RelationalTransformer(arch, width=8, heads=n) for n in (1, 2))
    >>> structure(one) == structure(two)
    False
    """
    rows: list[Any] = []
    for path, module in field.named_modules():
        # PyTorch's own modules say what counts; their attributes change from version to version.
        if type(module).__module__.startswith("torch."):
            options: Any = module.extra_repr()
        else:
            options = {
                name: value
                for name, value in sorted(vars(module).items())
                if isinstance(value, bool | int | float | str) and name != "training"
            }
        rows.append([path, type(module).__name__, options])
    rows += [[key, list(value.shape)] for key, value in field.state_dict().items()]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def _rows(w: Tensor, name: str) -> Tensor:
    if w.ndim == 1:
        raise ShapeError(
            f"{name} must be a batch of networks (R, D), got one network of shape "
            f"{tuple(w.shape)}: a flow is trained on many; pass {name}[None] if one is meant"
        )
    if w.ndim > 2:
        raise ShapeError(
            f"{name} must be a batch of networks (R, D), got shape {tuple(w.shape)}: of snapshots "
            f"pass the last, {name}[:, -1], or all, {name}.flatten(0, -2)"
        )
    if len(w) == 0:
        raise ShapeError(
            f"{name} holds no networks, its shape is {tuple(w.shape)}: at least one is needed. "
            "zoo.finite() is empty if every run diverged: train with a lower lr"
        )
    return w.detach()


def _shown(value: Any) -> str:
    """Show a short value as it is, of others the type: arrays are never quoted."""
    plain = value is None or isinstance(value, bool | int | float | str)
    return repr(value) if plain and len(repr(value)) < 60 else f"a {type(value).__name__}"


def device_of(device: str | torch.device) -> torch.device:
    """Return a device on which tensors can be made.

    Raises
    ------
    ShapeError
        If PyTorch does not know it, or this machine does not have it.

    Examples
    --------
    >>> device_of("cpu")
    device(type='cpu')
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ShapeError(
            f"device must be one that this machine has, such as 'cpu' or 'cuda', got {device!r} "
            f"({reason})"
        ) from error
    return found
