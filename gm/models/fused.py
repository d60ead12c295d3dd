"""The CPU's fused kernels: kernels.cc compiled at first use, and its functions as MindSpore operators.

Weights are constants to them: they give the gradient by the input, and none by weights. Where they cannot be had
(no compiler, no x86-64 Linux, another MindSpore), `library` says why, and layers take their other form.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.cc")
FLAGS = "-O3 -march=native -std=c++17 -fopenmp-simd -fno-math-errno -fno-trapping-math -fPIC -shared".split()
ACTIVATIONS = {None: 0, "silu": 1, "quick_gelu": 2, "gelu": 3}


class NoKernels(Exception):
    """Why there are no fused kernels here."""


def cache_folder():
    """Where compiled kernels are kept for the next process."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "textual_inversion_mindspore" / "kernels"


@functools.cache
def library():
    """Path of the compiled kernels; compiles them at the first call on a machine (some seconds).

    Raises:
        NoKernels: there is no way to have them here.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise NoKernels(f"they are written for Linux on x86-64, not {platform.system()} on {platform.machine()}")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise NoKernels("there is no C++ compiler (g++)")
    onednn = next((Path(ms.__file__).parent / "lib").glob("libdnnl.so.*"), None)
    if onednn is None:
        raise NoKernels("this MindSpore brings no oneDNN library")
    key = hashlib.sha256(SOURCE.read_bytes())
    for part in (*FLAGS, compiler, str(onednn), ms.__version__, _processor()):
        key.update(part.encode())
    path = cache_folder() / f"{key.hexdigest()[:16]}.so"
    try:
        if not path.exists():
            _compile(compiler, onednn, path)
        ctypes.CDLL(str(path), mode=os.RTLD_NOW).SetThreads(num_threads())
    except OSError as e:
        raise NoKernels(f"{path} does not load: {e}") from e
    return str(path)


def num_threads():
    """Threads of the kernels: OMP_NUM_THREADS, or the processors that this process may use.

    Asked here, since MindSpore sets OMP_NUM_THREADS to 1 for its own C++ code.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdecimal() and int(wanted) > 0 else len(os.sched_getaffinity(0))


def _compile(compiler, onednn, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    logger.info("Compiling the CPU kernels, once on this machine ...")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / "kernels.so"
        command = [compiler, *FLAGS, str(SOURCE), "-pthread", "-o", str(made)]
        command += [str(onednn), f"-Wl,-rpath,{onednn.parent}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError as e:
            raise NoKernels(f"the compiler {compiler} is not there") from e
        if done.returncode:
            raise NoKernels(f"{compiler} failed: {done.stderr.strip()[-500:]}")
        made.replace(path)  # whole, whoever else compiles it at the same time


def _processor():
    """What -march=native depends on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))


@functools.cache
def available():
    """Whether the kernels can be had; compiles them if need be, and says so if not."""
    try:
        library()
    except NoKernels as e:
        logger.warning("Computing without the fused CPU kernels, at half the speed: %s.", e)
        return False
    return True


def take_profile():
    """What the kernels have cost since the last call.

    Returns:
        dict of kernel -> (calls, seconds, operations of its matrix products); empty where there are no kernels.
    """
    if not available():
        return {}
    text = ctypes.create_string_buffer(1 << 16)
    ctypes.CDLL(library()).TakeAccounts(text, ctypes.c_int64(len(text)))
    lines = (line.split() for line in text.value.decode().splitlines())
    return {name: (int(calls), float(seconds), int(done)) for name, calls, seconds, done in lines}


def fast_bfloat16():
    """Whether this processor multiplies bfloat16 numbers faster than float32."""
    return any(flag in _processor() for flag in ("avx512_bf16", "amx_bf16"))


def to_bfloat16_bits(array):
    """float32 -> int16, rounded to nearest, ties to even."""
    array = np.ascontiguousarray(array, np.float32)
    bits = np.empty(array.shape, np.int16)
    pointers = (ctypes.c_void_p(a.ctypes.data) for a in (array, bits))
    ctypes.CDLL(library()).ToBfloat16(*pointers, ctypes.c_int64(array.size))
    return bits


# ---------------------------------------------------------------- operators


def settings(*values):
    """A constant of int32 numbers; floats as their bits."""
    return _settings(tuple(int(np.float32(v).view(np.int32)) if isinstance(v, float) else int(v) for v in values))


@functools.cache
def _settings(bits):
    return Tensor(np.array(bits, np.int32))


def _operator(name, shape, *, dtype=ms.float32, variant=""):
    """A function of kernels.cc as an operator.

    Args:
        shape: gives the output's shape, or a tuple of them, from the inputs' shapes.
        dtype: of the output, or a tuple of them.
        variant: text that differs where `shape` does; PyNative mode remembers shapes by name and attributes.
    """
    operator = ops.Custom(f"{library()}:{name}", out_shape=shape, out_dtype=dtype, func_type="aot")
    operator.add_prim_attr("variant", variant)
    return operator


class _Kernel(nn.Cell):
    """An operator with its gradient. One object serves all layers: MindSpore derives its gradient once."""

    def __init__(self, operator, gradient, numbers=None):
        super().__init__(auto_prefix=False)
        self.operator, self.gradient, self.numbers = operator, gradient, numbers


class _First(nn.Cell):
    """The first result of a kernel; the others are for its gradient."""

    def __init__(self, kernel):
        super().__init__(auto_prefix=False)
        self.kernel = kernel

    def construct(self, a, b, c):
        return self.kernel(a, b, c)[0]


class _Product(_Kernel):
    def construct(self, x, weight):
        return self.operator(x, weight)

    def bprop(self, x, weight, out, dout):
        return self.gradient(dout, weight), ops.zeros_like(weight)


class _Linear(_Kernel):
    def construct(self, x, weight, bias):
        return self.operator(x, weight, bias)

    def bprop(self, x, weight, bias, out, dout):
        return self.gradient(dout, weight), ops.zeros_like(weight), ops.zeros_like(bias)


@functools.cache
def linear(*, has_bias):
    """x (..., k), weight (n, k) float32 or the bits of bfloat16 in int16, maybe bias (n,) -> (..., n)."""
    operator = _operator("Linear", lambda x, w, *_: [*x[:-1], w[0]])
    gradient = _operator("LinearGradient", lambda dy, w: [*dy[:-1], w[1]])
    return (_Linear if has_bias else _Product)(operator, gradient)


class _Conv(_Kernel):
    def construct(self, x, weight, bias):
        return self.operator(x, weight, bias, self.numbers)

    def bprop(self, x, weight, bias, out, dout):
        return self.gradient(dout, weight, self.numbers), ops.zeros_like(weight), ops.zeros_like(bias)


@functools.cache
def conv(out_channels, kernel_size, stride, padding):
    """x (b, h, w, c), weight (o, k k c), bias (o,) -> (b, h', w', o); padding (top, bottom, left, right)."""
    top, bottom, left, right = padding
    tall, wide = kernel_size - top - bottom, kernel_size - left - right
    if stride > 1 and not (0 < tall <= stride and 0 < wide <= stride):
        raise ValueError(f"a convolution of stride {stride} must make maps {stride} times smaller")

    def shape(x, weight, *_):
        return [x[0], (x[1] - tall) // stride + 1, (x[2] - wide) // stride + 1, weight[0]]

    def gradient_shape(dy, weight, _):
        height, width = (stride * dy[1], stride * dy[2]) if stride > 1 else (dy[1] + tall - 1, dy[2] + wide - 1)
        return [dy[0], height, width, weight[1] // kernel_size**2]

    variant = f"{kernel_size} {stride} {padding}"
    return _Conv(
        _operator("Conv", shape, variant=variant),
        _operator("ConvGradient", gradient_shape, variant=variant),
        settings(kernel_size, stride, top, left),
    )


class _LayerNorm(_Kernel):
    def construct(self, x, gamma, beta):
        return self.operator(x, gamma, beta, self.numbers)

    def bprop(self, x, gamma, beta, out, dout):
        return self.gradient(dout, x, gamma, self.numbers), ops.zeros_like(gamma), ops.zeros_like(beta)


@functools.cache
def layer_norm(eps):
    """x (..., c), gamma (c,), beta (c,) -> (..., c)."""
    return _LayerNorm(
        _operator("LayerNorm", lambda x, *_: x), _operator("LayerNormGradient", lambda dy, *_: dy), settings(eps)
    )


class _GroupNorm(_LayerNorm):
    def bprop(self, x, gamma, beta, out, dout):
        return self.gradient(dout, x, gamma, beta, self.numbers), ops.zeros_like(gamma), ops.zeros_like(beta)


@functools.cache
def group_norm(channels, eps, num_groups, activation):
    """x (b, h, w, c), gamma (c,), beta (c,) -> (b, h, w, c), through an activation of ACTIVATIONS."""
    numbers = settings(eps, num_groups, ACTIVATIONS[activation])
    return _GroupNorm(
        _operator("GroupNorm", lambda x, *_: x), _operator("GroupNormGradient", lambda dy, *_: dy), numbers
    )


class _Attention(_Kernel):
    def construct(self, q, k, v):
        return self.operator(q, k, v, self.numbers)

    def bprop(self, q, k, v, out, dout):
        return self.gradient(dout, q, k, v, self.numbers)


class _HalfAttention(_Kernel):
    """Also returns q, k and v in bfloat16, which is what the gradient needs of them."""

    def construct(self, q, k, v):
        return self.operator(q, k, v, self.numbers)

    def bprop(self, q, k, v, out, dout):
        return self.gradient(dout[0], out[1], out[2], out[3], self.numbers)


@functools.cache
def attention(num_heads, *, causal, dtype):
    """q (b, lq, c), k, v (b, lk, c) -> (b, lq, c); products in bfloat16 or float32, softmax in float32."""
    numbers = settings(num_heads, causal)
    gradient = _operator("AttentionGradient", lambda dout, q, k, v, _: (q, k, v), dtype=(ms.float32,) * 3)
    if dtype != ms.bfloat16:
        return _Attention(_operator("Attention", lambda q, *_: q), gradient, numbers)
    kept = (ms.float32, ms.int16, ms.int16, ms.int16)
    operator = _operator("Attention", lambda q, k, v, _: (q, q, k, v), dtype=kept, variant="bfloat16")
    return _First(_HalfAttention(operator, gradient, numbers))


class _Activation(_Kernel):
    def construct(self, x):
        return self.operator(x, self.numbers)

    def bprop(self, x, out, dout):
        return (self.gradient(dout, x, self.numbers),)


@functools.cache
def activation(kind):
    """x -> act(x), one of ACTIVATIONS."""
    numbers = settings(ACTIVATIONS[kind])
    operators = _operator("Activation", lambda x, _: x), _operator("ActivationGradient", lambda dy, *_: dy)
    return _Activation(*operators, numbers)


class _GEGLU(_Kernel):
    """Also returns the product before the activation, which the gradient needs, in the weight's precision."""

    def construct(self, x, weight, bias):
        return self.operator(x, weight, bias)

    def bprop(self, x, weight, bias, out, dout):
        return self.gradient(dout[0], out[1], weight), ops.zeros_like(weight), ops.zeros_like(bias)


@functools.cache
def geglu(*, dtype):
    """x (..., k), weight (2c, k), bias (2c,) -> (..., c)."""
    kept = ms.int16 if dtype == ms.bfloat16 else ms.float32

    def shape(x, weight, _):
        return [*x[:-1], weight[0] // 2], [*x[:-1], weight[0]]

    operator = _operator("GEGLU", shape, dtype=(ms.float32, kept), variant=str(kept))
    return _First(_GEGLU(operator, _operator("GEGLUGradient", lambda dy, kept, w: [*dy[:-1], w[1]])))


class _Enlarge(_Kernel):
    def construct(self, x):
        return self.operator(x)

    def bprop(self, x, out, dout):
        return (self.gradient(dout),)


@functools.cache
def enlarge():
    """x (b, h, w, c) -> (b, 2h, 2w, c), each position four times."""
    return _Enlarge(
        _operator("Enlarge", lambda x: [x[0], 2 * x[1], 2 * x[2], x[3]]),
        _operator("EnlargeGradient", lambda dy: [dy[0], dy[1] // 2, dy[2] // 2, dy[3]]),
    )


class _AddPerSample(nn.Cell):
    def __init__(self, operator):
        super().__init__(auto_prefix=False)
        self.operator = operator

    def construct(self, x, e):
        return self.operator(x, e)

    def bprop(self, x, e, out, dout):
        return dout, ops.reduce_sum(dout, (1, 2))


@functools.cache
def add_per_sample():
    """x (b, h, w, c), e (b, c) -> (b, h, w, c)."""
    return _AddPerSample(_operator("AddPerSample", lambda x, e: x))
