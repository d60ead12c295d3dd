"""The tiny weights have the layout of the real files, and their tokenizer is a CLIP tokenizer."""

import numpy as np
import pytest
from transformers import CLIPTokenizer

from tests.tiny import FIXTURES, SDXL, TOKENIZER, VOCAB, file_shapes, tiny_state_dict


@pytest.mark.parametrize("kind", ["base", "refiner"])
def test_at_full_size_the_names_and_shapes_are_those_of_the_real_file(kind):
    real = {}
    for line in (FIXTURES / "sdxl_keys" / f"sd_xl_{kind}_1.0.tsv").read_text().splitlines():
        name, shape = line.split("\t")
        real[name] = () if shape == "scalar" else tuple(map(int, shape.split("x")))
    assert file_shapes(SDXL[kind]) == real


def test_a_seed_gives_the_same_weights_and_another_seed_others():
    one, again, other = tiny_state_dict(1), tiny_state_dict(1), tiny_state_dict(2)
    assert all(np.array_equal(one[name], again[name]) for name in one)
    name = "model.diffusion_model.out.2.weight"
    assert not np.array_equal(one[name], other[name])


def test_the_tiny_tokenizer_reads_as_a_clip_tokenizer():
    tokenizer = CLIPTokenizer.from_pretrained(str(TOKENIZER))
    assert len(tokenizer) == VOCAB
    start, cat, dog, end = tokenizer("cat  DOG").input_ids
    assert (start, end) == (VOCAB - 2, VOCAB - 1)
    assert tokenizer.convert_ids_to_tokens([cat, dog, 0]) == ["cat</w>", "dog</w>", "!"]
    assert len(tokenizer("zebra").input_ids) > 3
