import pytest
from symflow.sections import Section
from symflow.align import Aligner
from symflow.testing import concrete_classes
from symflow.testing.sections import section_laws
from symflow.testing.aligners import aligner_laws
CLASSES = concrete_classes(Section, "symflow.sections")
LAWS = [pytest.param(law, id=f"{cls.__name__}-{law}") for cls in CLASSES for law in section_laws(cls)]
CLASSES = concrete_classes(Aligner, "symflow.align")
LAWS += [pytest.param(law, id=f"{cls.__name__}-{law}") for cls in CLASSES for law in aligner_laws(cls)]
@pytest.mark.parametrize("law", LAWS)
def test_law(law):
    law.check()
