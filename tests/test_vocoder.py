import math
import random

import pytest
import torch
from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, get_class_obj_and_candidates
from diffusers.pipelines.pipeline_utils import _fetch_class_library_tuple

from alignment.toybox.sound import synthesise
from alignment.toybox.world import Sound
from decoders.mel import log_mel
from decoders.vocoder import GriffinLimVocoder


@pytest.fixture(scope="module")
def vocoder() -> GriffinLimVocoder:
    return GriffinLimVocoder()


def frames_of(thing: str, loudness: str = "loud") -> torch.Tensor:
    return log_mel(
        torch.from_numpy(synthesise(Sound(thing, "middle", 2, "fast", loudness), random.Random(0)))
    )


def test_each_frame_becomes_160_samples(vocoder):
    assert vocoder(torch.full((2, 40, 64), -5.0)).shape == (2, 6400)
    assert vocoder(torch.full((40, 64), -5.0)).shape == (6400,)


@pytest.mark.parametrize(
    ("thing", "limit"), [("bell", 0.3), ("drum", 0.2), ("siren", 0.2), ("rain cloud", 0.2)]
)
def test_the_mel_of_the_samples_is_the_mel_that_was_asked_for(vocoder, thing, limit):
    for loudness in ("loud", "quiet"):
        frames = frames_of(thing, loudness)
        again = log_mel(vocoder(frames))
        assert (again - frames).abs().mean() < limit  # nepers


def test_a_tone_comes_back_at_its_frequency_and_level(vocoder):
    tone = 0.4 * torch.sin(2 * math.pi * 1000 * torch.arange(16000) / 16000)
    samples = vocoder(log_mel(tone))
    spectrum = torch.fft.rfft(samples).abs()
    assert abs(int(spectrum.argmax()) - 1000) <= 25
    assert float(samples.square().mean().sqrt()) == pytest.approx(0.4 / math.sqrt(2), rel=0.25)


def test_the_same_frames_always_give_the_same_samples(vocoder):
    frames = frames_of("frog")
    assert torch.equal(vocoder(frames), vocoder(frames))


def test_a_batch_sounds_like_its_members(vocoder):
    frames = torch.stack([frames_of("bee"), frames_of("frog")])
    for member, samples in zip(frames, vocoder(frames), strict=True):
        assert (log_mel(samples) - log_mel(vocoder(member))).abs().mean() < 0.05  # nepers


def test_a_cell_louder_than_any_tone_leaves_the_rest_as_loud_as_it_was(vocoder):
    plain, spiked = frames_of("bee"), frames_of("bee")
    spiked[100, 40] += 8.0
    heard = log_mel(vocoder(spiked))
    assert (heard - log_mel(vocoder(plain)))[:80].abs().mean() < 0.1  # nepers
    assert heard[100, 40] < 2.5


def test_crests_beyond_full_scale_are_bent_below_it(vocoder):
    samples = vocoder(frames_of("bee") + 3.0)
    assert 0.9 < float(samples.abs().max()) <= 1.0


def test_no_band_is_louder_than_a_tone_of_the_peak():
    seconds = torch.arange(8_000) / 16_000
    tones = [log_mel(0.5 * torch.sin(2 * torch.pi * hz * seconds)) for hz in range(400, 600, 10)]
    frames = max(tones, key=lambda tone: tone[25, 10].item())  # the tone that band 10 hears loudest
    quiet = log_mel(GriffinLimVocoder(peak=0.25)(frames))
    same = log_mel(GriffinLimVocoder(peak=0.5)(frames))
    assert float(quiet[25, 10] - frames[25, 10]) == pytest.approx(-0.69, abs=0.15)
    assert float(same[25, 10] - frames[25, 10]) == pytest.approx(0.0, abs=0.1)


@pytest.mark.parametrize("peak", [0.0, 1.5])
def test_a_peak_that_is_no_amplitude_is_refused(peak):
    with pytest.raises(ValueError, match="expected an amplitude above 0"):
        GriffinLimVocoder(peak=peak)


def test_a_saved_vocoder_loads_with_its_settings_and_sounds_the_same(vocoder, tmp_path):
    GriffinLimVocoder(num_iterations=5).save_pretrained(tmp_path)
    loaded = GriffinLimVocoder.from_pretrained(tmp_path)
    assert loaded.config.num_iterations == 5
    frames = frames_of("phone")
    assert torch.equal(loaded(frames), GriffinLimVocoder(num_iterations=5)(frames))


def test_diffusers_finds_class_and_loading_method_from_the_model_index(vocoder):
    library, name = _fetch_class_library_tuple(vocoder)
    assert (library, name) == ("decoders.vocoder", "GriffinLimVocoder")
    found, bases = get_class_obj_and_candidates(library, name, ALL_IMPORTABLE_CLASSES, None, False)
    assert found is GriffinLimVocoder
    assert issubclass(found, bases["ModelMixin"])


def test_the_settings_that_the_pipeline_reads_fit_the_mel(vocoder):
    assert vocoder.config.sampling_rate == 16000
    assert vocoder.config.model_in_dim == 64
    assert math.prod(vocoder.config.upsample_rates) == 160


def test_a_foreign_frame_rate_is_refused():
    with pytest.raises(ValueError, match="a hop of 256 samples at 22050 Hz"):
        GriffinLimVocoder(sampling_rate=22050, upsample_rates=(8, 8, 2, 2))
