"""Explicit weights of the terms that an aligner's objective adds up."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

from jaxtyping import Float
from torch import Tensor

from symflow.align.base import Aligner, Found, PairedAligner, Status, objective
from symflow.arch import Leaf, Symmetry
from symflow.errors import LeafError, ShapeError


@final
@dataclass(frozen=True)
class Weighted(PairedAligner):
    """Give every leaf's term of the objective a factor of one's choice.

    The coordinates of both networks are multiplied by the root of their leaf's factor before they
    are aligned. A factor is the same for all coordinates of a leaf, so it commutes with the group.
    What is reported is the objective of the networks as they are.

    Parameters
    ----------
    aligner
        Sees the networks multiplied.
    weights
        Factor by key of a leaf; 1 where it has none.
    incoming, outgoing
        Further factors of the leaves that units receive through and give through; a map between two
        axes gets both. Degrees tell which is which (positive: receive), and where they are zero the
        order of dimensions, of which the first is the output in all maps but transposed ones.

    Raises
    ------
    ShapeError
        If a factor is negative or not finite.

    Examples
    --------
    >>> import symflow, torch
    >>> arch = symflow.mlp([3, 8, 2], "gelu")
    >>> w = torch.randn(2, arch.dimension, generator=torch.Generator().manual_seed(0))
    >>> plain, aligner = symflow.WeightMatching(), Weighted(symflow.WeightMatching(), outgoing=0.0)
    >>> bool(plain(arch.symmetry, *w).objective > aligner(arch.symmetry, *w).objective)
    True
    """

    aligner: Aligner
    weights: Mapping[str, float] = field(default_factory=dict[str, float])
    incoming: float = 1.0
    outgoing: float = 1.0

    def __post_init__(self) -> None:
        for name, factor in {**self.weights, "in": self.incoming, "out": self.outgoing}.items():
            if not (math.isfinite(factor) and factor >= 0):
                raise ShapeError(f"factors must be finite and not negative, got {name}: {factor}")

    def search(
        self, symmetry: Symmetry, w0: Float[Tensor, "N D"], w1: Float[Tensor, "N D"]
    ) -> Found:
        """Align the networks multiplied.

        Raises
        ------
        LeafError
            If ``weights`` names a leaf that is not there.
        """
        unknown = set(self.weights) - {key for x in symmetry.leaves for key in (x.name, x.key)}
        if unknown:
            raise LeafError(
                f"weights names leaves {sorted(unknown)}; there are "
                f"{[x.name for x in symmetry.leaves]}"
            )
        factors = [self._factor(leaf) for leaf in symmetry.leaves]
        roots = w0.new_ones(w0.shape[-1])
        for leaf, factor in zip(symmetry.leaves, factors, strict=True):
            roots[leaf.span] = math.sqrt(factor)
        found = self.aligner(symmetry, w0 * roots, w1 * roots)
        counted = {f for leaf, f in zip(symmetry.leaves, factors, strict=True) if leaf.learnable}
        if len(counted) == 1 and counted != {0.0}:  # the same objective, but for a factor
            history, status = found.history / counted.pop(), found.status
        else:
            history = objective(symmetry, w0, symmetry.act(found.element, w1))[None]
            status = Status.NOT_POLISHED
        return Found(found.element, history, status, found.losses)

    def _factor(self, leaf: Leaf) -> float:
        factor = self.weights.get(leaf.name, self.weights.get(leaf.key, 1.0))
        roles = {
            dim.degree > 0 if dim.degree else k == 0
            for k, dim in enumerate(leaf.dims)
            if dim.axis is not None and dim.within is None
        }
        factor *= self.incoming if True in roles else 1
        factor *= self.outgoing if False in roles else 1
        return float(factor)
