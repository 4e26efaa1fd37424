"""What moves weights in a flow: its parts put together into a velocity."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.arch import Architecture, InputCoordinates
from symflow.flows.condition import Conditioned
from symflow.flows.path import velocity_to
from symflow.flows.recipe import Recipe
from symflow.flows.require import coordinates_for, device_of, field_for
from symflow.nn import RelationalTransformer, VectorField
from symflow.quotient import Quotient

States = Float[Tensor, "*#batch size"]
Field = Callable[[Tensor, Tensor], Tensor]
D = TypeVar("D", bound="Dynamics")


class Dynamics(ABC):
    """States of weights, where they start, and the velocity with which a field moves them.

    Parameters are those of :class:`~symflow.flows.Flow`, which trains the field.
    """

    def __init__(
        self,
        arch: Architecture,
        recipe: Recipe,
        field: VectorField | None = None,
        *,
        coordinates: InputCoordinates | None = None,
        seed: int = 0,
        **field_options: Any,
    ) -> None:
        self.arch = arch
        self.recipe = recipe
        self.coordinates = coordinates_for(arch, coordinates)
        self.inner = arch if coordinates is None else coordinates.arch
        self.section = recipe.build_section(self.inner)
        self.quotient = Quotient(self.inner, self.section)
        self.space = recipe.path.space(self.section)
        self.extra = self.section.state_manifold.dimension - self.inner.dimension
        self.options = dict(field_options, seed=seed) if field is None else None
        if field is None:
            field = RelationalTransformer(self.inner, extra=self.extra, seed=seed, **field_options)
        self.field = field_for(self.inner, field, self.extra)
        self.average = copy.deepcopy(field).requires_grad_(False)
        self.floor = torch.full((arch.dimension,), -torch.inf)
        # How far coordinates move from start to end, in which path noise is measured.
        self.unit = torch.ones(self.inner.dimension + self.extra)
        self.history: list[dict[str, float]] = []

    @property
    def device(self) -> torch.device:
        """Where the field is, and states are moved."""
        return next(self.average.parameters()).device

    def to(self: D, device: str | torch.device) -> D:
        """Move the field to a device: the flow is trained, and its samples are drawn, there.

        Random numbers are drawn in main memory everywhere, and are the same ones on every device.

        Returns
        -------
        Dynamics
            Itself.

        Raises
        ------
        ShapeError
            If this machine has no such device.

        Examples
        --------
        >>> import symflow
        >>> symflow.flows.balanced(symflow.mlp([2, 3, 2]), width=8, depth=1).to("cpu").device
        device(type='cpu')
        """
        there = device_of(device)
        self.field, self.average = self.field.to(there), self.average.to(there)
        self.floor, self.unit = self.floor.to(there), self.unit.to(there)
        return self

    # ---------------------------------------------------------------- states

    def encode(self, w: Float[Tensor, "*batch D"]) -> States:
        """Return the state of weights: the section's point and the removed log-scales."""
        c = w if self.coordinates is None else self.coordinates.encode(w)
        return torch.cat(self.section.split(c), dim=-1)

    def decode(self, x: States) -> Float[Tensor, "*batch D"]:
        """Return the weights of a state; statistics that were positive in the zoo stay so."""
        w = self.decode_inner(x)
        w = w if self.coordinates is None else self.coordinates.decode(w)
        return torch.maximum(w, self.floor.to(w)) if bool(self.floor.isfinite().any()) else w

    def decode_inner(self, x: States) -> Float[Tensor, "*batch R"]:
        """Return the weights of a state in the coordinates that the flow works in."""
        point, removed = x.split([self.inner.dimension, self.extra], dim=-1)
        return self.section.join(point, removed)

    def draw(self, n: int, generator: torch.Generator, dtype: torch.dtype) -> States:
        """Draw states from the source."""
        source = self.recipe.source.sample(self.arch, n, generator=generator, dtype=dtype)
        return self.encode(source.to(self.device))

    def align(self, x0: States, x1: States) -> States:
        """Move each state x1 next to x0 along its orbit of the compact group (broadcasts)."""
        d = self.inner.dimension
        moved = self.quotient.align_points(x0[..., :d], x1[..., :d]).weights
        return torch.cat([moved, x1[..., d:].expand(*moved.shape[:-1], self.extra)], dim=-1)

    def told(self, field: VectorField, condition: Tensor | None) -> Field:
        """Return a field with a condition (n, k) filled in, if there is one."""
        return field if condition is None else Conditioned(field, condition)

    def predict(self, field: Field, x: States, t: Float[Tensor, " B"]) -> States:
        """Return the end that a field sees from the states ``x`` at times ``t``."""
        out = field(x, t)
        if self.recipe.predicts == "velocity":
            ahead = self.space.proju(x, out) * (1 - t)[:, None]
            return self.space.retr(x, ahead)
        end = x + self.recipe.path.reach(t)[:, None] * (out - x)
        return self.section.state_manifold.projx(end) if self.recipe.project_end else end

    def velocity(
        self,
        x: States,
        t: Float[Tensor, " B"],
        condition: Tensor | None = None,
        scale: float = 1.0,
    ) -> States:
        """Return the velocity of the flow (of the averaged network) at states and times.

        With a condition (n, k), n a divisor of B, and another ``scale`` than one: the velocity
        without the condition plus ``scale`` times what the condition changes.
        """
        v = self.velocity_of(self.told(self.average, condition), x, t)
        if condition is None or scale == 1:
            return v
        without = self.velocity_of(self.average, x, t)
        return without + scale * (v - without)

    def velocity_of(self, field: Field, x: States, t: Float[Tensor, " B"]) -> States:
        """Return the velocity that a field stands for."""
        if self.recipe.predicts == "velocity":
            return self.space.proju(x, field(x, t))
        return velocity_to(self.space, x, self.predict(field, x, t), t)

    def settle(self, x: States) -> States:
        """Return the state of the section that a state in the space of the paths stands for."""
        manifold = self.section.state_manifold
        return manifold.retr(x, torch.zeros_like(x))

    @abstractmethod
    def sample(self, n: int) -> Float[Tensor, "n D"]:
        """Draw networks."""
