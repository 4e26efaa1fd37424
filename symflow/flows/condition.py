"""Conditions: what a flow is told about the networks it learns from, and is asked for later."""

from typing import Any, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from symflow.errors import ShapeError, StateError
from symflow.nn import ConditionalField, VectorField


@final
class Conditioned:
    """A field with its condition filled in: a function of weights and time alone.

    Parameters
    ----------
    field
        The field.
    values
        One condition (B, k) for each network of a batch; a batch that is a multiple of it, one
        copy behind the other, is taken too.
    keep
        Which networks (B,) are told theirs; all if None.

    Examples
    --------
    >>> import symflow
    >>> arch = symflow.mlp([3, 4, 2])
    >>> field = symflow.nn.RelationalTransformer(arch, width=8, depth=1, conditions=1)
    >>> Conditioned(field, torch.ones(2, 1))(torch.zeros(4, 26), torch.zeros(4)).shape
    torch.Size([4, 26])
    """

    def __init__(
        self,
        field: VectorField,
        values: Float[Tensor, "B k"],
        keep: Bool[Tensor, " B"] | None = None,
    ) -> None:
        self.field = field
        self.values = values
        self.keep = keep

    def __call__(
        self, x: Float[Tensor, "B size"], t: Float[Tensor, " B"]
    ) -> Float[Tensor, "B size"]:
        copies = len(x) // len(self.values)
        values = self.values.to(x).repeat(copies, 1)
        keep = None if self.keep is None else self.keep.to(x.device).repeat(copies)
        return self.field(x, t, values, keep)


def count_of(field: VectorField) -> int:
    """Return how many numbers a field's condition has, 0 if it takes none.

    Examples
    --------
    >>> import symflow
    >>> count_of(symflow.nn.RelationalTransformer(symflow.mlp([3, 4, 2]), width=8, conditions=2))
    2
    """
    return field.conditions if isinstance(field, ConditionalField) else 0


def conditions_for(field: VectorField, values: Any, n: int, name: str) -> Tensor | None:
    """Return conditions (n, k) of what a user passed: one (k,) stands for all networks.

    Raises
    ------
    ShapeError
        If there are none of that shape, or one is NaN or infinite.
    StateError
        If the field takes no conditions.
    """
    if values is None:
        return None
    k = count_of(field)
    if k == 0:
        raise StateError(
            f"{name} were given, but the flow's field ({type(field).__name__}) takes none: make "
            "the flow with conditions=k for k numbers, as in flows.balanced(arch, conditions=1)"
        )
    try:
        found = torch.as_tensor(values, dtype=next(field.parameters()).dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ShapeError(f"{name} must be numbers (n = {n}, k = {k}): {error}") from error
    if found.shape not in ((n, k), (k,)):
        raise ShapeError(
            f"{name} must have shape (n, k) = {(n, k)}, or {(k,)} for all networks, got "
            f"{tuple(found.shape)}"
        )
    if not bool(found.isfinite().all()):
        bad = int((~found.isfinite()).sum())
        raise ShapeError(f"{name} hold {bad} NaN or infinite value(s): leave those networks out")
    return found.detach().expand(n, k)
