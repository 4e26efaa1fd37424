"""The symmetry group of an architecture: one group for each axis, acting on flat weight vectors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.arch.layout import Axis, Dim, Leaf
from symflow.errors import ShapeError
from symflow.groups import (
    CompactGroup,
    NoncompactGroup,
    Trivial,
    invert,
    map_element,
    monomial,
    reorder,
    repeated,
)

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

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Computed once: caches look it up at every call."""
        return hash((self.leaves, self.axes, self.fixed))

    @cached_property
    def num_parameters(self) -> int:
        """Number of learnable coordinates; they are the first ones."""
        return sum(leaf.size for leaf in self.leaves if leaf.learnable)

    def identity(self, *, like: Tensor) -> Element:
        """Return the element that moves nothing."""
        return {a.name: self._each_unit(a, a.group.identity(like=like)) for a in self.axes}

    def _each_unit(self, axis: Axis, g: Any) -> Any:
        """Repeat an element for each unit of the axis that ``axis`` is over."""
        if axis.over is None:
            return g
        return repeated(g, self[axis.over].size)

    def random(
        self, *, generator: torch.Generator, like: Tensor, batch: tuple[int, ...] = ()
    ) -> Element:
        """Draw each axis independently (Haar on compact groups)."""
        found: Element = {}
        for a in self.axes:
            units = () if a.over is None else (self[a.over].size,)
            found[a.name] = a.group.random(generator=generator, like=like, batch=(*batch, *units))
        return found

    def compose(self, g: Element, h: Element) -> Element:
        """Return the element that acts as ``h`` first, then ``g``."""
        found: Element = {}
        for a in self.axes:
            # Elements over an axis stand at the units as they are before that axis is moved.
            first = g[a.name]
            if a.over is not None:
                batch = len(self.batch_shape(a, first))
                first = self.carried(a, first, batch, h, back=True)
            found[a.name] = a.group.compose(first, h[a.name])
        return found

    def inverse(self, g: Element) -> Element:
        """Return the element that undoes ``g``."""
        found: Element = {}
        for a in self.axes:
            undone = a.group.inverse(g[a.name])
            if a.over is not None:
                batch = len(self.batch_shape(a, undone))
                undone = self.carried(a, undone, batch, g, back=False)
            found[a.name] = undone
        return found

    def carried(
        self, axis: Axis, part: Any, batch: int, g: Mapping[str, Any], *, back: bool = False
    ) -> Any:
        """Reorder elements over another axis as ``g`` moves that one's units.

        Parameters
        ----------
        axis
            An axis over another one.
        part
            An element of it; it stands where those units were before they were moved.
        batch
            How many batch dimensions it has, without those units.
        g
            Moves the other axis, if it names it.
        back
            The other way: ``part`` stands where the units are afterwards.
        """
        over = self[axis.over or ""]
        if over.name not in g:
            return part
        found = monomial(over.group, g[over.name])
        if found is None:
            raise TypeError(f"axis {axis.name} is over {over.name}, whose units {over.group} mixes")
        index = found[0]
        if index is None:
            return part
        missing = batch - (index.ndim - 1)
        if missing > 0:
            index = index.reshape((*(1,) * missing, *index.shape))
        part = part if missing >= 0 else _lift(part, -missing)
        return reorder(part, invert(index) if back else index)

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
        if not all(p is not None for p in parts.values()):
            return self._act_by_leaf(g, w)
        found = {k: p for k, p in parts.items() if p is not None}
        for axis in self.axes:
            if axis.over is not None and axis.name in found:  # as they stand afterwards
                index, scales = (
                    None if part is None else self.carried(axis, part, part.ndim - 2, g)
                    for part in found[axis.name]
                )
                found[axis.name] = index, scales
        return self._act_monomial(found, w)

    @property
    def compact(self) -> "Symmetry":
        """The group that is left on the balanced section: the residual group of each axis.

        Axes over another one on which nothing is left are left out, and their dimensions are fixed.
        """
        axes = tuple(replace(a, group=_residual(a)) for a in self.axes)
        gone = {a.name for a in axes if a.over is not None and isinstance(a.group, Trivial)}
        if not gone:
            return replace(self, axes=axes)
        leaves = tuple(
            replace(x, dims=tuple(Dim() if d.axis in gone else d for d in x.dims))
            for x in self.leaves
        )
        return replace(self, leaves=leaves, axes=tuple(a for a in axes if a.name not in gone))

    @property
    def dimension(self) -> int:
        """Dimension of the group as a manifold: of all that acts continuously."""
        return sum(self._copies(a) * a.group.dimension for a in self.axes)

    @property
    def log_components(self) -> float:
        """Natural logarithm of the number of connected components: of elements, if it is finite."""
        return sum((self._copies(a) * a.group.log_components for a in self.axes), 0.0)

    def _copies(self, axis: Axis) -> int:
        return 1 if axis.over is None else self[axis.over].size

    def over(self, name: str) -> tuple[Axis, ...]:
        """Return the axes each of whose elements is one for each unit of this one."""
        return tuple(a for a in self.axes if a.over == name)

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

    @cached_property
    def _dimension(self) -> int:
        return sum(leaf.size for leaf in self.leaves)

    def _act_monomial(
        self, parts: Mapping[str, tuple[Tensor | None, Tensor | None]], w: Tensor
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

    def batch_shape(self, axis: Axis, g: Any) -> torch.Size:
        """Return the batch dimensions of an axis' element, without those of what it is over."""
        shape = axis.group.batch_shape(g)
        return shape if axis.over is None else shape[:-1]

    def _act_by_leaf(self, g: Mapping[str, Any], w: Tensor) -> Tensor:
        batches = {a.name: self.batch_shape(a, g[a.name]) for a in self.axes if a.name in g}
        batch = torch.broadcast_shapes(w.shape[:-1], *batches.values())
        w = w.expand(*batch, w.shape[-1])
        # Groups match batch dimensions from the left, weights broadcast from the right.
        lifted = {name: _lift(g[name], len(batch) - len(own)) for name, own in batches.items()}
        pieces = [
            self.act_on_leaf(lifted, leaf, w[..., leaf.span].reshape((*batch, *leaf.shape)))
            for leaf in self.leaves
        ]
        return torch.cat([x.reshape(*batch, -1) for x in pieces], dim=-1)

    def act_on_leaf(
        self, g: Mapping[str, Any], leaf: Leaf, x: Tensor, *, skip: tuple[int | None, ...] = ()
    ) -> Tensor:
        """Move one leaf (*batch, *leaf.shape) by elements with as many batch dimensions.

        Parameters
        ----------
        g
            Element; an axis that is left out is not moved.
        leaf, x
            The leaf and its values.
        skip
            Dimensions that are not moved.
        """
        ranked = sorted(range(len(leaf.dims)), key=lambda k: leaf.dims[k].within is None)
        for k in ranked:  # what is over other axes first, while those stand where they were
            dim = leaf.dims[k]
            if k in skip or dim.axis is None or dim.axis not in g:
                continue
            at, group = k - len(leaf.dims), self[dim.axis].group
            if dim.within is None:
                x = group.act(g[dim.axis], x, dim=at, degree=dim.degree)
                continue
            unit = dim.within - len(leaf.dims)
            front = x.ndim - len(leaf.dims)
            moved = x.movedim(unit, front)
            if dim.within > k:  # what stood behind this dimension stands in front of it now
                at += 1
            x = group.act(g[dim.axis], moved, dim=at, degree=dim.degree).movedim(front, unit)
        return x


def _lift(g: Any, dims: int) -> Any:
    """Put dimensions of size one in front of an element."""
    return map_element(partial(_lifted, dims), g)


def _lifted(dims: int, part: Tensor) -> Tensor:
    return part.reshape((*(1,) * dims, *part.shape))


def _residual(axis: Axis) -> CompactGroup[Any]:
    if isinstance(axis.group, NoncompactGroup):
        return axis.group.residual
    if isinstance(axis.group, CompactGroup):
        return axis.group
    raise TypeError(
        f"the group {axis.group} of axis {axis.name} is neither a CompactGroup nor a "
        "NoncompactGroup: derive it from one of them"
    )


def _compile_index(
    leaves: tuple[Leaf, ...], indices: dict[str, Tensor | None], device: torch.device
) -> Tensor | None:
    moving = {k: v for k, v in indices.items() if v is not None}
    if not moving:
        return None
    batch = _common_batch(leaves, moving)
    pieces = []
    for leaf in leaves:
        index = torch.full((1,) * len(leaf.dims), leaf.offset, device=device)
        for k, dim in enumerate(leaf.dims):
            at = moving.get(dim.axis or "")
            stride = math.prod(leaf.shape[k + 1 :])
            if at is None:
                at, dim = torch.arange(leaf.shape[k], device=device), Dim()
            index = index + _placed(leaf, k, dim, at * stride)
        pieces.append(index.expand((*batch, *leaf.shape)).reshape((*batch, leaf.size)))
    return torch.cat(pieces, dim=-1)


def _common_batch(leaves: tuple[Leaf, ...], values: Mapping[str, Tensor]) -> torch.Size:
    """Batch dimensions of values of units (*batch, n), or (*batch, m, n) over m other units."""
    inside = {d.axis for leaf in leaves for d in leaf.dims if d.within is not None}
    return torch.broadcast_shapes(
        *(v.shape[: -2 if name in inside else -1] for name, v in values.items())
    )


def _placed(leaf: Leaf, k: int, dim: Dim, v: Tensor) -> Tensor:
    """View values of units so that they broadcast with a leaf (*batch, *leaf.shape)."""
    shape = [1] * len(leaf.dims)
    shape[k] = v.shape[-1]
    if dim.within is None:
        return v.reshape(*v.shape[:-1], *shape)
    shape[dim.within] = v.shape[-2]
    v = v if dim.within < k else v.mT
    return v.reshape(*v.shape[:-2], *shape)


def scale_coordinates(
    leaves: tuple[Leaf, ...], scales: Mapping[str, Tensor | None], *, absolute: bool = False
) -> Float[Tensor, "*batch D"] | None:
    """Compile scales of units into the factor of every coordinate.

    Parameters
    ----------
    leaves
        Leaves in flat order.
    scales
        For each axis the factors of its units (*batch, n), or None; for an axis over another one
        with m units (*batch, m, n).
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
    batch = _common_batch(leaves, moving)
    pieces = []
    for leaf in leaves:
        scale = one.new_ones((1,) * len(leaf.dims))
        for k, dim in enumerate(leaf.dims):
            s = moving.get(dim.axis or "")
            degree = abs(dim.degree) if absolute else dim.degree
            if s is not None and degree:
                scale = scale * _placed(leaf, k, dim, s**degree)
        pieces.append(scale.expand((*batch, *leaf.shape)).reshape((*batch, leaf.size)))
    return torch.cat(pieces, dim=-1)
