"""Weights as the measures take them: a zoo holds several kinds, so it must be said which."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from symflow.arch import Architecture
from symflow.errors import ShapeError


def flat_weights(arch: Architecture, w: Any, name: str) -> Float[Tensor, "*batch D"]:
    """Return flat weights, without their gradient.

    Raises
    ------
    ShapeError
        If it is a zoo, or a flat tensor does not end with D coordinates.
    LeafError
        If weights are missing, NaN or infinite.
    """
    if not isinstance(w, Tensor | nn.Module | Mapping | Sequence) and hasattr(w, "final"):
        raise ShapeError(
            f"{name} must be weights (*batch, D), state dicts or modules, got a "
            f"{type(w).__name__}: pass its trained weights, zoo.final (or zoo.initial, "
            "zoo.snapshots)"
        )
    return arch.as_weights(w, name=name).detach()
