"""The convex hull of a compact group over all axes at once, as dense matrices.

An isometry A acts with degree -1 as with +1 (A^-T = A), and a diagonal one of signs by the parity
of its degree. So a point of an axis' hull is at most two matrices: what odd degrees see, and what
even degrees see. For permutations both are doubly stochastic and equal; for signed permutations
the odd one carries the signs, within the bounds of the even one.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.align.base import Found
from symflow.align.costs import oracle as compact
from symflow.align.weight_matching import WeightMatching
from symflow.arch import Element, Leaf, Symmetry
from symflow.groups import Group

ODD, EVEN = 1, 0
_DRAWS, _FIXED = 64, 0.95

# Matrices by axis and parity: (N, n, n), and for axes over another one with m units (N, m, n, n).
Point: TypeAlias = dict[tuple[str, int], Tensor]


def oracle(symmetry: Symmetry, axis: str, costs: Mapping[int, Float[Tensor, "*batch n n"]]) -> Any:
    """Return the element of one axis' group that maximises the sum of <A^(p), c_p>.

    For an axis over another one with m units there are m problems (*batch, m, n, n). This is the
    one place where aligners of this folder, weight matching apart, ask a group anything.

    Raises
    ------
    TypeError
        If the group is not compact (:func:`symflow.align.base.require_compact` comes before).

    Examples
    --------
    >>> import symflow
    >>> symmetry = symflow.mlp([1, 2, 1], "gelu").symmetry
    >>> oracle(symmetry, "h1", {1: torch.tensor([[0.0, 5.0], [1.0, 0.0]])})
    tensor([1, 0])
    """
    return compact(symmetry[axis].group).nearest_by_degree(costs)


def parities(symmetry: Symmetry, axis: str, *, buffers: bool = False) -> tuple[int, ...]:
    """List the parities of the degrees with which leaves carry an axis, the odd one first.

    Parameters
    ----------
    symmetry, axis
        Where to look.
    buffers
        Whether leaves that are not learnable, and so never cost anything, are asked too.

    Examples
    --------
    >>> import symflow
    >>> parities(symflow.mlp([1, 2, 1], "tanh").symmetry, "h1")
    (1,)
    """
    found = {
        dim.degree % 2
        for leaf in symmetry.leaves
        if leaf.learnable or buffers
        for dim in leaf.dims
        if dim.axis == axis
    }
    return tuple(sorted(found, reverse=True))


def vertex(symmetry: Symmetry, element: Element, like: Tensor) -> Point:
    """Return an element (N), of some axes or all, as a point of the hull.

    Examples
    --------
    >>> import symflow
    >>> symmetry, like = symflow.mlp([1, 2, 1], "gelu").symmetry, torch.zeros(1, 7)
    >>> vertex(symmetry, {"h1": torch.tensor([[1, 0]])}, like)["h1", ODD]
    tensor([[[0., 1.],
             [1., 0.]]])
    """
    return {
        (name, parity): matrix(symmetry[name].group, g, parity, like)
        for name, g in element.items()
        for parity in parities(symmetry, name, buffers=True)
    }


def barycentre(symmetry: Symmetry, like: Float[Tensor, "N D"]) -> Point:
    """Return the Haar mean of every axis: the one point of the hull that no element moves.

    The mean of a representation projects on the vectors that it fixes; those are found as what a
    number of drawn elements fix, O(n^3).

    Examples
    --------
    >>> import symflow
    >>> barycentre(symflow.mlp([1, 2, 1], "gelu").symmetry, torch.zeros(1, 7))["h1", ODD]
    tensor([[[0.5000, 0.5000],
             [0.5000, 0.5000]]])
    """
    point: Point = {}
    for axis in symmetry.axes:
        for parity in parities(symmetry, axis.name, buffers=True):
            mean = _mean(axis.group, parity).to(like)
            units = () if axis.over is None else (symmetry[axis.over].size,)
            point[axis.name, parity] = mean.expand(len(like), *units, *mean.shape)
    return point


@lru_cache(maxsize=8)
def _mean(group: Group[Any], parity: int) -> Tensor:
    """Return the Haar mean of the matrices by which a parity acts: every call begins with it."""
    generator, like = torch.Generator().manual_seed(0), torch.zeros((), dtype=torch.float64)
    drawn = [group.random(generator=generator, like=like) for _ in range(_DRAWS)]
    total = sum((matrix(group, g, parity, like) for g in drawn), torch.zeros(()).double())
    eigenvalues, basis = torch.linalg.eigh((total + total.mT) / (2 * _DRAWS))
    basis = basis * (eigenvalues > _FIXED)
    return basis @ basis.mT


def matrix(group: Group[Any], g: Any, parity: int, like: Tensor) -> Float[Tensor, "*batch n n"]:
    """Return the matrix by which degrees of a parity act.

    Examples
    --------
    >>> from symflow.groups import Sign
    >>> matrix(Sign(1), torch.tensor([-1.0]), EVEN, torch.zeros(()))
    tensor([[1.]])
    """
    batch = group.batch_shape(g)
    eye = torch.eye(group.size, dtype=like.dtype, device=like.device)
    return group.act(g, eye.expand(*batch, *eye.shape), dim=-2, degree=parity)


def act(
    symmetry: Symmetry, point: Mapping[tuple[str, int], Tensor], w: Float[Tensor, "N D"]
) -> Float[Tensor, "N D"]:
    """Act with a point of the hull: on vertices it is the action of their element.

    Differentiable in the point and in the weights, O(weights x width) for each network.

    Examples
    --------
    >>> import symflow
    >>> symmetry, w = symflow.mlp([1, 2, 1], "gelu").symmetry, torch.arange(7.0)[None]
    >>> act(symmetry, vertex(symmetry, {"h1": torch.tensor([[1, 0]])}, w), w)
    tensor([[1., 0., 3., 2., 5., 4., 6.]])
    """
    return torch.cat([_move(symmetry, leaf, point, w) for leaf in symmetry.leaves], dim=-1)


def value(
    symmetry: Symmetry,
    point: Mapping[tuple[str, int], Tensor],
    w0: Float[Tensor, "N D"],
    w1: Float[Tensor, "N D"],
) -> Float[Tensor, " N"]:
    """Return the inner product of the learnable coordinates of ``w0`` with the moved ``w1``.

    Examples
    --------
    >>> import symflow
    >>> symmetry, w = symflow.mlp([1, 2, 1], "gelu").symmetry, torch.ones(1, 7)
    >>> value(symmetry, barycentre(symmetry, w), w, w)
    tensor([7.0000])
    """
    terms = [
        torch.linalg.vecdot(w0[:, leaf.span], _move(symmetry, leaf, point, w1))
        for leaf in symmetry.leaves
        if leaf.learnable
    ]
    return torch.stack(terms).sum(0)


def _move(
    symmetry: Symmetry, leaf: Leaf, point: Mapping[tuple[str, int], Tensor], w: Tensor
) -> Tensor:
    x = w[:, leaf.span].reshape(-1, *leaf.shape)
    # What is over other axes first, while those stand where they were.
    for k in sorted(range(len(leaf.dims)), key=lambda k: leaf.dims[k].within is None):
        dim = leaf.dims[k]
        if dim.axis is None or (dim.axis, dim.degree % 2) not in point:
            continue
        m = point[dim.axis, dim.degree % 2]
        places = [k + 1] if dim.within is None else [dim.within + 1, k + 1]
        front = list(range(1, len(places) + 1))
        y = x.movedim(places, front)
        x = (m @ y.reshape(*m.shape[:-1], -1)).reshape(y.shape)
        x = x.movedim(front, places)
    return x.reshape(len(w), leaf.size)


def nearest(symmetry: Symmetry, point: Mapping[tuple[str, int], Tensor]) -> Element:
    """Round a point of the hull to the element (N) whose matrices are nearest.

    Examples
    --------
    >>> import symflow
    >>> symmetry, like = symflow.mlp([1, 2, 1], "gelu").symmetry, torch.zeros(1, 7)
    >>> nearest(symmetry, vertex(symmetry, {"h1": torch.tensor([[1, 0]])}, like))
    {'h1': tensor([[1, 0]])}
    """
    return {
        axis.name: oracle(
            symmetry,
            axis.name,
            {parity: point[axis.name, parity] for parity in parities(symmetry, axis.name)},
        )
        for axis in symmetry.axes
    }


def sequential(symmetry: Symmetry, w0: Float[Tensor, "N D"], w1: Float[Tensor, "N D"]) -> Element:
    """Match each axis on its incoming weights, given the axes before it: the covariant start.

    Examples
    --------
    >>> import symflow
    >>> symmetry, w = symflow.mlp([1, 2, 1], "gelu").symmetry, torch.arange(7.0)[None]
    >>> sequential(symmetry, w, w)
    {'h1': tensor([[0, 1]])}
    """
    return WeightMatching(("sequential",), max_sweeps=0)(symmetry, w0, w1).element


def polish(
    symmetry: Symmetry,
    w0: Float[Tensor, "N D"],
    w1: Float[Tensor, "N D"],
    element: Element,
    max_sweeps: int = 100,
) -> Found:
    """Ascend by weight matching from an element (N); the history begins at its objective.

    Examples
    --------
    >>> import symflow
    >>> symmetry, w = symflow.mlp([1, 2, 1], "gelu").symmetry, torch.arange(7.0)[None]
    >>> polish(symmetry, w, w, {"h1": torch.tensor([[1, 0]])}).element
    {'h1': tensor([[0, 1]])}
    """
    ascent = WeightMatching(max_sweeps=max_sweeps).ascend_from(symmetry, w0, w1, element)
    return Found(ascent.element, ascent.history, ascent.status)
