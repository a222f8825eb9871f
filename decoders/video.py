"""The video decoder: the parts of a text-to-video pipeline, embeddings in.

Shape letters in this file:
    B batch   C latent channels   F frames   h, w latent height and width
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from diffusers import UNet3DConditionModel
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPTextModel

from decoders.latent_decoder import LatentDecoder, clip_states
from decoders.pixels import check_multiple, decode_pictures, from_pixels, resized, to_arrays
from decoders.settings import DecoderDefaults, DecodeSettings
from encoders.media import Medium, Modality, Video

USUAL_FRAMES = 16
USUAL_FPS = 8.0
"""Of a folder whose ``patchbay.json`` does not say: as many frames as diffusers' pipeline makes."""


class VideoDecoder(LatentDecoder):
    """Conditions ``(tokens, width)`` of text states to a :class:`Video`.

    Equals the diffusers pipeline of its folder for the same seed, scheduler and settings.
    """

    modality: ClassVar[Modality] = Modality.VIDEO
    pipelines: ClassVar[tuple[str, ...]] = ("TextToVideoSDPipeline",)
    usual: ClassVar[DecoderDefaults] = DecoderDefaults(steps=25, guidance_scale=9.0)

    def _load_networks(self) -> None:
        self.unet = self.folder.model("unet", UNet3DConditionModel)
        self.vae = self.folder.autoencoder()
        self._factor = 2 ** (len(self.vae.config.block_out_channels) - 1)

    def _load_text_encoder(self) -> Any:
        return self.folder.model("text_encoder", CLIPTextModel)

    def _encode_text(self, encoder: Any, inputs: Any) -> Tensor:
        return clip_states(encoder, inputs)

    def _condition_width(self) -> int:
        return int(self.unet.config.cross_attention_dim)

    def _size(self, settings: DecodeSettings) -> tuple[int, int, int]:
        """Return frames, height and width in pixels."""
        settings.only("width_px", "height_px", "num_frames")
        side = self.unet.config.sample_size * self._factor
        return (
            settings.num_frames or self.defaults.num_frames or USUAL_FRAMES,
            settings.height_px or self.defaults.height_px or side,
            settings.width_px or self.defaults.width_px or side,
        )

    def _latent_shape(self, settings: DecodeSettings) -> tuple[int, ...]:
        frames, height, width = self._size(settings)
        check_multiple("height_px", height, self._factor)
        check_multiple("width_px", width, self._factor)
        return (self.unet.config.in_channels, frames, height // self._factor, width // self._factor)

    @property
    def _network(self) -> Any:
        return self.unet

    def _run(self, network: Any, latents: Tensor, timesteps: Tensor, conditions: Tensor) -> Tensor:
        predicted: Tensor = network(latents, timesteps, conditions, return_dict=False)[0]
        return predicted

    def _media(
        self, latents: Tensor, settings: Sequence[DecodeSettings], *, sliced: bool = False
    ) -> Sequence[Video]:
        frames = latents.shape[2]
        pixels = to_arrays(self.finish(latents, sliced=sliced))  # (B * F, H, W, 3)
        fps = self.defaults.fps or USUAL_FPS
        return [Video(clip, fps) for clip in pixels.reshape(len(latents), frames, *pixels.shape[1:])]

    def finish(self, latents: Tensor, *, sliced: bool = False) -> Tensor:
        """Turn clean latents into frames ``(B * F, 3, H, W)`` uint8 on the device."""
        flat = latents.transpose(1, 2).flatten(0, 1)  # (B * F, C, h, w)
        return decode_pictures(self.vae, flat, sliced=sliced)

    def _still(self, latents: Tensor) -> Tensor:
        return latents[:, latents.shape[1] // 2]

    def _sizes(self, medium: Video) -> dict[str, Any]:
        frames, height, width = medium.frames.shape[:3]
        return {"width_px": width, "height_px": height, "num_frames": frames, "fps": medium.fps}

    def _encoded(self, medium: Medium, settings: DecodeSettings, *, sliced: bool) -> Tensor:
        """Return the latents ``(C, F, h, w)`` of a video, with frames picked evenly and resized."""
        assert isinstance(medium, Video)
        frames, height, width = self._size(settings)
        latents = from_pixels(self.vae, _picked(medium, frames), width, height, sliced=sliced)
        return latents.transpose(0, 1).cpu()

    def _fitted(self, original: Medium, settings: DecodeSettings) -> Video:
        self._expect(original)
        assert isinstance(original, Video)
        frames, height, width = self._size(settings)
        return Video(resized(_picked(original, frames), width, height), original.fps)


def _picked(video: Video, frames: int) -> list[NDArray[np.uint8]]:
    """Return so many frames, evenly spread."""
    return list(video.frames[np.linspace(0, len(video.frames) - 1, frames).round().astype(int)])
