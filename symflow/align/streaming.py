"""Aligning files: leaves are read when they are needed, and what is aligned is written at once."""

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from symflow.align.base import Aligner, Status
from symflow.align.weight_matching import WeightMatching
from symflow.arch import Architecture, Element, Leaf, Symmetry
from symflow.arch.layout import assemble
from symflow.errors import LeafError
from symflow.files import TensorFile, replacing

StrPath = str | os.PathLike[str]


@final
@dataclass(frozen=True, eq=False)
class FilesAligned:
    """How the network in one file was brought close to that in another.

    Attributes
    ----------
    element
        One element for each axis of ``arch.symmetry.compact``; it acts on the second network.
    objective
        Inner product of the first network with the second one as it was written: of the leaves
        that an axis moves.
    before
        The same with the second network as it was read.
    status
        How the solver ended, over all independent parts of the network.
    seconds
        Wall-clock time.

    Examples
    --------
    >>> FilesAligned({}, 2.0, 1.0, Status.CONVERGED, 0.1).objective
    2.0
    """

    element: Element
    objective: float
    before: float
    status: Status
    seconds: float


def align_files(
    arch: Architecture,
    reference: StrPath,
    other: StrPath,
    out: StrPath,
    aligner: Aligner | None = None,
) -> FilesAligned:
    """Align the network in one safetensors file to that in another, and write it to a third.

    Axes that share no leaf are independent of each other: a network is read, aligned and written in
    as many parts as there are groups of axes that hang together. So a transformer takes the memory
    of one of its layers, and a network with one residual stream about four times its weights.

    Parameters
    ----------
    arch
        What is in both files; from a module on the meta device it takes no memory for weights
        (``Architecture.from_module(module, *inputs, twin=small)``).
    reference, other
        Safetensors files; a key that is no leaf of the architecture is copied from the second.
    out
        What to write: the second network, moved, in the layout, dtypes and metadata of its file.
        It appears whole or not at all, and may be one of the files that are read.
    aligner
        ``WeightMatching()`` by default.

    Returns
    -------
    FilesAligned
        The element, the objective before and after, and how the search ended.

    Raises
    ------
    LeafError
        If a leaf is missing, misshapen or not finite in one of the files.
    FileFormatError
        If one of them is no safetensors file.

    Notes
    -----
    The function of the network stays the same: permutations, signs and rotations are applied. What
    is not compact (scales of ReLU units, the linear maps of attention heads) is *not* balanced
    before, as a section does; the weights are compared as they are stored.

    Examples
    --------
    >>> import symflow, tempfile, pathlib
    >>> arch, folder = symflow.mlp([2, 5, 1]), pathlib.Path(tempfile.mkdtemp())
    >>> for k, w in enumerate(torch.randn(2, arch.dimension)):
    ...     symflow.files.save_tensors(folder / f"{k}", arch.state_dict(w))
    >>> found = align_files(arch, folder / "0", folder / "1", folder / "aligned")
    >>> found.objective >= found.before
    True
    """
    began = time.perf_counter()
    solver = WeightMatching() if aligner is None else aligner
    symmetry = arch.symmetry.compact
    first, second = TensorFile(reference), TensorFile(other)
    _require_leaves(symmetry, first, second)
    aliases: dict[str, list[str]] = {}
    for alias, key in arch.aliases:
        aliases.setdefault(key, []).append(alias)
    element: Element = {}
    values, before = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    statuses: set[Status] = set()
    written: set[str] = set()
    with replacing(out) as file:
        file.write(second.head)

        def write(key: str, data: bytes | bytearray) -> None:
            file.seek(second.span(key)[0])
            file.write(data)
            written.add(key)

        for part in parts(symmetry):
            w0, w1 = (_flat(part, source) for source in (first, second))
            found = solver(part, w0, w1)
            element |= found.element
            statuses.add(found.status)
            values += found.objective
            counted = sum(leaf.size for leaf in part.leaves if leaf.learnable)
            before += torch.dot(w0[:counted], w1[:counted])
            del w0, w1
            for key, leaves in _by_key(part.leaves).items():
                pieces = [(x, found.weights[x.span].reshape(x.shape)) for x in leaves]
                data = _bytes(assemble(pieces).to(second.dtype(key)))
                for name in (key, *aliases.get(key, ())):
                    if name in second.entries:
                        write(name, data)
        for key in second.entries:
            if key not in written:
                write(key, second.raw(key))
    return FilesAligned(
        element={axis.name: element[axis.name] for axis in symmetry.axes},
        objective=float(values),
        before=float(before),
        status=Status.CONVERGED if statuses <= {Status.CONVERGED} else max(statuses, key=_rank),
        seconds=time.perf_counter() - began,
    )


def parts(symmetry: Symmetry) -> tuple[Symmetry, ...]:
    """Split a symmetry into what is independent: axes that share no parameter, with their leaves.

    Leaves on which nothing acts are in none of them, unless they are regions of a parameter of
    which another region moves.

    Examples
    --------
    >>> import symflow
    >>> [[a.name for a in part.axes] for part in parts(symflow.mlp([2, 3, 4, 1]).symmetry)]
    [['h1', 'h2']]
    """
    root = {axis.name: axis.name for axis in symmetry.axes}

    def find(name: str) -> str:
        while root[name] != name:
            name = root[name]
        return name

    def join(names: Iterable[str]) -> None:
        found = [find(name) for name in names]
        for name in found[1:]:
            root[find(name)] = find(found[0])

    for leaves in _by_key(symmetry.leaves).values():
        join(name for leaf in leaves for name in leaf.axes)
    for axis in symmetry.axes:
        join([axis.name, axis.over] if axis.over is not None else [])
    found: dict[str, list[Leaf]] = {}
    for leaves in _by_key(symmetry.leaves).values():
        names = [name for leaf in leaves for name in leaf.axes]
        if names:
            found.setdefault(find(names[0]), []).extend(leaves)
    return tuple(
        Symmetry(_packed(leaves), tuple(axis for axis in symmetry.axes if find(axis.name) == name))
        for name, leaves in found.items()
    )


def _packed(leaves: list[Leaf]) -> tuple[Leaf, ...]:
    """Put leaves one behind the other, the learnable ones first."""
    packed: list[Leaf] = []
    offset = 0
    for leaf in sorted(leaves, key=lambda leaf: not leaf.learnable):
        packed.append(replace(leaf, offset=offset))
        offset += leaf.size
    return tuple(packed)


def _by_key(leaves: Iterable[Leaf]) -> dict[str, list[Leaf]]:
    found: dict[str, list[Leaf]] = {}
    for leaf in leaves:
        found.setdefault(leaf.key, []).append(leaf)
    return found


def _flat(part: Symmetry, source: TensorFile) -> Tensor:
    """Read the leaves of a part into one vector, of at least single precision."""
    keys = _by_key(part.leaves)
    double = any(source.dtype(key) == torch.float64 for key in keys)
    w = torch.empty(sum(leaf.size for leaf in part.leaves))
    w = w.double() if double else w
    for key, leaves in keys.items():
        value = source.read(key)
        if not bool(value.isfinite().all()):
            raise LeafError(f"{source.path}: {key!r} holds NaN or infinite values")
        for leaf in leaves:
            w[leaf.span].view(leaf.shape).copy_(leaf.of(value))
    return w


def _bytes(x: Tensor) -> bytes:
    return x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _rank(status: Status) -> int:
    return list(Status).index(status)


def _require_leaves(symmetry: Symmetry, *sources: TensorFile) -> None:
    for source in sources:
        for key, leaves in _by_key(symmetry.leaves).items():
            if key not in source.entries:
                raise LeafError(
                    f"{source.path} lacks the leaf {key!r}; it has {sorted(source.entries)[:12]}"
                )
            size = sum(leaf.size for leaf in leaves)
            shape = source.entries[key]["shape"]
            stored = leaves[0].whole or leaves[0].stored or leaves[0].shape
            if torch.Size(shape).numel() != size or (
                len(leaves) == 1 and tuple(shape) != tuple(stored)
            ):
                raise LeafError(f"{source.path}: {key!r} has shape {shape}, not {list(stored)}")
