"""Laws of sections: one point on each orbit of the non-compact symmetries."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor, nn

from symflow.arch import Architecture, Shifts, scale_coordinates
from symflow.errors import AntipodalWarning, DeadNeuronWarning
from symflow.groups import ScalingGroup
from symflow.sections import (
    BalancedSection,
    CentredSection,
    FlatSection,
    Section,
    SphereSection,
    mixed_axes,
)
from symflow.testing.equivariance import random_inputs, same_outputs
from symflow.testing.law import Body, Draws, Law, agree, demand, law
from symflow.testing.networks import generic_weights, mlps, small_architectures, weights
from symflow.testing.strategies import elements, register, seeds, values

# A balanced point is the end of an iteration, and its rounding is that of all its sweeps.
_ROUNDING = 100.0


def section_laws(subject: Section | type[Section]) -> tuple[Law, ...]:
    """List the laws that a section (or, over drawn architectures, a class of them) has to obey.

    Parameters
    ----------
    subject
        A section, or a class with a strategy (:func:`symflow.testing.register`).

    Raises
    ------
    LookupError
        If ``subject`` is a class that no strategy draws.

    Examples
    --------
    >>> [str(law) for law in section_laws(SphereSection)][:4]
    ['point', 'idempotent', 'orbit', 'covariant']
    """
    drawn = values(subject) if isinstance(subject, type) else st.just(subject)
    return tuple(law(name, drawn, body, told=told) for name, body in SECTION.items())


def check_section(section: Section, *, max_examples: int | None = None) -> None:
    """Check that a section picks one point of each orbit and keeps the function as it promises.

    Parameters
    ----------
    section
        The section.
    max_examples
        How many examples to draw for each law; as many as the active Hypothesis profile says by
        default.

    Raises
    ------
    AssertionError
        Naming the law that is broken, the section, and the smallest example found.

    Examples
    --------
    >>> import symflow
    >>> check_section(SphereSection(symflow.mlp([2, 2, 1])), max_examples=5)
    """
    for one in section_laws(section):
        one.check(max_examples)


def told(section: Section) -> str:
    """Name a section and its architecture.

    Examples
    --------
    >>> import symflow
    >>> told(FlatSection(symflow.mlp([2, 1])))
    'FlatSection of Architecture(Sequential: 2 leaves, D = 3, axes )'
    """
    return f"{type(section).__name__} of {section.arch}"


@contextmanager
def degenerate() -> Iterator[None]:
    """Let pass the warnings that degenerate weights are owed: dead neurons, antipodal rows.

    Examples
    --------
    >>> with degenerate():
    ...     warnings.warn(DeadNeuronWarning(1))
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeadNeuronWarning)
        warnings.simplefilter("ignore", AntipodalWarning)
        warnings.filterwarnings("ignore", "the last layer of a network is zero")
        yield


# ---------------------------------------------------------------- the laws


def _weights(section: Section, draw: Draws) -> Tensor:
    return draw("w", weights(section.arch))


def _project(section: Section, w: Tensor) -> Tensor:
    with degenerate():
        return section.project(w)


def _same(got: Tensor, wanted: Tensor, what: str) -> None:
    agree(got, wanted, what, factor=_ROUNDING)


def _point(section: Section, draw: Draws) -> None:
    w = _weights(section, draw)
    before = w.clone()
    x = _project(section, w)
    demand(torch.equal(w, before), "projecting changes the weights it is given")
    demand(bool(x.isfinite().all()), "the point is not finite")
    section.manifold.assert_check_point_on_manifold(x)


def _idempotent(section: Section, draw: Draws) -> None:
    x = _project(section, _weights(section, draw))
    _same(_project(section, x), x, "the point of a point, against that point")


def _orbit(section: Section, draw: Draws) -> None:
    arch, w = section.arch, _weights(section, draw)
    g = draw("g", elements(arch.symmetry))
    # Scales applied by hand: the compact part of g does not come in.
    factors = scale_coordinates(arch.leaves, _scales(arch, g))
    moved = w if factors is None else w * factors
    if section.shifts is not None:
        shift_seed = draw("shift seed", seeds())
        generator = torch.Generator().manual_seed(shift_seed)
        moved = moved + section.shifts.random(generator=generator, like=w)
    before, after = _project(section, torch.stack([w, moved]))
    _same(after, before, "the point after scaling and adding")


def _scales(arch: Architecture, g: dict[str, object]) -> dict[str, Tensor | None]:
    groups = {axis.name: axis.group for axis in arch.axes}
    return {
        name: group.noncompact(g[name])
        for name, group in groups.items()
        if isinstance(group, ScalingGroup)
    }


def _covariant(section: Section, draw: Draws) -> None:
    w, k = _weights(section, draw), draw("k", elements(section.symmetry))
    before, after = _project(section, torch.stack([w, section.symmetry.act(k, w)]))
    _same(after, section.symmetry.act(k, before), "the point of k w, against k times the point")


def _function(section: Section, draw: Draws) -> None:
    arch, w = section.arch, _weights(section, draw)
    inputs = random_inputs(arch, draw("input seed", seeds()))
    with degenerate():
        x, removed = section.split(w)
    same_outputs(arch, w, arch.apply(section.join(x, removed), *inputs), inputs, "joined again")
    # What is removed are logarithms of positive factors of all outputs: the arg max is kept.
    factor = removed.sum().exp()
    same_outputs(arch, w, factor * arch.apply(x, *inputs), inputs, "the point, times its factor")


def _join(section: Section, draw: Draws) -> None:
    with degenerate():
        x, removed = section.split(_weights(section, draw))
        again, more = section.split(section.join(x, removed))
    _same(again, x, "the point after join")
    _same(more, removed, "the removed coordinates after join")


def _batch(section: Section, draw: Draws) -> None:
    w, k = draw("w", generic_weights(section.arch, batch=(2, 2))), draw("k", st.integers(0, 1))
    x, removed = section.split(w)
    demand(x.shape == w.shape, f"the points have shape {tuple(x.shape)}")
    one, rest = section.split(w[k, 1])
    _same(x[k, 1], one, f"point {k, 1} of a batch")
    _same(removed[k, 1], rest, f"removed coordinates {k, 1} of a batch")


def _precision(section: Section, draw: Draws) -> None:
    w = draw("w", generic_weights(section.arch))
    single = section.project(w.float())
    demand(single.dtype == torch.float32, f"float32 weights become {single.dtype}")
    agree(single, section.project(w.float().double()), "the point in float32 against float64")


SECTION: dict[str, Body] = {
    "point": _point,
    "idempotent": _idempotent,
    "orbit": _orbit,
    "covariant": _covariant,
    "function": _function,
    "join": _join,
    "batch": _batch,
    "precision": _precision,
}


# ---------------------------------------------------------------- the sections of symflow


def _spheres(arch: Architecture) -> SearchStrategy[Section]:
    kept = st.sampled_from(("function", "argmax") if arch.output else ("function",))
    return st.builds(
        lambda preserves, bias: SphereSection(arch, preserves=preserves, bias=bias),
        *(kept, st.sampled_from(("joint", "apart"))),
    )


def _feed_forward(arch: Architecture) -> bool:
    """Whether no axis leads to itself: rows can then be made unit one layer after the other."""
    return all(len(set(leaf.axes)) == len(leaf.axes) for leaf in arch.leaves)


# Tied maps from an axis to itself have no sphere section, and balance very slowly.
_SMALL = small_architectures().filter(_feed_forward)


@cache
def _normed() -> Architecture:
    """Make a stream that a norm centres, behind a map and a bias."""
    net = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.ReLU(), nn.Linear(3, 2))
    return Architecture.from_module(net, torch.zeros(1, 2))


@cache
def _shifts() -> Shifts:
    return Shifts.find(_normed())


def _centred() -> CentredSection:
    return CentredSection(BalancedSection(_normed()), _shifts())


register(CentredSection, st.builds(_centred))
register(BalancedSection, _SMALL.map(BalancedSection))
register(FlatSection, mlps(width=3, layers=2, activations=("gelu", "tanh")).map(FlatSection))
# Units that mix have no rows of their own.
register(SphereSection, _SMALL.filter(lambda arch: not mixed_axes(arch)).flatmap(_spheres))
