"""The balanced section: the point of least norm on every scaling orbit."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.arch import Architecture, Dim, scale_coordinates
from symflow.errors import ConvergenceError, LeafError
from symflow.groups import GeneralLinear, ScalingGroup
from symflow.manifolds import BalancedCone, ConeProduct
from symflow.numerics import power_of_two, tolerance
from symflow.sections.base import (
    Section,
    is_moderate,
    mixed_axes,
    require_finite,
    rescale,
    scaled_axes,
    uncompensated_axes,
    unit_coordinates,
    unit_shape,
)

_SWEEPS = 2000
_ROUGH_SWEEPS = 100


@dataclass(frozen=True)
class _Energy:
    """Squared weights summed over everything but the scaled axes they depend on."""

    # Axis, degree, place, and the place of what the axis is over, for each that scales the values.
    dims: tuple[tuple[str, int, int, int | None], ...]
    values: Tensor  # (*batch, n_1, ..., n_k), float64; summed dimensions have size one
    rank: int  # k

    def placed(self, j: int, factors: Tensor) -> Tensor:
        """View values of the units (*batch, units) of one of the axes along the values."""
        _, _, k, within = self.dims[j]
        units = [k] if within is None else [within, k]
        sizes = [self.values.shape[i - self.rank] for i in units]
        shape = [1] * self.rank
        for i, n in zip(units, sizes, strict=True):
            shape[i] = n
        spread = factors.unflatten(-1, sizes)
        if units != sorted(units):
            spread = spread.mT
        return spread.reshape(*factors.shape[:-1], *shape)

    def by_unit(self, j: int, values: Tensor) -> Tensor:
        """Sum values over everything but the units of one of the axes: (*batch, units)."""
        _, _, k, within = self.dims[j]
        units = [k] if within is None else [within, k]
        front = values.ndim - self.rank
        moved = values.movedim([front + i for i in units], list(range(front, front + len(units))))
        n = moved.shape[front : front + len(units)].numel()
        return moved.reshape(*moved.shape[:front], n, -1).sum(-1)


@final
class BalancedSection(Section):
    r"""Minimise the norm over all positive scales (Kempf-Ness; Stock et al., 2019).

    :math:`\min_\lambda |\lambda \cdot w|^2` is convex in :math:`\log \lambda` and has one minimiser
    on each closed orbit; there, the incoming and the outgoing weights of every unit have equal norm
    (for an activation of degree k: the ratio sqrt(k)). It does not change the function.

    Notes
    -----
    Coordinate descent over axes with the closed form of each group's ``balance``, on energies that
    are summed once: a sweep costs the number of weights between scaled axes. A unit that receives
    or sends nothing is put to zero, the limit of its orbit, with a ``DeadNeuronWarning``.

    Examples
    --------
    >>> import symflow
    >>> section = BalancedSection(symflow.mlp([1, 1, 1]))
    >>> section.project(torch.tensor([1.0, 0.0, 16.0, 5.0]))  # in, bias, out, output bias
    tensor([4., 0., 4., 5.])

    Raises
    ------
    LeafError
        If nothing compensates the scales of an axis, as those of units before a BatchNorm.
    """

    def __init__(self, arch: Architecture) -> None:
        self.arch = arch
        self.symmetry = arch.symmetry.compact
        self._axes = scaled_axes(arch)
        _require_compensated(arch)
        # Coordinates by unit, which A and A^-T multiply, for each axis whose units mix.
        self._mixed = {
            a: tuple(
                unit_coordinates(arch, a, degree).unflatten(0, unit_shape(arch, a))
                for degree in (1, -1)
            )
            for a in mixed_axes(arch)
        }
        # Whether balancing one of them, or the scales, disturbs the others.
        touched = [set(leaf.axes) & {*self._mixed, *self._axes} for leaf in arch.leaves]
        self._coupled = any(len(axes) > 1 and axes & set(self._mixed) for axes in touched)
        self._offsets: dict[str, int] = {}
        for name in self._axes:
            self._offsets[name] = sum(_count(arch, a) for a in self._offsets)
        coordinates, units, degrees = self._exponents()
        self._coordinates = coordinates
        self.manifold = self.state_manifold = BalancedCone(
            arch.dimension,
            coordinates,
            units,
            degrees,
            sum(_count(arch, a) for a in self._axes),
            self.project,
            arch.num_parameters,
        )

    def split(
        self, w: Float[Tensor, "*#batch D"]
    ) -> tuple[Float[Tensor, "*#batch D"], Float[Tensor, "*#batch E"]]:
        """Return the balanced weights and nothing."""
        if not (self._axes or self._mixed) or w.shape[:-1].numel() == 0:
            return w, w[..., :0]
        require_finite(self.arch, w)
        x = self._scaled(w) if self._axes else w
        for _ in range(_SWEEPS if self._mixed else 0):
            before, x = x, self._unmixed(x)
            if not self._coupled:
                break
            x = self._scaled(x) if self._axes else x
            change = (x - before).detach().to(torch.float64).norm()
            if change <= tolerance(w.dtype).eps * x.shape[-1] ** 0.5 * before.detach().norm():
                break
        require_finite(self.arch, x)
        return x, w[..., :0]

    def _scaled(self, w: Tensor) -> Tensor:
        """Balance all scales, other things being as they are."""
        x, present = w, None
        if w.dtype == torch.float64 and not _has_squares(w):
            present = self._energies((w != 0).to(w.dtype))
            x = self._brought_together(w)
        energies = self._energies(x if present is None else x * self._common(x))
        alive = self._alive(energies if present is None else present)
        logs = self._balance([_masked(e, alive) for e in energies])
        scales = {k: v.exp() for k, v in logs.items()}
        if not all(is_moderate(s, w.dtype) for s in scales.values()):
            x = x.to(torch.float64)
        return rescale(self.arch, x, scales, alive).to(w.dtype)

    def _unmixed(self, x: Tensor) -> Tensor:
        """Balance the linear maps of all mixed axes, one after the other, in float64."""
        moved = x.to(torch.float64)
        for axis, (up, down) in self._mixed.items():
            group = self.arch.symmetry[axis].group
            if not isinstance(group, GeneralLinear):
                raise TypeError(f"there is no balanced point under {group}, of axis {axis}")
            up, down = up.to(x.device), down.to(x.device)
            new_up, new_down = group.balance_factors(moved[..., up], moved[..., down])
            index = torch.cat([up.flatten(), down.flatten()])
            values = torch.cat([new_up.flatten(-up.ndim), new_down.flatten(-down.ndim)], -1)
            moved = moved.index_copy(-1, index, values)
        return moved.to(x.dtype)

    def join(
        self, x: Float[Tensor, "*#batch D"], removed: Float[Tensor, "*#batch E"]
    ) -> Float[Tensor, "*#batch D"]:
        """Return the weights."""
        return x

    def intrinsic(self) -> ConeProduct:
        """Return the balanced weights with the metric of the set itself: arcs instead of chords.

        Raises
        ------
        LeafError
            If a weight belongs to two scaled units, whose cones are not independent then, or if
            linear maps are balanced: no closed form is known there.

        Examples
        --------
        >>> import symflow
        >>> space = BalancedSection(symflow.mlp([2, 3, 2])).intrinsic()
        >>> space.check_point_on_manifold(space.projx(torch.randn(space.dimension)))
        True
        """
        if self._mixed:
            axis = self.arch.symmetry[next(iter(self._mixed))]
            raise LeafError(
                f"metric='intrinsic' is known for scales, not for the linear maps of axis "
                f"{axis.name} ({axis.group}): leave metric out, or these maps: "
                f"arch.with_groups({{{axis.name!r}: symflow.Trivial({axis.size})}})"
            )
        sides: dict[str, dict[int, Tensor]] = {}
        for leaf in self.arch.leaves:
            own = [d for d in leaf.dims if leaf.learnable and self._scales(d)]
            if len(own) > 1:
                raise LeafError(
                    f"metric='intrinsic' wants weights of one scaled unit each, but {leaf.name!r} "
                    f"stands between units of {own[0].axis} and {own[1].axis}: leave metric out "
                    "for chords, take section='sphere', or leave the scales of one of them out"
                )
            for d in own:
                axis = d.axis or ""
                found = sides.setdefault(axis, {})
                found[d.degree] = unit_coordinates(self.arch, axis, d.degree)
        families: list[tuple[Any, ...]] = []
        for axis, found in sides.items():
            if len(found) > 2:
                raise LeafError(
                    f"metric='intrinsic' wants two sides of each unit, but axis {axis} scales "
                    f"weights by {len(found)} powers, {sorted(found)}: leave metric out"
                )
            down, up = sorted(found)
            if 1 in (found[up].shape[1], found[down].shape[1]):
                raise LeafError(
                    f"metric='intrinsic' wants two weights or more on both sides of each unit, but "
                    f"units of axis {axis} have a single one on a side: its sign cannot turn "
                    "without going through zero. Leave metric out for chords, or take "
                    "section='sphere'"
                )
            odd = up % 2 == 1, down % 2 == 1
            families.append((found[up], found[down], -down / up, odd))
        incoming, outgoing, ratios, odd = ([one[j] for one in families] for j in range(4))
        counted = self.arch.num_parameters
        return ConeProduct(self.arch.dimension, incoming, outgoing, ratios, odd, counted)

    def _exponents(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the entries of E for the balanced cone, over learnable coordinates."""
        parts: list[tuple[Tensor, Tensor, int]] = []
        for name in self._axes:
            degrees = {
                d.degree for x in self.arch.leaves for d in x.dims if d.axis == name and d.degree
            }
            for degree in sorted(degrees):
                index = unit_coordinates(self.arch, name, degree)
                unit = torch.arange(index.shape[0])[:, None].expand_as(index)
                parts.append((index.reshape(-1), unit.reshape(-1) + self._offsets[name], degree))
        empty = torch.zeros(0, dtype=torch.long)
        return (
            torch.cat([empty, *(p[0] for p in parts)]),
            torch.cat([empty, *(p[1] for p in parts)]),
            torch.cat([empty, *(torch.full_like(p[0], p[2]) for p in parts)]),
        )

    def _energies(self, w: Tensor) -> list[_Energy]:
        """Sum squares over everything but scaled axes; leaves with the same dims are added."""
        found: dict[Any, _Energy] = {}
        for leaf in self.arch.leaves:
            dims = tuple(
                (d.axis or "", d.degree, k, d.within)
                for k, d in enumerate(leaf.dims)
                if self._scales(d)
            )
            if not dims or not leaf.learnable:
                continue
            squares = w[..., leaf.span].to(torch.float64).square()
            squares = squares.reshape(*w.shape[:-1], *leaf.shape)
            kept = {k for _, _, *places in dims for k in places if k is not None}
            for k in range(len(leaf.dims)):
                if k not in kept:
                    squares = squares.sum(k - len(leaf.dims), keepdim=True)
            if len(dims) == 2 and dims[0][0] == dims[1][0] and dims[0][1] == -dims[1][1]:
                # A unit's weight on itself has degree zero as a whole.
                first, second = (k - len(leaf.dims) for _, _, k, _ in dims)
                loops = squares.diagonal(dim1=first, dim2=second)
                loops = torch.diag_embed(loops, dim1=first, dim2=second)
                squares = squares - loops
            key = dims, squares.shape
            if key in found:
                squares = found[key].values + squares
            found[key] = _Energy(dims, squares, len(leaf.dims))
        return list(found.values())

    def _brought_together(self, w: Tensor) -> Tensor:
        """Move along the orbit until the squares of both sides of each unit can be compared.

        The greatest weights of both sides are made alike, up to a power of two: nothing is rounded.
        """
        x = w
        for _ in range(_ROUGH_SWEEPS):
            still = True
            for name in self._axes:
                shift = self._shift(x.detach(), name)
                if not bool(shift.any()):
                    continue
                still = False
                for part in (shift // 2, shift - shift // 2):  # the whole may be out of range
                    factors = scale_coordinates(self.arch.leaves, {name: torch.pow(2.0, part)})
                    x = x if factors is None else x * factors
            if still:
                break
        return x

    def _shift(self, x: Tensor, axis: str) -> Tensor:
        """Return the binary logarithm of the scale of each unit that makes its two sides alike."""
        tops: dict[bool, tuple[int, Tensor]] = {}
        for degree in {d.degree for leaf in self.arch.leaves for d in leaf.dims if d.axis == axis}:
            index = unit_coordinates(self.arch, axis, degree).to(x.device)
            if degree and index.shape[-1]:
                tops[degree > 0] = abs(degree), x[..., index].abs().amax(-1)
        if len(tops) < 2:
            return x.new_zeros(*x.shape[:-1], _count(self.arch, axis))
        (up, incoming), (down, outgoing) = tops[True], tops[False]
        apart = torch.frexp(outgoing).exponent - torch.frexp(incoming).exponent
        shift = (apart / (up + down)).trunc().to(x.dtype)
        return torch.where((incoming > 0) & (outgoing > 0), shift, torch.zeros_like(shift))

    def _common(self, x: Tensor) -> Tensor:
        """Return one factor for each network that brings its scaled weights next to one."""
        return power_of_two(x.index_select(-1, self._coordinates.to(x.device)))

    def _scales(self, dim: Dim) -> bool:
        return dim.axis in self._axes and dim.degree != 0

    def _alive(self, energies: list[_Energy]) -> dict[str, Tensor]:
        """Find the units with something on both sides, once those without are put to zero."""
        one = energies[0].values
        batch = one.shape[: one.ndim - energies[0].rank]
        alive = {a: one.new_ones(*batch, _count(self.arch, a)) for a in self._axes}
        for _ in range(1 + sum(_count(self.arch, a) for a in self._axes)):
            before = dict(alive)
            for axis in self._axes:
                energy = _unit_energy(energies, axis, alive, absolute=True)
                up = sum((e for p, e in energy.items() if p > 0), torch.zeros_like(alive[axis]))
                down = sum((e for p, e in energy.items() if p < 0), torch.zeros_like(alive[axis]))
                alive[axis] = alive[axis] * ((up > 0) & (down > 0))
            if all(torch.equal(alive[a], before[a]) for a in self._axes):
                break
        return {a: mask > 0 for a, mask in alive.items()}

    def _balance(self, energies: list[_Energy]) -> dict[str, Tensor]:
        """Coordinate descent on the logarithms of all scales, over axes from input to output."""
        one = energies[0].values
        batch = one.shape[: one.ndim - energies[0].rank]
        factors = {a: one.new_ones(*batch, _count(self.arch, a)) for a in self._axes}
        loops = {a for e in energies for a, *_ in e.dims if [x for x, *_ in e.dims].count(a) > 1}
        exact = len(self._axes) == 1 and not loops
        change = float("inf")
        for _ in range(_SWEEPS):
            change = 0.0
            for axis in self._axes:
                group = self.arch.symmetry[axis].group
                energy = _unit_energy(energies, axis, factors)
                if not isinstance(group, ScalingGroup) or not energy:
                    continue
                shape = unit_shape(self.arch, axis)
                energy = {p: e.unflatten(-1, shape) for p, e in energy.items()}
                new = group.noncompact(group.balance(energy)).flatten(-len(shape))
                if axis in loops:  # both ends of a weight move: go half of the way
                    new = (new * factors[axis]).sqrt()
                change = max(change, float((new / factors[axis]).detach().log().abs().max()))
                factors[axis] = new
            if exact or change <= tolerance(torch.float64).converged:
                return {a: f.log() for a, f in factors.items()}
        raise ConvergenceError(
            f"balancing did not converge in {_SWEEPS} sweeps: the scales of the layers are too far "
            "apart; rescale the network, or use section='sphere'",
            change,
        )


def _has_squares(w: Tensor) -> bool:
    """Whether squares of weights, and their products with squares of scales, are in range."""
    greatest = torch.finfo(w.dtype).max ** 0.2
    size = w.detach().abs()
    return bool(((size == 0) | ((size >= 1 / greatest) & (size <= greatest))).all())


def _unit_energy(
    energies: Sequence[_Energy],
    axis: str,
    factors: Mapping[str, Tensor],
    *,
    absolute: bool = False,
) -> dict[int, Tensor]:
    """Energy of every unit of an axis by degree, the other axes scaled by ``factors``."""
    total: dict[int, Tensor] = {}
    for energy in energies:
        for j, (name, degree, *_) in enumerate(energy.dims):
            if name != axis:
                continue
            values = energy.values
            for i, (other, power, *_) in enumerate(energy.dims):
                if i != j:
                    factor = factors[other] ** (2 * (abs(power) if absolute else power))
                    values = values * energy.placed(i, factor)
            summed = energy.by_unit(j, values)
            total[degree] = total[degree] + summed if degree in total else summed
    return total


def _masked(energy: _Energy, alive: Mapping[str, Tensor]) -> _Energy:
    values = energy.values
    for j, (axis, *_) in enumerate(energy.dims):
        values = values * energy.placed(j, alive[axis].to(values.dtype))
    return _Energy(energy.dims, values, energy.rank)


def _count(arch: Architecture, axis: str) -> int:
    """Count the units of an axis, for each unit of the one it is over."""
    return math.prod(unit_shape(arch, axis))


def _require_compensated(arch: Architecture) -> None:
    alone = uncompensated_axes(arch)
    if alone:
        axis = arch.symmetry[alone[0]]
        rest = f"{'Permutation' if axis.over is None else 'Trivial'}({axis.size})"
        raise LeafError(
            f"nothing compensates the scales of axis {axis.name} ({axis.reason}): they could "
            "shrink without end. Use section='sphere', or leave these scales out: "
            f"arch.with_groups({{{axis.name!r}: symflow.{rest}}})"
        )
