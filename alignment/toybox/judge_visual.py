"""Say what a picture or a clip shows, by asking which drawing of the world comes nearest.

The judge knows pixels and :mod:`alignment.toybox.draw`; it knows no model. A drawing ``T``
standing on a plain ground lowers the squared error of ``D``, the picture minus its ground, by
``2 <D, T> - <T, T>``. That number is called *gain* here; one correlation gives it for every
position at once. Every (thing, colour, size) is matched so at half size, the best few are drawn
again at full size in slightly different poses, and the highest gain wins. Whether anything is
seen at all is asked of the angle between ``D`` and ``T`` instead, which blur hardly changes.

Shape letters in this file:
    F frames   N drawings   P phases   H, W rows and columns   K columns of a real transform
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import scipy.fft
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from alignment.toybox.draw import (
    BODY_RGB,
    MIDDLE_PX,
    PERIOD_FRAMES,
    PLACE_PX,
    RADIUS_PX,
    SEVERAL_PX,
    Pixels,
    Stance,
    offset_px,
    paint_picture,
)
from alignment.toybox.world import (
    COLOURS,
    GROUNDS,
    IMAGE_SIDE_PX,
    INVISIBLE,
    MOTIONS,
    SIZES,
    TEMPOS,
    THINGS,
    VIDEO_FRAMES,
)

Floats = NDArray[np.float32]
Spectra = NDArray[np.complex64]
Name = tuple[str, str, str]  # thing, colour, size
Centre = tuple[float, float]  # x, y in picture pixels
Verdict = dict[str, str | int | None]

_RING_PX = 3
_SLACK_PX = 4  # how far from its proper place a thing may stand and still be counted as there
_HALF_PAD, _FULL_PAD = 48, 96
_PHASES = 8
_COARSE_PHASES = (0, 2, 4, 6)
_COARSE_FRAMES = (0, 3, 5)
_LOOK_CANDIDATES, _CLIP_CANDIDATES = 4, 3
_PATCH_PX = 44
_NUDGE_PX = 2
_SLANTS = (-0.06, 0.06)  # radians; things are drawn up to 0.09 off the upright
_SCALES = (0.975, 1.025)  # things are drawn up to 4 % off their size
_POSES = tuple((tilt, scale) for tilt in (0.0, *_SLANTS) for scale in _SCALES)
_SOFTNESS_PX = 0.5  # full-size drawings are blurred so, half way to what decoders return
_LEAST_LIKENESS = 0.65  # cosine between foreground and drawing, for it to be seen at all
_EXTRA_THING = 0.55  # share of its own energy which a further thing must explain to be counted
_BLURS_PX = (0.0, 0.5, 0.65, 0.8, 1.0)
_FOREGROUND_STEP = 30.0  # distance in RGB from the ground at which a pixel belongs to a thing

_LAYOUTS: tuple[tuple[int, str | None, tuple[Centre, ...]], ...] = (
    *((1, place, (centre,)) for place, centre in PLACE_PX.items()),
    *((count, None, centres) for count, centres in SEVERAL_PX.items()),
)


@dataclass(frozen=True, slots=True)
class Figures:
    """What of a picture can be measured beyond the words of the world.

    Attributes:
        body_rgb: shade of the thing's main colour, each channel 0 to 255.
        hue_degrees: hue of that shade, 0 to 360; of little meaning for white and black.
        centre_px: (x, y) of the middle of the nearest drawing, the mean of several.
        mass_px: centre of mass (x, y) of everything that is not ground.
        radius_px: half the extent of the nearest drawing.

    """

    body_rgb: tuple[float, float, float]
    hue_degrees: float
    centre_px: Centre
    mass_px: Centre
    radius_px: float


def judge_look(pixels: Pixels) -> Verdict:
    """Name what a picture shows.

    Args:
        pixels: ``(64, 64, 3)`` uint8 RGB.

    Returns:
        thing, colour, size, count, place and ground in the words of the world; ``place`` is None
        unless count is 1. Where no drawing explains the picture, everything but ground is None.
        A further thing outside the nearest drawing adds one to ``count``.

    Raises:
        ValueError: wrong shape or dtype.

    """
    _check(pixels, (IMAGE_SIDE_PX, IMAGE_SIDE_PX, 3))
    ground, difference = _split_ground(pixels[None])
    verdict: Verdict = dict.fromkeys(("thing", "colour", "size", "count", "place")) | {"ground": ground}
    best = _nearest(difference, ground)
    if best is None:
        return verdict
    bank = _coarse_bank(ground)
    rest = (difference[0] - _drawn(best.name, ground, best.stances))[None]
    further = _gains(_halved(rest), bank.spectra, bank.energies)[0].max(axis=(1, 2)) / bank.energies
    count = len(best.stances) + int(further.max() > _EXTRA_THING)
    verdict.update(zip(("thing", "colour", "size"), best.name, strict=True))
    verdict["count"] = count
    verdict["place"] = _nearest_place(best.stances[0]) if count == 1 else None
    return verdict


def judge_clip(frames: Pixels) -> Verdict:
    """Name what a clip shows.

    Args:
        frames: ``(8, 64, 64, 3)`` uint8 RGB at 8 frames a second.

    Returns:
        thing, colour, size, ground, motion and tempo in the words of the world. Where no drawing
        explains the clip, everything but ground is None.

    Raises:
        ValueError: wrong shape or dtype.

    """
    _check(frames, (VIDEO_FRAMES, IMAGE_SIDE_PX, IMAGE_SIDE_PX, 3))
    ground, difference = _split_ground(frames)
    verdict: Verdict = dict.fromkeys(("thing", "colour", "size", "motion", "tempo")) | {"ground": ground}
    energy = _foreground_energy(difference)
    bank = _coarse_bank(ground, _COARSE_PHASES)
    picked = _halved(difference[list(_COARSE_FRAMES)])
    best_gains = _gains(picked, bank.spectra, bank.energies).max(axis=(2, 3))  # (F, N)
    by_name = best_gains.reshape(len(picked), len(_COARSE_PHASES), -1).max(axis=1).sum(axis=0)
    spectrum = scipy.fft.rfft2(difference, (_FULL_PAD, _FULL_PAD))  # (F, 3, H, K)
    likely = [bank.names[index] for index in np.argsort(-by_name)[:_CLIP_CANDIDATES]]
    best = max((_follow(spectrum, name, ground) for name in likely), key=lambda track: track.gain)
    # A slanted harp string and a swinging one differ less than half a pixel, so the pose matters.
    for poses in ([(tilt, 1.0) for tilt in _SLANTS], [(0.0, scale) for scale in _SCALES]):
        posed = [_follow(spectrum, best.name, ground, best.tilt + tilt, scale) for tilt, scale in poses]
        best = max(best, *posed, key=lambda track: track.gain)
    if best.overlap >= _LEAST_LIKENESS * math.sqrt(max(energy, 1.0) * best.energy):
        seen = (*best.name, best.motion, best.tempo)
        verdict.update(zip(("thing", "colour", "size", "motion", "tempo"), seen, strict=True))
    return verdict


def measure_look(pixels: Pixels) -> Figures | None:
    """Measure shade and position of what a picture shows.

    Args:
        pixels: ``(64, 64, 3)`` uint8 RGB.

    Returns:
        The figures, or None where :func:`judge_look` sees no thing.

    Raises:
        ValueError: wrong shape or dtype.

    """
    _check(pixels, (IMAGE_SIDE_PX, IMAGE_SIDE_PX, 3))
    ground, difference = _split_ground(pixels[None])
    best = _nearest(difference, ground)
    if best is None:
        return None
    stances = _refined(difference[0], best, ground)
    r, g, b = _body_shade(pixels, best.name, ground, stances)
    mass_y, mass_x = np.nonzero(np.linalg.norm(difference[0], axis=0) > _FOREGROUND_STEP)
    return Figures(
        body_rgb=(r, g, b),
        hue_degrees=360 * colorsys.rgb_to_hsv(r / 255, g / 255, b / 255)[0],
        centre_px=(_mean(stance.x_px for stance in stances), _mean(stance.y_px for stance in stances)),
        mass_px=(float(mass_x.mean()) + 0.5, float(mass_y.mean()) + 0.5),
        radius_px=_mean(stance.radius_px for stance in stances),
    )


def _nearest(difference: Floats, ground: str) -> _Fit | None:
    """Return the fit of the highest gain, or None where it does not look like the picture."""
    bank = _coarse_bank(ground)
    gains = _gains(_halved(difference), bank.spectra, bank.energies)[0]  # (N, H, W)
    fits = [_fit(difference[0], name, ground, centres) for name, centres in _candidates(gains, bank.names)]
    best = max(fits, key=lambda fit: fit.gain)
    likeness = best.overlap / math.sqrt(max(_foreground_energy(difference), 1.0) * best.energy)
    return best if likeness >= _LEAST_LIKENESS else None


def _check(pixels: Pixels, shape: tuple[int, ...]) -> None:
    if pixels.shape != shape or pixels.dtype != np.uint8:
        raise ValueError(
            f"pixels have shape {pixels.shape} and dtype {pixels.dtype}; expected {shape} uint8. "
            "Resize, or pick the frames, before judging."
        )


def _split_ground(frames: Pixels) -> tuple[str, Floats]:
    """Name the ground by the outermost pixels; return it with frames minus ground (F, 3, H, W)."""
    planes = frames.astype(np.float32).transpose(0, 3, 1, 2)  # (F, 3, H, W)
    ring = np.ones((IMAGE_SIDE_PX, IMAGE_SIDE_PX), dtype=bool)
    ring[_RING_PX:-_RING_PX, _RING_PX:-_RING_PX] = False
    best = ("", math.inf)
    for ground in GROUNDS:
        away = np.abs(planes - _empty(ground))[:, :, ring].sum(axis=1)  # (F, ring pixels)
        best = min(best, (ground, float(np.minimum(away, 120.0).mean())), key=lambda pair: pair[1])
    ground = best[0]
    difference = planes - _empty(ground)
    lift = np.median(difference[:, :, ring], axis=(0, 2))[:, None, None]  # (3, 1, 1)
    return ground, difference - np.clip(lift, -12, 12).astype(np.float32)


def _foreground_energy(difference: Floats) -> float:
    """Return the squared sum over the pixels that noise alone does not lift off the ground."""
    squares = (difference**2).sum(axis=1)  # (F, H, W)
    return float(squares[squares > _FOREGROUND_STEP**2].sum())


@cache
def _empty(ground: str) -> Floats:
    return paint_picture("bell", "red", ground, []).astype(np.float32).transpose(2, 0, 1)  # (3, H, W)


def _drawn(name: Name, ground: str, stances: Sequence[Stance]) -> Floats:
    """Return a drawing minus its ground, (3, H, W)."""
    pixels = paint_picture(name[0], name[1], ground, stances)
    return pixels.astype(np.float32).transpose(2, 0, 1) - _empty(ground)


def _centred(name: Name, phase: float | None = None, tilt: float = 0.0, scale: float = 1.0) -> Stance:
    radius_px = RADIUS_PX[name[2]] * scale
    return Stance(x_px=MIDDLE_PX, y_px=MIDDLE_PX, radius_px=radius_px, tilt=tilt, phase=phase)


@dataclass(frozen=True, slots=True, eq=False)
class _Bank:
    """Half-size drawings of everything on one ground, ready to be correlated with a picture."""

    names: tuple[Name, ...]  # of one phase; the drawings of the other phases follow in this order
    spectra: Spectra  # (N, 3, H, K)
    energies: Floats  # (N,)


@cache
def _coarse_bank(ground: str, phases: tuple[int, ...] | None = None) -> _Bank:
    names = tuple(
        (thing, colour, size)
        for colour in COLOURS
        if (colour, ground) not in INVISIBLE
        for thing in THINGS
        for size in SIZES
    )
    steps = [None] if phases is None else [phase / _PHASES for phase in phases]
    drawings = [_halved(_drawn(name, ground, [_centred(name, step)])) for step in steps for name in names]
    return _Bank(names, *_spectra_at_origin(np.stack(drawings), _HALF_PAD))


def _spectra_at_origin(drawings: Floats, pad: int) -> tuple[Spectra, Floats]:
    """Return conjugated spectra of centred drawings (N, 3, H, W), moved to (0, 0), and energies."""
    side = drawings.shape[-1]
    padded = np.zeros((*drawings.shape[:2], pad, pad), dtype=np.float32)
    padded[..., :side, :side] = drawings
    padded = np.roll(padded, (-side // 2, -side // 2), axis=(2, 3))
    spectra: Spectra = np.conj(scipy.fft.rfft2(padded))
    return spectra, np.einsum("nchw,nchw->n", drawings, drawings)


def _softened(planes: Floats) -> Floats:
    softened: Floats = gaussian_filter(planes, (0, 0, _SOFTNESS_PX, _SOFTNESS_PX), truncate=3.0)
    return softened


def _halved(planes: Floats) -> Floats:
    *lead, height, width = planes.shape
    halved: Floats = planes.reshape(*lead, height // 2, 2, width // 2, 2).mean(axis=(-3, -1))
    return halved


def _gains(planes: Floats, spectra: Spectra, energies: Floats) -> Floats:
    """Return the gain of every drawing at every position of every half-size frame, (F, N, H, W)."""
    side = planes.shape[-1]
    seen = scipy.fft.rfft2(planes, (_HALF_PAD, _HALF_PAD))  # (F, 3, H, K)
    gains = []
    for frame in seen:
        products = spectra[:, 0] * frame[0]  # (N, H, K)
        for channel in (1, 2):
            products += spectra[:, channel] * frame[channel]
        overlaps = scipy.fft.irfft2(products, (_HALF_PAD, _HALF_PAD))[:, :side, :side]
        gains.append(2 * overlaps - energies[:, None, None])
    return np.stack(gains)


def _candidates(gains: Floats, names: Sequence[Name]) -> list[tuple[Name, tuple[Centre, ...]]]:
    """Return the most likely names with the centres where their copies seem to stand."""
    windows = {}
    for x, y in PLACE_PX.values():
        left, top = math.ceil((x - _SLACK_PX) / 2), math.ceil((y - _SLACK_PX) / 2)
        window = gains[:, top : top + _SLACK_PX, left : left + _SLACK_PX].reshape(len(names), -1)
        peaks = window.argmax(axis=1)
        tops = np.take_along_axis(window, peaks[:, None], axis=1)[:, 0]
        windows[x, y] = (tops, 2.0 * (left + peaks % _SLACK_PX), 2.0 * (top + peaks // _SLACK_PX))
    totals = np.stack([sum(windows[centre][0] for centre in centres) for _, _, centres in _LAYOUTS])
    likely = np.argsort(-totals, axis=None)[:_LOOK_CANDIDATES]
    found = []
    for layout, drawing in zip(*np.unravel_index(likely, totals.shape), strict=True):
        places = [windows[centre] for centre in _LAYOUTS[layout][2]]
        found.append((names[drawing], tuple((float(x[drawing]), float(y[drawing])) for _, x, y in places)))
    return found


@dataclass(frozen=True, slots=True)
class _Fit:
    name: Name
    gain: float
    energy: float
    stances: tuple[Stance, ...]

    @property
    def overlap(self) -> float:
        return (self.gain + self.energy) / 2


def _fit(difference: Floats, name: Name, ground: str, centres: Sequence[Centre]) -> _Fit:
    """Fit full-size copies around the centres, each within 2 px and in its own pose."""
    margin = (IMAGE_SIDE_PX - _PATCH_PX) // 2
    inner = slice(margin, margin + _PATCH_PX)
    poses = [_drawn(name, ground, [_centred(name, tilt=tilt, scale=scale)]) for tilt, scale in _POSES]
    drawings = _softened(np.stack(poses))[:, :, inner, inner].reshape(len(_POSES), -1)  # (N, pixels)
    energies = (drawings**2).sum(axis=1)
    reach = _PATCH_PX // 2 + _NUDGE_PX
    padded = np.pad(difference, ((0, 0), (reach, reach), (reach, reach)))
    total, energy, stances = 0.0, 0.0, []
    for x, y in centres:
        area = padded[:, int(y) : int(y) + 2 * reach, int(x) : int(x) + 2 * reach]
        patches = sliding_window_view(area, (_PATCH_PX, _PATCH_PX), axis=(1, 2))
        shifts = patches.shape[1]
        patches = patches.transpose(1, 2, 0, 3, 4).reshape(shifts**2, -1)  # (shifts, pixels)
        gains = 2 * patches @ drawings.T - energies  # (shifts, N)
        shift, pose = divmod(int(gains.argmax()), len(_POSES))
        tilt, scale = _POSES[pose]
        total += float(gains[shift, pose])
        energy += float(energies[pose])
        stances.append(
            Stance(
                x_px=x - _NUDGE_PX + shift % shifts,
                y_px=y - _NUDGE_PX + shift // shifts,
                radius_px=RADIUS_PX[name[2]] * scale,
                tilt=tilt,
            )
        )
    return _Fit(name, total, energy, tuple(stances))


def _refined(difference: Floats, fit: _Fit, ground: str) -> list[Stance]:
    """Move, scale and tilt each copy in ever smaller steps while the squared error falls."""
    stances = list(fit.stances)

    def error(trial: list[Stance]) -> float:
        drawing = _softened(_drawn(fit.name, ground, trial)[None])[0]
        return float(((difference - drawing) ** 2).sum())

    least = error(stances)
    for step in (0.5, 0.25, 0.12):
        for i in range(len(stances)):
            for field, unit in (("x_px", 1.0), ("y_px", 1.0), ("radius_px", 0.6), ("tilt", 0.08)):
                for sign in (-1, 1):
                    moved = replace(stances[i], **{field: getattr(stances[i], field) + sign * step * unit})
                    trial = [*stances[:i], moved, *stances[i + 1 :]]
                    if (found := error(trial)) < least:
                        least, stances = found, trial
                        break
    return stances


def _body_shade(pixels: Pixels, name: Name, ground: str, stances: Sequence[Stance]) -> NDArray[np.float64]:
    """Return the shade which, drawn and blurred like the picture, gives the picture's pixels."""

    def painted(shade: NDArray[np.float64]) -> NDArray[np.float64]:
        r, g, b = (int(value) for value in np.clip(np.rint(shade), 0, 255))
        return paint_picture(name[0], name[1], ground, stances, body=(r, g, b)).astype(np.float64)

    standard = np.array(BODY_RGB[name[1]], dtype=np.float64)
    share = (painted(standard / 2 + 100) - painted(standard / 2)).mean(axis=2)  # of body, (H, W)
    core = share >= 0.92 * share.max()
    seen: NDArray[np.float64] = np.median(pixels[core], axis=0)  # (3,)
    drawing = painted(seen)
    softened = [gaussian_filter(drawing, (sigma, sigma, 0)) if sigma else drawing for sigma in _BLURS_PX]
    blur = _BLURS_PX[int(np.argmin([((soft - pixels) ** 2).sum() for soft in softened]))]
    if not blur:
        return seen
    shade: NDArray[np.float64] = seen
    for _ in range(3):
        shade = np.clip(
            shade + seen - np.median(gaussian_filter(painted(shade), (blur, blur, 0))[core], axis=0), 0, 255
        )
    return shade


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _nearest_place(stance: Stance) -> str:
    return min(PLACE_PX, key=lambda place: math.dist(PLACE_PX[place], (stance.x_px, stance.y_px)))


@dataclass(frozen=True, slots=True)
class _Track:
    name: Name
    tilt: float
    motion: str
    tempo: str
    gain: float
    energy: float

    @property
    def overlap(self) -> float:
        return (self.gain + self.energy) / 2


def _follow(spectrum: Spectra, name: Name, ground: str, tilt: float = 0.0, scale: float = 1.0) -> _Track:
    """Return the motion and tempo that gain most over all frames of a spectrum (F, 3, H, K)."""
    spectra, energies = _phase_spectra(name, ground, tilt, scale)
    products = np.einsum("fchk,pchk->fphk", spectrum, spectra)
    overlaps = scipy.fft.irfft2(products, (_FULL_PAD, _FULL_PAD))[..., :IMAGE_SIDE_PX, :IMAGE_SIDE_PX]
    gains = 2 * overlaps - energies[:, None, None]  # (F, P, H, W)
    tracks = []
    for tempo in TEMPOS:
        step = _PHASES // PERIOD_FRAMES[tempo]
        for motion in MOTIONS:
            total = np.zeros((_PHASES, 2 * _SLACK_PX + 1, 2 * _SLACK_PX + 1), dtype=np.float32)
            for i in range(VIDEO_FRAMES):
                dx_px, dy_px = offset_px(motion, tempo, i)
                left, top = (round(MIDDLE_PX + d_px) - _SLACK_PX for d_px in (dx_px, dy_px))
                near = gains[i, :, top : top + 2 * _SLACK_PX + 1, left : left + 2 * _SLACK_PX + 1]
                total += np.roll(near, -step * i, axis=0)
            start = int(total.max(axis=(1, 2)).argmax())
            phases = [(start + step * i) % _PHASES for i in range(VIDEO_FRAMES)]
            energy = float(energies[phases].sum())
            tracks.append(_Track(name, tilt, motion, tempo, float(total.max()), energy))
    return max(tracks, key=lambda track: track.gain)


def _phase_spectra(name: Name, ground: str, tilt: float, scale: float) -> tuple[Spectra, Floats]:
    stances = [_centred(name, phase / _PHASES, tilt, scale) for phase in range(_PHASES)]
    drawings = np.stack([_drawn(name, ground, [stance]) for stance in stances])
    return _spectra_at_origin(_softened(drawings), _FULL_PAD)
