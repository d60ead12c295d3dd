"""Learned words go to diffusers and torch, and come back: real loaders, real files."""

import collections

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from gm.textual_inversion.concept import add_concept
from gm.textual_inversion.embedding_file import Embedding, read_embedding, write_embedding
from tests.tiny import CONFIGS, TINY, VOCAB, tiny_engine, write_tiny_weights
from tests.tiny_text import sizes
from tools.convert_weights import convert

pytestmark = pytest.mark.peers

TOKEN = "<cat-toy>"
WIDTHS = (TINY["base"].clip_l.width, TINY["base"].clip_g.width)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    at = tmp_path_factory.mktemp("tiny")
    convert(write_tiny_weights(at / "tiny.safetensors"), at / "folder", config=CONFIGS["base"])
    return at / "folder"


@pytest.fixture
def pipeline(folder):
    return StableDiffusionXLPipeline.from_pretrained(folder)


def make_embedding(num_vectors):
    rng = np.random.default_rng(num_vectors)
    rows = [rng.normal(size=(num_vectors, width), scale=0.3) for width in WIDTHS]
    return Embedding(TOKEN, *rows, step=20)


@pytest.fixture(params=[1, 3])
def embedding(request):
    return make_embedding(request.param)


def encoders(pipeline):
    return (pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2)


def load_halves(pipeline, halves, **settings):
    for half, (tokenizer, encoder) in zip(halves, encoders(pipeline), strict=True):
        pipeline.load_textual_inversion(half, tokenizer=tokenizer, text_encoder=encoder, **settings)


def assert_rows(pipeline, embedding):
    for (tokenizer, encoder), rows in zip(
        encoders(pipeline), (embedding.clip_l, embedding.clip_g), strict=True
    ):
        tokens = [TOKEN, *(f"{TOKEN}_{i}" for i in range(1, len(rows)))]
        ids = tokenizer.convert_tokens_to_ids(tokens)
        assert ids == list(range(VOCAB, VOCAB + len(rows)))
        assert np.array_equal(encoder.get_input_embeddings().weight[ids].detach().numpy(), rows)


# ---------------------------------------------------------------- out


def test_diffusers_loads_the_pair_into_both_encoders(pipeline, embedding, tmp_path):
    files = write_embedding(tmp_path, embedding, format="diffusers")
    load_halves(pipeline, map(str, files))
    assert_rows(pipeline, embedding)


def test_diffusers_finds_the_first_half_in_the_folder_by_itself(pipeline, embedding, tmp_path):
    write_embedding(tmp_path, embedding, format="diffusers")
    pipeline.load_textual_inversion(str(tmp_path))
    assert TOKEN in pipeline.tokenizer.get_vocab()


def test_diffusers_loads_the_halves_of_the_webui_file_and_of_pti(pipeline, embedding, tmp_path):
    for format, names in (("webui", ("clip_l", "clip_g")), ("pti", ("text_encoders_0", "text_encoders_1"))):
        write_embedding(tmp_path / format, embedding, format=format)
        tables = load_file(tmp_path / format)
        assert set(tables) == set(names)
        for table, rows in zip(
            (tables[name] for name in names), (embedding.clip_l, embedding.clip_g), strict=True
        ):
            assert table.dtype == torch.float32 and np.array_equal(table.numpy(), rows)
    load_halves(pipeline, [tables[name] for name in names], token=TOKEN)
    assert_rows(pipeline, embedding)


def test_the_learned_word_means_the_same_to_diffusers_and_to_us(pipeline, tmp_path, mode):
    embedding = make_embedding(3)
    load_halves(pipeline, map(str, write_embedding(tmp_path / "pair", embedding, format="diffusers")))
    write_embedding(tmp_path / "word.ckpt", embedding, format="ckpt")
    read = read_embedding(tmp_path / "word.ckpt", expect_widths=WIDTHS)
    conditioner = tiny_engine().conditioner
    add_concept(conditioner, token=read.token, initializer=(read.clip_l, read.clip_g))
    for prompt in (f"a photo of {TOKEN}, a red toy", TOKEN, f"two {TOKEN} next to a {TOKEN}"):
        vector, context = conditioner.encode({"txt": [prompt], **sizes(1)})
        with torch.no_grad():
            expected, _, pooled, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
        assert_close(context, expected.numpy())
        assert_close(vector[:, : WIDTHS[1]], pooled.numpy())


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


# ---------------------------------------------------------------- in


def trained(pipeline, embedding):
    """Both encoders after training: the learned rows behind the vocabulary."""
    for (tokenizer, encoder), rows in zip(
        encoders(pipeline), (embedding.clip_l, embedding.clip_g), strict=True
    ):
        tokenizer.add_tokens([TOKEN, *(f"{TOKEN}_{i}" for i in range(1, len(rows)))])
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        table = encoder.get_input_embeddings().weight
        with torch.no_grad():
            table[VOCAB : VOCAB + len(rows)] = torch.from_numpy(rows)
        yield table[VOCAB : VOCAB + len(rows)]


def assert_same(path, embedding, **settings):
    back = read_embedding(path, **settings)
    assert back.token == TOKEN
    assert np.array_equal(back.clip_l, embedding.clip_l) and np.array_equal(back.clip_g, embedding.clip_g)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_we_read_what_diffusers_training_saves(pipeline, embedding, tmp_path, suffix):
    """Its script saves a slice of the encoder's table under the token; torch.save keeps the whole storage."""
    for end, rows in zip(("", "_2"), trained(pipeline, embedding), strict=True):
        path, table = tmp_path / f"learned_embeds{end}.{suffix}", {TOKEN: rows.detach().cpu()}
        if suffix == "bin":
            torch.save(table, path)
        else:
            save_file(table, path, metadata={"format": "pt"})
    assert_same(tmp_path, embedding)
    assert_same(tmp_path / f"learned_embeds_2.{suffix}", embedding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", [torch.Tensor.clone, torch.nn.Parameter])
def test_we_read_what_torch_saves(embedding, tmp_path, dtype, kind):
    tables = {name: torch.from_numpy(getattr(embedding, name)).to(dtype) for name in ("clip_l", "clip_g")}
    saved = {
        **{name: kind(table) for name, table in tables.items()},
        "name": "cat",
        "step": 20,
        "optimizer": None,
    }
    torch.save(saved, tmp_path / "a.pt")
    torch.save(collections.OrderedDict(saved), tmp_path / "b.pt")
    save_file(tables, tmp_path / "c.safetensors")
    for name in ("a.pt", "b.pt", "c.safetensors"):
        back = read_embedding(tmp_path / name, token=TOKEN)
        assert np.array_equal(back.clip_l, tables["clip_l"].float().numpy())
        assert np.array_equal(back.clip_g, tables["clip_g"].float().numpy())
    assert read_embedding(tmp_path / "a.pt").step == 20


def test_transposed_and_strided_tensors_of_torch_are_read_in_their_order(embedding, tmp_path):
    clip_l, clip_g = torch.from_numpy(embedding.clip_l), torch.from_numpy(embedding.clip_g)
    wide = torch.zeros(embedding.num_vectors, 2 * WIDTHS[1])
    wide[:, 1::2] = clip_g
    torch.save({"clip_l": clip_l.T.contiguous().T, "clip_g": wide[:, 1::2]}, tmp_path / "a.pt")
    assert_same(tmp_path / "a.pt", embedding, token=TOKEN)


def test_torchs_old_files_and_modules_are_refused(embedding, tmp_path):
    tables = {"clip_l": torch.from_numpy(embedding.clip_l), "clip_g": torch.from_numpy(embedding.clip_g)}
    torch.save(tables, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="bare pickle.*may run code"):
        read_embedding(tmp_path / "old.pt")
    torch.save({**tables, "net": torch.nn.Linear(2, 2)}, tmp_path / "module.pt")
    with pytest.raises(ValueError, match="asks for 'torch.nn.modules.linear.Linear'"):
        read_embedding(tmp_path / "module.pt")


def test_an_sd1_embedding_of_a1111_is_refused(tmp_path):
    vectors = torch.zeros(2, 768)
    sd1 = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": vectors},
        "name": "cat",
        "step": 500,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
    }
    torch.save(sd1, tmp_path / "sd1.pt")
    with pytest.raises(ValueError, match="Stable Diffusion 1 or 2"):
        read_embedding(tmp_path / "sd1.pt")
    torch.save({TOKEN: vectors}, tmp_path / "learned_embeds.bin")
    with pytest.raises(ValueError, match="half of an SDXL embedding"):
        read_embedding(tmp_path / "learned_embeds.bin")
