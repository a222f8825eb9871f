import math

import pytest
import torch

from decoders.mel import RATE_HZ, band_centres_hz, log_mel, mel_filterbank


def tone(hz: float, amplitude: float = 0.5) -> torch.Tensor:
    return amplitude * torch.sin(2 * math.pi * hz * torch.arange(40960) / RATE_HZ)


def test_the_clip_of_the_world_gives_exactly_256_frames():
    assert log_mel(torch.zeros(40960)).shape == (256, 64)
    assert log_mel(torch.zeros(3, 40960)).shape == (3, 256, 64)


def test_a_batch_equals_its_members():
    batch = torch.stack([tone(300), tone(2000)])
    torch.testing.assert_close(log_mel(batch)[1], log_mel(batch[1]), rtol=1e-4, atol=1e-4)


def test_silence_is_the_logarithm_of_the_clamp():
    torch.testing.assert_close(log_mel(torch.zeros(16000)), torch.full((100, 64), math.log(1e-5)))


@pytest.mark.parametrize("band", [1, 8, 30, 45, 62])
def test_a_tone_at_the_centre_of_a_band_is_loudest_there(band):
    frames = log_mel(tone(band_centres_hz()[band]))
    assert (frames[5:-5].argmax(dim=1) == band).all()


def test_the_level_of_a_tone_follows_from_window_and_filterbank():
    # A Hann window of 1024 sums to 512: a sine of amplitude a on bin 64 stands 256 a high there
    # and half as high in the two bins beside it.
    weights = mel_filterbank()
    expected = math.log(256 * 0.5) + torch.log(weights[:, 64] + (weights[:, 63] + weights[:, 65]) / 2)
    band = int(expected.argmax())
    assert abs(band_centres_hz()[band] - 1000) < 25
    level = log_mel(tone(1000.0))[10:-10, band]
    torch.testing.assert_close(level, torch.full_like(level, float(expected[band])), atol=1e-3, rtol=0)


def test_halving_the_amplitude_takes_log_two_off_every_loud_band():
    loud, soft = log_mel(tone(500, 0.5)), log_mel(tone(500, 0.25))
    difference = (loud - soft)[soft > -6]
    torch.testing.assert_close(difference, torch.full_like(difference, math.log(2)), atol=1e-3, rtol=0)


def test_bands_start_linear_and_end_below_eight_kilohertz():
    centres = band_centres_hz()
    assert centres[0] == pytest.approx(46.4, abs=0.1)
    assert centres[1] - centres[0] == pytest.approx(centres[10] - centres[9])
    assert centres[-1] / centres[-2] == pytest.approx(centres[-11] / centres[-12])
    assert centres[-1] < 8000


def test_triangles_have_unit_area_in_hertz():
    area = mel_filterbank().sum(dim=1) * RATE_HZ / 1024
    assert ((area - 1).abs() < 0.05).all()


@pytest.mark.parametrize("length", [41000, 320])
def test_a_length_that_does_not_fill_frames_is_refused(length):
    with pytest.raises(ValueError, match=rf"there are {length} samples; expected a multiple of 160"):
        log_mel(torch.zeros(length))
