"""Captions that carry the new word: built-in ones, a user's file, and captions beside pictures.

A template is a line of text that holds `{placeholder}` at least once. The built-in ones have at most 5 CLIP
tokens besides it, so that 70 vectors fit into a prompt of 75.
"""

import logging
import re
from pathlib import Path

logger = logging.getLogger(__name__)

PLACEHOLDER = "{placeholder}"

OBJECT_TEMPLATES = (
    "a photo of a {placeholder}",
    "a photo of the {placeholder}",
    "a photo of one {placeholder}",
    "a good photo of a {placeholder}",
    "a clear photo of the {placeholder}",
    "a sharp photo of a {placeholder}",
    "a bright photo of a {placeholder}",
    "a dark photo of the {placeholder}",
    "a cropped photo of a {placeholder}",
    "a close photo of the {placeholder}",
    "a blurry photo of a {placeholder}",
    "a color photo of the {placeholder}",
    "a studio photo of a {placeholder}",
    "a picture of a {placeholder}",
    "a picture of the {placeholder}",
    "a simple picture of a {placeholder}",
    "a detailed picture of the {placeholder}",
    "an image of a {placeholder}",
    "a rendering of a {placeholder}",
    "a rendering of the {placeholder}",
    "a view of the {placeholder}",
    "a snapshot of the {placeholder}",
    "a photo showing a {placeholder}",
    "a photo of my {placeholder}",
    "this is a {placeholder}",
    "there is the {placeholder}",
    "the {placeholder}",
)

STYLE_TEMPLATES = (
    "a painting in {placeholder} style",
    "a drawing in {placeholder} style",
    "a picture in {placeholder} style",
    "an image in {placeholder} style",
    "a rendering in {placeholder} style",
    "a scene in {placeholder} style",
    "painting in the style of {placeholder}",
    "drawing in the style of {placeholder}",
    "picture in the style of {placeholder}",
    "rendering in the style of {placeholder}",
    "artwork in the style of {placeholder}",
    "illustration in the style of {placeholder}",
    "sketch in the style of {placeholder}",
    "print in the style of {placeholder}",
    "poster in the style of {placeholder}",
    "scene in the style of {placeholder}",
    "portrait in the style of {placeholder}",
    "landscape in the style of {placeholder}",
    "something in the style of {placeholder}",
    "all in the style of {placeholder}",
    "in the style of {placeholder}",
    "a work of {placeholder} art",
    "the {placeholder} style",
    "{placeholder} style",
)

FACE_TEMPLATES = (
    "a photo of {placeholder}",
    "a clear photo of {placeholder}",
    "a bright photo of {placeholder}",
    "a dark photo of {placeholder}",
    "a close photo of {placeholder}",
    "a cropped photo of {placeholder}",
    "a candid photo of {placeholder}",
    "a studio photo of {placeholder}",
    "a color photo of {placeholder}",
    "a portrait of {placeholder}",
    "a studio portrait of {placeholder}",
    "a close portrait of {placeholder}",
    "a formal portrait of {placeholder}",
    "a picture of {placeholder}",
    "an image of {placeholder}",
    "a snapshot of {placeholder}",
    "a rendering of {placeholder}",
    "the face of {placeholder}",
    "a photo showing {placeholder}",
    "{placeholder} in a photo",
    "{placeholder} facing the camera",
    "this is {placeholder}",
    "{placeholder}",
)

BUILT_IN = {"object": OBJECT_TEMPLATES, "style": STYLE_TEMPLATES, "face": FACE_TEMPLATES}


def caption_templates(learnable_property, *, template_file=None):
    """The templates of a kind of concept, or those of a file (UTF-8, one per line, blank lines skipped).

    Raises ValueError for an unknown property, an empty file, or naming each line without {placeholder};
    FileNotFoundError.
    """
    if learnable_property not in BUILT_IN:
        kinds = ", ".join(BUILT_IN)
        raise ValueError(f"--learnable_property must be one of {kinds}; got '{learnable_property}'.")
    if template_file is None:
        return BUILT_IN[learnable_property]
    path = Path(template_file)
    if not path.is_file():
        raise FileNotFoundError(f"--template_file '{path}' is not a file.")
    lines = _read_lines(path)
    if not lines:
        example = OBJECT_TEMPLATES[0]
        raise ValueError(f"--template_file '{path}' is empty; write a caption on each line, as '{example}'.")
    bad = [f"  line {number}: {line}" for number, line in lines if PLACEHOLDER not in line]
    if bad:
        raise ValueError(
            f"--template_file '{path}' has lines without {PLACEHOLDER}, which would teach nothing:\n"
            + "\n".join(bad)
        )
    return tuple(line for _, line in lines)


def picture_templates(paths, templates, *, token):
    """Per picture: the lines of `name.txt` beside `name.jpg` if there is one, else the common templates.

    In such a file the new word stands as {placeholder} or as itself. Captions without it are an error and not
    completed: nothing is learned without it, and where it belongs in a sentence only the author knows.

    Args:
        paths: the pictures' files.
        templates: for pictures without a caption file.
        token: the placeholder token, such as "<my-cat>".
    Returns: tuple with one tuple of templates per picture.
    Raises ValueError that names every caption without the word.
    """
    result, bad, found = [], [], 0
    word = re.compile(rf"(?<!\w){re.escape(token)}(?!\w)", re.IGNORECASE)  # CLIP does not know case
    for path in paths:
        path = Path(path).with_suffix(".txt")
        if not path.is_file():
            result.append(tuple(templates))
            continue
        found += 1
        own = [(number, word.sub(lambda _: PLACEHOLDER, line)) for number, line in _read_lines(path)]
        bad += [f"  {path.name}, line {number}: {line}" for number, line in own if PLACEHOLDER not in line]
        if not own:
            bad.append(f"  {path.name}: empty")
        result.append(tuple(line for _, line in own))
    if bad:
        raise ValueError(
            f"captions without the new word; write {PLACEHOLDER} or {token} where it belongs, or remove the "
            "file:\n" + "\n".join(dict.fromkeys(bad))
        )
    if found:
        logger.info("%d of %d pictures have captions of their own", found, len(result))
    return tuple(result)


def fill(template, token):
    """Put the word into a template."""
    return template.replace(PLACEHOLDER, token)


def longest_template(templates, count_tokens, *, room=75):
    """The template that leaves the fewest places for the word's vectors.

    Args:
        templates: at least one.
        count_tokens: text -> number of tokens, without start and end.
        room: tokens that a prompt holds, without start and end.
    Returns: (template, largest num_vectors that fits it; below 1 when not even one does).
    """

    def places(template):
        return (room - count_tokens(fill(template, " "))) // template.count(PLACEHOLDER)

    longest = min(templates, key=places)
    return longest, places(longest)


def _read_lines(path):
    """[(line number, text)] of the lines that are not blank."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' is not UTF-8 text; save it as UTF-8.") from error
    return [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
