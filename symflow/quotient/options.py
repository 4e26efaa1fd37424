"""What a quotient is made with: each choice is looked at before it is believed."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from symflow.align import Aligner
from symflow.arch import Architecture, Shifts
from symflow.errors import LeafError, ShapeError
from symflow.groups import Group
from symflow.manifolds import WeightManifold
from symflow.sections import (
    BalancedSection,
    CentredSection,
    FlatSection,
    Section,
    SphereSection,
    noncompact_axes,
    uncompensated_axes,
)


def with_groups(arch: Any, groups: Any) -> Architecture:
    """Return the architecture with these groups on its axes, after a look at both arguments."""
    if not isinstance(arch, Architecture):
        raise ShapeError(
            f"arch must be an Architecture, got {_shown(arch)}: make one, as in "
            "Architecture.from_module(module, example_input)"
        )
    if not isinstance(groups, Mapping):
        raise ShapeError(
            f"groups must be a dict from names of axes to groups, got {_shown(groups)}"
        )
    for name, group in groups.items():
        if not isinstance(group, Group):
            raise ShapeError(
                f"groups[{name!r}] must be a Group, such as Permutation(4), got {_shown(group)}"
            )
    return arch.with_groups(groups) if groups else arch


def an_aligner(aligner: Any) -> Aligner:
    """Return the aligner, if it is one."""
    if not isinstance(aligner, Aligner):
        raise ShapeError(
            f"aligner must be an Aligner, such as WeightMatching(), got {_shown(aligner)}"
        )
    return aligner


def a_section(arch: Architecture, section: Any, preserves: Any) -> Section:
    """Return the section of that name, or the one that was given if it fits."""
    if preserves not in ("function", "argmax"):
        raise ShapeError(f"preserves must be 'function' or 'argmax', got {_shown(preserves)}")
    if isinstance(section, Section):
        return _checked(arch, section, preserves)
    if preserves == "argmax" and section not in ("sphere", "auto"):
        raise ShapeError(
            "preserves='argmax' puts the last layer on a sphere: it needs section='sphere', got "
            f"{_shown(section)}"
        )
    if section == "auto" and uncompensated_axes(arch):
        section = "sphere"
    if section == "sphere" or preserves == "argmax":
        return SphereSection(arch, preserves=preserves)
    if section == "balanced" or (section == "auto" and noncompact_axes(arch)):
        return BalancedSection(arch)
    if section is None or section == "auto":
        return FlatSection(arch)
    raise ShapeError(
        "section must be 'auto', 'balanced', 'sphere', None or a Section, got " + _shown(section)
    )


def centred(section: Section, shifts: Any) -> Section:
    """Return the section of weights without translations: those given, or those that are found."""
    if shifts is None:
        return section
    if isinstance(shifts, str):
        shifts = Shifts.find(section.arch, preserves=shifts)
    if not isinstance(shifts, Shifts):
        raise ShapeError(
            "shifts must be 'function', 'probabilities' or symflow.arch.Shifts, got "
            + _shown(shifts)
        )
    return CentredSection(section, shifts)


def space_of(section: Section, metric: Any) -> WeightManifold:
    """Return the section's space with the metric of that name, or with factors of its leaves."""
    if metric is None:
        return section.manifold
    if isinstance(metric, Mapping):
        return section.manifold.weighted(_leaf_weights(section.arch, metric))
    if metric != "intrinsic":
        raise ShapeError(
            "metric must be None, 'intrinsic' or a dict from keys of parameters to positive "
            f"factors, got {_shown(metric)}"
        )
    inside = section.inside if isinstance(section, CentredSection) else section
    if not isinstance(inside, BalancedSection):
        raise ShapeError(
            "metric='intrinsic' is the balanced section's, whose own distances are chords; those "
            f"of a {type(inside).__name__} are intrinsic as they are: leave metric out"
        )
    return inside.intrinsic()


def _leaf_weights(arch: Architecture, metric: Mapping[Any, Any]) -> Tensor:
    """Return the factor of every coordinate in squared lengths."""
    keys = list(dict.fromkeys(leaf.key for leaf in arch.leaves if leaf.learnable))
    unknown = sorted(map(str, set(metric) - set(keys)))
    if unknown:
        raise LeafError(f"metric names {unknown}; the parameters are {keys}")
    weights = torch.ones(arch.dimension, dtype=torch.float64)
    for leaf in arch.leaves:
        factor = metric.get(leaf.key, 1.0)
        number = isinstance(factor, int | float) and not isinstance(factor, bool)
        if not (number and math.isfinite(factor) and factor > 0):
            raise ShapeError(
                f"metric[{leaf.key!r}] must be a positive number, got {_shown(factor)}: what "
                "should not count at all can have a small one"
            )
        weights[leaf.span] = factor
    return weights


def _checked(arch: Architecture, section: Section, preserves: str) -> Section:
    kind = type(section).__name__
    if section.arch.fingerprint != arch.fingerprint:
        raise ShapeError(
            f"section must be one of this architecture, {arch}, with the same groups on its axes; "
            f"got a {kind} of {section.arch}. Make it of the same architecture; if groups are "
            f"given, of that with them: {kind}(arch.with_groups(groups), ...)"
        )
    # What a section removes beside the symmetries of the function are the outputs' scales.
    if preserves == "argmax" and section.state_manifold.dimension == section.manifold.dimension:
        raise ShapeError(
            f"preserves='argmax' wants a section that removes the scale of the outputs, got a "
            f"{kind} that preserves the function: leave preserves out, or give "
            "SphereSection(arch, preserves='argmax')"
        )
    return section


def _shown(x: Any) -> str:
    """Show a small value as it is, anything else by its type: an address tells nothing."""
    plain = x is None or isinstance(x, str | int | float)
    return repr(x) if plain else f"an object of type {type(x).__name__}"
