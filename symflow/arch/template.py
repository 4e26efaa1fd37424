"""A module before it is traced: what is refused, which keys are one parameter, its leaves."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from symflow.arch.layout import Dim, Factors, Leaf, cut
from symflow.errors import LeafError, ShapeError, SymmetryError, UnsupportedModuleError

_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)


def canonical_names(module: nn.Module) -> tuple[dict[str, str], tuple[tuple[str, str], ...]]:
    """Every key with the first key of the same tensor, and the list of the further keys."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for pairs in (
        module.named_parameters(remove_duplicate=False),
        module.named_buffers(remove_duplicate=False),
    ):
        for key, value in pairs:
            names[key] = first.setdefault(id(value), key)
    return names, tuple((k, v) for k, v in names.items() if k != v)


def frozen_keys(
    module: nn.Module, frozen: Sequence[str] | None, names: Mapping[str, str]
) -> frozenset[str]:
    """Return the canonical keys of the parameters that must stay as they are.

    Those given, else those that do not require gradients where others do.

    Raises
    ------
    LeafError
        If the module has no parameter or buffer of a name.
    """
    if frozen is None:
        wanted = {key: p.requires_grad for key, p in module.named_parameters()}
        frozen = (
            [key for key, learns in wanted.items() if not learns] if any(wanted.values()) else ()
        )
    unknown = sorted(set(frozen) - set(names))
    if unknown:
        raise LeafError(
            f"frozen: no leaves {unknown}; the module has {sorted(names)[:12]}. Give keys of its "
            "state dict"
        )
    return frozenset(names[key] for key in frozen)


def ties_across_modules(
    module: nn.Module, aliases: tuple[tuple[str, str], ...]
) -> tuple[tuple[str, str], ...]:
    """Return the aliases whose parameter belongs to another module than its canonical key.

    ``functional_call`` must be told of these alone: a module that has two names is set once for
    each, and keeps the weights of the last.
    """

    def owner(key: str) -> nn.Module:
        return module.get_submodule(key.rpartition(".")[0])

    return tuple((a, b) for a, b in aliases if owner(a) is not owner(b))


def template(module: Any, inputs: tuple[Any, ...]) -> nn.Module:
    """Copy a module for tracing, after looking at what tracing would stumble over."""
    if not isinstance(module, nn.Module):
        raise UnsupportedModuleError(
            f"module must be an nn.Module (an instance, not its class), got {module!r:.80}"
        )
    for path, part in module.named_modules():
        where = f"{path or 'the module'} ({type(part).__name__})"
        if any(map(is_lazy, (*part.parameters(False), *part.buffers(False)))):
            raise UnsupportedModuleError(f"{where} is lazy: run the module once before")
        hooks = (vars(part)["_forward_pre_hooks"], vars(part)["_forward_hooks"])
        if parametrize.is_parametrized(part) or any(hooks):
            raise UnsupportedModuleError(
                f"{where} has a parametrisation or hooks, which tracing does not see: remove them "
                "first (torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm)"
            )
    if any(value.is_complex() for value in module.state_dict().values()):
        raise UnsupportedModuleError("complex parameters have no rules; use their real parts")
    if not any(value.is_floating_point() for value in module.state_dict().values()):
        raise UnsupportedModuleError(f"{type(module).__name__} has no weights")
    template = copy.deepcopy(module).eval().requires_grad_(False)
    try:
        with torch.no_grad():
            template(*(x.clone() if isinstance(x, Tensor) else x for x in inputs))
    except Exception as error:
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else x for x in inputs]
        raise ShapeError(
            f"{type(module).__name__} does not run on the example inputs {shapes}: {error}. Give "
            "what its forward takes, in the module's dtype; the first dimension is the batch"
        ) from error
    return template


def is_limit(preserves: str) -> bool:
    """Whether symmetries count that are exact only as eps goes to zero.

    Raises
    ------
    ShapeError
        If it is neither ``"function"`` nor ``"limit"``.
    """
    if preserves not in ("function", "limit"):
        raise ShapeError(f"preserves must be 'function' or 'limit', got {preserves!r}")
    return preserves == "limit"


def without_eps(module: nn.Module) -> nn.Module:
    """Copy a module; its BatchNorms and InstanceNorms divide by the deviation alone, in float64."""
    found = copy.deepcopy(module)
    for part in found.modules():
        if isinstance(part, _NORMS):
            part.eps = torch.finfo(torch.float64).tiny  # PyTorch refuses zero in places
    return found


def leaves_of(
    module: nn.Module,
    found: Mapping[str, tuple[list[list[Factors]], ...]],
    aliases: dict[str, str],
) -> tuple[Leaf, ...]:
    """Return parameters, then floating point buffers, with their dimensions, in flat order.

    What was found is for each dimension one list of parts, or several if it is taken apart.
    """
    state = module.state_dict()
    parameters = dict(module.named_parameters())
    ordered = [k for k in state if k in parameters] + [k for k in state if k not in parameters]
    leaves: list[Leaf] = []
    offset = 0
    for key in ordered:
        value = state[key]
        if key in aliases or not value.is_floating_point():
            continue
        shape = tuple(value.shape)
        dims = found.get(key, ([[]],) * len(shape))
        if len(dims) != len(shape):
            raise SymmetryError(
                f"the rule for leaf {key!r} labels {len(dims)} dimensions, it has {len(shape)}"
            )
        parts = [
            part or [((size, Dim()),)]
            for dim, size in zip(dims, shape, strict=True)
            for part in dim
        ]
        grid = tuple(sum(math.prod(n for n, _ in one) for one in part) for part in parts)
        view = {} if grid == shape else {"grid": grid, "whole": shape}
        for leaf in cut(key, parts):
            leaves.append(replace(leaf, offset=offset, learnable=key in parameters, **view))
            offset += leaf.size
    return tuple(leaves)


def within(leaves: tuple[Leaf, ...], over: Mapping[str, str | None]) -> tuple[Leaf, ...]:
    """Say for each dimension over an axis of another one which dimension that is."""

    def placed(leaf: Leaf, k: int, dim: Dim) -> Dim:
        parent = over.get(dim.axis or "")
        if parent is None:
            return dim
        places = [j for j, other in enumerate(leaf.dims) if other.axis == parent]
        before = [j for j in places if j < k]
        return replace(dim, within=before[-1] if before else places[0])

    return tuple(
        replace(leaf, dims=tuple(placed(leaf, k, dim) for k, dim in enumerate(leaf.dims)))
        for leaf in leaves
    )
