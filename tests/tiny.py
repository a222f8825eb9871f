"""A whole preset with tiny models: a language model drilled on a few dialogues, the rest random.

It obeys: "draw a bell" gives a picture, "play a bell" a sound, "film a bell" a video, "draw, play
and film a bell" all three with words between them, and "hello" gives words alone.
"""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from decoders.projection import OutputProjection, OutputProjectionConfig
from encoders.imagebind import ImageBind
from encoders.imagebind_config import AudioConfig, ImageBindConfig, VisionConfig
from encoders.imagebind_encoder import ImageBindEncoder
from encoders.media import Modality
from encoders.preprocess import PreprocessConfig
from llm.model import LanguageModel
from llm.projectors import ProjectorConfig
from llm.template import Dialogue, MediaTokens, Message, SignalPart
from llm.tokenizer import ConversationTokenizer, train_tokenizer
from tests import tiny_pipelines
from tests.lora_files import write_lm_lora, write_unet_lora
from tests.tiny_llm import llama

ENCODER_WIDTH, LLM_WIDTH = 16, 32
IMAGE, VIDEO, AUDIO = (SignalPart(m) for m in (Modality.IMAGE, Modality.VIDEO, Modality.AUDIO))
THREE_PARTS = ["Here is a bell.", IMAGE, "It sounds like this.", AUDIO, "And it moves.", VIDEO]


def write_tiny_preset(folder: Path) -> Path:
    """Write the weights and the YAML of the preset ``tiny``; return the path of the YAML."""
    weights = folder / "weights"
    torch.manual_seed(0)
    tiny_encoder().save_pretrained(weights / "encoder", torch.float32)
    tiny_speaker().save_pretrained(weights / "llm")
    pipelines = {
        Modality.IMAGE: tiny_pipelines.image_pipeline,
        Modality.VIDEO: tiny_pipelines.video_pipeline,
        Modality.AUDIO: tiny_pipelines.audio_pipeline,
    }
    for modality, pipeline in pipelines.items():
        tiny_pipelines.saved(pipeline(), weights / modality.value)
        config = OutputProjectionConfig(
            llm_width=LLM_WIDTH,
            out_width=tiny_pipelines.WIDTH,
            num_queries=1 if modality is Modality.AUDIO else tiny_pipelines.TOKENS,
            hidden_width=16,
            ffn_width=16,
            num_encoder_layers=1,
            num_decoder_layers=1,
        )
        OutputProjection(config).save_pretrained(weights / "projections" / modality.value)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_values()))
    return path


def tiny_values() -> dict[str, object]:
    """Return what stands in the YAML."""
    return {
        "name": "tiny",
        "description": "Tiny models for tests.",
        "weights": "weights",
        "decoders": {
            "image": {"folder": "image", "steps": 3, "guidance_scale": 2.0, "limits": {"steps": 1000}},
            "video": {"folder": "video", "steps": 3, "guidance_scale": 2.0},
            "audio": {"folder": "audio", "steps": 3, "guidance_scale": 2.0},
        },
        "generation": {"max_new_tokens": 160},
        "limits": {"max_request_mb": 2, "max_media": 4},
    }


def tiny_encoder() -> ImageBindEncoder:
    """Return an encoder for pictures, videos and sounds, with random weights."""
    trunk = {"width": 16, "num_blocks": 1, "num_heads": 2}
    model = ImageBind(
        ImageBindConfig(
            out_width=ENCODER_WIDTH,
            vision=VisionConfig(**trunk, image_size=16, patch_size=8),
            audio=AudioConfig(**trunk, num_mel_bins=32, num_frames=64, patch_size=16, stride=16),
        )
    )
    preprocessing = PreprocessConfig(
        image_size=16,
        video_clips=1,
        video_clip_seconds=1.0,
        video_clip_frames=2,
        video_crops=1,
        audio_clips=1,
        audio_clip_seconds=0.64,
        num_mel_bins=32,
        num_mel_frames=64,
    )
    return ImageBindEncoder(model.eval(), preprocessing, None)


def tiny_speaker() -> LanguageModel:
    """Return a language model that knows the dialogues of this file by heart."""
    dialogues = tiny_dialogues()
    words = [part for dialogue in dialogues for message in dialogue for part in message.parts]
    vocabulary = train_tokenizer([word for word in words if isinstance(word, str)], 400)
    tokenizer = ConversationTokenizer(vocabulary)
    sizes = {"encoder_width": ENCODER_WIDTH, "llm_width": LLM_WIDTH}
    projectors = {
        Modality.IMAGE: ProjectorConfig(kind="linear", **sizes),
        Modality.VIDEO: ProjectorConfig(kind="linear", **sizes),
        Modality.AUDIO: ProjectorConfig(kind="linear", **sizes),
    }
    base = llama(tokenizer.base_vocabulary, max_position_embeddings=512)
    model = LanguageModel(base, tokenizer, projectors).train()
    batch = model.collate(dialogues)
    trained = [
        parameter.requires_grad_()
        for name, parameter in model.named_parameters()
        if not name.startswith("projectors.")
    ]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    for _ in range(120):
        output = model(batch)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    if output.loss > 0.02:
        raise AssertionError(f"the tiny language model did not learn its lines: loss {output.loss:.3f}")
    return model.requires_grad_(False).eval()


def tiny_dialogues() -> list[Dialogue]:
    """Return all that the tiny language model knows to say."""
    pixels = MediaTokens(Modality.IMAGE, torch.zeros(4, ENCODER_WIDTH), torch.zeros(ENCODER_WIDTH))
    frames = MediaTokens(Modality.VIDEO, torch.zeros(4, ENCODER_WIDTH), torch.zeros(ENCODER_WIDTH))
    samples = MediaTokens(Modality.AUDIO, torch.zeros(8, ENCODER_WIDTH), torch.zeros(ENCODER_WIDTH))
    draw = [_user("draw a bell"), _agent("Here is a bell.", IMAGE)]
    return [
        draw,
        [_user("film a bell"), _agent("It moves.", VIDEO)],
        [_user("play a bell"), _agent("It sounds like this.", AUDIO)],
        [_user("draw, play and film a bell"), _agent(*THREE_PARTS)],
        [_user("hello"), _agent("Hello!")],
        [*draw, _user("play it"), _agent("It sounds like this.", AUDIO)],
        *([_user(medium, "what is this?"), _agent("It is a bell.")] for medium in (pixels, frames, samples)),
    ]


def _user(*parts: str | MediaTokens) -> Message:
    return Message("user", list(parts))


def _agent(*parts: str | MediaTokens | SignalPart) -> Message:
    return Message("assistant", list(parts))


def with_adapters(preset: Path) -> Path:
    """Write LoRA beside the weights of a tiny preset; return the YAML of one that allows it.

    ``pirate`` and ``poet`` are for the language model, ``ink`` and ``clay`` for the image decoder; ``odd``
    was made for another language model, and ``gone`` is not there.
    """
    path = preset.with_name("tiny-adapters.yaml")
    weights = preset.parent / "weights"
    folders = {
        "pirate": "language_model",
        "poet": "language_model",
        "odd": "language_model",
        "gone": "image",
        "ink": "image",
        "clay": "image",
    }
    if not path.exists():
        speaker = LanguageModel.from_pretrained(weights / "llm").causal_lm
        for seed, name in enumerate(("pirate", "poet"), 1):
            write_lm_lora(speaker, weights / "adapters" / name, seed)
        write_lm_lora(llama(30, hidden_size=16), weights / "adapters" / "odd", 3)
        for seed, name in enumerate(("ink", "clay"), 1):
            write_unet_lora(tiny_pipelines.image_pipeline().unet, weights / "adapters" / name, seed)
        adapters = {name: {"box": box, "folder": f"adapters/{name}"} for name, box in folders.items()}
        path.write_text(yaml.safe_dump(tiny_values() | {"adapters": adapters}))
    return path
