"""What can be asked of a flow: samples, paths, densities."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.flows.dynamics import Dynamics
from symflow.flows.guidance import Guidance
from symflow.flows.likelihood import log_prob
from symflow.flows.require import number, whole
from symflow.flows.sampling import (
    Motion,
    Optimised,
    optimise_start,
    prepared,
    require_trained,
    starts_of,
)


class Sampler(Dynamics, ABC):
    """A flow that draws networks and says how likely they are, once it is trained."""

    @abstractmethod
    def fit(self, zoo: Any) -> "Sampler":
        """Train it."""

    def sample(
        self,
        n: int,
        *,
        steps: int = 64,
        solver: str = "euler",
        noise: float = 0.0,
        bridge: float = 0.0,
        guidance: Guidance | None = None,
        condition: Tensor | Sequence[Any] | None = None,
        guidance_scale: float = 1.0,
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
            ``euler`` or ``heun`` (geodesic steps), ``midpoint``, ``rk4``, ``dopri5``, ``tsit5``.
        noise
            Standard deviation of the tangent noise added after each step but the last.
        bridge
            How much of the path's own noise is added after each step. 1 draws the process that the
            flow was trained on, Brownian bridges to the predicted ends (bridge matching: Shi et
            al., 2023), whose states have the law of the training paths at every time. 0 follows
            the drift of that process without its noise: better networks, but too much alike, the
            more so the more noise the path has.
        guidance
            Bends samples towards low values of a loss.
        condition
            What the networks are asked to be (n, k), or (k,) for all, if the flow was fitted with
            conditions; none is the flow of all networks.
        guidance_scale
            Classifier-free guidance: how many times what the condition changes in the velocity is
            counted; 1 is the condition itself, more exaggerates it.
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
            n,
            steps=steps,
            solver=solver,
            noise=noise,
            bridge=bridge,
            guidance=guidance,
            condition=condition,
            guidance_scale=guidance_scale,
            seed=seed,
            start=start,
        )
        return last

    def trajectory(
        self,
        n: int,
        *,
        steps: int = 64,
        solver: str = "euler",
        noise: float = 0.0,
        bridge: float = 0.0,
        guidance: Guidance | None = None,
        condition: Tensor | Sequence[Any] | None = None,
        guidance_scale: float = 1.0,
        seed: int = 0,
        start: Tensor | Sequence[Any] | None = None,
    ) -> Iterator[Float[Tensor, "n D"]]:
        """Yield the weights at the start and after each step; see :meth:`sample`."""
        require_trained(self)
        n, steps = whole("n", n, 1), whole("steps", steps, 1)
        generator = torch.Generator().manual_seed(whole("seed", seed))
        values, scale = prepared(self, condition, n, guidance_scale)
        motion = Motion(
            self,
            condition=values,
            scale=scale,
            guidance=guidance,
            noise=number("noise", noise),
            bridge=number("bridge", bridge),
            generator=generator,
        )
        x = starts_of(self, n, start, generator)
        yield self.decode(x)
        with torch.no_grad():
            for state in motion.states(x, steps, solver):
                yield self.decode(state)

    def optimise_start(
        self,
        loss: Callable[[Tensor], Tensor],
        n: int,
        *,
        iterations: int = 20,
        lr: float = 0.02,
        steps: int = 8,
        solver: str = "euler",
        condition: Tensor | Sequence[Any] | None = None,
        guidance_scale: float = 1.0,
        seed: int = 0,
        start: Tensor | Sequence[Any] | None = None,
    ) -> Optimised:
        """Draw networks of low loss by changing where they start (Ben-Hamu et al., 2024).

        The loss is differentiated through all steps of the flow, and Adam moves the starts on
        their manifold. Unlike guidance the result is a sample of the flow itself, from a start that
        the source may find unlikely: few iterations keep it near.

        Parameters
        ----------
        loss
            A differentiable function of weights (B, D) that returns one number for each network.
        n
            How many networks.
        iterations, lr
            Number of changes of the starts, and size of each coordinate's change in one.
        steps, solver, condition, guidance_scale, seed, start
            As for :meth:`sample`; fixed-step solvers only.

        Returns
        -------
        Optimised
            For each network the best sample found, its start, and the losses.

        Raises
        ------
        ShapeError
            If an argument is out of range, or the loss is not one number for each network.
        StateError
            If the flow is not trained, or the gradient is not finite.

        Notes
        -----
        Each iteration costs three evaluations of the field a step: memory holds the states of all
        steps but the inside of only one.

        Examples
        --------
        >>> import symflow
        >>> zoo = torch.randn(8, 17, generator=torch.Generator().manual_seed(0))
        >>> parts = {"coupling": symflow.flows.Independent(), "width": 8, "depth": 1}
        >>> flow = symflow.flows.euclidean(symflow.mlp([2, 3, 2]), **parts).fit(zoo, steps=2)
        >>> found = flow.optimise_start(lambda w: (w**2).sum(-1), 2, iterations=3, steps=2)
        >>> bool((found.history[-1] < found.history[0]).all())
        True
        """
        require_trained(self)
        n = whole("n", n, 1)
        values, scale = prepared(self, condition, n, guidance_scale)
        x = starts_of(self, n, start, torch.Generator().manual_seed(whole("seed", seed)))
        motion = Motion(self, condition=values, scale=scale)
        return optimise_start(
            self, motion, x, loss, iterations=iterations, lr=lr, steps=steps, solver=solver
        )

    # ---------------------------------------------------------------- density

    def log_prob(
        self,
        w: Tensor | Sequence[Any],
        *,
        steps: int = 64,
        solver: str = "heun",
        divergence: str = "exact",
        probes: int = 8,
        until: float | None = None,
        condition: Tensor | Sequence[Any] | None = None,
        seed: int = 0,
    ) -> Float[Tensor, "*n"]:
        r"""Return the log-density of the flow at the states of networks.

        The states move with :math:`\dot x = v(x, t)` from the source, so that along the way
        :math:`\tfrac{d}{dt} \log p_t(x_t) = -\operatorname{div} v` (Chen et al., 2018); this is
        integrated from the state of each network back to time zero, where the density of the source
        is known.

        Parameters
        ----------
        w
            Weights (n, D) or (D,), or modules or state dicts.
        steps
            Pieces of the time interval.
        solver
            As for :meth:`sample`.
        divergence
            ``"exact"``: D evaluations of the field at each step; ``"hutchinson"``: an estimate of
            the divergence without bias, from ``probes`` evaluations.
        probes
            Number of random directions of the estimate, the same at all steps.
        until
            The time whose density is returned. For flows that predict the end, 1 - 1/steps by
            default: the law of the states before the last step of sampling, which jumps to the
            predicted end (at one the velocity is not defined). For velocities 1.
        condition
            As for :meth:`sample`: the density among networks of that condition.
        seed
            Of the probes.

        Returns
        -------
        Tensor
            Log-densities (n,) or (), by the volume of the manifold of states ``flow.space``: the
            surface of the spheres times that of Euclidean coordinates, temperature included. It
            belongs to the state ``flow.encode(w)``, not to the function; networks that a
            permutation turns into each other have the same one.

        Raises
        ------
        ShapeError
            If an argument is out of range or unknown.
        StateError
            If the flow is not trained, or the density of its source on the states is not known. It
            is for :class:`~symflow.flows.Gaussian` with ``flows.euclidean``, and with
            ``flows.geometric`` where no weight lies between two layers of scaled units.
        LeafError
            If a unit without incoming weights has no direction.

        Notes
        -----
        The formula is for smooth fields. On spheres the predicted end is projected, and jumps where
        it passes zero before that (rows of two or three weights do often): a path back that runs
        into such a place gets a density of no meaning, often far too high, and another one with
        other ``steps``. Compare two numbers of them.

        Examples
        --------
        >>> import symflow
        >>> arch = symflow.mlp([2, 3, 2])
        >>> zoo = torch.randn(8, 17, generator=torch.Generator().manual_seed(0))
        >>> parts = {"source": symflow.flows.Gaussian(1.0), "coupling": symflow.flows.Independent()}
        >>> flow = symflow.flows.euclidean(arch, width=8, depth=1, **parts).fit(zoo, steps=2)
        >>> flow.log_prob(zoo, steps=4).shape
        torch.Size([8])
        """
        require_trained(self)
        flat = self.arch.as_weights(w).detach()
        flat = flat.to(self.device, next(self.average.parameters()).dtype)
        x = self.encode(flat).reshape(-1, self.inner.dimension + self.extra)
        motion = Motion(self, condition=prepared(self, condition, len(x), 1.0)[0])
        found = log_prob(
            self,
            x,
            motion.velocity,
            steps=steps,
            solver=solver,
            divergence=divergence,
            probes=probes,
            until=until,
            seed=seed,
        )
        return found.reshape(flat.shape[:-1])
