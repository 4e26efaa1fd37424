"""Vector fields on weight space."""

from typing import TYPE_CHECKING, Any

from symflow.nn.base import ConditionalField, VectorField
from symflow.nn.relational import RelationalTransformer

if TYPE_CHECKING:
    from symflow.nn.graph import GraphField

__all__ = ["ConditionalField", "GraphField", "RelationalTransformer", "VectorField"]


def __getattr__(name: str) -> Any:
    # PyTorch Geometric takes seconds to import: only whoever asks for a graph pays.
    if name == "GraphField":
        from symflow.nn.graph import GraphField

        return GraphField
    raise AttributeError(f"module 'symflow.nn' has no attribute {name!r}")
