import logging
import math

import numpy as np
import pytest

from gm.diffusion import samplers as s
from gm.diffusion.denoiser import DiscreteDenoiser, EpsScaling
from gm.diffusion.discretizer import EDMDiscretization, LCMDiscretization, LegacyDDPMDiscretization
from gm.diffusion.guiders import VanillaCFG

SDXL = LegacyDDPMDiscretization()
SHAPE = (2, 4, 3, 3)
ALL = [
    s.EulerEDMSampler(SDXL, s_churn=2.0),
    s.HeunEDMSampler(SDXL),
    s.EulerAncestralSampler(SDXL),
    s.DPMPP2SAncestralSampler(SDXL),
    s.DPMPP2MSampler(SDXL),
    s.DPMPP2MSDESampler(SDXL),
    s.LinearMultistepSampler(SDXL),
    s.LCMSampler(LCMDiscretization()),
]
each_sampler = pytest.mark.parametrize("sampler", ALL, ids=lambda sampler: type(sampler).__name__)
one_step_methods = pytest.mark.parametrize(
    "sampler", [s.EulerEDMSampler(SDXL), s.HeunEDMSampler(SDXL)], ids=lambda sampler: type(sampler).__name__
)


def unit_variance(x, sigma, cond):
    """The denoiser of data ~ N(0, 1), with a little that is not linear."""
    sigma = sigma[:, None, None, None]
    return ((x + 0.1 * x / (1 + x**2)) / (1 + sigma**2)).astype(x.dtype)


def run(sampler, denoise=unit_variance, *, seeds=(1, 2), num_steps=6, **settings):
    noise = s.noise_streams(seeds, SHAPE[1:])
    return sampler(denoise, noise(), {}, num_steps=num_steps, noise=noise, **settings)


def recorder(calls):
    def denoise(x, sigma, cond):
        calls.append((x, sigma, unit_variance(x, sigma, cond)))
        return calls[-1][2]

    return denoise


@each_sampler
def test_the_first_state_of_sdxl_is_the_noise_times_14_6488(sampler):
    if isinstance(sampler, s.EulerEDMSampler):
        sampler = s.EulerEDMSampler(SDXL)  # churning would raise the level first
    calls = []
    run(sampler, recorder(calls))
    x, sigma, _ = calls[0]
    assert sigma == pytest.approx([14.6146] * 2, abs=5e-5)
    np.testing.assert_allclose(x, 14.6488 * s.noise_streams((1, 2), SHAPE[1:])(), rtol=1e-5)


@each_sampler
def test_a_picture_does_not_depend_on_its_neighbours(sampler):
    together = run(sampler, seeds=(1, 2))
    assert together.dtype == np.float32 and np.all(np.isfinite(together))
    np.testing.assert_array_equal(together[1:], run(sampler, seeds=(2,)))
    assert np.abs(together[0] - together[1]).max() > 0.1


@each_sampler
def test_the_last_step_ends_at_the_last_estimate(sampler):
    if isinstance(sampler, s.LinearMultistepSampler):
        sampler = s.LinearMultistepSampler(SDXL, order=1)  # higher orders look back
    calls = []
    # LCM keeps c_skip = 1e-8 of x at its last step.
    np.testing.assert_allclose(run(sampler, recorder(calls)), calls[-1][2], atol=1e-6)


@pytest.mark.parametrize(
    "sampler, calls_expected",
    list(zip(ALL, [6, 11, 6, 11, 6, 6, 6, 6], strict=True)),
    ids=lambda value: type(value).__name__ if isinstance(value, s.BaseDiffusionSampler) else None,
)
def test_network_calls_of_six_steps(sampler, calls_expected):
    calls, steps = [], []
    run(sampler, recorder(calls), callback=lambda step, total: steps.append((step, total)))
    assert len(calls) == calls_expected
    assert steps == [(i, 6) for i in range(1, 7)]


def test_2s_looks_at_the_geometric_mean_of_two_levels():
    calls = []
    run(s.DPMPP2SAncestralSampler(SDXL, eta=0), recorder(calls))
    levels = [sigma[0] for _, sigma, _ in calls]
    assert levels[1] == pytest.approx(math.sqrt(levels[0] * levels[2]))


def test_second_order_2m_without_noise_is_the_sde_sampler_without_noise():
    np.testing.assert_array_equal(run(s.DPMPP2MSampler(SDXL)), run(s.DPMPP2MSDESampler(SDXL, eta=0)))


def test_churn_raises_levels_only_within_its_bounds():
    def levels(**bounds):
        calls = []
        run(s.EulerEDMSampler(SDXL, **bounds), recorder(calls))
        return np.array([sigma[0] for _, sigma, _ in calls])

    plain = levels()
    np.testing.assert_allclose(levels(s_churn=0.6), plain * 1.1)
    np.testing.assert_allclose(levels(s_churn=100), plain * math.sqrt(2))
    within = (plain >= 1) & (plain <= 5)
    assert 0 < within.sum() < 6
    np.testing.assert_allclose(levels(s_churn=0.6, s_tmin=1, s_tmax=5), plain * np.where(within, 1.1, 1))


def test_guidance_acts_on_every_step():
    def denoise(x, sigma, cond):
        assert x.shape == (4, *SHAPE[1:]) and sigma.shape == (4,)
        return np.broadcast_to(cond["vector"][:, :1, None, None], x.shape)

    sampler = s.EulerEDMSampler(SDXL, guider=VanillaCFG(7.5))
    cond, uc = {"vector": np.full((2, 3), 0.5)}, {"vector": np.full((2, 3), 0.1)}
    x = sampler(denoise, np.zeros(SHAPE), cond, uc, num_steps=3)
    np.testing.assert_allclose(x, 0.1 + 7.5 * 0.4)


def test_strength_keeps_the_last_levels_as_sgm_counts():
    sampler = s.EulerEDMSampler(SDXL, num_steps=40)
    whole = SDXL(40).tolist()
    assert sampler.schedule() == whole
    assert sampler.schedule(strength=0.75) == whole[-30:]  # floor(0.75 * 41)
    assert sampler.schedule(strength=0.0) == [0.0]
    assert sampler.schedule(10, strength=0.5) == SDXL(10).tolist()[-5:]


def test_img2img_starts_from_the_noised_picture():
    sampler, picture, calls = s.EulerEDMSampler(SDXL), np.ones(SHAPE, np.float32), []
    run(sampler, recorder(calls), init=picture, num_steps=20, strength=0.3)
    x, sigma, _ = calls[0]
    assert len(calls) == 5 and sigma[0] == sampler.schedule(20, strength=0.3)[0]
    np.testing.assert_allclose(x, 1 + sigma[0] * s.noise_streams((1, 2), SHAPE[1:])(), rtol=1e-5)


@each_sampler
def test_strength_zero_gives_back_the_picture(sampler):
    picture = np.ones(SHAPE, np.float32)
    np.testing.assert_array_equal(run(sampler, init=picture, strength=0.0), picture)


@one_step_methods
@pytest.mark.parametrize("share", [0.15, 0.5, 1.0])
def test_a_refiner_continues_where_the_base_model_stops(sampler, share):
    handed_over = run(sampler, num_steps=20, stop=share)
    finished = sampler(unit_variance, None, {}, init=handed_over, num_steps=20, strength=share)
    np.testing.assert_array_equal(finished, run(sampler, num_steps=20))


@pytest.mark.parametrize("sampler", [s.HeunEDMSampler(SDXL), s.DPMPP2MSampler(SDXL)], ids=["heun", "2m"])
def test_thirty_steps_of_an_eps_network_land_near_the_exact_latents(sampler):
    mean, table = 0.5, SDXL.training_sigmas()

    def network(x, timesteps, cond):  # eps of data ~ N(mean, 1)
        sigma = table[timesteps.astype(int)][:, None, None, None]
        noisy = x * np.sqrt(1 + sigma**2)
        return ((noisy - mean) * sigma / (1 + sigma**2)).astype(np.float32)

    denoiser = DiscreteDenoiser(EpsScaling(), SDXL, 1000)
    noise = s.noise_streams((1, 2), SHAPE[1:])()
    x = sampler(lambda x, sigma, cond: denoiser(network, x, sigma, cond), noise, {}, num_steps=30)
    exact = mean + (math.sqrt(1 + table[-1] ** 2) * noise - mean) / math.sqrt(1 + table[-1] ** 2)
    np.testing.assert_allclose(x, exact, atol=0.04)


def test_lcm_keeps_the_latents_of_time_step_zero():
    one_level = lambda n: np.array([LCMDiscretization().training_sigmas()[0], 0.0])  # noqa: E731
    # A sampler whose first level is time step 0: c_skip is 1, so the denoiser is not asked.
    sampler = s.LCMSampler(LCMDiscretization())
    x = np.full(SHAPE, 2.0)
    (result,) = sampler.trajectory(lambda x, sigma: np.full(SHAPE, 1e6), x, one_level(1).tolist(), None)
    np.testing.assert_allclose(result, x / math.hypot(1, one_level(1)[0]))


def test_lcm_scalings_are_those_of_the_paper():
    sampler = s.LCMSampler(LCMDiscretization(), sigma_data=0.5, timestep_scaling=10.0)
    sigma = LCMDiscretization().training_sigmas()[1]
    (result,) = sampler.trajectory(lambda x, sigma: 0 * x, np.ones(SHAPE), [float(sigma), 0.0], None)
    np.testing.assert_allclose(result, 0.25 / (10**2 + 0.25) / math.hypot(1, sigma))
    (result,) = sampler.trajectory(lambda x, sigma: x + 1, np.zeros(SHAPE), [float(sigma), 0.0], None)
    np.testing.assert_allclose(result, 10 / math.sqrt(10**2 + 0.25))


def test_verbose_says_what_runs(caplog):
    with caplog.at_level(logging.INFO):
        run(s.EulerEDMSampler(SDXL))
        assert caplog.text == ""
        run(s.EulerEDMSampler(SDXL, verbose=True))
    assert "EulerEDMSampler" in caplog.text and "6 steps, sigma 14.6146 to 0.0000" in caplog.text


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(strength=0.5), "needs init"),
        (dict(init=np.ones(SHAPE), strength=1.5), "strength 1.5"),
        (dict(stop=-0.1), "stop -0.1"),
        (dict(num_steps=None), "needs num_steps"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        run(s.EulerEDMSampler(SDXL), **settings)


def test_a_sampler_that_adds_noise_asks_for_it():
    with pytest.raises(ValueError, match="EulerAncestralSampler adds noise"):
        s.EulerAncestralSampler(SDXL)(unit_variance, np.ones(SHAPE), {}, num_steps=3)


def test_lcm_refuses_levels_without_time_steps():
    with pytest.raises(ValueError, match="LCMDiscretization"):
        s.LCMSampler(EDMDiscretization())
