"""A picture is decided by prompt, seed and settings, and by nothing else."""

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from gm import sampling
from gm.sampling import Part, SamplingArgs
from gm.textual_inversion.embedding_file import Embedding, write_embedding
from tests.fake_engine import FakeEngine, write_word
from tests.tiny import tiny_engine
from tests.tiny_text import tiny_conditioner

SMALL = {"height": 64, "width": 64}
FEW = SamplingArgs(**SMALL, steps=4)
STOCHASTIC = SamplingArgs(**SMALL, steps=4, sampler="EulerA")


def drawn(engine, args=FEW, prompt="a red cat", **grid):
    """Latents of one prompt, all rows together."""
    rows = list(sampling.draw(engine, [prompt], args, **{"seed": 7, **grid}))
    return np.concatenate([row.latents for row in rows])


# ---------------------------------------------------------------- what is asked for


def test_names_of_sizes_are_sgms_and_give_height_and_width():
    assert sampling.parse_size("1.0") == (1024, 1024)
    assert sampling.parse_size("1.46") == (832, 1216)
    assert sampling.parse_size("0.68") == (1216, 832)
    assert sampling.parse_size("3.0") == (576, 1728)
    assert sampling.parse_size("1.0_512") == (512, 512)
    assert sampling.parse_size("640x512") == (512, 640)
    with pytest.raises(ValueError, match="'big' is no size.*0.25, .*1.0_512.*4.0"):
        sampling.parse_size("big")


def test_all_named_sizes_have_about_a_megapixel_and_whole_latents():
    for name, (height, width) in sampling.RATIOS.items():
        SamplingArgs(height=height, width=width)
        assert float(name.partition("_")[0]) == pytest.approx(width / height, abs=0.005)
        assert "_" in name or 0.89 * 2**20 < height * width <= 2**20


@pytest.mark.parametrize("name", sampling.SAMPLERS)
def test_a_sampler_goes_by_its_name_or_its_classs(name):
    args = SamplingArgs(**SMALL, sampler=name, steps=3)
    sampler = sampling.make_sampler(args)
    by_class = SamplingArgs(**SMALL, sampler=type(sampler).__name__, steps=3)
    assert type(sampling.make_sampler(by_class)) is type(sampler) is sampling.SAMPLERS[name]
    assert np.isfinite(drawn(FakeEngine(), args)).all()


@pytest.mark.parametrize("name", sampling.DISCRETIZATIONS)
def test_every_spacing_of_noise_levels_stays_within_those_of_training(name):
    sampler = sampling.make_sampler(SamplingArgs(**SMALL, discretization=name, steps=10))
    levels = sampler.schedule()
    assert len(levels) == 11 and levels[-1] == 0
    assert 0.0291 < levels[-2] < levels[0] < 14.6147


@pytest.mark.parametrize(
    "change, said",
    [
        ({"height": 100}, "height is 100 pixels; it must be a multiple of 64"),
        ({"width": 0}, "width is 0 pixels"),
        ({"steps": 0}, "--sample_step 0"),
        ({"steps": 1001}, "1001 sampling steps"),
        ({"sampler": "Magic"}, "--sampler 'Magic' is not one of EulerEDM, HeunEDM"),
        ({"guider": "Magic"}, "--guider 'Magic' is not one of VanillaCFG"),
        ({"discretization": "Magic"}, "--discretization 'Magic' is not one of LegacyDDPM"),
        ({"sampler": "LCM", "discretization": "EDM"}, "LCMSampler needs time steps"),
        ({"guidance_scale": float("nan")}, "--guidance_scale nan"),
        ({"crop_coords_top_left": (-1, 0)}, "--crop_coords_top"),
        ({"original_size": (0, 64)}, "at least 1 pixel"),
    ],
)
def test_impossible_settings_are_named(change, said):
    with pytest.raises(ValueError, match=said):
        SamplingArgs(**{**SMALL, **change})


def test_the_models_own_size_is_its_configs():
    assert sampling.default_size({"data": {"target_size": 64}}) == (64, 64)
    assert sampling.default_size({"data": {"target_size": [512, 768]}}) == (512, 768)
    assert sampling.default_size({}) == (1024, 1024)


@pytest.mark.parametrize(
    "width, height, expected",
    [(4000, 3000, (896, 1152)), (640, 450, (448, 640)), (64, 64, (64, 64)), (30, 500, (512, 64))],
)
def test_a_picture_to_start_from_keeps_its_aspect_and_is_not_enlarged(width, height, expected):
    assert sampling.size_like(Image.new("RGB", (width, height)), (1024, 1024)) == expected


def test_prompts_are_a_text_or_the_lines_of_a_file(tmp_path):
    assert sampling.read_prompts("a cat") == ["a cat"]
    assert sampling.read_prompts("a long text " * 100) == ["a long text " * 100]  # longer than any file name
    file = tmp_path / "prompts"
    file.write_text("a <toy> at night\n\n  眠る猫 \n", encoding="utf-8")
    assert sampling.read_prompts(str(file)) == ["a <toy> at night", "眠る猫"]
    file.write_text("\n \n")
    with pytest.raises(ValueError, match="holds no prompts"):
        sampling.read_prompts(str(file))
    file.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match="not a text file"):
        sampling.read_prompts(str(file))
    with pytest.raises(FileNotFoundError, match="prompts.txt': there is no such file"):
        sampling.read_prompts("prompts.txt")


# ---------------------------------------------------------------- seeds, batches, noise


@pytest.mark.parametrize("args", [FEW, STOCHASTIC], ids=["deterministic", "stochastic"])
def test_a_seed_gives_the_same_picture_in_any_grid(args):
    engine = FakeEngine()
    row = drawn(engine, args, num_cols=4)
    np.testing.assert_array_equal(row, drawn(engine, args, num_rows=2, num_cols=2))
    for i, seed in enumerate(range(7, 11)):
        np.testing.assert_array_equal(row[i : i + 1], drawn(engine, args, seed=seed))
    assert len({latents.tobytes() for latents in row}) == 4


def test_a_prompt_draws_the_same_beside_others():
    engine = FakeEngine()
    rows = list(sampling.draw(engine, ["a dog " * 60, "a red cat"], FEW, seed=7, num_cols=2))
    assert [row.prompt for row in rows] == ["a dog " * 60, "a red cat"]
    assert [row.seeds for row in rows] == [[7, 8], [7, 8]]
    np.testing.assert_array_equal(rows[1].latents, drawn(engine, num_cols=2))


def test_given_noise_takes_the_place_of_the_first_only():
    engine = FakeEngine()
    own = np.stack([np.random.default_rng(s).standard_normal((4, 8, 8), dtype=np.float32) for s in (7, 8)])
    expected = drawn(engine, STOCHASTIC, num_cols=2)
    given = drawn(engine, STOCHASTIC, num_rows=2, first_noise=own)
    np.testing.assert_array_equal(given, expected)
    other = drawn(engine, STOCHASTIC, num_rows=2, first_noise=own + 0.1)
    assert np.abs(other - expected).min(axis=(1, 2, 3)).max() > 0


def test_guidance_doubles_the_networks_batch_and_a_scale_of_1_does_not():
    for args, rows in (
        (FEW, 4),
        (SamplingArgs(**SMALL, steps=4, guidance_scale=1), 2),
        (SamplingArgs(**SMALL, steps=4, guider="IdentityGuider"), 2),
        (SamplingArgs(**SMALL, steps=4, guider="DynamicThresholding"), 4),
    ):
        engine = FakeEngine()
        drawn(engine, args, num_cols=2)
        assert engine.calls == [(rows, 4, 8, 8)] * 4


# ---------------------------------------------------------------- img2img and the refiner


def picture_of(*colour):
    return Image.new("RGB", (200, 150), colour)


def test_strength_0_keeps_a_picture_and_more_loses_more_of_it():
    engine = FakeEngine()
    init = sampling.encode_picture(engine, picture_of(255, 0, 255), FEW)
    np.testing.assert_allclose(init[0, :, 0, 0], [1, -1, 1, 1], atol=0.01)
    moved = [np.abs(drawn(engine, part=Part(init, strength)) - init).mean() for strength in (0, 0.4, 0.9)]
    assert moved[0] == 0 and 1e-3 < moved[1] < moved[2]


@pytest.mark.parametrize("strength, steps", [(0.0, 0), (0.4, 1), (0.75, 2), (1.0, 4)])
def test_strength_says_how_many_of_the_steps_are_gone(strength, steps):
    engine = FakeEngine()
    drawn(engine, part=Part(np.zeros((1, 4, 8, 8), np.float32), strength))
    assert len(engine.calls) == steps == sampling.num_steps(FEW, Part(strength=strength))


def test_a_refiner_that_is_the_base_itself_changes_nothing():
    args = SamplingArgs(**SMALL, steps=10)
    engine = FakeEngine()
    rows = list(sampling.draw(engine, ["a red cat"], args, seed=7, num_cols=2, part=Part(stop=0.3)))
    assert len(engine.calls) == 8  # shares are counted in levels: 0.3 of 11 are 3, between which lie 2 steps
    refined = list(sampling.refine(engine, rows, args, strength=0.3, add_noise=False))
    assert len(engine.calls) == 10
    assert refined[0].seeds == [7, 8] and refined[0].prompt == "a red cat"
    np.testing.assert_allclose(refined[0].latents, drawn(engine, args, num_cols=2), atol=1e-5)


def test_a_refiner_that_goes_back_adds_noise_of_its_own_to_each_picture():
    engine = FakeEngine()
    rows = list(sampling.draw(engine, ["a red cat"], FEW, seed=7, num_cols=2))
    (refined,) = sampling.refine(engine, rows, FEW, strength=0.5, add_noise=True)
    assert np.abs(refined.latents - rows[0].latents).mean() > 1e-3
    alone = list(sampling.draw(engine, ["a red cat"], FEW, seed=8))
    (alone,) = sampling.refine(engine, alone, FEW, strength=0.5, add_noise=True)
    np.testing.assert_array_equal(alone.latents[0], refined.latents[1])


# ---------------------------------------------------------------- conditioning


def test_an_empty_negative_prompt_is_zeros_for_the_base_and_text_for_the_refiner():
    given = SamplingArgs(**SMALL, negative_prompt="ugly", aesthetic_score=7.0)
    for kind, args, zero in (("base", FEW, True), ("base", given, False), ("refiner", FEW, False)):
        engine = FakeEngine(kind=kind)
        sampling.condition(engine, "a red cat", args)
        ((batch, zero_text),) = engine.batches
        assert batch["txt"] == ["a red cat", args.negative_prompt]
        assert zero_text == [False, zero]
        assert batch["aesthetic_score"] == [(args.aesthetic_score,), (2.5,)]


def test_sizes_are_the_pictures_unless_given():
    engine = FakeEngine()
    sampling.condition(engine, "", SamplingArgs(height=128, width=64))
    sampling.condition(
        engine, "", SamplingArgs(original_size=(1, 2), crop_coords_top_left=(3, 4), target_size=(5, 6))
    )
    keys = ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")
    assert [[batch[key] for key in keys] for batch, _ in engine.batches] == [
        [[(128, 64)] * 2, [(0, 0)] * 2, [(128, 64)] * 2],
        [[(1, 2)] * 2, [(3, 4)] * 2, [(5, 6)] * 2],
    ]


def test_a_long_prompt_lengthens_the_negative_one_with_it():
    cond, uncond = sampling.condition(FakeEngine(), "a red cat " * 40, FEW)
    assert cond["crossattn"].shape[1] == uncond["crossattn"].shape[1] == 2 * 77
    cond, uncond = sampling.condition(FakeEngine(), "a cat", SamplingArgs(negative_prompt="a red dog " * 60))
    assert cond["crossattn"].shape[1] == uncond["crossattn"].shape[1] == 3 * 77


# ---------------------------------------------------------------- learned words


def test_words_of_several_files_are_known_afterwards_each_with_its_own_rows(tmp_path):
    conditioner = tiny_conditioner()
    files = [
        write_word(tmp_path / "SD-XL-base-1.0_3_ti.ckpt", "<toy>", seed=1),
        write_word(tmp_path / "<style>.safetensors", "<style>", num_vectors=3, format="webui", seed=2),
    ]
    words = sampling.read_words(conditioner, files, num_vectors=[2, 3])
    assert [word.token for word in words] == ["<toy>", "<style>"]
    sampling.add_words(conditioner, words)
    for embedder, name in zip(conditioner.text_embedders, ("clip_l", "clip_g"), strict=True):
        assert len(embedder.tokenizer.ids("<Toy> in <style>")) == 2 + 1 + 3
        expected = np.concatenate([getattr(word, name) for word in words])
        np.testing.assert_array_equal(embedder.token_embedding.learned.asnumpy(), expected)


def test_a_refiner_takes_its_encoders_half_of_a_word(tmp_path):
    conditioner = tiny_conditioner(kind="refiner")
    words = sampling.read_words(conditioner, [write_word(tmp_path / "word.ckpt")])
    sampling.add_words(conditioner, words)
    (embedder,) = conditioner.text_embedders
    np.testing.assert_array_equal(embedder.token_embedding.learned.asnumpy(), words[0].clip_g)


def test_a_word_can_be_called_otherwise(tmp_path):
    (word,) = sampling.read_words(tiny_conditioner(), [write_word(tmp_path / "w.ckpt")], tokens=["<other>"])
    assert word.token == "<other>"


@pytest.mark.parametrize(
    "change, flags, said",
    [
        ({"widths": (768, 1280)}, {}, "768 and 1280 wide.*32 and 48"),
        ({}, {"num_vectors": [4, 4]}, "--num_vectors 4, but .*a.ckpt holds 2 vectors"),
        ({}, {"num_vectors": [4]}, "--num_vectors has 1 values for 2"),
        ({}, {"tokens": ["<x>"]}, "--placeholder_token has 1 values for 2"),
        ({}, {"tokens": ["<x>", "<X>"]}, "both hold '<X>'"),
        ({}, {"tokens": ["<x>", "cat"]}, "'cat' is already a CLIP token"),
    ],
)
def test_words_that_cannot_be_used_are_refused_before_anything_is_added(tmp_path, change, flags, said):
    conditioner = tiny_conditioner()
    files = [write_word(tmp_path / f"{name}.ckpt", f"<{name}>", **change) for name in "ab"]
    with pytest.raises(ValueError, match=said):
        sampling.read_words(conditioner, files, **flags)
    assert all(not embedder.tokenizer.placeholders for embedder in conditioner.text_embedders)


def test_words_that_no_prompt_uses_and_words_that_were_not_learned_are_warned_of(tmp_path, caplog):
    conditioner = tiny_conditioner()
    files = [write_word(tmp_path / f"{name}.ckpt", f"<{name}>") for name in ("toy", "style")]
    sampling.add_words(conditioner, sampling.read_words(conditioner, files))
    with caplog.at_level(logging.WARNING):
        sampling.warn_about_words(conditioner, ["a (<TOY>:1.3) beside a <car>", ""])
    assert caplog.messages == [
        "The learned word '<style>' is in no prompt.",
        "'<car>' in a prompt is no learned word and is read as it stands.",
    ]


# ---------------------------------------------------------------- files


def test_a_png_tells_how_it_was_made(tmp_path):
    args = SamplingArgs(**SMALL, negative_prompt="blur")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    text = sampling.png_text("眠る <toy>", 7, args, {"weight": "w.ckpt"})
    sampling.save_png(tmp_path / "a.png", pixels, text)
    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)
        text = image.text
    assert (text["prompt"], text["negative_prompt"], text["seed"]) == ("眠る <toy>", "blur", "7")
    settings = json.loads(text["settings"])
    assert settings["weight"] == "w.ckpt" and settings["sampler"] == "EulerEDM" and settings["width"] == 64


def test_a_grid_is_read_like_a_page():
    pictures = [np.full((2, 3, 3), i, np.uint8) for i in range(6)]
    grid = sampling.make_grid(pictures, 3)
    assert grid.shape == (4, 9, 3)
    assert grid[::2, ::3, 0].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_numbers_of_pictures_go_on_where_they_stopped(tmp_path):
    assert sampling.next_number(tmp_path) == 1
    for name in ("0009_01_seed4.png", "0010_grid.png", "12.png", "cat_99.png", "0011_grid.txt"):
        (tmp_path / name).touch()
    assert sampling.next_number(tmp_path) == 11


def test_a_picture_of_nan_is_an_error_and_not_black():
    latents = np.zeros((2, 4, 8, 8), np.float32)
    assert sampling.decode(FakeEngine(), latents).shape == (2, 64, 64, 3)
    latents[1, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        sampling.decode(FakeEngine(), latents)


def test_all_brightnesses_are_reached():
    ramp = np.linspace(-1, 1, 256, dtype=np.float32)
    engine = SimpleNamespace(decode=lambda latents: np.broadcast_to(ramp, (1, 3, 1, 256)))
    pixels = sampling.decode(engine, np.zeros((1, 4, 1, 1), np.float32))
    assert pixels[0, 0, :, 0].tolist() == list(range(256))


# ---------------------------------------------------------------- the tiny SDXL


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """The tiny SDXL with two learned words: <toy>, and <twin>, whose rows are those of the word "cat"."""
    engine = tiny_engine()
    folder = tmp_path_factory.mktemp("words")
    rows = []
    for embedder in engine.conditioner.text_embedders:
        (cat,) = embedder.tokenizer.ids("cat")
        rows.append(embedder.token_embedding.weight.asnumpy()[[cat]])
    write_embedding(folder / "twin.safetensors", Embedding("<twin>", *rows), format="webui")
    files = [write_word(folder / "toy.ckpt"), folder / "twin.safetensors"]
    words = sampling.read_words(engine.conditioner, files, tokens=["<toy>", "<twin>"])
    sampling.add_words(engine.conditioner, words)
    return engine


def pictures(engine, prompt, *, negative_prompt="", **grid):
    args = SamplingArgs(**SMALL, steps=2, negative_prompt=negative_prompt)
    return sampling.decode(engine, drawn(engine, args, prompt, **grid)).astype(int)


def test_a_learned_word_draws_what_its_rows_say(engine):
    cat, twin, toy = (pictures(engine, f"a photo of a {word}") for word in ("cat", "<twin>", "<toy>"))
    assert cat.shape == (1, 64, 64, 3) and cat.std() > 5
    np.testing.assert_array_equal(twin, cat)
    assert np.abs(toy - cat).max() > 1


def test_a_learned_word_counts_in_negative_prompts_and_with_weights(engine):
    cat = pictures(engine, "a red dog", negative_prompt="(cat:1.4), blur")
    np.testing.assert_array_equal(pictures(engine, "a red dog", negative_prompt="(<twin>:1.4), blur"), cat)
    assert np.abs(pictures(engine, "a red dog") - cat).max() > 1
    assert np.abs(pictures(engine, "a red dog", negative_prompt="cat, blur") - cat).max() > 1


def test_pictures_do_not_depend_on_the_batch_beyond_rounding(engine):
    together = pictures(engine, "a photo of a <toy>", num_cols=2)
    compiled = len(engine.model.diffusion_model.compile_cache)
    alone = pictures(engine, "a photo of a <toy>", num_rows=2)
    assert np.abs(together[0] - together[1]).max() > 10
    assert np.abs(together - alone).max() <= 1
    pictures(engine, "a drawing of a <twin> and a red dog", num_cols=2)
    assert (
        len(engine.model.diffusion_model.compile_cache) <= compiled + 1
    )  # a graph a shape, whatever the prompt


def test_the_unconditional_half_has_zeros_for_text_and_the_prompts_sizes(engine):
    cond, uncond = sampling.condition(engine, "a <toy>", SamplingArgs(**SMALL))
    assert not uncond["crossattn"].any() and not uncond["vector"][:, :48].any()
    np.testing.assert_array_equal(uncond["vector"][:, 48:], cond["vector"][:, 48:])
    assert cond["crossattn"].shape == (1, 77, 80) and cond["crossattn"].all()
