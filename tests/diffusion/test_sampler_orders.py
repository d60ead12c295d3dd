"""Samplers against data ~ N(MEAN, STD^2), for which the denoiser and the way from noise to data are known.

D(x, sigma) = (STD^2 x + sigma^2 MEAN) / (STD^2 + sigma^2), and x - MEAN shrinks as sqrt(STD^2 + sigma^2).
"""

import math
from dataclasses import replace

import numpy as np
import pytest

from gm.diffusion import samplers as s
from gm.diffusion.discretizer import LCMDiscretization

MEAN, STD = 0.7, 0.6


def smooth_grid(n):
    """n + 1 levels from 5 to 0.1. It starts with small steps, so that the low order of the first steps of
    multistep methods does not hide that of the others."""
    u = np.linspace(0, 1, n + 1) ** 2
    return (5 ** (1 / 3) * (1 - u) + 0.1 ** (1 / 3) * u) ** 3


def denoiser(mean):
    def denoise(x, sigma, cond):
        sigma = sigma[:, None, None, None]
        return (STD**2 * x + sigma**2 * mean) / (STD**2 + sigma**2)

    return denoise


def deviation(sigma):
    return math.sqrt(STD**2 + sigma**2)


def error_of_a_path(sampler, n):
    first, *_, last = sampler.schedule(n)
    x = np.full((1, 1, 1, 1), 2.0)
    exact = MEAN + (x - MEAN) * deviation(last) / deviation(first)
    return np.abs(sampler(denoiser(MEAN), None, {}, init=x, num_steps=n) - exact).item()


def responses(sampler, n):
    """What each source of noise alone becomes: picture 0 is the initial state, picture k the k-th addition.

    All is linear, so the result's variance is exactly the sum of the squares: nothing is drawn.
    """
    init = np.zeros((n + 1, 1, 1, 1))
    init[0] = deviation(sampler.schedule(n)[0])
    unit = iter(np.eye(n + 1)[1:])
    noise = lambda: next(unit).reshape(init.shape)  # noqa: E731
    return sampler(denoiser(0), None, {}, init=init, num_steps=n, noise=noise).ravel()


def error_of_the_variance(sampler, n):
    return abs(np.sum(responses(sampler, n) ** 2) / deviation(sampler.schedule(n)[-1]) ** 2 - 1)


def order(error, sampler, n=80):
    return math.log2(error(sampler, n) / error(sampler, 2 * n))


@pytest.mark.parametrize(
    "sampler, expected",
    [
        (s.EulerEDMSampler(smooth_grid), 1),
        (s.HeunEDMSampler(smooth_grid), 2),
        (s.EulerAncestralSampler(smooth_grid, eta=0), 1),
        (s.DPMPP2SAncestralSampler(smooth_grid, eta=0), 2),
        (s.DPMPP2MSampler(smooth_grid), 2),
        (s.DPMPP2MSDESampler(smooth_grid, eta=0), 2),
        *((s.LinearMultistepSampler(smooth_grid, order=k), k) for k in (1, 2, 3, 4)),
    ],
    ids=lambda value: f"{type(value).__name__}" if isinstance(value, s.BaseDiffusionSampler) else None,
)
def test_paths_converge_with_the_order_of_the_method(sampler, expected):
    assert order(error_of_a_path, sampler) == pytest.approx(expected, abs=0.1)


STOCHASTIC = [
    (s.EulerEDMSampler(smooth_grid, s_churn=3), 1),
    (s.HeunEDMSampler(smooth_grid, s_churn=3), 2),
    (s.EulerAncestralSampler(smooth_grid), 1),
    (s.EulerAncestralSampler(smooth_grid, eta=0.5), 1),
    (s.DPMPP2SAncestralSampler(smooth_grid), 2),
    (s.DPMPP2MSDESampler(smooth_grid), 2),
    (s.DPMPP2MSDESampler(smooth_grid, eta=0.5), 2),
]


@pytest.mark.parametrize("sampler, expected", STOCHASTIC, ids=lambda value: type(value).__name__)
def test_with_noise_the_variance_converges_to_that_of_the_data(sampler, expected):
    assert error_of_the_variance(sampler, 160) < 0.1
    assert order(error_of_the_variance, sampler) == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize("sampler, _", STOCHASTIC, ids=lambda value: type(value).__name__)
def test_with_noise_the_mean_follows_its_path(sampler, _):
    n, silent = 160, lambda: 0.0
    at_the_mean = sampler(
        denoiser(MEAN), None, {}, init=np.full((1, 1, 1, 1), MEAN), num_steps=n, noise=silent
    )
    assert at_the_mean.item() == pytest.approx(MEAN)


@pytest.mark.parametrize("sampler, _", STOCHASTIC, ids=lambda value: type(value).__name__)
def test_s_noise_scales_what_is_added(sampler, _):
    full, half = responses(sampler, 10), responses(replace(sampler, s_noise=0.5), 10)
    assert half[0] == full[0] != 0
    assert np.abs(full[1:]).max() > 0.01
    np.testing.assert_allclose(half[1:], full[1:] / 2)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_lcm_with_a_perfect_consistency_model_has_the_right_variance_in_any_number_of_steps(n):
    sampler = s.LCMSampler(LCMDiscretization())

    def consistency(x, sigma, cond):  # to the end of the path
        return x * STD / np.sqrt(STD**2 + sigma[:, None, None, None] ** 2)

    init = np.zeros((n + 1, 1, 1, 1))
    init[0] = deviation(sampler.schedule(n)[0])
    unit = iter(np.eye(n + 1)[1:])
    x = sampler(consistency, None, {}, init=init, num_steps=n, noise=lambda: next(unit).reshape(init.shape))
    assert np.sum(x**2) == pytest.approx(STD**2, rel=1e-3)
