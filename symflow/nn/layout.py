"""Which numbers of a weight vector belong to which node or edge of the graph a field works on."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.arch import Architecture, Leaf
from symflow.errors import UnsupportedModuleError
from symflow.groups import Trivial


@final
@dataclass(frozen=True)
class NodeBlock:
    """Nodes of one kind.

    Attributes
    ----------
    name
        The axis they are the units of, or ``input`` or ``output``.
    size
        Number of nodes.
    features
        Numbers at each of them.
    alike
        True if a symmetry permutes them, so that a field must not tell them apart.
    """

    name: str
    size: int
    features: int
    alike: bool


@final
@dataclass(frozen=True)
class EdgeBlock:
    """All edges between two kinds of nodes (possibly the same), with numbers at each edge.

    Attributes
    ----------
    source, target
        Indices of the node blocks.
    features
        Numbers at each edge.
    """

    source: int
    target: int
    features: int


@final
@dataclass(frozen=True, eq=False)
class Layout:
    """A weight vector as a graph: global numbers, numbers at nodes, numbers at edges.

    Attributes
    ----------
    nodes, edges
        The blocks.
    features
        Number of global numbers; the extra coordinates come last among them.
    order
        Where in the flat vector the graph's numbers stand: global ones, then nodes (n, F) block by
        block, then edges (n, m, F). Each coordinate occurs once.

    Examples
    --------
    >>> import symflow
    >>> layout = symmetric_layout(symflow.mlp([30, 16, 16, 2]))
    >>> [(b.name, b.size, b.features) for b in layout.nodes], layout.features
    ([('h1', 16, 31), ('h2', 16, 3)], 2)
    >>> [(e.source, e.target, e.features) for e in layout.edges]
    [(0, 1, 1)]
    """

    nodes: tuple[NodeBlock, ...]
    edges: tuple[EdgeBlock, ...]
    features: int
    order: Tensor

    @property
    def sizes(self) -> list[int]:
        """Number of coordinates of each part, in the order of ``order``."""
        return [
            self.features,
            *(b.size * b.features for b in self.nodes),
            *(self.pairs(e) * e.features for e in self.edges),
        ]

    def pairs(self, edge: EdgeBlock) -> int:
        """Return the number of edges of a block."""
        return self.nodes[edge.source].size * self.nodes[edge.target].size

    @cached_property
    def inverse(self) -> Tensor:
        """Where in the graph's order each coordinate of the flat vector stands."""
        return torch.argsort(self.order)

    def cut(self, ordered: Float[Tensor, "*batch size"]) -> "Parts":
        """Cut numbers in the graph's order, ``x[..., order]``, into views."""
        batch = ordered.shape[:-1]
        pieces = ordered.split(self.sizes, dim=-1)
        k = 1 + len(self.nodes)
        nodes = tuple(
            p.reshape(*batch, b.size, b.features)
            for p, b in zip(pieces[1:k], self.nodes, strict=True)
        )
        edges = tuple(
            p.reshape(*batch, self.pairs(e), e.features)
            for p, e in zip(pieces[k:], self.edges, strict=True)
        )
        return Parts(pieces[0], nodes, edges)


@final
@dataclass(frozen=True, eq=False)
class Parts:
    """The numbers of a graph.

    Attributes
    ----------
    whole
        Global numbers (*batch, G).
    nodes
        For each node block (*batch, n, F).
    edges
        For each edge block (*batch, n * m, F), the target running fastest.
    """

    whole: Tensor
    nodes: tuple[Tensor, ...]
    edges: tuple[Tensor, ...]

    def join(self) -> Float[Tensor, "*batch size"]:
        """Undo :meth:`Layout.cut`."""
        pieces = [p.flatten(-2) for p in (*self.nodes, *self.edges)]
        return torch.cat([self.whole, *pieces], dim=-1)


def symmetric_layout(arch: Architecture, *, extra: int = 0) -> Layout:
    """Make nodes only where a symmetry acts.

    A leaf with no symmetric axis gives global numbers, with one numbers at the nodes of that axis,
    with two numbers at the edges between both; its other dimensions are the features.

    Raises
    ------
    UnsupportedModuleError
        If a leaf has more than two symmetric axes.
    """
    compact = arch.symmetry.compact
    for axis in compact.axes:
        if axis.over is not None:
            raise UnsupportedModuleError(
                f"axis {axis.name} has elements of {axis.group} for each unit of {axis.over}: a "
                "graph of units has no nodes for these. Fix it with "
                f"arch.with_groups({{{axis.name!r}: symflow.Trivial({axis.size})}})"
            )
    names = [a.name for a in compact.axes if not isinstance(a.group, Trivial)]
    found: dict[tuple[int, ...], list[Tensor]] = {(k,): [] for k in range(len(names))}
    whole = []
    for leaf in compact.leaves:
        place, ends = _positions(leaf, names)
        if len(ends) > 2:
            raise UnsupportedModuleError(
                f"leaf {leaf.name!r} has {len(ends)} symmetric axes, {leaf.axes}: a graph holds "
                "nodes and edges only. Fix one of them with "
                "arch.with_groups({name: symflow.Trivial(size)})"
            )
        if ends:
            found.setdefault(ends, []).append(place)
        else:
            whole.append(place.flatten())
    whole.append(torch.arange(extra) + arch.dimension)
    empty = torch.zeros(0, dtype=torch.long)
    nodes, node_places = [], []
    for k, name in enumerate(names):
        n = compact[name].size
        places = torch.cat([empty.reshape(n, 0), *found.pop((k,))], dim=1)
        nodes.append(NodeBlock(name, n, places.shape[1], alike=True))
        node_places.append(places.flatten())
    joined = {ends: torch.cat(found[ends], dim=2) for ends in sorted(found)}
    edges = tuple(EdgeBlock(ends[0], ends[1], x.shape[2]) for ends, x in joined.items())
    order = torch.cat([*whole, *node_places, *(p.flatten() for p in joined.values())])
    return Layout(tuple(nodes), edges, int(sum(map(len, whole))), order)


def _positions(leaf: Leaf, names: list[str]) -> tuple[Tensor, tuple[int, ...]]:
    """Flat positions (*units of its symmetric axes, features), and which axes these are."""
    place = torch.arange(leaf.size).reshape(leaf.shape) + leaf.offset
    units = [k for k, dim in enumerate(leaf.dims) if dim.axis in names]
    ends = {k: names.index(leaf.dims[k].axis or "") for k in units}
    ranked = sorted(units, key=lambda k: ends[k])
    place = place.movedim(ranked, list(range(len(ranked))))
    features = place.shape[len(ranked) :]
    place = place.reshape(*place.shape[: len(ranked)], math.prod(features))
    return place, tuple(ends[k] for k in ranked)


def layered_layout(arch: Architecture, *, extra: int = 0) -> Layout:
    """Make every neuron a node and every weight an edge, for a chain of linear maps.

    Raises
    ------
    UnsupportedModuleError
        If the architecture is anything but a chain of linear maps with activations in between.

    Examples
    --------
    >>> import symflow
    >>> layout = layered_layout(symflow.mlp([30, 16, 16, 2]))
    >>> [(b.name, b.size, b.features, b.alike) for b in layout.nodes]
    [('input', 30, 0, False), ('h1', 16, 1, True), ('h2', 16, 1, True), ('output', 2, 1, False)]
    """
    chain = _chain(arch)
    moving = {a.name for a in arch.symmetry.compact.axes if not isinstance(a.group, Trivial)}
    nodes = [NodeBlock("input", chain[0][0].shape[1], 0, alike=False)]
    places, edges = [], []
    for k, (weight, bias) in enumerate(chain):
        name = weight.dims[0].axis or "output"
        nodes.append(NodeBlock(name, weight.shape[0], len(bias), alike=name in moving))
        places += [torch.arange(leaf.size) + leaf.offset for leaf in bias]
        edges.append(EdgeBlock(k, k + 1, 1))
    for weight, _ in chain:
        index = torch.arange(weight.size).reshape(weight.shape) + weight.offset
        places.append(index.T.flatten())
    order = torch.cat([torch.arange(extra) + arch.dimension, *places])
    return Layout(tuple(nodes), tuple(edges), extra, order)


def _chain(arch: Architecture) -> list[tuple[Leaf, tuple[Leaf, ...]]]:
    """Weight and bias (if any) of each linear map, from the input to the output."""
    left = list(arch.leaves)
    chain: list[tuple[Leaf, tuple[Leaf, ...]]] = []
    axis: str | None = None
    passed: set[str | None] = set()
    while left and not (chain and axis is None):
        weight = next((leaf for leaf in left if _maps(leaf, axis)), None)
        if weight is None:
            break
        left.remove(weight)
        out = weight.dims[0]
        bias = next((leaf for leaf in left if leaf.learnable and leaf.dims == (out,)), None)
        if bias is not None and len(bias.shape) == 1 and bias.shape[0] == weight.shape[0]:
            left.remove(bias)
            chain.append((weight, (bias,)))
        else:
            chain.append((weight, ()))
        axis = out.axis
        if axis in passed:  # weights used twice: the units would stand for two layers
            left.append(weight)
            break
        passed.add(axis)
    if left or not chain or axis is not None:
        culprit = left[0].name if left else arch.leaves[-1].name
        raise UnsupportedModuleError(
            f"nodes='all' is for chains of linear maps, and leaf {culprit!r} does not fit into one "
            "of weights (out, in) and biases (out,): use nodes='symmetric', which takes any "
            "architecture"
        )
    return chain


def _maps(leaf: Leaf, axis: str | None) -> bool:
    """Whether a leaf is the matrix of a linear map from this axis (None: the input) to another."""
    return (
        leaf.learnable
        and len(leaf.shape) == 2
        and leaf.dims[1].axis == axis
        and (axis is None or leaf.dims[0].axis != axis)
    )
