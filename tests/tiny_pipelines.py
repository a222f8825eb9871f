"""Tiny pipelines with random weights in the folder layouts of the real ones, for the decoder tests."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AudioLDMPipeline,
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    TextToVideoSDPipeline,
    UNet2DConditionModel,
    UNet3DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    ClapTextConfig,
    ClapTextModelWithProjection,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
)

from decoders.pipeline_folder import DEFAULTS_FILE

WIDTH = 16
TOKENS = 8
FRAMES = 3
"""Of the tiny videos, whose folders say so; the usual 16 would take five times as long."""
WORDS = ["<s>", "<pad>", "</s>", "<unk>", "a", "big", "small", "red", "blue", "bell", "drum"]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        model_max_length=TOKENS,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


def scheduler(**changes: Any) -> DDIMScheduler:
    settings: dict[str, Any] = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "steps_offset": 1,
    }
    return DDIMScheduler(**settings | changes)


def clip_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        projection_dim=WIDTH,
    )


def clip() -> CLIPTextModel:
    return CLIPTextModel(clip_config()).eval()


def vae(blocks: int = 2, channels: int = 3) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.7,
    ).eval()


def picture_unet(levels: int = 2) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        sample_size=8,
        block_out_channels=(8, 16)[-levels:],
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D")[-levels:],
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")[:levels],
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def image_pipeline(levels: int = 2) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    unet = picture_unet(levels)
    pipeline = StableDiffusionPipeline(
        vae(),
        clip(),
        tokenizer(),
        unet.eval(),
        scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def xl_pipeline() -> StableDiffusionXLPipeline:
    torch.manual_seed(4)
    unet = UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=2 * WIDTH,
        attention_head_dim=4,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=WIDTH + 6 * 4,
    )
    pipeline = StableDiffusionXLPipeline(
        vae(),
        clip(),
        CLIPTextModelWithProjection(clip_config()).eval(),
        tokenizer(),
        tokenizer(),
        unet.eval(),
        EulerDiscreteScheduler(beta_schedule="scaled_linear"),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def video_pipeline(attention_outside: bool = False) -> TextToVideoSDPipeline:
    torch.manual_seed(1)
    down, up = ["DownBlock3D", "CrossAttnDownBlock3D"], ["CrossAttnUpBlock3D", "UpBlock3D"]
    unet = UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=tuple(reversed(down) if attention_outside else down),
        up_block_types=tuple(reversed(up) if attention_outside else up),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    for name, weight in unet.named_parameters():
        if ".conv4." in name:  # zero at birth, so that the convolutions over time would do nothing
            torch.nn.init.normal_(weight, std=0.1)
    pipeline = TextToVideoSDPipeline(vae(), clip(), tokenizer(), unet.eval(), scheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def audio_pipeline(vocoder: Any = None) -> AudioLDMPipeline:
    torch.manual_seed(3)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=(8, 16),
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=WIDTH,
        class_embeddings_concat=True,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    text = ClapTextConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        projection_dim=WIDTH,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    hifi_gan = SpeechT5HifiGanConfig(
        model_in_dim=8,
        sampling_rate=16000,
        upsample_initial_channel=16,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3, 7],
        resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
        normalize_before=False,
        initializer_range=0.5,
    )
    pipeline = AudioLDMPipeline(
        vae(channels=1),
        ClapTextModelWithProjection(text).eval(),
        tokenizer(),
        unet.eval(),
        scheduler(),
        vocoder or SpeechT5HifiGan(hifi_gan).eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def saved(pipeline: Any, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    if isinstance(pipeline, TextToVideoSDPipeline):
        (folder / DEFAULTS_FILE).write_text(json.dumps({"num_frames": FRAMES}))
    return folder
