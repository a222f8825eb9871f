"""The video decoder: the parts of a text-to-video pipeline, embeddings in.

Two kinds of network stand behind one decoder: the 3-D UNet of TextToVideoSDPipeline and the 2-D UNet
over stacked frames of TextToStackedVideoPipeline.

Shape letters in this file:
    B batch   C latent channels   F frames   h, w latent height and width
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from diffusers import UNet2DConditionModel, UNet3DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from decoders.denoising import make_scheduler
from decoders.latent_decoder import LatentDecoder, clip_states
from decoders.pixels import check_multiple, decode_pictures, from_pixels, to_arrays
from decoders.settings import DecoderDefaults, DecodeSettings
from decoders.stacked_video import predict_stacked
from encoders.media import Medium, Modality, Video

USUAL_FRAMES = 16
USUAL_FPS = 8.0


class VideoDecoder(LatentDecoder):
    """Conditions ``(tokens, width)`` of text states to a :class:`Video`.

    Equals the diffusers pipeline of its folder for the same seed, scheduler and settings.
    """

    modality: ClassVar[Modality] = Modality.VIDEO
    pipelines: ClassVar[tuple[str, ...]] = ("TextToVideoSDPipeline", "TextToStackedVideoPipeline")
    usual: ClassVar[DecoderDefaults] = DecoderDefaults(steps=25, guidance_scale=9.0)

    def _load_networks(self) -> None:
        self._is_stacked = self.folder.pipeline_class == "TextToStackedVideoPipeline"
        if self._is_stacked:
            self.network = self.folder.model("unet", UNet2DConditionModel)
            self._usual_size = self.folder.number("sample_size")
            self._usual_frames = self.folder.number("num_frames")
            self._usual_fps = self.folder.number("fps")
            self._channels = self.network.config.in_channels // int(self._usual_frames)
            scheduler = make_scheduler(self._scheduler_config, self.defaults.scheduler)
            self._alphas_cumprod: Tensor = scheduler.alphas_cumprod
        else:
            self.network = self.folder.model("unet", UNet3DConditionModel)
            self._channels = self.network.config.in_channels
            self._usual_size = self.network.config.sample_size
            self._usual_frames, self._usual_fps = USUAL_FRAMES, USUAL_FPS
        self.vae = self.folder.autoencoder()
        self._factor = 2 ** (len(self.vae.config.block_out_channels) - 1)

    def _load_text_encoder(self) -> Any:
        return self.folder.model("text_encoder", CLIPTextModel)

    def _encode_text(self, encoder: Any, inputs: Any) -> Tensor:
        return clip_states(encoder, inputs)

    def _condition_width(self) -> int:
        return int(self.network.config.cross_attention_dim)

    def _size(self, settings: DecodeSettings) -> tuple[int, int, int]:
        """Return frames, height and width in pixels."""
        settings.only("width_px", "height_px", "num_frames")
        side = self._usual_size * self._factor
        return (
            settings.num_frames or self.defaults.num_frames or self._usual_frames,
            settings.height_px or self.defaults.height_px or side,
            settings.width_px or self.defaults.width_px or side,
        )

    def _latent_shape(self, settings: DecodeSettings) -> tuple[int, ...]:
        frames, height, width = self._size(settings)
        if self._is_stacked and frames != self._usual_frames:
            raise ValueError(
                f"num_frames is {frames}; this decoder makes {self._usual_frames}. Ask for that."
            )
        check_multiple("height_px", height, self._factor)
        check_multiple("width_px", width, self._factor)
        return (self._channels, frames, height // self._factor, width // self._factor)

    @property
    def _network(self) -> Any:
        return self.network

    def _run(self, network: Any, latents: Tensor, timesteps: Tensor, conditions: Tensor) -> Tensor:
        if self._is_stacked:
            return predict_stacked(network, latents, timesteps, conditions, self._alphas_cumprod)
        predicted: Tensor = network(latents, timesteps, conditions, return_dict=False)[0]
        return predicted

    def _media(
        self, latents: Tensor, settings: Sequence[DecodeSettings], *, sliced: bool = False
    ) -> Sequence[Video]:
        frames = latents.shape[2]
        pixels = to_arrays(self.finish(latents, sliced=sliced))  # (B * F, H, W, 3)
        fps = self.defaults.fps or self._usual_fps
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

    def encode_source(self, medium: Medium, settings: DecodeSettings | None = None) -> Tensor:
        """Return the latents ``(C, F, h, w)`` of a video, with frames picked evenly and resized."""
        self._expect(medium)
        assert isinstance(medium, Video)
        frames, height, width = self._size(settings or DecodeSettings())
        picked = np.linspace(0, len(medium.frames) - 1, frames).round().astype(int)
        return from_pixels(self.vae, list(medium.frames[picked]), width, height).transpose(0, 1).cpu()
