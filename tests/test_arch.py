import pytest
from symflow.testing.equivariance import symmetry_laws
from symflow.testing import architectures
@pytest.mark.parametrize("law", symmetry_laws(architectures()), ids=str)
def test_symmetry(law): law.check()
