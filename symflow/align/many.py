"""Many networks at once: everyone to a common centre."""

import time
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.align.base import Aligner, Status, objective, require_compact, where
from symflow.arch import Element, Symmetry
from symflow.errors import ShapeError
from symflow.groups import map_element
from symflow.numerics import tolerance


@final
@dataclass(frozen=True, eq=False)
class Centred:
    """Networks aligned with a common centre.

    Attributes
    ----------
    symmetry
        The compact group.
    element
        One element for each axis (N): it brings network i next to the centre.
    weights
        The networks moved by it (N, D).
    centre
        Their mean (D,).
    history
        Sum over the networks of the squared distance to the centre, after each round; it never
        rises.
    status
        Converged once the aligner brings no network closer to the others.
    seconds
        Wall-clock time.

    Examples
    --------
    >>> import symflow
    >>> arch = symflow.mlp([3, 4, 2], "gelu")
    >>> w = torch.randn(5, arch.dimension, generator=torch.Generator().manual_seed(0))
    >>> found = align_to_centre(symflow.WeightMatching(), arch.symmetry, w)
    >>> torch.allclose(arch.symmetry.act(found.element, w), found.weights)
    True
    """

    symmetry: Symmetry
    element: Element
    weights: Float[Tensor, "N D"]
    centre: Float[Tensor, " D"]
    history: Float[Tensor, " rounds"]
    status: Status
    seconds: float

    def between(self, i: int, j: int) -> Element:
        """Return the element that brings network ``j`` next to network ``i``.

        It goes through the centre, so what leads around a cycle is the identity.

        Examples
        --------
        >>> import symflow
        >>> arch = symflow.mlp([3, 4, 2], "gelu")
        >>> w = torch.randn(3, arch.dimension, generator=torch.Generator().manual_seed(0))
        >>> found = align_to_centre(symflow.WeightMatching(), arch.symmetry, w)
        >>> around = arch.symmetry.compose(found.between(0, 1), found.between(1, 0))
        >>> around["h1"]
        tensor([0, 1, 2, 3])
        """
        back = self.symmetry.inverse(self._one(i))
        return self.symmetry.compose(back, self._one(j))

    def _one(self, k: int) -> Element:
        return {name: map_element(lambda part: part[k], g) for name, g in self.element.items()}


def align_to_centre(
    aligner: Aligner,
    symmetry: Symmetry,
    ws: Float[Tensor, "N D"],
    *,
    reference: int = 0,
    max_rounds: int = 100,
) -> Centred:
    """Align all networks with their own mean, and so with each other.

    Generalised Procrustes analysis (Gower, 1975) over the group: align every network with the mean
    of the others (with its own share in the mean, it would rather stay), as merging many does
    (Ainsworth et al., 2023), until nothing comes closer. Elements between pairs go through the
    centre and are consistent around every cycle, as in C2M3 (Crisostomi et al., 2024); those of
    pairs aligned by themselves are not.

    Parameters
    ----------
    aligner
        Aligns all networks in one batch. Where they would come apart by moving all at once, only
        the one that gains most is moved: the sum of squares never rises.
    symmetry
        A compact group.
    ws
        The networks.
    reference
        The network that all others are aligned with at first.
    max_rounds
        Give up improving after so many rounds.

    Raises
    ------
    ShapeError
        If there is no network of number ``reference``.
    NotIsometricError
        If an axis has a non-compact group.

    Examples
    --------
    >>> import symflow
    >>> arch = symflow.mlp([3, 4, 2], "gelu")
    >>> w = torch.randn(arch.dimension, generator=torch.Generator().manual_seed(0))
    >>> g = arch.symmetry.random(generator=torch.Generator(), like=w, batch=(5,))
    >>> found = align_to_centre(symflow.WeightMatching(), arch.symmetry, arch.symmetry.act(g, w))
    >>> bool(found.history[-1] < 1e-6)
    True
    """
    require_compact(symmetry)
    if not 0 <= reference < len(ws):
        raise ShapeError(f"reference must be one of the {len(ws)} networks, got {reference}")
    began = time.perf_counter()
    ws = ws.detach()
    still = symmetry.identity(like=ws)
    element = {
        name: map_element(lambda part: part.expand(len(ws), *part.shape).clone(), g)
        for name, g in still.items()
    }
    moved = ws
    history: list[Tensor] = []
    status = Status.SWEEP_LIMIT
    for _ in range(max_rounds):
        others = (moved.sum(0) - moved) / max(len(ws) - 1, 1)
        others = others if history else ws[reference].expand_as(ws)
        found = aligner(symmetry, others, ws)
        now = objective(symmetry, others, moved)
        gain = found.objective - now
        nearer = gain > tolerance(ws.dtype).gain * now.abs()
        trial = torch.where(nearer[:, None], found.weights, moved)
        if history and not bool(_spread(symmetry, trial) < history[-1]):
            nearer = nearer & (torch.arange(len(ws), device=ws.device) == gain.argmax())
            trial = torch.where(nearer[:, None], found.weights, moved)
        element = {name: where(nearer, g, element[name]) for name, g in found.element.items()}
        moved = trial
        history.append(_spread(symmetry, moved))
        if not bool(nearer.any()) and len(history) > 1:
            status = Status.CONVERGED
            break
    return Centred(
        symmetry=symmetry,
        element=element,
        weights=moved,
        centre=moved.mean(0),
        history=torch.stack(history) if history else ws.new_zeros(0),
        status=status,
        seconds=time.perf_counter() - began,
    )


def _spread(symmetry: Symmetry, moved: Tensor) -> Tensor:
    counted = symmetry.num_parameters
    return (moved - moved.mean(0))[:, :counted].square().sum()
