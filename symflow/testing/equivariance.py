"""Laws of what symmetries act on: networks, functions of weights, and fields on weight space."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor, nn

from symflow.arch import Architecture, Symmetry
from symflow.errors import ShapeError
from symflow.groups import Group
from symflow.testing.contracts import matrix, power
from symflow.testing.law import Body, Draws, Law, agree, demand, law
from symflow.testing.networks import generic_weights, weights
from symflow.testing.strategies import element, elements, expand, generator, pick, seeds

# A permuted sum is rounded in another order: a few units more than the table allows for one step.
_ROUNDING = 10.0


# ---------------------------------------------------------------- the symmetry of a network


def symmetry_laws(subject: Architecture | SearchStrategy[Architecture]) -> tuple[Law, ...]:
    """List the laws that the symmetry of an architecture has to obey.

    Parameters
    ----------
    subject
        An architecture, or a strategy for architectures.

    Examples
    --------
    >>> import symflow
    >>> [str(law) for law in symmetry_laws(symflow.mlp([2, 3, 1]))][:3]
    ['function', 'identity', 'inverse']
    """
    drawn = st.just(subject) if isinstance(subject, Architecture) else subject
    return tuple(law(name, drawn, body) for name, body in _SYMMETRY.items())


def check_symmetry(arch: Architecture, *, max_examples: int | None = None) -> None:
    """Check that the network's function survives its symmetry, and that this is a group.

    Parameters
    ----------
    arch
        The architecture.
    max_examples
        How many examples to draw for each law; as many as the active Hypothesis profile says by
        default.

    Raises
    ------
    AssertionError
        Naming the law that is broken, the architecture, and the smallest example found.

    Examples
    --------
    >>> import symflow
    >>> check_symmetry(symflow.mlp([2, 3, 1], "tanh"), max_examples=5)
    """
    for one in symmetry_laws(arch):
        one.check(max_examples)


def random_inputs(arch: Architecture, seed: int, *, dtype: torch.dtype = torch.float64) -> Any:
    """Return inputs of the shapes that the architecture was traced with, normally distributed.

    Examples
    --------
    >>> import symflow
    >>> random_inputs(symflow.mlp([3, 2]), 0)[0].shape
    torch.Size([2, 3])
    """
    g = generator(seed)
    return tuple(
        torch.randn(x.shape, generator=g, dtype=dtype)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for x in arch.inputs
    )


def same_outputs(arch: Architecture, w: Tensor, outputs: Tensor, inputs: Any, what: str) -> None:
    """Demand that outputs are those of the network ``w``, up to rounding.

    Examples
    --------
    >>> import symflow
    >>> arch, w = symflow.mlp([2, 1], "relu"), torch.tensor([1.0, -1.0, 3.0])
    >>> same_outputs(arch, w, torch.tensor([[2.0]]), (torch.tensor([[1.0, 2.0]]),), "outputs")
    """
    wanted = arch.apply(w, *inputs)
    # Sums of large terms may cancel: rounding is relative to the terms.
    terms = arch.apply(w.abs(), *(x.abs() for x in inputs))
    size = float(torch.cat([wanted, terms]).abs().max())
    agree(outputs, wanted, what, factor=_ROUNDING, scale=size)


def _function(arch: Architecture, draw: Draws) -> None:
    w = draw("w", weights(arch))
    g = draw("g", elements(arch.symmetry))
    inputs = random_inputs(arch, draw("input seed", seeds()))
    after = arch.apply(arch.symmetry.act(g, w), *inputs)
    same_outputs(arch, w, after, inputs, "output after a symmetry")


def _identity(arch: Architecture, draw: Draws) -> None:
    w = draw("w", weights(arch))
    agree(arch.symmetry.act(arch.symmetry.identity(like=w), w), w, "e w against w")
    agree(arch.symmetry.act({}, w), w, "the element that names no axis, against the identity")


def _inverse(arch: Architecture, draw: Draws) -> None:
    w, g = draw("w", weights(arch)), draw("g", elements(arch.symmetry))
    back = arch.symmetry.act(arch.symmetry.inverse(g), arch.symmetry.act(g, w))
    agree(back, w, "g^-1 g w against w")


def _homomorphism(arch: Architecture, draw: Draws) -> None:
    symmetry, w = arch.symmetry, draw("w", weights(arch))
    g, h = draw("g", elements(symmetry)), draw("h", elements(symmetry))
    wanted = symmetry.act(g, symmetry.act(h, w))
    agree(symmetry.act(symmetry.compose(g, h), w), wanted, "(g h) w against g (h w)")


def _dense(arch: Architecture, draw: Draws) -> None:
    w, g = draw("w", weights(arch)), draw("g", elements(arch.symmetry))
    moved = arch.symmetry.act(g, w)
    for leaf in arch.leaves:
        x = w[leaf.span].reshape(leaf.shape)
        for k, dim in enumerate(leaf.dims):
            if dim.axis is None:
                continue
            a = power(matrix(arch.symmetry[dim.axis].group, g[dim.axis]), dim.degree)
            x = (x.movedim(k, -1) @ a.mT).movedim(-1, k)
        agree(moved[leaf.span].reshape(leaf.shape), x, f"leaf {leaf.name} against matrices")


def _batch(arch: Architecture, draw: Draws) -> None:
    symmetry, seed = arch.symmetry, draw("seed", seeds())
    g, w = element(symmetry, seed, batch=(3,)), draw("w", generic_weights(arch, batch=(2, 3)))
    i, k = draw("network", st.tuples(st.integers(0, 1), st.integers(0, 2)))
    gk = pick(g, k)
    # Batch dimensions broadcast from the right: elements (3,) meet weights (2, 3, D).
    moved, wanted = symmetry.act(g, w), symmetry.act(gk, w[i, k])
    agree(moved[i, k], wanted, f"element {k} of a batch on network {i, k}")
    one = symmetry.act(gk, w)
    demand(one.shape == w.shape, "one element on a batch changes its shape")
    agree(one[i, k], wanted, "one element on a batch")
    if symmetry.axes:
        agree(symmetry.act(g, w[i, k])[k], wanted, "a batch of elements on one network")


def _leaf_by_leaf(arch: Architecture, draw: Draws) -> None:
    axes = tuple(replace(a, group=_Opaque(a.size, a.group)) for a in arch.axes)
    opaque = replace(arch.symmetry, axes=axes)
    seed, w = draw("seed", seeds()), draw("w", generic_weights(arch, batch=(2, 3)))
    batch = draw("batch", st.sampled_from(((), (3,), (2, 3))))
    g = element(arch.symmetry, seed, batch=batch)
    agree(opaque.act(g, w), arch.symmetry.act(g, w), "leaf by leaf, against compiled")


def _precision(arch: Architecture, draw: Draws) -> None:
    symmetry, seed, w = arch.symmetry, draw("seed", seeds()), draw("w", weights(arch))
    moved = symmetry.act(element(symmetry, seed, dtype=torch.float32), w.float())
    demand(moved.dtype == torch.float32, f"float32 weights become {moved.dtype}")
    agree(moved, symmetry.act(element(symmetry, seed), w), "float32 against float64")


def _purity(arch: Architecture, draw: Draws) -> None:
    symmetry, g, w = arch.symmetry, draw("g", elements(arch.symmetry)), draw("w", weights(arch))
    before = w.clone()
    for h in (g, expand(g, (2,))):
        symmetry.act(h, w)
    demand(torch.equal(w, before), "acting changes the weights it is given")


def _gradient(arch: Architecture, draw: Draws) -> None:
    g, w = draw("g", elements(arch.symmetry)), draw("w", weights(arch)).requires_grad_()
    torch.autograd.gradcheck(lambda v: arch.symmetry.act(g, v), (w,), fast_mode=True)


def _shapes(arch: Architecture, draw: Draws) -> None:
    g = draw("g", elements(arch.symmetry))
    short = torch.zeros(arch.dimension + 1, dtype=torch.float64)
    for h, w in ((g, short), ({**g, "no such axis": torch.ones(1)}, short[1:])):
        try:
            arch.symmetry.act(h, w)
        except ShapeError:
            continue
        raise AssertionError("a wrong size or an unknown axis is taken without a ShapeError")


_SYMMETRY: dict[str, Body] = {
    "function": _function,
    "identity": _identity,
    "inverse": _inverse,
    "homomorphism": _homomorphism,
    "dense": _dense,
    "batch": _batch,
    "leaf by leaf": _leaf_by_leaf,
    "precision": _precision,
    "purity": _purity,
    "gradient": _gradient,
    "shapes": _shapes,
}


@final
@dataclass(frozen=True)
class _Opaque(Group[Any]):
    """A group that nobody recognises as monomial, to force the general path."""

    size: int
    group: Group[Any]

    def identity(self, *, like: Tensor) -> Any:
        return self.group.identity(like=like)

    def compose(self, g: Any, h: Any) -> Any:
        return self.group.compose(g, h)

    def inverse(self, g: Any) -> Any:
        return self.group.inverse(g)

    def random(
        self, *, generator: torch.Generator, like: Tensor, batch: tuple[int, ...] = ()
    ) -> Any:
        return self.group.random(generator=generator, like=like, batch=batch)

    def act(self, g: Any, x: Tensor, *, dim: int = -1, degree: int = 1) -> Tensor:
        return self.group.act(g, x, dim=dim, degree=degree)


# ---------------------------------------------------------------- functions and fields


def check_invariant(
    function: Callable[[Tensor], Tensor],
    arch: Architecture,
    *,
    symmetry: Symmetry | None = None,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Check that a function of weights does not change along orbits.

    Parameters
    ----------
    function
        Takes flat weights (3, D), returns a tensor.
    arch
        The architecture.
    symmetry
        The group; all symmetries of the architecture by default.
    dtype
        Precision of the weights.

    Raises
    ------
    AssertionError
        With the smallest example found.

    Examples
    --------
    >>> import symflow
    >>> arch = symflow.mlp([2, 3, 1])
    >>> check_invariant(lambda w: arch.apply(w, torch.ones(4, 2, dtype=w.dtype)), arch)
    """
    group = arch.symmetry if symmetry is None else symmetry

    def invariant(arch: Architecture, draw: Draws) -> None:
        w = draw("w", generic_weights(arch, batch=(3,), dtype=dtype))
        k = draw("k", elements(group, batch=(3,), dtype=dtype))
        with torch.no_grad():
            before, after = function(w), function(group.act(k, w))
        agree(after, before, "f(k w) against f(w)", factor=_ROUNDING)

    law("invariant", st.just(arch), invariant).check()


def check_equivariant(
    field: Callable[[Tensor, Tensor], Tensor],
    arch: Architecture,
    *,
    symmetry: Symmetry | None = None,
    extra: int = 0,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Check that a field commutes with a symmetry, v(k x, t) = k v(x, t).

    Parameters
    ----------
    field
        Takes points (3, D + extra) and times (3,), returns vectors (3, D + extra). A module is put
        into evaluation mode and must have parameters of ``dtype``.
    arch
        The architecture.
    symmetry
        The group; the compact symmetries of the architecture by default. For a
        :class:`symflow.nn.VectorField` pass ``field.symmetry``.
    extra
        Number of coordinates behind the weights that no symmetry moves.
    dtype
        Precision of points and times.

    Raises
    ------
    AssertionError
        With the smallest example found.

    Examples
    --------
    >>> import symflow
    >>> check_equivariant(lambda x, t: t[:, None] * x, symflow.mlp([2, 3, 1]))
    """
    group = arch.symmetry.compact if symmetry is None else symmetry

    def act(k: Any, x: Tensor) -> Tensor:
        moved = group.act(k, x[..., : arch.dimension])
        return torch.cat([moved, x[..., arch.dimension :]], dim=-1)

    def equivariant(arch: Architecture, draw: Draws) -> None:
        w = draw("w", generic_weights(arch, batch=(3,), dtype=dtype))
        k = draw("k", elements(group, batch=(3,), dtype=dtype))
        times = draw("t", st.lists(st.sampled_from((0.0, 0.25, 1.0)), min_size=3, max_size=3))
        more = torch.randn(3, extra, generator=generator(draw("extra seed", seeds())))
        x, t = torch.cat([w, more.to(dtype)], dim=-1), torch.tensor(times, dtype=dtype)
        with torch.no_grad():
            before, after = field(x, t), field(act(k, x), t)
        demand(before.shape == x.shape, f"the field returns shape {tuple(before.shape)}")
        agree(after, act(k, before), "v(k x, t) against k v(x, t)", factor=_ROUNDING)

    if isinstance(field, nn.Module):
        field.eval()
    law("equivariant", st.just(arch), equivariant).check()
