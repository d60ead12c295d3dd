"""Weight files as tables of tensors that are read one at a time: safetensors and MindSpore's .ckpt.

Nothing here knows a model. Only headers are read until a tensor's `read` is called, so that what is done
with a file of any size needs the memory of one tensor. What is read is not memory-mapped meanwhile: mapped pages
count as this process's memory. Who keeps a tensor just as it is in the file asks for `mapped`.
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
from gm.bfloat16 import BFLOAT16, from_bfloat16, to_bfloat16

_NUMBERS = ("F64", "F32", "F16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8")
_DTYPES = {name: np.dtype(f"{name[0].lower()}{int(name[1:]) // 8}") for name in _NUMBERS} | {
    "BOOL": np.dtype("?")
}
_DTYPES["BF16"] = BFLOAT16
_SAFETENSORS_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAPPED_FROM = 1 << 15  # numbers; smaller tensors are not worth pages of their own


@dataclass(frozen=True)
class LazyTensor:
    """A tensor whose values are made when they are asked for.

    Attributes:
        shape: tuple of int.
        dtype: numpy dtype of what `read` returns.
        read: () -> array of that shape and dtype, freshly made at each call.
        read_rows: (first, last) -> read()[first:last] without reading the rest; None where that cannot be done.
        stored: numpy dtype in the file, BFLOAT16 where `read` gives float32; None if there is no file.
        mapped: () -> array of that dtype and shape, mapped into memory: the system reads it from the file where it
            is looked at, and may share it with other processes; what is written to it stays in this one. The file may
            be replaced meanwhile, but not written into. None where it does not lie in the file like that.
    """

    shape: tuple
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    read_rows: Callable[[int, int], np.ndarray] | None = None
    stored: np.dtype | None = None
    mapped: Callable[[], np.ndarray] | None = None

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
            self.shape if shape is None else tuple(shape), self.dtype, lambda: function(self.read()), stored=self.stored
        )

    def astype(self, dtype):
        """The tensor in another floating-point type, maybe BFLOAT16; integers stay what they are.

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
        cast = to_bfloat16(values) if dtype == BFLOAT16 else values.astype(dtype)
    if np.can_cast(values.dtype, dtype):
        return cast
    numbers = from_bfloat16(cast) if dtype == BFLOAT16 else cast
    if not np.isfinite(numbers).all() and np.isfinite(values).all():
        name = "bfloat16" if dtype == BFLOAT16 else dtype
        raise ValueError(f"a value of {np.abs(values).max():g} does not fit {name}; keep the weights in float32.")
    return cast


def in_memory(array):
    """A LazyTensor of an array."""
    array = np.asarray(array)
    return LazyTensor(array.shape, array.dtype, lambda: array)


def open_weights(path):
    """The tensors of one weight file; its format is told from its first bytes, not from its name.

    Returns:
        dict of name -> LazyTensor. bfloat16 is read as float32, which holds it exactly; `read` of a text in a
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
            name: _in_file(path, e.shape, _DTYPES[e.dtype], functools.partial(read, e), [e.offset])
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
            name: _in_file(path, e.shape, _ckpt_dtype(e), functools.partial(read, e), [at for at, _ in e.spans])
            for name, e in index.items()
        }
    what = "empty" if not start else "neither a safetensors file nor a MindSpore .ckpt"
    raise ValueError(f"{path} is {what}; it may be an interrupted download.")


def _ckpt_dtype(entry):
    return BFLOAT16 if entry.dtype == "BFloat16" else np.dtype(np.str_ if entry.dtype == "str" else entry.dtype.lower())


def _in_file(path, shape, stored, read, offsets):
    """A tensor of a file; its pieces begin at these offsets."""
    mapped = None
    if math.prod(shape) >= _MAPPED_FROM and len(offsets) == 1 and offsets[0] % stored.itemsize == 0:
        mapped = functools.partial(np.memmap, path, stored, "c", offsets[0], shape)
    dtype = np.dtype(np.float32) if stored == BFLOAT16 else stored
    return LazyTensor(shape, dtype, read, read, stored, mapped)


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
