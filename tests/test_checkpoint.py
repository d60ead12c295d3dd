"""Weights of every format reach the networks; what does not fit is named before anything changes."""

import json
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn
from safetensors.numpy import load_file, save_file

from gm import checkpoint
from gm.bfloat16 import BFLOAT16
from gm.checkpoint import check_weights, kind_of, load_weights, read_weights, save_weights
from gm.conditioning import embedders
from gm.config import build_engine
from gm.models.layers import Conv2d, Embedding, LayerNorm, Linear, file_layouts, parameter_dtype
from gm.weight_files import in_memory
from tests.tiny import CONFIGS, SDXL, file_shapes, tiny_state_dict, write_tiny_weights

UNUSED = ("position_ids", "logit_scale")


class Net(nn.Cell):
    def __init__(self):
        super().__init__()
        self.token_embedding = Embedding(5, 8)
        self.conv = Conv2d(8, 4, 3, padding=1)
        self.norm = LayerNorm(4)
        self.layers = nn.CellList([Linear(4, 6), Linear(6, 2, has_bias=False)])


def state(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "token_embedding.weight": (5, 8),
        "conv.weight": (4, 8, 3, 3),
        "conv.bias": (4,),
        "norm.weight": (4,),
        "norm.bias": (4,),
        "layers.0.weight": (6, 4),
        "layers.0.bias": (6,),
        "layers.1.weight": (2, 6),
    }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def values(net):
    parameters = dict(net.parameters_and_names())
    return {name: layout.unpack(parameters[name].asnumpy()) for name, layout in file_layouts(net).items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


@pytest.fixture(scope="module")
def engine():
    return build_engine(CONFIGS["base"])


@pytest.mark.parametrize("block", [16, checkpoint.BLOCK])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_what_is_saved_loads_bit_for_bit(tmp_path, monkeypatch, suffix, block):
    monkeypatch.setattr(checkpoint, "BLOCK", block)
    save_file(state(), tmp_path / "a.safetensors")
    net, other = Net(), Net()
    load_weights(net, tmp_path / "a.safetensors")
    assert_same(values(net), state())
    save_weights(net, tmp_path / f"b{suffix}")
    load_weights(other, tmp_path / f"b{suffix}")
    assert_same(values(other), state())


def test_a_loaded_network_computes_with_the_weights_of_the_file(tmp_path, mode):
    save_file(state(), tmp_path / "a.safetensors")
    net = Net()
    load_weights(net, tmp_path / "a.safetensors")
    x = np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)
    y = net.layers[0](ms.Tensor(x)).asnumpy()
    np.testing.assert_allclose(
        y, x @ state()["layers.0.weight"].T + state()["layers.0.bias"], rtol=1e-5, atol=1e-6
    )


def test_half_precision_files_and_networks_meet(tmp_path):
    half = {name: v.astype(np.float16) for name, v in state().items()}
    save_file(half, tmp_path / "half.safetensors")
    save_file(state(), tmp_path / "full.safetensors")
    net = Net()
    load_weights(net, tmp_path / "half.safetensors")
    assert all(v.dtype == np.float32 for v in values(net).values())
    assert_same(values(net), half)
    with parameter_dtype(ms.float16):
        net = Net()
    load_weights(net, tmp_path / "full.safetensors")
    assert all(v.dtype == np.float16 for v in values(net).values())
    assert_same(values(net), half)
    save_weights(net, tmp_path / "b.safetensors", dtype=np.float32, metadata={"by": "us"})
    assert {v.dtype for v in load_file(tmp_path / "b.safetensors").values()} == {np.dtype(np.float32)}
    header = (tmp_path / "b.safetensors").read_bytes()
    assert json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"] == {"by": "us"}


def test_bfloat16_is_read(tmp_path):
    bits = (state()["norm.weight"].view(np.uint32) >> 16).astype(np.uint16)
    entry = {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}
    header = json.dumps({"norm.weight": entry}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bits.tobytes())
    tensor = read_weights(tmp_path / "a.safetensors")["norm.weight"]
    assert tensor.dtype == tensor.read().dtype == np.float32
    np.testing.assert_array_equal(tensor.read(), (bits.astype(np.uint32) << 16).view(np.float32))


def test_a_value_that_half_precision_cannot_hold_is_not_loaded_as_infinity(tmp_path):
    save_file({**state(), "norm.bias": np.full(4, 1e5, np.float32)}, tmp_path / "a.safetensors")
    with parameter_dtype(ms.float16):
        net = Net()
    with pytest.raises(ValueError, match="100000 does not fit float16"):
        load_weights(net, tmp_path / "a.safetensors")


def test_mindspores_names_are_those_of_the_original_file(tmp_path):
    """Norms as gamma and beta, embeddings as embedding_table: what mindone's converter writes."""
    theirs = {
        "token_embedding.embedding_table": "token_embedding.weight",
        "norm.gamma": "norm.weight",
        "norm.beta": "norm.bias",
        "layers._backbone.0.weight": "layers.0.weight",
    }
    names = {ours: name for name, ours in theirs.items()}
    parameters = [{"name": names.get(n, n), "data": ms.Tensor(v)} for n, v in state().items()]
    ms.save_checkpoint(parameters, str(tmp_path / "a.ckpt"))
    net = Net()
    load_weights(net, tmp_path / "a.ckpt")
    assert_same(values(net), state())


def test_mindspore_reads_the_ckpt_that_is_saved(tmp_path):
    net = Net()
    save_file(state(), tmp_path / "a.safetensors")
    load_weights(net, tmp_path / "a.safetensors")
    save_weights(net, tmp_path / "b.ckpt")
    theirs = {name: p.asnumpy() for name, p in ms.load_checkpoint(str(tmp_path / "b.ckpt")).items()}
    renamed = {"token_embedding.embedding_table", "norm.gamma", "norm.beta"}
    assert renamed < theirs.keys() and "conv.weight" in theirs and "layers.0.bias" in theirs
    np.testing.assert_array_equal(theirs["conv.weight"], state()["conv.weight"])


def test_weights_are_written_as_one_of_two_formats(tmp_path):
    with pytest.raises(ValueError, match=r"written as \.safetensors or \.ckpt, not '\.bin'"):
        save_weights(Net(), tmp_path / "a.bin")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- what does not fit


def test_all_that_does_not_fit_is_named_at_once_and_nothing_changes(tmp_path):
    net = Net()
    wrong = state()
    del wrong["conv.bias"], wrong["norm.bias"]
    wrong["layers.0.weight"] = wrong["layers.0.weight"].T.copy()
    wrong.update({f"extra.{i}.weight": np.zeros(1, np.float32) for i in range(7)})
    save_file(wrong, tmp_path / "a.safetensors")
    with pytest.raises(ValueError) as e:
        load_weights(net, tmp_path / "a.safetensors")
    lines = str(e.value).splitlines()
    assert lines[0].endswith("a.safetensors does not fit the model that the config describes:")
    assert lines[1] == "  2 missing: conv.bias, norm.bias"
    assert lines[2].startswith("  7 unexpected: extra.0.weight,") and lines[2].endswith(", and 2 more")
    assert lines[3] == "  1 of another shape: layers.0.weight [4, 6] instead of [6, 4]"
    assert not any(v.any() for v in values(net).values())


@pytest.mark.parametrize(
    "name",
    [
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
        "conditioner.embedders.1.model.logit_scale",
        "denoiser.sigmas",
        "model_ema.decay",
        "first_stage_model.loss.logvar",
        "sqrt_one_minus_alphas_cumprod",
        "alphas_cumprod_prev",
        "global_step",
    ],
)
def test_tensors_of_real_files_that_have_no_use_are_left_out(name):
    expected = {"a.weight": (3,)}
    check_weights({**expected, name: (5,)}, expected, "file")
    with pytest.raises(ValueError, match=f"1 unexpected: x.{name}"):
        check_weights({**expected, f"x.{name}": (5,)}, expected, "file")


BASE = "conditioner.embedders.1.model.ln_final.weight"
REFINER = "conditioner.embedders.0.model.ln_final.weight"


@pytest.mark.parametrize(
    "name, kind",
    [
        (BASE, "the SDXL base"),
        (REFINER, "the SDXL refiner"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "Stable Diffusion 1"),
        ("cond_stage_model.model.ln_final.bias", "Stable Diffusion 2"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("lora_unet_down_blocks_0_attentions_0.lora_up.weight", "a LoRA"),
        ("unet.down_blocks.0.attn.processor.to_q_lora.up.weight", "a LoRA"),
        ("clip_l", "a textual-inversion embedding"),
        ("<cat-toy>", "a textual-inversion embedding"),
        ("placeholder_token", "a textual-inversion embedding"),
        ("down_blocks.0.resnets.0.conv1.weight", "one component of a diffusers folder"),
        ("something.else", None),
    ],
)
def test_the_kind_of_model_is_known_by_its_names(name, kind):
    assert kind_of([name]) == kind
    assert kind_of(["model.diffusion_model.out.2.bias", name]) == kind


@pytest.mark.parametrize(
    "found, expected, message",
    [
        (
            REFINER,
            BASE,
            "file is the SDXL refiner, but the config describes the SDXL base; give the other config",
        ),
        (
            BASE,
            REFINER,
            "file is the SDXL base, but the config describes the SDXL refiner; give the other config",
        ),
        (
            "lora_te_x",
            BASE,
            "file is a LoRA, but the config describes the SDXL base; give a file of that model",
        ),
        ("cond_stage_model.transformer.x", BASE, "file is Stable Diffusion 1, but"),
        ("clip_g", REFINER, "file is a textual-inversion embedding, but"),
        ("down_blocks.0.x", BASE, "is one component of a diffusers folder, .* give the folder itself"),
    ],
)
def test_a_file_of_another_model_is_called_by_its_name(found, expected, message):
    with pytest.raises(ValueError, match=message):
        check_weights({found: (1,)}, {expected: (1,)}, "file")


def test_the_refiner_does_not_load_as_the_base(engine, tmp_path):
    path = write_tiny_weights(tmp_path / "refiner.safetensors", kind="refiner")
    with pytest.raises(ValueError, match="refiner.safetensors is the SDXL refiner, but"):
        load_weights(engine, path)


def test_a_missing_truncated_or_foreign_file_has_its_own_error(tmp_path):
    save_file(state(), tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    save_weights(Net(), tmp_path / "a.ckpt")
    cases = {
        "cut.safetensors": (whole[:-1], "no whole safetensors file"),
        "header.safetensors": (whole[:50], "no whole safetensors file"),
        "cut.ckpt": ((tmp_path / "a.ckpt").read_bytes()[:-3], "not a whole MindSpore checkpoint"),
        "torch.ckpt": (b"PK\x03\x04" + bytes(100), "is a PyTorch pickle"),
        "old.ckpt": (b"\x80\x02}q\x00.", "is a PyTorch pickle"),
        "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        "empty.safetensors": (b"", "is empty"),
        "page.safetensors": (b"<!DOCTYPE html>" * 9, "neither a safetensors file nor a MindSpore .ckpt"),
        "text.ckpt": (b"\nhello\n" * 9, "not a whole MindSpore checkpoint"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is .*{message}|{message}"):
            load_weights(Net(), tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors does not exist"):
        load_weights(Net(), tmp_path / "nowhere.safetensors")


# ---------------------------------------------------------------- SDXL


def test_the_tiny_engine_holds_the_file(engine, tmp_path):
    load_weights(engine, write_tiny_weights(tmp_path / "a.safetensors"))
    expected = {name: v for name, v in tiny_state_dict().items() if not name.endswith(UNUSED)}
    assert_same(values(engine), expected)


@pytest.mark.parametrize("kind", ["base", "refiner"])
def test_at_full_size_keys_and_shapes_are_those_of_the_real_file(kind, monkeypatch):
    class NoTokenizer:  # the vocabulary may have to come from the network
        vocab_size, eos_id = 49408, 49407

        def __init__(self, *args, **kwargs):
            pass

    monkeypatch.setattr(embedders, "Tokenizer", NoTokenizer)
    engine = build_engine(f"configs/inference/sd_xl_{kind}.yaml")
    shapes = {name: layout.shape for name, layout in file_layouts(engine).items()}
    real = file_shapes(SDXL[kind])  # held to the list of real keys by test_tiny.py
    assert shapes == {name: shape for name, shape in real.items() if not name.endswith(UNUSED)}
    assert kind_of(shapes) == f"the SDXL {kind}"
    check_weights(real, shapes, "the real file")


def test_what_other_formats_leave_out_is_made_again():
    original = tiny_state_dict()
    used = {name: in_memory(v) for name, v in original.items() if not name.endswith(UNUSED)}
    full = checkpoint.with_unused(used)
    assert full.keys() == original.keys()
    for name in full:
        if name.endswith(UNUSED):
            np.testing.assert_array_equal(full[name].read(), original[name])
            assert full[name].dtype == original[name].dtype and full[name].shape == original[name].shape


def is_mapped(path):
    return str(path) in Path("/proc/self/maps").read_text()


class Large(nn.Cell):
    def __init__(self):
        super().__init__()
        self.linear = Linear(320, 256)
        self.conv = Conv2d(64, 64, 3, padding=1)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_weights_that_are_held_as_in_the_file_are_mapped_into_memory(tmp_path, suffix, mode):
    rng = np.random.default_rng(0)
    shapes = {"linear.bias": (256,), "linear.weight": (256, 320), "conv.bias": (64,), "conv.weight": (64, 64, 3, 3)}
    expected = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    path = tmp_path / f"a{suffix}"
    checkpoint.write_weights(path, {name: in_memory(array) for name, array in expected.items()})
    net = Large()
    load_weights(net, path)
    assert is_mapped(path) and net.conv.weight.shape == Large().conv.weight.shape  # which is rearranged, and so read
    save_weights(net, path)  # in place of the file that it is mapped from
    assert_same(values(net), expected)
    assert_same({name: tensor.read() for name, tensor in read_weights(path).items()}, expected)
    path.unlink()
    x = rng.standard_normal((3, 320)).astype(np.float32)
    y = net.linear(ms.Tensor(x)).asnumpy()
    expected_y = x @ expected["linear.weight"].T + expected["linear.bias"]
    np.testing.assert_allclose(y, expected_y, rtol=0, atol=1e-5 * np.abs(expected_y).max())


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_bfloat16_file_gives_the_weights_that_a_float32_file_is_rounded_to(tmp_path, suffix):
    with parameter_dtype(ms.bfloat16):
        expected, net = Large(), Large()
    rng = np.random.default_rng(0)
    layouts = sorted(file_layouts(net).items())
    state = {name: in_memory(rng.standard_normal(layout.shape).astype(np.float32)) for name, layout in layouts}
    checkpoint.write_weights(tmp_path / "a.safetensors", state)
    load_weights(expected, tmp_path / "a.safetensors")
    path = tmp_path / f"b{suffix}"
    checkpoint.write_weights(path, {name: tensor.astype(BFLOAT16) for name, tensor in state.items()})
    load_weights(net, path)
    assert is_mapped(path) and not is_mapped(tmp_path / "a.safetensors")
    for name in ("linear.weight", "conv.weight"):  # vectors are float32, and were rounded in one file alone
        np.testing.assert_array_equal(values(net)[name], values(expected)[name])


def test_threads_keep_the_order_stay_close_and_pass_errors_on():
    made = []
    results = checkpoint._in_threads(lambda n: made.append(n) or 1 / (20 - n), range(40), threads=3)
    for number in range(20):
        assert next(results) == 1 / (20 - number)
        assert len(made) <= number + 1 + 3
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert len(made) <= 20 + 1 + 3


MEASURE = """
import sys
import mindspore as ms
from mindspore import nn
from gm.checkpoint import load_weights
from gm.models.layers import Conv2d, Linear

def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

ms.set_device("CPU")
net = nn.CellList([Linear(512, 512) for _ in range(200)] + [Conv2d(192, 192, 3) for _ in range(80)])
size = sum(4 * p.size for p in net.get_parameters())
before = status("VmRSS")
load_weights(net, sys.argv[1])
assert all((p.asnumpy() == 1).all() for p in net.get_parameters())  # what is mapped counts where it is looked at
grown = status("VmHWM") - before
assert grown > 0.9 * size, (grown, size)  # otherwise nothing was measured
print(grown / size)
"""


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_loading_needs_little_more_memory_than_the_model(tmp_path, dtype):
    layers = {f"{i}.": (512, 512) for i in range(200)} | {f"{i}.": (192, 192, 3, 3) for i in range(200, 280)}
    weights = {f"{n}weight": np.ones(shape, dtype) for n, shape in layers.items()}
    save_file(weights | {f"{n}bias": np.ones(shape[0], dtype) for n, shape in layers.items()}, tmp_path / "a")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "a")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert float(result.stdout.splitlines()[-1]) < 1.15
