import numpy as np
import pytest

from gm.diffusion import denoiser as d
from gm.diffusion.discretizer import EDMDiscretization, LegacyDDPMDiscretization

SIGMA = np.array([0.03, 0.7, 14.6])
SHAPE = (3, 4, 2, 2)


def batch(seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(SHAPE), rng.standard_normal(SHAPE)


def per_picture(sigma):
    return sigma[:, None, None, None]


@pytest.mark.parametrize(
    "scaling", [d.EpsScaling(), d.VScaling(), d.VScalingWithEDMcNoise(), d.EDMScaling(0.5)]
)
def test_a_perfect_network_gives_back_the_clean_latents(scaling):
    z0, eps = batch()
    sigma = per_picture(SIGMA)
    answer = {
        d.EpsScaling: eps,
        d.VScaling: (eps - sigma * z0) / np.sqrt(1 + sigma**2),
        d.VScalingWithEDMcNoise: (eps - sigma * z0) / np.sqrt(1 + sigma**2),
        d.EDMScaling: (sigma * z0 - 0.25 * eps) / (0.5 * np.sqrt(sigma**2 + 0.25)),
    }[type(scaling)]
    denoised = d.Denoiser(scaling)(lambda x, t, cond: answer, z0 + sigma * eps, SIGMA, {})
    np.testing.assert_allclose(denoised, z0, atol=1e-12)


@pytest.mark.parametrize(
    "scaling, sigma_data", [(d.EpsScaling(), 1), (d.VScaling(), 1), (d.EDMScaling(0.5), 0.5)]
)
def test_the_network_sees_unit_variance(scaling, sigma_data):
    c_in = scaling(SIGMA)[2]
    np.testing.assert_allclose(c_in**2 * (sigma_data**2 + SIGMA**2), 1)


@pytest.mark.parametrize("scaling", [d.EDMScaling(), d.VScalingWithEDMcNoise()])
def test_edm_networks_take_a_quarter_of_log_sigma(scaling):
    np.testing.assert_allclose(scaling(SIGMA)[3], np.log(SIGMA) / 4)


@pytest.mark.parametrize(
    "scaling, weighting",
    [
        (d.EpsScaling(), d.EpsWeighting()),
        (d.VScaling(), d.VWeighting()),
        (d.EDMScaling(0.4), d.EDMWeighting(0.4)),
    ],
)
def test_each_weighting_makes_the_networks_own_error_count_alike(scaling, weighting):
    np.testing.assert_allclose(weighting(SIGMA) * scaling(SIGMA)[1] ** 2, 1)


def test_unit_weighting_is_one():
    assert d.UnitWeighting()(SIGMA).tolist() == [1, 1, 1]


def sdxl_denoiser():
    return d.DiscreteDenoiser(d.EpsScaling(), LegacyDDPMDiscretization(), 1000)


def test_a_discrete_network_gets_scaled_latents_and_the_index_of_the_nearest_level():
    table = LegacyDDPMDiscretization().training_sigmas()
    sigma = table[[0, 500, 999]] * [0.5, 1.0001, 3]
    seen = {}

    def network(x, timesteps, cond):
        seen.update(x=x, timesteps=timesteps, cond=cond)
        return np.zeros_like(x)

    x = batch()[0].astype(np.float32)
    denoised = sdxl_denoiser()(network, x, sigma, "cond")
    assert seen["timesteps"].tolist() == [0, 500, 999]
    assert seen["timesteps"].dtype == seen["x"].dtype == denoised.dtype == np.float32
    # The level itself counts as the nearest one, too.
    np.testing.assert_allclose(seen["x"], x / np.sqrt(1 + per_picture(table[[0, 500, 999]]) ** 2), rtol=1e-6)
    assert seen["cond"] == "cond"


def test_options_of_the_discrete_denoiser():
    largest_first = d.DiscreteDenoiser(
        d.EDMScaling(), EDMDiscretization(), 10, do_append_zero=True, quantize_c_noise=False, flip=False
    )
    assert largest_first.sigmas[0] == pytest.approx(80) and largest_first.sigmas[-1] == 0
    np.testing.assert_allclose(largest_first.coefficients(np.array([79.0]))[3], np.log(80) / 4)
    # Whatever time the scaling proposes, a quantised one is the index of the level.
    assert d.DiscreteDenoiser(d.EDMScaling(), EDMDiscretization(), 10).coefficients(np.array([79.0]))[3] == 9
