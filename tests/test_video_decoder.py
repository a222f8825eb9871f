import json
import shutil
import threading
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from diffusers import TextToVideoSDPipeline

from decoders.condition import ConditionSpec
from decoders.denoising import Cancelled, denoise, draw_noise, make_scheduler
from decoders.settings import SCHEDULER_NAMES, DecodeSettings
from decoders.stacked_video import TextToStackedVideoPipeline, predict_stacked
from decoders.video import VideoDecoder
from encoders.media import Image, Video
from tests import tiny_pipelines

CAPTION = "a big red bell"


@pytest.fixture(scope="module")
def unet_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.saved(tiny_pipelines.unet_video_pipeline(), tmp_path_factory.mktemp("unet"))


@pytest.fixture(scope="module")
def stacked_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipeline = tiny_pipelines.stacked_video_pipeline()
    return tiny_pipelines.saved(pipeline, tmp_path_factory.mktemp("stacked"))


@pytest.fixture(scope="module")
def unet_decoder(unet_folder: Path) -> VideoDecoder:
    return VideoDecoder.load(unet_folder)


@pytest.fixture(scope="module")
def decoder(stacked_folder: Path) -> VideoDecoder:
    return VideoDecoder.load(stacked_folder)


@pytest.mark.parametrize("name", SCHEDULER_NAMES)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_unet_latents_equal_those_of_the_diffusers_pipeline(
    unet_folder: Path, unet_decoder: VideoDecoder, name: str, guidance: float
) -> None:
    pipeline = TextToVideoSDPipeline.from_pretrained(unet_folder)
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
        unet_decoder._predict,
        make_scheduler(pipeline.scheduler.config, name),
        draw_noise((4, 3, 8, 8), [5]),
        unet_decoder.encode_caption(CAPTION).embeddings[None],
        unet_decoder._null,
        steps=5,
        guidance=[guidance],
    )

    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=0)


def test_unet_frames_equal_those_of_the_diffusers_pipeline(
    unet_folder: Path, unet_decoder: VideoDecoder
) -> None:
    pipeline = TextToVideoSDPipeline.from_pretrained(unet_folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = make_scheduler(pipeline.scheduler.config, "dpmsolver++")
    expected = pipeline(
        CAPTION,
        num_frames=3,
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(5),
    ).frames[0]

    settings = DecodeSettings(seed=5, steps=4, guidance_scale=3.0, num_frames=3)
    decoded = unet_decoder.decode(unet_decoder.encode_caption(CAPTION), settings)

    assert isinstance(decoded.medium, Video)
    assert decoded.medium.frames.shape == (3, 64, 64, 3)
    assert decoded.medium.fps == 8.0
    np.testing.assert_allclose(decoded.medium.frames, np.round(expected * 255), atol=1)


@pytest.mark.parametrize("name", SCHEDULER_NAMES)
def test_stacked_frames_equal_those_of_its_pipeline(
    stacked_folder: Path, decoder: VideoDecoder, name: str
) -> None:
    pipeline = TextToStackedVideoPipeline.from_pretrained(stacked_folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = make_scheduler(pipeline.scheduler.config, name)
    expected = pipeline(
        CAPTION, num_inference_steps=4, guidance_scale=3.0, generator=torch.Generator().manual_seed(5)
    )[0]

    settings = DecodeSettings(seed=5, steps=4, guidance_scale=3.0, scheduler=name)
    decoded = decoder.decode(decoder.encode_caption(CAPTION), settings)

    assert decoded.medium.frames.shape == (8, 16, 16, 3)
    np.testing.assert_allclose(decoded.medium.frames, np.round(expected * 255), atol=1)


def test_stacked_pipeline_loads_what_it_saved(stacked_folder: Path, tmp_path: Path) -> None:
    first = TextToStackedVideoPipeline.from_pretrained(stacked_folder)
    first.save_pretrained(tmp_path)

    again = TextToStackedVideoPipeline.from_pretrained(tmp_path)

    assert (again.config.sample_size, again.config.num_frames, again.config.fps) == (8, 8, 8.0)
    for name, value in first.unet.state_dict().items():
        torch.testing.assert_close(again.unet.state_dict()[name], value)


@pytest.mark.parametrize(
    ("part", "settings", "message"),
    [
        ("unet", {"in_channels": 4}, "takes 4 channels and gives 32; expected 32 of both: 8 frames of 4"),
        ("scheduler", {"prediction_type": "epsilon"}, "expects 'epsilon'; expected 'sample'"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(
    stacked_folder: Path, part: str, settings: dict[str, Any], message: str
) -> None:
    parts = TextToStackedVideoPipeline.from_pretrained(stacked_folder).components
    parts[part].register_to_config(**settings)

    with pytest.raises(ValueError, match=message):
        TextToStackedVideoPipeline(**parts)


def test_the_skip_lets_a_clean_clip_through_and_stops_noise() -> None:
    unet = Mock(return_value=(torch.zeros(3, 8, 4, 4),))
    clip, conditions = torch.randn(3, 2, 4, 4, 4), torch.zeros(3, 1, 1)
    schedule = torch.tensor([1.0, 0.64, 0.0])  # signal 1, 0.8, 0; noise 0, 0.6, 1

    predicted = predict_stacked(unet, clip, torch.tensor([0, 1, 2]), conditions, schedule)

    torch.testing.assert_close(predicted[0], clip[0])
    torch.testing.assert_close(predicted[1], 0.8 * 0.4**6 * clip[1])
    assert not predicted[2].any()
    assert unet.call_args.args[0].shape == (3, 8, 4, 4)


def test_stacked_channels_are_the_frames_of_each_latent_channel_in_turn() -> None:
    unet = Mock(side_effect=lambda stacked, *args, **more: (stacked,))
    clip = torch.arange(2 * 4.0).reshape(1, 2, 4, 1, 1)  # (B, C, F, H, W)
    noise_alone = torch.zeros(1)

    predicted = predict_stacked(unet, clip, torch.tensor(0), torch.zeros(1, 1, 1), noise_alone)

    torch.testing.assert_close(predicted, clip)
    assert unet.call_args.args[0].flatten().tolist() == list(range(8))


@pytest.mark.parametrize("kind", ["unet", "stacked"])
def test_the_condition_is_a_sequence_of_text_states(
    unet_decoder: VideoDecoder, decoder: VideoDecoder, kind: str
) -> None:
    chosen = unet_decoder if kind == "unet" else decoder

    assert chosen.condition_spec == ConditionSpec(tokens=8, width=16, pooled=False)
    assert chosen.encode_caption(CAPTION).embeddings.shape == (8, 16)


def test_the_manifest_suffices_to_make_the_video_again(decoder: VideoDecoder) -> None:
    condition = decoder.encode_caption(CAPTION)
    first = decoder.decode(condition, DecodeSettings(steps=2))
    kept = json.loads(json.dumps(first.manifest))

    names = ("seed", "scheduler", "steps", "guidance_scale", "width_px", "height_px", "num_frames")
    again = decoder.decode(condition, DecodeSettings(**{name: kept[name] for name in names}))

    np.testing.assert_array_equal(first.medium.frames, again.medium.frames)
    assert (kept["num_frames"], kept["fps"]) == (8, 8.0)


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
        (DecodeSettings(num_frames=6), "num_frames is 6; this decoder makes 8. Ask for that"),
        (DecodeSettings(width_px=17), "width_px is 17; this decoder makes multiples of 2"),
        (DecodeSettings(duration_s=2.0), "this decoder has no duration_s"),
    ],
)
def test_sizes_that_cannot_be_made_are_named(
    decoder: VideoDecoder, settings: DecodeSettings, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        decoder.decode(decoder.encode_caption(CAPTION), settings)


def test_sizes_and_frame_rate_default_to_the_folders(unet_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(unet_folder, tmp_path / "copy"))
    defaults = {"steps": 1, "guidance_scale": 1, "num_frames": 2, "fps": 4, "width_px": 32, "height_px": 16}
    (folder / "patchbay.json").write_text(json.dumps(defaults))
    decoder = VideoDecoder.load(folder)

    video = decoder.decode(decoder.encode_caption(CAPTION)).medium

    assert video.frames.shape == (2, 16, 32, 3)
    assert video.fps == 4


def test_a_source_keeps_its_frames_in_order(decoder: VideoDecoder) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3), dtype=np.uint8)

    source = decoder.encode_source(Video(frames, 8.0))
    reversed_source = decoder.encode_source(Video(frames[::-1], 8.0))

    assert source.shape == (4, 8, 8, 8)
    torch.testing.assert_close(source.flip(1), reversed_source)
    settings = DecodeSettings(seed=1, steps=4, strength=0.5)
    decoded = decoder.decode(decoder.encode_caption(CAPTION), settings, source=source)
    assert decoded.manifest["strength"] == 0.5


def test_a_longer_source_is_sampled_evenly(decoder: VideoDecoder) -> None:
    frames = np.repeat(np.arange(15, dtype=np.uint8)[:, None, None, None] * 17, 16, 1).repeat(16, 2)
    frames = frames.repeat(3, 3)

    source = decoder.encode_source(Video(frames, 30.0))

    torch.testing.assert_close(source, decoder.encode_source(Video(frames[::2], 15.0)))


def test_a_picture_is_no_source_for_a_video(decoder: VideoDecoder) -> None:
    with pytest.raises(ValueError, match="The source is image; this decoder starts from video only"):
        decoder.encode_source(Image(np.zeros((16, 16, 3), np.uint8)))


def test_a_missing_part_is_named(stacked_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stacked_folder, tmp_path / "copy"))
    shutil.rmtree(folder / "unet")

    with pytest.raises(FileNotFoundError, match=r"unet/config.json is missing"):
        VideoDecoder.load(folder)


def test_a_pipeline_folder_without_its_sizes_is_named(stacked_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stacked_folder, tmp_path / "copy"))
    index = json.loads((folder / "model_index.json").read_text())
    del index["num_frames"]
    (folder / "model_index.json").write_text(json.dumps(index))

    with pytest.raises(ValueError, match="num_frames"):
        VideoDecoder.load(folder)
