import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.signal import resample_poly

from alignment.toybox.judge_sound import judge_sound, measure_sound
from alignment.toybox.sound import INSTRUMENTS, synthesise
from alignment.toybox.world import AUDIO_RATE_HZ, THINGS, Sound, attributes, sample_sound
from decoders.mel import log_mel
from decoders.vocoder import GriffinLimVocoder


def play(thing="drum", pitch="middle", count=2, tempo="fast", loudness="loud", seed=0):
    return synthesise(Sound(thing, pitch, count, tempo, loudness), random.Random(seed))


def test_fresh_sounds_are_heard_as_what_they_are():
    rng = random.Random(11)
    for index in range(60):
        sound = sample_sound(rng, held_out=index % 4 == 0, thing=THINGS[index % len(THINGS)])
        assert judge_sound(synthesise(sound, rng), AUDIO_RATE_HZ) == attributes(sound)


def test_sounds_survive_the_spectrogram_and_the_vocoder():
    rng = random.Random(12)
    vocoder = GriffinLimVocoder()
    for thing in THINGS:
        sound = sample_sound(rng, thing=thing)
        samples = vocoder(log_mel(torch.from_numpy(synthesise(sound, rng)))).numpy()
        assert judge_sound(samples, AUDIO_RATE_HZ) == attributes(sound)


def test_sounds_survive_16_bits_at_another_rate():
    rng = random.Random(13)
    for thing in THINGS:
        sound = sample_sound(rng, thing=thing)
        samples = resample_poly(synthesise(sound, rng), 441, 160)
        coarse = (np.round(samples * 32767) / 32767).astype(np.float32)
        assert judge_sound(coarse, 44_100) == attributes(sound)


@pytest.mark.parametrize(
    "change",
    [{"thing": "harp"}, {"pitch": "low"}, {"count": 1}, {"tempo": "slow"}, {"loudness": "quiet"}],
)
def test_a_changed_attribute_changes_the_verdict_and_only_there(change):
    sound = Sound("bell", "middle", 2, "fast", "loud")
    verdict = judge_sound(synthesise(replace(sound, **change), random.Random(1)), AUDIO_RATE_HZ)
    assert verdict == attributes(sound) | change


def test_a_fourth_event_is_counted():
    samples = play(count=3)
    fourth = np.roll(play(count=1), round(3 * 0.38 * AUDIO_RATE_HZ))
    assert judge_sound(samples + fourth, AUDIO_RATE_HZ)["count"] == 4


def test_silence_is_no_thing():
    verdict = judge_sound(np.zeros(40960, dtype=np.float32), AUDIO_RATE_HZ)
    assert (verdict["thing"], verdict["count"]) == ("silence", 0)
    assert np.isnan(measure_sound(np.zeros(40960, dtype=np.float32), AUDIO_RATE_HZ)["hz"])


def test_samples_of_two_channels_are_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 40960\)"):
        judge_sound(np.zeros((2, 40960), dtype=np.float32), AUDIO_RATE_HZ)


@pytest.mark.parametrize("thing", THINGS)
def test_the_measured_pitch_is_the_tuning_of_the_instrument(thing):
    instrument, middle_hz = INSTRUMENTS[thing]
    limit = 1.2 if thing in ("rocket", "rain cloud", "frog") else 0.25  # semitones
    for offset in (-0.8, 0.0, 0.8):
        hz = middle_hz * 2 ** (offset / 12)
        samples = np.zeros(40960, dtype=np.float32)
        event = instrument(hz, 0.55, np.random.default_rng(99))
        samples[1600 : 1600 + len(event)] = 0.5 * event / np.abs(event).max()
        measured = measure_sound(samples, AUDIO_RATE_HZ)["hz"]
        assert abs(12 * np.log2(measured / hz)) < limit


def test_halving_a_sound_takes_six_decibels_off():
    whole, half = (measure_sound(gain * play("siren"), AUDIO_RATE_HZ) for gain in (1.0, 0.5))
    assert whole["loudness_db"] - half["loudness_db"] == pytest.approx(6.02, abs=0.05)
    assert whole["hz"] == pytest.approx(half["hz"], rel=1e-3)
