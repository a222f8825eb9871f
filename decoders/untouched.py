"""Give an edit back the pixels of its original wherever it changed nothing.

A decoder draws a whole picture anew, so what nobody asked to change comes back a little off: grounds by a
shade, things softer and a pixel or two aside. Here the two pictures are compared, and where they agree the
original's own pixels are taken; on a new ground, inside the things that were drawn again
(:mod:`decoders.matting`). Nothing is known of words: a new subject on a new ground agrees with what was there
before in next to nothing, and is left alone.

Shape letters in this file:
    N pictures, or the frames of a video   H, W rows and columns   ... any number of dimensions
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from decoders.matting import on_new_ground
from decoders.tuning import keep_tuning
from encoders.media import Audio, Image, Medium, Video

Pixels = NDArray[np.uint8]

_CHANGED = 45.0
"""Of 255: a pixel that is so far off in any channel was changed."""
_BLURRED, _BEYOND = 60.0, 20.0
"""How far off a careless redrawing may be: with both blurred, and beyond the original's colours around."""
_NEW_GROUND = 0.5
"""Where so much changed along the edges of a picture, it has a new ground with the old things on it."""
_REACH = 1 / 32
"""How far aside things are redrawn, and edges are soft, as a share of the shorter side."""
_FAINT = 0.02
"""Where fewer of the pixels around were kept, what is new keeps its own shade."""


def with_kept(medium: Medium, original: Medium | None, *, copied: bool = False) -> Medium:
    """Return a medium with what is kept of an original of its kind, if there is one.

    Of pictures and videos that is pixels, see :func:`keep_untouched`; of sounds their tuning, see
    :func:`decoders.tuning.keep_tuning`. With ``copied`` it is everything.
    """
    if original is None:
        return medium
    if isinstance(medium, Audio):
        assert isinstance(original, Audio)
        return original if copied else keep_tuning(original, medium)
    assert not isinstance(original, Audio)
    if copied:
        return Video(pixels_of(original), medium.fps) if isinstance(medium, Video) else original
    if isinstance(medium, Image):
        return Image(keep_untouched(pixels_of(original), medium.pixels))
    assert isinstance(medium, Video)
    return Video(keep_untouched(pixels_of(original), medium.frames), medium.fps)


def values_of(medium: Medium) -> NDArray[np.generic]:
    """Return what a medium consists of: its pixels, or its samples."""
    return medium.samples if isinstance(medium, Audio) else pixels_of(medium)


def pixels_of(medium: Image | Video) -> Pixels:
    """Return the pixels ``(H, W, 3)`` of a picture, or ``(frames, H, W, 3)`` of a video."""
    return medium.pixels if isinstance(medium, Image) else medium.frames


def keep_untouched(original: Pixels, edited: Pixels) -> Pixels:
    """Return ``edited`` with the pixels of ``original`` wherever nothing changed.

    Args:
        original: ``(..., H, W, 3)`` RGB, a picture or the frames of a video.
        edited: of the same shape.

    Returns:
        A new array of that shape, with soft seams.

    Raises:
        ValueError: the shapes differ.

    """
    if original.shape != edited.shape:
        raise ValueError(
            f"The original has the shape {original.shape} and the edit {edited.shape}; expected one shape. "
            f"Resize the original first."
        )
    before, after = (
        torch.tensor(pixels, dtype=torch.float32).flatten(0, -4).movedim(-1, 1)  # (N, 3, H, W)
        for pixels in (original[None], edited[None])
    )
    reach = max(1, round(min(before.shape[-2:]) * _REACH))
    changed = (before - after).abs().amax(1, keepdim=True) >= _CHANGED  # (N, 1, H, W)
    if _along_edges(changed, reach) < _NEW_GROUND:
        # What came and what went away are whole things with soft rims: no speck inside is the original's.
        changed = ~_spread(~_spread(changed, 4 * reach), 3 * reach)
        after = _in_shade_of(before, after, ~changed, 3 * reach)
    else:
        alike = ~changed | _redrawn(before, after, reach)
        old, new = (pixels.movedim(1, -1).double().numpy() for pixels in (before, after))  # (N, H, W, 3)
        laid = on_new_ground(old, new, alike[:, 0].numpy(), reach)
        if laid is not None:
            return laid.round().astype(np.uint8).reshape(original.shape)
        changed = _mean_around((~alike).float(), reach) > 0.5  # no speck of a kept thing is the edit's
    share = _mean_around(changed.float(), reach // 2)
    made: Pixels = (before + share * (after - before)).round().movedim(1, -1).to(torch.uint8).numpy()
    return made.reshape(original.shape)


def _along_edges(changed: Tensor, width: int) -> float:
    """Return the share of changed pixels in a frame of that width around pictures ``(N, 1, H, W)``."""
    inside = changed[..., width:-width, width:-width]
    return float((changed.sum() - inside.sum()) / (changed.numel() - inside.numel()))


def _redrawn(before: Tensor, after: Tensor, reach: int) -> Tensor:
    """Say where ``after`` is a soft drawing of ``before``, a little aside.

    There, both are alike when blurred, and its colours are between those of ``before`` close by.
    """
    alike = _mean_around(before - after, reach).abs() < _BLURRED  # (N, 3, H, W)
    least, most = (sign * _most_around(sign * before, reach) for sign in (-1, 1))
    alike &= (after >= least - _BEYOND) & (after <= most + _BEYOND)
    return alike.all(1, keepdim=True)  # (N, 1, H, W)


def _in_shade_of(before: Tensor, after: Tensor, kept: Tensor, reach: int) -> Tensor:
    """Return ``after``, a little lighter or darker, as it has to be to meet what is kept without a seam."""
    weight = kept.float()  # (N, 1, H, W)
    off = (before - after) * weight  # (N, 3, H, W)
    for _ in range(2):
        off, weight = _mean_around(off, reach), _mean_around(weight, reach)
    return (after + off / (weight + _FAINT)).clamp(0, 255)


def _spread(marked: Tensor, reach: int) -> Tensor:
    """Say what is marked, or has something marked so near."""
    return _most_around(marked.float(), reach) > 0


def _most_around(values: Tensor, reach: int) -> Tensor:
    """Return the largest value in the square around each; along columns and rows in turn, for speed."""
    columns = F.max_pool2d(values, (2 * reach + 1, 1), 1, (reach, 0))
    return F.max_pool2d(columns, (1, 2 * reach + 1), 1, (0, reach))


def _mean_around(values: Tensor, reach: int) -> Tensor:
    columns = F.avg_pool2d(values, (2 * reach + 1, 1), 1, (reach, 0), count_include_pad=False)
    return F.avg_pool2d(columns, (1, 2 * reach + 1), 1, (0, reach), count_include_pad=False)
