"""What a section is: one point on each orbit of the non-compact symmetries."""

import math
import warnings
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from symflow.arch import Architecture, Leaf, Shifts, Symmetry, scale_coordinates
from symflow.errors import DeadNeuronWarning, LeafError
from symflow.groups import NoncompactGroup, ScalingGroup
from symflow.numerics import tolerance

if TYPE_CHECKING:
    from symflow.manifolds import WeightManifold


class Section(ABC):
    """A map from weights to a chosen point of their non-compact orbit.

    Attributes
    ----------
    arch
        The architecture.
    symmetry
        The compact group that still acts on the section, by isometries.
    manifold
        The space of the chosen points, with its metric.
    state_manifold
        The space of points with their removed coordinates appended (D + E): what a flow moves in.
    shifts
        The translations that it takes away, too, if any.
    """

    arch: Architecture
    symmetry: Symmetry
    manifold: "WeightManifold"
    state_manifold: "WeightManifold"
    shifts: Shifts | None = None

    @abstractmethod
    def split(
        self, w: Float[Tensor, "*#batch D"]
    ) -> tuple[Float[Tensor, "*#batch D"], Float[Tensor, "*#batch E"]]:
        """Return the point of the section and the removed coordinates that change the function.

        The latter are empty (E = 0) for sections that preserve the function; where a class of
        functions is quotiented out (one positive factor of all logits) they are its logarithms.

        Raises
        ------
        LeafError
            If the dtype of the weights cannot represent the point.
        """

    @abstractmethod
    def join(
        self, x: Float[Tensor, "*#batch D"], removed: Float[Tensor, "*#batch E"]
    ) -> Float[Tensor, "*#batch D"]:
        """Return weights with the function that :meth:`split` took apart."""

    def project(self, w: Float[Tensor, "*#batch D"]) -> Float[Tensor, "*#batch D"]:
        """Return the point of the section; idempotent, and constant on orbits."""
        return self.split(w)[0]


def is_moderate(scales: Tensor, dtype: torch.dtype) -> bool:
    """Whether weights can be scaled by these, and by their small powers, in their own format.

    Examples
    --------
    >>> is_moderate(torch.tensor([0.5, 2.0]), torch.float32)
    True
    >>> is_moderate(torch.tensor([1e-25]), torch.float32)
    False
    """
    eps, scales = tolerance(dtype).eps, scales.detach()
    return bool(((scales >= eps) & (scales <= 1 / eps)).all())


def require_finite(arch: Architecture, x: Float[Tensor, "*#batch D"]) -> None:
    """Refuse a point that is not finite.

    Raises
    ------
    LeafError
        If a coordinate is infinite or no number; it names the first such leaf.
    """
    if bool(x.detach().isfinite().all()):
        return
    bad = [leaf.name for leaf in arch.leaves if not x.detach()[..., leaf.span].isfinite().all()]
    raise LeafError(
        f"w: leaf {bad[0]!r} of its point on the section is not finite: w holds NaN or infinite "
        f"values, or its scales are so far apart that {x.dtype} cannot represent the point. Leave "
        "the network out, or convert it to float64 if it is not"
    )


def scaled_axes(arch: Architecture) -> list[str]:
    """Names of the axes on which units are scaled, from input to output.

    Examples
    --------
    >>> import symflow
    >>> scaled_axes(symflow.mlp([2, 3, 3, 1])), scaled_axes(symflow.mlp([2, 3, 1], "tanh"))
    (['h1', 'h2'], [])
    """
    return [a.name for a in arch.axes if isinstance(a.group, ScalingGroup)]


def uncompensated_axes(arch: Architecture) -> list[str]:
    """Names of scaled axes whose learnable weights all grow together: there is nothing to balance.

    Such are the scales of what stands before a BatchNorm (``preserves="limit"``), and of units that
    nothing reads.

    Examples
    --------
    >>> import symflow
    >>> uncompensated_axes(symflow.mlp([2, 3, 1]))
    []
    """
    sides = {
        (dim.axis, dim.degree > 0)
        for leaf in arch.leaves
        for dim in leaf.dims
        if leaf.learnable and dim.degree
    }
    scaled = scaled_axes(arch)
    return [name for name in scaled if (name, True) in sides and (name, False) not in sides]


def mixed_axes(arch: Architecture) -> list[str]:
    """Names of the axes on which a non-compact group mixes units.

    Examples
    --------
    >>> import symflow
    >>> mixed_axes(symflow.mlp([3, 2, 2], "identity"))
    ['h1']
    """
    return [
        a.name
        for a in arch.axes
        if isinstance(a.group, NoncompactGroup) and not isinstance(a.group, ScalingGroup)
    ]


def noncompact_axes(arch: Architecture) -> list[str]:
    """Names of the axes whose group has unbounded orbits: a section has to choose points there.

    Examples
    --------
    >>> import symflow
    >>> noncompact_axes(symflow.mlp([2, 3, 1])), noncompact_axes(symflow.mlp([2, 3, 1], "tanh"))
    (['h1'], [])
    """
    return [a.name for a in arch.axes if isinstance(a.group, NoncompactGroup)]


def unit_shape(arch: Architecture, axis: str) -> tuple[int, ...]:
    """Shape of values of the units of an axis: (n,), or (m, n) for an axis over another one's m.

    Examples
    --------
    >>> import symflow
    >>> unit_shape(symflow.mlp([2, 3, 1]), "h1")
    (3,)
    """
    found = arch.symmetry[axis]
    outer = () if found.over is None else (arch.symmetry[found.over].size,)
    return (*outer, found.size)


def by_unit(leaf: Leaf, k: int, x: Tensor) -> Shaped[Tensor, "*batch units rest"]:
    """View a leaf (*batch, *leaf.shape) by the units of dimension ``k``, those of all it is over.

    Examples
    --------
    >>> import symflow
    >>> leaf = symflow.mlp([2, 3, 1]).leaves[0]
    >>> by_unit(leaf, 1, torch.arange(6).reshape(3, 2))
    tensor([[0, 2, 4],
            [1, 3, 5]])
    """
    front, within = x.ndim - len(leaf.dims), leaf.dims[k].within
    units = [k] if within is None else [within, k]
    moved = x.movedim([front + j for j in units], list(range(front, front + len(units))))
    n = moved.shape[front : front + len(units)].numel()
    return moved.reshape(*moved.shape[:front], n, leaf.size // n)


def unit_coordinates(arch: Architecture, axis: str, degree: int) -> Int[Tensor, "n d"]:
    """Return the learnable coordinates that each unit of an axis carries with a degree.

    Units of an axis over another one are counted for each unit of that one.

    Examples
    --------
    >>> import symflow
    >>> unit_coordinates(symflow.mlp([2, 3, 1]), "h1", 1)  # incoming rows, then the bias
    tensor([[0, 1, 6],
            [2, 3, 7],
            [4, 5, 8]])
    """
    parts = [torch.zeros(math.prod(unit_shape(arch, axis)), 0, dtype=torch.long)]
    for leaf in arch.leaves:
        if not leaf.learnable:
            continue
        index = torch.arange(leaf.offset, leaf.offset + leaf.size).reshape(leaf.shape)
        for k, dim in enumerate(leaf.dims):
            if dim.axis == axis and dim.degree == degree:
                parts.append(by_unit(leaf, k, index))
    return torch.cat(parts, dim=1)


def rescale(
    arch: Architecture,
    w: Float[Tensor, "*#batch D"],
    scales: dict[str, Tensor],
    alive: dict[str, Tensor],
) -> Float[Tensor, "*#batch D"]:
    """Scale units, and put those that are not alive to zero: the limit of their orbit.

    Both have one value for each unit (*batch, units), counted as :func:`unit_coordinates` does.
    A unit that receives nothing or sends nothing has no balanced point: its orbit runs towards
    zero, where incoming and outgoing weights are both zero and the function is the same.
    """
    scales = {k: v.unflatten(-1, unit_shape(arch, k)) for k, v in scales.items()}
    alive = {k: v.unflatten(-1, unit_shape(arch, k)) for k, v in alive.items()}
    factors = scale_coordinates(arch.leaves, scales)
    moved = w if factors is None else w * factors.to(w.dtype)
    dead = sum(int((~a).sum()) for a in alive.values())
    if not dead:
        return moved
    warnings.warn(DeadNeuronWarning(dead), stacklevel=4)
    keep = scale_coordinates(
        arch.leaves, {k: a.to(w.dtype) for k, a in alive.items()}, absolute=True
    )
    return moved if keep is None else moved * keep
