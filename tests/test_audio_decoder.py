import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AudioLDMPipeline

from decoders.audio import AudioDecoder
from decoders.condition import Condition, ConditionSpec
from decoders.denoising import Cancelled, make_scheduler
from decoders.settings import SCHEDULER_NAMES, DecodeSettings
from decoders.vocoder import GriffinLimVocoder
from encoders.media import Audio, Image
from tests import tiny_pipelines

CAPTION = "a big red bell"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.saved(tiny_pipelines.audio_pipeline(), tmp_path_factory.mktemp("audio"))


@pytest.fixture(scope="module")
def decoder(folder: Path) -> AudioDecoder:
    return AudioDecoder.load(folder)


@pytest.fixture(scope="module")
def mel_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipeline = tiny_pipelines.audio_pipeline(GriffinLimVocoder(num_iterations=2))
    return tiny_pipelines.saved(pipeline, tmp_path_factory.mktemp("mel"))


@pytest.fixture(scope="module")
def mel_decoder(mel_folder: Path) -> AudioDecoder:
    return AudioDecoder.load(mel_folder)


def pipeline_samples(
    folder: Path, name: str, steps: int, guidance: float, seconds: float | None
) -> np.ndarray:
    pipeline = AudioLDMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = make_scheduler(pipeline.scheduler.config, name)
    return pipeline(
        CAPTION,
        audio_length_in_s=seconds,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(5),
    ).audios[0]


@pytest.mark.parametrize("name", SCHEDULER_NAMES)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_samples_equal_those_of_the_diffusers_pipeline(
    folder: Path, decoder: AudioDecoder, name: str, guidance: float
) -> None:
    settings = DecodeSettings(seed=5, steps=5, guidance_scale=guidance, scheduler=name, duration_s=0.05)
    expected = pipeline_samples(folder, name, 5, guidance, 0.05)
    decoded = decoder.decode(decoder.encode_caption(CAPTION), settings)

    assert isinstance(decoded.medium, Audio)
    assert np.abs(expected).max() > 1e-2
    np.testing.assert_allclose(decoded.medium.samples, expected.clip(-1, 1), atol=1e-4)


def test_the_length_defaults_to_the_networks_and_is_cut_exactly(
    mel_folder: Path, mel_decoder: AudioDecoder
) -> None:
    condition = mel_decoder.encode_caption(CAPTION)

    usual = mel_decoder.decode(condition, DecodeSettings(steps=1))
    odd = mel_decoder.decode(condition, DecodeSettings(seed=5, steps=2, duration_s=0.1234))

    assert usual.medium.samples.shape == (8 * 2 * 160,)
    assert usual.medium.rate == 16000
    assert usual.manifest["duration_s"] == 0.16
    assert odd.medium.samples.shape == (round(0.1234 * 16000),)


def test_griffin_lim_stands_in_the_pipeline_and_in_the_decoder_alike(
    mel_folder: Path, mel_decoder: AudioDecoder
) -> None:
    expected = pipeline_samples(mel_folder, "dpmsolver++", 3, 2.0, None)

    settings = DecodeSettings(seed=5, steps=3, guidance_scale=2.0)
    decoded = mel_decoder.decode(mel_decoder.encode_caption(CAPTION), settings)

    np.testing.assert_allclose(decoded.medium.samples, expected.clip(-1, 1), atol=1e-3)


def test_the_condition_is_one_unit_vector(folder: Path, decoder: AudioDecoder) -> None:
    pipeline = AudioLDMPipeline.from_pretrained(folder)
    unwanted, wanted = pipeline._encode_prompt(CAPTION, "cpu", 1, True)
    embeddings = decoder.encode_caption(CAPTION).embeddings

    assert decoder.condition_spec == ConditionSpec(tokens=1, width=16, pooled=True)
    assert embeddings.norm().item() == pytest.approx(1.0)
    torch.testing.assert_close(embeddings, wanted[None])
    torch.testing.assert_close(decoder._null, unwanted[None])


def test_the_length_of_the_condition_vector_does_not_matter(decoder: AudioDecoder) -> None:
    condition = decoder.encode_caption(CAPTION)
    settings = DecodeSettings(seed=1, steps=2, duration_s=0.05)

    one = decoder.decode(condition, settings).medium.samples
    longer = decoder.decode(Condition(condition.embeddings * 7), settings).medium.samples

    np.testing.assert_allclose(one, longer, atol=1e-5)


def test_the_manifest_suffices_to_make_the_sound_again(decoder: AudioDecoder) -> None:
    condition = decoder.encode_caption(CAPTION)
    first = decoder.decode(condition, DecodeSettings(steps=2, duration_s=0.0501))
    kept = json.loads(json.dumps(first.manifest))

    names = ("seed", "scheduler", "steps", "guidance_scale", "duration_s")
    again = decoder.decode(condition, DecodeSettings(**{name: kept[name] for name in names}))

    np.testing.assert_array_equal(first.medium.samples, again.medium.samples)
    assert kept["rate_hz"] == 16000


def test_a_batch_equals_single_runs(mel_decoder: AudioDecoder) -> None:
    conditions = [mel_decoder.encode_caption(text) for text in (CAPTION, "a small blue drum")]
    settings = [DecodeSettings(seed=i, steps=3, guidance_scale=2.0 + i) for i in range(2)]

    batch = mel_decoder.decode_batch(conditions, settings)

    for condition, wish, decoded in zip(conditions, settings, batch, strict=True):
        single = mel_decoder.decode(condition, wish)
        np.testing.assert_allclose(single.medium.samples, decoded.medium.samples, atol=1e-3)


def test_a_stop_takes_effect_before_the_next_step(decoder: AudioDecoder) -> None:
    stop = threading.Event()
    seen: list[int] = []

    def on_step(done: int, total: int) -> None:
        seen.append(done)
        stop.set()

    with pytest.raises(Cancelled):
        decoder.decode(decoder.encode_caption(CAPTION), DecodeSettings(steps=5), on_step, stop)
    assert seen == [1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (DecodeSettings(width_px=64), "this decoder has no width_px; it takes duration_s"),
        (DecodeSettings(num_frames=8), "this decoder has no num_frames"),
    ],
)
def test_sizes_of_other_media_are_refused(
    decoder: AudioDecoder, settings: DecodeSettings, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        decoder.decode(decoder.encode_caption(CAPTION), settings)


def test_a_source_of_any_rate_and_length_becomes_latents(mel_decoder: AudioDecoder) -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 48000).astype(np.float32)
    short = mel_decoder.encode_source(Audio(noise[:500], 16000))
    long = mel_decoder.encode_source(Audio(noise, 48000))

    assert short.shape == long.shape == (4, 8, 32)
    decoded = mel_decoder.decode(
        mel_decoder.encode_caption(CAPTION), DecodeSettings(steps=4, strength=0.5), source=short
    )
    assert decoded.manifest["strength"] == 0.5
    assert len(decoded.medium.samples) == 2560


def test_sources_that_do_not_fit_are_refused(decoder: AudioDecoder, mel_decoder: AudioDecoder) -> None:
    with pytest.raises(ValueError, match="The source is image; this decoder starts from audio only"):
        mel_decoder.encode_source(Image(np.zeros((16, 16, 3), np.uint8)))
    with pytest.raises(ValueError, match="mel frames are not AudioLDM's"):
        decoder.encode_source(Audio(np.zeros(16000, np.float32), 16000))


def test_an_unknown_vocoder_is_named(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"vocoder": ["somewhere", "Vocoder"]}))

    with pytest.raises(ValueError, match="the vocoder is a Vocoder; known are GriffinLimVocoder"):
        AudioDecoder.load(copy)


def test_a_missing_vocoder_is_named(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    shutil.rmtree(copy / "vocoder")

    with pytest.raises(FileNotFoundError, match=r"vocoder/config.json is missing"):
        AudioDecoder.load(copy)


def test_a_sound_keeps_the_tuning_of_another(decoder: AudioDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Audio, Audio]] = []

    def tuned(original: Audio, edited: Audio) -> Audio:
        asked.append((original, edited))
        return Audio(edited.samples / 2, edited.rate)

    monkeypatch.setattr("decoders.untouched.keep_tuning", tuned)
    condition, wishes = decoder.encode_caption(CAPTION), DecodeSettings(seed=3, steps=2)
    sound = Audio(np.ones(16000, np.float32) / 4, 16000)

    plain = decoder.decode(condition, wishes)
    kept = decoder.decode(condition, wishes, original=sound)
    alone = decoder.decode(condition, replace(wishes, keep_untouched=False), original=sound)

    assert [original for original, _ in asked] == [sound]
    np.testing.assert_array_equal(kept.medium.samples, plain.medium.samples / 2)
    np.testing.assert_array_equal(alone.medium.samples, plain.medium.samples)
    assert "original" in kept.manifest
    assert "original" not in alone.manifest


def test_a_sound_keeps_nothing_of_a_picture(decoder: AudioDecoder) -> None:
    picture = Image(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="audio"):
        decoder.decode(decoder.encode_caption(CAPTION), original=picture)
