"""Weight files as tables of tensors that are read one at a time: safetensors and MindSpore's .ckpt.

Nothing here knows a model. Only headers are read until a tensor's `read` is called, so that what is done
with a file of any size needs the memory of one tensor. Tensors are read, not memory-mapped: mapped pages
count as this process's memory.
"""

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gm import ckpt_format, safetensors_format
from gm.atomic_file import atomic_file

_NUMBERS = ("F64", "F32", "F16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8")
_DTYPES = {name: np.dtype(f"{name[0].lower()}{int(name[1:]) // 8}") for name in _NUMBERS} | {
    "BOOL": np.dtype("?")
}
_SAFETENSORS_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_DTYPES["BF16"] = np.dtype(np.float32)  # as which it is read


@dataclass(frozen=True)
class LazyTensor:
    """A tensor whose values are made when they are asked for.

    Attributes:
        shape: tuple of int.
        dtype: numpy dtype of what `read` returns.
        read: () -> array of that shape and dtype, freshly made at each call.
        read_rows: (first, last) -> read()[first:last] without reading the rest; None where that cannot be done.
    """

    shape: tuple
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    read_rows: Callable[[int, int], np.ndarray] | None = None

    def blocks(self, numbers):
        """Yield (index, values) until all has been read, where values = read()[index].

        Args:
            numbers: in a block, at most, but at least a row; where rows cannot be read, the block is everything.
        """
        if self.read_rows is None or math.prod(self.shape) <= numbers:
            yield ..., self.read()
            return
        rows = max(1, numbers // math.prod(self.shape[1:]))
        for first in range(0, self.shape[0], rows):
            last = min(first + rows, self.shape[0])
            yield slice(first, last), self.read_rows(first, last)

    def map(self, function, shape=None):
        """The tensor function(values), of another shape if one is given."""
        return LazyTensor(
            self.shape if shape is None else tuple(shape), self.dtype, lambda: function(self.read())
        )

    def astype(self, dtype):
        """The tensor in another floating-point type; integers stay what they are.

        Raises:
            ValueError: at reading, if a finite value overflows the type.
        """
        dtype = np.dtype(dtype)
        if dtype == self.dtype or not np.issubdtype(self.dtype, np.floating):
            return self
        rows = self.read_rows and (lambda first, last: _cast(self.read_rows(first, last), dtype))
        return LazyTensor(self.shape, dtype, lambda: _cast(self.read(), dtype), rows)


_SINGLE = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)  # of every float16's bits


def _cast(values, dtype):
    if values.dtype == np.float16 and dtype == np.float32:
        return _SINGLE.take(values.view(np.uint16), mode="clip")  # three times as fast as astype
    with np.errstate(over="ignore"):
        cast = values.astype(dtype)
    if np.can_cast(values.dtype, dtype):
        return cast
    if not np.isfinite(cast).all() and np.isfinite(values).all():
        raise ValueError(
            f"a value of {np.abs(values).max():g} does not fit {dtype}; keep the weights in float32."
        )
    return cast


def in_memory(array):
    """A LazyTensor of an array."""
    array = np.asarray(array)
    return LazyTensor(array.shape, array.dtype, lambda: array)


def open_weights(path):
    """The tensors of one weight file; its format is told from its first bytes, not from its name.

    Returns:
        dict of name -> LazyTensor. bfloat16 arrives as float32, which holds it exactly; `read` of a text in a
        .ckpt gives a str.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of another type, truncated or corrupt.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, or is not a file.")
    with open(path, "rb") as file:
        start = file.read(64)
    if len(start) > 8 and start[8:9] == b"{":
        index, _ = safetensors_format.read_safetensors_index(path)
        read = functools.partial(safetensors_format.read_safetensors_entry, path)
        return {
            name: LazyTensor(e.shape, _DTYPES[e.dtype], functools.partial(read, e), functools.partial(read, e))
            for name, e in index.items()
        }
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        raise ValueError(
            f"{path} is a PyTorch pickle, which can run code when it is read; "
            "convert it to .safetensors with a tool that you trust."
        )
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path} is a Git LFS pointer, not the file itself; run 'git lfs pull' where it came from."
        )
    if start[:1] == b"\x0a":  # field 1 of a protobuf message
        index = ckpt_format.read_ckpt_index(path)
        read = functools.partial(ckpt_format.read_ckpt_entry, path)
        return {
            name: LazyTensor(e.shape, _ckpt_dtype(e), functools.partial(read, e), functools.partial(read, e))
            for name, e in index.items()
        }
    what = "empty" if not start else "neither a safetensors file nor a MindSpore .ckpt"
    raise ValueError(f"{path} is {what}; it may be an interrupted download.")


def _ckpt_dtype(entry):
    return np.dtype({"str": np.str_, "BFloat16": np.float32}.get(entry.dtype) or entry.dtype.lower())


def write_safetensors(path, tensors, *, metadata=None):
    """Write a safetensors file, one tensor in memory at a time. It takes its name only when it is whole.

    Args:
        tensors: dict of name -> LazyTensor.
        metadata: dict of str -> str for the header.
    """
    header, position = {"__metadata__": metadata} if metadata else {}, 0
    # Wider types first, so that every tensor is aligned to its own width.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    for name in order:
        tensor = tensors[name]
        end = position + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {
            "dtype": _SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(np.ascontiguousarray(_read(name, tensors[name])).data)


def write_ckpt(path, tensors):
    """Write name -> LazyTensor as a MindSpore checkpoint, which `mindspore.load_checkpoint` reads."""
    ckpt_format.write_ckpt(path, ((name, _read(name, tensor)) for name, tensor in tensors.items()))


def _read(name, tensor):
    values = tensor.read()
    assert values.shape == tensor.shape and values.dtype == tensor.dtype, name
    return values
