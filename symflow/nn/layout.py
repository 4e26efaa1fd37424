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
        The axis they are the units of, or ``input`` or ``output``. Units of axes over another one,
        as those inside heads, are nodes for each of its units: ``h3 x h3.1``.
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
class Family:
    """Node blocks of an axis and of those over it: nodes of the same unit belong together.

    Attributes
    ----------
    root
        Index of the node block of the axis itself.
    blocks
        Indices of all of them; nodes of each block stand unit by unit.
    """

    root: int
    blocks: tuple[int, ...]


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
    families
        The node blocks that belong together: none where no axis is over another one.

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
    families: tuple[Family, ...] = ()

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

    @property
    def members(self) -> tuple[tuple[int, int], ...]:
        """Node blocks of axes with those of axes over them, of whose nodes each unit has some."""
        return tuple(
            (family.root, k) for family in self.families for k in family.blocks if k != family.root
        )

    def unit_of(self, root: int, block: int) -> Tensor:
        """Which unit of a root block each node of another block of its family belongs to."""
        units, size = self.nodes[root].size, self.nodes[block].size
        return torch.arange(units).repeat_interleave(size // units)

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


# The axes that a node is a unit of: one, and those over it.
Key = tuple[str, ...]


def symmetric_layout(arch: Architecture, *, extra: int = 0) -> Layout:
    """Make nodes only where a symmetry acts.

    A leaf with no symmetric axis gives global numbers, with one numbers at the nodes of that axis,
    with two numbers at the edges between both; its other dimensions are the features. An axis
    counts together with those over it in the leaf: of attention heads and the units inside, each
    pair is a node.

    Raises
    ------
    UnsupportedModuleError
        If a leaf has more than two symmetric axes.

    Examples
    --------
    >>> import symflow
    >>> encoder = torch.nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), encoder, torch.nn.Linear(8, 2))
    >>> arch = symflow.Architecture.from_module(net, torch.zeros(1, 4, 3))
    >>> layout = symmetric_layout(arch)
    >>> [(b.name, b.size) for b in layout.nodes]
    [('h1', 8), ('h2', 2), ('h3', 12), ('h2 x h2.1', 8), ('h2 x h2.2', 8)]
    >>> layout.families
    (Family(root=1, blocks=(1, 3, 4)),)
    """
    compact = arch.symmetry.compact
    names = [a.name for a in compact.axes if not isinstance(a.group, Trivial)]
    # One unit over each of an axis, as the sign of a gain, is that axis' own.
    inner = {a.name for a in compact.axes if a.over is not None}
    names = [name for name in names if not (name in inner and compact[name].size == 1)]
    blocks: dict[Key, list[Tensor]] = {(name,): [] for name in names if name not in inner}
    sizes: dict[Key, int] = {key: compact[key[0]].size for key in blocks}
    edges: dict[tuple[Key, Key], list[Tensor]] = {}
    whole = []
    for leaf in compact.leaves:
        place, ends = _positions(leaf, names)
        if len(ends) > 2:
            raise UnsupportedModuleError(
                f"leaf {leaf.name!r} has {len(ends)} symmetric axes, {leaf.axes}: a graph holds "
                "nodes and edges only. Fix one of them with "
                "arch.with_groups({name: symflow.Trivial(size)})"
            )
        for key, size in zip(ends, place.shape, strict=False):
            for known, n in ((key[:1], compact[key[0]].size), (key, size)):
                blocks.setdefault(known, [])
                sizes[known] = n
        if len(ends) == 2:
            edges.setdefault((ends[0], ends[1]), []).append(place)
        elif ends:
            blocks[ends[0]].append(place)
        else:
            whole.append(place.flatten())
    whole.append(torch.arange(extra) + arch.dimension)
    keys, empty = list(blocks), torch.zeros(0, dtype=torch.long)
    nodes, node_places = [], []
    for key in keys:
        places = torch.cat([empty.reshape(sizes[key], 0), *blocks[key]], dim=1)
        nodes.append(NodeBlock(" x ".join(key), sizes[key], places.shape[1], alike=True))
        node_places.append(places.flatten())
    found = {(keys.index(a), keys.index(b)): torch.cat(x, dim=2) for (a, b), x in edges.items()}
    joined = {ends: found[ends] for ends in sorted(found)}
    order = torch.cat([*whole, *node_places, *(p.flatten() for p in joined.values())])
    return Layout(
        tuple(nodes),
        tuple(EdgeBlock(*ends, x.shape[2]) for ends, x in joined.items()),
        int(sum(map(len, whole))),
        order,
        _families(keys),
    )


def _positions(leaf: Leaf, names: list[str]) -> tuple[Tensor, tuple[Key, ...]]:
    """Flat positions (*nodes of its ends, features), and which axes these ends are.

    Dimensions over the same one are one end, that one first.
    """
    place = torch.arange(leaf.size).reshape(leaf.shape) + leaf.offset
    groups: dict[int, list[int]] = {}
    for k, dim in enumerate(leaf.dims):
        if dim.axis in names:
            groups.setdefault(k if dim.within is None else dim.within, []).append(k)
    for root, dims in groups.items():
        # What is over a dimension differs from one of its units to the next, be it fixed or not.
        if root not in dims:
            dims.append(root)
        dims.sort(key=lambda k, root=root: (k != root, k))
    keys = {root: tuple(leaf.dims[k].axis or "" for k in dims) for root, dims in groups.items()}

    def rank(root: int) -> tuple[int, Key]:
        known = [names.index(axis) for axis in keys[root] if axis in names]
        return min(known), keys[root]

    ranked = sorted(groups, key=rank)
    front = [k for root in ranked for k in groups[root]]
    place = place.movedim(front, list(range(len(front))))
    sizes = [math.prod(leaf.shape[k] for k in groups[root]) for root in ranked]
    features = math.prod(place.shape[len(front) :])
    return place.reshape(*sizes, features), tuple(keys[root] for root in ranked)


def _families(keys: list[Key]) -> tuple[Family, ...]:
    """Return the blocks that have an axis in common, and others over it."""
    roots = dict.fromkeys(key[:1] for key in keys if len(key) > 1)
    return tuple(
        Family(keys.index(root), tuple(k for k, key in enumerate(keys) if key[:1] == root))
        for root in roots
    )


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
