"""Weight space divided by the symmetries of the network."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.align import Aligner, Alignment, WeightMatching, objective, objective_bound
from symflow.align.arcs import polish_arcs
from symflow.arch import Architecture, Symmetry, Weights
from symflow.errors import LeafError, ShapeError
from symflow.groups import Group, map_element
from symflow.manifolds import SphereProduct, WeightManifold
from symflow.quotient.geodesic import Geodesic
from symflow.quotient.mean import frechet_mean
from symflow.sections import (
    BalancedSection,
    FlatSection,
    Section,
    SphereSection,
    scaled_axes,
)


@final
class Quotient:
    """The orbits of weights under the symmetries of an architecture, as a metric space.

    A section removes the non-compact symmetries (ReLU scales); what is left is a compact group K of
    isometries, and the distance of two orbits is the least distance over K.

    Parameters
    ----------
    arch
        The architecture.
    section
        ``"balanced"``: least norm on each scaling orbit, chordal distance. ``"sphere"``: incoming
        weights of each unit on a sphere, arcs. None: no section, for compact symmetries only.
        ``"auto"``: balanced where scales act, else None. Or a :class:`~symflow.sections.Section` of
        this architecture (of ``arch.with_groups(groups)`` if groups are given); what it preserves
        is then its own choice.
    aligner
        Searches K; :class:`~symflow.WeightMatching` with covariant starts by default.
    groups
        Other groups for some axes; tried on the network before they are believed.
    preserves
        ``"function"``, or ``"argmax"`` (with ``section="sphere"``): also divide by one positive
        factor of all outputs.

    Notes
    -----
    Finding the best element of K is NP-hard in general. ``distance`` is what the aligner finds, an
    upper bound of the true distance; ``distance_bounds`` brackets it. With the default aligner it
    is the same number (up to rounding) wherever on their orbits the ends lie, as long as no step of
    the search meets a tie. Equal units are such a tie: networks with units that have been copied,
    are all dead or have equal incoming weights may get another number, each an upper bound, at
    another place of their orbits.

    Weights may be flat tensors (*batch, D), state dicts, modules, or sequences of these.

    Raises
    ------
    ShapeError
        If an argument is of the wrong type, a choice is unknown, choices do not go together, or the
        section belongs to another architecture.
    SymmetryError
        If the function changes under a group of ``groups``.
    NotIsometricError
        If there is no section, but a non-compact group.
    LeafError
        If ``preserves="argmax"``, but scaling the last layer does more than scaling the outputs.

    Examples
    --------
    >>> import symflow
    >>> arch = symflow.mlp([3, 8, 2])
    >>> generator = torch.Generator().manual_seed(0)
    >>> w = torch.randn(arch.dimension, generator=generator, dtype=torch.float64)
    >>> moved = arch.symmetry.act(arch.symmetry.random(generator=generator, like=w), w)
    >>> bool(symflow.Quotient(arch).distance(w, moved) < 1e-6)
    True
    """

    def __init__(
        self,
        arch: Architecture,
        section: "str | Section | None" = "auto",
        *,
        aligner: Aligner | None = None,
        groups: Mapping[str, Group[Any]] | None = None,
        preserves: str = "function",
    ) -> None:
        self.arch = _with_groups(arch, groups or {})
        self.section = _section(self.arch, section, preserves)
        self.aligner = WeightMatching() if aligner is None else _aligner(aligner)

    @property
    def symmetry(self) -> Symmetry:
        """The compact group that is left on the section."""
        return self.section.symmetry

    @property
    def manifold(self) -> WeightManifold:
        """The section space M as a geoopt manifold (M / K itself is not smooth)."""
        return self.section.manifold

    def project(self, w: Weights) -> Float[Tensor, "*#batch D"]:
        """Return the section's point on the orbit of ``w``: same function, canonical scales.

        With ``preserves="argmax"`` the outputs are those of ``w`` divided by one positive number:
        the same predictions, not the same function.

        Raises
        ------
        LeafError
            If ``w`` is not of this architecture, or its dtype cannot represent the point.
        """
        return self.section.project(self.arch.as_weights(w))

    def align(self, w0: Weights, w1: Weights, *, bounds: bool = False) -> Alignment:
        """Bring ``w1`` as close to ``w0`` as the aligner can.

        Parameters
        ----------
        w0, w1
            Weights; batch dimensions broadcast, and every pair is aligned.
        bounds
            Also compute an upper bound of the objective.

        Returns
        -------
        Alignment
            ``weights`` is project(w1) moved by ``element``.
        """
        return self.align_points(*self._ends(w0, w1), bounds=bounds)

    def distance(self, w0: Weights, w1: Weights) -> Float[Tensor, "*#batch"]:
        """Return the distance of two orbits, as far as the aligner finds it.

        Raises
        ------
        ShapeError
            If the batch dimensions of ``w0`` and ``w1`` do not broadcast.
        LeafError
            If they differ in dtype or device, or cannot be projected.
        """
        x0, x1 = self._ends(w0, w1)
        return self.manifold.dist(x0, self.align_points(x0, x1).weights)

    def distance_bounds(
        self, w0: Weights, w1: Weights
    ) -> tuple[Float[Tensor, "*#batch"], Float[Tensor, "*#batch"]]:
        """Bracket the true distance of two orbits.

        The lower bound comes from an upper bound of the inner product over all of K; on the sphere
        section it is that of the chord, which no arc undercuts.
        """
        x0, x1 = self._ends(w0, w1)
        found = self.align_points(x0, x1, bounds=True)
        upper = self.manifold.dist(x0, found.weights)
        bound = found.objective_bound
        best = found.objective if bound is None else torch.maximum(bound, found.objective)
        squares = objective(self.symmetry, x0, x0) + objective(self.symmetry, x1, x1)
        lower = (squares - 2 * best).clamp_min(0).sqrt()
        return torch.minimum(lower, upper), upper

    def geodesic(self, w0: Weights, w1: Weights) -> Geodesic:
        """Return the path from project(w0) into the orbit of w1; its length is ``distance``."""
        x0, x1 = self._ends(w0, w1)
        found = self.align_points(x0, x1)
        start = x0.expand_as(found.weights)
        return Geodesic(start, self.manifold.logmap(start, found.weights), found, self.section)

    def log(self, w0: Weights, w1: Weights) -> Float[Tensor, "*#batch D"]:
        """Return the velocity at project(w0) with which a geodesic reaches the orbit of w1."""
        return self.geodesic(w0, w1).direction

    def exp(self, w: Weights, v: Float[Tensor, "*#batch D"]) -> Float[Tensor, "*#batch D"]:
        """Return the point that the geodesic from project(w) with velocity ``v`` reaches.

        Inverse of ``log`` as long as no closer element of the orbit turns up on the way. On the
        sphere section only the tangent part of ``v`` counts, so that the end is on the spheres too
        (rows that lead straight to the zero row of a dead unit are kept, as ``log`` makes them). On
        the balanced section geodesics are chords: after another ``v`` than one of ``log`` the end
        need not be balanced; ``project`` it.

        Raises
        ------
        ShapeError
            If ``v`` does not end with D coordinates, or does not broadcast with ``w``.
        """
        x = self.project(w)
        if v.ndim == 0 or v.shape[-1] != self.arch.dimension:
            raise ShapeError(
                f"v must end with D = {self.arch.dimension} coordinates, got {tuple(v.shape)}"
            )
        _require_broadcast(("w", x), ("v", v))
        one = torch.ones((), dtype=x.dtype, device=x.device)
        return self.manifold.geodesic(x, self.manifold.velocity(x, v), one)

    def mean(self, ws: Weights) -> Float[Tensor, " D"]:
        """Return the Frechet mean of a batch (N, D): the point of least summed squared distance.

        As far as :func:`frechet_mean` finds it: the best mean of its rounds.

        Raises
        ------
        ShapeError
            If ``ws`` is no batch, or an empty one.
        """
        points = self.arch.as_weights(ws, name="ws")
        if points.ndim != 2 or len(points) == 0:
            raise ShapeError(
                f"ws must be a batch (N, D) of one network or more, got shape {tuple(points.shape)}"
            )
        # Half precision would end the search where rounding hides what a round gains.
        half = points.dtype in (torch.float16, torch.bfloat16)
        ends = self.section.project(points.float() if half else points)
        mean = frechet_mean(self.manifold, lambda m, x: self.align_points(m, x).weights, ends)
        return mean.to(points.dtype)

    def _ends(self, w0: Weights, w1: Weights) -> tuple[Tensor, Tensor]:
        a, b = self.arch.as_weights(w0, name="w0"), self.arch.as_weights(w1, name="w1")
        if (a.dtype, a.device) != (b.dtype, b.device):
            raise LeafError(
                f"w0 is {a.dtype} on {a.device}, w1 is {b.dtype} on {b.device}: convert one of them"
            )
        _require_broadcast(("w0", a), ("w1", b))
        return self.section.project(a), self.section.project(b)

    def align_points(
        self,
        x0: Float[Tensor, "*#batch D"],
        x1: Float[Tensor, "*#batch D"],
        *,
        bounds: bool = False,
    ) -> Alignment:
        """Align points that are on the section already, as flows do at every step; no checks."""
        found = self.aligner(self.symmetry, x0, x1)
        if isinstance(self.manifold, SphereProduct):
            found = self._polish(self.manifold, found, x0, x1)
        if bounds:
            bound = objective_bound(self.symmetry, x0, x1)
            found = replace(found, objective_bound=bound)
        return found

    def _polish(
        self, manifold: SphereProduct, found: Alignment, x0: Tensor, x1: Tensor
    ) -> Alignment:
        batch, d = found.weights.shape[:-1], x1.shape[-1]
        left, right = (x.detach().expand(*batch, d).reshape(-1, d) for x in (x0, x1))
        flat = {
            k: map_element(lambda part: part.reshape(-1, *part.shape[len(batch) :]), g)
            for k, g in found.element.items()
        }
        better = polish_arcs(self.symmetry, manifold, left, right, flat)
        element = {
            k: map_element(lambda part: part.reshape((*batch, *part.shape[1:])), g)
            for k, g in better.items()
        }
        weights = self.symmetry.act(element, x1.expand(*batch, d))
        value = objective(self.symmetry, x0, weights)
        return replace(found, element=element, weights=weights, objective=value)


def _require_broadcast(first: tuple[str, Tensor], second: tuple[str, Tensor]) -> None:
    (a, x), (b, y) = first, second
    try:
        torch.broadcast_shapes(x.shape[:-1], y.shape[:-1])
    except RuntimeError:
        raise ShapeError(
            f"the batch dimensions of {a} and {b} must broadcast, got {a} of shape "
            f"{tuple(x.shape)} and {b} of shape {tuple(y.shape)}: for all pairs, give "
            f"{a}[:, None] and {b}[None]"
        ) from None


def _with_groups(arch: Any, groups: Any) -> Architecture:
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


def _aligner(aligner: Any) -> Aligner:
    if not isinstance(aligner, Aligner):
        raise ShapeError(
            f"aligner must be an Aligner, such as WeightMatching(), got {_shown(aligner)}"
        )
    return aligner


def _section(arch: Architecture, section: Any, preserves: Any) -> Section:
    if preserves not in ("function", "argmax"):
        raise ShapeError(f"preserves must be 'function' or 'argmax', got {_shown(preserves)}")
    if isinstance(section, Section):
        return _checked(arch, section, preserves)
    if preserves == "argmax" and section not in ("sphere", "auto"):
        raise ShapeError(
            "preserves='argmax' puts the last layer on a sphere: it needs section='sphere', got "
            f"{_shown(section)}"
        )
    if section == "sphere" or preserves == "argmax":
        return SphereSection(arch, preserves=preserves)
    if section == "balanced" or (section == "auto" and scaled_axes(arch)):
        return BalancedSection(arch)
    if section is None or section == "auto":
        return FlatSection(arch)
    raise ShapeError(
        "section must be 'auto', 'balanced', 'sphere', None or a Section, got " + _shown(section)
    )


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
