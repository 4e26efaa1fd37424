"""The symmetry group of an architecture: one group for each axis, acting on flat weight vectors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.arch.layout import Axis, Dim, Leaf
from symflow.errors import ShapeError
from symflow.groups import CompactGroup, NoncompactGroup, map_element, monomial

Element = dict[str, Any]


@final
@dataclass(frozen=True)
class Symmetry:
    """The product group over all axes of an architecture.

    An element is a dict from the name of each axis to an element of its group. For groups that
    permute and scale (monomial ones) an element compiles to one gather and one multiplication of
    the flat vector; others act leaf by leaf. Both ways are batched and differentiable.

    Attributes
    ----------
    leaves
        The leaves, in the order of the flat vector.
    axes
        The axes on which a group acts, from input to output.
    fixed
        The axes that stay as they are, with the reason.

    Examples
    --------
    >>> import symflow
    >>> arch = symflow.mlp([2, 3, 1])
    >>> g = arch.symmetry.random(generator=torch.Generator().manual_seed(0), like=torch.zeros(1))
    >>> w = torch.randn(5, arch.dimension)
    >>> back = arch.symmetry.act(arch.symmetry.inverse(g), arch.symmetry.act(g, w))
    >>> torch.allclose(back, w, atol=1e-5)
    True
    """

    leaves: tuple[Leaf, ...]
    axes: tuple[Axis, ...]
    fixed: tuple[Axis, ...] = ()

    def identity(self, *, like: Tensor) -> Element:
        """Return the element that moves nothing."""
        return {a.name: a.group.identity(like=like) for a in self.axes}

    def random(
        self, *, generator: torch.Generator, like: Tensor, batch: tuple[int, ...] = ()
    ) -> Element:
        """Draw each axis independently (Haar on compact groups)."""
        return {
            a.name: a.group.random(generator=generator, like=like, batch=batch) for a in self.axes
        }

    def compose(self, g: Element, h: Element) -> Element:
        """Return the element that acts as ``h`` first, then ``g``."""
        return {a.name: a.group.compose(g[a.name], h[a.name]) for a in self.axes}

    def inverse(self, g: Element) -> Element:
        """Return the element that undoes ``g``."""
        return {a.name: a.group.inverse(g[a.name]) for a in self.axes}

    def act(self, g: Mapping[str, Any], w: Float[Tensor, "*batch D"]) -> Float[Tensor, "*out D"]:
        """Move weights along their orbit.

        Parameters
        ----------
        g
            Element; an axis that is left out is not moved. Batch dimensions broadcast with those
            of ``w``.
        w
            Flat weights (*batch, D).

        Returns
        -------
        Tensor
            Flat weights; the network's function is the same. O(D) for each network.
        """
        if w.shape[-1] != self._dimension:
            raise ShapeError(
                f"w must have D = {self._dimension} coordinates in its last dimension, got "
                f"{tuple(w.shape)}"
            )
        unknown = set(g) - {a.name for a in self.axes}
        if unknown:
            raise ShapeError(
                f"the element names axes {sorted(unknown)}; the group acts on "
                f"{[a.name for a in self.axes]}"
            )
        parts = {a.name: monomial(a.group, g[a.name]) for a in self.axes if a.name in g}
        if all(p is not None for p in parts.values()):
            return self._act_monomial({k: p for k, p in parts.items() if p is not None}, w)
        return self._act_by_leaf(g, w)

    @property
    def compact(self) -> "Symmetry":
        """The group that is left on the balanced section: the residual group of each axis."""
        axes = tuple(replace(a, group=_residual(a)) for a in self.axes)
        return replace(self, axes=axes)

    def __getitem__(self, name: str) -> Axis:
        for axis in self.axes:
            if axis.name == name:
                return axis
        raise ShapeError(f"no axis {name!r}; the axes are {[a.name for a in self.axes]}")

    def __str__(self) -> str:
        rows = [("axis", "size", "group", "why")]
        rows += [(a.name, str(a.size), str(a.group), a.reason) for a in self.axes]
        rows += [(a.name, str(a.size), "fixed", a.reason) for a in self.fixed]
        widths = [max(len(row[k]) for row in rows) for k in range(3)]
        lines = [
            "  ".join([*(cell.ljust(n) for cell, n in zip(row, widths, strict=False)), row[3]])
            for row in rows
        ]
        rule = "-" * max(map(len, lines))
        return "\n".join([lines[0], rule, *lines[1:]])

    @property
    def _dimension(self) -> int:
        return sum(leaf.size for leaf in self.leaves)

    def _act_monomial(
        self, parts: dict[str, tuple[Tensor | None, Tensor | None]], w: Tensor
    ) -> Tensor:
        index = _compile_index(self.leaves, {k: p[0] for k, p in parts.items()}, w.device)
        scales = scale_coordinates(self.leaves, {k: p[1] for k, p in parts.items()})
        if index is None:
            return w if scales is None else w * scales.to(w.dtype)
        # gather, not index_select: on the CPU it is the one of the two that runs in parallel.
        shape = torch.broadcast_shapes(index.shape, w.shape)
        moved = w.expand(shape).gather(-1, index.expand(shape))
        if scales is None:
            return moved
        scales = scales.to(w.dtype)
        if w.requires_grad or scales.requires_grad or scales.ndim > 1:
            return moved * scales
        return moved.mul_(scales)  # a fresh tensor: no second allocation, half of the time

    def _act_by_leaf(self, g: Mapping[str, Any], w: Tensor) -> Tensor:
        batches = {a.name: a.group.batch_shape(g[a.name]) for a in self.axes if a.name in g}
        batch = torch.broadcast_shapes(w.shape[:-1], *batches.values())
        w = w.expand(*batch, w.shape[-1])
        # Groups match batch dimensions from the left, weights broadcast from the right.
        lifted = {name: _lift(g[name], len(batch) - len(own)) for name, own in batches.items()}
        pieces = []
        for leaf in self.leaves:
            x = w[..., leaf.span].reshape((*batch, *leaf.shape))
            for k, dim in enumerate(leaf.dims):
                if dim.axis is None or dim.axis not in g:
                    continue
                shape = x.shape
                back = k - len(leaf.dims)
                n = self[dim.axis].size
                x = x.unflatten(back, (dim.outer, n, dim.inner))
                x = self[dim.axis].group.act(lifted[dim.axis], x, dim=back - 1, degree=dim.degree)
                x = x.reshape(shape)
            pieces.append(x.reshape(*batch, leaf.size))
        return torch.cat(pieces, dim=-1)


def _lift(g: Any, dims: int) -> Any:
    """Put dimensions of size one in front of an element."""

    def lift(part: Tensor) -> Tensor:
        return part.reshape((*(1,) * dims, *part.shape))

    return map_element(lift, g)


def _residual(axis: Axis) -> CompactGroup[Any]:
    if isinstance(axis.group, NoncompactGroup):
        return axis.group.residual
    if isinstance(axis.group, CompactGroup):
        return axis.group
    raise TypeError(
        f"the group {axis.group} of axis {axis.name} is neither a CompactGroup nor a "
        "NoncompactGroup: derive it from one of them"
    )


def repeat_along(v: Tensor, dim: Dim) -> Tensor:
    """Spread values of units (*batch, n) over a dimension (*batch, outer * n * inner).

    Examples
    --------
    >>> repeat_along(torch.tensor([1, 2]), Dim("h", 1, outer=2, inner=2))
    tensor([1, 1, 2, 2, 1, 1, 2, 2])
    """
    if dim.outer == dim.inner == 1:
        return v
    spread = v[..., None, :, None].expand(*v.shape[:-1], dim.outer, v.shape[-1], dim.inner)
    return spread.flatten(-3)


def _positions(index: Tensor, dim: Dim) -> Tensor:
    """Coordinates of a dimension after permuting its axis by ``index``."""
    n, device = index.shape[-1], index.device
    outer = torch.arange(dim.outer, device=device)[:, None, None] * (n * dim.inner)
    inner = torch.arange(dim.inner, device=device)
    return (outer + index[..., None, :, None] * dim.inner + inner).flatten(-3)


def _compile_index(
    leaves: tuple[Leaf, ...], indices: dict[str, Tensor | None], device: torch.device
) -> Tensor | None:
    moving = {k: v for k, v in indices.items() if v is not None}
    if not moving:
        return None
    batch = torch.broadcast_shapes(*(v.shape[:-1] for v in moving.values()))
    pieces = []
    for leaf in leaves:
        index = torch.full((), leaf.offset, device=device)
        for k, dim in enumerate(leaf.dims):
            at = moving.get(dim.axis or "")
            place = (
                torch.arange(leaf.shape[k], device=device) if at is None else _positions(at, dim)
            )
            stride = math.prod(leaf.shape[k + 1 :])
            index = index[..., None] + _trailing(place * stride, k)
        pieces.append(index.expand((*batch, *leaf.shape)).reshape((*batch, leaf.size)))
    return torch.cat(pieces, dim=-1)


def scale_coordinates(
    leaves: tuple[Leaf, ...], scales: Mapping[str, Tensor | None], *, absolute: bool = False
) -> Float[Tensor, "*batch D"] | None:
    """Compile scales of units (*batch, n) into the factor of every coordinate.

    Parameters
    ----------
    leaves
        Leaves in flat order.
    scales
        For each axis the factors of its units, or None.
    absolute
        Use the absolute degree: for masks, which must not be inverted.

    Returns
    -------
    Tensor
        Factors (*batch, D), or None if no axis is scaled.

    Examples
    --------
    >>> import symflow
    >>> scale_coordinates(symflow.mlp([1, 1, 1]).leaves, {"h1": torch.tensor([2.0])})
    tensor([2.0000, 2.0000, 0.5000, 1.0000])
    """
    moving = {k: v for k, v in scales.items() if v is not None}
    if not moving:
        return None
    one = next(iter(moving.values()))
    batch = torch.broadcast_shapes(*(v.shape[:-1] for v in moving.values()))
    pieces = []
    for leaf in leaves:
        scale = one.new_ones(())
        for k, dim in enumerate(leaf.dims):
            s = moving.get(dim.axis or "")
            degree = abs(dim.degree) if absolute else dim.degree
            factor = one.new_ones(leaf.shape[k]) if s is None else repeat_along(s**degree, dim)
            scale = scale[..., None] * _trailing(factor, k)
        pieces.append(scale.expand((*batch, *leaf.shape)).reshape((*batch, leaf.size)))
    return torch.cat(pieces, dim=-1)


def _trailing(v: Tensor, k: int) -> Tensor:
    """View (*batch, m) as (*batch, 1 x k, m): the k dimensions before it broadcast."""
    return v.reshape(*v.shape[:-1], *(1,) * k, v.shape[-1])
