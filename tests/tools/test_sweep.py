"""A sweep learns and measures every word once, goes on where it was stopped, and averages over concepts."""

import json
import subprocess
from pathlib import Path

import pytest

from gm.training.args import parse_train_args
from tools import evaluate, sweep
from tools.small_world.concepts import OBJECTS, find_concept

FIDELITY = {"cat_toy": 1.0, "robot_toy": 0.0}
NAMES = {find_concept(name).name: value for name, value in FIDELITY.items()}


class Program:
    """Stands for both commands; fails at command number `fails_at`."""

    def __init__(self, fails_at=None):
        self.ran, self.fails_at = [], fails_at

    def __call__(self, command, *, cwd, check):
        assert cwd == sweep.ROOT and check
        self.ran.append(command[1:])
        if len(self.ran) == self.fails_at:
            raise subprocess.CalledProcessError(1, command)
        if command[1] == "train_textual_inversion.py":
            flags = dict(zip(command[2::2], command[3::2], strict=True))
            assert len(list(Path(flags["--data_path"]).glob("*.png"))) == 5
            (Path(flags["--save_path"]) / "SD-XL-small_400_ti.ckpt").touch()
        else:
            flags = dict(zip(command[2::2], command[3::2], strict=True))
            rows = {
                row: {"fidelity": {"mean": value}}
                for row, value in (("learned word", NAMES[flags["--concept"]]), ("oracle prompt", 1.0))
            }
            Path(flags["--json"]).write_text(json.dumps({"rows": rows}))


def flags(tmp_path, *more):
    return ["--save_path", str(tmp_path), "--concepts", *FIDELITY, *more]


def test_every_concept_and_seed_is_learned_then_measured(tmp_path):
    program = Program()
    table = sweep.main(flags(tmp_path), run=program)
    assert [command[0] for command in program.ran] == ["train_textual_inversion.py", "tools/evaluate.py"] * 4
    fidelity = table["learned word"]["fidelity"]
    assert (fidelity.mean, fidelity.low, fidelity.high, fidelity.pictures) == (0.5, 0, 1, 4)
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written["rows"]["oracle prompt"]["fidelity"]["mean"] == 1


def test_a_stopped_sweep_goes_on_with_the_word_it_was_at(tmp_path):
    with pytest.raises(subprocess.CalledProcessError):
        sweep.main(flags(tmp_path), run=Program(fails_at=3))
    program = Program()
    sweep.main(flags(tmp_path), run=program)
    assert len(program.ran) == 6
    assert "seed_1" in " ".join(program.ran[0])
    again = Program()
    sweep.main(flags(tmp_path), run=again)
    assert again.ran == []


def test_its_commands_are_ones_that_training_and_measuring_take(tmp_path):
    program = Program()
    sweep.main(
        flags(tmp_path, "--train_flags=--num_vectors 2 --learning_rate 0.01", "--num_seeds", "1"), run=program
    )
    weights = tmp_path / "weights"
    weights.touch()
    train = parse_train_args([*program.ran[0][1:], "--weight", str(weights)])
    assert (train.num_vectors, train.optim.lr, train.placeholder_token) == (2, 0.01, "<striped-yellow-heart>")
    measure = evaluate.parse_args(program.ran[1][1:])
    assert Path(measure.textual_inversion_weight).parent == train.save_path


def test_by_default_ten_objects_are_learned():
    names = sweep.parse_args([]).concepts
    assert len(set(names)) == 10 and set(names) <= set(OBJECTS)
