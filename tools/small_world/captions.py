"""What a scene is called: captions in the grammar that textual inversion's templates use.

    [a close photo of the] [small] [striped] [red] heart [on a sky background] [in the style of big outline]

Words about the picture as such ("close", "dark", "studio") mean nothing in this world; captions carry them so
that a text encoder has met, and learned to ignore, what the templates say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from gm.textual_inversion.templates import BUILT_IN, OBJECT_TEMPLATES, PLACEHOLDER, STYLE_TEMPLATES, fill
from tools.small_world.renderer import ATTRIBUTES, HELD_OUT_CONTOURS, Scene, is_gate, is_held_out

GENERIC = ("toy", "thing", "object")  # stands for any shape
TEMPLATES = (
    *OBJECT_TEMPLATES,
    "a {placeholder}",
    "a painting of a {placeholder}",
    "a drawing of the {placeholder}",
    "a print of a {placeholder}",
)
STYLE_ENDINGS = (" in the style of {placeholder}", " in {placeholder} style")
# One token each, so that prompts stay short, though no caption of pretraining has them.
OTHER_WORDS = (
    "and with without next to three pair big that by for from cat dog person black brown style art cool nice"
)


def words() -> list[str]:
    """Every word of this world, lower case, sorted."""
    named = [value for values in ATTRIBUTES.values() for value in values]
    nouns = [*ATTRIBUTES["shape"], *GENERIC]
    said = [*named, *nouns, *map(plural, nouns), *TEMPLATES, *STYLE_ENDINGS, "an two on background"]
    said.append(OTHER_WORDS)
    said += [template for group in BUILT_IN.values() for template in group]
    return sorted(set(re.findall("[a-z]+", " ".join(said).lower().replace(PLACEHOLDER, ""))))


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def phrase(attributes: Mapping[str, str], *, noun: str | None = None, count: int = 1) -> str:
    """The toy in words, without an article: "small striped red heart". Missing attributes stay unsaid."""
    noun = noun or attributes.get("shape", GENERIC[0])
    noun = plural(noun) if count > 1 else noun
    return " ".join([*(attributes[k] for k in ("size", "texture", "colour") if k in attributes), noun])


def background_ending(attributes: Mapping[str, str]) -> str:
    """ " on a sky background", or "" where none is given."""
    return f" on a {attributes['background']} background" if "background" in attributes else ""


def with_articles(text: str) -> str:
    """ "a orange star" -> "an orange star"."""
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def _two(template):
    return re.sub(rf"\S+ {PLACEHOLDER}", f"two {PLACEHOLDER}", template)


def full_caption(
    attributes: Mapping[str, str], *, template: str = OBJECT_TEMPLATES[0], count: int = 1
) -> str:
    """The best caption that this world has for a picture: all of `attributes`, in the given template."""
    if count == 2:
        template = _two(template)
        attributes = {k: v for k, v in attributes.items() if k != "size"}
    style = fill(STYLE_ENDINGS[0], attributes["style"]) if "style" in attributes else ""
    toy = fill(template, phrase(attributes, count=count))
    return with_articles(toy + background_ending(attributes) + style)


def caption(scene: Scene, rng: np.random.Generator, *, drop: float = 0.2, empty: float = 0.1) -> str:
    """A caption for pretraining.

    Args:
        scene: what the picture shows.
        rng: the only source of chance.
        drop: probability that an attribute is left out (the shape becomes "toy", "thing" or "object").
        empty: probability that nothing is said at all (for classifier-free guidance).
    """
    if rng.random() < empty:
        return ""
    count = len(scene.items)
    said = {k: v for k, v in scene.attributes().items() if rng.random() >= drop}
    noun = said.get("shape") or str(rng.choice(GENERIC))
    if "style" in said and scene.contour >= HELD_OUT_CONTOURS[1] and rng.random() < 0.5:
        said["style"] = f"big {said['style']}"
    if count == 1 and "style" in said and rng.random() < 0.1:  # like templates for styles: no word of the toy
        return with_articles(fill(str(rng.choice(STYLE_TEMPLATES)), said["style"]) + background_ending(said))
    template = str(rng.choice(TEMPLATES))
    if count == 2:
        template = _two(template)
        said.pop("size", None)
    style = fill(str(rng.choice(STYLE_ENDINGS)), said["style"]) if "style" in said else ""
    toy = fill(template, phrase(said, noun=noun, count=count))
    return with_articles(toy + background_ending(said) + style)


def gate_attributes(number: int, *, seed: int) -> list[dict[str, str]]:
    """All six attributes of `number` scenes for the gate: never drawn in pretraining, and no concepts."""
    rng = np.random.default_rng(seed)
    found: list[dict[str, str]] = []
    while len(found) < number:
        attributes = {k: str(rng.choice(v)) for k, v in ATTRIBUTES.items()}
        if is_gate(attributes) and not is_held_out(attributes):
            found.append(attributes)
    return found
