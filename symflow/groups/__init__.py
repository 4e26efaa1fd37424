"""Symmetry groups of one axis, and the contract for writing new ones."""

from symflow.groups.base import CompactGroup, Group, NoncompactGroup, along, map_element
from symflow.groups.diagonal import DiagonalGroup, PositiveScale, Sign
from symflow.groups.permutation import Permutation, PermutingGroup, assignment, invert
from symflow.groups.product import CompactProduct, NoncompactProduct, monomial
from symflow.groups.trivial import Trivial

__all__ = [
    "CompactGroup",
    "CompactProduct",
    "DiagonalGroup",
    "Group",
    "NoncompactGroup",
    "NoncompactProduct",
    "Permutation",
    "PermutingGroup",
    "PositiveScale",
    "Sign",
    "Trivial",
    "along",
    "assignment",
    "invert",
    "map_element",
    "monomial",
]
