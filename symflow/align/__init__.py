"""Alignment: the element of the compact group that brings one network close to another."""

from symflow.align.base import Aligner, Alignment, Status, objective
from symflow.align.bounds import objective_bound
from symflow.align.weight_matching import WeightMatching

__all__ = [
    "Aligner",
    "Alignment",
    "Status",
    "WeightMatching",
    "objective",
    "objective_bound",
]
