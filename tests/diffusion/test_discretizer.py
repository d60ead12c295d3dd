import numpy as np
import pytest

from gm.diffusion.discretizer import (
    DiffusersDDPMDiscretization,
    EDMDiscretization,
    LCMDiscretization,
    LegacyDDPMDiscretization,
)

SDXL = LegacyDDPMDiscretization()


def test_the_noise_levels_of_sdxl():
    sigmas = SDXL.training_sigmas()
    assert sigmas.shape == (1000,)
    assert sigmas[-1] == pytest.approx(14.6146, abs=5e-5)
    assert sigmas[0] == pytest.approx(0.0292, abs=5e-5)
    assert np.all(np.diff(sigmas) > 0)


def test_thirty_steps_of_sgm_visit_these_time_steps():
    expected = [999 * (30 - i) // 30 for i in range(30)]
    assert expected[:4] == [999, 965, 932, 899] and expected[-1] == 33
    assert SDXL.timesteps(30).tolist() == expected
    np.testing.assert_array_equal(SDXL(30), [*SDXL.training_sigmas()[expected], 0])


def test_trailing_agrees_with_sgm_only_where_the_steps_divide_a_thousand():
    trailing = DiffusersDDPMDiscretization(timestep_spacing="trailing")
    assert trailing.timesteps(20).tolist() == SDXL.timesteps(20).tolist()
    assert np.sum(trailing.timesteps(30) != SDXL.timesteps(30)) == 7


def test_leading_is_the_spacing_of_sdxls_own_diffusers_scheduler():
    assert DiffusersDDPMDiscretization().timesteps(20).tolist() == list(range(951, 0, -50))


def test_linspace_visits_both_ends_and_interpolates_between_time_steps():
    discretization = DiffusersDDPMDiscretization(timestep_spacing="linspace")
    table = discretization.training_sigmas()
    sigmas = discretization(5, do_append_zero=False)
    assert discretization.timesteps(5).tolist() == [999, 749.25, 499.5, 249.75, 0]
    assert (sigmas[0], sigmas[-1]) == (table[999], table[0])
    assert sigmas[2] == pytest.approx((table[499] + table[500]) / 2)


def test_log_linear_levels_have_one_ratio():
    sigmas = DiffusersDDPMDiscretization(interpolation_type="log_linear").get_sigmas(8)
    np.testing.assert_allclose(sigmas[1:] / sigmas[:-1], (sigmas[1] / sigmas[0]) * np.ones(7))
    assert sigmas[0] == pytest.approx(14.6146, abs=5e-5)


def test_lcm_takes_every_so_many_of_the_distilled_steps():
    assert LCMDiscretization().timesteps(4).tolist() == [999, 759, 499, 259]
    assert LCMDiscretization().timesteps(50).tolist() == list(range(999, 0, -20))


def test_edm_levels_are_even_in_the_root():
    sigmas = EDMDiscretization(sigma_min=0.03, sigma_max=15, rho=3)(10)
    assert sigmas[[0, -2, -1]] == pytest.approx([15, 0.03, 0])
    assert np.ptp(np.diff(sigmas[:-1] ** (1 / 3))) < 1e-12


@pytest.mark.parametrize(
    "discretization",
    [SDXL, *(DiffusersDDPMDiscretization(timestep_spacing=s) for s in ("leading", "trailing", "linspace"))],
)
def test_a_thousand_steps_are_all_training_steps(discretization):
    np.testing.assert_array_equal(
        discretization(1000, do_append_zero=False, flip=True), discretization.training_sigmas()
    )


def test_append_zero_and_flip():
    sigmas = SDXL(10)
    assert sigmas.shape == (11,) and sigmas[-1] == 0
    np.testing.assert_array_equal(SDXL(10, do_append_zero=False), sigmas[:-1])
    np.testing.assert_array_equal(SDXL(10, flip=True), sigmas[::-1])


def test_timestep_is_the_nearest_level():
    table = SDXL.training_sigmas()
    assert SDXL.timestep(table[17] + 0.4 * (table[18] - table[17])) == 17
    assert SDXL.timestep(np.array([1e9, 0.0])).tolist() == [999, 0]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SDXL(1001), "1001 sampling steps"),
        (lambda: SDXL(0), "0 sampling steps"),
        (lambda: LCMDiscretization()(51), "distilled on 50"),
        (lambda: DiffusersDDPMDiscretization(steps_offset=60)(20), "start at time step 1010"),
        (lambda: DiffusersDDPMDiscretization(timestep_spacing="even"), "'even'"),
        (lambda: DiffusersDDPMDiscretization(interpolation_type="cubic"), "'cubic'"),
    ],
)
def test_impossible_requests_say_why(make, message):
    with pytest.raises(ValueError, match=message):
        make()
