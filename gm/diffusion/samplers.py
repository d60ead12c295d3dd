"""From noise to latents: algorithms over a denoiser D(x, sigma).

All follow x as sigma falls along dx/dsigma = (x - D(x, sigma)) / sigma (EDM, eq. 1 and 3); some add fresh
noise on the way.
"""

import logging
import math
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from gm.diffusion.discretizer import DDPMDiscretization, Discretization
from gm.diffusion.guiders import IdentityGuider

logger = logging.getLogger(__name__)


def noise_streams(seeds, shape):
    """Noise for a batch: every picture has its own stream, so it does not depend on its neighbours.

    Args:
        seeds: one a picture, whatever numpy's default_rng takes.
        shape: of one picture's latents, (4, h, w).
    Returns: a function; each call draws the next (len(seeds), 4, h, w) float32 from N(0, 1).
    """
    rngs = [np.random.default_rng(seed) for seed in seeds]
    return lambda: np.stack([rng.standard_normal(shape, dtype=np.float32) for rng in rngs])


@dataclass(frozen=True)
class BaseDiffusionSampler:
    """What all samplers share; a subclass gives the algorithm as `trajectory`.

    discretization: n -> n + 1 noise levels, largest first.
    num_steps: n, unless a call says otherwise.
    guider: combines conditional and unconditional predictions.
    verbose: log the settings of each run.
    """

    discretization: Discretization
    num_steps: int | None = None
    guider: object = field(default_factory=IdentityGuider)
    verbose: bool = False

    def schedule(self, num_steps=None, *, strength=1.0, stop=0.0):
        """The noise levels of a run, largest first; one step leads from each to the next.

        Args:
            num_steps: of the whole way from noise to picture.
            strength: the share of the way, from its end, that is gone; below 1 for img2img and refiners.
            stop: leave the rest to a model that will be run with this strength.
        Returns: list of floats; of all n + 1 levels (n steps and 0) a strength keeps the last
            max(1, floor(strength * (n + 1))), as SGM counts.
        """
        num_steps = self.num_steps if num_steps is None else num_steps
        if num_steps is None:
            raise ValueError(f"{type(self).__name__} needs num_steps.")
        if not 0 <= stop <= strength <= 1:
            raise ValueError(f"stop {stop} and strength {strength} must satisfy 0 <= stop <= strength <= 1.")
        sigmas = self.discretization(num_steps).tolist()
        first, last = (len(sigmas) - max(1, int(share * len(sigmas))) for share in (strength, stop))
        return sigmas[first : last + 1]

    def __call__(
        self,
        denoise,
        x,
        cond,
        uc=None,
        *,
        num_steps=None,
        init=None,
        strength=1.0,
        stop=0.0,
        noise=None,
        callback=None,
    ):
        """Draw latents.

        Args:
            denoise: (x (B, 4, h, w), sigma (B,), cond) -> D like x; B is doubled where the guider needs both
                predictions.
            x: (B, 4, h, w) drawn from N(0, 1); None continues from `init`, where another model stopped.
            cond, uc: dicts of arrays whose first axis is B; uc is the unconditional one.
            init: (B, 4, h, w) clean latents to start from (img2img): `strength` says how much noise they get.
            num_steps, strength, stop: see `schedule`.
            noise: () -> fresh N(0, 1) like x, for samplers that add noise on their way.
            callback: called after each step with (step, number of steps), counted from 1.
        Returns: latents like x, at the noise level where the schedule ends.
        """
        if init is None and (x is None or strength < 1):
            raise ValueError("A run that starts halfway (x is None or strength < 1) needs init latents.")
        sigmas = self.schedule(num_steps, strength=strength, stop=stop)
        total = len(sigmas) - 1
        if self.verbose:
            logger.info("%s: %d steps, sigma %.4f to %.4f", self, total, sigmas[0], sigmas[-1])

        def denoised(x, sigma):
            inputs = self.guider.prepare(x, np.full(len(x), sigma), cond, uc)
            return self.guider.combine(denoise(*inputs))

        if init is None:
            # The deviation that noisy latents have at this level if clean ones have 1.
            x = x * math.sqrt(1 + sigmas[0] ** 2)
        else:
            x = init if x is None else init + sigmas[0] * x
        states = self.trajectory(denoised, x, sigmas, noise or self._no_noise)
        for step, state in enumerate(states, start=1):
            x = state
            if callback is not None:
                callback(step, total)
        return x

    def _no_noise(self):
        raise ValueError(f"{type(self).__name__} adds noise on its way: pass noise=.")

    def trajectory(self, denoise, x, sigmas, noise):
        """Yield x at each noise level after the first.

        Args:
            denoise: (x, sigma) -> D(x, sigma), guidance included.
            x: at noise level sigmas[0].
            sigmas: list of floats, falling, the last may be 0.
            noise: () -> N(0, 1) like x.
        """
        raise NotImplementedError


def towards(x, denoised, ratio):
    """Euler's step from sigma to ratio * sigma; also DDIM's and first-order DPM-Solver++'s."""
    return denoised + ratio * (x - denoised)


@dataclass(frozen=True)
class EDMSampler(BaseDiffusionSampler):
    """Samplers that may first raise the noise level a little (EDM, algorithm 2).

    s_churn: how much over all steps; 0 makes them deterministic.
    s_tmin, s_tmax: only at noise levels between these.
    s_noise: standard deviation of what is added.
    """

    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0

    def churn(self, x, sigma, num_steps, noise):
        """x and sigma at the raised level (lines 4 to 6)."""
        if self.s_churn == 0 or not self.s_tmin <= sigma <= self.s_tmax:
            return x, sigma
        raised = sigma * (1 + min(self.s_churn / num_steps, math.sqrt(2) - 1))
        return x + self.s_noise * math.sqrt(raised**2 - sigma**2) * noise(), raised


@dataclass(frozen=True)
class EulerEDMSampler(EDMSampler):
    """Euler's method: first order (EDM, algorithm 2 without lines 9 to 11)."""

    def trajectory(self, denoise, x, sigmas, noise):
        for sigma, sigma_next in pairwise(sigmas):
            x, sigma = self.churn(x, sigma, len(sigmas) - 1, noise)
            x = towards(x, denoise(x, sigma), sigma_next / sigma)
            yield x


@dataclass(frozen=True)
class HeunEDMSampler(EDMSampler):
    """Heun's method: second order, two network calls a step, the step to 0 by Euler (EDM, algorithm 2)."""

    def trajectory(self, denoise, x, sigmas, noise):
        for sigma, sigma_next in pairwise(sigmas):
            x, sigma = self.churn(x, sigma, len(sigmas) - 1, noise)
            slope = (x - denoise(x, sigma)) / sigma
            ahead = x + (sigma_next - sigma) * slope
            if sigma_next > 0:
                slope = (slope + (ahead - denoise(ahead, sigma_next)) / sigma_next) / 2
            x = x + (sigma_next - sigma) * slope
            yield x


@dataclass(frozen=True)
class AncestralSampler(BaseDiffusionSampler):
    """Samplers that go below the next noise level and add noise to come back to it.

    eta: 1 is the DDPM's own ancestral sampling, 0 adds none (Song et al. 2021, "DDIM", eq. 16).
    s_noise: standard deviation of what is added.
    """

    eta: float = 1.0
    s_noise: float = 1.0

    def split(self, sigma, sigma_next):
        """sigma_down, sigma_up with sigma_down^2 + sigma_up^2 = sigma_next^2."""
        up = min(sigma_next, self.eta * sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2))
        return math.sqrt(sigma_next**2 - up**2), up

    def trajectory(self, denoise, x, sigmas, noise):
        for sigma, sigma_next in pairwise(sigmas):
            down, up = self.split(sigma, sigma_next)
            x = self.descend(denoise, x, sigma, down)
            if up > 0:
                x = x + self.s_noise * up * noise()
            yield x

    def descend(self, denoise, x, sigma, sigma_down):
        """One deterministic step from sigma to sigma_down."""
        raise NotImplementedError


@dataclass(frozen=True)
class EulerAncestralSampler(AncestralSampler):
    """Euler's method between the additions of noise."""

    def descend(self, denoise, x, sigma, sigma_down):
        return towards(x, denoise(x, sigma), sigma_down / sigma)


@dataclass(frozen=True)
class DPMPP2SAncestralSampler(AncestralSampler):
    """DPM-Solver++(2S) between the additions of noise (Lu et al. 2022, "DPM-Solver++", algorithm 1, r = 1/2).

    Second order, two network calls a step, the second at the geometric mean of the two levels; a step to 0 is
    Euler's.
    """

    def descend(self, denoise, x, sigma, sigma_down):
        denoised = denoise(x, sigma)
        if sigma_down > 0:
            middle = math.sqrt(sigma * sigma_down)
            denoised = denoise(towards(x, denoised, middle / sigma), middle)
        return towards(x, denoised, sigma_down / sigma)


@dataclass(frozen=True)
class DPMPP2MSampler(BaseDiffusionSampler):
    """DPM-Solver++(2M): second order, one network call a step (Lu et al. 2022, "DPM-Solver++", algorithm 2).

    D is extrapolated, linearly in log(sigma), from this step and the one before; the first step and a step to
    0 use D alone.
    """

    eta = 0.0  # no noise: the SDE sampler below makes these two settings
    s_noise = 1.0

    def trajectory(self, denoise, x, sigmas, noise):
        previous = previous_h = None
        for sigma, sigma_next in pairwise(sigmas):
            denoised = denoise(x, sigma)
            if sigma_next == 0:
                yield denoised
                return
            h = math.log(sigma / sigma_next)
            ahead = denoised
            if previous is not None:
                ahead = denoised + h / (2 * previous_h) * (denoised - previous)
            x = towards(x, ahead, math.exp(-(1 + self.eta) * h))
            if self.eta > 0:
                x = x + self.s_noise * sigma_next * math.sqrt(-math.expm1(-2 * self.eta * h)) * noise()
            yield x
            previous, previous_h = denoised, h


@dataclass(frozen=True)
class DPMPP2MSDESampler(DPMPP2MSampler):
    """SDE-DPM-Solver++(2M), midpoint form: as 2M, with noise (Lu et al. 2022, "DPM-Solver++").

    eta: 1 solves the paper's reverse diffusion, 0 is DPM++ 2M.
    s_noise: standard deviation of what is added.
    """

    eta: float = 1.0
    s_noise: float = 1.0


@dataclass(frozen=True)
class LinearMultistepSampler(BaseDiffusionSampler):
    """Adams-Bashforth on uneven steps: integrates the polynomial through the last `order` slopes.

    Hairer, Norsett and Wanner, "Solving Ordinary Differential Equations I", sec. III.5. One network call a
    step; the first steps have fewer slopes to go by.
    """

    order: int = 4

    def trajectory(self, denoise, x, sigmas, noise):
        slopes = []  # newest first
        for i, sigma in enumerate(sigmas[:-1]):
            slopes = [(x - denoise(x, sigma)) / sigma, *slopes[: self.order - 1]]
            visited = sigmas[i::-1][: len(slopes)]  # where each was taken
            weights = _adams_weights(visited, sigmas[i + 1])
            x = x + sum(weight * slope for weight, slope in zip(weights, slopes, strict=True))
            yield x


def _adams_weights(visited, end):
    """Integrals from visited[0] to `end` of each Lagrange polynomial over the visited points."""
    roots, weights = np.polynomial.legendre.leggauss(len(visited))  # exact: their degree is below twice that
    half = (end - visited[0]) / 2
    points = visited[0] + half * (1 + roots)
    for j, at in enumerate(visited):
        others = visited[:j] + visited[j + 1 :]
        basis = np.prod([(points - other) / (at - other) for other in others], axis=0)
        yield float(half * np.sum(weights * basis))


@dataclass(frozen=True)
class LCMSampler(BaseDiffusionSampler):
    """Multistep consistency sampling: jump to the picture, add noise, jump again.

    Luo et al. 2023, "Latent Consistency Models", multistep latent consistency sampling. The consistency
    function c_skip x / sqrt(1 + sigma^2) + c_out D is the identity at time step 0: with
    u = timestep_scaling * time step, c_skip = sigma_data^2 / (u^2 + sigma_data^2) and
    c_out = u / sqrt(u^2 + sigma_data^2).
    """

    sigma_data: float = 0.5
    timestep_scaling: float = 10.0

    def __post_init__(self):
        if not isinstance(self.discretization, DDPMDiscretization):
            raise ValueError("LCMSampler needs time steps: use LCMDiscretization or another DDPM one.")

    def trajectory(self, denoise, x, sigmas, noise):
        for sigma, sigma_next in pairwise(sigmas):
            u = self.timestep_scaling * float(self.discretization.timestep(sigma))
            norm = math.hypot(u, self.sigma_data)
            c_skip, c_out = (self.sigma_data / norm) ** 2, u / norm
            x = c_skip / math.hypot(1, sigma) * x + c_out * denoise(x, sigma)
            if sigma_next > 0:
                x = x + sigma_next * noise()
            yield x
