"""How large a quotient is: its dimension, and how many points of the section are one network."""

import math
from typing import Any

from symflow.arch import Symmetry
from symflow.errors import ShapeError
from symflow.groups import Group, Permutation, PermutingGroup, PositiveScale, Sign, Trivial
from symflow.groups.product import CompactProduct, NoncompactProduct


def group_dimension(group: Group[Any]) -> int:
    """Return the dimension of a group as a manifold; zero for finite groups.

    Raises
    ------
    ShapeError
        If the dimension of such a group is not known.

    Examples
    --------
    >>> group_dimension(Permutation(5) @ PositiveScale(5))
    5
    """
    if isinstance(group, CompactProduct | NoncompactProduct):
        return sum(group_dimension(factor) for factor in group.factors)
    if isinstance(group, PositiveScale):
        return group.size
    if isinstance(group, PermutingGroup | Sign | Trivial):
        return 0
    raise ShapeError(f"the dimension of {group} is not known: {_KNOWN}")


def log_order(symmetry: Symmetry) -> float:
    """Return the natural logarithm of the number of elements of a finite group.

    Raises
    ------
    ShapeError
        If a group on an axis is not finite, or its number of elements is not known.

    Examples
    --------
    >>> import symflow
    >>> log_order(symflow.mlp([3, 4, 2], "tanh").symmetry)    # log(4! 2^4)
    5.9506
    """
    return sum((_log_order(axis.group) for axis in symmetry.axes), 0.0)


_KNOWN = "only those of permutations, signs, positive scales and their products are"


def _log_order(group: Group[Any]) -> float:
    if isinstance(group, CompactProduct | NoncompactProduct):
        return sum(_log_order(factor) for factor in group.factors)
    if isinstance(group, Permutation):
        return math.lgamma(group.size + 1)
    if isinstance(group, Sign):
        return group.size * math.log(2)
    if isinstance(group, Trivial):
        return 0.0
    raise ShapeError(f"the number of elements of {group} is not known: {_KNOWN}")
