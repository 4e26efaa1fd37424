"""The test kit: laws that groups and everything built on them obey, and strategies to draw them."""

from symflow.testing.aligners import BuiltFor, aligner_laws, check_aligner
from symflow.testing.equivariance import (
    check_equivariant,
    check_invariant,
    check_symmetry,
    symmetry_laws,
)
from symflow.testing.law import Law
from symflow.testing.laws import check_group, laws
from symflow.testing.networks import architectures, mlps, weights
from symflow.testing.quotients import check_quotient, quotient_laws, quotients
from symflow.testing.sections import check_section, section_laws
from symflow.testing.strategies import concrete_classes, elements, groups, register

__all__ = [
    "BuiltFor",
    "Law",
    "aligner_laws",
    "architectures",
    "check_aligner",
    "check_equivariant",
    "check_group",
    "check_invariant",
    "check_quotient",
    "check_section",
    "check_symmetry",
    "concrete_classes",
    "elements",
    "groups",
    "laws",
    "mlps",
    "quotient_laws",
    "quotients",
    "register",
    "section_laws",
    "symmetry_laws",
    "weights",
]
