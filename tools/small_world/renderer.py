"""Attributes in, picture out: anti-aliased toys on plain backgrounds, from signed distances.

All lengths are in pixels of a 64x64 picture; `render` scales them to any size. x points right, y down.
A `Scene` holds every number that the picture depends on, so that equal scenes give equal pictures.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np

SIDE = 64

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "ring", "moon")
COLOURS = {
    "red": (222, 38, 38),
    "orange": (246, 140, 28),
    "yellow": (252, 226, 50),
    "green": (48, 160, 60),
    "teal": (20, 168, 176),
    "blue": (28, 96, 226),
    "purple": (148, 46, 174),
    "pink": (244, 96, 178),
}
TEXTURES = ("plain", "striped", "dotted", "split")
BACKGROUNDS = {
    "white": (246, 246, 246),
    "grey": (150, 150, 150),
    "slate": (76, 84, 98),
    "sky": (158, 208, 248),
    "sand": (230, 206, 150),
    "mint": (172, 236, 196),
    "rose": (250, 198, 200),
    "lavender": (202, 180, 242),
}
SIZES = {"small": (13.0, 14.5), "large": (21.5, 23.5)}  # ranges of the radius
PAIR = (11.0, 12.5)  # range of the radius of each of two toys, of which captions say no size
STYLES = ("flat", "outline", "shadow", "outline and shadow")
STAR_POINTS = (4, 5, 6)  # all of them are just a "star" in captions
ATTRIBUTES = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "texture": TEXTURES,
    "size": tuple(SIZES),
    "background": tuple(BACKGROUNDS),
    "style": STYLES,
}

INK = np.array((14, 14, 20), np.float32)  # the contour's colour
PATTERN_TONE = 0.35  # a pattern is the object's colour times this
SHADOW_TONE = 0.6  # a shadow is the background's colour times this
STRIPE_PERIOD = 12.0
DOT_PERIOD, DOT_RADIUS = 12.0, 3.6
CONTOURS = (2.0, 5.0)  # range of the outline's width
HELD_OUT_CONTOURS = (3.0, 4.0)  # of these widths, which pretraining never draws
SHADOWS = (4.0, 6.0)  # range of the shadow's shift, to the right and down by as much
BORDER = 2.0  # pixels along the edge that stay plain background


@dataclass(frozen=True)
class Item:
    """One toy. The first four fields are what captions can say, the rest is what they cannot."""

    shape: str
    colour: str
    texture: str
    size: str
    x: float  # centre
    y: float
    radius: float
    rgb: tuple[float, float, float]  # 0..255, near COLOURS[colour]
    points: int = 5  # of a star
    tilt: float = 0.0  # of stripes, degrees from upright


@dataclass(frozen=True)
class Scene:
    """A picture: toys in one style on one background."""

    items: tuple[Item, ...]
    background: str
    style: str
    contour: float = 0.0  # width of the dark outline; 0: none
    shadow: float = 0.0  # shift of the drop shadow; 0: none

    def attributes(self) -> dict[str, str]:
        """The six named attributes (of the first toy)."""
        item = self.items[0]
        return {
            "shape": item.shape,
            "colour": item.colour,
            "texture": item.texture,
            "size": item.size,
            "background": self.background,
            "style": self.style,
        }


# ---- distances: x, y in units of the radius -> signed distance to the outline, negative inside ----


def _box(x, y, half_width, half_height):
    dx, dy = np.abs(x) - half_width, np.abs(y) - half_height
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)


def _segment(x, y, start, end):
    """Distance to the line from start to end, negative on the side of the origin."""
    ex, ey = end[0] - start[0], end[1] - start[1]
    wx, wy = x - start[0], y - start[1]
    t = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
    side = (ex * wy - ey * wx) * (ey * start[0] - ex * start[1])
    return np.hypot(wx - t * ex, wy - t * ey) * np.sign(-side)


def _triangle(x, y):
    y = y - 0.15
    edges = np.abs(x), y
    slope = _segment(*edges, (0, -1.15), (0.996, 0.575))
    base = _segment(*edges, (0.996, 0.575), (-0.996, 0.575))
    inside = (slope < 0) & (base < 0)
    return np.where(inside, -1, 1) * np.minimum(np.abs(slope), np.abs(base))


def _star(x, y, points):
    wedge = np.pi / points
    inner = {4: 0.40, 5: 0.47, 6: 0.54}.get(points, 0.58)
    turn = np.abs((np.arctan2(x, -y) + wedge) % (2 * wedge) - wedge)  # 0 along a ray, `wedge` along a notch
    r = np.hypot(x, y)
    return _segment(
        r * np.cos(turn), r * np.sin(turn), (1, 0), (inner * np.cos(wedge), inner * np.sin(wedge))
    )


def _heart(x, y):
    x, h = np.abs(x), 0.8  # a square on its tip, half a diagonal h, and a disc on each upper edge
    return np.minimum((x + np.abs(y) - h) / 2**0.5, np.hypot(x - h / 2, y + h / 2) - h / 2**0.5)


def _moon(x, y, bite=0.95, centre=0.78):
    """The unit disc without a disc of radius `bite` around (centre, 0)."""
    y = np.abs(y)
    tip_x = (1 - bite**2 + centre**2) / (2 * centre)
    tip_y = (1 - tip_x**2) ** 0.5
    beyond = (tip_y * x > tip_x * y) & (
        (tip_x - centre) * y < tip_y * (x - centre)
    )  # nearest to a tip, not an arc
    return np.where(
        beyond,
        np.hypot(x - tip_x, y - tip_y),
        np.maximum(np.hypot(x, y) - 1, bite - np.hypot(x - centre, y)),
    )


def distance(shape: str, x, y, *, points: int = 5) -> np.ndarray:
    """Signed distance to a shape of radius 1 around the origin; negative inside.

    Args:
        shape: one of SHAPES.
        x, y: coordinates in units of the radius, broadcastable against each other.
        points: how many a star has.
    """
    match shape:
        case "circle":
            return np.hypot(x, y) - 0.95
        case "square":
            return _box(x, y, 0.82, 0.82)
        case "triangle":
            return _triangle(x, y)
        case "star":
            return _star(x, y, points)
        case "cross":
            return np.minimum(_box(x, y, 1, 0.38), _box(x, y, 0.38, 1))
        case "heart":
            return _heart(x, y)
        case "ring":
            return np.abs(np.hypot(x, y) - 0.75) - 0.25
        case "moon":
            return _moon(x, y)
    raise ValueError(f"unknown shape '{shape}'; choose one of {', '.join(SHAPES)}.")


def pattern(texture: str, x, y, *, tilt: float = 0.0, scale: float = 1.0) -> np.ndarray | float:
    """Share of the dark tone, 0..1, at pixels (x, y) from the toy's centre.

    Args:
        texture: one of TEXTURES.
        x, y: pixels of the 64x64 picture, broadcastable against each other.
        tilt: of stripes, degrees.
        scale: drawn pixels per pixel, for the softness of edges.
    """
    match texture:
        case "plain":
            return 0.0
        case "striped":
            across = x * np.cos(np.radians(tilt)) + y * np.sin(np.radians(tilt))
            d = STRIPE_PERIOD / 4 - np.abs((across + STRIPE_PERIOD / 2) % STRIPE_PERIOD - STRIPE_PERIOD / 2)
        case "dotted":
            half = DOT_PERIOD / 2
            d = np.hypot((x + half) % DOT_PERIOD - half, (y + half) % DOT_PERIOD - half) - DOT_RADIUS
        case "split":
            d = -y
        case _:
            raise ValueError(f"unknown texture '{texture}'; choose one of {', '.join(TEXTURES)}.")
    return coverage(d, scale)


def coverage(d, scale: float = 1.0) -> np.ndarray:
    """Share of a pixel that is inside, from its signed distance in pixels: an edge one drawn pixel soft."""
    return np.clip(0.5 - d * scale, 0, 1)


def grid(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres (1, side) and (side, 1) float32, in pixels of the 64x64 picture."""
    centres = (np.arange(side, dtype=np.float32) + 0.5) * (SIDE / side)
    return centres[None, :], centres[:, None]


def render(scene: Scene, side: int = SIDE) -> np.ndarray:
    """Draw a scene: (side, side, 3) uint8."""
    scale = side / SIDE
    gx, gy = grid(side)
    background = np.array(BACKGROUNDS[scene.background], np.float32)
    picture = np.broadcast_to(background, (side, side, 3))
    for item in scene.items:
        x, y, r = gx - item.x, gy - item.y, item.radius

        if scene.shadow:
            behind = (
                distance(item.shape, (x - scene.shadow) / r, (y - scene.shadow) / r, points=item.points) * r
            )
            shade = coverage(behind - scene.contour, scale / 2)
            picture = _over(picture, background * SHADOW_TONE, shade)
        d = distance(item.shape, x / r, y / r, points=item.points) * r
        if scene.contour:
            picture = _over(picture, INK, coverage(d - scene.contour, scale))
        dark = pattern(item.texture, x, y, tilt=item.tilt, scale=scale)
        tone = np.asarray(1 - (1 - PATTERN_TONE) * dark, np.float32)[..., None]
        picture = _over(picture, np.array(item.rgb, np.float32) * tone, coverage(d, scale))
    return np.rint(picture).astype(np.uint8)


def _over(picture, colour, cover):
    return picture + np.asarray(cover, np.float32)[..., None] * (colour - picture)


# ---- drawing scenes ----


def shifted_hue(rgb, degrees: float) -> tuple[float, float, float]:
    """The same colour with its hue turned (HSV)."""
    h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in rgb))
    return tuple(255 * c for c in colorsys.hsv_to_rgb((h + degrees / 360) % 1, s, v))


def sample_scene(
    rng: np.random.Generator, fixed: Mapping[str, object] | None = None, *, count: int = 1
) -> Scene:
    """A random scene.

    Args:
        rng: the only source of chance.
        fixed: values that are not left to chance: any of ATTRIBUTES, or of Item's and Scene's other fields
            (`rgb`, `points`, `tilt`, `contour`, `shadow`, ...).
        count: toys in the picture, 1 or 2; two are alike, and small whatever `size` says.

    Raises:
        ValueError: an unknown name or value in `fixed`.
    """
    fixed = dict(fixed or {})
    for name, values in ATTRIBUTES.items():
        drawn = values[
            rng.integers(len(values))
        ]  # drawn even if fixed: the rest of the picture then stays the same
        if fixed.setdefault(name, drawn) not in values:
            raise ValueError(f"{name} '{fixed[name]}' is unknown; choose one of {', '.join(values)}.")
    jitter = rng.uniform(-1, 1, 3)
    spread = {
        "rgb": shifted_hue(COLOURS[fixed["colour"]], 4 * jitter[0]),
        "points": int(rng.choice(STAR_POINTS, p=(0.2, 0.6, 0.2))),
        "tilt": 20 * jitter[1],
        "radius": rng.uniform(*(SIZES[fixed["size"]] if count == 1 else PAIR)),
        "contour": rng.uniform(*CONTOURS) if "outline" in fixed["style"] else 0.0,
        "shadow": rng.uniform(*SHADOWS) if "shadow" in fixed["style"] else 0.0,
    }
    spread |= {name: fixed.pop(name) for name in spread if name in fixed}
    background, style = fixed.pop("background"), fixed.pop("style")
    contour, shadow = spread.pop("contour"), spread.pop("shadow")

    room = (SIDE - 2 * BORDER) / count - 1
    spread["radius"] = min(spread["radius"], (room - shadow) / 2 - contour)  # what a style adds has to fit in
    low = spread["radius"] + contour + BORDER
    high = SIDE - low - shadow
    if count == 1:
        places = [rng.uniform(low, high, 2)]
    else:  # towards opposite corners: left-high and right-low, or the other way round
        play = np.clip(room - 2 * (spread["radius"] + contour) - shadow, 0, 4)
        near, far = low + rng.uniform(0, play, 2), high - rng.uniform(0, play, 2)
        places = [near, far] if rng.random() < 0.5 else [(near[0], far[1]), (far[0], near[1])]
    items = (Item(**{"x": float(x), "y": float(y), **spread, **fixed}) for x, y in places)
    return Scene(tuple(items), background, style, contour, shadow)


# ---- what pretraining never draws ----


def is_held_out(attributes: Mapping[str, str]) -> bool:
    """Whether shape, colour and texture together are kept for concepts: an even eighth of all."""
    shape, colour, texture = (ATTRIBUTES[k].index(attributes[k]) for k in ("shape", "colour", "texture"))
    return (shape + 3 * colour + 2 * texture) % 8 == 5


def is_held_out_style(scene: Scene) -> bool:
    """Whether the outline's width is kept for styles to learn."""
    low, high = HELD_OUT_CONTOURS
    return low < scene.contour < high


def is_gate(attributes: Mapping[str, str]) -> bool:
    """Whether all six attributes together are kept for the gate's captions: about 1 in 17 combinations."""
    weights = {"shape": 1, "colour": 3, "texture": 5, "size": 7, "background": 11, "style": 13}
    return sum(w * ATTRIBUTES[k].index(attributes[k]) for k, w in weights.items()) % 17 == 0


def held_out_combinations() -> list[dict[str, str]]:
    """Every held-out shape, colour and texture, in a fixed order."""
    keys = ("shape", "colour", "texture")
    combinations = (
        dict(zip(keys, values, strict=True)) for values in product(*(ATTRIBUTES[k] for k in keys))
    )
    return [c for c in combinations if is_held_out(c)]


def pretraining_scene(seed: int, index: int, *, count: int = 1) -> Scene:
    """Scene `index` of the endless pretraining set `seed`, in whatever order scenes are asked for."""
    rng = np.random.default_rng((seed, index))
    while True:
        scene = sample_scene(rng, count=count)
        kept = (is_held_out(scene.attributes()), is_gate(scene.attributes()), is_held_out_style(scene))
        if not any(kept):
            return scene
