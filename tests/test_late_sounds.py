"""Late sounds: what is heard is the same but later, and only a mark of its own says so."""

from __future__ import annotations

import random
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from alignment.embedded import pools
from alignment.embedded.captions import WIDTH, CaptionEncoder, build, kept_tokenizer
from alignment.embedded.denoisers import ConditionedDenoiser
from alignment.embedded.denoisers import build as build_denoiser
from alignment.embedded.late_sounds import DELAYS, MARKS, LateSounds, also_late, delayed, late_sounds
from alignment.embedded.own_media import OwnMedia
from alignment.toybox.judge_sound import judge_sound
from alignment.toybox.sound import TIMING, synthesise
from alignment.toybox.world import AUDIO_RATE_HZ, COUNTS, Sound
from decoders.mel import log_mel
from decoders.vocoder import GriffinLimVocoder

BELL = Sound(thing="bell", pitch="middle", count=1, tempo="slow", loudness="loud")


def mel_of(sound: Sound) -> np.ndarray:
    samples = torch.from_numpy(synthesise(sound, random.Random(1)))
    return log_mel(samples[None])[0].numpy().astype(np.float16)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pools")


def made(cache: Path) -> LateSounds:
    def encode(rows: Tensor) -> Tensor:
        return rows.float().unflatten(1, (16, 16)).mean((2, 3))[:, :, None, None]  # (B, 16, 1, 1)

    return late_sounds(cache, pools.sound_mels(cache, 60), encode, WIDTH)


@pytest.mark.parametrize("events", DELAYS[1])
def test_the_same_is_heard_later(events: int) -> None:
    mel = mel_of(BELL)
    late = delayed(mel, BELL, events)

    samples = GriffinLimVocoder()(torch.from_numpy(late)).numpy()
    loudest = [int(frames.mean(1).argmax()) for frames in (mel, late)]

    assert loudest[1] - loudest[0] == 75 * events  # three quarters of a second, a hundred frames in each
    assert judge_sound(samples, AUDIO_RATE_HZ) == {**_words(BELL)}


def test_every_delay_has_a_mark_and_leaves_room_for_every_event() -> None:
    assert sorted(MARKS.values()) == list(range(len(MARKS)))
    for count, delay in MARKS:
        assert count + delay <= max(COUNTS)


def test_it_makes_the_same_ones_again_and_marks_them_by_count_and_delay(cache: Path) -> None:
    once, again = made(cache), made(cache)

    assert len(once.scenes) == len(once.latents) == len(once.marks) == 36
    assert list(once.scenes) == list(again.scenes)
    np.testing.assert_array_equal(once.latents, again.latents)
    assert torch.equal(once.marks, again.marks)
    assert {scene.count for scene in once.scenes} == set(DELAYS)
    assert not any(scene.held_out for scene in once.scenes)
    kinds = torch.unique(once.marks, dim=0)
    assert len(kinds) == len(MARKS)
    torch.testing.assert_close(kinds.norm(dim=1), torch.ones(len(MARKS)))


def test_a_mark_turns_the_condition_and_nothing_else_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = kept_tokenizer("sound", tmp_path / "tokenizer")
    captions = CaptionEncoder("sound", tokenizer, build("sound", tokenizer).eval())
    model = ConditionedDenoiser("sound", captions, build_denoiser("sound"))
    heard: list[Tensor] = []

    def predict(noisy: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        heard.append(condition)
        return noisy

    monkeypatch.setattr(model, "predict", predict)
    texts, marks = ["a bell", "a low drum"], torch.zeros(2, WIDTH)
    marks[1, 3] = 1
    for given in (None, marks):
        model.loss(torch.zeros(2, 16, 16, 4), texts, torch.Generator().manual_seed(0), given)

    plain, marked = heard
    torch.testing.assert_close(marked[0], plain[0])
    expected = torch.nn.functional.normalize(plain[1] + marks[1], dim=0)
    torch.testing.assert_close(marked[1], expected)
    assert (marked[1] - plain[1]).abs().max() > 0.1


def test_late_sounds_follow_those_of_the_decoder_and_are_what_their_scenes_say() -> None:
    number = 40
    samples = np.stack(
        [
            np.round(synthesise(cast(Sound, scene), random.Random(i)) * 32767).astype(np.int16)
            for i, scene in enumerate(pools.scenes("sound", number))
        ]
    )
    own = OwnMedia(pools.scenes("sound", 12), samples[:12])

    heard = also_late(own, samples)

    assert heard.num_late == 6
    assert len(heard.scenes) == len(heard.rows) == 18
    np.testing.assert_array_equal(heard.rows[:12], own.rows)
    for scene, row in zip(heard.scenes[12:], heard.rows[12:], strict=True):
        first = int(np.flatnonzero(np.abs(row) > 0.2 * np.abs(row.astype(int)).max())[0]) / AUDIO_RATE_HZ
        assert first > TIMING["fast"].gap_s
        assert judge_sound(row / np.float32(32767), AUDIO_RATE_HZ) == _words(cast(Sound, scene))


def _words(sound: Sound) -> dict[str, str | int]:
    return {name: getattr(sound, name) for name in ("thing", "pitch", "count", "tempo", "loudness")}
