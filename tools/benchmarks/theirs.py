"""Measure one case with diffusers, transformers and PyTorch, on networks of the sizes that our YAML gives.

Training goes as in diffusers' examples/textual_inversion/textual_inversion_sdxl.py, for both text encoders: their
whole token tables get gradients and AdamW, and all rows but the word's are put back after each step. Left out is what
would make it slower: encoding the pictures at every step, and the autoencoder in memory. In bf16 everything is bf16,
the tables included. See tools/benchmark_peers.py.
"""

import statistics
import time

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from omegaconf import OmegaConf
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from gm.config import load_config
from tools.benchmarks import GUIDANCE, NUM_VECTORS, find_model, measure_case

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
# Where the YAML gives no sizes, text encoders are SDXL's.
CLIP_L = {"width": 768, "layers": 12, "heads": 12, "vocab_size": 49408, "max_length": 77}
CLIP_G = {"width": 1280, "layers": 32, "heads": 20, "vocab_size": 49408, "max_length": 77, "embed_dim": 1280}


class Networks:
    """SDXL of diffusers, frozen, with default random weights.

    Args:
        config: our YAML.
        dtype: torch's, of all weights from the start: there is no second copy.
        new_rows: of both token tables, after the vocabulary.
    """

    def __init__(self, config, dtype, *, new_rows=0):
        params = OmegaConf.to_container(load_config(config).model, resolve=True)["params"]
        texts = params["conditioner_config"]["params"]["emb_models"][:2]
        clip_l, clip_g = (sizes | text["params"] for sizes, text in zip((CLIP_L, CLIP_G), texts))
        self.vocab_size, self.max_length = clip_l["vocab_size"], clip_l["max_length"]
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            self.unet = UNet2DConditionModel(**unet_config(params["network_config"]["params"]))
            self.text = CLIPTextModel(text_config(clip_l, "quick_gelu", new_rows))
            self.text_2 = CLIPTextModelWithProjection(text_config(clip_g, "gelu", new_rows))
            vae = params["first_stage_config"]["params"]
            self.vae = AutoencoderKL(**vae_config(vae["ddconfig"]), scaling_factor=params["scale_factor"])
        finally:
            torch.set_default_dtype(before)
        for net in (self.unet, self.text, self.text_2, self.vae):
            net.requires_grad_(False).eval()

    def encode(self, ids, ids_2):
        """(B, L) int64 token ids of both encoders -> context (B, L, C), pooled (B, D)."""
        states = self.text(ids, output_hidden_states=True).hidden_states[-2]
        output_2 = self.text_2(ids_2, output_hidden_states=True)
        return torch.cat((states, output_2.hidden_states[-2]), -1), output_2.text_embeds

    def loss(self, noisy, timesteps, noise, sizes, ids, ids_2):
        """Mean squared error of the predicted noise.

        Args:
            noisy, noise: (B, 4, h, w).
            timesteps: (B,) int64.
            sizes: (B, 6) original size, crop and target size.
            ids, ids_2: as of `encode`.
        """
        context, pooled = self.encode(ids, ids_2)
        conditions = {"text_embeds": pooled, "time_ids": sizes}
        predicted = self.unet(noisy, timesteps, context, added_cond_kwargs=conditions).sample
        return F.mse_loss(predicted.float(), noise.float())


def unet_config(ours):
    """Arguments of UNet2DConditionModel from our `network_config.params`."""
    widths = [ours["model_channels"] * mult for mult in ours["channel_mult"]]
    kinds = ["CrossAttn" if 2**level in ours["attention_resolutions"] else "" for level in range(len(widths))]
    return {
        "in_channels": ours["in_channels"],
        "out_channels": ours["out_channels"],
        "block_out_channels": widths,
        "layers_per_block": ours["num_res_blocks"],
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        "transformer_layers_per_block": ours["transformer_depth"],
        "attention_head_dim": [width // ours["num_head_channels"] for width in widths],  # their name for heads
        "cross_attention_dim": ours["context_dim"],
        "use_linear_projection": True,
        "norm_num_groups": ours.get("norm_num_groups", 32),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": ours["adm_in_channels"],
    }


def text_config(ours, activation, new_rows):
    """CLIPTextConfig from an entry of our `emb_models`."""
    vocab_size = ours["vocab_size"]
    return CLIPTextConfig(
        vocab_size=vocab_size + new_rows, hidden_size=ours["width"], intermediate_size=4 * ours["width"],
        num_hidden_layers=ours["layers"], num_attention_heads=ours["heads"], hidden_act=activation,
        max_position_embeddings=ours["max_length"], projection_dim=ours.get("embed_dim", ours["width"]),
        bos_token_id=vocab_size - 2, eos_token_id=vocab_size - 1, pad_token_id=1,
    )  # fmt: skip


def vae_config(ours):
    """Arguments of AutoencoderKL from our `ddconfig`."""
    widths = [ours["ch"] * mult for mult in ours["ch_mult"]]
    return {
        "block_out_channels": widths,
        "layers_per_block": ours["num_res_blocks"],
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "latent_channels": ours["z_channels"],
        "norm_num_groups": ours.get("norm_num_groups", 32),
    }


def make_networks(case, clock, **settings):
    nets = Networks(find_model(case.model).config, DTYPES[case.precision], **settings)
    clock.lap("build")
    clock.lap("load")  # they are built with their random weights
    return nets


def prompt_ids(nets, batch):
    """(B, L) int64: five words and, where the tables have them, the new rows."""
    words = [*range(5), *range(nets.vocab_size, nets.text.get_input_embeddings().num_embeddings)]
    ids = torch.full((batch, nets.max_length), nets.vocab_size - 1)
    ids[:, 0] = nets.vocab_size - 2
    ids[:, 1 : 1 + len(words)] = torch.tensor(words)
    return ids


def train(case, clock):
    """Seconds of every training step, from random latents to restored tables."""
    nets = make_networks(case, clock, new_rows=NUM_VECTORS)
    side = case.side // 2 ** (len(nets.vae.config.block_out_channels) - 1)
    nets.vae = None
    tables = [net.get_input_embeddings().weight.requires_grad_() for net in (nets.text, nets.text_2)]
    for net in (nets.text, nets.text_2):
        net.train()
    originals = [table.detach().clone() for table in tables]
    frozen = torch.arange(len(tables[0])) < nets.vocab_size
    optimizer = torch.optim.AdamW(tables, lr=5e-4, weight_decay=1e-2)
    scheduler = DDPMScheduler(**NOISE)
    dtype, ids = DTYPES[case.precision], prompt_ids(nets, case.batch)
    sizes = torch.tensor([[case.side, case.side, 0, 0, case.side, case.side]] * case.batch, dtype=dtype)

    def step():
        latents, noise = torch.randn(2, case.batch, 4, side, side, dtype=dtype)
        timesteps = torch.randint(1000, (case.batch,))
        noisy = scheduler.add_noise(latents, noise, timesteps)
        loss = nets.loss(noisy, timesteps, noise, sizes, ids, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for table, original in zip(tables, originals):
                table[frozen] = original[frozen]
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()}")

    return clock.time(step, case), {}


@torch.no_grad()
def sample(case, clock):
    """Seconds of every batch drawn, from token ids to pixels, and of the decoding in each."""
    nets = make_networks(case, clock)
    scheduler = EulerDiscreteScheduler(**NOISE, timestep_spacing="leading", steps_offset=1)
    pipe = StableDiffusionXLPipeline(
        nets.vae, nets.text, nets.text_2, None, None, nets.unet, scheduler, add_watermarker=False
    )
    pipe.set_progress_bar_config(disable=True)
    ids = prompt_ids(nets, 1)
    decoding = []

    def draw():
        context, pooled = nets.encode(ids, ids)
        latents = pipe(
            prompt_embeds=context, pooled_prompt_embeds=pooled, negative_prompt_embeds=torch.zeros_like(context),
            negative_pooled_prompt_embeds=torch.zeros_like(pooled), num_images_per_prompt=case.batch, height=case.side,
            width=case.side, guidance_scale=GUIDANCE, num_inference_steps=case.sampling_steps, output_type="latent",
        ).images  # fmt: skip
        start = time.monotonic()
        for one in latents / nets.vae.config.scaling_factor:  # one at a time, as we do
            pipe.image_processor.postprocess(nets.vae.decode(one[None]).sample, output_type="pil")
        decoding.append(time.monotonic() - start)

    times = clock.time(draw, case)
    return times, {"decode_s": statistics.median(decoding[-case.repeats :]) / case.batch}


if __name__ == "__main__":
    measure_case(train, sample)
