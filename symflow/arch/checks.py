"""What weights must be before an architecture takes them in."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from symflow.arch.layout import Leaf
from symflow.errors import LeafError


def require_names(
    leaves: tuple[Leaf, ...], module: nn.Module, state: Mapping[str, Tensor], name: str
) -> None:
    """Refuse a state dict that lacks a leaf or has what the module does not.

    Raises
    ------
    LeafError
        Naming what is missing, or unknown.
    """
    wanted = {leaf.key for leaf in leaves}
    missing = sorted(wanted - set(state))
    if missing:
        raise LeafError(
            f"{name}: missing leaves {missing}; it has {sorted(state)[:12]}. Pass the whole "
            "state dict of a network of this architecture"
        )
    unknown = sorted(set(state) - set(module.state_dict()))
    if unknown:
        raise LeafError(
            f"{name}: unknown leaves {unknown}; the architecture has {sorted(wanted)[:12]}. "
            "Drop them, or trace the module that they belong to"
        )


def require_ties(
    aliases: tuple[tuple[str, str], ...], state: Mapping[str, Tensor], name: str
) -> None:
    """Refuse values of tied weights that differ.

    Raises
    ------
    LeafError
        Naming both keys.
    """
    for alias, key in aliases:
        if alias in state and not torch.equal(state[alias], state[key]):
            raise LeafError(
                f"{name}: {alias!r} is tied to {key!r} in this architecture, but they differ: "
                "trace a module in which they are not tied"
            )


def require_finite(leaves: tuple[Leaf, ...], w: Tensor, name: str) -> None:
    """Refuse weights that are NaN or infinite.

    Raises
    ------
    LeafError
        Naming the first leaf that holds such values.
    """
    if bool(w.detach().isfinite().all()):
        return
    for leaf in leaves:
        part = w.detach()[..., leaf.span]
        bad = int((~part.isfinite()).sum())
        if bad:
            raise LeafError(
                f"{name}: leaf {leaf.name!r} holds {bad} NaN or infinite value(s): this "
                "network has diverged; leave it out"
            )
