"""From what tracing found to the axes of an architecture and the factors of its leaves."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, final

from symflow.arch.labels import Atom, Label
from symflow.arch.layout import Axis, Dim, Factors
from symflow.arch.structure import RawAxis
from symflow.arch.tracing import Tracing
from symflow.groups import (
    GeneralLinear,
    Group,
    Orthogonal,
    Permutation,
    PositiveScale,
    Rotary,
    Sign,
    Trivial,
)


@final
@dataclass(frozen=True)
class Trace:
    """What tracing found: factors of leaves, axes that move, axes that do not, the last layer."""

    leaves: dict[str, tuple[list[list[Factors]], ...]]
    axes: tuple[Axis, ...]
    fixed: tuple[Axis, ...]
    output: tuple[str, ...]


@dataclass
class _Use:
    """How leaves carry an axis.

    The degrees at each place, whether one carries it twice, and how many coordinates each unit has
    with the degrees 1 and -1, all others summed.
    """

    degrees: list[tuple[tuple[str, int], ...]] = field(default_factory=lambda: [])
    twice: bool = False
    widths: dict[int, int] = field(default_factory=lambda: {})

    @property
    def fibres(self) -> list[str]:
        """The fibres that scale some leaf."""
        return list(dict.fromkeys(f for one in self.degrees for f, _ in one))

    @property
    def is_plain(self) -> bool:
        """Whether one fibre acts everywhere by A or A^-T, so that A may be any matrix."""
        return len(self.fibres) == 1 and all(
            len(one) == 1 and abs(one[0][1]) == 1 for one in self.degrees
        )

    @property
    def is_contracted(self) -> bool:
        """Whether both A and A^-T act, on different leaves."""
        powers = {power for one in self.degrees for _, power in one}
        return self.is_plain and powers == {1, -1} and not self.twice

    def spans(self, size: int) -> bool:
        """Whether both sides span all units: else there is no point of least norm on orbits."""
        return min(self.widths.get(1, 0), self.widths.get(-1, 0)) >= size


def finish(
    tracing: Tracing, output: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]]
) -> Trace:
    """Name axes, choose their groups, and give every leaf, whose shapes are given, its factors."""
    whole = {name: tuple(map(tracing.resolve, dims)) for name, dims in tracing.leaves.items()}
    labels = {name: tuple(_reduced(tracing, dim) for dim in dims) for name, dims in whole.items()}
    uses = _uses(labels, shapes)
    fixed: list[Axis] = []
    moving: dict[str, Axis] = {}
    scales: dict[str, dict[str, str]] = {}  # raw axis -> fibre -> axis that scales by it
    ordered = [key for key in tracing.in_order() if key in uses or tracing.axes[key].fixed]
    parents = {key: _parent(tracing, key, labels) for key in ordered}
    # An axis over another one comes after it: names are given to the others first.
    names: dict[str, str] = {}
    for key in (key for key in ordered if not tracing.axes[key].fixed):
        if parents[key] is None:
            names[key] = f"h{len(names) + 1}"
    children: dict[str, int] = {}

    def child(parent: str) -> str:
        children[parent] = children.get(parent, 0) + 1
        return f"{names[parent]}.{children[parent]}"

    for key in ordered:
        raw = tracing.axes[key]
        if raw.fixed:
            name = "output" if raw.fixed.startswith("read out") else f"fixed {len(fixed)}"
            fixed.append(Axis(name, raw.size, Trivial(raw.size), f"{raw.source}: {raw.fixed}"))
            continue
        use, parent = uses[key], parents[key]
        why = f"out of {raw.source}; " + ("; ".join(dict.fromkeys(raw.passed)) or "linear")
        mixed = _mixed(raw, use)
        several = use.fibres if mixed is None and len(use.fibres) > 1 else []
        if parent is not None:  # no axes over axes over axes: one of its scales is kept
            name, several = child(parent), []
        else:
            name = names[key]
        group = mixed or _monomial(tracing, raw, [] if several else use.fibres[:1])
        over = None if parent is None else names[parent]
        moving[key] = Axis(name, raw.size, group, why, over)
        scales[key] = {f: name for f in ([] if several else use.fibres[:1])}
        for fibre in several:
            own = child(key)
            why = f"signs and scales of {tracing.fibres[fibre].source} over {name}"
            scales[key][fibre] = own
            group = _monomial(tracing, replace(raw, size=1), [fibre], permuted=False)
            moving[own] = Axis(own, 1, group, why, name)

    def factors(part: tuple[Atom, ...]) -> Factors:
        found: list[tuple[int, Dim]] = []
        for atom in part:
            axis = moving.get(atom.axis or "")
            if axis is None:
                found.append((atom.size, Dim()))
                continue
            acting = scales[atom.axis or ""]
            degrees = {acting[f]: p for f, p in atom.degrees if f in acting}
            if not acting:  # what is left does not see degrees, but another group might
                degrees[axis.name] = sum(p for _, p in atom.degrees)
            found.append((atom.size, Dim(axis.name, degrees.pop(axis.name, 0))))
            found += [(1, Dim(own, p)) for own, p in degrees.items()]
        return tuple(found)

    leaves = {
        name: tuple([[factors(part) for part in view] for view in _views(dim)] for dim in dims)
        for name, dims in whole.items()
    }
    return Trace(leaves, _in_order(list(moving.values())), tuple(fixed), output)


def _views(label: Label) -> list[tuple[tuple[Atom, ...], ...]]:
    """Return the parts of a dimension; of one with concatenations behind others, for each factor.

    What stands between two of these stays together.
    """
    if not label.is_nested:
        return [label.parts]
    found: list[tuple[tuple[Atom, ...], ...]] = []
    (part,) = label.parts
    between: list[Atom] = []
    for atom in part:
        if not atom.parts:
            between.append(atom)
            continue
        found += [(tuple(between),)] if between else []
        found.append(atom.parts)
        between = []
    return [*found, (tuple(between),)] if between else found


def _reduced(tracing: Tracing, label: Label) -> Label:
    """Leave out what has ended, and scales that those of the units inside can do too."""
    return label.each(partial(_acting, tracing))


def _acting(tracing: Tracing, atom: Atom) -> Atom:
    kept = [(f, p) for f, p in atom.degrees if tracing.acts(f) and not tracing.is_redundant(f)]
    return replace(atom, degrees=tuple(kept))


def _in_order(axes: list[Axis]) -> tuple[Axis, ...]:
    """Put axes over others right behind those."""
    found: list[Axis] = []
    for axis in axes:
        if axis.over is None:
            found += [axis, *(other for other in axes if other.over == axis.name)]
    return tuple(found)


def _uses(
    labels: dict[str, tuple[Label, ...]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, _Use]:
    uses: dict[str, _Use] = {}
    for name, dims in labels.items():
        seen: set[tuple[str, int]] = set()
        for k, dim in enumerate(dims):
            for atom in dim.atoms:
                use = uses.setdefault(atom.axis or "", _Use())
                use.degrees.append(atom.degrees)
                others = math.prod(n for j, n in enumerate(shapes[name]) if j != k)
                for _, power in atom.degrees:
                    use.widths[power] = use.widths.get(power, 0) + others
                use.twice |= any(axis == atom.axis and at != k for axis, at in seen)
                seen.add((atom.axis or "", k))
    return uses


def _parent(tracing: Tracing, key: str, labels: dict[str, tuple[Label, ...]]) -> str | None:
    """Return the axis each of whose units has an element of its own on this one, if any."""
    for over in tracing.over(key):
        if tracing.over(over) or tracing.axes[over].fixed:
            continue
        carried = [
            {atom.axis for dim in dims for atom in dim.atoms}
            for dims in labels.values()
            if any(atom.axis == key for dim in dims for atom in dim.atoms)
        ]
        if all(over in axes for axes in carried):
            return over
    return None


def _mixed(raw: RawAxis, use: _Use) -> Group[Any] | None:
    """Return the group that mixes units, if one may act."""
    if raw.size == 1:
        return None
    if raw.linear and use.is_contracted and (raw.rotary or use.spans(raw.size)):
        return Rotary(raw.size, raw.rotary) if raw.rotary else GeneralLinear(raw.size)
    if raw.orthogonal and not raw.linear and use.is_plain and not raw.rotary:
        return Orthogonal(raw.size)
    return None


def _monomial(
    tracing: Tracing, raw: RawAxis, fibres: list[str], *, permuted: bool = True
) -> Group[Any]:
    """Return the permutations, signs and scales that may act."""
    if raw.rotary:
        return Trivial(raw.size)
    group: Group[Any] = Permutation(raw.size) if permuted else Trivial(raw.size)
    for fibre in fibres:
        found = tracing.fibres[fibre]
        group = group @ Sign(raw.size) if found.sign else group
        group = group @ PositiveScale(raw.size) if found.scale else group
    return group
