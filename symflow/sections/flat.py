"""No section: compact symmetries alone, weights stay as they are."""

from typing import final

from jaxtyping import Float
from torch import Tensor

from symflow.arch import Architecture
from symflow.errors import NotIsometricError
from symflow.manifolds import Flat
from symflow.sections.base import Section, noncompact_axes


@final
class FlatSection(Section):
    """All of weight space, for architectures whose symmetries are all compact.

    Parameters
    ----------
    arch
        The architecture.
    isometric_only
        If True (default) a non-compact group is refused; if False it is ignored, and what remains
        is measured in raw weights (the Euclidean flow of the source thesis does that).

    Raises
    ------
    NotIsometricError
        If a non-compact group acts and may not be ignored.

    Examples
    --------
    >>> import symflow
    >>> FlatSection(symflow.mlp([2, 3, 1], "tanh")).manifold.name
    'Flat'
    """

    def __init__(self, arch: Architecture, *, isometric_only: bool = True) -> None:
        if isometric_only and noncompact_axes(arch):
            name = noncompact_axes(arch)[0]
            raise NotIsometricError(
                f"axis {name} has {arch.symmetry[name].group}, which does not keep distances: "
                "choose section='balanced' or 'sphere'"
            )
        self.arch = arch
        self.symmetry = arch.symmetry.compact
        self.manifold = self.state_manifold = Flat(arch.dimension, arch.num_parameters)

    def split(
        self, w: Float[Tensor, "*#batch D"]
    ) -> tuple[Float[Tensor, "*#batch D"], Float[Tensor, "*#batch E"]]:
        """Return the weights and nothing."""
        return w, w[..., :0]

    def join(
        self, x: Float[Tensor, "*#batch D"], removed: Float[Tensor, "*#batch E"]
    ) -> Float[Tensor, "*#batch D"]:
        """Return the weights."""
        return x
