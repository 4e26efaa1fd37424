"""How differently the networks of a set predict."""

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.arch import Architecture, Weights
from symflow.evaluate.predict import LabelledData, Split, Temperature, examples
from symflow.evaluate.sets import a_set, log_mean, log_probabilities


def diversity(
    arch: Architecture,
    ws: Weights,
    task: LabelledData,
    split: Split = "test",
    *,
    temperature: Temperature = None,
) -> Float[Tensor, "*batch"]:
    r"""Return the Jensen-Shannon divergence of the networks' predictions, mean over examples.

    :math:`\mathbb E_x [ H(\tfrac1N \sum_n p_n(\cdot | x)) - \tfrac1N \sum_n H(p_n(\cdot | x)) ]`
    in nats (Lin, 1991): 0 if all networks agree, at most log min(N, C). It is the mutual
    information of the class and which network was asked.

    Parameters
    ----------
    arch
        A classifier.
    ws
        Sets of networks (*batch, N, D).
    task
        Labelled data; labels are not used.
    split
        ``"train"`` or ``"test"``.
    temperature
        As for :func:`~symflow.evaluate.loss`.

    Raises
    ------
    ShapeError
        If ``ws`` is a single network or no network, or a temperature is not positive.
    LeafError
        If weights are NaN or infinite.

    Notes
    -----
    In float64; one forward pass for each network and example, in pieces over the examples.

    Examples
    --------
    >>> import symflow
    >>> arch, task = symflow.mlp([30, 4, 2]), symflow.zoo.breast_cancer()
    >>> diversity(arch, torch.ones(3, arch.dimension), task)
    tensor(0.)
    """
    w = a_set(arch, ws)
    x, _ = examples(task, split)
    total = torch.zeros(w.shape[:-2], dtype=torch.float64, device=w.device)
    for _, log_p in log_probabilities(arch, w, x, temperature):
        excess = entropy(log_mean(log_p)) - entropy(log_p).mean(-2)
        # Rounding must not make agreement a negative number.
        total += excess.clamp_min(0).sum(-1)
    return (total / len(x)).to(w.dtype)


def entropy(log_p: Float[Tensor, "*shape C"]) -> Float[Tensor, "*shape"]:
    """Entropy in nats of distributions that are given by their logarithms.

    Examples
    --------
    >>> entropy(torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log())
    tensor([0.3251, 0.6931])
    """
    return -(log_p.exp() * log_p).sum(-1)
