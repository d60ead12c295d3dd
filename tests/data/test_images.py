"""A folder of pictures becomes pixels of one size and the right six numbers."""

import os
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from gm.data import images

TARGET = (32, 32)


def corners(height=40, width=60):
    """Red, green / blue, yellow quarters: every one of the eight orientations looks different."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (250, 0, 0)
    pixels[: height // 2, width // 2 :] = (0, 250, 0)
    pixels[height // 2 :, : width // 2] = (0, 0, 250)
    pixels[height // 2 :, width // 2 :] = (250, 250, 0)
    return pixels


def save(path, image, **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image.save(path, **options)
    return path


def rgb(path):
    return np.asarray(images.read_picture(path)[0])


# Colours


@pytest.mark.parametrize("suffix", [".png", ".webp", ".bmp", ".PNG"])
def test_lossless_formats_come_through_exactly(tmp_path, suffix):
    path = save(tmp_path / f"a{suffix}", corners(), **({"lossless": True} if suffix == ".webp" else {}))
    np.testing.assert_array_equal(rgb(path), corners())


def test_grey_is_three_equal_channels(tmp_path):
    grey = np.arange(40 * 60, dtype=np.uint32).reshape(40, 60).astype(np.uint8)
    np.testing.assert_array_equal(rgb(save(tmp_path / "a.png", grey)), np.repeat(grey[..., None], 3, axis=2))


def test_black_and_white_is_0_and_255(tmp_path):
    grey = np.eye(40, dtype=np.uint8) * 255
    path = save(tmp_path / "a.png", Image.fromarray(grey).convert("1"))
    np.testing.assert_array_equal(rgb(path)[..., 0], grey)


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    deep = np.arange(40 * 60, dtype=np.uint32).reshape(40, 60) * 27
    path = save(tmp_path / "a.png", deep.astype(np.uint16))
    assert Image.open(path).mode == "I;16"
    expected = np.round(deep / 257)
    np.testing.assert_array_equal(rgb(path)[..., 1], expected)
    assert expected.max() > 250


def test_transparent_parts_become_white(tmp_path):
    rgba = np.dstack([corners(), np.full((40, 60), 255, np.uint8)])
    rgba[:, :10, 3] = 0
    rgba[:, 10:20, 3] = 127
    seen = rgb(save(tmp_path / "a.png", rgba))
    assert (seen[:, :10] == 255).all()
    blended = corners()[:, 10:20] * (127 / 255) + 255 * (128 / 255)
    np.testing.assert_allclose(seen[:, 10:20], blended, atol=1)
    np.testing.assert_array_equal(seen[:, 20:], corners()[:, 20:])


def test_grey_with_alpha_becomes_white_where_transparent(tmp_path):
    pixels = np.zeros((40, 60, 2), np.uint8)
    pixels[:, 30:, 1] = 255
    seen = rgb(save(tmp_path / "a.png", Image.fromarray(pixels, "LA")))
    assert (seen[:, :30] == 255).all() and (seen[:, 30:] == 0).all()


def test_a_palette_and_its_transparent_colour_are_resolved(tmp_path):
    palette = Image.fromarray(corners()).quantize(4)
    np.testing.assert_array_equal(rgb(save(tmp_path / "a.png", palette)), corners())
    red = palette.getpixel((0, 0))
    seen = rgb(save(tmp_path / "b.png", palette, transparency=red))
    assert (seen[:20, :30] == 255).all()
    np.testing.assert_array_equal(seen[20:], corners()[20:])


def test_a_transparent_rgb_colour_becomes_white(tmp_path):
    seen = rgb(save(tmp_path / "a.png", corners(), transparency=(250, 0, 0)))
    assert (seen[:20, :30] == 255).all() and (seen[20:, :30] == (0, 0, 250)).all()


def test_cmyk_jpeg_keeps_its_colours(tmp_path):
    path = save(tmp_path / "a.jpg", Image.fromarray(corners()).convert("CMYK"), quality=100)
    assert Image.open(path).mode == "CMYK"
    inner = np.s_[5:15, 5:25]
    np.testing.assert_allclose(rgb(path)[inner], corners()[inner], atol=4)


def test_several_pictures_in_one_jpeg_file_give_the_first(tmp_path):
    other = Image.new("RGB", (60, 40), "white")
    save(tmp_path / "a.jpg", Image.fromarray(corners()), format="MPO", save_all=True, append_images=[other])
    (picture,) = images.scan_folder(tmp_path)
    assert picture.size == (40, 60)
    assert rgb(picture.path)[5, 5, 0] > 200 and rgb(picture.path)[5, 5, 1] < 50


# Orientation and sizes


def write_oriented(path, orientation):
    """A file that looks like `corners()` once its EXIF orientation is applied."""
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation -> the Pillow transpose that inverts it
    image = Image.fromarray(corners())
    exif = Image.Exif()
    exif[0x0112] = orientation
    if orientation in undo:
        image = image.transpose(Image.Transpose(undo[orientation]))
    return save(path, image, exif=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_exif_orientation_is_applied_first(tmp_path, orientation, suffix):
    path = write_oriented(tmp_path / f"a{suffix}", orientation)
    (picture,) = images.scan_folder(tmp_path)
    assert Image.open(path).size == ((40, 60) if orientation >= 5 else (60, 40))
    assert picture.size == (40, 60)
    seen = rgb(path)
    assert seen.shape == (40, 60, 3)
    for y, x in [(10, 15), (10, 45), (30, 15), (30, 45)]:
        np.testing.assert_allclose(seen[y, x].astype(int), corners()[y, x], atol=8)


def test_sixteen_bit_grey_is_rotated_too(tmp_path):
    deep = (np.arange(40 * 60, dtype=np.uint16).reshape(40, 60) * 27).astype(np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    seen = rgb(save(tmp_path / "a.png", deep, exif=exif))
    np.testing.assert_array_equal(seen[..., 0], np.rot90(np.round(deep / 257), -1))


@pytest.mark.parametrize(
    "size, view, resized, crop",
    [
        ((40, 60), images.View(), (32, 48), (0, 8)),
        ((60, 40), images.View(), (48, 32), (8, 0)),
        ((60, 40), images.View(0, 0), (48, 32), (0, 0)),
        ((60, 40), images.View(1, 1), (48, 32), (16, 0)),
        ((32, 32), images.View(), (32, 32), (0, 0)),
        ((3, 5), images.View(), (32, 53), (0, 10)),  # 10.5 rounds to 10, as torchvision does
        ((4031, 3023), images.View(), (43, 32), (6, 0)),
    ],
)
def test_the_short_side_fits_and_the_crop_lies_where_asked(size, view, resized, crop):
    assert images.fit(size, TARGET, view) == (resized, crop)


def test_a_wide_target_is_just_covered():
    assert images.fit((100, 100), (32, 64), images.View()) == ((64, 64), (16, 0))


def test_the_six_numbers_are_exact():
    sample = images.crop_picture(Image.new("RGB", (301, 200)), TARGET, images.View())
    assert sample.original_size == (200, 301)
    assert sample.crop_coords_top_left == (0, 8)
    assert sample.target_size == TARGET


def test_pixels_are_channels_first_from_minus_one_to_one():
    halves = np.zeros((32, 32, 3), np.uint8)
    halves[:, 16:, 2] = 255
    pixels = images.crop_picture(Image.fromarray(halves), TARGET, images.View()).pixels
    assert pixels.shape == (3, 32, 32) and pixels.dtype == np.float32 and pixels.flags.c_contiguous
    assert (pixels[2, :, 16:] == 1).all() and (pixels[2, :, :16] == -1).all() and (pixels[:2] == -1).all()


def test_the_crop_is_that_part_of_the_resized_picture():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 40, 3), np.uint8))
    pixels = images.crop_picture(image, TARGET, images.View(0.25, 0.5)).pixels
    whole = np.asarray(image.resize((32, 48), Image.Resampling.LANCZOS))
    np.testing.assert_allclose((pixels.transpose(1, 2, 0) + 1) * 127.5, whole[4:36], atol=1e-4)


def test_fine_detail_is_averaged_not_aliased():
    stripes = np.zeros((320, 320, 3), np.uint8)
    stripes[:, ::2] = 255
    pixels = images.crop_picture(Image.fromarray(stripes), TARGET, images.View()).pixels
    assert np.abs(pixels).max() < 0.05


def test_mirroring_happens_before_the_crop():
    view = images.View(0.5, 0, flip=True)
    sample = images.crop_picture(Image.fromarray(corners()), TARGET, view)
    assert sample.crop_coords_top_left == (0, 0)
    assert sample.pixels[1, 4, 4] > 0.8 and sample.pixels[0, 4, 4] < -0.8  # top right was green


# Views


def test_one_centred_view_without_mirroring_is_the_default():
    assert images.make_views() == (images.View(0.5, 0.5, False),) == images.CENTER


def test_flips_double_the_views_when_asked_for():
    assert images.make_views((0, 1), flip=True) == (images.View(0, 1, False), images.View(0, 1, True))


def test_random_crops_follow_the_seed():
    first = images.make_views("random", num_crops=3, seed=0)
    assert len(set(first)) == 3 and all(0 <= v.y < 1 and 0 <= v.x < 1 and not v.flip for v in first)
    assert first == images.make_views("random", num_crops=3, seed=0)
    assert first != images.make_views("random", num_crops=3, seed=1)


@pytest.mark.parametrize("crop", ["middle", (0.5,), (0.5, 1.2)])
def test_an_unknown_crop_is_refused(crop):
    with pytest.raises(ValueError, match="crop must be"):
        images.make_views(crop)


@pytest.mark.parametrize("crop, num_crops", [("center", 2), ("random", 0)])
def test_an_impossible_number_of_crops_is_refused(crop, num_crops):
    with pytest.raises(ValueError, match="num_crops"):
        images.make_views(crop, num_crops=num_crops)


# Folders


def test_pictures_come_by_name_and_other_files_are_named_in_the_log(tmp_path, caplog):
    for name in ["b.png", "a.webp", "c.JPG", "d.jpeg", ".hidden.png"]:
        save(tmp_path / name, corners())
    (tmp_path / "a.txt").write_text("a caption")
    (tmp_path / "phone.heic").write_bytes(b"")
    (tmp_path / "more").mkdir()
    names = [picture.path.name for picture in images.scan_folder(tmp_path)]
    assert names == ["a.webp", "b.png", "c.JPG", "d.jpeg"]
    assert "more, phone.heic" in caplog.text and "a.txt" not in caplog.text and "hidden" not in caplog.text


def test_pictures_that_must_be_enlarged_are_named_in_the_log(tmp_path, caplog):
    save(tmp_path / "small.png", corners(20, 60))
    save(tmp_path / "large.png", corners(60, 60))
    images.scan_folder(tmp_path, target_size=TARGET)
    assert "smaller than 32x32 and enlarged: small.png" in caplog.text


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="--data_path .* is not a folder"):
        images.scan_folder(tmp_path / "none")


def test_an_empty_folder_is_an_error_that_says_what_is_there_instead(tmp_path):
    with pytest.raises(ValueError, match="no pictures in .*not in a sub-folder.$"):
        images.scan_folder(tmp_path)
    (tmp_path / "set1").mkdir()
    with pytest.raises(ValueError, match="It holds set1"):
        images.scan_folder(tmp_path)


def test_all_unreadable_files_are_named_at_once(tmp_path):
    save(tmp_path / "good.png", corners())
    (tmp_path / "zero.jpg").write_bytes(b"")
    (tmp_path / "text.png").write_text("not a picture")
    save(tmp_path / "really_a_gif.jpg", Image.fromarray(corners()), format="GIF")
    os.symlink(tmp_path / "nowhere", tmp_path / "link.png")
    (tmp_path / "folder.png").mkdir()
    save(tmp_path / "thin.png", np.zeros((2, 100, 3), np.uint8))
    with pytest.raises(ValueError) as caught:
        images.scan_folder(tmp_path)
    text = str(caught.value)
    assert "6 of 7 pictures" in text and "good.png" not in text
    for line in [
        "zero.jpg: not a jpg, png, webp or bmp picture",
        "text.png: not a jpg, png, webp or bmp picture",
        "really_a_gif.jpg: not a jpg, png, webp or bmp picture",
        "link.png: the file is gone",
        "folder.png: Is a directory",
        "thin.png: 2x100 is too narrow",
    ]:
        assert line in text


def test_truncated_pictures_are_found_by_decoding(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    for name in ["a.jpg", "b.png", "c.webp", "d.bmp", "whole.jpg"]:
        save(tmp_path / name, noise)
    pictures = images.scan_folder(tmp_path)
    for name in ["a.jpg", "b.png", "c.webp", "d.bmp"]:
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError) as caught:
        images.check_pictures(pictures)
    assert "4 of 5 pictures" in str(caught.value)
    assert all(name in str(caught.value) for name in ["a.jpg:", "b.png:", "c.webp:", "d.bmp:"])


def test_a_picture_deleted_after_the_scan_is_a_clear_error(tmp_path):
    save(tmp_path / "a.png", corners())
    pictures = images.scan_folder(tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match="a.png: the file is gone"):
        images.hash_pictures(pictures)
    with pytest.raises(ValueError, match="a.png: the file is gone"):
        images.check_pictures(pictures)


def huge_png(path, width, height):
    """The header of a PNG of width x height, without its pixels."""
    save(path, corners())
    data = bytearray(path.read_bytes())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)


def test_decompression_bombs_are_refused_before_decoding(tmp_path):
    huge_png(tmp_path / "bomb.png", 100_000, 100_000)
    huge_png(tmp_path / "big.png", 20_000, 9_000)
    with pytest.raises(ValueError) as caught:
        images.scan_folder(tmp_path)
    assert "bomb.png: more than 178 megapixels; save it smaller" in str(caught.value)
    assert "big.png: more than 178 megapixels; save it smaller" in str(caught.value)


def test_a_hundred_megapixels_are_no_bomb(tmp_path):
    path = tmp_path / "a.bmp"
    Image.new("1", (10_000, 10_000)).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (picture,) = images.scan_folder(tmp_path)
    assert picture.size == (10_000, 10_000)


def test_bytes_from_anyone_are_a_picture_or_an_error(tmp_path):
    save(tmp_path / "a.png", corners())
    data = (tmp_path / "a.png").read_bytes()
    np.testing.assert_array_equal(np.asarray(images.decode_picture(data)), rgb(tmp_path / "a.png"))
    for bad in (b"", b"GIF89a", data[: len(data) // 2], data[:20]):
        with pytest.raises(ValueError, match=r"\w"):
            images.decode_picture(bad)
    with pytest.raises(ValueError, match="megapixels; save it smaller"):
        images.decode_picture(data, max_pixels=40 * 60 - 1)
