"""symflow: the geometry of neural-network weights.

Symmetry groups as objects, the quotient of weight space by them, alignment of networks, and flow
matching over weights.
"""

import importlib
from typing import TYPE_CHECKING, Any

import symflow.arch as arch
import symflow.errors as errors
import symflow.groups as groups
from symflow.arch import Architecture, mlp
from symflow.groups import (
    CompactGroup,
    Group,
    NoncompactGroup,
    Permutation,
    PermutingGroup,
    PositiveScale,
    Sign,
    Trivial,
)

if TYPE_CHECKING:
    import symflow.align as align
    import symflow.evaluate as evaluate
    import symflow.flows as flows
    import symflow.manifolds as manifolds
    import symflow.nn as nn
    import symflow.quotient as quotient
    import symflow.sections as sections
    import symflow.testing as testing
    import symflow.zoo as zoo
    from symflow.align import WeightMatching
    from symflow.quotient import Quotient

__version__ = "0.1.0.dev0"

# These bring geoopt, SciPy, scikit-learn and the like with them: they load when first used.
_LAZY_NAMES = {
    "Quotient": "symflow.quotient",
    "WeightMatching": "symflow.align",
}
_LAZY_MODULES = (
    "align",
    "evaluate",
    "flows",
    "manifolds",
    "nn",
    "quotient",
    "sections",
    "testing",
    "zoo",
)

__all__ = [
    "Architecture",
    "CompactGroup",
    "Group",
    "NoncompactGroup",
    "Permutation",
    "PermutingGroup",
    "PositiveScale",
    "Quotient",
    "Sign",
    "Trivial",
    "WeightMatching",
    "align",
    "arch",
    "errors",
    "evaluate",
    "flows",
    "groups",
    "manifolds",
    "mlp",
    "nn",
    "quotient",
    "sections",
    "testing",
    "zoo",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY_NAMES:
        return getattr(importlib.import_module(_LAZY_NAMES[name]), name)
    if name in _LAZY_MODULES:
        return importlib.import_module(f"symflow.{name}")
    raise AttributeError(f"module 'symflow' has no attribute {name!r}")
