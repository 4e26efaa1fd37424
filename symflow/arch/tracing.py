"""What tracing has found out so far: labels of leaves, and a union-find over axes and fibres."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import final

from symflow.arch.labels import FIXED, Atom, Label, label_of
from symflow.arch.rules.registry import Activation


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


@final
class Tracing:
    """Labels collected so far.

    Examples
    --------
    >>> tracing = Tracing({})
    >>> a, b = (tracing.new_axis(4, "layer") for _ in range(2))
    >>> tracing.unify(a, b, "added")
    >>> tracing.resolve(a) == tracing.resolve(b)
    True
    """

    def __init__(self, names: dict[str, str]) -> None:
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
                found[moving[-1]] = replace(
                    found[moving[-1]], degrees=((self._fibre(source), 1),)
                )
            return tuple(found)

        label = self.resolve(label)
        self._unmix(label)
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
        return label_of([found for part in label.parts for found in self._resolved(part)])

    def _resolved(self, part: tuple[Atom, ...]) -> list[tuple[Atom, ...]]:
        """Return the parts that a product of factors consists of."""
        found: list[tuple[Atom, ...]] = [()]
        for atom in part:
            choices = self._expanded(atom)
            if len(choices) == 1:
                found = [(*before, *choices[0]) for before in found]
            else:  # repeated for every index of what stands before it
                times = math.prod(a.size for a in found[0])
                self.fix(Label((found[0],)), "a concatenation is repeated for each of its units")
                found = choices * times
        return found

    def _expanded(self, atom: Atom) -> list[tuple[Atom, ...]]:
        if atom.axis is None:
            return [(atom,)]
        axis = self.root(atom.axis)
        raw = self.axes[axis]
        if raw.parts:
            return [p for part in raw.parts for p in self._expanded(self._part(atom, part))]
        if raw.factors:
            first, last = raw.factors
            outer = self._expanded(self._part(atom, first, last))[0]
            inner = self._expanded(replace(atom, axis=last, size=self.axes[last].size))
            return [(*outer, *p) for p in inner]
        if raw.fixed:
            return [(Atom(atom.size),)]
        degrees: dict[str, int] = {}
        for name, power in atom.degrees:
            for root, p in self.powers(name, power).items():
                if self.fibres[root].sign or self.fibres[root].scale:
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
            while queue and (left := size - sum(map(_size, taken))) > 0:
                part = queue.pop(0)
                if _size(part) > left:
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
        if left % step:
            return None
        sizes = (left // step, first.size - left // step)
        if first.axis is None:
            one, two = (replace(first, size=n) for n in sizes)
            return (one, *inner), (two, *inner)
        raw = self.axes[first.axis]
        # Axes over this one, or this one over another, would need elements for each half.
        if raw.over or any(first.axis in self._over(name) for name in self.axes):
            return None
        raw.parts = tuple(
            self._open(n, f"{raw.source} (part {k + 1})", raw) for k, n in enumerate(sizes)
        )
        one, two = (self._part(first, part) for part in raw.parts)
        return (one, *inner), (two, *inner)

    def _over(self, axis: str) -> tuple[str, ...]:
        """Return the axes, as they are now, that an axis is over."""
        found: list[str] = []
        for name in self.axes[axis].over:
            expanded = self._expanded(Atom(self.axes[name].size, name))
            found += [a.axis for part in expanded for a in part if a.axis is not None]
        return tuple(dict.fromkeys(found))

    def is_redundant(self, fibre: str) -> bool:
        """Whether the units inside those that a fibre scales can be scaled by themselves."""
        inner = self.fibres[fibre].inner
        if inner is None:
            return False
        axis, own = inner
        moves = any(not self.axes[a.axis or ""].fixed for a in self.resolve(
            Label(((Atom(self.axes[axis].size, axis),),))).atoms)
        roots = [self.fibres[name] for name in self.powers(own)]
        return moves and any(root.sign or root.scale for root in roots)

    def over(self, axis: str) -> tuple[str, ...]:
        """Return the axes each of whose units has an element of its own on this one."""
        return self._over(self.root(axis))

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
                atom = queue.pop(0)
                if left % atom.size:
                    if atom.size % left:
                        return None
                    atom, rest = self._split(atom, left)
                    queue.insert(0, rest)
                taken.append(atom)
            found.append(taken or [Atom(1)])
        if queue and all(atom.size == 1 for atom in queue):
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
        """Return a label whose first factor is scaled by another one's scales too."""
        found, other = self.resolve(label), self.resolve(by)
        if FIXED in (found, other):
            return found
        (first, *inner), (second, *_) = found.parts[0], other.parts[0]
        return Label(((self._product(first, second), *inner),))

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
                if atom.axis not in gone and gone & set(self._over(atom.axis or "")):
                    raw = self.axes[atom.axis or ""]
                    raw.over = tuple(x for x in self._over(atom.axis or "") if x not in gone)

    # ---------------------------------------------------------------- what ends

    def fix(self, label: Label, reason: str) -> None:
        """Nothing may act on this dimension's axes."""
        for atom in self.resolve(label).atoms:
            raw = self.axes[atom.axis or ""]
            raw.fixed = raw.fixed or reason

    def _unmix(self, label: Label) -> None:
        """Only permutations, signs and scales are left of linear maps of these units."""
        for atom in self.resolve(label).atoms:
            raw = self.axes[atom.axis or ""]
            raw.linear = raw.orthogonal = False

    def _end(self, relation: dict[str, int]) -> None:
        """Nothing may scale by the product of these powers of fibres."""
        for name, power in relation.items():
            if power:
                self.fibres[name].end(even=power % 2 == 0)

    def weaken(self, label: Label, activation: Activation, name: str) -> None:
        """Let a dimension pass a function: what does not commute with it, ends."""
        label = self.resolve(label)
        if not activation.linear:
            self._unmix(label)
        for atom in label.atoms:
            for fibre, power in atom.degrees:
                raw = self.fibres[fibre]
                raw.sign = raw.sign and (activation.odd or power % 2 == 0)
                raw.scale = raw.scale and activation.homogeneous is not None
            self.axes[atom.axis or ""].passed.append(f"{name} commutes with {activation}")

    def keep_rotations(self, label: Label, name: str) -> None:
        """Let a dimension be divided by its norm: rotations, permutations and signs are left."""
        for atom in self.resolve(label).atoms:
            raw = self.axes[atom.axis or ""]
            raw.linear = False
            for fibre, _ in atom.degrees:
                self.fibres[fibre].scale = False
            raw.passed.append(f"{name} commutes with rotations")

    def pair(self, label: Label, pairing: str, name: str) -> None:
        """Let a dimension pass rotary embeddings: rotations and scales of pairs of units are left."""
        found = self.resolve(label)
        atoms = list(found.atoms)
        if len(found.parts) != 1 or len(found.parts[0]) != 1 or not atoms:
            self.fix(label, f"turned by {name}")
            return
        raw = self.axes[atoms[0].axis or ""]
        raw.rotary, raw.orthogonal = pairing, False
        raw.passed.append(f"{name} commute with rotations and scales of pairs")

    def permuted(self, label: Label) -> Label:
        """Return a dimension that is permuted with another one, but not scaled."""
        label = self.resolve(label)
        self._unmix(label)
        return label.each(Atom.permuted)

    # ---------------------------------------------------------------- ties

    def unify(self, a: Label, b: Label, reason: str) -> Label:
        """Both dimensions must move alike; return how they do.

        Where one is broadcast it does not see the order of the other one's units.
        """
        return self._tie(a, b, reason, scales=True)

    def share_permutation(self, a: Label, b: Label, reason: str) -> Label:
        """Both dimensions are permuted alike, and scaled each on its own."""
        self._unmix(a)
        self._unmix(b)
        return self._tie(a, b, reason, scales=False)

    def multiplied(self, a: Label, b: Label, reason: str) -> Label:
        """Multiply unit by unit: permuted alike; what comes out is scaled as both."""
        one, two = self.resolve(a), self.resolve(b)
        if one.is_copied or two.is_copied:
            return self._tie(a, b, reason, scales=False)
        if FIXED in (one, two):
            if one != two:  # each unit is multiplied by a number of its own: scales pass
                for atom in (*one.atoms, *two.atoms):
                    self.axes[atom.axis or ""].fixed = reason
            return FIXED
        self.share_permutation(a, b, reason)
        pairs = self._matched(a, b)
        if pairs is None:
            return FIXED
        parts = [tuple(self._product(x, y) for x, y in matched) for matched in pairs]
        return self.resolve(label_of(parts))

    def _product(self, one: Atom, two: Atom) -> Atom:
        if one.copied or two.copied:
            return two if one.copied else one
        degrees = dict(one.degrees)
        for fibre, power in two.degrees:
            degrees[fibre] = degrees.get(fibre, 0) + power
        return replace(one, degrees=tuple((f, p) for f, p in degrees.items() if p))

    def _tie(self, a: Label, b: Label, reason: str, *, scales: bool) -> Label:
        pairs = self._matched(a, b)
        if pairs is None:
            self.fix(a, reason)
            self.fix(b, reason)
            return FIXED
        parts: list[tuple[Atom, ...]] = []
        for matched in pairs:
            for one, two in matched:
                self._tie_atoms(one, two, reason, scales)
            parts.append(tuple(two if one.copied else one for one, two in matched))
        return self.resolve(label_of(parts))

    def _matched(self, a: Label, b: Label) -> list[list[tuple[Atom, Atom]]] | None:
        """Return corresponding factors of two dimensions, part by part."""
        one, two = self.resolve(a), self.resolve(b)
        if FIXED in (one, two):
            whole = two if one == FIXED else one
            return [[(Atom(x.size), x) for x in part] for part in whole.parts]
        for first, second in ((a, b), (b, a)):
            sizes = tuple(map(_size, self.resolve(second).parts))
            if self.cut(first, sizes) is None:
                return None
        one, two = self.resolve(a), self.resolve(b)
        ends = [list(map(_size, x.parts)) for x in (one, two)]
        if ends[0] != ends[1]:
            found = [self._aligned(x, ends) for x in (one, two)]
            if None in found:
                return None
            one, two = (x if x is not None else FIXED for x in found)
        matched: list[list[tuple[Atom, Atom]]] = []
        for left, right in zip(one.parts, two.parts, strict=True):
            pairs = self._factors_matched(list(left), list(right))
            if pairs is None:
                return None
            matched.append(pairs)
        return matched

    def _aligned(self, label: Label, ends: list[list[int]]) -> Label | None:
        """Cut a label wherever one of two does."""
        places = sorted({sum(sizes[: k + 1]) for sizes in ends for k in range(len(sizes))})
        sizes = tuple(b - a for a, b in zip([0, *places], places, strict=False))
        pieces = self.cut(label, sizes)
        if pieces is None:
            return None
        return Label(
            tuple(
                piece.parts[0] if piece.parts else (Atom(n),)
                for piece, n in zip(pieces, sizes, strict=True)
            )
        )

    def _factors_matched(
        self, left: list[Atom], right: list[Atom]
    ) -> list[tuple[Atom, Atom]] | None:
        pairs: list[tuple[Atom, Atom]] = []
        while left and right:
            one, two = left.pop(0), right.pop(0)
            if one.size > two.size:
                if one.size % two.size:
                    return None
                one, rest = self._split(one, two.size)
                left.insert(0, rest)
            elif two.size > one.size:
                if two.size % one.size:
                    return None
                two, rest = self._split(two, one.size)
                right.insert(0, rest)
            pairs.append((one, two))
        return pairs if all(atom.size == 1 for atom in (*left, *right)) else None

    def _tie_atoms(self, one: Atom, two: Atom, reason: str, scales: bool) -> None:
        both = [self.resolve(Label(((atom,),))) for atom in (one, two)]
        resolved = [list(label.atoms) for label in both]
        if one.copied or two.copied:
            if scales:
                for atoms in resolved:
                    self._end({f: p for atom in atoms for f, p in atom.degrees})
            return
        if not (resolved[0] and resolved[1]):
            for label in both:
                self.fix(label, reason)
            return
        for a, b in zip(*resolved, strict=True):
            self._join(a.axis or "", b.axis or "", reason)
            if not scales:
                continue
            # Resolved anew: joining factors may have tied their fibres.
            left, right = (dict(next(self.resolve(Label(((x,),))).atoms, x).degrees) for x in (a, b))
            relation = {
                f: left.get(f, 0) - right.get(f, 0) for f in {*left, *right}
            }
            self._relate({f: p for f, p in relation.items() if p}, a.axis or "")

    def _relate(self, relation: dict[str, int], axis: str) -> None:
        """The product of these powers of fibres must be one."""
        if not relation:
            return
        if len(relation) > 2 or any(abs(p) != 1 for p in relation.values()):
            raw = self.axes[self.root(axis)]
            raw.linear = raw.orthogonal = False
        free = [name for name, p in relation.items() if abs(p) == 1]
        if len(relation) == 1 or not free:
            self._end(relation)
            return
        # One of them is what the others leave: the youngest of those that may do most.
        child = max(free, key=lambda f: (self.fibres[f].sign + self.fibres[f].scale, int(f[1:])))
        new = self.fibres[child]
        others = {f: -p * relation[child] for f, p in relation.items() if f != child}
        new.means = others
        for name, power in others.items():
            fibre = self.fibres[name]
            fibre.scale = fibre.scale and new.scale
            fibre.sign = fibre.sign and (new.sign or power % 2 == 0)

    def _join(self, a: str, b: str, reason: str) -> None:
        if a == b:
            return
        one, two = self.axes[a], self.axes[b]
        over = [self._over(x) for x in (a, b)]
        if a in over[1] or b in over[0] or one.size != two.size:
            one.fixed = two.fixed = reason
            return
        # Each unit of an axis that only one of them is over had an element of its own: no longer.
        one.over = tuple(x for x in over[0] if x in over[1])
        two.parent = a
        one.fixed = one.fixed or two.fixed
        one.linear, one.orthogonal = one.linear and two.linear, one.orthogonal and two.orthogonal
        one.rotary = one.rotary or two.rotary
        one.passed += two.passed

    # ---------------------------------------------------------------- leaves

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


def _size(part: tuple[Atom, ...]) -> int:
    return math.prod(atom.size for atom in part)
