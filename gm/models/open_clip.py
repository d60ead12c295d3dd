"""The text model of OpenCLIP ViT-bigG/14 (Cherti et al. 2023).

Cells and parameters are named as in the original SDXL file, below ``conditioner.embedders.1.model``.
"""

import mindspore as ms
from mindspore import nn, ops

from gm.models.clip import TokenEmbedding
from gm.models.layers import Activation, Attention, LayerNorm, Linear, Product, empty_parameter


class OpenCLIPTextModel(nn.Cell):
    """Penultimate states and pooled vector of OpenCLIP's text model.

    ids: (B, L) int32 -> states (B, L, width) float32, the input of the last layer, not normalised; pooled
    (B, embed_dim) float32, ln_final(last state) @ text_projection at the first `eos_id` of each text.
    """

    def __init__(self, *, width, layers, heads, embed_dim, vocab_size, max_length, eos_id):
        super().__init__()
        self.eos_id = eos_id
        self.token_embedding = TokenEmbedding(vocab_size, width)
        self.positional_embedding = empty_parameter((max_length, width), "positional_embedding")
        self.transformer = _Transformer(width, layers, heads)
        self.ln_final = LayerNorm(width)
        self.text_projection = empty_parameter((width, embed_dim), "text_projection")

    def construct(self, ids):
        b, length = ids.shape
        x = self.token_embedding(ids) + ops.cast(self.positional_embedding[:length], ms.float32)
        states, last = self.transformer(x)
        # Learned words lie above the end-of-text id, so the largest id does not mark the end of the text.
        # Positions count down in the product because argmax over equal values may give any of them.
        is_end = ops.cast(ids == self.eos_id, ms.int32)
        end = ops.argmax(is_end * ops.arange(length, 0, -1), 1)  # (B,) first end of text
        rows = ops.reshape(last, (b * length, -1))
        pooled = self.ln_final(ops.gather(rows, ops.arange(b) * length + end, 0))
        pooled = ops.matmul(ops.cast(pooled, self.text_projection.dtype), self.text_projection)
        return states, ops.cast(pooled, ms.float32)


class _Transformer(nn.Cell):
    """x -> the input of the last layer, and its output."""

    def __init__(self, width, layers, heads):
        super().__init__()
        self.resblocks = nn.CellList([_ResidualBlock(width, heads) for _ in range(layers)])

    def construct(self, x):
        for i in range(len(self.resblocks) - 1):
            x = self.resblocks[i](x)
        return x, self.resblocks[-1](x)


class _ResidualBlock(nn.Cell):
    def __init__(self, width, heads):
        super().__init__()
        self.ln_1 = LayerNorm(width)
        self.attn = _PackedAttention(width, heads)
        self.ln_2 = LayerNorm(width)
        self.mlp = _MLP(width)

    def construct(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class _PackedAttention(nn.Cell):
    """Self attention whose q, k and v weights lie in one matrix, in this order."""

    def __init__(self, width, heads):
        super().__init__()
        self.in_proj_weight = empty_parameter((3 * width, width), "in_proj_weight", is_matrix=True)
        self.in_proj_bias = empty_parameter((3 * width,), "in_proj_bias")
        self.out_proj = Linear(width, width)
        self.in_proj = Product()
        self.split = ops.Split(-1, 3)
        self.attention = Attention(heads, causal=True)

    def construct(self, x):
        q, k, v = self.split(self.in_proj(x, self.in_proj_weight, self.in_proj_bias))
        return self.out_proj(self.attention(q, k, v))


class _MLP(nn.Cell):
    def __init__(self, width):
        super().__init__()
        self.c_fc = Linear(width, 4 * width)
        self.gelu = Activation("gelu")
        self.c_proj = Linear(4 * width, width)

    def construct(self, x):
        return self.c_proj(self.gelu(self.c_fc(x)))
