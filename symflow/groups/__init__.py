"""Symmetry groups of one axis, and the contract for writing new ones."""

from symflow.groups.base import (
    CompactGroup,
    Group,
    NoncompactGroup,
    ScalingGroup,
    along,
    map_element,
    reorder,
    repeated,
)
from symflow.groups.cyclic import CyclicShift
from symflow.groups.diagonal import DiagonalGroup, PositiveScale, Sign
from symflow.groups.heads import Heads
from symflow.groups.linear import GeneralLinear, MatrixGroup, Orthogonal
from symflow.groups.permutation import Permutation, PermutingGroup, assignment, invert
from symflow.groups.product import CompactProduct, NoncompactProduct, monomial
from symflow.groups.rotary import PairGroup, Phases, Rotary
from symflow.groups.trivial import Trivial

__all__ = [
    "CompactGroup",
    "CompactProduct",
    "CyclicShift",
    "DiagonalGroup",
    "GeneralLinear",
    "Group",
    "Heads",
    "MatrixGroup",
    "NoncompactGroup",
    "NoncompactProduct",
    "Orthogonal",
    "PairGroup",
    "Permutation",
    "PermutingGroup",
    "Phases",
    "PositiveScale",
    "Rotary",
    "ScalingGroup",
    "Sign",
    "Trivial",
    "along",
    "assignment",
    "invert",
    "map_element",
    "monomial",
    "reorder",
    "repeated",
]
