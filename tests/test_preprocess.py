import math
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from encoders.filter_banks import log_mel_bank
from encoders.media import Audio, Image, Video
from encoders.preprocess import (
    BANK_MEAN,
    BANK_STD,
    CLIP_MEAN,
    CLIP_STD,
    PreprocessConfig,
    clip_frames,
    clip_spans,
    prepare_images,
    prepare_sounds,
    prepare_videos,
)

HUGE, TOYBOX = PreprocessConfig.huge(), PreprocessConfig.toybox()

# Frames 0, 20 and 47, every eighth of 128 bands: kaldi-native-fbank with window hanning, dither 0,
# HTK layout, no energy, 25 ms every 10 ms, from 20 Hz to half the rate.
KALDI = torch.tensor(
    [
        -7.7509,
        -4.3899,
        0.1013,
        3.5886,
        -3.9784,
        -8.4191,
        -3.7955,
        -0.9276,
        -6.0374,
        -0.8491,
        -4.386,
        0.7504,
        -0.4844,
        -2.8319,
        -2.8736,
        -0.0624,
        -8.9644,
        -7.9192,
        -7.3335,
        3.4849,
        -4.1788,
        -6.8801,
        -3.2012,
        5.2395,
        -4.4652,
        -1.5391,
        -3.1405,
        -1.7036,
        -0.0111,
        -1.5521,
        -1.572,
        0.5959,
        -10.0981,
        -6.6517,
        -5.8174,
        3.5218,
        -4.5199,
        -4.094,
        -2.6929,
        -2.4533,
        -3.4268,
        -1.4122,
        -1.1021,
        -0.6623,
        0.4153,
        -0.2447,
        -0.1933,
        1.3121,
    ]
).reshape(3, 16)


def sweep() -> Tensor:
    """Half a second: a steady tone, a rising one, something like noise, and an offset."""
    i = np.arange(8_000)
    t = i / 16_000
    wave = 0.5 * np.sin(2 * np.pi * 440 * t) + 0.25 * np.sin(2 * np.pi * (200 + 3_000 * t) * t)
    return torch.from_numpy((wave + 0.05 * np.sin(i**2 * 0.37) + 0.1).astype(np.float32))


def test_filter_banks_agree_with_kaldi() -> None:
    bank = log_mel_bank(sweep(), 128)
    assert bank.shape == (48, 128)
    torch.testing.assert_close(bank[[0, 20, 47]][:, ::8], KALDI, rtol=0, atol=2e-3)


def test_filter_banks_of_a_batch_are_those_of_its_parts() -> None:
    both = torch.stack([sweep(), sweep().flip(0)])
    torch.testing.assert_close(log_mel_bank(both, 64)[1], log_mel_bank(both[1], 64))


def test_silence_is_the_floor_and_too_short_is_refused() -> None:
    assert torch.all(log_mel_bank(torch.zeros(400), 128) == math.log(2**-23))
    with pytest.raises(ValueError, match=r"shape \(399,\); expected \(..., T\) with T >= 400"):
        log_mel_bank(torch.zeros(399), 128)


def gradient(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows % 256, columns % 256, (rows + columns) % 256], axis=-1).astype(np.uint8)


def undone(prepared: Tensor) -> Tensor:
    """Back to 0..255."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (prepared * std + mean) * 255


def test_picture_of_the_right_size_is_only_normalised() -> None:
    pixels = gradient(64, 64)
    prepared = prepare_images([Image(pixels)], TOYBOX)
    assert prepared.shape == (1, 3, 64, 64)
    torch.testing.assert_close(
        undone(prepared[0]), torch.from_numpy(pixels).permute(2, 0, 1).float(), rtol=0, atol=1e-3
    )
    black = prepare_images([Image(np.zeros((64, 64, 3), np.uint8))], TOYBOX)
    assert black[0, :, 0, 0].tolist() == pytest.approx([-1.79226, -1.75210, -1.48022], abs=1e-5)


@pytest.mark.parametrize(("height", "width"), [(300, 451), (451, 300), (100, 100), (40, 333)])
def test_picture_is_scaled_bicubically_and_cropped_at_the_centre(height: int, width: int) -> None:
    pixels = gradient(height, width)
    scaled = (224, int(224 * height / width)) if width < height else (int(224 * width / height), 224)
    whole = np.asarray(PIL.Image.fromarray(pixels).resize(scaled, PIL.Image.Resampling.BICUBIC))
    top, left = round((whole.shape[0] - 224) / 2), round((whole.shape[1] - 224) / 2)
    expected = torch.from_numpy(whole[top : top + 224, left : left + 224].copy()).permute(2, 0, 1).float()
    prepared = prepare_images([Image(pixels)], HUGE)
    torch.testing.assert_close(undone(prepared[0]), expected, rtol=0, atol=1e-3)


def test_a_strip_is_scaled_without_its_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    resize, interpolate = PIL.Image.Image.resize, torch.nn.functional.interpolate
    sizes: list[tuple[int, int]] = []

    def watched_resize(self: PIL.Image.Image, size: tuple[int, int], *rest: Any) -> PIL.Image.Image:
        sizes.append(size)
        return resize(self, size, *rest)

    def watched_interpolate(frames: Tensor, size: tuple[int, int], **rest: Any) -> Tensor:
        sizes.append(size)
        return interpolate(frames, size=size, **rest)

    monkeypatch.setattr(PIL.Image.Image, "resize", watched_resize)
    monkeypatch.setattr("encoders.preprocess.F.interpolate", watched_interpolate)
    for strip in (gradient(2, 8_001), gradient(8_001, 2)):
        red = strip.copy()
        red[3_000:-3_000] = red[:, 3_000:-3_000] = (255, 0, 0)  # the middle, whichever way it lies
        picture = prepare_images([Image(red)], TOYBOX)
        video = prepare_videos([Video(np.stack([red] * 2), 8.0)], TOYBOX)
        assert picture.shape == (1, 3, 64, 64)
        assert video.shape == (1, 4, 3, 2, 64, 64)
        for frame in (picture[0], video[0, 0, :, 0]):
            torch.testing.assert_close(undone(frame)[1:], torch.zeros(2, 64, 64), rtol=0, atol=1e-3)
    assert sizes == [(1_024, 64), (64, 1_024), (64, 1_024), (1_024, 64)]


def test_clips_are_spread_from_start_to_end() -> None:
    assert clip_spans(10.0, 2.0, 5) == [(0.0, 2.0), (2.0, 4.0), (4.0, 6.0), (6.0, 8.0), (8.0, 10.0)]
    assert clip_spans(10.0, 2.0, 1) == [(0.0, 2.0)]
    assert clip_spans(1.0, 2.0, 3) == [(0.0, 2.0)] * 3


def test_toybox_video_is_four_pairs_of_frames_half_a_second_apart() -> None:
    assert clip_frames(8, 8.0, TOYBOX) == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_huge_takes_first_and_last_frame_of_each_clip() -> None:
    # 4 s at 25 fps: clips of 2 s start at 0, 0.5, 1, 1.5 and 2 s.
    assert clip_frames(100, 25.0, HUGE) == [[0, 49], [13, 62], [25, 74], [38, 87], [50, 99]]
    assert clip_frames(1, 25.0, HUGE) == [[0, 0]] * 5
    assert clip_frames(10, 10.0, HUGE) == [[0, 9]] * 5


@pytest.mark.parametrize("frames", [1, 2, 3, 7, 8, 9, 500])
@pytest.mark.parametrize("fps", [0.5, 8.0, 23.976, 240.0])
def test_frames_stay_inside_the_video(frames: int, fps: float) -> None:
    for config in (HUGE, TOYBOX):
        chosen = clip_frames(frames, fps, config)
        assert len(chosen) == config.video_clips
        for clip in chosen:
            assert len(clip) == 2
            assert 0 <= clip[0] <= clip[1] < frames


def test_toybox_video_holds_its_frames() -> None:
    frames = np.stack([np.full((64, 64, 3), 30 * i, np.uint8) for i in range(8)])
    prepared = prepare_videos([Video(frames, 8.0)] * 2, TOYBOX)
    assert prepared.shape == (2, 4, 3, 2, 64, 64)
    levels = undone(prepared[0, :, :, :, 0, 0].permute(1, 0, 2))[0]  # red: (clips, frames)
    expected = torch.tensor([[0, 4], [1, 5], [2, 6], [3, 7]]) * 30.0
    torch.testing.assert_close(levels, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("turned", [False, True])
def test_huge_video_has_three_crops_per_clip(turned: bool) -> None:
    columns = np.broadcast_to((np.arange(448) // 2)[None, :, None], (224, 448, 3)).astype(np.uint8)
    frame = columns.swapaxes(0, 1) if turned else columns
    prepared = prepare_videos([Video(np.stack([frame] * 8), 8.0)], HUGE)
    assert prepared.shape == (1, 15, 3, 2, 224, 224)
    corners = undone(prepared[0, :3, :, 0, 0, 0].T[:, :, None])[0, :, 0]
    torch.testing.assert_close(corners, torch.tensor([0.0, 56.0, 112.0]), rtol=0, atol=1e-3)


def test_large_video_is_scaled_by_its_short_side() -> None:
    frames = np.full((8, 90, 160, 3), 200, np.uint8)
    prepared = prepare_videos([Video(frames, 8.0)], TOYBOX)
    assert prepared.shape == (1, 4, 3, 2, 64, 64)
    assert undone(prepared[0, 0].transpose(0, 1)).sub(200).abs().max() < 1e-3


def test_toybox_sound_is_its_filter_bank_and_two_frames_of_filling() -> None:
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, 40_960).astype(np.float32)
    prepared = prepare_sounds([Audio(wave, 16_000)] * 2, TOYBOX)
    assert prepared.shape == (2, 1, 1, 128, 256)
    bank = (log_mel_bank(torch.from_numpy(wave - wave.mean()), 128) - BANK_MEAN) / BANK_STD
    torch.testing.assert_close(prepared[0, 0, 0, :, :254], bank.T, rtol=0, atol=1e-3)
    assert prepared[0, 0, 0, :, 254:].unique().tolist() == pytest.approx([4.268 / 9.138])


def test_huge_sound_is_three_clips_of_two_seconds() -> None:
    wave = np.concatenate([np.full(16_000 * 2, level * 0.01, np.float32) for level in range(5)])
    wave += 0.3 * np.sin(np.arange(len(wave)) * np.repeat([0.1, 0.2, 0.3, 0.4, 0.5], 32_000))
    prepared = prepare_sounds([Audio(wave.astype(np.float32), 16_000)], HUGE)  # 10 s: starts at 0, 4 and 8 s
    assert prepared.shape == (1, 3, 1, 128, 204)
    for i, start in enumerate((0, 4, 8)):
        clip = torch.from_numpy(wave[start * 16_000 : (start + 2) * 16_000].astype(np.float32))
        bank = (log_mel_bank(clip - clip.mean(), 128) - BANK_MEAN) / BANK_STD
        assert len(bank) == 198
        torch.testing.assert_close(prepared[0, i, 0, :, :198], bank.T, rtol=0, atol=1e-3)


def test_sounds_of_any_length_and_rate_fit_in_one_batch() -> None:
    sounds = [
        Audio(np.zeros(1, np.float32), 16_000),
        Audio(np.zeros(44_100 * 9, np.float32), 44_100),
        Audio(np.zeros(300, np.float32), 8_000),
        Audio(np.zeros(0, np.float32), 16_000),
    ]
    for config, shape in ((HUGE, (4, 3, 1, 128, 204)), (TOYBOX, (4, 1, 1, 128, 256))):
        prepared = prepare_sounds(sounds, config)
        assert prepared.shape == shape
        assert torch.isfinite(prepared).all()


def test_configs_survive_json_and_name_what_is_wrong() -> None:
    for config in (HUGE, TOYBOX):
        assert PreprocessConfig.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match="missing 1 required keyword-only argument: 'image_size'"):
        PreprocessConfig.from_json({k: v for k, v in HUGE.to_json().items() if k != "image_size"})
    with pytest.raises(ValueError, match="video_crops is 2; expected 1 or 3"):
        PreprocessConfig.from_json(HUGE.to_json() | {"video_crops": 2})
    with pytest.raises(ValueError, match="audio_clips is 0"):
        PreprocessConfig.from_json(HUGE.to_json() | {"audio_clips": 0})
