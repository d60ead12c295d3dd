"""Whole trajectories against diffusers' schedulers, with a network that is a formula.

The network answers with the eps of data around -1 and 1, of variance 1/4 each, so D is not linear. It sees
what the UNet would: x / sqrt(1 + sigma^2) and a time step. Both sides take 20 steps, at which "trailing"
visits exactly SGM's time steps; at 30 steps 7 of them differ.

The sides differ in the form of the state. We carry x = z0 + sigma eps. So do diffusers' Euler, Heun and LMS,
whose scale_model_input divides; their own first scale (init_noise_sigma) is sigma_max for "trailing", not
sqrt(1 + sigma_max^2), and is not used here. Its DPM-Solver and LCM carry x / sqrt(1 + sigma^2).
"""

import math

import diffusers
import numpy as np
import pytest
import torch

from gm.diffusion import samplers as s
from gm.diffusion.denoiser import DiscreteDenoiser, EpsScaling
from gm.diffusion.discretizer import DiffusersDDPMDiscretization, LCMDiscretization, LegacyDDPMDiscretization

pytestmark = pytest.mark.peers

SDXL = LegacyDDPMDiscretization()
TABLE = SDXL.training_sigmas()
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
SHAPE = (2, 4, 5, 5)
STEPS = 20


def network(x, timesteps, cond=None):
    sigma = np.interp(timesteps, np.arange(1000), TABLE).reshape(-1, 1, 1, 1)
    noisy, variance = x * np.sqrt(1 + sigma**2), 0.25 + sigma**2
    denoised = (0.25 * noisy + sigma**2 * np.tanh(noisy / variance)) / variance
    return ((noisy - denoised) / sigma).astype(np.float32)


def ours(sampler, noise, num_steps=STEPS, fresh=None):
    denoiser = DiscreteDenoiser(EpsScaling(), SDXL, 1000)
    return sampler(
        lambda x, sigma, cond: denoiser(network, x, sigma, cond), noise, {}, num_steps=num_steps, noise=fresh
    )


def theirs(scheduler, noise, num_steps=STEPS, form="exploding", **step_settings):
    scheduler.set_timesteps(num_steps)
    x = torch.from_numpy(noise)
    if form == "exploding":
        x = x * math.sqrt(1 + TABLE[-1] ** 2)
    for t in scheduler.timesteps:
        eps = network(scheduler.scale_model_input(x, t).numpy(), np.full(len(x), float(t)))
        x = scheduler.step(torch.from_numpy(eps), t, x, **step_settings).prev_sample
    return x.numpy()


def first_noise(seed=0):
    return np.random.default_rng(seed).standard_normal(SHAPE, dtype=np.float32)


def relative_error(x, y):
    return np.linalg.norm(x - y) / np.linalg.norm(y)


def trailing(scheduler, **settings):
    return scheduler(**BETAS, timestep_spacing="trailing", **settings)


def dpm_solver(algorithm):
    # final_sigmas_type "zero": the last step goes to 0 and is first order, as ours.
    return trailing(
        diffusers.DPMSolverMultistepScheduler,
        algorithm_type=algorithm,
        solver_order=2,
        final_sigmas_type="zero",
    )


@pytest.mark.parametrize(
    "sampler, scheduler, form",
    [
        (s.EulerEDMSampler(SDXL), trailing(diffusers.EulerDiscreteScheduler), "exploding"),
        (s.HeunEDMSampler(SDXL), trailing(diffusers.HeunDiscreteScheduler), "exploding"),
        (s.LinearMultistepSampler(SDXL), trailing(diffusers.LMSDiscreteScheduler), "exploding"),
        (s.DPMPP2MSampler(SDXL), dpm_solver("dpmsolver++"), "preserving"),
    ],
    ids=["euler", "heun", "lms", "dpm++2m"],
)
def test_deterministic_samplers_end_at_the_same_latents(sampler, scheduler, form):
    noise = first_noise()
    assert relative_error(ours(sampler, noise), theirs(scheduler, noise, form=form)) < 1e-5


@pytest.mark.parametrize(
    "sampler, scheduler, form",
    [
        (s.EulerAncestralSampler(SDXL), trailing(diffusers.EulerAncestralDiscreteScheduler), "exploding"),
        (s.DPMPP2MSDESampler(SDXL), dpm_solver("sde-dpmsolver++"), "preserving"),
    ],
    ids=["euler ancestral", "dpm++2m sde"],
)
def test_with_the_same_added_noise_the_latents_are_the_same(sampler, scheduler, form):
    noise = first_noise()
    generator = torch.Generator().manual_seed(5)  # both draw one array a step, in order
    mine = ours(sampler, noise, fresh=lambda: torch.randn(SHAPE, generator=generator).numpy())
    other = theirs(scheduler, noise, form=form, generator=torch.Generator().manual_seed(5))
    assert relative_error(mine, other) < 1e-5


@pytest.mark.parametrize("num_steps", [1, 4, 8])
def test_lcm_agrees(num_steps):
    noise = first_noise()
    generator = torch.Generator().manual_seed(5)
    mine = ours(
        s.LCMSampler(LCMDiscretization()),
        noise,
        num_steps,
        fresh=lambda: torch.randn(SHAPE, generator=generator).numpy(),
    )
    # Its betas, clipping and table of steps are set as SDXL's LCM files set them.
    scheduler = diffusers.LCMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=True)
    other = theirs(scheduler, noise, num_steps, form="preserving", generator=torch.Generator().manual_seed(5))
    assert relative_error(mine, other) < 1e-5
    assert scheduler.timesteps.tolist() == LCMDiscretization().timesteps(num_steps).tolist()


@pytest.mark.parametrize("num_steps", [20, 30, 50])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_levels_of_diffusers_spacings(spacing, num_steps):
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing=spacing, steps_offset=1)
    scheduler.set_timesteps(num_steps)
    discretization = DiffusersDDPMDiscretization(timestep_spacing=spacing, steps_offset=1)
    # diffusers forms its betas in float32.
    np.testing.assert_allclose(discretization(num_steps), scheduler.sigmas, rtol=3e-5)
    np.testing.assert_allclose(discretization.timesteps(num_steps), scheduler.timesteps, rtol=1e-6)


def test_log_linear_levels_of_diffusers_up_to_its_last():
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS, interpolation_type="log_linear")
    scheduler.set_timesteps(20)
    levels = DiffusersDDPMDiscretization(interpolation_type="log_linear")(20)
    np.testing.assert_allclose(levels[:20], scheduler.sigmas[:20], rtol=3e-5)


def test_a_leading_run_of_sdxls_own_scheduler_file():
    noise = first_noise()
    discretization = DiffusersDDPMDiscretization(timestep_spacing="leading", steps_offset=1)
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(30)
    # For "leading" its own first scale is ours: sqrt(1 + sigma^2) of the first level.
    scale = math.sqrt(1 + discretization(30)[0] ** 2)
    assert float(scheduler.init_noise_sigma) == pytest.approx(scale, rel=1e-5)
    mine = ours(s.EulerEDMSampler(discretization), noise, 30)
    other = theirs(scheduler, noise * np.float32(scale / math.sqrt(1 + TABLE[-1] ** 2)), 30)
    assert relative_error(mine, other) < 1e-5
