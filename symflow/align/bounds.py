"""Upper bounds of what any alignment can reach: the certificate that goes with a heuristic."""

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.align.base import require_compact
from symflow.arch import Leaf, Symmetry
from symflow.groups import CompactGroup, Permutation, assignment
from symflow.groups.product import CompactProduct


def objective_bound(
    symmetry: Symmetry, w0: Float[Tensor, "*#batch D"], w1: Float[Tensor, "*#batch D"]
) -> Float[Tensor, "*#batch"]:
    """Bound max over the group of <w0, k . w1> from above.

    Leaves that only one axis touches are solved exactly and together. A leaf between two axes gets
    the least of three bounds: sum of products of sorted singular values (von Neumann, 1937), and
    the best assignment of rows (or columns) at their rearrangement bound <sort(a_i), sort(b_j)>
    (absolute values where signs act). All others contribute |a| |b| (Cauchy and Schwarz).

    Examples
    --------
    >>> import symflow
    >>> arch = symflow.mlp([3, 4, 2], "tanh")
    >>> w = torch.randn(2, arch.dimension, generator=torch.Generator().manual_seed(0))
    >>> found = symflow.WeightMatching()(arch.symmetry, w[0], w[1]).objective
    >>> bool(found <= objective_bound(arch.symmetry, w[0], w[1]) + 1e-5)
    True
    """
    require_compact(symmetry)
    batch = torch.broadcast_shapes(w0.shape[:-1], w1.shape[:-1])
    a = w0.detach().to(torch.float64).expand(*batch, w0.shape[-1]).reshape(-1, w0.shape[-1])
    b = w1.detach().to(torch.float64).expand(*batch, w1.shape[-1]).reshape(-1, w1.shape[-1])
    total = a.new_zeros(len(a))
    single: dict[str, dict[int, Tensor]] = {}
    for leaf in symmetry.leaves:
        if not leaf.learnable:
            continue
        x, y = (v[:, leaf.span].reshape(-1, *leaf.shape) for v in (a, b))
        if not leaf.axes:
            total = total + (x * y).reshape(len(x), leaf.size).sum(1)
        elif len(leaf.axes) == 1:
            axis, degree, c = _contract(symmetry, leaf, x, y)
            costs = single.setdefault(axis, {})
            costs[degree] = costs.get(degree, 0) + c
        elif _is_matrix_between(symmetry, leaf):
            total = total + _matrix_bound(x, y, _has_signs(symmetry, leaf))
        else:
            total = total + _norm(x) * _norm(y)
    for axis, costs in single.items():
        group = symmetry[axis].group
        if isinstance(group, CompactGroup):
            total = total + group.support_by_degree(costs)
    return total.reshape(batch).to(w0.dtype)


def _contract(symmetry: Symmetry, leaf: Leaf, x: Tensor, y: Tensor) -> tuple[str, int, Tensor]:
    k = next(k for k, d in enumerate(leaf.dims) if d.axis is not None)
    dim = leaf.dims[k]

    def rows(v: Tensor) -> Tensor:
        return v.movedim(k + 1, 1).reshape(len(v), leaf.shape[k], leaf.size // leaf.shape[k])

    return dim.axis or "", dim.degree, rows(x) @ rows(y).mT


def _is_matrix_between(symmetry: Symmetry, leaf: Leaf) -> bool:
    """Whether permutations (and signs) of two axes act on the two sides of a matrix."""
    groups = [symmetry[a].group for a in leaf.axes]
    return (
        len(leaf.dims) == 2
        and all(d.axis is not None for d in leaf.dims)
        and all(
            isinstance(g.outer if isinstance(g, CompactProduct) else g, Permutation) for g in groups
        )
    )


def _has_signs(symmetry: Symmetry, leaf: Leaf) -> bool:
    return any(
        isinstance(symmetry[d.axis or ""].group, CompactProduct) and d.degree % 2 for d in leaf.dims
    )


def _matrix_bound(x: Tensor, y: Tensor, signs: bool) -> Tensor:
    spectral = (torch.linalg.svdvals(x) * torch.linalg.svdvals(y)).sum(-1)
    if signs:
        x, y = x.abs(), y.abs()
    bounds = [spectral]
    for p, q in ((x, y), (x.mT, y.mT)):
        c = p.sort(dim=-1).values @ q.sort(dim=-1).values.mT
        bounds.append(c.gather(-1, assignment(c)[..., None]).squeeze(-1).sum(-1))
    return torch.stack(bounds).amin(0)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.reshape(len(x), x.shape[1:].numel()), dim=-1)
