"""DiffusionEngine: the whole SDXL in one cell, whose attribute chains are the original checkpoint's keys."""

import gc

import numpy as np
from mindspore import Tensor, nn, ops

from gm import compile_cache
from gm.diffusion.denoiser import EpsWeighting
from gm.diffusion.discretizer import LegacyDDPMDiscretization
from gm.diffusion.loss import DiscreteSampling, StandardDiffusionLoss
from gm.models.autoencoder import Decode, Encode


class Model(nn.Cell):
    """Holds the UNet under the name that the checkpoint gives it."""

    def __init__(self, diffusion_model):
        super().__init__()
        self.diffusion_model = diffusion_model

    def construct(self, x, timesteps, context, y):
        return self.diffusion_model(x, timesteps, context, y)


class DiffusionEngine(nn.Cell):
    """Text encoders, UNet and autoencoder, frozen, and what turns them into a diffusion model.

    The cell itself computes the training loss. The host methods (`encode`, `decode`, `network`)
    take and give numpy arrays; each is a graph of its own, compiled once a shape.

    Args:
        network: the UNet.
        denoiser: DiscreteDenoiser: scalings and the noise levels.
        conditioner: GeneralConditioner: prompts and sizes to (vector, crossattn).
        first_stage: AutoencoderKL.
        sampler: of the config, or None.
        loss_fn: of the config; by default SDXL's own, the plain squared error of eps at uniformly drawn levels.
        scale_factor: what latents are multiplied by after encoding (SDXL: 0.13025).
    """

    def __init__(
        self, *, network, denoiser, conditioner, first_stage, sampler=None, loss_fn=None, scale_factor=1.0
    ):
        super().__init__()
        self.model = Model(network)
        self.conditioner = conditioner
        self.first_stage_model = first_stage
        self.denoiser = denoiser
        self.sampler = sampler
        self.loss_fn = loss_fn or StandardDiffusionLoss(
            DiscreteSampling(LegacyDDPMDiscretization(), 1000), loss_weighting=EpsWeighting()
        )
        self.scale_factor = scale_factor
        for parameter in self.get_parameters():
            parameter.requires_grad = False
        self.set_train(False)
        self._encode = Encode(first_stage)
        self._decode = Decode(first_stage)

    def construct(self, network_input, timesteps, target, weight, *conditioner_inputs):
        """The weighted squared error of the network (see `gm.diffusion.loss`).

        Args:
            network_input: (B, 4, h, w) noised latents, scaled as the network expects them.
            timesteps: (B,) float32.
            target: (B, 4, h, w) what the network should say (eps, for SDXL).
            weight: (B,) weight of each sample.
            conditioner_inputs: one tensor an embedder, see `GeneralConditioner.prepare`.

        Returns:
            Scalar: mean over samples of weight * mean((F - target)^2).
        """
        vector, crossattn = self.conditioner(*conditioner_inputs)
        output = self.model(network_input, timesteps, crossattn, vector)
        error = ops.mean(ops.square(output - target), (1, 2, 3))
        return ops.mean(error * weight)

    def drop_first_stage(self):
        """Give the autoencoder's memory back, where all pictures are encoded and none will be decoded."""
        del self._encode, self._decode, self.first_stage_model
        gc.collect()  # cells refer to each other

    def encode(self, images):
        """(B, 3, H, W) in [-1, 1] -> (B, 8, h, w) moments: mean and log-variance, unscaled. Numpy."""
        return compile_cache.call(self._encode, Tensor(images)).asnumpy()

    def decode(self, latents):
        """(B, 4, h, w) scaled latents -> (B, 3, H, W) in [-1, 1]. Numpy."""
        pixels = compile_cache.call(self._decode, Tensor(latents / np.float32(self.scale_factor)))
        return np.clip(pixels.asnumpy(), -1, 1)

    def network(self, x, timesteps, cond):
        """The UNet on numpy arrays: (B, 4, h, w), (B,), {"vector", "crossattn"} -> (B, 4, h, w)."""
        arrays = (x, timesteps, cond["crossattn"], cond["vector"])
        inputs = (Tensor(np.asarray(a, np.float32)) for a in arrays)
        return compile_cache.call(self.model.diffusion_model, *inputs).asnumpy()
