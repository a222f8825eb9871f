"""How a sound of Toybox sounds: every thing has an instrument, played once per event.

An instrument is a function ``(hz, length_s, noise) -> samples``: ``hz`` scales its whole spectrum,
``length_s`` its whole course in time, so pitch and tempo are heard in a single event already.
What the words of a :class:`~alignment.toybox.world.Sound` mean in hertz, seconds and decibels
is in the tables of this file; the words themselves are in :mod:`alignment.toybox.world`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alignment.toybox.world import AUDIO_RATE_HZ, AUDIO_SAMPLES, Sound

Samples = NDArray[np.float32]
Instrument = Callable[[float, float, np.random.Generator], Samples]

LOUD_PEAK = 0.6  # leaves room for the crests that resynthesis from a spectrogram adds
GAIN_DB = {"loud": 0.0, "quiet": -22.0}
PITCH_FACTOR = {"high": 2.0, "middle": 1.0, "low": 0.5}
NOISE_FLOOR = 2e-4  # standard deviation; 70 dB below a loud peak

FIRST_ONSET_S = 0.1
ONSET_JITTER_S = 0.03
TIMING_JITTER = 0.03
PITCH_JITTER_SEMITONES = 1.0
GAIN_JITTER_DB = 1.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Seconds from onset to end of one event, and from one onset to the next."""

    length_s: float
    gap_s: float


TIMING = {"slow": Timing(length_s=0.55, gap_s=0.75), "fast": Timing(length_s=0.28, gap_s=0.38)}


def synthesise(sound: Sound, rng: random.Random) -> Samples:
    """Play a sound, with jitter in tuning, timing and level drawn from ``rng``.

    Returns:
        ``(40960,)`` float32 in [-1, 1], 16 kHz mono. The same state of ``rng`` gives the same samples.

    """
    instrument, middle_hz = INSTRUMENTS[sound.thing]
    timing = TIMING[sound.tempo]
    hz = middle_hz * PITCH_FACTOR[sound.pitch] * 2 ** (_jitter(rng, PITCH_JITTER_SEMITONES) / 12)
    pace = 1 + _jitter(rng, TIMING_JITTER)
    onset_s = FIRST_ONSET_S + _jitter(rng, ONSET_JITTER_S)
    gain_db = GAIN_DB[sound.loudness] + _jitter(rng, GAIN_JITTER_DB)
    noise = np.random.default_rng(rng.getrandbits(64))

    samples = np.zeros(AUDIO_SAMPLES, dtype=np.float32)
    for index in range(sound.count):
        late_s = _jitter(rng, 0.02 * timing.gap_s) if index else 0.0
        event = instrument(hz, timing.length_s * pace, noise)
        event *= np.float32(1 + _jitter(rng, 0.08)) / np.abs(event).max()
        start = round((onset_s + index * timing.gap_s * pace + late_s) * AUDIO_RATE_HZ)
        samples[start : start + len(event)] += event
    samples *= LOUD_PEAK * 10 ** (gain_db / 20) / np.abs(samples).max()
    samples += NOISE_FLOOR * noise.standard_normal(AUDIO_SAMPLES, dtype=np.float32)
    return samples


def _bell(hz: float, length_s: float, noise: np.random.Generator) -> Samples:
    """Inharmonic partials of a church bell, the higher ones dying sooner."""
    t = _seconds(length_s)
    samples = np.zeros_like(t)
    partials = ((0.5, 0.35), (1.0, 1.0), (1.19, 0.7), (1.56, 0.5), (2.0, 0.75), (2.66, 0.45), (4.1, 0.3))
    for ratio, level in partials:
        decay_s = 0.3 * length_s / ratio**0.4
        samples += level * np.exp(-t / decay_s) * np.sin(2 * np.pi * ratio * hz * t + noise.uniform(0, 6.28))
    return samples * _fade(t, 0.002, 0.15 * length_s)


def _drum(hz: float, length_s: float, noise: np.random.Generator) -> Samples:
    """A skin whose tone falls by more than an octave, with the slap of the stick."""
    t = _seconds(length_s)
    fall_s = 0.09 * length_s
    tone: Samples = np.sin(_phase(hz * (1 + 1.6 * np.exp(-t / fall_s)))) * np.exp(-t / (0.28 * length_s))
    slap: Samples = _band_noise(np.full_like(t, 9 * hz), 4 * hz, noise) * np.exp(-t / (0.045 * length_s))
    return (tone + 0.4 * slap) * _fade(t, 0.002, 0.3 * length_s)


def _bird(hz: float, length_s: float, noise: np.random.Generator) -> Samples:
    """Three short chirps, each sliding up and a little down again."""
    t = _seconds(length_s)
    place = 3 * t / length_s
    within = place - np.floor(place)  # 0..1 through each chirp
    glide = hz * (0.8 + 0.5 * np.sin(np.pi * np.minimum(within / 0.62, 1.0) * 0.75))
    shape = np.sin(np.pi * np.minimum(within / 0.62, 1.0))
    whistle: Samples = np.sin(_phase(glide)) * shape
    return whistle * _fade(t, 0.004, 0.01)


def _bee(hz: float, length_s: float, noise: np.random.Generator) -> Samples:
    """A harsh, wavering buzz: many harmonics with a hump, beating wings."""
    t = _seconds(length_s)
    waver = 1 + 0.05 * np.sin(2 * np.pi * (2.5 / length_s) * t + noise.uniform(0, 6.28))
    phase = _phase(hz * waver)
    samples = np.zeros_like(t)
    for k in range(1, 13):
        level = 0.5 / k**0.5 + np.exp(-(((k - 6) / 2.0) ** 2))
        samples += level * np.sin(k * phase + noise.uniform(0, 6.28))
    return samples * _fade(t, 0.15 * length_s, 0.25 * length_s)


def _clock(hz: float, length_s: float, noise: np.random.Generator) -> Samples:
    """A tick and a lower tock: clicks in a small wooden box."""
    t = _seconds(length_s)
    samples = np.zeros_like(t)
    for start, ratio in ((0.0, 1.12), (0.5, 0.89)):
        after = t - start * length_s
        struck = after >= 0
        s = after[struck]
        click = np.zeros_like(s)
        for partial, level in ((1.0, 1.0), (1.6, 0.6), (2.1, 0.4)):
            click += level * np.sin(2 * np.pi * partial * ratio * hz * s + noise.uniform(0, 6.28))
        samples[struck] += click * np.exp(-s / 0.012) * (1 - np.exp(-s / 0.0004))
    return samples * _fade(t, 0.0, 0.05 * length_s)


def _siren(hz: float, length_s: float, noise: np.random.Generator) -> Samples:
    """One wail, up and down by two thirds of an octave."""
    t = _seconds(length_s)
    phase = _phase(hz * (0.8 + 0.5 * np.sin(np.pi * t / length_s)))
    tones = np.sin(phase) + 0.4 * np.sin(2 * phase) + 0.3 * np.sin(3 * phase)
    return tones.astype(np.float32) * _fade(t, 0.1 * length_s, 0.15 * length_s)


def _heart(hz: float, length_s: float, noise: np.random.Generator) -> Samples:
    """Lub-dub: two soft thuds, the second higher and weaker."""
    t = _seconds(length_s)
    samples = np.zeros_like(t)
    for start, ratio, level in ((0.0, 0.92, 1.0), (0.45, 1.1, 0.75)):
        place = (t / length_s - start) / 0.4
        shape = np.where((place > 0) & (place < 1), np.sin(np.pi * np.clip(place, 0, 1) ** 0.6) ** 2, 0)
        phase = 2 * np.pi * ratio * hz * t + noise.uniform(0, 6.28)
        samples += level * shape * (np.sin(phase) + 0.4 * np.sin(2 * phase))
    return samples.astype(np.float32)


def _rocket(hz: float, length_s: float, noise: np.random.Generator) -> Samples:
    """A whoosh: a band of noise that swells, rises and passes by."""
    t = _seconds(length_s)
    place = t / length_s
    centre = hz * (0.65 + 0.7 * place)
    swell: Samples = np.sin(np.pi * place**0.8) ** 1.3
    return _band_noise(centre, 0.3 * hz, noise) * swell


def _harp(hz: float, length_s: float, noise: np.random.Generator) -> Samples:
    """Three plucked strings, a quick broken chord upwards."""
    t = _seconds(length_s)
    samples = np.zeros_like(t)
    for start, ratio in ((0.0, 0.8), (0.2, 1.0), (0.4, 1.2)):
        s = t[round(start * len(t)) :] - start * length_s
        string = np.zeros_like(s)
        for k in range(1, 7):
            decay_s = 0.22 * length_s / k**0.7
            string += np.exp(-s / decay_s) / k * np.sin(2 * np.pi * k * ratio * hz * s)
        samples[len(t) - len(s) :] += string * (1 - np.exp(-s / 0.001))
    return samples * _fade(t, 0.0, 0.2 * length_s)


def _frog(hz: float, length_s: float, noise: np.random.Generator) -> Samples:
    """A croak: a train of damped pulses of the throat, in two resonances."""
    t = _seconds(length_s)
    spacing_s = length_s / 14
    within = np.mod(t, spacing_s)
    ring = np.sin(2 * np.pi * hz * within) + 0.6 * np.sin(2 * np.pi * 2.4 * hz * within)
    pulse = ring * np.exp(-within / (0.3 * spacing_s)) * np.minimum((spacing_s - within) / 0.002, 1)
    return pulse.astype(np.float32) * _fade(t, 0.2 * length_s, 0.3 * length_s)


def _phone(hz: float, length_s: float, noise: np.random.Generator) -> Samples:
    """A trill between two bright tones, a fifth apart, gliding from one to the other in milliseconds."""
    t = _seconds(length_s)
    swing = np.tanh(6 * np.sin(2 * np.pi * (3.5 / length_s) * t))
    phase = _phase(hz * (1.04 - 0.21 * swing))
    tones = np.sin(phase) + 0.45 * np.sin(2 * phase)
    return tones.astype(np.float32) * _fade(t, 0.01, 0.04 * length_s)


def _rain_cloud(hz: float, length_s: float, noise: np.random.Generator) -> Samples:
    """A shower: a hiss with many drops pattering in it."""
    t = _seconds(length_s)
    hiss = _band_noise(np.full_like(t, hz), 0.3 * hz, noise)
    patter = np.zeros_like(t)
    hits = noise.integers(0, len(t), size=22)
    patter[hits] = noise.uniform(0.4, 1.0, size=22)
    drop = np.exp(-_seconds(0.02) / 0.004).astype(np.float32)
    level = 0.25 + np.convolve(patter, drop)[: len(t)]
    return hiss * level.astype(np.float32) * _fade(t, 0.05 * length_s, 0.15 * length_s)


INSTRUMENTS: dict[str, tuple[Instrument, float]] = {  # with the hertz of a middle pitch
    "bell": (_bell, 700.0),
    "drum": (_drum, 170.0),
    "bird": (_bird, 2200.0),
    "bee": (_bee, 220.0),
    "clock": (_clock, 1500.0),
    "siren": (_siren, 800.0),
    "heart": (_heart, 160.0),
    "rocket": (_rocket, 900.0),
    "harp": (_harp, 350.0),
    "frog": (_frog, 500.0),
    "phone": (_phone, 1200.0),
    "rain cloud": (_rain_cloud, 2600.0),
}


def _seconds(length_s: float) -> Samples:
    return np.arange(round(length_s * AUDIO_RATE_HZ), dtype=np.float32) / np.float32(AUDIO_RATE_HZ)


def _phase(hz: Samples) -> Samples:
    """Radians, from 0 to 2 pi, of an oscillator whose frequency runs through ``hz``."""
    cycles = np.cumsum(hz, dtype=np.float64) / AUDIO_RATE_HZ
    radians: Samples = (2 * np.pi * (cycles % 1)).astype(np.float32)
    return radians


def _fade(t: Samples, attack_s: float, release_s: float) -> Samples:
    """Rise from zero within ``attack_s``, stay at one, sink to zero in the last ``release_s``."""
    fade = np.minimum(1, (t[-1] - t) / np.float32(release_s))
    if attack_s:
        fade = np.minimum(fade, t / np.float32(attack_s))
    curve: Samples = np.sin(np.float32(np.pi / 2) * fade) ** 2
    return curve


def _band_noise(centre_hz: Samples, half_width_hz: float, noise: np.random.Generator) -> Samples:
    """Noise of unit power whose band, Gaussian in frequency, follows ``centre_hz``."""
    size = len(centre_hz)
    offset_hz = np.fft.fftfreq(size, 1 / AUDIO_RATE_HZ)
    spectrum = noise.standard_normal(size) + 1j * noise.standard_normal(size)
    slow = np.fft.ifft(spectrum * np.exp(-0.5 * (offset_hz / half_width_hz) ** 2))
    slow *= np.sqrt(2) / np.sqrt(np.mean(np.abs(slow) ** 2))
    carrier = np.exp(1j * _phase(centre_hz).astype(np.float64))
    band: Samples = np.real(slow * carrier).astype(np.float32)
    return band


def _jitter(rng: random.Random, extent: float) -> float:
    return rng.uniform(-extent, extent)
