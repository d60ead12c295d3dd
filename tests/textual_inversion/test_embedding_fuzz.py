"""Thousands of damaged files: each ends in an embedding that can be used or in a plain refusal.

Half of the damage is done inside containers that stay whole (a JSON header with the right length, a zip with
the right checksums, a protobuf message that parses), or a checksum would stop it before it reaches the rest.
"""

import io
import json
import random
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
from mindspore.train.checkpoint_pb2 import Checkpoint

from gm.textual_inversion.embedding_file import MAX_VECTORS, Embedding, read_embedding, write_embedding
from tests.torch_files import Tensor, torch_file, torch_pickle

L, G = "clip_l", "clip_g"

MUTATIONS = 1000  # a format
SECONDS, PEAK_BYTES = 2.0, 48 << 20  # for one read; of computing, as others may use the machine
NUMBERS = [
    0,
    1,
    2,
    3,
    7,
    8,
    75,
    76,
    255,
    2**15,
    2**31 - 1,
    2**31,
    2**32,
    2**40,
    2**62,
    2**63 - 1,
    2**64 - 1,
    -1,
]
RNG = np.random.default_rng(0)
WORD = Embedding(
    "<cat-toy>",
    RNG.normal(size=(3, 8)).astype(np.float32),
    RNG.normal(size=(3, 12)).astype(np.float32),
    step=3000,
    metadata={"modelspec.title": "cat", "lr": "5e-4"},
)


def valid_file(folder, format):
    """Write WORD; returns the file that is going to be damaged."""
    if format == "pt":
        path = folder / "cat-toy.pt"
        content = {
            L: Tensor("0", WORD.clip_l.shape),
            G: Tensor("1", WORD.clip_g.shape),
            "name": "cat",
            "step": 5,
        }
        torch_file(path, torch_pickle(content), {"0": WORD.clip_l.tobytes(), "1": WORD.clip_g.tobytes()})
        return path
    path = folder / ("pair" if format == "diffusers" else f"cat.{format}")
    return write_embedding(path, WORD, format=format)[-1]


# ---------------------------------------------------------------- damage


def flip_bits(rng, data, count=None):
    data = bytearray(data)
    for _ in range(count or rng.choice([1, 1, 2, 8, 64])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def damage_bytes(rng, data):
    at, length = rng.randrange(len(data)), rng.choice([1, 2, 4, 8, 100])
    what = rng.randrange(8)
    if what == 0:
        return data[:at]
    if what == 1:
        return data[:at] + rng.randbytes(length) + data[at:]
    if what == 2:
        return data[:at] + data[at + length :]
    if what == 3:  # a number field of the container
        width = rng.choice([1, 2, 4, 8])
        return (
            data[:at]
            + (rng.choice(NUMBERS) % 2 ** (8 * width)).to_bytes(width, "little")
            + data[at + width :]
        )
    if what == 4:  # a part moved to another place
        source = rng.randrange(len(data))
        return data[:at] + data[source : source + length] + data[at + length :]
    if what == 5:
        return data + data[at:]
    if what == 6:
        return data[:at] + bytes([rng.choice([0, 255])]) * length + data[at + length :]
    return flip_bits(rng, data)


def damage_json(rng, node):
    """Change one thing, somewhere in a JSON document."""
    if isinstance(node, dict) and node and rng.random() < 0.85:
        key = rng.choice(list(node))
        changed = dict(node)
        value = changed.pop(key)
        what = rng.random()
        if what < 0.15:
            return changed
        if what < 0.25:
            return {**node, rng.choice([L, G, "text_encoders_0", "x", "__metadata__"]): value}
        return {**node, key: damage_json(rng, value)}
    if isinstance(node, list) and node and rng.random() < 0.85:
        i = rng.randrange(len(node))
        return node[:i] + [damage_json(rng, node[i])] + node[i + 1 :]
    if isinstance(node, int) and rng.random() < 0.5:
        return node + rng.choice([-8, -4, -1, 1, 4, 8])
    return rng.choice([*NUMBERS, None, True, 0.5, "F16", "F64", "BF16", "I32", "", [], {}, [1] * 9, {"a": 1}])


def damage_safetensors(rng, data):
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(damage_json(rng, json.loads(data[8 : 8 + length]))).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def damage_zip(rng, data):
    """Damage one record, and keep the archive and its checksums right."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        victim = rng.choice([*old.namelist(), *["archive/data.pkl"] * 9])
        for name in old.namelist():
            record = old.read(name)
            new.writestr(name, damage_bytes(rng, record) if name == victim else record)
    return out.getvalue()


def damage_protobuf(rng, data):
    checkpoint = Checkpoint.FromString(data)
    value = rng.choice(checkpoint.value)
    tensor = value.tensor
    what = rng.randrange(6)
    if what == 0 and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice([n for n in NUMBERS if n < 2**63])
    elif what == 1:
        tensor.dims.append(rng.choice([0, 1, 2, 2**40]))
    elif what == 2:
        tensor.tensor_type = rng.choice(
            ["Float16", "Float64", "Int32", "BFloat16", "str", "Bool", "", "Float32x"]
        )
    elif what == 3:
        tensor.tensor_content = damage_bytes(rng, tensor.tensor_content)
    elif what == 4:
        value.tag = rng.choice(
            [L, G, "num_vectors", "placeholder_token", "", rng.choice(checkpoint.value).tag]
        )
    else:
        twin = rng.choice(checkpoint.value)
        checkpoint.value.add().CopyFrom(twin)
    return checkpoint.SerializeToString()


INSIDE = {
    "ckpt": damage_protobuf,
    "webui": damage_safetensors,
    "diffusers": damage_safetensors,
    "pti": damage_safetensors,
    "pt": damage_zip,
}
CONTAINERS = ("ckpt", "webui", "pt")


# ---------------------------------------------------------------- what must hold


def read_or_none(path):
    """The embedding, or None if it was refused; anything else is a failure."""
    tracemalloc.reset_peak()
    start = time.process_time()
    try:
        embedding = read_embedding(path)
    except (ValueError, FileNotFoundError) as refusal:
        assert 10 < len(str(refusal)) < 1000 + len(str(path)), refusal
        embedding = None
    assert time.process_time() - start < SECONDS
    assert tracemalloc.get_traced_memory()[1] < PEAK_BYTES
    if embedding is not None:
        for rows in (embedding.clip_l, embedding.clip_g):
            assert rows.dtype == np.float32 and rows.ndim == 2 and rows.size and np.isfinite(rows).all()
        assert len(embedding.clip_l) == len(embedding.clip_g) <= MAX_VECTORS
        assert embedding.token and embedding.token.isprintable()
    return embedding


@pytest.fixture(autouse=True)
def traced():
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.parametrize("format", INSIDE)
def test_damaged_files_are_usable_or_refused(tmp_path, format):
    path = valid_file(tmp_path, format)
    good, rng = path.read_bytes(), random.Random(f"damage {format}")
    refused = 0
    for i in range(MUTATIONS):
        damage = INSIDE[format] if i % 2 else damage_bytes
        bad = damage(rng, good)
        for _ in range(rng.choice([0, 0, 0, 2])):
            bad = damage_bytes(rng, bad) if bad else bad
        path.write_bytes(bad)
        refused += read_or_none(path) is None
    assert MUTATIONS / 3 < refused < MUTATIONS  # the damage is neither nothing nor everything


@pytest.mark.parametrize("format", CONTAINERS)
def test_a_flipped_bit_changes_no_more_than_the_number_it_hits(tmp_path, format):
    path = valid_file(tmp_path, format)
    good, rng = path.read_bytes(), random.Random(f"flips {format}")
    for _ in range(MUTATIONS // 3):
        path.write_bytes(flip_bits(rng, good, count=1))
        embedding = read_or_none(path)
        if embedding is not None:
            assert embedding.clip_l.shape == WORD.clip_l.shape and embedding.clip_g.shape == WORD.clip_g.shape
            wrong = (embedding.clip_l != WORD.clip_l).sum() + (embedding.clip_g != WORD.clip_g).sum()
            assert wrong <= 1


@pytest.mark.parametrize("format", CONTAINERS)
def test_every_truncation_is_refused(tmp_path, format):
    path = valid_file(tmp_path, format)
    good = path.read_bytes()
    for length in range(0, len(good), max(1, len(good) // 200)):
        path.write_bytes(good[:length])
        embedding = read_or_none(path)
        assert embedding is None, f"{length} of {len(good)} bytes were taken for a whole file"
