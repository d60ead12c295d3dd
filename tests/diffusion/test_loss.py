import numpy as np
import pytest

from gm.diffusion import denoiser as d
from gm.diffusion.discretizer import LegacyDDPMDiscretization
from gm.diffusion.loss import DiscreteSampling, EDMSampling, StandardDiffusionLoss

SDXL = LegacyDDPMDiscretization()
SHAPE = (3, 4, 2, 2)


def draw(seed=0):
    rng = np.random.default_rng(seed)
    z0, eps, prediction = (rng.standard_normal(SHAPE).astype(np.float32) for _ in range(3))
    return z0, eps, prediction, SDXL.training_sigmas()[[3, 400, 999]]


def make_denoiser(scaling, weighting):
    return d.DiscreteDenoiser(scaling, SDXL, 1000, weighting=weighting)


def test_eps_prediction_is_the_plain_error_of_eps():
    z0, eps, _, sigma = draw()
    x, timesteps, target, weight = StandardDiffusionLoss().prepare(
        make_denoiser(d.EpsScaling(), d.EpsWeighting()), z0, eps=eps, sigma=sigma
    )
    np.testing.assert_array_equal(target, eps)
    np.testing.assert_array_equal(weight, np.ones(3))
    assert timesteps.tolist() == [3, 400, 999]
    noise_level = sigma[:, None, None, None]
    np.testing.assert_allclose(x, (z0 + noise_level * eps) / np.sqrt(1 + noise_level**2), rtol=1e-6)
    assert {array.dtype for array in (x, timesteps, target, weight)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("weighting", [d.UnitWeighting(), d.EpsWeighting(), d.VWeighting(), d.EDMWeighting()])
@pytest.mark.parametrize("scaling", [d.EpsScaling(), d.VScaling(), d.VScalingWithEDMcNoise(), d.EDMScaling()])
@pytest.mark.parametrize("off_grid", [1.0, 1.002])
def test_it_is_the_weighted_error_of_the_denoised_latents(scaling, weighting, off_grid):
    z0, eps, prediction, sigma = draw()
    sigma = sigma * off_grid
    denoiser = make_denoiser(scaling, weighting)
    z = z0.astype(np.float64) + sigma[:, None, None, None] * eps
    denoised = denoiser(lambda x, t, cond: prediction, z, sigma, {})
    expected = weighting(sigma) * np.mean((denoised - z0) ** 2, axis=(1, 2, 3))

    _, _, target, weight = StandardDiffusionLoss().prepare(denoiser, z0, eps=eps, sigma=sigma)
    np.testing.assert_allclose(
        weight * np.mean((prediction - target) ** 2, axis=(1, 2, 3)), expected, rtol=1e-5
    )


def test_the_loss_may_bring_its_own_weighting():
    z0, eps, _, sigma = draw()
    loss = StandardDiffusionLoss(loss_weighting=d.UnitWeighting())
    *_, weight = loss.prepare(make_denoiser(d.EpsScaling(), d.EpsWeighting()), z0, eps=eps, sigma=sigma)
    np.testing.assert_allclose(weight, sigma**2, rtol=1e-6)


def test_training_draws_every_time_step_alike():
    sigma = DiscreteSampling(SDXL, 1000)(np.random.default_rng(0), 100_000)
    counts = np.bincount(SDXL.timestep(np.unique(sigma)), minlength=1000)
    assert counts.tolist() == [1] * 1000  # only trained levels, all of them
    share = np.searchsorted(SDXL.training_sigmas(), sigma) / 1000
    np.testing.assert_allclose(np.histogram(share, bins=10, range=(0, 1))[0], 10_000, rtol=0.05)


def test_edm_sampling_is_log_normal():
    log_sigma = np.log(EDMSampling(p_mean=-1.2, p_std=1.2)(np.random.default_rng(0), 20_000))
    assert (log_sigma.mean(), log_sigma.std()) == pytest.approx((-1.2, 1.2), abs=0.02)


def test_one_stream_gives_one_batch():
    loss = StandardDiffusionLoss(DiscreteSampling(SDXL, 1000))
    (eps, sigma), (again, sigma_again) = (loss.draw(np.random.default_rng(7), SHAPE) for _ in range(2))
    assert eps.shape == SHAPE and eps.dtype == np.float32 and sigma.shape == (3,)
    np.testing.assert_array_equal(eps, again)
    np.testing.assert_array_equal(sigma, sigma_again)


def test_offset_noise_shifts_whole_pictures():
    def noise(level):
        loss = StandardDiffusionLoss(EDMSampling(), offset_noise_level=level)
        return loss.draw(np.random.default_rng(1), (4000, 1, 4, 4))[0]

    shift = noise(0.5) - noise(0.0)
    np.testing.assert_allclose(np.ptp(shift, axis=(1, 2, 3)), 0, atol=1e-6)
    assert shift[:, 0, 0, 0].std() == pytest.approx(0.5, abs=0.02)


def test_what_is_missing_is_named():
    z0, eps, _, sigma = draw()
    with pytest.raises(ValueError, match="'l1' is not supported"):
        StandardDiffusionLoss(type="l1")
    with pytest.raises(ValueError, match="sigma_sampler_config"):
        StandardDiffusionLoss().draw(np.random.default_rng(0), SHAPE)
    with pytest.raises(ValueError, match="weighting_config"):
        StandardDiffusionLoss().prepare(make_denoiser(d.EpsScaling(), None), z0, eps=eps, sigma=sigma)
