"""How conditional and unconditional predictions combine."""

from dataclasses import dataclass

import numpy as np


class NoDynamicThresholding:
    """Classifier-free guidance as it is (Ho and Salimans 2022, eq. 6, with their w = scale - 1)."""

    def __call__(self, uncond, cond, scale):
        return uncond + scale * (cond - uncond)


@dataclass(frozen=True)
class DynamicThresholding(NoDynamicThresholding):
    """Guidance that pulls oversaturated values in (Saharia et al. 2022, "Imagen", sec. 2.3).

    Values are clipped to [-s, s] and multiplied by threshold / s, where s is the `percentile` of a picture's
    absolute values, or `threshold` if that is larger.

    percentile: in [0, 1], the share of values that is not clipped.
    threshold: None takes the largest absolute value of the conditional prediction, because latents, unlike
        Imagen's pixels (threshold 1), have no fixed range.
    """

    percentile: float = 0.995
    threshold: float | None = None

    def __call__(self, uncond, cond, scale):
        guided = super().__call__(uncond, cond, scale)
        picture = dict(axis=(1, 2, 3), keepdims=True)
        limit = np.abs(cond).max(**picture) if self.threshold is None else self.threshold
        s = np.maximum(np.quantile(np.abs(guided), self.percentile, **picture).astype(guided.dtype), limit)
        return np.clip(guided, -s, s) * (limit / s)


class IdentityGuider:
    """The conditional prediction alone."""

    def prepare(self, x, sigma, cond, uncond):
        """Inputs of the one denoiser call of a step.

        Args:
            x: (B, 4, h, w); sigma: (B,).
            cond, uncond: dicts of arrays whose first axis is B; uncond may be None.
        Returns: x, sigma, cond to denoise, of batch B or, where both predictions are needed, 2B.
        """
        return x, sigma, cond

    def combine(self, denoised):
        """The denoised batch of `prepare` -> (B, 4, h, w)."""
        return denoised


class VanillaCFG:
    """Classifier-free guidance: uncond + scale * (cond - uncond), both predicted in one call.

    Args:
        scale: 1 is the conditional prediction alone, and costs half.
        dyn_thresh: how the two combine, (uncond, cond, scale) -> guided.
    """

    def __init__(self, scale, dyn_thresh=None):
        self.scale = float(scale)
        self.dyn_thresh = dyn_thresh or NoDynamicThresholding()

    def prepare(self, x, sigma, cond, uncond):
        if self.scale == 1:
            return x, sigma, cond
        if uncond is None:
            raise ValueError(f"A guidance scale of {self.scale} needs an unconditional conditioning (uc).")
        both = {key: np.concatenate((uncond[key], cond[key])) for key in cond}
        return np.concatenate((x, x)), np.concatenate((sigma, sigma)), both

    def combine(self, denoised):
        uncond, cond = (denoised, denoised) if self.scale == 1 else np.split(denoised, 2)
        return self.dyn_thresh(uncond, cond, self.scale)
