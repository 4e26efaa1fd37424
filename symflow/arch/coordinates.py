"""Weights of a first linear map in the principal directions of what it is applied to."""

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from symflow.arch.architecture import Architecture
from symflow.arch.mlp import from_config
from symflow.errors import ShapeError, UnsupportedModuleError
from symflow.numerics import tolerance

_ROWS = 4096  # inputs taken to float64 at once


@final
@dataclass(frozen=True, eq=False)
class InputCoordinates:
    """The chart in which Euclidean distances of first-layer weights are distances of functions.

    A first map W x + b sees inputs of mean m and covariance S = U diag(s)^2 U'. With z = (U'(x -
    m)) / s, cut off after the ``rank`` directions of greatest variance, it is C z + b' with C = W U
    diag(s) and b' = b + W m. Entries of z are uncorrelated with mean 0 and variance 1, so |dC|^2 +
    |db'|^2 is the mean square of what a change of the weights does to the units' inputs:
    coordinates that no input excites do not count, and the incoming norm of a unit is the root mean
    square of its pre-activation. Without a bias, m = 0 and S is the second moment.

    Make it with :meth:`of_inputs`.

    Attributes
    ----------
    outer
        The architecture.
    arch
        Its twin on z: the same network with ``rank`` inputs. Sections, alignment and fields work on
        it as on any other.
    mean, directions, deviations
        m (n,), U (n, rank), s (rank,). They are data, not parameters of a model.

    Examples
    --------
    >>> import symflow
    >>> arch = symflow.mlp([20, 8, 3])
    >>> generator = torch.Generator().manual_seed(0)
    >>> x = torch.randn(100, 4, generator=generator) @ torch.randn(4, 20, generator=generator)
    >>> chart = InputCoordinates.of_inputs(arch, x, rank=4)
    >>> w = torch.randn(5, arch.dimension, generator=generator)
    >>> there = chart.arch.apply(chart.encode(w), chart.features(x))
    >>> torch.allclose(arch.apply(w, x), there, atol=1e-4), chart.arch.dimension
    (True, 67)
    """

    outer: Architecture
    arch: Architecture
    mean: Float[Tensor, " n"]
    directions: Float[Tensor, "n rank"]
    deviations: Float[Tensor, " rank"]

    @staticmethod
    def of_inputs(
        arch: Architecture, inputs: Float[Tensor, "m *n"], *, rank: int | None = None
    ) -> "InputCoordinates":
        """Find the principal directions of inputs; costs one product X'X in float64.

        Parameters
        ----------
        arch
            An ``nn.Sequential`` (or :func:`symflow.mlp`) whose first layer with weights is
            ``nn.Linear``, behind nothing but ``nn.Flatten``.
        inputs
            Training inputs; other dimensions than the first are flattened.
        rank
            How many directions to keep. By default all that the inputs excite.

        Raises
        ------
        UnsupportedModuleError
            If the network does not begin with a linear map.
        ShapeError
            If the inputs do not fit, are not finite, or excite fewer than ``rank`` directions.
        """
        path, linear = _first_linear(arch)
        bias, n = _has_bias(arch, path), linear.in_features
        if inputs.ndim < 2 or inputs[0].numel() != n or not bool(inputs.isfinite().all()):
            raise ShapeError(
                f"inputs must be finite inputs of the network, (m, {n}) when flattened, got shape "
                f"{tuple(inputs.shape)}: pass task.x_train"
            )
        x = inputs.detach().flatten(1)
        mean = x.to(torch.float64).mean(0) if bias else torch.zeros(n, dtype=torch.float64)
        second = torch.zeros(n, n, dtype=torch.float64)
        for part in x.split(_ROWS):
            centred = part.to(torch.float64) - mean
            second.addmm_(centred.T, centred, alpha=1 / len(x))
        values, vectors = torch.linalg.eigh(second)
        values, vectors = values.flip(0), vectors.flip(1)
        excited = int((values > n * tolerance(torch.float64).eps * values[0]).sum())
        rank = excited if rank is None else rank
        if not 1 <= rank <= excited:
            raise ShapeError(
                f"rank must be from 1 to {excited}, the number of directions that "
                f"these inputs excite, got {rank}"
            )
        # An eigenvector's sign is arbitrary: the same on every machine.
        top = vectors.abs().argmax(0, keepdim=True)
        vectors = vectors * vectors.gather(0, top).sign()
        deviations = values[:rank].sqrt()
        return InputCoordinates.of_tensors(arch, mean, vectors[:, :rank].contiguous(), deviations)

    @staticmethod
    def of_tensors(
        arch: Architecture, mean: Tensor, directions: Tensor, deviations: Tensor
    ) -> "InputCoordinates":
        """Make it from stored tensors."""
        return InputCoordinates(
            arch, _with_inputs(arch, len(deviations)), mean, directions, deviations
        )

    @property
    def rank(self) -> int:
        """Number of directions kept."""
        return len(self.deviations)

    def features(self, x: Float[Tensor, "m *n"]) -> Float[Tensor, "m rank"]:
        """Return z, what the twin takes where the network takes ``x``."""
        flat = x.flatten(1)
        return (flat - self.mean.to(flat)) @ (self.directions / self.deviations).to(flat)

    def encode(self, w: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch R"]:
        """Return the twin's weights; what the kept directions do not see is dropped."""
        parts = self._split(w, self.outer)
        first = parts[self._names[0]].unflatten(-1, (-1, len(self.mean)))
        parts[self._names[0]] = (first @ (self.directions * self.deviations).to(w)).flatten(-2)
        if self._names[1]:
            parts[self._names[1]] = parts[self._names[1]] + first @ self.mean.to(w)
        return torch.cat([parts[leaf.name] for leaf in self.arch.leaves], dim=-1)

    def decode(self, c: Float[Tensor, "*batch R"]) -> Float[Tensor, "*batch D"]:
        """Return the weights of least norm whose function on the kept directions is the twin's."""
        parts = self._split(c, self.arch)
        small = parts[self._names[0]].unflatten(-1, (-1, self.rank))
        first = small @ (self.directions / self.deviations).to(c).mT
        parts[self._names[0]] = first.flatten(-2)
        if self._names[1]:
            parts[self._names[1]] = parts[self._names[1]] - first @ self.mean.to(c)
        return torch.cat([parts[leaf.name] for leaf in self.outer.leaves], dim=-1)

    def tensors(self) -> dict[str, Tensor]:
        """Return what :meth:`of_tensors` takes."""
        return {
            "mean": self.mean,
            "directions": self.directions,
            "deviations": self.deviations,
        }

    @cached_property
    def _names(self) -> tuple[str, str]:
        """Names of the first map's weight and bias (empty without one)."""
        path, _ = _first_linear(self.outer)
        return f"{path}.weight", f"{path}.bias" if _has_bias(self.outer, path) else ""

    @staticmethod
    def _split(w: Tensor, arch: Architecture) -> dict[str, Tensor]:
        return {leaf.name: w[..., leaf.span] for leaf in arch.leaves}


def _first_linear(arch: Architecture) -> tuple[str, nn.Linear]:
    """Find the first map and its path."""
    if isinstance(arch.module, nn.Sequential):
        for path, layer in arch.module.named_children():
            if isinstance(layer, nn.Linear):
                return path, layer
            if not isinstance(layer, nn.Flatten | nn.Identity):
                break
    raise UnsupportedModuleError(
        "coordinates of the inputs are for networks that begin with a linear map: an "
        f"nn.Sequential whose first layer is nn.Linear or nn.Flatten, got {arch!r}"
    )


def _has_bias(arch: Architecture, path: str) -> bool:
    return any(leaf.name == f"{path}.bias" for leaf in arch.leaves)


def _with_inputs(arch: Architecture, rank: int) -> Architecture:
    """Return the same network for ``rank`` inputs."""
    if arch.config is not None and arch.config.get("kind") == "mlp":
        return from_config({**arch.config, "widths": [rank, *arch.config["widths"][1:]]})
    path, linear = _first_linear(arch)
    module: Any = copy.deepcopy(arch.module)
    kept = linear.weight
    first = nn.Linear(
        rank,
        linear.out_features,
        bias=_has_bias(arch, path),
        device=kept.device,
        dtype=kept.dtype,
    )
    # Leaves that need no gradient among others that do would be taken for frozen ones.
    setattr(module, path, first.requires_grad_(kept.requires_grad))
    inner = Architecture.from_module(module, torch.zeros(2, rank, dtype=kept.dtype))
    chosen = {
        axis.name: axis.group
        for axis in arch.axes
        if axis.reason == "chosen by the user" and axis.name in {a.name for a in inner.axes}
    }
    return inner.with_groups(chosen) if chosen else inner
