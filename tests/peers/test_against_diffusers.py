"""The comparison with diffusers live, on weights and inputs that nothing was tuned to."""

import numpy as np
import pytest

from tests.reference.agreement import Agreement, engine_for

pytestmark = pytest.mark.peers
engine = pytest.fixture(engine_for, scope="module")


@pytest.fixture(scope="module")
def compute():
    from tests.reference.make_reference import (
        compute_reference,
    )  # needs torch, which `make test` does without

    return compute_reference


@pytest.fixture(scope="module")
def reference(compute):
    return compute(seed=1)


class TestAgainstDiffusers(Agreement):
    pass


def test_the_stored_numbers_are_what_the_script_makes(compute):
    from tests.reference.make_reference import OUTPUT

    fresh = compute()
    with np.load(OUTPUT) as stored:
        assert set(stored) == set(fresh)
        for name, value in fresh.items():
            if value.dtype.kind == "f":
                # torch sums in another order on another processor
                np.testing.assert_allclose(
                    stored[name], value, rtol=0, atol=2e-5 * np.abs(value).max(), err_msg=name
                )
            else:
                np.testing.assert_array_equal(stored[name], value, err_msg=name)
