"""Contraction of two networks over an axis: the matrix that an axis' oracle is given."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.arch import Axis, Element, Leaf, Symmetry
from symflow.groups import CompactGroup, Group, PermutingGroup, map_element, monomial

Costs = dict[int, Tensor]

# Leaves up to this size are kept a second time, in the order in which they are multiplied.
_SMALL = 2**17


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

    @property
    def degree(self) -> int:
        """How the axis acts there."""
        return self.leaf.dims[self.dim].degree


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
    no other axis touches are contracted once, and the others again only where one of their other
    axes has moved since: a product no larger than its leaf is kept, with the elements in it.

    An axis with others over it (heads, with the units in each) is solved together with these: the
    cost of a pair of its units is the best that their elements can do on it.
    """

    def __init__(self, symmetry: Symmetry, w0: Tensor, w1: Tensor) -> None:
        self.symmetry = symmetry
        self.places: dict[str, list[Place]] = {a.name: [] for a in symmetry.axes}
        self._left: dict[str, Tensor] = {}
        self._right: dict[str, Tensor] = {}
        for leaf in symmetry.leaves:
            if not (leaf.learnable and leaf.axes):
                continue
            self._right[leaf.name] = w1[..., leaf.span].reshape(-1, *leaf.shape)
            self._left[leaf.name] = w0[..., leaf.span].reshape(-1, *leaf.shape)
            for k, dim in enumerate(leaf.dims):
                if dim.axis is not None:
                    self.places[dim.axis].append(Place(leaf, k))
        self._rows_left: dict[tuple[str, int], Tensor] = {}
        self._constant: dict[str, Costs] = {}
        self._kept: dict[tuple[str, int], tuple[Element, Tensor]] = {}
        self._every = torch.arange(w1.shape[:-1].numel())
        self._neighbours = {
            name: {other for place in places for other in place.others} - {name}
            for name, places in self.places.items()
        }

    @property
    def pairs(self) -> int:
        """Number N of pairs."""
        return len(self._every)

    # ---------------------------------------------------------------- what depends on what

    def neighbours(self, axis: str) -> set[str]:
        """Return the axes that share a leaf with this one."""
        return self._neighbours[axis]

    def is_linear(self, axis: str) -> bool:
        """Whether the objective is linear in the axis' element: it occurs once in each leaf."""
        return not any(axis in place.others for place in self.places[axis])

    def solved_with(self, axis: str) -> tuple[Axis, ...]:
        """Return the axes over this one that are solved together with it.

        Those that come without other axes over it in some leaf: there the pair's cost is theirs.
        """
        over = self.symmetry.over(axis)
        names = {a.name for a in over}
        return tuple(a for a in over if any(not names & set(p.others) for p in self.places[a.name]))

    # ---------------------------------------------------------------- one step

    def best(
        self,
        axis: str,
        element: Element,
        rows: Tensor,
        known: set[str] | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Element:
        """Solve for one axis, and those over it, the others being as they are.

        Parameters
        ----------
        axis
            Name of the axis.
        element
            Where all axes are (N).
        rows
            The networks of the batch to solve for.
        known
            Use only leaves whose other axes are all among these; all leaves if None.
        weights
            For each leaf without other axes one factor for each coordinate of a unit: the covariant
            way of making starts differ.

        Returns
        -------
        Element
            New elements of the axes solved for, for ``rows``; none if no leaf can be used.
        """
        found = self.symmetry[axis]
        inner = self.solved_with(axis)
        if found.over is not None:
            return self._best_over(found, element, rows, known)
        names = {a.name for a in inner}
        usable = [p for p in self.places[axis] if known is None or _ready(p, known, names)]
        plain = [p for p in usable if not names & set(p.others)]
        costs = self._costs(axis, plain, element, rows, weights)
        if not inner:
            return {axis: nearest(found.group, costs)} if costs else {}
        blocks = {a.name: self._blocks(a, usable, element, rows) for a in inner}
        for a in inner:
            if blocks[a.name]:
                support = oracle(a.group).support_by_degree(blocks[a.name])
                costs[0] = costs[0] + support if 0 in costs else support
        if not costs:
            return {}
        new = {axis: oracle(found.group).nearest_by_degree(costs)}
        index = _index(found.group, new[axis])
        for a in inner:
            if blocks[a.name]:
                chosen = {p: _pairs(c, index) for p, c in blocks[a.name].items()}
                best = oracle(a.group).nearest_by_degree(chosen)
                new[a.name] = self.symmetry.carried(a, best, 1, new, back=True)
        return new

    def costs(self, axis: str, element: Element, rows: Tensor) -> Costs:
        """Return C (N, n, n) by degree for the networks ``rows`` of the batch."""
        return self._costs(axis, self.places[axis], element, rows, None)

    def gain(self, axis: str, costs: Costs, new: Any, old: Any) -> Float[Tensor, " N"]:
        """Return by how much the (linear) objective rises from one element of an axis to another.

        Exact if the axis occurs once in each leaf; O(n) for permutations.
        """
        group = self.symmetry[axis].group
        return inner_product(group, costs, new) - inner_product(group, costs, old)

    def value(self, names: set[str], element: Element, rows: Tensor) -> Float[Tensor, " N"]:
        """Return the inner product of the leaves that run over one of these axes."""
        total = torch.zeros(())
        for leaf in {p.leaf.name: p.leaf for k in names for p in self.places[k]}.values():
            moved = self._act(element, leaf, self._right[leaf.name], rows)
            left = self._take(self._left[leaf.name], rows)
            total = total + (left * moved).flatten(1).sum(1)
        return total

    def moved(self, element: Element, w1: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """Return the networks where the element takes them: one network leaf by leaf, in O(D)."""
        if len(w1) != 1:
            return self.symmetry.act(element, w1)
        found = torch.empty_like(w1)
        for leaf in self.symmetry.leaves:
            x = w1[:, leaf.span].reshape(1, *leaf.shape)
            found[:, leaf.span] = self._act(element, leaf, x, self._every).reshape(1, -1)
        return found

    def _costs(
        self,
        axis: str,
        places: list[Place],
        element: Element,
        rows: Tensor,
        weights: Mapping[str, Tensor] | None,
    ) -> Costs:
        # Where every degree acts alike there is one matrix, whatever the degrees.
        alike = isinstance(self.symmetry[axis].group, PermutingGroup)
        total = self._fixed(axis, [p for p in places if not p.others], weights, alike)
        total = {degree: self._take(c, rows) for degree, c in total.items()}
        for place in places:
            if place.others:
                c = {1 if alike else place.degree: self._product(place, element, rows)}
                total = _add(total, c)
        return total

    def _fixed(
        self, axis: str, places: list[Place], weights: Mapping[str, Tensor] | None, alike: bool
    ) -> Costs:
        """Contract the leaves that no other axis touches; but for weights, which vary, once."""
        if weights is None and axis in self._constant:
            return self._constant[axis]
        total: Costs = {}
        for place in places:
            left = self._left_rows(place, self._every)
            if weights is not None:
                left = left * weights[place.leaf.name].to(left)
            right = _rows(self._right[place.leaf.name], place.dim)
            degree = 1 if alike else place.degree
            if degree in total:
                left = left.expand(len(right), -1, -1)
                total[degree] = total[degree].baddbmm_(left, right.mT)
            else:
                total[degree] = left @ right.mT
        if weights is None:
            self._constant[axis] = total
        return total

    def _product(self, place: Place, element: Element, rows: Tensor) -> Tensor:
        """Contract a leaf over all its dimensions but one: only where other axes have moved."""
        key = place.leaf.name, place.dim
        now = {name: element[name] for name in dict.fromkeys(place.others)}
        if key not in self._kept:
            c = self._multiply(place, element, rows)
            if len(rows) == len(self._every) and c[0].numel() <= place.leaf.size:
                self._kept[key] = now, c
            return c
        before, c = self._kept[key]
        todo = rows[_differ(before, now, len(self._every))[rows]]
        if len(todo) == len(self._every):
            c = self._multiply(place, element, todo)
        elif len(todo):

            def fresh(old: Tensor, new: Tensor) -> Tensor:
                return old.index_copy(0, todo, new[todo])

            c = c.index_copy(0, todo, self._multiply(place, element, todo))
            now = {name: map_element(fresh, before[name], now[name]) for name in now}
        else:
            return self._take(c, rows)
        self._kept[key] = now, c
        return self._take(c, rows)

    def _multiply(self, place: Place, element: Element, rows: Tensor) -> Tensor:
        return self._left_rows(place, rows) @ _rows(self._moved(place, element, rows), place.dim).mT

    def _best_over(
        self, axis: Axis, element: Element, rows: Tensor, known: set[str] | None
    ) -> Element:
        costs: Costs = {}
        for place in self.places[axis.name]:
            if known is not None and not set(place.others) <= known:
                continue
            left = _units(self._left[place.leaf.name], place, flat=False)
            left = self._take(left, rows)
            right = _units(self._moved(place, element, rows), place, flat=False)
            costs = _add(costs, {place.degree: left @ right.mT})
        if not costs:
            return {}
        best = oracle(axis.group).nearest_by_degree(costs)
        over = axis.over or ""
        moved = {over: map_element(lambda part: part[rows], element[over])}
        return {axis.name: self.symmetry.carried(axis, best, 1, moved, back=True)}

    def _blocks(self, axis: Axis, usable: list[Place], element: Element, rows: Tensor) -> Costs:
        """Return the costs of an axis for each pair of units of the one it is over, by degree.

        Of shape (N, n, n, m, m): what units i of w0 and j of w1 have in common, inside.
        """
        total: Costs = {}
        leaves = {p.leaf.name for p in usable}
        for place in self.places[axis.name]:
            if place.leaf.name not in leaves:
                continue
            n, m = self.symmetry[axis.over or ""].size, axis.size
            left = _units(self._left[place.leaf.name], place, flat=True)
            left = self._take(left, rows)
            within = place.leaf.dims[place.dim].within
            moved = self._moved(place, element, rows, also=within)
            c = left @ _units(moved, place, flat=True).mT
            total = _add(total, {place.degree: c.reshape(-1, n, m, n, m).transpose(2, 3)})
        return total

    def width(self, place: Place) -> int:
        """Return the number of coordinates that a leaf gives to one unit."""
        return place.leaf.size // place.leaf.shape[place.dim]

    def _left_rows(self, place: Place, rows: Tensor) -> Tensor:
        key = place.leaf.name, place.dim
        if key not in self._rows_left:
            left = _rows(self._left[place.leaf.name], place.dim)
            if place.leaf.size > _SMALL:  # to copy it again costs little beside the product
                return self._take(left, rows)
            self._rows_left[key] = left
        return self._take(self._rows_left[key], rows)

    def _moved(
        self, place: Place, element: Element, rows: Tensor, also: int | None = None
    ) -> Tensor:
        """Return the leaf of w1 with every dimension moved but that of the place (and another)."""
        return self._act(element, place.leaf, self._right[place.leaf.name], rows, place.dim, also)

    def _act(
        self, element: Element, leaf: Leaf, x: Tensor, rows: Tensor, *skip: int | None
    ) -> Tensor:
        axes = {d.axis for k, d in enumerate(leaf.dims) if d.axis is not None and k not in skip}
        x = self._take(x, rows)
        if not axes:
            return x
        here = {name: map_element(lambda g: self._take(g, rows), element[name]) for name in axes}
        if len(x) == 1:  # without a batch an index moves whole rows
            here = {name: map_element(lambda g: g[0], part) for name, part in here.items()}
            return self.symmetry.act_on_leaf(here, leaf, x[0], skip=skip)[None]
        return self.symmetry.act_on_leaf(here, leaf, x, skip=skip)

    def _take(self, x: Tensor, rows: Tensor) -> Tensor:
        """Pick networks of the batch; what there is one of serves them all."""
        return x if len(x) == 1 or len(rows) == len(self._every) else x[rows]


def oracle(group: Group[Any]) -> CompactGroup[Any]:
    """Return a group that aligners can maximise over.

    Raises
    ------
    TypeError
        If it is not compact.
    """
    if isinstance(group, CompactGroup):
        return group
    raise TypeError(f"{group} is not compact")  # excluded by require_compact


def nearest(group: Group[Any], costs: Costs) -> Any:
    """Solve for one axis; a single matrix for a group whose degrees act alike is not copied."""
    if len(costs) == 1 and isinstance(group, PermutingGroup):
        return group.nearest(next(iter(costs.values())))
    return oracle(group).nearest_by_degree(costs)


def inner_product(group: Group[Any], costs: Costs, g: Any) -> Float[Tensor, " N"]:
    """Return the sum over degrees p of <A^(p), c_p>, A^(p) being how degree p acts."""
    found = monomial(group, g)
    total: Tensor | None = None
    for degree, c in costs.items():
        if found is None:
            power = group.act(g, _eye(c), dim=-2, degree=degree if degree else 1)
            value = (power * c).sum((-2, -1))
        else:
            index, scales = found
            picked = c.diagonal(dim1=-2, dim2=-1)
            if index is not None:
                picked = c.gather(-1, index[..., None]).squeeze(-1)
            value = (picked if scales is None else picked * scales.to(c) ** degree).sum(-1)
        total = value if total is None else total + value
    return total if total is not None else torch.zeros(())


def _ready(place: Place, known: set[str], solved: set[str]) -> bool:
    """Whether all other axes of a leaf are known, but for one that is solved at the same time."""
    return len(set(place.others) & solved) < 2 and set(place.others) <= known | solved


def _differ(before: Element, now: Element, n: int) -> Tensor:
    """Which networks' elements are others than before."""
    found = torch.zeros(n, dtype=torch.bool)

    def compare(old: Tensor, new: Tensor) -> Tensor:
        nonlocal found
        if old is not new:
            found = found | (old != new).flatten(1).any(1)
        return new

    for name, g in now.items():
        map_element(compare, before[name], g)
    return found


def _eye(c: Tensor) -> Tensor:
    return torch.eye(c.shape[-1], dtype=c.dtype, device=c.device).expand_as(c)


def _rows(x: Tensor, k: int) -> Tensor:
    """View a leaf (N, ...) as (N, n, coordinates of one unit)."""
    return x.movedim(k + 1, 1).reshape(len(x), x.shape[k + 1], -1)


def _units(x: Tensor, place: Place, *, flat: bool) -> Tensor:
    """View a leaf by the units of an axis and of the one it is over: (N, m, n, rest)."""
    within = place.leaf.dims[place.dim].within or 0
    moved = x.movedim([within + 1, place.dim + 1], [1, 2])
    moved = moved.reshape(*moved.shape[:3], -1)
    return moved.flatten(1, 2) if flat else moved


def _index(group: Group[Any], g: Any) -> Tensor:
    found = monomial(group, g)
    if found is None or found[0] is None:
        size = group.size
        return torch.arange(size).expand(*group.batch_shape(g), size)
    return found[0]


def _pairs(c: Tensor, index: Tensor) -> Tensor:
    """Pick from (N, n, n, m, m) the blocks of units i and index_i."""
    at = index[..., None, None, None].expand(*index.shape, 1, *c.shape[-2:])
    return c.gather(2, at).squeeze(2)


def _add(a: Costs, b: Costs) -> Costs:
    total = dict(a)
    for degree, c in b.items():
        total[degree] = total[degree] + c if degree in total else c
    return total


def where(keep: Tensor, element: Any, other: Any) -> Any:
    """Choose between two batched elements entry by entry; ``keep`` is (N,)."""
    return map_element(
        lambda e, o: torch.where(keep.reshape(-1, *(1,) * (e.ndim - 1)), e, o), element, other
    )
