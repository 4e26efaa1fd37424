"""The relational transformer of the source thesis, block by block: every neuron is a node.

Edge states exist only between consecutive layers and from each node to itself; no N x N tensor is
formed. Both directions of an edge lie side by side, and the blocks of different layers are never
joined into one tensor: the states of edges are large, and time goes into moving them. The
rewritings below are exact:

* <q_i + Q e, k_j + K e> = q_i . k_j + e . (K^T q_i + Q^T k_j + M e) with M = Q^T K;
* sum_j alpha_ij A e_ij = A sum_j alpha_ij e_ij;
* sum_j alpha_ij (G e_ij + c) * v_j = sum_j alpha_ij (G e_ij) * v_j + c * sum_j alpha_ij v_j;
* (A1 e_ij + A2 e_ji, A1 e_ji + A2 e_ij) is one product with (e_ij, e_ji).
"""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from symflow.nn.layout import Layout, Parts
from symflow.nn.pairs import EdgeScores, EdgeSums, EdgeUpdate


@final
class Perceptron(nn.Module):
    """Two linear maps with a GELU in between."""

    def __init__(self, n_in: int, n_hidden: int, n_out: int) -> None:
        nn.Module.__init__(self)
        self.first = nn.Linear(n_in, n_hidden)
        self.second = nn.Linear(n_hidden, n_out)

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return the second map of the GELU of the first."""
        return self.second(F.gelu(self.first(x)))


@final
class RelationalLayer(nn.Module):
    """Node attention with relational keys and values, then an edge update (Diao and Loynd, 2023).

    Edges between two consecutive layers of n and m nodes are one tensor (B, n, m, 2, d): state 0
    is the edge seen from the earlier node i, e_ij, state 1 the edge seen from the later one, e_ji.
    The edges from each node to itself are one tensor (B, N, d).
    """

    def __init__(self, width: int, sizes: list[int]) -> None:
        nn.Module.__init__(self)
        self.width = width
        self.sizes = sizes
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.edge_query = nn.Linear(width, width, bias=False)
        self.edge_key = nn.Linear(width, width, bias=False)
        self.edge_gate = nn.Linear(width, width)
        self.edge_value = nn.Linear(width, width, bias=False)
        self.merge = nn.Linear(width, width)
        self.node_norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.node_mlp = Perceptron(width, width, width)
        self.own = nn.Linear(width, width)
        self.reverse = nn.Linear(width, width, bias=False)
        self.from_node = nn.Linear(width, width, bias=False)
        self.to_node = nn.Linear(width, width, bias=False)
        self.mix = nn.Linear(width, width)
        self.edge_norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.eps = nn.LayerNorm(width).eps
        self.edge_mlp = Perceptron(width, width, width)

    def forward(
        self, h: Float[Tensor, "B N d"], edges: list[Tensor], loops: Float[Tensor, "B N d"]
    ) -> tuple[Float[Tensor, "B N d"], list[Tensor], Float[Tensor, "B N d"]]:
        """Update nodes, then edges between layers and edges from each node to itself."""
        h = self.update_nodes(h, edges, loops)
        begins, ends = self.from_node(h) + self.own.bias, self.to_node(h)
        sources = torch.cat([begins, ends], dim=2).split(self.sizes, dim=1)
        targets = torch.cat([ends, begins], dim=2).split(self.sizes, dim=1)
        a, b = self.own.weight, self.reverse.weight
        both = torch.cat([torch.cat([a, b], dim=1), torch.cat([b, a], dim=1)])
        updated = [self._update(e, both, sources[k], targets[k + 1]) for k, e in enumerate(edges)]
        z = F.linear(loops, a + b) + begins + ends
        loops = self.edge_norm[0](loops + self.mix(F.gelu(z)))
        return h, updated, self.edge_norm[1](loops + self.edge_mlp(loops))

    def finish(
        self, h: Float[Tensor, "B N d"], edges: list[Tensor], loops: Float[Tensor, "B N d"]
    ) -> tuple[Float[Tensor, "B N d"], list[Tensor]]:
        """Do as :meth:`forward`, but of the edges update only what is read, states 0."""
        h = self.update_nodes(h, edges, loops)
        begins = (self.from_node(h) + self.own.bias).split(self.sizes, dim=1)
        ends = self.to_node(h).split(self.sizes, dim=1)
        both = torch.cat([self.own.weight, self.reverse.weight], dim=1)
        return h, [
            self._update(e, both, begins[k], ends[k + 1])[..., 0, :] for k, e in enumerate(edges)
        ]

    def update_nodes(
        self, h: Float[Tensor, "B N d"], edges: list[Tensor], loops: Float[Tensor, "B N d"]
    ) -> Float[Tensor, "B N d"]:
        """Let each node listen to the layers before and after it, and to itself."""
        h = self.node_norm[0](h + self.merge(self._attend(h, edges, loops)))
        return self.node_norm[1](h + self.node_mlp(h))

    def _update(self, e: Tensor, both: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
        (norm, last), mlp = self.edge_norm, self.edge_mlp
        maps = [p for m in (self.mix, norm, mlp.first, mlp.second, last) for p in m.parameters()]
        new = EdgeUpdate.apply(self.eps, e, both, sources, targets, *maps)
        return torch.as_tensor(new)

    def _attend(self, h: Tensor, edges: list[Tensor], loops: Tensor) -> Tensor:
        q, k, v = self.query(h) / self.width**0.5, self.key(h), self.value(h)
        form = self.edge_query.weight.T @ self.edge_key.weight / self.width**0.5
        by_query, by_key = q @ self.edge_key.weight, k @ self.edge_query.weight / self.width**0.5
        begins = torch.stack([by_query, by_key], dim=2).split(self.sizes, dim=1)
        ends = torch.stack([by_key, by_query], dim=2).split(self.sizes, dim=1)
        qs, ks, vs = (x.split(self.sizes, dim=1) for x in (q, k, v))
        alone = (q * k).sum(-1) + (loops * (by_query + by_key + loops @ form)).sum(-1)
        scores = [[own[:, :, None]] for own in alone.split(self.sizes, dim=1)]
        for j, e in enumerate(edges):
            pair = EdgeScores.apply(e, form, begins[j], ends[j + 1])
            ahead, back = torch.as_tensor(pair).unbind(-1)
            scores[j].append(ahead + qs[j] @ ks[j + 1].mT)
            scores[j + 1].append(back.mT + qs[j + 1] @ ks[j].mT)
        shares = [
            torch.cat(parts, dim=-1).softmax(-1).split([p.shape[-1] for p in parts], dim=-1)
            for parts in scores
        ]
        own = torch.cat([share[0] for share in shares], dim=1)
        values = (own * v * F.linear(loops, self.edge_gate.weight)).split(self.sizes, dim=1)
        plain = (own * v).split(self.sizes, dim=1)
        mixed = (own * loops).split(self.sizes, dim=1)
        heard = [list(parts) for parts in zip(values, plain, mixed, strict=True)]
        for j, e in enumerate(edges):
            ahead, back = shares[j][-1], shares[j + 1][1]
            alpha = torch.stack([ahead, back.mT], dim=-1)
            found = EdgeSums.apply(e, self.edge_gate.weight, alpha, vs[j], vs[j + 1])
            for i, which, x in zip((j, j, j + 1, j + 1), (0, 2, 0, 2), found, strict=True):
                heard[i][which] = heard[i][which] + x
            heard[j][1] = heard[j][1] + ahead @ vs[j + 1]
            heard[j + 1][1] = heard[j + 1][1] + back @ vs[j]
        values, plain, mixed = (torch.cat(parts, dim=1) for parts in zip(*heard, strict=True))
        return values + plain * self.edge_gate.bias + self.edge_value(mixed)


@final
class LayeredNetwork(nn.Module):
    """Embedding, relational layers, and a readout for each weight and bias."""

    def __init__(self, layout: Layout, width: int, depth: int) -> None:
        nn.Module.__init__(self)
        self.layout = layout
        sizes = [b.size for b in layout.nodes]
        clock = 1 + layout.features
        self.node_in = Perceptron(1 + clock, width, width)
        self.edge_in = Perceptron(4 + clock, width, width)
        # One row for each input and output neuron, one for each hidden layer: hidden permutations
        # are symmetries, others are not.
        self.rows = nn.ParameterList(
            nn.Parameter(torch.randn(1 if b.alike else b.size, width) / width**0.5)
            for b in layout.nodes
        )
        self.layers = nn.ModuleList(RelationalLayer(width, sizes) for _ in range(depth - 1))
        self.last = RelationalLayer(width, sizes)
        self.node_out = Perceptron(width, width, 1)
        self.edge_out = Perceptron(width, width, 1)
        self.whole_out = nn.Linear(width, layout.features)
        self.node_gain = nn.Parameter(torch.ones(len(layout.nodes)))
        self.edge_gain = nn.Parameter(torch.ones(len(layout.edges)))

    def heads_out(self) -> list[nn.Linear]:
        """Return the last linear maps, whose zero weights make the output zero."""
        return [self.node_out.second, self.edge_out.second, self.whole_out]

    def embed(self, parts: Parts, t: Float[Tensor, " B"]) -> tuple[Tensor, list[Tensor], Tensor]:
        """Return the first states of nodes, edges and self edges, as the layers take them."""
        clock = torch.cat([t[:, None], parts.whole], dim=-1)
        biases = [x if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1) for x in parts.nodes]
        nodes = torch.cat(biases, dim=1)
        rows = [row.expand(b.size, -1) for row, b in zip(self.rows, self.layout.nodes, strict=True)]
        nodes = torch.cat([nodes, clock[:, None].expand(-1, nodes.shape[1], -1)], dim=-1)
        h = self.node_in(nodes) + torch.cat(rows)
        # A weight, what kind of edge it is at (seen from its earlier end, from its later, of a node
        # with itself), and the clock go in; only the weight is another one for each edge.
        kinds = torch.eye(3, dtype=t.dtype, device=t.device).expand(len(t), 3, 3)
        slope, rest = self.edge_in.first.weight.split([1, 3 + clock.shape[-1]], dim=1)
        rest = torch.cat([kinds, clock[:, None].expand(-1, 3, -1)], dim=-1) @ rest.T
        rest = rest + self.edge_in.first.bias
        edges: list[Tensor] = []
        for w, block in zip(parts.edges, self.layout.edges, strict=True):
            n, m = (self.layout.nodes[k].size for k in (block.source, block.target))
            first = torch.addcmul(rest[:, None, None, :2], w.view(-1, n, m, 1, 1), slope[:, 0])
            edges.append(self.edge_in.second(F.gelu(first)))
        loops = self.edge_in.second(F.gelu(rest[:, 2:]))
        return h, edges, loops.expand_as(h)

    def forward(self, parts: Parts, t: Float[Tensor, " B"]) -> Parts:
        """Map the numbers of the graph to new ones."""
        h, edges, loops = self.embed(parts, t)
        for layer in self.layers:
            h, edges, loops = layer(h, edges, loops)
        return self.read(*self.last.finish(h, edges, loops))

    def read(self, h: Float[Tensor, "B N d"], edges: list[Tensor]) -> Parts:
        """Read weights from edges seen from their earlier end, biases from nodes."""
        biases = self.node_out(h).split([b.size for b in self.layout.nodes], dim=1)
        return Parts(
            self.whole_out(h.mean(1)),
            tuple(
                x[..., : b.features] * gain
                for x, b, gain in zip(biases, self.layout.nodes, self.node_gain, strict=True)
            ),
            tuple(
                self.edge_out(e).flatten(1, 2) * gain
                for e, gain in zip(edges, self.edge_gain, strict=True)
            ),
        )
