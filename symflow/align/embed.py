"""Networks of different widths: a narrow one put into a wide one."""

from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from symflow.align.base import Aligner, Alignment
from symflow.align.weight_matching import WeightMatching
from symflow.arch import Architecture, Element, Leaf
from symflow.errors import ShapeError, SymmetryError
from symflow.groups import invert, monomial
from symflow.numerics import tolerance


@final
@dataclass(frozen=True, eq=False)
class Embedding:
    """A narrow network at the width of a wide one, next to it.

    Attributes
    ----------
    weights
        The narrow network, padded with units that are zero and aligned (*batch, D of the wide one).
    units
        For each axis, which wide unit each narrow one lies at (*batch, n of the narrow one).
    alignment
        How the padded network was aligned.

    Examples
    --------
    >>> import symflow
    >>> narrow, wide = symflow.mlp([2, 2, 1], "gelu"), symflow.mlp([2, 3, 1], "gelu")
    >>> w0 = torch.arange(13.0)
    >>> embed_narrow(narrow, wide, torch.tensor([4.0, 5, 2, 3, 8, 7, 11, 10, 12]), w0).units["h1"]
    tensor([2, 1])
    """

    weights: Float[Tensor, "*#batch D"]
    units: dict[str, Int[Tensor, "*#batch n"]]
    alignment: Alignment


def widen(
    narrow: Architecture, wide: Architecture, w: Float[Tensor, "*batch d"]
) -> Float[Tensor, "*batch D"]:
    """Pad a narrow network with units that neither receive nor give, to the width of a wide one.

    Its function stays, as is tried on inputs of the shape of the example's.

    Parameters
    ----------
    narrow, wide
        Architectures with the same leaves over the same axes, none of which is narrower in
        ``wide``; all dimensions without an axis are equal.
    w
        Weights of the narrow one.

    Raises
    ------
    ShapeError
        If the architectures differ by more than the width of their axes.
    SymmetryError
        If the function changes, as where a normalisation averages over the units of an axis.

    Examples
    --------
    >>> import symflow
    >>> narrow, wide = symflow.mlp([1, 1, 1]), symflow.mlp([1, 2, 1])
    >>> widen(narrow, wide, torch.tensor([1.0, 2, 3, 4]))
    tensor([1., 0., 2., 0., 3., 0., 4.])
    """
    _check_alike(narrow, wide)
    batch = w.shape[:-1]
    fresh = wide.module.state_dict()
    pieces: list[Tensor] = []
    for small, big in zip(narrow.leaves, wide.leaves, strict=True):
        x = w[..., small.span].reshape(*batch, *small.shape)
        # Units that are not there have the statistics of a fresh network: no variance is zero.
        target = big.of(fresh[big.key]).to(w) if not big.learnable else w.new_zeros(big.shape)
        target = target.expand(*batch, *big.shape).clone()
        view = target
        for k, n in enumerate(small.shape):
            view = view.narrow(len(batch) + k, 0, n)
        view.copy_(x)
        pieces.append(target.reshape(*batch, big.size))
    padded = torch.cat(pieces, dim=-1)
    _check_function(narrow, wide, w, padded)
    return padded


def embed_narrow(
    narrow: Architecture,
    wide: Architecture,
    w_narrow: Float[Tensor, "*#batch d"],
    w_wide: Float[Tensor, "*#batch D"],
    *,
    aligner: Aligner | None = None,
) -> Embedding:
    """Put a narrow network into the weight space of a wide one, as near to that as can be found.

    It is padded with units that are zero (:func:`widen`) and aligned. Units that are zero cost
    nothing wherever they lie, so a square assignment of all is a rectangular one of the real ones.

    Parameters
    ----------
    narrow, wide
        Architectures that differ in the width of their axes alone.
    w_narrow, w_wide
        Weights; batch dimensions broadcast. Where units have scales, on a section that fixes them.
    aligner
        Of the padded network with the wide one under ``wide.symmetry.compact``;
        ``WeightMatching()`` by default.

    Raises
    ------
    ShapeError
        If the architectures differ by more than the width of their axes.
    SymmetryError
        If padding changes the function.

    Examples
    --------
    >>> import symflow
    >>> narrow, wide = symflow.mlp([3, 4, 2], "tanh"), symflow.mlp([3, 9, 2], "tanh")
    >>> w0 = torch.randn(wide.dimension, generator=torch.Generator().manual_seed(0))
    >>> w1 = torch.randn(narrow.dimension, generator=torch.Generator().manual_seed(1))
    >>> embed_narrow(narrow, wide, w1, w0).units["h1"].shape
    torch.Size([4])
    """
    padded = widen(narrow, wide, w_narrow)
    symmetry = wide.symmetry.compact
    found = (WeightMatching() if aligner is None else aligner)(symmetry, w_wide, padded)
    units = {
        axis.name: _places(wide, found.element, axis.name)[..., : axis.size] for axis in narrow.axes
    }
    return Embedding(found.weights, units, found)


def _places(arch: Architecture, element: Element, axis: str) -> Tensor:
    """Where each unit goes."""
    group: Any = arch.symmetry.compact[axis].group
    parts = monomial(group, element[axis])
    if parts is None or parts[0] is None:
        raise ShapeError(
            f"axis {axis} has {group}, which moves no unit as a whole to another place: embed "
            "networks whose wide axes have permutations"
        )
    return invert(parts[0])


def _check_alike(narrow: Architecture, wide: Architecture) -> None:
    def shown(leaves: tuple[Leaf, ...]) -> list[str]:
        return [f"{x.key} {x.shape} {x.axes}" for x in leaves]

    sizes = {a.name: a.size for a in wide.axes}
    alike = len(narrow.leaves) == len(wide.leaves) and all(
        (a.key, a.dims, a.learnable) == (b.key, b.dims, b.learnable)
        and all(
            n == m if dim.axis is None else n <= m
            for n, m, dim in zip(a.shape, b.shape, a.dims, strict=True)
        )
        for a, b in zip(narrow.leaves, wide.leaves, strict=True)
    )
    if not alike or any(a.size > sizes.get(a.name, 0) for a in narrow.axes):
        raise ShapeError(
            "the architectures must have the same leaves over the same axes, none of which is "
            f"wider in the narrow one; got {shown(narrow.leaves)} and {shown(wide.leaves)}"
        )


def _check_function(narrow: Architecture, wide: Architecture, w: Tensor, padded: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(x.shape, generator=generator).to(w) if x.is_floating_point() else x
        for x in narrow.inputs
    ]
    with torch.no_grad():
        before, after = narrow.apply(w, *inputs), wide.apply(padded, *inputs)
    change = float((after - before).abs().max() / before.abs().max().clamp_min(1))
    if not change <= tolerance(w.dtype).symmetry:
        raise SymmetryError(
            f"units that are zero change the output by {change:.3g}: some layer of the wide "
            "architecture looks at all units of an axis at once, as LayerNorm does"
        )
