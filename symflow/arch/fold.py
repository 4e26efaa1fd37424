"""Folding the gains of RMSNorm layers into the linear maps that follow: then rotations act.

With a gain for each unit only permutations (signs, scales) of a residual stream are symmetries.
The gain can be multiplied into the maps behind the norm; without it, the whole orthogonal group
acts on the stream (Ashkboos et al., SliceGPT, 2024).
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, fx, nn

from symflow.arch.graphs import graphs_of
from symflow.errors import LeafError, UnsupportedModuleError


@final
@dataclass(frozen=True, eq=False)
class Folded:
    """A module whose RMSNorm layers have no gains, and what it takes to put them back.

    Attributes
    ----------
    module
        The module: the same function, its norms without weights.
    gains
        For each norm, by its path, the gain that was folded.
    readers
        For each norm the paths of the linear maps that read it.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4), nn.Linear(4, 2))
    >>> folded = fold_gains(net, torch.zeros(1, 3))
    >>> folded.readers
    {'1': ('2',)}
    """

    module: nn.Module
    gains: Mapping[str, Tensor]
    readers: Mapping[str, tuple[str, ...]]

    def unfold(self, module: nn.Module) -> nn.Module:
        """Put the gains back into a copy of a module like ``module``: the same function again.

        Exact also after the stream was rotated: what the gain multiplies, the maps divide by.

        Examples
        --------
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4), nn.Linear(4, 2))
        >>> folded = fold_gains(net, torch.zeros(1, 3))
        >>> sorted(folded.unfold(folded.module).state_dict()) == sorted(net.state_dict())
        True
        """
        made = copy.deepcopy(module)
        for path, gain in self.gains.items():
            norm: Any = made.get_submodule(path)
            if not isinstance(norm, nn.RMSNorm) or norm.elementwise_affine:
                raise LeafError(f"{path!r} is no RMSNorm without gain: give what fold_gains made")
            for reader in self.readers[path]:
                _multiply(made, reader, 1 / gain)
            made.set_submodule(path, _norm(norm, gain))
        return made


def fold_gains(module: nn.Module, *example_inputs: Any) -> Folded:
    """Multiply the gain of every RMSNorm into the linear maps that read it.

    Parameters
    ----------
    module
        A network with ``nn.RMSNorm`` layers; it is copied.
    *example_inputs
        What its ``forward`` takes.

    Raises
    ------
    UnsupportedModuleError
        If something other than an ``nn.Linear`` reads a norm, or a reader has another input too.
    LeafError
        If a gain is zero somewhere: that could not be undone.

    Examples
    --------
    >>> import symflow
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4), nn.Linear(4, 4))
    >>> symflow.Architecture.from_module(net, torch.zeros(1, 3)).axes[0].group
    Permutation(size=4)
    >>> net = fold_gains(net, torch.zeros(1, 3)).module
    >>> symflow.Architecture.from_module(net, torch.zeros(1, 3)).axes[0].group
    Orthogonal(size=4)
    """
    made = copy.deepcopy(module)
    graph = next(graphs_of(made.eval(), example_inputs)).graph
    gains: dict[str, Tensor] = {}
    readers: dict[str, tuple[str, ...]] = {}
    for node in graph.nodes:
        path = str(node.target)
        if node.op != "call_module" or not isinstance(made.get_submodule(path), nn.RMSNorm):
            continue
        norm: Any = made.get_submodule(path)
        if norm.weight is None:
            continue
        if path in gains:
            raise UnsupportedModuleError(f"{path!r} is used twice: its gain cannot be folded")
        if bool((norm.weight == 0).any()):
            raise LeafError(f"the gain of {path!r} is zero somewhere: folding could not be undone")
        gains[path] = norm.weight.detach().clone()
        readers[path] = tuple(_reader(made, user, path) for user in node.users)
    used = [reader for group in readers.values() for reader in group]
    twice = sorted({reader for reader in used if used.count(reader) > 1})
    if twice:
        raise UnsupportedModuleError(f"{twice} read several norms: their gains cannot be folded")
    for path, gain in gains.items():
        for reader in readers[path]:
            _multiply(made, reader, gain)
        norm = made.get_submodule(path)
        made.set_submodule(path, _norm(norm, None))
    return Folded(made.train(module.training), gains, readers)


def _reader(module: nn.Module, node: fx.Node, path: str) -> str:
    reader = str(node.target)
    if node.op != "call_module" or not isinstance(module.get_submodule(reader), nn.Linear):
        raise UnsupportedModuleError(
            f"{path!r} is read by {node.name!r}, which is no nn.Linear: its gain cannot be folded"
        )
    return reader


def _multiply(module: nn.Module, path: str, gain: Tensor) -> None:
    weight: Any = module.get_submodule(path).weight
    with torch.no_grad():
        weight.mul_(gain.to(weight))


def _norm(norm: Any, gain: Tensor | None) -> nn.RMSNorm:
    """Return an RMSNorm like another one, with this gain or without."""
    made = nn.RMSNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=gain is not None)
    if gain is not None:
        made.weight = nn.Parameter(gain.clone())
    return made
