"""Reading a flow from its file."""

import os

from symflow.arch import Architecture, InputCoordinates, from_config
from symflow.errors import FileFormatError
from symflow.files import load_tensors
from symflow.flows.flow import Flow
from symflow.flows.recipe import Recipe
from symflow.flows.require import structure
from symflow.nn import VectorField


def load(
    path: str | os.PathLike[str],
    arch: Architecture | None = None,
    field: VectorField | None = None,
) -> Flow:
    """Read a flow that :meth:`Flow.save` wrote.

    Parameters
    ----------
    path
        The file.
    arch
        Its architecture; needed unless it was made by :func:`symflow.mlp`.
    field
        A network like the one it was trained with; needed if that was the user's own.

    Raises
    ------
    FileFormatError
        If the file is truncated, foreign, or belongs to another architecture or field.

    Examples
    --------
    >>> import symflow, tempfile
    >>> flow = symflow.flows.balanced(symflow.mlp([2, 3, 2]), width=8, depth=1)
    >>> file = tempfile.mkdtemp() + "/flow.safetensors"
    >>> flow.save(file)
    >>> load(file).recipe == flow.recipe
    True
    """
    tensors, meta = load_tensors(path)
    if meta.get("kind") != "flow":
        raise FileFormatError(f"{path} holds no flow (kind {meta.get('kind')!r})")
    if arch is None:
        if meta["arch"] is None:
            raise FileFormatError(f"{path}: the flow was made for a module of yours; pass arch=")
        arch = from_config(meta["arch"])
    if arch.fingerprint != meta["fingerprint"]:
        raise FileFormatError(
            f"{path} belongs to an architecture with fingerprint {meta['fingerprint']}, the one "
            f"given has {arch.fingerprint}"
        )
    if field is None and meta["options"] is None:
        raise FileFormatError(f"{path}: the flow has a {meta['field']} of yours; pass field=")
    recipe = Recipe.from_json(meta["recipe"])
    options = (meta["options"] or {}) if field is None else {}
    found = {k.partition(".")[::2]: v for k, v in tensors.items()}
    chart = {name: v for (part, name), v in found.items() if part == "coordinates"}
    try:
        coordinates = InputCoordinates.of_tensors(arch, **chart) if chart else None
    except TypeError as error:
        raise FileFormatError(
            f"{path}: the coordinates of the inputs are not whole, it has {sorted(chart)}"
        ) from error
    flow = Flow(arch, recipe, field, coordinates=coordinates, **options)
    if field is not None and meta.get("structure", structure(field)) != structure(field):
        raise FileFormatError(
            f"{path} holds the weights of another {meta['field']} than the one given: pass a field "
            "with the options (such as heads) that it was trained with"
        )
    flow.restore(tensors, meta["history"])
    return flow
