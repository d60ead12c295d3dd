"""The small world: pictures from attributes, captions for them, and a tokenizer for the captions."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from transformers import CLIPTokenizer

from gm.textual_inversion.templates import BUILT_IN, fill
from tools.small_world import captions, renderer, tokenizer
from tools.small_world.draw import contact_sheet, pretraining_batch
from tools.small_world.renderer import (
    ATTRIBUTES,
    BACKGROUNDS,
    SHAPES,
    SIDE,
    pretraining_scene,
    render,
    sample_scene,
)

SHIPPED_TOKENIZER = Path(__file__).parents[2] / "checkpoints" / "sd_xl_small_tokenizer"


@pytest.fixture(scope="module")
def clip_tokenizer():
    return CLIPTokenizer.from_pretrained(str(SHIPPED_TOKENIZER))


# ---- pictures ----


def test_a_picture_depends_on_its_seed_and_index_only():
    pictures, said, _ = pretraining_batch(3, range(6))
    again, said_again, _ = pretraining_batch(3, [5, 4])
    assert np.array_equal(pictures[[5, 4]], again) and [said[5], said[4]] == said_again
    assert not np.array_equal(pictures, pretraining_batch(4, range(6))[0])


def test_pictures_are_uint8_and_their_edge_is_plain_background():
    for count in (1, 2):
        for seed in range(100):
            scene = sample_scene(np.random.default_rng(seed), count=count)
            picture = render(scene)
            assert picture.shape == (SIDE, SIDE, 3) and picture.dtype == np.uint8
            edge = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
            assert np.abs(edge.astype(int) - BACKGROUNDS[scene.background]).max() <= 1, scene


def test_a_larger_picture_shows_the_same():
    scene = pretraining_scene(0, 8)
    large = render(scene, 256).reshape(64, 4, 64, 4, 3).mean((1, 3))
    assert np.abs(large - render(scene)).mean() < 1.5


def test_every_shape_fills_its_box_and_outlines_follow_it_at_equal_distance():
    axis = np.linspace(-2, 2, 401)
    for shape in SHAPES:
        for points in (4, 5, 6) if shape == "star" else (5,):
            d = renderer.distance(shape, axis[None], axis[:, None], points=points)
            reach = np.maximum(*np.abs(np.meshgrid(axis, axis)))[d < 0].max()
            assert (0.8 if shape == "square" else 0.93) < reach <= 1, shape
            slope = np.hypot(*np.gradient(d, axis[1] - axis[0]))[(d > 0.05) & (d < 0.2)]
            assert np.percentile(slope, 5) > 0.9 and slope.max() < 1.1, shape


def test_fixed_attributes_hold_and_leave_the_others_as_they_were():
    free = sample_scene(np.random.default_rng(1))
    fixed = sample_scene(np.random.default_rng(1), {"colour": "teal", "background": "sand"})
    assert fixed.attributes() == {**free.attributes(), "colour": "teal", "background": "sand"}
    with pytest.raises(ValueError, match="background 'beach' is unknown; choose one of white"):
        sample_scene(np.random.default_rng(1), {"background": "beach"})


def test_pretraining_is_balanced_and_never_draws_what_is_held_out():
    scenes = [pretraining_scene(0, i).attributes() for i in range(4000)]
    assert not any(renderer.is_held_out(a) or renderer.is_gate(a) for a in scenes)
    assert not any(3 < pretraining_scene(0, i).contour < 4 for i in range(1000))
    for name, values in ATTRIBUTES.items():
        shares = Counter(a[name] for a in scenes)
        assert all(abs(shares[v] / len(scenes) * len(values) - 1) < 0.25 for v in values), (name, shares)


def test_each_value_is_held_out_equally_often():
    held_out = renderer.held_out_combinations()
    assert len(held_out) == 32
    for name in ("shape", "colour", "texture"):
        assert set(Counter(a[name] for a in held_out).values()) == {32 // len(ATTRIBUTES[name])}


def test_gate_captions_are_new_and_no_concepts():
    asked = captions.gate_attributes(50, seed=1)
    assert all(renderer.is_gate(a) and not renderer.is_held_out(a) for a in asked)
    assert asked == captions.gate_attributes(50, seed=1) and asked[:9] != captions.gate_attributes(9, seed=2)


def test_a_contact_sheet_holds_every_picture():
    pictures, _, _ = pretraining_batch(0, range(5))
    sheet = np.asarray(contact_sheet(pictures, columns=3, zoom=1))
    assert sheet.shape == (130, 196, 3)
    assert np.array_equal(sheet[66:, 66:130], pictures[4])


# ---- captions ----


def test_captions_say_nothing_wrong_and_leave_each_attribute_out_sometimes():
    rng = np.random.default_rng(0)
    said, empty = Counter(), 0
    for index in range(3000):
        scene = pretraining_scene(0, index)
        text = captions.caption(scene, rng)
        empty += text == ""
        # "a print of a ...", "in the style of ..." hold no attribute's word by themselves
        for name, values in ATTRIBUTES.items():
            right, words = scene.attributes()[name], set(re.findall("[a-z]+", text))
            whole = bool(re.search(rf"\b{right}\b", text))
            named = words & set(" ".join(values).split()) - {"and"}
            assert named == (set(right.split()) - {"and"} if whole else set()), text
            said[name] += whole
    assert 0.08 < empty / 3000 < 0.12
    for name, times in said.items():  # templates for styles name no toy
        assert 0.65 < times / (3000 - empty) < 0.85, (name, said)


def test_only_big_outlines_are_said_to_be_big():
    rng = np.random.default_rng(0)
    thin, big = (sample_scene(rng, {"style": "outline", "contour": width}) for width in (2.5, 4.5))
    said = [captions.caption(scene, rng, drop=0, empty=0) for scene in (thin, big) for _ in range(100)]
    assert not any("big" in text for text in said[:100])
    assert 30 < sum("big outline" in text for text in said[100:]) < 70


def test_captions_of_two_toys_say_so():
    scene = sample_scene(np.random.default_rng(0), {"shape": "cross"}, count=2)
    rng = np.random.default_rng(0)
    said = [captions.caption(scene, rng, drop=0, empty=0) for _ in range(50)]
    assert all(
        "two" in text and "crosses" in text and not {"small", "large"} & set(text.split()) for text in said
    )


def test_the_full_caption_names_everything():
    attributes = dict(
        shape="star", colour="orange", texture="dotted", size="small", background="sky", style="shadow"
    )
    text = "a photo of a small dotted orange star on a sky background in the style of shadow"
    assert captions.full_caption(attributes) == text
    assert captions.full_caption({"colour": "orange", "shape": "star"}) == "a photo of an orange star"


# ---- tokenizer ----


def test_the_shipped_tokenizer_is_what_the_script_builds(tmp_path):
    size = tokenizer.build(tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_text() == (SHIPPED_TOKENIZER / file.name).read_text(), file.name
    assert len(json.loads((tmp_path / "vocab.json").read_text())) == size


def test_each_word_of_the_world_is_one_token(clip_tokenizer):
    split = [word for word in captions.words() if len(clip_tokenizer(word).input_ids) != 3]
    assert not split


def test_any_text_can_be_tokenized_and_read_back(clip_tokenizer):
    text = "größe 🐱 qwertz 12,5 <cat-toy>!"
    ids = clip_tokenizer(text).input_ids
    size = len(clip_tokenizer)
    assert (ids[0], ids[-1]) == (size - 2, size - 1) and max(ids[1:-1]) < size - 2
    assert clip_tokenizer.decode(ids[1:-1]).replace(" ", "") == text.replace(" ", "")
    assert clip_tokenizer.convert_ids_to_tokens(0) == "!"


def test_twenty_vectors_fit_into_the_longest_prompt(clip_tokenizer):
    ending = " on a lavender background in the style of outline and shadow"
    longest = max(
        len(clip_tokenizer(fill(t, "") + ending).input_ids) for group in BUILT_IN.values() for t in group
    )
    assert longest + 20 <= tokenizer.CONTEXT_LENGTH == clip_tokenizer.model_max_length
