"""An endless, seeded stream of training samples.

Sample k of a run (k = 0, 1, ...) is a pure function of the seed and k: a random generator of its own draws
its caption, view, latent, noise and noise level, and the shuffle of its epoch decides its picture. A step of
N ranks with batch B consumes samples k to k + N*B - 1, rank r the r-th slice of B. Hence
- ranks differ, and share an epoch's pictures without repeats;
- N ranks with batch B see the same samples as one rank with batch N*B, or as N*B steps of one;
- the whole state is one number, and a resumed stream continues bit for bit.
"""

import hashlib
import json
from dataclasses import dataclass

import numpy as np

from gm.data import latents as latents_module

SHUFFLE, SAMPLE = 0, 1  # branches of the seed


@dataclass(frozen=True)
class Batch:
    """What one forward and backward step needs; all arrays on the host."""

    z0: np.ndarray  # (B, 4, h, w) float32, times the scale factor
    eps: np.ndarray  # like z0, from N(0, 1)
    sigma: np.ndarray  # (B,) float64 noise level
    captions: list[str]
    original_size: np.ndarray  # (B, 2) float32 (h, w)
    crop_coords_top_left: np.ndarray  # (B, 2) float32 (y, x)
    target_size: np.ndarray  # (B, 2) float32 (h, w)


class Batches:
    """Iterator over Batch without end. Every picture comes once before any comes again.

    Args:
        latents: Latents of N pictures; more or fewer than the batch.
        captions: N sequences of captions, the word filled in; one is drawn each time.
        draw: (numpy Generator, shape (n, 4, h, w)) -> eps of that shape and sigma (n,), as the loss's `draw`.
        scale_factor: of the first stage, 0.13025 for SDXL.
        batch_size: samples per rank and step.
        seed: of the run, the same on all ranks; 0 is a seed.
        rank, world_size: which slice of the common stream this process takes.
    """

    def __init__(self, latents, captions, *, draw, scale_factor, batch_size, seed, rank=0, world_size=1):
        if batch_size < 1:
            raise ValueError(f"--train_batch_size must be at least 1, not {batch_size}.")
        if seed < 0:
            raise ValueError(f"--seed must be 0 or more, not {seed}.")
        assert len(latents) == len(captions) > 0 and all(captions) and 0 <= rank < world_size
        self.latents = latents
        self.captions = [tuple(choices) for choices in captions]
        self.draw = draw
        self.scale_factor = scale_factor
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.position = 0  # samples that all ranks together have consumed
        data = json.dumps([latents.digest, self.captions])
        self.digest = hashlib.sha256(data.encode()).hexdigest()

    def __iter__(self):
        return self

    def __next__(self):
        start = self.position + self.rank * self.batch_size
        self.position += self.world_size * self.batch_size
        samples = [self._draw(k) for k in range(start, start + self.batch_size)]
        z0, eps, sigma, captions, original_size, crop = zip(*samples, strict=True)
        return Batch(
            z0=np.stack(z0),
            eps=np.concatenate(eps),
            sigma=np.concatenate(sigma),
            captions=list(captions),
            original_size=np.stack(original_size),
            crop_coords_top_left=np.stack(crop),
            target_size=np.tile(self.latents.target_size, (self.batch_size, 1)),
        )

    def state_dict(self):
        """Where the stream stands, as JSON can hold it."""
        return {"seed": self.seed, "position": self.position, "data": self.digest}

    def load_state_dict(self, state):
        """Continue from `state_dict()`; ValueError if it is of other pictures, captions or another seed."""
        if state["seed"] != self.seed:
            raise ValueError(f"the run to resume has --seed {state['seed']}, not {self.seed}.")
        if state["data"] != self.digest:
            raise ValueError(
                "the pictures, their crops, their captions or the VAE differ from those of the run to "
                "resume; restore them, or start anew under another --save_path."
            )
        self.position = state["position"]

    def _draw(self, k):
        epoch, place = divmod(k, len(self.latents))
        # A shuffle a sample costs microseconds for hundreds of pictures, and keeps the stream free of state.
        picture = self._rng(SHUFFLE, epoch).permutation(len(self.latents))[place]
        rng = self._rng(SAMPLE, k)
        choices = self.captions[picture]
        caption = choices[rng.integers(len(choices))]
        view = rng.integers(self.latents.moments.shape[1])
        z0 = latents_module.sample(self.latents.moments[picture, view], rng) * np.float32(self.scale_factor)
        eps, sigma = self.draw(rng, (1, *z0.shape))
        original_size = self.latents.original_size[picture]
        return z0, eps, sigma, caption, original_size, self.latents.crop_coords_top_left[picture, view]

    def _rng(self, branch, index):
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(branch, index)))
