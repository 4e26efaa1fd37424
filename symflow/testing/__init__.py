"""The test kit: laws that groups and everything built on them obey, and strategies to draw them."""

from symflow.testing.law import Law
from symflow.testing.laws import check_group, laws
from symflow.testing.networks import architectures, mlps, weights
from symflow.testing.strategies import concrete_classes, elements, groups, register

__all__ = [
    "Law",
    "architectures",
    "check_group",
    "concrete_classes",
    "elements",
    "groups",
    "laws",
    "mlps",
    "register",
    "weights",
]
