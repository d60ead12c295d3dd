"""Which noise levels a sampler visits and a model was trained on."""

from dataclasses import dataclass

import numpy as np


def nearest(table, sigma):
    """Index of the entry of `table` (T,) closest to each `sigma` (any shape); the first of two as close."""
    return np.abs(np.asarray(sigma)[..., None] - table).argmin(axis=-1)


class Discretization:
    def __call__(self, n, do_append_zero=True, flip=False):
        """n noise levels, in latent units, largest first.

        Args:
            n: number of levels, each of which costs a sampler at least one network call.
            do_append_zero: end with the level 0, where the picture is.
            flip: smallest first.
        Returns: (n,) or, with the zero, (n + 1,) float64.
        """
        sigmas = self.get_sigmas(n)
        if do_append_zero:
            sigmas = np.append(sigmas, 0.0)
        return sigmas[::-1] if flip else sigmas


@dataclass(frozen=True)
class EDMDiscretization(Discretization):
    """Evenly spaced in sigma^(1/rho) (EDM, eq. 5)."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def get_sigmas(self, n):
        return np.linspace(self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho), n) ** self.rho


@dataclass(frozen=True)
class DDPMDiscretization(Discretization):
    """The training steps of a DDPM with scaled-linear betas; subclasses choose which of them to visit.

    sqrt(beta_t) is linear in t, and sigma_t^2 = (1 - abar_t) / abar_t, where abar_t is the product of
    1 - beta up to t (Ho et al. 2020, eq. 4).
    """

    linear_start: float = 0.00085
    linear_end: float = 0.0120
    num_timesteps: int = 1000

    def training_sigmas(self):
        """(num_timesteps,) float64, smallest first: index = time step."""
        betas = np.linspace(self.linear_start**0.5, self.linear_end**0.5, self.num_timesteps) ** 2
        alphas_cumprod = np.cumprod(1 - betas)
        return np.sqrt((1 - alphas_cumprod) / alphas_cumprod)

    def timestep(self, sigma):
        """The time step whose noise level is closest to `sigma`."""
        return nearest(self.training_sigmas(), sigma)

    def get_sigmas(self, n):
        if not 1 <= n <= self.num_timesteps:
            raise ValueError(f"{n} sampling steps asked for; choose 1 to {self.num_timesteps}.")
        # Time steps need not be whole: between two of them sigma is linear.
        return np.interp(self.timesteps(n), np.arange(self.num_timesteps), self.training_sigmas())


@dataclass(frozen=True)
class LegacyDDPMDiscretization(DDPMDiscretization):
    """SGM's spacing, in use with SDXL: n even parts of the way from the last time step to 0, truncated."""

    def timesteps(self, n):
        return np.linspace(self.num_timesteps - 1, 0, n, endpoint=False).astype(int)


@dataclass(frozen=True)
class DiffusersDDPMDiscretization(DDPMDiscretization):
    """The spacings of diffusers' schedulers (names of Lin et al. 2024, table 2).

    interpolation_type: "linear" takes sigma at the time steps; "log_linear" ignores them and spaces the
        levels evenly in log sigma (the last step goes to 0; diffusers' to the smallest training level).
    timestep_spacing: "leading" (which starts low: at 951 of 1000 for 20 steps), "trailing" or "linspace".
    steps_offset: added to the "leading" time steps.
    """

    interpolation_type: str = "linear"
    timestep_spacing: str = "leading"
    steps_offset: int = 1

    def __post_init__(self):
        if self.interpolation_type not in ("linear", "log_linear"):
            raise ValueError(f"interpolation_type is '{self.interpolation_type}', not linear or log_linear.")
        if self.timestep_spacing not in ("leading", "trailing", "linspace"):
            raise ValueError(
                f"timestep_spacing is '{self.timestep_spacing}', not leading, trailing or linspace."
            )

    def timesteps(self, n):
        last = self.num_timesteps - 1
        if n == self.num_timesteps:
            return np.arange(n)[::-1]
        if self.timestep_spacing == "linspace":
            return np.linspace(last, 0, n)
        if self.timestep_spacing == "trailing":
            return np.round(self.num_timesteps - np.arange(n) * (self.num_timesteps / n)) - 1
        steps = np.arange(n)[::-1] * (self.num_timesteps // n) + self.steps_offset
        if steps[0] > last:
            raise ValueError(
                f"{n} leading steps with steps_offset {self.steps_offset} start at time step {steps[0]}, but "
                f"the last one is {last}; lower steps_offset."
            )
        return steps

    def get_sigmas(self, n):
        if self.interpolation_type == "linear":
            return super().get_sigmas(n)
        sigmas = self.training_sigmas()
        return np.geomspace(sigmas[-1], sigmas[0], n + 1)[:n]


@dataclass(frozen=True)
class LCMDiscretization(DDPMDiscretization):
    """n of the `original_steps` time steps that a latent consistency model was distilled on.

    Luo et al. 2023, "Latent Consistency Models", sec. 4.3 (the skipping-step technique).
    """

    original_steps: int = 50

    def timesteps(self, n):
        if n > self.original_steps:
            raise ValueError(f"{n} LCM steps asked for; the model was distilled on {self.original_steps}.")
        distilled = np.arange(self.original_steps, 0, -1) * (self.num_timesteps // self.original_steps) - 1
        return distilled[np.linspace(0, self.original_steps, n, endpoint=False).astype(int)]
