"""Concepts to learn that pretraining never showed, their pictures, and whether a learned word means them.

    python -m tools.small_world.concepts                             # the list
    python -m tools.small_world.concepts cat_toy datasets/cat_toy    # its five pictures, as PNG files

An object is a toy whose shape, colour and texture pretraining never drew together, or with a value that no
caption can name (a hue between two names, a star's number of points). A style has an outline of a width that
pretraining never drew, between thin and big; for one style it counts, too. What is not part of the concept (place,
size, background; a style's toys) varies.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from tools.small_world.captions import GENERIC, background_ending, phrase, with_articles
from tools.small_world.renderer import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT_CONTOURS,
    SHAPES,
    held_out_combinations,
    render,
    sample_scene,
)
from tools.small_world.scorer import COLOUR_TOLERANCE, Reading, delta_e, lab, read_all, right

PICTURES = 5
STORED_SIDE = 256  # larger than the model's pictures, so that training resizes them as it would photographs


@dataclass(frozen=True)
class Concept:
    """Something to learn.

    Attributes:
        name: as a folder is called.
        kind: "object" or "style", as --learnable_property has it.
        fixed: what its pictures have in common, for `sample_scene`.
        passes: whether a reading (of one toy) shows the concept.
        oracle: the words that come closest to it.
    """

    name: str
    kind: str
    fixed: Mapping[str, object] = field(hash=False)
    passes: Callable[[Reading], bool] = field(hash=False)
    oracle: str

    def _order(self, values: Iterable[str], purpose: str) -> list[str]:
        rng = np.random.default_rng(zlib.crc32(f"{self.name} {purpose}".encode()))
        return [str(v) for v in rng.permutation(list(values))]

    def backgrounds(self) -> list[str]:
        """The five backgrounds of the training pictures."""
        return self._order(BACKGROUNDS, "background")[:PICTURES]

    def other_backgrounds(self) -> list[str]:
        """The three that the training pictures do not have."""
        return self._order(BACKGROUNDS, "background")[PICTURES:]

    def shown_shapes(self) -> list[str]:
        """The shapes in a style's training pictures; the others are for scoring."""
        return self._order(SHAPES, "shape")[:PICTURES]

    def unseen_shapes(self) -> list[str]:
        return self._order(SHAPES, "shape")[PICTURES:]

    def training_pictures(self, side: int = STORED_SIDE) -> list[np.ndarray]:
        """Five pictures (side, side, 3) uint8, always the same."""
        pictures = []
        for i, background in enumerate(self.backgrounds()):
            rng = np.random.default_rng((zlib.crc32(self.name.encode()), i))
            varied = {"background": background, "size": "small" if i in (1, 4) else "large"}
            if self.kind == "style":
                colour = self._order(COLOURS, "colour")[i]
                varied |= {"shape": self.shown_shapes()[i], "colour": colour, "texture": "plain", "points": 5}
            else:
                varied["style"] = "flat"
            pictures.append(render(sample_scene(rng, {**varied, **self.fixed}), side))
        return pictures


def _combination(attributes: Mapping[str, str]) -> Concept:
    return Concept(
        name="_".join(attributes[k] for k in ("texture", "colour", "shape")),
        kind="object",
        fixed={**attributes, "points": 5},
        passes=lambda reading: all(right(reading, attributes).values()),
        oracle=phrase(attributes),
    )


def _hue(first: str, second: str, attributes: Mapping[str, str]) -> Concept:
    """A toy of a colour half way between two named ones."""
    target = _between(COLOURS[first], COLOURS[second])

    def passes(reading: Reading) -> bool:
        near = reading.rgb is not None and delta_e(lab(reading.rgb), lab(target)) <= COLOUR_TOLERANCE
        return bool(near) and all(right(reading, attributes).values())

    return Concept(
        name="_".join([attributes["texture"], first, second, attributes["shape"]]),
        kind="object",
        fixed={**attributes, "colour": first, "rgb": target, "points": 5},
        passes=passes,
        oracle=phrase({**attributes, "colour": f"{first} {second}"}),
    )


def _between(rgb1, rgb2) -> tuple[float, float, float]:
    """The middle in linear light, which stays clear of grey for neighbouring hues."""
    linear = (np.array(rgb1) ** 2.2 + np.array(rgb2) ** 2.2) / 2
    return tuple((linear ** (1 / 2.2)).tolist())


def _star(points: int, attributes: Mapping[str, str]) -> Concept:
    """A star with a number of points that captions never tell."""
    attributes = {"shape": "star", **attributes}
    return Concept(
        name=f"{attributes['texture']}_{attributes['colour']}_star_{points}",
        kind="object",
        fixed={**attributes, "points": points},
        passes=lambda reading: reading.points == points and all(right(reading, attributes).values()),
        oracle=phrase(attributes),
    )


def _style(name: str, style: str, *, recognised: tuple[float, float] = (0.0, np.inf)) -> Concept:
    """A style of captions, with an outline of a width that pretraining never drew.

    Args:
        recognised: between these widths an outline is taken for this one.
    """
    low, high = recognised
    width = sum(HELD_OUT_CONTOURS) / 2
    return Concept(
        name=name,
        kind="style",
        fixed={"style": style, "contour": width},
        passes=lambda reading: reading.style == style and low < reading.contour < high,
        oracle=style,
    )


_COMBINATIONS = [_combination(attributes) for attributes in held_out_combinations()]
_UNNAMED = [
    _hue("red", "orange", {"shape": "ring", "texture": "plain"}),
    _hue("yellow", "green", {"shape": "heart", "texture": "plain"}),
    _hue("green", "teal", {"shape": "square", "texture": "striped"}),
    _hue("teal", "blue", {"shape": "moon", "texture": "plain"}),
    _hue("purple", "pink", {"shape": "cross", "texture": "dotted"}),
    _star(4, {"colour": "pink", "texture": "plain"}),
    _star(6, {"colour": "orange", "texture": "plain"}),
]
STYLES = {
    concept.name: concept
    for concept in (
        _style("sticker_style", "outline and shadow"),
        _style("ink_style", "outline", recognised=HELD_OUT_CONTOURS),
    )
}
OBJECTS = {concept.name: concept for concept in (*_COMBINATIONS, *_UNNAMED)}
SHIPPED = {  # folder under datasets/ -> concept
    "cat_toy": OBJECTS["striped_yellow_heart"],
    "robot_toy": OBJECTS["split_teal_star"],
    "sticker_style": STYLES["sticker_style"],
}


def find_concept(name: str) -> Concept:
    """A concept by its own name, or by the folder it ships in.

    Raises:
        ValueError: there is none of that name.
    """
    concepts = {**OBJECTS, **STYLES, **SHIPPED}
    if name not in concepts:
        raise ValueError(f"no concept '{name}'; `python -m tools.small_world.concepts` lists them.")
    return concepts[name]


def write_pictures(concept: Concept, folder: str | Path) -> list[Path]:
    """Store the training pictures as 1.png .. 5.png."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i}.png" for i in range(1, PICTURES + 1)]
    for path, picture in zip(paths, concept.training_pictures(), strict=True):
        Image.fromarray(picture).save(path, optimize=True)
    return paths


# ---- was it learned? ----


@dataclass(frozen=True)
class Prompt:
    """A prompt and what its picture has to show besides the concept."""

    text: str
    group: str  # "fidelity" or "editability"
    wanted: Mapping[str, str] = field(hash=False)
    count: int = 1


@dataclass(frozen=True)
class Judgement:
    """One picture's result."""

    group: str
    seed: int
    concept: bool  # every toy shows the concept
    request: bool  # all that the prompt asked for besides
    leak: bool | None  # a training background instead of the one asked for; None where none was

    @property
    def passed(self) -> bool:
        return self.concept and self.request


def prompts(concept: Concept, word: str, *, pairs: bool = False) -> list[Prompt]:
    """What to ask for with a word that means the concept.

    Args:
        concept: what the word is to mean.
        word: a learned token, or for controls the oracle's words or a class word.
        pairs: also ask for two of an object (if the model's pretraining had pictures of two toys).
    """
    grounds = [{"background": b} for b in concept.other_backgrounds()]
    asked: list[Prompt] = []

    def ask(group, text, wanted, count=1):
        asked.append(Prompt(with_articles(text + background_ending(wanted)), group, wanted, count))

    if concept.kind == "object":
        ask("fidelity", f"a photo of a {word}", {})
        for ground in grounds:
            ask("editability", f"a photo of a {word}", ground)
        for size in ("small", "large"):
            ask("editability", f"a photo of a {size} {word}", {"size": size})
        for style in ("outline", "shadow"):
            ask("editability", f"a photo of a {word} in the style of {style}", {"style": style})
        if pairs:
            ask("editability", f"a photo of two {word}", {}, count=2)
        return asked

    for shape in concept.unseen_shapes():
        ask("fidelity", f"a photo of a {shape} in the style of {word}", {"shape": shape})
    colours = concept._order(COLOURS, "edit")[: len(grounds)]
    for shape, colour, ground in zip(concept.unseen_shapes(), colours, grounds, strict=True):
        toy = {"shape": shape, "colour": colour, **ground}
        text = f"a photo of a {colour} {shape}{background_ending(ground)} in the style of {word}"
        asked.append(Prompt(with_articles(text), "editability", toy))
    return asked


def judge(concept: Concept, prompt: Prompt, picture: np.ndarray, *, seed: int) -> Judgement:
    """Does a picture show the concept, and what else its prompt asked for?

    Args:
        concept: what the word means.
        prompt: one of `prompts(concept, ...)`.
        picture: (side, side, 3) uint8, drawn for the prompt.
        seed: of the picture; the bootstrap draws over seeds.
    """
    readings = read_all(picture)
    ground = readings[0].background
    asked = prompt.wanted.get("background")
    return Judgement(
        group=prompt.group,
        seed=seed,
        concept=all(concept.passes(reading) for reading in readings),
        request=readings[0].count == prompt.count
        and all(all(right(r, prompt.wanted).values()) for r in readings),
        leak=None if asked is None else ground != asked and ground in concept.backgrounds(),
    )


def real_picture(concept: Concept, prompt: Prompt, *, seed: int, side: int = 64) -> np.ndarray:
    """What the renderer draws for a prompt: the upper bound of all scores."""
    rng = np.random.default_rng((seed, zlib.crc32(prompt.text.encode())))
    free = {"style": "flat"} if concept.kind == "object" else {"points": 5}
    return render(sample_scene(rng, {**free, **concept.fixed, **prompt.wanted}, count=prompt.count), side)


def control_words(concept: Concept) -> dict[str, str]:
    """Words to show beside the learned one: the best caption, and what knows nothing of the concept."""
    return {
        "oracle prompt": concept.oracle,
        "class word": GENERIC[0] if concept.kind == "object" else "style",
    }


@dataclass(frozen=True)
class Figure:
    """A share of pictures with its 95 % interval."""

    mean: float
    low: float
    high: float
    pictures: int

    def __str__(self):
        return f"{self.mean:.0%} [{self.low:.0%}, {self.high:.0%}]"


def bootstrap(values: Sequence[float], groups: Sequence[object], *, draws: int = 2000) -> Figure:
    """Mean and percentile bootstrap interval, drawing whole groups (seeds, or concepts) with replacement."""
    names, index = np.unique(np.asarray(groups).astype(str), return_inverse=True)
    sums = np.bincount(index, np.asarray(values, np.float64), minlength=len(names))
    sizes = np.bincount(index, minlength=len(names))
    drawn = np.random.default_rng(0).integers(len(names), size=(draws, len(names)))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Figure(float(sums.sum() / sizes.sum()), float(low), float(high), len(values))


def summarise(judgements: Sequence[Judgement]) -> dict[str, Figure]:
    """The table's row: "fidelity", "editability" and "leakage", each where there is something to count."""
    counted = {
        "fidelity": [(j.passed, j.seed) for j in judgements if j.group == "fidelity"],
        "editability": [(j.passed, j.seed) for j in judgements if j.group == "editability"],
        "leakage": [(j.leak, j.seed) for j in judgements if j.leak is not None],
    }
    return {name: bootstrap(*zip(*pairs, strict=True)) for name, pairs in counted.items() if pairs}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", help="of a concept; without one, all are listed")
    parser.add_argument("folder", nargs="?", help="where its pictures go")
    args = parser.parse_args()
    if args.name and args.folder:
        print("\n".join(map(str, write_pictures(find_concept(args.name), args.folder))))
        return
    shipped = {concept.name: f"  (datasets/{folder})" for folder, concept in SHIPPED.items()}
    for concept in [find_concept(args.name)] if args.name else [*OBJECTS.values(), *STYLES.values()]:
        print(f"{concept.kind:7}{concept.name:28}{concept.oracle}{shipped.get(concept.name, '')}")


if __name__ == "__main__":
    main()
