"""Flat weight space."""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.manifolds.base import WeightManifold


@final
class Flat(WeightManifold):
    """All of weight space with straight lines; buffers have no length.

    Examples
    --------
    >>> Flat(3, counted=2).dist(torch.zeros(3), torch.tensor([3.0, 4.0, 9.0]))
    tensor(5.)
    """

    name = "Flat"
    reversible = True

    def weighted(self, weights: Float[Tensor, " D"]) -> "Flat":
        return Flat(self.dimension, self.counted, weights)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Return x + u."""
        return x + u

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Return x + u."""
        return x + u

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y - x."""
        return y - x

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Return the vector itself."""
        return v.expand(torch.broadcast_shapes(x.shape, y.shape, v.shape))

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the vector itself."""
        return u

    def projx(self, x: Tensor) -> Tensor:
        """Return the point itself."""
        return x

    def geodesic(self, x: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """Return x + t v."""
        return x + t[..., None] * v

    def geodesic_velocity(self, x: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """Return v at all times."""
        return v.expand(torch.broadcast_shapes(x.shape, v.shape, t[..., None].shape))

    def _check_point_on_manifold(
        self, x: Tensor, *, atol: float = 0.0, rtol: float = 0.0
    ) -> tuple[bool, str | None]:
        return True, None

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 0.0, rtol: float = 0.0
    ) -> tuple[bool, str | None]:
        return True, None
