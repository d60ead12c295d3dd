"""The conditioner: a batch of prompts and sizes -> the UNet's vector and cross-attention context."""

import numpy as np
from mindspore import Tensor, nn, ops

from gm import compile_cache
from gm.conditioning.embedders import TextEmbedder


def weigh(context, weights):
    """Emphasise tokens: multiply their states, then restore the mean of each chunk (as AUTOMATIC1111 does).

    Args:
        context: (B, chunks * L, C) states of one text encoder.
        weights: (B, chunks, L) one factor a token.
    """
    b, chunks, length = weights.shape
    states = context.reshape(b, chunks, length, -1)
    weighed = states * weights[..., None]
    mean, new_mean = (x.mean(axis=(2, 3), keepdims=True, dtype=np.float64) for x in (states, weighed))
    weighed *= np.where(mean == new_mean, 1.0, mean / new_mean)
    return weighed.reshape(context.shape)


class GeneralConditioner(nn.Cell):
    """The embedders of an SDXL model (SGM's name). All of them are frozen.

    Inputs: an array an embedder, as `prepare` makes them -> vector (B, D): pooled text, then sizes; context
    (B, L, C): the text encoders' states side by side, in the embedders' order.

    Args:
        emb_models: embedders, text encoders first.
    """

    def __init__(self, emb_models):
        super().__init__()
        is_text = [isinstance(embedder, TextEmbedder) for embedder in emb_models]
        if is_text != sorted(is_text, reverse=True):
            raise ValueError("GeneralConditioner: in emb_models, text encoders must come before the others.")
        self.embedders = nn.CellList(emb_models)
        for parameter in self.get_parameters():
            parameter.requires_grad = False

    @property
    def text_embedders(self):
        """The text encoders, in order."""
        return [embedder for embedder in self.embedders if isinstance(embedder, TextEmbedder)]

    def prepare(self, batch):
        """Inputs for training: prompts are cut at one chunk, brackets are literal.

        Args:
            batch: for each embedder's `input_key` a list of B texts ("txt") or (B, n) numbers.

        Returns:
            tuple of arrays: ids (B, 1, 77) int32, numbers (B, n) float32.
        """
        return tuple(embedder.prepare(_entry(batch, embedder.input_key)) for embedder in self.embedders)

    def construct(self, *inputs):
        vectors, contexts = (), ()
        for i in range(len(self.embedders)):
            for output in self.embedders[i](inputs[i]):
                if output.ndim == 2:
                    vectors += (output,)
                else:
                    contexts += (output,)
        return ops.concat(vectors, 1), ops.concat(contexts, 2)

    def encode(self, batch, *, zero_text=None):
        """Conditioning for sampling: prompts of any length, with weights such as (word:1.3).

        Prompts encoded together get as many chunks of 77 as the longest needs.

        Args:
            batch: as in `prepare`.
            zero_text: (B,) bools, samples whose text is replaced by zeros, as SDXL base has it for an empty
                negative prompt; their sizes stay.

        Returns:
            vector (B, D), context (B, chunks * 77, C), float32 numpy.
        """
        inputs, weights = [], []
        for embedder in self.embedders:
            values = _entry(batch, embedder.input_key)
            if isinstance(embedder, TextEmbedder):
                ids, weight = embedder.tokenizer.encode_weighted(values)
                inputs.append(ids)
                weights.append(weight)
            else:
                inputs.append(embedder.prepare(values))
        vector, context = (output.asnumpy().copy() for output in compile_cache.call(self, *map(Tensor, inputs)))

        start = 0
        for embedder, weight in zip(self.text_embedders, weights, strict=True):
            end = start + embedder.width
            context[..., start:end] = weigh(context[..., start:end], weight)
            start = end
        if zero_text is not None:
            zero = np.asarray(zero_text, bool)
            context[zero] = 0
            vector[zero, : sum(embedder.pooled_width for embedder in self.text_embedders)] = 0
        return vector, context


def _entry(batch, key):
    if key not in batch:
        raise ValueError(f"The batch has no '{key}', which the conditioner needs; it has {sorted(batch)}.")
    return batch[key]
