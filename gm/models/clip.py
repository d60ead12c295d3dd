"""The text model of OpenAI's CLIP ViT-L/14 (Radford et al. 2021, sec. 2.4), with learned tokens.

Cells and parameters are named as in the original SDXL file, below ``conditioner.embedders.0.transformer``.
"""

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from gm.models.layers import Activation, Attention, Embedding, LayerNorm, Linear


class TokenEmbedding(Embedding):
    """A frozen table and, once `set_learned` was called, a Parameter of learned rows for the ids above it.

    ids: (B, L) int32 -> (B, L, width) float32. An id from `num_embeddings` on picks learned row
    `id - num_embeddings`.
    """

    def __init__(self, num_embeddings, width):
        super().__init__(num_embeddings, width)
        self.num_embeddings, self.width = num_embeddings, width
        self.learned = None

    def set_learned(self, rows):
        """Make `rows` (n, width) the learned Parameter, in place of an earlier one. Not after compiling."""
        assert rows.shape[1] == self.width, rows.shape
        name = self.weight.name.removesuffix("weight") + "learned"
        self.learned = Parameter(Tensor(np.asarray(rows, np.float32)), name=name)

    def construct(self, ids):
        if self.learned is None:
            return ops.cast(self.gather(self.weight, ids, 0), ms.float32)
        frozen = self.gather(self.weight, ops.minimum(ids, self.num_embeddings - 1), 0)
        learned = self.gather(self.learned, ops.maximum(ids - self.num_embeddings, 0), 0)
        is_learned = ops.expand_dims(ids >= self.num_embeddings, -1)
        return ops.where(is_learned, learned, ops.cast(frozen, ms.float32))


class CLIPTextModel(nn.Cell):
    """Hidden states of CLIP's text model.

    ids: (B, L) int32, L <= max_length -> (B, L, width) float32: the states after `num_layers_run` layers,
    without the final layer norm. The layers after those are there for the checkpoint's sake only.
    """

    def __init__(self, *, width, layers, heads, vocab_size, max_length, num_layers_run):
        super().__init__()
        self.text_model = _CLIPTextTransformer(width, layers, heads, vocab_size, max_length, num_layers_run)

    @property
    def token_embedding(self):
        return self.text_model.embeddings.token_embedding

    def construct(self, ids):
        return self.text_model(ids)


class _CLIPTextTransformer(nn.Cell):
    def __init__(self, width, layers, heads, vocab_size, max_length, num_layers_run):
        super().__init__()
        self.embeddings = _CLIPTextEmbeddings(width, vocab_size, max_length)
        self.encoder = _CLIPEncoder(width, layers, heads, num_layers_run)
        self.final_layer_norm = LayerNorm(width)

    def construct(self, ids):
        return self.encoder(self.embeddings(ids))


class _CLIPTextEmbeddings(nn.Cell):
    def __init__(self, width, vocab_size, max_length):
        super().__init__()
        self.token_embedding = TokenEmbedding(vocab_size, width)
        self.position_embedding = Embedding(max_length, width)

    def construct(self, ids):
        positions = self.position_embedding(ops.arange(ids.shape[1]))
        return self.token_embedding(ids) + ops.cast(positions, ms.float32)


class _CLIPEncoder(nn.Cell):
    def __init__(self, width, layers, heads, num_layers_run):
        super().__init__()
        self.num_layers_run = num_layers_run
        self.layers = nn.CellList([_CLIPEncoderLayer(width, heads) for _ in range(layers)])

    def construct(self, x):
        for i in range(self.num_layers_run):
            x = self.layers[i](x)
        return x


class _CLIPEncoderLayer(nn.Cell):
    # x stays float32 whatever the weights are: each Linear casts what it reads, sums are promoted.
    def __init__(self, width, heads):
        super().__init__()
        self.layer_norm1 = LayerNorm(width)
        self.self_attn = _CLIPAttention(width, heads)
        self.layer_norm2 = LayerNorm(width)
        self.mlp = _CLIPMLP(width)

    def construct(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _CLIPAttention(nn.Cell):
    def __init__(self, width, heads):
        super().__init__()
        self.q_proj = Linear(width, width)
        self.k_proj = Linear(width, width)
        self.v_proj = Linear(width, width)
        self.out_proj = Linear(width, width)
        self.attention = Attention(heads, causal=True)

    def construct(self, x):
        return self.out_proj(self.attention(self.q_proj(x), self.k_proj(x), self.v_proj(x)))


class _CLIPMLP(nn.Cell):
    def __init__(self, width):
        super().__init__()
        self.fc1 = Linear(width, 4 * width)
        self.activation = Activation("quick_gelu")
        self.fc2 = Linear(4 * width, width)

    def construct(self, x):
        return self.fc2(self.activation(self.fc1(x)))
