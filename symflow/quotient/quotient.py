"""Weight space divided by the symmetries of the network."""

from collections.abc import Mapping
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.align import Aligner, Alignment, WeightMatching, objective
from symflow.arch import Architecture, Element, Shifts, Symmetry, Weights
from symflow.errors import LeafError, ShapeError
from symflow.groups import Group
from symflow.manifolds import WeightManifold
from symflow.quotient.geodesic import Geodesic
from symflow.quotient.mean import frechet_mean
from symflow.quotient.options import a_section, an_aligner, centred, space_of, with_groups
from symflow.quotient.pairs import pairwise
from symflow.quotient.points import align_points, require_broadcast
from symflow.quotient.principal import Principal, principal
from symflow.quotient.state import transport_state
from symflow.sections import Section


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
        ``"auto"``: balanced where scales act, spheres where nothing compensates them, else None. Or
        a :class:`~symflow.sections.Section` of this architecture (of ``arch.with_groups(groups)``
        if groups are given); what it preserves is then its own choice.
    aligner
        Searches K; :class:`~symflow.WeightMatching` with covariant starts by default.
    groups
        Other groups for some axes; tried on the network before they are believed.
    preserves
        ``"function"``, or ``"argmax"`` (with ``section="sphere"``): also divide by one positive
        factor of all outputs.
    shifts
        Translations to take away, too (:class:`symflow.arch.Shifts`: biases of keys, means over the
        units of a stream that norms centre), or ``"function"`` to find them; ``"probabilities"``
        finds those that only the softmax of the outputs does not see.
    metric
        Factors of leaves in squared distances, by key: ``{"0.weight": 0.1}``; one where none is
        given. Alignment, means and principal directions go by it, the section does not. Not on
        spheres. Or ``"intrinsic"``: of balanced weights as a manifold, whose geodesics stay
        balanced, instead of chords; for networks none of whose weights stand between two scaled
        axes (:class:`symflow.manifolds.ConeProduct`).

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
        If ``preserves="argmax"``, but scaling the last layer does more than scaling the outputs; if
        ``metric="intrinsic"``, but a weight belongs to two scaled units, or linear maps are
        balanced.

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
        shifts: "str | Shifts | None" = None,
        metric: Mapping[str, float | int] | str | None = None,
    ) -> None:
        self.arch = with_groups(arch, groups or {})
        self.section = centred(a_section(self.arch, section, preserves), shifts)
        self.aligner = WeightMatching() if aligner is None else an_aligner(aligner)
        self._space = space_of(self.section, metric)

    @property
    def symmetry(self) -> Symmetry:
        """The compact group that is left on the section."""
        return self.section.symmetry

    @property
    def manifold(self) -> WeightManifold:
        """The section space M as a geoopt manifold (M / K itself is not smooth)."""
        return self._space

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

        The lower bound comes from an upper bound of the inner product over all of K; where
        distances are arcs it is that of the chord, which no arc undercuts.
        """
        x0, x1 = self._ends(w0, w1)
        found = self.align_points(x0, x1, bounds=True)
        upper = self.manifold.dist(x0, found.weights)
        bound = found.objective_bound
        best = found.objective if bound is None else torch.maximum(bound, found.objective)
        a, b = self.manifold.stretch(x0), self.manifold.stretch(x1)
        squares = objective(self.symmetry, a, a) + objective(self.symmetry, b, b)
        lower = (squares - 2 * best).clamp_min(0).sqrt()
        return torch.minimum(lower, upper), upper

    def geodesic(self, w0: Weights, w1: Weights) -> Geodesic:
        """Return the path from project(w0) into the orbit of w1; its length is ``distance``."""
        x0, x1 = self._ends(w0, w1)
        found = self.align_points(x0, x1)
        start = x0.expand_as(found.weights)
        direction = self.manifold.logmap(start, found.weights)
        return Geodesic(start, direction, found, self.section, self.manifold)

    def log(self, w0: Weights, w1: Weights) -> Float[Tensor, "*#batch D"]:
        """Return the velocity at project(w0) with which a geodesic reaches the orbit of w1."""
        return self.geodesic(w0, w1).direction

    def exp(self, w: Weights, v: Float[Tensor, "*#batch D"]) -> Float[Tensor, "*#batch D"]:
        """Return the point that the geodesic from project(w) with velocity ``v`` reaches.

        Inverse of ``log`` as long as no closer element of the orbit turns up on the way. On spheres
        only the tangent part of ``v`` counts (and rows that lead straight to the zero row of a dead
        unit, as ``log`` makes them). On the balanced section geodesics are chords (but with
        ``metric="intrinsic"``): after another ``v`` than one of ``log`` the end need not be
        balanced; ``project`` it.

        Raises
        ------
        ShapeError
            If ``v`` does not end with D coordinates, or does not broadcast with ``w``.
        """
        x = self.project(w)
        self._require_vector(v, ("w", x))
        one = torch.ones((), dtype=x.dtype, device=x.device)
        return self.manifold.geodesic(x, self.manifold.velocity(x, v), one)

    def transport(
        self, w0: Weights, w1: Weights, v: Float[Tensor, "*#batch D"]
    ) -> Float[Tensor, "*#batch D"]:
        """Carry a vector at project(w0) in parallel along the geodesic to project(w1).

        The geodesic ends at k . project(w1), for the element k of the alignment; there, k is undone
        (:meth:`Geodesic.transport` leaves the vector where the path ends). Lengths and angles stay,
        and the way back undoes it. See there for what each section carries.

        Raises
        ------
        ShapeError
            If ``v`` does not end with D coordinates, or does not broadcast with the ends.

        Examples
        --------
        >>> import symflow
        >>> q = symflow.Quotient(symflow.mlp([3, 4, 2]), "sphere")
        >>> w = torch.randn(2, 26, generator=torch.Generator().manual_seed(0))
        >>> v = q.log(w[0], w[1])
        >>> torch.allclose(q.transport(w[0], w[1], v), -q.log(w[1], w[0]), atol=1e-5)
        True
        """
        path = self.geodesic(w0, w1)
        self._require_vector(v, ("w0 and w1", path.start))
        return self.symmetry.act(
            self.symmetry.inverse(path.alignment.element), path.transport(v.to(path.start))
        )

    def transport_state(self, g: Element, state: Mapping[str, Any]) -> dict[str, Any]:
        """Move an optimiser's state along with weights; see :func:`transport_state`.

        ``g`` is an element of ``arch.symmetry``, or an alignment's, which does not scale.

        Examples
        --------
        >>> import symflow
        >>> q = symflow.Quotient(symflow.mlp([1, 1, 1]))    # in, bias, out, output bias
        >>> q.transport_state({"h1": (torch.tensor([0]), torch.tensor([2.0]))},
        ...                   {"exp_avg": torch.ones(4)})["exp_avg"]
        tensor([0.5000, 0.5000, 2.0000, 1.0000])
        """
        return transport_state(self.arch, g, state)

    def mean(self, ws: Weights, *, progress: bool = False) -> Float[Tensor, " D"]:
        """Return the Frechet mean of a batch (N, D): the point of least summed squared distance.

        As far as :func:`frechet_mean` finds it: the best mean of its rounds.

        Raises
        ------
        ShapeError
            If ``ws`` is no batch, or an empty one.
        """
        points = self._batch(ws)
        # Half precision would end the search where rounding hides what a round gains.
        half = points.dtype in (torch.float16, torch.bfloat16)
        ends = self.section.project(points.float() if half else points)
        mean = frechet_mean(
            self.manifold, lambda m, x: self.align_points(m, x).weights, ends, progress=progress
        )
        return mean.to(points.dtype)

    def principal(self, ws: Weights, k: int) -> Principal:
        """Return the k directions in which a batch (N, D) of networks differs most.

        Tangent-space principal component analysis (Fletcher et al., 2004): the networks are aligned
        to their mean, and the geodesics that lead to them decomposed by singular values.

        Raises
        ------
        ShapeError
            If ``ws`` is no batch, or ``k`` not from 1 to the least of N and P.

        Examples
        --------
        >>> import symflow
        >>> w = torch.randn(9, 26, generator=torch.Generator().manual_seed(0))
        >>> found = symflow.Quotient(symflow.mlp([3, 4, 2])).principal(w, 2)
        >>> found.reconstruct(found.coordinates).shape
        torch.Size([9, 26])
        """
        points = self._batch(ws)
        half = points.dtype in (torch.float16, torch.bfloat16)
        with torch.no_grad():
            points = points.float() if half else points
            mean = self.mean(points)
            return principal(self.manifold, mean, self.log(mean, points), k)

    def pairwise(
        self, ws: Weights, *, workers: int = 1, progress: bool = True
    ) -> Float[Tensor, "N N"]:
        """Return the distances of all pairs of a batch (N, D): symmetric, with a zero diagonal.

        N (N - 1) / 2 alignments, without gradient, in pieces of bounded memory.

        Parameters
        ----------
        ws
            Networks (N, D).
        workers
            Number of joblib's jobs: processes, for the small operations of an alignment hold the
            interpreter lock; inside ``joblib.parallel_config(backend)`` that backend runs them,
            such as Dask or Ray on many machines.
        progress
            Whether a bar is shown where the output is a terminal and it takes a while.

        Raises
        ------
        ShapeError
            If ``ws`` is no batch, or an empty one, or there is no worker.

        Examples
        --------
        >>> import symflow
        >>> w = torch.randn(3, 26, generator=torch.Generator().manual_seed(0))
        >>> symflow.Quotient(symflow.mlp([3, 4, 2])).pairwise(w).diagonal()
        tensor([0., 0., 0.])
        """
        with torch.no_grad():
            points = self.project(self._batch(ws))
            return pairwise(self._between_points, points, workers=workers, progress=progress)

    def medoid(self, ws: Weights, *, workers: int = 1, progress: bool = True) -> int:
        """Return which network of a batch (N, D) has the least sum of distances to the others.

        A centre that is one of them (Kaufman and Rousseeuw, 1987). Arguments, errors and cost as
        :meth:`pairwise`.

        Examples
        --------
        >>> import symflow
        >>> arch, t = symflow.mlp([3, 4, 2], "tanh"), torch.tensor([0.0, 3.0, 1.0])
        >>> symflow.Quotient(arch).medoid(torch.ones(26) + 0.1 * t[:, None])
        2
        """
        return int(self.pairwise(ws, workers=workers, progress=progress).sum(1).argmin())

    @property
    def dimension(self) -> int:
        """Dimension near a generic point: number of parameters less that of the group.

        With ``preserves="argmax"`` one less, the scale of the outputs.

        Examples
        --------
        >>> import symflow
        >>> symflow.Quotient(symflow.mlp([3, 4, 2])).dimension    # 26 parameters, 4 scales
        22
        """
        removed = self.section.state_manifold.dimension - self.manifold.dimension
        if self.section.shifts is not None:
            removed += self.section.shifts.dimension
        return self.arch.num_parameters - self.arch.symmetry.dimension - removed

    @property
    def log_orbit_size(self) -> float:
        """Natural logarithm of how many points of the section are one generic network.

        That is the number of elements of the finite group left there, n! for the permutations of n
        units and 2^n for their signs. Scales, which the section takes away, do not count; of a
        group that is not finite (rotations) the connected components do.

        Examples
        --------
        >>> import math, symflow
        >>> round(math.exp(symflow.Quotient(symflow.mlp([3, 4, 2])).log_orbit_size))    # 4!
        24
        """
        return self.symmetry.log_components

    def _between_points(self, x0: Tensor, x1: Tensor) -> Tensor:
        return self.manifold.dist(x0, self.align_points(x0, x1).weights)

    def _require_vector(self, v: Tensor, at: tuple[str, Tensor]) -> None:
        if v.ndim == 0 or v.shape[-1] != self.arch.dimension:
            raise ShapeError(
                f"v must end with D = {self.arch.dimension} coordinates, got {tuple(v.shape)}"
            )
        require_broadcast(at, ("v", v))

    def _batch(self, ws: Weights) -> Tensor:
        points = self.arch.as_weights(ws, name="ws")
        if points.ndim != 2 or len(points) == 0:
            raise ShapeError(
                f"ws must be a batch (N, D) of one network or more, got shape {tuple(points.shape)}"
            )
        return points

    def _ends(self, w0: Weights, w1: Weights) -> tuple[Tensor, Tensor]:
        a, b = self.arch.as_weights(w0, name="w0"), self.arch.as_weights(w1, name="w1")
        if (a.dtype, a.device) != (b.dtype, b.device):
            raise LeafError(
                f"w0 is {a.dtype} on {a.device}, w1 is {b.dtype} on {b.device}: convert one of them"
            )
        require_broadcast(("w0", a), ("w1", b))
        return self.section.project(a), self.section.project(b)

    def align_points(
        self,
        x0: Float[Tensor, "*#batch D"],
        x1: Float[Tensor, "*#batch D"],
        *,
        bounds: bool = False,
    ) -> Alignment:
        """Align points that are on the section already, as flows do at every step; no checks."""
        return align_points(self.symmetry, self.manifold, self.aligner, x0, x1, bounds=bounds)
