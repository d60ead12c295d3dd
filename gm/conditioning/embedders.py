"""What SDXL is conditioned on: two text encoders and numbers about size. SGM's class names and parameters.

Every embedder knows the key of its input in a batch, makes its array on the host (`prepare`), and as a Cell
turns that array into a tuple of tensors: (B, L, width) for cross attention, (B, width) for the vector.
"""

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from gm.conditioning.tokenizer import Tokenizer
from gm.models.clip import CLIPTextModel
from gm.models.layers import Sinusoid
from gm.models.open_clip import OpenCLIPTextModel

# What SGM's YAML calls the version of this encoder are its weights; the vocabulary is CLIP's.
OPEN_CLIP_WEIGHTS = "laion2b_s39b_b160k"


class TextEmbedder(nn.Cell):
    """A frozen text encoder with its tokenizer.

    ids: (B, chunks, L) int32 -> context (B, chunks * L, width) and maybe pooled (B, embed_dim), float32.
    """

    rows_name: str  # of learned rows for this encoder, in embedding files

    def __init__(self, tokenizer, input_key, width, vocab_size, *, pooled_width=0):
        super().__init__()
        if tokenizer.vocab_size != vocab_size:
            raise ValueError(
                f"{type(self).__name__}: vocab_size is {vocab_size}, but its tokenizer has "
                f"{tokenizer.vocab_size} tokens."
            )
        self.tokenizer = tokenizer
        self.input_key, self.width, self.pooled_width = input_key, width, pooled_width

    def prepare(self, texts):
        """Texts -> ids (B, 1, L) int32 as in training: cut at one chunk, brackets literal."""
        return self.tokenizer.encode(texts)


class FrozenCLIPEmbedder(TextEmbedder):
    """SDXL's first text encoder, CLIP ViT-L/14: the states that enter layer `layer_idx`, from 0.

    Args:
        layer: "hidden", the only one that SDXL uses.
        version: of the tokenizer, see `load_clip_tokenizer`.
    """

    rows_name = "clip_l"

    def __init__(
        self, *, input_key="txt", layer="hidden", layer_idx=11, version=None, max_length=77,
        width=768, layers=12, heads=12, vocab_size=49408,
    ):  # fmt: skip
        super().__init__(Tokenizer(version, max_length=max_length, pad="eos"), input_key, width, vocab_size)
        if layer != "hidden" or not 0 <= layer_idx <= layers:
            raise ValueError(
                f"FrozenCLIPEmbedder: layer {layer!r} with layer_idx {layer_idx} is not supported; SDXL "
                f"takes 'hidden' with a layer_idx from 0 to {layers}."
            )
        self.transformer = CLIPTextModel(
            width=width, layers=layers, heads=heads, vocab_size=vocab_size, max_length=max_length,
            num_layers_run=layer_idx,
        )  # fmt: skip

    @property
    def token_embedding(self):
        return self.transformer.token_embedding

    def construct(self, ids):
        b, chunks, length = ids.shape
        states = self.transformer(ops.reshape(ids, (b * chunks, length)))
        return (ops.reshape(states, (b, chunks * length, -1)),)


class FrozenOpenCLIPEmbedder2(TextEmbedder):
    """SDXL's second text encoder, OpenCLIP ViT-bigG/14: penultimate states, the first chunk's pooled vector.

    Args:
        layer: "penultimate", the only one that SDXL uses.
        version: of the tokenizer, see `load_clip_tokenizer`.
    """

    rows_name = "clip_g"

    def __init__(
        self, *, input_key="txt", layer="penultimate", version=None, max_length=77,
        width=1280, layers=32, heads=20, embed_dim=1280, vocab_size=49408,
    ):  # fmt: skip
        tokenizer = Tokenizer(None if version == OPEN_CLIP_WEIGHTS else version, max_length=max_length, pad=0)
        super().__init__(tokenizer, input_key, width, vocab_size, pooled_width=embed_dim)
        if layer != "penultimate":
            raise ValueError(
                f"FrozenOpenCLIPEmbedder2: layer {layer!r} is not supported, only 'penultimate'."
            )
        self.model = OpenCLIPTextModel(
            width=width, layers=layers, heads=heads, embed_dim=embed_dim, vocab_size=vocab_size,
            max_length=max_length, eos_id=tokenizer.eos_id,
        )  # fmt: skip

    @property
    def token_embedding(self):
        return self.model.token_embedding

    def construct(self, ids):
        b, chunks, length = ids.shape
        states, pooled = self.model(ops.reshape(ids, (b * chunks, length)))
        pooled = ops.reshape(pooled, (b, chunks, -1))[:, 0]
        return ops.reshape(states, (b, chunks * length, -1)), pooled


class ConcatTimestepEmbedderND(nn.Cell):
    """Numbers, such as (height, width), each as a sinusoid: (B, n) float32 -> (B, n * outdim) float32."""

    def __init__(self, *, input_key, outdim=256):
        super().__init__()
        self.input_key = input_key
        self.sinusoid = Sinusoid(outdim)

    def prepare(self, numbers):
        """(B, n) numbers -> float32, since 4031 is no float16 number."""
        return np.asarray(numbers, np.float32)

    def construct(self, numbers):
        waves = self.sinusoid(ops.reshape(ops.cast(numbers, ms.float32), (-1,)))
        return (ops.reshape(waves, (numbers.shape[0], -1)),)
