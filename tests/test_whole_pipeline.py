import ast
import inspect
import json
import threading
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from decoders.condition import Condition, ConditionSpec
from decoders.denoising import Cancelled
from decoders.pipeline_arguments import ENCODED
from decoders.pipeline_folder import PipelineFolder
from decoders.settings import DecodeSettings
from decoders.whole_pipeline import WholePipeline
from encoders.media import Audio, Image, Modality, Video
from tests import tiny_pipelines
from tests.tiny_pipelines import TOKENS, WIDTH

CAPTION = "a big red bell"


@pytest.fixture(scope="module")
def xl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.saved(tiny_pipelines.xl_pipeline(), tmp_path_factory.mktemp("xl"))


@pytest.fixture(scope="module")
def xl(xl_folder: Path) -> WholePipeline:
    return WholePipeline.load(xl_folder)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> WholePipeline:
    folder = tmp_path_factory.mktemp("video")
    return WholePipeline.load(tiny_pipelines.saved(tiny_pipelines.video_pipeline(), folder))


@pytest.fixture(scope="module")
def audio(tmp_path_factory: pytest.TempPathFactory) -> WholePipeline:
    folder = tmp_path_factory.mktemp("audio")
    return WholePipeline.load(tiny_pipelines.saved(tiny_pipelines.audio_pipeline(), folder))


@pytest.fixture
def folder(tmp_path: Path) -> PipelineFolder:
    (tmp_path / "model_index.json").write_text('{"_class_name": "OwnPipeline"}')
    return PipelineFolder(tmp_path)


def called(pipeline: Any, **arguments: Any) -> Any:
    """Call the diffusers pipeline as its users do."""
    generator = torch.Generator("cpu").manual_seed(7)
    return pipeline(CAPTION, generator=generator, output_type="np", num_inference_steps=3, **arguments)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_picture_from_embeddings_equals_the_pipeline_called_with_the_words(
    xl: WholePipeline, guidance: float
) -> None:
    settings = DecodeSettings(seed=7, steps=3, guidance_scale=guidance, width_px=24)

    decoded = xl.decode(xl.encode_caption(CAPTION), settings)

    expected = called(tiny_pipelines.xl_pipeline(), guidance_scale=guidance, width=24).images[0]
    assert isinstance(decoded.medium, Image)
    assert decoded.medium.pixels.shape == (16, 24, 3)
    np.testing.assert_array_equal(decoded.medium.pixels, (expected * 255).round().astype(np.uint8))


def test_a_video_from_words_equals_the_pipeline(video: WholePipeline) -> None:
    decoded = video.decode(
        video.encode_caption(CAPTION), DecodeSettings(seed=7, steps=3, guidance_scale=2.0, num_frames=3)
    )

    expected = called(tiny_pipelines.video_pipeline(), guidance_scale=2.0, num_frames=3).frames[0]
    assert isinstance(decoded.medium, Video)
    np.testing.assert_array_equal(decoded.medium.frames, (expected * 255).round().astype(np.uint8))


def test_a_sound_from_words_equals_the_pipeline(audio: WholePipeline) -> None:
    settings = DecodeSettings(seed=7, steps=3, guidance_scale=2.0, duration_s=0.05)
    decoded = audio.decode(audio.encode_caption(CAPTION), settings)

    pipeline = tiny_pipelines.audio_pipeline()
    expected = called(pipeline, guidance_scale=2.0, audio_length_in_s=0.05).audios[0]
    assert isinstance(decoded.medium, Audio)
    assert decoded.medium.rate == 16000
    np.testing.assert_array_equal(decoded.medium.samples, expected.clip(-1, 1))


def test_what_conditions_a_pipeline_is_derived_from_it(xl: WholePipeline, audio: WholePipeline) -> None:
    assert xl.condition_specs == {
        "prompt_embeds": ConditionSpec(tokens=TOKENS, width=2 * WIDTH),
        "pooled_prompt_embeds": ConditionSpec(tokens=1, width=WIDTH, pooled=True),
    }
    assert xl.condition_spec == xl.condition_specs["prompt_embeds"]
    assert audio.condition_specs == {}
    with pytest.raises(ValueError, match="AudioLDMPipeline is conditioned on words"):
        _ = audio.condition_spec


def test_the_modality_follows_from_what_the_pipeline_takes(
    xl: WholePipeline, video: WholePipeline, audio: WholePipeline
) -> None:
    assert [each.modality for each in (xl, video, audio)] == [Modality.IMAGE, Modality.VIDEO, Modality.AUDIO]


@pytest.mark.parametrize("name", ENCODED)
def test_the_named_results_of_encode_prompt_are_those_of_the_installed_diffusers(name: str) -> None:
    source = inspect.getsource(getattr(diffusers, name).encode_prompt)
    [answer] = [node for node in ast.walk(ast.parse(source.lstrip())) if isinstance(node, ast.Return)]
    assert isinstance(answer.value, ast.Tuple)
    assert tuple(ast.unparse(part) for part in answer.value.elts) == ENCODED[name]


@pytest.mark.parametrize("kind", ["xl", "audio"])
def test_a_stop_ends_the_pipeline_after_the_step(kind: str, request: pytest.FixtureRequest) -> None:
    decoder: WholePipeline = request.getfixturevalue(kind)
    stop, seen = threading.Event(), []

    def on_step(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 2:
            stop.set()

    with pytest.raises(Cancelled):
        decoder.decode(decoder.encode_caption(CAPTION), DecodeSettings(steps=9), on_step, stop)
    assert seen == [(1, 9), (2, 9)]

    assert decoder.decode(decoder.encode_caption(CAPTION), DecodeSettings(steps=1)).medium


def test_the_manifest_makes_the_same_medium_again(xl: WholePipeline) -> None:
    condition = xl.encode_caption(CAPTION)
    first = xl.decode(condition, DecodeSettings(steps=2, height_px=16, width_px=16))

    names = ("seed", "steps", "guidance_scale", "width_px", "height_px")
    again = xl.decode(condition, DecodeSettings(**{name: first.manifest[name] for name in names}))

    assert first.manifest["pipeline"] == "StableDiffusionXLPipeline"
    assert first.manifest["scheduler"] == "EulerDiscreteScheduler"
    assert again.manifest == first.manifest
    assert isinstance(first.medium, Image)
    assert isinstance(again.medium, Image)
    np.testing.assert_array_equal(first.medium.pixels, again.medium.pixels)


def test_defaults_come_from_the_pipeline_and_the_file_beside_it(xl: WholePipeline, xl_folder: Path) -> None:
    assert (xl.defaults.steps, xl.defaults.guidance_scale) == (50, 5.0)
    file = xl_folder / "patchbay.json"
    file.write_text(json.dumps({"steps": 4, "guidance_scale": 3.0}))
    try:
        plan = WholePipeline.load(xl_folder).plan(xl.encode_caption(CAPTION))
    finally:
        file.unlink()
    assert (plan.settings.steps, plan.settings.guidance_scale) == (4, 3.0)


def test_a_condition_that_does_not_fit_is_refused(xl: WholePipeline, audio: WholePipeline) -> None:
    good = xl.encode_caption(CAPTION)
    with pytest.raises(ValueError, match=r"shape \(1, 16\); this decoder expects"):
        xl.plan(Condition(torch.zeros(1, WIDTH), good.named))
    with pytest.raises(ValueError, match="lacks pooled_prompt_embeds"):
        xl.plan(Condition(good.embeddings))
    with pytest.raises(ValueError, match=r"pooled_prompt_embeds of shape \(3,\)"):
        xl.plan(Condition(good.embeddings, {"pooled_prompt_embeds": torch.zeros(3)}))
    with pytest.raises(ValueError, match="holds no caption"):
        audio.plan(good if good.caption is None else Condition(good.embeddings))


def test_settings_that_the_pipeline_does_not_know_are_refused(xl: WholePipeline) -> None:
    condition = xl.encode_caption(CAPTION)
    with pytest.raises(ValueError, match="num_frames is 3"):
        xl.plan(condition, DecodeSettings(num_frames=3))
    with pytest.raises(ValueError, match="keeps its own scheduler"):
        xl.plan(condition, DecodeSettings(scheduler="ddim"))
    with pytest.raises(ValueError, match="keep_untouched is true; a StableDiffusionXLPipeline"):
        xl.plan(condition, DecodeSettings(keep_untouched=True))


def test_a_folder_of_an_unknown_class_or_with_a_missing_part_is_refused(
    xl_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    with pytest.raises(ValueError, match="holds a NoSuchPipeline; diffusers"):
        WholePipeline.load(tmp_path)

    (tmp_path / "model_index.json").write_text((xl_folder / "model_index.json").read_text())
    with pytest.raises(ValueError, match="cannot be loaded as StableDiffusionXLPipeline"):
        WholePipeline.load(tmp_path)


def test_a_pipeline_that_cannot_be_stopped_or_told_is_refused(folder: PipelineFolder) -> None:
    class Deaf:
        def __call__(self, prompt: str, num_inference_steps: int = 5) -> None: ...

    class Mute:
        def __call__(self, class_labels: list[int], callback: Any = None) -> None: ...

    with pytest.raises(ValueError, match="calls nobody after its steps"):
        WholePipeline(Deaf(), folder)
    with pytest.raises(ValueError, match="takes no prompt"):
        WholePipeline(Mute(), folder)


def test_guidance_goes_to_the_argument_that_guides(folder: PipelineFolder) -> None:
    asked: list[dict[str, Any]] = []

    class Answer:
        images = np.zeros((1, 8, 8, 3))

    class Distilled:
        scheduler = None

        def __call__(
            self,
            prompt: str,
            negative_prompt: str | None = None,
            true_cfg_scale: float = 1.0,
            guidance_scale: float = 3.5,
            callback_on_step_end: Any = None,
        ) -> Answer:
            asked.append({"away": negative_prompt, "true": true_cfg_scale, "scale": guidance_scale})
            return Answer()

    class Guided(Distilled):
        def __call__(
            self,
            prompt: str,
            negative_prompt: str | None = None,
            true_cfg_scale: float = 4.0,
            guidance_scale: float | None = None,
            callback_on_step_end: Any = None,
        ) -> Answer:
            return super().__call__(prompt, negative_prompt, true_cfg_scale, guidance_scale or 0.0)

    for kind in (Distilled, Guided):
        decoder = WholePipeline(kind(), folder)
        decoder.decode(decoder.encode_caption(CAPTION), DecodeSettings(guidance_scale=2.0))

    assert asked == [
        {"away": None, "true": 1.0, "scale": 2.0},
        {"away": " ", "true": 2.0, "scale": 0.0},
    ]
