"""Networks, conditioner and samplers agree with diffusers, whose numbers make_reference.py has stored.

training/test_step.py holds training against the same file; peers/test_against_diffusers.py compares live.
"""

import numpy as np
import pytest

from tests.reference.agreement import Agreement, engine_for
from tests.tiny import FIXTURES

engine = pytest.fixture(engine_for, scope="module")


@pytest.fixture(scope="module")
def reference():
    with np.load(FIXTURES.parent / "reference" / "tiny_sdxl.npz") as file:
        return dict(file)


class TestAgainstStoredNumbers(Agreement):
    pass
