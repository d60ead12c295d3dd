"""make demo: learn a word on the small model, draw with it, and show on one sheet whether it was learned.

    python -m tools.demo

Runs the two commands of the README, train_textual_inversion.py and demo/sampling_without_streamlit.py, on the
pictures of datasets/cat_toy, and measures what they drew as tools/evaluate.py does. Everything goes to a new
folder, runs/demo or runs/demo_2 and so on; its sheet.png is the last thing that is named.
"""

import argparse
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gm.atomic_file import atomic_file
from gm.textual_inversion.embedding_file import learned_file_name
from gm.training.args import VERSIONS
from tools.evaluate import evaluate, format_table, write_json
from tools.small_world.concepts import control_words, find_concept, judge, prompts

ROOT = Path(__file__).resolve().parents[1]
SMALL = VERSIONS["SDXL-small"]
DATA, WORD = "cat_toy", "<cat-toy>"
TOTAL_STEP = 300
SEED = 42  # of training and previews
SEEDS = range(42, 45)  # of the pictures of a prompt
ENDINGS = ("", " on a white background", " in the style of outline")
PREVIEWS = (*(f"a photo of a {WORD}{ending}" for ending in ENDINGS), f"a photo of a small {WORD}")


def main(argv=None, *, run=subprocess.run):
    """Run the commands and write the sheet; returns its path.

    Args:
        run: starts a command, as subprocess.run does.

    Raises:
        FileNotFoundError: the small model's weights are not there.
        subprocess.CalledProcessError: a command failed; it has said why.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save_path", type=Path, help="a new folder (default: runs/demo or the next one)")
    folder = (parser.parse_args(argv).save_path or next_folder(Path("runs"))).resolve()
    weights = ROOT / SMALL.weights[0]
    if not weights.exists():
        raise FileNotFoundError(
            f"{weights} is missing. It is part of a clone of this project: check that the clone is whole "
            "(`git status`), or make it again with tools/pretrain_small.py."
        )
    folder.mkdir(parents=True)
    concept = find_concept(DATA)
    words = {"learned word": WORD, **control_words(concept)}
    asked = [prompt.text for word in words.values() for prompt in prompts(concept, word)]
    (folder / "prompts.txt").write_text("".join(f"{text}\n" for text in asked))

    started = time.perf_counter()
    for title, command in commands(folder).items():
        print(f"\n== {title}\n$ {shlex.join(['python', *command])}\n", flush=True)
        run([sys.executable, *command], cwd=ROOT, check=True)

    print("\n== Measuring it", flush=True)
    drawn = read_drawn(folder / "drawn")
    table = evaluate(concept, words, draw=lambda text, seeds: [drawn[text, s] for s in seeds], seeds=SEEDS)
    print(f"\n{concept.name}, {len(SEEDS)} pictures a prompt\n{format_table(table)}")
    write_json(folder / "scores.json", table, concept=concept.name, word=WORD, seeds=list(SEEDS))

    sheet = folder / "sheet.png"
    with atomic_file(sheet) as file:
        contact_sheet(rows_of(folder, drawn)).save(file, "PNG")
    print(f"\nDone in {time.perf_counter() - started:.0f} s. From training pictures to edits:\n{sheet}")
    return sheet


def next_folder(runs):
    """runs/demo, or the first of runs/demo_2, runs/demo_3, ... that is not there yet."""
    folder, number = runs / "demo", 1
    while folder.exists():
        number += 1
        folder = runs / f"demo_{number}"
    return folder


def commands(folder):
    """Title -> arguments of python: the README's commands, with the small model's numbers."""
    learned = str(folder / learned_file_name(SMALL.name, TOTAL_STEP))
    train = ["train_textual_inversion.py", "--version", "SDXL-small", "--data_path", f"datasets/{DATA}"]
    train += ["--save_path", str(folder), "--infer_during_train", "True"]
    train += ["--gradient_accumulation_steps", "1", "--num_vectors", "4", "--total_step", str(TOTAL_STEP)]
    train += ["--placeholder_token", WORD, "--learnable_property", "object", "--seed", str(SEED)]
    train += ["--log_interval", "50", "--infer_interval", str(TOTAL_STEP // 2)]
    train += ["--validation_prompt", *PREVIEWS]

    sample = ["demo/sampling_without_streamlit.py", "--task", "txt2img", "--config", SMALL.config]
    sample += ["--weight", SMALL.weights[0], "--textual_inversion_weight", learned]
    sample += ["--prompt", str(folder / "prompts.txt"), "--num_cols", str(len(SEEDS)), "--sample_step", "16"]
    sample += ["--seed", str(SEEDS[0]), "--save_path", str(folder / "drawn")]
    return {"Learning a word": train, "Drawing with it": sample}


# ---------------------------------------------------------------- the sheet


@dataclass(frozen=True)
class Cell:
    picture: np.ndarray  # (side, side, 3) uint8
    caption: str = ""
    passed: bool | None = None  # the scorer's verdict, where there is one


def read_drawn(folder):
    """What the sampling command drew, {(prompt, seed): picture}; its PNG files say which is which."""
    drawn = {}
    for path in sorted(folder.glob("*_seed*.png")):
        with Image.open(path) as image:
            drawn[image.info["prompt"], int(image.info["seed"])] = np.asarray(image.convert("RGB"))
    return drawn


def rows_of(folder, drawn):
    """The sheet's rows, title -> cells, from what the commands left in a folder and `read_drawn`."""
    concept = find_concept(DATA)
    shown = sorted((ROOT / "datasets" / DATA).glob("*.png"))
    rows = {"training pictures": [Cell(read(path)) for path in shown]}
    previews = sorted((folder / "previews").glob("step_*.png"))
    for path in previews:
        step = int(path.stem.removeprefix("step_"))
        when = {previews[0]: "before", previews[-1]: "after"}.get(path, "during")
        pictures = np.split(read(path), len(PREVIEWS), axis=1)
        rows[f"{when}: step {step}"] = [Cell(*cell) for cell in zip(pictures, PREVIEWS, strict=True)]
    edits = [prompt for prompt in prompts(concept, WORD) if prompt.group == "editability"]
    for seed in SEEDS[:2]:
        cells = []
        for prompt in edits:
            picture = drawn[prompt.text, seed]
            passed = judge(concept, prompt, picture, seed=seed).passed
            cells.append(Cell(picture, prompt.text, passed))
        rows[f"edits, seed {seed} (framed green where the scorer finds the toy and the edit)"] = cells
    return rows


def read(path):
    return np.asarray(Image.open(path).convert("RGB"))


def contact_sheet(rows, *, side=128, gap=10, line=13):
    """Rows of captioned pictures under their titles; a green frame passed the scorer, a red one did not.

    Args:
        rows: title -> list of Cell.
        side: pixels of a picture.
        gap: pixels between pictures.
        line: pixels a line of text.

    Returns:
        PIL picture.
    """
    font = ImageFont.load_default(size=line - 2)
    width = gap + max(len(cells) for cells in rows.values()) * (side + gap)
    captions = {title: [wrap(cell.caption, side, font) for cell in cells] for title, cells in rows.items()}
    heights = {
        title: 2 * line + side + line * max(len(lines) for lines in captions[title]) + gap for title in rows
    }
    sheet = Image.new("RGB", (width, gap + sum(heights.values())), "white")
    pen = ImageDraw.Draw(sheet)
    top = gap
    for title, cells in rows.items():
        pen.text((gap, top), title, fill="black", font=ImageFont.load_default(size=line))
        for column, (cell, lines) in enumerate(zip(cells, captions[title], strict=True)):
            x, y = gap + column * (side + gap), top + 2 * line - 5
            if cell.passed is not None:
                colour = (30, 150, 60) if cell.passed else (210, 40, 40)
                pen.rectangle((x - 4, y - 4, x + side + 3, y + side + 3), fill=colour)
            sheet.paste(Image.fromarray(cell.picture).resize((side, side), Image.Resampling.LANCZOS), (x, y))
            pen.multiline_text((x, y + side + 4), "\n".join(lines), fill=(90, 90, 90), font=font, spacing=2)
        top += heights[title]
    return sheet


def wrap(text, width, font):
    """A text in lines of at most `width` pixels, broken between words."""
    lines = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, FileExistsError) as error:
        sys.exit(f"error: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: `{shlex.join(error.cmd[1:2])}` failed; its message stands above.")
