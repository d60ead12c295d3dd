"""A small SDXL for tests: random weights in the layout of the original single files.

The names and shapes are enumerated here, apart from gm, for any sizes; at full size they are exactly those of
Stability's two files (tests/test_tiny.py holds them to fixtures/sdxl_keys). Needs numpy and safetensors only;
`tiny_engine` alone imports gm.
"""

import re
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

FIXTURES = Path(__file__).parent / "fixtures"
TOKENIZER = FIXTURES / "tiny_tokenizer"
CONFIGS = {
    "base": FIXTURES / "tiny_sdxl.yaml",
    "refiner": FIXTURES / "tiny_refiner.yaml",
    "micro": FIXTURES / "micro_sdxl.yaml",  # a base that compiles in seconds
}


@dataclass(frozen=True)
class TextSize:
    width: int
    layers: int
    vocab: int
    positions: int = 77


@dataclass(frozen=True)
class Size:
    model_channels: int
    channel_mult: tuple
    num_res_blocks: int
    transformer_depth: (
        tuple  # a number a level, 0 where the level has no attention; the middle block is the last
    )
    adm_in_channels: int
    clip_l: TextSize | None  # the refiner has none
    clip_g: TextSize
    vae_channels: int
    vae_mult: tuple
    vae_res_blocks: int

    @property
    def context_dim(self):
        return self.clip_g.width + (self.clip_l.width if self.clip_l else 0)


SDXL = {
    "base": Size(
        320,
        (1, 2, 4),
        2,
        (0, 2, 10, 10),
        2816,
        TextSize(768, 12, 49408),
        TextSize(1280, 32, 49408),
        128,
        (1, 2, 4, 4),
        2,
    ),
    "refiner": Size(
        384, (1, 2, 4, 4), 2, (0, 4, 4, 0, 4), 2560, None, TextSize(1280, 32, 49408), 128, (1, 2, 4, 4), 2
    ),
}
VOCAB = 734  # of fixtures/tiny_tokenizer; the last two are <|startoftext|> and <|endoftext|>
TINY = {
    "base": Size(
        32,
        (1, 2, 4),
        1,
        (0, 1, 2, 2),
        48 + 6 * 256,
        TextSize(32, 3, VOCAB),
        TextSize(48, 3, VOCAB),
        32,
        (1, 2, 2, 2),
        1,
    ),
    "refiner": Size(
        32, (1, 2, 2, 2), 1, (0, 1, 1, 0, 1), 48 + 5 * 256, None, TextSize(48, 3, VOCAB), 32, (1, 2, 2, 2), 1
    ),
    "micro": Size(
        16, (1,), 1, (0, 1), 16 + 6 * 256, TextSize(16, 2, VOCAB), TextSize(16, 1, VOCAB), 16, (1, 1, 1), 1
    ),
}


def file_shapes(size):
    """Name -> shape of every tensor of a single file of this size."""
    shapes = {}

    def layer(name, *shape, bias=True):
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    _add_text_encoders(size, layer, shapes)
    _add_unet(size, layer)
    _add_vae(size, layer)
    return shapes


def _add_text_encoders(size, layer, shapes):
    number = 0
    if size.clip_l:
        w = size.clip_l.width
        at = "conditioner.embedders.0.transformer.text_model"
        layer(f"{at}.embeddings.token_embedding", size.clip_l.vocab, w, bias=False)
        layer(f"{at}.embeddings.position_embedding", size.clip_l.positions, w, bias=False)
        shapes[f"{at}.embeddings.position_ids"] = (1, size.clip_l.positions)
        for i in range(size.clip_l.layers):
            block = f"{at}.encoder.layers.{i}"
            for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
                layer(f"{block}.self_attn.{projection}", w, w)
            layer(f"{block}.layer_norm1", w)
            layer(f"{block}.layer_norm2", w)
            layer(f"{block}.mlp.fc1", 4 * w, w)
            layer(f"{block}.mlp.fc2", w, 4 * w)
        layer(f"{at}.final_layer_norm", w)
        number = 1

    w = size.clip_g.width
    at = f"conditioner.embedders.{number}.model"
    layer(f"{at}.token_embedding", size.clip_g.vocab, w, bias=False)
    shapes[f"{at}.positional_embedding"] = (size.clip_g.positions, w)
    shapes[f"{at}.text_projection"] = (w, w)
    shapes[f"{at}.logit_scale"] = ()
    for i in range(size.clip_g.layers):
        block = f"{at}.transformer.resblocks.{i}"
        shapes[f"{block}.attn.in_proj_weight"] = (3 * w, w)
        shapes[f"{block}.attn.in_proj_bias"] = (3 * w,)
        layer(f"{block}.attn.out_proj", w, w)
        layer(f"{block}.ln_1", w)
        layer(f"{block}.ln_2", w)
        layer(f"{block}.mlp.c_fc", 4 * w, w)
        layer(f"{block}.mlp.c_proj", w, 4 * w)
    layer(f"{at}.ln_final", w)


def _add_unet(size, layer):
    at = "model.diffusion_model"
    width = size.model_channels
    emb = 4 * width

    def res_block(name, ch_in, ch_out):
        layer(f"{name}.in_layers.0", ch_in)
        layer(f"{name}.in_layers.2", ch_out, ch_in, 3, 3)
        layer(f"{name}.emb_layers.1", ch_out, emb)
        layer(f"{name}.out_layers.0", ch_out)
        layer(f"{name}.out_layers.3", ch_out, ch_out, 3, 3)
        if ch_in != ch_out:
            layer(f"{name}.skip_connection", ch_out, ch_in, 1, 1)

    def transformer(name, ch, depth):
        layer(f"{name}.norm", ch)
        layer(f"{name}.proj_in", ch, ch)
        layer(f"{name}.proj_out", ch, ch)
        for i in range(depth):
            block = f"{name}.transformer_blocks.{i}"
            for attention, source in (("attn1", ch), ("attn2", size.context_dim)):
                layer(f"{block}.{attention}.to_q", ch, ch, bias=False)
                layer(f"{block}.{attention}.to_k", ch, source, bias=False)
                layer(f"{block}.{attention}.to_v", ch, source, bias=False)
                layer(f"{block}.{attention}.to_out.0", ch, ch)
            for norm in ("norm1", "norm2", "norm3"):
                layer(f"{block}.{norm}", ch)
            layer(f"{block}.ff.net.0.proj", 8 * ch, ch)
            layer(f"{block}.ff.net.2", ch, 4 * ch)

    layer(f"{at}.time_embed.0", emb, width)
    layer(f"{at}.time_embed.2", emb, emb)
    layer(f"{at}.label_emb.0.0", emb, size.adm_in_channels)
    layer(f"{at}.label_emb.0.2", emb, emb)

    layer(f"{at}.input_blocks.0.0", width, 4, 3, 3)
    ch, skips, block = width, [width], 1
    levels = len(size.channel_mult)
    for level, mult in enumerate(size.channel_mult):
        for _ in range(size.num_res_blocks):
            res_block(f"{at}.input_blocks.{block}.0", ch, mult * width)
            ch = mult * width
            if size.transformer_depth[level]:
                transformer(f"{at}.input_blocks.{block}.1", ch, size.transformer_depth[level])
            skips.append(ch)
            block += 1
        if level < levels - 1:
            layer(f"{at}.input_blocks.{block}.0.op", ch, ch, 3, 3)
            skips.append(ch)
            block += 1

    res_block(f"{at}.middle_block.0", ch, ch)
    transformer(f"{at}.middle_block.1", ch, size.transformer_depth[-1])
    res_block(f"{at}.middle_block.2", ch, ch)

    block = 0
    for level, mult in reversed(list(enumerate(size.channel_mult))):
        for i in range(size.num_res_blocks + 1):
            res_block(f"{at}.output_blocks.{block}.0", ch + skips.pop(), mult * width)
            ch = mult * width
            if size.transformer_depth[level]:
                transformer(f"{at}.output_blocks.{block}.1", ch, size.transformer_depth[level])
            if level and i == size.num_res_blocks:
                layer(
                    f"{at}.output_blocks.{block}.{2 if size.transformer_depth[level] else 1}.conv",
                    ch,
                    ch,
                    3,
                    3,
                )
            block += 1
    layer(f"{at}.out.0", ch)
    layer(f"{at}.out.2", 4, ch, 3, 3)


def _add_vae(size, layer):
    at = "first_stage_model"
    widths = [size.vae_channels * mult for mult in size.vae_mult]
    top = len(widths) - 1

    def res_block(name, ch_in, ch_out):
        layer(f"{name}.norm1", ch_in)
        layer(f"{name}.conv1", ch_out, ch_in, 3, 3)
        layer(f"{name}.norm2", ch_out)
        layer(f"{name}.conv2", ch_out, ch_out, 3, 3)
        if ch_in != ch_out:
            layer(f"{name}.nin_shortcut", ch_out, ch_in, 1, 1)

    def middle(name, ch):
        res_block(f"{name}.block_1", ch, ch)
        res_block(f"{name}.block_2", ch, ch)
        layer(f"{name}.attn_1.norm", ch)
        for projection in ("q", "k", "v", "proj_out"):
            layer(f"{name}.attn_1.{projection}", ch, ch, 1, 1)

    ch = widths[0]
    layer(f"{at}.encoder.conv_in", ch, 3, 3, 3)
    for level, width in enumerate(widths):
        for i in range(size.vae_res_blocks):
            res_block(f"{at}.encoder.down.{level}.block.{i}", ch, width)
            ch = width
        if level < top:
            layer(f"{at}.encoder.down.{level}.downsample.conv", ch, ch, 3, 3)
    middle(f"{at}.encoder.mid", ch)
    layer(f"{at}.encoder.norm_out", ch)
    layer(f"{at}.encoder.conv_out", 8, ch, 3, 3)
    layer(f"{at}.quant_conv", 8, 8, 1, 1)

    layer(f"{at}.post_quant_conv", 4, 4, 1, 1)
    layer(f"{at}.decoder.conv_in", ch, 4, 3, 3)
    middle(f"{at}.decoder.mid", ch)
    for level in reversed(range(top + 1)):
        for i in range(size.vae_res_blocks + 1):
            res_block(f"{at}.decoder.up.{level}.block.{i}", ch, widths[level])
            ch = widths[level]
        if level:
            layer(f"{at}.decoder.up.{level}.upsample.conv", ch, ch, 3, 3)
    layer(f"{at}.decoder.norm_out", ch)
    layer(f"{at}.decoder.conv_out", 3, ch, 3, 3)


# Residual streams are kept small (a deviation of about 0.1), so that the epsilon of every norm shows in the
# result: weights that lead into a stream are small, those that lead from one to the next keep its size. The
# context is a stream too, and is read at full size.
GAINS = {
    r"input_blocks\.0\.0|in_layers\.2|out_layers\.3|emb_layers|proj_in\.|to_out|ff\.net\.2|out_proj|mlp\.fc2|c_proj"
    r"|\.conv_in|conv1|conv2|attn_1\.proj_out": (0.03, 0.003),  # of weights and of biases
    r"skip_connection|\.op\.|blocks\.\d+\.\d\.conv\.|1\.proj_out|nin_shortcut|sample\.conv": (1, 0.003),
    r"attn2\.to_[kv]": (10, 0),
    r"decoder\.conv_out": (0.2, 0.02),  # pixels within [-1, 1]
}


def _random_tensor(name, shape, seed):
    """One tensor, the same whatever else is in the file; no activation explodes or vanishes."""
    if name.endswith("position_ids"):
        return np.arange(shape[1], dtype=np.int64)[None]
    if name.endswith("logit_scale"):
        return np.float32(np.log(100))
    # RandomState, because its stream is frozen: the stored reference numbers depend on it.
    values = np.random.RandomState([seed, zlib.crc32(name.encode())]).standard_normal(shape)
    gain, bias_gain = next((gains for names, gains in GAINS.items() if re.search(names, name)), (1, 0.1))
    if name.endswith("bias"):
        values *= bias_gain
    elif len(shape) == 1:  # a norm's weight
        values = 1 + 0.1 * values
    elif "embedding" in name:
        values *= 0.05
    elif name.endswith("text_projection"):
        values /= np.sqrt(shape[0])
    else:
        values *= gain / np.sqrt(np.prod(shape[1:]))
    return values.astype(np.float32)


def tiny_state_dict(seed=0, *, kind="base"):
    """Random weights of the tiny "base", "refiner" or "micro": original name -> array (fp32, `position_ids` int64)."""
    return {
        name: np.asarray(_random_tensor(name, shape, seed)) for name, shape in file_shapes(TINY[kind]).items()
    }


def write_tiny_weights(path, *, seed=0, kind="base", dtype=np.float32):
    """Write `tiny_state_dict` as one safetensors file and return its path."""
    state = tiny_state_dict(seed, kind=kind)
    save_file({name: v.astype(dtype) if v.dtype == np.float32 else v for name, v in state.items()}, str(path))
    return Path(path)


def tiny_engine(seed=0, *, kind="base"):
    """A fresh tiny DiffusionEngine built from its YAML and filled from a file, as a user's would be."""
    from gm.checkpoint import load_weights
    from gm.config import build_engine

    engine = build_engine(CONFIGS[kind])
    with tempfile.TemporaryDirectory() as folder:
        load_weights(engine, write_tiny_weights(Path(folder) / "tiny.safetensors", seed=seed, kind=kind))
    return engine
