"""Measure training steps and drawing on this machine: time, time to the first step, memory.

    python tools/benchmark.py                                   # the small model that ships
    python tools/benchmark.py --model full --side 256 512 --batch 1 --out benchmark.json

Each case runs in a process of its own, by the same calls as the commands make. A training step goes from random
latents to updated rows (10 vectors, both text encoders included); a picture goes from its prompt to its pixels, by
EulerEDM with guidance. Times are medians after a warm-up; memory is the process's largest resident size, loading
included. The user's cache of compiled graphs is neither read nor written. A case that fails is reported with
its reason.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tools import benchmarks  # noqa: E402

PHASES = ("import", "build", "load", "compile")


def main(argv=None, *, make_runner=benchmarks.Runner):
    """Run the command; returns the results, as `benchmarks.Runner` gives them.

    Args:
        make_runner: stands for benchmarks.Runner.
    """
    args = parse_args(argv)
    cases = benchmarks.make_cases(args, args.precision, args.cache)
    facts = benchmarks.machine_facts(("mindspore", "numpy"))
    print(benchmarks.describe(facts), flush=True)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        run_case = make_runner(folder)
        for number, case in enumerate(cases, start=1):
            print(f"{number} of {len(cases)}: {case}", file=sys.stderr, flush=True)
            results.append(run_case("ours", case))
            if args.out:  # what was measured is kept if the command is stopped
                benchmarks.write_json(args.out, facts, results)
    if args.profile:
        for result in results:
            print(f"\n{profile(result)}")
    for task in args.task:
        print(f"\n{table(task, [result for result in results if result['task'] == task])}")
    return results


def table(task, results):
    """Markdown: one row a case."""
    setting = ["model", "side", "batch", "precision", "cache"]
    if task == "train":
        header = ["s a step", "pictures/s", "s to first step", *(f"of it {phase}" for phase in PHASES)]
        figures = ["seconds", "per_s", "to_first_s", *(f"{phase}_s" for phase in PHASES)]
    else:
        header = ["steps", "s a picture", "of it decoding", "s to first picture"]
        figures = ["sampling_steps", "seconds", "decode_s", "to_first_s"]
    header, figures = [*setting, *header, "peak GiB"], [*setting, *figures, "peak_gib"]
    rows = [[result.get(figure, "-") for figure in figures] for result in results]
    for row, result in zip(rows, results, strict=True):
        row[0] = benchmarks.short_name(row[0])
        if "error" in result:
            row[-1] = f"failed: {result['error']}"
    return benchmarks.markdown(header, rows)


def profile(result):
    """Markdown: where the time of one step, or of one batch drawn, goes."""
    title = " ".join(str(result[key]) for key in ("task", "model", "side", "batch", "precision", "cache"))
    if "error" in result:
        return f"{title}: failed, {result['error']}"
    repetition = statistics.mean(result["times"])
    rows = [
        [name, round(calls), seconds, seconds / repetition, operations / 1e12, operations / seconds / 1e9]
        for name, (calls, seconds, operations) in sorted(result["kernels"].items(), key=lambda item: -item[1][1])
    ]
    inside = sum(row[2] for row in rows)
    rows.append(["everything else", "", repetition - inside, 1 - inside / repetition, "", ""])
    header = ["kernel", "calls", "seconds", "share", "TFLOP of products", "GFLOP/s"]
    return f"{title}\n\n{benchmarks.markdown(header, rows)}"


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    benchmarks.add_case_flags(parser, benchmarks.PRECISIONS)
    help = "of compiled graphs: empty, as at the first run, or filled by an earlier run (default: both)"
    parser.add_argument("--cache", nargs="+", choices=benchmarks.CACHES, default=benchmarks.CACHES, help=help)
    parser.add_argument("--profile", action="store_true", help="also print where the time goes")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
