"""What tracing has found out so far about axes: what they are tied to, cut into, a product of."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import final

from symflow.arch.labels import FIXED, Atom, Label, label_of, nested, size_of


@final
@dataclass
class RawAxis:
    """Units while it is being found out what moves them: what has not been ruled out still acts.

    Attributes
    ----------
    size, source
        Number of units, and the path of the operation that made them.
    parent
        The axis it is tied to.
    parts
        The axes it was cut into, one after the other, if it was.
    factors
        The axes it is the product of, if it was unflattened; the last runs fastest.
    over
        Axes each of whose units may have an element of its own.
    linear, orthogonal
        Whether all linear maps, or all rotations, of the units may still act.
    rotary
        How the units are paired if rotary embeddings turn them: what commutes with that, acts.
    fixed
        Why nothing may act, if so.
    passed
        What it went through, for the reason that is shown.
    """

    size: int
    source: str
    parent: str | None = None
    parts: tuple[str, ...] = ()
    factors: tuple[str, ...] = ()
    over: tuple[str, ...] = ()
    linear: bool = True
    orthogonal: bool = True
    rotary: str = ""
    fixed: str = ""
    passed: list[str] = field(default_factory=lambda: [])


@final
@dataclass
class RawFibre:
    """Signs and scales of the units of an axis, as long as nothing speaks against them.

    Attributes
    ----------
    source
        The operation that made it.
    means
        The fibres whose product, to these powers, it is tied to.
    sign, scale
        Whether these may still act.
    inner
        For scales of units that were unflattened: the axis and the fibre of the units inside them,
        which can do the same.
    """

    source: str
    means: dict[str, int] | None = None
    sign: bool = True
    scale: bool = True
    inner: tuple[str, str] | None = None

    def end(self, *, even: bool = False) -> None:
        """Nothing acts any more; signs do if they come to an even power."""
        self.scale, self.sign = False, self.sign and even


class Structure(ABC):
    """A union-find over axes and fibres that can be cut and unflattened.

    Parameters
    ----------
    names
        From each key of the state dict to its canonical one, for tied weights.
    limit
        Whether scales count that are exact only as the eps of normalisation layers goes to zero.
    """

    def __init__(self, names: dict[str, str], *, limit: bool = False) -> None:
        self.limit = limit
        self.axes: dict[str, RawAxis] = {}
        self.fibres: dict[str, RawFibre] = {}
        self.leaves: dict[str, tuple[Label, ...]] = {}
        self.names = names  # alias -> canonical name, for tied weights
        # Fibres of axes that were cut out of others, by those axes and the fibres there.
        self._copies: dict[tuple[str, str], str] = {}

    # ---------------------------------------------------------------- new ones

    def new_axis(self, size: int, source: str) -> Label:
        """Open an axis on which everything acts until something speaks against it."""
        name = self._open(size, source)
        return Label(((Atom(size, name, ((self._fibre(source), 1),)),),))

    def _open(self, size: int, source: str, like: RawAxis | None = None) -> str:
        name = f"#{len(self.axes)}"
        self.axes[name] = RawAxis(size, source)
        if like is not None:
            one, two = self.axes[name], like
            one.linear, one.orthogonal, one.fixed = two.linear, two.orthogonal, two.fixed
            one.over, one.passed = two.over, list(two.passed)
        return name

    def _fibre(self, source: str) -> str:
        name = f"f{len(self.fibres)}"
        self.fibres[name] = RawFibre(source)
        return name

    def new_fibre(self, label: Label, source: str) -> Label:
        """Return the same units with signs and scales of their own, and no others."""

        def renewed(part: tuple[Atom, ...]) -> tuple[Atom, ...]:
            moving = [k for k, atom in enumerate(part) if atom.axis is not None]
            found = [atom.permuted() for atom in part]
            if moving:
                found[moving[-1]] = replace(found[moving[-1]], degrees=((self._fibre(source), 1),))
            return tuple(found)

        label = self.resolve(label)
        if label.is_nested:
            self.fix(label, f"a concatenation behind other units, at {source}")
            return FIXED
        self.unmix(label)
        return Label(tuple(map(renewed, label.parts)))

    # ---------------------------------------------------------------- following ties

    def root(self, axis: str) -> str:
        """Return the axis that this one is tied to in the end."""
        while (parent := self.axes[axis].parent) is not None:
            axis = parent
        return axis

    def powers(self, name: str, power: int = 1) -> dict[str, int]:
        """Return the fibres that a power of this one is the product of in the end."""
        means = self.fibres[name].means
        if means is None:
            return {name: power}
        found: dict[str, int] = {}
        for other, p in means.items():
            for root, q in self.powers(other, p * power).items():
                found[root] = found.get(root, 0) + q
        return found

    def resolve(self, label: Label) -> Label:
        """Follow everything to what it is tied to, cut into or a product of."""
        found = label_of([found for part in label.parts for found in self._resolved(part)])
        if found.is_nested and not found.is_grid:
            for atom in found.atoms:
                raw = self.axes[atom.axis or ""]
                raw.fixed = raw.fixed or "concatenations within concatenations"
            return self.resolve(found)
        return found

    def _resolved(self, part: tuple[Atom, ...]) -> list[tuple[Atom, ...]]:
        """Return the parts that a product of factors consists of."""
        found: list[tuple[Atom, ...]] = [()]
        for atom in part:
            choices = self._expanded(atom)
            if len(choices) == 1:
                found = [(*before, *choices[0]) for before in found]
            elif found == [()]:
                found = choices
            else:  # repeated for every index of what stands before it
                found = [(*before, nested(choices)) for before in found]
        return found

    def _expanded(self, atom: Atom) -> list[tuple[Atom, ...]]:
        if atom.parts:
            return [found for part in atom.parts for found in self._resolved(part)]
        if atom.axis is None:
            return [(atom,)]
        axis = self.root(atom.axis)
        raw = self.axes[axis]
        if raw.parts:
            return [p for part in raw.parts for p in self._expanded(self._part(atom, part))]
        if raw.factors:
            first, last = raw.factors
            outer = self._expanded(self._part(atom, first, last))
            inner = self._expanded(replace(atom, axis=last, size=self.axes[last].size))
            behind = inner[0] if len(inner) == 1 else (nested(inner),)
            return [(*part, *behind) for part in outer]
        if raw.fixed:
            return [(Atom(atom.size),)]
        degrees: dict[str, int] = {}
        for name, power in atom.degrees:
            for root, p in self.powers(name, power).items():
                degrees[root] = degrees.get(root, 0) + p
        kept = tuple(sorted((f, p) for f, p in degrees.items() if p))
        return [(Atom(atom.size, axis, kept),)]

    def _part(self, atom: Atom, part: str, inner: str = "") -> Atom:
        """Return a factor on one of the axes that its axis was cut into, with fibres of its own.

        Or on the outer of the two it was unflattened into, ``inner`` being the other: its scales
        are then those of the inner units too, as long as these are scaled.
        """
        degrees: dict[str, int] = {}
        for name, power in atom.degrees:
            for root, p in self.powers(name, power).items():
                own, sense = self._copy(part, root, inner)
                degrees[own] = degrees.get(own, 0) + p * sense
        return Atom(self.axes[part].size, part, tuple(degrees.items()))

    def _copy(self, part: str, root: str, inner: str) -> tuple[str, int]:
        """Return the fibre of a part that stands for one of the whole, and the sense of degrees."""
        for (axis, name), own in self._copies.items():
            if axis == part and (sense := self.powers(name)).keys() == {root}:
                return own, sense[root]  # it may have been tied since
        own = self._copies[part, root] = self._fibre(self.fibres[root].source)
        new, old = self.fibres[own], self.fibres[root]
        new.sign, new.scale, new.inner = old.sign, old.scale, (inner, root) if inner else None
        return own, 1

    # ---------------------------------------------------------------- cutting

    def cut(self, label: Label, sizes: tuple[int, ...]) -> tuple[Label, ...] | None:
        """Cut a label into consecutive ones of these sizes; None if units would be cut through.

        An axis is cut into several for good: its units no longer mix across the cuts.
        """
        found = self.resolve(label)
        if found == FIXED:
            return (FIXED,) * len(sizes)
        queue, pieces = list(found.parts), list[Label]()
        for size in sizes:
            taken: list[tuple[Atom, ...]] = []
            while queue and (left := size - sum(map(size_of, taken))) > 0:
                # Anew: an axis that comes twice has been cut where it came first.
                part, *more = self._resolved(queue.pop(0))
                queue[:0] = more
                if size_of(part) > left:
                    halves = self._halved(part, left)
                    if halves is None:
                        return None
                    part, rest = halves
                    queue.insert(0, rest)
                taken.append(part)
            pieces.append(label_of(taken))
        return tuple(pieces)

    def _halved(
        self, part: tuple[Atom, ...], left: int
    ) -> tuple[tuple[Atom, ...], tuple[Atom, ...]] | None:
        """Cut a product in two, through its first factor."""
        first, *inner = part
        step = math.prod(atom.size for atom in inner)
        if left % step or first.parts:
            return None
        sizes = (left // step, first.size - left // step)
        if first.axis is None:
            one, two = (replace(first, size=n) for n in sizes)
            return (one, *inner), (two, *inner)
        raw = self.axes[first.axis]
        # Axes over this one would need elements for each half.
        if any(first.axis in self.over(name) for name in self.axes):
            return None
        raw.parts = tuple(
            self._open(n, f"{raw.source} (part {k + 1})", raw) for k, n in enumerate(sizes)
        )
        one, two = (self._part(first, part) for part in raw.parts)
        return (one, *inner), (two, *inner)

    def over(self, axis: str) -> tuple[str, ...]:
        """Return the axes, as they are now, each of whose units has its own element on this one."""
        found: list[str] = []
        for name in self.axes[self.root(axis)].over:
            expanded = self._expanded(Atom(self.axes[name].size, name))
            found += [a.axis for part in expanded for a in part if a.axis is not None]
        return tuple(dict.fromkeys(found))

    def is_redundant(self, fibre: str) -> bool:
        """Whether the units inside those that a fibre scales can be scaled by themselves."""
        inner = self.fibres[fibre].inner
        if inner is None:
            return False
        axis, own = inner
        moves = any(
            not self.axes[a.axis or ""].fixed
            for a in self.resolve(Label(((Atom(self.axes[axis].size, axis),),))).atoms
        )
        return moves and any(self.acts(root) for root in self.powers(own))

    def acts(self, fibre: str) -> bool:
        """Whether signs or scales of a fibre may still act."""
        return self.fibres[fibre].sign or self.fibres[fibre].scale

    def factor(self, part: tuple[Atom, ...], sizes: tuple[int, ...]) -> list[list[Atom]] | None:
        """Regroup a product into consecutive products of these sizes, unflattening axes for good.

        None if some size would cut through units.
        """
        queue, found = list(part), list[list[Atom]]()
        for size in sizes:
            taken: list[Atom] = []
            while (left := size // max(1, math.prod(a.size for a in taken))) > 1:
                if not queue:
                    return None
                (now, *others) = self._expanded(queue.pop(0))
                if others:
                    return None
                atom, *more = now
                queue[:0] = more
                if left % atom.size:
                    if atom.size % left or atom.parts:
                        return None
                    atom, rest = self._split(atom, left)
                    queue.insert(0, rest)
                taken.append(atom)
            found.append(taken or [Atom(1)])
        if found and queue and all(atom.size == 1 for atom in queue):
            found[-1] += queue
            queue = []
        return None if queue else found

    def split(self, label: Label, sizes: tuple[int, ...]) -> list[Label] | None:
        """Unflatten a label into consecutive ones; None if some size would cut through units."""
        found = self.resolve(label)
        if found == FIXED:
            return [FIXED] * len(sizes)
        pieces = self.factor(found.parts[0], sizes) if len(found.parts) == 1 else None
        if pieces is None:
            return None
        return [label_of([tuple(piece)]) for piece in pieces]

    def scaled(self, label: Label, by: Label) -> Label:
        """Return a label whose first factors are scaled by another one's scales too."""
        found, other = self.resolve(label), self.resolve(by)
        if FIXED in (found, other):
            return found
        part, scales = found.parts[0], other.parts[0]
        front = [self.product(x, y) for x, y in zip(part, scales, strict=False)]
        return Label(((*front, *part[len(front) :]),))

    def _split(self, atom: Atom, outer: int) -> tuple[Atom, Atom]:
        """Split a factor in two; the inner units may then move differently in each outer one."""
        inner = atom.size // outer
        if atom.axis is None:
            return replace(atom, size=outer), replace(atom, size=inner)
        raw = self.axes[atom.axis]
        if outer == 1:
            return Atom(1), atom
        first = self._open(outer, raw.source, raw)
        second = self._open(inner, raw.source, raw)
        raw.factors = (first, second)
        self.axes[first].linear = self.axes[first].orthogonal = False
        self.axes[second].over = (*raw.over, first)
        for other in self.axes.values():  # what was over all units, is over both
            if atom.axis in other.over:
                other.over = tuple(
                    y for x in other.over for y in (raw.factors if x == atom.axis else (x,))
                )
        return self._part(atom, first, second), replace(atom, axis=second, size=inner)

    def share(self, label: Label, others: list[Label]) -> None:
        """Sum over units: what is left in ``others`` has no elements for each of them any more."""
        gone = {atom.axis for atom in self.resolve(label).atoms}
        for other in others:
            for atom in self.resolve(other).atoms:
                if atom.axis not in gone and gone & set(self.over(atom.axis or "")):
                    raw = self.axes[atom.axis or ""]
                    raw.over = tuple(x for x in self.over(atom.axis or "") if x not in gone)

    @abstractmethod
    def unify(self, a: Label, b: Label, reason: str) -> Label:
        """Both dimensions must move alike; return how they do."""

    def fix(self, label: Label, reason: str) -> None:
        """Nothing may act on this dimension's axes."""
        for atom in self.resolve(label).atoms:
            raw = self.axes[atom.axis or ""]
            raw.fixed = raw.fixed or reason

    def unmix(self, label: Label) -> None:
        """Only permutations, signs and scales are left of linear maps of these units."""
        for atom in self.resolve(label).atoms:
            raw = self.axes[atom.axis or ""]
            raw.linear = raw.orthogonal = False

    def product(self, one: Atom, two: Atom) -> Atom:
        """Return a factor of a product of two tensors: it is scaled as both."""
        if one.copied or two.copied:
            return two if one.copied else one
        degrees = dict(one.degrees)
        for fibre, power in two.degrees:
            degrees[fibre] = degrees.get(fibre, 0) + power
        return replace(one, degrees=tuple((f, p) for f, p in degrees.items() if p))

    def label(self, name: str, dims: tuple[Label, ...]) -> None:
        """Label a leaf; a leaf used twice ties the axes of both uses together."""
        name = self.names.get(name, name)
        if name in self.leaves:
            for a, b in zip(self.leaves[name], dims, strict=True):
                self.unify(a, b, f"{name} is used more than once")
        else:
            self.leaves[name] = dims

    def in_order(self) -> Iterator[str]:
        """Return the axes that others are tied to, by where the first of them was made."""
        seen: dict[str, None] = {}
        for name in self.axes:
            raw = self.axes[self.root(name)]
            if not (raw.parts or raw.factors):
                seen.setdefault(self.root(name))
        return iter(seen)
