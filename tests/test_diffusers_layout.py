"""The original names and a diffusers folder's. (tests/peers asks diffusers itself.)"""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from gm.diffusers_layout import FILE_STEM, read_folder, to_components
from gm.weight_files import in_memory
from tests.tiny import SDXL, file_shapes, tiny_state_dict

UNUSED = ("position_ids", "logit_scale")


def components(kind="base"):
    return to_components({name: in_memory(v) for name, v in tiny_state_dict(kind=kind).items()})


def write(folder, found, *, suffix=".safetensors"):
    for component, tensors in found.items():
        (folder / component).mkdir(parents=True)
        path = folder / component / (FILE_STEM[component] + suffix)
        save_file({name: tensor.read() for name, tensor in tensors.items()}, path)


def assert_original(folder, kind="base"):
    found = read_folder(folder)
    original = {name: v for name, v in tiny_state_dict(kind=kind).items() if not name.endswith(UNUSED)}
    assert found.keys() == original.keys()
    for name, values in original.items():
        assert found[name].shape == values.shape
        np.testing.assert_array_equal(found[name].read(), values, err_msg=name)


@pytest.mark.parametrize("kind", ["base", "refiner"])
@pytest.mark.parametrize("suffix", [".safetensors", ".fp16.safetensors"])
def test_there_and_back_again(tmp_path, kind, suffix):
    write(tmp_path, components(kind), suffix=suffix)
    assert (tmp_path / "text_encoder").exists() == (kind == "base")
    assert_original(tmp_path, kind)


def test_names_at_full_size_are_those_of_the_published_folder():
    zero = np.zeros((), np.float16)
    tensors = {n: in_memory(np.broadcast_to(zero, shape)) for n, shape in file_shapes(SDXL["base"]).items()}
    found = {component: {n: t.shape for n, t in c.items()} for component, c in to_components(tensors).items()}
    assert {component: len(names) for component, names in found.items()} == {
        "unet": 1680, "vae": 248, "text_encoder": 196, "text_encoder_2": 517
    }  # fmt: skip
    unet, vae, text_2 = found["unet"], found["vae"], found["text_encoder_2"]
    assert unet["down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k.weight"] == (1280, 2048)
    assert unet["up_blocks.0.resnets.0.conv_shortcut.weight"] == (1280, 2560, 1, 1)
    assert unet["up_blocks.1.upsamplers.0.conv.weight"] == (640, 640, 3, 3)
    assert unet["down_blocks.1.downsamplers.0.conv.bias"] == (640,)
    assert unet["mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj.weight"] == (10240, 1280)
    assert vae["decoder.up_blocks.2.resnets.0.conv_shortcut.weight"] == (256, 512, 1, 1)
    assert vae["encoder.mid_block.attentions.0.to_q.weight"] == (512, 512)
    assert text_2["text_model.encoder.layers.31.self_attn.v_proj.weight"] == (1280, 1280)
    assert text_2["text_projection.weight"] == (1280, 1280)


def test_query_key_and_value_are_packed_in_this_order():
    state = tiny_state_dict()
    packed = state["conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_bias"]
    text_2 = components()["text_encoder_2"]
    for i, name in enumerate("qkv"):
        found = text_2[f"text_model.encoder.layers.1.self_attn.{name}_proj.bias"].read()
        np.testing.assert_array_equal(found, packed[48 * i : 48 * (i + 1)])


def test_the_text_projection_is_transposed():
    projection = tiny_state_dict()["conditioner.embedders.1.model.text_projection"]
    np.testing.assert_array_equal(
        components()["text_encoder_2"]["text_projection.weight"].read(), projection.T
    )


def test_names_of_the_autoencoders_attention_before_diffusers_0_17_are_read(tmp_path):
    found = components()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for name in [name for name in found["vae"] if "attentions.0.to_" in name]:
        part = name.split("attentions.0.")[1].rpartition(".")[0]
        found["vae"][name.replace(part, old[part])] = found["vae"].pop(name)
    write(tmp_path, found)
    assert_original(tmp_path)


def test_text_encoders_without_their_prefix_are_read(tmp_path):
    found = components()
    for component in ("text_encoder", "text_encoder_2"):
        found[component] = {name.removeprefix("text_model."): t for name, t in found[component].items()}
    write(tmp_path, found)
    assert_original(tmp_path)


def test_a_component_may_be_split_over_several_files(tmp_path):
    found = components()
    write(tmp_path, found)
    names = sorted(found["unet"])
    files = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(names)}
    for part in set(files.values()):
        tensors = {name: found["unet"][name].read() for name in names if files[name] == part}
        save_file(tensors, tmp_path / "unet" / part)
    whole = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    whole.unlink()
    index = tmp_path / "unet" / f"{whole.name}.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    assert_original(tmp_path)
    index.write_text(json.dumps({"weight_map": {**files, "absent": "part-0.safetensors"}}))
    with pytest.raises(ValueError, match="index.json does not fit the files beside it"):
        read_folder(tmp_path)


def test_a_folder_that_is_no_model_or_lacks_a_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="is a folder without 'unet/'"):
        read_folder(tmp_path)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="holds no diffusion_pytorch_model.safetensors"):
        read_folder(tmp_path)
