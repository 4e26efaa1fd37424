"""Shortest paths between orbits."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.align import Alignment
from symflow.manifolds import WeightManifold
from symflow.sections import Section


@final
@dataclass(frozen=True, eq=False)
class Geodesic:
    """A path of constant speed from ``project(w0)`` into the orbit of ``w1``.

    Which path it is depends on the section: on the sphere section great circles; on flat space a
    straight line; on the balanced section the chord, whose inner points are not balanced (they can
    be moved to the balanced point of their orbit: ``path(t, rebalance=True)``), or with its
    intrinsic metric a path of balanced points. It is a shortest
    path of the section space divided by the compact group, as far as the alignment is optimal.

    Attributes
    ----------
    start
        project(w0), (*batch, D).
    direction
        Velocity at the start (*batch, D).
    alignment
        The alignment of w1 that gave the end.
    section
        The section on which the path runs.
    space
        The section space with another metric than its own, or None.

    Examples
    --------
    >>> import symflow
    >>> q = symflow.Quotient(symflow.mlp([3, 4, 2]))
    >>> w = torch.randn(2, 26, generator=torch.Generator().manual_seed(0))
    >>> path = q.geodesic(w[0], w[1])
    >>> path(torch.linspace(0, 1, 5)).shape
    torch.Size([5, 26])
    """

    start: Float[Tensor, "*#batch D"]
    direction: Float[Tensor, "*#batch D"]
    alignment: Alignment
    section: Section
    space: WeightManifold | None = None

    @property
    def manifold(self) -> WeightManifold:
        """The space in which the path runs."""
        return self.section.manifold if self.space is None else self.space

    @property
    def end(self) -> Float[Tensor, "*#batch D"]:
        """The end point: w1 on the section, moved next to the start."""
        return self.alignment.weights

    @property
    def length(self) -> Float[Tensor, "*#batch"]:
        """Length of the path; equal to the quotient distance."""
        return self.manifold.norm(self.start, self.direction)

    def __call__(
        self, t: float | int | Float[Tensor, "*times"], *, rebalance: bool = False
    ) -> Float[Tensor, "*out D"]:
        """Return the points at times ``t``, of shape (*times, *batch, D).

        Parameters
        ----------
        t
            One time or a tensor of times; 0 is the start, 1 the end.
        rebalance
            Project the points on the section (only the balanced section needs it).
        """
        points = self.manifold.geodesic(self.start, self.direction, self._times(t))
        return self.section.project(points) if rebalance else points

    def velocity(self, t: float | int | Float[Tensor, "*times"]) -> Float[Tensor, "*out D"]:
        """Return the velocities at times ``t``, of shape (*times, *batch, D)."""
        return self.manifold.geodesic_velocity(self.start, self.direction, self._times(t))

    def transport(self, v: Float[Tensor, "*#batch D"]) -> Float[Tensor, "*#batch D"]:
        """Carry a vector at the start in parallel to the end; its length stays.

        On the sphere section its tangent part turns along great circles. On flat space nothing
        turns, nor along the chord of the balanced section: what is carried there is a vector of
        the ambient space, as ``direction`` is one (``manifold.proju`` takes its tangent part).
        With the intrinsic metric the tangent part is carried.
        """
        return self.manifold.carry(self.start, self.direction, v)

    def _times(self, t: float | int | Tensor) -> Tensor:
        times = torch.as_tensor(t, dtype=self.start.dtype, device=self.start.device)
        batch = self.start.shape[:-1]
        return times.reshape((*times.shape, *(1,) * len(batch))).expand((*times.shape, *batch))
