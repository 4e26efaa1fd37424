"""Every group of symflow, found by walking subclasses, obeys the laws of its contract."""

import pytest

from symflow.groups import Group
from symflow.testing import concrete_classes, laws

CLASSES = concrete_classes(Group, "symflow.groups")
LAWS = [pytest.param(law, id=f"{cls.__name__}-{law}") for cls in CLASSES for law in laws(cls)]


@pytest.mark.parametrize("law", LAWS)
def test_law(law):
    law.check()
