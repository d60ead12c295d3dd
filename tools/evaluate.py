"""Was the word learned? Measures a learned word on the small model, with controls beside it.

    python tools/evaluate.py --concept cat_toy --textual_inversion_weight runs/cat_toy/SD-XL-small_400_ti.ckpt

    fidelity     share of pictures for "a photo of a <word>" that show the concept
    editability  share of pictures that show the concept and what the prompt asks for besides
    leakage      share of pictures with a training background where another one was asked for

An interval beside a share is its 95 % bootstrap interval over seeds. No network judges:
tools/small_world/scorer.py reads the pixels. `python -m tools.small_world.concepts` lists the concepts.
"""

import argparse
import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from gm import sampling  # noqa: E402
from gm.atomic_file import atomic_file  # noqa: E402
from gm.checkpoint import load_weights  # noqa: E402
from gm.config import build_engine, load_config  # noqa: E402
from gm.models.layers import parameter_dtype  # noqa: E402
from gm.runtime import add_runtime_flags, runtime_args, start_runtime  # noqa: E402
from gm.textual_inversion.concept import add_concept  # noqa: E402
from gm.training.args import VERSIONS  # noqa: E402
from tools.small_world.concepts import (  # noqa: E402
    control_words,
    find_concept,
    judge,
    prompts,
    real_picture,
    summarise,
)

SMALL = VERSIONS["SDXL-small"]
UNTRAINED = "<untrained>"
MEASURES = ("fidelity", "editability", "leakage")


def main(argv=None):
    """Run the command; returns the table, row -> measure -> Figure."""
    args = parse_args(argv)
    concept = find_concept(args.concept)
    runtime = start_runtime(runtime_args(args))
    config = load_config(args.config)
    height, width = sampling.default_size(config)
    settings = sampling.SamplingArgs(
        height=height, width=width, guidance_scale=args.guidance_scale, steps=args.sample_step
    )
    with parameter_dtype(runtime.dtype):
        engine = build_engine(config)
    words = sampling.read_words(engine.conditioner, [args.textual_inversion_weight, *args.other_weight])
    load_weights(engine, args.weight)
    sampling.add_words(engine.conditioner, words)
    rng = np.random.default_rng(args.seed)  # rows as training starts from
    add_concept(engine.conditioner, token=UNTRAINED, num_vectors=words[0].num_vectors, rng=rng)
    table = evaluate(
        concept,
        {"learned word": words[0].token, **control_words(concept), "untrained word": UNTRAINED}
        | {f"word {other.token}": other.token for other in words[1:]},
        draw=lambda text, seeds: draw(engine, text, seeds, settings),
        round_trip=lambda picture: round_trip(engine, picture, settings),
        seeds=range(args.seed, args.seed + args.num_pictures),
    )
    print(f"\n{concept.name} ({concept.kind}), {args.num_pictures} pictures a prompt\n{format_table(table)}")
    if args.json:
        write_json(args.json, table, concept=concept.name, word=words[0].token, settings=vars(args))
        print(f"written to {args.json}")
    return table


def evaluate(concept, words, *, draw, seeds, round_trip=None):
    """Measure words that are to mean a concept; renders and the autoencoder show the best that is possible.

    Args:
        concept: of tools.small_world.concepts.
        words: row of the table -> word, in a prompt in the place of the concept's name.
        draw: (prompt's text, seeds) -> a picture (side, side, 3) uint8 a seed.
        seeds: of each prompt's pictures.
        round_trip: a picture -> what the autoencoder makes of it; None leaves that row out.

    Returns:
        row -> measure -> Figure, as `summarise` has them.
    """
    seeds = list(seeds)
    sources = {row: (word, lambda prompt: draw(prompt.text, seeds)) for row, word in words.items()}
    real = {}

    def renders(prompt):
        real.setdefault(prompt.text, [real_picture(concept, prompt, seed=seed) for seed in seeds])
        return real[prompt.text]

    if round_trip is not None:
        sources["autoencoder"] = "concept", lambda prompt: map(round_trip, renders(prompt))
    sources["real renders"] = "concept", renders

    table = {}
    for row, (word, pictures_of) in sources.items():
        judged = []
        for prompt in tqdm(prompts(concept, word), desc=row, unit="prompt"):
            pairs = zip(seeds, pictures_of(prompt), strict=True)
            judged += [judge(concept, prompt, picture, seed=seed) for seed, picture in pairs]
        table[row] = summarise(judged)
    return table


def draw(engine, text, seeds, settings):
    """Pictures of a prompt (B, side, side, 3) uint8, one a seed, drawn together."""
    condition = sampling.condition(engine, text, settings)
    return sampling.decode(engine, sampling.draw_latents(engine, condition, seeds, settings))


def round_trip(engine, picture, settings):
    """A picture, encoded and decoded."""
    return sampling.decode(engine, sampling.encode_picture(engine, Image.fromarray(picture), settings))[0]


def format_table(table):
    """The table as text, and the share of the oracle's fidelity that was reached."""
    lines = [f"{'':18}" + "".join(f"{name:>20}" for name in MEASURES)]
    for row, figures in table.items():
        lines.append(f"{row:18}" + "".join(f"{figures.get(name, '-')!s:>20}" for name in MEASURES))
    oracle = table["oracle prompt"]["fidelity"].mean
    if oracle:
        share = table["learned word"]["fidelity"].mean / oracle
        lines.append(f"The learned word's fidelity is {share:.0%} of the oracle prompt's.")
    return "\n".join(lines)


def write_json(path, table, **facts):
    """Write facts and the table; a Figure becomes mean, low, high and pictures."""
    rows = {row: {name: asdict(figure) for name, figure in figures.items()} for row, figures in table.items()}
    with atomic_file(path) as file:
        file.write((json.dumps({**facts, "rows": rows}, indent=2, default=str) + "\n").encode())


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--concept", required=True, help="what the word is to mean: a folder of datasets/ or a concept")
    add("--textual_inversion_weight", required=True, metavar="FILE", help="the learned word, in any format")
    add("--other_weight", nargs="+", default=[], metavar="FILE", help="words of other concepts, as a control")
    add("--config", default=ROOT / SMALL.config, help="YAML of the model (default: the small model's)")
    add("--weight", default=ROOT / SMALL.weights[0], help="its weights (default: the small model's)")
    add("--num_pictures", type=int, default=8, help="pictures a prompt, seeds from --seed on (default 8)")
    add("--guidance_scale", type=float, default=5.0, help="default 5")
    add("--sample_step", type=int, default=20, help="sampling steps (default 20)")
    add("--json", type=Path, metavar="FILE", help="also write the table here")
    add_runtime_flags(parser)
    args = parser.parse_args(argv)
    if args.num_pictures < 1:
        parser.error(f"--num_pictures {args.num_pictures}: at least 1.")
    return args


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
