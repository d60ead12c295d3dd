"""Layers on a CPU in MindSpore's own operators: for machines without the fused kernels, and for gradients by weights.

A feature map is (B, H, W, C): rows of positions. MindSpore's CPU convolution takes its slowest path on AVX-512
processors, and its broadcasting operators keep index lists larger than their tensors, so a convolution is one gather
and one matrix product, and what would broadcast is a matrix product by ones. Each has its own gradient. The functions
at the end are what `gm.models.layers` asks a form for.
"""

import functools
import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import constexpr

from gm.models.native import linear  # noqa: F401 (the same in both forms)

# Above this many bytes, gathered convolution windows are made and multiplied band by band.
MAX_WINDOW_BYTES = 256 * 2**20

# Above this many bytes of scores, queries are taken in chunks.
MAX_SCORE_BYTES = 512 * 2**20


# ---------------------------------------------------------------- products by ones


def repeat(x, length):
    """(B, 1, C) -> (B, length, C), as a product by ones (a broadcast would keep index lists)."""
    return ops.bmm(ops.cast(ones(x.shape[0], length, 1), x.dtype), x)


@functools.cache
def _filled(shape, value):
    return Tensor(np.full(shape, value, np.float32))


@constexpr
def ones(*shape):
    """A constant of ones: products by it stand for broadcasts and sums."""
    return _filled(shape, 1.0)


@constexpr
def _average_over(*shape):
    """Ones / (last axis), to take means with by a matrix product."""
    return _filled(shape, 1.0 / shape[-1])


@constexpr
def _average_column(length):
    return _filled((length, 1), 1.0 / length)


# ---------------------------------------------------------------- gathers of rows


def _conv_windows(b, h, w, kernel, stride, padding):
    """Row numbers of each output position's window, (B*H'*W'*kernel^2,); row B*h*w stands for the zero padding."""
    top, bottom, left, right = padding
    positions = np.full((b, h + top + bottom, w + left + right), b * h * w, np.int32)
    positions[:, top : top + h, left : left + w] = np.arange(b * h * w, dtype=np.int32).reshape(b, h, w)
    windows = np.lib.stride_tricks.sliding_window_view(positions, (kernel, kernel), axis=(1, 2))
    return windows[:, ::stride, ::stride].ravel()


def _doubled(b, h, w):
    """Row numbers of a map enlarged twice by repeating positions."""
    return np.arange(b * h * w, dtype=np.int32).reshape(b, h, w).repeat(2, 1).repeat(2, 2).ravel()


def _lines(b, h, w, start, stop):
    """Row numbers of lines start..stop of each map, where a line is one row (w is 1)."""
    return np.arange(b * h, dtype=np.int32).reshape(b, h)[:, start:stop].ravel()


@constexpr
def _num_bands(b, h, w, c, kernel, stride):
    """How many bands keep the gathered windows under MAX_WINDOW_BYTES."""
    if stride > 1:
        return 1
    return min(-(-4 * b * h * w * c * kernel**2 // MAX_WINDOW_BYTES), h)


@functools.cache
def _gather_table(kind, *sizes):
    """The index of a gather, and the index of its transpose: for each row, where it went (padded to one width)."""
    index = {"windows": _conv_windows, "doubled": _doubled, "lines": _lines}[kind](*sizes)
    num_rows = math.prod(sizes[:3])
    order = np.argsort(index, kind="stable").astype(np.int32)
    order = order[: np.searchsorted(index[order], num_rows)]  # without those that read the zero row
    rows = index[order]
    starts = np.searchsorted(rows, np.arange(num_rows))
    slot = np.arange(len(rows)) - starts[rows]
    uses = np.full((num_rows, slot.max() + 1), len(index), np.int32)  # len(index): again a row of zeros
    uses[rows, slot] = order
    return Tensor(index), Tensor(uses.ravel())


@constexpr
def _gather_index(*key):
    return _gather_table(*key)[0]


@constexpr
def _scatter_index(*key):
    return _gather_table(*key)[1]


class _GatherRows(nn.Cell):
    """Rows of x by a constant index; the gradient is a gather too, since a scatter is slow on the CPU."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.gather = ops.Gather()

    def construct(self, x, sizes):
        b, h, w, c = x.shape
        rows = ops.concat((ops.reshape(x, (b * h * w, c)), ops.zeros((1, c), x.dtype)), 0)
        return self.gather(rows, _gather_index(self.kind, b, h, w, *sizes), 0)

    def bprop(self, x, sizes, out, dout):
        b, h, w, c = x.shape
        rows = ops.concat((dout, ops.zeros((1, c), x.dtype)), 0)
        used = self.gather(rows, _scatter_index(self.kind, b, h, w, *sizes), 0)
        return ops.reshape(ops.reduce_sum(ops.reshape(used, (b * h * w, -1, c)), 1), x.shape), sizes


class _Conv(nn.Cell):

    def __init__(self, kernel_size, stride, padding):
        super().__init__(auto_prefix=False)
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.windows = _GatherRows("windows")
        self.lines = _GatherRows("lines")
        self.matmul = ops.MatMul(transpose_b=True)

    def construct(self, x, weight, bias):
        b, h, w, c = x.shape
        if self.kernel_size == 1:
            windows = ops.reshape(x, (b * h * w, c))
            return ops.reshape(ops.bias_add(self.matmul(windows, weight), bias), (b, h, w, -1))
        bands = _num_bands(b, h, w, c, self.kernel_size, self.stride)
        if bands == 1:
            return self.window_product(x, weight, bias, self.padding)
        return self.in_bands(x, weight, bias, bands)

    def window_product(self, x, weight, bias, padding):
        b, h, w, c = x.shape
        k, stride = self.kernel_size, self.stride
        top, bottom, left, right = padding
        windows = self.windows(x, (k, stride, padding))
        y = self.matmul(ops.reshape(windows, (-1, k * k * c)), weight)
        y = ops.bias_add(y, bias)
        shape = (b, (h + top + bottom - k) // stride + 1, (w + left + right - k) // stride + 1, weight.shape[0])
        return ops.reshape(y, shape)

    def in_bands(self, x, weight, bias, bands):
        """The same, some output lines at a time: the windows of a large map are nine times as large as the map."""
        b, h, w, c = x.shape
        top, bottom, left, right = self.padding
        reach = self.kernel_size - 1
        height = h + top + bottom - reach
        out = ()
        for i in range(bands):
            first, last = height * i // bands, height * (i + 1) // bands
            start, stop = max(first - top, 0), min(last - top + reach, h)
            lines = self.lines(ops.reshape(x, (b, h, 1, w * c)), (start, stop))
            band = ops.reshape(lines, (b, stop - start, w, c))
            padding = (max(top - first, 0), max(last - top + reach - h, 0), left, right)
            out += (self.window_product(band, weight, bias, padding),)
            x = ops.depend(x, out[-1])  # the next band waits until this one's windows are free again
        return ops.concat(out, 1)


# ---------------------------------------------------------------- normalisation


class _LayerNormRows(nn.Cell):
    """LayerNorm of (N, C) rows without a broadcast; also returns (N, 1) mean and 1/std, for its own gradient."""

    def __init__(self, eps):
        super().__init__()
        self.eps = eps

    def construct(self, x, gamma, beta):
        c = x.shape[1]
        mean = ops.matmul(x, _average_column(c))
        d = x - ops.matmul(mean, ones(1, c))
        rstd = ops.rsqrt(ops.matmul(ops.square(d), _average_column(c)) + self.eps)
        y = ops.bias_add(d * ops.matmul(rstd, ops.reshape(gamma, (1, c))), beta)
        return y, mean, rstd

    def bprop(self, x, gamma, beta, out, dout):
        n, c = x.shape
        _, mean, rstd = out
        dy = dout[0]
        gamma_row, gamma_mean = ops.reshape(gamma, (1, c)), ops.reshape(gamma, (c, 1)) / c
        # dx = (g - mean(g) - x_hat mean(g x_hat)) / std, where g = dy gamma; written in x to keep no x_hat
        g_mean = ops.matmul(dy, gamma_mean)
        slope = (ops.matmul(dy * x, gamma_mean) - mean * g_mean) * rstd * rstd * rstd
        dx = dy * ops.matmul(rstd, gamma_row) - x * ops.matmul(slope, ones(1, c))
        dx = dx + ops.matmul(mean * slope - rstd * g_mean, ones(1, c))
        x_hat = (x - ops.matmul(mean, ones(1, c))) * ops.matmul(rstd, ones(1, c))
        dgamma = ops.reshape(ops.matmul(ones(1, n), dy * x_hat), (c,))
        dbeta = ops.reshape(ops.matmul(ones(1, n), dy), (c,))
        return dx, dgamma, dbeta


@functools.cache
def _average_over_group(channels, num_groups):
    """(C, C): averages the channels of a group and hands the average to each of them. One for all norms of a width."""
    size = channels // num_groups
    return Tensor(np.kron(np.eye(num_groups, dtype=np.float32), np.full((size, size), 1 / size, np.float32)))


class _GroupNormRows(nn.Cell):
    """GroupNorm of (B, L, C) without a broadcast; also returns (B, 1, C) mean and 1/std, for its own gradient."""

    def __init__(self, channels, eps, num_groups):
        super().__init__()
        self.eps = eps
        self.over_group = _average_over_group(channels, num_groups)

    def over_positions(self, x):
        """(B, L, C) -> (B, 1, C) mean over positions."""
        return ops.bmm(_average_over(x.shape[0], 1, x.shape[1]), x)

    def group_mean(self, x):
        """(B, 1, C) -> (B, 1, C), each channel the mean of its group."""
        b, _, c = x.shape
        return ops.reshape(ops.matmul(ops.reshape(x, (b, c)), self.over_group), (b, 1, c))

    def construct(self, x, gamma, beta):
        b, length, c = x.shape
        mean = self.group_mean(self.over_positions(x))
        d = x - repeat(mean, length)
        rstd = ops.rsqrt(self.group_mean(self.over_positions(ops.square(d))) + self.eps)
        y = ops.reshape(d * repeat(rstd * gamma, length), (b * length, c))
        return ops.reshape(ops.bias_add(y, beta), x.shape), mean, rstd

    def bprop(self, x, gamma, beta, out, dout):
        length = x.shape[1]
        _, mean, rstd = out
        dy = dout[0]
        dy_mean = self.over_positions(dy)
        dyd_mean = self.over_positions(dy * x) - mean * dy_mean
        slope = self.group_mean(dyd_mean * gamma) * rstd * rstd * rstd
        shift = mean * slope - self.group_mean(dy_mean * gamma) * rstd
        dx = dy * repeat(rstd * gamma, length) - x * repeat(slope, length) + repeat(shift, length)
        dgamma = ops.reduce_sum(dyd_mean * rstd, (0, 1)) * length
        return dx, dgamma, ops.reduce_sum(dy_mean, (0, 1)) * length


# ---------------------------------------------------------------- activations


class _SiLURows(nn.Cell):
    def construct(self, x):
        return x * ops.sigmoid(x)

    def bprop(self, x, out, dout):
        s = ops.sigmoid(x)
        return (dout * (s + out * (1.0 - s)),)


def _normal_cdf(x):
    return ops.erf(x * math.sqrt(0.5)) * 0.5 + 0.5


def _normal_pdf(x):
    return ops.exp(ops.square(x) * -0.5) * (1 / math.sqrt(2 * math.pi))


class _GELURows(nn.Cell):
    """Also returns Phi(x): erf is the cost of it, and the gradient needs the same number."""

    def construct(self, x):
        p = _normal_cdf(x)
        return x * p, p

    def bprop(self, x, out, dout):
        return (dout[0] * (out[1] + x * _normal_pdf(x)),)


class _GEGLURows(nn.Cell):
    def __init__(self):
        super().__init__()
        self.split = ops.Split(-1, 2)

    def construct(self, x):
        value, gate = self.split(x)
        p = _normal_cdf(gate)
        return value * (gate * p), p

    def bprop(self, x, out, dout):
        value, gate = self.split(x)
        p, dy = out[1], dout[0]
        return (ops.concat((dy * (gate * p), dy * value * (p + gate * _normal_pdf(gate))), -1),)


class _GEGLU(nn.Cell):
    def __init__(self):
        super().__init__()
        self.linear, self.halves = linear(has_bias=True), _GEGLURows()

    def construct(self, x, weight, bias):
        return self.halves(self.linear(x, weight, bias))[0]


# ---------------------------------------------------------------- attention


@constexpr
def causal_mask(*shape):
    """0 where a key is seen, -inf elsewhere; of the scores' full shape, since a broadcast would keep index lists."""
    _, queries, keys = shape
    return Tensor(np.broadcast_to(np.triu(np.full((queries, keys), -np.inf, np.float32), 1), shape).copy())


@constexpr
def _num_chunks(n, queries, keys):
    """The smallest divisor of `queries` that keeps a chunk's scores under MAX_SCORE_BYTES."""
    return next(c for c in range(1, queries + 1) if queries % c == 0 and 4 * n * queries // c * keys <= MAX_SCORE_BYTES)


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
            scores = scores + causal_mask(*scores.shape)
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


# ---------------------------------------------------------------- what layers ask for


class _LayerNorm(nn.Cell):
    def __init__(self, eps):
        super().__init__(auto_prefix=False)
        self.normalise = _LayerNormRows(eps)

    def construct(self, x, gamma, beta):
        y = self.normalise(ops.reshape(x, (-1, x.shape[-1])), gamma, beta)[0]
        return ops.reshape(y, x.shape)


class _GroupNorm(nn.Cell):
    def __init__(self, channels, eps, num_groups, activation):
        super().__init__(auto_prefix=False)
        self.normalise = _GroupNormRows(channels, eps, num_groups)
        self.activate = _ACTIVATIONS[activation]()

    def construct(self, x, gamma, beta):
        b, h, w, c = x.shape
        y = self.normalise(ops.reshape(x, (b, h * w, c)), gamma, beta)[0]
        return self.activate(ops.reshape(y, x.shape))


class _Attention(nn.Cell):
    def __init__(self, num_heads, causal):
        super().__init__(auto_prefix=False)
        self.num_heads = num_heads
        self.core = _AttentionRows(causal)

    def construct(self, q, k, v):
        b, length, c = q.shape
        out = self.core(self.to_heads(q), self.to_heads(k), self.to_heads(v))
        out = ops.transpose(ops.reshape(out, (b, self.num_heads, length, -1)), (0, 2, 1, 3))
        return ops.cast(ops.reshape(out, (b, length, c)), q.dtype)

    def to_heads(self, x):
        """(B, L, C) -> (B * heads, L, d) float32."""
        b, length, c = x.shape
        x = ops.reshape(ops.cast(x, ms.float32), (b, length, self.num_heads, c // self.num_heads))
        return ops.reshape(ops.transpose(x, (0, 2, 1, 3)), (b * self.num_heads, length, c // self.num_heads))


class _QuickGELU(nn.Cell):
    def construct(self, x):
        return x * ops.sigmoid(1.702 * x)


class _First(nn.Cell):
    """The first of a cell's outputs; the others are there for its gradient."""

    def __init__(self, core):
        super().__init__(auto_prefix=False)
        self.core = core

    def construct(self, x):
        return self.core(x)[0]


class _Enlarge(nn.Cell):
    def __init__(self):
        super().__init__(auto_prefix=False)
        self.gather = _GatherRows("doubled")

    def construct(self, x):
        b, h, w, c = x.shape
        return ops.reshape(self.gather(x, ()), (b, 2 * h, 2 * w, c))


class _AddPerSample(nn.Cell):
    def construct(self, x, e):
        b, h, w, c = x.shape
        if b == 1:
            return ops.reshape(ops.bias_add(ops.reshape(x, (h * w, c)), ops.reshape(e, (c,))), (b, h, w, c))
        return x + ops.reshape(repeat(ops.reshape(e, (b, 1, c)), h * w), (b, h, w, c))


_ACTIVATIONS = {
    None: nn.Identity,
    "silu": _SiLURows,
    "quick_gelu": _QuickGELU,
    "gelu": lambda: _First(_GELURows()),
}


def conv(out_channels, kernel_size, stride, padding):
    return _Conv(kernel_size, stride, padding)


def layer_norm(eps):
    return _LayerNorm(eps)


def group_norm(channels, eps, num_groups, activation):
    return _GroupNorm(channels, eps, num_groups, activation)


def attention(num_heads, *, causal, dtype):
    return _Attention(num_heads, causal)


def activation(kind):
    return _ACTIVATIONS[kind]()


def geglu(*, dtype):
    return _GEGLU()


def enlarge():
    return _Enlarge()


def add_per_sample():
    return _AddPerSample()
