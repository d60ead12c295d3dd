"""Reads a picture's attributes back from its pixels, by drawing it again.

No learned network judges here. The border tells the background; what differs from it is a toy; every shape,
style and texture is drawn at the toy's place, moved until it fits best; its colour follows by least squares.
The drawing that leaves the smallest squared error is the reading, if it explains the picture at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image
from scipy import ndimage

from tools.small_world import renderer
from tools.small_world.renderer import BACKGROUNDS, COLOURS, INK, PATTERN_TONE, SHADOW_TONE, SHAPES, SIDE

FOREGROUND = 30.0  # distance from the background, 0..255 RGB, from which a pixel belongs to a toy
SMALLEST_TOY = 60  # pixels; less is a blot
COLOUR_TOLERANCE = 10.0  # CIEDE2000
BACKGROUND_TOLERANCE = 12.0
MIN_OVERLAP = 0.8  # of the drawn and the seen silhouette, intersection over union
MAX_ERROR = 0.2  # unexplained share of the squared contrast
SMALL_BELOW = 18.0  # radius between the two sizes
MARGIN = 4  # pixels around a toy that its fit looks at
BLUR = 0.8  # standard deviation of the blur before a fit, in pixels
STRIDE = 2  # what is so soft needs every second pixel only
EDGE = 1 / 3  # drawn edges are three pixels wide, about as soft


@dataclass(frozen=True)
class Reading:
    """What a picture shows; None where it shows nothing that this world has."""

    background: str | None
    background_rgb: tuple[float, ...]
    count: int = 0
    shape: str | None = None
    colour: str | None = None
    texture: str | None = None
    size: str | None = None
    style: str | None = None  # one of renderer.STYLES
    rgb: tuple[float, ...] | None = None
    radius: float = 0.0
    points: int = 0  # of a star
    contour: float = 0.0
    shadow: float = 0.0
    overlap: float = 0.0
    error: float = 1.0


# ---- colours ----


TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def lab(rgb) -> np.ndarray:
    """sRGB (..., 3) in 0..255 to CIE L*a*b* under D65."""
    c = np.asarray(rgb, np.float64) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    t = linear @ TO_XYZ.T / (0.95047, 1.0, 1.08883)
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def delta_e(lab1, lab2) -> np.ndarray:
    """Colour difference CIEDE2000 of (..., 3) and (..., 3) (Sharma, Wu, Dalal 2005)."""
    (l1, a1, b1), (l2, a2, b2) = (np.moveaxis(np.asarray(v, np.float64), -1, 0) for v in (lab1, lab2))
    c7 = ((np.hypot(a1, b1) + np.hypot(a2, b2)) / 2) ** 7
    stretch = 1.5 - 0.5 * np.sqrt(c7 / (c7 + 25.0**7))
    a1, a2 = a1 * stretch, a2 * stretch
    c1, c2 = np.hypot(a1, b1), np.hypot(a2, b2)
    h1, h2 = np.degrees(np.arctan2(b1, a1)) % 360, np.degrees(np.arctan2(b2, a2)) % 360
    grey = c1 * c2 == 0  # a grey has no hue
    dh = np.where(grey, 0, (h2 - h1 + 180) % 360 - 180)
    h = np.where(grey, h1 + h2, (h1 + dh / 2) % 360)
    dl, dc, dh = l2 - l1, c2 - c1, 2 * np.sqrt(c1 * c2) * np.sin(np.radians(dh / 2))
    lightness, c = (l1 + l2) / 2, (c1 + c2) / 2
    t = (
        1
        - 0.17 * np.cos(np.radians(h - 30))
        + 0.24 * np.cos(np.radians(2 * h))
        + 0.32 * np.cos(np.radians(3 * h + 6))
        - 0.20 * np.cos(np.radians(4 * h - 63))
    )
    sl = 1 + 0.015 * (lightness - 50) ** 2 / np.sqrt(20 + (lightness - 50) ** 2)
    sc, sh = 1 + 0.045 * c, 1 + 0.015 * c * t
    turn = -2 * np.sqrt(c**7 / (c**7 + 25.0**7)) * np.sin(np.radians(60 * np.exp(-(((h - 275) / 25) ** 2))))
    return np.sqrt((dl / sl) ** 2 + (dc / sc) ** 2 + (dh / sh) ** 2 + turn * dc / sc * dh / sh)


def nearest_name(rgb, palette: Mapping[str, Sequence[float]], *, tolerance: float) -> str | None:
    """The palette's nearest colour, or None if it is further away than `tolerance` (CIEDE2000)."""
    distances = delta_e(lab(rgb), lab(list(palette.values())))
    best = int(distances.argmin())
    return list(palette)[best] if distances[best] <= tolerance else None


# ---- fitting ----


@dataclass(frozen=True)
class _Pose:
    shape: str
    points: int
    x: float
    y: float
    radius: float
    contour: float
    shadow: float
    texture: str = "plain"
    tilt: float = 0.0
    across: float = 0.0  # by which the pattern is shifted: the renderer centres it, but it is no other pattern then
    down: float = 0.0


_QUARTER = renderer.STRIPE_PERIOD / 4
_PATTERNS = (  # texture, tilt, across, down
    ("plain", 0, 0, 0),
    *(("striped", tilt, across, 0) for tilt in (-13, 0, 13) for across in _QUARTER * np.arange(-1, 3)),
    *(("dotted", 0, _QUARTER * i, _QUARTER * j) for i in range(-1, 3) for j in range(-1, 3) if (i + j) % 2 == 0),
    ("split", 0, 0, 0),
)
_PATTERN_NUMBERS = {"striped": ("tilt", "across"), "dotted": ("across", "down")}  # that are fitted
_STYLES = ((0.0, 0.0), (2.5, 0.0), (4.5, 0.0), (0.0, 5.0), (2.5, 5.0), (4.5, 5.0))  # (contour, shadow)
_STEPS = {"tilt": 2.0}  # for slopes; 0.25 otherwise
_LIMITS = {
    "x": (0, SIDE),
    "y": (0, SIDE),
    "radius": (6.0, 30.0),
    "contour": (1.2, 7.0),
    "shadow": (3.5, 9.0),
    "tilt": (-30, 30),
    "across": (-9, 9),
    "down": (-9, 9),
}


@lru_cache
def _extent(shape: str, points: int) -> tuple[float, float, float, float]:
    """Left, right, top and bottom of a shape of radius 1."""
    axis = np.linspace(-1.5, 1.5, 601)
    y, x = np.nonzero(renderer.distance(shape, axis[None, :], axis[:, None], points=points) < 0)
    return axis[x.min()], axis[x.max()], axis[y.min()], axis[y.max()]


class _Patch:
    """The pixels around one toy, and how well a drawing explains them.

    The picture is blurred a little, and drawn with edges as soft, so that sharpness does not matter.
    """

    def __init__(self, picture: np.ndarray, background: np.ndarray, toy: np.ndarray, others: np.ndarray):
        rows, columns = np.nonzero(toy)
        self.box = columns.min(), columns.max() + 1, rows.min(), rows.max() + 1
        left, right = max(self.box[0] - MARGIN, 0), min(self.box[1] + MARGIN, SIDE)
        top, bottom = max(self.box[2] - MARGIN, 0), min(self.box[3] + MARGIN, SIDE)
        x, y = renderer.grid(SIDE)
        self.x, self.y = x[:, left:right:STRIDE], y[top:bottom:STRIDE]
        self.background = background
        self.mask = toy[top:bottom:STRIDE, left:right:STRIDE]
        alone = np.where(others[..., None], background, picture)
        soft = ndimage.gaussian_filter(alone, (BLUR, BLUR, 0))
        self.seen = soft[top:bottom:STRIDE, left:right:STRIDE] - background
        self.contrast = float((self.seen**2).sum())

    def poses(self) -> Iterator[_Pose]:
        """Every shape in every style, where it fills the toy's bounding box."""
        x0, x1, y0, y1 = (float(v) for v in self.box)
        variants = [(s, p) for s in SHAPES for p in (renderer.STAR_POINTS if s == "star" else (5,))]
        for shape, points in variants:
            left, right, top, bottom = _extent(shape, points)
            for contour, shadow in _STYLES:
                across = (x1 - x0 - 2 * contour - shadow) / (right - left)
                down = (y1 - y0 - 2 * contour - shadow) / (bottom - top)
                if min(across, down) < 6 or not 0.7 < across / down < 1.4:
                    continue
                radius = (across + down) / 2
                x = (x0 + x1 - shadow) / 2 - radius * (left + right) / 2
                y = (y0 + y1 - shadow) / 2 - radius * (top + bottom) / 2
                yield _Pose(shape, points, x, y, radius, contour, shadow)

    def distances(self, pose: _Pose):
        """Signed distances in pixels to the toy's outline and to its shadow's."""
        x, y, r = self.x - pose.x, self.y - pose.y, pose.radius
        d = renderer.distance(pose.shape, x / r, y / r, points=pose.points) * r
        if not pose.shadow:
            return d, None
        x, y = x - pose.shadow, y - pose.shadow
        return d, renderer.distance(pose.shape, x / r, y / r, points=pose.points) * r

    def overlap(self, remainder) -> float:
        """Intersection over union of the drawn and the seen silhouette."""
        seen, drawn = _foreground(self.seen), _foreground(self.seen - remainder)
        return float((drawn & seen).sum() / max((drawn | seen).sum(), 1))

    def rough_overlap(self, pose: _Pose) -> float:
        """The same before the colour is known."""
        d, behind = self.distances(pose)
        drawn = d < pose.contour
        drawn = drawn if behind is None else drawn | (behind < pose.contour)
        return float(np.count_nonzero(drawn & self.mask) / max(np.count_nonzero(drawn | self.mask), 1))

    def fits(self, pose: _Pose, patterns=None):
        """For each pattern (by default the pose's own) at this place: (remainder, rgb).

        The remainder (h, w, 3) is what the drawing leaves unexplained.
        """
        d, behind = self.distances(pose)
        cover = renderer.coverage(d, EDGE)
        body = cover if not pose.contour else renderer.coverage(d - pose.contour, EDGE)
        rest = self.seen + cover[..., None] * self.background
        if pose.contour:
            rest = rest - (body - cover)[..., None] * (INK - self.background)
        if pose.shadow:
            shade = renderer.coverage(behind - pose.contour, EDGE) * (1 - body)
            rest = rest + shade[..., None] * ((1 - SHADOW_TONE) * self.background)
        x, y = self.x - pose.x, self.y - pose.y
        for texture, tilt, across, down in patterns or ((pose.texture, pose.tilt, pose.across, pose.down),):
            dark = renderer.pattern(texture, x - across, y - down, tilt=tilt, scale=EDGE)
            weight = cover * (1 - (1 - PATTERN_TONE) * dark)
            rgb = np.tensordot(weight, rest, 2) / max(float((weight * weight).sum()), 1e-6)
            rgb = rgb.clip(0, 255)
            yield rest - weight[..., None] * rgb, rgb

    def error(self, remainder) -> float:
        """Unexplained share of the contrast to the background."""
        return float((remainder**2).sum()) / self.contrast

    def candidates(self) -> Iterator[tuple[float, _Pose]]:
        """In each style the best drawing of the three shapes whose silhouettes match."""
        poses = list(self.poses())
        for style in _STYLES:
            alike = [pose for pose in poses if (pose.contour, pose.shadow) == style]
            likely = sorted(alike, key=self.rough_overlap, reverse=True)[:3]
            rough = [self.refine(self.best_pattern(pose), steps=1) for pose in likely]
            if rough:
                yield self.refine(self.best_pattern(min(rough, key=_first)[1]), steps=3)

    def best_pattern(self, pose: _Pose) -> _Pose:
        errors = [self.error(remainder) for remainder, _ in self.fits(pose, _PATTERNS)]
        texture, tilt, across, down = _PATTERNS[int(np.argmin(errors))]
        return replace(pose, texture=texture, tilt=tilt, across=across, down=down)

    def refine(self, pose: _Pose, *, steps: int) -> tuple[float, _Pose]:
        """Gauss-Newton on place, radius and the numbers of style and pattern; the colour follows by itself.

        Returns the error, for ranking, and the better pose.
        """
        names = ["x", "y", "radius", *(n for n in ("contour", "shadow") if getattr(pose, n))]
        names += _PATTERN_NUMBERS.get(pose.texture, ())
        remainder, _ = next(self.fits(pose))
        for _ in range(steps):
            slopes = []
            for name in names:
                step = _STEPS.get(name, 0.25)
                moved = replace(pose, **{name: getattr(pose, name) + step})
                slopes.append((next(self.fits(moved))[0] - remainder).ravel() / step)
            slopes = np.stack(slopes)
            square = slopes @ slopes.T + 1e-3 * np.eye(len(names))
            change = np.linalg.solve(square, slopes @ -remainder.ravel())
            most = [8 * _STEPS.get(n, 0.25) for n in names]
            change = dict(zip(names, np.clip(change, np.negative(most), most), strict=True))
            values = {n: float(np.clip(getattr(pose, n) + c, *_LIMITS[n])) for n, c in change.items()}
            moved = replace(pose, **values)
            found, _ = next(self.fits(moved))
            if (found**2).sum() >= (remainder**2).sum():
                break
            pose, remainder = moved, found
        # More numbers always fit a little better.
        effort = 1.25 ** bool(pose.contour) * 1.25 ** bool(pose.shadow)
        return (self.error(remainder) + 0.005) * effort, pose


def _first(pair):
    return pair[0]


def _foreground(contrast):
    return (contrast**2).sum(-1) > FOREGROUND**2


def read(picture: np.ndarray) -> Reading:
    """Read the attributes of a picture of one toy, or of the largest of several (see `read_all`)."""
    return read_all(picture, most=1)[0]


def read_all(picture: np.ndarray, *, most: int = 4) -> list[Reading]:
    """Read each toy of a picture, the largest first; without any, there is one reading of the background.

    Args:
        picture: (side, side, 3) uint8, or float in 0..255; reduced to 64x64 first if it is larger.
        most: toys to read; `count` tells them all.
    """
    if picture.shape[0] != SIDE:
        image = Image.fromarray(np.asarray(picture, np.uint8))
        picture = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))
    picture = np.asarray(picture, np.float32)
    edge = np.ones((SIDE, SIDE), bool)
    edge[2:-2, 2:-2] = False
    background = np.median(picture[edge], axis=0)
    labels, _ = ndimage.label(_foreground(picture - background), np.ones((3, 3)))
    areas = np.bincount(labels.ravel())[1:]
    toys = [i + 1 for i in np.argsort(-areas) if areas[i] >= max(SMALLEST_TOY, 0.25 * areas.max())]
    empty = Reading(
        background=nearest_name(background, BACKGROUNDS, tolerance=BACKGROUND_TOLERANCE),
        background_rgb=tuple(background.tolist()),
        count=len(toys),
    )
    masks = ((labels == toy, (labels > 0) & (labels != toy)) for toy in toys[:most])
    return [_read_toy(_Patch(picture, background, *mask), empty) for mask in masks] or [empty]


def _read_toy(patch: _Patch, reading: Reading) -> Reading:
    candidates = list(patch.candidates())
    if not candidates:
        return reading
    _, pose = min(candidates, key=_first)
    remainder, rgb = next(patch.fits(pose))
    reading = replace(
        reading,
        radius=pose.radius,
        size="small" if pose.radius < SMALL_BELOW else "large",
        overlap=patch.overlap(remainder),
        error=patch.error(remainder),
    )
    if reading.overlap < MIN_OVERLAP or reading.error > MAX_ERROR:
        return reading
    style = " and ".join(name for name, value in (("outline", pose.contour), ("shadow", pose.shadow)) if value)
    return replace(
        reading,
        shape=pose.shape,
        colour=nearest_name(rgb, COLOURS, tolerance=COLOUR_TOLERANCE),
        texture=pose.texture,
        style=style or "flat",
        rgb=tuple(rgb.tolist()),
        points=pose.points if pose.shape == "star" else 0,
        contour=pose.contour,
        shadow=pose.shadow,
    )


def right(reading: Reading, attributes: Mapping[str, str]) -> dict[str, bool]:
    """Attribute by attribute: does the picture show what was asked for?"""
    return {name: getattr(reading, name) == value for name, value in attributes.items()}


def accuracy(pictures: Sequence[np.ndarray], attributes: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """Share of pictures that show each attribute as asked, and "all" of them together; the gate's figures."""
    rows = [right(read(p), a) for p, a in zip(pictures, attributes, strict=True)]
    shares = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return shares | {"all": float(np.mean([all(row.values()) for row in rows]))}
