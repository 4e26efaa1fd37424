"""Activation matching: which units answer alike on data."""

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from symflow.align import hull
from symflow.align.base import Aligner, Alignment, Found, Status, objective, require_compact
from symflow.align.costs import oracle as compact
from symflow.align.places import chosen, index_of
from symflow.arch import Architecture, Axis, Dim, Leaf, Symmetry
from symflow.errors import ShapeError, UnsupportedModuleError
from symflow.groups import monomial
from symflow.numerics import tolerance, unit

# Modules whose channels are dimension 1 of what they give; those of all others are the last.
_CHANNELS_FIRST = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.GroupNorm),
)

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@final
@dataclass(frozen=True)
class Owner:
    """A module whose output runs over an axis.

    Attributes
    ----------
    begin, end
        Which of its channels do.
    units
        How these channels are to be viewed: the units of the axis, for an axis over another one the
        units of that one and its own, in front of what no axis runs over.
    degree
        How the axis acts on them.
    grid
        Where channels are taken out of those inside each head: how many heads, and how many inside;
        ``begin`` and ``end`` are among these.

    Examples
    --------
    >>> import symflow
    >>> owners(symflow.mlp([3, 8, 2], "tanh").symmetry, symflow.mlp([3, 8, 2], "tanh").module)
    {'h1': {'0': Owner(begin=0, end=8, units=(8,), degree=1, grid=())}}
    """

    begin: int
    end: int
    units: tuple[int, ...]
    degree: int
    grid: tuple[int, ...] = ()

    def of(self, z: Float[Tensor, "*batch channels"]) -> Float[Tensor, "..."]:
        """Pick the answers (*batch, *units, rest) of the axis out of those of all channels."""
        if self.grid:
            z = z.unflatten(-1, self.grid)
        z = z[..., self.begin : self.end]
        return (z.flatten(-2) if self.grid else z).unflatten(-1, (*self.units, -1))


# By axis and path of the module.
_Owners: TypeAlias = Mapping[str, Mapping[str, Owner]]
_Answers: TypeAlias = dict[str, tuple[int, Tensor]]


@final
@dataclass(frozen=True, eq=False)
class ActivationMatching(Aligner):
    """Match units by what they answer on data, each axis by itself, exactly.

    Li et al. (2015) for correlations, Ainsworth et al. (2023) for inner products. What an axis
    answers is the output of the last module that owns a parameter whose first dimension runs over
    it with degree one: before the activation, after a normalisation. Positions count as samples.

    Parameters
    ----------
    arch
        The architecture of the networks that will be aligned.
    inputs
        What its ``forward`` takes: a tensor, or a tuple of several.
    correlation
        Whether each unit's answers are centred and normalised.

    Raises
    ------
    UnsupportedModuleError
        If the outputs of no module run over some axis, as inside of recurrent layers and attention,
        or if they move with others as well: each claim is tried on random weights.

    Notes
    -----
    The inner product of the weights is reported but not maximised: let
    :class:`symflow.align.Polished` go on from here where it should be.

    Examples
    --------
    >>> import symflow
    >>> arch = symflow.mlp([3, 8, 2], "tanh")
    >>> w, x = torch.randn(2, 64, arch.dimension, generator=torch.Generator().manual_seed(0))
    >>> g = {"h1": (torch.arange(8).flip(0), -torch.ones(8))}
    >>> found = ActivationMatching(arch, x[:, :3])(arch.symmetry, w, arch.symmetry.act(g, w))
    >>> torch.allclose(found.weights, w)
    True
    """

    arch: Architecture
    inputs: Any
    correlation: bool = True

    def __post_init__(self) -> None:
        _try(self.arch, tuple(x[:4] if isinstance(x, Tensor) else x for x in self._given))

    @property
    def _given(self) -> tuple[Any, ...]:
        return self.inputs if isinstance(self.inputs, tuple) else (self.inputs,)

    def __call__(
        self, symmetry: Symmetry, w0: Float[Tensor, "*#batch D"], w1: Float[Tensor, "*#batch D"]
    ) -> Alignment:
        """Run every network once, then solve one problem for each axis and pair.

        Raises
        ------
        ShapeError
            If the symmetry is that of another architecture.
        """
        require_compact(symmetry)
        if [(x.name, x.shape) for x in symmetry.leaves] != [
            (x.name, x.shape) for x in self.arch.leaves
        ]:
            raise ShapeError(
                f"the symmetry is of other leaves than those of {self.arch}: build the aligner "
                "with the architecture whose networks it aligns"
            )
        began = time.perf_counter()
        spans = owners(symmetry, self.arch.module)
        left, right = (answers(self.arch, spans, w.detach(), self._given) for w in (w0, w1))
        batch = torch.broadcast_shapes(w0.shape[:-1], w1.shape[:-1])
        element: dict[str, Any] = {}
        for axis in symmetry.axes:
            if axis.over is None:
                element |= self._match(symmetry, axis, left, right, batch)
        flat = [w.detach().expand(*batch, w.shape[-1]).reshape(-1, w.shape[-1]) for w in (w0, w1)]
        reached = objective(symmetry, flat[0], symmetry.act(element, flat[1]))
        found = Found(element, reached[None], Status.NOT_POLISHED)
        return found.reshape(symmetry, w0, w1, seconds=time.perf_counter() - began)

    def _match(
        self, symmetry: Symmetry, axis: Axis, left: _Answers, right: _Answers, batch: torch.Size
    ) -> dict[str, Any]:
        """Solve for an axis together with those over it, whose best counts for a pair of units."""
        costs: dict[int, Tensor] = {}
        if axis.name in left:
            costs = self._costs(axis, left, right, batch)
        blocks = {a.name: self._costs(a, left, right, batch) for a in symmetry.over(axis.name)}
        for name, block in blocks.items():
            support = compact(symmetry[name].group).support_by_degree(block)
            costs[0] = costs[0] + support if 0 in costs else support
        new = {axis.name: hull.oracle(symmetry, axis.name, costs)}
        index = index_of(axis.group, new[axis.name])
        for name, block in blocks.items():
            best = hull.oracle(symmetry, name, {p: chosen(c, index) for p, c in block.items()})
            new[name] = symmetry.carried(symmetry[name], best, 1, new, back=True)
        return new

    def _costs(
        self, axis: Axis, left: _Answers, right: _Answers, batch: torch.Size
    ) -> dict[int, Tensor]:
        """Return C (N, n, n), for an axis over m units (N, m, m, n, n), by degree."""
        degree, a = left[axis.name]
        a, b = (self._normalised(axis, z) for z in (a, right[axis.name][1]))
        if axis.over is None:
            c = a.mT @ b
        else:
            c = torch.einsum("...sin,...sjm->...ijnm", a, b)
        inner = c.shape[-2:] if axis.over is None else c.shape[-4:]
        return {degree: c.expand(*batch, *inner).reshape(-1, *inner)}

    def _normalised(self, axis: Axis, z: Tensor) -> Tensor:
        """Centre every coordinate, and give every unit (or else all together) the norm one."""
        if not self.correlation:
            return z
        centred = z - z.mean(-2 if axis.over is None else -3, keepdim=True)
        if axis.over is not None:
            rows = centred.transpose(-3, -2)
            return unit(rows.flatten(-2)).reshape(rows.shape).transpose(-3, -2)
        if monomial(axis.group, axis.group.identity(like=z)) is None:
            return unit(centred.flatten(-2)).reshape(z.shape)
        return unit(centred.mT).mT


def owners(symmetry: Symmetry, module: nn.Module) -> _Owners:
    """Find the modules whose outputs run over each axis.

    Raises
    ------
    UnsupportedModuleError
        If an axis has none.

    Examples
    --------
    >>> import symflow
    >>> arch = symflow.mlp([3, 8, 2])
    >>> list(owners(arch.symmetry.compact, arch.module)["h1"])
    ['0']
    """
    found: dict[str, dict[str, Owner]] = {a.name: {} for a in symmetry.axes}
    for leaf in symmetry.leaves:
        path = leaf.key.rpartition(".")[0]
        owner = module.get_submodule(path)
        # What a module of the user's gives need not run over what its parameters run over.
        if not (leaf.learnable and leaf.dims and type(owner).__module__.startswith("torch.nn.")):
            continue
        stored = leaf.stored or leaf.shape
        at = 1 if isinstance(owner, _TRANSPOSED) and len(stored) > 1 else 0
        if leaf.grid and (at or math.prod(leaf.grid[:2]) != leaf.whole[0]):
            continue
        grid = leaf.grid[:2]  # of the channels; then those inside come second
        dims = [k for place in ((0, 1) if grid else (at,)) for k in _factors(leaf, place)]
        last = 1 if grid else at
        begin, end = leaf.region[last] if leaf.region else (0, stored[last])
        units = tuple(leaf.shape[k] for k in dims)
        first, second = ([leaf.dims[k] for k in dims] + [Dim(), Dim()])[:2]
        if first.axis is None or first.axis not in found:
            continue
        if second.axis is not None and second.within == dims[0]:
            found[second.axis][path] = Owner(begin, end, units[:2], second.degree, grid)
        elif all(leaf.dims[k].axis is None for k in dims[1:]):
            found[first.axis][path] = Owner(begin, end, units[:1], first.degree, grid)
    for axis in symmetry.axes:
        inner = [a.name for a in symmetry.over(axis.name)]
        if not found[axis.name] and (axis.over is not None or not inner):
            raise _silent(axis.name)
    return found


def _try(arch: Architecture, inputs: tuple[Any, ...]) -> None:
    """Move random weights by a random element: what units answer must move along."""
    symmetry, generator = arch.symmetry.compact, torch.Generator().manual_seed(0)
    w = torch.randn(arch.dimension, generator=generator)
    for leaf in arch.leaves:
        if not leaf.learnable:
            w[leaf.span] = w[leaf.span].abs() + 1
    g = symmetry.random(generator=generator, like=w)
    spans = owners(symmetry, arch.module)
    before, after = (answers(arch, spans, x, inputs) for x in (w, symmetry.act(g, w)))
    for name, (degree, z) in before.items():
        axis = symmetry[name]
        if axis.over is None:
            wanted = axis.group.act(g[name], z, dim=-1, degree=degree)
        else:
            inside = axis.group.act(g[name], z.transpose(0, 1), dim=-1, degree=degree)
            over = symmetry[axis.over].group
            wanted = over.act(g[axis.over], inside.transpose(0, 1), dim=-2, degree=0)
        error = (after[name][1] - wanted).abs().max()
        if not error <= tolerance(w.dtype).symmetry * z.abs().max().clamp_min(1):
            raise _silent(name)


def _factors(leaf: Leaf, at: int) -> list[int]:
    """Return the dimensions of a leaf that are one dimension of its parameter."""
    if not leaf.stored:
        return [at]
    groups: list[list[int]] = []
    k = 0
    for size in leaf.stored:
        group, n = [k], leaf.shape[k]
        k += 1
        while n < size or (k < len(leaf.shape) and leaf.shape[k] == 1 and leaf.dims[k].axis):
            n *= leaf.shape[k]
            group.append(k)
            k += 1
        groups.append(group)
    return groups[at]


def _silent(axis: str) -> UnsupportedModuleError:
    return UnsupportedModuleError(
        f"no module's output runs over axis {axis} and moves with it alone, so it has no "
        "activations to match: use an aligner that looks at weights, such as WeightMatching"
    )


def answers(
    arch: Architecture, spans: _Owners, w: Float[Tensor, "*batch D"], inputs: tuple[Any, ...]
) -> _Answers:
    """Run networks on data and return what the units of each axis answer.

    Returns
    -------
    dict
        By axis the degree with which it acts and the answers (*batch, samples, n); for an axis over
        m units (*batch, samples, m, n).

    Examples
    --------
    >>> import symflow
    >>> arch = symflow.mlp([3, 8, 2])
    >>> spans = owners(arch.symmetry.compact, arch.module)
    >>> answers(arch, spans, torch.zeros(5, arch.dimension), (torch.zeros(7, 3),))["h1"][1].shape
    torch.Size([5, 7, 8])
    """
    module = copy.deepcopy(arch.module)
    heard: dict[str, Tensor] = {}
    degrees: dict[str, int] = {}
    run, wanted = module.forward, [axis for axis, paths in spans.items() if paths]

    def listen(owner: nn.Module, path: str) -> None:
        def hook(owner: nn.Module, _: Any, output: Any) -> None:
            for axis in wanted:
                span = spans[axis].get(path)
                if span is None or not isinstance(output, Tensor):
                    continue
                z = output.movedim(1 if isinstance(owner, _CHANNELS_FIRST) else -1, -1)
                degrees[axis] = span.degree
                heard[axis] = span.of(z).movedim(-1, 0).reshape(-1, *span.units)

        owner.register_forward_hook(hook)

    for path in {path for paths in spans.values() for path in paths}:
        listen(module.get_submodule(path), path)

    def forward(*args: Any) -> Tensor:
        heard.clear()
        run(*args)
        for axis in wanted:
            if axis not in heard:
                raise _silent(axis)
        return torch.cat([heard[axis].reshape(-1) for axis in wanted])

    if not wanted:
        return {}
    module.forward = forward
    inputs = tuple(
        x.to(w.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs
    )
    with torch.no_grad():
        flat = replace(arch, module=module).apply(w, *inputs)
    sizes = [heard[axis].shape for axis in wanted]
    parts = flat.split([shape.numel() for shape in sizes], dim=-1)
    return {
        axis: (degrees[axis], part.reshape(*w.shape[:-1], *shape))
        for axis, part, shape in zip(wanted, parts, sizes, strict=True)
    }
