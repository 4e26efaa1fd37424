"""One aligner after another."""

from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.align.base import Aligner, Found, PairedAligner, better
from symflow.align.hull import polish
from symflow.align.weight_matching import WeightMatching
from symflow.arch import Symmetry


@final
@dataclass(frozen=True)
class Polished(PairedAligner):
    """Let a second aligner go on from where a first one ends, and keep the better by objective.

    Weight matching ascends from the element of ``first``. Any other aligner sees the second network
    moved by it, and goes wherever it goes from there.

    Parameters
    ----------
    first, then
        Aligners.

    Examples
    --------
    >>> import symflow
    >>> from symflow.align import FrankWolfe, WeightMatching
    >>> arch = symflow.mlp([3, 8, 2], "gelu")
    >>> w = torch.randn(2, arch.dimension, generator=torch.Generator().manual_seed(0))
    >>> both = Polished(FrankWolfe(polish=False), WeightMatching())
    >>> both(arch.symmetry, w[0], w[1]).status.name
    'CONVERGED'
    """

    first: Aligner
    then: Aligner

    def search(
        self, symmetry: Symmetry, w0: Float[Tensor, "N D"], w1: Float[Tensor, "N D"]
    ) -> Found:
        """Align twice; the history is that of both, as far as it rises."""
        start = self.first(symmetry, w0, w1)
        one = Found(start.element, start.history, start.status, start.losses)
        if isinstance(self.then, WeightMatching):
            two = polish(symmetry, w0, w1, start.element, self.then.max_sweeps)
        else:
            end = self.then(symmetry, w0, start.weights)
            element = symmetry.compose(end.element, start.element)
            two = Found(element, end.history, end.status, end.losses)
        # The second comes first among equals: an ascent that ends is a certificate.
        best = better(two, one)
        rising = torch.cat([one.history, two.history]).cummax(0).values
        losses = [x.losses for x in (one, two) if x.losses is not None]
        return replace(best, history=rising, losses=torch.cat(losses) if losses else None)
