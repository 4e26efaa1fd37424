"""Averages of predictions, and of weights."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.arch import Architecture, Weights
from symflow.evaluate.predict import LabelledData, Split, Temperature, examples, labels_for
from symflow.evaluate.sets import a_set, log_mean, log_probabilities
from symflow.quotient import Quotient


@final
@dataclass(frozen=True, eq=False)
class Averaged:
    """What the average of some networks' predictions is worth.

    Attributes
    ----------
    accuracy
        Share of examples where the mean probabilities are largest at the label (*batch,).
    loss
        Mean of minus the logarithm of the label's mean probability (*batch,), in nats.

    Examples
    --------
    >>> Averaged(torch.tensor(0.9), torch.tensor(0.2)).accuracy
    tensor(0.9000)
    """

    accuracy: Float[Tensor, "*batch"]
    loss: Float[Tensor, "*batch"]


def averaged(
    arch: Architecture,
    ws: Weights,
    task: LabelledData,
    split: Split = "test",
    *,
    temperature: Temperature = None,
) -> Averaged:
    """Average the predicted probabilities of the networks of a set, as Bayesian averaging does.

    Parameters
    ----------
    arch
        A classifier.
    ws
        Sets of networks (*batch, N, D).
    task
        Labelled data.
    split
        ``"train"`` or ``"test"``.
    temperature
        As for :func:`~symflow.evaluate.loss`.

    Raises
    ------
    ShapeError
        If ``ws`` is a single network or no network, the outputs do not fit the labels, or a
        temperature is not positive.
    LeafError
        If weights are NaN or infinite.

    Notes
    -----
    The loss is at most the mean loss of the networks (Jensen's inequality). One forward pass for
    each network and example, in pieces over the examples, averaged in float64.

    Examples
    --------
    >>> import symflow
    >>> arch, task = symflow.mlp([30, 4, 2]), symflow.zoo.breast_cancer()
    >>> averaged(arch, torch.zeros(3, arch.dimension), task).loss    # log 2
    tensor(0.6931)
    """
    w = a_set(arch, ws)
    x, y = examples(task, split)
    right, total = torch.zeros(2, *w.shape[:-2], dtype=torch.float64, device=w.device)
    for at, log_p in log_probabilities(arch, w, x, temperature):
        mean = log_mean(log_p)
        labels = labels_for(y[at], mean).expand(mean.shape[:-1])
        right += (mean.argmax(-1) == labels).sum(-1)
        total -= mean.gather(-1, labels[..., None]).sum((-2, -1))
    return Averaged((right / len(x)).to(w.dtype), (total / len(x)).to(w.dtype))


def weight_average(quotient: Quotient, ws: Weights) -> Float[Tensor, "*batch D"]:
    """Align the networks of each set to its first one and average their weights.

    One step of the Frechet mean (:meth:`symflow.Quotient.mean` goes on until it stands still).

    Parameters
    ----------
    quotient
        Whose alignment is used; the average is that of points on its section.
    ws
        Sets of networks (*batch, N, D).

    Raises
    ------
    ShapeError
        If ``ws`` is a single network.
    LeafError
        If weights are NaN or infinite.

    Examples
    --------
    >>> import symflow
    >>> arch = symflow.mlp([3, 4, 2], "tanh")
    >>> w = torch.randn(arch.dimension, generator=torch.Generator().manual_seed(0))
    >>> g = arch.symmetry.random(generator=torch.Generator().manual_seed(1), like=w, batch=(5,))
    >>> torch.allclose(weight_average(symflow.Quotient(arch), [w, *arch.symmetry.act(g, w)]), w)
    True
    """
    w = a_set(quotient.arch, ws)
    aligned = quotient.align(w[..., :1, :], w).weights
    return quotient.project(aligned.mean(-2))
