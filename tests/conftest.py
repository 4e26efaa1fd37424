"""Set up before anything of symflow is imported: shape checks, Hypothesis profiles, determinism."""

import os
import sys

import pytest
import torch
from hypothesis import Phase, settings
from jaxtyping import install_import_hook

# Every annotation in symflow, shapes included, is checked at each call while the tests run. The
# hook rewrites modules as they are imported, so one that is here already would go unchecked.
if "symflow" in sys.modules:
    raise RuntimeError("symflow was imported before the test suite could check its annotations")
install_import_hook("symflow", "beartype.beartype")

# A suite that is drawn anew at each run fails for people who changed nothing: only the nightly
# profile draws. What it finds becomes an @example.
settings.register_profile("dev", max_examples=20, derandomize=True, deadline=None, print_blob=True)
settings.register_profile("ci", max_examples=100, derandomize=True, deadline=None, print_blob=True)
settings.register_profile("nightly", max_examples=5000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

os.environ.setdefault("MPLBACKEND", "Agg")
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    """Both precisions in which symflow promises its results."""
    return request.param


@pytest.fixture
def generator():
    """A generator with the same seed for each test (inside @given draw an integer seed instead)."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def unshrunk():
    """Stop at the first failure: whether a law bites is the question, and shrinking takes long."""
    active = settings.get_current_profile_name()
    settings.register_profile(
        "unshrunk", max_examples=50, phases=[Phase.generate], derandomize=True, deadline=None
    )
    settings.load_profile("unshrunk")
    yield
    settings.load_profile(active)


def pytest_collection_modifyitems(items):
    """Leave discovered laws out of the measured coverage: tracing doubles the time they take.

    They run the same lines for each of many examples; that a law bites, and so its lines too, is
    tested beside its broken twin, where coverage is measured.
    """
    for item in items:
        if getattr(item, "originalname", "") == "test_law":
            item.add_marker(pytest.mark.no_cover)
