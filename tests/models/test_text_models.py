"""Both text models: causal, pooled at the first end of text, with learned rows, with fp16 weights."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from gm.models.clip import CLIPTextModel
from gm.models.layers import file_layouts, parameter_dtype
from gm.models.open_clip import OpenCLIPTextModel
from tests.tiny_text import randomise

VOCAB, BOS, EOS = 50, 48, 49
SIZES = {"width": 32, "layers": 3, "heads": 2, "vocab_size": VOCAB, "max_length": 10}
LEARNED = {VOCAB: 17, VOCAB + 1: 3}  # id of a learned row -> the row of the table that it is a copy of


def make_clip():
    return with_learned_rows(CLIPTextModel(num_layers_run=2, **SIZES))


def make_open_clip():
    return with_learned_rows(OpenCLIPTextModel(embed_dim=24, eos_id=EOS, **SIZES))


def with_learned_rows(model):
    randomise(model)
    model.token_embedding.set_learned(model.token_embedding.weight.asnumpy()[list(LEARNED.values())])
    return model


@pytest.fixture(scope="module")
def clip():
    return make_clip()


@pytest.fixture(scope="module")
def open_clip():
    return make_open_clip()


def run(model, *texts):
    """Outputs for lists of ids, as a tuple of arrays. All calls have one shape, so a model compiles once."""
    ids = np.zeros((4, 6), np.int32)
    for row, text in zip(ids, texts, strict=False):
        row[: len(text)] = text
    out = model(Tensor(ids))
    return tuple(o.asnumpy()[: len(texts)] for o in (out if isinstance(out, tuple) else (out,)))


def test_a_state_sees_itself_and_earlier_tokens_only(clip, open_clip, mode):
    for model in (clip, open_clip):
        states = run(model, [BOS, 3, 4, 5, EOS], [BOS, 3, 4, 6, EOS])[0]
        np.testing.assert_array_equal(states[0, :3], states[1, :3])
        assert (np.abs(states[0, 3:] - states[1, 3:]).max(-1) > 1e-3).all()


def test_a_learned_row_acts_as_a_row_of_the_table_does(clip, open_clip, mode):
    learned = [BOS, VOCAB + 1, VOCAB, 3, EOS]
    for model in (clip, open_clip):
        for output in run(model, learned, [LEARNED.get(i, i) for i in learned]):
            np.testing.assert_array_equal(output[0], output[1])


def test_pooling_is_at_the_first_end_of_text_whatever_follows_or_lies_above_it(open_clip, mode):
    learned = VOCAB + 1
    _, pooled = run(
        open_clip,
        [BOS, learned, 3, EOS, EOS, EOS],
        [BOS, learned, 3, EOS, 0, 7],
        [BOS, learned, 4, EOS, 0, 0],
        [BOS, learned, 3, 5, EOS, 0],
    )
    assert pooled.shape == (4, 24)
    np.testing.assert_array_equal(pooled[0], pooled[1])
    assert np.abs(pooled[0] - pooled[2]).max() > 1e-3  # a word after the learned one matters
    assert np.abs(pooled[0] - pooled[3]).max() > 1e-3


def test_clip_does_not_run_layers_after_the_hidden_state():
    model, text = make_clip(), [BOS, 3, EOS]
    before = run(model, text)[0]
    layers = model.text_model.encoder.layers
    for layer, is_run in ((2, False), (1, True)):
        for parameter in layers[layer].get_parameters():
            parameter.set_data(Tensor(np.zeros(parameter.shape, np.float32)))
        assert (np.abs(run(model, text)[0] - before).max() > 1e-3) == is_run


@pytest.mark.parametrize("dtype", [ms.float16, ms.bfloat16])
@pytest.mark.parametrize("name", ["clip", "open_clip"])
def test_with_weights_of_half_the_size_states_stay_fp32_and_close(request, mode, name, dtype):
    text = [BOS, 3, VOCAB, 9, EOS]
    whole = request.getfixturevalue(name)
    exact = run(whole, text)
    with parameter_dtype(dtype):
        model = {"clip": make_clip, "open_clip": make_open_clip}[name]()
    layouts, values = file_layouts(model), dict(whole.parameters_and_names())
    for key, parameter in model.parameters_and_names():
        array = file_layouts(whole)[key].unpack(values[key].asnumpy()).astype(layouts[key].dtype)
        parameter.set_data(Tensor.from_numpy(layouts[key].pack(array)))
    for expected, actual in zip(exact, run(model, text), strict=True):
        assert actual.dtype == np.float32
        assert 0 < np.abs(actual - expected).max() < (5e-3 if dtype == ms.float16 else 5e-2) * np.abs(expected).max()
