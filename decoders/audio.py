"""The audio decoder: the parts of an AudioLDMPipeline, one CLAP-like vector in.

Shape letters in this file:
    B batch   E width of the text vector   T samples   N mel frames   M mel bands
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor
from transformers import ClapTextModelWithProjection, SpeechT5HifiGan

from decoders.latent_decoder import LatentDecoder
from decoders.mel import HOP, NUM_BANDS, RATE_HZ, log_mel
from decoders.settings import DecoderDefaults, DecodeSettings
from decoders.vocoder import GriffinLimVocoder
from encoders.media import Audio, Medium, Modality, resample

_VOCODERS = {"GriffinLimVocoder": GriffinLimVocoder, "SpeechT5HifiGan": SpeechT5HifiGan}


class AudioDecoder(LatentDecoder):
    """Conditions ``(1, width)``, a text vector that is L2-normalised on entry, to :class:`Audio`.

    Equals AudioLDMPipeline for the same seed, scheduler and settings, clipped to [-1, 1]; only, a duration
    that is not a whole number of mel frames is kept exactly, where the pipeline cuts the last frame off.
    """

    modality: ClassVar[Modality] = Modality.AUDIO
    pipelines: ClassVar[tuple[str, ...]] = ("AudioLDMPipeline",)
    usual: ClassVar[DecoderDefaults] = DecoderDefaults(steps=25, guidance_scale=2.5)

    def _load_networks(self) -> None:
        name = self.folder.class_of("vocoder")
        if name not in _VOCODERS:
            raise ValueError(
                f"{self.folder.path}: the vocoder is a {name}; known are {', '.join(_VOCODERS)}."
            )
        self.vocoder = self.folder.model("vocoder", _VOCODERS[name])
        self.unet = self.folder.model("unet", UNet2DConditionModel)
        self.vae = self.folder.autoencoder()
        self._factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        config = self.vocoder.config
        self._seconds_per_frame = float(np.prod(config.upsample_rates)) / config.sampling_rate

    def _load_text_encoder(self) -> Any:
        return self.folder.model("text_encoder", ClapTextModelWithProjection)

    def _encode_text(self, encoder: Any, inputs: Any) -> Tensor:
        vectors = encoder(inputs.input_ids, attention_mask=inputs.attention_mask).text_embeds  # (B, E)
        return F.normalize(vectors, dim=-1)[:, None]  # (B, 1, E)

    def _prepared(self, embeddings: Tensor) -> Tensor:
        return F.normalize(embeddings, dim=-1)

    def _condition_width(self) -> int:
        return int(self.unet.config.projection_class_embeddings_input_dim)

    def _seconds(self, settings: DecodeSettings) -> float:
        settings.only("duration_s")
        usual = self.unet.config.sample_size * self._factor * self._seconds_per_frame
        return settings.duration_s or self.defaults.duration_s or float(usual)

    def _latent_shape(self, settings: DecodeSettings) -> tuple[int, ...]:
        seconds = self._seconds(settings)
        rows = math.ceil(round(seconds / (self._seconds_per_frame * self._factor), 6))
        return (self.unet.config.in_channels, rows, self.vocoder.config.model_in_dim // self._factor)

    @property
    def _network(self) -> Any:
        return self.unet

    def _run(self, network: Any, latents: Tensor, timesteps: Tensor, conditions: Tensor) -> Tensor:
        predicted: Tensor = network(
            latents, timesteps, encoder_hidden_states=None, class_labels=conditions[:, 0], return_dict=False
        )[0]
        return predicted

    def _media(
        self, latents: Tensor, settings: Sequence[DecodeSettings], *, sliced: bool = False
    ) -> Sequence[Audio]:
        waveforms = self.finish(latents).cpu().numpy()  # (B, T)
        rate = self.vocoder.config.sampling_rate
        lengths = [round(self._seconds(wish) * rate) for wish in settings]
        return [
            Audio(np.ascontiguousarray(waveform[:length]), rate)
            for waveform, length in zip(waveforms, lengths, strict=True)
        ]

    def finish(self, latents: Tensor, *, sliced: bool = False) -> Tensor:
        """Turn clean latents into samples ``(B, T)`` on the device; nothing is sliced."""
        mels = self.vae.decode(latents / self.vae.config.scaling_factor).sample[:, 0]  # (B, N, M)
        waveforms: Tensor = self.vocoder(mels).float().clamp(-1, 1)  # (B, T)
        return waveforms

    def _shown(self, pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
        mel = pixels[:, ::-1, 0].T  # (M, N), low tones at the bottom
        grey = (mel - mel.min()) / max(float(np.ptp(mel)), 1e-6) * 255
        return np.repeat(grey.round().astype(np.uint8)[..., None], 3, axis=2)

    def _sizes(self, medium: Audio) -> dict[str, Any]:
        return {"duration_s": len(medium.samples) / medium.rate, "rate_hz": medium.rate}

    def _fitted(self, original: Medium, settings: DecodeSettings) -> Audio:
        self._expect(original)
        assert isinstance(original, Audio)
        return original

    def _encoded(self, medium: Medium, settings: DecodeSettings, *, sliced: bool) -> Tensor:
        """Return the latents ``(C, n, m)`` of a sound, cut or filled with silence to the wanted length."""
        assert isinstance(medium, Audio)
        rows = self._latent_shape(settings)[1]
        length = rows * self._factor * HOP
        config = self.vocoder.config
        known = (config.sampling_rate, config.model_in_dim, self._seconds_per_frame)
        if known != (RATE_HZ, NUM_BANDS, HOP / RATE_HZ):
            raise ValueError("This decoder's mel frames are not AudioLDM's; a sound cannot be its source.")
        samples = torch.from_numpy(np.array(resample(medium.samples, medium.rate, RATE_HZ)))
        samples = F.pad(samples[:length], (0, max(0, length - len(samples))))
        mel = log_mel(samples)[None, None].to(self.vae.device, self.vae.dtype)  # (1, 1, N, M)
        with torch.inference_mode():
            latents = self.vae.encode(mel).latent_dist.mode() * self.vae.config.scaling_factor
        clean: Tensor = latents[0].clone().cpu()
        return clean
