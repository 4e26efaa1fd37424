"""The default network: tokens for the units that a symmetry moves, light states for the edges."""

from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from symflow.nn.layout import Family, Layout, Parts
from symflow.numerics import tolerance

_FREQUENCIES = 16


@final
class TimeFeatures(nn.Module):
    """Sines and cosines of the time, mixed by two linear maps."""

    def __init__(self, width: int) -> None:
        nn.Module.__init__(self)
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.linspace(0, 5, _FREQUENCIES).exp())
        self.mix = nn.Sequential(
            nn.Linear(2 * _FREQUENCIES + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )

    def forward(self, t: Float[Tensor, " B"]) -> Float[Tensor, "B width"]:
        """Return the features of each time."""
        angles = t[:, None] * self.frequencies.to(t.dtype)
        return self.mix(torch.cat([t[:, None], angles.sin(), angles.cos()], dim=-1))


@final
class ConditionFeatures(nn.Module):
    """A condition mixed by two linear maps; zero before it is trained, and where it is left out."""

    def __init__(self, count: int, width: int) -> None:
        nn.Module.__init__(self)
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer("shift", torch.zeros(count))
        self.register_buffer("scale", torch.ones(count))
        last = nn.Linear(width, width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.mix = nn.Sequential(nn.Linear(count, width), nn.SiLU(), last)

    def standardise(self, samples: Float[Tensor, "n k"]) -> None:
        """Set the units: mean 0 and variance 1; a condition that never varies is only moved."""
        with torch.no_grad():
            values = samples.detach().to(self.shift.device, torch.float64)
            mean, deviation = values.mean(0), values.std(0, correction=0)
            varies = deviation > tolerance(samples.dtype).eps * mean.abs()
            self.shift.copy_(mean)
            self.scale.copy_(torch.where(varies, deviation, 1.0))

    def forward(
        self, condition: Float[Tensor, "B k"], keep: Bool[Tensor, " B"] | None
    ) -> Float[Tensor, "B width"]:
        """Return the features of each condition."""
        found = self.mix((condition - self.shift) / self.scale)
        return found if keep is None else torch.where(keep[:, None], found, 0)


@final
class Messages(nn.Module):
    """What the edges of one block tell the units at their ends: means over their edges."""

    def __init__(self, width: int, edge_width: int) -> None:
        nn.Module.__init__(self)
        self.gates = nn.Linear(edge_width, 2 * edge_width)
        self.from_source = nn.Linear(width, edge_width)
        self.from_target = nn.Linear(width, edge_width)
        self.to_source = nn.Linear(2 * edge_width, width)
        self.to_target = nn.Linear(2 * edge_width, width)

    def forward(
        self, e: Float[Tensor, "B n m E"], a: Float[Tensor, "B n W"], b: Float[Tensor, "B m W"]
    ) -> tuple[Float[Tensor, "B n W"], Float[Tensor, "B m W"]]:
        """Return the messages to the sources and to the targets."""
        forward, backward = self.gates(e).chunk(2, dim=-1)
        to_target = (forward * self.from_source(a)[:, :, None]).mean(1)
        to_source = (backward * self.from_target(b)[:, None]).mean(2)
        return (
            self.to_source(torch.cat([to_source, e.mean(2)], dim=-1)),
            self.to_target(torch.cat([to_target, e.mean(1)], dim=-1)),
        )


@final
class Relatives(nn.Module):
    """What nodes of the same unit tell each other: heads, and the units inside each of them."""

    def __init__(self, family: Family, units: int, width: int) -> None:
        nn.Module.__init__(self)
        self.family = family
        self.units = units
        self.say = nn.ModuleList(nn.Linear(width, width) for _ in family.blocks)
        self.hear = nn.ModuleList(nn.Linear(width, width) for _ in family.blocks)

    def forward(self, nodes: list[Tensor]) -> list[Tensor]:
        """Return the messages (B, n, W) to the family's blocks, from those nodes of all blocks."""
        family = [nodes[k] for k in self.family.blocks]
        said = torch.stack(
            [
                say(x).unflatten(1, (self.units, -1)).mean(2)
                for say, x in zip(self.say, family, strict=True)
            ]
        ).mean(0)
        return [
            hear(F.gelu(said)).repeat_interleave(x.shape[1] // self.units, dim=1)
            for hear, x in zip(self.hear, family, strict=True)
        ]


@final
class EdgeUpdate(nn.Module):
    """What the units at their ends tell the edges of one block."""

    def __init__(self, width: int, edge_width: int) -> None:
        nn.Module.__init__(self)
        self.norm = nn.LayerNorm(edge_width)
        self.mix = nn.Linear(edge_width, edge_width)
        self.source_to_edge = nn.Linear(width, edge_width)
        self.target_to_edge = nn.Linear(width, edge_width)
        self.out = nn.Linear(edge_width, edge_width)

    def forward(
        self, e: Float[Tensor, "B n m E"], a: Float[Tensor, "B n W"], b: Float[Tensor, "B m W"]
    ) -> Float[Tensor, "B n m E"]:
        """Return the new edge states."""
        z = self.mix(self.norm(e))
        z = z + self.source_to_edge(a)[:, :, None] + self.target_to_edge(b)[:, None]
        return e + self.out(F.gelu(z))


@final
class TokenLayer(nn.Module):
    """Attention among all tokens, messages along edges, an MLP for each token; time by AdaLN."""

    def __init__(
        self, layout: Layout, width: int, heads: int, edge_width: int, time_width: int
    ) -> None:
        nn.Module.__init__(self)
        self.layout = layout
        self.heads = heads
        self.time = nn.Linear(time_width, 6 * width)
        nn.init.zeros_(self.time.weight)
        nn.init.zeros_(self.time.bias)
        with torch.no_grad():  # gates start open: the layer begins as a plain transformer layer
            self.time.bias.view(6, width)[2::3] = 1
        self.attend = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        self.expand = nn.Linear(width, 2 * width)
        self.contract = nn.Linear(2 * width, width)
        self.messages = nn.ModuleList(Messages(width, edge_width) for _ in layout.edges)
        self.updates = nn.ModuleList(EdgeUpdate(width, edge_width) for _ in layout.edges)
        # Last, so that everything else is initialised as in a network without.
        self.relatives = nn.ModuleList(
            Relatives(family, layout.nodes[family.root].size, width) for family in layout.families
        )

    def forward(
        self, h: Float[Tensor, "B N W"], edges: list[Tensor], time: Float[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B N W"], list[Tensor]]:
        """Update tokens, then edges."""
        shift_a, scale_a, gate_a, shift_b, scale_b, gate_b = self.time(time)[:, None].chunk(6, -1)
        y = F.layer_norm(h, h.shape[-1:]) * (1 + scale_a) + shift_a
        heard = self._attention(y)
        units = self._units(y)
        parts = [heard[:, :1], *self._units(heard)]
        for e, block, talk in zip(edges, self.layout.edges, self.messages, strict=True):
            back, ahead = talk(e, units[block.source], units[block.target])
            parts[1 + block.source] = parts[1 + block.source] + back
            parts[1 + block.target] = parts[1 + block.target] + ahead
        for family, talk in zip(self.layout.families, self.relatives, strict=True):
            for k, x in zip(family.blocks, talk(units), strict=True):
                parts[1 + k] = parts[1 + k] + x
        h = h + gate_a * self.merge(torch.cat(parts, dim=1))
        y = F.layer_norm(h, h.shape[-1:]) * (1 + scale_b) + shift_b
        h = h + gate_b * self.contract(F.gelu(self.expand(y)))
        units = self._units(h)
        return h, [
            update(e, units[block.source], units[block.target])
            for e, block, update in zip(edges, self.layout.edges, self.updates, strict=True)
        ]

    def _attention(self, y: Tensor) -> Tensor:
        b, n, w = y.shape
        q, k, v = self.attend(y).view(b, n, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, w)

    def _units(self, h: Tensor) -> list[Tensor]:
        """Return the tokens of each node block; token 0 is the global one."""
        return list(h[:, 1:].split([block.size for block in self.layout.nodes], dim=1))


@final
class TokenNetwork(nn.Module):
    """Tokens with all weights of a unit that no other symmetry touches, edges between them.

    Memory and time are linear in the number of weights: no pair of units without a weight between
    them has a state.
    """

    recompute: bool = False

    def __init__(
        self,
        layout: Layout,
        width: int,
        depth: int,
        heads: int,
        edge_width: int,
        time_width: int,
        seen: int = 0,
        more: int = 0,
        conditions: int = 0,
        recompute: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.layout = layout
        if recompute:  # no attribute without: files know fields by what they have
            self.recompute = True
        self.time = TimeFeatures(time_width)
        times = 1 + seen
        self.whole_in = nn.Linear(times * layout.features + more, width)
        self.nodes_in = nn.ModuleList(nn.Linear(times * b.features, width) for b in layout.nodes)
        self.edges_in = nn.ModuleList(
            nn.Linear(times * e.features, edge_width) for e in layout.edges
        )
        self.layers = nn.ModuleList(
            TokenLayer(layout, width, heads, edge_width, time_width) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.whole_out = nn.Linear(width, layout.features)
        self.nodes_out = nn.ModuleList(nn.Linear(width, b.features) for b in layout.nodes)
        self.edges_out = nn.ModuleList(nn.Linear(edge_width, e.features) for e in layout.edges)
        # Last, so that everything else is initialised as in a network without.
        self.condition = ConditionFeatures(conditions, time_width) if conditions else None

    def heads_out(self) -> list[nn.Linear]:
        """Return the last linear maps, whose zero weights make the output zero."""
        found = (self.whole_out, *self.nodes_out, *self.edges_out)
        return [m for m in found if isinstance(m, nn.Linear)]

    def forward(
        self,
        parts: Parts,
        t: Float[Tensor, " B"],
        condition: Float[Tensor, "B k"] | None = None,
        keep: Bool[Tensor, " B"] | None = None,
    ) -> Parts:
        """Map the numbers of the graph to new ones; a condition stands beside the time."""
        time = self.time(t)
        if self.condition is not None and condition is not None:
            time = time + self.condition(condition, keep)
        tokens = [self.whole_in(parts.whole)[:, None]]
        tokens += [put(x) for put, x in zip(self.nodes_in, parts.nodes, strict=True)]
        edges = [
            put(x).unflatten(1, self._ends(k))
            for k, (put, x) in enumerate(zip(self.edges_in, parts.edges, strict=True))
        ]
        h = torch.cat(tokens, dim=1)
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                h, edges = checkpoint(layer, h, edges, time, use_reentrant=False)
            else:
                h, edges = layer(h, edges, time)
        first, *units = self.norm(h).split([1, *(b.size for b in self.layout.nodes)], dim=1)
        return Parts(
            self.whole_out(first[:, 0]),
            tuple(read(x) for read, x in zip(self.nodes_out, units, strict=True)),
            tuple(read(e).flatten(1, 2) for read, e in zip(self.edges_out, edges, strict=True)),
        )

    def _ends(self, k: int) -> tuple[int, int]:
        block = self.layout.edges[k]
        return self.layout.nodes[block.source].size, self.layout.nodes[block.target].size
