"""Learn and measure many words on the small model: how good is a recipe, over concepts and seeds?

    python tools/sweep.py --save_path runs/sweep           # 10 held-out objects x 2 seeds
    python tools/sweep.py --save_path runs/slow --train_flags="--num_vectors 2 --learning_rate 1e-3"
    python tools/sweep.py --save_path runs/styles --concepts sticker_style ink_style

Runs train_textual_inversion.py and tools/evaluate.py for one word after the other. Stop it whenever you like:
what was measured is not learned again. The table's intervals draw concepts with replacement, since more
seeds of one concept do not tell how a recipe does on others.
"""

import argparse
import itertools
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tools.evaluate import format_table, write_json  # noqa: E402
from tools.small_world.concepts import OBJECTS, bootstrap, find_concept, write_pictures  # noqa: E402


def main(argv=None, *, run=subprocess.run):
    """Run the command; returns the table over all words, row -> measure -> Figure.

    Args:
        run: starts a command, as subprocess.run does.
    """
    args = parse_args(argv)
    concepts = [find_concept(name) for name in args.concepts]
    scores = {}
    for concept, seed in itertools.product(concepts, range(args.num_seeds)):
        folder = args.save_path.resolve() / concept.name / f"seed_{seed}"
        measured = folder / "scores.json"
        if not measured.exists():
            write_pictures(concept, folder / "pictures")
            start(run, train_command(concept, folder, seed, args))
            (learned,) = folder.glob("*_ti.ckpt")
            start(run, score_command(concept, learned, args))
        scores[concept.name, seed] = json.loads(measured.read_text())["rows"]
        print(f"\n{len(scores)} of {len(concepts) * args.num_seeds} words\n{format_table(summary(scores))}\n")
    table = summary(scores)
    write_json(args.save_path / "summary.json", table, concepts=args.concepts, settings=vars(args))
    return table


def start(run, command):
    print(f"$ {shlex.join(['python', *command])}", flush=True)
    run([sys.executable, *command], cwd=ROOT, check=True)


def train_command(concept, folder, seed, args):
    """Arguments of python that learn a concept's word into a folder."""
    command = [
        "train_textual_inversion.py",
        "--version",
        "SDXL-small",
        "--data_path",
        str(folder / "pictures"),
    ]
    command += ["--save_path", str(folder), "--placeholder_token", f"<{concept.name.replace('_', '-')}>"]
    command += ["--learnable_property", concept.kind, "--seed", str(seed), "--max_num_ckpt", "1"]
    return [*command, "--log_interval", "100", *shlex.split(args.train_flags)]


def score_command(concept, learned, args):
    """Arguments of python that measure a learned file, always with the same seeds."""
    command = ["tools/evaluate.py", "--concept", concept.name, "--textual_inversion_weight", str(learned)]
    command += ["--num_pictures", str(args.num_pictures), "--seed", "1000"]
    return [*command, "--json", str(learned.with_name("scores.json")), *shlex.split(args.evaluate_flags)]


def summary(scores):
    """Means over words, with bootstrap intervals over concepts.

    Args:
        scores: (concept's name, seed) -> row -> measure -> dict with a "mean", as evaluate writes them.

    Returns:
        row -> measure -> Figure.
    """
    names = [name for name, _ in scores]
    first = next(iter(scores.values()))
    return {
        row: {
            measure: bootstrap([rows[row][measure]["mean"] for rows in scores.values()], names)
            for measure in first[row]
        }
        for row in first
    }


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    drawn = np.random.default_rng(0).permutation(list(OBJECTS))[:10].tolist()
    add("--save_path", type=Path, default=Path("runs/sweep"), help="a folder a word (default runs/sweep)")
    add("--concepts", nargs="+", default=drawn, metavar="NAME", help="default: ten objects, always the same")
    add("--num_seeds", type=int, default=2, help="words a concept (default 2)")
    add("--num_pictures", type=int, default=4, help="pictures a prompt (default 4)")
    add("--train_flags", default="--num_vectors 4", help="the recipe, in one text (default --num_vectors 4)")
    add("--evaluate_flags", default="", help="more flags of tools/evaluate.py, in one text")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: `{shlex.join(error.cmd[1:2])}` failed; its message stands above.")
