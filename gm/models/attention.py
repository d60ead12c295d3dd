"""Scaled dot-product attention: one function, whatever the device computes it with."""

import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import constexpr

from gm.models.layers import ones, rows_form

# Above this many bytes of scores, queries are taken in chunks.
MAX_SCORE_BYTES = 512 * 2**20

_flash = False


def use_flash_attention(enabled):
    """Build attention from here on with Ascend's fused kernel (True) or with plain operators (False).

    Raises:
        ValueError: the device has no such kernel.
    """
    global _flash
    if enabled and ms.get_context("device_target") != "Ascend":
        raise ValueError(
            f"Flash attention was asked for, and {ms.get_context('device_target')} has none: it needs an Ascend "
            "device. Leave --flash_attention out."
        )
    _flash = enabled


class Attention(nn.Cell):
    """softmax(q k^T / sqrt(d)) v for each head (Vaswani et al. 2017, eq. 1).

    q: (B, Lq, C), k and v: (B, Lk, C), where C = num_heads * d -> (B, Lq, C).

    Args:
        causal: a position sees itself and earlier ones (Lq = Lk).
    """

    def __init__(self, num_heads, *, causal=False):
        super().__init__()
        self.num_heads = num_heads
        self.flash = _flash and not causal
        self.rows = rows_form()
        self.core = _AttentionRows(causal) if self.rows else _PlainAttention(causal)

    def construct(self, q, k, v):
        b, length, c = q.shape
        if self.flash:
            scale = 1 / math.sqrt(c // self.num_heads)
            return ops.flash_attention_score(q, k, v, self.num_heads, scalar_value=scale, input_layout="BSH")
        out = self.core(self.to_heads(q), self.to_heads(k), self.to_heads(v))
        out = ops.transpose(ops.reshape(out, (b, self.num_heads, length, -1)), (0, 2, 1, 3))
        return ops.cast(ops.reshape(out, (b, length, c)), q.dtype)

    def to_heads(self, x):
        """(B, L, C) -> (B * heads, L, d)."""
        b, length, c = x.shape
        if self.rows:
            x = ops.cast(x, ms.float32)
        x = ops.transpose(ops.reshape(x, (b, length, self.num_heads, c // self.num_heads)), (0, 2, 1, 3))
        return ops.reshape(x, (b * self.num_heads, length, c // self.num_heads))


@constexpr
def _causal_mask(*shape):
    """0 where a key is seen, -inf elsewhere; of the scores' full shape, since a broadcast would keep index lists."""
    _, queries, keys = shape
    return Tensor(np.broadcast_to(np.triu(np.full((queries, keys), -np.inf, np.float32), 1), shape).copy())


@constexpr
def _num_chunks(n, queries, keys):
    """The smallest divisor of `queries` that keeps a chunk's scores under MAX_SCORE_BYTES."""
    return next(c for c in range(1, queries + 1) if queries % c == 0 and 4 * n * queries // c * keys <= MAX_SCORE_BYTES)


class _PlainAttention(nn.Cell):
    """The formula, differentiated by MindSpore; softmax in float32."""

    def __init__(self, causal):
        super().__init__()
        self.causal = causal

    def construct(self, q, k, v):
        scores = ops.cast(ops.bmm(q * (1 / math.sqrt(q.shape[2])), ops.transpose(k, (0, 2, 1))), ms.float32)
        if self.causal:
            scores = scores + _causal_mask(*scores.shape)
        return ops.bmm(ops.cast(ops.softmax(scores, -1), v.dtype), v)


class _AttentionRows(nn.Cell):
    """The same in float32 with its own gradient: only q, k, v and the result are kept between the two passes.

    With p = softmax(s): dv = p^T do, ds = p (do v^T - rowsum(do out)) (Dao et al. 2022, appendix B).
    """

    def __init__(self, causal):
        super().__init__()
        self.causal = causal
        self.qk = ops.BatchMatMul(transpose_b=True)
        self.pv = ops.BatchMatMul()
        self.tn = ops.BatchMatMul(transpose_a=True)
        self.softmax = ops.Softmax(-1)

    def probabilities(self, q, k):
        scores = self.qk(q * (1 / math.sqrt(q.shape[2])), k)
        if self.causal:
            scores = scores + _causal_mask(*scores.shape)
        return self.softmax(scores)

    def construct(self, q, k, v):
        n, queries, _ = q.shape
        chunks = _num_chunks(n, queries, k.shape[1])
        if chunks == 1 or self.causal:
            return self.pv(self.probabilities(q, k), v)
        out = ()
        for part in ops.Split(1, chunks)(q):
            if len(out) > 0:
                part = ops.depend(part, out[-1])  # one chunk's scores in memory at a time
            out += (self.pv(self.probabilities(part, k), v),)
        return ops.concat(out, 1)

    def bprop(self, q, k, v, out, dout):
        n, queries, _ = q.shape
        chunks = _num_chunks(n, queries, k.shape[1])
        if chunks == 1 or self.causal:
            # Without this, the scores would be computed again in the forward pass already, and kept.
            return self.gradients(ops.depend(q, dout), k, v, out, dout)
        split = ops.Split(1, chunks)
        qs, outs, douts = split(q), split(out), split(dout)
        dqs, dk, dv = (), None, None
        for i in range(chunks):
            part = ops.depend(qs[i], douts[i] if i == 0 else dqs[-1])
            dq_i, dk_i, dv_i = self.gradients(part, k, v, outs[i], douts[i])
            dqs += (dq_i,)
            dk, dv = (dk_i, dv_i) if i == 0 else (dk + dk_i, dv + dv_i)
        return ops.concat(dqs, 1), dk, dv

    def gradients(self, q, k, v, out, dout):
        n, _, d = q.shape
        p = self.probabilities(q, k)
        delta = self.pv(self.pv(dout * out, ones(n, d, 1)), ones(n, 1, k.shape[1]))
        ds = p * (self.qk(dout, v) - delta)
        scale = 1 / math.sqrt(d)
        return self.pv(ds, k) * scale, self.tn(ds, q) * scale, self.tn(p, dout)
