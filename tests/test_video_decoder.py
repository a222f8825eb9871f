import inspect
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import TextToVideoSDPipeline, VideoToVideoSDPipeline

from decoders.condition import ConditionSpec
from decoders.denoising import Cancelled, denoise, draw_noise, make_scheduler
from decoders.settings import SCHEDULER_NAMES, DecodeSettings
from decoders.video import VideoDecoder
from encoders.media import Image, Video
from tests import tiny_pipelines

CAPTION = "a big red bell"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.saved(tiny_pipelines.video_pipeline(), tmp_path_factory.mktemp("video"))


@pytest.fixture(scope="module")
def decoder(folder: Path) -> VideoDecoder:
    return VideoDecoder.load(folder)


@pytest.mark.parametrize("name", SCHEDULER_NAMES)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_latents_equal_those_of_the_diffusers_pipeline(
    folder: Path, decoder: VideoDecoder, name: str, guidance: float
) -> None:
    pipeline = TextToVideoSDPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = make_scheduler(pipeline.scheduler.config, name)
    expected = pipeline(
        CAPTION,
        num_frames=3,
        num_inference_steps=5,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
    ).frames

    latents = denoise(
        decoder._predict,
        make_scheduler(pipeline.scheduler.config, name),
        draw_noise((4, 3, 8, 8), [5]),
        decoder.encode_caption(CAPTION).embeddings[None],
        decoder._null,
        steps=5,
        guidance=[guidance],
    )

    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", SCHEDULER_NAMES)
def test_a_start_from_a_source_takes_the_steps_of_the_video_to_video_pipeline(
    folder: Path, decoder: VideoDecoder, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    editing = VideoToVideoSDPipeline.from_pretrained(folder)
    editing.set_progress_bar_config(disable=True)
    editing.scheduler = make_scheduler(editing.scheduler.config, name)
    monkeypatch.setattr(editing.video_processor, "preprocess_video", lambda video: video)  # these are latents
    source = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = editing(
        CAPTION,
        video=source,
        strength=0.6,
        num_inference_steps=10,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
    ).frames

    frames = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))  # it draws frame by frame
    latents = denoise(
        decoder._predict,
        make_scheduler(editing.scheduler.config, name),
        frames.transpose(0, 1)[None],
        decoder.encode_caption(CAPTION).embeddings[None],
        decoder._null,
        steps=10,
        guidance=[3.0],
        source=source,
        strength=0.6,
    )

    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=0)


def test_frames_equal_those_of_the_diffusers_pipeline(folder: Path, decoder: VideoDecoder) -> None:
    pipeline = TextToVideoSDPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = make_scheduler(pipeline.scheduler.config, "dpmsolver++")
    expected = pipeline(
        CAPTION,
        num_frames=4,
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(5),
    ).frames[0]

    settings = DecodeSettings(seed=5, steps=4, guidance_scale=3.0, num_frames=4)
    decoded = decoder.decode(decoder.encode_caption(CAPTION), settings)

    assert isinstance(decoded.medium, Video)
    assert decoded.medium.frames.shape == (4, 16, 16, 3)
    assert decoded.medium.fps == 8.0
    np.testing.assert_allclose(decoded.medium.frames, np.round(expected * 255), atol=1)


def test_the_condition_is_a_sequence_of_text_states(decoder: VideoDecoder) -> None:
    assert decoder.condition_spec == ConditionSpec(tokens=8, width=16, pooled=False)
    assert decoder.encode_caption(CAPTION).embeddings.shape == (8, 16)


def test_the_manifest_suffices_to_make_the_video_again(decoder: VideoDecoder) -> None:
    condition = decoder.encode_caption(CAPTION)
    first = decoder.decode(condition, DecodeSettings(steps=2))
    kept = json.loads(json.dumps(first.manifest))

    names = ("seed", "scheduler", "steps", "guidance_scale", "width_px", "height_px", "num_frames")
    again = decoder.decode(condition, DecodeSettings(**{name: kept[name] for name in names}))

    np.testing.assert_array_equal(first.medium.frames, again.medium.frames)
    assert (kept["num_frames"], kept["fps"]) == (3, 8.0)


def test_a_batch_equals_single_runs(decoder: VideoDecoder) -> None:
    conditions = [decoder.encode_caption(text) for text in (CAPTION, "a small blue drum")]
    settings = [DecodeSettings(seed=i, steps=3, guidance_scale=2.0 + i) for i in range(2)]

    batch = decoder.decode_batch(conditions, settings)

    for condition, wish, decoded in zip(conditions, settings, batch, strict=True):
        single = decoder.decode(condition, wish)
        assert np.abs(single.medium.frames.astype(int) - decoded.medium.frames).max() <= 1


def test_a_stop_takes_effect_before_the_next_step(decoder: VideoDecoder) -> None:
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
        (DecodeSettings(width_px=17), "width_px is 17; this decoder makes multiples of 2"),
        (DecodeSettings(duration_s=2.0), "this decoder has no duration_s"),
    ],
)
def test_sizes_that_cannot_be_made_are_named(
    decoder: VideoDecoder, settings: DecodeSettings, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        decoder.decode(decoder.encode_caption(CAPTION), settings)


def test_sizes_and_frame_rate_default_to_the_folders(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    defaults = {"steps": 1, "guidance_scale": 1, "num_frames": 2, "fps": 4, "width_px": 32, "height_px": 16}
    (copy / "patchbay.json").write_text(json.dumps(defaults))
    decoder = VideoDecoder.load(copy)

    video = decoder.decode(decoder.encode_caption(CAPTION)).medium

    assert video.frames.shape == (2, 16, 32, 3)
    assert video.fps == 4


def test_without_a_word_a_folder_makes_as_many_frames_as_the_diffusers_pipeline(
    folder: Path, tmp_path: Path
) -> None:
    usual = inspect.signature(TextToVideoSDPipeline.__call__).parameters["num_frames"].default
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "patchbay.json").unlink()
    decoder = VideoDecoder.load(copy)

    video = decoder.decode(decoder.encode_caption(CAPTION), DecodeSettings(steps=1)).medium

    assert video.frames.shape == (usual, 16, 16, 3)
    assert video.fps == 8


def test_a_source_keeps_its_frames_in_order(decoder: VideoDecoder) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), dtype=np.uint8)

    source = decoder.encode_source(Video(frames, 8.0))
    reversed_source = decoder.encode_source(Video(frames[::-1], 8.0))

    assert source.shape == (4, 3, 8, 8)
    torch.testing.assert_close(source.flip(1), reversed_source)
    settings = DecodeSettings(seed=1, steps=4, strength=0.5)
    decoded = decoder.decode(decoder.encode_caption(CAPTION), settings, source=source)
    assert decoded.manifest["strength"] == 0.5


def test_an_edit_gets_the_frames_of_its_original_where_they_agree(decoder: VideoDecoder) -> None:
    condition, settings = decoder.encode_caption(CAPTION), DecodeSettings(seed=4, steps=3, num_frames=3)
    anew = decoder.decode(condition, settings).medium
    assert isinstance(anew, Video)
    original = anew.frames.copy()
    original[1] ^= 1
    twice_as_many = Video(original.repeat(2, 0), 16.0)  # frames 0, 2 or 3, and 5 are picked

    edited = decoder.decode(condition, settings, original=twice_as_many)

    assert isinstance(edited.medium, Video)
    np.testing.assert_array_equal(edited.medium.frames, original)
    assert edited.medium.fps == anew.fps
    assert len(edited.manifest["original"]) == 16


def test_a_longer_source_is_sampled_evenly(decoder: VideoDecoder) -> None:
    frames = np.repeat(np.arange(5, dtype=np.uint8)[:, None, None, None] * 51, 16, 1).repeat(16, 2)
    frames = frames.repeat(3, 3)

    source = decoder.encode_source(Video(frames, 30.0))

    torch.testing.assert_close(source, decoder.encode_source(Video(frames[::2], 15.0)))


def test_a_picture_is_no_source_for_a_video(decoder: VideoDecoder) -> None:
    with pytest.raises(ValueError, match="The source is image; this decoder starts from video only"):
        decoder.encode_source(Image(np.zeros((16, 16, 3), np.uint8)))


def test_a_missing_part_is_named(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    shutil.rmtree(copy / "unet")

    with pytest.raises(FileNotFoundError, match=r"unet/config.json is missing"):
        VideoDecoder.load(copy)
