"""What ties axes together, and what ends: the verbs of rules."""

from typing import final

from symflow.arch.labels import FIXED, Atom, Label, label_of, size_of
from symflow.arch.rules.registry import Activation
from symflow.arch.structure import Structure


@final
class Tracing(Structure):
    """Labels collected so far.

    Examples
    --------
    >>> tracing = Tracing({})
    >>> a, b = (tracing.new_axis(4, "layer") for _ in range(2))
    >>> _ = tracing.unify(a, b, "added")
    >>> tracing.resolve(a) == tracing.resolve(b)
    True
    """

    # ---------------------------------------------------------------- what ends

    def _end(self, relation: dict[str, int]) -> None:
        """Nothing may scale by the product of these powers of fibres."""
        for name, power in relation.items():
            if power:
                self.fibres[name].end(even=power % 2 == 0)

    def weaken(self, label: Label, activation: Activation, name: str) -> None:
        """Let a dimension pass a function: what does not commute with it, ends."""
        label = self.resolve(label)
        if not activation.linear:
            self.unmix(label)
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
        """Let a dimension pass rotary embeddings: what acts on pairs of units is left."""
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
        self.unmix(label)
        return label.each(Atom.permuted)

    # ---------------------------------------------------------------- ties

    def unify(self, a: Label, b: Label, reason: str) -> Label:
        """Both dimensions must move alike; return how they do.

        Where one is broadcast it does not see the order of the other one's units.
        """
        return self._tie(a, b, reason, scales=True)

    def share_permutation(self, a: Label, b: Label, reason: str) -> Label:
        """Both dimensions are permuted alike, and scaled each on its own."""
        self.unmix(a)
        self.unmix(b)
        return self._tie(a, b, reason, scales=False)

    def multiplied(self, a: Label, b: Label, reason: str) -> Label:
        """Multiply unit by unit: permuted alike; what comes out is scaled as both."""
        one, two = self.resolve(a), self.resolve(b)
        if one.is_copied or two.is_copied:
            return self._tie(a, b, reason, scales=False)
        if FIXED in (one, two) or one.is_nested or two.is_nested:
            # Each unit is multiplied by a number of its own, or it is not known by which.
            self.fix(one, reason)
            self.fix(two, reason)
            return FIXED
        self.share_permutation(a, b, reason)
        pairs = self._matched(a, b)
        if pairs is None:
            return FIXED
        parts = [tuple(self.product(x, y) for x, y in matched) for matched in pairs]
        return self.resolve(label_of(parts))

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
            sizes = tuple(map(size_of, self.resolve(second).parts))
            if self.cut(first, sizes) is None:
                return None
        one, two = self.resolve(a), self.resolve(b)
        ends = [list(map(size_of, x.parts)) for x in (one, two)]
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
            if one.size != two.size and (one.parts or two.parts):
                return None
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
        if any(atom.size > 1 for atom in (*left, *right)):
            return None
        # A single unit beside nothing has no scale of its own.
        return [*pairs, *((atom, Atom(1)) for atom in left), *((Atom(1), atom) for atom in right)]

    def _tie_atoms(self, one: Atom, two: Atom, reason: str, scales: bool) -> None:
        if one.parts or two.parts:
            left, right = (Label(x.parts or ((x,),)) for x in (one, two))
            self._tie(left, right, reason, scales=scales)
            return
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
            left, right = (
                dict(next(self.resolve(Label(((x,),))).atoms, x).degrees) for x in (a, b)
            )
            relation = {f: left.get(f, 0) - right.get(f, 0) for f in {*left, *right}}
            self._relate({f: p for f, p in relation.items() if p}, a.axis or "")

    def _relate(self, relation: dict[str, int], axis: str) -> None:
        """Demand that the product of these powers of fibres be one."""
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
        over = [self.over(x) for x in (a, b)]
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
