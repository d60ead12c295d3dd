"""From a raw network F to a denoiser D(x, sigma), and how much each noise level counts in training.

D(x, sigma) = c_skip x + c_out F(c_in x, c_noise)   (EDM, eq. 7)
"""

from dataclasses import dataclass

import numpy as np

from gm.diffusion.discretizer import nearest


class EpsScaling:
    """F predicts the noise eps; c_noise is sigma, for a discrete denoiser to look up."""

    def __call__(self, sigma):
        """(B,) sigma -> c_skip, c_out, c_in, c_noise, each (B,)."""
        return np.ones_like(sigma), -sigma, (sigma**2 + 1) ** -0.5, sigma


class VScaling:
    """F predicts v = (eps - sigma x0) / sqrt(1 + sigma^2) (Salimans and Ho 2022, sec. 4)."""

    def __call__(self, sigma):
        c_in = (sigma**2 + 1) ** -0.5
        return c_in**2, -sigma * c_in, c_in, sigma


class VScalingWithEDMcNoise(VScaling):
    """As VScaling, for a network that takes log(sigma) / 4 as its time."""

    def __call__(self, sigma):
        return *super().__call__(sigma)[:3], 0.25 * np.log(sigma)


@dataclass(frozen=True)
class EDMScaling:
    """Unit variance of input and target whatever sigma (EDM, table 1)."""

    sigma_data: float = 0.5  # standard deviation of the clean latents

    def __call__(self, sigma):
        c_in = (sigma**2 + self.sigma_data**2) ** -0.5
        return (self.sigma_data * c_in) ** 2, sigma * self.sigma_data * c_in, c_in, 0.25 * np.log(sigma)


class UnitWeighting:
    """Weights multiply the squared error of D, not of F."""

    def __call__(self, sigma):
        return np.ones_like(sigma)


class EpsWeighting:
    """Plain mean squared error of eps."""

    def __call__(self, sigma):
        return sigma**-2.0


@dataclass(frozen=True)
class EDMWeighting:
    """Plain mean squared error of F under EDMScaling (EDM, table 1)."""

    sigma_data: float = 0.5

    def __call__(self, sigma):
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2


@dataclass(frozen=True)
class VWeighting(EDMWeighting):
    """Plain mean squared error of v."""

    sigma_data: float = 1.0


class Denoiser:
    """D for a network that takes any noise level.

    Args:
        scaling: sigma -> c_skip, c_out, c_in, c_noise.
        weighting: sigma -> weight in the loss, unless the loss brings its own.
    """

    def __init__(self, scaling, weighting=None):
        self.scaling = scaling
        self.weighting = weighting

    def coefficients(self, sigma):
        """(B,) noise levels -> c_skip, c_out, c_in, c_noise, each (B,) float64."""
        return self.scaling(np.asarray(sigma, np.float64))

    def __call__(self, network, x, sigma, cond):
        """Estimate the clean latents.

        Args:
            network: (x (B, 4, h, w) float32, timesteps (B,) float32, cond) -> (B, 4, h, w) array.
            x: (B, 4, h, w) noisy latents.
            sigma: (B,) their noise levels.
            cond: handed to the network as it is.
        Returns: like x.
        """
        c_skip, c_out, c_in, c_noise = (c[:, None, None, None] for c in self.coefficients(sigma))
        prediction = network((c_in * x).astype(np.float32), c_noise.ravel().astype(np.float32), cond)
        return (c_skip * x + c_out * prediction).astype(x.dtype)


class DiscreteDenoiser(Denoiser):
    """D for a network that was trained on some noise levels: each sigma counts as the nearest of them.

    Args:
        discretization: (n, do_append_zero=, flip=) -> the trained levels.
        num_idx: how many levels.
        do_append_zero: whether 0 is one of them.
        quantize_c_noise: the network takes the level's index as its time, else the scaling's c_noise.
        flip: index 0 is the smallest level.
    """

    def __init__(
        self,
        scaling,
        discretization,
        num_idx,
        weighting=None,
        do_append_zero=False,
        quantize_c_noise=True,
        flip=True,
    ):
        super().__init__(scaling, weighting)
        self.sigmas = discretization(num_idx, do_append_zero=do_append_zero, flip=flip)  # (num_idx,)
        self.quantize_c_noise = quantize_c_noise

    def coefficients(self, sigma):
        index = nearest(self.sigmas, sigma)
        c_skip, c_out, c_in, c_noise = self.scaling(self.sigmas[index])
        return c_skip, c_out, c_in, index.astype(np.float64) if self.quantize_c_noise else c_noise
