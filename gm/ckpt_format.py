"""MindSpore's checkpoint file (.ckpt), read and written without importing MindSpore.

The file is one protobuf message `Checkpoint { repeated Value value = 1 }` with
`Value { string tag = 1; TensorProto tensor = 2 }` and
`TensorProto { repeated int64 dims = 1; string tensor_type = 2; bytes tensor_content = 3 }`
(mindspore/train/checkpoint_pb2.py). Beyond the schema, `mindspore.save_checkpoint` has four habits:

- a tensor above 512 MiB comes as several consecutive values of the same name, each with the whole shape;
- a string is a value of type "str", dims [0], with 4 bytes (UTF-32) a character;
- a number is a tensor of no dims (older versions: dims [0]);
- with `crc_check` the file ends in `crc_num` and ten bytes, outside the message.

Reading an index touches only the small parts of the file, so that a 7 GB file is listed in a moment.
Every size that the file declares is checked against the file's length before it is used.
"""

import itertools
import json
import math
import mmap
from dataclasses import dataclass
from math import prod

import numpy as np

from gm.atomic_file import atomic_file
from gm.bfloat16 import BFLOAT16, from_bfloat16

_NUMPY_TYPES = {
    "Bool": "?", "Int8": "i1", "Int16": "<i2", "Int32": "<i4", "Int64": "<i8",
    "UInt8": "u1", "UInt16": "<u2", "UInt32": "<u4", "UInt64": "<u8",
    "Float16": "<f2", "Float32": "<f4", "Float64": "<f8", "BFloat16": "<u2",
}  # fmt: skip
_MINDSPORE_TYPES = {np.dtype(v): k for k, v in _NUMPY_TYPES.items() if k != "BFloat16"} | {
    BFLOAT16: "BFloat16"
}
_VARINT, _BYTES = 0, 2  # protobuf's wire types that the format uses
_SKIPPED = {1: 8, 5: 4}  # wire types of fixed width, in bytes
# Far above what a real file holds, and low enough that a hostile one is refused in a second.
_MAX_VALUES, _MAX_PIECES, _MAX_DIMS, _MAX_METADATA = 20_000, 1000, 8, 1 << 20
# Not in the schema: protobuf readers, MindSpore's and mindone's among them, step over unknown fields,
# whereas mindone refuses a file with a tensor that it does not know.
_METADATA_FIELD = 1000
# Likewise: bytes that make a large tensor begin at a multiple of _ALIGNMENT, so that it can be mapped into memory.
_PADDING_FIELD, _ALIGNMENT, _LARGE = 1001, 64, 1 << 16


@dataclass(frozen=True)
class CkptEntry:
    """Where one value of a .ckpt lies.

    Attributes:
        dtype: MindSpore's name of the element type ("Float32", "BFloat16", ...), or "str".
        shape: the tensor's shape, () for a number or a string.
        spans: (offset, length) in bytes of each piece in the file, in order.
    """

    dtype: str
    shape: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


class _Damaged(ValueError):
    """The bytes are not a checkpoint message."""


def read_ckpt_index(path):
    """List a .ckpt without reading its tensors.

    Returns:
        dict of name -> CkptEntry, in file order.

    Raises:
        ValueError: the file is no MindSpore checkpoint, is cut short, or declares sizes that are not there.
    """
    return _read_index(path)[0]


def read_ckpt_metadata(path):
    """The dict of str -> str that `write_ckpt` stored beside the tensors; empty for others' files."""
    return _read_index(path)[1]


def read_ckpt_entry(path, entry, first=0, last=None):
    """Read one value, or a tensor's rows from `first` to before `last`.

    Args:
        path: the .ckpt from whose index the entry comes.
        entry: CkptEntry.

    Returns:
        str, or an array of entry.shape or (last - first, *entry.shape[1:]). BFloat16 arrives as float32, which holds
        its values exactly.
    """
    shape, spans = entry.shape, entry.spans
    if last is not None:
        row = math.prod(shape[1:]) * np.dtype(_NUMPY_TYPES[entry.dtype]).itemsize
        shape, spans = (last - first, *shape[1:]), _part(spans, first * row, last * row)
    pieces = [np.fromfile(path, np.uint8, count=length, offset=offset) for offset, length in spans]
    data = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    if entry.dtype == "str":
        try:
            return data.tobytes().decode("utf-32-le").rstrip("\0")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: a string in the checkpoint is damaged ({error}).") from error
    array = data.view(_NUMPY_TYPES[entry.dtype]).reshape(shape)
    if entry.dtype == "BFloat16":
        array = from_bfloat16(array)
    return array


def _part(spans, begin, end):
    """Bytes `begin` to before `end` of the row that the spans make."""
    parts, position = [], 0
    for offset, length in spans:
        first, last = max(begin - position, 0), min(end - position, length)
        if first < last:
            parts.append((offset + first, last - first))
        position += length
    return parts


def write_ckpt(path, items, *, metadata=None):
    """Write a .ckpt that `mindspore.load_checkpoint` reads, one tensor in memory at a time.

    The file appears under its name only when it is whole.

    Args:
        path: replaced if it exists.
        items: iterable of (name, array | str | int); an array of BFLOAT16 becomes BFloat16.
        metadata: dict of str -> str, kept where other readers do not look; see `read_ckpt_metadata`.
    """
    with atomic_file(path) as file:
        for name, value in items:
            if isinstance(value, str):
                dims, dtype, content = (0,), "str", (value or "\0").encode("utf-32-le")
            else:
                array = np.asarray(value, np.int64 if isinstance(value, int) else None)
                if array.dtype not in _MINDSPORE_TYPES:
                    raise ValueError(f"{name!r} has type {array.dtype}, which a .ckpt cannot hold.")
                dims, dtype, content = array.shape, _MINDSPORE_TYPES[array.dtype], array.tobytes()
            tensor = b"".join(_varint(1 << 3) + _varint(dim) for dim in dims)
            tensor += _delimited(2, dtype.encode()) + _header(3, len(content))
            tag = _delimited(1, name.encode())
            value_header = tag + _header(2, len(tensor) + len(content)) + tensor
            value_header = _header(1, len(value_header) + len(content)) + value_header
            if len(content) >= _LARGE and file.tell():  # the first bytes of a file tell what it is
                without = file.tell() + len(_delimited(_PADDING_FIELD, b"")) + len(value_header)
                file.write(_delimited(_PADDING_FIELD, bytes(-without % _ALIGNMENT)))
            file.write(value_header)
            file.write(content)
            if metadata:  # behind the first value: not at the end, where a cut file would lose it unnoticed
                file.write(_delimited(_METADATA_FIELD, json.dumps(metadata, sort_keys=True).encode()))
                metadata = None


def _read_index(path):
    index, metadata, last = {}, {}, None
    with open(path, "rb") as file:
        if not file.seek(0, 2):
            raise ValueError(f"{path} is empty.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            end = len(data)
            if data[-17:-10] == b"crc_num":
                end -= 17
            try:
                for field, span in _fields(data, 0, end, limit=_MAX_VALUES):
                    if field == _METADATA_FIELD:
                        metadata = _string_dict(data, span)
                        continue
                    if field == _PADDING_FIELD:
                        continue
                    if field != 1:
                        raise _Damaged(f"unknown field {field}")
                    name, entry = _parse_value(data, span)
                    if name == last:
                        previous = index[name]
                        if (previous.dtype, previous.shape) != (entry.dtype, entry.shape):
                            raise _Damaged(f"the pieces of {name!r} disagree on type or shape")
                        if len(previous.spans) == _MAX_PIECES:
                            raise _Damaged(f"{name!r} has more than {_MAX_PIECES} pieces")
                        entry = CkptEntry(entry.dtype, entry.shape, previous.spans + entry.spans)
                    elif name in index:
                        raise _Damaged(f"{name!r} occurs twice")
                    index[name] = entry
                    last = name
                for name, entry in index.items():
                    _check_size(name, entry)
            except _Damaged as error:
                raise ValueError(f"{path} is not a whole MindSpore checkpoint: {error}.") from error
    if not index:
        raise ValueError(f"{path} is not a whole MindSpore checkpoint: it holds no values.")
    return index, metadata


def _parse_value(data, span):
    name = tensor = None
    for field, value in _fields(data, *_as_span(span), limit=2):
        if field == 1:
            name = _text(data, value)
        elif field == 2:
            tensor = value
    if name is None or tensor is None:
        raise _Damaged("a value without a name or a tensor")
    dims, dtype, content = [], None, None
    for field, value in _fields(data, *_as_span(tensor), limit=2 + _MAX_DIMS):
        if field == 1:
            dims += [value] if isinstance(value, int) else _packed_numbers(data, value)
        elif field == 2:
            dtype = _text(data, value)
        elif field == 3:
            content = _as_span(value)
    if content is None or (dtype != "str" and dtype not in _NUMPY_TYPES):
        raise _Damaged(f"{name!r} has type {dtype!r}, or no content")
    if len(dims) > _MAX_DIMS:
        raise _Damaged(f"{name!r} has more than {_MAX_DIMS} dimensions")
    if dims == [0]:
        dims = []
    return name, CkptEntry(dtype, tuple(dims), ((content[0], content[1] - content[0]),))


def _packed_numbers(data, value):
    position, stop = _as_span(value)
    numbers = []
    while position < stop and len(numbers) <= _MAX_DIMS:
        number, position = _read_varint(data, position, stop)
        numbers.append(number)
    return numbers


def _check_size(name, entry):
    size = sum(length for _, length in entry.spans)
    if entry.dtype == "str":
        if size % 4:
            raise _Damaged(f"the string {name!r} has {size} bytes, which is no multiple of 4")
        return
    declared = prod(entry.shape) * np.dtype(_NUMPY_TYPES[entry.dtype]).itemsize
    if declared != size:
        raise _Damaged(
            f"{name!r} declares {entry.dtype} {list(entry.shape)}, {declared} bytes; the file holds {size}"
        )


def _fields(data, position, end, *, limit):
    """Yield (field number, number | (start, stop)) for each field of the message data[position:end]."""
    for count in itertools.count(1):
        if position == end:
            return
        if count > limit:
            raise _Damaged(f"more than {limit} fields in a message")
        key, position = _read_varint(data, position, end)
        field, wire_type = key >> 3, key & 7
        if field == 0:
            raise _Damaged(f"field number 0 at byte {position}")
        if wire_type == _VARINT:
            value, position = _read_varint(data, position, end)
        elif wire_type == _BYTES:
            length, position = _read_varint(data, position, end)
            value, position = (position, position + length), position + length
        elif wire_type in _SKIPPED:
            value, position = None, position + _SKIPPED[wire_type]
        else:
            raise _Damaged(f"unknown wire type {wire_type} at byte {position}")
        if position > end:
            raise _Damaged(f"a field reaches to byte {position}, its message ends at {end}")
        yield field, value


def _read_varint(data, position, end):
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            raise _Damaged(f"it ends within a number at byte {position}")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _Damaged(f"a number of more than 64 bits at byte {position}")


def _as_span(value):
    if not isinstance(value, tuple):
        raise _Damaged("a number stands where text, bytes or a message belongs")
    return value


def _text(data, value):
    start, stop = _as_span(value)
    try:
        return data[start:stop].decode()
    except UnicodeDecodeError as error:
        raise _Damaged(f"a name is not text ({error})") from error


def _string_dict(data, value):
    start, stop = _as_span(value)
    if stop - start > _MAX_METADATA:
        raise _Damaged(f"{stop - start} bytes of metadata")
    try:
        metadata = json.loads(_text(data, value))
    except (ValueError, RecursionError) as error:
        raise _Damaged(f"its metadata is not JSON ({error})") from error
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _Damaged("its metadata is not a table of texts")
    return metadata


def _varint(value):
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _header(field, length):
    return _varint(field << 3 | _BYTES) + _varint(length)


def _delimited(field, content):
    return _header(field, len(content)) + content
