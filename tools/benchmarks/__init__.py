"""Time and memory of training steps and of drawing, each case in a process of its own.

`ours` and `theirs` are programs that measure one case with this project and with diffusers. What is here asks them,
and knows neither MindSpore nor PyTorch, so that the asking process stays small.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from gm.atomic_file import atomic_file

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs/training"
TASKS = ("train", "sample")
CACHES = ("empty", "filled")  # whether this project finds the compiled graphs of an earlier run
NUM_VECTORS = 10  # of the word that is trained
GUIDANCE = 5.0
WARM_UP = {"train": 1, "sample": 0}  # calls after the first, which compiles, that are not counted either

# Precisions of this project, and the fields of gm.runtime.RuntimeArgs that each stands for.
PRECISIONS = {"fp32": {"ms_amp_level": "O0"}, "bf16": {"ms_amp_level": "bf16"}}


@dataclass(frozen=True)
class Model:
    config: Path  # YAML of the model
    weights: Path | None  # None: random numbers, made in memory unless --weight names a file
    sides: tuple  # of pictures, pixels
    steps: int = 5  # of training that are timed


MODELS = {
    "small": Model(
        CONFIGS / "sd_xl_small_textual_inversion.yaml", ROOT / "checkpoints/sd_xl_small.safetensors", (64,), 20
    ),
    "full": Model(CONFIGS / "sd_xl_base_finetune_textual_inversion.yaml", None, (256, 512, 1024)),
}


def find_model(name):
    """A Model by its name, or a YAML file with random weights.

    Raises:
        FileNotFoundError: it is neither.
    """
    if name in MODELS:
        return MODELS[name]
    if not Path(name).is_file():
        raise FileNotFoundError(f"--model '{name}' is neither {' nor '.join(MODELS)} nor the YAML file of a model.")
    return Model(Path(name), None, (64,))


@dataclass(frozen=True)
class Case:
    """What one process measures."""

    task: str  # train: steps of training; sample: from a prompt to pixels
    model: str  # as find_model takes it
    side: int  # of the pictures, pixels
    batch: int  # pictures a step, or drawn together
    precision: str
    cache: str  # of CACHES
    repeats: int  # steps or drawings that are timed
    sampling_steps: int  # a picture
    weight: str | None = None  # file of the model's weights; None: as find_model says


# ---------------------------------------------------------------- in the process that measures


class Clock:
    """Seconds of each phase since the process was asked for.

    Args:
        started: time.monotonic() of the asking process; the clock is the same for all processes.
    """

    def __init__(self, started):
        self.last, self.phases = started, {}

    def lap(self, name):
        """A phase ends."""
        now = time.monotonic()
        self.phases[name], self.last = now - self.last, now

    def time(self, work, case, *, before=lambda: None):
        """Call `work` once as the phase "first", then to warm up, then as often as is timed; returns those times.

        Args:
            before: called before the first that is timed.
        """
        work()
        self.lap("first")
        for _ in range(WARM_UP[case.task]):
            work()
        before()
        return [self._seconds(work) for _ in range(case.repeats)]

    @staticmethod
    def _seconds(work):
        start = time.monotonic()
        work()
        return time.monotonic() - start


def measure_case(train, sample):
    """The program of a measuring process: prints a JSON line.

    Args:
        train: (Case, Clock) -> seconds of every step, and a dict of more figures.
        sample: (Case, Clock) -> seconds of every batch drawn, and a dict of more figures.
    """
    case = Case(**json.loads(sys.argv[1]))
    # Where memory runs out, this process shall end, and none beside it.
    Path("/proc/self/oom_score_adj").write_text("1000")
    clock = Clock(float(sys.argv[2]))
    clock.lap("import")
    times, figures = (train if case.task == "train" else sample)(case, clock)
    seconds = statistics.median(times)
    print(json.dumps({
        "seconds": seconds if case.task == "train" else seconds / case.batch,
        "per_s": case.batch / seconds,
        **figures,
        "to_first_s": sum(clock.phases.values()),
        **{f"{name}_s": value for name, value in clock.phases.items()},
        "compile_s": max(0.0, clock.phases["first"] - seconds),
        "peak_gib": peak_memory(),
        "times": times,
    }))  # fmt: skip


def peak_memory():
    """The largest resident memory that this process has had, GiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


# ---------------------------------------------------------------- in the process that asks


class Runner:
    """Measures cases, each in a fresh process. Cache folders are the runner's own, not the user's.

    Args:
        folder: of the caches, one a case; empty at first, and to be removed by the caller.
        start: starts a command, as subprocess.run does.
    """

    def __init__(self, folder, *, start=subprocess.run):
        self.folder, self.start = Path(folder), start

    def __call__(self, program, case):
        """Measure a case.

        Args:
            program: "ours" or "theirs".

        Returns:
            dict of the case and its figures: "seconds" of a step or of a picture drawn (median), "per_s" pictures a
            second, "to_first_s" from the process's start to the end of the first step or drawing, of which "import_s",
            "build_s", "load_s" and "first_s"; "compile_s", by how much "first_s" is longer than a later one; "decode_s"
            of a picture, "peak_gib" memory, and all "times"; "kernels" of this project, each with [calls, seconds,
            operations] of a step or batch. Or of the case and "error", why it has none.
        """
        same = dataclasses.replace(case, cache="", repeats=0, sampling_steps=0)  # for these the graphs are the same
        cache = self.folder / hashlib.sha256(f"{program} {same}".encode()).hexdigest()[:16]
        if case.cache == "empty":
            shutil.rmtree(cache, ignore_errors=True)
        elif program == "ours" and not cache.exists():
            self._run(program, dataclasses.replace(case, repeats=1, sampling_steps=1), cache)
        done = self._run(program, case, cache)
        facts = {"program": program, **dataclasses.asdict(case)}
        if done.returncode == 0:
            return facts | json.loads(done.stdout.splitlines()[-1])
        return facts | {"error": failure(done.returncode, done.stderr)}

    def _run(self, program, case, cache):
        cache.mkdir(exist_ok=True)
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        hub = os.environ.get("HF_HOME") or str(Path(home) / "huggingface")  # tokenizers stay where they are
        return self.start(
            [sys.executable, "-m", f"tools.benchmarks.{program}", _to_json(case), str(time.monotonic())],
            cwd=ROOT, env={**os.environ, "XDG_CACHE_HOME": str(cache), "HF_HOME": hub}, capture_output=True, text=True,
        )  # fmt: skip


def _to_json(case):
    return json.dumps(dataclasses.asdict(case))


def failure(returncode, stderr):
    """Why a process ended without figures, in one line."""
    if returncode == -9:
        return "killed, which is what the system does when memory runs out"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    said = (errors or lines or ["it said nothing"])[-1]
    ended = f"signal {-returncode}" if returncode < 0 else f"exit status {returncode}"
    return f"{said} ({ended})"


def add_case_flags(parser, precisions):
    """The flags that say what is measured; `precisions` are those that can be."""
    add = parser.add_argument
    add("--task", nargs="+", choices=TASKS, default=TASKS, help="default: both")
    add("--model", nargs="+", type=_model_name, default=["small"],
        help="small, full (SDXL base with random weights), or the YAML file of a model (default small)")  # fmt: skip
    add("--weight", type=Path, help="file of the model's weights (default: the small model's; random numbers, made in "
        "memory, for others; tools/random_weights.py writes a file of them)")  # fmt: skip
    add("--side", nargs="+", type=int, help="of pictures, pixels (default 64 for small; 256 512 1024 for full)")
    add("--batch", nargs="+", type=int, default=[1, 2, 4], help="pictures at a time (default 1 2 4)")
    add("--precision", nargs="+", choices=precisions, default=list(precisions), help="default: all")
    add("--steps", type=int, help="training steps that are timed (default 20 for small, else 5)")
    add("--pictures", type=int, default=3, help="drawings that are timed (default 3)")
    add("--sampling_steps", type=int, default=20, help="steps a picture (default 20)")
    add("--out", type=Path, help="also write all figures to this JSON file")


def _model_name(text):
    """A file's path as the measuring process, which may be in another folder, finds it."""
    return text if text in MODELS else str(Path(text).resolve())


def make_cases(args, precisions, caches):
    """The Cases that the flags of `add_case_flags` ask for, at these precisions and with these caches.

    Raises:
        ValueError: a flag is impossible.
        FileNotFoundError: as `find_model`.
    """
    for name in ("steps", "pictures", "sampling_steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: at least 1.")
    if min(args.batch) < 1:
        raise ValueError(f"--batch {min(args.batch)}: at least 1.")
    for side in args.side or ():
        if side < 64 or side % 64:
            raise ValueError(f"--side {side}: it must be a multiple of 64 pixels.")
    if args.weight and len(args.model) > 1:
        raise ValueError(f"--weight {args.weight} is of one model; give --model one name.")
    if args.weight and not args.weight.exists():
        raise FileNotFoundError(f"--weight '{args.weight}' does not exist.")
    weight = str(args.weight.resolve()) if args.weight else None
    cases = []
    for name in args.model:
        model = find_model(name)
        repeats = {"train": args.steps or model.steps, "sample": args.pictures}
        settings = itertools.product(args.task, args.side or model.sides, args.batch, precisions, caches)
        cases += [Case(task, name, *setting, repeats[task], args.sampling_steps, weight) for task, *setting in settings]
    return cases


def short_name(model):
    """A Case's model as tables have it."""
    return Path(model).stem


def machine_facts(packages):
    """What the figures depend on: processor, memory, versions, other load, and the command.

    Args:
        packages: names whose versions are of interest.
    """
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    return {
        "cpu": cpu.partition(":")[2].strip(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "load_average": os.getloadavg()[0],
        "environment": {
            name: value for name, value in os.environ.items() if name.startswith(("OMP_", "MS_", "ONEDNN_"))
        },
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
        "command": shlex.join(["python", *sys.argv]),
    }


def describe(facts):
    """Machine facts in a line; warns where others compute on the same machine."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    line = f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB; {versions}"
    if facts["load_average"] > 0.5:
        line += (
            f"\nThe machine is busy (load {facts['load_average']:.1f}), so times are too long; PyTorch's many times, "
        )
        line += "since its threads wait for each other in loops, unless OMP_WAIT_POLICY=passive is in the environment."
    return line


def markdown(header, rows):
    """A table. Floats have three digits."""
    cells = [[f"{value:.3g}" if isinstance(value, float) else str(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    lines = [header, ["-" * width for width in widths], *cells]
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def write_json(path, facts, results, **more):
    """Write what was measured and where."""
    with atomic_file(path) as file:
        file.write((json.dumps({"machine": facts, "results": results, **more}, indent=2) + "\n").encode())
