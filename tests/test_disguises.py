import random

import torch
from torch import Tensor

from alignment.embedded.disguises import (
    FURTHEST_PACE,
    Disguised,
    disguised_sounds,
    greyed,
    of_no_thing,
    transposed,
    without_colour,
)
from alignment.toybox.sound import synthesise
from alignment.toybox.world import AUDIO_RATE_HZ, Sound, sample_sound
from encoders.filter_banks import log_mel_bank


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_sounds_of_no_thing_are_duets_or_mirrored():
    banks, partners = torch.randn(40, 2, 1, 8, 20), torch.randn(40, 2, 1, 8, 20)

    hidden = of_no_thing(banks, partners, noise())

    duets = [torch.equal(row, both) for row, both in zip(hidden, torch.maximum(banks, partners), strict=True)]
    assert 8 < sum(duets) < 32
    assert hidden.shape == banks.shape
    assert not any(torch.equal(row, plain) for row, plain in zip(hidden, banks, strict=True))


def test_grey_is_the_same_in_every_channel():
    pictures = torch.randn(3, 3, 4, 4)

    assert torch.allclose(greyed(pictures), pictures.mean(1, keepdim=True).expand_as(pictures))


def test_some_pictures_and_clips_lose_their_colours_and_the_others_stay():
    for shape, colours in (((40, 3, 8, 8), 1), ((40, 2, 3, 2, 8, 8), 2)):
        batch = torch.randn(shape)

        less = without_colour(batch, noise())

        assert 0 < less.plain.sum() < 40
        assert torch.equal(less.media[less.plain], batch[less.plain])
        assert less.media[~less.plain].std(colours).max() < 1e-6
        assert torch.allclose(less.media.mean(colours), batch.mean(colours), atol=1e-6)
        assert set(less.shown) == {"colour", "ground"}
        assert all(torch.equal(shown, less.plain) for shown in less.shown.values())


def disguised(batch: Tensor, partners: Tensor) -> Disguised:
    scenes = [sample_sound(random.Random(i)) for i in range(len(batch))]
    return disguised_sounds(batch, scenes, partners, noise())


def test_sounds_stay_or_are_duets_or_lie_between_or_are_mirrored():
    batch, partners = torch.randn(60, 1, 1, 8, 16), torch.randn(60, 1, 1, 8, 16)

    less = disguised(batch, partners)

    named, timed = less.shown["thing"], less.shown["tempo"]
    duets, between, mirrored = ~named & timed, named & ~timed, ~named & ~timed
    for rows in (less.plain, duets, between, mirrored):
        assert rows.any()
    assert torch.equal(less.plain, named & timed)
    assert torch.equal(less.media[less.plain], batch[less.plain])
    assert torch.equal(less.media[duets], torch.maximum(batch, partners)[duets])
    for rows in (between, mirrored):
        assert ((less.media - batch).abs().flatten(1).amax(1)[rows] > 0.1).all()


def test_mirrored_sounds_have_their_low_bands_on_top():
    t = torch.arange(16) < 8
    low = torch.zeros(60, 1, 1, 128, 16)
    low[:, :, :, 24:32] = t.float()  # eight low bands for half of the time

    less = disguised(low, low)

    mirrored = ~less.shown["thing"] & ~less.shown["tempo"]
    heights = less.media.amax(-1).flatten(1).argmax(1)  # (B,)
    assert heights[mirrored].min() > 64 > heights[~mirrored].max()


def test_how_often_is_asked_where_nothing_else_gives_it_away():
    less = disguised(torch.randn(60, 1, 1, 8, 16), torch.randn(60, 1, 1, 8, 16))

    assert torch.equal(less.shown["pitch"], less.plain)
    assert torch.equal(less.shown["count"], ~less.plain)
    assert "loudness" not in less.shown


def test_a_transposed_bank_is_that_of_the_higher_sound():
    t = torch.arange(AUDIO_RATE_HZ) / AUDIO_RATE_HZ
    low, high = (log_mel_bank(torch.sin(2 * torch.pi * hz * t), 128).T for hz in (800.0, 1000.0))
    semitones = 12 * torch.log2(torch.tensor([1000.0 / 800.0]))

    moved = transposed(low[None, None], semitones, torch.ones(1))[0, 0]

    assert abs(int(moved.mean(1).argmax()) - int(high.mean(1).argmax())) <= 1
    assert int(high.mean(1).argmax()) - int(low.mean(1).argmax()) > 5


def test_a_faster_bank_has_all_its_sounds_sooner_and_silence_at_the_end():
    scene = Sound("drum", "middle", 3, "slow", "loud")
    samples = torch.from_numpy(synthesise(scene, random.Random(1)))
    bank = log_mel_bank(samples, 128).T  # (M, T)

    moved = transposed(bank[None, None], torch.zeros(1), torch.tensor([FURTHEST_PACE]))[0, 0]

    def onsets(of: Tensor) -> list[int]:
        level = of.amax(0)
        loud = level > level.amax() - 3
        return [i for i in range(1, len(loud)) if loud[i] and not loud[i - 1]]

    assert len(onsets(moved)) == len(onsets(bank)) == 3
    gaps = [b - a for a, b in zip(onsets(bank), onsets(bank)[1:], strict=False)]
    faster = [b - a for a, b in zip(onsets(moved), onsets(moved)[1:], strict=False)]
    for gap, less in zip(gaps, faster, strict=True):
        assert abs(gap / less - FURTHEST_PACE) < 0.1
    assert moved[:, -1].amax() == bank.amin()
