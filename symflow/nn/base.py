"""What a vector field on weight space is: equivariant, in time, and honest about its symmetry."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from symflow.arch import Architecture, Symmetry
from symflow.errors import EquivarianceError, ShapeError
from symflow.groups import (
    CompactProduct,
    Group,
    NoncompactProduct,
    Permutation,
    PermutingGroup,
    Trivial,
)
from symflow.numerics import tolerance


class VectorField(nn.Module, ABC):
    """A function of weights and time that commutes with the symmetries of an architecture.

    What it returns is a point (a prediction of the end of the path) or a velocity: the flow that
    trains it decides. Subclasses implement :meth:`forward`, declare in ``symmetry`` what they
    commute with, and may look at the weights through :meth:`standardised`.

    Parameters
    ----------
    arch
        The architecture whose weights it moves.
    symmetry
        What the field commutes with: a group for each axis.
    extra
        Number of further coordinates behind the D weights that no symmetry moves, such as a
        log-temperature.
    groups
        ``"permutation"`` accepts a field that respects less than the compact symmetry of ``arch``.

    Raises
    ------
    EquivarianceError
        If ``arch`` has more compact symmetry than the field and ``groups`` does not accept that.
        Non-compact symmetries (positive scales) are no matter of the field: a section removes them.
    """

    shift: Tensor
    scale: Tensor
    _leaf_of: Tensor

    def __init__(
        self,
        arch: Architecture,
        symmetry: Symmetry,
        *,
        extra: int = 0,
        groups: str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        if extra < 0:
            raise ShapeError(f"extra must be a number of coordinates, 0 or more, got {extra}")
        if groups not in (None, "permutation"):
            raise ShapeError(f"groups must be None or 'permutation', got {groups!r}")
        self.arch = arch
        self.extra = extra
        self.symmetry = symmetry
        self.groups = groups
        if groups is None:
            self.require_equivariance(arch.symmetry)
        size = arch.dimension + extra
        self.register_buffer("shift", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))
        leaf_of = [torch.full((leaf.size,), k) for k, leaf in enumerate(arch.leaves)]
        leaf_of.append(torch.arange(extra) + len(arch.leaves))
        self.register_buffer("_leaf_of", torch.cat(leaf_of), persistent=False)

    def training_bytes(self, batch_size: int) -> int:
        """Return about how much memory one step of training takes, before it is run.

        What is kept for the way back is counted on batches of one and of two networks, and grows in
        proportion; parameters are counted five times (gradient, running average, two moments). Not
        counted are temporary buffers, such as the largest product, and a behaviour loss.

        Parameters
        ----------
        batch_size
            Networks in a batch.

        Returns
        -------
        int
            Bytes.

        Raises
        ------
        ShapeError
            If ``batch_size`` is not positive.

        Examples
        --------
        >>> import symflow
        >>> field = symflow.nn.RelationalTransformer(symflow.mlp([30, 16, 16, 2]), width=16)
        >>> small, large = field.training_bytes(32), field.training_bytes(64)
        >>> 1.5 < large / small < 2
        True
        """
        if batch_size < 1:
            raise ShapeError(f"batch_size must be at least 1, got {batch_size}")
        one, two = (self._kept(n) for n in (1, 2))
        own = sum(p.numel() * p.element_size() for p in self.parameters())
        return 5 * own + max(0, one + (batch_size - 1) * (two - one))

    def _kept(self, n: int) -> int:
        """Return how many bytes are kept for the way back from n networks."""
        known = {p.untyped_storage().data_ptr() for p in (*self.parameters(), *self.buffers())}
        kept: dict[int, int] = {}

        def count(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
            return x

        x = self.shift.expand(n, -1).clone()
        t = torch.full((n,), 0.5).to(x)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            self(x, t)
        return sum(kept.values())

    @abstractmethod
    def forward(
        self, x: Float[Tensor, "B size"], t: Float[Tensor, " B"]
    ) -> Float[Tensor, "B size"]:
        """Evaluate the field.

        Parameters
        ----------
        x
            Weights and extra coordinates (B, D + extra).
        t
            One time for each of them, in [0, 1].

        Returns
        -------
        Tensor
            As ``x``; moves along when a symmetry moves ``x``.
        """

    def require_equivariance(self, symmetry: Symmetry) -> None:
        """Check that the field respects the compact part of a symmetry.

        Raises
        ------
        EquivarianceError
            If a group is not contained in the one the field declares on that axis.
        """
        for axis in symmetry.compact.axes:
            own = self.symmetry[axis.name].group
            if not contains(own, axis.group):
                raise EquivarianceError(
                    f"{type(self).__name__} commutes with {own} on axis {axis.name}, but the "
                    f"architecture has {axis.group} there. Pass groups='permutation' to accept a "
                    "field that respects the permutations alone, or use one that declares more"
                )

    def standardise(self, samples: Float[Tensor, "n *size"]) -> "VectorField":
        """Set the units in which the field sees weights: mean 0 and variance 1 for each leaf.

        Parameters
        ----------
        samples
            Typical points (n, D + extra), or weights alone (n, D); the extra coordinates are then
            left as they are. One mean and deviation for each leaf keep the field equivariant.

        Examples
        --------
        >>> import symflow, torch
        >>> arch = symflow.mlp([3, 4, 2])
        >>> field = symflow.nn.RelationalTransformer(arch, width=8, depth=1, heads=1)
        >>> field = field.standardise(2 + 3 * torch.randn(1000, arch.dimension))
        >>> field.shift[0].round().item(), field.scale[0].round().item()
        (2.0, 3.0)
        """
        size = samples.shape[-1]
        if size not in (self.arch.dimension, self.arch.dimension + self.extra):
            raise ShapeError(
                f"samples must have D = {self.arch.dimension} coordinates, or {self.extra} more, "
                f"got shape {tuple(samples.shape)}"
            )
        leaf_of = self._leaf_of[:size]
        with torch.no_grad():
            flat = samples.detach().reshape(-1, size).to(leaf_of.device, torch.float64)
            mean = _leaf_mean(flat.mean(0), leaf_of)
            deviation = _leaf_mean((flat - mean).square().mean(0), leaf_of).sqrt()
            # A leaf that never varies (a fresh gain of one) is only moved to zero.
            varies = deviation > tolerance(samples.dtype).eps * mean.abs()
            self.shift[:size] = mean.to(self.shift)
            self.scale[:size] = torch.where(varies, deviation, 1.0).to(self.scale)
        return self

    def standardised(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        """Return a point in the units that :meth:`standardise` has set."""
        return (x - self.shift) / self.scale

    def require_point(self, x: Tensor, t: Tensor) -> None:
        """Check the shapes of what :meth:`forward` takes.

        Raises
        ------
        ShapeError
            If ``x`` is not (B, D + extra) or ``t`` not (B,).
        """
        size = self.arch.dimension + self.extra
        if x.ndim != 2 or x.shape[1] != size or t.shape != x.shape[:1]:
            raise ShapeError(
                f"x must be (B, D + extra = {size}) and t (B,), got {tuple(x.shape)} and "
                f"{tuple(t.shape)}"
            )


class ConditionalField(VectorField, ABC):
    """A field that may be told something about the networks it makes: a condition for each.

    Attributes
    ----------
    conditions
        How many numbers a condition has; 0 for a field that takes none.
    """

    conditions: int = 0

    @abstractmethod
    def forward(
        self,
        x: Float[Tensor, "B size"],
        t: Float[Tensor, " B"],
        condition: Float[Tensor, "B k"] | None = None,
        keep: Bool[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B size"]:
        """Evaluate the field.

        Parameters
        ----------
        x
            Weights and extra coordinates (B, D + extra).
        t
            One time for each of them, in [0, 1].
        condition
            One condition for each of them, which no symmetry moves; None for the field without.
        keep
            Where False, the condition is left out: the field is the one without.

        Returns
        -------
        Tensor
            As ``x``; moves along when a symmetry moves ``x``.
        """

    @abstractmethod
    def standardise_conditions(self, samples: Float[Tensor, "n k"]) -> "ConditionalField":
        """Set the units in which the field sees conditions: mean 0 and variance 1 for each."""

    def require_condition(self, x: Tensor, condition: Tensor | None) -> None:
        """Check the shape of the condition that :meth:`forward` takes.

        Raises
        ------
        ShapeError
            If it is not (B, conditions).
        """
        wanted = (len(x), self.conditions)
        if condition is not None and (self.conditions == 0 or condition.shape != wanted):
            raise ShapeError(
                f"condition must be (B, conditions) = {wanted}, got {tuple(condition.shape)}: how "
                "many numbers it has is the field's option conditions="
            )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Initialise modules from their own seed and leave the global generator as it was.

    Graphs may lack a kind of number (no biases, say); the maps for it have zero elements, which
    PyTorch warns of.

    Examples
    --------
    >>> with seeded(0):
    ...     a = torch.rand(1)
    >>> with seeded(0):
    ...     torch.equal(a, torch.rand(1))
    True
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        torch.manual_seed(seed)
        yield


def permutations(symmetry: Symmetry) -> Symmetry:
    """Return the permutations of every axis on which a compact group acts.

    Examples
    --------
    >>> import symflow
    >>> permutations(symflow.mlp([3, 4, 2], "tanh").symmetry)["h1"].group
    Permutation(size=4)
    """
    axes = tuple(
        axis if isinstance(axis.group, Trivial) else replace(axis, group=Permutation(axis.size))
        for axis in symmetry.compact.axes
    )
    return replace(symmetry, axes=axes)


def contains(outer: Group[Any], inner: Group[Any]) -> bool:
    """Whether each factor of ``inner`` is a subgroup of a factor of ``outer``.

    Examples
    --------
    >>> from symflow import Permutation, Sign
    >>> contains(Permutation(3) @ Sign(3), Permutation(3)), contains(Permutation(3), Sign(3))
    (True, False)
    """
    parts = _factors(outer)
    return all(
        isinstance(factor, Trivial)
        or factor in parts
        or (isinstance(factor, PermutingGroup) and Permutation(factor.size) in parts)
        for factor in _factors(inner)
    )


def _factors(group: Group[Any]) -> tuple[Group[Any], ...]:
    if isinstance(group, CompactProduct | NoncompactProduct):
        return (*_factors(group.outer), *_factors(group.inner))
    return (group,)


def _leaf_mean(v: Tensor, leaf_of: Tensor) -> Tensor:
    """Mean over the coordinates of each leaf, spread over them again."""
    count = torch.bincount(leaf_of).to(v)
    total = torch.zeros_like(count).index_add_(0, leaf_of, v)
    return (total / count)[leaf_of]
