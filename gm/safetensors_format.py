"""The index of a .safetensors file, checked before anything is read by it.

The file is eight bytes with the header's length (little-endian), a JSON header
`{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {text: text}}`, and the tensors
in one gapless row (https://huggingface.co/docs/safetensors). Unlike the safetensors package's numpy
half, this reads bfloat16 and gives up with a ValueError alone.
"""

import json
import os
from dataclasses import dataclass
from math import prod

import numpy as np

from gm.bfloat16 import from_bfloat16

_NUMPY_TYPES = {
    "BOOL": "?", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8",
    "U8": "u1", "U16": "<u2", "U32": "<u4", "U64": "<u8",
    "F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<u2",
}  # fmt: skip


@dataclass(frozen=True)
class SafetensorsEntry:
    """Where one tensor of a .safetensors file lies.

    Attributes:
        dtype: the format's name of the element type ("F32", "BF16", ...).
        shape: the tensor's shape.
        offset: first byte, counted from the start of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int


def read_safetensors_index(path, *, max_header=100_000_000):
    """List a .safetensors file without reading its tensors.

    Args:
        path: the file.
        max_header: longest header to accept, in bytes; the format's own limit by default.

    Returns:
        dict of name -> SafetensorsEntry, and the metadata, a dict of str -> str.

    Raises:
        ValueError: the header is no JSON or lies: sizes that the file does not hold, tensors that overlap
            or leave gaps, a name twice.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, max_header):
            raise ValueError(
                f"{path} is no whole safetensors file: a header of {length} bytes does not fit into {size} "
                f"bytes (at most {max_header} are accepted)."
            )
        text = file.read(length)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique_keys)
        if not isinstance(header, dict):
            raise ValueError("it is no table")
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is not a table of texts")
        index = {name: _entry(name, described, start=8 + length) for name, described in header.items()}
        end = 8 + length
        for name, entry in sorted(index.items(), key=lambda item: (item[1].offset, _nbytes(item[1]))):
            if entry.offset != end:
                raise ValueError(f"{name!r} starts at byte {entry.offset}, what is before ends at {end}")
            end += _nbytes(entry)
        if end != size:
            raise ValueError(f"the tensors end at byte {end}, the file at {size}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}.") from error
    return index, metadata


def read_safetensors_entry(path, entry, first=0, last=None):
    """Read one tensor, or its rows from `first` to before `last`.

    Returns:
        array of entry.shape, or (last - first, *entry.shape[1:]). BF16 arrives as float32, which holds its values
        exactly.
    """
    shape, dtype = entry.shape, np.dtype(_NUMPY_TYPES[entry.dtype])
    skipped = first * prod(shape[1:])
    if last is not None:
        shape = (last - first, *shape[1:])
    array = np.fromfile(path, dtype, count=prod(shape), offset=entry.offset + skipped * dtype.itemsize)
    if entry.dtype == "BF16":
        array = from_bfloat16(array)
    return array.reshape(shape)


def _entry(name, described, *, start):
    if not isinstance(described, dict) or set(described) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = described["dtype"], described["shape"], described["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _NUMPY_TYPES:
        raise ValueError(f"{name!r} has the unknown type {str(dtype)[:20]!r}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
            raise ValueError(f"{name!r} has a shape or offsets that are no sizes")
    if len(shape) > 8 or len(offsets) != 2:
        raise ValueError(f"{name!r} has {len(shape)} dimensions and {len(offsets)} offsets")
    entry = SafetensorsEntry(dtype, tuple(shape), start + offsets[0])
    if offsets[1] - offsets[0] != _nbytes(entry):
        raise ValueError(
            f"{name!r} declares {dtype} {shape}, {_nbytes(entry)} bytes, and offsets {offsets}, "
            f"{offsets[1] - offsets[0]} bytes"
        )
    return entry


def _nbytes(entry):
    return prod(entry.shape) * np.dtype(_NUMPY_TYPES[entry.dtype]).itemsize


def _unique_keys(pairs):
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table
