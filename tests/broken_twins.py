"""Broken twins: for every law of the test kit something that breaks it, by the law's name."""

import operator
from dataclasses import dataclass, replace

import torch

import symflow
from symflow.align import Aligner, Alignment, Status, WeightMatching, objective
from symflow.arch import Symmetry
from symflow.groups import (
    CompactGroup,
    DiagonalGroup,
    GeneralLinear,
    Permutation,
    PositiveScale,
    Sign,
    Trivial,
    assignment,
)
from symflow.quotient import Geodesic
from symflow.sections import FlatSection, SphereSection
from symflow.testing.strategies import expand


def twin(base, *args, **members):
    """Make a value of a class like ``base``, with some members replaced."""
    return type(f"Broken{base.__name__}", (base,), members)(*args)


# ---------------------------------------------------------------- groups


def backwards(self, g, h):
    return Permutation.compose(self, h, g)


def degree_blind(self, g, x, *, dim=-1, degree=1):
    return PositiveScale.act(self, g, x, dim=dim)


def acting(change):
    """An action of signs that ends with a change of the result, or of what it is given."""

    def act(self, g, x, *, dim=-1, degree=1):
        return change(Sign.act(self, g, x, dim=dim, degree=degree), x)

    return act


def unchecked(self, g, x, *, dim=-1, degree=1):
    return x * g.reshape(*g.shape, *(1,) * (x.ndim - 1 - dim % x.ndim)) ** degree


def first_only(self, c):
    return assignment(c.reshape(-1, self.size, self.size)[0]).expand(c.shape[:-1])


def balance_times(factor):
    return lambda self, energy: factor * PositiveScale.balance(self, energy)


def no_balance(self, energy):
    return torch.ones_like(next(iter(energy.values())))


def global_scales(self, *, generator, like, batch=()):
    return torch.randn(*batch, self.size).exp().to(like)


def no_scales(self, *, generator, like, batch=()):
    return torch.zeros(*batch, self.size).to(like)


class Posing(DiagonalGroup, CompactGroup):
    """Positive scales that pose as a compact group."""

    inverse, random = PositiveScale.inverse, PositiveScale.random
    nearest, unit = Trivial.nearest, Trivial.unit

    def __init__(self, size):
        self.size = size


GROUPS = {
    "value": twin(Sign, 3, __setattr__=object.__setattr__),
    "identity": twin(Sign, 3, identity=lambda self, *, like: -torch.ones(3).to(like)),
    "inverse": twin(Permutation, 3, inverse=lambda self, g: g),
    "associativity": twin(
        Permutation, 3, compose=lambda self, g, h: Permutation(3).compose(g, self.inverse(h))
    ),
    "homomorphism": twin(Permutation, 3, compose=backwards),
    "linear": twin(Sign, 3, act=acting(lambda y, x: y.abs())),
    "degree": twin(PositiveScale, 3, act=degree_blind),
    "pairing": twin(PositiveScale, 3, act=degree_blind),
    "batch": twin(Permutation, 3, nearest=first_only),
    "precision": twin(Sign, 3, act=acting(lambda y, x: y.double())),
    "generator": twin(PositiveScale, 3, random=global_scales),
    "random": twin(PositiveScale, 3, random=no_scales),
    "purity": twin(Sign, 3, act=acting(lambda y, x: x.copy_(y))),
    "gradient": twin(Sign, 3, act=acting(lambda y, x: y.detach())),
    "shapes": twin(Sign, 3, act=unchecked),
    "isometry": Posing(3),
    "nearest": twin(Permutation, 3, nearest=lambda self, c: torch.arange(3).expand(c.shape[:-1])),
    "recovery": twin(Sign, 3, nearest=lambda self, c: -Sign.nearest(self, c)),
    "support": twin(Sign, 3, support=lambda self, c: 2 * Sign.support(self, c)),
    "mixed degrees": twin(Sign, 3, nearest_by_degree=CompactGroup.nearest_by_degree),
    "balance": twin(PositiveScale, 3, balance=balance_times(1.1)),
    "balance again": twin(PositiveScale, 3, balance=balance_times(2)),
    "balance anywhere": twin(PositiveScale, 3, balance=no_balance),
    "residual": twin(PositiveScale, 3, residual=property(lambda self: Trivial(4))),
    "stretch": twin(PositiveScale, 3, noncompact=lambda self, g: 2 * g),
    "factors": twin(GeneralLinear, 2, balance_factors=lambda self, up, down: (up, down)),
}


# ---------------------------------------------------------------- networks


def moving(change):
    """A symmetry whose action ends with a change of the result, or of what it is given."""
    return {"act": lambda self, g, w: change(Symmetry.act(self, g, w), w)}


def forgiving(self, g, w):
    known = {axis.name: g[axis.name] for axis in self.axes}
    return Symmetry.act(self, known, w[..., : self._dimension])


SYMMETRIES = {
    "identity": moving(lambda moved, w: moved + 1),
    "inverse": {"inverse": lambda self, g: g},
    "homomorphism": {"compose": lambda self, g, h: Symmetry.compose(self, h, g)},
    "dense": {"act": lambda self, g, w: Symmetry.act(self, self.inverse(g) if g else g, w)},
    "batch": moving(lambda moved, w: moved.flip(0) if w.ndim > 1 else moved),
    "leaf by leaf": {"_act_by_leaf": lambda self, g, w: w.expand(2, 3, -1)},
    "precision": moving(lambda moved, w: moved.double()),
    "purity": moving(lambda moved, w: w.detach().copy_(moved)),
    "gradient": moving(lambda moved, w: moved.detach()),
    "shapes": {"act": forgiving},
}


def with_symmetry(arch, **members):
    broken = twin(Symmetry, arch.leaves, arch.axes, arch.symmetry.fixed, **members)
    return replace(arch, symmetry=broken)


def with_false_signs():
    """Signs on an axis behind which a GELU stands, put there past the gate."""
    arch = symflow.mlp([2, 3, 3, 1], "gelu")
    axes = [replace(axis, group=axis.group @ Sign(axis.size)) for axis in arch.axes]
    return replace(arch, symmetry=replace(arch.symmetry, axes=tuple(axes)))


# ---------------------------------------------------------------- sections


def splitting(change):
    """A section without scales whose point is changed in the end."""
    return {"split": lambda self, w: (change(w), w[..., :0])}


SECTIONS = {
    "point": lambda arch: twin(
        SphereSection, arch, split=lambda self, w: (2 * SphereSection.split(self, w)[0], w[..., :0])
    ),
    "idempotent": lambda arch: flat(**splitting(lambda w: 2 * w)),
    "orbit": lambda arch: FlatSection(arch, isometric_only=False),
    "covariant": lambda arch: flat(**splitting(lambda w: w * torch.arange(w.shape[-1]))),
    "function": lambda arch: flat(**splitting(lambda w: w.abs())),
    "join": lambda arch: forgetful(arch),
    "batch": lambda arch: flat(**splitting(lambda w: w.flip(0))),
    "precision": lambda arch: flat(**splitting(lambda w: w.double())),
}


def flat(**members):
    return twin(FlatSection, symflow.mlp([2, 3, 1], "tanh"), **members)


def forgetful(arch):
    section = twin(SphereSection, arch, join=lambda self, x, removed: x)
    section._last = SphereSection(arch, preserves="argmax")._last
    return section


# ---------------------------------------------------------------- aligners


class Lazy(Aligner):
    """Leaves everything as it is, and says that this is the best."""

    def __call__(self, symmetry, w0, w1):
        batch = torch.broadcast_shapes(w0.shape[:-1], w1.shape[:-1])
        element = expand(symmetry.identity(like=w1), batch)
        moved = w1.expand(*batch, w1.shape[-1])
        value = objective(symmetry, w0, moved)
        return Alignment(element, moved, value, value[None], Status.CONVERGED, 0.0)


class FirstPair(Aligner):
    """Solves the first pair of a batch, and takes its element for all."""

    def __call__(self, symmetry, w0, w1):
        found = Lazy()(symmetry, w0, w1)
        first = [w.reshape(-1, w.shape[-1])[0] for w in (w0, w1)]
        element = WeightMatching()(symmetry, *first).element
        element = expand(element, found.objective.shape)
        return replace(found, element=element, weights=symmetry.act(element, w1))


@dataclass(frozen=True)
class Misreported(Aligner):
    """Weight matching, with a field of the result replaced."""

    field: str
    change: object

    def __call__(self, symmetry, w0, w1):
        found = WeightMatching()(symmetry, w0, w1)
        return replace(found, **{self.field: self.change(getattr(found, self.field))})


ALIGNERS = {
    "result": Misreported("objective", operator.neg),
    "ascent": Misreported("history", lambda h: torch.cat([h + 1, h])),
    "planted": Lazy(),
    "orbit": WeightMatching(("identity",)),
    "fixed point": Lazy(),
    "batch": FirstPair(),
    "refusal": Lazy(),
}


# ---------------------------------------------------------------- quotients


def broken_quotient(activation="relu", section="sphere", **members):
    arch = symflow.mlp([2, 3, 1], activation)
    aligner = members.pop("aligner", None)
    cls = type("BrokenQuotient", (symflow.Quotient,), members)
    return cls(arch, section, aligner=aligner)


def with_path(**members):
    """A quotient whose geodesics have some members replaced."""

    def geodesic(self, w0, w1):
        path = symflow.Quotient.geodesic(self, w0, w1)
        return twin(Geodesic, path.start, path.direction, path.alignment, path.section, **members)

    return broken_quotient(geodesic=geodesic)


def accelerated(self, t, **options):
    return Geodesic.__call__(self, t**2, **options)


WRONG_CURVES = {
    "velocity against the derivative": {"velocity": lambda self, t: Geodesic.velocity(self, 0 * t)},
    "speed against the length": {
        "__call__": accelerated,
        "velocity": lambda self, t: 2 * t * Geodesic.velocity(self, t**2),
    },
}


def stretched(self, w0, w1):
    path = symflow.Quotient.geodesic(self, w0, w1)
    return replace(path, direction=2 * path.direction)


def shuffled(self, w0, w1):
    return symflow.Quotient.geodesic(self, w0.roll(1, 0) if w0.ndim > 1 else w0, w1)


def one_sided(self, w0, w1):
    return symflow.Quotient.distance(self, w0, w1) * (1 + w0.norm(dim=-1))


def no_certificate(self, w0, w1):
    upper = self.distance(w0, w1)
    return upper, upper


def straight(self, w, v):
    return self.project(w) + v


def deep(aligner):
    return symflow.Quotient(symflow.mlp([2, 4, 4, 2], "gelu"), aligner=aligner)


QUOTIENTS = {
    "zero": broken_quotient("tanh", None, aligner=Lazy()),
    "invariant": deep(WeightMatching(("identity",))),
    "symmetric": broken_quotient(distance=one_sided),
    "shortest": broken_quotient("tanh", None, aligner=Lazy()),
    "bracket": broken_quotient("tanh", None, aligner=Lazy(), distance_bounds=no_certificate),
    "batch": broken_quotient(geodesic=shuffled),
    "geodesic ends": broken_quotient(geodesic=stretched),
    "curve": with_path(velocity=lambda self, t: Geodesic.velocity(self, 0 * t)),
    "exp after log": broken_quotient(exp=straight),
}
