"""What is kept of a run survives anything: kills at any moment, damage, an earlier run in the same folder."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from gm.textual_inversion.embedding_file import read_embedding
from gm.training.state import LearnedFiles, LossLog, load_state, run_folder, save_state, set_aside

ROOT = Path(__file__).parents[2]
ARRAYS = {"rows": np.arange(6, dtype=np.float32).reshape(2, 3), "first_moment.rows": np.ones((2, 3), np.float32)}

SAVES_WITHOUT_END = """
import sys
from tests.training.test_state import save_all
for step in range(int(sys.argv[2]), 10**6):
    save_all(sys.argv[1], step)
    print(step, flush=True)
"""


def concept(value=0.5):
    rows = [np.full((2, 768), value, np.float32), np.full((2, 1280), value, np.float32)]
    return SimpleNamespace(token="<cat-toy>", rows=lambda: rows)


def result(loss):
    return SimpleNamespace(loss=loss, grad_norm=1.0, rate=1e-3)


def save_all(folder, step):
    """What a run writes at a step, in its order."""
    log = LossLog(folder)
    log.resume(step - 1, folder)
    log.add(step, result(1 / (step + 1)), step)
    log.save()
    files = LearnedFiles(folder, "SD-XL-base-1.0", concept(step % 100), metadata={}, keep=3)
    files.save(step, final=True)
    save_state(Path(folder) / "state", step, arrays={"rows": np.full((200, 200), step, np.float32)}, numbers={})


def check_every_file(folder):
    """Every file under a final name is whole. Returns the step to go on from."""
    arrays, numbers = load_state(folder)
    for path in Path(folder).rglob("*"):
        if path.suffix == ".npz":
            arrays, own = load_state(path)
            assert (arrays["rows"] == own["step"]).all()
        elif path.suffix in (".ckpt", ".safetensors"):
            learned = read_embedding(path)
            assert (learned.clip_g == learned.step % 100).all()
        elif path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".csv":
            steps = [int(line.split(",")[0]) for line in path.read_text().splitlines()[1:]]
            assert steps == list(range(len(steps))) and len(steps) > numbers["step"]
        else:
            assert path.is_dir() or path.name.startswith(".")
    return numbers["step"]


def test_no_kill_at_any_moment_leaves_a_broken_file(tmp_path):
    moments = random.Random(0)
    step = 0
    for _ in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVES_WITHOUT_END, str(tmp_path), str(step)], stdout=subprocess.PIPE, cwd=ROOT
        )
        process.stdout.readline()  # one save is done
        time.sleep(moments.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        reached = check_every_file(tmp_path)
        assert reached >= step
        step = reached + 1


def test_a_state_comes_back_bit_for_bit(tmp_path):
    numbers = {"learner": {"updates": 3, "loss_scale": {"value": 2.0**16}}, "batches": {"position": 7}}
    save_state(tmp_path / "state", 7, arrays=ARRAYS, numbers=numbers)
    for path in (tmp_path, tmp_path / "state", tmp_path / "state" / "step_00000007.npz"):
        arrays, back = load_state(path)
        assert back == {**numbers, "step": 7} and set(arrays) == set(ARRAYS)
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(arrays[name], array)
            assert arrays[name].dtype == array.dtype
        assert run_folder(path) == tmp_path


def test_the_newest_two_states_are_kept(tmp_path):
    for step in (5, 10, 100):
        save_state(tmp_path, step, arrays=ARRAYS, numbers={})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000010.npz", "step_00000100.npz"]


def test_a_damaged_newest_state_gives_way_to_the_one_before(tmp_path, caplog):
    for step in (4, 8):
        save_state(tmp_path / "state", step, arrays=ARRAYS, numbers={})
    newest = tmp_path / "state" / "step_00000008.npz"
    newest.write_bytes(newest.read_bytes()[:-100])
    assert load_state(tmp_path)[1]["step"] == 4
    assert "step_00000008.npz is damaged" in caplog.text
    with pytest.raises(ValueError, match="step_00000008.npz is damaged"):  # asked for by name
        load_state(newest)
    (tmp_path / "state" / "step_00000004.npz").write_bytes(b"")
    with pytest.raises(ValueError, match="every state in .* is damaged"):
        load_state(tmp_path)


def test_damage_anywhere_in_a_state_is_found_or_harmless(tmp_path):
    save_state(tmp_path, 1, arrays=ARRAYS, numbers={"learner": [1, 2, 3]})
    path = tmp_path / "step_00000001.npz"
    whole = path.read_bytes()
    draw = np.random.default_rng(0)
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(draw.integers(1, 4)):
            damaged[draw.integers(len(damaged))] = draw.integers(256)
        path.write_bytes(damaged[: draw.choice([len(damaged), draw.integers(len(damaged))], p=[0.8, 0.2])])
        try:
            arrays, numbers = load_state(path)
        except ValueError:
            continue
        assert numbers == {"learner": [1, 2, 3], "step": 1} and set(arrays) == set(ARRAYS)
        assert all(np.array_equal(arrays[name], array) for name, array in ARRAYS.items())


def test_a_missing_or_foreign_state_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no state of a run is there .*nowhere/state"):
        load_state(tmp_path / "nowhere")
    other = tmp_path / "loss.csv"
    other.write_text("step,loss\n")
    with pytest.raises(ValueError, match="no state of a run"):
        load_state(other)


def test_an_earlier_run_is_set_aside_and_nothing_else_is_moved(tmp_path):
    set_aside(tmp_path, "<cat-toy>")
    assert list(tmp_path.iterdir()) == []
    for _ in range(2):
        save_all(tmp_path, 0)
        (tmp_path / "run.json").write_text("{}")
        (tmp_path / "sd_xl_base_1.0.safetensors").write_bytes(b"a model that lies here")
        (tmp_path / "latents").mkdir(exist_ok=True)
        set_aside(tmp_path, "<cat-toy>")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "earlier_1", "earlier_2", "latents", "sd_xl_base_1.0.safetensors"
    ]  # fmt: skip
    for number in (1, 2):
        earlier = tmp_path / f"earlier_{number}"
        assert (earlier / "run.json").exists() and read_embedding(earlier / "cat-toy.safetensors").step == 0
        assert load_state(earlier)[1]["step"] == 0


def test_learned_files_are_pruned_by_step_and_the_last_also_serves_other_programs(tmp_path):
    files = LearnedFiles(tmp_path, "SD-XL-base-1.0", concept(), metadata={"seed": "42"}, keep=2)
    assert files.newest() is None
    for step in (9, 10, 100):
        path = files.save(step, final=step == 100)
        assert path == files.newest() == tmp_path / f"SD-XL-base-1.0_{step}_ti.ckpt"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "SD-XL-base-1.0_100_ti.ckpt", "SD-XL-base-1.0_10_ti.ckpt", "cat-toy.safetensors"
    ]  # fmt: skip
    for name in ("SD-XL-base-1.0_100_ti.ckpt", "cat-toy.safetensors"):
        learned = read_embedding(tmp_path / name)
        assert (learned.step, learned.base_model, learned.metadata["seed"]) == (100, "SD-XL-base-1.0", "42")
        assert (learned.clip_l == 0.5).all() and learned.clip_g.shape == (2, 1280)


def test_the_loss_log_goes_on_where_the_state_was_saved(tmp_path):
    log = LossLog(tmp_path)
    for step in range(1, 6):
        log.add(step, result(step / 10), step // 2)
    log.save()
    resumed = LossLog(tmp_path)
    resumed.resume(3, tmp_path)
    resumed.add(4, result(0.25), 2)
    resumed.save()
    lines = (tmp_path / "loss.csv").read_text().splitlines()
    assert lines[0] == "step,update,loss,grad_norm,learning_rate"
    assert lines[3:] == ["3,1,0.3,1,0.001", "4,2,0.25,1,0.001"]


@pytest.mark.parametrize("losses", [[], [0.5], [0.0, 0.0], [1.0, float("inf"), float("nan"), 0.5], [float("nan")]])
def test_any_losses_can_be_drawn(tmp_path, losses):
    log = LossLog(tmp_path)
    for step, loss in enumerate(losses, start=1):
        log.add(step, result(loss), step)
    log.save()
    picture = np.asarray(Image.open(tmp_path / "loss.png"))
    assert picture.shape == (400, 800, 3) and (picture == 255).mean() > 0.8
