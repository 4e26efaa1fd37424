"""Architectures: leaves, axes, and the symmetry of a network's weights."""

from symflow.arch.architecture import Architecture, StateDict, Weights
from symflow.arch.batches import by_batch
from symflow.arch.coordinates import InputCoordinates
from symflow.arch.fold import Folded, fold_gains
from symflow.arch.labels import FIXED, Atom, Label
from symflow.arch.layout import Axis, Dim, Leaf
from symflow.arch.mlp import from_config, mlp
from symflow.arch.rules import Activation, Value, rule
from symflow.arch.shifts import Shift, Shifts
from symflow.arch.symmetry import Element, Symmetry, scale_coordinates
from symflow.arch.trace import Call

__all__ = [
    "FIXED",
    "Activation",
    "Architecture",
    "Atom",
    "Axis",
    "Call",
    "Dim",
    "Element",
    "Folded",
    "InputCoordinates",
    "Label",
    "Leaf",
    "Shift",
    "Shifts",
    "StateDict",
    "Symmetry",
    "Value",
    "Weights",
    "by_batch",
    "fold_gains",
    "from_config",
    "mlp",
    "rule",
    "scale_coordinates",
]
