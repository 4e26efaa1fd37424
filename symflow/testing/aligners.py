"""Laws of aligners: what a search over the compact group promises, though the problem is hard.

The greatest objective over the group is out of reach in general (it is NP-hard), so no law compares
with it: an aligner that is never below any element *and* gives the same everywhere on the orbits
would be exact. What holds is that it ends where no single axis can be improved.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from symflow.align import (
    ActivationMatching,
    Aligner,
    Alignment,
    FrankWolfe,
    Polished,
    Sinkhorn,
    Status,
    StraightThrough,
    Weighted,
    WeightMatching,
)
from symflow.align.descent import mixes
from symflow.arch import Architecture, Symmetry, mlp
from symflow.errors import NotIsometricError
from symflow.testing.law import Body, Draws, Law, agree, demand, law
from symflow.testing.networks import generic_weights, small_architectures
from symflow.testing.strategies import (
    element,
    elements,
    generator,
    pick,
    register,
    seeds,
    values,
)

_RIVALS = 24


@final
@dataclass(frozen=True, eq=False)
class BuiltFor:
    """An aligner that is built for one architecture, because it needs data of it.

    Attributes
    ----------
    build
        Builds the aligner; the networks of the law's examples are of the same architecture.
    architectures
        What to build it for; by default whatever other aligners are tried on.

    Examples
    --------
    >>> print(BuiltFor(lambda arch: ActivationMatching(arch, arch.inputs), name="mine"))
    mine
    """

    build: Callable[[Architecture], Aligner]
    architectures: SearchStrategy[Architecture] | None = None
    name: str = "an aligner built for each architecture"

    def __str__(self) -> str:
        return self.name


Subject: TypeAlias = Aligner | BuiltFor


def aligner_laws(subject: Subject | type[Aligner]) -> tuple[Law, ...]:
    """List the laws that an aligner (or, over drawn options, a class of aligners) has to obey.

    Parameters
    ----------
    subject
        An aligner, how to build one for an architecture (:class:`BuiltFor`), or a class with a
        strategy that draws either (:func:`symflow.testing.register`).

    Raises
    ------
    LookupError
        If ``subject`` is a class that no strategy draws.

    Examples
    --------
    >>> [str(law) for law in aligner_laws(WeightMatching())][:4]
    ['result', 'ascent', 'planted', 'orbit']
    """
    drawn = values(subject) if isinstance(subject, type) else st.just(subject)
    return tuple(law(name, drawn, body) for name, body in ALIGNER.items())


def check_aligner(aligner: Subject, *, max_examples: int | None = None) -> None:
    """Check that an aligner undoes planted elements, is covariant, and stops at a fixed point.

    Parameters
    ----------
    aligner
        The aligner, or how to build it for an architecture.
    max_examples
        How many examples to draw for each law; as many as the active Hypothesis profile says by
        default.

    Raises
    ------
    AssertionError
        Naming the law that is broken, the aligner, and the smallest example found.

    Examples
    --------
    >>> check_aligner(WeightMatching(("sequential",)), max_examples=5)
    """
    for one in aligner_laws(aligner):
        one.check(max_examples)


def single_axis_rivals(
    symmetry: Symmetry, found: dict[str, Any], axis: str, seed: int, like: Tensor
) -> dict[str, Any]:
    """Return elements (24,) that differ from ``found`` on one axis alone, the identity among them.

    Examples
    --------
    >>> import symflow
    >>> symmetry, like = symflow.mlp([2, 3, 1], "gelu").symmetry, torch.zeros(1)
    >>> single_axis_rivals(symmetry, symmetry.identity(like=like), "h1", 0, like)["h1"].shape
    torch.Size([24, 3])
    """
    group = symmetry[axis].group
    rivals = element(group, seed, batch=(_RIVALS - 1,), dtype=like.dtype)
    still = element(group, 0, batch=(1,), dtype=like.dtype)
    return {**found, axis: _joined(still, rivals)}


def _joined(g: Any, h: Any) -> Any:
    if isinstance(g, tuple):
        return tuple(_joined(a, b) for a, b in zip(g, h, strict=True))
    return torch.cat([g, h])


# ---------------------------------------------------------------- the laws


# Two hidden layers: the smallest problem with more than one fixed point.
_HARD = st.builds(
    functools.cache(mlp),
    st.tuples(st.just(2), st.integers(3, 5), st.integers(3, 5), st.just(2)),
    st.sampled_from(("gelu", "tanh")),
)
_ANY = small_architectures() | _HARD


def _problem(
    subject: Subject, draw: Draws, batch: tuple[int, ...] = ()
) -> tuple[Aligner, Architecture, Symmetry, Any, Any]:
    """Draw an architecture, its compact symmetry, and two networks without ties."""
    architectures = subject.architectures if isinstance(subject, BuiltFor) else None
    arch = draw("arch", _ANY if architectures is None else architectures)
    w0, w1 = (draw(name, generic_weights(arch, batch=batch)) for name in ("w0", "w1"))
    return _built(subject, arch), arch, arch.symmetry.compact, w0, w1


def _built(subject: Subject, arch: Architecture) -> Aligner:
    return subject.build(arch) if isinstance(subject, BuiltFor) else subject


def _value(arch: Architecture, w0: Tensor, w1: Tensor) -> Tensor:
    """Inner product of the learnable coordinates, leaf by leaf."""
    parts = [(w0[..., x.span] * w1[..., x.span]).sum(-1) for x in arch.leaves if x.learnable]
    return torch.stack(parts).sum(0)


def _result(subject: Subject, draw: Draws) -> None:
    aligner, arch, symmetry, w0, w1 = _problem(subject, draw)
    kept = w0.clone(), w1.clone()
    found = aligner(symmetry, w0, w1)
    agree(found.weights, symmetry.act(found.element, w1), "weights against the element's action")
    agree(found.objective, _value(arch, w0, found.weights), "objective against the inner product")
    agree(found.history[-1], found.objective, "end of the history against the objective")
    demand(torch.equal(w0, kept[0]) and torch.equal(w1, kept[1]), "aligning changes its arguments")


def _ascent(subject: Subject, draw: Draws) -> None:
    aligner, _, symmetry, w0, w1 = _problem(subject, draw)
    history = aligner(symmetry, w0, w1).history
    agree(history.cummax(0).values, history, "greatest objective so far, against the objective")


def _planted(subject: Subject, draw: Draws) -> None:
    aligner, _, symmetry, w, _ = _problem(subject, draw)
    g = draw("g", elements(symmetry))
    agree(aligner(symmetry, w, symmetry.act(g, w)).weights, w, "g w brought back, against w")


def _orbit(subject: Subject, draw: Draws) -> None:
    aligner, _, symmetry, w0, w1 = _problem(subject, draw)
    g, h = draw("g", elements(symmetry)), draw("h", elements(symmetry, batch=(8,)))
    first = aligner(symmetry, w0, w1).objective
    w1 = symmetry.act(h, w1.expand(8, -1))
    others = aligner(symmetry, symmetry.act(g, w0), w1).objective
    agree(others, first.expand(8), "objective elsewhere on the orbits")


def _fixed_point(subject: Subject, draw: Draws) -> None:
    aligner, arch, symmetry, w0, w1 = _problem(subject, draw)
    found, seed = aligner(symmetry, w0, w1), draw("rivals", seeds())
    if found.status is not Status.CONVERGED:
        return
    for axis in symmetry.axes:
        if any(leaf.axes.count(axis.name) > 1 for leaf in arch.leaves):
            continue  # the step is a linearisation there
        rivals = single_axis_rivals(symmetry, found.element, axis.name, seed, w1)
        best = _value(arch, w0, symmetry.act(rivals, w1)).max()
        slack = float(w0.norm() * w1.norm())
        top = torch.maximum(best, found.objective)
        agree(top, found.objective, f"best of axis {axis.name}, against the objective", scale=slack)


def _batch(subject: Subject, draw: Draws) -> None:
    aligner, arch, symmetry, w0, w1 = _problem(subject, draw, (2,))
    grid = aligner(symmetry, w0[:, None], w1)
    shape = (2, 2, arch.dimension)
    demand(grid.weights.shape == shape, f"2 x 2 pairs give shape {tuple(grid.weights.shape)}")
    i, k = draw("pair", st.tuples(st.integers(0, 1), st.integers(0, 1)))
    one: Alignment = aligner(symmetry, w0[i], w1[k])
    agree(grid.weights[i, k], one.weights, f"pair {i, k} of a batch")
    moved = symmetry.act(pick(grid.element, (i, k)), w1[k])
    agree(moved, one.weights, f"the element of pair {i, k}")


@functools.cache
def _scaled(width: int) -> Architecture:
    return mlp([2, width, 1], "relu")


def _refusal(subject: Subject, draw: Draws) -> None:
    arch = _scaled(draw("width", st.integers(1, 3)))
    w = draw("w", generic_weights(arch))
    try:
        _built(subject, arch)(arch.symmetry, w, w)
    except NotIsometricError:
        return
    raise AssertionError("a group with scales is taken without a NotIsometricError")


ALIGNER: dict[str, Body] = {
    "result": _result,
    "ascent": _ascent,
    "planted": _planted,
    "orbit": _orbit,
    "fixed point": _fixed_point,
    "batch": _batch,
    "refusal": _refusal,
}

# ---------------------------------------------------------------- what is drawn


def _size(w: Tensor) -> Tensor:
    """Return a loss that is the same along orbits: midpoints are longest where networks agree."""
    return -w.square().sum(-1)


def _on_data(correlation: bool, architectures: SearchStrategy[Architecture]) -> BuiltFor:
    """Activation matching on inputs drawn once."""

    def build(arch: Architecture) -> Aligner:
        g = generator(0)
        inputs = [2 * torch.randn(64, *x.shape[1:], generator=g) for x in arch.inputs]
        return ActivationMatching(arch, tuple(inputs), correlation)

    return BuiltFor(build, architectures, f"ActivationMatching on data, correlation={correlation}")


def _moves_units(arch: Architecture) -> bool:
    """Whether no axis is rotated: few inputs leave rotations of many units undetermined."""
    return not any(mixes(axis.group) for axis in arch.symmetry.compact.axes)


# The start at the identity depends on where on their orbits the networks lie: it breaks "orbit".
_STARTS = (("sequential",), ("sequential", "random"), ("sequential", "random", "random"))
_STEEPEST = FrankWolfe(max_steps=5)
_DRAWN: dict[type[Aligner], tuple[Subject, ...]] = {
    WeightMatching: tuple(map(WeightMatching, _STARTS)),
    # The barycentre alone need not lead to a planted element: the relaxed problem has local maxima.
    FrankWolfe: (_STEEPEST, FrankWolfe(("sequential",), 5), FrankWolfe(max_steps=5, polish=False)),
    # From the uniform matrix the same.
    Sinkhorn: (
        Sinkhorn(steps=5),
        Sinkhorn(steps=5, polish=False),
        Sinkhorn(_size, steps=3),
        Sinkhorn(_size, at="random", steps=3, polish=False),
    ),
    StraightThrough: (StraightThrough(_size, steps=3),),
    # Correlations of two units that see one coordinate alone are one: narrow networks have ties.
    ActivationMatching: (_on_data(True, _HARD), _on_data(False, _ANY.filter(_moves_units))),
    Polished: (
        Polished(FrankWolfe(("sequential",), 3, polish=False), WeightMatching()),
        Polished(WeightMatching(("sequential",)), _STEEPEST),
    ),
    Weighted: (
        Weighted(WeightMatching(), outgoing=0.5),
        Weighted(WeightMatching(), incoming=2.0, outgoing=0.25),
    ),
}
for _cls, _subjects in _DRAWN.items():
    register(_cls, st.sampled_from(_subjects))
