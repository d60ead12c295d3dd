"""The doctor finds what is wrong, says what to do, and changes nothing."""

import pytest

from tests.tiny import CONFIGS, write_tiny_weights
from tools import doctor

TRAIN = ["--placeholder_token", "<cat-toy>", "--num_vectors", "4", "--total_step", "100"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    weights = write_tiny_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors")
    return ["--config", str(CONFIGS["base"]), "--weight", str(weights)]


def run(capsys, *argv):
    status = doctor.main([str(a) for a in argv])
    return status, capsys.readouterr().out


def test_a_run_that_can_start_is_told_what_it_does_and_needs(tiny, tmp_path, capsys):
    save = tmp_path / "run"
    status, text = run(
        capsys, *tiny, "--data_path", "datasets/cat_toy", "--save_path", save, *TRAIN,
        "--gradient_accumulation_steps", "4", "data.target_size=64",
    )  # fmt: skip
    assert status == 0 and "mend" not in text
    assert "5 pictures in datasets/cat_toy can be read; short sides 256 to 256 pixels" in text
    assert "'<cat-toy>' gets 4 rows of 32 and 48 numbers; 100 steps of 1 pictures, 25 updates" in text
    assert "tiny.safetensors is the SDXL base, whole, and fits the config" in text


def test_all_that_is_wrong_with_a_command_is_said_at_once(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    status, text = run(
        capsys, *tiny, "--data_path", "datasets/cat_toy", "--placeholder_token", "cat", "--num_vectors", "71",
        "--save_path", tmp_path / "file",
    )  # fmt: skip
    assert status == 1
    assert "--num_vectors 71" in text and "'cat' is already a CLIP token" in text and "cannot be written to" in text


def test_pictures_that_cannot_be_read_are_named(tiny, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    status, text = run(capsys, *tiny, "--data_path", tmp_path)
    assert status == 1 and "broken.png" in text


def test_weights_of_another_model_are_named(tiny, tmp_path, capsys):
    refiner = write_tiny_weights(tmp_path / "refiner.safetensors", kind="refiner")
    status, text = run(capsys, *tiny[:2], "--weight", refiner)
    assert status == 1 and "is the SDXL refiner, but the config describes the SDXL base" in text


def test_a_cut_weight_file_is_found_out(tiny, tmp_path, capsys):
    cut = tmp_path / "cut.safetensors"
    with open(tiny[3], "rb") as whole:
        cut.write_bytes(whole.read()[:-1000])
    status, text = run(capsys, *tiny[:2], "--weight", cut)
    assert status == 1 and "cut.safetensors" in text


def test_missing_weights_say_where_to_put_them(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, text = run(capsys, "--config", CONFIGS["base"], "--weight", "nowhere.ckpt")
    assert status == 1 and "'nowhere.ckpt' does not exist" in text


def test_an_old_package_is_found_out(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "2.1" if name == "numpy" else "99")
    findings = [f for f in doctor.packages() if f.level == doctor.BAD]
    assert any("numpy is 2.1" in f.text and f.advice for f in findings)


def test_too_little_memory_is_found_out(tiny, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "memory", lambda: (2**20, 2**30))
    status, text = run(capsys, *tiny)
    assert status == 1 and "GiB are free" in text
