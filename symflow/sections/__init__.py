"""Sections: how one point is chosen on each orbit of the non-compact symmetries."""

from symflow.sections.balanced import BalancedSection
from symflow.sections.base import (
    Section,
    mixed_axes,
    noncompact_axes,
    scaled_axes,
    uncompensated_axes,
    unit_coordinates,
)
from symflow.sections.centred import CentredSection
from symflow.sections.flat import FlatSection
from symflow.sections.sphere import SphereSection

__all__ = [
    "BalancedSection",
    "CentredSection",
    "FlatSection",
    "Section",
    "SphereSection",
    "mixed_axes",
    "noncompact_axes",
    "scaled_axes",
    "uncompensated_axes",
    "unit_coordinates",
]
