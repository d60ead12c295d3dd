"""Layers in MindSpore's own operators: on Ascend, and the plain form that the others are held to.

The functions at the end are what `gm.models.layers` asks a form for. A feature map is (B, C, H, W).
"""

import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import constexpr

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


class _Linear(nn.Cell):
    def __init__(self):
        super().__init__(auto_prefix=False)
        self.matmul = ops.MatMul(transpose_b=True)

    def construct(self, x, weight, bias=None):
        y = self.matmul(ops.reshape(x, (-1, x.shape[-1])), weight)
        y = y if bias is None else ops.bias_add(y, bias)
        return ops.reshape(y, (*x.shape[:-1], y.shape[-1]))


class _Conv(nn.Cell):
    def __init__(self, out_channels, kernel_size, stride, padding):
        super().__init__(auto_prefix=False)
        self.conv = ops.Conv2D(out_channels, kernel_size, stride=stride, pad_mode="pad", pad=padding)

    def construct(self, x, weight, bias):
        return ops.bias_add(self.conv(x, weight), bias)


class _LayerNorm(nn.Cell):
    def __init__(self, eps):
        super().__init__(auto_prefix=False)
        self.normalise = ops.LayerNorm(-1, -1, eps)

    def construct(self, x, gamma, beta):
        y = self.normalise(ops.reshape(x, (-1, x.shape[-1])), gamma, beta)[0]
        return ops.reshape(y, x.shape)


class _GroupNorm(nn.Cell):
    def __init__(self, eps, num_groups, activation):
        super().__init__(auto_prefix=False)
        self.eps, self.num_groups = eps, num_groups
        self.activate = _Activation(activation)

    def construct(self, x, gamma, beta):
        b, c, _, _ = x.shape
        y = ops.reshape(x, (b, self.num_groups, -1))
        d = y - ops.mean(y, -1, keep_dims=True)
        y = d * ops.rsqrt(ops.mean(ops.square(d), -1, keep_dims=True) + self.eps)
        y = ops.reshape(y, x.shape) * ops.reshape(gamma, (1, c, 1, 1)) + ops.reshape(beta, (1, c, 1, 1))
        return self.activate(y)


class _Attention(nn.Cell):
    """softmax(q k^T / sqrt(d)) v for each head, differentiated by MindSpore; softmax in float32."""

    def __init__(self, num_heads, causal):
        super().__init__(auto_prefix=False)
        self.num_heads, self.causal = num_heads, causal
        self.flash = _flash and not causal

    def construct(self, q, k, v):
        b, length, c = q.shape
        scale = 1 / math.sqrt(c // self.num_heads)
        if self.flash:
            return ops.flash_attention_score(q, k, v, self.num_heads, scalar_value=scale, input_layout="BSH")
        scores = ops.bmm(self.to_heads(q) * scale, ops.transpose(self.to_heads(k), (0, 2, 1)))
        scores = ops.cast(scores, ms.float32)
        if self.causal:
            scores = scores + _causal_mask(length)
        out = ops.bmm(ops.cast(ops.softmax(scores, -1), v.dtype), self.to_heads(v))
        out = ops.transpose(ops.reshape(out, (b, self.num_heads, length, -1)), (0, 2, 1, 3))
        return ops.reshape(out, (b, length, c))

    def to_heads(self, x):
        """(B, L, C) -> (B * heads, L, d)."""
        b, length, c = x.shape
        x = ops.transpose(ops.reshape(x, (b, length, self.num_heads, c // self.num_heads)), (0, 2, 1, 3))
        return ops.reshape(x, (b * self.num_heads, length, c // self.num_heads))


@constexpr
def _causal_mask(length):
    """0 where a key is seen, -inf elsewhere: (1, L, L)."""
    return Tensor(np.triu(np.full((1, length, length), -np.inf, np.float32), 1))


class _Activation(nn.Cell):
    def __init__(self, kind):
        super().__init__(auto_prefix=False)
        self.kind = kind

    def construct(self, x):
        if self.kind == "silu":
            return ops.silu(x)
        if self.kind == "quick_gelu":
            return x * ops.sigmoid(1.702 * x)
        if self.kind == "gelu":
            return ops.gelu(x, approximate="none")
        return x


class _GEGLU(nn.Cell):
    def __init__(self):
        super().__init__(auto_prefix=False)
        self.linear = _Linear()
        self.split = ops.Split(-1, 2)

    def construct(self, x, weight, bias):
        value, gate = self.split(self.linear(x, weight, bias))
        return value * ops.gelu(gate, approximate="none")


class _Enlarge(nn.Cell):
    def construct(self, x):
        _, _, h, w = x.shape
        return ops.interpolate(x, size=(2 * h, 2 * w), mode="nearest")


class _AddPerSample(nn.Cell):
    def construct(self, x, e):
        return x + ops.reshape(e, (*e.shape, 1, 1))


def linear(*, has_bias):
    return _Linear()


def conv(out_channels, kernel_size, stride, padding):
    return _Conv(out_channels, kernel_size, stride, padding)


def layer_norm(eps):
    return _LayerNorm(eps)


def group_norm(channels, eps, num_groups, activation):
    return _GroupNorm(eps, num_groups, activation)


def attention(num_heads, *, causal, dtype):
    return _Attention(num_heads, causal)


def activation(kind):
    return _Activation(kind)


def geglu(*, dtype):
    return _GEGLU()


def enlarge():
    return _Enlarge()


def add_per_sample():
    return _AddPerSample()
