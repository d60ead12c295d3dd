"""Weights keep every bit from format to format, in the memory of a few tensors."""

import json
import os
import subprocess
import sys

import mindspore as ms
import numpy as np
import pytest
from omegaconf import OmegaConf
from safetensors.numpy import load_file, save_file

from gm.bfloat16 import BFLOAT16, from_bfloat16, to_bfloat16
from gm.checkpoint import load_weights, read_weights
from gm.config import build_engine
from gm.models.layers import file_layouts
from gm.weight_files import LazyTensor, write_safetensors
from tests.tiny import CONFIGS, TINY, Size, TextSize, file_shapes, tiny_state_dict, write_tiny_weights
from tools.convert_weights import convert, main


def assert_same_file(path, other):
    found, expected = load_file(path), load_file(other)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype and found[name].shape == values.shape, name
        np.testing.assert_array_equal(found[name], values, err_msg=name)


@pytest.mark.parametrize("kind, dtype", [("base", np.float16), ("refiner", np.float32)])
def test_a_round_through_all_formats_keeps_every_bit(tmp_path, kind, dtype):
    original = write_tiny_weights(tmp_path / "a.safetensors", kind=kind, dtype=dtype)
    stations = [original, tmp_path / "b.ckpt", tmp_path / "c", tmp_path / "d.safetensors"]
    for src, dst in zip(stations, stations[1:], strict=False):
        convert(src, dst, config=CONFIGS[kind])
    assert_same_file(stations[-1], original)


def test_every_format_fills_the_engine_alike(tmp_path):
    original, state = write_tiny_weights(tmp_path / "a.safetensors"), tiny_state_dict()
    for dst in (tmp_path / "b.ckpt", tmp_path / "c"):
        convert(original, dst, config=CONFIGS["base"])
        engine = build_engine(CONFIGS["base"])
        load_weights(engine, dst)
        layouts = file_layouts(engine)
        for name, parameter in engine.parameters_and_names():
            values = layouts[name].unpack(parameter.asnumpy())
            np.testing.assert_array_equal(values, state[name], err_msg=name)


def test_bfloat16_is_written_and_kept(tmp_path):
    original = write_tiny_weights(tmp_path / "a.safetensors")
    stations = [original, tmp_path / "b.safetensors", tmp_path / "c.ckpt", tmp_path / "d", tmp_path / "e.safetensors"]
    for src, dst in zip(stations, stations[1:], strict=False):
        convert(src, dst, config=CONFIGS["base"], dtype="bf16" if src == original else "keep")
    first, last = read_weights(stations[1]), read_weights(stations[-1])
    for name, values in tiny_state_dict().items():
        stored = BFLOAT16 if values.dtype == np.float32 else values.dtype
        assert first[name].stored == stored
        expected = from_bfloat16(to_bfloat16(values)) if stored == BFLOAT16 else values
        np.testing.assert_array_equal(first[name].read(), expected)
        if not name.endswith("logit_scale"):  # which no folder holds
            assert last[name].stored == stored
            np.testing.assert_array_equal(last[name].read(), expected)
    types = {p.dtype for n, p in ms.load_checkpoint(str(tmp_path / "c.ckpt")).items() if "ids" not in n}
    assert types == {ms.bfloat16}


def test_a_type_that_is_asked_for_is_written_and_integers_stay(tmp_path):
    original = write_tiny_weights(tmp_path / "a.safetensors")
    for name in ("b.safetensors", "b.ckpt", "b"):
        convert(original, tmp_path / name, config=CONFIGS["base"], dtype="fp16")
    half = load_file(tmp_path / "b.safetensors")
    for name, values in tiny_state_dict().items():
        expected = values.astype(np.float16) if values.dtype == np.float32 else values
        assert half[name].dtype == expected.dtype
        np.testing.assert_array_equal(half[name], expected)
    assert {p.dtype for n, p in ms.load_checkpoint(str(tmp_path / "b.ckpt")).items() if "ids" not in n} == {
        ms.float16
    }
    unet = load_file(tmp_path / "b" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {v.dtype for v in unet.values()} == {np.dtype(np.float16)}


def test_a_folder_has_the_settings_and_tokenizers_of_the_config(tmp_path):
    convert(write_tiny_weights(tmp_path / "a.safetensors"), tmp_path / "b", config=CONFIGS["base"])

    def settings(name):
        return json.loads((tmp_path / "b" / name).read_text(encoding="utf-8"))

    unet, size = settings("unet/config.json"), TINY["base"]
    assert unet["block_out_channels"] == [32, 64, 128] and unet["attention_head_dim"] == [2, 4, 8]
    assert unet["down_block_types"] == ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
    assert unet["layers_per_block"] == size.num_res_blocks and unet["cross_attention_dim"] == 80
    text = settings("text_encoder_2/config.json")
    assert (text["num_attention_heads"], text["num_hidden_layers"], text["hidden_act"]) == (3, 3, "gelu")
    assert settings("text_encoder/config.json")["eos_token_id"] == size.clip_l.vocab - 1
    assert settings("tokenizer_2/tokenizer_config.json")["pad_token"] == "!"
    assert settings("tokenizer/tokenizer_config.json")["pad_token"] == "<|endoftext|>"
    assert len(settings("tokenizer/vocab.json")) == size.clip_l.vocab
    assert settings("model_index.json")["_class_name"] == "StableDiffusionXLPipeline"


def test_what_is_there_is_replaced_only_when_told(tmp_path):
    original = write_tiny_weights(tmp_path / "a.safetensors")
    (tmp_path / "b.ckpt").write_text("precious")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "notes.txt").write_text("precious")
    for name in ("b.ckpt", "c"):
        with pytest.raises(ValueError, match=f"{name} exists; give --overwrite"):
            convert(original, tmp_path / name, config=CONFIGS["base"])
    assert (tmp_path / "b.ckpt").read_text() == "precious"
    for name in ("b.ckpt", "c"):
        convert(original, tmp_path / name, config=CONFIGS["base"], overwrite=True)
    assert (tmp_path / "c" / "notes.txt").read_text() == "precious"
    convert(tmp_path / "b.ckpt", tmp_path / "d.safetensors", config=CONFIGS["base"])
    assert_same_file(tmp_path / "d.safetensors", original)
    with pytest.raises(ValueError, match="--src and --dst are both"):
        convert(original, tmp_path / "c" / ".." / "a.safetensors", overwrite=True)


def test_keys_and_shapes_are_checked_before_anything_is_written(tmp_path):
    state = tiny_state_dict()
    state["model.diffusion_model.out.2.weight"] = np.zeros((4, 33, 3, 3), np.float32)
    del state["first_stage_model.quant_conv.bias"]
    save_file(state, tmp_path / "a.safetensors")
    message = (
        r"(?s)1 missing: first_stage_model.quant_conv.bias.*out.2.weight \[4, 33, 3, 3\] instead of \[4, 32"
    )
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "a.safetensors", tmp_path / "b.ckpt", config=CONFIGS["base"])
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_averages_and_buffers_are_not_carried_along(tmp_path):
    state = tiny_state_dict() | {"model_ema.decay": np.zeros(1, np.float32), "betas": np.zeros(9, np.float32)}
    save_file(state, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", config=CONFIGS["base"])
    assert load_file(tmp_path / "b.safetensors").keys() == tiny_state_dict().keys()


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    save_file({"lora_x": np.zeros(1, np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(
        SystemExit, match="error: .*a.safetensors is a LoRA, neither SDXL base nor SDXL refiner"
    ):
        main(["--src", str(tmp_path / "a.safetensors"), "--dst", str(tmp_path / "b.ckpt")])
    with pytest.raises(SystemExit, match="error: .*nowhere.ckpt does not exist"):
        main(["--src", str(tmp_path / "nowhere.ckpt"), "--dst", str(tmp_path / "b.ckpt")])
    original = write_tiny_weights(tmp_path / "c.safetensors")
    main(["--src", str(original), "--dst", str(tmp_path / "d.ckpt"), "--config", str(CONFIGS["base"])])
    assert "d.ckpt: 100%" in capsys.readouterr().err


MEASURE = """
import sys
from tools.convert_weights import convert

def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

before = status("VmRSS")
for src, dst in zip(sys.argv[2:], sys.argv[3:]):
    convert(src, dst, config=sys.argv[1])
print(status("VmHWM") - before)
"""


def test_conversion_needs_the_memory_of_a_few_tensors(tmp_path):
    size = Size(192, (1, 2, 4), 1, (0, 1, 1, 1), 48 + 6 * 256, TextSize(32, 3, 734), TextSize(48, 3, 734),
                32, (1, 2, 2, 2), 1)  # fmt: skip
    tensors = {
        name: LazyTensor(shape, np.dtype(np.float16), lambda shape=shape: np.ones(shape, np.float16))
        for name, shape in file_shapes(size).items()
    }
    write_safetensors(tmp_path / "a.safetensors", tensors)
    model_bytes = (tmp_path / "a.safetensors").stat().st_size
    cfg = OmegaConf.load(CONFIGS["base"])
    cfg.model.params.network_config.params.update({"model_channels": 192, "transformer_depth": [1, 1, 1]})
    OmegaConf.save(cfg, tmp_path / "wide.yaml")
    stations = [
        str(tmp_path / name) for name in ("wide.yaml", "a.safetensors", "b.ckpt", "c", "d.safetensors")
    ]
    command = [sys.executable, "-c", MEASURE, *stations]
    # Freed arrays go back to the system at once, so that the peak is what is held and not malloc's habits.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0, result.stderr[-2000:]
    assert model_bytes > 200e6
    assert int(result.stdout.splitlines()[-1]) < 0.4 * model_bytes
    assert (tmp_path / "d.safetensors").stat().st_size == pytest.approx(model_bytes, rel=0.01)
