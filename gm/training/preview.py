"""Pictures drawn while training, always from the same seeds: a grid whose rows are steps and columns prompts."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from gm import sampling
from gm.atomic_file import atomic_file

LABEL = 14  # pixels, the height of a row's label


class Previews:
    """Draws every prompt at some steps and keeps <folder>/preview.png up to date.

    Args:
        engine: DiffusionEngine; its text encoders hold the word's rows as they are now.
        prompts: one a column.
        args: gm.sampling.SamplingArgs.
        seed: of every prompt's picture.
        folder: of the run. Rows are kept in <folder>/previews/step_<n>.png, so that a resumed run has them all.
    """

    def __init__(self, engine, prompts, args, *, seed, folder):
        self.engine, self.prompts, self.args, self.seed = engine, list(prompts), args, seed
        self.rows = Path(folder) / "previews"
        self.path = Path(folder) / "preview.png"

    def draw(self, step):
        """Add the row of a step."""
        drawn = sampling.draw(self.engine, self.prompts, self.args, seed=self.seed)
        pictures = [sampling.decode(self.engine, row.latents)[0] for row in drawn]
        self.rows.mkdir(parents=True, exist_ok=True)
        text = sampling.png_text(" | ".join(self.prompts), self.seed, self.args, {"step": step})
        sampling.save_png(self.rows / f"step_{step:08d}.png", sampling.make_grid(pictures, len(pictures)), text)
        self._assemble()

    def _assemble(self):
        """Every row, in the order of steps, under its label."""
        paths = sorted(self.rows.glob("step_*.png"))
        rows = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
        width = max(row.shape[1] for row in rows)
        sheet = Image.new("RGB", (width, sum(row.shape[0] + LABEL for row in rows)), "white")
        draw = ImageDraw.Draw(sheet)
        top = 0
        for path, row in zip(paths, rows, strict=True):
            label = f"step {int(path.stem.removeprefix('step_'))}: {' | '.join(self.prompts)}"
            draw.text((2, top + 1), label.encode("latin-1", "replace").decode("latin-1"), fill="black")
            sheet.paste(Image.fromarray(row), (0, top + LABEL))
            top += row.shape[0] + LABEL
        with atomic_file(self.path) as file:
            sheet.save(file, "PNG")
