"""The demo: its commands are right, nothing of the user's is touched, the sheet shows what came out."""

import importlib.util
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from gm.sampling import SamplingArgs, png_text, save_png
from gm.training.args import parse_train_args
from tools import demo
from tools.demo import Cell, contact_sheet
from tools.small_world.concepts import control_words, find_concept, prompts, real_picture

CAT = find_concept("cat_toy")
WORDS = (demo.WORD, *control_words(CAT).values())
EDITS = [prompt for prompt in prompts(CAT, demo.WORD) if prompt.group == "editability"]


@pytest.fixture
def weights(tmp_path, monkeypatch):
    path = tmp_path / "small.safetensors"
    path.touch()
    monkeypatch.setattr(demo, "SMALL", replace(demo.SMALL, weights=(str(path),)))
    return path


@pytest.fixture
def commands(weights, tmp_path):
    return list(demo.commands(tmp_path / "run").values())


class Program:
    """Stands for the commands: leaves what they would, with the toy itself as what the word came to mean."""

    def __init__(self, folder):
        self.folder, self.ran = folder, []

    def __call__(self, command, *, cwd, check):
        self.ran.append(command[1])
        assert cwd == demo.ROOT and check
        if command[1] == "train_textual_inversion.py":
            (self.folder / "previews").mkdir()
            for step in (0, 200, 400):
                row = np.full((64, 64 * len(demo.PREVIEWS), 3), step // 2, np.uint8)
                Image.fromarray(row).save(self.folder / "previews" / f"step_{step:08d}.png")
            return
        settings, number = SamplingArgs(height=64, width=64), 0
        asked = {p.text: (p, word) for word in WORDS for p in prompts(CAT, word)}
        for text in (self.folder / "prompts.txt").read_text().splitlines():
            prompt, word = asked[text]
            for seed in demo.SEEDS:
                number += 1
                scene = prompt if word != "toy" else replace(prompt, text="", wanted={"shape": "ring"})
                path = self.folder / "drawn" / f"0001_{number:02d}_seed{seed}.png"
                path.parent.mkdir(exist_ok=True)
                save_png(path, real_picture(CAT, scene, seed=seed), png_text(text, seed, settings, {}))


# ---- commands ----


def test_the_training_command_is_one_that_training_takes(commands, weights):
    args = parse_train_args([*commands[0][1:], "--weight", str(weights)])
    assert args.version.name == "SD-XL-small" and args.infer_during_train
    assert args.validation_prompts == demo.PREVIEWS
    assert args.total_step % args.infer_interval == 0
    assert len(list((demo.ROOT / args.data_path).glob("*.png"))) == 5


def test_the_sampling_command_takes_the_file_that_training_leaves(commands, tmp_path):
    path = demo.ROOT / commands[1][0]
    spec = importlib.util.spec_from_file_location("sampling_without_streamlit", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    args = script.parse_args(commands[1][1:])
    assert args.textual_inversion_weight == [str(tmp_path / "run" / f"SD-XL-small_{demo.TOTAL_STEP}_ti.ckpt")]
    assert Path(args.config).name == "sd_xl_small_textual_inversion.yaml"


def test_the_demo_runs_both_measures_what_they_drew_and_names_the_sheet_last(
    weights, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(demo, "SEEDS", range(42, 44))
    folder = tmp_path / "run"
    program = Program(folder)
    sheet = demo.main(["--save_path", str(folder)], run=program)
    assert program.ran == ["train_textual_inversion.py", "demo/sampling_without_streamlit.py"]
    assert capsys.readouterr().out.splitlines()[-1] == str(sheet) == str(folder / "sheet.png")
    assert Image.open(sheet).width == 10 + 7 * 138

    rows = json.loads((folder / "scores.json").read_text())["rows"]
    assert list(rows) == ["learned word", "oracle prompt", "class word", "real renders"]
    means = {row: [figure["mean"] for figure in figures.values()] for row, figures in rows.items()}
    assert means["learned word"] == means["oracle prompt"] == [1, 1, 0] and means["class word"][:2] == [0, 0]

    shown = demo.rows_of(folder, demo.read_drawn(folder / "drawn"))
    titles = [title.split(" (")[0] for title in shown]
    assert titles[:4] == ["training pictures", "before: step 0", "during: step 200", "after: step 400"]
    assert titles[4:] == ["edits, seed 42", "edits, seed 43"]
    assert [len(cells) for cells in shown.values()] == [5, 4, 4, 4, len(EDITS), len(EDITS)]
    *_, during, _, first, second = shown.values()
    assert [cell.picture.max() for cell in during] == [100] * 4
    assert all(cell.passed for cell in (*first, *second))
    assert [cell.caption for cell in second] == [prompt.text for prompt in EDITS]


def test_a_second_demo_leaves_the_first_alone(tmp_path):
    assert demo.next_folder(tmp_path) == tmp_path / "demo"
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo_2").mkdir()
    assert demo.next_folder(tmp_path) == tmp_path / "demo_3"


def test_missing_weights_are_named_before_anything_is_written(weights, tmp_path):
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="small.safetensors is missing"):
        demo.main(["--save_path", str(tmp_path / "run")], run=None)
    assert not (tmp_path / "run").exists()


def test_a_command_that_fails_stops_the_demo(weights, tmp_path):
    def fail(command, **_):
        raise subprocess.CalledProcessError(1, command)

    with pytest.raises(subprocess.CalledProcessError):
        demo.main(["--save_path", str(tmp_path / "run")], run=fail)


# ---- the sheet ----


def test_a_sheet_shows_each_picture_in_its_place_framed_by_its_verdict():
    def cell(value, **more):
        return Cell(np.full((64, 64, 3), value, np.uint8), **more)

    rows = {"one": [cell(10), cell(20, passed=True)], "two": [cell(30, caption="words " * 9, passed=False)]}
    sheet = np.asarray(contact_sheet(rows, side=128, gap=10, line=13)).astype(int)
    assert sheet.shape[1] == 10 + 2 * 138
    assert (sheet[35:150, 12:130] == 10).all() and (sheet[35:150, 152:270] == 20).all()
    green, red = sheet[60, 146], sheet[-130, 7]
    assert green[1] > green[0] and red[0] > red[1] and (sheet[60, 7] == 255).all()


def test_captions_are_broken_between_words_where_they_would_run_into_the_next():
    font = ImageFont.load_default(size=11)
    text = "a photo of a small <cat-toy> on a lavender background"
    lines = demo.wrap(text, 128, font)
    assert " ".join(lines) == text and len(lines) > 1
    assert max(font.getlength(line) for line in lines) <= 128
    assert demo.wrap("", 128, font) == []
