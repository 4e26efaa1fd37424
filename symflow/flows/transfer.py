"""A flow on networks of other widths: its field has no weight that belongs to one unit."""

import torch
from torch import Tensor

from symflow.arch import Architecture, InputCoordinates
from symflow.errors import ShapeError
from symflow.flows.flow import Flow
from symflow.nn.tokens import TokenNetwork

_DRAWS = 256  # source networks that tell how large each leaf is


def transfer(flow: Flow, arch: Architecture, *, seed: int = 0) -> Flow:
    """Return the flow on another architecture that differs in the sizes of symmetric axes alone.

    Units of one axis share all parameters of the field, so that there may be more or fewer of them.
    What depends on their number is how large weights are on the section (the last layer has one
    norm, however many units share it): the units in which the field sees each leaf are scaled by
    the ratio of that leaf's size in networks of the source.

    Parameters
    ----------
    flow
        A trained flow with the default field, ``nodes="symmetric"``.
    arch
        The same leaves, with other numbers of hidden units: ``symflow.mlp([784, 32, 10])`` for a
        flow on ``symflow.mlp([784, 10, 10])``.
    seed
        Of the source networks that are measured.

    Returns
    -------
    Flow
        A new flow; nothing is trained, and the one given stays as it is.

    Raises
    ------
    ShapeError
        If the field is another one, or leaves differ in more than the sizes of symmetric axes.

    Examples
    --------
    >>> import symflow
    >>> zoo = torch.randn(8, 17, generator=torch.Generator().manual_seed(0))
    >>> flow = symflow.flows.geometric(
    ...     symflow.mlp([2, 3, 2]), coupling=symflow.flows.Independent(), width=8, depth=1
    ... ).fit(zoo, steps=2)
    >>> transfer(flow, symflow.mlp([2, 6, 2])).sample(4, steps=2).shape
    torch.Size([4, 32])
    """
    field = flow.field
    if flow.options is None:
        raise ShapeError(
            f"transfer is for flows that made their field themselves, this one has a "
            f"{type(field).__name__} of yours: give the flow the field's options instead, as in "
            "flows.geometric(arch, width=64)"
        )
    if not isinstance(getattr(field, "network", None), TokenNetwork):
        raise ShapeError(
            "transfer is for flows with a RelationalTransformer of nodes='symmetric', got "
            f"{type(field).__name__}: other fields may have weights of single units"
        )
    _require_alike(flow.arch, arch)
    chart = flow.coordinates
    coordinates = None if chart is None else InputCoordinates.of_tensors(arch, **chart.tensors())
    found = Flow(arch, flow.recipe, coordinates=coordinates, **flow.options)
    old, new = (_sizes(one, seed) for one in (flow, found))
    ratios = {name: new[name] / old[name] if old[name] > 0 else 1.0 for name in old}
    for mine, theirs in ((found.field, flow.field), (found.average, flow.average)):
        state = dict(theirs.state_dict())
        state["shift"] = _spread(flow.inner, found.inner, state["shift"], ratios)
        state["scale"] = _spread(flow.inner, found.inner, state["scale"], ratios)
        mine.load_state_dict(state)
    found.floor = _spread(flow.arch, arch, flow.floor, {})
    found.unit = _spread(flow.inner, found.inner, flow.unit, ratios)
    found.history = list(flow.history)
    return found


def _require_alike(old: Architecture, new: Architecture) -> None:
    """Check that leaves differ in the sizes of axes alone that a symmetry permutes."""
    ours, theirs = (_shapes(arch) for arch in (old, new))
    differ = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if differ:
        name = differ[0]
        raise ShapeError(
            f"arch must have the leaves of the flow's, up to the sizes of symmetric axes; leaf "
            f"{name!r} is {theirs.get(name, 'missing')} where the flow has "
            f"{ours.get(name, 'none')} (named dimensions may differ in size)"
        )


def _shapes(arch: Architecture) -> dict[str, list[object]]:
    """Return sizes of fixed dimensions and names of symmetric axes, leaf by leaf."""
    moving = {axis.name for axis in arch.symmetry.compact.axes}
    return {
        leaf.name: [
            dim.axis if dim.axis in moving else size
            for dim, size in zip(leaf.dims, leaf.shape, strict=True)
        ]
        for leaf in arch.leaves
    }


def _sizes(flow: Flow, seed: int) -> dict[str, float]:
    """Return the root mean square of each leaf in states of the source."""
    generator = torch.Generator().manual_seed(seed)
    x = flow.draw(_DRAWS, generator, torch.float32)
    return {leaf.name: float(x[:, leaf.span].square().mean().sqrt()) for leaf in flow.inner.leaves}


def _spread(old: Architecture, new: Architecture, v: Tensor, ratios: dict[str, float]) -> Tensor:
    """Take one number for each leaf over to another architecture; the rest stays at the end."""
    parts = [
        v[old.leaf(leaf.name).span][:1].expand(leaf.size) * ratios.get(leaf.name, 1.0)
        for leaf in new.leaves
    ]
    return torch.cat([*parts, v[old.dimension :]])
