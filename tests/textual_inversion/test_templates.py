"""Captions that carry the new word."""

import logging
import re

import pytest

from gm.textual_inversion.templates import (
    BUILT_IN,
    caption_templates,
    fill,
    longest_template,
    picture_templates,
)

TOKEN = "<my-cat>"


def count_words(text):
    return len(re.findall(r"\w+|[^\w\s]", text))


@pytest.mark.parametrize("kind", BUILT_IN)
def test_each_kind_has_many_different_templates_with_one_placeholder(kind):
    lines = caption_templates(kind)
    assert 20 <= len(lines) == len(set(lines)) <= 30
    for line in lines:
        assert line.count("{placeholder}") == 1 and line == line.strip().lower() and "  " not in line
        assert "{" not in fill(line, TOKEN) and TOKEN in fill(line, TOKEN)


@pytest.mark.parametrize("kind", BUILT_IN)
def test_seventy_vectors_fit_into_every_built_in_template(kind):
    assert longest_template(caption_templates(kind), count_words)[1] >= 70


def test_the_kinds_differ():
    kinds = [set(lines) for lines in BUILT_IN.values()]
    assert len(set().union(*kinds)) == sum(map(len, kinds))
    assert all("style" in line or "art" in line for line in BUILT_IN["style"])


def test_an_unknown_property_is_an_error():
    with pytest.raises(ValueError, match="must be one of object, style, face; got 'objekt'"):
        caption_templates("objekt")
    with pytest.raises(ValueError, match="--learnable_property"):
        caption_templates("objekt", template_file="lines.txt")


def test_the_longest_template_says_how_many_vectors_fit():
    lines = ("a {placeholder}", "a photo of a {placeholder}", "the {placeholder}")
    assert longest_template(lines, count_words) == ("a photo of a {placeholder}", 71)
    assert longest_template(lines, count_words, room=14) == ("a photo of a {placeholder}", 10)


def test_a_template_with_the_word_twice_holds_half_as_many_vectors():
    lines = ("a photo of a {placeholder}", "{placeholder} and {placeholder}")
    assert longest_template(lines, count_words) == ("{placeholder} and {placeholder}", 37)


# --template_file


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def test_a_template_file_replaces_the_built_in_ones(tmp_path):
    path = write(tmp_path / "t.txt", "\ufeff  a {placeholder} in Köln \r\n\r\n{placeholder}, {style}\n")
    lines = caption_templates("object", template_file=path)
    assert lines == ("a {placeholder} in Köln", "{placeholder}, {style}")
    assert fill(lines[1], TOKEN) == "<my-cat>, {style}"


def test_lines_without_the_placeholder_are_all_named(tmp_path):
    path = write(tmp_path / "t.txt", "a {placeholder}\n\na cat\na {placehoder}\n")
    with pytest.raises(ValueError, match=r"(?s)t\.txt.*line 3: a cat\n.*line 4: a \{placehoder\}") as caught:
        caption_templates("object", template_file=path)
    assert "line 1" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "\n  \n"])
def test_an_empty_template_file_is_an_error(tmp_path, text):
    with pytest.raises(ValueError, match="is empty; write a caption on each line, as 'a photo of a {"):
        caption_templates("object", template_file=write(tmp_path / "t.txt", text))


def test_a_missing_template_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="--template_file .* is not a file"):
        caption_templates("object", template_file=tmp_path / "none.txt")


def test_a_template_file_in_another_encoding_is_an_error(tmp_path):
    path = write(tmp_path / "t.txt", "{placeholder} in Köln", encoding="latin-1")
    with pytest.raises(ValueError, match=r"t\.txt' is not UTF-8 text"):
        caption_templates("object", template_file=path)


# Captions beside pictures


def test_pictures_without_a_caption_file_take_the_common_templates(tmp_path):
    common = ("a {placeholder}", "the {placeholder}")
    paths = [tmp_path / "a.jpg", tmp_path / "b.png"]
    assert picture_templates(paths, common, token=TOKEN) == (common, common)


def test_a_caption_file_holds_for_its_picture_alone(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write(tmp_path / "a.txt", "a red {placeholder}\n\n a {placeholder} at night\n")
    found = picture_templates([tmp_path / "a.JPG", tmp_path / "b.png"], ("{placeholder}",), token=TOKEN)
    assert found == (("a red {placeholder}", "a {placeholder} at night"), ("{placeholder}",))
    assert "1 of 2 pictures have captions of their own" in caplog.text


@pytest.mark.parametrize("written", ["<my-cat>", "<My-Cat>"])
def test_a_caption_may_hold_the_word_itself(tmp_path, written):
    write(tmp_path / "a.txt", f"{written} on a sofa")
    assert picture_templates([tmp_path / "a.png"], (), token=TOKEN) == (("{placeholder} on a sofa",),)


def test_a_word_inside_another_word_does_not_count(tmp_path):
    write(tmp_path / "a.txt", "she asks")
    with pytest.raises(ValueError, match="a.txt, line 1: she asks"):
        picture_templates([tmp_path / "a.png"], (), token="sks")


def test_captions_without_the_word_are_all_named(tmp_path):
    write(tmp_path / "a.txt", "a {placeholder}\na cat")
    write(tmp_path / "b.txt", "")
    write(tmp_path / "c.txt", "{placeholder}")
    paths = [tmp_path / f"{name}.png" for name in "abc"]
    with pytest.raises(ValueError) as caught:
        picture_templates(paths, (), token=TOKEN)
    text = str(caught.value)
    assert "a.txt, line 2: a cat" in text and "b.txt: empty" in text and "c.txt" not in text
    assert "write {placeholder} or <my-cat> where it belongs" in text
