"""Which noise levels training draws, and what the network should answer."""

from dataclasses import dataclass

import numpy as np


class DiscreteSampling:
    """Trained levels, each as likely as the others."""

    def __init__(self, discretization, num_idx, do_append_zero=False, flip=True):
        self.sigmas = discretization(num_idx, do_append_zero=do_append_zero, flip=flip)

    def __call__(self, rng, n):
        """n levels, (n,) float64, from a numpy Generator."""
        return self.sigmas[rng.integers(len(self.sigmas), size=n)]


@dataclass(frozen=True)
class EDMSampling:
    """log sigma ~ N(p_mean, p_std^2) (EDM, table 1)."""

    p_mean: float = -1.2
    p_std: float = 1.2

    def __call__(self, rng, n):
        return np.exp(self.p_mean + self.p_std * rng.standard_normal(n))


@dataclass(frozen=True)
class StandardDiffusionLoss:
    """Weighted squared error of the denoised latents, written as a squared error of the network's own output.

    weighting(sigma) (D - z0)^2 = weight (F - target)^2 with weight = weighting(sigma) c_out^2 and
    target = (z0 - c_skip z) / c_out   (EDM, eq. 8). For eps prediction the target is eps and the weight 1.

    sigma_sampler: (rng, n) -> sigmas. SGM's YAML gives it here, others beside the loss.
    loss_weighting: sigma -> weight; by default the denoiser's.
    type: "l2", the only one.
    offset_noise_level: each picture's noise gets a constant drawn from N(0, level^2) added, so that its mean
        brightness is learned too (Guttenberg 2023, "Diffusion with Offset Noise").
    """

    sigma_sampler: object = None
    loss_weighting: object = None
    type: str = "l2"
    offset_noise_level: float = 0.0

    def __post_init__(self):
        if self.type != "l2":
            raise ValueError(f"loss type '{self.type}' is not supported; use 'l2'.")

    def draw(self, rng, shape):
        """Noise and noise levels of one batch.

        Args:
            rng: numpy Generator.
            shape: (B, 4, h, w).
        Returns: eps like shape, float32, and sigma (B,) float64.
        """
        if self.sigma_sampler is None:
            raise ValueError("The loss has no sigma_sampler; add sigma_sampler_config to the model's YAML.")
        sigma = self.sigma_sampler(rng, shape[0])
        eps = rng.standard_normal(shape, dtype=np.float32)
        if self.offset_noise_level > 0:
            eps += self.offset_noise_level * rng.standard_normal((shape[0], 1, 1, 1), dtype=np.float32)
        return eps, sigma

    def prepare(self, denoiser, z0, *, eps, sigma):
        """Everything the network needs for one batch.

        Args:
            denoiser: the Denoiser that the network will be sampled with.
            z0: (B, 4, h, w) clean latents, already times the VAE's scale factor.
            eps: like z0, drawn from N(0, 1).
            sigma: (B,) noise levels.
        Returns: network_input (B, 4, h, w), timesteps (B,), target (B, 4, h, w) and weight (B,), all float32;
            the loss of a picture is weight * mean((F(network_input, timesteps) - target)^2).
        """
        weighting = self.loss_weighting or denoiser.weighting
        if weighting is None:
            raise ValueError("The loss has no weighting; add weighting_config to the YAML's denoiser.")
        c_skip, c_out, c_in, c_noise = denoiser.coefficients(sigma)
        per_picture = (-1, 1, 1, 1)
        z = z0 + sigma.reshape(per_picture) * eps
        # The target's shares of z0 and eps are formed first: for eps prediction the former is exactly 0.
        z0_share, eps_share = (1 - c_skip) / c_out, -c_skip * sigma / c_out
        target = z0_share.reshape(per_picture) * z0 + eps_share.reshape(per_picture) * eps
        arrays = c_in.reshape(per_picture) * z, c_noise, target, weighting(sigma) * c_out**2
        return tuple(array.astype(np.float32) for array in arrays)
