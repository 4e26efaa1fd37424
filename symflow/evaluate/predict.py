"""Predictions, accuracy, loss and temperature of whole batches of classifiers."""

import math
from collections.abc import Iterator
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from symflow.arch import Architecture, Weights
from symflow.errors import ShapeError
from symflow.evaluate.weights import flat_weights
from symflow.numerics import tolerance

Split: TypeAlias = Literal["train", "test"]
Temperature: TypeAlias = "float | Tensor | None"

# So many activations of the widest layer are held at a time.
_ACTIVATIONS = 2**22
# A fitted temperature lies between the inverse of this and this.
_TEMPERATURES = 1000.0
_NEWTON_STEPS = 100


@runtime_checkable
class LabelledData(Protocol):
    """Inputs and classes, split into training and test examples; ``symflow.zoo.Task`` is one.

    Examples
    --------
    >>> import symflow
    >>> isinstance(symflow.zoo.breast_cancer(), LabelledData)
    True
    """

    @property
    def x_train(self) -> Tensor:
        """Training inputs (n, *features)."""
        ...

    @property
    def y_train(self) -> Tensor:
        """Training labels (n,)."""
        ...

    @property
    def x_test(self) -> Tensor:
        """Test inputs (m, *features)."""
        ...

    @property
    def y_test(self) -> Tensor:
        """Test labels (m,)."""
        ...


def probabilities(
    arch: Architecture,
    w: Weights,
    x: Float[Tensor, "n *features"],
    *,
    temperature: Temperature = None,
) -> Float[Tensor, "*batch n C"]:
    """Return the class probabilities of every network on the same inputs.

    Parameters
    ----------
    arch
        A classifier: outputs (n, C), read as logits.
    w
        Weights (*batch, D), state dicts or modules.
    x
        Inputs; taken to the dtype and device of the weights.
    temperature
        Logits are divided by it: one number, or one for each network (*batch,).

    Raises
    ------
    ShapeError
        If there is no network or no input, the outputs are not (n, C), or a temperature is not
        positive.
    LeafError
        If weights are NaN or infinite.

    Notes
    -----
    Without gradient, in pieces over networks and inputs: beside the result and the logits, memory
    does not grow with either.

    Examples
    --------
    >>> import symflow
    >>> arch = symflow.mlp([3, 4, 2])
    >>> probabilities(arch, torch.zeros(5, arch.dimension), torch.zeros(7, 3))[0, 0]
    tensor([0.5000, 0.5000])
    """
    flat, batch = networks(arch, w)
    one = temperatures(temperature, batch, flat)
    z = logits(arch, flat, x)
    return z.div_(one[:, None, None]).softmax(-1).reshape(*batch, *z.shape[1:])


def accuracy(
    arch: Architecture, w: Weights, task: LabelledData, split: Split = "test"
) -> Float[Tensor, "*batch"]:
    """Return the share of examples that each network classifies right.

    Errors and cost as :func:`loss`.

    Examples
    --------
    >>> import symflow
    >>> arch, task = symflow.mlp([30, 4, 2]), symflow.zoo.breast_cancer()
    >>> accuracy(arch, torch.zeros(5, arch.dimension), task).shape
    torch.Size([5])
    """
    flat, batch = networks(arch, w)
    x, y = examples(task, split)
    right = torch.zeros(len(flat), dtype=torch.float64)
    for nets, pieces in logits_by_network(arch, flat, x):
        for at, z in pieces:
            labels = labels_for(y[at], z)
            right[nets] += (z.argmax(-1) == labels).sum(-1).cpu()
    return (right / len(y)).to(flat).reshape(batch)


def loss(
    arch: Architecture,
    w: Weights,
    task: LabelledData,
    split: Split = "test",
    *,
    temperature: Temperature = None,
) -> Float[Tensor, "*batch"]:
    """Return the mean cross-entropy of each network, in nats.

    Parameters
    ----------
    arch
        A classifier: outputs (n, C), read as logits.
    w
        Weights (*batch, D), state dicts or modules.
    task
        Labelled data.
    split
        ``"train"`` or ``"test"``.
    temperature
        Logits are divided by it: one number, or one for each network (*batch,).

    Raises
    ------
    ShapeError
        If there is no network, the outputs do not fit the labels, or a temperature is not positive.
    LeafError
        If weights are NaN or infinite.

    Notes
    -----
    One forward pass for each network and example, summed in float64, without gradient; memory does
    not grow with their numbers.

    Examples
    --------
    >>> import symflow
    >>> arch, task = symflow.mlp([30, 4, 2]), symflow.zoo.breast_cancer()
    >>> loss(arch, torch.zeros(arch.dimension), task)   # log 2
    tensor(0.6931)
    """
    flat, batch = networks(arch, w)
    x, y = examples(task, split)
    one = temperatures(temperature, batch, flat)
    total = torch.zeros(len(flat), dtype=torch.float64)
    for nets, pieces in logits_by_network(arch, flat, x):
        for at, z in pieces:
            scaled = (z / one[nets, None, None]).movedim(-1, 1)
            labels = labels_for(y[at], z).expand(len(z), -1)
            total[nets] += F.cross_entropy(scaled, labels, reduction="none").double().sum(-1).cpu()
    return (total / len(y)).to(flat).reshape(batch)


def fit_temperature(
    arch: Architecture,
    w: Weights,
    task: LabelledData,
    split: Split = "train",
    *,
    shared: bool = False,
) -> Float[Tensor, "*batch"]:
    """Find the temperature by which dividing the logits makes the loss least (Guo et al., 2017).

    In the inverse temperature the loss is convex: Newton's method, safeguarded by bisection of a
    bracket.

    Parameters
    ----------
    arch, w, task
        As for :func:`loss`.
    split
        Whose loss; a temperature fitted on test data flatters.
    shared
        One temperature for all networks together (a scalar), or one for each (*batch,).

    Raises
    ------
    ShapeError, LeafError
        As :func:`loss`.

    Notes
    -----
    Between 1/1000 and 1000. A network that has every example right has a smaller loss at every
    smaller temperature, so that it gets the least; one that does worse than chance gets the
    largest. Each of ten to forty steps costs one pass over networks and examples.

    Examples
    --------
    >>> import symflow
    >>> arch, task = symflow.mlp([30, 4, 2]), symflow.zoo.breast_cancer()
    >>> zoo = symflow.zoo.train(arch, task, runs=2, epochs=3, progress=False)
    >>> t = fit_temperature(arch, zoo.final, task)
    >>> better = loss(arch, zoo.final, task, "train", temperature=t)
    >>> bool((better <= zoo.metrics["train_loss"]).all())
    True
    """
    flat, batch = networks(arch, w)
    x, y = examples(task, split)
    count = 1 if shared else len(flat)
    low = torch.full((count,), -math.log(_TEMPERATURES), dtype=torch.float64)
    high, log_scale = -low, torch.zeros_like(low)
    last = high - low
    for _ in range(_NEWTON_STEPS):
        slope, curvature = _derivatives(arch, flat, x, y, log_scale.exp().expand(len(flat)))
        if shared:
            slope, curvature = slope.sum(0, keepdim=True), curvature.sum(0, keepdim=True)
        low = torch.where(slope <= 0, log_scale, low)
        high = torch.where(slope <= 0, high, log_scale)
        newton = log_scale - slope / (curvature * log_scale.exp())
        # Bisect where Newton's method leaves the bracket (or the curvature vanishes), and where its
        # steps do not halve: without a minimum they would stay as long as they are.
        good = (newton >= low) & (newton <= high) & ((newton - log_scale).abs() <= last / 2)
        new = torch.where(good, newton, (low + high) / 2)
        new = torch.where(last <= tolerance(torch.float64).close, log_scale, new)  # found before
        last, log_scale = (new - log_scale).abs(), new
        if bool(last.max() <= tolerance(torch.float64).close):
            break
    found = (-log_scale).exp().to(flat)
    return found.reshape(()) if shared else found.reshape(batch)


# ---------------------------------------------------------------- what the other measures share


def networks(
    arch: Architecture, w: Weights, *, name: str = "w"
) -> tuple[Float[Tensor, "N D"], torch.Size]:
    """Return the weights as one batch, and the shape they had in front.

    Raises
    ------
    ShapeError
        If there is no network in them, or they are a zoo.
    LeafError
        If they are NaN or infinite.
    """
    flat = flat_weights(arch, w, name)
    batch = flat.shape[:-1]
    if batch.numel() == 0:
        raise ShapeError(f"{name} holds no network: its shape is {tuple(flat.shape)}")
    return flat.reshape(-1, flat.shape[-1]), batch


def examples(task: LabelledData, split: Split) -> tuple[Tensor, Tensor]:
    """Return inputs and labels of a split.

    Raises
    ------
    ShapeError
        If there is no such split, or inputs and labels do not fit.
    """
    if split not in ("train", "test"):
        raise ShapeError(f"split must be 'train' or 'test', got {split!r}")
    x, y = (task.x_train, task.y_train) if split == "train" else (task.x_test, task.y_test)
    if y.ndim != 1 or len(x) != len(y) or len(y) == 0 or y.is_floating_point():
        raise ShapeError(
            f"the {split} split must hold inputs (n, ...) and as many integer labels (n,), at "
            f"least one; got {tuple(x.shape)} and {y.dtype} of shape {tuple(y.shape)}"
        )
    return x, y


def temperatures(temperature: Temperature, batch: torch.Size, like: Tensor) -> Float[Tensor, " N"]:
    """Return one temperature for each network of a batch.

    Raises
    ------
    ShapeError
        If they do not broadcast to the batch, or one is not positive and finite.
    """
    value = torch.as_tensor(1.0 if temperature is None else temperature).to(like)
    if not bool(((value > 0) & value.isfinite()).all()):
        raise ShapeError("temperature must be positive and finite: logits are divided by it")
    try:
        return value.expand(batch).reshape(-1)
    except RuntimeError:
        raise ShapeError(
            f"temperature must be one number or have the batch shape {tuple(batch)}, got "
            f"{tuple(value.shape)}"
        ) from None


def labels_for(y: Tensor, outputs: Float[Tensor, "*shape C"]) -> Tensor:
    """Return labels on the device of the outputs.

    Raises
    ------
    ShapeError
        If one is no index of an output.
    """
    classes = outputs.shape[-1]
    if bool((y < 0).any()) or bool((y >= classes).any()):
        raise ShapeError(
            f"labels must be from 0 to {classes - 1}, one for each of {classes} outputs; got "
            f"labels from {int(y.min())} to {int(y.max())}"
        )
    return y.to(outputs.device)


Pieces: TypeAlias = Iterator[tuple[slice, Tensor]]


def logits(arch: Architecture, flat: Float[Tensor, "N D"], x: Tensor) -> Float[Tensor, "N n C"]:
    """Return the outputs of every network on every input.

    Raises
    ------
    ShapeError
        As :func:`logits_by_network`.
    """
    groups = logits_by_network(arch, flat, x)
    return torch.cat([torch.cat([z for _, z in pieces], dim=1) for _, pieces in groups])


def inputs_for(arch: Architecture, x: Tensor) -> Tensor:
    """Give examples that are stored flat, such as images, the shape the network was made for.

    Raises
    ------
    ShapeError
        If there are none.
    """
    if len(x) == 0:
        raise ShapeError("x holds no inputs: at least one is needed")
    made_for = arch.inputs[0]
    if isinstance(made_for, Tensor) and x[0].numel() == made_for[0].numel():
        x = x.reshape(-1, *made_for.shape[1:])
    return x


def at_once(units: int, n: int) -> tuple[int, int]:
    """Return how many networks of a width, and how many of ``n`` inputs, are run at once."""
    pairs = max(1, _ACTIVATIONS // max(units, 1))
    step = max(1, pairs // n)
    return step, max(1, pairs // step)


def logits_by_network(
    arch: Architecture, flat: Float[Tensor, "N D"], x: Tensor
) -> Iterator[tuple[slice, Pieces]]:
    """Yield groups of networks, each with the logits (group, piece, C) on pieces of the inputs.

    Refuses as :func:`inputs_for`, and networks that do not make (n, C) numbers of n inputs.
    """
    x = inputs_for(arch, x)
    units = max(leaf.shape[0] for leaf in arch.leaves if leaf.shape)
    step, size = at_once(units, len(x))
    for start in range(0, len(flat), step):
        group = slice(start, min(start + step, len(flat)))
        yield group, _logits(arch, flat[group], x, size)


@torch.no_grad()
def _logits(arch: Architecture, w: Tensor, x: Tensor, step: int) -> Pieces:
    for start in range(0, len(x), step):
        at = slice(start, min(start + step, len(x)))
        try:
            z = arch.apply(w, x[at].to(w, copy=True))  # a first step may be in place
        except RuntimeError as error:
            shapes = [tuple(i.shape[1:]) for i in arch.inputs if isinstance(i, Tensor)]
            raise ShapeError(
                f"the network does not run on inputs of shape {tuple(x.shape[1:])}: it was made "
                f"for {', '.join(map(str, shapes))} ({error})"
            ) from error
        if z.ndim != 3 or z.shape[1] != at.stop - at.start:
            raise ShapeError(
                "a classifier is needed, with outputs (n, C) for n inputs; this network gives "
                f"{tuple(z.shape[1:])} for {at.stop - at.start}"
            )
        yield at, z


def _derivatives(
    arch: Architecture, flat: Tensor, x: Tensor, y: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """First and second derivative of each network's summed loss by its inverse temperature.

    They are sum_x E_p (z - z_y) and sum_x Var_p z, with p = softmax(scale z). On an example that is
    right every term of the former is negative: rounding cannot make a minimum where there is none.
    """
    slope, curvature = torch.zeros(2, len(flat), dtype=torch.float64)
    for nets, pieces in logits_by_network(arch, flat, x):
        for at, z in pieces:
            labels = labels_for(y[at], z).expand(len(z), -1)[..., None]
            z = z.double()
            p = (z * scale[nets, None, None].to(z)).softmax(-1)
            excess = z - z.gather(-1, labels)
            mean = (p * excess).sum(-1, keepdim=True)
            slope[nets] += mean.sum((-2, -1)).cpu()
            curvature[nets] += (p * (excess - mean).square()).sum((-2, -1)).cpu()
    return slope, curvature
