"""A folder of pictures -> pixels of one size, with SDXL's size conditioning (Podell et al. 2023, sec. 2.2).

All pairs of numbers are (height, width) or (y, x), in pixels, after EXIF rotation.
"""

import hashlib
import io
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

logger = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # what a file may contain, whatever it is called
MAX_PIXELS = 2 * 89_478_485  # half a gigabyte of RGB; where Pillow, too, refuses to go on
MAX_ASPECT = 20

UPRIGHT = {  # EXIF orientation -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Picture:
    """A picture file whose header was readable."""

    path: Path
    size: tuple[int, int]  # original (height, width)


@dataclass(frozen=True)
class View:
    """Where a picture is cropped, in parts (0 to 1) of the room left, and whether it is mirrored first."""

    y: float = 0.5
    x: float = 0.5
    flip: bool = False


CENTER = (View(),)


@dataclass(frozen=True)
class Sample:
    """What the VAE and the size embedders see of a picture."""

    pixels: np.ndarray  # (3, H, W) float32 in [-1, 1]
    original_size: tuple[int, int]  # before resizing
    crop_coords_top_left: tuple[int, int]  # in the resized (and mirrored) picture
    target_size: tuple[int, int]  # (H, W)


def scan_folder(folder, *, target_size=None):
    """List the pictures directly in `folder`, by name. Reads headers (of PNG files, which may keep their
    EXIF at the end, the whole).

    Args:
        folder: holds 1 to hundreds of jpg, png, webp or bmp files; names that start with a dot are skipped.
        target_size: (H, W); if given, the log names pictures that must be enlarged to it.
    Returns: list of Picture.
    Raises FileNotFoundError (no such folder), ValueError (no pictures; or names every unreadable one).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"--data_path '{folder}' is not a folder; give one that holds pictures.")
    names = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    paths = [path for path in names if path.suffix.lower() in SUFFIXES]
    others = [path.name for path in names if path not in paths and path.suffix.lower() != ".txt"]
    if not paths:
        seen = f" It holds {', '.join(others[:5])}." if others else ""
        raise ValueError(
            f"no pictures in '{folder}': it needs at least one {', '.join(SUFFIXES)} file, "
            f"not in a sub-folder.{seen}"
        )
    if others:
        logger.warning("not used in %s: %s", folder, ", ".join(others))

    pictures = _for_each(paths, _read_header)
    if target_size is not None:
        height, width = target_size
        small = [p.path.name for p in pictures if p.size[0] < height or p.size[1] < width]
        if small:
            logger.warning("smaller than %dx%d and enlarged: %s", height, width, ", ".join(small))
    return pictures


def check_pictures(pictures):
    """Decode every picture once; ValueError names all that are broken, too large or gone."""
    _for_each([picture.path for picture in pictures], _decode)


def hash_pictures(pictures):
    """sha256 of every file's bytes, as hex; ValueError names all files that cannot be read."""
    return _for_each([picture.path for picture in pictures], _hash)


def read_picture(path):
    """Decode one file.

    Transparent parts become white, 16-bit grey is scaled to 8 bits; embedded colour profiles are not applied.
    Returns: (upright PIL image in RGB, sha256 of the file's bytes as hex).
    Raises whatever the file system and Pillow raise.
    """
    data = Path(path).read_bytes()
    return _decode_bytes(data, MAX_PIXELS), hashlib.sha256(data).hexdigest()


def decode_picture(data, *, max_pixels=MAX_PIXELS):
    """A file's bytes -> upright PIL image in RGB, as `read_picture` does. The bytes may be anyone's.

    Raises:
        ValueError: they are no picture of a known format, damaged, or of more than `max_pixels`.
    """
    try:
        return _decode_bytes(data, max_pixels)
    except Image.DecompressionBombError as error:
        raise ValueError(f"more than {max_pixels // 10**6} megapixels; save it smaller") from error
    except Exception as error:  # broken files make Pillow raise half of Python's exceptions
        raise ValueError(_reason(error)) from error


def _decode_bytes(data, max_pixels):
    with _open(io.BytesIO(data), max_pixels) as image:
        image.load()
        return _to_rgb(_upright(image))


def fit(size, target_size, view):
    """Where the crop lies when a picture is scaled to just cover the target.

    Args: size, target_size: (height, width).
    Returns: resized (height, width), crop (top, left) in the resized picture.
    """
    scale = max(target_size[0] / size[0], target_size[1] / size[1])
    height = max(target_size[0], round(size[0] * scale))
    width = max(target_size[1], round(size[1] * scale))
    crop = (round(view.y * (height - target_size[0])), round(view.x * (width - target_size[1])))
    return (height, width), crop


def crop_picture(image, target_size, view):
    """Upright RGB image -> Sample, resampled with Lanczos."""
    original_size = (image.height, image.width)
    resized, (top, left) = fit(original_size, target_size, view)
    if view.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.resize(resized[::-1], Image.Resampling.LANCZOS)
    image = image.crop((left, top, left + target_size[1], top + target_size[0]))
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1) / 127.5 - 1
    return Sample(np.ascontiguousarray(pixels), original_size, (top, left), tuple(target_size))


def make_views(crop="center", *, num_crops=1, flip=False, seed=0):
    """The views taken of every picture.

    Args:
        crop: "center"; "random" (num_crops places, the same for every picture and every run with this seed);
            or a pair (y, x) from 0 (top, left) to 1 (bottom, right).
        flip: each crop also mirrored. Off by default: faces and logos are not symmetric.
    Returns: tuple of View.
    """
    if crop != "random" and num_crops != 1:
        raise ValueError(f"num_crops is {num_crops}, but only crop='random' takes several, not {crop!r}.")
    if crop == "random":
        if num_crops < 1:
            raise ValueError(f"num_crops must be at least 1, not {num_crops}.")
        places = np.random.default_rng(seed).random((num_crops, 2)).tolist()
    elif crop == "center":
        places = [(0.5, 0.5)]
    elif not isinstance(crop, str) and len(crop) == 2 and all(0 <= c <= 1 for c in crop):
        places = [crop]
    else:
        raise ValueError(f"crop must be 'center', 'random' or two numbers (y, x) from 0 to 1, not {crop!r}.")
    flips = (False, True) if flip else (False,)
    return tuple(View(y, x, mirrored) for y, x in places for mirrored in flips)


def _for_each(paths, read):
    """[read(path)], with all failures in one ValueError."""
    results, problems = [], []
    for path in paths:
        try:
            results.append(read(path))
        except Exception as error:  # broken files make Pillow raise half of Python's exceptions
            problems.append(f"  {path.name}: {_reason(error)}")
    if problems:
        raise ValueError(
            f"{len(problems)} of {len(paths)} pictures in '{paths[0].parent}' cannot be used:\n"
            + "\n".join(problems) + "\nReplace or remove them."
        )
    return results


def _reason(error):
    if isinstance(error, UnidentifiedImageError):
        return "not a jpg, png, webp or bmp picture, or damaged at its start"
    if isinstance(error, FileNotFoundError):
        return "the file is gone"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS // 10**6} megapixels; save it smaller"
    return str(error) or type(error).__name__


def _decode(path):
    read_picture(path)


def _hash(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_header(path):
    with _open(path) as image:
        width, height = image.size
        if _orientation(image) in (5, 6, 7, 8):  # lies on its side
            height, width = width, height
    return Picture(path, (height, width))


def _open(source, max_pixels=MAX_PIXELS):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # at half the size where it refuses
        image = Image.open(source, formats=FORMATS)
    if image.width * image.height > max_pixels:
        raise Image.DecompressionBombError
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(f"{image.height}x{image.width} is too narrow; cut it to at most 1:{MAX_ASPECT}")
    return image


def _orientation(image):
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def _upright(image):
    # Not ImageOps.exif_transpose: it writes the EXIF back, which fails for odd but harmless tags.
    turn = UPRIGHT.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _to_rgb(image):
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's convert() clips at 255
        image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
