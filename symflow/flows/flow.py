"""A flow over weights: train it on a zoo of networks, draw new networks from it."""

import os
from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Any, Protocol, final, runtime_checkable

from torch import Tensor

from symflow.errors import FileFormatError, StateError
from symflow.files import digest, save_tensors
from symflow.flows.condition import conditions_for, count_of
from symflow.flows.descent import Processes
from symflow.flows.distil import distil
from symflow.flows.fit import Trainer
from symflow.flows.require import networks, number, structure, whole
from symflow.flows.sampler import Sampler
from symflow.flows.settings import FitSettings


@runtime_checkable
class WeightZoo(Protocol):
    """Trained networks with their initial weights, as ``symflow.zoo.train`` returns them.

    Examples
    --------
    >>> import torch
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
class Flow(Sampler):
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
    >>> import symflow, torch
    >>> arch = symflow.mlp([2, 3, 2])
    >>> zoo = torch.randn(8, arch.dimension, generator=torch.Generator().manual_seed(0))
    >>> flow = symflow.flows.balanced(arch, coupling=symflow.flows.Independent(), width=8, depth=1)
    >>> flow.fit(zoo, steps=2).sample(3, steps=2).shape
    torch.Size([3, 17])
    """

    # ---------------------------------------------------------------- training

    def fit(
        self,
        zoo: "WeightZoo | Tensor | Sequence[Any]",
        *,
        inputs: Tensor | None = None,
        folder: str | os.PathLike[str] | None = None,
        progress: bool = False,
        validation: "WeightZoo | Tensor | Sequence[Any] | None" = None,
        conditions: Tensor | Sequence[Any] | None = None,
        condition_dropout: float = 0.1,
        fabric: Processes | None = None,
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
            Held-out networks; their loss, without conditions, is recorded beside the training one.
        conditions
            What each network is (R, k), such as its accuracy or the share of a class it saw: what
            :meth:`sample` may ask for. For flows made with ``conditions=k``.
        condition_dropout
            With which probability the flow is not told, so that it learns all networks as well
            (what classifier-free guidance goes away from).
        fabric
            A launched ``lightning_fabric.Fabric`` where several processes (``torchrun``) train the
            flow together. Each calls ``fit`` with the same arguments; all draw the same batch, take
            their share of it, and average their gradients: the result is that of one process, up to
            the order of sums. The first one writes checkpoints.
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
            conditions do not go with the field, or the training diverges.
        FileFormatError
            If ``folder`` holds a checkpoint of another flow, other settings or other data.
        """
        chosen = FitSettings.of(settings)
        starts, ends = networks(self.arch, zoo, "zoo")
        told = conditions_for(self.field, conditions, len(ends), "conditions")
        if told is None and count_of(self.field):
            raise StateError(
                f"the flow was made with conditions={count_of(self.field)}: pass conditions= with "
                "as many numbers for each network"
            )
        dropout = number("condition_dropout", condition_dropout, below=1.0)
        held_out = None if validation is None else networks(self.arch, validation, "validation")
        trainer = Trainer(self, chosen, starts, ends, inputs, held_out, told, dropout, fabric)
        trainer.run(None if folder is None else FilePath(folder), progress)
        return self

    def distil(
        self,
        steps: int = 2,
        *,
        teacher_steps: int = 64,
        iterations: int = 1000,
        starts: int = 1024,
        start: Tensor | Sequence[Any] | None = None,
        conditions: Tensor | Sequence[Any] | None = None,
        guidance_scale: float = 1.0,
        batch_size: int = 32,
        lr: float = 0.0005,
        ema: float = 0.99,
        seed: int = 0,
    ) -> "Flow":
        """Return a copy that samples in few steps what this flow samples in many.

        The copy's field is trained so that the states of its own ``steps`` Euler steps (the last
        one jumps to the predicted end) meet this flow's after ``teacher_steps``, from the same
        starts and at the same times (Luhman and Luhman, 2021, for one step). Sample it with
        ``student.sample(n, steps=steps)``: with other steps it is a flow of no meaning.

        Parameters
        ----------
        steps, teacher_steps
            Steps of the copy, and of this flow, a multiple.
        iterations, batch_size, lr, ema, seed
            As steps, batch_size, ... of :class:`~symflow.flows.FitSettings`.
        starts
            How many of this flow's paths it learns from, with starts from the source.
        start
            Starts to learn from instead: weights (M, D), modules or state dicts.
        conditions, guidance_scale
            What those paths are told (M, k), or (k,) for all, and how much it counts. The copy is
            asked for them with ``condition=`` alone: it has learned the guided paths.

        Returns
        -------
        Flow
            The copy; this flow stays as it is. Its ``history`` holds the losses.

        Raises
        ------
        ShapeError
            If an argument is out of range.
        StateError
            If this flow is not trained, or the training diverges.

        Examples
        --------
        >>> import symflow, torch
        >>> zoo = torch.randn(8, 17, generator=torch.Generator().manual_seed(0))
        >>> parts = {"coupling": symflow.flows.Independent(), "width": 8, "depth": 1}
        >>> flow = symflow.flows.euclidean(symflow.mlp([2, 3, 2]), **parts).fit(zoo, steps=2)
        >>> flow.distil(1, teacher_steps=4, iterations=2, starts=4).sample(3, steps=1).shape
        torch.Size([3, 17])
        """
        settings = FitSettings(
            steps=whole("iterations", iterations, 1),
            batch_size=batch_size,
            lr=lr,
            ema=ema,
            seed=seed,
        )
        return distil(
            self,
            steps=steps,
            teacher_steps=teacher_steps,
            starts=starts,
            start=start,
            conditions=conditions,
            guidance_scale=guidance_scale,
            settings=settings,
        )

    # ---------------------------------------------------------------- files

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that training changes."""
        return {
            **{f"field.{k}": v for k, v in self.field.state_dict().items()},
            **{f"average.{k}": v for k, v in self.average.state_dict().items()},
            "floor": self.floor,
            "unit": self.unit,
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
            "options": self.options,
            "structure": structure(self.field),
            "coordinates": digest(*self._chart().values()) if self._chart() else None,
        }

    def restore(self, tensors: dict[str, Tensor], history: list[dict[str, float]]) -> None:
        """Take over tensors as :meth:`tensors` gives them."""
        try:
            for name, module in (("field.", self.field), ("average.", self.average)):
                found = {k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)}
                module.load_state_dict(found)
            self.floor, self.unit = (tensors[k].to(self.device) for k in ("floor", "unit"))
        except (RuntimeError, KeyError) as error:
            raise FileFormatError(f"the file holds another field: {error}") from error
        self.history = history

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the flow to one safetensors file, atomically."""
        save_tensors(path, self.tensors(), {**self.describe(), "history": self.history})
