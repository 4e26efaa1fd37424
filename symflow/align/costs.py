"""Contraction of two networks over an axis: the matrix that an axis' oracle is given."""

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.align.places import (
    Costs,
    Place,
    added,
    chosen,
    differ,
    index_of,
    permutations,
    permute,
    ready,
    rows_of,
    units_of,
)
from symflow.arch import Axis, Element, Leaf, Symmetry
from symflow.groups import (
    CompactGroup,
    Group,
    Permutation,
    PermutingGroup,
    map_element,
    monomial,
)

# Leaves up to this size are kept a second time, in the order in which they are multiplied.
_SMALL = 2**17
# From so many weights on networks are moved one after the other: that takes an eighth of the time
# of a gather over all of them, but some calls for each network.
_EACH = 2**14


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
        self._first: dict[tuple[str, int], Tensor] = {}
        self._constant: dict[str, Costs] = {}
        self._kept: dict[tuple[str, int], tuple[Element, Tensor]] = {}
        self._every = torch.arange(w1.shape[:-1].numel(), device=w1.device)
        self.pairs = len(self._every)
        self._alike = {a.name: isinstance(a.group, PermutingGroup) for a in symmetry.axes}
        plain = {a.name for a in symmetry.axes if isinstance(a.group, Permutation)}
        self._permuted = {leaf.name: permutations(plain, leaf) for leaf in symmetry.leaves}
        self._neighbours = {
            name: {other for place in places for other in place.others} - {name}
            for name, places in self.places.items()
        }

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
        # With two axes over this one in a leaf, what a pair has in common there depends on how the
        # other one stands at units that were never compared.
        over = {a.name for a in self.symmetry.over(axis)}
        usable = [p for p in self.places[axis] if len(set(p.others) & over) < 2]
        usable = [p for p in usable if known is None or ready(p, known, names)]
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
        index = index_of(found.group, new[axis])
        for a in inner:
            if blocks[a.name]:
                inside = {p: chosen(c, index) for p, c in blocks[a.name].items()}
                best = oracle(a.group).nearest_by_degree(inside)
                new[a.name] = self.symmetry.carried(a, best, 1, new, back=True)
        return new

    def costs(self, axis: str, element: Element, rows: Tensor) -> Costs:
        """Return C (N, n, n) by degree for the networks ``rows`` of the batch."""
        return self._costs(axis, self.places[axis], element, rows, None)

    def value(self, names: set[str], element: Element, rows: Tensor) -> Float[Tensor, " N"]:
        """Return the inner product of the leaves that run over one of these axes."""
        total = torch.zeros(())
        for leaf in {p.leaf.name: p.leaf for k in names for p in self.places[k]}.values():
            moved = self._act(element, leaf, self._right[leaf.name], rows)
            left = self._take(self._left[leaf.name], rows)
            total = total + (left * moved).flatten(1).sum(1)
        return total

    def moved(self, element: Element, w1: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """Return the networks where the element takes them, leaf by leaf, in O(N D)."""
        few = len(w1) != 1 and w1.shape[1] <= _EACH
        if few or w1.device.type != "cpu":
            return self.symmetry.act(element, w1)
        found = w1.clone()
        sizes = [leaf.size for leaf in self.symmetry.leaves]
        pieces = zip(self.symmetry.leaves, w1.split(sizes, 1), found.split(sizes, 1), strict=True)
        for leaf, x, target in pieces:
            simple = self._permuted[leaf.name]
            if simple is None:
                moved = self._act(element, leaf, x.unflatten(1, leaf.shape), self._every)
                target.copy_(moved.flatten(1))
            elif simple:
                indices = [(k, element[axis].unbind(0)) for k, axis in simple]
                _select(x.unflatten(1, leaf.shape), target.unflatten(1, leaf.shape), indices)
        return found

    def _costs(
        self,
        axis: str,
        places: list[Place],
        element: Element,
        rows: Tensor,
        weights: Mapping[str, Tensor] | None,
    ) -> Costs:
        alike = self._alike[axis]  # then there is one matrix, whatever the degrees
        total = self._fixed(axis, [p for p in places if not p.others], weights, alike)
        total = {degree: self._take(c, rows) for degree, c in total.items()}
        for place in places:
            if place.others:
                degree = 1 if alike else place.degree
                total = added(total, {degree: self._product(place, element, rows)})
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
            c = left @ rows_of(self._right[place.leaf.name], place.dim).mT
            degree = 1 if alike else place.degree
            total[degree] = total[degree].add_(c) if degree in total else c
        if weights is None:
            self._constant[axis] = total
        return total

    def _product(self, place: Place, element: Element, rows: Tensor) -> Tensor:
        """Contract a leaf over all its dimensions but one: only where other axes have moved."""
        key = place.leaf.name, place.dim
        now = {name: element[name] for name in place.others}
        if key not in self._kept:
            c = self._multiply(place, element, rows)
            if len(rows) == self.pairs and c[0].numel() <= place.leaf.size:
                self._kept[key] = now, c
            return c
        before, c = self._kept[key]
        todo = rows[differ(before, now, rows.new_zeros(self.pairs).bool())[rows]]
        if len(todo) == self.pairs:
            c = self._corrected(place, before, now, c)
            c = self._multiply(place, element, todo) if c is None else c
        elif len(todo):

            def fresh(old: Tensor, new: Tensor) -> Tensor:
                return old.index_copy(0, todo, new[todo])

            c.index_copy_(0, todo, self._multiply(place, element, todo))  # only kept here
            now = {name: map_element(fresh, before[name], now[name]) for name in now}
        else:
            return self._take(c, rows)
        self._kept[key] = now, c
        return self._take(c, rows)

    def _corrected(self, place: Place, before: Element, now: Element, c: Tensor) -> Tensor | None:
        """Correct the product of one pair where one other axis' few moved units were counted."""
        simple = self._permuted[place.leaf.name]
        if self.pairs > 1 or simple is None or len(place.others) != 1:
            return None
        k = next(k for k, _ in simple if k != place.dim)
        old, new = before[place.others[0]][0], now[place.others[0]][0]
        units = (old != new).nonzero().squeeze(-1)
        if 4 * len(units) > len(old):
            return None
        left, right = self._left[place.leaf.name], self._right[place.leaf.name]
        moved = right.index_select(k + 1, new[units]) - right.index_select(k + 1, old[units])
        left = rows_of(left.index_select(k + 1, units), place.dim)
        return c.baddbmm(left, rows_of(moved, place.dim).mT)

    def _multiply(self, place: Place, element: Element, rows: Tensor) -> Tensor:
        left, simple = self._left_rows(place, rows), self._permuted[place.leaf.name]
        small = place.leaf.size <= _SMALL
        if simple is None or not (small and (self.pairs == 1 or len(place.leaf.dims) == 2)):
            return left @ rows_of(self._moved(place, element, rows), place.dim).mT
        # Whole rows are moved: of one pair they stand behind the axis, of many before it.
        key, front = (place.leaf.name, place.dim), self.pairs == 1
        if key not in self._first:
            x = self._right[place.leaf.name]
            x = x.movedim(place.dim + 1, 1 if front else 2)
            self._first[key] = x.contiguous()
        x = self._first[key]
        for k, axis in simple:
            if k != place.dim:
                at = (k + 2 if k < place.dim else k + 1) if front else 1
                x = permute(x, at, self._take(element[axis], rows), rows)
        return left @ (x.flatten(2).mT if front else x)

    def _best_over(
        self, axis: Axis, element: Element, rows: Tensor, known: set[str] | None
    ) -> Element:
        costs: Costs = {}
        for place in self.places[axis.name]:
            if known is not None and not set(place.others) <= known:
                continue
            left = units_of(self._left[place.leaf.name], place, flat=False)
            left = self._take(left, rows)
            right = units_of(self._moved(place, element, rows), place, flat=False)
            costs = added(costs, {place.degree: left @ right.mT})
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
            left = units_of(self._left[place.leaf.name], place, flat=True)
            left = self._take(left, rows)
            within = place.leaf.dims[place.dim].within
            moved = self._moved(place, element, rows, also=within)
            c = left @ units_of(moved, place, flat=True).mT
            total = added(total, {place.degree: c.reshape(-1, n, m, n, m).transpose(2, 3)})
        return total

    def width(self, place: Place) -> int:
        """Return the number of coordinates that a leaf gives to one unit."""
        return place.leaf.size // place.leaf.shape[place.dim]

    def _left_rows(self, place: Place, rows: Tensor) -> Tensor:
        key = place.leaf.name, place.dim
        if key not in self._rows_left:
            left = rows_of(self._left[place.leaf.name], place.dim)
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
        x = self._take(x, rows)
        simple = self._permuted[leaf.name]
        if simple is not None:
            for k, axis in simple:
                if k not in skip:
                    x = permute(x, k + 1, self._take(element[axis], rows))
            return x
        axes = {d.axis for k, d in enumerate(leaf.dims) if d.axis is not None and k not in skip}
        if not axes:
            return x
        here = {name: map_element(lambda g: self._take(g, rows), element[name]) for name in axes}
        if len(x) == 1:
            here = {name: map_element(lambda g: g[0], part) for name, part in here.items()}
            return self.symmetry.act_on_leaf(here, leaf, x[0], skip=skip)[None]
        return self.symmetry.act_on_leaf(here, leaf, x, skip=skip)

    def _take(self, x: Tensor, rows: Tensor) -> Tensor:
        """Pick networks of the batch; what there is one of serves them all."""
        return x if x.shape[0] == 1 or rows.shape[0] == self.pairs else x[rows]


def _select(x: Tensor, target: Tensor, indices: Sequence[tuple[int, Sequence[Tensor]]]) -> None:
    """Pick along some dimensions of each network's leaf, and put it straight to its place."""
    (last, final), rest = indices[-1], indices[:-1]
    for n, (source, place) in enumerate(zip(x.unbind(0), target.unbind(0), strict=True)):
        for k, index in rest:
            source = source.index_select(k, index[n])
        torch.index_select(source, last, final[n], out=place)


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
            eye = torch.eye(c.shape[-1], dtype=c.dtype, device=c.device).expand_as(c)
            power = group.act(g, eye, dim=-2, degree=degree if degree else 1)
            value = (power * c).sum((-2, -1))
        else:
            index, scales = found
            picked = c.diagonal(dim1=-2, dim2=-1)
            if index is not None:
                picked = c.gather(-1, index[..., None]).squeeze(-1)
            value = (picked if scales is None else picked * scales.to(c) ** degree).sum(-1)
        total = value if total is None else total + value
    return torch.zeros(()) if total is None else total
