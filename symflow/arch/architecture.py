"""An architecture: a network without its weights, and what moves them without changing it."""

import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias, TypeVar, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap

from symflow.arch.checks import require_finite, require_names, require_ties
from symflow.arch.layout import Axis, Leaf, assemble
from symflow.arch.running import has_recurrence, mappable, tensors_of
from symflow.arch.symmetry import Symmetry
from symflow.arch.template import (
    canonical_names,
    frozen_keys,
    is_limit,
    leaves_of,
    template,
    ties_across_modules,
    within,
    without_eps,
)
from symflow.arch.trace import trace
from symflow.arch.twins import require_twin
from symflow.arch.verify import verify
from symflow.errors import LeafError, ShapeError
from symflow.groups import Group
from symflow.numerics import tolerance

StateDict: TypeAlias = Mapping[str, Tensor]
Weights: TypeAlias = "Tensor | StateDict | nn.Module | Sequence[Any]"
_M = TypeVar("_M", bound=nn.Module)


@final
@dataclass(frozen=True, eq=False)
class Architecture:
    """A network as a function of a flat weight vector, with its verified symmetry group.

    The last dimension of every weight tensor is the coordinate count D: parameters first, then
    floating point buffers; anything in front is batch. Make one with :meth:`from_module` or
    :func:`symflow.mlp`.

    Attributes
    ----------
    module
        The network; its own weights are never used.
    inputs
        The example inputs it was traced with.
    leaves
        Parameters, then buffers, in flat order.
    symmetry
        The product group over all axes; prints as a table.
    output
        Keys of the last linear map's leaves if the network ends with one, else empty.
    aliases
        Further keys of tied weights, with the key they are tied to.
    config
        A JSON-able description from which :func:`symflow.arch.from_config` builds it again, or
        None for a module of the user's.

    Examples
    --------
    >>> import symflow
    >>> arch = symflow.mlp([30, 16, 16, 2], activation="relu")
    >>> arch.dimension, [a.name for a in arch.axes]
    (802, ['h1', 'h2'])
    >>> arch.apply(torch.zeros(5, 802), torch.zeros(7, 30)).shape
    torch.Size([5, 7, 2])
    """

    module: nn.Module
    inputs: tuple[Any, ...]
    leaves: tuple[Leaf, ...]
    symmetry: Symmetry
    output: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    config: dict[str, Any] | None = None

    @staticmethod
    def from_module(
        module: nn.Module,
        *example_inputs: Any,
        frozen: Sequence[str] | None = None,
        twin: "Architecture | None" = None,
        preserves: str = "function",
    ) -> "Architecture":
        """Trace a module, find the symmetries of its weights, and try each of them.

        Parameters
        ----------
        module
            Any module that torch.fx or torch.export can trace and all of whose operations have a
            rule. It is copied.
        *example_inputs
            What ``forward`` takes; the first dimension is the batch.
        frozen
            Keys of leaves that must stay as they are: no axis on them moves. By default those
            that do not require gradients, where others do.
        twin
            A smaller network of the same class, traced before. Then nothing is tried on this one,
            which may be on the meta device: its claim is believed if it has the structure of the
            twin's.
        preserves
            ``"limit"``: units before a BatchNorm module are scaled, too, with its running
            statistics: exact as its eps goes to zero, and tried so. Nothing compensates these
            scales: the sphere section alone takes them away.

        Raises
        ------
        UnsupportedModuleError
            If tracing fails, an operation has no rule (:func:`symflow.arch.rule`), or the module
            has hooks or parametrisations, which tracing does not see.
        ShapeError
            If the module does not run on the example inputs.
        SymmetryError
            If a rule claims a symmetry that changes the output, or not that of the twin.

        Notes
        -----
        Costs two forward passes, and a dozen in float64 for the check.

        Examples
        --------
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> arch = Architecture.from_module(net, torch.zeros(1, 4))
        >>> arch.symmetry["h1"].group
        Permutation(size=8) @ Sign(size=8)
        """
        traced = template(module, example_inputs)
        names, aliases = canonical_names(traced)
        limit = is_limit(preserves)
        found = trace(traced, example_inputs, names, frozen_keys(module, frozen, names), limit)
        leaves = leaves_of(traced, found.leaves, dict(aliases))
        leaves = within(leaves, {a.name: a.over for a in found.axes})
        symmetry = Symmetry(leaves, found.axes, found.fixed)
        if twin is None:
            verify(without_eps(traced) if limit else traced, example_inputs, leaves, symmetry)
        else:
            require_twin(traced, symmetry, twin.module, twin.symmetry)
        return Architecture(traced, example_inputs, leaves, symmetry, found.output, aliases)

    # ---------------------------------------------------------------- sizes and names

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The axes on which a group acts, from input to output."""
        return self.symmetry.axes

    @cached_property
    def dimension(self) -> int:
        """Number D of coordinates of a weight vector, buffers included."""
        return sum(leaf.size for leaf in self.leaves)

    @cached_property
    def num_parameters(self) -> int:
        """Number P of learnable coordinates; they are the first ones."""
        return self.symmetry.num_parameters

    @cached_property
    def fingerprint(self) -> str:
        """A hash of leaves, axes and groups: files of one architecture do not load into another."""
        rows: list[Any] = [
            [x.name, x.shape, x.learnable, [[d.axis, d.degree, d.within] for d in x.dims]]
            for x in self.leaves
        ]
        rows += [[a.name, a.size, str(a.group)] for a in self.axes]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]

    def leaf(self, name: str) -> Leaf:
        """Return a leaf by its key.

        Raises
        ------
        LeafError
            If there is none of that name.
        """
        for leaf in self.leaves:
            if leaf.name == name:
                return leaf
        raise LeafError(f"no leaf {name!r}; the leaves are {[x.name for x in self.leaves]}")

    def __repr__(self) -> str:
        return (
            f"Architecture({type(self.module).__name__}: {len(self.leaves)} leaves, "
            f"D = {self.dimension}, axes {', '.join(f'{a.name}({a.size})' for a in self.axes)})"
        )

    def with_groups(self, groups: Mapping[str, Group[Any]]) -> "Architecture":
        """Replace the groups of some axes, and try the new claim on the network.

        Raises
        ------
        ShapeError
            If an axis is unknown or a group has another size.
        SymmetryError
            If the function changes under a new group.

        Examples
        --------
        >>> import symflow
        >>> arch = symflow.mlp([3, 4, 2]).with_groups({"h1": symflow.Permutation(4)})
        >>> arch.axes[0].group
        Permutation(size=4)
        """
        for name, group in groups.items():
            if self.symmetry[name].size != group.size:
                raise ShapeError(
                    f"axis {name} has {self.symmetry[name].size} units, {group} acts on "
                    f"{group.size}"
                )
        axes = tuple(
            replace(a, group=groups[a.name], reason="chosen by the user") if a.name in groups else a
            for a in self.axes
        )
        symmetry = replace(self.symmetry, axes=axes)
        verify(self.module, self.inputs, self.leaves, symmetry)
        config = None if self.config is None or groups else self.config
        return replace(self, symmetry=symmetry, config=config)

    # ---------------------------------------------------------------- weights in and out

    def as_weights(self, w: "Weights", *, name: str = "w") -> Float[Tensor, "*batch D"]:
        """Return flat weights from a flat tensor, a state dict, a module, or a sequence of these.

        Raises
        ------
        ShapeError
            If a flat tensor does not end with D coordinates.
        LeafError
            If a leaf is missing, unknown, misshapen, not finite, or dtypes or devices are mixed.

        Examples
        --------
        >>> import symflow
        >>> arch = symflow.mlp([3, 4, 2])
        >>> arch.as_weights([arch.module, arch.module]).shape
        torch.Size([2, 26])
        """
        if isinstance(w, Tensor):
            flat = w
            if w.ndim == 0 or w.shape[-1] != self.dimension:
                raise ShapeError(
                    f"{name} must be flat weights (*batch, D = {self.dimension}), got shape "
                    f"{tuple(w.shape)}"
                )
            tolerance(w.dtype)
        elif isinstance(w, nn.Module | Mapping):
            flat = self.flatten(w, name=name)
        else:
            flat = self._stack(w, name)
        require_finite(self.leaves, flat, name)
        return flat

    def _stack(self, w: Any, name: str) -> Tensor:
        if not isinstance(w, Sequence) or isinstance(w, str | bytes):
            instead = ", its .final say" if hasattr(w, "final") else ""
            raise ShapeError(
                f"{name} must be a flat tensor, a state dict, a module, or a sequence of these, "
                f"got {type(w).__name__}; give the weights in it{instead}"
            )
        parts = [self.as_weights(x, name=f"{name}[{k}]") for k, x in enumerate(w)]
        shapes = {tuple(part.shape) for part in parts}
        if len(shapes) != 1:
            raise ShapeError(
                f"{name} must hold one network or more, all of one shape, got {sorted(shapes)}"
            )
        return torch.stack(parts)

    def flatten(
        self, source: "StateDict | nn.Module", *, name: str = "state dict"
    ) -> Float[Tensor, "*batch D"]:
        """Concatenate the leaves of a state dict (or module) into one vector, on a copy.

        Leaves may carry common batch dimensions in front. Entries that are no leaves (integer
        counters, further keys of tied weights) are ignored.

        Raises
        ------
        LeafError
            If a leaf is missing, unknown, misshapen, or dtypes or devices are mixed.
        """
        state = source.state_dict() if isinstance(source, nn.Module) else source
        require_names(self.leaves, self.module, state, name)
        own = self.module.state_dict()
        keys = list(dict.fromkeys(leaf.key for leaf in self.leaves))
        first, shape = state[keys[0]], own[keys[0]].shape
        batch = first.shape[: first.ndim - len(shape)]
        for key in keys:
            x, shape = state[key], tuple(own[key].shape)
            if x.shape != (*batch, *shape):
                raise LeafError(
                    f"{name}: leaf {key!r} must have shape {(*batch, *shape)}, got {tuple(x.shape)}"
                )
            if (x.dtype, x.device) != (first.dtype, first.device):
                raise LeafError(
                    f"{name}: leaves of mixed dtype or device: {keys[0]!r} is "
                    f"{first.dtype} on {first.device}, {key!r} is {x.dtype} on {x.device}; "
                    "convert the network first, as in net.to(device, dtype)"
                )
        tolerance(first.dtype)
        require_ties(self.aliases, state, name)
        pieces = [
            leaf.of(state[leaf.key].detach()).reshape(*batch, leaf.size) for leaf in self.leaves
        ]
        return torch.cat(pieces, dim=-1)

    def unflatten(self, w: Float[Tensor, "*batch D"]) -> dict[str, Tensor]:
        """Return parameters (*batch, *shape) by key, as views where they are one leaf."""
        if w.shape[-1] != self.dimension:
            raise ShapeError(f"w must end with D = {self.dimension}, got {tuple(w.shape)}")
        # One split, not a slice for each leaf: its backward pass is one concatenation.
        pieces = w.split([leaf.size for leaf in self.leaves], dim=-1)
        found: dict[str, list[tuple[Leaf, Tensor]]] = {}
        for leaf, piece in zip(self.leaves, pieces, strict=True):
            view = piece.reshape((*w.shape[:-1], *leaf.shape))
            found.setdefault(leaf.key, []).append((leaf, view))
        return {key: assemble(parts) for key, parts in found.items()}

    def state_dict(self, w: Float[Tensor, "*batch D"]) -> dict[str, Tensor]:
        """Return a complete state dict: the leaves, tied keys, and the template's counters."""
        found = self.unflatten(w)
        found |= {alias: found[name] for alias, name in self.aliases if name in found}
        own = self.module.state_dict()
        return {key: found[key] if key in found else value for key, value in own.items()}

    def load_into(self, module: _M, w: Float[Tensor, " D"]) -> _M:
        """Copy weights into a module of this architecture and return it."""
        w = self.as_weights(w)
        if w.ndim != 1:
            raise ShapeError(f"one network wanted, w of shape (D,), got {tuple(w.shape)}")
        module.load_state_dict(self.state_dict(w))
        return module

    def apply(self, w: Float[Tensor, "*batch D"], *inputs: Tensor) -> Float[Tensor, "*out"]:
        """Run every network of a batch on the same inputs (evaluation mode).

        Parameters
        ----------
        w
            Flat weights (*batch, D).
        *inputs
            What the module's ``forward`` takes.

        Returns
        -------
        Tensor
            Outputs (*batch, *output.shape); differentiable in ``w`` and the inputs. Of a module
            that returns several tensors ``logits``, or else the first.
        """
        return self._call(w, inputs, None)

    def apply_paired(self, w: Float[Tensor, "*batch D"], *inputs: Tensor) -> Float[Tensor, "*out"]:
        """Run every network on its own inputs, which carry the batch dimensions of ``w`` in front.

        Examples
        --------
        >>> import symflow
        >>> arch = symflow.mlp([3, 4, 2])
        >>> arch.apply_paired(torch.zeros(5, 26), torch.zeros(5, 7, 3)).shape
        torch.Size([5, 7, 2])
        """
        batch = w.shape[:-1]
        for x in inputs:
            if x.shape[: len(batch)] != batch:
                raise ShapeError(
                    f"inputs must begin with the batch shape {tuple(batch)} of w, got "
                    f"{tuple(x.shape)}"
                )
        return self._call(w, tuple(x.reshape(-1, *x.shape[len(batch) :]) for x in inputs), 0)

    def to_graph(self, w: Float[Tensor, "*batch D"]) -> Any:
        """Return the weights as a PyTorch Geometric graph; see :func:`symflow.nn.graph.to_graph`.

        Units on which a symmetry acts are nodes, weights between them edges.
        """
        # Graphs live on a floor above this one: found by name when asked for, not imported.
        return importlib.import_module("symflow.nn.graph").to_graph(self, w)

    def _call(self, w: Tensor, inputs: tuple[Tensor, ...], in_dim: int | None) -> Tensor:
        batch = w.shape[:-1]
        state = self.unflatten(w.reshape(-1, w.shape[-1]))
        # Running statistics are not learned, and torch cannot differentiate by them.
        fixed = {leaf.key for leaf in self.leaves if not leaf.learnable}
        state = {key: x.detach() if key in fixed else x for key, x in state.items()}
        if self._loops:
            rows = [
                self._forward(
                    {key: value[k] for key, value in state.items()},
                    *(x if in_dim is None else x[k] for x in inputs),
                )
                for k in range(batch.numel())
            ]
            out = torch.stack(rows)
        else:
            dims = (0, *(in_dim for _ in inputs))
            with mappable():
                out = vmap(self._forward, in_dims=dims)(state, *inputs)
        return out.reshape((*batch, *out.shape[1:]))

    @cached_property
    def _loops(self) -> bool:
        """Whether networks run one after the other."""
        return has_recurrence(self.module)

    def _forward(self, state: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        ties = {alias: state[name] for alias, name in self._ties}
        output = functional_call(self.module, state | ties, inputs, tie_weights=False)
        return next(tensors_of(output))

    @cached_property
    def _ties(self) -> tuple[tuple[str, str], ...]:
        return ties_across_modules(self.module, self.aliases)
