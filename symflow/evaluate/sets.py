"""Sets of networks, and what all networks of a set predict: what averages and diversity share."""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.arch import Architecture, Weights
from symflow.errors import ShapeError
from symflow.evaluate.predict import Temperature, logits, networks, probabilities, temperatures
from symflow.evaluate.weights import flat_weights

# So many probabilities are held at a time.
_PROBABILITIES = 2**22


def a_set(arch: Architecture, ws: Weights) -> Float[Tensor, "*batch N D"]:
    """Return sets of networks.

    Raises
    ------
    ShapeError
        If ``ws`` is a single network or an empty set.
    LeafError
        If weights are NaN or infinite.
    """
    w = flat_weights(arch, ws, "ws")
    if w.ndim < 2 or w.shape[:-1].numel() == 0:
        raise ShapeError(
            f"ws must be a set of networks (*batch, N, D) with N at least 1, got {tuple(w.shape)}"
        )
    return w


def log_probabilities(
    arch: Architecture, w: Float[Tensor, "*batch D"], x: Tensor, temperature: Temperature
) -> Iterator[tuple[slice, Float[Tensor, "*batch piece C"]]]:
    """Yield pieces of the inputs with the log-probabilities of all networks, in float64.

    Logarithms, because the probability of a class that a confident network rules out is no
    floating point number any more, and its logarithm is.
    """
    flat, batch = networks(arch, w)
    one = temperatures(temperature, batch, flat).double()[:, None, None]
    classes = probabilities(arch, flat[0], x[:1]).shape[-1]
    step = max(1, _PROBABILITIES // (len(flat) * classes))
    for start in range(0, len(x), step):
        at = slice(start, min(start + step, len(x)))
        found = (logits(arch, flat, x[at]).double() / one).log_softmax(-1)
        yield at, found.reshape(*batch, *found.shape[1:])


def log_mean(log_p: Float[Tensor, "*batch N n C"]) -> Float[Tensor, "*batch n C"]:
    """Return the logarithm of the mean over a set of what is given by its logarithms.

    Examples
    --------
    >>> log_mean(torch.tensor([[[0.9, 0.1]], [[0.1, 0.9]]]).log()).exp()
    tensor([[0.5000, 0.5000]])
    """
    return torch.logsumexp(log_p, -3) - math.log(log_p.shape[-3])
