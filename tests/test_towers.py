"""Encoders of the library transformers: what they give, and that it is what the library gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    ClapAudioConfig,
    ClapAudioModelWithProjection,
    ClapFeatureExtractor,
    ClapModel,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from encoders.encoder import Encoder, load_encoder
from encoders.imagebind_encoder import ImageBindEncoder
from encoders.media import Audio, Image, Modality, Video
from encoders.towers import AudioTower, TowerEncoder, TowerNumbers, sound_clips, spread
from llm.checkpoint import Manifest
from llm.model import LanguageModel
from llm.projectors import ProjectorConfig
from llm.template import MediaTokens, Message
from services.presets import SHIPPED
from tests.tiny import tiny_encoder
from tests.tiny_llm import WIDTH, llama, tiny_tokenizer
from tests.tiny_towers import AUDIO_WIDTH, VISION_WIDTH, write_towers, write_vision

IMAGE, VIDEO, AUDIO = Modality.IMAGE, Modality.VIDEO, Modality.AUDIO


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_towers(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TowerEncoder:
    loaded = load_encoder(folder)
    assert isinstance(loaded, TowerEncoder)
    return loaded


def pixels(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def sound(seconds: float, rate: int = 4000, seed: int = 0) -> Audio:
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * rate)).astype(np.float32)
    return Audio(samples, rate)


def test_a_picture_gives_the_states_of_the_library_s_own_model(encoder: TowerEncoder, folder: Path) -> None:
    picture = Image(pixels(16, 16))  # the size of the tower: nothing is resized
    model = SiglipModel.from_pretrained(folder / "vision").eval()

    features = encoder.encode(picture)

    values = torch.from_numpy(picture.pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    expected = model.vision_model(values)
    torch.testing.assert_close(features.tokens, expected.last_hidden_state[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        features.pooled, F.normalize(expected.pooler_output[0], dim=-1), rtol=1e-4, atol=1e-5
    )
    assert (features.grid, features.width) == ((4, 4), VISION_WIDTH)


def test_a_sound_gives_the_states_of_the_library_s_own_model(encoder: TowerEncoder, folder: Path) -> None:
    heard = sound(1.0)
    model = ClapModel.from_pretrained(folder / "audio").eval()
    assert encoder.audio

    features = encoder.encode(heard)

    inputs = encoder.audio.extractor(heard.samples, sampling_rate=4000, return_tensors="pt")
    with torch.no_grad():
        expected = model.audio_model(**inputs)
    states = expected.last_hidden_state[0]  # (E, bands, times)
    torch.testing.assert_close(features.tokens, states.flatten(1).T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        features.pooled, F.normalize(expected.pooler_output[0], dim=-1), rtol=1e-4, atol=1e-5
    )
    assert features.grid == (1, *states.shape[1:])
    assert features.width == AUDIO_WIDTH


def test_a_video_is_read_frame_by_frame(encoder: TowerEncoder) -> None:
    frames = np.stack([pixels(16, 16, seed=i) for i in range(3)])

    video = encoder.encode(Video(frames, 3.0))

    pictures = [encoder.encode(Image(frame)) for frame in frames]
    torch.testing.assert_close(video.tokens, torch.cat([p.tokens for p in pictures]), rtol=1e-4, atol=1e-5)
    mean = torch.stack([p.pooled for p in pictures]).mean(dim=0)
    torch.testing.assert_close(video.pooled, F.normalize(mean, dim=-1), rtol=1e-4, atol=1e-5)
    assert video.grid == (3, 4, 4)


def test_a_batch_gives_what_its_media_give_alone(encoder: TowerEncoder) -> None:
    media = [sound(0.4, seed=1), sound(2.5, seed=2)]

    together = encoder.encode_batch(media)

    for medium, features in zip(media, together, strict=True):
        alone = encoder.encode(medium)
        torch.testing.assert_close(features.tokens, alone.tokens, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(features.pooled, alone.pooled, rtol=1e-4, atol=1e-5)
    assert [features.grid[0] for features in together] == [1, 3]


def test_the_same_sound_gives_the_same_features_twice(encoder: TowerEncoder) -> None:
    np.random.seed(0)
    first = encoder.encode(sound(7.0)).tokens
    np.random.seed(1)
    torch.testing.assert_close(encoder.encode(sound(7.0)).tokens, first, rtol=0, atol=0)


def test_a_fused_clap_draws_nothing_either(tmp_path: Path, folder: Path) -> None:
    shutil.copytree(folder / "audio", tmp_path / "audio")
    config = json.loads((tmp_path / "audio" / "preprocessor_config.json").read_text())
    (tmp_path / "audio" / "preprocessor_config.json").write_text(
        json.dumps(config | {"truncation": "fusion"})
    )
    audio = ClapAudioConfig.from_pretrained(folder / "audio", enable_fusion=True)
    from transformers import ClapAudioModelWithProjection

    torch.manual_seed(0)
    ClapAudioModelWithProjection(audio).save_pretrained(tmp_path / "audio")
    encoder = load_encoder(tmp_path)
    np.random.seed(0)
    first = encoder.encode(sound(0.5)).tokens
    np.random.seed(5)
    torch.testing.assert_close(encoder.encode(sound(0.5)).tokens, first, rtol=0, atol=0)


def test_an_empty_sound_is_silence(encoder: TowerEncoder) -> None:
    nothing = Audio(np.zeros(0, np.float32), 4000)
    silence = Audio(np.zeros(4000, np.float32), 4000)
    torch.testing.assert_close(encoder.encode(nothing).tokens, encoder.encode(silence).tokens)


def test_frames_are_taken_from_the_middles_of_equal_parts() -> None:
    assert spread(100, 4) == [12, 37, 62, 87]
    assert spread(3, 8) == [0, 1, 2]


def test_clips_cover_a_sound_and_the_last_ends_with_it() -> None:
    samples = np.arange(2500, dtype=np.float32) / 2500
    clips = sound_clips(Audio(samples, 1000), 1000, 1.0, 3)
    assert [round(float(clip[0]) * 2500) for clip in clips] == [0, 750, 1500]
    assert clips[-1][-1] == samples[-1]
    assert len(sound_clips(Audio(samples, 1000), 1000, 1.0, 2)) == 2
    assert len(sound_clips(Audio(samples[:900], 1000), 1000, 1.0, 3)) == 1


def test_each_modality_has_its_own_width_and_its_own_projector(encoder: TowerEncoder) -> None:
    media = [Image(pixels(20, 30)), Video(np.stack([pixels(9, 9)] * 2), 2.0), sound(0.7)]
    projectors = {
        medium.modality: ProjectorConfig(
            kind="resampler",
            encoder_width=encoder.width_of(medium.modality),
            llm_width=WIDTH,
            num_queries=3,
            grid=encoder.grid_of(medium.modality),
        )
        for medium in media
    }
    assert len({config.encoder_width for config in projectors.values()}) == 2
    tokenizer = tiny_tokenizer()
    model = LanguageModel(llama(tokenizer.base_vocabulary), tokenizer, projectors)
    features = [encoder.encode(medium) for medium in media]
    parts: list[Any] = [MediaTokens(f.modality, f.tokens, f.pooled) for f in features]

    output = model(
        model.collate([[Message("user", [*parts, "what is this?"]), Message("assistant", ["a bell"])]])
    )

    assert torch.isfinite(output.loss)
    with pytest.raises(ValueError, match=r"image features are 64 wide; this model's projector expects 24"):
        model.collate([[Message("user", [MediaTokens(IMAGE, parts[2].tokens)])]])


@pytest.mark.parametrize("part", ["vision", "audio"])
def test_one_tower_alone_reads_its_own_media_only(folder: Path, tmp_path: Path, part: str) -> None:
    shutil.copytree(folder / part, tmp_path / part)
    encoder = load_encoder(tmp_path)
    assert encoder.modalities == ({IMAGE, VIDEO} if part == "vision" else {AUDIO})
    other = sound(0.1) if part == "vision" else Image(pixels(4, 4))
    with pytest.raises(ValueError, match=f"cannot read {other.modality}; it reads"):
        encoder.encode(other)


def test_numbers_of_towers_json_are_followed_and_checked(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "e")
    (tmp_path / "e" / "towers.json").write_text('{"video_frames": 2, "audio_clips": 1}')
    encoder = load_encoder(tmp_path / "e")
    assert encoder.encode(Video(np.stack([pixels(8, 8)] * 5), 5.0)).grid == (2, 4, 4)
    assert encoder.encode(sound(3.0)).grid[0] == 1
    (tmp_path / "e" / "towers.json").write_text('{"frames": 2}')
    with pytest.raises(ValueError, match=r"towers.json: .*frames.*Expected a JSON object with video_frames"):
        load_encoder(tmp_path / "e")
    with pytest.raises(ValueError, match="audio_clips is 0; expected a whole number"):
        TowerNumbers(audio_clips=0)


def test_what_does_not_fit_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        TowerEncoder.from_pretrained(tmp_path)
    broken = tmp_path / "e"
    shutil.copytree(folder, broken)
    (broken / "audio" / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"audio.preprocessor_config.json is missing"):
        load_encoder(broken)
    shutil.rmtree(broken / "audio")
    config = json.loads((broken / "vision" / "config.json").read_text())
    (broken / "vision" / "config.json").write_text(json.dumps(config | {"model_type": "siglip2"}))
    with pytest.raises(ValueError, match=r"of the type 'siglip2'; expected siglip"):
        load_encoder(broken)
    vision = dict(config["vision_config"], hidden_size=32)
    (broken / "vision" / "config.json").write_text(json.dumps(config | {"vision_config": vision}))
    with pytest.raises(ValueError, match=r"has shape .*; expected"):
        load_encoder(broken)
    (broken / "vision" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors is missing"):
        load_encoder(broken)


def test_a_processor_of_another_resolution_is_refused(folder: Path, tmp_path: Path) -> None:
    write_vision(tmp_path / "vision")
    shutil.copytree(folder / "vision", tmp_path / "other")
    processor = json.loads((tmp_path / "vision" / "preprocessor_config.json").read_text())
    processor["size"] = {"height": 32, "width": 32}
    (tmp_path / "vision" / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(ValueError, match="this tower reads 16 x 16"):
        load_encoder(tmp_path)


def test_a_folder_says_by_its_files_which_encoder_it_holds(tmp_path: Path) -> None:
    tiny_encoder().save_pretrained(tmp_path)
    encoder: Encoder = load_encoder(tmp_path)
    assert isinstance(encoder, ImageBindEncoder)
    assert encoder.width_of(IMAGE) == encoder.width_of(AUDIO) == 16
    assert (encoder.grid_of(IMAGE), encoder.grid_of(AUDIO)) == ((2, 2), (2, 4))


def test_the_published_siglip_2_has_the_sizes_that_its_projector_needs() -> None:
    # config.json of google/siglip2-so400m-patch14-384
    sizes = {"hidden_size": 1152, "image_size": 384, "intermediate_size": 4304, "patch_size": 14}
    layers = {"num_attention_heads": 16, "num_hidden_layers": 27}
    with torch.device("meta"):
        model = SiglipVisionModel(SiglipVisionConfig(**sizes, **layers))
        output = model(torch.zeros(1, 3, 384, 384))
    assert output.last_hidden_state.shape == (1, 27 * 27, 1152)
    assert output.pooler_output.shape == (1, 1152)


def test_the_published_clap_has_the_sizes_that_its_projector_needs() -> None:
    # config.json of laion/larger_clap_general; what it leaves out is the library's own
    folder = SHIPPED / "open-8b"
    values = json.loads((folder / "encoder" / "audio" / "config.json").read_text())
    manifest = Manifest.model_validate_json((folder / "llm" / "bridge.json").read_bytes())
    projector = manifest.projector_configs[AUDIO]
    with torch.device("meta"):
        tower = AudioTower(
            ClapAudioModelWithProjection(ClapAudioConfig(**values["audio_config"])), ClapFeatureExtractor()
        )
        output = tower.model(torch.zeros(1, 1, 1001, 64), is_longer=torch.zeros(1, 1, dtype=torch.bool))
    assert output.last_hidden_state.shape == (1, 1024, 2, 32)
    assert (tower.width, tower.grid) == (projector.encoder_width, projector.grid) == (1024, (2, 32))


def test_the_published_qwen3_has_the_sizes_that_the_bridge_needs() -> None:
    folder = SHIPPED / "open-8b" / "llm"
    values = json.loads((folder / "base" / "config.json").read_text())
    manifest = Manifest.model_validate_json((folder / "bridge.json").read_bytes())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
        states = model.model(inputs_embeds=torch.zeros(1, 3, manifest.llm_width)).last_hidden_state
    assert states.shape == (1, 3, manifest.llm_width)
    rows, width = model.get_input_embeddings().weight.shape
    assert (model.config.head_dim, width) == (128, manifest.llm_width)
    assert rows >= manifest.base_vocabulary == 151_669  # the rows behind the tokenizer's are for padding
    assert {config.llm_width for config in manifest.projector_configs.values()} == {width}
