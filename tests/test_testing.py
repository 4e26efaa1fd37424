"""The kit's own tests: a broken twin for every law must be caught, and the message must name it."""

from dataclasses import dataclass

import pytest
import torch
from broken_twins import (
    ALIGNERS,
    GROUPS,
    QUOTIENTS,
    SECTIONS,
    SYMMETRIES,
    WRONG_CURVES,
    Lazy,
    Posing,
    backwards,
    broken_quotient,
    flat,
    splitting,
    twin,
    with_false_signs,
    with_path,
    with_symmetry,
)
from hypothesis import find, settings

import symflow
from symflow.align import WeightMatching
from symflow.groups import DiagonalGroup, GeneralLinear, Group, Permutation, PositiveScale, Sign
from symflow.sections import FlatSection, Section
from symflow.testing import (
    aligner_laws,
    architectures,
    check_aligner,
    check_equivariant,
    check_group,
    check_invariant,
    check_quotient,
    check_section,
    check_symmetry,
    concrete_classes,
    elements,
    laws,
    quotient_laws,
    section_laws,
    symmetry_laws,
    weights,
)
from symflow.testing.strategies import values

pytestmark = pytest.mark.usefixtures("unshrunk")


@pytest.fixture
def shrunk(unshrunk):
    """Shrink after all, where the smallest example is the question."""
    settings.register_profile("shrunk", max_examples=50, derandomize=True, deadline=None)
    settings.load_profile("shrunk")
    yield
    settings.load_profile("unshrunk")


def assert_caught(found, name):
    """The law of that name, and no other error, names itself."""
    (broken,) = [law for law in found if law.name == name]
    with pytest.raises(AssertionError, match=f"^law '{name}' is broken by "):
        broken.check()


# ---------------------------------------------------------------- groups
@pytest.mark.parametrize("name", GROUPS)
def test_broken_groups_are_caught(name):
    assert_caught(laws(GROUPS[name]), name)


def test_every_law_of_groups_has_a_twin():
    names = {law.name for cls in (Sign, PositiveScale, GeneralLinear) for law in laws(cls)}
    assert names == set(GROUPS)


@pytest.mark.usefixtures("shrunk")
def test_the_failure_shows_the_smallest_example():
    """Two swaps commute in S_1 and S_2, so the smallest group that composes backwards is S_3."""
    broken = type("Backwards", (Permutation,), {"compose": backwards})
    (law,) = [law for law in laws(broken) if law.name == "homomorphism"]
    with pytest.raises(AssertionError) as caught:
        law.check()
    first, *rest = str(caught.value).splitlines()
    assert first.startswith("law 'homomorphism' is broken by Backwards(size=3): (g h) x against")
    assert [line.split(" = ")[0].strip() for line in rest[:3]] == ["g", "h", "x"]


def test_check_group_takes_a_group_of_the_users():
    @dataclass(frozen=True)
    class Cyclic(symflow.groups.PermutingGroup):
        """Shifts: an element is the amount, as a tensor (*batch, 1)."""

        size: int

        def identity(self, *, like):
            return torch.zeros(1, dtype=torch.long, device=like.device)

        def compose(self, g, h):
            return (g + h) % self.size

        def inverse(self, g):
            return -g % self.size

        def random(self, *, generator, like, batch=()):
            return torch.randint(self.size, (*batch, 1), generator=generator).to(like.device)

        def indices(self, g):
            return (g + torch.arange(self.size)) % self.size

        def nearest(self, c):
            shifts = self.indices(torch.arange(self.size)[:, None])
            return c[..., torch.arange(self.size), shifts].sum(-1).argmax(-1, keepdim=True)

    check_group(Cyclic(4))
    with pytest.raises(AssertionError, match=r"is broken by .*BrokenCyclic\(size=4\)"):
        check_group(twin(Cyclic, 4, inverse=lambda self, g: g))


# ---------------------------------------------------------------- networks
@pytest.mark.parametrize("name", SYMMETRIES)
def test_broken_symmetries_are_caught(name):
    arch = symflow.mlp([2, 3, 3, 1], "tanh")
    assert_caught(symmetry_laws(with_symmetry(arch, **SYMMETRIES[name])), name)


def test_a_false_claim_about_the_function_is_caught():
    assert_caught(symmetry_laws(with_false_signs()), "function")
    with pytest.raises(AssertionError, match="'function' is broken by Architecture"):
        check_symmetry(with_false_signs())
    names = {law.name for law in symmetry_laws(architectures())}
    assert names == {"function", *SYMMETRIES}


def test_fields_and_functions_of_weights_are_told_apart():
    arch = symflow.mlp([2, 3, 1], "tanh")
    x = torch.ones(4, 2, dtype=torch.float64)
    check_invariant(lambda w: arch.apply(w, x), arch)
    check_equivariant(lambda w, t: w.square() * w + t[:, None] * w, arch)
    with pytest.raises(AssertionError, match="law 'invariant' is broken by Architecture"):
        check_invariant(lambda w: w[:, 0], arch)
    for field in (lambda w, t: w.flip(-1), lambda w, t: w.abs()):  # permutations, signs
        with pytest.raises(AssertionError, match="law 'equivariant' is broken by Architecture"):
            check_equivariant(field, arch)
    with pytest.raises(AssertionError, match=r"the field returns shape \(3, 2\)"):
        check_equivariant(lambda w, t: w[:, :2], arch)
    check_equivariant(lambda w, t: w, arch, extra=2)
    with pytest.raises(AssertionError, match="law 'equivariant'"):
        check_equivariant(lambda w, t: w.roll(2, -1), arch, extra=2)


# ---------------------------------------------------------------- sections
@pytest.mark.parametrize("name", SECTIONS)
def test_broken_sections_are_caught(name):
    assert_caught(section_laws(SECTIONS[name](symflow.mlp([2, 3, 1]))), name)


def test_a_section_that_changes_its_argument_is_caught():
    with pytest.raises(AssertionError, match=r"'point' .*projecting changes the weights"):
        check_section(flat(**splitting(lambda w: w.mul_(2))))


def test_every_law_of_sections_has_a_twin():
    assert {law.name for law in section_laws(FlatSection)} == set(SECTIONS)
    with pytest.raises(AssertionError, match="'orbit' is broken by FlatSection of Architecture"):
        check_section(FlatSection(symflow.mlp([2, 3, 1]), isometric_only=False))


# ---------------------------------------------------------------- aligners
@pytest.mark.parametrize("name", ALIGNERS)
def test_broken_aligners_are_caught(name):
    assert_caught(aligner_laws(ALIGNERS[name]), name)


def test_every_law_of_aligners_has_a_twin():
    assert {law.name for law in aligner_laws(WeightMatching)} == set(ALIGNERS)
    with pytest.raises(AssertionError, match="law 'planted' is broken by "):
        check_aligner(Lazy())


# ---------------------------------------------------------------- quotients
@pytest.mark.parametrize("name", QUOTIENTS)
def test_broken_quotients_are_caught(name):
    assert_caught(quotient_laws(QUOTIENTS[name]), name)


@pytest.mark.parametrize("what", WRONG_CURVES)
def test_wrong_speeds_are_told(what):
    (law,) = [x for x in quotient_laws(with_path(**WRONG_CURVES[what])) if x.name == "curve"]
    with pytest.raises(AssertionError, match=f"law 'curve' is broken by .*: {what}"):
        law.check()


def test_every_law_of_quotients_has_a_twin():
    names = {law.name for law in quotient_laws(broken_quotient())}
    assert names == {*QUOTIENTS, *(f"section: {name}" for name in SECTIONS)}


@pytest.mark.parametrize("name", SECTIONS)
def test_broken_sections_are_caught_in_their_quotient(name):
    section = SECTIONS[name](symflow.mlp([2, 3, 1]))
    assert_caught(quotient_laws(symflow.Quotient(section.arch, section)), f"section: {name}")


def test_check_quotient_names_the_law():
    message = "law 'zero' is broken by FlatSection, Lazy, Architecture"
    with pytest.raises(AssertionError, match=message):
        check_quotient(QUOTIENTS["zero"])


# ---------------------------------------------------------------- strategies


def test_a_class_without_a_strategy_is_named():
    class Odd(Sign):
        """Has no field ``size`` to build it from alone."""

    wide = dataclass(frozen=True)(type("Wide", (Odd,), {"__annotations__": {"more": int}}))
    with pytest.raises(LookupError, match=r"no strategy draws .*Wide: register one with"):
        values(wide)
    with pytest.raises(LookupError, match="register"):
        laws(wide)
    with pytest.raises(LookupError, match="register"):
        section_laws(type("Unknown", (FlatSection,), {}))


def test_concrete_classes_leave_out_what_is_abstract_private_or_elsewhere():
    assert {cls.__name__ for cls in concrete_classes(Section, "symflow.sections")} == {
        "BalancedSection",
        "CentredSection",
        "FlatSection",
        "SphereSection",
    }
    assert DiagonalGroup not in concrete_classes(Group, "symflow.groups")
    assert Posing not in concrete_classes(Group, "symflow.groups")


@pytest.mark.usefixtures("shrunk")
def test_awkward_weights_are_drawn():
    """Dead and twin units and leaves on a large scale do come up."""
    arch = symflow.mlp([2, 4, 3])
    rows = symflow.sections.unit_coordinates(arch, "h1", 1)

    def twins(w):
        same = (w[rows][:, None] == w[rows][None]).all(-1)
        return bool(same.triu(1).any()) and bool((w[rows] != 0).all())

    assert twins(find(weights(arch), twins))
    dead = find(weights(arch), lambda w: bool((w[rows] == 0).all(1).any() and (w[rows] != 0).any()))
    assert (dead[rows] == 0).all(1).any()
    assert find(weights(arch), lambda w: float(w.abs().max()) > 3).abs().max() >= 64


def test_elements_begin_with_the_identity():
    group = Permutation(3) @ Sign(3)
    g, signs = find(elements(group), lambda g: True)
    assert torch.equal(g, torch.arange(3)) and torch.equal(signs, torch.ones(3).double())
