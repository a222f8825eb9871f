"""Lay the things of a picture over what a decoder drew of them on another ground.

The rim of a thing is part thing and part ground, so on another ground a rim cut out of the old picture is a
halo, or, where the old ground was as dark as a thing's outline, missing. What was drawn anew has a rim that
suits its ground, but is soft inside and a pixel or two aside. So it is moved to where the thing was, keeps
its rim, and gets the thing's own pixels inside. The old picture may be soft, too: what is half ground there,
and nothing like what was drawn, does not count as inside. All this takes grounds from which things can be
told: it is done where both are plain or shaded evenly, and nowhere else.

Shape letters in this file:
    N pictures, or the frames of a video   H, W rows and columns
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

_GRAIN = 24.0
"""Of 255: how far a pixel may be from an even ground and still belong to it."""
_FRAME_SHARE = 0.5
"""How much of a picture's edges its ground must be seen at."""
_COVERED, _WITHIN, _ALIKE = 0.95, 0.9, 0.6
"""How much of a thing, of what was drawn there, and of the colours inside must have come again."""
_SOLID = 0.5
"""How opaque a pixel is that belongs to the inside even if what was drawn is not like it."""
_AROUND = np.stack([np.zeros((3, 3)), np.ones((3, 3)), np.zeros((3, 3))])
"""The pixels around one, in its own frame."""
_BESIDE = _AROUND * ndimage.generate_binary_structure(3, 1)
"""Those that share a side with it: lines keep apart what is on either side, aslant too."""


def on_new_ground(before: Floats, after: Floats, alike: Mask, reach: int) -> Floats | None:
    """Return ``after`` with those things of ``before`` that it shows again, as they were.

    Args:
        before: ``(N, H, W, 3)`` from 0 to 255; its things are kept.
        after: of the same shape; its grounds are kept, rims, and all things that are not those of ``before``.
        alike: ``(N, H, W)``, where ``after`` could be a careless drawing of ``before``.
        reach: how many pixels aside things may have been drawn.

    Returns:
        ``(N, H, W, 3)``, or None where a ground is not even or no thing comes again.

    """
    old, new = even_grounds(before, reach), even_grounds(after, reach)
    if old is None or new is None:
        return None
    drawn = _off(after, new) > _GRAIN  # (N, H, W)
    things = _drawn_again(_cut_out(before, after, old, new), drawn, alike, reach)
    things &= _wider(drawn, reach)  # no stain of the old ground
    if not things.any():
        return None
    rim = max(1, reach // 2)
    laid = _moved(after, new, before, things, reach)
    smeared = _wider(things, 4 * reach) & ~_wider(things, 2 * rim)
    laid += _soft(smeared, rim)[..., None] * (new - laid)
    inside = ndimage.binary_erosion(things, _BESIDE, iterations=rim, border_value=1)
    inside &= alike | (_opacity(before, old, reach) >= _SOLID)
    return np.where(inside[..., None], before, laid).clip(0, 255)


def even_grounds(pictures: Floats, width: int) -> Floats | None:
    """Return the plain or evenly shaded grounds that the edges of pictures show.

    Args:
        pictures: ``(N, H, W, 3)``.
        width: of the frame along the edges that is looked at.

    Returns:
        ``(N, H, W, 3)``, colours that change evenly along rows and columns; None if most of the frame of any
        picture is something else.

    """
    rows, columns = np.indices(pictures.shape[1:3])
    along = np.stack([np.ones_like(rows), rows, columns], axis=-1).astype(np.float64)  # (H, W, 3)
    frame = np.ones(rows.shape, np.bool_)
    frame[width:-width, width:-width] = False
    grounds = []
    for pixels in pictures:
        seen = frame & (_off(pixels, np.median(pixels[frame], axis=0)) < 3 * _GRAIN)
        for _ in range(3):
            if seen.sum() < _FRAME_SHARE * frame.sum():
                return None
            slopes, *_ = np.linalg.lstsq(along[seen], pixels[seen], rcond=None)
            ground = along @ slopes
            seen = frame & (_off(pixels, ground) < _GRAIN)
        grounds.append(ground)
    return np.stack(grounds)


def _cut_out(before: Floats, after: Floats, old: Floats, new: Floats) -> Mask:
    """Say which pixels are things: not ground that reaches the edges, nor ground seen through a gap."""
    areas, number = ndimage.label(_off(before, old) <= _GRAIN, _BESIDE)
    edges = np.concatenate([areas[:, side].ravel() for side in (0, -1)] + [areas[:, :, [0, -1]].ravel()])
    is_ground = np.isin(np.arange(number + 1), edges)
    for area in np.flatnonzero(~is_ground):
        gap = areas == area
        shown = after[gap].mean(axis=0)
        is_ground[area] = _off(shown, new[gap].mean(axis=0)) < _off(shown, before[gap].mean(axis=0))
    is_ground[0] = False
    cut_out: Mask = ~is_ground[areas]
    return cut_out


def _drawn_again(things: Mask, drawn: Mask, alike: Mask, reach: int) -> Mask:
    """Leave out things whose outlines or colours did not come again; what is close together is one thing."""
    groups, number = ndimage.label(_wider(things, reach), np.ones((3, 3, 3)))
    inside = ndimage.binary_erosion(things, _AROUND, iterations=reach)
    kept = np.zeros_like(things)
    for group in range(1, number + 1):
        thing = things & (groups == group)
        there = drawn & _wider(thing, 3 * reach)
        if not there.any():
            continue
        covered, within = _wider(drawn, reach)[thing].mean(), _wider(thing, reach)[there].mean()
        colours = alike[thing & inside if (thing & inside).any() else thing].mean()
        if covered >= _COVERED and within >= _WITHIN and colours >= _ALIKE:
            kept |= thing
    return kept


def _moved(after: Floats, ground: Floats, before: Floats, things: Mask, reach: int) -> Floats:
    """Return ``after`` with each drawing of a thing, frame by frame, moved to where it is most like it."""
    groups, number = ndimage.label(_wider(things, reach), _AROUND)
    drawn = after - ground
    moved = drawn.copy()
    for group in range(1, number + 1):
        frame = int(np.flatnonzero((groups == group).any(axis=(1, 2)))[0])
        thing = (things[frame] & (groups[frame] == group))[None]
        offset = _offset(drawn[frame], before[frame] - ground[frame], thing[0], reach)
        around = _wider(thing, 3 * reach)[0, ..., None]
        moved[frame] = np.where(around, _aside(drawn[frame], offset), moved[frame])
    return ground + moved


def _offset(drawn: Floats, wanted: Floats, thing: Mask, reach: int) -> tuple[int, int]:
    """Return how far down and right a drawing is to be moved, at most ``reach``: first in long strides."""
    best, stride, strides = (0, 0), max(1, reach // 2), 2
    while stride:
        steps = [stride * step for step in range(-strides, strides + 1)]
        near = [(best[0] + down, best[1] + right) for down in steps for right in steps]
        within = [offset for offset in near if max(map(abs, offset)) <= reach]
        within.sort(key=lambda offset: math.hypot(*offset))  # the nearest wins a tie
        best = min(within, key=lambda offset: float(np.abs(_aside(drawn, offset) - wanted)[thing].sum()))
        stride, strides = stride // 2, 1
    return best


def _aside(pixels: Floats, offset: tuple[int, int]) -> Floats:
    """Return ``(H, W, 3)`` moved down and right; what comes in is as the edge is."""
    rows, columns = (np.arange(size) - by for size, by in zip(pixels.shape, offset, strict=False))
    height, width, _ = pixels.shape
    aside: Floats = pixels[rows.clip(0, height - 1)[:, None], columns.clip(0, width - 1)]
    return aside


def _opacity(pixels: Floats, ground: Floats, reach: int) -> Floats:
    """Return how far ``(N, H, W)`` pixels are from their ground, as a share of the farthest around."""
    far = _off(pixels, ground)
    opacity: Floats = far / np.maximum(ndimage.maximum_filter(far, (1, 4 * reach + 1, 4 * reach + 1)), 1)
    return opacity


def _off(pixels: Floats, others: Floats) -> Floats:
    """Return how far apart colours ``(..., 3)`` are in the worst channel."""
    apart: Floats = np.abs(pixels - others).max(axis=-1)
    return apart


def _soft(marked: Mask, reach: int) -> Floats:
    softened: Floats = ndimage.uniform_filter(marked.astype(np.float64), (1, 2 * reach + 1, 2 * reach + 1))
    return softened


def _wider(marked: Mask, by: int) -> Mask:
    wider: Mask = ndimage.binary_dilation(marked, _AROUND, iterations=by)
    return wider
