"""The relational transformer: a vector field laid out by the symmetry of the architecture."""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.arch import Architecture
from symflow.errors import ShapeError
from symflow.nn.base import VectorField, permutations, seeded
from symflow.nn.layered import LayeredNetwork
from symflow.nn.layout import layered_layout, symmetric_layout
from symflow.nn.tokens import TokenNetwork


@final
class RelationalTransformer(VectorField):
    """A transformer over the units and weights of a network, equivariant to permutations.

    By default only units on which a symmetry acts become tokens; a weight that no symmetric axis
    touches is a global number, with one axis a feature of that unit, with two a feature of an edge.
    Inputs and outputs of a classifier are never nodes. With ``nodes="all"`` every neuron of a chain
    of linear maps is a node and every weight an edge, as in the source thesis.

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
    nodes
        ``"symmetric"`` or ``"all"``.
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
        nodes: str = "symmetric",
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
        self.residual = residual
        make = symmetric_layout if nodes == "symmetric" else layered_layout
        self.layout = make(arch, extra=extra)
        with seeded(seed):
            if nodes == "symmetric":
                self.network = TokenNetwork(self.layout, width, depth, heads, edge_width)
            else:
                self.network = LayeredNetwork(self.layout, width, depth)
        with torch.no_grad():
            for head in self.network.heads_out():
                head.weight.zero_()
                head.bias.zero_()
        self.order: Tensor
        self.back: Tensor
        self.register_buffer("order", self.layout.order, persistent=False)
        self.register_buffer("back", self.layout.inverse, persistent=False)

    def forward(
        self, x: Float[Tensor, "B size"], t: Float[Tensor, " B"]
    ) -> Float[Tensor, "B size"]:
        """Return the predicted end (``residual``) or the velocity, as ``x``."""
        self.require_point(x, t)
        parts = self.layout.cut(self.standardised(x).index_select(-1, self.order))
        out = self.network(parts, t.to(x)).join().index_select(-1, self.back) * self.scale
        return x + out if self.residual else out
