"""What an optimiser remembers, moved along with the weights."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from symflow.arch import Architecture, Element, Leaf, Symmetry
from symflow.errors import LeafError, ShapeError
from symflow.groups import monomial

# By which power of the gradient each quantity of torch.optim is made: gradients are covectors.
# Adadelta's acc_delta is made of squared steps, which are vectors.
_POWERS = {
    "exp_avg": 1,
    "momentum_buffer": 1,
    "grad_avg": 1,
    "prev": 1,
    "exp_avg_sq": 2,
    "max_exp_avg_sq": 2,
    "square_avg": 2,
    "sum": 2,
    "acc_delta": -2,
}


def transport_state(arch: Architecture, g: Element, state: Mapping[str, Any]) -> dict[str, Any]:
    r"""Return the state an optimiser would have, had it seen the moved weights all along.

    Where weights move by A, gradients move by :math:`A^{-T}`: they are permuted and get the signs
    of their weights, and scales act with the opposite power. What is made of squared gradients gets
    the squares of these factors. After it, training goes on from g . w as it would have from w, for
    every symmetry under which the optimiser's step is the same: permutations and signs for Adam.
    (Adam's step is not the same at other scales; the state is right all the same.)

    Parameters
    ----------
    arch
        The architecture.
    g
        An element of its symmetry; axes that are left out stay.
    state
        One of: flat quantities by name, ``{"exp_avg": (*batch, D), ...}``, where P = number of
        parameters will do as well; dicts of tensors by parameter, ``{"exp_avg": {"0.weight": ...},
        ...}``; or what ``optimizer.state_dict()`` of a ``torch.optim`` optimiser returns, made with
        all parameters of the module in their order (or with named ones).

    Returns
    -------
    dict
        The same, with new tensors; counters and settings are those of ``state``.

    Raises
    ------
    ShapeError
        If a quantity is not known, or does not have the shape of what it belongs to.
    LeafError
        If it belongs to a parameter that the architecture does not have.

    Notes
    -----
    Known are the quantities of Adam, AdamW, SGD, RMSprop, Adagrad and Adadelta. Squares of
    coordinates are moved only by groups that permute and scale.

    Examples
    --------
    >>> import symflow, torch
    >>> arch = symflow.mlp([1, 1, 1], "tanh")    # in, bias, out, output bias
    >>> flip = {"h1": (torch.tensor([0]), torch.tensor([-1.0]))}
    >>> transport_state(arch, flip, {"exp_avg": torch.ones(4)})["exp_avg"]
    tensor([-1., -1., -1.,  1.])
    """
    if "param_groups" in state:
        return _optimizer(arch, g, state)
    moved: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Mapping):
            moved[name] = _by_parameter(arch, g, name, dict(value))
        elif isinstance(value, Tensor) and value.ndim > 0:
            moved[name] = _flat(arch, g, name, value)
        else:
            moved[name] = value  # a number of steps
    return moved


def _flat(arch: Architecture, g: Element, name: str, x: Tensor) -> Tensor:
    counted = (arch.dimension, arch.num_parameters)
    if x.shape[-1] not in counted:
        raise ShapeError(
            f"{name} must be flat (*batch, D = {counted[0]}), or end with the P = {counted[1]} "
            f"parameters, got {tuple(x.shape)}"
        )
    whole = x.shape[-1] == arch.dimension
    leaves = [leaf for leaf in arch.leaves if whole or leaf.learnable]
    return _dual(arch, g, name, leaves).act(g, x)


def _dual(arch: Architecture, g: Element, name: str, leaves: list[Leaf]) -> Symmetry:
    """Return the symmetry that acts on powers of covectors instead of vectors."""
    if name not in _POWERS:
        raise ShapeError(
            f"how {name!r} moves is not known: the known quantities are {', '.join(_POWERS)}. "
            "Leave it out, and let the optimiser begin with it again"
        )
    power = -_POWERS[name]
    for axis in arch.axes:
        linear = axis.name in g and monomial(axis.group, g[axis.name]) is None
        if linear and abs(power) != 1:
            raise ShapeError(
                f"{name} holds squares of coordinates, which {axis.group} of axis {axis.name} "
                "mixes: leave it out, and let the optimiser begin with it again"
            )
    dual = tuple(
        replace(leaf, dims=tuple(replace(d, degree=power * d.degree) for d in leaf.dims))
        for leaf in leaves
    )
    return replace(arch.symmetry, leaves=dual)


def _by_parameter(
    arch: Architecture, g: Element, name: str, parts: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Move what belongs to some of the parameters; the others count as zero."""
    own = dict(arch.module.named_parameters())
    for key, part in parts.items():
        if key not in own:
            raise LeafError(
                f"{name}: {key!r} is no parameter of the architecture; it has {list(own)[:12]}"
            )
        if part.shape[part.ndim - own[key].ndim :] != own[key].shape:
            raise ShapeError(
                f"{name}: {key!r} must have shape {tuple(own[key].shape)}, got {tuple(part.shape)}"
            )
    if not parts:
        return {}
    key, one = next(iter(parts.items()))
    batch = one.shape[: one.ndim - own[key].ndim]
    whole = {
        key: parts[key] if key in parts else one.new_zeros(*batch, *value.shape)
        for key, value in arch.module.state_dict().items()
        if value.is_floating_point() and key in {leaf.key for leaf in arch.leaves}
    }
    moved = arch.unflatten(_flat(arch, g, name, arch.flatten(whole, name=name)))
    return {key: moved[key].clone() for key in parts}


def _optimizer(arch: Architecture, g: Element, state: Mapping[str, Any]) -> dict[str, Any]:
    keys = _keys(arch, state["param_groups"])
    rows: dict[Any, dict[str, Any]] = {k: dict(v) for k, v in state["state"].items()}
    shapes = {key: value.shape for key, value in arch.module.named_parameters()}
    found: dict[str, dict[str, Tensor]] = {}
    for k, row in rows.items():
        for name, value in row.items():
            # Counters are scalars, in tensors; so may parameters be, but not with these names.
            if isinstance(value, Tensor) and (value.ndim > 0 or name in _POWERS):
                if value.shape != shapes[keys[k]]:
                    raise ShapeError(
                        f"{name} of parameter {k}, {keys[k]!r}, must have shape "
                        f"{tuple(shapes[keys[k]])}, got {tuple(value.shape)}: the optimiser must "
                        "be made with all parameters of the module in their order"
                    )
                found.setdefault(name, {})[keys[k]] = value
    moved = {name: _by_parameter(arch, g, name, parts) for name, parts in found.items()}
    for k, row in rows.items():
        rows[k] = {
            name: moved[name][keys[k]] if keys[k] in moved.get(name, {}) else value
            for name, value in row.items()
        }
    groups = [dict(group) for group in state["param_groups"]]
    return {**state, "state": rows, "param_groups": groups}


def _keys(arch: Architecture, groups: list[dict[str, Any]]) -> dict[Any, str]:
    """Return the name of the parameter that each index of an optimiser stands for."""
    own = [key for key, _ in arch.module.named_parameters()]
    indices = [k for group in groups for k in group["params"]]
    names = [name for group in groups for name in group.get("param_names", ())]
    if not names:
        names = [own[k] for k in sorted(indices)] if len(indices) == len(own) else []
        indices = sorted(indices)
    if len(names) != len(indices) or set(names) - set(own):
        raise LeafError(
            f"the optimiser has {len(indices)} parameters, the architecture {len(own)}, "
            f"{own[:12]}: make it with all parameters of the module in their order, or with named "
            "ones (module.named_parameters())"
        )
    return dict(zip(indices, names, strict=True))
