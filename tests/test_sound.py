import itertools
import random

import numpy as np
import pytest

from alignment.toybox.sound import FIRST_ONSET_S, ONSET_JITTER_S, TIMING, Samples, synthesise
from alignment.toybox.world import (
    AUDIO_RATE_HZ,
    AUDIO_SAMPLES,
    COUNTS,
    LOUDNESSES,
    PITCHES,
    TEMPOS,
    THINGS,
    Sound,
)

INNER_SILENCE_S = {"heart": 0.12, "bird": 0.1}  # within one event, at slow tempo


def play(thing, pitch="middle", count=1, tempo="slow", loudness="loud", seed=0) -> Samples:
    return synthesise(Sound(thing, pitch, count, tempo, loudness), random.Random(seed))


def envelope(samples: Samples) -> np.ndarray:
    return np.sqrt(np.convolve(samples**2, np.full(160, 1 / 160), mode="same"))


def onsets_s(samples: Samples, merge_s: float) -> list[float]:
    """Seconds at which something starts after more than ``merge_s`` of silence."""
    level = envelope(samples)
    loud = np.flatnonzero(level > 0.08 * level.max())
    starts = loud[np.diff(loud, prepend=-AUDIO_SAMPLES) > merge_s * AUDIO_RATE_HZ]
    return [start / AUDIO_RATE_HZ for start in starts]


def centroid_hz(samples: Samples) -> float:
    power = np.abs(np.fft.rfft(samples)) ** 2
    return float((power * np.fft.rfftfreq(len(samples), 1 / AUDIO_RATE_HZ)).sum() / power.sum())


@pytest.mark.parametrize("thing", THINGS)
def test_every_sound_has_the_size_of_the_world_and_stays_within_full_scale(thing):
    for pitch, count, tempo, loudness in itertools.product(PITCHES, COUNTS, TEMPOS, LOUDNESSES):
        samples = play(thing, pitch, count, tempo, loudness)
        assert samples.shape == (AUDIO_SAMPLES,)
        assert samples.dtype == np.float32
        assert np.abs(samples).max() <= 0.75


@pytest.mark.parametrize("thing", THINGS)
def test_a_seed_repeats_its_sound_and_another_seed_does_not(thing):
    np.testing.assert_array_equal(play(thing, seed=3), play(thing, seed=3))
    assert np.abs(play(thing, seed=3) - play(thing, seed=4)).max() > 0.01


@pytest.mark.parametrize("tempo", TEMPOS)
@pytest.mark.parametrize("thing", THINGS)
def test_pitches_lie_in_order_and_about_an_octave_apart(thing, tempo):
    for seed in range(3):
        low, middle, high = (centroid_hz(play(thing, p, tempo=tempo, seed=seed)) for p in reversed(PITCHES))
        assert 1.6 < middle / low < 2.4
        assert 1.6 < high / middle < 2.4


@pytest.mark.parametrize("tempo", TEMPOS)
@pytest.mark.parametrize("thing", THINGS)
def test_the_number_of_onsets_is_the_count(thing, tempo):
    scale = TIMING[tempo].length_s / TIMING["slow"].length_s
    merge_s = INNER_SILENCE_S.get(thing, 0.06) * scale
    strokes = 2 if thing == "clock" else 1  # tick and tock stand as far apart as two clocks do
    for count in COUNTS:
        starts = onsets_s(play(thing, count=count, tempo=tempo), merge_s)
        assert len(starts) == count * strokes


@pytest.mark.parametrize("tempo", TEMPOS)
def test_drums_start_where_their_tempo_says(tempo):
    first, second, third = onsets_s(play("drum", count=3, tempo=tempo, seed=5), 0.1)
    gap_s = TIMING[tempo].gap_s
    assert abs(first - FIRST_ONSET_S) < ONSET_JITTER_S + 0.01
    assert second - first == pytest.approx(gap_s, rel=0.08)
    assert third - second == pytest.approx(gap_s, rel=0.08)


@pytest.mark.parametrize("thing", THINGS)
def test_a_single_fast_event_is_about_half_as_long(thing):
    def length_s(tempo):
        level = envelope(play(thing, tempo=tempo))
        loud = np.flatnonzero(level > 0.05 * level.max())
        return (loud[-1] - loud[0]) / AUDIO_RATE_HZ

    assert 0.4 < length_s("fast") / length_s("slow") < 0.65


@pytest.mark.parametrize("thing", THINGS)
def test_quiet_is_22_decibels_below_loud_up_to_the_jitter(thing):
    for seed in range(4):
        loud, quiet = (np.abs(play(thing, loudness=word, seed=seed)).max() for word in reversed(LOUDNESSES))
        assert 20 * np.log10(loud / quiet) == pytest.approx(22, abs=0.3)  # one seed, one jitter
        assert 20 * np.log10(loud / 0.6) == pytest.approx(0, abs=1.6)


def test_before_and_after_the_events_there_is_next_to_silence():
    samples = play("bell", count=1, tempo="fast")
    assert np.abs(samples[: round(0.06 * AUDIO_RATE_HZ)]).max() < 1.5e-3
    assert np.abs(samples[AUDIO_RATE_HZ:]).max() < 1.5e-3
