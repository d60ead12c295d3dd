"""make demo: learn a word on the small model, draw with it, and show on one sheet whether it was learned.

    python -m tools.demo

Runs the two commands of the README, train_textual_inversion.py and demo/sampling_without_streamlit.py, on the
pictures of datasets/cat_toy, then tools/evaluate.py. Everything goes to a new folder, runs/demo or runs/demo_2 and
so on; its sheet.png is the last thing that is named.
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
from tools.small_world.concepts import find_concept, judge, prompts

ROOT = Path(__file__).resolve().parents[1]
SMALL = VERSIONS["SDXL-small"]
DATA, WORD = "cat_toy", "<cat-toy>"
TOTAL_STEP = 400
SEED = 42
PREVIEWS = (f"a photo of a {WORD}", f"a picture of the {WORD}", f"a rendering of a {WORD}", f"a view of the {WORD}")


def main(argv=None, *, run=subprocess.run):
    """Run the commands and write the sheet; returns its path.

    Args:
        run: starts a command, as subprocess.run does.

    Raises:
        FileNotFoundError: the small model's weights are not there.
        subprocess.CalledProcessError: a command failed; it has said why.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save_path", type=Path, help="a new folder (default: runs/demo, or the next one free)")
    folder = parser.parse_args(argv).save_path or next_folder(Path("runs"))
    weights = ROOT / SMALL.weights[0]
    if not weights.exists():
        raise FileNotFoundError(
            f"{weights} is missing. It is part of a clone of this project: check that the clone is whole "
            "(`git status`), or make it again with tools/pretrain_small.py."
        )
    folder.mkdir(parents=True)
    edits = [prompt for prompt in prompts(find_concept(DATA), WORD) if prompt.group == "editability"]
    (folder / "prompts.txt").write_text("".join(f"{prompt.text}\n" for prompt in edits))

    started = time.perf_counter()
    for title, command in commands(folder).items():
        print(f"\n== {title}\n$ {shlex.join(['python', *command])}\n", flush=True)
        run([sys.executable, *command], cwd=ROOT, check=True)
    sheet = folder / "sheet.png"
    with atomic_file(sheet) as file:
        contact_sheet(rows_of(folder, edits)).save(file, "PNG")
    print(f"\nDone in {time.perf_counter() - started:.0f} s. Training pictures, before, during, after and edits:\n{sheet}")
    return sheet


def next_folder(runs):
    """runs/demo, or the first of runs/demo_2, runs/demo_3, ... that is not there yet."""
    folder, number = runs / "demo", 1
    while folder.exists():
        number += 1
        folder = runs / f"demo_{number}"
    return folder.resolve()


def commands(folder):
    """Title -> arguments of python. The first two are the README's, with the small model's numbers."""
    learned = str(folder / learned_file_name(SMALL.name, TOTAL_STEP))
    train = ["train_textual_inversion.py", "--version", "SDXL-small", "--data_path", f"datasets/{DATA}"]
    train += ["--save_path", str(folder), "--infer_during_train", "True", "--gradient_accumulation_steps", "1"]
    train += ["--num_vectors", "4", "--total_step", str(TOTAL_STEP), "--placeholder_token", WORD]
    train += ["--learnable_property", "object", "--infer_interval", str(TOTAL_STEP // 4), "--seed", str(SEED)]
    train += ["--log_interval", "50", "--validation_prompt", *PREVIEWS]

    sample = ["demo/sampling_without_streamlit.py", "--task", "txt2img", "--config", SMALL.config]
    sample += ["--weight", SMALL.weights[0], "--textual_inversion_weight", learned]
    sample += ["--prompt", str(folder / "prompts.txt"), "--num_cols", "2", "--sample_step", "20"]
    sample += ["--seed", str(SEED), "--save_path", str(folder / "edits")]

    score = ["tools/evaluate.py", "--concept", DATA, "--textual_inversion_weight", learned]
    score += ["--num_pictures", "4", "--seed", "1000", "--json", str(folder / "scores.json")]
    return {"Learning a word": train, "Drawing with it": sample, "Measuring it": score}


# ---------------------------------------------------------------- the sheet


@dataclass(frozen=True)
class Cell:
    picture: np.ndarray  # (side, side, 3) uint8
    caption: str = ""
    passed: bool | None = None  # the scorer's verdict, where there is one


def rows_of(folder, edits):
    """The sheet's rows, title -> cells, from what the commands left in a folder."""
    concept = find_concept(DATA)
    rows = {"training pictures": [Cell(read(path)) for path in sorted((ROOT / "datasets" / DATA).glob("*.png"))]}
    previews = sorted((folder / "previews").glob("step_*.png"))
    for path in previews:
        step = int(path.stem.removeprefix("step_"))
        when = {previews[0]: "before", previews[-1]: "after"}.get(path, "during")
        pictures = np.split(read(path), len(PREVIEWS), axis=1)
        rows[f"{when}: step {step}"] = [Cell(*cell) for cell in zip(pictures, PREVIEWS, strict=True)]
    drawn = [read(path) for path in sorted((folder / "edits").glob("*_seed*.png"))]
    columns = len(drawn) // len(edits)
    for column in range(columns):
        cells = []
        for prompt, picture in zip(edits, drawn[column::columns], strict=True):
            passed = judge(concept, prompt, picture, seed=column).passed
            cells.append(Cell(picture, prompt.text, passed))
        rows[f"edits, seed {SEED + column}"] = cells
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
    captions = {
        title: [wrap(cell.caption, side, font) for cell in cells] for title, cells in rows.items()
    }
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
