"""The contract of a symmetry group that acts on one axis of a network's weights.

A group value (such as ``Permutation(16)``) is a frozen description; its *elements* are tensors, or
tuples of tensors, with any batch dimensions in front. An element stands for an invertible matrix A.
It acts along one dimension of a leaf with a **degree**: degree +1 multiplies by A, degree -1 by the
inverse transpose of A (so that a product over the axis does not change), and a diagonal A acts with
any integer degree p by its p-th power.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.errors import ShapeError

E = TypeVar("E")


def along(v: Tensor, x: Tensor, dim: int) -> Tensor:
    """View coordinates ``v`` (*batch, n) so that they broadcast along ``dim`` of ``x``.

    The batch dimensions of ``v`` are matched with the *leading* dimensions of ``x``; ``dim`` counts
    from the end.

    Raises
    ------
    ShapeError
        If ``dim`` is not negative, the sizes differ, or a batch dimension would meet ``dim``.

    Examples
    --------
    >>> along(torch.ones(5, 3), torch.ones(5, 3, 2), -2).shape
    torch.Size([5, 3, 1])
    """
    if dim >= 0:
        raise ShapeError(f"dim must be negative (counted from the end), got {dim}")
    batch = v.ndim - 1
    inner = x.ndim + dim - batch
    if inner < 0:
        raise ShapeError(
            f"the element has batch shape {tuple(v.shape[:-1])}, but the tensor of shape "
            f"{tuple(x.shape)} has no room for it before dim {dim}: add batch dimensions in front"
        )
    if x.shape[dim] != v.shape[-1]:
        raise ShapeError(
            f"the group acts on size {v.shape[-1]}, but dim {dim} of the tensor of shape "
            f"{tuple(x.shape)} has size {x.shape[dim]}"
        )
    if any(1 not in (m, n) and m != n for m, n in zip(v.shape[:-1], x.shape, strict=False)):
        raise ShapeError(
            f"the element has batch shape {tuple(v.shape[:-1])}, which does not broadcast with the "
            f"leading dimensions of the tensor of shape {tuple(x.shape)}"
        )
    return v.reshape(*v.shape[:-1], *(1,) * inner, v.shape[-1], *(1,) * (-dim - 1))


def map_element(function: Callable[..., Tensor], g: Any, *others: Any) -> Any:
    """Apply a function to every tensor of an element (a tensor, or nested tuples of them).

    Parameters
    ----------
    function
        Takes one tensor of each element.
    g, *others
        Elements of the same group.

    Examples
    --------
    >>> map_element(torch.add, (torch.zeros(1), torch.ones(1)), (torch.ones(1), torch.ones(1)))
    (tensor([1.]), tensor([2.]))
    """
    if isinstance(g, tuple):
        return tuple(map_element(function, *parts) for parts in zip(g, *others, strict=True))
    return function(g, *others)


def reorder(g: Any, index: Tensor) -> Any:
    """Pick elements by an index (*batch, n) of their last batch dimension.

    Examples
    --------
    >>> reorder(torch.tensor([[1.0], [2.0]]), torch.tensor([1, 0]))
    tensor([[2.],
            [1.]])
    """
    return map_element(partial(_picked, index), g)


def repeated(g: Any, n: int) -> Any:
    """Put a batch dimension with n copies in front of an element.

    Examples
    --------
    >>> repeated(torch.tensor([1, 0]), 2)
    tensor([[1, 0],
            [1, 0]])
    """
    return map_element(partial(_copies, n), g)


def _copies(n: int, part: Tensor) -> Tensor:
    return part.expand(n, *part.shape).clone()


def _picked(index: Tensor, part: Tensor) -> Tensor:
    batch = index.ndim - 1
    lead = torch.broadcast_shapes(part.shape[:batch], index.shape[:-1])
    at = index.expand(*lead, -1).reshape(*lead, -1, *(1,) * (part.ndim - index.ndim))
    return torch.take_along_dim(part.expand(*lead, *part.shape[batch:]), at, batch)


class Group(ABC, Generic[E]):
    """A group that acts linearly on an axis of ``size`` coordinates.

    Subclasses are ``@final @dataclass(frozen=True)`` and derive from :class:`CompactGroup` or
    :class:`NoncompactGroup`; what a group can do is what its base class promises.
    """

    size: int

    @abstractmethod
    def identity(self, *, like: Tensor) -> E:
        """Return the neutral element (no batch), on the device and in the dtype of ``like``."""

    @abstractmethod
    def compose(self, g: E, h: E) -> E:
        """Return the element that acts as ``h`` first, then ``g``."""

    @abstractmethod
    def inverse(self, g: E) -> E:
        """Return the element that undoes ``g``."""

    @abstractmethod
    def random(self, *, generator: torch.Generator, like: Tensor, batch: tuple[int, ...] = ()) -> E:
        """Draw elements: from the Haar measure if compact, else from around the identity."""

    @abstractmethod
    def act(self, g: E, x: Tensor, *, dim: int = -1, degree: int = 1) -> Tensor:
        """Multiply ``x`` along ``dim`` (negative) by A (degree 1), A^-T (-1) or A^p (diagonal)."""

    def matrix(self, g: E, *, like: Tensor) -> Float[Tensor, "*batch n n"]:
        """Return A itself, of shape (*batch, n, n); for tests and small sizes: O(n^2) memory.

        Examples
        --------
        >>> from symflow import Permutation
        >>> Permutation(2).matrix(torch.tensor([1, 0]), like=torch.zeros(1))
        tensor([[0., 1.],
                [1., 0.]])
        """
        batch = self.batch_shape(g)
        eye = torch.eye(self.size, dtype=like.dtype, device=like.device)
        return self.act(g, eye.expand(*batch, self.size, self.size), dim=-2)

    def batch_shape(self, g: E) -> torch.Size:
        """Return the batch dimensions of an element: what it has in front of an unbatched one.

        Examples
        --------
        >>> from symflow import Permutation, Sign
        >>> (Permutation(2) @ Sign(2)).batch_shape((torch.zeros(5, 2), torch.zeros(5, 2)))
        torch.Size([5])
        """
        part: Any = g
        single: Any = self.identity(like=torch.zeros(()))
        while isinstance(part, tuple):
            part, single = part[0], single[0]
        return part.shape[: part.ndim - single.ndim]

    @property
    def dimension(self) -> int:
        """Dimension as a manifold: 0 for finite groups, and for what does not say.

        Examples
        --------
        >>> from symflow.groups import GeneralLinear, Permutation, PositiveScale
        >>> (Permutation(5) @ PositiveScale(5)).dimension, GeneralLinear(3).dimension
        (5, 9)
        """
        return 0

    @property
    def log_components(self) -> float:
        """Natural logarithm of the number of connected components: of elements, for finite groups.

        Raises
        ------
        ShapeError
            If the group does not say.

        Examples
        --------
        >>> import math
        >>> from symflow.groups import Permutation, Sign
        >>> round(math.exp((Permutation(3) @ Sign(3)).log_components))
        48
        """
        raise ShapeError(
            f"the number of elements of {self} is not known: give its class a property "
            "log_components"
        )

    def __matmul__(self, inner: "Group[Any]") -> "Group[Any]":
        """Return ``A @ B``, all products a b (semidirect where A permutes B's coordinates)."""
        from symflow.groups.product import product

        return product(self, inner)


class CompactGroup(Group[E]):
    """A group that acts by isometries, and over which a linear function can be maximised."""

    @abstractmethod
    def nearest(self, c: Float[Tensor, "*batch n n"]) -> E:
        """Return the element whose matrix A maximises <A, c>: the one oracle aligners need."""

    def support(self, c: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch"]:
        """Return the greatest <A, c> over the group (override it where that is cheaper).

        Examples
        --------
        >>> from symflow import Sign
        >>> Sign(2).support(torch.tensor([[-1.0, 9.0], [9.0, 2.0]]))
        tensor(3.)
        """
        return (self.matrix(self.nearest(c), like=c) * c).sum((-2, -1))

    def nearest_by_degree(self, costs: Mapping[int, Float[Tensor, "*batch n n"]]) -> E:
        """Maximise the sum over degrees p of <A^(p), c_p>, A^(p) being how degree p acts.

        The default serves groups for which each degree acts by A itself (orthogonal matrices with
        degrees +1 and -1, permutations with any). Groups where even degrees differ override it.
        """
        return self.nearest(torch.stack(tuple(costs.values())).sum(0))

    def support_by_degree(
        self, costs: Mapping[int, Float[Tensor, "*batch n n"]]
    ) -> Float[Tensor, "*batch"]:
        """Return the maximum that :meth:`nearest_by_degree` attains."""
        return self.support(torch.stack(tuple(costs.values())).sum(0))


class NoncompactGroup(Group[E]):
    """A group with unbounded orbits: a section picks one point of each before any measuring."""

    @property
    def dimension(self) -> int:
        """Dimension as a manifold."""
        raise ShapeError(
            f"the dimension of {self} is not known: give its class a property dimension"
        )

    @property
    @abstractmethod
    def residual(self) -> CompactGroup[Any]:
        """The compact group that still acts on the balanced section."""


class ScalingGroup(NoncompactGroup[E]):
    """A non-compact group that stretches each coordinate: a positive scale, and a compact rest."""

    @abstractmethod
    def balance(self, energy: Mapping[int, Float[Tensor, "*batch n"]]) -> E:
        r"""Return the element of least norm, :math:`\min_s \sum_p \sum_i s_i^{2p} e_{p,i}`.

        Parameters
        ----------
        energy
            For each degree p, the squared norm of what each coordinate carries with that degree.

        Notes
        -----
        Where an orbit is not closed (one side is zero) there is no minimum; the element returned is
        the identity on those coordinates.
        """

    @abstractmethod
    def noncompact(self, g: E) -> Tensor:
        """Return the positive scales (*batch, n) that ``g`` applies, without its compact part."""
