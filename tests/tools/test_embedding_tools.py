import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from gm.textual_inversion.embedding_file import FORMATS, Embedding, read_embedding, write_embedding
from tests.tiny import TINY, TOKENIZER, VOCAB, write_tiny_weights
from tools import convert_embedding, inspect_embedding

TOOLS = Path(convert_embedding.__file__).parent
WIDTHS = (TINY["base"].clip_l.width, TINY["base"].clip_g.width)
OUTPUTS = {"ckpt": "a.ckpt", "webui": "a.safetensors", "diffusers": "folder", "pti": "embeddings.pti"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    write_tiny_weights(path)
    return path


def make_embedding(*, rows=2, **facts):
    rng = np.random.default_rng(0)
    tables = [rng.normal(size=(rows, width)).astype(np.float32) for width in WIDTHS]
    return Embedding("<cat-toy>", *tables, **facts)


def write(path, format="ckpt", **facts):
    embedding = make_embedding(**facts)
    write_embedding(path, embedding, format=format)
    return embedding


# ---------------------------------------------------------------- convert


@pytest.mark.parametrize("format", FORMATS)
def test_the_suffix_of_dst_tells_the_format(tmp_path, capsys, format):
    source = write(
        tmp_path / "SD-XL-small_30_ti.ckpt", step=30, base_model="SD-XL-small", metadata={"lr": "1e-3"}
    )
    dst = tmp_path / OUTPUTS[format]
    convert_embedding.main(["--src", str(tmp_path / "SD-XL-small_30_ti.ckpt"), "--dst", str(dst)])
    back = read_embedding(dst)
    assert (back.format, back.token, back.step, back.base_model) == (format, "<cat-toy>", 30, "SD-XL-small")
    assert back.metadata == {"lr": "1e-3"}
    assert np.array_equal(back.clip_l, source.clip_l) and np.array_equal(back.clip_g, source.clip_g)
    assert f"{dst}" in capsys.readouterr().out


def test_facts_can_be_given(tmp_path):
    write(tmp_path / "a.ckpt", step=1)
    convert_embedding.main(
        ["--src", str(tmp_path / "a.ckpt"), "--dst", str(tmp_path / "b.x"), "--to", "webui"]
        + ["--token", "<dog>", "--step", "0", "--base_model", "other"]
    )
    back = read_embedding(tmp_path / "b.x")
    assert (back.format, back.token, back.step, back.base_model) == ("webui", "<dog>", 0, "other")


def test_a_webui_file_in_a_folder_is_named_by_the_word(tmp_path):
    write(tmp_path / "a.ckpt")
    arguments = ["--src", str(tmp_path / "a.ckpt"), "--dst", str(tmp_path / "embeddings"), "--to", "webui"]
    convert_embedding.main(arguments)
    assert set(load_file(tmp_path / "embeddings" / "cat-toy.safetensors")) == {"clip_l", "clip_g"}
    with pytest.raises(SystemExit, match="error: The token '../x' cannot name a file"):
        convert_embedding.main([*arguments, "--token", "../x"])
    assert not (tmp_path / "x.safetensors").exists()


def test_nothing_is_overwritten_unless_told(tmp_path):
    write(tmp_path / "a.ckpt", rows=2)
    write(tmp_path / "b.ckpt", rows=3)
    arguments = ["--src", str(tmp_path / "a.ckpt"), "--dst", str(tmp_path / "b.ckpt")]
    with pytest.raises(SystemExit, match="error: .*b.ckpt exists"):
        convert_embedding.main(arguments)
    assert read_embedding(tmp_path / "b.ckpt").num_vectors == 3
    convert_embedding.main([*arguments, "--overwrite"])
    assert read_embedding(tmp_path / "b.ckpt").num_vectors == 2


def test_what_is_wrong_is_said_without_a_traceback(tmp_path):
    write(tmp_path / "a.ckpt")
    with pytest.raises(SystemExit, match="error: There is no embedding at"):
        convert_embedding.main(["--src", str(tmp_path / "none"), "--dst", str(tmp_path / "b.ckpt")])
    with pytest.raises(SystemExit, match="ends in '.gguf', which names no format; give --to"):
        convert_embedding.main(["--src", str(tmp_path / "a.ckpt"), "--dst", str(tmp_path / "b.gguf")])


# ---------------------------------------------------------------- inspect


def inspect(capsys, *arguments):
    inspect_embedding.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_json_tells_what_is_in_the_file(tmp_path, capsys):
    source = write(tmp_path / "SD-XL-small_30_ti.ckpt", step=30, metadata={"lr": "1e-3"})
    report = json.loads(inspect(capsys, tmp_path / "SD-XL-small_30_ti.ckpt", "--json"))
    norms = {name: encoder.pop("norms") for name, encoder in report["encoders"].items()}
    assert report == {
        "file": str(tmp_path / "SD-XL-small_30_ti.ckpt"),
        "format": "ckpt",
        "token": "<cat-toy>",
        "num_vectors": 2,
        "widths": list(WIDTHS),
        "step": 30,
        "base_model": None,
        "metadata": {"lr": "1e-3"},
        "encoders": {"clip_l": {}, "clip_g": {}},
    }
    assert np.allclose(norms["clip_g"], np.linalg.norm(source.clip_g, axis=1), atol=1e-5)


def tables_and_words(weights):
    file = load_file(weights)
    tables = {name: file[key].astype(np.float32) for name, key in inspect_embedding.TABLES.items()}
    vocabulary = json.loads((TOKENIZER / "vocab.json").read_text())
    return tables, {i: token for token, i in vocabulary.items()}


def test_the_nearest_word_of_a_words_own_row_is_that_word(tmp_path, capsys, weights):
    tables, words = tables_and_words(weights)
    ids = [i for i in range(VOCAB) if words[i].endswith("</w>") and words[i][:-4].isalpha()][-2:]
    rows = {name: 3 * table[ids] for name, table in tables.items()}
    write_embedding(tmp_path / "a.ckpt", Embedding("<t>", rows["clip_l"], rows["clip_g"]), format="ckpt")
    arguments = (tmp_path / "a.ckpt", "--weight", weights, "--tokenizer", TOKENIZER, "--count", 3)
    report = json.loads(inspect(capsys, *arguments, "--json"))
    for name, encoder in report["encoders"].items():
        assert [nearest[0] for nearest in encoder["nearest"]] == [
            [words[i].removesuffix("</w>"), 1.0] for i in ids
        ]
        assert all(len(nearest) == 3 for nearest in encoder["nearest"])
        norms = np.linalg.norm(tables[name], axis=1)
        assert np.allclose(list(encoder["vocabulary"].values()), np.percentile(norms, [5, 50, 95]), rtol=1e-3)
        assert np.allclose(encoder["norms"], 3 * norms[ids], rtol=1e-3)
    text = inspect(capsys, *arguments)
    assert f"{words[ids[0]].removesuffix('</w>')} 1.000" in text and "vocabulary's norms" in text


def test_nearest_words_are_those_of_a_plain_computation(weights):
    tables, words = tables_and_words(weights)
    rows, table = make_embedding(rows=3).clip_l, tables["clip_l"]
    found = inspect_embedding._compare(rows, table, [words[i] for i in range(VOCAB)], 4)["nearest"]
    cosines = rows @ table.T / np.linalg.norm(rows, axis=1)[:, None] / np.linalg.norm(table, axis=1)
    for row, nearest in zip(cosines, found, strict=True):
        order = np.argsort(-row)[:4]
        assert [word for word, _ in nearest] == [words[i] for i in order]
        assert np.allclose([cosine for _, cosine in nearest], row[order], atol=1e-4)


def test_another_model_or_tokenizer_is_refused(tmp_path, weights):
    rng = np.random.default_rng(0)
    wide = Embedding("<t>", *(rng.normal(size=(1, width)).astype(np.float32) for width in (768, 1280)))
    write_embedding(tmp_path / "wide.ckpt", wide, format="ckpt")
    write(tmp_path / "a.ckpt")
    with pytest.raises(SystemExit, match="error: .*768 and 1280 wide, the model's text encoders 32 and 48"):
        inspect_embedding.main([str(tmp_path / "wide.ckpt"), "--weight", str(weights)])
    write(tmp_path / "b.safetensors", "webui")
    other = tmp_path / "tokenizer"
    other.mkdir()
    pieces = {"a": 0, "a</w>": 1, "<|startoftext|>": 2, "<|endoftext|>": 3}
    (other / "vocab.json").write_text(json.dumps(pieces))
    (other / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(SystemExit, match="error: The tokenizer has 4 words, the table of .* 734 rows"):
        inspect_embedding.main(
            [str(tmp_path / "a.ckpt"), "--weight", str(weights), "--tokenizer", str(other)]
        )
    with pytest.raises(SystemExit, match="error: .*is no SDXL base"):
        inspect_embedding.main([str(tmp_path / "a.ckpt"), "--weight", str(tmp_path / "b.safetensors")])


@pytest.mark.parametrize("tool", ["convert_embedding", "inspect_embedding"])
def test_the_tools_start_from_any_folder(tmp_path, tool):
    result = subprocess.run(
        [sys.executable, TOOLS / f"{tool}.py", "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "usage" in result.stdout
