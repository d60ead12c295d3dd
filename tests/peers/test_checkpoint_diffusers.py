"""diffusers agrees where each tensor belongs; it loads folders that we write, and we those that it writes."""

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from diffusers.loaders import single_file_utils

from gm.checkpoint import read_weights
from tests.tiny import CONFIGS, tiny_state_dict, write_tiny_weights
from tools.convert_weights import convert

pytestmark = pytest.mark.peers

PIPELINES = {"base": StableDiffusionXLPipeline, "refiner": StableDiffusionXLImg2ImgPipeline}
UNUSED = ("position_ids", "logit_scale")


@pytest.fixture(scope="module", params=["base", "refiner"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    at = tmp_path_factory.mktemp(kind)
    convert(write_tiny_weights(at / "tiny.safetensors", kind=kind), at / "folder", config=CONFIGS[kind])
    return at / "folder"


@pytest.fixture(scope="module")
def pipeline(kind, folder):
    return PIPELINES[kind].from_pretrained(folder)


def test_diffusers_own_conversion_of_the_single_file_gives_the_same_networks(kind, pipeline):
    state = {name: torch.from_numpy(values.copy()) for name, values in tiny_state_dict(kind=kind).items()}
    unet = single_file_utils.convert_ldm_unet_checkpoint(dict(state), pipeline.unet.config)
    assert_same(pipeline.unet.state_dict(), unet)
    vae = single_file_utils.convert_ldm_vae_checkpoint(dict(state), pipeline.vae.config)
    assert_same(pipeline.vae.state_dict(), vae)
    prefix = f"conditioner.embedders.{1 if kind == 'base' else 0}.model."
    text_2 = single_file_utils.convert_open_clip_checkpoint(
        pipeline.text_encoder_2, dict(state), prefix=prefix
    )
    assert_same(
        pipeline.text_encoder_2.state_dict(), {n: t for n, t in text_2.items() if "position_ids" not in n}
    )


def assert_same(ours, theirs):
    # transformers 5 leaves this prefix out of the names in memory
    ours, theirs = ({name.removeprefix("text_model."): t for name, t in d.items()} for d in (ours, theirs))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_first_text_encoder_gets_its_weights(pipeline, kind):
    if kind == "refiner":
        assert pipeline.text_encoder is None
        return
    prefix = "conditioner.embedders.0.transformer.text_model."
    theirs = {n.removeprefix(prefix): v for n, v in tiny_state_dict().items() if n.startswith(prefix)}
    theirs.pop("embeddings.position_ids")
    assert_same(
        pipeline.text_encoder.state_dict(), {n: torch.from_numpy(v.copy()) for n, v in theirs.items()}
    )


def test_the_tokenizers_and_settings_of_the_folder_are_those_of_the_config(pipeline, kind):
    if kind == "base":
        assert pipeline.tokenizer("cat", padding="max_length").input_ids[:5] == [732, 719, 733, 733, 733]
    ids = pipeline.tokenizer_2("cat", padding="max_length").input_ids
    assert len(ids) == 77 and ids[:5] == [732, 719, 733, 0, 0]
    assert pipeline.vae.config.scaling_factor == 0.13025
    assert pipeline.config.force_zeros_for_empty_prompt == (kind == "base")


@pytest.mark.parametrize("settings", [{}, {"max_shard_size": "400KB"}, {"variant": "fp16"}])
def test_a_folder_that_diffusers_wrote_reads_as_the_original(kind, folder, tmp_path, settings):
    dtype = torch.float16 if "variant" in settings else torch.float32
    pipeline = PIPELINES[kind].from_pretrained(folder).to(dtype)
    pipeline.save_pretrained(tmp_path, **settings)
    assert bool(list(tmp_path.glob("unet/*.index*.json"))) == ("max_shard_size" in settings)
    found = read_weights(tmp_path)
    original = {name: v for name, v in tiny_state_dict(kind=kind).items() if not name.endswith(UNUSED)}
    assert found.keys() == original.keys()
    for name, tensor in found.items():
        assert (tensor.read() == original[name].astype(tensor.dtype)).all(), name
