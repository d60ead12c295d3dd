"""Read what `torch.save` wrote (.pt, .bin), without torch and without running anything.

Such a file is a zip archive with a pickle (`data.pkl`) and the tensors' raw numbers (`data/0`, ...). A pickle
is a program for a small stack machine, and the usual reader lets that program call any function of Python.
This one interprets the instructions that `torch.save` uses, and can make tensors, dicts, lists, tuples, text
and numbers; anything else that the program asks for ends in an error that names it.

Sources: the instructions' meaning, Python's `pickletools`; the records, `torch/serialization.py`.
"""

import io
import pickletools
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import numpy as np

from gm.bfloat16 import from_bfloat16

_STORAGE_TYPES = {
    "torch FloatStorage": "<f4", "torch HalfStorage": "<f2", "torch DoubleStorage": "<f8",
    "torch BFloat16Storage": "bf16", "torch LongStorage": "<i8", "torch IntStorage": "<i4",
}  # fmt: skip
_DICT, _TENSOR, _PARAMETER = (
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
# An embedding's pickle has some hundred bytes and its largest storage some hundred thousand.
_MAX_PICKLE, _MAX_READ = 1 << 18, 1 << 20


@dataclass(frozen=True)
class _Global:
    name: str  # "module attribute"


@dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str  # name of the record under data/


@dataclass(frozen=True)
class TorchTensor:
    """A tensor's description; `read_torch_tensor` fetches the numbers.

    Attributes:
        storage: the record that holds the numbers, which several tensors may share.
        offset: first element within the storage.
        shape: the tensor's shape.
        strides: steps between neighbours along each axis, in elements.
    """

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Refused(ValueError):
    """The pickle is damaged or asks for more than data."""


def read_torch_file(path):
    """Read the structure of a file of `torch.save`.

    Returns:
        what was saved: dicts (keys str or int), lists, tuples, str, int, float, bool, None and TorchTensor.

    Raises:
        ValueError: the file is damaged, of the format before torch 1.6, or asks for anything but data.
    """
    with _archive(path) as (archive, root):
        return _interpret(_record(archive, root + "data.pkl", _MAX_PICKLE))


def read_torch_tensor(path, tensor):
    """Read the numbers of one tensor of `read_torch_file(path)`.

    Returns:
        array of tensor.shape, contiguous; bfloat16 arrives as float32, which holds its values exactly.
    """
    with _archive(path) as (archive, root):
        if root + "byteorder" in archive.namelist() and _record(archive, root + "byteorder", 16) != b"little":
            raise _Refused("its numbers are not little-endian")
        content = _record(archive, f"{root}data/{tensor.storage.key}", _MAX_READ)
        dtype = np.dtype("<u2" if tensor.storage.dtype == "bf16" else tensor.storage.dtype)
        count = len(content) // dtype.itemsize
        reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.strides, strict=True))
        if 0 in tensor.shape or tensor.offset + reach >= count or prod(tensor.shape) > _MAX_READ:
            raise _Refused(
                f"a tensor of shape {list(tensor.shape)}, strides {list(tensor.strides)} and offset "
                f"{tensor.offset} does not fit into its {count} numbers"
            )
    storage = np.frombuffer(content, dtype, count=count)
    if tensor.storage.dtype == "bf16":
        storage = from_bfloat16(storage)
    strides = [step * storage.itemsize for step in tensor.strides]
    return np.lib.stride_tricks.as_strided(storage[tensor.offset :], tensor.shape, strides).copy()


class _SmallReads(io.FileIO):
    """A file that refuses long reads, such as that of a directory of a million entries."""

    def read(self, size=-1):
        if size is not None and size > _MAX_READ:
            raise zipfile.BadZipFile(f"a part of {size} bytes, larger than any of an embedding")
        return super().read(size)


@contextmanager
def _archive(path):
    """Open the zip file; yields it and the folder that its records lie in."""
    with _SmallReads(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                pickles = [name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
                if len(pickles) != 1:
                    raise _Refused("it is a zip archive without a data.pkl")
                yield archive, pickles[0].removesuffix("data.pkl")
        except (ValueError, zipfile.BadZipFile, RuntimeError, EOFError, OSError) as error:
            raise ValueError(f"{path} cannot be read safely as a torch file: {str(error)[:300]}.") from error


def _record(archive, name, limit):
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise _Refused(f"it holds no {name}") from None
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > limit:
        raise _Refused(f"{name} is compressed or larger than {limit} bytes")
    return archive.read(name)


def _interpret(pickle):
    """Run the pickle's program on a stack that can hold only data."""
    stack, marks, memo = [], [], {}

    def pop_to_mark():
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    try:
        for opcode, argument, _ in pickletools.genops(pickle):
            name = opcode.name
            if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name in ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"):
                stack.append(argument)
            elif name in ("EMPTY_DICT", "EMPTY_LIST"):
                stack.append({} if name == "EMPTY_DICT" else [])
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name == "MARK":
                marks.append(len(stack))
            elif name == "TUPLE":
                stack.append(tuple(pop_to_mark()))
            elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
                size = int(name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            elif name in ("APPEND", "APPENDS"):
                items = [stack.pop()] if name == "APPEND" else pop_to_mark()
                if not isinstance(stack[-1], list):
                    raise _Refused("it appends to what is no list")
                stack[-1].extend(items)
            elif name in ("SETITEM", "SETITEMS"):
                items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else pop_to_mark()
                _set_items(stack[-1], items)
            elif name == "GLOBAL":
                if argument not in (_DICT, _TENSOR, _PARAMETER, *_STORAGE_TYPES):
                    raise _Refused(
                        f"its pickle asks for '{argument.replace(' ', '.')[:80]}', which is no tensor, dict, "
                        "list, text or number and could run code"
                    )
                stack.append(_Global(argument))
            elif name == "BINPERSID":
                stack.append(_storage(stack.pop()))
            elif name == "REDUCE":
                arguments = stack.pop()
                stack.append(_call(stack.pop(), arguments))
            elif name not in ("PROTO", "STOP"):
                raise _Refused(f"its pickle has the instruction {name}, which torch.save does not write")
        return stack.pop()
    except _Refused:
        raise
    except (ValueError, IndexError, KeyError) as error:
        raise _Refused(f"its pickle is damaged ({error})") from error


def _set_items(target, items):
    keys = items[::2]
    # Texts and numbers alone: hashing a deeply nested tuple overflows the C stack.
    if not isinstance(target, dict) or len(items) % 2 or not all(isinstance(key, str | int) for key in keys):
        raise _Refused("it fills what is no dict, or with keys that are no text or number")
    target.update(zip(keys, items[1::2], strict=True))


def _storage(description):
    match description:
        case ("storage", _Global(kind), str(key), str(), int()) if kind in _STORAGE_TYPES:
            return _Storage(_STORAGE_TYPES[kind], key)
    raise _Refused("it refers to something that is no storage of numbers")


def _call(function, arguments):
    match function, arguments:
        case _Global(name), () if name == _DICT:
            return {}
        case _Global(name), (TorchTensor() as data, *_) if name == _PARAMETER:
            return data
        case _Global(name), (_Storage() as store, offset, tuple(shape), tuple(strides), *_) if (
            name == _TENSOR
        ):
            sizes = (offset, *shape, *strides)
            if len(shape) == len(strides) <= 8 and all(type(n) is int and 0 <= n < 2**40 for n in sizes):
                return TorchTensor(store, offset, shape, strides)
    raise _Refused("it describes a tensor that cannot be")
