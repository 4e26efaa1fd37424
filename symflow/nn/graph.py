"""Networks as PyTorch Geometric graphs. The only file that imports PyTorch Geometric."""

from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from symflow.arch import Architecture
from symflow.errors import ShapeError
from symflow.nn.base import VectorField, permutations, seeded
from symflow.nn.layout import Layout, Parts, symmetric_layout


def to_graph(arch: Architecture, w: Float[Tensor, "*batch D"]) -> Any:
    """Turn weights into graphs.

    Node types are the axes on which a symmetry acts, with the weights that touch no other axis as
    features, and ``"global"`` (one node) with the weights that touch none. Edge types are
    ``(axis, "weight", axis)`` with the weights between both. Units of axes over another one, as
    those inside attention heads, are node types such as ``"h2 x h2.1"``; edges without weights,
    ``("h2", "has", "h2 x h2.1")``, say which of them belong to one head.

    Parameters
    ----------
    arch
        The architecture.
    w
        One network (D,), or a batch (N, D).

    Returns
    -------
    HeteroData or list of HeteroData
        One graph, or one for each network; ``torch_geometric.data.Batch`` joins them.

    Raises
    ------
    UnsupportedModuleError
        If a leaf has more than two symmetric axes.

    Examples
    --------
    >>> import symflow
    >>> graph = to_graph(symflow.mlp([30, 16, 16, 2]), torch.zeros(802))
    >>> graph["h1"].x.shape, graph["h1", "weight", "h2"].edge_attr.shape
    (torch.Size([16, 31]), torch.Size([256, 1]))
    """
    w = arch.as_weights(w)
    if w.ndim > 2:
        raise ShapeError(f"w must be one network (D,) or a batch (N, D), got {tuple(w.shape)}")
    if w.ndim == 2:
        return [to_graph(arch, row) for row in w]
    layout = symmetric_layout(arch)
    parts = layout.cut(w[layout.order.to(w.device)])
    graph = HeteroData()
    graph["global"].x = parts.whole[None]
    for block, x in zip(layout.nodes, parts.nodes, strict=True):
        graph[block.name].x = x
    for block, x in zip(layout.edges, parts.edges, strict=True):
        source, target = (layout.nodes[k] for k in (block.source, block.target))
        edges = graph[source.name, "weight", target.name]
        edges.edge_index = _pairs(source.size, target.size).to(w.device)
        edges.edge_attr = x
    for root, k in layout.members:
        names = layout.nodes[root].name, layout.nodes[k].name
        units = layout.unit_of(root, k)
        has = torch.stack([units, torch.arange(len(units))])
        graph[names[0], "has", names[1]].edge_index = has.to(w.device)
    return graph


def from_graph(arch: Architecture, graph: Any) -> Float[Tensor, " D"]:
    """Read the weights back from a graph that :func:`to_graph` made.

    Examples
    --------
    >>> import symflow
    >>> arch, w = symflow.mlp([3, 4, 4, 2]), torch.arange(46.0)
    >>> torch.equal(from_graph(arch, to_graph(arch, w)), w)
    True
    """
    layout = symmetric_layout(arch)
    names = [block.name for block in layout.nodes]
    parts = Parts(
        graph["global"].x[0],
        tuple(graph[name].x for name in names),
        tuple(
            graph[names[block.source], "weight", names[block.target]].edge_attr
            for block in layout.edges
        ),
    )
    return parts.join()[layout.inverse]


@final
class GraphField(VectorField):
    """Any PyTorch Geometric network as a vector field.

    The graph has one node for each unit on which a symmetry acts and one global node, which is
    joined to all others; weights between two such axes are edges in both directions, and so is what
    belongs together, as a head and the units inside. Each kind of node and edge is embedded by its
    own linear map (time comes in at every node), the network passes messages, and linear maps read
    the new numbers from its node embeddings. Message passing commutes with permutations, so the
    field does.

    Parameters
    ----------
    module
        A network called as ``module(x, edge_index, edge_attr)`` with ``x`` (nodes, channels) and
        ``edge_attr`` (edges, edge_channels), which returns (nodes, out_channels).
    arch
        The architecture.
    channels, edge_channels, out_channels
        The sizes that the network takes and gives.
    extra, residual, groups, seed
        As in :class:`~symflow.nn.RelationalTransformer`.

    Examples
    --------
    >>> import symflow
    >>> from torch_geometric.nn import GATv2Conv
    >>> arch = symflow.mlp([3, 4, 4, 2])
    >>> field = GraphField(GATv2Conv(8, 8, edge_dim=8), arch, channels=8, edge_channels=8)
    >>> field(torch.zeros(5, arch.dimension), torch.rand(5)).shape
    torch.Size([5, 46])
    """

    def __init__(
        self,
        module: nn.Module,
        arch: Architecture,
        *,
        channels: int,
        edge_channels: int,
        out_channels: int | None = None,
        extra: int = 0,
        residual: bool = True,
        groups: str | None = None,
        seed: int = 0,
    ) -> None:
        VectorField.__init__(self, arch, permutations(arch.symmetry), extra=extra, groups=groups)
        self.residual = residual
        self.module = module
        self.layout = symmetric_layout(arch, extra=extra)
        out = channels if out_channels is None else out_channels
        nodes, edges = self.layout.nodes, self.layout.edges
        with seeded(seed):
            self.whole_in = nn.Linear(self.layout.features + 1, channels)
            self.nodes_in = nn.ModuleList(nn.Linear(b.features + 1, channels) for b in nodes)
            self.edges_in = nn.ModuleList(nn.Linear(e.features, edge_channels) for e in edges)
            kinds = 2 * (len(nodes) + len(self.layout.members))
            self.kinds = nn.Parameter(torch.randn(kinds, edge_channels))
            self.whole_out = nn.Linear(out, self.layout.features)
            self.nodes_out = nn.ModuleList(nn.Linear(out, b.features) for b in nodes)
            self.edges_out = nn.ModuleList(
                nn.Sequential(
                    nn.Linear(2 * out + edge_channels, out), nn.GELU(), nn.Linear(out, e.features)
                )
                for e in edges
            )
        self.edge_index: Tensor
        self.order: Tensor
        self.back: Tensor
        self.register_buffer("edge_index", _all_edges(self.layout), persistent=False)
        self.register_buffer("order", self.layout.order, persistent=False)
        self.register_buffer("back", self.layout.inverse, persistent=False)

    def forward(
        self, x: Float[Tensor, "B size"], t: Float[Tensor, " B"]
    ) -> Float[Tensor, "B size"]:
        """Return the predicted end (``residual``) or the velocity, as ``x``."""
        self.require_point(x, t)
        parts = self.layout.cut(self.standardised(x).index_select(-1, self.order))
        t = t.to(x)
        tokens = [self.whole_in(torch.cat([parts.whole, t[:, None]], dim=-1))[:, None]]
        for put, p in zip(self.nodes_in, parts.nodes, strict=True):
            tokens.append(put(torch.cat([p, t[:, None, None].expand(*p.shape[:-1], 1)], dim=-1)))
        h = torch.cat(tokens, dim=1)
        edges = [put(p) for put, p in zip(self.edges_in, parts.edges, strict=True)]
        b, n = h.shape[:2]
        # One big graph of B disjoint ones: a network never sees its batch mates.
        shift = torch.arange(b, device=x.device)[:, None, None] * n
        index = (self.edge_index + shift).movedim(0, 1).reshape(2, -1)
        out = self.module(h.flatten(0, 1), index, self._attributes(edges, b).flatten(0, 1))
        moved = self._read(out.unflatten(0, (b, n)), edges).join()
        moved = moved.index_select(-1, self.back) * self.scale
        return x + moved if self.residual else moved

    def _attributes(self, edges: list[Tensor], batch: int) -> Tensor:
        """Edge features in the order of ``edge_index``: both directions, without weights last."""
        pieces = [x for e in edges for x in (e, e)]
        others = [self.layout.nodes[k] for _, k in self.layout.members]
        for k, block in enumerate((*self.layout.nodes, *others)):
            for kind in self.kinds[2 * k : 2 * k + 2]:
                pieces.append(kind.expand(batch, block.size, -1))
        return torch.cat(pieces, dim=1)

    def _read(self, h: Tensor, edges: list[Tensor]) -> Parts:
        first, *units = h.split([1, *(b.size for b in self.layout.nodes)], dim=1)
        found: list[Tensor] = []
        for read, e, block in zip(self.edges_out, edges, self.layout.edges, strict=True):
            a, b = units[block.source], units[block.target]
            n, m = a.shape[1], b.shape[1]
            ends = [
                a[:, :, None].expand(-1, -1, m, -1).flatten(1, 2),
                b[:, None].expand(-1, n, -1, -1).flatten(1, 2),
            ]
            found.append(read(torch.cat([*ends, e], dim=-1)))
        return Parts(
            self.whole_out(first[:, 0]),
            tuple(read(u) for read, u in zip(self.nodes_out, units, strict=True)),
            tuple(found),
        )


def _pairs(n: int, m: int) -> Tensor:
    """All pairs of n sources and m targets, the target running fastest."""
    return torch.cartesian_prod(torch.arange(n), torch.arange(m)).reshape(-1, 2).T.contiguous()


def _all_edges(layout: Layout) -> Tensor:
    """Edges of one network, both directions: weights, the global node 0, what belongs together."""
    starts = [1]
    for block in layout.nodes:
        starts.append(starts[-1] + block.size)
    pieces: list[Tensor] = []
    for block in layout.edges:
        n, m = layout.nodes[block.source].size, layout.nodes[block.target].size
        there = _pairs(n, m) + torch.tensor([[starts[block.source]], [starts[block.target]]])
        pieces += [there, there.flip(0)]
    for start, block in zip(starts, layout.nodes, strict=False):
        units = torch.arange(block.size) + start
        down = torch.stack([torch.zeros_like(units), units])
        pieces += [down, down.flip(0)]
    for root, k in layout.members:
        units = layout.unit_of(root, k)
        down = torch.stack([units + starts[root], torch.arange(len(units)) + starts[k]])
        pieces += [down, down.flip(0)]
    return torch.cat(pieces, dim=1)
