"""Draw what :mod:`alignment.toybox.world` describes: pictures and clips with a little jitter.

:func:`draw_look` and :func:`draw_clip` are the world; :func:`paint_picture` is what stands under
both, and draws exactly what it is told, without chance. The shapes themselves are in
:mod:`alignment.toybox.things`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from alignment.toybox.things import PAINTERS, RGB, Affine, Paint, Pen
from alignment.toybox.world import IMAGE_SIDE_PX, PLACES, VIDEO_FRAMES, Clip, Look

Pixels = NDArray[np.uint8]

RADIUS_PX = {"small": 8.5, "medium": 12.0, "big": 15.8}
MIDDLE_PX = 32.0
PLACE_PX = {place: (17.0 + 15 * (i % 3), 17.0 + 15 * (i // 3)) for i, place in enumerate(PLACES)}
SEVERAL_PX = {2: ((17.0, 32.0), (47.0, 32.0)), 3: ((32.0, 17.0), (17.0, 47.0), (47.0, 47.0))}
BODY_RGB: dict[str, RGB] = {
    "red": (218, 34, 40),
    "orange": (250, 128, 16),
    "yellow": (252, 220, 36),
    "green": (44, 160, 62),
    "blue": (40, 98, 226),
    "purple": (146, 54, 178),
    "white": (248, 248, 248),
    "black": (26, 26, 30),
}
GROUND_RGB: dict[str, tuple[RGB, RGB]] = {  # at the top and at the bottom edge
    "white": ((252, 252, 252), (252, 252, 252)),
    "grey": ((152, 152, 152), (152, 152, 152)),
    "sky": ((146, 202, 244), (190, 226, 250)),
    "night": ((12, 16, 46), (12, 16, 46)),
}
PATH_PX = {"slow": 12.0, "fast": 26.0}
PERIOD_FRAMES = {"slow": 8, "fast": 4}
FIRST_PHASE = 1 / 8
"""Where a thing's own movement is when a clip begins. Half a second later, which is half a slow movement or
a whole fast one, a slow thing is posed differently: ImageBind sees two frames that far apart."""
HEADING = {"still": (0, 0), "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

_OVERSAMPLING = 4
_EDGE_PX = 0.75
_DARK_MARKS = frozenset({"yellow", "white", "orange"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Stance:
    """Where and how one thing stands: pixels, radians; ``aspect`` is width over height."""

    x_px: float
    y_px: float
    radius_px: float
    tilt: float = 0.0
    aspect: float = 1.0
    phase: float | None = None


def draw_look(look: Look, rng: random.Random) -> Pixels:
    """Draw a picture of ``look`` with jitter from ``rng``.

    Returns:
        ``(64, 64, 3)`` uint8 RGB. Centres are off by up to 1.2 px, radii by 4 %, shades and
        shapes a little. The things of one picture share their radius and shade.

    """
    body = _jittered(BODY_RGB[look.colour], rng)
    radius_px = RADIUS_PX[look.size] * rng.uniform(0.96, 1.04)
    aspect = rng.uniform(0.96, 1.04)
    centres = [PLACE_PX[look.place]] if look.place is not None else SEVERAL_PX[look.count]
    stances = [
        Stance(
            x_px=x + rng.uniform(-1.2, 1.2),
            y_px=y + rng.uniform(-1.2, 1.2),
            radius_px=radius_px,
            tilt=rng.uniform(-0.09, 0.09),
            aspect=aspect,
        )
        for x, y in centres
    ]
    return paint_picture(look.thing, look.colour, look.ground, stances, body=body, lift=rng.randint(-3, 3))


def draw_clip(clip: Clip, rng: random.Random) -> Pixels:
    """Draw a clip of ``clip`` with jitter from ``rng``.

    Returns:
        ``(8, 64, 64, 3)`` uint8 RGB, 8 frames a second. The thing crosses the middle at constant
        speed, 12 px of path when slow and 26 px when fast, while its own movement runs once or
        twice through, from near :data:`FIRST_PHASE`. A still thing stays within 2 px of the middle.

    """
    body = _jittered(BODY_RGB[clip.colour], rng)
    lift = rng.randint(-3, 3)
    radius_px = RADIUS_PX[clip.size] * rng.uniform(0.96, 1.04)
    tilt = rng.uniform(-0.09, 0.09)
    aspect = rng.uniform(0.96, 1.04)
    reach_px = 2.0 if clip.motion == "still" else 1.2
    x_px = MIDDLE_PX + rng.uniform(-reach_px, reach_px)
    y_px = MIDDLE_PX + rng.uniform(-reach_px, reach_px)
    start = FIRST_PHASE + rng.uniform(-0.05, 0.05)
    frames = []
    for i in range(VIDEO_FRAMES):
        dx_px, dy_px = offset_px(clip.motion, clip.tempo, i)
        stance = Stance(
            x_px=x_px + dx_px,
            y_px=y_px + dy_px,
            radius_px=radius_px,
            tilt=tilt,
            aspect=aspect,
            phase=(start + i / PERIOD_FRAMES[clip.tempo]) % 1.0,
        )
        frames.append(paint_picture(clip.thing, clip.colour, clip.ground, [stance], body=body, lift=lift))
    return np.stack(frames)


def offset_px(motion: str, tempo: str, frame: int) -> tuple[float, float]:
    """Return how far from the middle of its path a thing is in frame 0 to 7."""
    along = (frame / (VIDEO_FRAMES - 1) - 0.5) * PATH_PX[tempo]
    dx, dy = HEADING[motion]
    return dx * along, dy * along


def paint_picture(
    thing: str,
    colour: str,
    ground: str,
    stances: Sequence[Stance],
    *,
    body: RGB | None = None,
    lift: int = 0,
) -> Pixels:
    """Draw exactly this, without chance.

    Args:
        thing, colour, ground: words of the world; they are not checked for visibility.
        stances: one for each copy of the thing, drawn in this order.
        body: the shade of the colour; the standard one when None.
        lift: added to every channel of the ground.

    Returns:
        ``(64, 64, 3)`` uint8 RGB: drawn at four times the size, averaged over 4 x 4 boxes.

    """
    image = _ground(ground, lift).copy()
    canvas = ImageDraw.Draw(image)
    paint = _paint(colour, ground, body or BODY_RGB[colour])
    for stance in stances:
        PAINTERS[thing](Pen(canvas, paint, _affine(stance), _EDGE_PX * _OVERSAMPLING), stance.phase)
    return np.asarray(image.reduce(_OVERSAMPLING))


def _affine(stance: Stance) -> Affine:
    reach = (stance.radius_px - _EDGE_PX) * _OVERSAMPLING
    sx, sy = reach * math.sqrt(stance.aspect), reach / math.sqrt(stance.aspect)
    c, s = math.cos(stance.tilt), math.sin(stance.tilt)
    x, y = stance.x_px * _OVERSAMPLING, stance.y_px * _OVERSAMPLING
    return (c * sx, -s * sy, x, s * sx, c * sy, y)


@cache
def _ground(ground: str, lift: int) -> Image.Image:
    top, bottom = (np.array(rgb, dtype=np.float64) + lift for rgb in GROUND_RGB[ground])
    side = IMAGE_SIDE_PX * _OVERSAMPLING
    down = np.linspace(0, 1, side)[:, None, None]
    column = np.clip(np.rint(top + (bottom - top) * down), 0, 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(column, (side, side, 3))))


def _paint(colour: str, ground: str, body: RGB) -> Paint:
    if colour == "black":
        dark, light, edge, mark = (92, 92, 100), (150, 150, 158), (118, 118, 124), (236, 236, 240)
    elif colour == "white":
        dark, light, edge, mark = (168, 172, 182), (212, 216, 224), (92, 94, 104), (44, 46, 56)
    else:
        dark, light, edge = (
            _mix(body, (0, 0, 0), 0.36),
            _mix(body, (255, 255, 255), 0.5),
            _mix(body, (0, 0, 0), 0.6),
        )
        mark = _mix(body, (20, 16, 16), 0.86) if colour in _DARK_MARKS else (250, 250, 250)
    ink = (178, 178, 186) if colour == "black" else _mix(body, (20, 16, 16), 0.86)
    thread = _mix(body, (255, 255, 255), 0.3) if ground == "night" else body if colour == "black" else edge
    shade = _mix(body, dark, 0.6)
    return Paint(body=body, dark=dark, light=light, edge=edge, mark=mark, ink=ink, shade=shade, thread=thread)


def _mix(rgb: RGB, other: RGB, share: float) -> RGB:
    r, g, b = (round(a + (c - a) * share) for a, c in zip(rgb, other, strict=True))
    return (r, g, b)


def _jittered(rgb: RGB, rng: random.Random) -> RGB:
    gain = rng.uniform(0.95, 1.05)
    r, g, b = (min(255, max(0, round(value * gain + rng.uniform(-6, 6)))) for value in rgb)
    return (r, g, b)
