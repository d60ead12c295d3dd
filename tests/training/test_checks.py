"""What is wrong with a run is said before it starts, all of it at once."""

import functools

import numpy as np
import pytest
from PIL import Image

from gm.config import build_engine
from gm.textual_inversion.embedding_file import Embedding, write_embedding
from gm.training.args import parse_train_args
from gm.training.checks import check_run
from gm.training.state import save_state
from tests.tiny import CONFIGS


@functools.cache
def engine():
    return build_engine(CONFIGS["micro"])


@pytest.fixture
def run(tmp_path):
    """A run that is in order; flags in `check` change it."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (70, 80), "red").save(pictures / "1.jpg")
    (tmp_path / "weights.ckpt").touch()
    return [
        "--config", str(CONFIGS["micro"]), "--weight", str(tmp_path / "weights.ckpt"), "--data_path", str(pictures),
        "--save_path", str(tmp_path / "out"), "--placeholder_token", "<cat-toy>",
    ]  # fmt: skip


def check(run, *flags):
    check_run(parse_train_args([*run, *map(str, flags)]), engine())


def write_learned(path, *, num_vectors=2, widths=(16, 16)):
    rows = [np.ones((num_vectors, width), np.float32) for width in widths]
    write_embedding(path, Embedding("<cat-toy>", *rows), format="webui")
    return path


def test_a_run_in_order_passes(run, tmp_path):
    learned = write_learned(tmp_path / "learned.safetensors")
    save_state(tmp_path / "out" / "state", 3, arrays={}, numbers={})
    check(run, "--infer_during_train", "True", "--num_vectors", 2, "--initializer_embedding", learned)
    check(run, "--resume", tmp_path / "out", "--num_vectors", 30)
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / "state"]  # the probe of the folder is gone


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--weight", "{tmp}/none.ckpt"], r"--weight '.*none.ckpt' does not exist"),
        (["--data_path", "{tmp}/nowhere"], r"--data_path '.*nowhere' is not a folder"),
        (["--data_path", "{tmp}"], "no pictures in"),
        (["--placeholder_token", "cat"], "'cat' is already"),
        (["--placeholder_token", "<cat/toy>"], "names a file of the run, too; use letters"),
        (["--num_vectors", "0"], "--num_vectors 0: it must be 1 to 70"),
        (["--num_vectors", "71"], "--num_vectors 71: it must be 1 to 70"),
        (["--num_vectors", "70", "--template_file", "{tmp}/long.txt"], "leaves room for"),
        (["--template_file", "{tmp}/none.txt"], "--template_file '.*none.txt' is not a file"),
        (["--template_file", "{tmp}/bare.txt"], "line 2: a photo"),
        (["--initializer_token", "toy", "--initializer_embedding", "{tmp}/wide.safetensors"], "exclude each other"),
        (["--num_vectors", "2", "--initializer_embedding", "{tmp}/wide.safetensors"], "learned for another model"),
        (["--num_vectors", "3", "--initializer_embedding", "{tmp}/two.safetensors"], "give --num_vectors 2"),
        (["--initializer_embedding", "{tmp}/none.pt"], "none.pt"),
        (["--resume", "{tmp}/nowhere"], "--resume '.*nowhere': no state of a run is there"),
        (["--save_path", "{tmp}/weights.ckpt"], "--save_path '.*weights.ckpt' cannot be written to: File exists"),
        (["--save_path", "/proc/run"], "--save_path '/proc/run' cannot be written to"),
        (["--total_step", "3", "--gradient_accumulation_steps", "4"], "nothing would be learned"),
        (["--infer_during_train", "True", "--validation_prompt", "a photo"], "'a photo' has no <cat-toy> in it"),
        (["--infer_during_train", "True", "data.target_size=96"], "multiple of 64"),
        (["data.target_size=70"], "data.target_size .* multiples of 4 pixels"),
        (["data.crop=middle"], "middle"),
    ],
)
def test_each_problem_is_named(run, tmp_path, flags, words):
    (tmp_path / "long.txt").write_text(" ".join(["photo"] * 60) + " {placeholder}\n")
    (tmp_path / "bare.txt").write_text("a {placeholder}\na photo\n")
    write_learned(tmp_path / "wide.safetensors", widths=(768, 1280))
    write_learned(tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=words):
        check(run, *(flag.format(tmp=tmp_path) if flag.startswith("{") else flag for flag in flags))


def test_all_problems_are_named_at_once(run, tmp_path):
    (tmp_path / "pictures" / "2.png").write_bytes(b"not a picture")
    (tmp_path / "pictures" / "3.png").write_bytes(b"")
    flags = "--weight none.ckpt --num_vectors 99 --placeholder_token dog --resume nowhere --save_path /proc/run"
    with pytest.raises(ValueError) as error:
        check(run, *flags.split(), "--template_file", "none.txt", "--infer_during_train", "True")
    text = str(error.value)
    for part in ("none.ckpt", "2.png", "3.png", "--placeholder_token 'dog'", "nowhere", "/proc/run", "none.txt"):
        assert part in text
    lines = text.splitlines()
    assert lines[0] == "this run cannot start:" and sum(line.startswith("- ") for line in lines) == 6


def test_sides_are_multiples_of_what_autoencoder_and_unet_divide_them_by(run):
    run[1] = str(CONFIGS["base"])  # 8 times smaller latents, halved twice
    for size, fits in ((96, True), ("[64,160]", True), (80, False), ("[64,16]", False)):
        args = parse_train_args([*run, f"data.target_size={size}"])
        if fits:
            check_run(args, build_engine(args.config))
        else:
            with pytest.raises(ValueError, match="multiples of 32 pixels"):
                check_run(args, build_engine(args.config))


def test_too_little_room_on_the_disk_is_seen(run, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 2**20}))
    with pytest.raises(ValueError, match="only 1 MiB are free"):
        check(run)
