import collections
import json
import pickle
import subprocess
import sys
import zipfile

import mindspore as ms
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from gm.ckpt_format import write_ckpt
from gm.textual_inversion.embedding_file import (
    FORMATS,
    Embedding,
    file_stem,
    learned_file_name,
    read_embedding,
    write_embedding,
)
from tests.torch_files import Named, Storage, Tensor, torch_file, torch_pickle

RNG = np.random.default_rng(0)
L, G = "clip_l", "clip_g"
TABLE_L = "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.embedding_table"
TABLE_G = "conditioner.embedders.1.model.token_embedding.embedding_table"
WEIGHT_G = "conditioner.embedders.1.model.token_embedding.weight"


def rows(n, width):
    return RNG.normal(size=(n, width), scale=0.1).astype(np.float32)


def toy(**changes):
    facts = dict(step=3000, base_model="SD-XL-base-1.0", metadata={"lr": "5e-4", "note": "Käse 猫"})
    return Embedding(
        **{"token": "<cat-toy>", "clip_l": rows(2, 8), "clip_g": rows(2, 12), **facts, **changes}
    )


def name_for(format):
    return {"ckpt": "cat.ckpt", "webui": "cat.safetensors", "diffusers": "cat", "pti": "cat.pti"}[format]


def same(a, b):
    return (
        np.array_equal(a.clip_l, b.clip_l)
        and np.array_equal(a.clip_g, b.clip_g)
        and (a.token, a.step, a.base_model) == (b.token, b.step, b.base_model)
        and a.metadata == b.metadata
    )


# ---------------------------------------------------------------- the formats


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("widths", [(8, 12), (768, 1280)])
def test_every_format_gives_back_what_was_written(tmp_path, format, widths):
    embedding = toy(clip_l=rows(3, widths[0]), clip_g=rows(3, widths[1]))
    path = tmp_path / name_for(format)
    files = write_embedding(path, embedding, format=format)
    assert all(file.is_file() for file in files)
    back = read_embedding(path, expect_widths=widths)
    assert (back.format, back.num_vectors, back.widths) == (format, 3, widths)
    assert back.clip_l.dtype == back.clip_g.dtype == np.float32
    kept = {key: text for key, text in back.metadata.items() if not key.startswith("modelspec.")}
    assert same(embedding, Embedding(**{**vars(back), "metadata": kept}))


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("source", FORMATS)
def test_nothing_is_lost_between_any_two_formats(tmp_path, source, target):
    embedding = toy()
    write_embedding(tmp_path / "a", embedding, format=source)
    write_embedding(tmp_path / "b", read_embedding(tmp_path / "a"), format=target)
    assert same(embedding, read_embedding(tmp_path / "b"))


def test_ckpt_is_what_mindone_writes_and_reads(tmp_path):
    """Its reader refuses a tensor that it does not know, so the file may hold these four values alone."""
    embedding = toy(clip_l=rows(10, 768), clip_g=rows(10, 1280))
    path = str(tmp_path / "SD-XL-base-1.0_3000_ti.ckpt")
    write_embedding(path, embedding, format="ckpt")
    loaded = ms.load_checkpoint(path)
    assert list(loaded) == [TABLE_L, TABLE_G, "placeholder_token", "num_vectors"]
    assert np.array_equal(loaded[TABLE_L].asnumpy(), embedding.clip_l) and loaded[TABLE_L].dtype == ms.float32
    assert np.array_equal(loaded[TABLE_G].asnumpy(), embedding.clip_g) and loaded[TABLE_G].dtype == ms.float32
    assert loaded["placeholder_token"] == "<cat-toy>" and int(loaded["num_vectors"].value()) == 10


@pytest.mark.parametrize("dtype", [ms.float32, ms.float16, ms.bfloat16])
def test_a_ckpt_of_mindspore_is_read(tmp_path, dtype):
    embedding = toy()
    path = str(tmp_path / "SD-XL-base-1.0_1500_ti.ckpt")
    tables = {TABLE_L: ms.Tensor(embedding.clip_l, dtype), TABLE_G: ms.Tensor(embedding.clip_g, dtype)}
    ms.save_checkpoint(
        [{"name": name, "data": table} for name, table in tables.items()],
        path,
        append_dict={"placeholder_token": "<猫>", "num_vectors": 2},
    )
    back = read_embedding(path)
    assert (back.token, back.step, back.format) == ("<猫>", 1500, "ckpt")
    assert np.array_equal(back.clip_l, tables[TABLE_L].astype(ms.float32).asnumpy())
    assert np.array_equal(back.clip_g, tables[TABLE_G].astype(ms.float32).asnumpy())


def test_torch_names_in_a_ckpt_are_read_and_other_tensors_passed_over(tmp_path):
    embedding = toy()
    tables = [(TABLE_L, embedding.clip_l), (TABLE_G, embedding.clip_g)]
    save = [{"name": n.replace("embedding_table", "weight"), "data": ms.Tensor(t)} for n, t in tables] + [
        {"name": "conditioner.embedders.1.model.positional_embedding", "data": ms.Tensor(rows(77, 12))}
    ]
    ms.save_checkpoint(save, str(tmp_path / "word.ckpt"))
    with pytest.raises(ValueError, match="lacks placeholder_token or num_vectors"):
        read_embedding(tmp_path / "word.ckpt")
    back = read_embedding(tmp_path / "word.ckpt", token="<word>")
    assert back.token == "<word>" and np.array_equal(back.clip_g, embedding.clip_g)


def test_webui_file_has_exactly_the_keys_of_its_readers(tmp_path):
    """A1111, ComfyUI, kohya: clip_l [n, 768] and clip_g [n, 1280]; the file's name is the word."""
    embedding = toy(clip_l=rows(2, 768), clip_g=rows(2, 1280))
    path = tmp_path / (file_stem(embedding.token) + ".safetensors")
    write_embedding(path, embedding, format="webui")
    data = load_file(path)
    assert {name: (t.shape, t.dtype) for name, t in data.items()} == {
        L: ((2, 768), np.float32),
        G: ((2, 1280), np.float32),
    }
    assert path.name == "cat-toy.safetensors"
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    assert metadata["modelspec.sai_model_spec"] == "1.0.0"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/textual-inversion"
    assert metadata["modelspec.implementation"] and metadata["modelspec.title"] == "cat-toy"
    assert metadata["modelspec.trigger_phrase"] == "<cat-toy>"
    assert (metadata["ti.step"], metadata["ti.base_model"], metadata["lr"]) == (
        "3000",
        "SD-XL-base-1.0",
        "5e-4",
    )


def test_modelspec_keys_of_the_source_are_kept_but_those_of_the_word(tmp_path):
    embedding = toy(clip_l=rows(1, 768), clip_g=rows(1, 1280), metadata={"modelspec.title": "My cat"})
    write_embedding(tmp_path / "a.safetensors", embedding, format="webui")
    write_embedding(tmp_path / "b", read_embedding(tmp_path / "a.safetensors", token="<dog>"), format="webui")
    with safe_open(tmp_path / "b", "np") as file:
        metadata = file.metadata()
    assert metadata["modelspec.title"] == "My cat" and metadata["modelspec.trigger_phrase"] == "<dog>"


def test_another_models_vectors_are_not_called_sdxl(tmp_path):
    write_embedding(tmp_path / "a", toy(), format="webui")
    assert not [key for key in read_embedding(tmp_path / "a").metadata if key.startswith("modelspec.")]


def test_diffusers_pair_is_read_from_either_file_or_the_folder(tmp_path):
    embedding = toy()
    write_embedding(tmp_path / "pair", embedding, format="diffusers")
    first, second = (tmp_path / "pair" / f"learned_embeds{end}.safetensors" for end in ("", "_2"))
    assert {n: t.shape for n, t in load_file(first).items()} == {"<cat-toy>": (2, 8)}
    assert {n: t.shape for n, t in load_file(second).items()} == {"<cat-toy>": (2, 12)}
    with safe_open(first, "np") as file:
        assert file.metadata()["format"] == "pt"
    for path in (tmp_path / "pair", first, second):
        assert same(read_embedding(path), embedding)


def test_diffusers_names_with_steps_are_paired(tmp_path):
    embedding = toy()
    for end, table in (("", embedding.clip_l), ("_2", embedding.clip_g)):
        save_file({"<c>": table}, tmp_path / f"learned_embeds{end}-steps-2000.safetensors")
    for end in ("", "_2"):
        back = read_embedding(tmp_path / f"learned_embeds{end}-steps-2000.safetensors")
        assert back.token == "<c>" and back.widths == (8, 12)
        assert np.array_equal(back.clip_l, embedding.clip_l) and np.array_equal(back.clip_g, embedding.clip_g)


def test_a_single_vector_without_rows_is_one_row(tmp_path):
    save_file({"<c>": rows(1, 8)[0]}, tmp_path / "learned_embeds.safetensors")
    save_file({"<c>": rows(1, 12)[0]}, tmp_path / "learned_embeds_2.safetensors")
    assert read_embedding(tmp_path).clip_g.shape == (1, 12)


def test_bfloat16_is_read_exactly(tmp_path):
    brain = [(rows(2, width).view(np.uint32) >> 16).astype(np.uint16) for width in (8, 12)]
    header = {L: described([2, 8], [0, 32], "BF16"), G: described([2, 12], [32, 80], "BF16")}
    (tmp_path / "a.safetensors").write_bytes(
        safetensors_bytes(header, brain[0].tobytes() + brain[1].tobytes())
    )
    back = read_embedding(tmp_path / "a.safetensors")
    assert np.array_equal(back.clip_g, (brain[1].astype(np.uint32) << 16).view(np.float32))


def test_the_word_comes_from_the_caller_then_the_file_then_its_name(tmp_path):
    save_file({L: rows(1, 8), G: rows(1, 12)}, tmp_path / "my-cat.safetensors")
    assert read_embedding(tmp_path / "my-cat.safetensors").token == "my-cat"
    write_embedding(tmp_path / "named.safetensors", toy(), format="webui")
    assert read_embedding(tmp_path / "named.safetensors").token == "<cat-toy>"
    assert read_embedding(tmp_path / "named.safetensors", token="<dog>").token == "<dog>"


# ---------------------------------------------------------------- torch files


def write_pt(path, embedding, **others):
    content = {L: Tensor("0", embedding.clip_l.shape), G: Tensor("1", embedding.clip_g.shape), **others}
    torch_file(
        path, torch_pickle(content), {"0": embedding.clip_l.tobytes(), "1": embedding.clip_g.tobytes()}
    )


def test_pt_files_are_read_without_torch(tmp_path):
    embedding = toy()
    write_pt(
        tmp_path / "word.pt", embedding, name="x", step=700, sd_checkpoint=None, more=[1, 2.5, True, ("a",)]
    )
    back = read_embedding(tmp_path / "word.pt")
    assert np.array_equal(back.clip_l, embedding.clip_l) and np.array_equal(back.clip_g, embedding.clip_g)
    assert (back.token, back.step, back.format) == ("word", 700, "webui")


def test_views_and_half_precision_in_pt_files(tmp_path):
    whole = rows(6, 8)
    brain = (rows(2, 12).view(np.uint32) >> 16).astype(np.uint16)
    content = {L: Tensor("0", (2, 4), strides=(16, 2), offset=9), G: Tensor("1", (2, 12), "BFloat16Storage")}
    torch_file(tmp_path / "a.pt", torch_pickle(content), {"0": whole.tobytes(), "1": brain.tobytes()})
    back = read_embedding(tmp_path / "a.pt")
    assert np.array_equal(back.clip_l, whole[1:4:2, 1::2])
    assert np.array_equal(back.clip_g, (brain.astype(np.uint32) << 16).view(np.float32))
    half = rows(1, 8).astype(np.float16)
    content = {L: Tensor("0", (1, 8), "HalfStorage"), G: Tensor("1", (1, 8), "DoubleStorage")}
    torch_file(
        tmp_path / "b.pt", torch_pickle(content), {"0": half.tobytes(), "1": half.astype("f8").tobytes()}
    )
    assert np.array_equal(read_embedding(tmp_path / "b.pt").clip_g, half.astype(np.float32))


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("bare", [False, True])
def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path, protocol, bare):
    evil = pickle.dumps({L: Attack(tmp_path / "ran")}, protocol)
    path = tmp_path / "evil.pt"
    if bare:
        path.write_bytes(evil)
    else:
        torch_file(path, evil)
    with pytest.raises(ValueError) as refusal:
        read_embedding(path)
    assert not (tmp_path / "ran").exists()
    if protocol >= 2 and bare:
        assert "may run code" in str(refusal.value)
    pickle.loads(evil)  # the attack itself works
    assert (tmp_path / "ran").exists()


def tuple_tower():
    return pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.NONE + pickle.TUPLE1 * 100_000


PICKLES = {
    "global": (torch_pickle({L: Named("os", "system")}), "asks for 'os.system'"),
    "parameters": (
        torch_pickle({"string_to_param": Named("torch.nn", "ParameterDict")}),
        "torch.nn.ParameterDict",
    ),
    "object": (torch_pickle(collections.deque()), "collections.deque"),
    "huge_text": (b"\x80\x02X\xff\xff\xff\x7fabc.", "damaged"),
    "huge_bytes": (b"\x80\x05\x8e" + b"\xff" * 7 + b"\x7f.", "damaged"),
    "huge_memo": (b"\x80\x02}r\xff\xff\xff\x7f.", "no table of tensors|known format"),
    "deep_key": (tuple_tower() + b"Ns.", "no text or number"),
    "underflow": (b"\x80\x02ss.", "damaged"),
    "no_mark": (b"\x80\x02u.", "damaged"),
    "cut": (torch_pickle({L: 1})[:-1], "damaged"),
    "text": (b"a photo of a cat", "damaged"),
    "empty": (b"", "damaged"),
    "list": (torch_pickle([1, 2]), "no table of tensors"),
    "storage": (torch_pickle({L: Storage(("storage", "torch FloatStorage", "0", "cpu", 1))}), "no storage"),
    "outside": (torch_pickle({L: Tensor("0", (2, 8), offset=60), G: Tensor("0", (2, 8))}), "does not fit"),
    "huge_view": (
        torch_pickle({L: Tensor("0", (75, 16384), strides=(0, 0)), G: Tensor("0", (2, 8))}),
        "does not fit",
    ),
    "huge_shape": (
        torch_pickle({L: Tensor("0", (2, 1 << 39)), G: Tensor("0", (2, 8))}),
        "more than any text",
    ),
    "negative": (
        torch_pickle({L: Tensor("0", (2, 8), strides=(-8, 1)), G: Tensor("0", (2, 8))}),
        "cannot be",
    ),
    "no_record": (torch_pickle({L: Tensor("7", (2, 8)), G: Tensor("0", (2, 8))}), "holds no archive/data/7"),
    "integers": (
        torch_pickle({L: Tensor("0", (2, 4), "LongStorage"), G: Tensor("0", (2, 8))}),
        "not floating",
    ),
}


@pytest.mark.parametrize("name", PICKLES)
def test_bad_pickles_are_refused(tmp_path, name):
    pickled, says = PICKLES[name]
    torch_file(tmp_path / "bad.pt", pickled, {"0": rows(8, 8).tobytes()})
    with pytest.raises(ValueError, match=says):
        read_embedding(tmp_path / "bad.pt")


def test_bad_archives_are_refused(tmp_path):
    path = tmp_path / "bad.pt"
    good = torch_pickle({L: Tensor("0", (2, 8)), G: Tensor("0", (2, 8))})
    for say, arguments in {
        "compressed": dict(pickled=good, compression=zipfile.ZIP_DEFLATED),
        "larger than": dict(pickled=good + b"N" * (1 << 18)),
        "little-endian": dict(pickled=good, records={"0": bytes(64)}, byteorder=b"big"),
    }.items():
        torch_file(path, **arguments)
        with pytest.raises(ValueError, match=say):
            read_embedding(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match="without a data.pkl"):
        read_embedding(path)
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(20_000):
            archive.writestr(f"{i}" + "x" * 60, "")
    with pytest.raises(ValueError, match="larger than any"):
        read_embedding(path)


# ---------------------------------------------------------------- other models', broken and hostile files


def test_an_sd1_embedding_is_refused_by_name(tmp_path):
    a1111 = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": Tensor("0", (2, 8))},
        "name": "x",
        "step": 5,
    }
    torch_file(tmp_path / "sd1.pt", torch_pickle(a1111), {"0": rows(2, 8).tobytes()})
    with pytest.raises(ValueError, match="Stable Diffusion 1 or 2.*cannot use it"):
        read_embedding(tmp_path / "sd1.pt")
    save_file({"emb_params": rows(2, 8)}, tmp_path / "sd1.safetensors")
    with pytest.raises(ValueError, match="half of an SDXL embedding .or one for Stable Diffusion 1"):
        read_embedding(tmp_path / "sd1.safetensors")


def test_a_diffusers_half_without_its_partner_is_refused(tmp_path):
    save_file({"<c>": rows(2, 8)}, tmp_path / "learned_embeds.safetensors")
    with pytest.raises(ValueError, match="its partner learned_embeds_2.safetensors is missing"):
        read_embedding(tmp_path)
    save_file({"<other>": rows(2, 12)}, tmp_path / "learned_embeds_2.safetensors")
    with pytest.raises(
        ValueError, match="its token is '<c>', and learned_embeds_2.safetensors holds: '<other>'"
    ):
        read_embedding(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({L: (2, 8)}, "'clip_g' is missing"),
        ({"text_encoders_1": (2, 12)}, "'text_encoders_0' is missing"),
        ({TABLE_L: (2, 8)}, "is missing"),
        ({L: (2, 8), G: (3, 12)}, "different numbers of vectors: 2 and 3"),
        ({L: (2, 8, 1), G: (2, 12, 1)}, "not \\[vectors, width\\]"),
        ({L: (0, 8), G: (0, 12)}, "0 vectors"),
        ({L: (2, 0), G: (2, 0)}, "width 0"),
        ({L: (76, 8), G: (76, 12)}, "a prompt has room for 75"),
        ({L: (2, 20000), G: (2, 12)}, "20000 wide, more than any"),
        ({L: (2, 8), G: (2, 12), "text_encoders_0": (2, 8)}, "several formats"),
        ({name: (2, 8) for name in (TABLE_L, TABLE_G, WEIGHT_G)}, "table twice"),
        ({"a": (2, 8), "b": (2, 12)}, "no embedding of a known format; its tensors: 'a', 'b'"),
        ({}, "its tensors: none"),
    ],
)
def test_tables_that_are_no_embedding_are_refused(tmp_path, tensors, says):
    path = tmp_path / "bad.safetensors"
    save_file({name: np.zeros(shape, np.float32) for name, shape in tensors.items()}, path)
    with pytest.raises(ValueError, match=says) as refusal:
        read_embedding(path)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e5])
def test_rows_that_are_no_vectors_are_refused(tmp_path, value):
    bad = rows(3, 12)
    bad[1, 7] = value
    save_file({L: rows(3, 8), G: bad}, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match="Vector 1 of clip_g holds NaN, infinite or absurd"):
        read_embedding(tmp_path / "bad.safetensors")


def test_integers_are_no_vectors(tmp_path):
    save_file({L: np.ones((1, 8), np.int32), G: np.ones((1, 12), np.int32)}, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match="not floating-point"):
        read_embedding(tmp_path / "bad.safetensors")


def test_a_count_that_does_not_agree_is_refused(tmp_path):
    path = str(tmp_path / "a.ckpt")
    tables = [
        {"name": TABLE_L, "data": ms.Tensor(rows(2, 8))},
        {"name": TABLE_G, "data": ms.Tensor(rows(2, 12))},
    ]
    ms.save_checkpoint(tables, path, append_dict={"placeholder_token": "<a>", "num_vectors": 3})
    with pytest.raises(ValueError, match="num_vectors says 3, and it holds 2"):
        read_embedding(path)


def test_a_count_that_is_no_number_is_refused(tmp_path):
    values = [(TABLE_L, rows(2, 8)), (TABLE_G, rows(2, 12)), ("placeholder_token", "<a>")]
    for count, says in (
        ("two", "num_vectors says two"),
        (np.array([2, 2]), "lacks placeholder_token or num_v"),
    ):
        write_ckpt(tmp_path / "a.ckpt", [*values, ("num_vectors", count)])
        with pytest.raises(ValueError, match=says):
            read_embedding(tmp_path / "a.ckpt")


@pytest.mark.parametrize("format", FORMATS)
def test_another_models_widths_are_refused_with_both_numbers(tmp_path, format):
    write_embedding(tmp_path / "a", toy(), format=format)
    with pytest.raises(ValueError, match="are 8 and 12 wide, the model's text encoders 768 and 1280"):
        read_embedding(tmp_path / "a", expect_widths=(768, 1280))


def safetensors_bytes(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + data


def described(shape, offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HOSTILE = {
    "empty": (b"", "is empty"),
    "text": (b"a photo of a cat\n" * 20, "no embedding"),
    "html": (b"<!DOCTYPE html><html>", "no embedding"),
    "json": (b'{"clip_l": [1, 2]}', "no embedding"),
    "long_header": ((1 << 62).to_bytes(8, "little") + b"{}", "no embedding"),
    "header_past_end": ((99).to_bytes(8, "little") + b"{}", "does not fit into 10"),
    "header_too_long": (safetensors_bytes(b"{" + b" " * (1 << 20) + b"}"), "does not fit"),
    "no_json": (safetensors_bytes(b"{clip_l"), "no whole safetensors"),
    "no_utf8": (safetensors_bytes(b'{"\xff": 1}'), "no whole safetensors"),
    "deep": (safetensors_bytes(b'{"a":' + b"[" * 100_000), "no whole safetensors"),
    "twice": (safetensors_bytes(b'{"a": 1, "a": 2}'), "occurs twice"),
    "list": (safetensors_bytes(b'{"__metadata__": [1]}'), "not a table of texts"),
    "numbers": (safetensors_bytes({"__metadata__": {"a": 1}}), "not a table of texts"),
    "no_shape": (safetensors_bytes({"a": {"dtype": "F32"}}), "not described"),
    "bad_type": (safetensors_bytes({"a": described([1], [0, 4], "F33")}, bytes(4)), "unknown type 'F33'"),
    "bad_shape": (safetensors_bytes({"a": described([-1], [0, 4])}, bytes(4)), "no sizes"),
    "bool_shape": (safetensors_bytes({"a": described([True], [0, 4])}, bytes(4)), "no sizes"),
    "float_offsets": (safetensors_bytes({"a": described([1], [0, 4.0])}, bytes(4)), "no sizes"),
    "three_offsets": (safetensors_bytes({"a": described([1], [0, 4, 8])}, bytes(8)), "3 offsets"),
    "backwards": (safetensors_bytes({"a": described([1], [4, 0])}, bytes(4)), "declares F32"),
    "gigabytes": (safetensors_bytes({"a": described([1 << 33], [0, 1 << 35])}, bytes(4)), "the file at"),
    "overflow": (safetensors_bytes({"a": described([1 << 62, 4], [0, 0])}), "declares F32"),
    "overlap": (
        safetensors_bytes({L: described([1, 4], [0, 16]), G: described([1, 4], [8, 24])}, bytes(24)),
        "starts at byte",
    ),
    "shared": (
        safetensors_bytes({L: described([1, 4], [0, 16]), G: described([1, 4], [0, 16])}, bytes(16)),
        "starts at byte",
    ),
    "gap": (safetensors_bytes({L: described([1, 4], [8, 24])}, bytes(24)), "starts at byte"),
    "tail": (safetensors_bytes({L: described([1, 4], [0, 16])}, bytes(24)), "the file at"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_broken_and_lying_files_are_refused(tmp_path, name):
    content, says = HOSTILE[name]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=says) as refusal:
        read_embedding(path)
    assert str(path) in str(refusal.value)


def test_a_file_larger_than_any_embedding_is_refused_unread(tmp_path):
    path = tmp_path / "sd_xl_base_1.0.safetensors"
    with open(path, "wb") as file:
        file.truncate(7 << 30)  # takes no room on the disk
    with pytest.raises(ValueError, match="7168 MiB, more than any embedding; a model's weights"):
        read_embedding(path)


def test_a_missing_file_and_an_empty_folder_say_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no embedding at"):
        read_embedding(tmp_path / "nothing.ckpt")
    with pytest.raises(FileNotFoundError, match="holds no learned_embeds"):
        read_embedding(tmp_path)


def test_numbers_that_do_not_match_their_hash_are_reported(tmp_path, caplog):
    path = tmp_path / "a.safetensors"
    write_embedding(path, toy(clip_l=rows(1, 768), clip_g=rows(1, 1280)), format="webui")
    read_embedding(path)
    assert not caplog.records
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    read_embedding(path)
    assert "hash_sha256" in caplog.text


@pytest.mark.parametrize("token", ["", " ", "a\nb", " a", "a\x1b[2J", "x" * 201, 7, None])
def test_a_token_that_is_no_word_is_refused(token):
    with pytest.raises(ValueError, match="token"):
        toy(token=token)


@pytest.mark.parametrize("facts", [{"step": -1}, {"metadata": {"lr": 1e-3}}])
def test_facts_that_no_format_holds_are_refused(facts):
    with pytest.raises(ValueError, match="step is -1|metadata holds text"):
        toy(**facts)


# ---------------------------------------------------------------- writing


def test_the_step_is_read_from_the_name_that_training_gives(tmp_path):
    path = tmp_path / learned_file_name("SD-XL-base-1.0", 3000)
    assert path.name == "SD-XL-base-1.0_3000_ti.ckpt"
    write_embedding(path, toy(step=None), format="ckpt")
    assert read_embedding(path).step == 3000


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_is_overwritten_unless_asked_for(tmp_path, format):
    old, new = toy(), toy()
    write_embedding(tmp_path / "a", old, format=format)
    with pytest.raises(ValueError, match="exists"):
        write_embedding(tmp_path / "a", new, format=format)
    assert same(read_embedding(tmp_path / "a"), old)
    write_embedding(tmp_path / "a", new, format=format, overwrite=True)
    assert same(read_embedding(tmp_path / "a"), new)
    assert not list(tmp_path.rglob("*.tmp"))


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'gguf' is no embedding format; choose one of ckpt, webui"):
        write_embedding(tmp_path / "a", toy(), format="gguf")


def test_files_are_named_by_the_word():
    assert [file_stem(token) for token in ("<cat-toy>", "cat", "<猫>", "my cat")] == [
        "cat-toy",
        "cat",
        "猫",
        "my cat",
    ]


@pytest.mark.parametrize(
    "token", ["<a/b>", "../../etc/cron", "a\\b", "<>", "..", ".hidden", "a:b", "a?", "a.", "a\0"]
)
def test_a_word_that_cannot_name_a_file_is_refused(token):
    with pytest.raises(ValueError, match="cannot name a file"):
        file_stem(token)


def test_the_module_is_imported_without_mindspore_and_torch():
    code = (
        "import sys, gm.textual_inversion.embedding_file as module\n"
        "assert not {'mindspore', 'torch', 'safetensors', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
