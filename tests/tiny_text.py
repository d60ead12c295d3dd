"""A small conditioner for tests, without the rest of the engine."""

import numpy as np
from mindspore import Tensor

from gm.conditioning.conditioner import GeneralConditioner
from gm.conditioning.embedders import ConcatTimestepEmbedderND, FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder2
from tests.tiny import TINY, TOKENIZER

SIZE_KEYS = {
    "base": ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple"),
    "refiner": ("original_size_as_tuple", "crop_coords_top_left", "aesthetic_score"),
}
HEADS = {32: 2, 48: 3, 768: 12, 1280: 20}


def build_conditioner(size, *, kind="base", version=TOKENIZER, max_length=77):
    """The conditioner of a `tests.tiny.Size`, its weights zero."""
    shared = {"version": version, "max_length": max_length}
    embedders = []
    if size.clip_l:
        text = size.clip_l
        embedders.append(
            FrozenCLIPEmbedder(
                width=text.width, layers=text.layers, layer_idx=text.layers - 1, heads=HEADS[text.width],
                vocab_size=text.vocab, **shared,
            )
        )  # fmt: skip
    text = size.clip_g
    embedders.append(
        FrozenOpenCLIPEmbedder2(
            width=text.width, layers=text.layers, heads=HEADS[text.width], embed_dim=text.width,
            vocab_size=text.vocab, **shared,
        )
    )  # fmt: skip
    embedders += [ConcatTimestepEmbedderND(outdim=256, input_key=key) for key in SIZE_KEYS[kind]]
    return GeneralConditioner(embedders)


def randomise(cell, seed=0):
    """Fill with random weights that keep activations of order one; returns the cell."""
    rng = np.random.default_rng(seed)
    for parameter in cell.get_parameters():
        values = rng.standard_normal(parameter.shape) * (0.2 if len(parameter.shape) > 1 else 0.1)
        is_norm = "norm" in parameter.name or ".ln_" in parameter.name
        values += 1 if is_norm and parameter.name.endswith("weight") else 0
        parameter.set_data(Tensor(values.astype(np.float32)))
    return cell


def tiny_conditioner(*, kind="base", max_length=77, seed=0):
    return randomise(build_conditioner(TINY[kind], kind=kind, max_length=max_length), seed)


def sizes(n, *, kind="base"):
    """Size entries of a batch of n."""
    numbers = {"aesthetic_score": (6.0,), "crop_coords_top_left": (0, 64)}
    return {key: [numbers.get(key, (768, 1024))] * n for key in SIZE_KEYS[kind]}
