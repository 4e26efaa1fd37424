"""Conditional paths from a start to an end, and how a state moves along them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.manifolds import Flat, WeightManifold
from symflow.sections import Section

States = Float[Tensor, "B size"]


class Path(ABC):
    """The curve from x0 to x1 in the space of states, with noise around it.

    Attributes
    ----------
    noise
        Standard deviation of the noise at all times.
    bridge
        Further noise of deviation 2 b sqrt(t (1 - t)), zero at both ends: off the path, the field
        learns to point back (in units of the root mean square of a coordinate's motion).
    """

    noise: float
    bridge: float

    @abstractmethod
    def space(self, section: Section) -> WeightManifold:
        """Return the manifold whose geodesics the paths are."""

    def reach(self, t: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """Return how far off the end still is at a time, relative to the whole path.

        An end prediction is x + reach(t) * (output - x): a network that may move x by as much at
        t = 1 as at 0 has a velocity of order 1 / (1 - t), whose integral diverges, and samples that
        drift the more the finer the steps are.
        """
        return ((1 - t) ** 2 + 4 * self.bridge**2 * t * (1 - t)).clamp_min(0).sqrt()


@final
@dataclass(frozen=True)
class Straight(Path):
    """Straight lines in the ambient space; the state reaches the section at the end.

    Examples
    --------
    >>> import symflow
    >>> section = symflow.Quotient(symflow.mlp([2, 3, 2]), section="sphere").section
    >>> Straight(bridge=0.1).space(section).name
    'Flat'
    """

    noise: float = 0.0
    bridge: float = 0.0

    def space(self, section: Section) -> WeightManifold:
        """Return flat space of the same dimension."""
        return Flat(section.state_manifold.dimension, section.arch.num_parameters)


@final
@dataclass(frozen=True)
class GeodesicPath(Path):
    """Shortest paths of the section space.

    On the sphere section every state is on it. The balanced section has the chordal metric, whose
    paths are straight lines: there the states between the ends are not balanced.

    Examples
    --------
    >>> import symflow
    >>> section = symflow.Quotient(symflow.mlp([2, 3, 2]), section="sphere").section
    >>> GeodesicPath().space(section).name
    'SphereProduct'
    """

    noise: float = 0.0
    bridge: float = 0.0

    def space(self, section: Section) -> WeightManifold:
        """Return the section space."""
        return section.state_manifold


def interpolate(
    space: WeightManifold,
    path: Path,
    x0: States,
    x1: States,
    t: Float[Tensor, " B"],
    unit: Float[Tensor, " size"],
    generator: torch.Generator,
) -> States:
    """Return noisy points of the paths at times ``t``; the noise is tangent.

    Parameters
    ----------
    space
        The manifold whose geodesics the paths are.
    path
        Its noise.
    x0, x1
        Starts and ends.
    t
        Times.
    unit
        Size of the bridge noise for each coordinate.
    generator
        Source of the noise.
    """
    point = space.geodesic(x0, space.logmap(x0, x1), t)
    if path.noise == 0 and path.bridge == 0:
        return point
    bridge = 2 * path.bridge * (t * (1 - t)).clamp_min(0).sqrt()[:, None] * unit
    normal = torch.randn(x0.shape, generator=generator, device=generator.device)
    kick = space.proju(point, normal.to(point) * (path.noise + bridge))
    return space.retr(point, kick)


def velocity_to(space: WeightManifold, x: States, end: States, t: Float[Tensor, " B"]) -> States:
    """Return the velocity log_x(end) / (1 - t) that reaches ``end`` at time one."""
    return space.logmap(x, end) / (1 - t)[:, None]
