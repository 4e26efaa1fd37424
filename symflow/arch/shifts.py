"""Translations of weights: what can be added to a leaf without a change of the function.

A softmax does not see a constant added to all its inputs, nor a norm that centres what is added to
all units of its stream; so a bias of keys, the mean over the classes of a last layer, and the mean
over units of whatever writes to such a stream are free. These symmetries are affine: vectors V that
are added, not matrices that multiply.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.arch.architecture import Architecture
from symflow.arch.layout import Leaf
from symflow.arch.verify import Trial, trials
from symflow.errors import ShapeError, SymmetryError

_FUNCTION, _PROBABILITIES = "function", "probabilities"


@final
@dataclass(frozen=True)
class Shift:
    """What may be added to one leaf.

    Attributes
    ----------
    leaf
        Its name.
    dim
        The same number may be added at all places along this dimension, another one for each place
        of the others. None: anything may be added, the outputs do not depend on the leaf.

    Examples
    --------
    >>> str(Shift("2.bias", 0))
    '2.bias: the same along dimension 0'
    """

    leaf: str
    dim: int | None = None

    def __str__(self) -> str:
        added = "any vector" if self.dim is None else f"the same along dimension {self.dim}"
        return f"{self.leaf}: {added}"


@final
@dataclass(frozen=True, eq=False)
class Shifts:
    """The group of all sums of some shifts: a linear space V of vectors that are added to weights.

    Made by :meth:`find`, or :meth:`of` claims; both try them on the network.

    Attributes
    ----------
    arch
        The architecture.
    shifts
        Generators of V, at most one for each dimension of a leaf.
    preserves
        ``"function"``, or ``"probabilities"``: the softmax of the outputs over their last dimension
        stays the same, the outputs need not.

    Examples
    --------
    >>> import symflow
    >>> arch = symflow.mlp([3, 4, 2])
    >>> Shifts.find(arch).dimension, Shifts.find(arch, preserves="probabilities").dimension
    (0, 5)
    """

    arch: Architecture
    shifts: tuple[Shift, ...]
    preserves: str = _FUNCTION

    @staticmethod
    def find(arch: Architecture, *, preserves: str = _FUNCTION) -> "Shifts":
        """Try all shifts of each parameter on the network and keep what it does not show.

        Costs a dozen forward passes in float64 for each parameter and each of its dimensions. A
        shift that does not go with the symmetry of ``arch`` is left out (scales move what is added
        to units they act on).

        Parameters
        ----------
        arch
            The architecture.
        preserves
            ``"function"``, or ``"probabilities"`` for classifiers whose last dimension of outputs
            holds logits.

        Raises
        ------
        ShapeError
            If ``preserves`` is neither.
        """
        _require_known(preserves)
        found: list[Shift] = []
        seen = list(trials(arch.module, arch.inputs, arch.leaves))
        for leaf in arch.leaves:
            if not leaf.learnable:
                continue
            dims = [k for k, n in enumerate(leaf.shape) if n > 1]
            if _holds(arch, Shift(leaf.name), preserves, seen):
                found.append(Shift(leaf.name))
                continue
            claims = [Shift(leaf.name, k) for k in dims]
            found += [one for one in claims if _holds(arch, one, preserves, seen)]
        return Shifts(arch, tuple(x for x in found if _fits(arch, x)), preserves)

    @staticmethod
    def of(arch: Architecture, shifts: Sequence[Shift], *, preserves: str = _FUNCTION) -> "Shifts":
        """Try claimed shifts on the network.

        Raises
        ------
        LeafError
            If a leaf is unknown.
        ShapeError
            If a leaf has no such dimension, or ``preserves`` is unknown.
        SymmetryError
            If a shift changes what is to be preserved, or the symmetry of ``arch`` moves what it
            adds somewhere else.

        Examples
        --------
        >>> import symflow
        >>> arch = symflow.mlp([3, 4, 2])
        >>> Shifts.of(arch, [Shift("2.weight", 0)], preserves="probabilities").dimension
        4
        """
        _require_known(preserves)
        seen = list(trials(arch.module, arch.inputs, arch.leaves))
        for one in shifts:
            shape = arch.leaf(one.leaf).shape
            if one.dim is not None and not 0 <= one.dim < len(shape):
                raise ShapeError(f"leaf {one.leaf!r} has shape {shape}, no dimension {one.dim}")
            if not _holds(arch, one, preserves, seen):
                raise SymmetryError(f"{one} changes the {preserves} of the network: no symmetry")
            if not _fits(arch, one):
                raise SymmetryError(
                    f"{one} is a symmetry, but the groups of the architecture turn what it "
                    "adds into something else: choose smaller ones with arch.with_groups"
                )
        return Shifts(arch, tuple(shifts), preserves)

    @property
    def dimension(self) -> int:
        """Dimension of V."""
        return sum(_size(leaf, dims) for leaf, dims in self._by_leaf)

    def random(
        self, *, generator: torch.Generator, like: Tensor, batch: tuple[int, ...] = ()
    ) -> Float[Tensor, "*batch D"]:
        """Draw vectors of V: what is left of normal ones."""
        normal = torch.randn(*batch, self.arch.dimension, generator=generator).to(like)
        return normal - self.centre(normal)

    def centre(self, w: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """Return the shortest weights among all that w can be shifted to: w less its part in V.

        Linear, idempotent, and it commutes with the symmetry of the architecture. O(D).

        Examples
        --------
        >>> import symflow
        >>> arch = symflow.mlp([1, 1, 2])
        >>> shifts = Shifts.find(arch, preserves="probabilities")
        >>> shifts.centre(torch.tensor([1.0, 1.0, 5.0, 3.0, 1.0, 2.0]))
        tensor([ 1.0000,  1.0000,  1.0000, -1.0000, -0.5000,  0.5000])
        """
        pieces = list(w.split([leaf.size for leaf in self.arch.leaves], dim=-1))
        number = {leaf.name: k for k, leaf in enumerate(self.arch.leaves)}
        for leaf, dims in self._by_leaf:
            k = number[leaf.name]
            pieces[k] = _centred(leaf, dims, pieces[k])
        return torch.cat(pieces, dim=-1)

    @cached_property
    def _by_leaf(self) -> list[tuple[Leaf, list[int | None]]]:
        names = dict.fromkeys(x.leaf for x in self.shifts)
        return [
            (self.arch.leaf(name), [x.dim for x in self.shifts if x.leaf == name]) for name in names
        ]

    def __str__(self) -> str:
        return "\n".join(map(str, self.shifts)) or "nothing can be added"


def _require_known(preserves: str) -> None:
    if preserves not in (_FUNCTION, _PROBABILITIES):
        raise ShapeError(
            f"preserves must be {_FUNCTION!r} or {_PROBABILITIES!r}, got {preserves!r}"
        )


def _centred(leaf: Leaf, dims: list[int | None], x: Tensor) -> Tensor:
    """Take the mean along each dimension from a leaf (*batch, size); means commute."""
    if None in dims:
        return torch.zeros_like(x)
    y = x.reshape(*x.shape[:-1], *leaf.shape)
    for dim in dims:
        y = y - y.mean(dim - len(leaf.shape) if dim is not None else None, keepdim=True)
    return y.flatten(x.ndim - 1)


def _size(leaf: Leaf, dims: list[int | None]) -> int:
    """Dimension of what may be added: all that has not mean zero along each dimension."""
    if None in dims:
        return leaf.size
    left = 1
    for k, n in enumerate(leaf.shape):
        left *= n - 1 if k in dims else n
    return leaf.size - left


def _holds(arch: Architecture, one: Shift, preserves: str, seen: Sequence[Trial]) -> bool:
    """Whether a shift changes nothing that is to be preserved, on any of the networks tried."""
    alone = Shifts(arch, (one,))
    look = None if preserves == _FUNCTION else _probabilities
    for trial in seen:
        v = alone.random(generator=trial.generator, like=trial.w)
        if not trial.change(trial.w + v, look) <= trial.allowed:
            return False
    return bool(seen)


def _probabilities(x: Tensor) -> Tensor:
    return x.softmax(-1)


def _fits(arch: Architecture, one: Shift) -> bool:
    """Whether centring commutes with the groups: they keep V, and what is orthogonal to it."""
    leaf = arch.leaf(one.leaf)
    if one.dim is None or leaf.dims[one.dim].axis is None:
        return True
    alone, generator = Shifts(arch, (one,)), torch.Generator().manual_seed(0)
    w = torch.randn(arch.dimension, generator=generator, dtype=torch.float64)
    g = arch.symmetry.random(generator=generator, like=w)
    a, b = alone.centre(arch.symmetry.act(g, w)), arch.symmetry.act(g, alone.centre(w))
    return bool(torch.allclose(a, b))
