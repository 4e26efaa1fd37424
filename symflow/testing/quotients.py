"""Laws of the quotient: distances and geodesics of orbits.

The distance is what a heuristic finds, an upper bound of the true one, so the laws say what is left
of a metric. With covariant starts it is zero on orbits and the same wherever on its orbits it is
measured, and symmetric: each step of the aligner is the inverse of the step the other way round.
No triangle inequality holds, and a path through another element of K may be shorter; but none that
changes the alignment of one axis alone, and the bounds enclose every path tried.
"""

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from symflow.align import Status
from symflow.errors import LeafError, ShapeError
from symflow.manifolds import ConeProduct, RowManifold, SphereProduct
from symflow.quotient import Geodesic, Quotient
from symflow.sections import Section
from symflow.testing.aligners import single_axis_rivals
from symflow.testing.law import Body, Draws, Law, agree, demand, law
from symflow.testing.networks import generic_weights, weights
from symflow.testing.sections import SECTION, degenerate
from symflow.testing.strategies import concrete_classes, elements, seeds, values

_ROUNDING = 100.0
_PIECES = 32


def quotient_laws(subject: Quotient | SearchStrategy[Quotient]) -> tuple[Law, ...]:
    """List the laws that the quotient of a weight space has to obey, its section's included.

    Parameters
    ----------
    subject
        A quotient, or a strategy for quotients.

    Examples
    --------
    >>> import symflow
    >>> [str(law) for law in quotient_laws(symflow.Quotient(symflow.mlp([2, 3, 1])))][:4]
    ['zero', 'invariant', 'symmetric', 'shortest']
    """
    drawn = st.just(subject) if isinstance(subject, Quotient) else subject
    own = [law(name, drawn, body, told=told) for name, body in QUOTIENT.items()]
    sections = [
        law(f"section: {name}", drawn, _of_section(body), told=told)
        for name, body in SECTION.items()
    ]
    return (*own, *sections)


def check_quotient(q: Quotient, *, max_examples: int | None = None) -> None:
    """Check the distance, the geodesics and the section of a quotient.

    Parameters
    ----------
    q
        The quotient.
    max_examples
        How many examples to draw for each law; as many as the active Hypothesis profile says by
        default.

    Raises
    ------
    AssertionError
        Naming the law that is broken, section and architecture, and the smallest example found.

    Examples
    --------
    >>> import symflow
    >>> check_quotient(symflow.Quotient(symflow.mlp([2, 2, 1], "tanh")), max_examples=5)
    """
    for one in quotient_laws(q):
        one.check(max_examples)


def quotients() -> SearchStrategy[Quotient]:
    """Quotients of small networks by every kind of section that symflow has.

    Examples
    --------
    >>> quotient_laws(quotients())[0].check(max_examples=2)
    """
    kinds = concrete_classes(Section, "symflow.sections")
    sections = st.one_of([values(cls) for cls in kinds]).filter(_has_no_ties)
    return sections.flatmap(_with_metrics)


def _with_metrics(section: Section) -> SearchStrategy[Quotient]:
    """Draw the quotient of a section with its own metric, or another one that it has."""
    own = Quotient(section.arch, section)
    try:
        return st.sampled_from((own, Quotient(section.arch, section, metric="intrinsic")))
    except (LeafError, ShapeError):
        return st.just(own)


def _has_no_ties(section: Section) -> bool:
    """Rows of one coordinate are 1 or -1 on a sphere: no aligner tells equal ones apart."""
    space = section.manifold
    return not isinstance(space, SphereProduct) or all(d > 1 for _, d in space.shapes)


def told(q: Quotient) -> str:
    """Name a quotient: its section (its space, if another), its aligner and its architecture.

    Examples
    --------
    >>> import symflow
    >>> told(symflow.Quotient(symflow.mlp([2, 1])))
    'FlatSection, WeightMatching, Architecture(Sequential: 2 leaves, D = 3, axes )'
    """
    space = "" if q.manifold is q.section.manifold else f" as a {q.manifold.name}"
    return f"{type(q.section).__name__}{space}, {type(q.aligner).__name__}, {q.arch}"


def _of_section(body: Body) -> Body:
    def about(q: Quotient, draw: Draws) -> None:
        body(q.section, draw)

    return about


# ---------------------------------------------------------------- distances


def _ends(q: Quotient, draw: Draws) -> tuple[Tensor, Tensor]:
    """Draw two networks without ties: among equal units no aligner can tell which is which."""
    w0, w1 = (draw(name, generic_weights(q.arch)) for name in ("w0", "w1"))
    return w0, w1


def _size(q: Quotient, *ws: Tensor) -> float:
    return sum(float(q.project(w).norm()) for w in ws)


def _zero(q: Quotient, draw: Draws) -> None:
    w, _ = _ends(q, draw)
    g = draw("g", elements(q.arch.symmetry))
    d = q.distance(w, q.arch.symmetry.act(g, w))
    agree(d, torch.zeros_like(d), "distance from w to g w", factor=_ROUNDING, scale=_size(q, w))


def _invariant(q: Quotient, draw: Draws) -> None:
    ends = _ends(q, draw)
    moves = [draw(name, elements(q.arch.symmetry, batch=(8,))) for name in "gh"]
    # One batch: the pair itself first, then elsewhere on its orbits.
    w0, w1 = (
        torch.cat([w[None], q.arch.symmetry.act(g, w.expand(8, -1))])
        for w, g in zip(ends, moves, strict=True)
    )
    distances = q.distance(w0, w1)
    here = distances[:1].expand(9)
    agree(distances, here, "distance elsewhere on the orbits", factor=_ROUNDING)


def _symmetric(q: Quotient, draw: Draws) -> None:
    w0, w1 = _ends(q, draw)
    there, back = q.distance(torch.stack([w0, w1]), torch.stack([w1, w0]))
    agree(back, there, "distance back against distance there", factor=_ROUNDING)


def _shortest(q: Quotient, draw: Draws) -> None:
    w0, w1 = _ends(q, draw)
    found, x0, x1 = q.align(w0, w1), q.project(w0), q.project(w1)
    length, seed = q.manifold.dist(x0, found.weights), draw("rivals", seeds())

    def no_shorter(others: Tensor, what: str) -> None:
        with degenerate():  # a rival may turn rows round
            shortest = q.manifold.dist(x0, others).min()
        # Squares: near zero a root would turn rounding into a difference.
        least = torch.minimum(shortest, length).square()
        agree(least, length.square(), f"squared length of {what}", scale=_size(q, w0, w1) ** 2)

    if isinstance(q.manifold, RowManifold):
        own = q.aligner(q.symmetry, x0, x1).weights
        no_shorter(own, "the path that the aligner chose by chords, against the arcs'")
    if found.status is not Status.CONVERGED:
        return
    for axis in q.symmetry.axes:
        if not _is_linearised(q, axis.name):
            rivals = single_axis_rivals(q.symmetry, found.element, axis.name, seed, x1)
            others = q.symmetry.act(rivals, x1)
            no_shorter(others, f"the best of 24 paths that differ on axis {axis.name}")


def _is_linearised(q: Quotient, axis: str) -> bool:
    """Whether a step on this axis is solved to first order only, and so may miss the best."""
    if any(leaf.axes.count(axis) > 1 for leaf in q.arch.leaves):
        return True
    # The arcs of an axis' own rows are assigned exactly; those of other rows see it inside.
    return isinstance(q.manifold, RowManifold) and len(q.manifold.shapes) > 1


def _bracket(q: Quotient, draw: Draws) -> None:
    w0, w1 = _ends(q, draw)
    lower, upper = q.distance_bounds(w0, w1)
    demand(0 <= float(lower) <= float(upper), f"lower bound {lower:.6g}, upper bound {upper:.6g}")
    agree(upper, q.distance(w0, w1), "upper bound against the distance")
    others = q.symmetry.act(draw("k", elements(q.symmetry, batch=(24,))), q.project(w1))
    with degenerate():  # a rival may turn rows round
        least = torch.minimum(q.manifold.dist(q.project(w0), others).min(), lower).square()
    what = "squared length of the best of 24 paths, against the lower bound"
    agree(least, lower.square(), what, scale=_size(q, w0, w1) ** 2)


def _batch(q: Quotient, draw: Draws) -> None:
    w0, w1 = draw("w0", generic_weights(q.arch, batch=(2,))), draw("w1", generic_weights(q.arch))
    k = draw("k", st.integers(0, 1))
    both, one = q.geodesic(w0[:, None], w1), q.geodesic(w0[k], w1)
    demand(both.length.shape == (2, 1), f"2 x 1 pairs have lengths {tuple(both.length.shape)}")
    agree(both.length[k, 0], one.length, f"length of geodesic {k} of a batch")
    agree(both(0.5)[k, 0], one(0.5), f"middle of geodesic {k} of a batch")


# ---------------------------------------------------------------- geodesics


def _path(q: Quotient, draw: Draws) -> tuple[Geodesic, Tensor, Tensor]:
    """Draw two networks, degenerate ones too, and return the geodesic between them."""
    w0, w1 = (draw(name, weights(q.arch)) for name in ("w0", "w1"))
    with degenerate():
        return q.geodesic(w0, w1), w0, w1


def _geodesic_ends(q: Quotient, draw: Draws) -> None:
    path, w0, w1 = _path(q, draw)
    with degenerate():
        start, target = q.project(w0), q.project(w1)
        distance = q.distance(w0, w1)
    agree(path(0), start, "path(0) against the projection of w0")
    end = q.symmetry.act(path.alignment.element, target)
    agree(path(1), end, "path(1) against k w1", factor=_ROUNDING)
    agree(path.end, end, "path.end against k w1")
    agree(path.length, distance, "length against the distance")


def _curve(q: Quotient, draw: Draws) -> None:
    path, _, _ = _path(q, draw)
    t = torch.tensor(draw("t", st.sampled_from((0.0, 0.25, 1.0))), dtype=torch.float64)
    slope = torch.func.jvp(path, (t,), (torch.ones_like(t),))[1]
    agree(path.velocity(t), slope, "velocity against the derivative of the path", factor=_ROUNDING)
    speed = q.manifold.norm(path(t), slope)
    agree(speed, path.length, "speed against the length", factor=_ROUNDING)
    steps = path(torch.linspace(0, 1, _PIECES + 1).double()).diff(dim=0)
    polygon = steps[:, : q.arch.num_parameters].norm(dim=-1).sum()
    agree(torch.maximum(path.length, polygon), path.length, "chords along the path against it")
    if isinstance(q.manifold, ConeProduct):
        return  # near the tip a unit turns quickly, however short the pieces are
    # An arc of angle a is longer than its chord by a factor of at most 1 + a^2 / 24 + O(a^4); no
    # row turns by more than pi.
    longest = torch.minimum(path.length, (1 + (torch.pi / _PIECES) ** 2 / 20) * polygon)
    agree(longest, path.length, "length against the chords along the path", factor=_ROUNDING)


def _exp(q: Quotient, draw: Draws) -> None:
    path, w0, w1 = _path(q, draw)
    with degenerate():
        reached = q.exp(w0, q.log(w0, w1))
    agree(reached, path.end, "exp of log, against the end of the path", factor=_ROUNDING)
    q.manifold.assert_check_point_on_manifold(path.end)


QUOTIENT: dict[str, Body] = {
    "zero": _zero,
    "invariant": _invariant,
    "symmetric": _symmetric,
    "shortest": _shortest,
    "bracket": _bracket,
    "batch": _batch,
    "geodesic ends": _geodesic_ends,
    "curve": _curve,
    "exp after log": _exp,
}
