"""The embedded decoders as they are shipped, recorded, beside the diffusers pipelines of the same weights."""

from typing import Any

import pytest
import torch
from torch import Tensor

from decoders.latent_decoder import LatentDecoder
from decoders.settings import SCHEDULER_NAMES, DecodeSettings
from encoders.media import Modality
from services.bench.pipelines import CAPTION, parts_of, pipeline
from services.compiling import compile_if_possible
from services.local_decoder import decoder_class
from services.presets import load_preset

STEPS = 5


@pytest.fixture(scope="module", params=list(load_preset("toybox").decoders))
def decoder(request: pytest.FixtureRequest) -> LatentDecoder:
    preset, modality = load_preset("toybox"), request.param
    decoder = decoder_class(modality).load(preset.decoder_folder(modality))
    compile_if_possible(f"{modality.value} decoder", preset.decoders[modality].compile, decoder)
    assert decoder._quick._recorded is not None
    return decoder


@pytest.mark.parametrize("name", SCHEDULER_NAMES)
def test_latents_of_an_embedded_decoder_are_those_of_its_pipeline(
    decoder: LatentDecoder, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wish = DecodeSettings(seed=3, steps=STEPS, guidance_scale=2.0, scheduler=name)
    condition = decoder.encode_caption(CAPTION)
    caught: list[Tensor] = []
    decode = decoder.vae.decode

    def noted(latents: Tensor, *args: Any, **rest: Any) -> Any:
        caught.append(latents * decoder.vae.config.scaling_factor)
        return decode(latents, *args, **rest)

    monkeypatch.setattr(decoder.vae, "decode", noted)
    pipeline(decoder, parts_of(decoder), wish)(condition, 3)
    expected = torch.cat(caught)  # (1, C, h, w), or all frames of a video (F, C, h, w)

    run = decoder.begin([decoder.plan(condition, wish)])
    while not run.finished:
        decoder.step([run])

    ours = run.latents[0].transpose(0, 1) if decoder.modality is Modality.VIDEO else run.latents
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
