"""What a dimension of a tensor inside the network runs over, while it is being found out."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import final


@final
@dataclass(frozen=True)
class Atom:
    """One factor of a dimension.

    Attributes
    ----------
    size
        Number of units.
    axis
        What it runs over; None if nothing acts on it.
    degrees
        How it is scaled: (fibre, power) pairs. A fibre is one set of signs and scales of the units;
        several of them may share one permutation.
    copied
        The same for all its indices, as a broadcast dimension is.
    parts
        Of a factor behind another one, if it is a concatenation itself: its parts, each a product
        of factors. Queries, keys and values of each head may stand so behind the heads.

    Examples
    --------
    >>> Atom(4, "#0", (("#0", 1),)).dual().degrees
    (('#0', -1),)
    """

    size: int
    axis: str | None = None
    degrees: tuple[tuple[str, int], ...] = ()
    copied: bool = False
    parts: tuple[tuple["Atom", ...], ...] = ()

    def dual(self) -> "Atom":
        """Return the factor that is contracted with this one: degrees change their signs."""
        return self.power(-1)

    def power(self, k: int) -> "Atom":
        """Return the factor with all degrees multiplied."""
        return replace(self, degrees=tuple((f, k * p) for f, p in self.degrees if k * p))

    def permuted(self) -> "Atom":
        """Return the factor without its scales."""
        return replace(self, degrees=())


@final
@dataclass(frozen=True)
class Label:
    """What a dimension runs over: parts one after the other, each a product of factors.

    A concatenation makes parts; a flatten makes factors, the last of which runs fastest. Without
    any part (:data:`FIXED`) nothing acts on the dimension.

    Attributes
    ----------
    parts
        The parts.

    Examples
    --------
    >>> Label(((Atom(4, "#0"), Atom(2)), (Atom(3, "#1"),))).size
    11
    """

    parts: tuple[tuple[Atom, ...], ...] = ()

    @property
    def size(self) -> int:
        """Number of coordinates (0 for ``FIXED``, which has no size of its own)."""
        return sum(math.prod(atom.size for atom in part) for part in self.parts)

    @property
    def atoms(self) -> Iterator[Atom]:
        """The factors of all parts on which something acts."""
        return (atom for part in self.parts for atom in _moving(part))

    @property
    def is_nested(self) -> bool:
        """Whether a concatenation stands behind another factor."""
        return any(atom.parts for part in self.parts for atom in part)

    @property
    def is_copied(self) -> bool:
        """Whether all its coordinates are the same."""
        return bool(self.parts) and all(
            atom.copied or atom.size == 1 for part in self.parts for atom in part
        )

    @property
    def is_grid(self) -> bool:
        """Whether concatenations stand behind others, but none within another one."""
        if len(self.parts) != 1:
            return False
        return not any(atom.parts for one in self.parts[0] for part in one.parts for atom in part)

    def each(self, function: Callable[[Atom], Atom]) -> "Label":
        """Apply a function to every factor on which something acts."""
        return Label(tuple(_each(function, part) for part in self.parts))

    def dual(self) -> "Label":
        """Return the dimension that this one is contracted with."""
        return self.each(Atom.dual)


def _each(function: Callable[[Atom], Atom], part: tuple[Atom, ...]) -> tuple[Atom, ...]:
    return tuple(
        replace(atom, parts=tuple(_each(function, one) for one in atom.parts))
        if atom.parts
        else (atom if atom.axis is None else function(atom))
        for atom in part
    )


FIXED = Label()


def label_of(parts: list[tuple[Atom, ...]]) -> Label:
    """Build a label in its normal form: neighbours on which nothing acts become one.

    Examples
    --------
    >>> label_of([(Atom(2), Atom(3)), (Atom(4),)]) == FIXED
    True
    """
    found: list[tuple[Atom, ...]] = []
    for part in map(_joined, parts):
        if found and _stays(part) and _stays(found[-1]):
            found[-1] = (Atom(found[-1][0].size + part[0].size),)
        else:
            found.append(part)
    if all(_stays(part) for part in found):
        return FIXED
    return Label(tuple(found))


def size_of(part: tuple[Atom, ...]) -> int:
    """Return the number of coordinates of a product of factors.

    Examples
    --------
    >>> size_of((Atom(2), Atom(3)))
    6
    """
    return math.prod(atom.size for atom in part)


def nested(parts: list[tuple[Atom, ...]]) -> Atom:
    """Make one factor of a concatenation, to stand behind others.

    Examples
    --------
    >>> found = nested([(Atom(2, "#0"),), (Atom(3),), (Atom(4),)])
    >>> found.size, len(found.parts)
    (9, 2)
    """
    return Atom(sum(map(size_of, parts)), parts=label_of(parts).parts)


def _moving(part: tuple[Atom, ...]) -> Iterator[Atom]:
    for atom in part:
        for inner in atom.parts:
            yield from _moving(inner)
        if atom.axis is not None:
            yield atom


def _stays(part: tuple[Atom, ...]) -> bool:
    (first, *others) = part
    return not others and first.axis is None and not first.copied and not first.parts


def _joined(part: tuple[Atom, ...]) -> tuple[Atom, ...]:
    found: list[Atom] = []
    for atom in part:
        if atom.size == 1 and len(part) > 1 and atom.axis is None:
            continue
        last = found[-1] if found else None
        if last and _plain(last) and _plain(atom) and last.copied == atom.copied:
            found[-1] = replace(last, size=last.size * atom.size)
        else:
            found.append(atom)
    return tuple(found) or (Atom(1),)


def _plain(atom: Atom) -> bool:
    return atom.axis is None and not atom.parts
