"""The sampling command: what its flags become, what it writes, what it refuses before loading anything."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.fake_engine import FakeEngine, write_word
from tests.tiny import CONFIGS, write_tiny_weights

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "demo" / "sampling_without_streamlit.py"
spec = importlib.util.spec_from_file_location("sampling_without_streamlit", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


@pytest.fixture
def files(tmp_path):
    """A folder with all that a command names: weights (empty: fake engines need none), words, a picture."""
    for name in ("base.safetensors", "refiner.safetensors"):
        (tmp_path / name).touch()
    write_word(tmp_path / "SD-XL-base-1.0_3000_ti.ckpt", "<cat-toy>")
    write_word(tmp_path / "style.safetensors", "<style>", format="webui", seed=1)
    Image.new("RGB", (130, 70), "purple").save(tmp_path / "start.jpg")
    return tmp_path


@pytest.fixture
def fakes(monkeypatch):
    """Engines without networks; lists those that were built, and what was loaded."""
    built, loaded = [], []

    def build(config):
        kind = "refiner" if config.model.params.network_config.params.context_dim == [48] else "base"
        built.append(FakeEngine(kind=kind))
        return built[-1]

    monkeypatch.setattr(script, "build_engine", build)
    monkeypatch.setattr(script, "open_fitting", lambda engine, path: None)
    monkeypatch.setattr(script, "load_weights", lambda engine, path: loaded.append(Path(path).name))
    build.built, build.loaded = built, loaded
    return build


def command(files, *flags, prompt="a <cat-toy> backpack", config=CONFIGS["base"]):
    own = {
        "--config": config, "--weight": files / "base.safetensors", "--prompt": prompt,
        "--save_path": files / "out", "--sd_xl_base_ratios": "64x64", "--sample_step": 4,
        "--device_target": "CPU", "--pipeline_config": CONFIGS["refiner"],
        "--pipeline_weight": files / "refiner.safetensors",
    }  # fmt: skip
    return [str(part) for pair in own.items() for part in pair] + [str(flag) for flag in flags]


def read(path):
    with Image.open(path) as image:
        return np.asarray(image), image.text


def test_every_picture_and_a_grid_are_saved_and_tell_how_they_were_made(files, fakes):
    word = files / "SD-XL-base-1.0_3000_ti.ckpt"
    flags = ("--textual_inversion_weight", word, "--num_rows", 2, "--num_cols", 3, "--seed", 5)
    *paths, grid = script.main(command(files, *flags, "--negative_prompt", "blur"))
    names = [f"0001_{i:02d}_seed{4 + i}.png" for i in range(1, 7)]
    assert [path.name for path in (*paths, grid)] == [*names, "0001_grid.png"]
    pictures, texts = zip(*map(read, paths), strict=True)
    assert [text["seed"] for text in texts] == ["5", "6", "7", "8", "9", "10"]
    assert {text["prompt"] for text in texts} == {"a <cat-toy> backpack"}
    assert {text["negative_prompt"] for text in texts} == {"blur"}
    settings = json.loads(texts[0]["settings"])
    assert (settings["weight"], settings["words"]) == ("base.safetensors", [word.name])
    assert (settings["steps"], settings["height"], settings["task"]) == (4, 64, "txt2img")
    rows = [np.concatenate(pictures[start : start + 3], axis=1) for start in (0, 3)]
    np.testing.assert_array_equal(read(grid)[0], np.concatenate(rows))
    assert fakes.loaded == ["base.safetensors"]
    assert fakes.built[0].calls == [(6, 4, 8, 8)] * 8


def test_a_seed_draws_the_same_picture_alone_and_later_runs_overwrite_nothing(files, fakes):
    *many, _ = script.main(command(files, "--num_cols", 3, "--seed", 5, "--sampler", "DPMPP2MSDE"))
    alone, _ = script.main(command(files, "--seed", 7, "--sampler", "DPMPP2MSDESampler"))
    assert alone.name == "0002_01_seed7.png"
    np.testing.assert_array_equal(read(many[2])[0], read(alone)[0])


def test_a_file_of_prompts_gives_its_rows_to_each(files, fakes):
    (files / "prompts.txt").write_text("a red cat\n\na red dog\n")
    *paths, grid = script.main(command(files, "--num_cols", 2, prompt=str(files / "prompts.txt")))
    texts = [read(path)[1] for path in paths]
    assert [(text["prompt"], text["seed"]) for text in texts] == [
        ("a red cat", "42"), ("a red cat", "43"), ("a red dog", "42"), ("a red dog", "43"),
    ]  # fmt: skip
    assert read(grid)[0].shape == (128, 128, 3)


def test_flags_of_size_conditioning_and_scores_arrive(files, fakes):
    flags = "--orig_width 11 --orig_height 12 --target_width 13 --crop_coords_top 15 --crop_coords_left 16"
    scores = "--aesthetic_score 7.5 --negative_aesthetic_score 1"
    script.main(command(files, *flags.split(), *scores.split()))
    ((batch, _),) = fakes.built[0].batches
    assert batch["original_size_as_tuple"] == [(12, 11)] * 2
    assert batch["target_size_as_tuple"] == [(64, 13)] * 2
    assert batch["crop_coords_top_left"] == [(15, 16)] * 2
    assert batch["aesthetic_score"] == [(7.5,), (1.0,)]


def test_pictures_are_as_large_as_the_configs_target_size(files, fakes):
    config = files / "config.yaml"
    config.write_text(CONFIGS["base"].read_text() + "\ndata:\n  target_size: [128, 64]\n")
    args = command(files, config=config)
    del args[args.index("--sd_xl_base_ratios") : args.index("--sample_step")]
    picture, _ = script.main(args)
    assert read(picture)[0].shape == (128, 64, 3)


def test_the_first_noise_can_be_given(files, fakes):
    noise = np.random.default_rng(42).standard_normal((1, 4, 8, 8), dtype=np.float32)
    expected, _ = script.main(command(files))
    for given in (noise, noise[0]):
        np.save(files / "noise.npy", given)
        path, _ = script.main(command(files, "--seed", 1, "--init_latent_path", files / "noise.npy"))
        np.testing.assert_array_equal(read(path)[0], read(expected)[0])


def test_img2img_starts_from_a_picture_of_its_own_size(files, fakes):
    args = command(files, "--task", "img2img", "--img", files / "start.jpg", "--strength", 0)
    del args[args.index("--sd_xl_base_ratios") : args.index("--sample_step")]
    path, _ = script.main(args)
    pixels, text = read(path)
    assert pixels.shape == (64, 128, 3)
    settings = json.loads(text["settings"])
    assert (settings["img"], settings["strength"]) == ("start.jpg", 0.0)
    purple = np.array([128, 0, 128]) / 127.5 - 1  # the fake decoder shows a third
    np.testing.assert_allclose(pixels[32, 64] / 127.5 - 1, purple / 3, atol=0.02)


@pytest.mark.parametrize("finish, base_steps, refiner_steps", [("True", 3, 1), ("False", 4, 1)])
def test_the_refiner_goes_the_last_part(files, fakes, finish, base_steps, refiner_steps):
    word = files / "SD-XL-base-1.0_3000_ti.ckpt"
    flags = ("--add_pipeline", "True", "--stage2strength", 0.4, "--finish_denoising", finish, "--num_cols", 2)
    *paths, _ = script.main(command(files, *flags, "--textual_inversion_weight", word))
    base, refiner = fakes.built
    assert fakes.loaded == ["base.safetensors", "refiner.safetensors"]
    assert (len(base.calls), len(refiner.calls)) == (base_steps, refiner_steps)
    assert "<cat-toy>" in refiner.conditioner.text_embedders[0].tokenizer.placeholders
    assert json.loads(read(paths[0])[1]["settings"])["refiner"] == "refiner.safetensors"


WRONG = [
    (["--seed", "-1"], "--seed -1"),
    (["--num_cols", "0"], "--num_cols 0"),
    (["--weight", "nowhere.ckpt"], "--weight 'nowhere.ckpt' does not exist"),
    (["--config", "nowhere.yaml"], "--config 'nowhere.yaml' does not exist"),
    (["--prompt", "nowhere.txt"], "--prompt 'nowhere.txt'"),
    (["--textual_inversion_weight", "nowhere.ckpt"], "--textual_inversion_weight 'nowhere.ckpt' does not"),
    (["--textual_inversion_weight", "{}/base.safetensors"], "base.safetensors"),
    (["--textual_inversion_weight", "{}/style.safetensors", "--num_vectors", "9"], "--num_vectors 9, but"),
    (["--task", "img2img"], "--task img2img and --img"),
    (["--img", "{}/start.jpg"], "--task img2img and --img"),
    (["--task", "img2img", "--img", "{}/start.jpg", "--strength", "1.5"], "strength 1.5"),
    (["--add_pipeline", "True", "--stage2strength", "-1"], "stop -1.0"),
    (["--add_pipeline", "True", "--pipeline_weight", "nowhere.ckpt"], "--pipeline_weight 'nowhere.ckpt'"),
    (["--sd_xl_base_ratios", "7.7"], "--sd_xl_base_ratios '7.7' is no size"),
    (["--sd_xl_base_ratios", "100x64"], "width is 100 pixels"),
    (["--sampler", "Magic"], "--sampler 'Magic' is not one of"),
    (["--init_latent_path", "{}/style.safetensors"], "is no .npy file of numbers"),
    (["--init_latent_path", "{}/flat.npy"], r"has the shape \(4, 8\); these pictures need \(1, 4, 8, 8\)"),
    (["--device_target", "Ascend"], "--device_target Ascend"),
]


@pytest.mark.parametrize("flags, said", WRONG, ids=[" ".join(flags) for flags, _ in WRONG])
def test_mistakes_show_before_weights_are_loaded(files, fakes, flags, said):
    np.save(files / "flat.npy", np.zeros((4, 8)))
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        script.main(command(files, *(flag.format(files) for flag in flags)))
    assert not fakes.loaded


def test_a_refiner_of_another_model_shows_before_the_base_draws(files, monkeypatch):
    write_tiny_weights(files / "refiner.safetensors", kind="base")
    monkeypatch.setattr(script, "load_weights", lambda engine, path: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="is the SDXL base, but the config describes the SDXL refiner"):
        script.main(command(files, "--add_pipeline", "True"))


@pytest.mark.parametrize("flags", [["--prompts", "a cat"], ["--add_pipeline", "maybe"], ["--task", "video"]])
def test_unknown_flags_and_values_stop_the_run(files, fakes, flags, capsys):
    with pytest.raises(SystemExit):
        script.main(command(files, *flags))
    assert flags[0] in capsys.readouterr().err and not fakes.built


# ---------------------------------------------------------------- with networks


def run(args):
    command = [sys.executable, SCRIPT, *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_the_readmes_command_draws_with_a_learned_word(files):
    write_tiny_weights(files / "base.safetensors")
    words = [files / "SD-XL-base-1.0_3000_ti.ckpt", files / "style.safetensors"]
    flags = ("--task", "txt2img", "--num_cols", 4, "--textual_inversion_weight", *words)
    flags += ("--placeholder_token", "<cat-toy>", "<style>")
    args = command(files, *flags, prompt="a <cat-toy> backpack, in (<style>:1.2)")
    done = run(args)
    assert done.returncode == 0, done.stderr
    pictures = [read(path)[0] for path in sorted((files / "out").glob("0001_*_seed*.png"))]
    assert len(pictures) == 4 and all(picture.std() > 5 for picture in pictures)
    assert "no prompt" not in done.stderr and "4/4" in done.stderr  # steps


def test_a_wrong_command_ends_with_one_line():
    args = ["--config", str(CONFIGS["base"]), "--weight", "nowhere.ckpt", "--prompt", "a cat"]
    done = run(args)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: --weight 'nowhere.ckpt' does not exist."
    assert "Traceback" not in done.stderr


def test_img2img_and_the_refiner_run_end_to_end_in_half_precision(files):
    write_tiny_weights(files / "base.safetensors")
    write_tiny_weights(files / "refiner.safetensors", kind="refiner")
    flags = ("--task", "img2img", "--img", files / "start.jpg", "--add_pipeline", "True")
    flags += ("--stage2strength", 0.4, "--textual_inversion_weight", files / "SD-XL-base-1.0_3000_ti.ckpt")
    path, _ = script.main(command(files, *flags, "--ms_amp_level", "O2"))
    pixels, _ = read(path)
    assert pixels.shape == (64, 64, 3) and pixels.std() > 5
