"""What every section space has in common: points are flat weight vectors."""

from abc import abstractmethod

import geoopt
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from symflow.errors import ShapeError
from symflow.numerics import norm, tolerance


class WeightManifold(geoopt.Manifold):
    """A manifold of flat weight vectors with the metric of R^D, as a geoopt manifold.

    The last dimension of points and tangent vectors holds the coordinates. Coordinates that are not
    ``counted`` (running statistics) move along as Euclidean ones, but have no length.

    Subclasses implement ``expmap, logmap, proju, projx, retr, transp`` and the two checks.

    Parameters
    ----------
    dimension
        Number of coordinates.
    counted
        How many coordinates, from the first, count in norms; all if None.
    weights
        Positive factors (D,) of the coordinates in squared lengths; one if None.
    """

    ndim = 1
    reversible = False

    def __init__(
        self,
        dimension: int,
        counted: int | None = None,
        weights: Float[Tensor, " D"] | None = None,
    ) -> None:
        geoopt.Manifold.__init__(self)
        self.dimension = dimension
        self.counted = dimension if counted is None else counted
        self.weights: Tensor | None
        self.register_buffer("weights", weights)

    def weighted(self, weights: Float[Tensor, " D"]) -> "WeightManifold":
        """Return the same space with other factors of the coordinates in squared lengths.

        Raises
        ------
        ShapeError
            Where lengths are not those of single coordinates: on spheres.
        """
        raise ShapeError(
            f"{self.name} has no weighted metric: its lengths are arcs of whole rows. Use flat "
            "space or the balanced section"
        )

    def stretch(self, u: Float[Tensor, "*#batch D"]) -> Float[Tensor, "*#batch D"]:
        """Multiply by the roots of the weights: lengths are Euclidean ones afterwards."""
        return u if self.weights is None else u * self.weights.sqrt().to(u)

    def inner(
        self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False
    ) -> Tensor:
        """Return the inner product of tangent vectors over the counted coordinates."""
        v = u if v is None else v
        product = (self.stretch(u) * self.stretch(v))[..., : self.counted].sum(-1, keepdim=keepdim)
        batch = x[..., :1].shape if keepdim else x.shape[:-1]
        return product.expand(torch.broadcast_shapes(batch, product.shape))

    def norm(self, x: Tensor, u: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return the length of a tangent vector; its gradient at zero is zero."""
        return norm(self.stretch(u)[..., : self.counted], keepdim=keepdim)

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return the length of the shortest path; exactly zero between equal points."""
        return self.norm(x, self.logmap(x, y), keepdim=keepdim)

    def dist2(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return the squared distance."""
        return self.dist(x, y, keepdim=keepdim).square()

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Turn a Euclidean gradient into a Riemannian one: the tangent part, by the metric."""
        return self.proju(x, u if self.weights is None else u / self.weights.to(u))

    def velocity(
        self, x: Float[Tensor, "*#batch D"], v: Float[Tensor, "*#batch D"]
    ) -> Float[Tensor, "*#batch D"]:
        """Return the part of ``v`` with which :meth:`geodesic` can leave ``x``.

        All of it where geodesics are straight lines of the ambient space.
        """
        return v

    @abstractmethod
    def geodesic(
        self, x: Float[Tensor, "*#batch D"], v: Float[Tensor, "*#batch D"], t: Tensor
    ) -> Float[Tensor, "*out D"]:
        """Return exp_x(t v) for many times at once: ``t`` broadcasts against the batch."""

    @abstractmethod
    def geodesic_velocity(
        self, x: Float[Tensor, "*#batch D"], v: Float[Tensor, "*#batch D"], t: Tensor
    ) -> Float[Tensor, "*out D"]:
        """Return the velocity of t -> exp_x(t v), a tangent vector at that point."""

    def carry(
        self, x: Float[Tensor, "*#batch D"], v: Float[Tensor, "*#batch D"], u: Tensor
    ) -> Float[Tensor, "*#batch D"]:
        """Carry the vector ``u`` at ``x`` in parallel along t -> exp_x(t v), from t = 0 to 1.

        Where geodesics are straight lines of the ambient space nothing turns.
        """
        return u.expand(torch.broadcast_shapes(x.shape, v.shape, u.shape))

    def _close(self, error: Tensor, scale: Tensor, atol: float, rtol: float) -> bool:
        return bool((error <= atol + rtol * scale).all())


def no_rows(x: Tensor) -> Bool[Tensor, "*shape 1"]:
    """Mark rows that are too short to have a direction.

    Examples
    --------
    >>> no_rows(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    tensor([[ True],
            [False]])
    """
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return length <= tolerance(x.dtype).eps
