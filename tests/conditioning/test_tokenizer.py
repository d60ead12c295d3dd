"""Prompts become the ids that CLIP was trained with, and learned words, weights and long prompts work."""

import gzip
import importlib.metadata
import logging
import urllib.error

import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import CLIPTokenizer

from gm.conditioning import tokenizer as tokenizer_module
from gm.conditioning.tokenizer import Tokenizer, load_clip_tokenizer, parse_weights
from tests.tiny import TOKENIZER, VOCAB


@pytest.fixture
def tokenizer():
    return Tokenizer(TOKENIZER)


def one(tokenizer, word):
    """The id of a word that is a single token."""
    (i,) = tokenizer.ids(word)
    return i


# ---------------------------------------------------------------- where the vocabulary comes from


@pytest.fixture
def no_hub(monkeypatch):
    """No network, nothing in the hub's cache, open_clip_torch not installed."""

    def no_network(request, timeout):
        raise urllib.error.URLError("no network")

    def not_cached(name, file, local_files_only):
        assert local_files_only, "the hub's client would retry for minutes"
        raise LocalEntryNotFoundError("not cached")

    def not_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(tokenizer_module.urllib.request, "urlopen", no_network)
    monkeypatch.setattr(tokenizer_module, "hf_hub_download", not_cached)
    monkeypatch.setattr(tokenizer_module.importlib.metadata, "files", not_installed)


@pytest.fixture
def open_clip_installed(no_hub, monkeypatch, tmp_path):
    """An installed distribution whose vocabulary file has the tiny tokenizer's merges."""
    path = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    path.write_bytes(gzip.compress((TOKENIZER / "merges.txt").read_bytes().strip()))

    class File:
        name = path.name
        locate = staticmethod(lambda: path)

    monkeypatch.setattr(tokenizer_module.importlib.metadata, "files", lambda name: [File])


def test_without_folder_hub_and_open_clip_the_error_says_all_three_ways(no_hub):
    with pytest.raises(
        FileNotFoundError, match="vocab.json.*connect to the hub.*pip install --no-deps open_clip_torch"
    ):
        load_clip_tokenizer.__wrapped__("some/name")


def test_a_folder_without_merges_is_named(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path.name}' has no merges.txt"):
        load_clip_tokenizer.__wrapped__(str(tmp_path))


def test_the_vocabulary_of_open_clip_gives_the_same_ids(open_clip_installed, tokenizer):
    own = load_clip_tokenizer.__wrapped__(None)
    assert own.get_vocab() == load_clip_tokenizer(TOKENIZER).get_vocab()
    text = "A photo of the Unknown cat's toy, 42 é!"
    assert own.encode(text, add_special_tokens=False) == tokenizer.ids(text)


def test_taking_clips_vocabulary_for_another_name_is_said(open_clip_installed, caplog):
    load_clip_tokenizer.__wrapped__("some/name")
    assert "some/name" in caplog.text and "open_clip_torch" in caplog.text


def test_a_hub_that_answers_is_asked(no_hub, monkeypatch):
    def forbidden(request, timeout):
        raise urllib.error.HTTPError("url", 403, "not for HEAD", {}, None)

    def download(name, file, local_files_only):
        if local_files_only:
            raise LocalEntryNotFoundError("not cached")
        return TOKENIZER / file

    monkeypatch.setattr(tokenizer_module.urllib.request, "urlopen", forbidden)
    monkeypatch.setattr(tokenizer_module, "hf_hub_download", download)
    assert len(load_clip_tokenizer.__wrapped__("some/name")) == VOCAB


# ---------------------------------------------------------------- plain prompts


def test_ids_are_those_of_transformers(tokenizer):
    peer = CLIPTokenizer.from_pretrained(TOKENIZER)
    for text in ("a photo of a cat", "  A  Photo\nof the CAT's toy... ", "", "one23 unknownword é ☃"):
        assert tokenizer.ids(text) == peer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(("pad", "pad_id"), [("eos", VOCAB - 1), (0, 0)])
def test_a_prompt_starts_ends_and_is_padded_as_its_encoder_was_trained(pad, pad_id):
    tokenizer = Tokenizer(TOKENIZER, max_length=8, pad=pad)
    cat, toy = one(tokenizer, "cat"), one(tokenizer, "toy")
    ids = tokenizer.encode(["cat toy", ""])
    assert ids.dtype == np.int32
    assert ids.tolist() == [
        [[VOCAB - 2, cat, toy, VOCAB - 1, *[pad_id] * 4]],
        [[VOCAB - 2, VOCAB - 1, *[pad_id] * 6]],
    ]


def test_a_prompt_that_is_cut_names_the_lost_words_once(caplog):
    tokenizer = Tokenizer(TOKENIZER, max_length=6)
    tokenizer.add_placeholder("<my-cat>", 3)
    for _ in range(2):
        ids = tokenizer.encode(["a red toy <My-Cat> on the beach", "a toy"])
    assert ids.shape == (2, 1, 6)
    assert ids[0, 0].tolist() == [VOCAB - 2, *tokenizer.ids("a red toy"), VOCAB, VOCAB - 1]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "lost: <my-cat> on the beach" in caplog.text


# ---------------------------------------------------------------- learned words


def test_a_learned_word_expands_wherever_it_stands(tokenizer):
    cat = tokenizer.add_placeholder("<Cat>", 3)
    toy = tokenizer.add_placeholder("sks-toy", 1)
    assert cat == [VOCAB, VOCAB + 1, VOCAB + 2] and toy == [VOCAB + 3]
    a, comma, dog = one(tokenizer, "a"), one(tokenizer, ","), one(tokenizer, "dog")
    assert tokenizer.ids("a <cat>,a\n<CAT>") == [a, *cat, comma, a, *cat]
    assert tokenizer.ids("<cat>dog<cat><cat>") == [*cat, dog, *cat, *cat]
    assert tokenizer.ids("dog,SKS-toy, <cat>") == [dog, comma, *toy, comma, *cat]


def test_a_learned_word_that_begins_like_another_is_not_confused(tokenizer):
    short, long = tokenizer.add_placeholder("<cat>", 2), tokenizer.add_placeholder("<cat>2", 2)
    word, longer = tokenizer.add_placeholder("qqcat", 1), tokenizer.add_placeholder("qqcats", 1)
    assert tokenizer.ids("<cat>2 <cat> <cat>2") == [*long, *short, *long]
    assert tokenizer.ids("qqcat qqcats") == [*word, *longer]
    assert not {*word, *longer} & {
        *tokenizer.ids("qqcatty"),
        *tokenizer.ids("aqqcat"),
        *tokenizer.ids("qqcat_1"),
    }


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("Cat", r"'Cat' is already a CLIP token \(id \d+\); choose a word"),
        ("*", "already a CLIP token"),
        (" ", "must be one word"),
        ("my cat", "must be one word"),
        ("<TAKEN>", "was added before"),
    ],
)
def test_a_placeholder_must_be_a_new_word(tokenizer, token, message):
    tokenizer.add_placeholder("<taken>", 1)
    with pytest.raises(ValueError, match=message):
        tokenizer.add_placeholder(token, 1)
    assert list(tokenizer.placeholders) == ["<taken>"]


@pytest.mark.parametrize("num_vectors", [0, 76])
def test_a_placeholder_must_fit_into_a_prompt(tokenizer, num_vectors):
    with pytest.raises(ValueError, match=f"--num_vectors {num_vectors}: a prompt holds 1 to 75"):
        tokenizer.add_placeholder("<cat>", num_vectors)


# ---------------------------------------------------------------- weights and long prompts


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a cat", [("a cat", 1)]),
        ("a (cat) toy", [("a ", 1), ("cat", 1.1), (" toy", 1)]),
        ("(cat:1.3)", [("cat", 1.3)]),
        ("(cat : .5 )", [("cat ", 0.5)]),
        ("((cat) [toy:2])", [("cat", 1.21), (" ", 1.1), ("toy:2", 1)]),
        ("[[cat]]", [("cat", 1 / 1.21)]),
        ("((red cat:2) toy:0.5)", [("red cat", 1), (" toy", 0.5)]),
        (r"\(cat\) \[toy\] \\", [("(cat) [toy] \\", 1)]),
        (r"a\b (cat\:1.3)", [("ab ", 1), ("cat", 1.3)]),
        ("cat) toy] :1.2)", [("cat) toy] :1.2)", 1)]),
        ("cat (toy [dog", [("cat ", 1), ("toy ", 1.1), ("dog", 1)]),
        ("time 12:30 (at 12:30)", [("time 12:30 ", 1), ("at 12", 30)]),
        ("", []),
    ],
)
def test_brackets_weigh_as_in_automatic1111(prompt, pieces):
    texts, weights = zip(*parse_weights(prompt), strict=True) if pieces else ((), ())
    assert list(texts) == [text for text, _ in pieces]
    np.testing.assert_allclose(weights, [weight for _, weight in pieces], rtol=1e-12)


def test_weights_reach_learned_words_whose_names_have_brackets(tokenizer):
    own = tokenizer.add_placeholder("(v:2)", 2)
    ids, weights = tokenizer.encode_weighted(["a ((v:2):1.5) cat"])
    a, cat = one(tokenizer, "a"), one(tokenizer, "cat")
    assert ids[0, 0, :6].tolist() == [VOCAB - 2, a, *own, cat, VOCAB - 1]
    np.testing.assert_array_equal(weights[0, 0], np.float32([1, 1, 1.5, 1.5] + [1] * 73))


def test_brackets_are_literal_in_training_captions(tokenizer):
    plain = tokenizer.encode(["a (cat:1.3)"])[0, 0].tolist()
    text = [one(tokenizer, piece) for piece in ("a", "(")] + tokenizer.ids("cat:1.3)")
    assert plain[1 : plain.index(VOCAB - 1)] == text


def test_long_prompts_take_several_chunks_each_padded_as_in_training():
    tokenizer = Tokenizer(TOKENIZER, max_length=6, pad=0)
    ids, weights = tokenizer.encode_weighted(["a red (cat:2) on the blue sea", "toy"])
    assert ids.shape == weights.shape == (2, 2, 6)
    np.testing.assert_array_equal(ids[:1, :1], tokenizer.encode(["a red cat on"]))
    np.testing.assert_array_equal(ids[:1, 1:], tokenizer.encode(["the blue sea"]))
    np.testing.assert_array_equal(
        ids[1:], np.concatenate([tokenizer.encode(["toy"]), tokenizer.encode([""])], 1)
    )
    assert (
        weights[0, 0].tolist() == [1, 1, 1, 2, 1, 1]
        and (weights[0, 1] == 1).all()
        and (weights[1] == 1).all()
    )


def test_a_learned_word_is_not_split_between_chunks():
    tokenizer = Tokenizer(TOKENIZER, max_length=6)
    tokenizer.add_placeholder("<cat>", 3)
    ids, _ = tokenizer.encode_weighted(["a red <cat> toy"])
    np.testing.assert_array_equal(ids[0, :1], tokenizer.encode(["a red"])[0])
    np.testing.assert_array_equal(ids[0, 1:], tokenizer.encode(["<cat> toy"])[0])


def test_a_short_prompt_has_the_same_ids_for_training_and_for_sampling(tokenizer):
    tokenizer.add_placeholder("<cat>", 2)
    prompts = ["a photo of <cat>, on the beach", ""]
    np.testing.assert_array_equal(tokenizer.encode_weighted(prompts)[0], tokenizer.encode(prompts))


def test_other_words_in_place_of_learned_ones(tokenizer):
    tokenizer.add_placeholder("<cat>", 2)
    tokenizer.add_placeholder("<dog>", 1)
    assert tokenizer.replace_placeholders("A <CAT>, a <dog>  <bird>", {"<Cat>": r"\1 toy", "<dog>": ""}) == (
        r"a \1 toy, a <bird>"
    )
    assert tokenizer.replace_placeholders("a <cat>", {}) == "a <cat>"
    tokenizer.clear_placeholders()
    assert tokenizer.replace_placeholders("a <cat>", {"<cat>": "toy"}) == "a <cat>"
