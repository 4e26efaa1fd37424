"""The published plain coordinate descent, written as plainly as it was published.

Ainsworth, Hayase and Srinivasa (Git Re-Basin, 2023), algorithm 1: what alignment is timed against.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from symflow import Architecture

Placed = tuple[str, int]


def specification(
    arch: Architecture,
) -> tuple[dict[str, list[Placed]], dict[str, list[str | None]]]:
    """Return where each axis is (parameter, dimension), and the axes of each parameter."""
    places: dict[str, list[Placed]] = {axis.name: [] for axis in arch.axes}
    axes: dict[str, list[str | None]] = {}
    for leaf in arch.leaves:
        if leaf.learnable:
            axes[leaf.name] = [dim.axis for dim in leaf.dims]
            for k, dim in enumerate(leaf.dims):
                if dim.axis is not None:
                    places[dim.axis].append((leaf.name, k))
    return places, axes


def permuted(
    axes: list[str | None], found: dict[str, Tensor], x: Tensor, skip: int | None = None
) -> Tensor:
    """Permute each dimension of a parameter but one."""
    for k, axis in enumerate(axes):
        if axis is not None and k != skip:
            x = x.index_select(k, found[axis])
    return x


def coordinate_descent(
    arch: Architecture, a: dict[str, Tensor], b: dict[str, Tensor], seed: int, sweeps: int = 100
) -> dict[str, Tensor]:
    """Match axis by axis in random order from the identity, until a sweep changes nothing."""
    places, axes = specification(arch)
    found = {axis.name: torch.arange(axis.size) for axis in arch.axes}
    generator = torch.Generator().manual_seed(seed)
    names = list(found)
    for _ in range(sweeps):
        progress = False
        for k in torch.randperm(len(names), generator=generator).tolist():
            name = names[k]
            n = len(found[name])
            total = torch.zeros(n, n)
            for parameter, dim in places[name]:
                left = a[parameter].movedim(dim, 0).reshape(n, -1)
                moved = permuted(axes[parameter], found, b[parameter], skip=dim)
                total += left @ moved.movedim(dim, 0).reshape(n, -1).T
            new = torch.from_numpy(linear_sum_assignment(total.numpy(), maximize=True)[1])
            rows = torch.arange(n)
            before, after = (total[rows, index].sum() for index in (found[name], new))
            found[name] = new
            progress = progress or bool(after > before + 1e-12)
        if not progress:
            break
    return found


def value(
    arch: Architecture, a: dict[str, Tensor], b: dict[str, Tensor], found: dict[str, Tensor]
) -> float:
    """Return the inner product of all parameters in float64."""
    _, axes = specification(arch)
    terms = (
        (a[name].double() * permuted(axes[name], found, b[name]).double()).sum() for name in axes
    )
    return float(sum(terms))
