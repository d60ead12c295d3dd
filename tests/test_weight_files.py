"""Weight files as tables of tensors."""

import json

import numpy as np
import pytest
from safetensors import safe_open

from gm import ckpt_format
from gm.bfloat16 import BFLOAT16, from_bfloat16, to_bfloat16
from gm.weight_files import LazyTensor, in_memory, open_weights, write_ckpt, write_safetensors

ARRAYS = {
    "half": np.arange(6, dtype=np.float16).reshape(2, 3),
    "full": np.linspace(0, 1, 5, dtype=np.float32),
    "ids": np.arange(7, dtype=np.int64)[None],
    "scalar": np.float16(4.6).reshape(()),
    "flags": np.array([True, False]),
    "empty": np.zeros((0, 3), np.float32),
}


@pytest.mark.parametrize("write", [write_safetensors, write_ckpt])
def test_what_is_written_is_read_again(tmp_path, write):
    write(tmp_path / "a", {name: in_memory(array) for name, array in ARRAYS.items()})
    found = open_weights(tmp_path / "a")
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(found[name].read(), array)
        assert found[name].read().dtype == array.dtype


@pytest.mark.parametrize("write", [write_safetensors, write_ckpt])
def test_rows_are_read_without_the_others(tmp_path, write):
    array = np.random.default_rng(0).standard_normal((7, 3, 2)).astype(np.float16)
    write(tmp_path / "a", {"other": in_memory(np.ones(5, np.float32)), "it": in_memory(array)})
    it = open_weights(tmp_path / "a")["it"]
    np.testing.assert_array_equal(it.read_rows(2, 5), array[2:5])
    for numbers, expected in ((1, [1] * 7), (13, [2, 2, 2, 1]), (42, [7]), (10**6, [7])):
        blocks = list(it.astype(np.float32).blocks(numbers))
        assert [len(values) for _, values in blocks] == expected
        whole = np.zeros(array.shape, np.float32)
        for index, values in blocks:
            assert values.dtype == np.float32
            whole[index] += values
        np.testing.assert_array_equal(whole, array)


@pytest.mark.parametrize("write", [write_safetensors, write_ckpt])
@pytest.mark.parametrize("dtype", [np.dtype(np.float16), np.dtype(np.float32), BFLOAT16])
def test_a_large_tensor_is_mapped_as_it_is_in_the_file(tmp_path, write, dtype):
    large = np.random.default_rng(0).standard_normal((300, 130)).astype(np.float32)
    arrays = {"small": large[:3], "odd": np.ones(7, bool), "large": large, "more": large[::-1], "ids": np.arange(9)}
    tensors = {name: in_memory(array).astype(dtype) for name, array in arrays.items()}
    write(tmp_path / "a", tensors)
    content = (tmp_path / "a").read_bytes()
    found = open_weights(tmp_path / "a")
    assert [name for name in found if found[name].mapped] == [name for name in found if name in ("large", "more")]
    for name in ("large", "more"):
        values = found[name].mapped()
        assert found[name].stored == values.dtype == dtype and values.flags.aligned
        assert values.tobytes() == tensors[name].read().tobytes()
        values[:] = values[0, 0]  # what has it may write to it
    assert (tmp_path / "a").read_bytes() == content
    assert found["large"].astype(np.float64).mapped is None


def test_bfloat16_is_the_nearest_number_and_comes_back():
    numbers = np.array([1, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8 - 2**-20, 2**-140, np.inf, -0.0], np.float32)
    nearest = np.array([1, 1, 1 + 4 * 2**-8, -1 - 2 * 2**-8, 0, np.inf, -0.0], np.float32)
    nearest[4] = from_bfloat16(to_bfloat16(numbers[4:5]))[0]
    found = from_bfloat16(to_bfloat16(numbers))
    np.testing.assert_array_equal(found, nearest)
    assert abs(found[4] - numbers[4]) <= 2**-134 and np.signbit(found[-1])
    assert np.isnan(from_bfloat16(to_bfloat16(np.array([0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)))).all()
    every = np.arange(1 << 16, dtype=np.uint16).view(BFLOAT16)
    every = every[~np.isnan(from_bfloat16(every))]
    assert (to_bfloat16(from_bfloat16(every)) == every).all()


def test_texts_and_numbers_of_a_ckpt_are_read(tmp_path):
    ckpt_format.write_ckpt(tmp_path / "a", [("word", "<toy>"), ("count", 3), ("rows", np.ones((2, 3), np.float32))])
    found = open_weights(tmp_path / "a")
    assert (found["word"].read(), found["count"].read()) == ("<toy>", 3)


def test_float16_becomes_float32_bit_by_bit():
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    np.testing.assert_array_equal(in_memory(every).astype(np.float32).read(), every.astype(np.float32))


def test_the_safetensors_library_reads_what_is_written(tmp_path):
    tensors = {name: in_memory(array) for name, array in ARRAYS.items()}
    write_safetensors(tmp_path / "a", tensors, metadata={"format": "pt"})
    with safe_open(tmp_path / "a", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(file.get_tensor(name), array)


def test_tensors_are_aligned_to_their_own_width(tmp_path):
    write_safetensors(tmp_path / "a", {name: in_memory(array) for name, array in ARRAYS.items()})
    content = (tmp_path / "a").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    for name, entry in json.loads(content[8 : 8 + length]).items():
        assert entry["data_offsets"][0] % ARRAYS[name].dtype.itemsize == 0, name


def test_a_tensor_is_made_when_it_is_read_and_not_before(tmp_path):
    order = []

    def read(name):
        order.append(name)
        return np.zeros(3, np.float32)

    tensors = {n: LazyTensor((3,), np.dtype(np.float32), lambda n=n: read(n)) for n in "ab"}
    tensors = {n: t.astype(np.float16).map(lambda v: v[:2], (2,)) for n, t in tensors.items()}
    assert not order
    write_safetensors(tmp_path / "a", tensors)
    assert order == ["a", "b"]
    assert open_weights(tmp_path / "a")["b"].shape == (2,)


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path):
    def fail():
        raise ValueError("broken")

    good = in_memory(np.ones(2, np.float32))
    for write in (write_safetensors, write_ckpt):
        write(tmp_path / "a", {"x": good})
        before = (tmp_path / "a").read_bytes()
        with pytest.raises(ValueError, match="broken"):
            write(tmp_path / "a", {"x": good, "y": LazyTensor((2,), np.dtype(np.float32), fail)})
        assert (tmp_path / "a").read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_integers_keep_their_type_and_floats_do_not_become_infinite():
    assert in_memory(np.arange(3)).astype(np.float16).dtype == np.int64
    assert np.isinf(in_memory(np.array([np.inf])).astype(np.float16).read()).all()
    with pytest.raises(ValueError, match="70000 does not fit float16"):
        in_memory(np.array([1.0, -7e4])).astype(np.float16).read()
    with pytest.raises(ValueError, match="3.4e[+]38 does not fit bfloat16"):
        in_memory(np.array([1.0, 3.4e38])).astype(BFLOAT16).read()
