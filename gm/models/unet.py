"""SDXL's UNet (Podell et al. 2023, sec. 2.1): convolutions with text cross attention, conditioned on time and size.

Attribute chains are the original checkpoint's keys: ``input_blocks.4.1.transformer_blocks.0.attn1.to_q`` and so on.
"""

import mindspore as ms
from mindspore import nn, ops

from gm.models.layers import (
    GEGLU,
    Activation,
    AddPerSample,
    Attention,
    Conv2d,
    GroupNorm,
    LayerNorm,
    Linear,
    Sinusoid,
    Upsample,
    concat_channels,
    from_feature_map,
    from_tokens,
    to_feature_map,
    to_tokens,
)


class ResBlock(nn.Cell):
    """x + conv(silu(norm(conv(silu(norm(x))) + time))), with a 1x1 convolution on x where channels change."""

    takes = "embedding"

    def __init__(self, channels, emb_channels, out_channels, num_groups):
        super().__init__()
        # The convolutions' numbers in the file count the activation, which the norm does here, and a dropout.
        self.in_layers = nn.SequentialCell(
            GroupNorm(channels, 1e-5, num_groups=num_groups, activation="silu"),
            nn.Identity(),
            Conv2d(channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.SequentialCell(Activation("silu"), Linear(emb_channels, out_channels))
        self.add_embedding = AddPerSample()
        self.out_layers = nn.SequentialCell(
            GroupNorm(out_channels, 1e-5, num_groups=num_groups, activation="silu"),
            nn.Identity(),
            nn.Identity(),
            Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else Conv2d(channels, out_channels, 1)

    def construct(self, x, emb):
        h = self.add_embedding(self.in_layers(x), self.emb_layers(emb))
        return self.skip_connection(x) + self.out_layers(h)


class CrossAttention(nn.Cell):
    """Multi-head attention of tokens x (B, L, query_dim) to a context (B, Lc, context_dim)."""

    def __init__(self, query_dim, context_dim, num_heads):
        super().__init__()
        self.to_q = Linear(query_dim, query_dim, has_bias=False)
        self.to_k = Linear(context_dim, query_dim, has_bias=False)
        self.to_v = Linear(context_dim, query_dim, has_bias=False)
        self.to_out = nn.SequentialCell(Linear(query_dim, query_dim))
        self.attention = Attention(num_heads)

    def construct(self, x, context):
        return self.to_out(self.attention(self.to_q(x), self.to_k(context), self.to_v(context)))


class FeedForward(nn.Cell):
    """dim -> 4 dim -> dim through GEGLU."""

    def __init__(self, dim):
        super().__init__()
        self.net = nn.SequentialCell(GEGLU(dim, 4 * dim), nn.Identity(), Linear(4 * dim, dim))

    def construct(self, x):
        return self.net(x)


class BasicTransformerBlock(nn.Cell):
    """Self attention, cross attention to the text, feed-forward; each on normalised tokens, each added."""

    def __init__(self, dim, context_dim, num_heads):
        super().__init__()
        self.attn1 = CrossAttention(dim, dim, num_heads)
        self.attn2 = CrossAttention(dim, context_dim, num_heads)
        self.ff = FeedForward(dim)
        self.norm1 = LayerNorm(dim)
        self.norm2 = LayerNorm(dim)
        self.norm3 = LayerNorm(dim)

    def construct(self, x, context):
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Cell):
    """Transformer blocks over the positions of a feature map, added to it."""

    takes = "context"

    def __init__(self, channels, context_dim, num_heads, depth, num_groups):
        super().__init__()
        self.norm = GroupNorm(channels, 1e-6, num_groups=num_groups)
        self.proj_in = Linear(channels, channels)
        self.transformer_blocks = nn.CellList(
            [BasicTransformerBlock(channels, context_dim, num_heads) for _ in range(depth)]
        )
        self.proj_out = Linear(channels, channels)

    def construct(self, x, context):
        tokens = self.proj_in(to_tokens(self.norm(x)))
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + from_tokens(self.proj_out(tokens), like=x)


class Downsample(nn.Cell):
    takes = "map"

    def __init__(self, channels):
        super().__init__()
        self.op = Conv2d(channels, channels, 3, stride=2, padding=1)

    def construct(self, x):
        return self.op(x)


class Block(nn.SequentialCell):
    """Layers in a row; each gets what it takes: the time embedding, the text, or the map alone."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.takes = tuple(getattr(layer, "takes", "map") for layer in layers)

    def construct(self, x, emb, context):
        for layer, takes in zip(self.cell_list, self.takes):
            if takes == "embedding":
                x = layer(x, emb)
            elif takes == "context":
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class UNetModel(nn.Cell):
    """The denoising network F(x, t | text, size).

    Argument names are those of SGM's configs.

    Args:
        in_channels, out_channels: latent channels.
        model_channels: width of the first level; level i is channel_mult[i] times as wide.
        attention_resolutions: downsampling factors at which transformers stand, e.g. [4, 2].
        num_res_blocks: ResBlocks a level on the way down (one more on the way up).
        transformer_depth: transformer blocks a level (entries of levels without attention are unused; the middle
            block uses the last).
        num_head_channels: width of one attention head (not the number of heads).
        context_dim: width of the text context.
        adm_in_channels: width of the pooled text and size vector.
        norm_num_groups: groups of every GroupNorm; SGM has no such setting, diffusers calls it so.
        num_classes: "sequential", the one kind of vector conditioning that SDXL has.
        use_linear_in_transformer: must be true, as in SDXL.
        use_recompute: recompute activations of ResBlocks and transformer blocks in the backward pass.

    Raises:
        ValueError: a setting describes another family of UNets.
    """

    def __init__(
        self,
        *,
        in_channels,
        out_channels,
        model_channels,
        attention_resolutions,
        num_res_blocks,
        channel_mult,
        transformer_depth,
        num_head_channels,
        context_dim,
        adm_in_channels,
        norm_num_groups=32,
        num_classes="sequential",
        use_linear_in_transformer=True,
        use_recompute=False,
    ):
        super().__init__()
        if num_classes != "sequential":
            raise ValueError(f"UNetModel: num_classes is {num_classes!r}; SDXL's networks have 'sequential'.")
        if not use_linear_in_transformer:
            raise ValueError("UNetModel: use_linear_in_transformer must be true, as in SDXL.")
        levels = len(channel_mult)
        if isinstance(transformer_depth, int):
            transformer_depth = [transformer_depth] * levels
        if len(transformer_depth) != levels:
            raise ValueError(
                f"UNetModel: transformer_depth has {len(transformer_depth)} entries, channel_mult {levels} levels."
            )
        emb_channels = 4 * model_channels
        self.time_sinusoid = Sinusoid(model_channels)
        self.time_embed = nn.SequentialCell(
            Linear(model_channels, emb_channels), Activation("silu"), Linear(emb_channels, emb_channels)
        )
        self.label_emb = nn.SequentialCell(
            nn.SequentialCell(
                Linear(adm_in_channels, emb_channels), Activation("silu"), Linear(emb_channels, emb_channels)
            )
        )

        def transformer(channels, level):
            if channels % num_head_channels:
                raise ValueError(f"UNetModel: {channels} channels are no multiple of {num_head_channels} a head.")
            heads, depth = channels // num_head_channels, transformer_depth[level]
            return SpatialTransformer(channels, context_dim, heads, depth, norm_num_groups)

        def res_block(channels, out_channels):
            return ResBlock(channels, emb_channels, out_channels, norm_num_groups)

        blocks = [Block(Conv2d(in_channels, model_channels, 3, padding=1))]
        skips = [model_channels]
        channels = model_channels
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers = [res_block(channels, mult * model_channels)]
                channels = mult * model_channels
                if 2**level in attention_resolutions:
                    layers.append(transformer(channels, level))
                blocks.append(Block(*layers))
                skips.append(channels)
            if level < levels - 1:
                blocks.append(Block(Downsample(channels)))
                skips.append(channels)
        self.input_blocks = nn.CellList(blocks)

        self.middle_block = Block(
            res_block(channels, channels),
            transformer(channels, levels - 1),
            res_block(channels, channels),
        )

        blocks = []
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks + 1):
                layers = [res_block(channels + skips.pop(), mult * model_channels)]
                channels = mult * model_channels
                if 2**level in attention_resolutions:
                    layers.append(transformer(channels, level))
                if level > 0 and i == num_res_blocks:
                    layers.append(Upsample(channels))
                blocks.append(Block(*layers))
        self.output_blocks = nn.CellList(blocks)
        self.out = nn.SequentialCell(
            GroupNorm(channels, 1e-5, num_groups=norm_num_groups, activation="silu"),
            nn.Identity(),
            Conv2d(channels, out_channels, 3, padding=1),
        )
        if use_recompute:
            for _, cell in self.cells_and_names():
                if isinstance(cell, (ResBlock, BasicTransformerBlock)):
                    cell.recompute()

    def construct(self, x, timesteps, context, y):
        """One evaluation of the network.

        Args:
            x: (B, in_channels, h, w) scaled noisy latents, h and w multiples of 2^(levels - 1).
            timesteps: (B,) numbers 0 .. 999.
            context: (B, L, context_dim) text, encoder 1's channels first.
            y: (B, adm_in_channels) pooled text and size sinusoids.

        Returns:
            (B, out_channels, h, w) float32.
        """
        emb = self.time_embed(self.time_sinusoid(timesteps)) + self.label_emb(y)
        h = to_feature_map(x)
        skips = ()
        for block in self.input_blocks:
            h = block(h, emb, context)
            skips = (h, *skips)
        h = self.middle_block(h, emb, context)
        for block, skip in zip(self.output_blocks, skips):
            h = block(concat_channels(h, skip), emb, context)
        return ops.cast(from_feature_map(self.out(h)), ms.float32)
