"""VAE moments of every picture, encoded once and kept on disk by content.

An entry is the mean and log-variance of one (picture, crop, flip) in fp32, so each training step still draws
a fresh latent sample: the cache changes nothing but the time.
"""

import hashlib
import io
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gm.atomic_file import atomic_file
from gm.data import images

logger = logging.getLogger(__name__)

ENTRY_VERSION = 1  # count up when images.py changes what the VAE sees


def sample(moments, rng):
    """Draw from the VAE's diagonal Gaussian.

    Args:
        moments: (..., 8, h, w) float32, mean and log-variance stacked along the channels.
        rng: numpy Generator.
    Returns: (..., 4, h, w) float32, not yet times the scale factor.
    """
    mean, logvar = np.split(moments, 2, axis=-3)
    std = np.exp(0.5 * np.clip(logvar, -30, 20))
    return mean + std * rng.standard_normal(mean.shape, dtype=np.float32)


@dataclass(frozen=True)
class Latents:
    """Moments of N pictures under V views each, with their size conditioning; all in memory."""

    names: tuple[str, ...]
    moments: np.ndarray  # (N, V, 8, h, w) float32
    original_size: np.ndarray  # (N, 2) float32 (h, w)
    crop_coords_top_left: np.ndarray  # (N, V, 2) float32 (y, x)
    target_size: np.ndarray  # (2,) float32 (h, w)
    digest: str  # of the pictures' contents, views and VAE, in order

    def __len__(self):
        return len(self.names)


class LatentCache:
    """Arrays on disk by key. An entry gets its name only when it is whole; damaged ones count as missing."""

    def __init__(self, folder):
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_keep(self.folder, error) from error

    def load(self, key):
        """The array stored under `key`, or None."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        digest, body = data[:32], data[32:]
        if hashlib.sha256(body).digest() != digest:
            logger.warning("cached latents %s are damaged and will be computed again", path)
            return None
        return np.load(io.BytesIO(body), allow_pickle=False)

    def store(self, key, array):
        """Appears whole or not at all. OSError names the file and what to do."""
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        body = buffer.getvalue()
        path = self._path(key)
        try:
            with atomic_file(path) as file:
                file.write(hashlib.sha256(body).digest() + body)
        except OSError as error:
            raise _cannot_keep(path, error) from error

    def _path(self, key):
        return self.folder / f"{key}.moments"


def encode_pictures(
    pictures, encode, *, target_size, cache_dir, vae_fingerprint, views=images.CENTER, batch_size=1,
    progress=True,
):
    """Moments of all pictures, from the cache where it has them.

    Every file is read here and never again. Ranks that share `cache_dir` should let one of them run first;
    the others then find everything there.

    Args:
        pictures: list of images.Picture.
        encode: (batch_size, 3, H, W) float32 in [-1, 1] -> (batch_size, 8, h, w) moments. Always called with
            the same shape, and not at all if nothing is missing.
        target_size: (H, W) of the crops.
        cache_dir: where entries live, such as <save_path>/latents.
        vae_fingerprint: str that differs when the VAE's weights, precision or scaling of pixels do.
        views: the crops and flips of every picture, from images.make_views.
        batch_size: crops to encode at once. With 1 an entry that is lost comes back with the same bits.
    Returns: Latents.
    Raises ValueError (unreadable pictures, all named, before anything is encoded; NaN from the VAE),
    OSError (the cache cannot be written).
    """
    cache = LatentCache(cache_dir)
    hashes = images.hash_pictures(pictures)
    keys, crops, moments, missing = [], [], {}, {}
    for picture, file_hash in zip(pictures, hashes, strict=True):
        for view in views:
            crop = images.fit(picture.size, target_size, view)[1]
            key = _key(file_hash, crop, view.flip, target_size, vae_fingerprint)
            keys.append(key)
            crops.append(crop)
            if key in moments or key in missing:
                continue
            moments[key] = cache.load(key)
            if moments[key] is None:
                missing[key] = (picture, view, file_hash)
    logger.info("latents: %d in the cache, %d to encode", len(moments) - len(missing), len(missing))

    images.check_pictures(list(dict.fromkeys(picture for picture, _, _ in missing.values())))
    todo = list(missing)
    with tqdm(total=len(todo), desc="encoding pictures", unit="crop", disable=not (progress and todo)) as bar:
        for start in range(0, len(todo), batch_size):
            chunk = todo[start : start + batch_size]
            pixels = [_read_crop(*missing[key], target_size) for key in chunk]
            pixels += pixels[-1:] * (batch_size - len(chunk))  # one shape, one compilation
            encoded = np.asarray(encode(np.stack(pixels)), np.float32)
            assert encoded.ndim == 4 and len(encoded) == batch_size, encoded.shape
            for key, entry in zip(chunk, encoded, strict=False):
                if not np.isfinite(entry).all():
                    raise ValueError(
                        f"the VAE gave NaN or infinite latents for '{missing[key][0].path}'; "
                        "it must run in fp32 with whole weights."
                    )
                cache.store(key, entry)
                moments[key] = entry
                bar.update()

    per_picture = (len(pictures), len(views))
    stacked = np.stack([moments[key] for key in keys])
    return Latents(
        names=tuple(picture.path.name for picture in pictures),
        moments=stacked.reshape(*per_picture, *stacked.shape[1:]),
        original_size=np.array([picture.size for picture in pictures], np.float32),
        crop_coords_top_left=np.array(crops, np.float32).reshape(*per_picture, 2),
        target_size=np.array(target_size, np.float32),
        digest=hashlib.sha256("".join(keys).encode()).hexdigest(),
    )


def _cannot_keep(path, error):
    advice = f"cannot keep latents ({error.strerror}); free the disk or change --save_path"
    return OSError(error.errno, advice, str(path))


def _key(file_hash, crop, flip, target_size, vae_fingerprint):
    parts = [ENTRY_VERSION, file_hash, list(crop), bool(flip), list(target_size), vae_fingerprint]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _read_crop(picture, view, file_hash, target_size):
    image, now = images.read_picture(picture.path)
    if now != file_hash:
        raise ValueError(f"'{picture.path}' changed while it was read; start again when the folder is still.")
    return images.crop_picture(image, target_size, view).pixels
