"""The autoencoder in bfloat16: its decoder's matrices, and nothing of its encoder."""

from pathlib import Path

import mindspore as ms
import numpy as np
from PIL import Image

from gm.checkpoint import load_weights
from gm.config import build_engine
from gm.models.layers import parameter_dtype

ROOT = Path(__file__).resolve().parents[2]


def small_model(dtype):
    with parameter_dtype(dtype):
        engine = build_engine(ROOT / "configs/training/sd_xl_small_textual_inversion.yaml")
    load_weights(engine, ROOT / "checkpoints/sd_xl_small.safetensors")
    return engine


def test_pictures_decoded_in_bfloat16_are_those_of_float32_to_the_eye():
    single, half = small_model(ms.float32), small_model(ms.bfloat16)
    files = sorted((ROOT / "datasets/cat_toy").glob("*.png"))[:4]
    pictures = np.stack([np.asarray(Image.open(file).convert("RGB"), np.float32) for file in files]) / 127.5 - 1
    moments = single.encode(pictures.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(half.encode(pictures.transpose(0, 3, 1, 2)), moments)
    latents = moments[:, :4] * single.scale_factor
    expected, found = single.decode(latents), half.decode(latents)
    psnr = 10 * np.log10(4 / np.mean((found - expected) ** 2))
    assert 50 < psnr < 80  # above 80 nothing was rounded
