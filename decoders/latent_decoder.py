"""What the three latent diffusion decoders have in common: from a condition to a medium.

Shape letters in this file:
    B requests in the batch   S condition tokens   E condition width   ... latent shape, channels first
"""

import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import Tensor

from decoders.condition import Condition, ConditionSpec, digest
from decoders.denoising import OnStep, check_stop, denoise, draw_noise, make_scheduler
from decoders.pipeline_folder import DEFAULTS_FILE, PipelineFolder
from decoders.settings import DecoderDefaults, DecodeSettings
from encoders.media import Medium, Modality

VAE_BATCH_PIXELS = 2**21
"""Pixels that go through the VAE's decoder at once; more are split, to bound its memory."""


@dataclass(frozen=True, eq=False, slots=True)
class Decoded:
    """A medium and how it was made: enough to make it again with the same weights and condition."""

    medium: Medium
    manifest: dict[str, Any]


class LatentDecoder(ABC):
    """A frozen latent diffusion model that takes embeddings in place of a prompt.

    One object serves one thread at a time.
    """

    modality: ClassVar[Modality]
    pipelines: ClassVar[tuple[str, ...]]
    usual: ClassVar[DecoderDefaults]

    def __init__(self, folder: PipelineFolder) -> None:
        folder.expect_pipeline(*self.pipelines)
        self.folder = folder
        self.defaults = self.usual.updated(folder.path / DEFAULTS_FILE)
        self._scheduler_config = folder.scheduler_config()
        make_scheduler(self._scheduler_config, self.defaults.scheduler)
        self._load_networks()
        self._text: tuple[Any, Any] | None = None
        null = folder.saved_null()
        self._null = self.embed_captions([""])[0] if null is None else null  # (S, E)
        if self._null.ndim != 2 or self._null.shape[1] != self._condition_width():
            raise ValueError(
                f"{folder.path}: its text encoder gives embeddings of shape {tuple(self._null.shape)}, its "
                f"network wants a width of {self._condition_width()}. The parts do not belong together."
            )
        self.digest = folder.digest()

    @classmethod
    def load(cls, folder: Path | str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Self:
        """Load a decoder from a folder in the layout of its diffusers pipeline.

        ``patchbay.json`` in it may set defaults (see :class:`DecoderDefaults`); ``null.safetensors``
        saves loading the text encoder until a caption has to be encoded.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, or parts do not fit together.

        """
        return cls(PipelineFolder(folder, device, dtype))

    @property
    def condition_spec(self) -> ConditionSpec:
        """The shape of the conditions that :meth:`decode` takes."""
        tokens, width = self._null.shape
        return ConditionSpec(tokens=tokens, width=width, pooled=self.modality is Modality.AUDIO)

    def encode_caption(self, caption: str) -> Condition:
        """Return what the decoder's own text encoder makes of ``caption``, on the CPU."""
        return Condition(self.embed_captions([caption])[0].cpu())

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Encode captions as the diffusers pipeline does: ``(B, S, E)`` on the decoder's device."""
        if self._text is None:
            self._text = self.folder.tokenizer(), self._load_text_encoder()
        tokenizer, encoder = self._text
        inputs = tokenizer(
            list(captions),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            embeddings = self._encode_text(encoder, inputs.to(self.folder.device))  # (B, S, E)
        return embeddings.clone()

    def save_null(self) -> None:
        """Write ``null.safetensors`` into the folder, so that the text encoder can stay unloaded."""
        self.folder.write_null(self.embed_captions([""])[0])

    def decode(
        self,
        condition: Condition,
        settings: DecodeSettings | None = None,
        on_step: OnStep | None = None,
        stop: threading.Event | None = None,
        *,
        source: Tensor | None = None,
        strength: float = 0.6,
    ) -> Decoded:
        """Make one medium.

        Args:
            condition: of the shape :attr:`condition_spec`.
            settings: wishes; what is None follows the decoder's defaults, a seed is drawn.
            on_step: called with (steps done, steps in all) after each denoising step.
            stop: checked before each step and before the medium is put together.
            source: latents of :meth:`encode_source` to start from instead of noise.
            strength: with ``source``, how far to go away from it, in (0, 1].

        Returns:
            The medium and its manifest. Seed, settings and condition decide the medium, bit for bit on
            one machine.

        Raises:
            Cancelled: ``stop`` was set.
            ValueError: a condition, source or setting that does not fit this decoder.

        """
        sources = None if source is None else [source]
        return self.decode_batch(
            [condition], [settings or DecodeSettings()], on_step, stop, sources=sources, strength=strength
        )[0]

    def decode_batch(
        self,
        conditions: Sequence[Condition],
        settings: Sequence[DecodeSettings],
        on_step: OnStep | None = None,
        stop: threading.Event | None = None,
        *,
        sources: Sequence[Tensor] | None = None,
        strength: float = 0.6,
    ) -> list[Decoded]:
        """Make several media in one run; each has its own seed and guidance.

        As :meth:`decode`, but steps, scheduler and sizes must be the same for all. Results equal those
        of single runs up to floating-point rounding.
        """
        if len(settings) != len(conditions) or not conditions:
            raise ValueError(f"There are {len(conditions)} conditions and {len(settings)} settings.")
        if sources is not None and len(sources) != len(conditions):
            raise ValueError(f"There are {len(conditions)} conditions and {len(sources)} sources.")
        for condition in conditions:
            self.condition_spec.check(condition)
        first = settings[0]
        shape = self._latent_shape(first)
        steps = first.steps or self.defaults.steps
        name = first.scheduler or self.defaults.scheduler
        for other in settings[1:]:
            same = (other.steps or self.defaults.steps, other.scheduler or self.defaults.scheduler)
            if same != (steps, name) or self._latent_shape(other) != shape:
                raise ValueError(
                    "Requests of one batch differ in steps, scheduler or size. Run them in separate batches."
                )
        seeds = [secrets.randbelow(2**32) if wish.seed is None else wish.seed for wish in settings]
        guidance = [
            self.defaults.guidance_scale if wish.guidance_scale is None else wish.guidance_scale
            for wish in settings
        ]
        device, dtype = self.folder.device, self.folder.dtype
        embeddings = torch.stack([condition.embeddings for condition in conditions])
        with torch.inference_mode():
            latents = denoise(
                self._predict,
                make_scheduler(self._scheduler_config, name),
                draw_noise(shape, seeds, device),  # float32: many small steps add up
                self._prepared(embeddings.to(device, dtype)),
                self._null,
                steps=steps,
                guidance=guidance,
                source=None if sources is None else torch.stack(list(sources)).to(device, torch.float32),
                strength=strength,
                on_step=on_step,
                stop=stop,
            )
            check_stop(stop)
            media = self._media(latents.to(dtype), first)
        results = []
        for row, medium in enumerate(media):
            manifest = {
                "modality": self.modality.value,
                "pipeline": self.folder.pipeline_class,
                "weights": self.digest,
                "seed": seeds[row],
                "scheduler": name,
                "steps": steps,
                "guidance_scale": guidance[row],
                **self._sizes(medium),
                "condition": digest(conditions[row].embeddings),
            }
            if sources is not None:
                manifest |= {"source": digest(sources[row]), "strength": strength}
            results.append(Decoded(medium, manifest))
        return results

    @abstractmethod
    def encode_source(self, medium: Medium, settings: DecodeSettings | None = None) -> Tensor:
        """Return the latents of a medium ``(...)`` on the CPU, for ``source`` of :meth:`decode`.

        The medium is fitted to the size that ``settings`` ask for. Raises ValueError for a medium of
        another modality.
        """

    @abstractmethod
    def _load_networks(self) -> None:
        """Load all parts but tokenizer and text encoder."""

    @abstractmethod
    def _load_text_encoder(self) -> Any:
        """Load the text encoder."""

    @abstractmethod
    def _encode_text(self, encoder: Any, inputs: Any) -> Tensor:
        """Return ``(B, S, E)`` for tokenised captions."""

    @abstractmethod
    def _condition_width(self) -> int:
        """Return the width E that the denoising network takes."""

    @abstractmethod
    def _latent_shape(self, settings: DecodeSettings) -> tuple[int, ...]:
        """Return the latent shape of one request; raise ValueError for sizes that cannot be made."""

    @abstractmethod
    def _predict(self, latents: Tensor, timestep: Tensor, conditions: Tensor) -> Tensor:
        """Run the denoising network."""

    @abstractmethod
    def _media(self, latents: Tensor, settings: DecodeSettings) -> Sequence[Medium]:
        """Turn clean latents ``(B, ...)`` into one medium per request."""

    @abstractmethod
    def _sizes(self, medium: Any) -> dict[str, Any]:
        """Return the settings that fix the size of ``medium``, for the manifest."""

    def _prepared(self, embeddings: Tensor) -> Tensor:
        """Return conditions ``(B, S, E)`` as the denoising network wants them."""
        return embeddings

    def _expect(self, medium: Medium) -> None:
        if medium.modality is not self.modality:
            raise ValueError(
                f"The source is {medium.modality}; this decoder starts from {self.modality} only."
            )


def clip_states(encoder: Any, inputs: Any) -> Tensor:
    """Return CLIP's last hidden states ``(B, S, E)`` as StableDiffusionPipeline uses them."""
    uses_mask = getattr(encoder.config, "use_attention_mask", None)
    mask = inputs.attention_mask if uses_mask else None
    states: Tensor = encoder(inputs.input_ids, attention_mask=mask)[0]
    return states


def to_pixels(vae: Any, latents: Tensor) -> NDArray[np.uint8]:
    """Decode latents ``(N, C, h, w)`` of a StableDiffusion VAE into uint8 ``(N, H, W, 3)``."""
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    at_once = max(1, VAE_BATCH_PIXELS // (latents.shape[2] * latents.shape[3] * scale**2))
    images = torch.cat(
        [vae.decode(part / vae.config.scaling_factor).sample for part in latents.split(at_once)]
    )  # (N, 3, H, W)
    images = (images / 2 + 0.5).clamp(0, 1) * 255
    pixels: NDArray[np.uint8] = images.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return pixels


def from_pixels(vae: Any, frames: Sequence[NDArray[np.uint8]], width_px: int, height_px: int) -> Tensor:
    """Encode pictures ``(H, W, 3)`` uint8, resized to one size, into latents ``(N, C, h, w)``."""
    resized = [
        np.asarray(PIL.Image.fromarray(frame).resize((width_px, height_px), PIL.Image.Resampling.LANCZOS))
        for frame in frames
    ]
    pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)  # (N, 3, H, W)
    images = pixels.to(vae.device, vae.dtype) / 127.5 - 1
    at_once = max(1, VAE_BATCH_PIXELS // (width_px * height_px))
    with torch.inference_mode():
        latents = torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(at_once)])
    scaled: Tensor = latents * vae.config.scaling_factor
    return scaled.clone()


def check_multiple(name: str, value: int, factor: int) -> int:
    """Return ``value`` divided by ``factor``; raise ValueError when it does not divide."""
    if value % factor:
        raise ValueError(
            f"{name} is {value}; this decoder makes multiples of {factor}. "
            f"Ask for {max(factor, round(value / factor) * factor)}."
        )
    return value // factor
