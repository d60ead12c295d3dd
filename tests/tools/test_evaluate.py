"""Measuring a word: a model that knows it gets full marks, and one that does not gets none."""

import json

import numpy as np
import pytest

from tests.fake_engine import FakeEngine, write_word
from tools import evaluate
from tools.small_world.concepts import find_concept, prompts, real_picture
from tools.small_world.renderer import BACKGROUNDS

CAT, ROBOT = find_concept("cat_toy"), find_concept("robot_toy")


def drawer(concept, word):
    """A model that knows what the word means: the renderer."""
    known = {prompt.text: prompt for prompt in prompts(concept, word)}
    return lambda text, seeds: [real_picture(concept, known[text], seed=seed) for seed in seeds]


def measure(words, draw, *, concept=CAT, round_trip=lambda picture: picture, seeds=(0,)):
    return evaluate.evaluate(concept, words, draw=draw, round_trip=round_trip, seeds=seeds)


def means(figures):
    return {name: figure.mean for name, figure in figures.items()}


def test_a_model_that_draws_the_concept_gets_full_marks_and_another_concept_none():
    good, bad = drawer(CAT, "<cat>"), drawer(ROBOT, "<robot>")
    asked = {a.text: b.text for a, b in zip(prompts(CAT, "<robot>"), prompts(ROBOT, "<robot>"), strict=True)}

    def draw(text, seeds):
        return bad(asked[text], seeds) if "<robot>" in text else good(text, seeds)

    table = measure({"learned word": "<cat>", "word <robot>": "<robot>"}, draw)
    assert list(table) == ["learned word", "word <robot>", "autoencoder", "real renders"]
    full = {"fidelity": 1, "editability": 1, "leakage": 0}
    assert means(table["learned word"]) == means(table["real renders"]) == means(table["autoencoder"]) == full
    other = means(table["word <robot>"])
    assert other["fidelity"] == other["editability"] == 0


def test_a_model_that_repeats_its_training_pictures_leaks_their_backgrounds():
    pictures = CAT.training_pictures(64)
    table = measure({"learned word": "<cat>"}, lambda _, seeds: [pictures[s] for s in seeds], seeds=(0, 2))
    scores = means(table["learned word"])
    assert scores["fidelity"] == scores["leakage"] == 1
    assert scores["editability"] < 0.3  # what is large anyway is large


def test_what_the_autoencoder_loses_shows_in_its_row():
    blank = np.full((64, 64, 3), BACKGROUNDS["white"], np.uint8)
    table = measure({}, draw=None, round_trip=lambda picture: blank)
    assert means(table["autoencoder"])["fidelity"] == 0
    assert means(table["real renders"])["fidelity"] == 1


def test_every_seed_and_prompt_is_drawn_once_and_counted():
    asked = []

    def draw(text, seeds):
        asked.append((text, list(seeds)))
        return np.zeros((len(seeds), 64, 64, 3), np.uint8)

    table = measure({"learned word": "<cat>"}, draw, seeds=range(5, 8))
    assert asked == [(prompt.text, [5, 6, 7]) for prompt in prompts(CAT, "<cat>")]
    assert table["learned word"]["fidelity"].pictures == 3
    assert table["learned word"]["editability"].pictures == 21


def test_the_engine_draws_a_seed_alone_as_it_does_beside_others():
    engine = FakeEngine()
    settings = evaluate.sampling.SamplingArgs(height=64, width=64, steps=2)
    together = evaluate.draw(engine, "a toy", [3, 4], settings)
    assert together.shape == (2, 64, 64, 3) and together.dtype == np.uint8
    assert np.array_equal(together[1:], evaluate.draw(engine, "a toy", [4], settings))
    assert not np.array_equal(together[0], together[1])


def test_a_picture_goes_through_the_autoencoder_and_back():
    settings = evaluate.sampling.SamplingArgs(height=64, width=64)
    flat = np.full((64, 64, 3), 200, np.uint8)
    back = evaluate.round_trip(FakeEngine(), flat, settings)  # its decoder divides by 3 what its encoder kept
    expected = round(((200 / 127.5 - 1) / 3 + 1) * 127.5)
    assert back.shape == flat.shape and np.unique(back).tolist() == [expected]


def test_the_command_prints_a_table_and_writes_it_as_json(tmp_path, monkeypatch, capsys):
    engine = FakeEngine()
    monkeypatch.setattr(evaluate, "build_engine", lambda config: engine)
    monkeypatch.setattr(evaluate, "load_weights", lambda engine, path: None)
    files = [str(write_word(tmp_path / f"{name}.ckpt", f"<{name}>")) for name in ("cat", "robot")]
    table = evaluate.main([
        "--concept", "cat_toy", "--textual_inversion_weight", files[0], "--other_weight", files[1],
        "--num_pictures", "1", "--sample_step", "1", "--json", str(tmp_path / "scores.json"),
        "--device_target", "CPU",
    ])  # fmt: skip
    rows = ["learned word", "oracle prompt", "class word", "untrained word", "word <robot>", "autoencoder"]
    assert list(table) == [*rows, "real renders"]

    written = json.loads((tmp_path / "scores.json").read_text())
    assert (written["concept"], written["word"]) == (CAT.name, "<cat>")
    assert written["rows"]["real renders"]["fidelity"] == {"mean": 1, "low": 1, "high": 1, "pictures": 1}
    assert written["rows"]["learned word"]["fidelity"]["mean"] == 0
    printed = capsys.readouterr().out
    assert all(row in printed for row in rows) and "100% [100%, 100%]" in printed

    texts = {text for batch, _ in engine.batches for text in batch["txt"]}
    assert {"a photo of a <cat>", "a photo of a <untrained>", "a photo of a toy"} <= texts


def test_the_table_compares_with_the_oracle_prompt():
    table = measure({"learned word": "<cat>", "oracle prompt": "<cat>"}, drawer(CAT, "<cat>"))
    assert evaluate.format_table(table).endswith("fidelity is 100% of the oracle prompt's.")


def test_no_pictures_at_all_are_refused(capsys):
    flags = ["--concept", "cat_toy", "--textual_inversion_weight", "x", "--num_pictures", "0"]
    with pytest.raises(SystemExit):
        evaluate.parse_args(flags)
    assert "--num_pictures 0: at least 1" in capsys.readouterr().err
