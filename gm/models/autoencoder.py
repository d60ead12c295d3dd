"""SDXL's autoencoder (Rombach et al. 2022, sec. 3.1): pictures to latents eight times smaller, and back.

Float32 where the rest is float16, in which SDXL's weights overflow. bfloat16 has float32's range, so the decoder's
matrices may be in it; the encoder's stay float32, since what it gives is learned from.
"""

import mindspore as ms
from mindspore import nn, ops

from gm.models.layers import (
    Attention,
    Conv2d,
    GroupNorm,
    Upsample,
    current_dtype,
    from_feature_map,
    from_tokens,
    parameter_dtype,
    to_feature_map,
    to_tokens,
)


class ResnetBlock(nn.Cell):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on x where channels change."""

    def __init__(self, channels, out_channels, num_groups):
        super().__init__()
        self.norm1 = GroupNorm(channels, 1e-6, num_groups=num_groups, activation="silu")
        self.conv1 = Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(out_channels, 1e-6, num_groups=num_groups, activation="silu")
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Identity() if channels == out_channels else Conv2d(channels, out_channels, 1)

    def construct(self, x):
        h = self.conv1(self.norm1(x))
        return self.nin_shortcut(x) + self.conv2(self.norm2(h))


class AttnBlock(nn.Cell):
    """One head of self attention over all positions, added to the map."""

    def __init__(self, channels, num_groups):
        super().__init__()
        self.norm = GroupNorm(channels, 1e-6, num_groups=num_groups)
        self.q = Conv2d(channels, channels, 1)
        self.k = Conv2d(channels, channels, 1)
        self.v = Conv2d(channels, channels, 1)
        self.proj_out = Conv2d(channels, channels, 1)
        self.attention = Attention(1)

    def construct(self, x):
        h = self.norm(x)
        h = self.attention(to_tokens(self.q(h)), to_tokens(self.k(h)), to_tokens(self.v(h)))
        return x + self.proj_out(from_tokens(h, like=x))


class Middle(nn.Cell):
    def __init__(self, channels, num_groups):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, num_groups)
        self.attn_1 = AttnBlock(channels, num_groups)
        self.block_2 = ResnetBlock(channels, channels, num_groups)

    def construct(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Cell):
    def __init__(self, channels):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=(0, 1, 0, 1))

    def construct(self, x):
        return self.conv(x)


class DownLevel(nn.Cell):
    def __init__(self, channels, out_channels, num_res_blocks, num_groups, *, is_last):
        super().__init__()
        widths = [channels] + [out_channels] * num_res_blocks
        self.block = nn.CellList([ResnetBlock(a, b, num_groups) for a, b in zip(widths, widths[1:])])
        self.downsample = nn.Identity() if is_last else Downsample(out_channels)

    def construct(self, x):
        for block in self.block:
            x = block(x)
        return self.downsample(x)


class UpLevel(nn.Cell):
    def __init__(self, channels, out_channels, num_res_blocks, num_groups, *, is_last):
        super().__init__()
        widths = [channels] + [out_channels] * (num_res_blocks + 1)
        self.block = nn.CellList([ResnetBlock(a, b, num_groups) for a, b in zip(widths, widths[1:])])
        self.upsample = nn.Identity() if is_last else Upsample(out_channels)

    def construct(self, x):
        for block in self.block:
            x = block(x)
        return self.upsample(x)


class Encoder(nn.Cell):
    def __init__(self, *, ch, ch_mult, num_res_blocks, num_groups, in_channels, z_channels):
        super().__init__()
        widths = [ch] + [ch * m for m in ch_mult]
        last = len(ch_mult) - 1
        self.conv_in = Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.CellList(
            [
                DownLevel(widths[i], widths[i + 1], num_res_blocks, num_groups, is_last=i == last)
                for i in range(len(ch_mult))
            ]
        )
        self.mid = Middle(widths[-1], num_groups)
        self.norm_out = GroupNorm(widths[-1], 1e-6, num_groups=num_groups, activation="silu")
        self.conv_out = Conv2d(widths[-1], 2 * z_channels, 3, padding=1)

    def construct(self, x):
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(self.norm_out(self.mid(h)))


class Decoder(nn.Cell):
    def __init__(self, *, ch, ch_mult, num_res_blocks, num_groups, out_ch, z_channels):
        super().__init__()
        widths = [ch * m for m in ch_mult] + [ch * ch_mult[-1]]
        levels = [
            UpLevel(widths[i + 1], widths[i], num_res_blocks, num_groups, is_last=i == 0)
            for i in range(len(ch_mult))
        ]
        self.conv_in = Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], num_groups)
        self.up = nn.CellList(levels)  # counted from the output
        self.num_levels = len(levels)
        self.norm_out = GroupNorm(widths[0], 1e-6, num_groups=num_groups, activation="silu")
        self.conv_out = Conv2d(widths[0], out_ch, 3, padding=1)

    def construct(self, z):
        h = self.mid(self.conv_in(z))
        for i in range(self.num_levels):
            h = self.up[self.num_levels - 1 - i](h)
        return self.conv_out(self.norm_out(h))


class AutoencoderKL(nn.Cell):
    """Pictures to the moments of a Gaussian over latents, and latents to pictures.

    Args:
        embed_dim: latent channels.
        ddconfig: SGM's mapping of the two networks' settings: ch, ch_mult, num_res_blocks, in_channels, out_ch,
            z_channels, double_z, resolution, attn_resolutions (must be empty, as in SDXL), dropout (must be 0); and
            norm_num_groups, groups of every GroupNorm (32 unless given; SGM has no such setting).

    Raises:
        ValueError: ddconfig describes another family of autoencoders.
    """

    def __init__(self, *, embed_dim, ddconfig):
        super().__init__()
        dd = dict(ddconfig)
        if list(dd.get("attn_resolutions") or []) or dd.get("dropout", 0.0):
            raise ValueError("AutoencoderKL: ddconfig.attn_resolutions must be [] and ddconfig.dropout 0, as in SDXL.")
        if not dd.get("double_z", True):
            raise ValueError("AutoencoderKL: ddconfig.double_z must be true: the encoder gives mean and log-variance.")
        shared = {"ch": dd["ch"], "ch_mult": list(dd["ch_mult"]), "num_res_blocks": dd["num_res_blocks"]}
        shared["num_groups"] = dd.get("norm_num_groups", 32)
        z_channels = dd["z_channels"]
        with parameter_dtype(ms.float32):
            self.encoder = Encoder(**shared, in_channels=dd["in_channels"], z_channels=z_channels)
            self.quant_conv = Conv2d(2 * z_channels, 2 * embed_dim, 1)
        with parameter_dtype(ms.bfloat16 if current_dtype() == ms.bfloat16 else ms.float32):
            self.decoder = Decoder(**shared, out_ch=dd["out_ch"], z_channels=z_channels)
            self.post_quant_conv = Conv2d(embed_dim, z_channels, 1)
        self.embed_dim = embed_dim
        self.downsampling = 2 ** (len(dd["ch_mult"]) - 1)

    def encode(self, x):
        """(B, 3, H, W) in [-1, 1] -> (B, 2 * embed_dim, h, w): mean, then log-variance, not yet scaled."""
        return from_feature_map(self.quant_conv(self.encoder(to_feature_map(x))))

    def decode(self, z):
        """(B, embed_dim, h, w) latents, already divided by the scale factor -> (B, 3, H, W), about [-1, 1]."""
        return from_feature_map(self.decoder(self.post_quant_conv(to_feature_map(z))))

    def construct(self, x):
        """The picture through both halves, by the posterior's mean."""
        mean, _ = ops.split(self.encode(x), self.embed_dim, axis=1)
        return self.decode(mean)


class Encode(nn.Cell):
    """`AutoencoderKL.encode` as a cell, so that it compiles by itself."""

    def __init__(self, autoencoder):
        super().__init__(auto_prefix=False)
        self.autoencoder = autoencoder

    def construct(self, x):
        return self.autoencoder.encode(x)


class Decode(nn.Cell):
    """`AutoencoderKL.decode` as a cell, so that it compiles by itself."""

    def __init__(self, autoencoder):
        super().__init__(auto_prefix=False)
        self.autoencoder = autoencoder

    def construct(self, z):
        return self.autoencoder.decode(z)
