"""The image decoder: the parts of a StableDiffusionPipeline, embeddings in."""

from collections.abc import Sequence
from typing import Any, ClassVar

from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from decoders.latent_decoder import LatentDecoder, clip_states
from decoders.pixels import check_multiple, decode_pictures, from_pixels, resized, to_arrays
from decoders.settings import DecoderDefaults, DecodeSettings
from encoders.media import Image, Medium, Modality


class ImageDecoder(LatentDecoder):
    """Conditions ``(tokens, width)`` of text states to an :class:`Image`.

    Equals StableDiffusionPipeline (without its safety checker) for the same seed, scheduler and settings.
    """

    modality: ClassVar[Modality] = Modality.IMAGE
    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline",)
    usual: ClassVar[DecoderDefaults] = DecoderDefaults(steps=25, guidance_scale=7.5)

    def _load_networks(self) -> None:
        self.unet = self.folder.model("unet", UNet2DConditionModel)
        self.vae = self.folder.autoencoder()
        self._factor = 2 ** (len(self.vae.config.block_out_channels) - 1)

    def _load_text_encoder(self) -> Any:
        return self.folder.model("text_encoder", CLIPTextModel)

    def _encode_text(self, encoder: Any, inputs: Any) -> Tensor:
        return clip_states(encoder, inputs)

    def _condition_width(self) -> int:
        return int(self.unet.config.cross_attention_dim)

    def _size(self, settings: DecodeSettings) -> tuple[int, int]:
        settings.only("width_px", "height_px")
        usual = self.unet.config.sample_size
        rows, columns = (usual, usual) if isinstance(usual, int) else usual
        width = settings.width_px or self.defaults.width_px or columns * self._factor
        height = settings.height_px or self.defaults.height_px or rows * self._factor
        return width, height

    def _latent_shape(self, settings: DecodeSettings) -> tuple[int, ...]:
        width, height = self._size(settings)
        rows = check_multiple("height_px", height, self._factor)
        columns = check_multiple("width_px", width, self._factor)
        return (self.unet.config.in_channels, rows, columns)

    @property
    def _network(self) -> Any:
        return self.unet

    def _run(self, network: Any, latents: Tensor, timesteps: Tensor, conditions: Tensor) -> Tensor:
        predicted: Tensor = network(latents, timesteps, conditions, return_dict=False)[0]
        return predicted

    def _media(
        self, latents: Tensor, settings: Sequence[DecodeSettings], *, sliced: bool = False
    ) -> Sequence[Image]:
        return [Image(pixels) for pixels in to_arrays(self.finish(latents, sliced=sliced))]

    def finish(self, latents: Tensor, *, sliced: bool = False) -> Tensor:
        """Turn clean latents into pictures ``(B, 3, H, W)`` uint8 on the device."""
        return decode_pictures(self.vae, latents, sliced=sliced)

    def _sizes(self, medium: Image) -> dict[str, Any]:
        height, width = medium.pixels.shape[:2]
        return {"width_px": width, "height_px": height}

    def _encoded(self, medium: Medium, settings: DecodeSettings, *, sliced: bool) -> Tensor:
        """Return the latents ``(C, h, w)`` of an image, resized to the size that ``settings`` ask for."""
        assert isinstance(medium, Image)
        width, height = self._size(settings)
        return from_pixels(self.vae, [medium.pixels], width, height, sliced=sliced)[0].cpu()

    def _fitted(self, original: Medium, settings: DecodeSettings) -> Image:
        self._expect(original)
        assert isinstance(original, Image)
        return Image(resized([original.pixels], *self._size(settings))[0])
