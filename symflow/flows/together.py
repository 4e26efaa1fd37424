"""One field for several architectures: their networks share batches and do not see each other."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from symflow.errors import ShapeError, StateError
from symflow.files import digest
from symflow.flows.condition import count_of
from symflow.flows.fit import Trainer
from symflow.flows.flow import Flow, WeightZoo
from symflow.flows.require import networks
from symflow.flows.settings import FitSettings
from symflow.nn import VectorField


def fit_together(
    flows: Sequence[Flow],
    zoos: Sequence[WeightZoo | Tensor | Sequence[Any]],
    *,
    inputs: Tensor | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
    validation: Sequence[WeightZoo | Tensor | Sequence[Any]] | None = None,
    **settings: Any,
) -> Sequence[Flow]:
    """Train flows on several architectures with one field: networks of other widths, say.

    Every step takes a batch of each architecture. Its networks are seen by the field one by one, as
    ever, and the loss is the mean over all. Each flow keeps its own section, path, and the units in
    which the field sees weights; the parameters of the fields become one and the same, so that
    training one of the flows again moves all.

    Parameters
    ----------
    flows
        Flows whose fields have the same parameters: the same options, on architectures that differ
        in the sizes of symmetric axes, as :func:`~symflow.flows.transfer` makes them. The field of
        the first is trained, the others' parameters are replaced by its own.
    zoos
        What each learns from, as ``zoo`` of :meth:`Flow.fit`.
    inputs, folder, progress
        As in :meth:`Flow.fit`; the checkpoint is the first flow's.
    validation
        Held-out networks of each.
    **settings
        Fields of :class:`~symflow.flows.FitSettings`; ``batch_size`` counts for each architecture.

    Returns
    -------
    sequence of Flow
        The flows, all trained; their histories are that of the mean loss.

    Raises
    ------
    ShapeError
        If there are not as many zoos as flows, fields have other parameters than the first, or as
        for :meth:`Flow.fit`.
    StateError
        If a flow takes conditions, or as for :meth:`Flow.fit`.
    FileFormatError
        If ``folder`` holds a checkpoint of other flows, settings or data.

    Examples
    --------
    >>> import symflow, torch
    >>> archs = [symflow.mlp([2, n, 2]) for n in (3, 6)]
    >>> generator = torch.Generator().manual_seed(0)
    >>> zoos = [torch.randn(8, arch.dimension, generator=generator) for arch in archs]
    >>> own = {"coupling": symflow.flows.Independent(), "width": 8, "depth": 1}
    >>> flows = [symflow.flows.geometric(arch, **own) for arch in archs]
    >>> narrow, wide = fit_together(flows, zoos, steps=2)
    >>> wide.sample(4, steps=2).shape
    torch.Size([4, 32])
    """
    held_out = [None] * len(flows) if validation is None else list(validation)
    if not flows or len(zoos) != len(flows) or len(held_out) != len(flows):
        raise ShapeError(
            f"zoos (and validation) must have one entry for each of {len(flows)} flows, at least "
            f"one, got {len(zoos)} (and {len(held_out)})"
        )
    first, *others = flows
    if any(count_of(flow.field) for flow in flows):
        raise StateError("flows with conditions are trained one by one: use flow.fit")
    for k, flow in enumerate(others, 1):
        same = next((j for j in range(k) if flows[j] is flow), None)
        if same is not None:
            raise ShapeError(f"flows[{k}] is flows[{same}]: each zoo needs a flow of its own")
        _require_same(flow.field, first.field, k)
    for flow in others:
        share(flow.field, first.field)
        share(flow.average, first.average)
    chosen = FitSettings.of(settings)
    lead, *companions = [
        Trainer(
            flow,
            chosen,
            *networks(flow.arch, zoo, f"zoos[{k}]"),
            inputs,
            None if held is None else networks(flow.arch, held, f"validation[{k}]"),
        )
        for k, (flow, zoo, held) in enumerate(zip(flows, zoos, held_out, strict=True))
    ]
    lead.companions = tuple(companions)
    for k, companion in enumerate(companions, 1):
        told = f"{companion.flow.arch.fingerprint} {sorted(companion.data.items())}"
        lead.data[f"together {k}"] = digest(*companion.flow.tensors().values()) + told
    lead.run(None if folder is None else Path(folder), progress)
    for flow in others:
        flow.history = [dict(record) for record in first.history]
    return flows


def share(field: VectorField, owner: VectorField) -> None:
    """Replace the parameters of a field by those of another one; buffers stay.

    Examples
    --------
    >>> import symflow
    >>> one, two = (symflow.nn.RelationalTransformer(symflow.mlp([2, n, 2])) for n in (3, 6))
    >>> share(two, one)
    >>> next(two.parameters()) is next(one.parameters())
    True
    """
    for name, parameter in owner.named_parameters():
        path, _, key = name.rpartition(".")
        setattr(field.get_submodule(path), key, parameter)


def _require_same(field: VectorField, owner: VectorField, k: int) -> None:
    ours, theirs = (
        {name: (tuple(p.shape), p.dtype, str(p.device)) for name, p in one.named_parameters()}
        for one in (field, owner)
    )
    differ = [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]
    if differ or type(field) is not type(owner):
        name = differ[0] if differ else type(field).__name__
        raise ShapeError(
            f"flows[{k}] must have a field with the parameters of flows[0]: {name!r} is "
            f"{ours.get(name, 'missing')}, there {theirs.get(name, 'missing')}. Architectures may "
            "differ in the sizes of symmetric axes alone, and fields need the same options"
        )
