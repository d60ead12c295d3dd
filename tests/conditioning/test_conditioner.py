"""The conditioner's parts have the original names, the right order and the right numbers."""

import json

import numpy as np
import pytest
from mindspore import Tensor

from gm.conditioning.conditioner import GeneralConditioner, weigh
from gm.conditioning.embedders import ConcatTimestepEmbedderND, FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder2
from gm.models.layers import file_layouts
from gm.textual_inversion.concept import add_concept
from tests.tiny import SDXL, TINY, TOKENIZER, VOCAB, file_shapes
from tests.tiny_text import build_conditioner, sizes, tiny_conditioner

L, G = TINY["base"].clip_l.width, TINY["base"].clip_g.width
LENGTH = 12  # short prompts compile and run faster
UNUSED = ("position_ids", "logit_scale")


@pytest.fixture(scope="module")
def conditioner():
    """One for all tests, since each compiles once. It knows the word <cat>, of two vectors."""
    conditioner = tiny_conditioner(max_length=LENGTH)
    rng = np.random.default_rng(1)
    rows = [0.2 * rng.standard_normal((2, width)) for width in (L, G)]
    add_concept(conditioner, token="<cat>", initializer=rows)
    return conditioner


def batch(*texts):
    return {"txt": list(texts), **sizes(len(texts))}


@pytest.fixture
def full_size_tokenizer(tmp_path):
    vocab = {f"token{i}": i for i in range(49406)} | {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    return tmp_path


@pytest.mark.parametrize("kind", ["base", "refiner"])
def test_names_and_shapes_are_those_of_the_original_files(kind, full_size_tokenizer):
    conditioner = build_conditioner(SDXL[kind], kind=kind, version=full_size_tokenizer)
    own = {f"conditioner.{name}": layout.shape for name, layout in file_layouts(conditioner).items()}
    real = file_shapes(SDXL[kind])
    used = [name for name in real if name.startswith("conditioner.") and not name.endswith(UNUSED)]
    assert own == {name: real[name] for name in used}
    assert {f"conditioner.{parameter.name}" for parameter in conditioner.get_parameters()} == set(used)


def test_vector_is_pooled_original_crop_target_and_context_is_clip_l_clip_g(conditioner):
    data = batch("a photo of <cat>, my toy", "")
    before = conditioner.encode(data)
    assert before[0].shape == (2, G + 6 * 256) and before[1].shape == (2, LENGTH, L + G)

    def changed():
        """Which columns of the vector and of the context are other than before."""
        after = conditioner.encode(data)
        return [sorted(set(np.nonzero(a != b)[-1])) for a, b in zip(after, before, strict=True)]

    for number, columns in ((0, [[], [*range(L)]]), (1, [[*range(G)], [*range(L, L + G)]])):
        (positions,) = [p for p in conditioner.embedders[number].get_parameters() if "position" in p.name]
        values = positions.asnumpy().copy()
        positions.set_data(Tensor(values * 2))
        assert changed() == columns
        positions.set_data(Tensor(values))
    for i, key in enumerate(("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")):
        for axis in range(2):
            numbers = np.array(data[key])
            data[key] = numbers + [[axis == 0, axis == 1]]
            start = G + 512 * i + 256 * axis
            vector, context = changed()
            assert context == [] and len(vector) > 100 and set(vector) <= {*range(start, start + 256)}
            data[key] = numbers


def test_size_numbers_are_exact_waves_cosines_first(mode):
    numbers = np.array([[4031.0, 1.0]])
    embedder = ConcatTimestepEmbedderND(outdim=256, input_key="original_size_as_tuple")
    (waves,) = embedder(Tensor(embedder.prepare(numbers)))
    frequencies = np.exp(-np.log(10000) * np.arange(128) / 128)
    expected = [np.concatenate([np.cos(n * frequencies), np.sin(n * frequencies)]) for n in numbers[0]]
    np.testing.assert_allclose(waves.asnumpy()[0], np.concatenate(expected), atol=4e-4)


def test_the_refiner_has_one_text_encoder_and_an_aesthetic_score(mode):
    refiner = tiny_conditioner(kind="refiner", max_length=LENGTH)
    low, high = ({"txt": ["a cat"], **sizes(1, kind="refiner"), "aesthetic_score": [[s]]} for s in (2.5, 6.0))
    vector, context = refiner.encode(low)
    assert vector.shape == (1, G + 5 * 256) and context.shape == (1, LENGTH, G)
    changed = np.flatnonzero(vector != refiner.encode(high)[0])
    assert changed.min() >= G + 4 * 256 and changed.size > 200


# ---------------------------------------------------------------- encoding for sampling


def test_a_prompt_without_weights_is_encoded_as_in_training(conditioner):
    data = batch("a photo of <cat>, my toy", "")
    trained = [output.asnumpy() for output in conditioner(*map(Tensor, conditioner.prepare(data)))]
    for ours, theirs in zip(conditioner.encode(data), trained, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_weights_scale_the_tokens_of_each_encoder_and_keep_its_mean(conditioner):
    plain_vector, plain = conditioner.encode(batch("a red <cat> toy", "a cat"))
    vector, weighed = conditioner.encode(batch("a (red <cat>:1.5) toy", "a cat"))
    np.testing.assert_array_equal(vector, plain_vector)
    np.testing.assert_array_equal(weighed[1], plain[1])
    weights = np.array([1, 1, 1.5, 1.5, 1.5] + [1] * 7)[
        :, None
    ]  # start, a, red, two vectors of <cat>, toy ...
    for own in (slice(0, L), slice(L, L + G)):
        states = plain[0, :, own] * weights
        expected = states * plain[0, :, own].mean() / states.mean()
        np.testing.assert_allclose(weighed[0, :, own], expected, rtol=1e-3, atol=1e-4)


def test_weighing_a_prompt_does_not_depend_on_its_batch():
    rng = np.random.default_rng(0)
    context = rng.standard_normal((2, 2 * 5, 3)).astype(np.float32)
    weights = rng.uniform(0.5, 1.5, (2, 2, 5)).astype(np.float32)
    together = weigh(context, weights)
    np.testing.assert_array_equal(together[1:], weigh(context[1:], weights[1:]))
    np.testing.assert_array_equal(together[1:, 5:], weigh(context[1:, 5:], weights[1:, 1:]))
    np.testing.assert_array_equal(weigh(context, np.ones_like(weights)), context)


def test_long_prompts_are_chunks_side_by_side_with_the_first_ones_pooled_vector(conditioner, mode):
    first, second = "a photo of a red cat on the beach ,", "my <cat> toy"
    vector, context = conditioner.encode(batch(first + " " + second))
    vectors, contexts = conditioner.encode(batch(first, second))
    assert context.shape == (1, 2 * LENGTH, L + G)
    np.testing.assert_allclose(context[0], np.concatenate(contexts), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(vector[0], vectors[0], rtol=1e-4, atol=1e-4)


def test_zeroed_text_keeps_its_sizes(conditioner):
    vector, context = conditioner.encode(batch("", "a cat"))
    zero_vector, zero_context = conditioner.encode(batch("", "a cat"), zero_text=[True, False])
    assert not zero_context[0].any() and not zero_vector[0, :G].any()
    np.testing.assert_array_equal(zero_vector[0, G:], vector[0, G:])
    np.testing.assert_array_equal(zero_vector[1], vector[1])
    np.testing.assert_array_equal(zero_context[1], context[1])


# ---------------------------------------------------------------- errors


def test_nothing_of_the_conditioner_is_trainable():
    conditioner = tiny_conditioner()
    assert len(list(conditioner.get_parameters())) > 80 and not conditioner.trainable_params()


def test_a_batch_without_a_key_names_it(conditioner):
    data = batch("a cat")
    del data["crop_coords_top_left"]
    with pytest.raises(ValueError, match="no 'crop_coords_top_left'"):
        conditioner.prepare(data)


def test_text_encoders_stand_first():
    size = ConcatTimestepEmbedderND(input_key="aesthetic_score")
    text = FrozenOpenCLIPEmbedder2(
        version=TOKENIZER, width=48, layers=1, heads=3, embed_dim=48, vocab_size=VOCAB
    )
    with pytest.raises(ValueError, match="text encoders must come before"):
        GeneralConditioner([size, text])


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (FrozenCLIPEmbedder, {"layer": "last"}, "layer 'last' .* takes 'hidden'"),
        (FrozenCLIPEmbedder, {"layer_idx": 13}, "layer_idx 13 .* from 0 to 12"),
        (FrozenCLIPEmbedder, {"vocab_size": 99}, f"vocab_size is 99, but its tokenizer has {VOCAB}"),
        (FrozenOpenCLIPEmbedder2, {"layer": "last"}, "'last' is not supported, only 'penultimate'"),
    ],
)
def test_settings_that_sdxl_does_not_have_are_refused(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make(**{"version": TOKENIZER, "vocab_size": VOCAB, **settings})
