"""How far networks are from those a generator was trained on."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from symflow.arch import Weights
from symflow.errors import ShapeError
from symflow.evaluate.predict import networks
from symflow.quotient import Quotient

# So many coordinates of pairs are held at a time.
_COORDINATES = 2**22


@final
@dataclass(frozen=True, eq=False)
class Nearest:
    """The nearest training network of each network.

    Attributes
    ----------
    distance
        Quotient distance to it (*batch,).
    index
        Which one it is (*batch,).

    Examples
    --------
    >>> Nearest(torch.tensor([0.5]), torch.tensor([3])).index
    tensor([3])
    """

    distance: Float[Tensor, "*batch"]
    index: Int[Tensor, "*batch"]


def nearest(
    quotient: Quotient, ws: Weights, zoo_ws: Weights, *, exclude_self: bool = False
) -> Nearest:
    """Find the nearest of the training networks to each network, in the quotient.

    Every pair is aligned: neurons in another order, or ReLU scales, hide no copy.

    Parameters
    ----------
    quotient
        The metric space of orbits.
    ws
        Networks (*batch, D).
    zoo_ws
        Training networks (M, D).
    exclude_self
        Leave pair (i, i) out: for ``ws`` that are the training networks themselves, whose distances
        to each other are what others are compared with.

    Raises
    ------
    ShapeError
        If there is no network on a side, or with ``exclude_self`` the sides are not equally many
        or only one.
    LeafError
        If weights are NaN or infinite, or dtypes are mixed.

    Notes
    -----
    As far as the aligner finds it: an upper bound of the true distance. N x M alignments, in pieces
    of bounded memory.

    Examples
    --------
    >>> import symflow
    >>> arch = symflow.mlp([3, 4, 2], "tanh")
    >>> zoo = torch.randn(6, arch.dimension, generator=torch.Generator().manual_seed(0))
    >>> g = arch.symmetry.random(generator=torch.Generator().manual_seed(1), like=zoo)
    >>> nearest(symflow.Quotient(arch), arch.symmetry.act(g, zoo[2:4]), zoo).index
    tensor([2, 3])
    """
    flat, batch = networks(quotient.arch, ws, name="ws")
    training, shape = networks(quotient.arch, zoo_ws, name="zoo_ws")
    if len(shape) != 1:
        raise ShapeError(f"zoo_ws must be networks (M, D), got a batch of shape {tuple(shape)}")
    if exclude_self and (len(flat) != len(training) or len(flat) < 2):
        raise ShapeError(
            "exclude_self leaves pair (i, i) out: ws and zoo_ws must be the same two or more "
            f"networks, got {len(flat)} and {len(training)}"
        )
    # Projected once, not once for each pair; projecting the points again changes nothing.
    left, right = quotient.project(flat), quotient.project(training)
    step = max(1, _COORDINATES // right.numel())
    distances: list[Tensor] = []
    indices: list[Tensor] = []
    for start in range(0, len(left), step):
        d = quotient.distance(left[start : start + step, None], right)
        if exclude_self:
            rows = torch.arange(len(d), device=d.device)
            d = d.index_put((rows, rows + start), d.new_tensor(torch.inf))
        found = d.min(-1)
        distances.append(found.values)
        indices.append(found.indices)
    return Nearest(torch.cat(distances).reshape(batch), torch.cat(indices).reshape(batch))
