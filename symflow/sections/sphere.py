"""The sphere section: every unit's incoming weights on a sphere (Pittorino et al., 2022)."""

import copy
import math
import warnings
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.arch import Architecture, Leaf
from symflow.errors import LeafError, ShapeError, SymflowWarning
from symflow.manifolds import SphereProduct
from symflow.numerics import norm, power_of_two, tolerance
from symflow.sections.base import (
    Section,
    is_moderate,
    mixed_axes,
    require_finite,
    rescale,
    scaled_axes,
    unit_coordinates,
)

# What the last layer is multiplied by when that is tried, and on how many random weights: on few
# inputs a network may be constant, all of its units off.
_FACTOR = 3.0
_DRAWS = 8


@final
class SphereSection(Section):
    """Divide each unit's incoming weights by their norm, multiply its outgoing ones by it.

    Layer by layer from the input. The point is not of least norm, but each unit becomes a point of
    a sphere, with great circles as shortest paths.

    Parameters
    ----------
    arch
        The architecture.
    preserves
        ``"function"``: the last layer is Euclidean. ``"argmax"``: the last linear map, weights and
        biases together, is put on the sphere of radius sqrt(C) for C outputs; this divides all
        outputs by one positive number, whose logarithm ``split`` returns.
    bias
        ``"joint"``: the norm is that of row and bias together (a zero row with a bias is harmless).
        ``"apart"``: of the row alone, as in the source thesis; the bias is divided by it too. Where
        the row is zero and the bias is not, the bias alone is put to norm one.

    Raises
    ------
    LeafError
        If ``preserves="argmax"`` and the network does not end with a linear map, or uses that one
        at another place too; or if units feed themselves or earlier ones through shared weights:
        no pass from input to output makes all rows unit then.

    Notes
    -----
    A unit whose incoming weights and bias are all zero (dead) is put to zero, the limit of its
    orbit, and counted in a ``DeadNeuronWarning``; it takes no part in spherical interpolation.
    Idempotent; continuous away from zero rows. O(D).

    Examples
    --------
    >>> import symflow
    >>> section = SphereSection(symflow.mlp([1, 1, 1]))
    >>> section.project(torch.tensor([3.0, 4.0, 2.0, 5.0]))  # in, bias, out, output bias
    tensor([ 0.6000,  0.8000, 10.0000,  5.0000])
    """

    def __init__(
        self,
        arch: Architecture,
        *,
        preserves: str = "function",
        bias: str = "joint",
    ) -> None:
        if bias not in ("joint", "apart"):
            raise ShapeError(f"bias must be 'joint' or 'apart', got {bias!r}")
        if preserves not in ("function", "argmax"):
            raise ShapeError(f"preserves must be 'function' or 'argmax', got {preserves!r}")
        self.arch = arch
        self.symmetry = arch.symmetry.compact
        mixed = mixed_axes(arch)
        if mixed:
            raise LeafError(
                f"{arch.symmetry[mixed[0]].group} mixes the units of axis {mixed[0]}: they have no "
                "rows of their own to put on spheres. Use section='balanced'"
            )
        self._rows = {
            name: unit_coordinates(arch, name, 1)
            if bias == "joint"
            else _without_biases(arch, name)
            for name in _feed_forward(arch, scaled_axes(arch))
        }
        self._incoming = {name: unit_coordinates(arch, name, 1) for name in self._rows}
        self._last = _output_coordinates(arch) if preserves == "argmax" else None
        rows, radii = list(self._rows.values()), [1.0] * len(self._rows)
        if self._last is not None:
            rows.append(self._last[None])
            radii.append(self._radius)
        self.manifold = SphereProduct(arch.dimension, rows, radii, arch.num_parameters)
        removed = 0 if self._last is None else 1
        self.state_manifold = SphereProduct(
            arch.dimension + removed, rows, radii, arch.num_parameters
        )

    @property
    def _radius(self) -> float:
        return _output_leaves(self.arch)[0].shape[0] ** 0.5

    def split(
        self, w: Float[Tensor, "*#batch D"]
    ) -> tuple[Float[Tensor, "*#batch D"], Float[Tensor, "*#batch E"]]:
        """Return the point, and the log-scale of the outputs if ``preserves="argmax"``."""
        x = w
        for name in self._rows:
            length, alive = self._lengths(x, name)
            if not is_moderate(length, x.dtype):  # what is in between may be out of range
                x = x.to(torch.float64)
                near = power_of_two(self._lengths(x, name)[0][..., None]).squeeze(-1)
                x = rescale(self.arch, x, {name: near}, {})  # or gradients would be, too
                length, alive = self._lengths(x, name)
            x = rescale(self.arch, x, {name: 1 / length}, {name: alive})
        x, removed = (x, x[..., :0]) if self._last is None else self._split_output(x)
        x, removed = x.to(w.dtype), removed.to(w.dtype)
        require_finite(self.arch, x)
        return x, removed

    def join(
        self, x: Float[Tensor, "*#batch D"], removed: Float[Tensor, "*#batch E"]
    ) -> Float[Tensor, "*#batch D"]:
        """Multiply the last layer by the exponential of ``removed``."""
        if self._last is None:
            return x
        last = self._last.to(x.device)
        x, removed = _expand(x, removed)
        return x.index_copy(-1, last, x[..., last] * removed.exp())

    def _lengths(self, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """Return the norm of each unit's row, one where it is dead, and whether it is not."""
        length = norm(x[..., self._rows[name].to(x.device)])
        # A row of zeros may stand beside a bias: a constant unit, whose scale is the bias's.
        whole = norm(x[..., self._incoming[name].to(x.device)])
        length = torch.where(length > 0, length, whole)
        return torch.where(length > 0, length, torch.ones_like(length)), length > 0

    def _split_output(self, x: Tensor) -> tuple[Tensor, Tensor]:
        last = (self._last if self._last is not None else torch.zeros(0)).to(x.device)
        part = x[..., last]
        length = norm(part, keepdim=True) / self._radius
        if bool((length == 0).any()):
            warnings.warn(
                SymflowWarning("the last layer of a network is zero: it is kept"), stacklevel=3
            )
        length = torch.where(length > 0, length, torch.ones_like(length))
        return x.index_copy(-1, last, part / length), length.log()


def _expand(x: Tensor, removed: Tensor) -> tuple[Tensor, Tensor]:
    batch = torch.broadcast_shapes(x.shape[:-1], removed.shape[:-1])
    return x.expand(*batch, x.shape[-1]), removed.expand(*batch, removed.shape[-1])


def _feed_forward(arch: Architecture, axes: list[str]) -> list[str]:
    """Order axes so that none's rows are changed again by the scales of later ones.

    As they are, but that those of one residual stream, which stand together, come where they are
    made. Rows that later units', or their own, scales change again are refused.
    """
    before: dict[str, dict[str, str]] = {name: {} for name in axes}
    for leaf in arch.leaves:
        for target in leaf.dims:
            for source in leaf.dims:
                known = target.axis in before and source.axis in before
                if known and target.degree == 1 and source.degree < 0:
                    before[target.axis or ""][source.axis or ""] = leaf.name
    ordered: list[str] = []
    while left := [name for name in axes if name not in ordered]:
        ready = next((a for a in left if not before[a].keys() & set(left)), None)
        if ready is None:
            target, source = next((a, b) for a in left for b in before[a] if b in left)
            raise LeafError(
                f"leaf {before[target][source]!r} leads from axis {source} to {target}, which "
                "comes no later: the sphere section goes from input to output, one layer after the "
                "other. Use section='balanced'"
            )
        ordered.append(ready)
    return ordered


def _without_biases(arch: Architecture, axis: str) -> Tensor:
    """Coordinates of degree one in leaves with further dimensions: the rows of the maps."""
    index = unit_coordinates(arch, axis, 1)
    rows = [x for x in arch.leaves if len(x.shape) > 1]
    inside = torch.zeros(arch.dimension, dtype=torch.bool)
    for leaf in rows:
        inside[leaf.span] = True
    keep = inside[index].all(0)
    return index[:, keep] if bool(keep.any()) else index


def _output_leaves(arch: Architecture) -> list[Leaf]:
    """Return the leaves of the last linear map, whose weight is the first of them.

    The architecture may name tied weights by any of their keys, and cut parameters as a whole.
    """
    first = dict(arch.aliases)
    keys = [first.get(key, key) for key in arch.output]
    return [leaf for key in keys for leaf in arch.leaves if leaf.key == key]


def _output_coordinates(arch: Architecture) -> Tensor:
    if not arch.output:
        raise LeafError(
            "preserves='argmax' scales the last layer, but this network does not end with a linear "
            "map: use preserves='function'"
        )
    spans = [x.span for x in _output_leaves(arch)]
    last = torch.cat([torch.arange(x.start, x.stop) for x in spans])
    _require_output_scales(arch, last)
    return last


def _require_output_scales(arch: Architecture, last: Tensor) -> None:
    """Try it on the network: the outputs must be multiplied by what the last layer is.

    They are not if the network also uses these leaves, or leaves tied to them, at another place;
    the labels of leaves do not tell.
    """
    generator = torch.Generator().manual_seed(0)
    network = copy.deepcopy(arch.module).double().eval()
    own = network.state_dict()
    own = {leaf.name: leaf.of(own[leaf.key]).reshape(-1).clone() for leaf in arch.leaves}
    for _ in range(_DRAWS):
        w = torch.cat([_drawn(leaf, own[leaf.name], generator) for leaf in arch.leaves])
        inputs = [_random_input(x, generator) for x in arch.inputs]
        with torch.no_grad():
            before = arch.load_into(network, w)(*inputs)
            after = arch.load_into(network, w.index_copy(0, last, _FACTOR * w[last]))(*inputs)
        off = (after - _FACTOR * before).abs().max()
        if not off <= tolerance(torch.float64).symmetry * before.abs().max():
            raise LeafError(
                f"preserves='argmax' scales the last layer, the leaves {list(arch.output)}, but "
                "scaling them does more than scaling the outputs: the network uses them at another "
                "place too. Use preserves='function'"
            )


def _random_input(x: Any, generator: torch.Generator) -> Any:
    if isinstance(x, Tensor) and x.is_floating_point():
        return torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return x


def _drawn(leaf: Leaf, own: Tensor, generator: torch.Generator) -> Tensor:
    """Draw random parameters, which keep the size of signals; buffers stay as they are."""
    if not leaf.learnable:
        return own
    fan_in = max(1, math.prod(leaf.shape[1:]))
    return torch.randn(leaf.size, generator=generator, dtype=torch.float64) / fan_in**0.5
