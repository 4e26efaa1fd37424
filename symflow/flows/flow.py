"""A flow over weights: train it on a zoo of networks, draw new networks from it."""

import copy
import os
from collections.abc import Iterator, Sequence
from pathlib import Path as FilePath
from typing import Any, Protocol, final, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.arch import Architecture, InputCoordinates
from symflow.errors import FileFormatError, ShapeError, StateError
from symflow.files import digest, save_tensors
from symflow.flows.fit import Trainer
from symflow.flows.guidance import Guidance
from symflow.flows.path import velocity_to
from symflow.flows.recipe import Recipe
from symflow.flows.require import coordinates_for, field_for, networks, number, structure, whole
from symflow.flows.settings import FitSettings
from symflow.flows.solve import solve
from symflow.nn import RelationalTransformer, VectorField
from symflow.quotient import Quotient

States = Float[Tensor, "*#batch size"]


@runtime_checkable
class WeightZoo(Protocol):
    """Trained networks with their initial weights, as ``symflow.zoo.train`` returns them.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> isinstance(SimpleNamespace(initial=torch.zeros(2, 3), final=torch.ones(2, 3)), WeightZoo)
    True
    """

    @property
    def initial(self) -> Tensor:
        """Initial weights (R, D)."""
        ...

    @property
    def final(self) -> Tensor:
        """Trained weights (R, D)."""
        ...


@final
class Flow:
    """A generative model of weights: source, path, coupling and an equivariant network.

    Usually made by a preset (:func:`~symflow.flows.geometric` and its like).

    Parameters
    ----------
    arch
        The architecture whose weights it generates.
    recipe
        The parts.
    field
        The network; a :class:`~symflow.nn.RelationalTransformer` by default.
    coordinates
        Coordinates of the first linear map in which the flow works; weights go in and come out as
        they are. A field given must be for ``coordinates.arch``.
    seed
        Of the default field's initialisation.
    **field_options
        Options of the default field.

    Raises
    ------
    ShapeError
        If the field is for another architecture, or the recipe has an unknown section.
    EquivarianceError
        If the field respects less symmetry than the architecture has.

    Examples
    --------
    >>> import symflow
    >>> arch = symflow.mlp([2, 3, 2])
    >>> zoo = torch.randn(8, arch.dimension, generator=torch.Generator().manual_seed(0))
    >>> flow = symflow.flows.balanced(arch, coupling=symflow.flows.Independent(), width=8, depth=1)
    >>> flow.fit(zoo, steps=2).sample(3, steps=2).shape
    torch.Size([3, 17])
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
        self._options = dict(field_options, seed=seed) if field is None else None
        if field is None:
            field = RelationalTransformer(self.inner, extra=self.extra, seed=seed, **field_options)
        self.field = field_for(self.inner, field, self.extra)
        self.average = copy.deepcopy(field).requires_grad_(False)
        self.floor = torch.full((arch.dimension,), -torch.inf)
        self.history: list[dict[str, float]] = []

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
        return self.encode(source)

    def align(self, x0: States, x1: States) -> States:
        """Move each state x1 next to x0 along its orbit of the compact group (broadcasts)."""
        d = self.inner.dimension
        moved = self.quotient.align_points(x0[..., :d], x1[..., :d]).weights
        return torch.cat([moved, x1[..., d:].expand(*moved.shape[:-1], self.extra)], dim=-1)

    def predict(self, field: VectorField, x: States, t: Float[Tensor, " B"]) -> States:
        """Return the end that a field sees from the states ``x`` at times ``t``."""
        out = field(x, t)
        if self.recipe.predicts == "velocity":
            ahead = self.space.proju(x, out) * (1 - t)[:, None]
            return self.space.retr(x, ahead)
        end = x + self.recipe.path.reach(t)[:, None] * (out - x)
        return self.section.state_manifold.projx(end) if self.recipe.project_end else end

    def velocity(self, x: States, t: Float[Tensor, " B"]) -> States:
        """Return the velocity of the flow (of the averaged network) at states and times."""
        if self.recipe.predicts == "velocity":
            return self.space.proju(x, self.average(x, t))
        return velocity_to(self.space, x, self.predict(self.average, x, t), t)

    # ---------------------------------------------------------------- training

    def fit(
        self,
        zoo: "WeightZoo | Tensor | Sequence[Any]",
        *,
        inputs: Tensor | None = None,
        folder: str | os.PathLike[str] | None = None,
        progress: bool = False,
        validation: "WeightZoo | Tensor | Sequence[Any] | None" = None,
        **settings: Any,
    ) -> "Flow":
        """Train the flow by regression on the end (or velocity) of random paths.

        Parameters
        ----------
        zoo
            Trained networks: a zoo; or, for couplings that need no runs, plain weights (N, D) or a
            sequence of modules or state dicts.
        inputs
            Inputs of the networks (n, ...), needed for the behaviour loss only; no labels are used.
        folder
            Where checkpoints go. If there is one of the same flow, settings and data (the weights
            of ``zoo`` and ``validation``, and ``inputs``), training goes on from it, with the same
            results as without the interruption; a finished one is read. Others are refused.
        progress
            Show a progress bar.
        validation
            Held-out networks; their loss is recorded beside the training loss.
        **settings
            Fields of :class:`~symflow.flows.FitSettings`: steps, batch_size, lr, behaviour, ...

        Returns
        -------
        Flow
            Itself; ``history`` holds the losses.

        Raises
        ------
        ShapeError
            If a setting is unknown or out of range, there are no networks, or shapes do not fit.
        LeafError
            If weights are NaN or infinite: leave out diverged runs with ``zoo.finite()``.
        StateError
            If the coupling needs initial weights that the zoo lacks, the field has no parameters,
            or the training diverges.
        FileFormatError
            If ``folder`` holds a checkpoint of another flow, other settings or other data.
        """
        chosen = FitSettings.of(settings)
        starts, ends = networks(self.arch, zoo, "zoo")
        held_out = None if validation is None else networks(self.arch, validation, "validation")
        trainer = Trainer(self, chosen, starts, ends, inputs, held_out)
        trainer.run(None if folder is None else FilePath(folder), progress)
        return self

    # ---------------------------------------------------------------- sampling

    def sample(
        self,
        n: int,
        *,
        steps: int = 64,
        solver: str = "euler",
        noise: float = 0.0,
        guidance: Guidance | None = None,
        seed: int = 0,
        start: Tensor | Sequence[Any] | None = None,
    ) -> Float[Tensor, "n D"]:
        """Draw networks.

        Parameters
        ----------
        n
            How many.
        steps
            Pieces of the time interval; 1 is the one-step prediction.
        solver
            ``euler`` (geodesic steps), ``midpoint``, ``rk4``, ``dopri5`` or ``tsit5``.
        noise
            Standard deviation of the tangent noise added before each step.
        guidance
            Bends samples towards low values of a loss.
        seed
            Of the source and the noise.
        start
            Initial weights (n, D), or n modules or state dicts, instead of draws from the source.

        Returns
        -------
        Tensor
            Flat weights (n, D).

        Raises
        ------
        ShapeError
            If a number is out of range, ``start`` does not hold n networks, the solver is unknown
            or cannot take noise, or the loss of the guidance is not one number for each network.
        StateError
            If the flow is not trained.
        """
        *_, last = self.trajectory(
            n, steps=steps, solver=solver, noise=noise, guidance=guidance, seed=seed, start=start
        )
        return last

    def trajectory(
        self,
        n: int,
        *,
        steps: int = 64,
        solver: str = "euler",
        noise: float = 0.0,
        guidance: Guidance | None = None,
        seed: int = 0,
        start: Tensor | Sequence[Any] | None = None,
    ) -> Iterator[Float[Tensor, "n D"]]:
        """Yield the weights at the start and after each step; see :meth:`sample`."""
        if not self.history:
            raise StateError("the flow is not trained: call flow.fit(zoo) or load one first")
        n, steps = whole("n", n, 1), whole("steps", steps, 1)
        noise = number("noise", noise)
        generator = torch.Generator().manual_seed(whole("seed", seed))
        dtype = next(self.average.parameters()).dtype
        if start is None:
            x = self.draw(n, generator, dtype)
        else:
            w = self.arch.as_weights(start, name="start").detach()
            if w.shape != (n, self.arch.dimension):
                raise ShapeError(
                    f"start must hold n = {n} networks (n, D) = {(n, self.arch.dimension)}, got "
                    f"shape {tuple(w.shape)}"
                )
            x = self.encode(w.to(dtype))

        def velocity(t: Tensor, x: Tensor) -> Tensor:
            v = self.velocity(x, t.expand(len(x)))
            if guidance is None:
                return v
            return v + self.space.proju(x, guidance.push(x, self.decode))

        def finish(t: Tensor, x: Tensor) -> Tensor:
            if guidance is None:
                return self.predict(self.average, x, t.expand(len(x)))
            return self.space.retr(x, (1 - t) * velocity(t, x))

        def kick(x: Tensor) -> Tensor:
            normal = torch.randn(x.shape, generator=generator).to(x)
            return self.space.retr(x, self.space.proju(x, noise * normal))

        yield self.decode(x)
        with torch.no_grad():
            states = solve(
                self.space,
                velocity,
                finish,
                x,
                steps=steps,
                solver=solver,
                kick=kick if noise > 0 else None,
            )
            for k, state in enumerate(states):
                # Samples end on the section; a flow in ambient space gets there only now.
                done = k == steps - 1 or solver in ("dopri5", "tsit5")
                yield self.decode(self._settle(state) if done else state)

    def _settle(self, x: States) -> States:
        manifold = self.section.state_manifold
        return manifold.retr(x, torch.zeros_like(x))

    # ---------------------------------------------------------------- files

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that training changes."""
        return {
            **{f"field.{k}": v for k, v in self.field.state_dict().items()},
            **{f"average.{k}": v for k, v in self.average.state_dict().items()},
            "floor": self.floor,
            **{f"coordinates.{k}": v for k, v in self._chart().items()},
        }

    def _chart(self) -> dict[str, Tensor]:
        return {} if self.coordinates is None else self.coordinates.tensors()

    def describe(self) -> dict[str, Any]:
        """Return what identifies the flow: architecture, recipe, field."""
        return {
            "kind": "flow",
            "arch": self.arch.config,
            "fingerprint": self.arch.fingerprint,
            "recipe": self.recipe.to_json(),
            "field": type(self.field).__name__,
            "options": self._options,
            "structure": structure(self.field),
            "coordinates": digest(*self._chart().values()) if self._chart() else None,
        }

    def restore(self, tensors: dict[str, Tensor], history: list[dict[str, float]]) -> None:
        """Take over tensors as :meth:`tensors` gives them."""
        try:
            for name, module in (("field.", self.field), ("average.", self.average)):
                found = {k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)}
                module.load_state_dict(found)
            self.floor = tensors["floor"]
        except (RuntimeError, KeyError) as error:
            raise FileFormatError(f"the file holds another field: {error}") from error
        self.history = history

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the flow to one safetensors file, atomically."""
        save_tensors(path, self.tensors(), {**self.describe(), "history": self.history})
