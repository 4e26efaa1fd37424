"""What tracing has found out so far: labels of leaves, and a union-find over axes."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, final

from symflow.arch.layout import FIXED, Dim, Label, Segments
from symflow.arch.rules.registry import Activation
from symflow.groups import Group, Permutation, PositiveScale, Sign, Trivial


@final
@dataclass
class RawAxis:
    """An axis while it is being found out: what has not been ruled out still acts on it.

    Attributes
    ----------
    size, source
        Number of units, and the path of the operation that made them.
    parent, factor
        The axis it is tied to, and by what degrees are multiplied there: -1 where A acts as A^-T,
        0 where a scale ends.
    parts
        The axes it was cut into, one after the other, if it was.
    sign, scale
        Whether these may still act.
    fixed
        Why nothing may act, if so.
    passed
        What it went through, for the reason that is shown.
    """

    size: int
    source: str
    parent: str | None = None
    factor: int = 1
    parts: tuple[str, ...] = ()
    sign: bool = True
    scale: bool = True
    fixed: str = ""
    passed: list[str] = field(default_factory=lambda: [])


@final
class Tracing:
    """Labels collected so far. Labels may be concatenations: what is asked of them, all parts do.

    Examples
    --------
    >>> tracing = Tracing({})
    >>> a, b = (Dim(tracing.new_axis(4, "layer"), 1) for _ in range(2))
    >>> tracing.unify(a, b, "added")
    >>> tracing.resolve(a) == tracing.resolve(b)
    True
    """

    def __init__(self, names: dict[str, str]) -> None:
        self.axes: dict[str, RawAxis] = {}
        self.leaves: dict[str, tuple[Label, ...]] = {}
        self.names = names  # alias -> canonical name, for tied weights

    def new_axis(self, size: int, source: str) -> str:
        """Open an axis on which everything acts until something speaks against it."""
        name = f"#{len(self.axes)}"
        self.axes[name] = RawAxis(size, source)
        return name

    def resolve(self, label: Label) -> Label:
        """Follow axes to their roots, with the degrees that are left there, and to their parts."""
        if isinstance(label, Segments):
            return Segments(tuple(p for dim, n in label.parts for p in self._parts(dim, n)))
        found = self._root(label)
        if found.axis is None or not self.axes[found.axis].parts:
            return found
        size = self.axes[found.axis].size * found.outer * found.inner
        return Segments(tuple(self._parts(found, size)))

    def _root(self, dim: Dim) -> Dim:
        if dim.axis is None:
            return FIXED
        axis, degree = dim.axis, dim.degree
        while (parent := self.axes[axis].parent) is not None:
            degree *= self.axes[axis].factor
            axis = parent
        return replace(dim, axis=axis, degree=degree)

    def _parts(self, dim: Dim, size: int) -> Iterator[tuple[Dim, int]]:
        dim = self._root(dim)
        if dim.axis is None or not self.axes[dim.axis].parts:
            yield dim, size
            return
        for _ in range(dim.outer):
            for part in self.axes[dim.axis].parts:
                inside = replace(dim, axis=part, outer=1)
                yield from self._parts(inside, self.axes[part].size * dim.inner)

    def in_order(self) -> list[str]:
        """Return the axes that others are tied to, by where the first of them was made."""
        found = [dim.axis for name in self.axes for dim in self.roots(Dim(name, 1))]
        return [name for name in dict.fromkeys(found) if name is not None]

    def roots(self, label: Label) -> list[Dim]:
        """Return the dimensions that a label consists of."""
        found = self.resolve(label)
        return [dim for dim, _ in found.parts] if isinstance(found, Segments) else [found]

    def cut(self, label: Label, sizes: tuple[int, ...]) -> tuple[Label, ...] | None:
        """Cut a label into consecutive ones of these sizes; None if units would be cut through.

        An axis is cut into several for good: its units no longer mix across the cuts.
        """
        found = self.resolve(label)
        if found == FIXED:
            return (FIXED,) * len(sizes)
        if isinstance(found, Dim):
            raw = self.axes[found.axis or ""]
            if found.outer != 1 or any(n % found.inner for n in sizes):
                return None
            raw.parts = tuple(
                self._copy(raw, n // found.inner, f"{raw.source} (part {k + 1})")
                for k, n in enumerate(sizes)
            )
            return self.cut(found, sizes)
        pieces: list[Label] = []
        queue = list(found.parts)
        for size in sizes:
            taken: list[tuple[Dim, int]] = []
            while queue and sum(n for _, n in taken) < size:
                left = size - sum(n for _, n in taken)
                dim, n = queue.pop(0)
                if n > left:
                    halves = self.cut(dim, (left, n - left)) if dim != FIXED else (FIXED, FIXED)
                    if halves is None or any(isinstance(h, Segments) for h in halves):
                        return None
                    queue.insert(0, (self.roots(halves[1])[0], n - left))
                    dim, n = self.roots(halves[0])[0], left
                taken.append((dim, n))
            pieces.append(concatenated(taken))
        return tuple(pieces)

    def _copy(self, raw: RawAxis, size: int, source: str) -> str:
        name = self.new_axis(size, source)
        new = self.axes[name]
        new.sign, new.scale, new.fixed = raw.sign, raw.scale, raw.fixed
        new.passed = list(raw.passed)
        return name

    def fix(self, label: Label, reason: str) -> None:
        """Nothing may act on this dimension's axes."""
        for dim in self.roots(label):
            if dim.axis is not None and not self.axes[dim.axis].fixed:
                self.axes[dim.axis].fixed = reason

    def _pairs(self, a: Label, b: Label, reason: str) -> list[tuple[Dim, Dim]]:
        """Return corresponding dimensions of two labels; without any, both are fixed."""
        one, two = self.resolve(a), self.resolve(b)
        if isinstance(one, Dim) and isinstance(two, Dim):
            return [(one, two)]
        if FIXED not in (one, two):
            for label, other in ((a, b), (b, a)):
                found = self.resolve(other)
                if isinstance(found, Segments):
                    self.cut(label, tuple(n for _, n in found.parts))
            first, second = self.roots(a), self.roots(b)
            if len(first) == len(second):
                return list(zip(first, second, strict=True))
        self.fix(a, reason)
        self.fix(b, reason)
        return []

    def unify(self, a: Label, b: Label, reason: str) -> None:
        """Both dimensions must move alike."""
        for one, two in self._pairs(a, b, reason):
            self._unify(one, two, reason)

    def _unify(self, a: Dim, b: Dim, reason: str) -> None:
        if a.axis is None or b.axis is None:
            self.fix(a if b.axis is None else b, reason)
            return
        one, two = self.axes[a.axis], self.axes[b.axis]
        if (one.size, a.outer, a.inner) != (two.size, b.outer, b.inner):
            self.fix(a, reason)
            self.fix(b, reason)
        elif a.axis == b.axis:
            if a.degree != b.degree:
                one.scale = False
                one.sign = one.sign and (a.degree - b.degree) % 2 == 0
        elif b.degree == 0 and a.degree != 0:
            self._join(a.axis, b.axis, 0)  # only permuted there: scales and signs end
        elif a.degree == 0 or b.degree == 0:
            self._join(b.axis, a.axis, 0)
        elif abs(a.degree) == abs(b.degree) == 1:
            self._join(b.axis, a.axis, a.degree * b.degree)
            one.sign, one.scale = one.sign and two.sign, one.scale and two.scale
        else:  # s and its square, say: what is left is where both agree
            odd = (a.degree - b.degree) % 2
            self._join(b.axis, a.axis, 1)
            one.sign, one.scale = one.sign and two.sign and not odd, False

    def _join(self, child: str, root: str, factor: int) -> None:
        one, two = self.axes[root], self.axes[child]
        two.parent, two.factor = root, factor
        one.fixed = one.fixed or two.fixed
        one.passed += two.passed

    def share_permutation(self, a: Label, b: Label, reason: str) -> None:
        """Both dimensions are permuted alike; the scales and signs of ``b`` end here."""
        for one, two in self._pairs(a, b, reason):
            if one.axis is None or two.axis is None:
                self.fix(one if two.axis is None else two, reason)
            elif one.axis != two.axis:
                same = (self.axes[one.axis].size, one.outer, one.inner)
                if same == (self.axes[two.axis].size, two.outer, two.inner):
                    self._join(two.axis, one.axis, 0)
                else:
                    self.fix(one, reason)
                    self.fix(two, reason)

    def weaken(self, label: Label, activation: Activation, name: str) -> None:
        """Let a dimension pass a function: what does not commute with it, ends."""
        for dim in self.roots(label):
            if dim.axis is None:
                continue
            raw = self.axes[dim.axis]
            if dim.degree:
                raw.sign = raw.sign and (activation.odd or dim.degree % 2 == 0)
                raw.scale = raw.scale and activation.homogeneous is not None
            raw.passed.append(f"{name} commutes with {activation}")

    def is_scaled(self, label: Label) -> bool:
        """Whether positive scales may act on a dimension, as far as is known."""
        return any(
            dim.axis is not None and dim.degree != 0 and self.axes[dim.axis].scale
            for dim in self.roots(label)
        )

    def label(self, name: str, dims: tuple[Label, ...]) -> None:
        """Label a leaf; a leaf used twice ties the axes of both uses together."""
        name = self.names.get(name, name)
        if name in self.leaves:
            for a, b in zip(self.leaves[name], dims, strict=True):
                self.unify(a, b, f"{name} is used more than once")
        else:
            self.leaves[name] = dims

    def group(self, raw: RawAxis) -> Group[Any]:
        """Return what may act on a root axis."""
        if raw.fixed:
            return Trivial(raw.size)
        group: Group[Any] = Permutation(raw.size)
        group = group @ Sign(raw.size) if raw.sign else group
        return group @ PositiveScale(raw.size) if raw.scale else group


def concatenated(parts: list[tuple[Dim, int]]) -> Label:
    """Return the label of dimensions one after the other; fixed neighbours become one.

    Examples
    --------
    >>> concatenated([(FIXED, 2), (FIXED, 3)])
    Dim(axis=None, degree=0, outer=1, inner=1)
    """
    found: list[tuple[Dim, int]] = []
    for dim, size in parts:
        if found and dim == found[-1][0] == FIXED:
            found[-1] = (FIXED, found[-1][1] + size)
        else:
            found.append((dim, size))
    return found[0][0] if len(found) == 1 else Segments(tuple(found))
