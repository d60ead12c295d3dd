"""train_textual_inversion.py as a user meets it: what a run writes, how it stops, goes on and fails.

The model is "micro" (tests/tiny.py). Compiling its step still takes a dozen seconds, so that few runs train; the others
stop where the training would begin, or use the network that the first one compiled.
"""

import contextlib
import copy
import functools
import io
import json
import logging
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from omegaconf import OmegaConf
from PIL import Image
from tqdm import tqdm

import train_textual_inversion as script
from gm.textual_inversion.embedding_file import read_embedding
from gm.training.state import load_state
from tests.tiny import CONFIGS, write_tiny_weights

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "datasets" / "cat_toy"
STEPS = 40
RECIPE = ["--num_vectors", "2", "--gradient_accumulation_steps", "2", "--total_step", str(STEPS)]


@dataclass
class Outcome:
    folder: Path
    log: str
    run: script.Run  # as it ended
    rows: list  # before training
    frozen: dict  # every parameter of the model before training


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_tiny_weights(tmp_path_factory.mktemp("weights") / "micro.safetensors", kind="micro")


def command(weights, folder, *flags, data=PICTURES):
    """The flags of a run; of those given twice the last counts."""
    return [
        "--config", str(CONFIGS["micro"]), "--weight", str(weights), "--data_path", str(data),
        "--save_path", str(folder), "--placeholder_token", "<cat-toy>", *RECIPE, *map(str, flags),
    ]  # fmt: skip


@contextlib.contextmanager
def captured_log():
    """What is logged to the terminal meanwhile; logging and MindSpore's mode are put back afterwards."""
    root, text = logging.getLogger(), io.StringIO()
    handlers, level = list(root.handlers), root.level
    try:
        with contextlib.redirect_stderr(text):
            yield text
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        ms.set_context(mode=ms.GRAPH_MODE)


def train(arguments, *, before=lambda run: None, steps=True):
    """main() in this process. `before` is called when training would start, `steps` says whether it then does."""
    seen = {}
    original = script.Run.train

    def watched(run):
        parameters = run.engine.parameters_and_names()
        seen.update(run=run, rows=run.concept.rows(), frozen={n: p.asnumpy().copy() for n, p in parameters})
        before(run)
        if steps:
            original(run)

    script.Run.train = watched
    try:
        with captured_log() as text:
            script.main(arguments)
    finally:
        script.Run.train = original
    return Outcome(seen["run"].args.save_path, text.getvalue(), **seen)


def error_of(arguments):
    """What the program says when it fails; it must end with status 1 (a text) and no traceback."""
    argv, sys.argv = sys.argv, ["train_textual_inversion.py", *arguments]
    try:
        with captured_log() as text, pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "train_textual_inversion.py"), run_name="__main__")
    finally:
        sys.argv = argv
    assert isinstance(stop.value.code, str) and stop.value.code.startswith("error: ")
    assert "Traceback" not in text.getvalue()
    return stop.value.code


def contents(folder):
    """Every file of a folder but those that differ from start to start."""
    return {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file() and p.name != "run.json"}


@pytest.fixture(scope="module")
def finished(weights, tmp_path_factory):
    """A run that was never stopped; its pictures vanish once it trains."""
    folder = tmp_path_factory.mktemp("finished")
    pictures = folder / "pictures"
    shutil.copytree(PICTURES, pictures)
    flags = """--save_ckpt_interval 15 --max_num_ckpt 2 --log_interval 20 --infer_during_train True
        --infer_interval 30 --guidance_scale 2 optim.weight_decay=0.02""".split()
    flags += ["--validation_prompt", "a photo of a <cat-toy>", "a big <cat-toy>"]
    arguments = command(weights, folder / "run", *flags, data=pictures)
    return train(arguments, before=lambda run: shutil.rmtree(pictures))


def evaluation_loss(outcome, rows):
    """Mean loss of six fixed batches under given rows; no step is taken."""
    run, kept = outcome.run, outcome.run.concept.rows()
    set_rows(run, rows)
    batches = copy.copy(run.batches)
    batches.seed, batches.position = 99, 0
    ones, zeros = Tensor(np.ones(2, np.float32)), Tensor(np.zeros(2, np.float32))
    losses = []
    for _ in range(6):
        inputs = (Tensor(array) for array in run.loss_inputs(next(batches)))
        loss, _, _ = run.learner.cell(Tensor(False), Tensor(1.0, ms.float32), zeros, ones, *inputs)
        losses.append(float(loss.asnumpy()))
    set_rows(run, kept)
    return np.mean(losses)


def set_rows(run, rows):
    for parameter, values in zip(run.concept.parameters(), rows, strict=True):
        parameter.set_data(Tensor(values))


# ---------------------------------------------------------------- what a run does


def test_a_run_writes_learned_files_that_every_program_reads(finished):
    names = {path.name for path in finished.folder.glob("*_ti.ckpt")}
    assert names == {"SD-XL-base-1.0_30_ti.ckpt", f"SD-XL-base-1.0_{STEPS}_ti.ckpt"}  # --max_num_ckpt 2; the end saves
    rows = finished.run.concept.rows()
    for name in (f"SD-XL-base-1.0_{STEPS}_ti.ckpt", "cat-toy.safetensors"):
        learned = read_embedding(finished.folder / name)
        assert (learned.token, learned.step, learned.base_model) == ("<cat-toy>", STEPS, "SD-XL-base-1.0")
        np.testing.assert_array_equal(learned.clip_l, rows[0])
        np.testing.assert_array_equal(learned.clip_g, rows[1])
    ours = ms.load_checkpoint(str(finished.folder / f"SD-XL-base-1.0_{STEPS}_ti.ckpt"))
    tables = [value.asnumpy() for name, value in ours.items() if name.endswith("embedding_table")]
    assert all(np.array_equal(*pair) for pair in zip(tables, rows, strict=True))


def test_losses_are_written_step_by_step(finished):
    lines = [line.split(",") for line in (finished.folder / "loss.csv").read_text().splitlines()]
    assert lines[0] == ["step", "update", "loss", "grad_norm", "learning_rate"]
    assert [int(line[0]) for line in lines[1:]] == list(range(1, STEPS + 1))
    assert [int(line[1]) for line in lines[1:]] == [step // 2 for step in range(1, STEPS + 1)]
    assert all(0 < float(line[2]) < 10 and float(line[4]) == 0.05 for line in lines[1:])
    assert Image.open(finished.folder / "loss.png").size == (800, 400)


def test_previews_are_a_grid_of_steps_by_prompts(finished):
    steps = [0, 30, STEPS]
    rows = sorted((finished.folder / "previews").iterdir())
    assert [path.name for path in rows] == [f"step_{step:08d}.png" for step in steps]
    first, *_, last = (np.asarray(Image.open(path)) for path in rows)
    assert first.shape[0] >= 64 and first.shape[1] >= 2 * 64 and (first != last).any()
    sheet = np.asarray(Image.open(finished.folder / "preview.png"))
    assert sheet.shape == (3 * (first.shape[0] + 14), first.shape[1], 3)
    np.testing.assert_array_equal(sheet[-last.shape[0] :], last)
    assert finished.run.previews.args.guidance_scale == 2


def test_settings_and_versions_are_kept(finished):
    config = OmegaConf.load(finished.folder / "config.yaml")
    assert config.optim.weight_decay == 0.02 and config.data.total_step == STEPS
    facts = json.loads((finished.folder / "run.json").read_text())
    assert facts["placeholder_token"] == "<cat-toy>" and facts["optim.weight_decay"] == 0.02
    assert facts["versions"]["mindspore"] == ms.__version__


def test_the_log_tells_what_will_happen_before_compiling(finished):
    log = finished.log[: finished.log.index("compiling the training step")]
    for part in (
        "CPU, graph mode, float32, seed 42", "5 pictures in", "seen at 64 x 64 pixels", "'a photo of a <cat-toy>' is [",
        "734, 735]", "2 learned rows of 16 numbers, norms 0.0", "(vocabulary: 0.", f"{STEPS} steps, each of 1 picture",
        f"{STEPS // 2} updates", "learning rate 0.05", "latents: 0 in the cache, 5 to encode",
    ):  # fmt: skip
        assert part in log, part
    after = finished.log[len(log) :]
    assert f"step 20 of {STEPS}, update 10: loss" in after and "loss=" in after and "norm=" in after
    for step in (15, 30, STEPS):
        assert f"saved {finished.folder}/SD-XL-base-1.0_{step}_ti.ckpt" in after


def test_only_the_learned_rows_change_and_all_of_them(finished):
    learned = finished.run.concept.parameter_names()
    for name, parameter in finished.run.engine.parameters_and_names():
        same = finished.frozen[name] == parameter.asnumpy()
        assert not same.all(axis=1).any() if name in learned else same.all(), name


def test_optimizer_state_is_held_for_the_rows_alone(finished):
    engine, cell = finished.run.engine, finished.run.learner.cell
    assert [p.name for p in engine.trainable_params()] == finished.run.concept.parameter_names()
    of_model = {id(p) for _, p in engine.parameters_and_names()}
    held = [p for _, p in cell.parameters_and_names() if id(p) not in of_model]
    assert sorted(tuple(p.shape) for p in held) == [(2, 16)] * 6  # accumulated, first and second moment of two tables


def test_the_loss_of_fixed_batches_falls(finished, weights, tmp_path, mode):
    if mode == "graph":
        trained = finished
    else:
        flags = "--ms_mode 1 --total_step 4 --gradient_accumulation_steps 1 --learning_rate 0.1".split()
        trained = train(command(weights, tmp_path / "run", *flags))
        assert "CPU, pynative mode" in trained.log
        ms.set_context(mode=ms.GRAPH_MODE)  # the rows are judged by the compiled step
    learned = trained.run.concept.rows()
    before, after = evaluation_loss(finished, trained.rows), evaluation_loss(finished, learned)
    assert after < 0.99 * before


# ---------------------------------------------------------------- stopping and going on


def start(arguments):
    """The program as a process of its own (its UNet is a stand-in, for the time that compiling takes)."""
    return subprocess.Popen(
        [sys.executable, "tests/training/quick_train.py", *arguments], cwd=ROOT, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def wait_for(process, words):
    said = []
    for line in process.stdout:
        said.append(line)
        if words in line:
            return
    raise AssertionError(f"the program ended and never said '{words}':\n{''.join(said)}")


def check_every_file(folder):
    """Every file under a final name is whole, whatever happened."""
    for path in folder.rglob("*"):
        if path.name.startswith(".") or path.is_dir():
            continue
        if path.suffix in (".ckpt", ".safetensors"):
            read_embedding(path)
        elif path.suffix == ".npz":
            load_state(path)
        elif path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".yaml":
            assert "optim" in OmegaConf.load(path)
        else:
            assert path.suffix in (".csv", ".moments"), path


def test_a_run_that_was_killed_stopped_and_prolonged_ends_as_if_it_never_was(weights, tmp_path):
    folder, total = tmp_path / "run", 80
    flags = ["--total_step", total, "--save_ckpt_interval", "1"]
    whole = start(command(weights, tmp_path / "whole", *flags))
    said, _ = whole.communicate()
    assert whole.returncode == 0, said
    shutil.copytree(tmp_path / "whole" / "latents", folder / "latents")
    moments = random.Random(0)
    resume = command(weights, folder, *flags, "--resume", folder)
    for arguments in (command(weights, folder, *flags, "--total_step", "70"), resume):
        process = start(arguments)
        wait_for(process, "saved ")
        time.sleep(moments.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        check_every_file(folder)

    process = start(resume)
    wait_for(process, "saved ")
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate()
    # While a graph runs, MindSpore itself takes SIGINT and sends SIGTERM instead.
    assert process.returncode in (128 + signal.SIGINT, 128 + signal.SIGTERM) and "Traceback" not in said
    check_every_file(folder)
    step = load_state(folder)[1]["step"]
    assert f"Stopped after step {step}; all is saved. Go on with:" in said and 2 < step < total
    again = said[said.index("Go on with:") :].splitlines()[1]
    assert again.split()[:2] == ["python", str(ROOT / "train_textual_inversion.py")]
    again = again.replace("train_textual_inversion.py", "tests/training/quick_train.py", 1)  # with its stand-in UNet
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shell = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(again, shell=True, cwd=ROOT, env=shell, capture_output=True, text=True)
    assert done.returncode == 0 and f"resumed after step {step}" in done.stderr

    assert_same_end(folder, tmp_path / "whole", total)


def assert_same_end(folder, other, total):
    """Rows, optimizer state and losses of two runs are the same, bit for bit."""
    name = f"SD-XL-base-1.0_{total}_ti.ckpt"
    for rows, others in zip(load_learned(folder / name), load_learned(other / name), strict=True):
        np.testing.assert_array_equal(rows, others)
    assert (folder / "loss.csv").read_bytes() == (other / "loss.csv").read_bytes()
    ours, theirs = load_state(folder)[0], load_state(other)[0]
    assert all(np.array_equal(ours[key], theirs[key]) for key in {*ours, *theirs})


def test_a_run_resumed_elsewhere_from_one_state_ends_as_if_it_never_was(finished, weights, tmp_path):
    state = finished.folder / "state" / "step_00000030.npz"
    (tmp_path / "run" / "state").mkdir(parents=True)  # of an earlier run
    shutil.copytree(finished.folder / "latents", tmp_path / "run" / "latents")
    resumed = train(command(weights, tmp_path / "run", "--resume", state, "optim.weight_decay=0.02"))
    assert "resumed after step 30" in resumed.log and (tmp_path / "run" / "earlier_1" / "state").is_dir()
    assert_same_end(tmp_path / "run", finished.folder, STEPS)


def test_a_complete_run_says_so(finished, weights):
    before = contents(finished.folder)
    arguments = command(weights, finished.folder, "--resume", finished.folder, "optim.weight_decay=0.02")
    assert f"The run is complete: {STEPS} steps; a larger --total_step prolongs it." in train(arguments).log
    changed = {path.name for path, data in contents(finished.folder).items() if before.get(path) != data}
    assert not changed


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--placeholder_token", "<dog-toy>"], "placeholder_token was '<cat-toy>' and is '<dog-toy>' now"),
        (["--num_vectors", "3"], "num_vectors was 2 and is 3 now"),
        (["--seed", "1", "--learning_rate", "1"], "seed was 42 and is 1 now; optim.lr was 0.05 and is 1.0 now"),
        (["--version", "SDXL-small"], "model was 'SD-XL-base-1.0' and is 'SD-XL-small' now"),
        (["--config", str(CONFIGS["base"]), "--weight", "{tiny}"], "weights_fingerprint was"),
        (["--data_path", str(ROOT / "datasets" / "robot_toy")], "the pictures, their crops, their captions"),
        (["data.flip=True"], "the pictures, their crops, their captions"),
        (["--learnable_property", "style"], "learnable_property was 'object'"),
        (["--resume", "{folder}/loss.csv"], "loss.csv is damaged or no state of a run"),
        (["--resume", "{folder}/nowhere"], "no state of a run is there"),
    ],
)
def test_another_run_is_not_resumed_and_nothing_of_this_one_is_lost(finished, weights, tmp_path, flags, words):
    before = contents(finished.folder)
    values = {"folder": finished.folder, "tiny": tmp_path / "tiny.safetensors"}
    if "{tiny}" in flags:
        write_tiny_weights(values["tiny"])
    flags = [flag.format(**values) if flag.startswith("{") else flag for flag in flags]
    said = error_of(
        command(weights, finished.folder, "--resume", finished.folder, "optim.weight_decay=0.02", *flags)
    )
    assert words in said
    after = contents(finished.folder)
    assert all(after[path] == data for path, data in before.items() if path.name != "config.yaml")


def test_the_same_folder_again_reuses_latents_and_keeps_the_earlier_run(weights, tmp_path):
    arguments = command(weights, tmp_path / "run")
    train(arguments, before=lambda run: run.save(), steps=False)
    again = train(arguments, steps=False)
    assert "latents: 5 in the cache, 0 to encode" in again.log
    assert f"{tmp_path}/run holds an earlier run; its files are in {tmp_path}/run/earlier_1 now" in again.log
    assert read_embedding(tmp_path / "run" / "earlier_1" / "SD-XL-base-1.0_0_ti.ckpt").step == 0


# ---------------------------------------------------------------- what can go wrong


@pytest.mark.parametrize("limit", [100, 1000, 3000])
def test_a_full_disk_is_said_and_leaves_what_was_saved(finished, limit, monkeypatch):
    import resource

    before = contents(finished.folder)
    monkeypatch.setattr(finished.run, "step", STEPS)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # bytes that a file may have
    try:
        with pytest.raises(OSError) as error:
            finished.run.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = str(error.value)
    assert f"step {STEPS} cannot be saved" in said and f"--resume {finished.folder}" in said
    assert f"whole: {finished.folder}/SD-XL-base-1.0_{STEPS}_ti.ckpt" in said
    assert contents(finished.folder).keys() == before.keys()
    check_every_file(finished.folder)
    assert load_state(finished.folder)[1]["step"] == STEPS


def test_nan_stops_the_run_with_the_step_and_the_last_good_file(finished):
    before = contents(finished.folder)
    weight = finished.run.engine.model.diffusion_model.out[2].weight
    good, rows = weight.asnumpy().copy(), finished.run.concept.rows()
    weight.set_data(Tensor(np.full_like(good, np.nan)))
    try:
        for _ in range(2):
            with pytest.raises(FloatingPointError, match=rf"step {STEPS + 1}: the loss is nan.*_{STEPS}_ti.ckpt"):
                finished.run.take_step(tqdm(disable=True))
    finally:
        weight.set_data(Tensor(good))
    assert all(np.array_equal(*pair) for pair in zip(rows, finished.run.concept.rows(), strict=True))
    assert contents(finished.folder) == before


def test_all_that_is_wrong_is_said_at_once_and_nothing_written(weights, tmp_path):
    flags = ["--weight", "none.ckpt", "--num_vectors", "99", "--placeholder_token", "dog", "--data_path", "nowhere"]
    said = error_of(command(weights, tmp_path / "run", *flags, "--dry_run"))
    assert said.startswith("error: this run cannot start:\n- ") and said.count("\n- ") == 4
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("place", ["{weights}", "/proc/run", "{weights}/run"])
def test_a_save_path_that_cannot_be_written_is_named(weights, place):
    place = place.format(weights=weights)
    assert f"--save_path '{place}' cannot be written to" in error_of(command(weights, place))


def test_a_process_that_fails_ends_with_status_1_and_no_traceback(weights, tmp_path):
    arguments = command(weights, tmp_path, "--total_step", "1")
    done = subprocess.run(
        [sys.executable, "train_textual_inversion.py", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: --total_step 1 is less than --gradient_accumulation_steps 2" in done.stderr


def test_a_dry_run_checks_and_writes_nothing(weights, tmp_path):
    with captured_log() as text:
        script.main(command(weights, tmp_path / "run", "--dry_run", "True"))
    assert "Everything is in order; this was a dry run." in text.getvalue()
    assert "2 learned rows of 16 numbers" in text.getvalue() and list((tmp_path / "run").iterdir()) == []


# ---------------------------------------------------------------- flags that act before the first step


@pytest.fixture
def begin(weights, tmp_path, finished):
    """A run as it is when training would begin; latents are at hand."""
    shutil.copytree(finished.folder / "latents", tmp_path / "run" / "latents")
    return functools.partial(lambda *flags: train(command(weights, tmp_path / "run", *flags), steps=False))


def test_rows_start_from_words_from_a_learned_file_or_from_the_seed(begin, finished):
    table = finished.frozen["conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight"]
    photo = finished.run.engine.conditioner.text_embedders[0].tokenizer.ids("photo")
    from_word = begin("--initializer_token", "photo").rows[0]
    np.testing.assert_array_equal(from_word, table[photo * 2])
    learned = finished.folder / f"SD-XL-base-1.0_{STEPS}_ti.ckpt"
    for rows, stored in zip(begin("--initializer_embedding", learned).rows, load_learned(learned), strict=True):
        np.testing.assert_array_equal(rows, stored)
    zero, again, one = (begin("--seed", seed).rows[0] for seed in (0, 0, 1))
    assert np.array_equal(zero, again) and not np.array_equal(zero, one)


def load_learned(path):
    learned = read_embedding(path)
    return learned.clip_l, learned.clip_g


def test_captions_come_from_the_template_file_or_the_kind_of_concept(begin, tmp_path):
    (tmp_path / "captions.txt").write_text("my {placeholder} here\n")
    own = begin("--template_file", tmp_path / "captions.txt")
    assert own.run.batches.captions == [("my <cat-toy> here",)] * 5
    style = begin("--learnable_property", "style").run.batches.captions
    assert all("style" in caption or "art" in caption for caption in style[0])


def test_optimizer_settings_reach_the_step(begin):
    run = begin("--learning_rate", "0.5", "--clip_grad", "False", "--max_grad_norm", "3", "optim.beta1=0.5").run
    assert (run.learner.optim.lr, run.learner.cell.beta1) == (0.5, 0.5)
    assert (run.learner.cell.clip_grad, run.learner.cell.max_grad_norm) == (False, 3.0)


def test_the_autoencoder_is_freed_where_nothing_is_decoded(begin):
    assert not hasattr(begin().run.engine, "first_stage_model")
    assert hasattr(begin("--infer_during_train", "True").run.engine, "first_stage_model")


def test_the_version_names_the_files(begin, tmp_path):
    begin("--version", "SDXL-small").run.save()
    assert (tmp_path / "run" / "SD-XL-small_0_ti.ckpt").exists()
