"""Translations taken away before scales are: the shortest weights of all that can be added."""

from typing import final

from jaxtyping import Float
from torch import Tensor

from symflow.arch import Shifts
from symflow.errors import ShapeError
from symflow.sections.base import Section


@final
class CentredSection(Section):
    """Another section of weights from which translations that change nothing are taken away.

    Centring is an orthogonal projection that commutes with all groups: distances of centred points
    are those of the orbits under translations, too, and what is joined has the outputs (or with
    ``preserves="probabilities"`` the softmax of the outputs) of the weights before.

    Parameters
    ----------
    section
        What is done to the centred weights.
    shifts
        The translations.

    Raises
    ------
    ShapeError
        If the two are for different architectures.

    Examples
    --------
    >>> import symflow, torch
    >>> arch = symflow.mlp([3, 4, 2], "tanh")
    >>> shifts = symflow.arch.Shifts.find(arch, preserves="probabilities")
    >>> section = CentredSection(symflow.sections.FlatSection(arch), shifts)
    >>> w = torch.arange(26.0)
    >>> arch.unflatten(section.project(w))["2.bias"]
    tensor([-0.5000,  0.5000])
    """

    def __init__(self, section: Section, shifts: Shifts) -> None:
        if shifts.arch.fingerprint != section.arch.fingerprint:
            raise ShapeError(
                f"shifts are for {shifts.arch!r}, the section is for {section.arch!r}: find them "
                "for the architecture of the section"
            )
        self.inside, self.shifts, self._centre = section, shifts, shifts.centre
        self.arch, self.symmetry = section.arch, section.symmetry
        self.manifold, self.state_manifold = section.manifold, section.state_manifold

    def split(
        self, w: Float[Tensor, "*#batch D"]
    ) -> tuple[Float[Tensor, "*#batch D"], Float[Tensor, "*#batch E"]]:
        """Split the centred weights."""
        return self.inside.split(self._centre(w))

    def join(
        self, x: Float[Tensor, "*#batch D"], removed: Float[Tensor, "*#batch E"]
    ) -> Float[Tensor, "*#batch D"]:
        """Return centred weights."""
        return self.inside.join(x, removed)
