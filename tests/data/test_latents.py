"""Moments are encoded once a crop, survive on disk, and change nothing but the time."""

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gm.data import images, latents

ROOT = Path(__file__).parents[2]
TARGET = (16, 16)


class ToyVAE:
    """Moments that depend on every pixel; counts what it is asked."""

    def __init__(self):
        self.shapes = []

    def __call__(self, pixels):
        assert pixels.dtype == np.float32
        self.shapes.append(pixels.shape)
        patches = pixels.reshape(len(pixels), 3, 4, 4, 4, 4).mean((3, 5))
        return np.concatenate([patches, patches, patches[:, :2]], axis=1)


def never(pixels):
    raise AssertionError("the VAE was asked although everything is in the cache")


def draw_picture(path, seed):
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 30, 3), np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed, name in enumerate(["a.png", "b.png", "c.png"]):
        draw_picture(folder / name, seed)
    return folder


def encode(folder, vae, **changes):
    settings = {
        "target_size": TARGET,
        "cache_dir": folder.parent / "out" / "latents",
        "vae_fingerprint": "toy",
        "progress": False,
    }
    return latents.encode_pictures(images.scan_folder(folder), vae, **{**settings, **changes})


def entries(folder):
    return sorted((folder.parent / "out" / "latents").iterdir())


def same(a, b):
    return a.digest == b.digest and a.moments.tobytes() == b.moments.tobytes()


def test_moments_and_size_numbers_belong_to_their_picture_and_view(folder):
    views = images.make_views((0.5, 0.0), flip=True)
    found = encode(folder, ToyVAE(), views=views)
    assert found.names == ("a.png", "b.png", "c.png") and len(found) == 3
    assert found.moments.shape == (3, 2, 8, 4, 4) and found.moments.dtype == np.float32
    for n, name in enumerate(found.names):
        for v, view in enumerate(views):
            sample = images.crop_picture(images.read_picture(folder / name)[0], TARGET, view)
            np.testing.assert_array_equal(found.moments[n, v], ToyVAE()(sample.pixels[None])[0])
            assert tuple(found.original_size[n]) == sample.original_size == (20, 30)
            assert tuple(found.crop_coords_top_left[n, v]) == sample.crop_coords_top_left
    assert tuple(found.target_size) == TARGET
    assert not np.array_equal(found.moments[:, 0], found.moments[:, 1])


def test_a_second_run_never_asks_the_vae(folder):
    first = encode(folder, ToyVAE())
    assert same(first, encode(folder, never))


def test_a_second_process_finds_the_same_entries(folder):
    first = encode(folder, ToyVAE())
    script = (
        "import sys; from gm.data import images, latents\n"
        "found = latents.encode_pictures(images.scan_folder(sys.argv[1]), None, target_size=(16, 16),\n"
        "    cache_dir=sys.argv[2], vae_fingerprint='toy', progress=False)\n"
        "print(found.digest)"
    )
    command = [sys.executable, "-c", script, str(folder), str(folder.parent / "out" / "latents")]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert output.strip() == first.digest


def test_entries_follow_the_content_not_the_name(folder):
    encode(folder, ToyVAE())
    (folder / "b.png").rename(folder / "z.png")
    os.utime(folder / "a.png", (0, 0))
    assert encode(folder, never).names == ("a.png", "c.png", "z.png")


def test_only_new_or_changed_pictures_are_encoded(folder):
    encode(folder, ToyVAE())
    draw_picture(folder / "b.png", seed=7)
    draw_picture(folder / "d.png", seed=8)
    vae = ToyVAE()
    encode(folder, vae)
    assert len(vae.shapes) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"vae_fingerprint": "another"},
        {"target_size": (8, 32)},
        {"views": (images.View(0.5, 0.0),)},
        {"views": (images.View(flip=True),)},
    ],
)
def test_another_vae_size_crop_or_flip_is_another_entry(folder, change):
    encode(folder, ToyVAE())
    calls = []

    def vae(pixels):
        calls.append(pixels.shape)
        return np.zeros((1, 8, 2, 2), np.float32)

    assert encode(folder, vae, **change).digest != encode(folder, never).digest
    assert len(calls) == 3


def test_copies_of_a_picture_are_encoded_once(folder):
    (folder / "copy.png").write_bytes((folder / "a.png").read_bytes())
    vae = ToyVAE()
    found = encode(folder, vae)
    assert len(vae.shapes) == 3
    np.testing.assert_array_equal(found.moments[0], found.moments[found.names.index("copy.png")])


def test_small_batches_all_have_one_shape_and_the_same_result(folder):
    vae = ToyVAE()
    pairs = encode(folder, vae, batch_size=2, cache_dir=folder.parent / "pairs")
    assert vae.shapes == [(2, 3, 16, 16)] * 2
    np.testing.assert_allclose(pairs.moments, encode(folder, ToyVAE()).moments, atol=1e-6)


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped bit", "zeros"])
def test_damaged_entries_are_noticed_and_computed_again(folder, damage, caplog):
    first = encode(folder, ToyVAE())
    path = entries(folder)[1]
    data = bytearray(path.read_bytes())
    if damage == "flipped bit":
        data[-1] ^= 1
    cut = {"truncated": data[:-1], "empty": b"", "flipped bit": data, "zeros": bytes(len(data))}[damage]
    path.write_bytes(cut)
    vae = ToyVAE()
    assert same(first, encode(folder, vae))
    assert len(vae.shapes) == 1 and "damaged" in caplog.text
    assert same(first, encode(folder, never))


def test_an_interrupted_run_keeps_what_it_has(folder):
    class Interrupted(ToyVAE):
        def __call__(self, pixels):
            if len(self.shapes) == 2:
                raise KeyboardInterrupt
            return super().__call__(pixels)

    with pytest.raises(KeyboardInterrupt):
        encode(folder, Interrupted())
    assert len(entries(folder)) == 2
    vae = ToyVAE()
    encode(folder, vae)
    assert len(vae.shapes) == 1


def test_a_full_disk_is_a_clear_error_and_leaves_no_entry(folder, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="cannot keep latents .No space left.*free the disk") as caught:
            encode(folder, ToyVAE())
    assert caught.value.errno == errno.ENOSPC
    assert entries(folder) == []
    encode(folder, ToyVAE())
    assert len(entries(folder)) == 3


def test_a_save_path_that_is_a_file_is_a_clear_error(folder):
    (folder.parent / "out").write_text("")
    with pytest.raises(OSError, match="cannot keep latents .*--save_path"):
        encode(folder, never)


def test_a_broken_picture_stops_the_run_before_anything_is_encoded(folder):
    for name in ["b.png", "c.png"]:
        (folder / name).write_bytes((folder / name).read_bytes()[:-600])
    with pytest.raises(ValueError, match=r"(?s)2 of 3 pictures.*b\.png.*c\.png"):
        encode(folder, never)


def test_a_picture_deleted_after_the_scan_is_a_clear_error(folder):
    pictures = images.scan_folder(folder)
    (folder / "b.png").unlink()
    with pytest.raises(ValueError, match=r"b\.png: the file is gone"):
        latents.encode_pictures(
            pictures, never, target_size=TARGET, cache_dir=folder.parent / "out", vae_fingerprint="toy"
        )


def test_a_picture_that_changes_while_it_is_read_is_a_clear_error(folder):
    class Painter(ToyVAE):
        def __call__(self, pixels):
            draw_picture(folder / "c.png", seed=9)
            return super().__call__(pixels)

    with pytest.raises(ValueError, match=r"c\.png' changed while it was read"):
        encode(folder, Painter())


def test_nan_from_the_vae_is_an_error_that_names_the_picture(folder):
    with pytest.raises(ValueError, match=r"NaN or infinite latents for .*a\.png"):
        encode(folder, lambda pixels: np.full((1, 8, 4, 4), np.nan, np.float32))
    assert entries(folder) == []


def test_the_log_says_what_was_cached(folder, caplog):
    caplog.set_level(logging.INFO)
    encode(folder, ToyVAE())
    assert "latents: 0 in the cache, 3 to encode" in caplog.text
    encode(folder, never)
    assert "latents: 3 in the cache, 0 to encode" in caplog.text


def test_samples_have_the_gaussian_s_mean_and_deviation():
    mean = np.array([-1.0, 0.0, 2.0, 5.0], np.float32)
    std = np.array([0.1, 1.0, 2.0, 0.5], np.float32)
    moments = np.concatenate([mean, 2 * np.log(std)]).reshape(8, 1, 1) * np.ones((1, 100, 100), np.float32)
    drawn = latents.sample(moments.astype(np.float32), np.random.default_rng(0))
    assert drawn.shape == (4, 100, 100) and drawn.dtype == np.float32
    np.testing.assert_allclose(drawn.mean((1, 2)), mean, atol=0.05)
    np.testing.assert_allclose(drawn.std((1, 2)), std, rtol=0.03)


def test_log_variance_is_clipped_at_both_ends():
    moments = np.zeros((2, 8, 3, 3), np.float32)
    moments[0, 4:], moments[1, 4:] = -1000, 1000
    noise = np.random.default_rng(0).standard_normal((2, 4, 3, 3), dtype=np.float32)
    drawn = latents.sample(moments, np.random.default_rng(0))
    np.testing.assert_allclose(drawn[0], noise[0] * np.exp(-15), rtol=1e-6)
    np.testing.assert_allclose(drawn[1], noise[1] * np.exp(10), rtol=1e-6)
