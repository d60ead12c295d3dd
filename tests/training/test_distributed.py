"""Two processes that train together, started as a user would, by mpirun and by msrun."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from gm.cluster import cluster_variables, join
from gm.textual_inversion.embedding_file import read_embedding
from gm.training.state import load_state
from tests.tiny import CONFIGS, write_tiny_weights
from tests.training import rank as rank_program

ROOT = Path(__file__).parents[2]
FOREVER = "1000000"
LIMIT = 60  # seconds in which a job is gone after one of its ranks


class Job:
    """A command and all processes that come of it, known by a variable of their environment."""

    def __init__(self, command, log):
        self.mark = uuid.uuid4().hex
        self.log = log
        paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        env = {**os.environ, **paths, "GLOG_v": "3", "JOB_MARK": self.mark}
        with open(log, "w") as file:
            self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT)

    def output(self):
        return self.log.read_text()

    def processes(self, **variables):
        """Living processes of the job, those with these variables."""
        found = []
        for process in psutil.process_iter():
            try:
                env = process.environ()
                alive = process.status() != psutil.STATUS_ZOMBIE
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            if alive and env.get("JOB_MARK") == self.mark and variables.items() <= env.items():
                found.append(process)
        return found

    def running(self):
        """Whether the command runs, or something that it started."""
        return self.process.poll() is None or bool(self.processes())

    def wait_until(self, condition, *, limit=240):
        """Wait for condition() to be true and return what it gave."""
        end = time.monotonic() + limit
        while not (result := condition()):
            assert time.monotonic() < end, self.output()
            assert self.running() or condition(), self.output()
            time.sleep(0.3)
        return result

    def wait_until_gone(self):
        """Wait until nothing of the job runs any more, and return the command's exit status."""
        end = time.monotonic() + LIMIT
        while self.running():
            assert time.monotonic() < end, self.output()
            time.sleep(0.3)
        return self.process.returncode


@contextmanager
def mpirun(*command, log):
    assert shutil.which("mpirun"), "this test needs Open MPI: apt-get install openmpi-bin"
    options = ["--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable]
    with _ended(Job(["mpirun", *options, *command], log)) as job:
        yield job


@contextmanager
def msrun(*command, log, options=()):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--worker_num", "2", "--local_worker_num", "2", "--master_port", str(port), *options]
    folder = log.with_suffix("")
    with _ended(Job(["msrun", *options, "--log_dir", str(folder), *command], log)) as job:
        yield job


@contextmanager
def _ended(job):
    try:
        yield job
    finally:
        for process in job.processes():
            process.kill()
        job.process.wait()


@contextmanager
def busy_processors():
    """Every processor has something else to do: threads wait for their turn at the worst of times."""
    with ExitStack() as stack:
        for _ in range(os.cpu_count()):
            busy = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(busy.kill)
        yield


def train_command(folder, save_path, *flags, parallel=True):
    return [
        "train_textual_inversion.py", "--config", str(CONFIGS["micro"]),
        "--weight", str(folder / "micro.safetensors"), "--data_path", str(folder / "pictures"),
        "--save_path", str(save_path), "--placeholder_token", "<toy>",
        "--learning_rate", "1e-3", "--gradient_accumulation_steps", "2", "--device_target", "CPU",
        "--is_parallel", str(parallel), *flags,
    ]  # fmt: skip


def learned(save_path, step):
    """Path of the file of a step, None until it is there."""
    return next(iter(save_path.glob(f"*_{step}_ti.ckpt")), None)


def rows(path):
    embedding = read_embedding(path)
    return np.concatenate([embedding.clip_l.ravel(), embedding.clip_g.ravel()])


def test_training_with_two_ranks_under_both_launchers(tmp_path):
    """One story: mpirun stops on a signal to one rank; msrun goes on from its state, and loses one."""
    write_tiny_weights(tmp_path / "micro.safetensors", kind="micro")
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i}.png")

    first, kept = tmp_path / "first", tmp_path / "kept.npz"
    flags = ["--total_step", FOREVER, "--save_ckpt_interval"]
    with mpirun(*train_command(tmp_path, first, *flags, "5"), log=tmp_path / "first.log") as job:
        state = job.wait_until(lambda: sorted((first / "state").glob("step_*.npz")))[0]
        shutil.copy(state, kept)
        (other,) = job.processes(OMPI_COMM_WORLD_RANK="1")
        with busy_processors():
            other.send_signal(signal.SIGTERM)
            assert job.wait_until_gone() == 128 + signal.SIGTERM
        assert job.output().count(f"0/{FOREVER} [00:00<?") == 1  # one progress bar
        assert job.output().count("2 processes") == 1 and job.output().count("all is saved") == 1
    stopped_at = load_state(first)[1]["step"]
    assert stopped_at > load_state(kept)[1]["step"]

    alone = tmp_path / "alone"
    command = train_command(tmp_path, alone, "--total_step", "5", "--train_batch_size", "2", parallel=False)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
    np.testing.assert_allclose(rows(learned(first, 5)), rows(learned(alone, 5)), rtol=0, atol=1e-6)

    second = tmp_path / "second"
    flags = [*flags, "1", "--resume", str(kept)]
    command = train_command(tmp_path, second, *flags)
    with msrun(*command, log=tmp_path / "second.log", options=("--join", "True")) as job:
        path = job.wait_until(lambda: learned(second, stopped_at))
        other = job.processes(RANK_ID="1", MS_ROLE="MS_WORKER")[0]  # the second is msrun's tail of its log
        other.kill()
        assert job.wait_until_gone() != 0
        assert "Error code: -9" in job.output()
    np.testing.assert_array_equal(rows(path), rows(learned(first, stopped_at)))
    assert load_state(second)[1]["step"] >= stopped_at  # nothing saved is lost

    command = train_command(tmp_path, second, "--resume", str(kept), parallel=False)
    refused = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 1 and "processes was 2 and is 1 now" in refused.stderr


@pytest.mark.parametrize("launcher", [mpirun, msrun])
def test_ranks_hold_what_one_process_would_and_die_together(launcher, tmp_path):
    with launcher("tests/training/rank.py", log=tmp_path / "job.log") as job:
        logs = [tmp_path / "job.log", *(tmp_path / "job" / f"worker_{i}.log" for i in range(2))]

        def results():
            lines = [line for log in logs if log.exists() for line in log.read_text().splitlines()]
            found = {line for line in lines if line.startswith('{"rank"')}
            return len(found) == 2 and sorted(map(json.loads, found), key=lambda result: result["rank"])

        zero, one = job.wait_until(results)
        assert (zero.pop("rank"), one.pop("rank")) == (0, 1) and zero == one
        losses, learned_rows = rank_program.learn(rank_program.points(), world_size=1)
        np.testing.assert_allclose(zero["losses"], losses, rtol=1e-6)
        np.testing.assert_allclose(zero["rows"], learned_rows, rtol=0, atol=1e-6 * np.abs(learned_rows).max())

        name = "OMPI_COMM_WORLD_RANK" if launcher is mpirun else "RANK_ID"
        (process,) = job.processes(**{name: "1"})
        process.kill()
        status = job.wait_until_gone()
    if launcher is mpirun:
        assert status == 128 + signal.SIGKILL and "rank 1" in job.output()
    else:  # msrun without --join has ended long before; its scheduler tells
        assert "worker 1 is the first one timed out" in (tmp_path / "job" / "scheduler.log").read_text()


def test_alone_it_says_how_to_launch(monkeypatch):
    monkeypatch.delenv("OMPI_COMM_WORLD_RANK", raising=False)
    monkeypatch.delenv("MS_ROLE", raising=False)
    with pytest.raises(ValueError, match="mpirun -n N .* or 'msrun --worker_num N"):
        join("CPU")


OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_NAMESPACE": "206110721",
    "OMPI_MCA_orte_hnp_uri": "206110720.0;tcp://192.0.2.2,198.51.100.7:60369;tcp6://[fd00::2]:47023",
}


def test_ranks_of_a_job_agree_on_the_scheduler():
    first, last = (cluster_variables({**OPEN_MPI, "OMPI_COMM_WORLD_RANK": str(i)}) for i in (0, 3))
    assert (first.pop("MS_NODE_ID"), last.pop("MS_NODE_ID")) == ("0", "3") and first == last
    assert first["MS_SCHED_HOST"] == "127.0.0.1" and 10000 <= int(first["MS_SCHED_PORT"]) < 32000
    another = cluster_variables({**OPEN_MPI, "PMIX_NAMESPACE": "206176257"})
    assert another["MS_SCHED_PORT"] != first["MS_SCHED_PORT"]


def test_on_several_machines_the_scheduler_is_beside_mpirun_or_where_told():
    spread = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    assert cluster_variables(spread)["MS_SCHED_HOST"] == "192.0.2.2"
    told = {"MS_SCHED_HOST": "203.0.113.9", "MS_SCHED_PORT": "18118"}
    assert told.items() <= cluster_variables({**spread, **told}).items()
    del spread["OMPI_MCA_orte_hnp_uri"]
    with pytest.raises(ValueError, match="-x MS_SCHED_HOST="):
        cluster_variables(spread)
