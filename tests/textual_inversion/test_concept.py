"""A learned word is a few rows beside each frozen vocabulary, and the only thing that learns."""

import logging

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from gm.conditioning.tokenizer import Tokenizer
from gm.textual_inversion.concept import add_concept, check_num_vectors, replace_words, vocabulary_norms
from tests.tiny import TINY, TOKENIZER, VOCAB
from tests.tiny_text import sizes, tiny_conditioner

WIDTHS = (TINY["base"].clip_l.width, TINY["base"].clip_g.width)


@pytest.fixture
def conditioner():
    return tiny_conditioner(max_length=12)


def given(num_vectors, value=0.0):
    return [np.full((num_vectors, width), value, np.float32) for width in WIDTHS]


class WeighedSum(nn.Cell):
    """A number that depends on context and vector as much as it is told to."""

    def __init__(self, conditioner):
        super().__init__()
        self.conditioner = conditioner
        rng = np.random.default_rng(0)
        self.c = Tensor(rng.standard_normal((1, 12, sum(WIDTHS))).astype(np.float32))
        self.v = Tensor(rng.standard_normal((1, WIDTHS[1] + 6 * 256)).astype(np.float32))

    def construct(self, for_context, for_vector, *inputs):
        vector, context = self.conditioner(*inputs)
        return for_context * ops.reduce_sum(context * self.c) + for_vector * ops.reduce_sum(vector * self.v)


def test_the_gradient_reaches_every_row_along_both_ways_and_nothing_else(conditioner, mode):
    concept = add_concept(conditioner, token="<cat>", num_vectors=3, rng=np.random.default_rng(0))
    loss = WeighedSum(conditioner)
    assert loss.trainable_params() == concept.parameters()
    inputs = conditioner.prepare({"txt": ["a photo of <cat>, my toy"], **sizes(1)})
    gradient = ms.grad(loss, grad_position=None, weights=concept.parameters())

    def norms(for_context, for_vector):
        weights = (Tensor(for_context, ms.float32), Tensor(for_vector, ms.float32))
        return [np.linalg.norm(g.asnumpy(), axis=1) for g in gradient(*weights, *map(Tensor, inputs))]

    context_l, context_g = norms(1.0, 0.0)
    vector_l, vector_g = norms(0.0, 1.0)
    assert context_l.shape == context_g.shape == (3,)
    assert context_l.min() > 1e-2 and context_g.min() > 1e-2  # through the penultimate states
    assert vector_g.min() > 1e-2  # through the pooled vector
    assert not vector_l.any()  # encoder 1 has no pooled vector


def test_the_gradient_of_a_row_is_the_slope_of_the_loss(conditioner):
    concept = add_concept(conditioner, token="<cat>", num_vectors=2, initializer="cat")
    inputs = [Tensor(x) for x in conditioner.prepare({"txt": ["a <cat>, my <cat> toy"], **sizes(1)})]
    one = Tensor(1.0, ms.float32)
    loss = WeighedSum(conditioner)
    gradients = ms.grad(loss, grad_position=None, weights=concept.parameters())(one, one, *inputs)
    for parameter, gradient in zip(concept.parameters(), gradients, strict=True):
        rows, gradient = parameter.asnumpy().copy(), gradient.asnumpy()
        step = 1e-2 * gradient / np.linalg.norm(gradient)
        values = []
        for sign in (1, -1):
            parameter.set_data(Tensor(rows + sign * step))
            values.append(float(loss(one, one, *inputs).asnumpy()))
        parameter.set_data(Tensor(rows))
        slope = (values[0] - values[1]) / 2e-2
        np.testing.assert_allclose(slope, np.linalg.norm(gradient), rtol=1e-2)


def test_rows_start_from_small_noise_without_an_initializer(conditioner):
    concept = add_concept(conditioner, token="<cat>", num_vectors=10, rng=np.random.default_rng(0))
    assert [rows.shape for rows in concept.rows()] == [(10, width) for width in WIDTHS]
    for rows in concept.rows():
        assert rows.dtype == np.float32 and 0.009 < rows.std() < 0.011


def test_rows_start_from_the_initializers_tokens_in_order_repeating(conditioner, caplog):
    caplog.set_level(logging.INFO)
    concept = add_concept(conditioner, token="<cat>", num_vectors=5, initializer="Red toy")
    for rows, embedder in zip(concept.rows(), conditioner.text_embedders, strict=True):
        red, toy = embedder.tokenizer.ids("red toy")
        table = embedder.token_embedding.weight.asnumpy()
        np.testing.assert_array_equal(rows, table[[red, toy, red, toy, red]])
    assert f"'Red toy' splits into 'red' ({red}), 'toy' ({toy})" in caplog.text


def test_an_initializer_with_more_tokens_than_vectors_says_so(conditioner, caplog):
    add_concept(conditioner, token="<cat>", num_vectors=1, initializer="red toy")
    assert "only the first 1 are used" in caplog.text


def test_words_of_several_files_stand_beside_each_other(conditioner):
    one = add_concept(conditioner, token="<cat>", initializer=given(2, 0.5))
    two = add_concept(conditioner, token="<Dog>", initializer=given(3, 0.25))
    assert one.placeholder_ids == (VOCAB, VOCAB + 1) and two.placeholder_ids == (
        VOCAB + 2,
        VOCAB + 3,
        VOCAB + 4,
    )
    assert (two.token, two.num_vectors) == ("<Dog>", 3)
    for word, value in ((one, 0.5), (two, 0.25)):
        for rows, expected in zip(word.rows(), given(word.num_vectors, value), strict=True):
            np.testing.assert_array_equal(rows, expected)
    assert one.parameters() == two.parameters() == conditioner.trainable_params()
    assert one.parameter_names() == [
        "embedders.0.transformer.text_model.embeddings.token_embedding.learned",
        "embedders.1.model.token_embedding.learned",
    ]


def test_the_refiner_takes_its_encoders_half_of_an_embedding():
    refiner = tiny_conditioner(kind="refiner")
    concept = add_concept(refiner, token="<cat>", initializer=given(2, 0.5))
    np.testing.assert_array_equal(concept.rows(), [given(2, 0.5)[1]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_vectors": 71}, "--num_vectors 71: it must be 1 to 70"),
        ({"num_vectors": 0}, "--num_vectors 0"),
        ({"num_vectors": 1, "token": "cat"}, "already a CLIP token"),
        ({"num_vectors": 1, "initializer": " "}, "--initializer_token ' ' has no token"),
        ({"num_vectors": 3, "initializer": given(2)}, r"clip_l is \[2, 32\], but this model needs \[3, 32\]"),
        ({"initializer": (given(1)[0], given(1)[0])}, r"clip_g is \[1, 32\], but this model needs \[1, 48\]"),
        ({"num_vectors": 11, "initializer": "cat"}, "--num_vectors 11: a prompt holds 1 to 10"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(conditioner, settings, message):
    with pytest.raises(ValueError, match=message):
        add_concept(conditioner, **{"token": "<cat>", "rng": np.random.default_rng(0), **settings})
    assert not conditioner.trainable_params()
    assert not any(embedder.tokenizer.placeholders for embedder in conditioner.text_embedders)


def test_the_vectors_must_fit_into_the_longest_template():
    tokenizer = Tokenizer(TOKENIZER, max_length=12)
    templates = ("a {placeholder}", "a photo of my {placeholder}")
    check_num_vectors(6, templates=templates, tokenizer=tokenizer)
    with pytest.raises(
        ValueError, match="holds 10 tokens, and 'a photo of my {placeholder}' leaves room for 6"
    ):
        check_num_vectors(7, templates=templates, tokenizer=tokenizer)


def test_norms_of_the_vocabulary(conditioner):
    for embedder in conditioner.text_embedders:
        table = np.ones(embedder.token_embedding.weight.shape, np.float32)
        table[1::2] *= 3
        embedder.token_embedding.weight.set_data(Tensor(table))
    expected = [(2 * width**0.5, width**0.5) for width in WIDTHS]
    np.testing.assert_allclose(vocabulary_norms(conditioner), expected, rtol=1e-5)


def encoded(conditioner, prompt):
    return conditioner.encode({"txt": [prompt], **sizes(1)})[1]


def test_words_are_replaced_without_compiling_again(conditioner):
    replace_words(conditioner, [], room=4)
    compiled = encoded(conditioner, "a <cat>"), len(conditioner.compile_cache)
    seen = [compiled[0]]
    for words in ([("<cat>", given(2, 0.5))], [("<dog>", given(1, 2.0)), ("<cat>", given(3, 0.25))], []):
        replace_words(conditioner, words, room=4)
        seen.append(encoded(conditioner, "a <cat>"))
        alone = tiny_conditioner(max_length=12)
        for token, rows in words:
            add_concept(alone, token=token, initializer=rows)
        np.testing.assert_allclose(seen[-1], encoded(alone, "a <cat>"), atol=1e-5)
    assert len(conditioner.compile_cache) == compiled[1]
    assert not np.allclose(seen[1], seen[2], atol=1e-3)
    np.testing.assert_array_equal(seen[0], seen[3])


def test_more_vectors_than_there_is_room_for_are_refused(conditioner):
    with pytest.raises(ValueError, match="5 vectors together, and there is room for 4"):
        replace_words(conditioner, [("<cat>", given(2)), ("<dog>", given(3))], room=4)
