"""Benchmarks: every case is measured alone, a failure is a result, and ratios are those of what was measured."""

import json
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.tiny import CONFIGS
from tools import benchmark, benchmark_peers, benchmarks

FLAGS = ["--model", str(CONFIGS["micro"]), "--batch", "2", "--steps", "2", "--pictures", "1", "--sampling_steps", "2"]
ONCE = ["--cache", "empty", "--precision", "fp32"]


def test_training_and_drawing_are_measured_and_written(tmp_path, capsys):
    results = benchmark.main([*FLAGS, *ONCE, "--out", str(tmp_path / "figures.json")])
    train, sample = results
    assert (train["task"], sample["task"]) == ("train", "sample")
    for result in results:
        assert "error" not in result, result["error"]
        assert 0.1 < result["peak_gib"] < 10
        assert sum(result[f"{name}_s"] for name in ("import", "build", "load", "first")) == pytest.approx(
            result["to_first_s"]
        )
        assert result["first_s"] >= result["compile_s"] > 0
        assert result["per_s"] == pytest.approx(2 / (sum(result["times"]) / len(result["times"])))
    assert len(train["times"]) == 2 and len(sample["times"]) == 1
    assert sample["seconds"] == pytest.approx(sample["times"][0] / 2)  # of one picture
    assert 0 < sample["decode_s"] < sample["seconds"]
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["results"] == results
    assert {"cpu", "cores", "versions", "command", "load_average"} <= set(written["machine"])
    shown = capsys.readouterr().out
    assert "| micro_sdxl | 64   | 2 " in shown and "s a picture" in shown


def test_a_case_that_fails_is_reported_and_the_next_one_runs(tmp_path, capsys):
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: {target: gm.engine.NoEngine}\n")
    good = {"seconds": 0.5, "per_s": 2.0, "to_first_s": 9.0, "peak_gib": 1.0}

    class Runner(benchmarks.Runner):
        def __call__(self, program, case):
            if case.side == 64:
                return super().__call__(program, case)
            return {"program": program, **asdict(case), **good}

    flags = ["--model", str(broken), "--task", "train", "--batch", "1", "--side", "64", "128", *ONCE]
    failed, measured = benchmark.main(flags, make_runner=Runner)
    assert "NoEngine" in failed["error"] and "exit status 1" in failed["error"]
    assert measured["seconds"] == 0.5
    lines = capsys.readouterr().out.splitlines()
    assert any("failed: " in line and "| broken | 64 " in line for line in lines)
    assert any("| broken | 128 " in line and "| 0.5 " in line for line in lines)


def test_weights_are_read_from_the_file_that_is_named(tmp_path):
    file = tmp_path / "broken.safetensors"
    file.write_bytes(b"no weights")
    (failed,) = benchmark.main([*FLAGS, *ONCE, "--task", "train", "--weight", str(file)])
    assert "broken.safetensors is neither" in failed["error"]


@pytest.mark.parametrize(
    "returncode, stderr, said",
    [
        (-9, "loading\n", "memory runs out"),
        (-11, "", "it said nothing (signal 11)"),
        (1, "RuntimeError: Allocate memory failed\n\n- C++ Call Stack:\nhost.cc:12\n", "Allocate memory failed"),
        (1, "Traceback\nValueError: first\nDuring it\nOSError: second\n", "OSError: second (exit status 1)"),
    ],
)
def test_a_failure_is_told_in_a_line(returncode, stderr, said):
    message = benchmarks.failure(returncode, stderr)
    assert said in message and "\n" not in message


def test_cases_are_every_combination_with_the_models_own_sizes():
    args = benchmark.parse_args(["--model", "small", "full", "--task", "train", "--batch", "1", "2"])
    cases = benchmarks.make_cases(args, ["fp32"], ["empty"])
    assert [(case.model, case.side, case.batch, case.repeats) for case in cases] == [
        ("small", 64, 1, 20),
        ("small", 64, 2, 20),
        *(("full", side, batch, 5) for side in (256, 512, 1024) for batch in (1, 2)),
    ]


def test_a_cache_is_empty_or_filled_by_the_same_case_and_never_the_users(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "user")
    ran = []

    def start(command, *, env, **_):
        case, cache = json.loads(command[3]), Path(env["XDG_CACHE_HOME"])
        assert env["HF_HOME"] == "user/huggingface"
        ran.append((case["side"], case["repeats"], len(list(cache.iterdir()))))
        (cache / str(len(ran))).touch()
        return subprocess.CompletedProcess(command, 0, stdout='warning\n{"seconds": 1}\n')

    runner = benchmarks.Runner(tmp_path, start=start)
    for side, cache in ((64, "filled"), (64, "filled"), (128, "empty"), (128, "filled"), (128, "empty")):
        case = benchmarks.Case("train", "small", side, 1, "fp32", cache, repeats=3, sampling_steps=2)
        assert runner("ours", case) == {"program": "ours", **asdict(case), "seconds": 1}
    filling = (64, 1, 0)
    assert ran == [filling, (64, 3, 1), (64, 3, 2), (128, 3, 0), (128, 3, 1), (128, 3, 0)]


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--side", "100"], "--side 100"),
        (["--batch", "0"], "--batch 0"),
        (["--steps", "0"], "--steps 0"),
        (["--model", "nowhere.yaml"], "nowhere.yaml"),
        (["--weight", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--model", "small", "full", "--weight", "."], "one model"),
    ],
)
def test_impossible_flags_are_named(flags, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        benchmark.main(flags)


# ---------------------------------------------------------------- ratios


def result(program, precision, round_, seconds, *, task="train", peak=2.0, model="full"):
    setting = {"task": task, "model": model, "side": 256, "batch": 1, "precision": precision}
    return {"round": round_, "program": program, **setting, "seconds": seconds, "peak_gib": peak}


def failed(program, precision, round_):
    return {key: value for key, value in result(program, precision, round_, 0).items() if key != "seconds"} | {
        "error": "killed"
    }


def compared(results):
    return {
        (c["figure"], c["our_precision"], c["their_precision"], c["goal"]): c for c in benchmark_peers.ratios(results)
    }


def test_a_ratio_is_of_medians_and_beside_it_stand_the_rounds():
    ours = [result("ours", "fp32", r, s) for r, s in enumerate((1.0, 2.0, 9.0))]
    theirs = [result("theirs", "fp32", r, s, peak=4.0) for r, s in enumerate((4.0, 5.0, 6.0))]
    found = compared(ours + theirs)
    assert set(found) == {
        ("seconds", "fp32", "fp32", 0.5),
        ("seconds", "fp32", "fp32", 0.85),
        ("peak_gib", "fp32", "fp32", 1.0),
    }
    time = found["seconds", "fp32", "fp32", 0.85]
    assert (time["ratio"], time["low"], time["high"]) == (2 / 5, 1 / 4, 9 / 6)
    assert found["peak_gib", "fp32", "fp32", 1.0]["ratio"] == 0.5


def test_our_best_precision_meets_both_of_theirs_and_memory_its_like():
    results = [result("ours", "fp32", 1, 8.0), result("ours", "bf16", 1, 4.0, peak=1.0)]
    results += [result("theirs", "fp32", 1, 10.0, peak=4.0), result("theirs", "bf16", 1, 5.0)]
    ratios = {key: c["ratio"] for key, c in compared(results).items()}
    assert ratios == {
        ("seconds", "bf16", "fp32", 0.5): 0.4,
        ("seconds", "bf16", "bf16", 1.0): 0.8,
        ("seconds", "fp32", "fp32", 0.85): 0.8,
        ("peak_gib", "fp32", "fp32", 1.0): 0.5,
        ("peak_gib", "bf16", "bf16", 1.0): 0.5,
    }


def test_goals_are_those_of_the_model_and_the_table_says_which_were_reached():
    results = [result(*side, 1, 1.0, model="small") for side in (("ours", "fp32"), ("theirs", "fp32"))]
    table = benchmark_peers.table(benchmark_peers.ratios(results)).splitlines()[2:]
    assert ["missed" in line for line in table] == [False, True, False]
    assert "<= 0.8 " in table[1] and "reached" in table[2]


def test_a_failed_run_leaves_the_other_rounds_and_is_told():
    results = [result("ours", "fp32", 1, 3.0), failed("theirs", "fp32", 1)]
    assert benchmark_peers.ratios(results) == []
    assert list(benchmark_peers.failures(results)) == ["theirs, full, train, 256 px, batch 1, fp32 failed: killed"]
    results += [failed("ours", "fp32", 2), result("theirs", "fp32", 2, 6.0)]  # the sides met in no round
    time = compared(results)["seconds", "fp32", "fp32", 0.5]
    assert (time["ratio"], time["low"], time["high"]) == (0.5, 0.5, 0.5)


def test_ours_and_theirs_take_turns():
    args = benchmark_peers.parse_args(["--batch", "1", "2", "--task", "train", "--precision", "fp32"])
    runs = benchmark_peers.make_runs(args)
    assert [(program, case.batch, case.precision) for program, case in runs] == [
        (program, batch, precision)
        for batch in (1, 2)
        for program, precision in (("ours", "fp32"), ("theirs", "fp32"), ("theirs", "bf16"))
    ]
