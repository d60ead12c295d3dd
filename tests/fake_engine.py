"""A DiffusionEngine without networks, for tests of what surrounds it; prompts, seeds and sizes do matter."""

from types import SimpleNamespace

import numpy as np

from gm.diffusion.denoiser import DiscreteDenoiser, EpsScaling
from gm.diffusion.discretizer import LegacyDDPMDiscretization
from gm.textual_inversion.embedding_file import Embedding, write_embedding
from tests.tiny_text import SIZE_KEYS, tiny_conditioner


def write_word(path, token="<toy>", *, num_vectors=2, widths=(32, 48), format="ckpt", seed=0):
    """Write a file of random rows as if they had been learned for the tiny SDXL; returns its path."""
    rng = np.random.default_rng(seed)
    rows = [rng.normal(0, 0.3, (num_vectors, width)).astype(np.float32) for width in widths]
    write_embedding(path, Embedding(token, *rows), format=format)
    return path


class FakeEngine:
    """Like DiffusionEngine, in numpy. Records what it was asked.

    batches: what was conditioned on, (batch, zero_text) each.
    calls: shapes of the network's inputs.
    """

    scale_factor = 0.13025
    first_stage_model = SimpleNamespace(embed_dim=4, downsampling=8)

    def __init__(self, *, kind="base"):
        self.conditioner = tiny_conditioner(kind=kind)  # its tokenizers and learned words are real
        self.conditioner.encode = self._encode_text
        self.denoiser = DiscreteDenoiser(EpsScaling(), LegacyDDPMDiscretization(), 1000)
        self.size_keys = SIZE_KEYS[kind]
        self.batches, self.calls = [], []

    def _encode_text(self, batch, *, zero_text):
        self.batches.append((batch, zero_text))
        embedder = self.conditioner.text_embedders[-1]
        ids, weights = embedder.tokenizer.encode_weighted(batch["txt"])
        context = np.sin(ids * weights).reshape(len(ids), -1, 1).astype(np.float32)
        context[np.asarray(zero_text)] = 0
        return np.concatenate([batch[key] for key in self.size_keys], axis=1).astype(np.float32), context

    def network(self, x, timesteps, cond):
        self.calls.append(x.shape)
        text = cond["crossattn"].mean(axis=(1, 2)) + 1e-4 * cond["vector"].mean(axis=1)
        return np.tanh(x + text[:, None, None, None]) + timesteps[:, None, None, None] / 1e4

    def encode(self, images):
        """The mean is three of the pixels' channels and a fourth, every eighth pixel."""
        mean = np.concatenate([images, images[:, :1]], axis=1)[:, :, ::8, ::8] / self.scale_factor
        return np.concatenate([mean, np.zeros_like(mean)], axis=1)

    def decode(self, latents):
        return np.clip(latents[:, :3].repeat(8, axis=2).repeat(8, axis=3) / 3, -1, 1)
