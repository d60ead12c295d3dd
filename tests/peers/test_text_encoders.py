"""Text encoders and tokenizer against transformers' own, with one set of random weights."""

import numpy as np
import pytest
import torch
from mindspore import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from gm.conditioning.tokenizer import Tokenizer
from gm.textual_inversion.concept import add_concept
from tests.tiny import TINY, VOCAB
from tests.tiny_text import HEADS, tiny_conditioner

pytestmark = pytest.mark.peers
TEXTS = ["a photo of <cat>, a red toy", "", "<cat>", "unknown words!", "the cat " * 60]


def torch_model(kind, size, act, state):
    """A model of transformers whose vocabulary is as long as the token embedding given."""
    config = CLIPTextConfig(
        vocab_size=len(state["text_model.embeddings.token_embedding.weight"]), hidden_act=act,
        hidden_size=size.width, intermediate_size=4 * size.width, projection_dim=size.width,
        num_hidden_layers=size.layers, num_attention_heads=HEADS[size.width],
        eos_token_id=VOCAB - 1, bos_token_id=VOCAB - 2, pad_token_id=0,
    )  # fmt: skip
    model = kind(config).eval()
    prefix = "" if "text_model.final_layer_norm.weight" in model.state_dict() else "text_model."
    state = {name.removeprefix(prefix): torch.from_numpy(array) for name, array in state.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("position_ids") for name in missing), (missing, unexpected)
    return model


def extended(embedding):
    """The vocabulary and the learned rows as one table."""
    return np.concatenate([embedding.weight.asnumpy(), embedding.learned.asnumpy()])


def clip_state(model):
    state = {parameter.name: parameter.asnumpy() for parameter in model.get_parameters()}
    state = {
        name[name.index("text_model.") :]: array for name, array in state.items() if "learned" not in name
    }
    state["text_model.embeddings.token_embedding.weight"] = extended(model.token_embedding)
    return state


def open_clip_state(model):
    """OpenCLIP's names -> transformers'."""
    state = {
        "text_model.embeddings.token_embedding.weight": extended(model.token_embedding),
        "text_model.embeddings.position_embedding.weight": model.positional_embedding.asnumpy(),
        "text_projection.weight": model.text_projection.asnumpy().T.copy(),
        "text_model.final_layer_norm.weight": model.ln_final.weight.asnumpy(),
        "text_model.final_layer_norm.bias": model.ln_final.bias.asnumpy(),
    }
    for i, block in enumerate(model.transformer.resblocks):
        weights = np.split(block.attn.in_proj_weight.asnumpy(), 3)
        biases = np.split(block.attn.in_proj_bias.asnumpy(), 3)
        at = f"text_model.encoder.layers.{i}"
        for name, weight, bias in zip("qkv", weights, biases, strict=True):
            state[f"{at}.self_attn.{name}_proj.weight"], state[f"{at}.self_attn.{name}_proj.bias"] = (
                weight,
                bias,
            )
        for name, layer in (
            ("self_attn.out_proj", block.attn.out_proj),
            ("layer_norm1", block.ln_1),
            ("layer_norm2", block.ln_2),
            ("mlp.fc1", block.mlp.c_fc),
            ("mlp.fc2", block.mlp.c_proj),
        ):
            state[f"{at}.{name}.weight"], state[f"{at}.{name}.bias"] = (
                layer.weight.asnumpy(),
                layer.bias.asnumpy(),
            )
    return state


def assert_close(ours, theirs):
    theirs = theirs.numpy()
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


@pytest.fixture(scope="module")
def conditioner():
    conditioner = tiny_conditioner()
    rows = [np.random.default_rng(i).standard_normal((2, w)) for i, w in enumerate((32, 48))]
    add_concept(conditioner, token="<cat>", initializer=rows)
    return conditioner


def test_encoder_1_gives_transformers_penultimate_state(conditioner, mode):
    embedder = conditioner.embedders[0]
    ids = embedder.prepare(TEXTS)
    assert (ids >= VOCAB).sum() == 4
    peer = torch_model(CLIPTextModel, TINY["base"].clip_l, "quick_gelu", clip_state(embedder.transformer))
    with torch.no_grad():
        expected = peer(
            torch.from_numpy(ids[:, 0].astype(np.int64)), output_hidden_states=True
        ).hidden_states[-2]
    assert_close(embedder(Tensor(ids))[0].asnumpy(), expected)


def test_encoder_2_gives_transformers_penultimate_state_and_pooled_vector(conditioner, mode):
    embedder = conditioner.embedders[1]
    ids = embedder.prepare(TEXTS)
    peer = torch_model(
        CLIPTextModelWithProjection, TINY["base"].clip_g, "gelu", open_clip_state(embedder.model)
    )
    with torch.no_grad():
        expected = peer(torch.from_numpy(ids[:, 0].astype(np.int64)), output_hidden_states=True)
    states, pooled = (output.asnumpy() for output in embedder(Tensor(ids)))
    assert_close(states, expected.hidden_states[-2])
    assert_close(pooled, expected.text_embeds)


def test_clips_own_vocabulary_gives_the_known_ids():
    tokenizer = Tokenizer()
    assert tokenizer.vocab_size == 49408
    ids = tokenizer.encode(["a photo of a cat"])[0, 0]
    assert ids[:8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]
    assert tokenizer.ids("Hello, world!") == [3306, 267, 1002, 256]
    assert tokenizer.add_placeholder("<my-cat>", 2) == [49408, 49409]
