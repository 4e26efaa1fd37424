"""Principal directions of a set of networks, at their mean."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.errors import ShapeError
from symflow.manifolds import WeightManifold


@final
@dataclass(frozen=True, eq=False)
class Principal:
    """The directions in which networks differ most, and where each network lies along them.

    Attributes
    ----------
    mean
        Where the tangent space touches (D,).
    components
        Directions there (k, D), orthonormal in the metric, the widest first. Running statistics,
        which have no length, move along as the networks' do.
    variances
        Mean square of the coordinates along each component (k,).
    coordinates
        Of each network (N, k).
    total
        Mean square of the distances to the mean: the sum of all variances.
    manifold
        The section space.

    Examples
    --------
    >>> from symflow.manifolds import Flat
    >>> logs = torch.tensor([[0.0, 3.0], [0.0, -3.0], [1.0, 0.0], [-1.0, 0.0]])
    >>> found = principal(Flat(2), torch.ones(2), logs, 1)
    >>> found.components, found.variances, found.reconstruct(found.coordinates)[0]
    (tensor([[0., 1.]]), tensor([4.5000]), tensor([1., 4.]))
    """

    mean: Float[Tensor, " D"]
    components: Float[Tensor, "k D"]
    variances: Float[Tensor, " k"]
    coordinates: Float[Tensor, "N k"]
    total: Float[Tensor, ""]
    manifold: WeightManifold

    def reconstruct(self, coordinates: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch D"]:
        """Return the points that geodesics from the mean reach at these coordinates.

        On the balanced section geodesics are chords, and these points need not be balanced:
        ``Quotient.project`` moves them there without changing what the network does. Running
        variances may become negative far from the networks.
        """
        v = coordinates.to(self.components) @ self.components
        one = torch.ones(v.shape[:-1], dtype=v.dtype, device=v.device)
        return self.manifold.geodesic(self.mean, self.manifold.velocity(self.mean, v), one)


def principal(
    manifold: WeightManifold,
    mean: Float[Tensor, " D"],
    logs: Float[Tensor, "N D"],
    k: int,
) -> Principal:
    """Find the principal directions of tangent vectors at a mean, by singular values.

    Parameters
    ----------
    manifold
        The section space.
    mean
        Where the vectors begin; they are not centred, for they are about a Frechet mean already.
    logs
        Tangent vectors.
    k
        How many directions.

    Raises
    ------
    ShapeError
        If ``k`` is not from 1 to the least of N and the number of parameters.

    Examples
    --------
    >>> from symflow.manifolds import Flat
    >>> principal(Flat(2), torch.zeros(2), torch.tensor([[3.0, 4.0]]), 1).components
    tensor([[0.6000, 0.8000]])
    """
    most = min(len(logs), manifold.counted)
    if not 1 <= k <= most:
        raise ShapeError(
            f"k must be from 1 to {most}, for {len(logs)} networks of {manifold.counted} "
            f"parameters, got {k}"
        )
    roots = manifold.stretch(torch.ones_like(mean))[: manifold.counted]
    own = logs[:, : manifold.counted] * roots
    left, values, right = torch.linalg.svd(own, full_matrices=False)
    left, values, right = left[:, :k], values[:k], right[:k]
    # A direction and its opposite are the same: the greatest entry is made positive.
    top = right.gather(-1, right.abs().argmax(-1, keepdim=True)).squeeze(-1)
    sign = torch.where(top < 0, -torch.ones_like(top), torch.ones_like(top))
    left, right = left * sign, right * sign[:, None]
    alive = values > torch.finfo(values.dtype).eps * max(logs.shape) * values[0]
    safe = torch.where(alive, values, torch.ones_like(values))
    rest = (left.mT @ logs[:, manifold.counted :]) * (alive / safe)[:, None]
    return Principal(
        mean,
        torch.cat([right / roots, rest], dim=-1),
        values.square() / len(logs),
        left * values,
        own.square().sum() / len(logs),
        manifold,
    )
