"""Give an edited sound the tuning of its original, where it is the same instrument at the same pitch.

A decoder makes a whole sound anew, so what nobody asked to change comes back a little sharp or flat. Here
the spectra of both are laid over each other along a logarithmic axis of frequencies: where they agree best a
small step aside, the edit is played that much faster or slower. Nothing is known of words: a sound that
agrees nowhere nearby, because it is another instrument or an octave away, is left alone.

Shape letters in this file:
    T samples   N windows   K frequency bins   G points of the logarithmic axis
"""

import math

import numpy as np
from numpy.typing import NDArray

from encoders.media import Audio, resample

Samples = NDArray[np.float32]

WINDOW_S = 0.256
"""Long enough to tell neighbouring semitones of a low tone apart."""
LOWEST_HZ = 60.0
PER_SEMITONE = 8
"""Points of the axis."""
FURTHEST = 2.5
"""Semitones: what is further off was meant."""
LOOKED_AT = 14.0
"""Semitones to both sides within which there must be no better place: an octave and a little."""
ALIKE = 0.7
"""Correlation from which on two spectra are those of one instrument."""
PASSED = 0.92
"""Of the band, by a change of rate; see :func:`encoders.media.resample`."""
_STEP = 2.0 ** (1 / (12 * PER_SEMITONE))
_TINY = 1e-9


def keep_tuning(original: Audio, edited: Audio) -> Audio:
    """Return ``edited`` in the tuning of ``original``, as long as before; or itself, where both differ.

    At most :data:`FURTHEST` semitones are mended. All frequencies move by the same factor, and so does the
    pace.
    """
    semitones = semitones_off(original, edited)
    if semitones is None or abs(semitones) < 1 / PER_SEMITONE:
        return edited
    slower = round(edited.rate * 2 ** (semitones / 12))  # a sharp sound is stretched
    samples = resample(edited.samples, edited.rate, slower)[: len(edited.samples)]
    missing = len(edited.samples) - len(samples)
    # Where nothing is left, at the end and above all tones, there was a faint noise. Without it, who listens
    # closely hears that something is missing: so the end goes on backwards, and the top stays what it was.
    samples = np.pad(samples, (0, missing), "reflect")
    samples += _above(edited, PASSED * min(1.0, edited.rate / slower))
    return Audio(np.clip(samples, -1, 1), edited.rate)


def _above(sound: Audio, share: float) -> Samples:
    """Return what of a sound lies above that share of its band."""
    spectrum = np.fft.rfft(sound.samples)
    spectrum[: round(share * len(spectrum))] = 0
    return np.fft.irfft(spectrum, len(sound.samples)).astype(np.float32)


def semitones_off(original: Audio, edited: Audio) -> float | None:
    """Return by how many semitones ``edited`` is sharp; None where it is no retuned ``original``."""
    highest = 0.45 * min(original.rate, edited.rate)
    before, after = (_spectrum(sound, highest) for sound in (original, edited))  # (G,)
    if not before.any() or not after.any():
        return None
    most = round(LOOKED_AT * PER_SEMITONE)
    shifts = range(-most, most + 1)
    alike = np.array([_correlation(before, after, shift) for shift in shifts])
    best = int(alike.argmax())
    if alike[best] < ALIKE or abs(shifts[best]) > FURTHEST * PER_SEMITONE:
        return None
    return float((shifts[best] + _vertex(alike, best)) / PER_SEMITONE)


def _spectrum(sound: Audio, highest_hz: float) -> NDArray[np.float64]:
    """Return the mean magnitudes of a sound on the logarithmic axis, ``(G,)``, above what lies under all."""
    size = round(WINDOW_S * sound.rate)
    samples = np.pad(sound.samples, (0, max(0, size - len(sound.samples))))
    windows = np.lib.stride_tricks.sliding_window_view(samples, size)[:: max(1, size // 2)]  # (N, size)
    padded = 1 << (4 * size - 1).bit_length()
    magnitudes = np.abs(np.fft.rfft(windows * np.hanning(size), padded)).mean(0)  # (K,)
    count = math.floor(math.log(highest_hz / LOWEST_HZ) / math.log(_STEP))
    axis_hz = LOWEST_HZ * _STEP ** np.arange(count)  # (G,)
    levels = np.sqrt(np.interp(axis_hz, np.fft.rfftfreq(padded, 1 / sound.rate), magnitudes))
    spread: NDArray[np.float64] = levels - np.median(levels)
    return np.maximum(spread, 0.0)


def _correlation(before: NDArray[np.float64], after: NDArray[np.float64], shift: int) -> float:
    """Compare what overlaps when ``after`` is moved down by ``shift`` points."""
    one = before[max(0, -shift) : len(before) - max(0, shift)]
    other = after[max(0, shift) : len(after) - max(0, -shift)]
    return float(one @ other / (np.linalg.norm(before) * np.linalg.norm(after) + _TINY))


def _vertex(values: NDArray[np.float64], at: int) -> float:
    """Return how far from ``at`` the top of the parabola through it and its neighbours lies."""
    if not 0 < at < len(values) - 1:
        return 0.0
    low, middle, high = values[at - 1 : at + 2]
    bend = low - 2 * middle + high
    return float((low - high) / (2 * bend)) if bend < 0 else 0.0
