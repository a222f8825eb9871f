"""Hear which sound of Toybox some samples are, without any trained model.

Analysis by synthesis: every thing, pitch and tempo is rendered as a single event with several jitters,
and the events are laid over the log-mel picture of the samples, one after another, as long as each
explains more of the picture than silence does. The picture is as loud as the event for that, as its peak may
be a single spot. The event that leaves the least unexplained gives thing, pitch and tempo, the number laid
gives the count, its level gives the loudness.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from functools import cache
from math import gcd

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.signal import resample_poly

from alignment.toybox.sound import GAIN_DB, INSTRUMENTS, PITCH_FACTOR, TIMING, synthesise
from alignment.toybox.world import AUDIO_RATE_HZ, PITCHES, TEMPOS, THINGS, Sound
from decoders.mel import HOP, WINDOW, log_mel

Array = NDArray[np.float32]

FRAMES_PER_S = AUDIO_RATE_HZ / HOP
RANGE_NEPERS = 3.5  # how far below its peak a sound still counts; the quiet ones sink into noise there
SILENCE_PEAK = 2e-3
JITTERS_PER_EVENT = 8
LEAD_FRAMES = 3  # of silence kept before the onset of an event
SLACK = 0.12  # how far the gap between two events may be off
MOST_OFF_NEPERS = 1.5  # that the rest of a sound may lie below what its peak promises
CANDIDATES_PER_TEMPO = 5
BROAD = frozenset({"frog"})  # tuned by resonances; its partials belong to the pulses

SILENCE: dict[str, str | int] = {
    "thing": "silence",
    "pitch": "none",
    "count": 0,
    "tempo": "none",
    "loudness": "none",
}


@dataclass(frozen=True, eq=False, slots=True)
class _Event:
    """One rendered event: its words, its picture (frames, 64) in [0, 1] and its peak in nepers."""

    thing: str
    pitch: str
    tempo: str
    picture: Array
    peak: float


def judge_sound(samples: Array, rate: int) -> dict[str, str | int]:
    """Name the attributes of a sound.

    Args:
        samples: ``(T,)`` float in [-1, 1], at least 0.5 s.
        rate: of the samples, in hertz.

    Returns:
        ``thing``, ``pitch``, ``count``, ``tempo`` and ``loudness`` in the words of
        :mod:`alignment.toybox.world`; the count may be above three. Samples without a sound give
        thing ``"silence"`` and count 0.

    Raises:
        ValueError: the samples are not one-dimensional or shorter than 0.5 s.

    """
    at_rate = _at_world_rate(samples, rate)
    if np.abs(at_rate).max() < SILENCE_PEAK:
        return dict(SILENCE)
    nepers = _nepers(at_rate)
    peak = float(nepers.max())
    picture = _picture(nepers, peak)
    onset = _onset(picture)
    events = _nearest_events(picture, onset)
    fits = [_fit(event, nepers, picture, onset) for event in events]
    best = max(range(len(fits)), key=lambda index: fits[index].explained)
    event, fit = events[best], fits[best]
    gain_db = 20 / np.log(10) * (peak - event.peak + fit.level)
    loudness = min(GAIN_DB, key=lambda word: abs(GAIN_DB[word] - gain_db))
    return {
        "thing": event.thing,
        "pitch": event.pitch,
        "count": fit.count,
        "tempo": event.tempo,
        "loudness": loudness,
    }


def measure_sound(samples: Array, rate: int) -> dict[str, float]:
    """Measure what words leave open.

    Returns:
        ``hz``, the tuning of the judged thing's instrument (its fundamental, or the centre of its band),
        found by sliding the instrument's spectrum along a logarithmic frequency axis; ``loudness_db``,
        the root mean square while it sounds, relative to full scale. A silent sound gives ``nan`` and
        ``-inf``.

    Raises:
        ValueError: as :func:`judge_sound`.

    """
    at_rate = _at_world_rate(samples, rate)
    judged = judge_sound(samples, rate)
    if judged["thing"] == "silence":
        return {"hz": float("nan"), "loudness_db": float("-inf")}
    thing, pitch, tempo = str(judged["thing"]), str(judged["pitch"]), str(judged["tempo"])
    hz = _true_hz(thing, pitch)
    spectrum = _log_spectrum(at_rate, broad=thing in BROAD)
    shift = _octaves_between(_reference_spectrum(thing, pitch, tempo), spectrum)
    power = np.convolve(at_rate**2, np.full(HOP, 1 / HOP), mode="same")
    sounding = power > 1e-3 * power.max()
    return {
        "hz": float(hz * 2**shift),
        "loudness_db": float(10 * np.log10(np.mean(at_rate[sounding] ** 2))),
    }


def _at_world_rate(samples: Array, rate: int) -> Array:
    """Samples at 16 kHz, cut to whole frames."""
    if samples.ndim != 1 or len(samples) < 0.5 * rate:
        raise ValueError(
            f"the samples have shape {samples.shape} at {rate} Hz; expected one dimension of at least 0.5 s. "
            "Mix the channels down and pad with silence."
        )
    if rate != AUDIO_RATE_HZ:
        common = gcd(rate, AUDIO_RATE_HZ)
        samples = resample_poly(samples, AUDIO_RATE_HZ // common, rate // common)
    return samples[: len(samples) // HOP * HOP].astype(np.float32)


def _nepers(samples: Array) -> Array:
    """Log-mel frames (N, 64), softened a little."""
    magnitude = log_mel(torch.from_numpy(samples)).exp()
    smooth: Array = F.avg_pool2d(magnitude[None], 3, stride=1, padding=1)[0].log().numpy()
    return smooth


def _picture(nepers: Array, top: float) -> Array:
    """Frames (N, 64) between 0 and 1: one at ``top`` and above, zero ``RANGE_NEPERS`` below."""
    picture: Array = np.clip(1 + (nepers - top) / RANGE_NEPERS, 0, 1)
    return picture


def _onset(picture: Array) -> int:
    """First frame in which something sounds."""
    energy = (picture**2).sum(axis=1)
    return int(np.argmax(energy > 0.1 * energy.max()))


def _event_frames(tempo: str) -> int:
    """Frames of an event with its lead and a little of the silence that follows."""
    return LEAD_FRAMES + round((0.4 * TIMING[tempo].length_s + 0.6 * TIMING[tempo].gap_s) * FRAMES_PER_S)


@cache
def _events() -> tuple[_Event, ...]:
    """Render the bank: every thing, pitch and tempo, several times."""
    rng = random.Random(0)
    bank = []
    for thing, pitch, tempo in itertools.product(THINGS, PITCHES, TEMPOS):
        for _ in range(JITTERS_PER_EVENT):
            nepers = _nepers(synthesise(Sound(thing, pitch, 1, tempo, "loud"), rng))
            peak = float(nepers.max())
            picture = _picture(nepers, peak)
            first = _onset(picture) - LEAD_FRAMES
            bank.append(_Event(thing, pitch, tempo, picture[first : first + _event_frames(tempo)], peak))
    return tuple(bank)


@cache
def _beginnings() -> Array:
    """The first frames of every event of the bank, (events, frames * 64)."""
    frames = _event_frames("fast")
    return np.stack([event.picture[:frames].ravel() for event in _events()])


def _nearest_events(picture: Array, onset: int) -> list[_Event]:
    """The events of the bank whose beginning is most like what follows the onset, louder or not."""
    bank = _beginnings()
    frames = _event_frames("fast")
    padded = np.pad(picture, ((LEAD_FRAMES + 2, frames), (0, 0)))
    starts = [onset + shift for shift in range(5)]  # onset - LEAD_FRAMES - 2 .. + 2 in the picture
    heard = np.stack([padded[start : start + frames].ravel() for start in starts])
    cosine = bank @ heard.T / (np.linalg.norm(bank, axis=1)[:, None] * np.linalg.norm(heard, axis=1))
    ranked = [_events()[index] for index in np.argsort(-cosine.max(axis=1))]
    return [
        event
        for tempo in TEMPOS
        for event in itertools.islice((e for e in ranked if e.tempo == tempo), CANDIDATES_PER_TEMPO)
    ]


@dataclass(frozen=True, slots=True)
class _Fit:
    """How much of a picture's energy some events explain, how many there are and how far, in nepers,
    the picture lies above them on average.

    The energy is a sum of squares, or in the end a share of the picture's.
    """

    explained: float
    count: int
    level: float


def _fit(event: _Event, nepers: Array, picture: Array, onset: int) -> _Fit:
    """Lay an event over log-mel frames: once to find out how loud they are beside it, and once to compare."""
    off = _lay(event, picture, onset).level
    off = min(max(off, -MOST_OFF_NEPERS), MOST_OFF_NEPERS)
    as_loud = _picture(nepers, float(nepers.max()) + off)
    laid = _lay(event, as_loud, onset)
    return _Fit(laid.explained / float((as_loud**2).sum()), laid.count, off + laid.level)


def _lay(event: _Event, picture: Array, onset: int) -> _Fit:
    """Lay an event over a picture, again and again at its tempo."""
    frames = len(event.picture)
    padded = np.pad(picture, ((LEAD_FRAMES + 2, frames), (0, 0)))
    energy = (event.picture**2).sum()
    gap = TIMING[event.tempo].gap_s * FRAMES_PER_S
    slack = round(SLACK * gap)
    start, spread = onset + 2, 2
    loud_cells = event.picture > 0.25
    explained = 0.0
    levels: list[float] = []
    while start - spread <= len(picture) - gap / 2:
        gains = {
            at: float(2 * (event.picture * padded[at : at + frames]).sum() - energy)
            for at in range(start - spread, min(start + spread, len(picture)) + 1)
        }
        at = max(gains, key=lambda at: gains[at])
        if levels and gains[at] <= 0:
            break
        explained += gains[at]
        above = padded[at : at + frames] - event.picture
        levels.append(float(above[loud_cells].mean()) * RANGE_NEPERS)
        start, spread = round(at + gap), slack
    return _Fit(explained, len(levels), float(np.mean(levels)))


_GRID_PER_OCTAVE = 96
_GRID_HZ = 40.0 * 2 ** (np.arange(round(7.6 * _GRID_PER_OCTAVE)) / _GRID_PER_OCTAVE)


def _log_spectrum(samples: Array, broad: bool) -> Array:
    """Mean magnitude on a grid of 96 points per octave from 40 Hz, compressed, of zero mean and unit power.

    ``broad`` smooths over a third of an octave, so that only bands and resonances remain.
    """
    size = 4 * WINDOW
    frames = np.lib.stride_tricks.sliding_window_view(samples, size)[:: WINDOW // 2]
    magnitude = np.sqrt((np.abs(np.fft.rfft(frames * np.hanning(size))) ** 2).mean(axis=0))
    spectrum = np.interp(_GRID_HZ, np.arange(len(magnitude)) * AUDIO_RATE_HZ / size, magnitude) ** 0.5
    if broad:
        bell = np.hanning(_GRID_PER_OCTAVE * 2 // 3)
        spectrum = np.convolve(spectrum, bell / bell.sum(), mode="same")
    normal: Array = ((spectrum - spectrum.mean()) / spectrum.std()).astype(np.float32)
    return normal


@cache
def _reference_spectrum(thing: str, pitch: str, tempo: str) -> Array:
    """Spectrum of an instrument in tune, averaged over several performances."""
    instrument, _ = INSTRUMENTS[thing]
    silence = np.zeros(AUDIO_RATE_HZ, dtype=np.float32)
    spectra = []
    for seed in range(JITTERS_PER_EVENT):
        samples = silence.copy()
        noise = np.random.default_rng(seed)
        event = instrument(_true_hz(thing, pitch), TIMING[tempo].length_s, noise)
        samples[2000 : 2000 + len(event)] = event
        spectra.append(_log_spectrum(samples, broad=thing in BROAD))
    mean: Array = np.mean(spectra, axis=0, dtype=np.float32)
    return mean


def _true_hz(thing: str, pitch: str) -> float:
    return INSTRUMENTS[thing][1] * PITCH_FACTOR[pitch]


def _octaves_between(reference: Array, heard: Array) -> float:
    """How far ``heard`` lies above ``reference``, at most half an octave either way."""
    reach = _GRID_PER_OCTAVE // 2
    padded = np.pad(heard, reach)
    likeness = np.correlate(padded, reference, mode="valid")  # (2 reach + 1,)
    best = int(np.argmax(likeness[1:-1])) + 1
    before, at, after = likeness[best - 1 : best + 2]
    vertex = 0.5 * (before - after) / (before - 2 * at + after)
    return float((best - reach + vertex) / _GRID_PER_OCTAVE)
