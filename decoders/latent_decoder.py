"""What the three latent diffusion decoders have in common: from a condition to a medium.

A request becomes a :class:`Plan`, in which nothing is left open; :meth:`LatentDecoder.begin`,
:meth:`~LatentDecoder.step` and :meth:`~LatentDecoder.complete` carry plans out, one denoising step at a
time. :meth:`LatentDecoder.decode_batch` does so for one batch and :mod:`decoders.engine` for many callers.

Shape letters in this file:
    B requests in the batch   S condition tokens   E condition width   ... latent shape, channels first
"""

import copy
import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from decoders.condition import Condition, ConditionSpec
from decoders.deep_features import DeepFeatures, step_reusing
from decoders.denoising import (
    Denoising,
    OnStep,
    check_source,
    check_stop,
    draw_noise,
    make_scheduler,
    step,
)
from decoders.lora import DecoderLora, WornLora, expect_named, read_decoder_lora
from decoders.patch_autoencoder import PatchAutoencoderKL
from decoders.pipeline_folder import DEFAULTS_FILE, PipelineFolder
from decoders.plan import Decoded, Plan
from decoders.preview import LinearPreview
from decoders.quick_network import Capture, QuickNetwork
from decoders.settings import USUAL_STRENGTH, DecoderDefaults, DecodeSettings
from decoders.thrift import Thrift, aside
from decoders.untouched import with_kept
from encoders.media import Image, Medium, Modality

VaeUse = Literal["whole", "sliced", "tiled"]


class LatentDecoder(ABC):
    """A frozen latent diffusion model that takes embeddings in place of a prompt.

    One object serves one thread at a time.
    """

    modality: ClassVar[Modality]
    pipelines: ClassVar[tuple[str, ...]]
    usual: ClassVar[DecoderDefaults]
    vae: Any

    def __init__(self, folder: PipelineFolder) -> None:
        folder.expect_pipeline(*self.pipelines)
        self.folder = folder
        self.defaults = self.usual.updated(folder.path / DEFAULTS_FILE)
        self._scheduler_config = folder.scheduler_config()
        usual = self.defaults.scheduler
        self._schedulers = {usual: make_scheduler(self._scheduler_config, usual)}
        self._load_networks()
        self._text: tuple[Any, Any] | None = None
        self._linear: LinearPreview | None = None
        self._deep: DeepFeatures | None = None
        self._vae_use: VaeUse = "whole"
        self._worn = WornLora(self._network)
        null = folder.saved_null()
        self._null = self.embed_captions([""])[0] if null is None else null  # (S, E)
        if self._null.ndim != 2 or self._null.shape[1] != self._condition_width():
            raise ValueError(
                f"{folder.path}: its text encoder gives embeddings of shape {tuple(self._null.shape)}, its "
                f"network wants a width of {self._condition_width()}. The parts do not belong together."
            )
        usual_null = self._prepared(self._null[None].to(folder.device, folder.dtype))[0]
        usual_shape = self._latent_shape(DecodeSettings())
        self._quick = QuickNetwork(self._network, self._run, usual_shape, usual_null)
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

    @property
    def condition_specs(self) -> dict[str, ConditionSpec]:
        """:attr:`condition_spec` by name, as decoders have it that take several tensors."""
        return {"prompt_embeds": self.condition_spec}

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

    def forget_text_encoder(self) -> None:
        """Let go of tokenizer and text encoder; the next caption loads them again."""
        self._text = None

    def read_lora(self, name: str, folder: Path) -> DecoderLora:
        """Read LoRA for this decoder's network; see :func:`decoders.lora.read_decoder_lora`."""
        return read_decoder_lora(name, folder, self._network, self.folder.dtype)

    def use_vae(self, how: VaeUse) -> None:
        """Choose how latents become pictures: all ``whole`` at once, ``sliced`` one by one, or ``tiled``.

        Tiled, what is larger than the VAE was made for is decoded in overlapping tiles, which shows a little.

        Raises:
            ValueError: the VAE cannot be tiled.

        """
        if how == "tiled" and isinstance(self.vae, PatchAutoencoderKL):
            raise ValueError(
                f"{self.folder.path}: its PatchAutoencoderKL cannot be tiled, as tiles do not fit its folds. "
                f"Choose sliced."
            )
        if how == "tiled":
            self.vae.enable_tiling()
        else:
            self.vae.disable_tiling()
        self._vae_use = how

    def compile(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile the denoising network for whole steps without LoRA; others go on as they are.

        Takes such steps, so that what cannot be compiled is known at once.

        Raises:
            RuntimeError: it cannot be compiled, for want of a C++ compiler for instance. The decoder goes on
                uncompiled.

        """
        self._quick.compile(backend)

    def trace(self) -> None:
        """Record the denoising network and repeat it without Python, for whole steps at the usual size.

        Steps with LoRA, and those of networks that have hooks, go on as they are.

        Raises:
            RuntimeError: the network cannot be recorded. The decoder goes on as it is.

        """
        self._quick.trace()

    def graph(self, capture: Capture) -> None:
        """Replay steps of small batches at the usual size as CUDA graphs, which ``capture`` makes.

        What :meth:`trace` leaves as it is, is left here too.

        Raises:
            RuntimeError: there is no GPU, or a step cannot be captured. The decoder goes on as it is.

        """
        self._quick.graph(capture)

    def move(self, device: torch.device | str) -> None:
        """Move all weights to ``device``. Before anything is decoded they must be on the decoder's own."""
        for module in self._modules():
            module.to(device)

    def weight_bytes(self) -> int:
        """Return the bytes of all weights that are loaded."""
        tensors = (tensor for module in self._modules() for tensor in module.parameters())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _modules(self) -> list[nn.Module]:
        own = [value for value in vars(self).values() if isinstance(value, nn.Module)]
        return own if self._text is None else [*own, self._text[1]]

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
        lora: DecoderLora | None = None,
        original: Medium | None = None,
    ) -> Decoded:
        """Make one medium.

        Args:
            condition: of the shape :attr:`condition_spec`.
            settings: wishes; what is None follows the decoder's defaults, a seed is drawn. A strength needs a
                ``source``.
            on_step: called with (steps done, steps in all) after each denoising step.
            stop: checked before each step and before the medium is put together.
            source: latents of :meth:`encode_source` to start from instead of noise.
            lora: of :meth:`read_lora`, on the decoder's device; what ``settings`` name.
            original: a picture or video that is edited; it gives its pixels wherever what is made agrees.

        Returns:
            The medium and its manifest. Seed, settings and condition decide the medium, bit for bit on
            one machine.

        Raises:
            Cancelled: ``stop`` was set.
            ValueError: a condition, source, original or setting that does not fit this decoder.

        """
        sources = None if source is None else [source]
        wishes, originals = [settings or DecodeSettings()], [original]
        return self.decode_batch(
            [condition], wishes, on_step, stop, sources=sources, lora=lora, originals=originals
        )[0]

    def decode_batch(
        self,
        conditions: Sequence[Condition],
        settings: Sequence[DecodeSettings],
        on_step: OnStep | None = None,
        stop: threading.Event | None = None,
        *,
        sources: Sequence[Tensor] | None = None,
        lora: DecoderLora | None = None,
        originals: Sequence[Medium | None] | None = None,
    ) -> list[Decoded]:
        """Make several media in one run; each has its own seed and guidance.

        As :meth:`decode`, but steps, scheduler, sizes, strength and LoRA must be the same for all; an
        original may be there for some. Results equal those of single runs up to floating-point rounding.
        """
        if len(settings) != len(conditions) or not conditions:
            raise ValueError(f"There are {len(conditions)} conditions and {len(settings)} settings.")
        if sources is not None and len(sources) != len(conditions):
            raise ValueError(f"There are {len(conditions)} conditions and {len(sources)} sources.")
        nothing = [None] * len(conditions)
        starts: Sequence[Tensor | None] = nothing if sources is None else sources
        plans = [
            self.plan(condition, wish, source=source, lora=lora, original=original)
            for condition, wish, source, original in zip(
                conditions, settings, starts, originals or nothing, strict=True
            )
        ]
        run = self.begin(plans)
        while not run.finished:
            check_stop(stop)
            self.step([run], plans[:1])
            if on_step is not None:
                on_step(run.done, run.total)
        check_stop(stop)
        return self.complete(run.latents, plans)

    def plan(
        self,
        condition: Condition,
        settings: DecodeSettings | None = None,
        *,
        source: Tensor | None = None,
        lora: DecoderLora | None = None,
        original: Medium | None = None,
    ) -> Plan:
        """Make all choices of one request; arguments and errors as in :meth:`decode`."""
        self.condition_spec.check(condition)
        wishes, usual = settings or DecodeSettings(), self.defaults
        shape = self._latent_shape(wishes)
        expect_named(wishes.lora, lora)
        if (wishes.deep_every or 1) > 1:
            self._deep_features()
        if source is not None:
            check_source(source, shape)
        elif wishes.strength is not None:
            raise ValueError(
                f"strength is {wishes.strength:g}, and there is no source to keep anything of. "
                f"Give a source, or leave strength out."
            )
        if original is None and wishes.keep_untouched:
            raise ValueError(
                "keep_untouched is true, and there is no original to keep anything of. Give an original, or "
                "leave keep_untouched out."
            )
        chosen = replace(
            wishes,
            seed=secrets.randbelow(2**32) if wishes.seed is None else wishes.seed,
            steps=wishes.steps or usual.steps,
            guidance_scale=usual.guidance_scale if wishes.guidance_scale is None else wishes.guidance_scale,
            scheduler=wishes.scheduler or usual.scheduler,
            strength=None if source is None else wishes.strength or USUAL_STRENGTH,
        )
        kept = None if original is None or wishes.keep_untouched is False else self._fitted(original, wishes)
        return Plan(condition, chosen, shape, source, lora, kept)

    def begin(self, plans: Sequence[Plan]) -> Denoising:
        """Return the state before the first step of plans that take every step together.

        Raises:
            ValueError: the plans differ in steps, scheduler, size, LoRA, or in whether they have a source.

        """
        first = plans[0]
        if len({plan.kind for plan in plans}) > 1:
            raise ValueError(
                "Requests of one batch differ in steps, scheduler, size or LoRA. Run them apart."
            )
        device, dtype = self.folder.device, self.folder.dtype
        sources = [plan.source for plan in plans if plan.source is not None]
        with torch.inference_mode():
            embeddings = torch.stack([plan.condition.embeddings for plan in plans])
            return Denoising(
                self._scheduler(first.settings.scheduler or ""),
                draw_noise(first.shape, [plan.settings.seed or 0 for plan in plans], device),
                self._prepared(embeddings.to(device, dtype)),
                steps=first.settings.steps or 1,
                guidance=[plan.settings.guidance_scale or 0 for plan in plans],
                source=torch.stack(sources).to(device, torch.float32) if sources else None,
                strength=first.strength,
            )

    def _scheduler(self, name: str) -> Any:
        """Return a scheduler for one run. Building one takes longer than a step of a small network."""
        if name not in self._schedulers:
            self._schedulers[name] = make_scheduler(self._scheduler_config, name)
        return copy.copy(self._schedulers[name])  # a run sets all that it changes anew: set_timesteps()

    def step(
        self,
        runs: Sequence[Denoising],
        plans: Sequence[Plan] | None = None,
        *,
        thrift: Thrift = Thrift.NONE,
    ) -> None:
        """Take one denoising step of every run, as :func:`decoders.denoising.step` does.

        Where ``plans`` ask for it, deep features of the network are kept and reused; that takes a second,
        cheaper call for the runs that reuse them. The network wears the LoRA of the plans, which is the
        same in all of them.
        """
        loras = {plan.lora for plan in plans or ()}
        assert len(loras) <= 1, "plans with different LoRA in one step"
        idle = self._other_networks() if thrift >= Thrift.SPARSE else []
        with aside(idle, self.folder.device), self._worn.wearing(next(iter(loras), None)):
            halves_apart = thrift >= Thrift.SLICED
            every = [plan.deep_every for plan in plans or ()]
            if max(every, default=1) == 1:
                step(self._predict, runs, self._null, halves_apart=halves_apart)
                return
            deep = self._deep_features()
            shallow = partial(self._run, deep.shallow)
            step_reusing(deep, self._predict, shallow, runs, every, self._null, halves_apart=halves_apart)

    @property
    def has_deep_features(self) -> bool:
        """Whether requests may ask for ``deep_every``: the network has two levels or more."""
        return len(self._network.up_blocks) > 1

    def _deep_features(self) -> DeepFeatures:
        if self._deep is None:
            self._deep = DeepFeatures(self._network)
        return self._deep

    def _predict(self, latents: Tensor, timesteps: Tensor, conditions: Tensor) -> Tensor:
        """Run the denoising network; each row has its own timestep."""
        hooked = not self._worn.nothing or (self._deep is not None and self._deep.is_recording)
        return self._quick(latents, timesteps, conditions, plain=hooked)

    def complete(
        self, latents: Tensor, plans: Sequence[Plan], *, thrift: Thrift = Thrift.NONE
    ) -> list[Decoded]:
        """Turn clean latents ``(B, ...)`` into the media that were planned."""
        settings = [plan.settings for plan in plans]
        with self._vae_with(thrift) as sliced:
            media = self._media(latents.to(self.folder.dtype), settings, sliced=sliced)
        media = [
            with_kept(medium, plan.original, copied=plan.condition.copied)
            for medium, plan in zip(media, plans, strict=True)
        ]
        return [
            Decoded(medium, self._manifest(medium, plan)) for medium, plan in zip(media, plans, strict=True)
        ]

    def encode_source(
        self, medium: Medium, settings: DecodeSettings | None = None, *, thrift: Thrift = Thrift.NONE
    ) -> Tensor:
        """Return the latents of a medium ``(...)`` on the CPU, for ``source`` of :meth:`decode`.

        The medium is fitted to the size that ``settings`` ask for. Raises ValueError for a medium of
        another modality.
        """
        self._expect(medium)
        with self._vae_with(thrift) as sliced:
            latents = self._encoded(medium, settings or DecodeSettings(), sliced=sliced)
        return latents.clone()  # out here it is a tensor like any other

    @contextmanager
    def _vae_with(self, thrift: Thrift) -> Iterator[bool]:
        """Let the VAE work as sparingly as asked for, and say whether with one picture at a time."""
        idle = [self._network] if thrift >= Thrift.SPARSE else []
        with torch.inference_mode(), aside(idle, self.folder.device):
            if thrift >= Thrift.SPARSE:
                self.vae.enable_tiling()
            try:
                yield thrift >= Thrift.SLICED or self._vae_use != "whole"
            finally:
                self.use_vae(self._vae_use)

    def preview(self, latents: Tensor) -> Image:
        """Show roughly what latents ``(...)`` of one request will be: a picture, without the VAE.

        The middle frame of a video; for a sound its mel spectrum, low tones at the bottom. The first
        call fits a linear map to the VAE.
        """
        if self._linear is None:
            with torch.inference_mode():
                channels = int(self.vae.config.latent_channels)
                self._linear = LinearPreview.fit(self._pictures, channels, self.folder.device)
        return Image(self._shown(self._linear(self._still(latents))))

    def _other_networks(self) -> list[nn.Module]:
        """Return all networks but the denoising one."""
        text_encoder = () if self._text is None else self._text[1:]
        loaded = [*vars(self).values(), *text_encoder]
        return [part for part in loaded if isinstance(part, nn.Module) and part is not self._network]

    def _manifest(self, medium: Medium, plan: Plan) -> dict[str, Any]:
        manifest = {
            "modality": self.modality.value,
            "pipeline": self.folder.pipeline_class,
            "weights": self.digest,
            **self._sizes(medium),
            **plan.manifest(),
        }
        if self._vae_use == "tiled":
            manifest["vae"] = "tiled"
        return manifest

    @abstractmethod
    def _encoded(self, medium: Medium, settings: DecodeSettings, *, sliced: bool) -> Tensor:
        """Return the latents of a medium of this modality ``(...)`` on the CPU."""

    @abstractmethod
    def _fitted(self, original: Medium, settings: DecodeSettings) -> Medium:
        """Return an original of this modality in the size that ``settings`` ask for, if size matters."""

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

    @property
    @abstractmethod
    def _network(self) -> Any:
        """The denoising network."""

    @abstractmethod
    def _run(self, network: Any, latents: Tensor, timesteps: Tensor, conditions: Tensor) -> Tensor:
        """Run ``network`` as the denoising network wants to be run; each row has its own timestep."""

    @abstractmethod
    def _media(
        self, latents: Tensor, settings: Sequence[DecodeSettings], *, sliced: bool = False
    ) -> Sequence[Medium]:
        """Turn clean latents ``(B, ...)`` into one medium per request."""

    @abstractmethod
    def finish(self, latents: Tensor, *, sliced: bool = False) -> Tensor:
        """Turn clean latents ``(B, ...)`` into pictures or samples, on the device."""

    def _still(self, latents: Tensor) -> Tensor:
        """Return the latents ``(C, h, w)`` of one picture to show for those of a medium."""
        return latents

    def _pictures(self, latents: Tensor) -> Tensor:
        """Decode latents ``(N, C, h, w)`` with the VAE alone."""
        pictures: Tensor = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return pictures

    def _shown(self, pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Return what the VAE gives ``(H, W, c)`` as a picture ``(H, W, 3)``."""
        shown: NDArray[np.uint8] = ((pixels / 2 + 0.5).clip(0, 1) * 255).round().astype(np.uint8)
        return shown

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
