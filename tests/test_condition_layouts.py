"""What pipelines are conditioned on: from their configurations, in numbers and end to end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from decoders.condition import ConditionSpec
from decoders.condition_layouts import condition_layout
from decoders.projection import OutputProjection, OutputProjectionConfig
from decoders.settings import DecodeSettings
from decoders.text_readers import round_mask
from decoders.whole_pipeline import WholePipeline
from encoders.media import Audio, Image, Modality, Video
from services.boxes import SpokenSignal
from services.links import SignalLink
from services.presets import SHIPPED
from tests import tiny_current
from tests.tiny_pipelines import TOKENS, WIDTH

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
LLM_WIDTH = 8
WISHES: Mapping[str, Mapping[str, Any]] = {
    "xl": {},
    "klein": {"width_px": 32, "height_px": 32},
    "wan": {"width_px": 16, "height_px": 16, "num_frames": 5},
    "ltx": {"width_px": 32, "height_px": 32, "num_frames": 9},
    "stable-audio": {"duration_s": 0.5},
    "audioldm2": {"duration_s": 0.05},
}
SPECS: Mapping[str, Mapping[str, ConditionSpec]] = {
    "xl": {
        "prompt_embeds": ConditionSpec(tokens=TOKENS, width=2 * WIDTH),
        "pooled_prompt_embeds": ConditionSpec(tokens=1, width=WIDTH, pooled=True),
    },
    "klein": {"prompt_embeds": ConditionSpec(tokens=512, width=3 * tiny_current.KLEIN_WIDTH)},
    "wan": {"prompt_embeds": ConditionSpec(tokens=512, width=WIDTH)},
    "ltx": {
        "prompt_embeds": ConditionSpec(tokens=128, width=WIDTH),
        "prompt_attention_mask": ConditionSpec(tokens=1, width=128),
    },
    "stable-audio": {
        "prompt_embeds": ConditionSpec(tokens=TOKENS, width=WIDTH),
        "attention_mask": ConditionSpec(tokens=1, width=TOKENS),
    },
    "audioldm2": {
        "prompt_embeds": ConditionSpec(tokens=2 * TOKENS, width=WIDTH),
        "generated_prompt_embeds": ConditionSpec(tokens=4, width=WIDTH),
        "attention_mask": ConditionSpec(tokens=1, width=2 * TOKENS),
    },
}


@pytest.fixture(scope="module", params=SPECS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def decoder(name: str, tmp_path_factory: pytest.TempPathFactory) -> WholePipeline:
    return WholePipeline.load(tiny_current.write(name, tmp_path_factory.mktemp(name)))


def values(medium: Image | Video | Audio) -> Any:
    return {"image": "pixels", "video": "frames", "audio": "samples"}[medium.modality]


def test_a_signal_becomes_a_medium_through_a_projection_of_the_right_shape(
    name: str, decoder: WholePipeline, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = OutputProjectionConfig.for_decoder(
        decoder.condition_specs,
        LLM_WIDTH,
        hidden_width=8,
        ffn_width=8,
        num_encoder_layers=1,
        num_decoder_layers=1,
    )
    OutputProjection(config).save_pretrained(tmp_path)
    link = SignalLink(tmp_path, decoder.condition_specs)
    states = np.random.default_rng(0).normal(size=(2, 4, LLM_WIDTH)).astype(np.float32)

    first, second = (
        decoder.decode(
            link.condition(SpokenSignal(decoder.modality, "a bell", states[i], states[i])),
            DecodeSettings(seed=1, steps=2, guidance_scale=2.0, **WISHES[name]),
        ).medium
        for i in (0, 1)
    )

    assert decoder.condition_specs == SPECS[name]
    assert first.modality == second.modality == decoder.modality
    shown, other = getattr(first, values(first)), getattr(second, values(second))
    assert shown.shape == other.shape
    assert not np.array_equal(shown, other), "the condition has no effect"


def test_a_gate_above_zero_asks_for_a_copy(name: str, decoder: WholePipeline, tmp_path: Path) -> None:
    config = OutputProjectionConfig.for_decoder(
        decoder.condition_specs, LLM_WIDTH, hidden_width=8, ffn_width=8, copy_gate=True
    )
    projection = OutputProjection(config)
    torch.nn.init.ones_(projection.copy_gate.weight)
    torch.nn.init.zeros_(projection.copy_gate.bias)
    projection.save_pretrained(tmp_path)
    link = SignalLink(tmp_path, decoder.condition_specs)
    states = np.ones((4, LLM_WIDTH), np.float32)

    asked, not_asked = (
        link.condition(SpokenSignal(decoder.modality, "a bell", sign * states, states)) for sign in (1, -1)
    )

    assert asked.copied
    assert not not_asked.copied


def test_a_caption_makes_what_the_pipeline_itself_makes_of_the_words(
    name: str, decoder: WholePipeline
) -> None:
    settings = DecodeSettings(seed=3, steps=2, guidance_scale=2.0, **WISHES[name])

    made = decoder.decode(decoder.encode_caption("a big red bell"), settings).medium

    pipeline = tiny_current.PIPELINES[name]()
    pipeline.set_progress_bar_config(disable=True)
    names = {"width_px": "width", "height_px": "height", "duration_s": "audio_length_in_s"}
    if name == "stable-audio":
        names["duration_s"] = "audio_end_in_s"
    wishes = {names.get(wish, wish): value for wish, value in WISHES[name].items()}
    with torch.inference_mode():
        answer = pipeline(
            prompt="a big red bell",
            generator=torch.Generator("cpu").manual_seed(3),
            num_inference_steps=2,
            guidance_scale=2.0,
            output_type="np",
            **wishes,
        )
    if isinstance(made, Audio):
        expected = np.asarray(answer.audios[0], dtype=np.float32)
        expected = expected.mean(axis=0) if expected.ndim == 2 else expected
        np.testing.assert_allclose(made.samples, expected.clip(-1, 1), atol=1e-4)
    else:
        expected = np.asarray(answer.images[0] if isinstance(made, Image) else answer.frames[0])
        shown = made.pixels if isinstance(made, Image) else made.frames
        assert np.abs(shown.astype(int) - (expected * 255).round().astype(int)).max() <= 1


def test_parts_that_do_not_belong_together_are_refused(name: str, decoder: WholePipeline) -> None:
    if name == "audioldm2":
        pytest.skip("its network says nothing about the width of the text states")

    def read(file: str) -> dict[str, Any]:
        found = decoder.folder.json(file)
        if file.startswith("text_encoder"):
            widths = {
                key: found[key] + 1 for key in ("hidden_size", "d_model", "projection_dim") if key in found
            }
            found |= widths
        return found

    with pytest.raises(ValueError, match="The parts do not belong together"):
        condition_layout(decoder.folder.pipeline_class, read)


def test_a_number_that_is_missing_is_named(decoder: WholePipeline) -> None:
    with pytest.raises(ValueError, match=r"\.json of this .*Pipeline gives no number for"):
        condition_layout(decoder.folder.pipeline_class, lambda file: {})


def test_a_class_that_is_not_known_has_no_layout() -> None:
    assert condition_layout("AceStepPipeline", lambda file: {}) == {}


def test_a_mask_is_rounded_and_never_empty() -> None:
    assert round_mask(torch.tensor([[0.9, 0.51, 0.49, -3.0]])).tolist() == [1, 1, 0, 0]
    assert round_mask(torch.tensor([[0.1, 0.2]])).tolist() == [1, 0]


# --- true size, on the meta device: config.json values of the published pipelines ---------------------

SDXL = {
    "text_encoder": {"hidden_size": 768},
    "text_encoder_2": {"hidden_size": 1280, "projection_dim": 1280},
    "tokenizer": {"model_max_length": 77},
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "projection_class_embeddings_input_dim": 2816,
        "sample_size": 128,
        "transformer_layers_per_block": [1, 2, 10],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "use_linear_projection": True,
    },
}
LTX = {
    "text_encoder": {"d_model": 4096},
    "transformer": {
        "_class_name": "LTXVideoTransformer3DModel",
        "attention_head_dim": 64,
        "caption_channels": 4096,
        "cross_attention_dim": 2048,
        "in_channels": 128,
        "num_attention_heads": 32,
        "num_layers": 28,
        "out_channels": 128,
    },
}
AUDIOLDM2 = {
    "text_encoder_2": {"d_model": 1024},
    "tokenizer_2": {"model_max_length": 512},
    "language_model": {"n_embd": 768, "max_new_tokens": 8},
}


def reader(configs: Mapping[str, Mapping[str, Any]]) -> Any:
    return lambda file: configs.get(file.partition("/")[0], {})


def shipped(part: str) -> Any:
    folder = SHIPPED / "open-8b" / part
    return lambda file: json.loads((folder / file).read_text())


def network(config: Mapping[str, Any]) -> Any:
    with torch.device("meta"):
        return getattr(diffusers, config["_class_name"]).from_config(dict(config)).eval()


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, device="meta")


def given(layout: Mapping[str, ConditionSpec], name: str = "prompt_embeds") -> Tensor:
    return zeros(1, layout[name].tokens, layout[name].width)


def test_sdxl_takes_77_tokens_of_2048_and_a_vector_of_1280_at_true_size() -> None:
    layout = condition_layout("StableDiffusionXLPipeline", reader(SDXL))
    assert [(spec.tokens, spec.width) for spec in layout.values()] == [(77, 2048), (1, 1280)]
    added = {"text_embeds": given(layout, "pooled_prompt_embeds")[:, 0], "time_ids": zeros(1, 6)}
    out = network(SDXL["unet"])(zeros(1, 4, 8, 8), 1, given(layout), added_cond_kwargs=added).sample
    assert out.shape == (1, 4, 8, 8)


def test_ltx_takes_128_tokens_of_4096_at_true_size() -> None:
    layout = condition_layout("LTXPipeline", reader(LTX))
    assert [(spec.tokens, spec.width) for spec in layout.values()] == [(128, 4096), (1, 128)]
    out = network(LTX["transformer"])(
        zeros(1, 12, 128), given(layout), torch.ones(1, device="meta"), zeros(1, 128), 2, 2, 3
    ).sample
    assert out.shape == (1, 12, 128)


def test_audioldm_2_takes_t5_and_gpt2_states() -> None:
    layout = condition_layout("AudioLDM2Pipeline", reader(AUDIOLDM2))
    assert {name: (spec.tokens, spec.width) for name, spec in layout.items()} == {
        "prompt_embeds": (512, 1024),
        "generated_prompt_embeds": (8, 768),
        "attention_mask": (1, 512),
    }


def test_the_image_decoder_of_the_open_preset_takes_512_tokens_of_7680_at_true_size() -> None:
    read = shipped("image")
    layout = condition_layout("Flux2KleinPipeline", read)
    assert layout == {"prompt_embeds": ConditionSpec(tokens=512, width=7680)}
    out = network(read("transformer/config.json"))(
        hidden_states=zeros(1, 16, 128),
        encoder_hidden_states=given(layout),
        timestep=torch.ones(1, device="meta"),
        img_ids=zeros(1, 16, 4),
        txt_ids=zeros(1, 512, 4),
    ).sample
    assert out.shape == (1, 16, 128)


def test_the_video_decoder_of_the_open_preset_takes_512_tokens_of_4096_at_true_size() -> None:
    read = shipped("video")
    layout = condition_layout("WanPipeline", read)
    assert layout == {"prompt_embeds": ConditionSpec(tokens=512, width=4096)}
    out = network(read("transformer/config.json"))(
        zeros(1, 16, 3, 8, 8), torch.ones(1, device="meta"), given(layout)
    ).sample
    assert out.shape == (1, 16, 3, 8, 8)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_the_audio_decoder_of_the_open_preset_takes_128_tokens_of_768_at_true_size() -> None:
    read = shipped("audio")
    layout = condition_layout("StableAudioPipeline", read)
    assert layout["prompt_embeds"] == ConditionSpec(tokens=128, width=768)
    projected = network(read("projection_model/config.json"))(
        text_hidden_states=given(layout)
    ).text_hidden_states
    states = torch.cat([projected, zeros(1, 2, 768)], dim=1)  # start and end of the sound behind the text
    out = network(read("transformer/config.json"))(
        zeros(1, 64, 32), torch.ones(1, device="meta"), states, zeros(1, 1, 1536),
        rotary_embedding=(zeros(33, 32), zeros(33, 32)), return_dict=False,
    )[0]  # fmt: skip
    assert out.shape == (1, 64, 32)


@pytest.mark.parametrize("modality", [Modality.IMAGE, Modality.VIDEO, Modality.AUDIO])
def test_the_projections_of_the_open_preset_fit_its_decoders(modality: Modality) -> None:
    folder = SHIPPED / "open-8b"
    index = json.loads((folder / modality / "model_index.json").read_text())
    layout = condition_layout(index["_class_name"], shipped(modality))
    config = OutputProjectionConfig(
        **json.loads((folder / "projections" / modality / "config.json").read_text())
    )
    assert config == OutputProjectionConfig.for_decoder(layout, 4096)
    with torch.device("meta"):
        main, named = OutputProjection(config).project(zeros(1, 4, 4096), zeros(1, 4, 4096))
    assert [main.shape[1:], *(tensor.shape[1:] for tensor in named.values())] == [
        (spec.tokens, spec.width) for spec in layout.values()
    ]
