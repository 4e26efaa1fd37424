"""The relational transformer: a vector field laid out by the symmetry of the architecture."""

from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from symflow.arch import Architecture
from symflow.errors import ShapeError
from symflow.nn.base import ConditionalField, VectorField, permutations, seeded
from symflow.nn.layered import LayeredNetwork
from symflow.nn.layout import Parts, layered_layout, symmetric_layout
from symflow.nn.probes import Probes
from symflow.nn.tokens import TimeFeatures, TokenNetwork


@final
class RelationalTransformer(ConditionalField):
    """A transformer over the units and weights of a network, equivariant to permutations.

    By default only units on which a symmetry acts become tokens; a weight that no symmetric axis
    touches is a global number, with one axis a feature of that unit, with two a feature of an edge.
    Units of axes over another one (those inside attention heads, the channels of groups) are tokens
    for each of its units, and hear what these have in common. Inputs and outputs of a classifier
    are never nodes. With ``nodes="all"`` every neuron of a chain of linear maps is a node and every
    weight an edge, as in the source thesis.

    Parameters
    ----------
    arch
        The architecture.
    width
        Features of a token (and, with ``nodes="all"``, of an edge).
    depth
        Number of layers.
    heads
        Attention heads of the default layout; must divide ``width``. ``nodes="all"`` has one.
    edge_width
        Features of an edge in the default layout: edges are the many, so they are light.
    time_width
        Features of the time, in the default layout; ``width`` by default. Every layer has a map
        from them to six numbers for each feature of a token: a good share of all parameters.
    nodes
        ``"symmetric"`` or ``"all"``.
    probes, probe_kinds
        Number of inputs on which the default layout sees what the network does (set by
        :meth:`look_at`; a flow takes them from the inputs it is fitted with), and of gradients.
    conditions
        How many numbers the default layout may be told about each network, beside the time.
    recompute
        Whether the inside of each layer of the default layout is computed again on the way back,
        instead of being kept: memory of one layer, a third more time, the same gradients.
    extra
        Further coordinates behind the weights, such as a log-temperature.
    residual
        Return x plus the network's output (a prediction of the end, starting at the identity), or
        the output alone (a velocity).
    groups
        ``"permutation"`` accepts that other compact symmetries (signs) are not respected.
    seed
        Of the initialisation.

    Raises
    ------
    UnsupportedModuleError
        If a leaf has more than two symmetric axes, or ``nodes="all"`` and the architecture is no
        chain of linear maps.
    EquivarianceError
        If the architecture has signs and ``groups`` does not accept that.

    Notes
    -----
    Time and memory are linear in the number of weights. Exactly equivariant, and the networks of a
    batch do not see each other.

    Examples
    --------
    >>> import symflow
    >>> arch = symflow.mlp([30, 16, 16, 2])
    >>> field = RelationalTransformer(arch, width=16, depth=1)
    >>> field(torch.zeros(3, arch.dimension), torch.rand(3)).shape
    torch.Size([3, 802])
    """

    def __init__(
        self,
        arch: Architecture,
        *,
        width: int = 64,
        depth: int = 3,
        heads: int = 4,
        edge_width: int = 16,
        time_width: int | None = None,
        nodes: str = "symmetric",
        probes: int = 0,
        probe_kinds: int = 2,
        conditions: int = 0,
        recompute: bool = False,
        extra: int = 0,
        residual: bool = True,
        groups: str | None = None,
        seed: int = 0,
    ) -> None:
        VectorField.__init__(self, arch, permutations(arch.symmetry), extra=extra, groups=groups)
        if min(width, depth, heads, edge_width) < 1 or width % heads:
            raise ShapeError(
                "width, depth, heads and edge_width must be positive and heads divide width; got "
                f"{width}, {depth}, {heads}, {edge_width}"
            )
        if nodes not in ("symmetric", "all"):
            raise ShapeError(f"nodes must be 'symmetric' or 'all', got {nodes!r}")
        if probes < 0 or probe_kinds < 1 or (nodes == "all" and probes):
            raise ShapeError(
                "probes must be a number of inputs, 0 or more, and 0 with nodes='all', and "
                f"probe_kinds at least 1; got {probes} and {probe_kinds} with nodes={nodes!r}"
            )
        if conditions < 0 or (nodes == "all" and conditions):
            raise ShapeError(
                "conditions must be a number of them, 0 or more, and 0 with nodes='all', got "
                f"{conditions} with nodes={nodes!r}"
            )
        if recompute and nodes == "all":
            raise ShapeError(
                "recompute is for nodes='symmetric', got nodes='all': leave one of them out"
            )
        if conditions:  # no attribute without: files know fields by what they have
            self.conditions = conditions
        self.residual = residual
        make = symmetric_layout if nodes == "symmetric" else layered_layout
        self.layout = make(arch, extra=extra)
        with seeded(seed):
            self.probes = Probes(arch, probes, probe_kinds) if probes else None
            if nodes == "symmetric":
                time_width = width if time_width is None else time_width
                seen = probe_kinds if probes else 0
                more = seen * len(arch.leaves)
                self.network = TokenNetwork(
                    self.layout,
                    width,
                    depth,
                    heads,
                    edge_width,
                    time_width,
                    seen,
                    more,
                    conditions,
                    recompute,
                )
                self.clock = TimeFeatures(time_width) if probes else None
                self.gains = nn.Linear(time_width, more) if probes else None
            else:
                self.clock, self.gains = None, None
                self.network = LayeredNetwork(self.layout, width, depth)
        with torch.no_grad():
            for head in (*self.network.heads_out(), *([self.gains] if self.gains else [])):
                head.weight.zero_()
                head.bias.zero_()
        self.order: Tensor
        self.back: Tensor
        self.register_buffer("order", self.layout.order, persistent=False)
        self.register_buffer("back", self.layout.inverse, persistent=False)

    def forward(
        self,
        x: Float[Tensor, "B size"],
        t: Float[Tensor, " B"],
        condition: Float[Tensor, "B k"] | None = None,
        keep: Bool[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B size"]:
        """Return the predicted end (``residual``) or the velocity, as ``x``."""
        self.require_point(x, t)
        self.require_condition(x, condition)
        told = () if condition is None else (condition.to(x), keep)
        parts = self.layout.cut(self.standardised(x).index_select(-1, self.order))
        t = t.to(x)
        if self.probes is None or self.clock is None or self.gains is None:
            out = self.network(parts, t, *told)
            out = out.join().index_select(-1, self.back)
        else:
            gradients, sizes = self.probes(x[:, : self.arch.dimension])
            gradients = F.pad(gradients, (0, self.extra))
            seen = self.layout.cut(gradients.index_select(-1, self.order))
            out = (
                self.network(_beside(parts, seen, sizes), t, *told)
                .join()
                .index_select(-1, self.back)
            )
            gains = self.gains(self.clock(t)).unflatten(-1, (gradients.shape[1], -1))
            gains = F.pad(gains[..., self._leaf_of[: self.arch.dimension]], (0, self.extra))
            out = out + (gains * gradients).sum(1)
        out = out * self.scale
        return x + out if self.residual else out

    def standardise_conditions(self, samples: Float[Tensor, "n k"]) -> "RelationalTransformer":
        if isinstance(self.network, TokenNetwork) and self.network.condition is not None:
            self.network.condition.standardise(samples)
        return self

    def look_at(self, inputs: Float[Tensor, "n *shape"]) -> "RelationalTransformer":
        """Set the probe inputs; see :class:`~symflow.nn.probes.Probes`.

        Raises
        ------
        ShapeError
            If there are too few, they are none of the network, or the field has no probes.
        """
        if self.probes is None:
            raise ShapeError("this field looks at no inputs: make it with probes=n for n of them")
        self.probes.look_at(inputs)
        return self


def _beside(parts: Parts, seen: Parts, sizes: Tensor) -> Parts:
    """Put gradients (B, kinds, ...) beside the weights they are gradients by."""
    return Parts(
        torch.cat([parts.whole, seen.whole.flatten(1), sizes], dim=-1),
        tuple(
            torch.cat([x, g.movedim(1, -2).flatten(-2)], dim=-1)
            for x, g in zip(parts.nodes, seen.nodes, strict=True)
        ),
        tuple(
            torch.cat([x, g.movedim(1, -2).flatten(-2)], dim=-1)
            for x, g in zip(parts.edges, seen.edges, strict=True)
        ),
    )
