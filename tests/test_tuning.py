"""An edited sound gets the tuning of its original, and nothing else of it."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from alignment.samples import semitones_between
from alignment.toybox.judge_sound import judge_sound
from alignment.toybox.sound import synthesise
from alignment.toybox.world import AUDIO_RATE_HZ, PITCHES, THINGS, Sound
from decoders.mel import log_mel
from decoders.tuning import FURTHEST, keep_tuning, semitones_off
from encoders.media import Audio, resample

HARP = Sound(thing="harp", pitch="middle", count=2, tempo="fast", loudness="loud")


def played(sound: Sound, seed: int = 0) -> Audio:
    return Audio(synthesise(sound, random.Random(seed)), AUDIO_RATE_HZ)


def sharper(sound: Audio, semitones: float) -> Audio:
    """Play a sound faster."""
    return Audio(resample(sound.samples, sound.rate, round(sound.rate * 2 ** (-semitones / 12))), sound.rate)


@pytest.mark.parametrize("semitones", [-2.0, -0.6, 0.4, 1.7])
def test_says_how_sharp_a_sound_is(semitones: float) -> None:
    original = played(HARP)

    assert semitones_off(original, sharper(original, semitones)) == pytest.approx(semitones, abs=0.1)


@pytest.mark.parametrize("thing", sorted(set(THINGS) - {"frog", "rocket", "rain cloud"}))  # these are noise
def test_what_was_edited_otherwise_comes_back_in_tune(thing: str) -> None:
    off = []
    for seed in range(6):
        before = replace(HARP, thing=thing)
        original = played(before, seed)
        edited = played(replace(before, count=1, tempo="slow", loudness="quiet"), 100 + seed)

        tuned = keep_tuning(original, edited)

        off.append((semitones_between(original, edited), semitones_between(original, tuned)))
        found = judge_sound(tuned.samples, tuned.rate)
        assert (found["count"], found["tempo"], found["loudness"]) == (1, "slow", "quiet")
    assert max(was for was, _ in off) > 0.5
    assert max(now for _, now in off) < 0.5


def test_keeps_length_and_rate_and_stays_within_full_scale() -> None:
    original = played(HARP)
    flat = sharper(original, -2)
    loud = Audio(flat.samples / np.abs(flat.samples).max(), flat.rate)

    tuned = keep_tuning(original, loud)

    assert tuned.rate == loud.rate
    assert len(tuned.samples) == len(loud.samples)
    assert tuned.samples.dtype == np.float32
    assert np.abs(tuned.samples).max() <= 1


@pytest.mark.parametrize("pitch", sorted(set(PITCHES) - {"middle"}))
def test_another_pitch_was_meant(pitch: str) -> None:
    edited = played(replace(HARP, pitch=pitch), 1)

    assert keep_tuning(played(HARP), edited) is edited


def test_further_off_than_a_slip_was_meant() -> None:
    original = played(HARP)

    assert semitones_off(original, sharper(original, FURTHEST + 1)) is None


def test_another_instrument_is_mostly_left_alone() -> None:
    others = [thing for thing in THINGS if thing != "harp"]

    left = [semitones_off(played(HARP), played(replace(HARP, thing=thing), 1)) is None for thing in others]

    assert sum(left) >= len(others) - 1


def test_rates_and_lengths_may_differ() -> None:
    original = played(HARP)
    fine = Audio(resample(original.samples, 16000, 44100)[:60000], 44100)

    assert semitones_off(fine, sharper(original, 1)) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("samples", [np.zeros(16000, np.float32), np.zeros(10, np.float32)])
def test_silence_has_no_tuning(samples: np.ndarray) -> None:
    silence, sound = Audio(samples, 16000), played(HARP)

    assert keep_tuning(silence, sound) is sound
    assert keep_tuning(sound, silence) is silence


@pytest.mark.parametrize("sign", [-1, 1])
def test_leaves_no_hole_in_the_faint_noise_around_a_sound(sign: int) -> None:
    pairs = ((played(HARP, a), played(replace(HARP, count=1), b)) for a in range(4) for b in range(4, 20))
    original, edited = next(pair for pair in pairs if sign * (semitones_off(*pair) or 0) > 0.6)

    tuned = keep_tuning(original, edited)

    mel, plain = (log_mel(torch.from_numpy(sound.samples)[None])[0] for sound in (tuned, edited))  # (T, M)
    assert (mel[-20:].mean(0) - plain[-20:].mean(0)).abs().max() < 1  # nepers; at the end
    assert (mel[:, -3:].mean(0) - plain[:, -3:].mean(0)).abs().max() < 1  # above all tones
