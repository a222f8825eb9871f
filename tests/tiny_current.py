"""Tiny pipelines with random weights, of the classes of today's decoders, in the layouts of their folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AudioLDM2Pipeline,
    AudioLDM2ProjectionModel,
    AudioLDM2UNet2DConditionModel,
    AutoencoderKLFlux2,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    AutoencoderOobleck,
    EDMDPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    ClapAudioConfig,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    ClapTextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaTokenizer,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.tiny_pipelines import TOKENS, WIDTH, WORDS, scheduler, tokenizer, vae, xl_pipeline

T5_SIZES = {
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 1,
    "num_heads": 2,
    "vocab_size": len(WORDS),
}
KLEIN_LAYERS, KLEIN_WIDTH = 28, 8


def klein_pipeline() -> Flux2KleinPipeline:
    torch.manual_seed(0)
    words = tokenizer()
    words.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    text = Qwen3Config(
        vocab_size=len(WORDS),
        hidden_size=KLEIN_WIDTH,
        intermediate_size=8,
        num_hidden_layers=KLEIN_LAYERS,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=512,
    )
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * KLEIN_WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    autoencoder = AutoencoderKLFlux2(
        block_out_channels=(4,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return Flux2KleinPipeline(
        FlowMatchEulerDiscreteScheduler(),
        autoencoder.eval(),
        Qwen3ForCausalLM(text).eval(),
        words,
        transformer.eval(),
        is_distilled=True,
    )


def wan_pipeline() -> WanPipeline:
    torch.manual_seed(1)
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    )
    autoencoder = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    return WanPipeline(
        tokenizer(),
        UMT5EncoderModel(UMT5Config(**T5_SIZES)).eval(),
        autoencoder.eval(),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer.eval(),
    )


def ltx_pipeline() -> LTXPipeline:
    torch.manual_seed(2)
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=WIDTH,
    )
    scaled = (True, True, False, False)
    autoencoder = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=scaled,
        decoder_spatio_temporal_scaling=scaled,
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
    )
    return LTXPipeline(
        FlowMatchEulerDiscreteScheduler(),
        autoencoder.eval(),
        T5EncoderModel(T5Config(**T5_SIZES)).eval(),
        tokenizer(),
        transformer.eval(),
    )


def stable_audio_pipeline() -> StableAudioPipeline:
    torch.manual_seed(3)
    transformer = StableAudioDiTModel(
        sample_size=64,
        in_channels=3,
        out_channels=3,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        num_key_value_attention_heads=2,
        cross_attention_dim=8,
        cross_attention_input_dim=8,
        global_states_input_dim=16,
        time_proj_dim=8,
    )
    autoencoder = AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=3,
        channel_multiples=[2, 4],
        sampling_rate=64,
    )
    return StableAudioPipeline(
        autoencoder.eval(),
        T5EncoderModel(T5Config(**T5_SIZES)).eval(),
        StableAudioProjectionModel(
            text_encoder_dim=WIDTH, conditioning_dim=8, min_value=0, max_value=32
        ).eval(),
        tokenizer(),
        transformer.eval(),
        EDMDPMSolverMultistepScheduler(
            sigma_data=1.0, prediction_type="v_prediction", sigma_schedule="exponential"
        ),
    )


def audioldm2_pipeline() -> AudioLDM2Pipeline:
    torch.manual_seed(4)
    words = [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        "<mask>",
        *(chr(256 + i) for i in range(8)),
        *"abcdefghijklmnopqrstuvwxyz",
    ]
    clap_words = RobertaTokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=TOKENS
    )
    words_of_t5 = [(f"\u2581{word}", -1.0) for word in WORDS[4:]]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *words_of_t5]
    t5_words = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=2 * TOKENS)
    text = ClapTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64, projection_dim=WIDTH,
        bos_token_id=0, pad_token_id=1, eos_token_id=2,
    )  # fmt: skip
    audio = ClapAudioConfig(
        spec_size=32, num_mel_bins=8, patch_size=2, patch_stride=[2, 2], patch_embeds_hidden_size=16,
        hidden_size=64, depths=[1, 1, 1], num_attention_heads=[2, 2, 2], window_size=4, projection_dim=WIDTH,
    )  # fmt: skip
    clap = ClapModel(
        ClapConfig(text_config=text.to_dict(), audio_config=audio.to_dict(), projection_dim=WIDTH)
    )
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            n_embd=WIDTH, n_head=2, n_layer=1, vocab_size=16, n_positions=64, bos_token_id=0, eos_token_id=1
        )
    )
    gpt2.config.max_new_tokens = 4
    unet = AudioLDM2UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=((None, WIDTH, WIDTH), (None, WIDTH, WIDTH)),
        attention_head_dim=4,
        norm_num_groups=4,
    )
    hifi_gan = SpeechT5HifiGanConfig(
        model_in_dim=8, sampling_rate=16000, upsample_initial_channel=16, upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4], resblock_kernel_sizes=[3, 7],
        resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]], normalize_before=False,
    )  # fmt: skip
    return AudioLDM2Pipeline(
        vae(channels=1),
        clap.eval(),
        T5EncoderModel(T5Config(**T5_SIZES)).eval(),
        AudioLDM2ProjectionModel(WIDTH, WIDTH, WIDTH).eval(),
        gpt2.eval(),
        clap_words,
        t5_words,
        ClapFeatureExtractor(feature_size=8, sampling_rate=16000),
        unet.eval(),
        scheduler(),
        SpeechT5HifiGan(hifi_gan).eval(),
    )


PIPELINES: Mapping[str, Callable[[], Any]] = {
    "xl": xl_pipeline,
    "klein": klein_pipeline,
    "wan": wan_pipeline,
    "ltx": ltx_pipeline,
    "stable-audio": stable_audio_pipeline,
    "audioldm2": audioldm2_pipeline,
}


def write(name: str, folder: Path) -> Path:
    """Save one of the pipelines into ``folder``."""
    pipeline = PIPELINES[name]()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return folder
