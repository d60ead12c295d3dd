"""Compare training steps and drawing with diffusers: ratios of times and memory, ours to theirs.

    pip install -r tests/peers/requirements.txt
    python tools/benchmark_peers.py --rounds 3                  # the small model that ships
    python tools/benchmark_peers.py --model full --side 256 512 --batch 1 --rounds 1 --out peers.json

What is measured is that of tools/benchmark.py. diffusers trains as its example script does (tools/benchmarks/theirs.py
says what differs) and draws by its own pipeline, on networks of the same sizes, in fp32 and bf16. A round runs ours and
theirs in turn, each case in a process of its own. A ratio is that of the medians over rounds; beside it stand the
smallest and the largest ratio of a round.
"""

import argparse
import statistics
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product, zip_longest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tools import benchmarks  # noqa: E402

THEIR_PRECISIONS = ("fp32", "bf16")
SETTING = ("model", "task", "side", "batch")  # fields of a Case that are the same on both sides of a ratio
BEST = "best"


@dataclass(frozen=True)
class Comparison:
    """A ratio that is of interest, and how large it may be."""

    task: str
    figure: str  # of the results
    ours: str  # precision; BEST is the one with the fastest median
    theirs: str
    goals: dict  # model -> largest ratio


COMPARISONS = [
    Comparison("train", "seconds", BEST, "fp32", {"full": 0.5}),
    Comparison("train", "seconds", BEST, "bf16", {"full": 1.0}),
    Comparison("train", "seconds", "fp32", "fp32", {"full": 0.85, "small": 0.8}),
    *(Comparison("train", "peak_gib", name, name, {"full": 1.0, "small": 1.0}) for name in THEIR_PRECISIONS),
    Comparison("sample", "seconds", BEST, "fp32", {"full": 0.5}),
    Comparison("sample", "seconds", BEST, "bf16", {"full": 1.0}),
    *(Comparison("sample", "peak_gib", name, name, {}) for name in THEIR_PRECISIONS),
]
NAMES = {("train", "seconds"): "s a step", ("sample", "seconds"): "s a picture"}


def main(argv=None):
    """Run the command; returns the ratios, as `ratios` gives them.

    Raises:
        ValueError: PyTorch or diffusers is missing, or a flag is impossible.
    """
    args = parse_args(argv)
    if args.rounds < 1:
        raise ValueError(f"--rounds {args.rounds}: at least 1.")
    runs = make_runs(args)
    if missing := [name for name in ("torch", "diffusers", "transformers") if find_spec(name) is None]:
        raise ValueError(f"{' and '.join(missing)} are missing; pip install -r tests/peers/requirements.txt")
    facts = benchmarks.machine_facts(("mindspore", "torch", "diffusers", "transformers", "numpy"))
    print(benchmarks.describe(facts), flush=True)
    results, compared = [], []
    with tempfile.TemporaryDirectory() as folder:
        run_case = benchmarks.Runner(folder)
        for round_, (number, (program, case)) in product(range(1, args.rounds + 1), enumerate(runs, start=1)):
            print(f"round {round_}, {number} of {len(runs)}: {program}, {case}", file=sys.stderr, flush=True)
            results.append({"round": round_, **run_case(program, case)})
            compared = ratios(results)
            if args.out:
                benchmarks.write_json(args.out, facts, results, ratios=compared)
    print(f"\n{table(compared)}")
    for error in dict.fromkeys(failures(results)):
        print(error)
    return compared


def make_runs(args):
    """[(program, Case)] of a round: ours and theirs in turn for each setting."""
    ours = benchmarks.make_cases(args, args.precision, [args.cache])
    theirs = benchmarks.make_cases(args, args.their_precision, [args.cache])
    runs = []
    for setting in dict.fromkeys(map(setting_of, map(vars, ours))):
        own = [("ours", case) for case in ours if setting_of(vars(case)) == setting]
        others = [("theirs", case) for case in theirs if setting_of(vars(case)) == setting]
        runs += [run for pair in zip_longest(own, others) for run in pair if run is not None]
    return runs


def setting_of(result):
    return tuple(result[name] for name in SETTING)


def ratios(results):
    """Ours divided by theirs, for every comparison of which both sides were measured.

    Args:
        results: of all rounds, in order.

    Returns:
        list of dicts: the setting, "figure", precisions, medians of "ours" and "theirs", "ratio", "low" and "high" over
        rounds, and "goal", None where there is none.
    """
    compared = []
    for setting in dict.fromkeys(map(setting_of, results)):
        model, task = setting[:2]
        measured = [result for result in results if setting_of(result) == setting and "error" not in result]
        for wanted in COMPARISONS:
            if wanted.task != task:
                continue
            own = best_precision(measured) if wanted.ours == BEST else wanted.ours
            ours, theirs = (
                {r["round"]: r[wanted.figure] for r in measured if (r["program"], r["precision"]) == side}
                for side in (("ours", own), ("theirs", wanted.theirs))
            )
            if not ours or not theirs:
                continue
            medians = statistics.median(ours.values()), statistics.median(theirs.values())
            by_round = [ours[r] / theirs[r] for r in ours if r in theirs] or [medians[0] / medians[1]]
            compared.append({
                **dict(zip(SETTING, setting)),
                "figure": wanted.figure,
                "our_precision": own,
                "their_precision": wanted.theirs,
                "ours": medians[0],
                "theirs": medians[1],
                "ratio": medians[0] / medians[1],
                "low": min(by_round),
                "high": max(by_round),
                "goal": wanted.goals.get(model),
            })  # fmt: skip
    return compared


def best_precision(results):
    """Our precision with the fastest median; None where we have no figures."""
    times = {}
    for result in results:
        if result["program"] == "ours":
            times.setdefault(result["precision"], []).append(result["seconds"])
    return min(times, key=lambda name: statistics.median(times[name]), default=None)


def table(compared):
    """Markdown: one row a ratio."""
    header = ["model", "side", "batch", "what", "ours", "", "diffusers", "", "ratio", "of rounds", "goal", ""]
    rows = []
    for c in compared:
        verdict = "" if c["goal"] is None else "reached" if c["ratio"] <= c["goal"] else "missed"
        what = NAMES.get((c["task"], c["figure"]), f"peak GiB, {c['task']}")
        rows.append([
            benchmarks.short_name(c["model"]), c["side"], c["batch"], what, c["our_precision"], c["ours"],
            c["their_precision"], c["theirs"], f"{c['ratio']:.2f}", f"{c['low']:.2f} to {c['high']:.2f}",
            "" if c["goal"] is None else f"<= {c['goal']:g}", verdict,
        ])  # fmt: skip
    return benchmarks.markdown(header, rows)


def failures(results):
    """A line for each case that gave no figures."""
    for r in results:
        if "error" in r:
            setting = f"{r['model']}, {r['task']}, {r['side']} px, batch {r['batch']}, {r['precision']}"
            yield f"{r['program']}, {setting} failed: {r['error']}"


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    benchmarks.add_case_flags(parser, benchmarks.PRECISIONS)
    parser.add_argument("--their_precision", nargs="+", choices=THEIR_PRECISIONS, default=list(THEIR_PRECISIONS),
                        help="default: both")  # fmt: skip
    parser.add_argument("--cache", choices=benchmarks.CACHES, default="filled",
                        help="of our compiled graphs; compiling takes memory, too (default filled)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3, help="runs of every case (default 3)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
