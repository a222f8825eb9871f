"""The twelve things, as shapes in a box that reaches from -1 to 1 both ways (y points down).

This file knows shapes and poses. Colours come in as :class:`Paint`; where and how large a thing
stands comes in with the :class:`Pen`. Backgrounds, jitter and pixels are in
:mod:`alignment.toybox.draw`.

A painter takes a pen and a ``phase``: None is the resting pose; a number in [0, 1) is a place in
the thing's own small movement, which repeats with period one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from PIL import ImageDraw

RGB = tuple[int, int, int]
Point = tuple[float, float]
Affine = tuple[float, float, float, float, float, float]  # x' = a x + b y + c, y' = d x + e y + f

TURN = 2 * math.pi
_CIRCLE = tuple((math.cos(TURN * i / 28), math.sin(TURN * i / 28)) for i in range(28))


@dataclass(frozen=True, slots=True)
class Paint:
    """The shades one thing is painted with; ``body`` covers most of it."""

    body: RGB
    dark: RGB
    light: RGB
    edge: RGB
    mark: RGB
    ink: RGB
    shade: RGB
    thread: RGB


class Pen:
    """Draws shapes given in the unit box onto a canvas, each with a thin edge around it."""

    def __init__(self, canvas: ImageDraw.ImageDraw, paint: Paint, affine: Affine, edge_px: float) -> None:
        """``affine`` maps the unit box to canvas pixels; ``edge_px`` is the edge's width there."""
        self.canvas = canvas
        self.paint = paint
        self.affine = affine
        self.edge_px = edge_px
        a, b, _, d, e, _ = affine
        self.unit_px = math.sqrt(abs(a * e - b * d))

    def moved(self, dx: float, dy: float) -> Pen:
        """Return a pen whose box is shifted by (dx, dy) of this box."""
        return self._compose((1, 0, dx, 0, 1, dy))

    def scaled(self, sx: float, sy: float, x: float = 0, y: float = 0) -> Pen:
        """Return a pen whose box is stretched about (x, y)."""
        return self._compose((sx, 0, x - sx * x, 0, sy, y - sy * y))

    def turned(self, angle: float, x: float = 0, y: float = 0) -> Pen:
        """Return a pen whose box is turned clockwise by ``angle`` radians about (x, y)."""
        c, s = math.cos(angle), math.sin(angle)
        return self._compose((c, -s, x - c * x + s * y, s, c, y - s * x - c * y))

    def area(self, *outlines: Sequence[Point], fill: RGB | None = None, edge: bool = True) -> None:
        """Fill the union of closed outlines, in the body colour unless told otherwise."""
        placed = [self._place(outline) for outline in outlines]
        if edge:
            for points in placed:
                width = round(2 * self.edge_px)
                self.canvas.line([*points, points[0], points[1]], fill=self.paint.edge, width=width)
        for points in placed:
            self.canvas.polygon(points, fill=fill or self.paint.body)

    def disc(
        self, x: float, y: float, rx: float, ry: float = 0, *, fill: RGB | None = None, edge: bool = True
    ) -> None:
        """Fill an ellipse; ``ry`` of zero means a circle."""
        self.area(oval(x, y, rx, ry or rx), fill=fill, edge=edge)

    def stroke(
        self, points: Sequence[Point], width: float, *, fill: RGB | None = None, edge: bool = True
    ) -> None:
        """Draw a thick line with round joints. It is never thinner than one picture pixel."""
        placed = self._place(points)
        width_px = max(width * self.unit_px, 4.0)
        if edge:
            self._line(placed, width_px + 2 * self.edge_px, self.paint.edge)
        self._line(placed, width_px, fill or self.paint.body)

    def _line(self, placed: list[Point], width_px: float, fill: RGB) -> None:
        self.canvas.line(placed, fill=fill, width=round(width_px))
        if width_px > 5:
            r = width_px / 2 - 0.5
            for x, y in placed:
                self.canvas.ellipse((x - r, y - r, x + r, y + r), fill=fill)

    def _place(self, points: Sequence[Point]) -> list[Point]:
        a, b, c, d, e, f = self.affine
        return [(a * x + b * y + c, d * x + e * y + f) for x, y in points]

    def _compose(self, inner: Affine) -> Pen:
        a, b, c, d, e, f = self.affine
        g, h, i, j, k, m = inner
        affine = (
            a * g + b * j,
            a * h + b * k,
            a * i + b * m + c,
            d * g + e * j,
            d * h + e * k,
            d * i + e * m + f,
        )
        return Pen(self.canvas, self.paint, affine, self.edge_px)


@cache
def oval(x: float, y: float, rx: float, ry: float) -> tuple[Point, ...]:
    """Return the outline of an ellipse."""
    return tuple((x + rx * c, y + ry * s) for c, s in _CIRCLE)


@cache
def smooth(points: tuple[Point, ...], closed: bool = True, steps: int = 5) -> tuple[Point, ...]:
    """Return a Catmull-Rom curve through the points."""
    n = len(points)
    curve = []
    for i in range(n if closed else n - 1):
        quad = [points[k % n] if closed else points[min(max(k, 0), n - 1)] for k in range(i - 1, i + 3)]
        curve += [_catmull_rom(quad, step / steps) for step in range(steps)]
    return tuple(curve) if closed else (*curve, points[-1])


def _catmull_rom(quad: Sequence[Point], t: float) -> Point:
    weights = (
        (-t + 2 * t**2 - t**3) / 2,
        (2 - 5 * t**2 + 3 * t**3) / 2,
        (t + 4 * t**2 - 3 * t**3) / 2,
        (t**3 - t**2) / 2,
    )
    return (
        sum(w * p[0] for w, p in zip(weights, quad, strict=True)),
        sum(w * p[1] for w, p in zip(weights, quad, strict=True)),
    )


def _mirrored(right_half: Sequence[Point]) -> tuple[Point, ...]:
    return (*right_half, *((-x, y) for x, y in reversed(right_half) if x > 0))


def _wave(phase: float | None) -> float:
    return 0.0 if phase is None else math.sin(TURN * phase)


def _dip(phase: float | None) -> float:
    return 0.0 if phase is None else (1 - math.cos(TURN * phase)) / 2


_BELL = _mirrored(
    (
        (0, -0.84),
        (0.22, -0.8),
        (0.4, -0.66),
        (0.5, -0.42),
        (0.55, -0.1),
        (0.62, 0.2),
        (0.76, 0.42),
        (1, 0.56),
        (1, 0.74),
    )
)


def _bell(pen: Pen, phase: float | None) -> None:
    pen = pen.turned(0.38 * _wave(phase), 0, -0.75)
    clapper = pen.turned(0.3 * _wave(phase), 0, -0.3)
    clapper.disc(0, 0.78, 0.22, fill=pen.paint.dark)
    pen.disc(0, -0.84, 0.16, fill=pen.paint.dark)
    pen.area(_BELL)
    pen.area(((-0.72, 0.38), (0.72, 0.38), (0.86, 0.54), (-0.86, 0.54)), fill=pen.paint.dark, edge=False)
    pen.stroke(((-0.2, -0.5), (-0.28, 0.15)), 0.14, fill=pen.paint.light, edge=False)


_DRUM_SIDE = (
    (-0.96, -0.12),
    (0.96, -0.12),
    (0.96, 0.66),
    *((0.96 * math.cos(a), 0.66 + 0.32 * math.sin(a)) for a in [math.pi * i / 10 for i in range(11)]),
)


def _drum(pen: Pen, phase: float | None) -> None:
    paint = pen.paint
    pen.area(_DRUM_SIDE)
    zigzag = ((-0.94, 0.14), (-0.62, 0.8), (-0.3, 0.26), (0, 0.88), (0.3, 0.26), (0.62, 0.8), (0.94, 0.14))
    pen.stroke(zigzag, 0.11, fill=paint.mark, edge=False)
    pen.disc(0, -0.12, 0.96, 0.32, fill=paint.dark)
    pen.disc(0, -0.14, 0.8, 0.23, fill=paint.light, edge=False)
    beat = math.cos(TURN * phase) if phase is not None else 0.0
    for side, lift in ((-1, beat), (1, -beat)):
        stick = pen.turned(side * 0.5 * lift, side * 0.85, -0.6)
        stick.stroke(((side * 0.9, -0.94), (side * 0.3, -0.36)), 0.13)
        stick.disc(side * 0.27, -0.33, 0.15)


_BIRD_TAIL = ((-0.4, 0.3), (-1, 0.08), (-0.86, 0.36), (-1, 0.62), (-0.4, 0.66))
_BIRD_WING = smooth(((0.3, 0.32), (0.16, -0.3), (-0.3, -0.98), (-0.52, -0.5), (-0.56, 0), (-0.42, 0.36)))


def _bird(pen: Pen, phase: float | None) -> None:
    paint = pen.paint
    pen.stroke(((-0.1, 0.7), (-0.16, 0.97)), 0.08, fill=paint.thread, edge=False)
    pen.stroke(((0.14, 0.7), (0.1, 0.97)), 0.08, fill=paint.thread, edge=False)
    pen.area(((0.7, -0.34), (1, -0.04), (0.7, 0.16)), fill=paint.dark)
    pen.area(_BIRD_TAIL, oval(-0.02, 0.44, 0.62, 0.4), oval(0.52, -0.08, 0.36, 0.36))
    pen.disc(0.6, -0.16, 0.13, fill=paint.mark, edge=False)
    pen.disc(0.62, -0.16, 0.065, fill=paint.body, edge=False)
    wing = pen.scaled(1, 1 - 1.55 * _dip(phase), 0, 0.3)
    wing.area(_BIRD_WING, fill=paint.shade)
    wing.stroke(((0, 0.14), (-0.26, -0.6)), 0.1, fill=paint.light, edge=False)


def _bee(pen: Pen, phase: float | None) -> None:
    paint = pen.paint
    pen = pen.moved(0, 0.14 * _wave(phase))
    for x, lean in ((-0.3, -0.55), (0.16, 0.3)):
        wing = pen.turned(lean, x, 0.05).scaled(1, 1 - 0.65 * _dip(phase), x, 0.05)
        wing.disc(x, -0.46, 0.3, 0.54, fill=paint.light)
    pen.area(((-0.74, 0.26), (-1, 0.42), (-0.74, 0.58)), fill=paint.dark)
    for tip in (0.72, 0.98):
        pen.stroke(((0.62, 0.1), (tip, -0.4)), 0.07, fill=paint.thread, edge=False)
    pen.area(oval(-0.12, 0.42, 0.72, 0.54), oval(0.62, 0.32, 0.36, 0.36))
    for x in (-0.56, -0.18, 0.2):
        half = 0.1
        top = [
            (u, 0.42 - 0.54 * math.sqrt(max(0.0, 1 - ((u + 0.12) / 0.72) ** 2)))
            for u in (x - half, x, x + half)
        ]
        pen.area((*top, *((u, 0.84 - v) for u, v in reversed(top))), fill=paint.ink, edge=False)
    pen.disc(0.72, 0.24, 0.11, fill=paint.ink, edge=False)


def _clock(pen: Pen, phase: float | None) -> None:
    paint = pen.paint
    pen.disc(0, 0, 1, fill=paint.dark)
    pen.disc(0, 0, 0.82, edge=False)
    for i in range(12):
        s, c = math.sin(TURN * i / 12), math.cos(TURN * i / 12)
        inner = 0.54 if i % 3 == 0 else 0.66
        if i % 3 == 0 or pen.unit_px > 40:
            pen.stroke(((inner * s, inner * c), (0.74 * s, 0.74 * c)), 0.09, fill=paint.mark, edge=False)
    angle = -0.13 * TURN if phase is None else TURN * phase
    pen.stroke(((0, 0), (0.34, -0.2)), 0.17, fill=paint.mark, edge=False)
    pen.stroke(((0, 0), (0.64 * math.sin(angle), -0.64 * math.cos(angle))), 0.13, fill=paint.mark, edge=False)


_DOME = (
    (-0.56, 0.6),
    *((-0.56 * math.cos(a), 0.08 - 0.52 * math.sin(a)) for a in [math.pi * i / 12 for i in range(13)]),
    (0.56, 0.6),
)


def _siren(pen: Pen, phase: float | None) -> None:
    paint = pen.paint
    sweep = 0.0 if phase is None else TURN * phase
    for i in range(-2, 3):
        angle = i * math.pi / 4.3
        power = 1.0 if phase is None else (1 + math.cos(sweep - i * TURN / 5)) / 2
        if power > 0.15:
            s, c = math.sin(angle), math.cos(angle)
            outer = 0.68 + 0.34 * power
            pen.stroke(((0.78 * s, 0.1 - 0.72 * c), (outer * s, 0.06 - 1.02 * outer * c)), 0.13)
    pen.area(_DOME)
    x = -0.24 if phase is None else 0.36 * math.sin(sweep)
    lit = phase is None or math.cos(sweep) > -0.3
    pen.disc(x, 0.12, 0.15, 0.32, fill=paint.light if lit else paint.dark, edge=False)
    pen.area(((-0.74, 0.6), (0.74, 0.6), (0.92, 0.98), (-0.92, 0.98)), fill=paint.dark)
    pen.stroke(((-0.5, 0.79), (0.5, 0.79)), 0.1, fill=paint.body, edge=False)


def _heart_outline() -> tuple[Point, ...]:
    points = []
    for t in [TURN * i / 40 for i in range(40)]:
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((math.sin(t) ** 3, -(y + 2.55) / 14.5))
    return tuple(points)


_HEART = _heart_outline()
_HEART_SHINE = smooth(((-0.66, -0.2), (-0.64, -0.44), (-0.48, -0.62), (-0.3, -0.64)), closed=False)


def _heart(pen: Pen, phase: float | None) -> None:
    beat = 1 - 0.36 * _dip(phase)
    pen = pen.scaled(beat, beat)
    pen.area(_HEART)
    pen.stroke(_HEART_SHINE, 0.16, fill=pen.paint.light, edge=False)


_HULL = smooth(_mirrored(((0, -1), (0.26, -0.74), (0.42, -0.34), (0.42, 0.06), (0.28, 0.36))))
_NOSE = ((0, -0.98), (0.16, -0.84), (0.32, -0.62), (-0.32, -0.62), (-0.16, -0.84))
_FIN = smooth(((0.36, -0.16), (0.74, 0.1), (0.92, 0.66), (0.6, 0.46), (0.28, 0.34)))
_FLAME = ((-0.24, 0.3), (-0.4, 0.62), (-0.18, 0.7), (0, 1), (0.18, 0.7), (0.4, 0.62), (0.24, 0.3))


def _rocket(pen: Pen, phase: float | None) -> None:
    paint = pen.paint
    pen.scaled(1, 1 - 0.9 * _dip(phase), 0, 0.3).area(_FLAME, fill=paint.light)
    pen.area(_FIN, fill=paint.shade)
    pen.area([(-x, y) for x, y in _FIN], fill=paint.shade)
    pen.area(_HULL)
    pen.area(_NOSE, fill=paint.dark, edge=False)
    pen.disc(0, -0.26, 0.22, fill=paint.mark)
    pen.stroke(((0, 0.12), (0, 0.46)), 0.12, fill=paint.dark, edge=False)


_NECK = smooth(
    ((-0.84, -0.86), (-0.44, -0.62), (0.06, -0.58), (0.44, -0.86), (0.88, -0.74)), closed=False, steps=4
)


def _harp(pen: Pen, phase: float | None) -> None:
    paint = pen.paint
    pen = pen.turned(0.2 * _wave(phase), -0.55, 0.97)  # strings alone are too thin to be seen swinging
    bow = 0.22 * _wave(phase)
    for x, top, bottom in ((-0.5, -0.6, 0.6), (-0.17, -0.56, 0.34), (0.16, -0.6, 0.06), (0.48, -0.8, -0.2)):
        bend = bow * (1 if bottom - top > 0.5 else 0.7)
        shares = ((0, 0.0), (0.3, 0.8), (0.5, 1.0), (0.7, 0.8), (1, 0.0))
        string = [(x + bend * out, top + (bottom - top) * along) for along, out in shares]
        pen.stroke(string, 0.07, fill=paint.thread, edge=False)
    pillar = ((-0.84, -0.86), (-0.8, 0.78))
    board = ((-0.66, 0.8), (0.88, -0.52))
    bars = ((_NECK, 0.22), (pillar, 0.2), (board, 0.27))
    for edge in (True, False):
        for points, width in bars:
            pen.stroke(points, width, edge=edge)
    pen.area(((-0.96, 0.74), (-0.2, 0.74), (-0.1, 0.97), (-0.96, 0.97)), fill=paint.dark)
    pen.stroke(((-0.36, 0.54), (0.64, -0.31)), 0.08, fill=paint.light, edge=False)


_SMILE = smooth(((-0.56, 0.08), (-0.3, 0.26), (0, 0.32), (0.3, 0.26), (0.56, 0.08)), closed=False, steps=3)


def _frog(pen: Pen, phase: float | None) -> None:
    paint = pen.paint
    hop = 0.0 if phase is None else math.sin(math.pi * phase) ** 2
    squash = 0.0 if phase is None else 0.22 * max(0.0, math.cos(TURN * phase))
    pen = pen.moved(0, 0.1 - 0.46 * hop if phase is not None else 0).scaled(1, 1 - squash, 0, 1)
    for side in (-1, 1):
        pen.disc(side * 0.66, 0.84, 0.34, 0.15, fill=paint.dark)
    pen.area(
        oval(0, 0.52, 0.72, 0.44),
        oval(0, 0.02, 0.98, 0.46),
        oval(-0.52, -0.56, 0.4, 0.42),
        oval(0.52, -0.56, 0.4, 0.42),
    )
    pen.disc(0, 0.68, 0.36, 0.22, fill=paint.light, edge=False)
    pen.stroke(_SMILE, 0.11, fill=paint.mark, edge=False)
    for side in (-1, 1):
        if hop > 0.8:
            pen.stroke(((side * 0.76, -0.56), (side * 0.28, -0.56)), 0.12, fill=paint.mark, edge=False)
        else:
            pen.disc(side * 0.52, -0.6, 0.27, fill=(255, 255, 255), edge=False)
            pen.disc(side * 0.48, -0.58, 0.14, fill=(16, 16, 20), edge=False)


_PHONE_BASE = smooth(
    (
        (-0.4, -0.34),
        (0.4, -0.34),
        (0.62, 0.2),
        (0.94, 0.62),
        (0.96, 0.96),
        (0, 0.97),
        (-0.96, 0.96),
        (-0.94, 0.62),
        (-0.62, 0.2),
    ),
    steps=3,
)
_HANDSET = smooth(
    ((-0.8, -0.46), (-0.52, -0.78), (0, -0.86), (0.52, -0.78), (0.8, -0.46)), closed=False, steps=3
)


def _phone(pen: Pen, phase: float | None) -> None:
    paint = pen.paint
    pen = pen.moved(0.1 * _wave(phase), 0)
    for x in (-0.26, 0.26):
        pen.stroke(((x, -0.6), (x, -0.3)), 0.14, fill=paint.dark)
    pen.area(_PHONE_BASE)
    pen.disc(0, 0.34, 0.4, fill=paint.mark, edge=False)
    for i in range(8):
        angle = TURN * i / 8
        pen.disc(0.27 * math.cos(angle), 0.34 + 0.27 * math.sin(angle), 0.075, fill=paint.body, edge=False)
    pen.disc(0, 0.34, 0.13, fill=paint.body, edge=False)
    pen.stroke(((-0.7, 0.84), (0.7, 0.84)), 0.09, fill=paint.dark, edge=False)
    handset = pen.moved(0, -0.12 * abs(_wave(phase))).turned(0.32 * _wave(phase), 0, -0.6)
    ends = (oval(-0.78, -0.4, 0.2, 0.24), oval(0.78, -0.4, 0.2, 0.24))
    handset.area(*ends)
    handset.stroke(_HANDSET, 0.24)
    handset.area(*ends, edge=False)


_DROP = tuple((0.15 * c, 0.16 * s) for c, s in _CIRCLE[::2] if s > -0.2)


def _rain_cloud(pen: Pen, phase: float | None) -> None:
    fall = 0.5 if phase is None else phase
    for i, x in enumerate((-0.56, 0, 0.56)):
        part = (fall + (0.5 if i == 1 else 0)) % 1 if phase is not None else (0.4, 0.8, 0.4)[i]
        y = 0.2 + 0.78 * part
        pen.area([(x + u, y + v - 0.12) for u, v in _DROP] + [(x, y - 0.42)])
    cloud = pen.moved(0.08 * _wave(phase), 0)
    base = ((-0.6, -0.4), (0.6, -0.4), (0.6, 0.2), (-0.6, 0.2))
    cloud.area(
        base, oval(-0.58, -0.18, 0.4, 0.38), oval(-0.1, -0.5, 0.5, 0.48), oval(0.54, -0.22, 0.44, 0.42)
    )
    shine = smooth(((-0.42, -0.56), (-0.28, -0.76), (-0.04, -0.8)), closed=False, steps=3)
    cloud.stroke(shine, 0.12, fill=pen.paint.light, edge=False)
    cloud.stroke(((-0.6, 0.1), (0.56, 0.1)), 0.12, fill=pen.paint.dark, edge=False)


PAINTERS: dict[str, Callable[[Pen, float | None], None]] = {
    "bell": _bell,
    "drum": _drum,
    "bird": _bird,
    "bee": _bee,
    "clock": _clock,
    "siren": _siren,
    "heart": _heart,
    "rocket": _rocket,
    "harp": _harp,
    "frog": _frog,
    "phone": _phone,
    "rain cloud": _rain_cloud,
}
