"""The relational transformer with nodes="all", written plainly: every pair of N nodes has a state.

The masked form of the layer, with no rewriting: queries, keys, gates and values of all N x N pairs
are formed, and pairs without an edge are masked out of the softmax. It shares the parameters of a
block-structured network and must give the same numbers.
"""

import torch
from torch.nn import functional as F


def dense_forward(field, x, t):
    """Evaluate ``field`` (a RelationalTransformer with nodes="all") the dense way."""
    net, arch = field.network, field.arch
    sizes = [block.size for block in net.layout.nodes]
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    n = sum(sizes)
    z = (x - field.shift) / field.scale
    whole = z[:, arch.dimension :]
    clock = torch.cat([t[:, None], whole], dim=-1)
    adjacency = torch.eye(n, dtype=torch.bool, device=x.device)
    weights = x.new_zeros(len(x), n, n)
    kinds = x.new_zeros(n, n, 3)
    kinds[range(n), range(n), 2] = 1
    biases = x.new_zeros(len(x), n, 1)
    chain = [leaf for leaf in arch.leaves if len(leaf.shape) == 2]
    for k, leaf in enumerate(chain):
        a = slice(starts[k], starts[k] + sizes[k])
        b = slice(starts[k + 1], starts[k + 1] + sizes[k + 1])
        w = z[:, leaf.span].reshape(-1, *leaf.shape)  # (B, out, in)
        weights[:, a, b], weights[:, b, a] = w.transpose(1, 2), w
        adjacency[a, b] = adjacency[b, a] = True
        kinds[a, b, 0] = kinds[b, a, 1] = 1
        bias = next((v for v in arch.leaves if v.name == leaf.name.replace("weight", "bias")), None)
        if bias is not None:
            biases[:, b, 0] = z[:, bias.span]
    rows = torch.cat([r.expand(s, -1) for r, s in zip(net.rows, sizes, strict=True)])
    node_clock = clock[:, None].expand(-1, n, -1)
    h = net.node_in(torch.cat([biases, node_clock], -1)) + rows
    pair_clock = clock[:, None, None].expand(-1, n, n, -1)
    pair_kinds = kinds.expand(len(x), -1, -1, -1)
    e = torch.cat([weights[..., None], pair_kinds, pair_clock], dim=-1)
    e = net.edge_in(e)
    for layer in (*net.layers, net.last):
        h, e = dense_layer(layer, h, e, adjacency)
    out = x.new_zeros(x.shape)
    read, node = net.edge_out(e)[..., 0], net.node_out(h)[..., 0]
    for k, leaf in enumerate(chain):
        a = slice(starts[k], starts[k] + sizes[k])
        b = slice(starts[k + 1], starts[k + 1] + sizes[k + 1])
        out[:, leaf.span] = (read[:, a, b].transpose(1, 2) * net.edge_gain[k]).flatten(1)
        bias = next((v for v in arch.leaves if v.name == leaf.name.replace("weight", "bias")), None)
        if bias is not None:
            out[:, bias.span] = node[:, b] * net.node_gain[k + 1]
    if whole.shape[1]:
        out[:, arch.dimension :] = net.whole_out(h.mean(1))
    return x * field.residual + out * field.scale


def dense_layer(layer, h, e, adjacency):
    """One layer over all pairs (i, j): node i listens to node j."""
    q = layer.query(h)[:, :, None] + layer.edge_query(e)
    k = layer.key(h)[:, None] + layer.edge_key(e)
    v = layer.value(h)[:, None] * layer.edge_gate(e) + layer.edge_value(e)
    scores = (q * k).sum(-1) / layer.width**0.5
    alpha = scores.masked_fill(~adjacency, -torch.inf).softmax(-1)
    heard = (alpha[..., None] * v).sum(2)
    h = layer.node_norm[0](h + layer.merge(heard))
    h = layer.node_norm[1](h + layer.node_mlp(h))
    z = layer.own(e) + layer.reverse(e.transpose(1, 2))
    z = z + layer.from_node(h)[:, :, None] + layer.to_node(h)[:, None]
    e = layer.edge_norm[0](e + layer.mix(F.gelu(z)))
    return h, layer.edge_norm[1](e + layer.edge_mlp(e))
