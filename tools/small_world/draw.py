"""Draws the small world: the endless pretraining set, and contact sheets to look at.

python -m tools.small_world.draw sheet.png --number 96 --seed 0
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from tools.small_world.captions import caption
from tools.small_world.renderer import SIDE, Scene, pretraining_scene, render


def pretraining_batch(
    seed: int, indices: Iterable[int], *, two_objects: float = 0.0
) -> tuple[np.ndarray, list[str], list[Scene]]:
    """Pictures of the endless pretraining set, each determined by (seed, index) alone.

    Args:
        seed: names the set.
        indices: which pictures, from 0 on.
        two_objects: share of pictures with two toys instead of one.

    Returns:
        pictures (n, 64, 64, 3) uint8, their captions, their scenes.
    """
    pictures, captions, scenes = [], [], []
    for index in indices:
        rng = np.random.default_rng((seed, index, 1))
        scene = pretraining_scene(seed, index, count=2 if rng.random() < two_objects else 1)
        scenes.append(scene)
        captions.append(caption(scene, rng))
        pictures.append(render(scene))
    return np.stack(pictures), captions, scenes


def contact_sheet(
    pictures: Sequence[np.ndarray], *, columns: int = 12, zoom: int = 2, gap: int = 2
) -> Image.Image:
    """Pictures of one size in rows, on white, each pixel `zoom` times enlarged."""
    height, width = pictures[0].shape[:2]
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return Image.fromarray(sheet.repeat(zoom, 0).repeat(zoom, 1))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", help="where the sheet goes, such as sheet.png")
    parser.add_argument("--number", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--two_objects", type=float, default=0.0, help="share of pictures with two toys")
    parser.add_argument("--captions", action="store_true", help="print the captions as well")
    args = parser.parse_args()
    pictures, captions, _ = pretraining_batch(args.seed, range(args.number), two_objects=args.two_objects)
    contact_sheet(pictures).save(args.path)
    print("\n".join(captions) if args.captions else f"{args.path}: {args.number} pictures of {SIDE}x{SIDE}")


if __name__ == "__main__":
    main()
