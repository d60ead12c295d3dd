"""The layers that every network is made of, and the only file that knows the device.

Two forms of each layer compute the same function:

- ``rows`` (CPU): a feature map is (B, H, W, C), that is, rows of positions. MindSpore's CPU convolution takes its
  slowest path on AVX-512 processors, and its broadcasting operators keep index lists larger than their tensors, so
  a convolution is one gather and one matrix product, and what would broadcast is a matrix product by ones.
- ``native`` (Ascend): a feature map is (B, C, H, W) and layers are MindSpore's own operators.

Networks never look inside a feature map: they make one with `to_feature_map`, and use the functions and cells below.
Parameters carry the names of the original SDXL checkpoint (``weight`` and ``bias``, in norms and embeddings too);
where a parameter is kept in another shape than in the file, `file_layouts` says how the two are exchanged.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.ops import constexpr

# Above this many bytes, gathered convolution windows are made and multiplied band by band.
MAX_WINDOW_BYTES = 256 * 2**20

_forced_form = None


def rows_form():
    """Whether layers built now take the CPU form. Read once, when a layer is constructed."""
    form = _forced_form or ("rows" if ms.get_context("device_target") == "CPU" else "native")
    return form == "rows"


@contextlib.contextmanager
def forced_form(form):
    """Build and run layers in a given form, "rows" or "native", whatever the device (for tests, benchmarks)."""
    global _forced_form
    assert form in ("rows", "native"), form
    before, _forced_form = _forced_form, form
    try:
        yield
    finally:
        _forced_form = before


@constexpr
def _is_rows():
    """`rows_form` inside a compiled graph."""
    return rows_form()


_dtype = ms.float32


@contextlib.contextmanager
def parameter_dtype(dtype):
    """Make parameters of layers built inside in `dtype`, ms.float32 or ms.float16."""
    global _dtype
    before, _dtype = _dtype, dtype
    try:
        yield
    finally:
        _dtype = before


def empty_parameter(shape, name):
    """A Parameter of zeros whose memory the system hands out only when it is written."""
    dtype = str(_dtype).lower()
    parameter = Parameter(Tensor(np.zeros([1] * len(shape), dtype)), name=name)
    # Parameter() copies what it is given, and so writes it; set_data keeps the untouched pages of np.zeros.
    parameter.set_data(Tensor.from_numpy(np.zeros(shape, dtype)), slice_shape=True)
    parameter.sliced = False
    return parameter


@dataclass(frozen=True)
class FileLayout:
    """How a Parameter stands in the original checkpoint: its shape there, and the way there and back (numpy)."""

    shape: tuple
    pack: Callable = lambda array: array  # file -> parameter
    unpack: Callable = lambda array: array  # parameter -> file


def file_layouts(net):
    """The FileLayout of every Parameter of a network.

    Returns:
        dict from the parameter's attribute chain (the original SDXL key) to its FileLayout.
    """
    layouts = {}
    for prefix, cell in net.cells_and_names():
        own = cell.file_layouts() if isinstance(cell, Conv2d) else {}
        for name, parameter in cell.parameters_and_names(expand=False):
            key = f"{prefix}.{name}" if prefix else name
            layouts[key] = own.get(name) or FileLayout(tuple(parameter.shape))
    return layouts


# ---------------------------------------------------------------- feature maps


def to_feature_map(x):
    """(B, C, H, W) -> feature map."""
    return ops.transpose(x, (0, 2, 3, 1)) if _is_rows() else x


def from_feature_map(x):
    """Feature map -> (B, C, H, W)."""
    return ops.transpose(x, (0, 3, 1, 2)) if _is_rows() else x


def to_tokens(x):
    """Feature map -> (B, H*W, C), positions in reading order."""
    if _is_rows():
        b, h, w, c = x.shape
        return ops.reshape(x, (b, h * w, c))
    b, c, h, w = x.shape
    return ops.transpose(ops.reshape(x, (b, c, h * w)), (0, 2, 1))


def from_tokens(tokens, like):
    """(B, H*W, C) -> feature map with the height and width of `like`."""
    b, _, c = tokens.shape
    if _is_rows():
        _, h, w, _ = like.shape
        return ops.reshape(tokens, (b, h, w, c))
    _, _, h, w = like.shape
    return ops.reshape(ops.transpose(tokens, (0, 2, 1)), (b, c, h, w))


def concat_channels(a, b):
    """Two feature maps of one size, channels of `a` first."""
    return ops.concat((a, b), 3 if _is_rows() else 1)


def add_per_sample(x, e):
    """Add a vector a sample to every position: feature map + (B, C)."""
    if not _is_rows():
        return x + ops.reshape(e, (*e.shape, 1, 1))
    b, h, w, c = x.shape
    if b == 1:
        return ops.reshape(ops.bias_add(ops.reshape(x, (h * w, c)), ops.reshape(e, (c,))), (b, h, w, c))
    return x + ops.reshape(_repeat(ops.reshape(e, (b, 1, c)), h * w), (b, h, w, c))


def _repeat(x, length):
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


class Upsample2x(nn.Cell):
    """Nearest-neighbour enlargement of a feature map by two."""

    def __init__(self):
        super().__init__()
        self.rows = rows_form()
        self.gather = _GatherRows("doubled")

    def construct(self, x):
        if self.rows:
            b, h, w, c = x.shape
            return ops.reshape(self.gather(x, ()), (b, 2 * h, 2 * w, c))
        b, c, h, w = x.shape
        return ops.interpolate(x, size=(2 * h, 2 * w), mode="nearest")


# ---------------------------------------------------------------- layers with parameters


class Linear(nn.Cell):
    """y = x W^T + b on the last axis, in the weight's dtype.

    x: (..., in_features) -> (..., out_features). weight: (out_features, in_features).
    """

    def __init__(self, in_features, out_features, *, has_bias=True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = empty_parameter((out_features, in_features), "weight")
        self.bias = empty_parameter((out_features,), "bias") if has_bias else None
        self.matmul = ops.MatMul(transpose_b=True)

    def construct(self, x):
        rows = ops.cast(ops.reshape(x, (-1, self.in_features)), self.weight.dtype)
        y = self.matmul(rows, self.weight)
        if self.bias is not None:
            y = ops.bias_add(y, self.bias)
        return ops.reshape(y, (*x.shape[:-1], self.out_features))


class Conv2d(nn.Cell):
    """2D convolution of a feature map, zero padded.

    Args:
        kernel_size: 1 or 3 (any odd number works).
        padding: positions on every side, or (top, bottom, left, right).

    weight: (out, in, k, k) in the file; on CPU (out, k*k*in), so that one matrix product does all windows.
    """

    def __init__(self, in_channels, out_channels, kernel_size, *, stride=1, padding=0):
        super().__init__()
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.stride = stride
        self.padding = (padding,) * 4 if isinstance(padding, int) else tuple(padding)
        self.rows = rows_form()
        self.file_shape = (out_channels, in_channels, kernel_size, kernel_size)
        shape = (out_channels, kernel_size**2 * in_channels) if self.rows else self.file_shape
        self.weight = empty_parameter(shape, "weight")
        self.bias = empty_parameter((out_channels,), "bias")
        if self.rows:
            self.windows = _GatherRows("windows")
            self.lines = _GatherRows("lines")
            self.matmul = ops.MatMul(transpose_b=True)
        else:
            self.conv = ops.Conv2D(out_channels, kernel_size, stride=stride, pad_mode="pad", pad=self.padding)

    def construct(self, x):
        x = ops.cast(x, self.weight.dtype)
        if not self.rows:
            return ops.bias_add(self.conv(x, self.weight), self.bias)
        b, h, w, c = x.shape
        if self.kernel_size == 1:
            windows = ops.reshape(x, (b * h * w, c))
            return ops.reshape(ops.bias_add(self.matmul(windows, self.weight), self.bias), (b, h, w, -1))
        bands = _num_bands(b, h, w, c, self.kernel_size, self.stride)
        if bands == 1:
            return self.window_product(x, self.padding)
        return self.in_bands(x, bands)

    def window_product(self, x, padding):
        b, h, w, c = x.shape
        k, stride = self.kernel_size, self.stride
        top, bottom, left, right = padding
        windows = self.windows(x, (k, stride, padding))
        y = self.matmul(ops.reshape(windows, (-1, k * k * c)), self.weight)
        y = ops.bias_add(y, self.bias)
        shape = (b, (h + top + bottom - k) // stride + 1, (w + left + right - k) // stride + 1, self.out_channels)
        return ops.reshape(y, shape)

    def in_bands(self, x, bands):
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
            out += (self.window_product(band, padding),)
            x = ops.depend(x, out[-1])  # the next band waits until this one's windows are free again
        return ops.concat(out, 1)

    def file_layouts(self):
        if not self.rows:
            return {}
        out, inner, k, _ = self.file_shape
        return {
            "weight": FileLayout(
                self.file_shape,
                pack=lambda a: np.ascontiguousarray(a.transpose(0, 2, 3, 1)).reshape(out, -1),
                unpack=lambda a: np.ascontiguousarray(a.reshape(out, k, k, inner).transpose(0, 3, 1, 2)),
            )
        }


class Upsample(nn.Cell):
    """A feature map enlarged by two, then a 3x3 convolution, as in the UNet and the autoencoder."""

    def __init__(self, channels):
        super().__init__()
        self.enlarge = Upsample2x()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def construct(self, x):
        return self.conv(self.enlarge(x))


class Embedding(nn.Cell):
    """Rows of a table: ids (...) int32 -> (..., width). weight: (num_embeddings, width)."""

    def __init__(self, num_embeddings, width):
        super().__init__()
        self.weight = empty_parameter((num_embeddings, width), "weight")
        self.gather = ops.Gather()

    def construct(self, ids):
        return self.gather(self.weight, ids, 0)


# ---------------------------------------------------------------- normalisation


def _vector(parameter):
    """A parameter as a float32 (C,) tensor.

    The reshape matters: PyNative loses the gradient of a Parameter handed as it is to a cell with its own bprop.
    """
    return ops.cast(ops.reshape(parameter, (-1,)), ms.float32)


class LayerNorm(nn.Cell):
    """Normalise the last axis, then scale and shift. Computed in float32, returned in the input's dtype."""

    def __init__(self, width, eps=1e-5):
        super().__init__()
        self.width = width
        self.weight = empty_parameter((width,), "weight")
        self.bias = empty_parameter((width,), "bias")
        self.rows = rows_form()
        self.normalise = _NormaliseRows(eps) if self.rows else ops.LayerNorm(-1, -1, eps)

    def construct(self, x):
        rows = ops.cast(ops.reshape(x, (-1, self.width)), ms.float32)
        y = self.normalise(rows, _vector(self.weight), _vector(self.bias))[0]
        return ops.cast(ops.reshape(y, x.shape), x.dtype)


class _NormaliseRows(nn.Cell):
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


class GroupNorm(nn.Cell):
    """Normalise a feature map over positions and the channels of a group (Wu and He 2018), scale and shift.

    Computed in float32, returned in the input's dtype.
    """

    def __init__(self, channels, eps, *, num_groups=32):
        super().__init__()
        if channels % num_groups:
            raise ValueError(f"GroupNorm: {channels} channels do not divide into {num_groups} groups.")
        self.num_groups, self.eps = num_groups, eps
        self.weight = empty_parameter((channels,), "weight")
        self.bias = empty_parameter((channels,), "bias")
        self.rows = rows_form()
        if self.rows:
            self.normalise = _NormaliseGroups(channels, eps, num_groups)

    def construct(self, x):
        gamma, beta = _vector(self.weight), _vector(self.bias)
        if self.rows:
            b, h, w, c = x.shape
            y = self.normalise(ops.cast(ops.reshape(x, (b, h * w, c)), ms.float32), gamma, beta)[0]
            return ops.cast(ops.reshape(y, x.shape), x.dtype)
        b, c, h, w = x.shape
        y = ops.cast(ops.reshape(x, (b, self.num_groups, -1)), ms.float32)
        d = y - ops.mean(y, -1, keep_dims=True)
        y = d * ops.rsqrt(ops.mean(ops.square(d), -1, keep_dims=True) + self.eps)
        y = ops.reshape(y, x.shape) * ops.reshape(gamma, (1, c, 1, 1)) + ops.reshape(beta, (1, c, 1, 1))
        return ops.cast(y, x.dtype)


@functools.cache
def _average_over_group(channels, num_groups):
    """(C, C): averages the channels of a group and hands the average to each of them. One for all norms of a width."""
    size = channels // num_groups
    return Tensor(np.kron(np.eye(num_groups, dtype=np.float32), np.full((size, size), 1 / size, np.float32)))


class _NormaliseGroups(nn.Cell):
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
        d = x - _repeat(mean, length)
        rstd = ops.rsqrt(self.group_mean(self.over_positions(ops.square(d))) + self.eps)
        y = ops.reshape(d * _repeat(rstd * gamma, length), (b * length, c))
        return ops.reshape(ops.bias_add(y, beta), x.shape), mean, rstd

    def bprop(self, x, gamma, beta, out, dout):
        length = x.shape[1]
        _, mean, rstd = out
        dy = dout[0]
        dy_mean = self.over_positions(dy)
        dyd_mean = self.over_positions(dy * x) - mean * dy_mean
        slope = self.group_mean(dyd_mean * gamma) * rstd * rstd * rstd
        shift = mean * slope - self.group_mean(dy_mean * gamma) * rstd
        dx = dy * _repeat(rstd * gamma, length) - x * _repeat(slope, length) + _repeat(shift, length)
        dgamma = ops.reduce_sum(dyd_mean * rstd, (0, 1)) * length
        return dx, dgamma, ops.reduce_sum(dy_mean, (0, 1)) * length


# ---------------------------------------------------------------- activations


class SiLU(nn.Cell):
    """x sigmoid(x)."""

    def __init__(self):
        super().__init__()
        self.activate = _SiLURows() if rows_form() else ops.silu

    def construct(self, x):
        return self.activate(x)


class _SiLURows(nn.Cell):
    def construct(self, x):
        return x * ops.sigmoid(x)

    def bprop(self, x, out, dout):
        s = ops.sigmoid(x)
        return (dout * (s + out * (1.0 - s)),)


class QuickGELU(nn.Cell):
    """x sigmoid(1.702 x), the activation of OpenAI's CLIP."""

    def construct(self, x):
        return x * ops.sigmoid(1.702 * x)


def _normal_cdf(x):
    return ops.erf(x * math.sqrt(0.5)) * 0.5 + 0.5


def _normal_pdf(x):
    return ops.exp(ops.square(x) * -0.5) * (1 / math.sqrt(2 * math.pi))


class GELU(nn.Cell):
    """x Phi(x) with the exact normal distribution function (Hendrycks and Gimpel 2016)."""

    def __init__(self):
        super().__init__()
        self.rows = rows_form()
        self.activate = _GELURows() if self.rows else ops.gelu

    def construct(self, x):
        return self.activate(x)[0] if self.rows else self.activate(x, approximate="none")


class _GELURows(nn.Cell):
    """Also returns Phi(x): erf is the cost of it, and the gradient needs the same number."""

    def construct(self, x):
        p = _normal_cdf(x)
        return x * p, p

    def bprop(self, x, out, dout):
        return (dout[0] * (out[1] + x * _normal_pdf(x)),)


class GEGLU(nn.Cell):
    """(..., 2C) -> (..., C): the first half times GELU of the second half (Shazeer 2020)."""

    def __init__(self):
        super().__init__()
        self.rows = rows_form()
        self.split = ops.Split(-1, 2)
        self.activate = _GEGLURows() if self.rows else ops.gelu

    def construct(self, x):
        if self.rows:
            return self.activate(x)[0]
        value, gate = self.split(x)
        return value * self.activate(gate, approximate="none")


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


# ---------------------------------------------------------------- sinusoids


class Sinusoid(nn.Cell):
    """Numbers as waves: (N,) float32 -> (N, dim), cosines first (Vaswani et al. 2017, sec. 3.5; SGM's order).

    Frequencies are 10000^(-i / (dim/2)) for i in 0 .. dim/2 - 1, made in numpy: MindSpore's CPU exp is off by
    6e-7, which size numbers in the thousands would show.
    """

    def __init__(self, dim):
        super().__init__()
        half = dim // 2
        self.frequencies = Tensor(np.exp(-math.log(10000) * np.arange(half) / half).astype(np.float32)[None])

    def construct(self, x):
        angles = ops.matmul(ops.reshape(ops.cast(x, ms.float32), (-1, 1)), self.frequencies)
        return ops.concat((ops.cos(angles), ops.sin(angles)), -1)
