import pytest

from symflow.testing import architectures
from symflow.testing.equivariance import symmetry_laws


@pytest.mark.parametrize("law", symmetry_laws(architectures()), ids=str)
def test_symmetry(law):
    law.check()
