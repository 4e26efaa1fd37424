"""Contraction of two networks over an axis: the matrix that an axis' oracle is given."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.arch import Element, Leaf, Symmetry
from symflow.groups import map_element


@final
@dataclass(frozen=True)
class Place:
    """One dimension of a learnable leaf that runs over an axis."""

    leaf: Leaf
    dim: int

    @property
    def others(self) -> tuple[str, ...]:
        """The axes of the leaf's other dimensions."""
        return tuple(
            d.axis for k, d in enumerate(self.leaf.dims) if k != self.dim and d.axis is not None
        )


@final
class Contraction:
    """Two batches of networks, contracted over one axis at a time.

    Parameters
    ----------
    symmetry
        A compact symmetry group.
    w0, w1
        Flat weights (N, D); w0 may have N = 1.

    Notes
    -----
    ``costs(axis, element)`` is C with C_ij = <unit i of w0, unit j of w1>, summed over all leaves
    that carry the axis, the other axes of w1 already moved: O(n x weights on the axis). Leaves that
    no other axis touches are contracted once.
    """

    def __init__(self, symmetry: Symmetry, w0: Tensor, w1: Tensor) -> None:
        self.symmetry = symmetry
        self.places: dict[str, list[Place]] = {a.name: [] for a in symmetry.axes}
        self._left: dict[tuple[str, int], Tensor] = {}
        self._leaves: dict[str, Tensor] = {}
        for leaf in symmetry.leaves:
            if not (leaf.learnable and leaf.axes):
                continue
            self._leaves[leaf.name] = w1[..., leaf.span].reshape(-1, *leaf.shape)
            x0 = w0[..., leaf.span].reshape(-1, *leaf.shape)
            for k, dim in enumerate(leaf.dims):
                if dim.axis is not None:
                    self.places[dim.axis].append(Place(leaf, k))
                    self._left[leaf.name, k] = self._rows(x0, leaf, k)
        self._constant: dict[str, dict[int, Tensor]] = {}

    def neighbours(self, axis: str) -> set[str]:
        """Return the axes that share a leaf with this one."""
        return {other for place in self.places[axis] for other in place.others} - {axis}

    def is_quadratic(self, axis: str) -> bool:
        """Whether the axis occurs twice in one leaf: a step is then only a linearisation."""
        return any(axis in place.others for place in self.places[axis])

    def costs(self, axis: str, element: Element, rows: Tensor) -> dict[int, Float[Tensor, "N n n"]]:
        """Return C by degree for the networks ``rows`` of the batch."""
        if axis not in self._constant:
            fixed = [p for p in self.places[axis] if not p.others]
            self._constant[axis] = self._sum(fixed, element, torch.arange(self._batch()))
        constant = {degree: c[rows] for degree, c in self._constant[axis].items()}
        moving = [p for p in self.places[axis] if p.others]
        return _add(constant, self._sum(moving, element, rows))

    def incoming(
        self,
        axis: str,
        element: Element,
        known: set[str],
        weights: Mapping[str, Tensor] | None,
    ) -> dict[int, Float[Tensor, "N n n"]]:
        """Return C over the leaves whose other axes are all ``known``.

        ``weights`` holds, for each leaf without other axes, one factor for each coordinate of a
        unit: the covariant way of making starts differ.
        """
        places = [p for p in self.places[axis] if set(p.others) <= known]
        return self._sum(places, element, torch.arange(self._batch()), weights)

    def width(self, place: Place) -> int:
        """Return the number of coordinates that a leaf gives to one unit."""
        return self._left[place.leaf.name, place.dim].shape[-1]

    def _batch(self) -> int:
        return max((x.shape[0] for x in self._leaves.values()), default=0)

    def _sum(
        self,
        places: list[Place],
        element: Element,
        rows: Tensor,
        weights: Mapping[str, Tensor] | None = None,
    ) -> dict[int, Tensor]:
        total: dict[int, Tensor] = {}
        for place in places:
            leaf, k = place.leaf, place.dim
            left = self._left[leaf.name, k]
            left = left if left.shape[0] == 1 else left[rows]
            right = self._rows(self._moved(leaf, k, element, rows), leaf, k)
            if weights is not None and leaf.name in weights:
                left = left * weights[leaf.name].to(left)
            c = left @ right.mT
            total = _add(total, {leaf.dims[k].degree: c})
        return total

    def _moved(self, leaf: Leaf, k: int, element: Element, rows: Tensor) -> Tensor:
        """Return the leaf of w1 with every dimension but ``k`` moved by the element."""
        x = self._leaves[leaf.name][rows]
        for j, dim in enumerate(leaf.dims):
            if j == k or dim.axis is None:
                continue
            n = self.symmetry[dim.axis].size
            at = j - len(leaf.dims)
            shape = x.shape
            x = x.unflatten(at, (dim.outer, n, dim.inner))
            g = map_element(lambda part: part[rows], element[dim.axis])
            x = self.symmetry[dim.axis].group.act(g, x, dim=at - 1, degree=dim.degree)
            x = x.reshape(shape)
        return x

    def _rows(self, x: Tensor, leaf: Leaf, k: int) -> Tensor:
        """View a leaf (N, ...) as (N, n, coordinates of one unit)."""
        dim = leaf.dims[k]
        n = leaf.shape[k] // (dim.outer * dim.inner)
        x = x.unflatten(k + 1, (dim.outer, n, dim.inner)).movedim(k + 2, 1)
        return x.reshape(x.shape[0], n, leaf.size // n)


def _add(a: dict[int, Tensor], b: dict[int, Tensor]) -> dict[int, Tensor]:
    total = dict(a)
    for degree, c in b.items():
        total[degree] = total[degree] + c if degree in total else c
    return total


def where(keep: Tensor, element: Any, other: Any) -> Any:
    """Choose between two batched elements entry by entry; ``keep`` is (N,)."""
    return map_element(
        lambda e, o: torch.where(keep.reshape(-1, *(1,) * (e.ndim - 1)), e, o), element, other
    )
