import mindspore as ms
import numpy as np
import pytest
from mindspore.train.checkpoint_pb2 import Checkpoint

from gm.atomic_file import atomic_file
from gm.ckpt_format import read_ckpt_entry, read_ckpt_index, read_ckpt_metadata, write_ckpt

RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(3, 40)).astype(np.float32)
HALF = RNG.normal(size=(2, 3, 4)).astype(np.float16)


def read_all(path):
    return {name: read_ckpt_entry(path, entry) for name, entry in read_ckpt_index(path).items()}


def test_mindspore_reads_what_we_write(tmp_path):
    path = str(tmp_path / "a.ckpt")
    large = RNG.normal(size=(200, 300)).astype(np.float32)  # with padding before it
    items = [("table", TABLE), ("half", HALF), ("word", "<猫-toy>"), ("nothing", ""), ("count", 3), ("large", large)]
    write_ckpt(path, items, metadata={"step": "7"})
    loaded = ms.load_checkpoint(path)
    assert list(loaded) == ["table", "half", "word", "nothing", "count", "large"]
    assert np.array_equal(loaded["large"].asnumpy(), large)
    assert read_ckpt_index(path)["large"].spans[0][0] % 64 == 0
    assert np.array_equal(loaded["table"].asnumpy(), TABLE) and loaded["table"].dtype == ms.float32
    assert np.array_equal(loaded["half"].asnumpy(), HALF) and loaded["half"].dtype == ms.float16
    assert (loaded["word"], loaded["nothing"], int(loaded["count"].value())) == ("<猫-toy>", "", 3)
    assert read_ckpt_metadata(path) == {"step": "7"}


@pytest.mark.parametrize("crc_check", [False, True])
def test_we_read_what_mindspore_writes(tmp_path, crc_check):
    path = str(tmp_path / "b.ckpt")
    tensors = {"table": ms.Tensor(TABLE), "half": ms.Tensor(HALF), "brain": ms.Tensor(TABLE, ms.bfloat16)}
    ms.save_checkpoint(
        [{"name": name, "data": data} for name, data in tensors.items()],
        path,
        append_dict={"word": "<猫-toy>", "count": 3, "rate": 0.5, "flag": True},
        crc_check=crc_check,
    )
    values = read_all(path)
    assert np.array_equal(values["table"], TABLE) and np.array_equal(values["half"], HALF)
    assert np.array_equal(values["brain"], tensors["brain"].astype(ms.float32).asnumpy())
    assert values["word"] == "<猫-toy>"
    assert (values["count"], values["rate"], values["flag"]) == (3, 0.5, True)
    assert read_ckpt_metadata(path) == {}


def message(*values):
    """A checkpoint of (name, dims, type, content), as MindSpore's protobuf classes write it."""
    checkpoint = Checkpoint()
    for name, dims, dtype, content in values:
        value = checkpoint.value.add(tag=name)
        value.tensor.dims.extend(dims)
        value.tensor.tensor_type = dtype
        value.tensor.tensor_content = content
    return checkpoint.SerializeToString()


def test_a_large_tensor_in_pieces_is_joined(tmp_path):
    path = tmp_path / "c.ckpt"
    # MindSpore writes the whole shape into each piece.
    parts = (TABLE[:2].tobytes(), TABLE[2:].tobytes())
    path.write_bytes(message(*(("table", TABLE.shape, "Float32", part) for part in parts)))
    assert np.array_equal(ms.load_checkpoint(str(path))["table"].asnumpy(), TABLE)
    assert np.array_equal(read_all(path)["table"], TABLE)
    (entry,) = read_ckpt_index(path).values()
    for first, last in ((0, 1), (1, 3), (2, 3), (0, 3)):
        assert np.array_equal(read_ckpt_entry(path, entry, first, last), TABLE[first:last])


def test_old_scalars_of_dims_zero_are_numbers(tmp_path):
    path = tmp_path / "d.ckpt"
    path.write_bytes(message(("count", [0], "Int32", b"\x03\0\0\0")))
    assert int(ms.load_checkpoint(str(path))["count"].value()) == 3
    assert read_all(path)["count"] == 3


GOOD = message(("w", [1], "Int32", b"1234"))
DAMAGED = {
    "empty": b"",
    "text": b"a photo of a cat\n" * 9,
    "newline_text": b"\na photo of a cat\n" * 9,
    "cut": GOOD[:-1],
    "wrong_size": message(("w", [1], "Int32", b"12")),
    "unknown_type": message(("w", [1], "Int99", b"1234")),
    "too_many_dims": message(("w", [1] * 9, "Int8", b"1")),
    "packed_dims": b"\x0a\x20\x0a\x01w\x12\x1b\x0a\x0c" + b"\x01" * 12 + b"\x12\x05Int32\x1a\x041234",
    "foreign_field": GOOD + b"\x10\x01",
    "many_fields": b"\x0a\xff\xff\x03" + b"\x28\x01" * 0x7FFF + b"\x28",
    "gigabytes": message(("w", [2**32], "Float32", b"1234")),
    "negative": message(("w", [-1, -4], "Int8", b"1234")),
    "no_content": message(("w", [1], "Int32", b"1234")).replace(b"\x1a\x04", b"\x2a\x04"),
    "endless_number": b"\x0a" + b"\xff" * 20,
    "metadata_only": b"\xc2\x3e\x02{}",
    "metadata_list": GOOD + b"\xc2\x3e\x02[]",
    "nested_metadata": GOOD + b"\xc2\x3e\x80\x80\x04" + b"[" * 65536,
    "broken_string": message(("w", [0], "str", b"12345")),
}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("empty", "is empty"),
        ("text", "not a whole MindSpore checkpoint"),
        ("newline_text", "not a whole MindSpore checkpoint"),
        ("cut", "reaches to byte"),
        ("wrong_size", "declares Int32 \\[1\\], 4 bytes; the file holds 2"),
        ("unknown_type", "type 'Int99'"),
        ("too_many_dims", "more than 10 fields"),
        ("packed_dims", "more than 8 dimensions"),
        ("foreign_field", "unknown field 2"),
        ("many_fields", "more than 2 fields"),
        ("gigabytes", "17179869184 bytes; the file holds 4"),
        ("negative", "bytes; the file holds 4"),
        ("no_content", "or no content"),
        ("endless_number", "more than 64 bits"),
        ("metadata_only", "holds no values"),
        ("metadata_list", "not a table of texts"),
        ("nested_metadata", "not JSON"),
        ("broken_string", "no multiple of 4"),
    ],
)
def test_damaged_files_are_refused(tmp_path, name, says):
    path = tmp_path / "bad.ckpt"
    path.write_bytes(DAMAGED[name])
    with pytest.raises(ValueError, match=says):
        read_ckpt_index(path)


def test_a_name_that_occurs_twice_is_refused(tmp_path):
    path = tmp_path / "twice.ckpt"
    write_ckpt(path, [("a", TABLE), ("b", TABLE), ("a", TABLE)])
    with pytest.raises(ValueError, match="'a' occurs twice"):
        read_ckpt_index(path)


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as file:
        file.write(b"half of the n")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with atomic_file(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]
