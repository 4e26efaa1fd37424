"""What a network does on a few inputs, told to each of its weights by gradients."""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from symflow.arch import Architecture
from symflow.errors import ShapeError
from symflow.numerics import VARIANCE_FLOOR


@final
class Probes(nn.Module):
    """Gradients of numbers that depend on the network's function alone.

    The number is the cross-entropy between predictions on probe inputs and learned targets; no
    symmetry changes it, so its gradient moves along with the weights: an equivariant field that
    knows what the weights do together, which no layer could work out from single weights.

    Parameters
    ----------
    arch
        The architecture whose weights are looked at; its output's last dimension holds logits.
    count
        Number of inputs; they are data, given by :meth:`look_at`.
    kinds
        Number of sets of targets, each with a gradient.

    Examples
    --------
    >>> import symflow
    >>> arch = symflow.mlp([3, 4, 2])
    >>> probes = Probes(arch, 8, 2).look_at(torch.randn(8, 3))
    >>> gradients, sizes = probes(torch.randn(5, arch.dimension))
    >>> gradients.shape, sizes.shape
    (torch.Size([5, 2, 26]), torch.Size([5, 8]))
    """

    inputs: Tensor
    _leaf_of: Tensor

    def __init__(self, arch: Architecture, count: int, kinds: int) -> None:
        nn.Module.__init__(self)
        example = arch.inputs[0]
        if not isinstance(example, Tensor):
            raise ShapeError(
                f"probes are for networks that take a tensor, {arch!r} was traced with a "
                f"{type(example).__name__}: make the field with probes=0"
            )
        self.arch = arch
        self.count = count
        self.register_buffer("inputs", torch.zeros(count, *example.shape[1:], dtype=example.dtype))
        with torch.no_grad():
            out = arch.apply(torch.zeros(arch.dimension), self.inputs)
        self.targets = nn.Parameter(torch.randn(kinds, *out.shape))
        leaf_of = [torch.full((leaf.size,), k) for k, leaf in enumerate(arch.leaves)]
        self.register_buffer("_leaf_of", torch.cat(leaf_of), persistent=False)

    def look_at(self, inputs: Float[Tensor, "n *shape"]) -> "Probes":
        """Set the probe inputs; the first ``count`` are taken.

        Raises
        ------
        ShapeError
            If there are too few, or they are none of the network.
        """
        if len(inputs) < self.count or inputs.shape[1:] != self.inputs.shape[1:]:
            raise ShapeError(
                f"probes must be at least {self.count} inputs of the network, shape (n, "
                f"{tuple(self.inputs.shape[1:])}), got {tuple(inputs.shape)}"
            )
        self.inputs.copy_(inputs[: self.count])
        return self

    def forward(
        self, w: Float[Tensor, "B D"]
    ) -> tuple[Float[Tensor, "B kinds D"], Float[Tensor, "B sizes"]]:
        """Return gradients of root mean square one in each leaf, and the logs of what it was."""
        graph = torch.is_grad_enabled()
        with torch.enable_grad():
            w = w if w.requires_grad else w.detach().requires_grad_(True)
            logs = F.log_softmax(self.arch.apply(w, self.inputs.to(w)), dim=-1)
            targets = self.targets.softmax(-1).to(w)
            numbers = -(targets[:, None] * logs).flatten(2).sum(-1).sum(1) / self.count
            found = [
                torch.autograd.grad(x, w, create_graph=graph, retain_graph=True)[0] for x in numbers
            ]
        gradients = torch.stack(found if graph else [g.detach() for g in found], dim=1)
        sizes = gradients.new_zeros(*gradients.shape[:2], len(self.arch.leaves))
        sizes = sizes.index_add(-1, self._leaf_of, gradients.square())
        sizes = (sizes / torch.bincount(self._leaf_of).to(w) + VARIANCE_FLOOR).sqrt()
        return gradients / sizes[..., self._leaf_of], sizes.log().flatten(1)
