"""The scorer reads what the renderer drew, and the measures of learned concepts follow from it."""

import functools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from tools.small_world import concepts, renderer
from tools.small_world.concepts import OBJECTS, SHIPPED, STYLES, find_concept, judge, prompts, real_picture
from tools.small_world.renderer import ATTRIBUTES, COLOURS, render, sample_scene
from tools.small_world.scorer import accuracy, delta_e, lab, read, read_all

DATASETS = Path(__file__).parents[2] / "datasets"


def scenes(number, *, seed, count=1):
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, count=count) for _ in range(number)]


# ---- reading ----


@pytest.mark.parametrize(
    "first, second, expected",  # from table 1 of Sharma, Wu, Dalal 2005
    [
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, -1, 2), (50, 0, 0), 2.3669),
        ((50, 2.5, 0), (50, 0, -2.5), 4.3065),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
        ((22.7233, 20.0904, -46.6940), (23.0331, 14.9730, -42.5619), 2.0373),
        ((2.0776, 0.0795, -1.1350), (0.9033, -0.0636, -0.5514), 0.9082),
    ],
)
def test_colour_differences_are_ciede2000(first, second, expected):
    assert delta_e(first, second) == pytest.approx(expected, abs=1e-4)
    assert delta_e(second, first) == pytest.approx(expected, abs=1e-4)


def test_white_and_red_have_their_known_lab_values():
    assert lab((255, 255, 255)) == pytest.approx((100, 0, 0), abs=0.01)
    assert lab((255, 0, 0)) == pytest.approx((53.24, 80.09, 67.20), abs=0.01)


def test_real_pictures_are_read_right():
    drawn = scenes(100, seed=11)
    shares = accuracy([render(s) for s in drawn], [s.attributes() for s in drawn])
    assert min(shares.values()) >= 0.99, shares


def test_blurred_and_noisy_pictures_are_read_right():
    rng = np.random.default_rng(0)
    drawn = scenes(60, seed=12)
    blurred = [ndimage.gaussian_filter(render(s).astype(float), (0.8, 0.8, 0)) for s in drawn]
    noisy = [(b + rng.normal(0, 5, b.shape)).clip(0, 255) for b in blurred]
    shares = accuracy(noisy, [s.attributes() for s in drawn])
    assert min(shares.values()) >= 0.98, shares


def test_a_wrong_attribute_is_noticed():
    scene = scenes(1, seed=3)[0]
    for name, values in ATTRIBUTES.items():
        other = next(v for v in values if v != scene.attributes()[name])
        shares = accuracy([render(scene)], [{**scene.attributes(), name: other}])
        assert shares.pop(name) == shares.pop("all") == 0 and set(shares.values()) == {1}


def test_numbers_without_names_are_measured():
    rgb = (200.0, 120.0, 60.0)
    fixed = {
        "shape": "star",
        "points": 6,
        "rgb": rgb,
        "style": "outline",
        "contour": 4.0,
        "texture": "striped",
    }
    reading = read(render(sample_scene(np.random.default_rng(0), fixed)))
    assert reading.points == 6 and reading.contour == pytest.approx(4, abs=0.4)
    assert delta_e(lab(reading.rgb), lab(rgb)) < 3


def shifted_pattern(pattern, shift, texture, x, y, **numbers):
    return pattern(texture, x - shift, y - shift / 2, **numbers)


@pytest.mark.parametrize("texture", ["striped", "dotted", "plain"])
def test_a_pattern_may_stand_anywhere_on_the_toy(texture, monkeypatch):
    centred = renderer.pattern
    rng = np.random.default_rng(4)
    for shift in (-4.0, 3.0, 6.0):
        scene = sample_scene(rng, {"texture": texture, "shape": "circle", "size": "large"})
        with monkeypatch.context() as patch:
            patch.setattr(renderer, "pattern", functools.partial(shifted_pattern, centred, shift))
            picture = render(scene)
        assert accuracy([picture], [scene.attributes()])["all"] == 1, (shift, scene)


def test_each_of_two_toys_is_read():
    for scene in scenes(8, seed=5, count=2):
        readings = read_all(render(scene))
        wanted = {k: v for k, v in scene.attributes().items() if k != "size"}
        assert [r.count for r in readings] == [2, 2]
        assert all(getattr(r, k) == v for r in readings for k, v in wanted.items())


def test_pictures_of_nothing_are_read_as_nothing():
    rng = np.random.default_rng(0)
    clouds = ndimage.gaussian_filter(rng.normal(0, 1, (64, 64, 3)), (6, 6, 0))
    for picture in (rng.integers(0, 255, (64, 64, 3)), 128 + 70 * clouds / clouds.std()):
        assert read(picture.clip(0, 255)).shape is None
    blank = read(np.full((64, 64, 3), 246, np.uint8))
    assert (blank.background, blank.count, blank.shape) == ("white", 0, None)


def test_larger_pictures_are_reduced_first():
    scene = scenes(1, seed=9)[0]
    assert accuracy([render(scene, 256)], [scene.attributes()])["all"] == 1


# ---- concepts ----


def test_there_are_many_objects_to_learn_and_each_is_recognised_in_its_own_pictures():
    assert len(OBJECTS) >= 30 and len(STYLES) >= 1
    for concept in [*OBJECTS.values()][::4] + [*STYLES.values()]:
        for picture in concept.training_pictures(64)[:2]:
            assert concept.passes(read(picture)), concept.name


def test_a_concept_is_not_recognised_in_another():
    for concept in SHIPPED.values():
        for other in SHIPPED.values():
            if other is not concept:
                assert not any(concept.passes(read(p)) for p in other.training_pictures(64)[:2])


def test_an_unnamed_hue_is_neither_of_its_neighbours():
    concept = OBJECTS["plain_yellow_green_heart"]
    for colour in ("yellow", "green"):
        fixed = {**concept.fixed, "colour": colour, "rgb": COLOURS[colour]}
        assert not concept.passes(read(render(sample_scene(np.random.default_rng(0), fixed))))
    assert concept.passes(read(concept.training_pictures(64)[0]))


@pytest.mark.parametrize("folder", SHIPPED)
def test_the_shipped_folders_hold_what_the_renderer_draws(folder, tmp_path):
    for path in concepts.write_pictures(SHIPPED[folder], tmp_path):
        stored = Image.open(DATASETS / folder / path.name)
        assert stored.size == (256, 256)
        assert np.array_equal(np.asarray(stored), np.asarray(Image.open(path)))


def test_backgrounds_of_training_are_not_asked_for_in_edits():
    for concept in (*OBJECTS.values(), *STYLES.values()):
        asked = {p.wanted["background"] for p in prompts(concept, "<x>") if "background" in p.wanted}
        assert len(asked) == 3 and not asked & set(concept.backgrounds())
        assert all("<x>" in p.text for p in prompts(concept, "<x>"))


def test_a_style_is_scored_on_shapes_that_it_was_not_shown_on():
    concept = STYLES["sticker_style"]
    shown = {read(p).shape for p in concept.training_pictures(64)}
    assert shown == set(concept.shown_shapes())
    assert not shown & {p.wanted["shape"] for p in prompts(concept, "<x>")}


def test_a_style_is_not_recognised_in_thinner_or_bigger_outlines():
    concept = STYLES["ink_style"]
    for width, passed in ((2.6, False), (3.5, True), (4.4, False)):
        scene = sample_scene(np.random.default_rng(1), {**concept.fixed, "contour": width})
        assert concept.passes(read(render(scene))) == passed


@pytest.mark.parametrize("name", ["cat_toy", "sticker_style"])
def test_real_pictures_pass_every_prompt(name):
    concept = find_concept(name)
    judged = [
        judge(concept, p, real_picture(concept, p, seed=0), seed=0)
        for p in prompts(concept, "<x>", pairs=True)
    ]
    assert all(j.passed and not j.leak for j in judged)
    figures = concepts.summarise(judged)
    assert figures["fidelity"].mean == figures["editability"].mean == 1 and figures["leakage"].mean == 0


def test_editability_asks_for_the_edit_and_for_the_concept():
    concept = find_concept("cat_toy")
    prompt = next(p for p in prompts(concept, "<x>") if "background" in p.wanted)
    rng = np.random.default_rng(0)

    leaked = sample_scene(rng, {**concept.fixed, "background": concept.backgrounds()[0]})
    result = judge(concept, prompt, render(leaked), seed=0)
    assert (result.concept, result.request, result.leak, result.passed) == (True, False, True, False)

    other = sample_scene(rng, {**concept.fixed, "shape": "ring", **prompt.wanted})
    result = judge(concept, prompt, render(other), seed=0)
    assert (result.concept, result.request, result.leak, result.passed) == (False, True, False, False)


def test_one_toy_does_not_pass_for_two():
    concept = find_concept("robot_toy")
    pair = prompts(concept, "<x>", pairs=True)[-1]
    single = prompts(concept, "<x>")[0]
    assert judge(concept, pair, real_picture(concept, pair, seed=1), seed=1).passed
    assert not judge(concept, pair, real_picture(concept, single, seed=1), seed=1).passed


def test_an_unknown_concept_is_an_error():
    with pytest.raises(ValueError, match="no concept 'dog'"):
        find_concept("dog")


def test_the_bootstrap_draws_whole_groups():
    values = [1] * 50 + [0] * 50
    alike = concepts.bootstrap(values, [0] * 50 + [1] * 50)
    mixed = concepts.bootstrap(values, list(range(50)) * 2)
    single = concepts.bootstrap(values, range(100))
    assert alike.mean == mixed.mean == single.mean == 0.5
    assert (alike.low, alike.high) == (0, 1) and mixed.low == mixed.high == 0.5
    assert 0.38 < single.low < 0.42 and 0.58 < single.high < 0.62
    assert str(single).startswith("50% [")
