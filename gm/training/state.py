"""What is kept of a run: learned files, the state that continues it exactly, and its losses."""

import csv
import itertools
import json
import logging
import math
import re
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from gm.atomic_file import atomic_file
from gm.textual_inversion.embedding_file import Embedding, file_stem, learned_file_name, write_embedding

logger = logging.getLogger(__name__)

KEPT_STATES = 2
_STATE_NAME = re.compile(r"step_(\d+)\.npz")


def save_state(folder, step, *, arrays, numbers):
    """Write <folder>/step_<step>.npz and remove all but the newest two.

    Args:
        arrays: name -> numpy array.
        numbers: JSON-serialisable.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**numbers, "step": step, "arrays": sorted(arrays)})
    with atomic_file(folder / f"step_{step:08d}.npz") as file:
        np.savez(file, __numbers__=np.array(text), **arrays)
    for _, path in _states(folder)[:-KEPT_STATES]:
        path.unlink(missing_ok=True)


def load_state(path):
    """Read the newest whole state of a run, or one file of it.

    Args:
        path: a run's --save_path, its state/ folder, or one step_<n>.npz.

    Returns:
        (arrays, numbers); numbers["step"] counts the steps taken.

    Raises:
        FileNotFoundError: there is no state.
        ValueError: every state there is damaged.
    """
    path = Path(path)
    if path.is_file():
        return _read(path)
    folder = run_folder(path) / "state"
    states = _states(folder)
    if not states:
        raise FileNotFoundError(f"--resume '{path}': no state of a run is there (looked for {folder}/step_<n>.npz).")
    for _, state in reversed(states):
        try:
            return _read(state)
        except ValueError as e:
            logger.warning("%s Trying the one before it.", e)
    raise ValueError(f"--resume '{path}': every state in {folder} is damaged.")


def run_folder(path):
    """The --save_path of the run that `path`, as of load_state, belongs to."""
    path = Path(path)
    if path.is_file() or path.suffix == ".npz":
        path = path.parent
    return path.parent if path.name == "state" else path


def _states(folder):
    found = ((_STATE_NAME.fullmatch(path.name), path) for path in Path(folder).glob("step_*.npz"))
    return sorted((int(match[1]), path) for match, path in found if match)


def _read(path):
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        numbers = json.loads(str(arrays.pop("__numbers__")))
        if numbers.pop("arrays") != sorted(arrays):  # a damaged table of contents can hide some
            raise ValueError("arrays are missing")
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError, OSError, RuntimeError) as e:
        raise ValueError(f"{path} is damaged or no state of a run ({e}).") from e
    return arrays, numbers


def set_aside(folder, token):
    """Move what an earlier run left in a folder to <folder>/earlier_<n>; its latents may stay, they are reused.

    Args:
        token: the word to learn. Of .safetensors files only this word's moves: others may be a model's weights.
    """
    folder = Path(folder)
    names = [f"{file_stem(token)}.safetensors", "loss.csv", "loss.png", "state", "previews", "preview.png"]
    left = [*folder.glob("*_ti.ckpt"), *(path for name in names if (path := folder / name).exists())]
    if not left:
        return
    left += [path for name in ("config.yaml", "run.json") if (path := folder / name).exists()]
    number = next(n for n in itertools.count(1) if not (folder / f"earlier_{n}").exists())
    place = folder / f"earlier_{number}"
    place.mkdir()
    for path in left:
        path.rename(place / path.name)
    logger.info("%s holds an earlier run; its files are in %s now", folder, place)


class LearnedFiles:
    """The `<name>_<step>_ti.ckpt` files of a run.

    Args:
        folder: the run's --save_path.
        name: of the model, such as SD-XL-base-1.0.
        concept: Concept whose rows are written.
        metadata: settings of the run, text to text, for formats that can hold them.
        keep: how many to keep, the newest; None keeps all.
    """

    def __init__(self, folder, name, concept, *, metadata, keep=None):
        self.folder, self.name, self.concept, self.metadata, self.keep = Path(folder), name, concept, metadata, keep

    def save(self, step, *, final=False):
        """Write the rows of this step; the last ones also as .safetensors for other programs."""
        clip_l, clip_g = self.concept.rows()
        embedding = Embedding(
            self.concept.token, clip_l, clip_g, step=step, base_model=self.name, metadata=self.metadata
        )
        path = self.folder / learned_file_name(self.name, step)
        write_embedding(path, embedding, format="ckpt", overwrite=True)
        if final:
            # Programs that read this format take the word from the file's name.
            name = f"{file_stem(self.concept.token)}.safetensors"
            write_embedding(self.folder / name, embedding, format="webui", overwrite=True)
        if self.keep is not None:
            for old in self._files()[: -self.keep]:
                old.unlink(missing_ok=True)
        return path

    def newest(self):
        """The learned file of the latest step, or None."""
        files = self._files()
        return files[-1] if files else None

    def _files(self):
        pattern = re.compile(re.escape(self.name) + r"_(\d+)_ti\.ckpt")
        found = ((pattern.fullmatch(path.name), path) for path in self.folder.glob("*_ti.ckpt"))
        return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


class LossLog:
    """loss.csv, a line a step, and loss.png, drawn from it."""

    HEADER = ("step", "update", "loss", "grad_norm", "learning_rate")

    def __init__(self, folder):
        self.path = Path(folder) / "loss.csv"
        self.rows = []

    def resume(self, step, folder):
        """Keep what the run in a folder logged up to a step: it goes on from there."""
        path = Path(folder) / self.path.name
        if path.is_file():
            with open(path, newline="") as file:
                lines = [line for line in csv.reader(file) if len(line) == len(self.HEADER) and line[0].isdigit()]
            self.rows = [tuple(line) for line in lines if int(line[0]) <= step]

    def add(self, step, result, update):
        self.rows.append((step, update, f"{result.loss:.6g}", f"{result.grad_norm:.6g}", f"{result.rate:.6g}"))

    def save(self):
        with atomic_file(self.path) as file:
            lines = "\n".join(",".join(map(str, row)) for row in (self.HEADER, *self.rows))
            file.write(f"{lines}\n".encode())
        with atomic_file(self.path.with_suffix(".png")) as file:
            self._draw().save(file, "PNG")

    def _draw(self, *, size=(800, 400), margin=40):
        """The loss by step, faint, and its running mean over a twentieth of the run, dark."""
        image = Image.new("RGB", size, "white")
        rows = [row for row in self.rows if math.isfinite(float(row[2]))]
        if not rows:
            return image
        draw = ImageDraw.Draw(image)
        steps = np.array([int(row[0]) for row in rows])
        losses = np.array([float(row[2]) for row in rows])
        window = max(1, len(losses) // 20)
        mean = np.convolve(np.pad(losses, (window - 1, 0), "edge"), np.full(window, 1 / window), "valid")
        top = float(np.quantile(losses, 0.99)) * 1.1 or 1.0
        width, height = size[0] - 2 * margin, size[1] - 2 * margin

        def points(values):
            x = margin + width * (steps - steps[0]) / max(1, steps[-1] - steps[0])
            y = margin + height * (1 - np.clip(values / top, 0, 1))
            return list(zip(x.tolist(), y.tolist(), strict=True))

        draw.rectangle((margin, margin, size[0] - margin, size[1] - margin), outline="gray")
        if len(steps) > 1:
            draw.line(points(losses), fill=(190, 205, 230))
            draw.line(points(mean), fill=(20, 60, 140), width=2)
        draw.text((margin, margin // 2), f"loss (top {top:.3g}) and its mean over {window} steps", fill="black")
        draw.text((margin, size[1] - margin + 8), f"step {steps[0]} to {steps[-1]}", fill="black")
        return image
