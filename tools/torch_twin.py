"""The small model's networks once more, in PyTorch, for pretraining only.

MindSpore's CPU kernels train these widths at a quarter of PyTorch's pace (see checkpoints/sd_xl_small.md), so
`pretrain_small.py` trains this twin. Cells, parameters and defaults are those of gm.models, and names are those of
the original SDXL file: a state dict of `SmallSDXL` is a checkpoint. tests/tools holds the two to the same outputs.
"""

from __future__ import annotations

import math
import re

import torch
import torch.nn.functional as F
from torch import nn


def _attention(q, k, v, heads, *, causal=False):
    """(B, Lq, C), (B, Lk, C) -> (B, Lq, C)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5  # PyTorch's fused kernel takes twice as long at these sizes on a CPU
    if causal:
        scores = scores + torch.full(scores.shape[-2:], -math.inf, device=q.device).triu(1)
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)


def _conv(channels, out_channels, kernel=3, *, stride=1, padding=None):
    return nn.Conv2d(channels, out_channels, kernel, stride, kernel // 2 if padding is None else padding)


def _waves(numbers, dim):
    """(N,) -> (N, dim) sinusoids, cosines first."""
    frequencies = torch.exp(torch.arange(dim // 2, device=numbers.device) * (-math.log(10000) / (dim // 2)))
    angles = numbers.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), 1)


# ---------------------------------------------------------------- autoencoder


class _VAEBlock(nn.Module):
    def __init__(self, channels, out_channels, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, 1e-6)
        self.conv1 = _conv(channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, 1e-6)
        self.conv2 = _conv(out_channels, out_channels)
        if channels != out_channels:
            self.nin_shortcut = _conv(channels, out_channels, 1)

    def forward(self, x):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class _VAEAttention(nn.Module):
    def __init__(self, channels, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, 1e-6)
        self.q, self.k, self.v, self.proj_out = (_conv(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return x + self.proj_out(_attention(q, k, v, 1).transpose(1, 2).unflatten(2, x.shape[2:]))


class _VAEMiddle(nn.Module):
    def __init__(self, channels, groups):
        super().__init__()
        self.block_1 = _VAEBlock(channels, channels, groups)
        self.attn_1 = _VAEAttention(channels, groups)
        self.block_2 = _VAEBlock(channels, channels, groups)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class _Down(nn.Module):
    def __init__(self, widths, groups, *, is_last):
        super().__init__()
        self.block = nn.ModuleList(_VAEBlock(a, b, groups) for a, b in zip(widths, widths[1:]))
        if not is_last:
            self.downsample = nn.Module()
            self.downsample.conv = _conv(widths[-1], widths[-1], stride=2, padding=0)

    def forward(self, x):
        for block in self.block:
            x = block(x)
        return self.downsample.conv(F.pad(x, (0, 1, 0, 1))) if hasattr(self, "downsample") else x


class _Up(nn.Module):
    def __init__(self, widths, groups, *, is_last):
        super().__init__()
        self.block = nn.ModuleList(_VAEBlock(a, b, groups) for a, b in zip(widths, widths[1:]))
        if not is_last:
            self.upsample = nn.Module()
            self.upsample.conv = _conv(widths[-1], widths[-1])

    def forward(self, x):
        for block in self.block:
            x = block(x)
        return self.upsample.conv(F.interpolate(x, scale_factor=2.0)) if hasattr(self, "upsample") else x


class _Encoder(nn.Module):
    def __init__(self, dd, groups):
        super().__init__()
        widths = [dd["ch"]] + [dd["ch"] * m for m in dd["ch_mult"]]
        last = len(widths) - 2
        self.conv_in = _conv(dd["in_channels"], widths[0])
        self.down = nn.ModuleList(
            _Down([widths[i]] + [widths[i + 1]] * dd["num_res_blocks"], groups, is_last=i == last)
            for i in range(last + 1)
        )
        self.mid = _VAEMiddle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], 1e-6)
        self.conv_out = _conv(widths[-1], 2 * dd["z_channels"])

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class _Decoder(nn.Module):
    def __init__(self, dd, groups):
        super().__init__()
        widths = [dd["ch"] * m for m in dd["ch_mult"]] + [dd["ch"] * dd["ch_mult"][-1]]
        self.conv_in = _conv(dd["z_channels"], widths[-1])
        self.mid = _VAEMiddle(widths[-1], groups)
        self.up = nn.ModuleList(
            _Up([widths[i + 1]] + [widths[i]] * (dd["num_res_blocks"] + 1), groups, is_last=i == 0)
            for i in range(len(widths) - 1)
        )
        self.norm_out = nn.GroupNorm(groups, widths[0], 1e-6)
        self.conv_out = _conv(widths[0], dd["out_ch"])

    def forward(self, z):
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoencoderKL(nn.Module):
    def __init__(self, *, embed_dim, ddconfig):
        super().__init__()
        groups = ddconfig.get("norm_num_groups", 32)
        self.encoder, self.decoder = _Encoder(ddconfig, groups), _Decoder(ddconfig, groups)
        self.quant_conv = _conv(2 * ddconfig["z_channels"], 2 * embed_dim, 1)
        self.post_quant_conv = _conv(embed_dim, ddconfig["z_channels"], 1)

    def encode(self, x):
        """(B, 3, H, W) in [-1, 1] -> (B, 8, h, w): mean and log-variance."""
        return self.quant_conv(self.encoder(x))

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z))


# ---------------------------------------------------------------- UNet


class _ResBlock(nn.Module):
    def __init__(self, channels, emb_channels, out_channels, groups):
        super().__init__()
        norms = nn.GroupNorm(groups, channels, 1e-5), nn.GroupNorm(groups, out_channels, 1e-5)
        self.in_layers = nn.Sequential(norms[0], nn.SiLU(), _conv(channels, out_channels))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(norms[1], nn.SiLU(), nn.Identity(), _conv(out_channels, out_channels))
        self.skip_connection = nn.Identity() if channels == out_channels else _conv(channels, out_channels, 1)

    def forward(self, x, emb, context):
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class _CrossAttention(nn.Module):
    def __init__(self, dim, context_dim, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x, context):
        return self.to_out(_attention(self.to_q(x), self.to_k(context), self.to_v(context), self.heads))


class _GEGLU(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Linear(dim, 8 * dim)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, -1)
        return value * F.gelu(gate)


class _FeedForward(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.net = nn.Sequential(_GEGLU(dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        return self.net(x)


class _TransformerBlock(nn.Module):
    def __init__(self, dim, context_dim, heads):
        super().__init__()
        self.attn1 = _CrossAttention(dim, dim, heads)
        self.attn2 = _CrossAttention(dim, context_dim, heads)
        self.ff = _FeedForward(dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, x, context):
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class _SpatialTransformer(nn.Module):
    def __init__(self, channels, context_dim, heads, depth, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, 1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(_TransformerBlock(channels, context_dim, heads) for _ in range(depth))
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x, emb, context):
        tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


class _Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.op = _conv(channels, channels, stride=2)

    def forward(self, x, emb, context):
        return self.op(x)


class _Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = _conv(channels, channels)

    def forward(self, x, emb, context):
        return self.conv(F.interpolate(x, scale_factor=2.0))


class _FirstConv(nn.Conv2d):
    def forward(self, x, emb, context):
        return super().forward(x)


class _Block(nn.Sequential):
    def forward(self, x, emb, context):
        for layer in self:
            x = layer(x, emb, context)
        return x


class UNetModel(nn.Module):
    """Takes the `network_config.params` of a YAML, as gm.models.unet.UNetModel does."""

    def __init__(
        self, *, in_channels, out_channels, model_channels, attention_resolutions, num_res_blocks, channel_mult,
        transformer_depth, num_head_channels, context_dim, adm_in_channels, norm_num_groups=32,
    ):  # fmt: skip
        super().__init__()
        self.model_channels = model_channels
        emb = 4 * model_channels
        self.time_embed = nn.Sequential(nn.Linear(model_channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.label_emb = nn.Sequential(
            nn.Sequential(nn.Linear(adm_in_channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        )

        def res_block(channels, out):
            return _ResBlock(channels, emb, out, norm_num_groups)

        def transformer(channels, level):
            heads = channels // num_head_channels
            return _SpatialTransformer(channels, context_dim, heads, transformer_depth[level], norm_num_groups)

        def with_attention(layers, channels, level):
            return layers + ([transformer(channels, level)] if 2**level in attention_resolutions else [])

        ch, skips = model_channels, [model_channels]
        blocks = [_Block(_FirstConv(in_channels, ch, 3, padding=1))]
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                out = mult * model_channels
                blocks.append(_Block(*with_attention([res_block(ch, out)], out, level)))
                ch = out
                skips.append(ch)
            if level < len(channel_mult) - 1:
                blocks.append(_Block(_Downsample(ch)))
                skips.append(ch)
        self.input_blocks = nn.ModuleList(blocks)
        self.middle_block = _Block(res_block(ch, ch), transformer(ch, len(channel_mult) - 1), res_block(ch, ch))
        blocks = []
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks + 1):
                out = mult * model_channels
                layers = with_attention([res_block(ch + skips.pop(), out)], out, level)
                ch = out
                if level and i == num_res_blocks:
                    layers.append(_Upsample(ch))
                blocks.append(_Block(*layers))
        self.output_blocks = nn.ModuleList(blocks)
        self.out = nn.Sequential(nn.GroupNorm(norm_num_groups, ch, 1e-5), nn.SiLU(), _conv(ch, out_channels))

    def forward(self, x, timesteps, context, y):
        emb = self.time_embed(_waves(timesteps, self.model_channels)) + self.label_emb(y)
        skips = []
        for block in self.input_blocks:
            x = block(x, emb, context)
            skips.append(x)
        x = self.middle_block(x, emb, context)
        for block in self.output_blocks:
            x = block(torch.cat((x, skips.pop()), 1), emb, context)
        return self.out(x)


# ---------------------------------------------------------------- text encoders


class _CLIPAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        return self.out_proj(_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, causal=True))


class _CLIPMLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class _CLIPLayer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn, self.mlp = _CLIPAttention(width, heads), _CLIPMLP(width)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEmbedder(nn.Module):
    """Text encoder 1: ids (B, L) -> the states that enter layer `layer_idx`, (B, L, width)."""

    def __init__(self, *, width, layers, heads, vocab_size, max_length, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        text = nn.Module()
        text.embeddings = nn.Module()
        text.embeddings.token_embedding = nn.Embedding(vocab_size, width)
        text.embeddings.position_embedding = nn.Embedding(max_length, width)
        text.encoder = nn.Module()
        text.encoder.layers = nn.ModuleList(_CLIPLayer(width, heads) for _ in range(layers))
        text.final_layer_norm = nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.text_model = text

    def forward(self, ids):
        text = self.transformer.text_model
        x = text.embeddings.token_embedding(ids) + text.embeddings.position_embedding.weight[: ids.shape[1]]
        for layer in text.encoder.layers[: self.layer_idx]:
            x = layer(x)
        return x


class _PackedAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        return self.out_proj(_attention(q, k, v, self.heads, causal=True))


class _OpenCLIPMLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))


class _OpenCLIPLayer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = _PackedAttention(width, heads), _OpenCLIPMLP(width)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class OpenCLIPEmbedder(nn.Module):
    """Text encoder 2: ids (B, L) -> penultimate states (B, L, width), and (B, embed_dim) at the first end of text."""

    def __init__(self, *, width, layers, heads, embed_dim, vocab_size, max_length):
        super().__init__()
        self.eos_id = vocab_size - 1
        self.model = model = nn.Module()
        model.token_embedding = nn.Embedding(vocab_size, width)
        model.positional_embedding = nn.Parameter(torch.zeros(max_length, width))
        model.transformer = nn.Module()
        model.transformer.resblocks = nn.ModuleList(_OpenCLIPLayer(width, heads) for _ in range(layers))
        model.ln_final = nn.LayerNorm(width)
        model.text_projection = nn.Parameter(torch.zeros(width, embed_dim))

    def forward(self, ids):
        x = self.model.token_embedding(ids) + self.model.positional_embedding[: ids.shape[1]]
        *layers, last = self.model.transformer.resblocks
        for layer in layers:
            x = layer(x)
        end = (ids == self.eos_id).int().argmax(1)
        pooled = last(x)[torch.arange(len(ids), device=ids.device), end]
        return x, self.model.ln_final(pooled) @ self.model.text_projection


class Conditioner(nn.Module):
    """Two text encoders; size numbers become sinusoids of width `outdim`."""

    def __init__(self, clip, open_clip, outdim):
        super().__init__()
        self.embedders = nn.ModuleList((CLIPEmbedder(**clip), OpenCLIPEmbedder(**open_clip)))
        self.outdim = outdim

    def forward(self, ids1, ids2, sizes, keep):
        """Two (B, L) arrays of ids, (B, 6) size numbers, (B, 1) 0 where the text counts as unsaid -> (y, context)."""
        states1 = self.embedders[0](ids1)
        states2, pooled = self.embedders[1](ids2)
        waves = _waves(sizes.flatten(), self.outdim).reshape(len(sizes), -1)
        return torch.cat((pooled * keep, waves), 1), torch.cat((states1, states2), 2) * keep[:, :, None]


class SmallSDXL(nn.Module):
    """All networks of a YAML's `model.params`, under the original checkpoint's names."""

    def __init__(self, params):
        super().__init__()
        texts = [dict(entry["params"]) for entry in params["conditioner_config"]["params"]["emb_models"][:3]]
        clip = {k: texts[0][k] for k in ("width", "layers", "heads", "vocab_size", "max_length", "layer_idx")}
        open_clip = {k: texts[1][k] for k in ("width", "layers", "heads", "embed_dim", "vocab_size", "max_length")}
        first_stage = params["first_stage_config"]["params"]
        self.model = nn.Module()
        self.model.diffusion_model = UNetModel(**params["network_config"]["params"])
        self.conditioner = Conditioner(clip, open_clip, texts[2]["outdim"])
        self.first_stage_model = AutoencoderKL(embed_dim=first_stage["embed_dim"], ddconfig=first_stage["ddconfig"])
        self.to(memory_format=torch.channels_last)


@torch.no_grad()
def initialise(net, *, generator):
    """First weights, drawn in the order of names.

    Branches end near zero, so that each residual block starts as its skip connection. Token rows are small, as
    CLIP's are: the layers' norms make them large, and learned rows live at the same scale.
    """
    last_of_branch = re.compile(r"conv2|out_layers\.3|proj_out|\.out\.2").search
    inside_branch = re.compile(r"out_proj|fc2|c_proj|to_out|ff\.net\.2").search
    norms = {f"{n}.weight" for n, m in net.named_modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm))}
    for name, parameter in sorted(net.named_parameters()):
        if "embedding" in name:
            parameter.normal_(0, 0.01 if "position" in name else 0.02, generator=generator)
        elif parameter.ndim == 1:
            parameter.fill_(float(name in norms))
        else:
            fan_in = parameter.shape[0] if name.endswith("text_projection") else parameter[0].numel()
            gain = 0.1 if last_of_branch(name) else 0.5 if inside_branch(name) else 1.0
            parameter.normal_(0, gain / math.sqrt(fan_in), generator=generator)
