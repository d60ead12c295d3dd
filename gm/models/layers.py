"""The layers that every network is made of, and the only file that knows the device.

A layer holds parameters; what computes with them comes in three forms, each a module with the same functions:

- `native` (Ascend): MindSpore's own operators; a feature map is (B, C, H, W).
- `fused` (CPU): kernels written for this program, which hold weights constant; a feature map is (B, H, W, C), that
  is, rows of positions.
- `rows` (CPU without a compiler, or float16): the same layout in MindSpore's own operators.

Networks never look inside a feature map: they make one with `to_feature_map`, and use the functions and cells below.
Parameters carry the names of the original SDXL checkpoint (``weight`` and ``bias``, in norms and embeddings too);
where a parameter is kept in another way than in the file, `file_layouts` says how the two are exchanged.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.ops import constexpr

from gm.bfloat16 import BFLOAT16, from_bfloat16
from gm.models import fused, native, rows

FORMS = {"native": native, "fused": fused, "rows": rows}

_forced_form = None
_dtype = ms.float32


@contextlib.contextmanager
def forced_form(name):
    """Build and run layers in a given form, one of FORMS, whatever the device (for tests, benchmarks)."""
    global _forced_form
    assert name in FORMS, name
    before, _forced_form = _forced_form, name
    try:
        yield
    finally:
        _forced_form = before


@contextlib.contextmanager
def parameter_dtype(dtype):
    """Make parameters of layers built inside in `dtype`: ms.float32, ms.float16, or ms.bfloat16.

    bfloat16 is for the fused form: matrices are held in it, everything else is float32.
    """
    global _dtype
    before, _dtype = _dtype, dtype
    try:
        yield
    finally:
        _dtype = before


def current_dtype():
    """The `parameter_dtype` of layers built now."""
    return _dtype


def form_name():
    """The form of layers built now."""
    if _forced_form:
        return _forced_form
    if ms.get_context("device_target") != "CPU":
        return "native"
    return "fused" if _dtype != ms.float16 and fused.available() else "rows"


def _form():
    return FORMS[form_name()]


@constexpr
def _is_rows():
    """Inside a compiled graph: whether a feature map is (B, H, W, C)."""
    return (_forced_form or ms.get_context("device_target")) not in ("native", "Ascend")


# ---------------------------------------------------------------- parameters


def empty_parameter(shape, name, *, is_matrix=False):
    """A Parameter of zeros whose memory the system hands out only when it is written.

    A matrix multiplies activations; it is held as the bits of bfloat16 in int16 where that is the `parameter_dtype`.
    """
    dtype = str(_dtype).lower()
    if _dtype == ms.bfloat16:
        assert form_name() == "fused", "bfloat16 needs the fused form"
        dtype = "int16" if is_matrix else "float32"
    parameter = Parameter(Tensor(np.zeros([1] * len(shape), dtype)), name=name, requires_grad=form_name() != "fused")
    # Parameter() copies what it is given, and so writes it; set_data keeps the untouched pages of np.zeros.
    parameter.set_data(Tensor.from_numpy(np.zeros(shape, dtype)), slice_shape=True)
    parameter.sliced = False
    return parameter


def as_vector(parameter):
    """A parameter as a float32 (C,) tensor.

    The reshape matters: PyNative loses the gradient of a Parameter handed as it is to a cell with its own bprop.
    """
    return ops.cast(ops.reshape(parameter, (-1,)), ms.float32)


@dataclass(frozen=True)
class FileLayout:
    """How a Parameter stands in the original checkpoint, and the way there and back (numpy)."""

    shape: tuple
    dtype: np.dtype  # of the array that `pack` takes and `unpack` gives
    held: np.dtype | None  # of the file whose very bytes the parameter holds, maybe BFLOAT16; None: always rearranged
    pack: Callable = lambda array: array  # file -> parameter, of everything or of some rows of the first axis
    unpack: Callable = lambda array: array  # parameter -> file


def file_layouts(net):
    """The FileLayout of every Parameter of a network.

    Returns:
        dict from the parameter's attribute chain (the original SDXL key) to its FileLayout.
    """
    layouts = {}
    for prefix, cell in net.cells_and_names():
        for name, parameter in cell.parameters_and_names(expand=False):
            shape = cell.file_shape if name == "weight" and isinstance(cell, Conv2d) else tuple(parameter.shape)
            layouts[f"{prefix}.{name}" if prefix else name] = _file_layout(parameter, shape)
    return layouts


def _file_layout(parameter, shape):
    bits, turned = parameter.dtype == ms.int16, tuple(parameter.shape) != shape
    dtype = np.dtype("float32" if bits else str(parameter.dtype).lower())
    held = None if turned else BFLOAT16 if bits else dtype

    def pack(array):
        if turned:  # (o, c, k, k) -> (o, k k c)
            array = np.ascontiguousarray(array.transpose(0, 2, 3, 1)).reshape(len(array), -1)
        return fused.to_bfloat16_bits(array) if bits else array

    def unpack(array):
        array = from_bfloat16(array) if bits else array
        if turned:
            out, inner, k, _ = shape
            array = np.ascontiguousarray(array.reshape(out, k, k, inner).transpose(0, 3, 1, 2))
        return array

    return FileLayout(shape, dtype, held, pack, unpack)


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


class AddPerSample(nn.Cell):
    """Add a vector a sample to every position: feature map + (B, C)."""

    def __init__(self):
        super().__init__()
        self.core = _form().add_per_sample()

    def construct(self, x, e):
        return self.core(x, e)


class Enlarge(nn.Cell):
    """A feature map enlarged by two, each position four times."""

    def __init__(self):
        super().__init__()
        self.core = _form().enlarge()

    def construct(self, x):
        return self.core(x)


# ---------------------------------------------------------------- layers with parameters


class Product(nn.Cell):
    """x W^T, or x W^T + b, on the last axis, with parameters that belong to another cell.

    x: (..., in_features), weight: (out_features, in_features), bias: (out_features,) -> (..., out_features).
    """

    def __init__(self, *, has_bias=True):
        super().__init__()
        self.dtype = _dtype if _dtype != ms.bfloat16 else ms.float32
        self.has_bias = has_bias
        self.core = _form().linear(has_bias=has_bias)

    def construct(self, x, weight, bias=None):
        x = ops.cast(x, self.dtype)
        return self.core(x, weight, bias) if self.has_bias else self.core(x, weight)


class Linear(nn.Cell):
    """y = x W^T + b on the last axis.

    x: (..., in_features) -> (..., out_features). weight: (out_features, in_features).
    """

    def __init__(self, in_features, out_features, *, has_bias=True):
        super().__init__()
        self.weight = empty_parameter((out_features, in_features), "weight", is_matrix=True)
        self.bias = empty_parameter((out_features,), "bias") if has_bias else None
        self.product = Product(has_bias=has_bias)

    def construct(self, x):
        return self.product(x, self.weight, self.bias)


class GEGLU(nn.Cell):
    """The first half of x W^T + b times GELU of its second half, on the last axis (Shazeer 2020).

    x: (..., in_features) -> (..., out_features). proj.weight: (2 out_features, in_features).
    """

    def __init__(self, in_features, out_features):
        super().__init__()
        self.proj = Linear(in_features, 2 * out_features)
        self.dtype = self.proj.product.dtype
        self.core = _form().geglu(dtype=_dtype)

    def construct(self, x):
        return self.core(ops.cast(x, self.dtype), self.proj.weight, self.proj.bias)


class Conv2d(nn.Cell):
    """2D convolution of a feature map, zero padded.

    Args:
        kernel_size: 1 or 3 (any odd number works).
        padding: positions on every side, or (top, bottom, left, right).

    weight: (out, in, k, k) in the file; on CPU (out, k*k*in), so that one matrix product does all windows.
    """

    def __init__(self, in_channels, out_channels, kernel_size, *, stride=1, padding=0):
        super().__init__()
        padding = (padding,) * 4 if isinstance(padding, int) else tuple(padding)
        self.file_shape = (out_channels, in_channels, kernel_size, kernel_size)
        shape = self.file_shape if form_name() == "native" else (out_channels, kernel_size**2 * in_channels)
        self.weight = empty_parameter(shape, "weight", is_matrix=True)
        self.bias = empty_parameter((out_channels,), "bias")
        self.dtype = _dtype if _dtype != ms.bfloat16 else ms.float32
        self.core = _form().conv(out_channels, kernel_size, stride, padding)

    def construct(self, x):
        return self.core(ops.cast(x, self.dtype), self.weight, self.bias)


class Upsample(nn.Cell):
    """A feature map enlarged by two, then a 3x3 convolution, as in the UNet and the autoencoder."""

    def __init__(self, channels):
        super().__init__()
        self.enlarge = Enlarge()
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


class LayerNorm(nn.Cell):
    """Normalise the last axis, then scale and shift. Computed in float32, returned in the input's dtype."""

    def __init__(self, width, eps=1e-5):
        super().__init__()
        self.weight = empty_parameter((width,), "weight")
        self.bias = empty_parameter((width,), "bias")
        self.core = _form().layer_norm(eps)

    def construct(self, x):
        y = self.core(ops.cast(x, ms.float32), as_vector(self.weight), as_vector(self.bias))
        return ops.cast(y, x.dtype)


class GroupNorm(nn.Cell):
    """Normalise a feature map over positions and the channels of a group (Wu and He 2018), scale, shift, activate.

    Computed in float32, returned in the input's dtype.

    Args:
        activation: None or "silu".
    """

    def __init__(self, channels, eps, *, num_groups=32, activation=None):
        super().__init__()
        if channels % num_groups:
            raise ValueError(f"GroupNorm: {channels} channels do not divide into {num_groups} groups.")
        self.weight = empty_parameter((channels,), "weight")
        self.bias = empty_parameter((channels,), "bias")
        self.core = _form().group_norm(channels, eps, num_groups, activation)

    def construct(self, x):
        y = self.core(ops.cast(x, ms.float32), as_vector(self.weight), as_vector(self.bias))
        return ops.cast(y, x.dtype)


# ---------------------------------------------------------------- activations


class Activation(nn.Cell):
    """Elementwise: "silu", x sigmoid(x); "quick_gelu", x sigmoid(1.702 x), of OpenAI's CLIP; "gelu", x Phi(x) with
    the exact normal distribution function (Hendrycks and Gimpel 2016).
    """

    def __init__(self, kind):
        super().__init__()
        self.core = _form().activation(kind)

    def construct(self, x):
        return self.core(x)


class Attention(nn.Cell):
    """softmax(q k^T / sqrt(d)) v for each head (Vaswani et al. 2017, eq. 1).

    q: (B, Lq, C), k and v: (B, Lk, C), where C = num_heads * d -> (B, Lq, C).

    Args:
        causal: a position sees itself and earlier ones (Lq = Lk).
    """

    def __init__(self, num_heads, *, causal=False):
        super().__init__()
        self.core = _form().attention(num_heads, causal=causal, dtype=_dtype)

    def construct(self, q, k, v):
        return self.core(q, k, v)


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
