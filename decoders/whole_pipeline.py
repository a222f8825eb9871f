"""Any diffusers pipeline as a decoder, one request at a time: a condition in, a medium out.

What the latent decoders take apart is left whole here: the pipeline's own ``__call__`` makes the medium, and
its arguments are found by their names. Its own scheduler is kept, as flow-matching pipelines run with no
other.
"""

from __future__ import annotations

import inspect
import math
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decoders.condition import Condition, ConditionSpec, digest
from decoders.condition_layouts import condition_layout
from decoders.denoising import OnStep, check_stop
from decoders.lora import DecoderLora, WornLora, expect_named
from decoders.pipeline_arguments import (
    ARGUMENTS,
    ENCODED,
    SELF_GUIDED,
    WITHOUT_TEXT_ENCODERS,
    argument_names,
    modality_of,
)
from decoders.pipeline_folder import DEFAULTS_FILE, PipelineFolder
from decoders.pipeline_lora import denoising_networks, read_pipeline_lora, wearer
from decoders.plan import Decoded
from decoders.settings import DecoderDefaults, DecodeSettings
from decoders.text_readers import READERS
from encoders.media import Audio, Image, Medium, Modality, Video

_SCHEDULERS: Mapping[str, str] = {"CosineDPMSolverMultistepScheduler": "EDMDPMSolverMultistepScheduler"}
"""Schedulers that need a further library, and those that solve the same equation without noise."""

_ANSWERS = {Modality.IMAGE: "images", Modality.VIDEO: "frames", Modality.AUDIO: "audios"}
_USUAL_FPS = 8.0
_FPS = {"WanPipeline": 16.0}
"""Frames per second that a model was trained on, where its pipeline does not say."""


@dataclass(frozen=True, eq=False, slots=True)
class PipelinePlan:
    """One request with every choice made; made by :meth:`WholePipeline.plan`.

    ``shape`` are the numbers that its cost grows with, ``lora`` what the network wears meanwhile.
    """

    condition: Condition
    settings: DecodeSettings
    shape: tuple[int, ...]
    lora: DecoderLora | None = None

    @property
    def steps(self) -> int:
        """Denoising steps that will run."""
        return self.settings.steps or 1

    @property
    def rows(self) -> float:
        """Rows that a step takes in the network, as far as can be known."""
        return 2.0 if (self.settings.guidance_scale or 0) > 1 else 1.0


class WholePipeline:
    """One loaded diffusers pipeline that makes one medium at a time. One object serves one thread.

    Media equal those of the pipeline called with the same prompt, settings and CPU generator. ``null`` is
    what its text encoders make of the empty caption, None if they are to be asked.
    """

    def __init__(
        self, pipeline: Any, folder: PipelineFolder, null: Mapping[str, Tensor] | None = None
    ) -> None:
        self.pipeline = pipeline
        self.folder = folder
        self._takes = inspect.signature(type(pipeline).__call__).parameters
        if not {"callback_on_step_end", "callback"} & set(self._takes):
            raise ValueError(
                f"{folder.path}: a {folder.pipeline_class} calls nobody after its steps, so it could not be "
                f"stopped. Choose a pipeline that takes callback_on_step_end or callback."
            )
        if "prompt" not in self._takes:
            raise ValueError(
                f"{folder.path}: a {folder.pipeline_class} takes no prompt, so nobody could say what it "
                f"should make. Choose a pipeline that makes media of words."
            )
        self._names = argument_names(self._takes)
        self.modality = modality_of(self._names)
        self.defaults = self._usual().updated(folder.path / DEFAULTS_FILE)
        encodes = folder.pipeline_class in ENCODED or folder.pipeline_class in READERS
        self._layout = condition_layout(folder.pipeline_class, folder.json) if encodes else {}
        self._null = self._read("") if null is None else dict(null)
        if folder.pipeline_class in SELF_GUIDED:
            self._null |= {f"negative_{name}": self._null[name] for name in self._layout}
        self._check_layout()
        self.digest = folder.digest()
        self._vae_use = "whole"
        networks = denoising_networks(pipeline)
        self._worn = WornLora(wearer(networks)) if networks else None

    @classmethod
    def load(
        cls,
        folder: Path | str,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        reads_captions: bool = True,
    ) -> Self:
        """Load a pipeline from a folder that ``save_pretrained`` wrote: safetensors only.

        ``patchbay.json`` in it may set defaults (see :class:`DecoderDefaults`); what it leaves open, the
        pipeline's own defaults decide. Without ``reads_captions`` the text encoders read the empty caption
        alone, on the CPU, and are let go; ``null.safetensors`` keeps what they made of it for the next time.

        Raises:
            FileNotFoundError: the folder or its index is missing.
            ValueError: the installed diffusers has no such class, a part is missing or damaged, or the
                pipeline cannot be stopped between its steps.

        """
        opened = PipelineFolder(folder, device, dtype)
        name = opened.pipeline_class
        kind = getattr(diffusers, name, None)
        if not (isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)):
            raise ValueError(
                f"{opened.path} holds a {name}; diffusers {diffusers.__version__} has no such pipeline. "
                f"Install a diffusers that has it, or choose another folder."
            )
        parts = _other_scheduler(opened)
        if reads_captions or name not in WITHOUT_TEXT_ENCODERS:
            return cls(_silent(opened.pipeline(kind, **parts)).to(device), opened)
        null = opened.saved_nulls()
        gone = {} if null is None else dict.fromkeys(opened.text_encoders)
        decoder = cls(_silent(opened.pipeline(kind, **parts, **gone)), opened, null)
        if null is None:
            opened.write_nulls(decoder._null)
        decoder.forget_text_encoders()
        decoder.move(device)
        return decoder

    def forget_text_encoders(self) -> None:
        """Let go of the text encoders; the next caption loads them again."""
        for part in self.folder.text_encoders:
            setattr(self.pipeline, part, None)
        self._null = {name: tensor.to(self.folder.device) for name, tensor in self._null.items()}

    def _recall_text_encoders(self) -> None:
        gone = [part for part in self.folder.text_encoders if getattr(self.pipeline, part, None) is None]
        if not gone:
            return
        kept = {name: part for name, part in self.pipeline.components.items() if name not in gone}
        whole = self.folder.pipeline(type(self.pipeline), **kept)
        for part in gone:
            setattr(self.pipeline, part, getattr(whole, part).to(self.folder.device))

    @property
    def condition_specs(self) -> dict[str, ConditionSpec]:
        """The tensors that the pipeline is conditioned on, by name; none if it takes words only."""
        return dict(self._layout) or self._given_specs()

    def _given_specs(self) -> dict[str, ConditionSpec]:
        """Return the shapes of what the text encoders give."""
        found = {}
        for name, tensor in self._null.items():
            if not name.startswith("negative_"):
                rows = tensor if tensor.ndim == 2 else tensor[None]
                found[name] = ConditionSpec(
                    tokens=rows.shape[0], width=rows.shape[1], pooled=tensor.ndim == 1 and "pooled" in name
                )
        return found

    def _check_layout(self) -> None:
        """Raise ValueError when the text encoders give other shapes than the configurations promise."""
        given = self._given_specs()
        if self._layout and given != self._layout:
            raise ValueError(
                f"{self.folder.path}: its text encoders give {given}; expected {self._layout} from the "
                f"configurations. The parts do not belong together; copy the whole pipeline again."
            )

    @property
    def condition_spec(self) -> ConditionSpec:
        """The shape of the embeddings of a condition; raises ValueError if only words will do."""
        specs = self.condition_specs
        if not specs:
            raise ValueError(
                f"A {self.folder.pipeline_class} is conditioned on words, not on embeddings. "
                f"Give it the caption: link: caption."
            )
        return specs["prompt_embeds"]

    def encode_caption(self, caption: str) -> Condition:
        """Return what the pipeline's own text encoders make of ``caption``, on the CPU.

        For a class that is not in :data:`ENCODED`, the words themselves, to be encoded when they are used.
        """
        named = {
            name: tensor.cpu()
            for name, tensor in (self._read(caption) if caption else self._null).items()
            if not name.startswith("negative_")
        }
        embeddings = named.pop("prompt_embeds", torch.zeros(0, 0))
        return Condition(embeddings, named, caption)

    def read_lora(self, name: str, folder: Path) -> DecoderLora:
        """Read LoRA for the denoising networks; see :func:`decoders.pipeline_lora.read_pipeline_lora`."""
        return read_pipeline_lora(name, folder, self.pipeline, self.folder.dtype)

    def compile(self) -> None:
        """Raise ValueError: pipelines that are not taken apart are not compiled here."""
        raise ValueError(
            f"{self.folder.path}: a {self.folder.pipeline_class} runs as a whole and is not compiled here. "
            f"Take compile out of the preset."
        )

    def trace(self) -> None:
        """Raise ValueError: neither are they recorded."""
        self.compile()

    def graph(self, capture: object) -> None:
        """Raise ValueError: nor captured."""
        self.compile()

    def encode_source(self, medium: Medium, settings: DecodeSettings | None = None) -> Tensor:
        """Raise ValueError: pipelines that are not taken apart always start from noise."""
        raise self._no_source()

    def _no_source(self) -> ValueError:
        return ValueError(
            f"strength asks for a start from an earlier {self.modality.value}; a "
            f"{self.folder.pipeline_class} runs as a whole, from noise. Leave strength out."
        )

    def move(self, device: torch.device | str) -> None:
        """Move all weights to ``device``. Before anything is decoded they must be on the decoder's own."""
        self.pipeline.to(device)

    def use_vae(self, how: str) -> None:
        """Choose how latents become pictures or sounds: all ``whole``, ``sliced`` one by one, or ``tiled``.

        Raises:
            ValueError: the VAE of this pipeline cannot do so.

        """
        vae = getattr(self.pipeline, "vae", None)
        for name, wanted in (("slicing", how != "whole"), ("tiling", how == "tiled")):
            switch = getattr(vae, f"{'enable' if wanted else 'disable'}_{name}", None)
            if wanted and switch is None:
                raise ValueError(
                    f"{self.folder.path}: the {type(vae).__name__} of this {self.folder.pipeline_class} "
                    f"knows no {name}. Choose whole."
                )
            if switch is not None:
                switch()
        self._vae_use = how

    def decode(
        self,
        condition: Condition,
        settings: DecodeSettings | None = None,
        on_step: OnStep | None = None,
        stop: threading.Event | None = None,
        *,
        lora: DecoderLora | None = None,
    ) -> Decoded:
        """Make one medium.

        Args:
            condition: of :meth:`encode_caption`, or embeddings of the shape :attr:`condition_spec`. Masks
                that it lacks are filled with ones.
            settings: wishes; what is None follows the decoder's defaults, a seed is drawn.
            on_step: called with (steps done, steps in all) after each denoising step.
            stop: looked at before the first step and after each.
            lora: of :meth:`read_lora`, on the decoder's device; what ``settings`` name.

        Returns:
            The medium and its manifest.

        Raises:
            Cancelled: ``stop`` was set.
            ValueError: a condition or setting that does not fit this pipeline.

        """
        return self.run(self.plan(condition, settings, lora=lora), on_step, stop)

    def plan(
        self,
        condition: Condition,
        settings: DecodeSettings | None = None,
        *,
        lora: DecoderLora | None = None,
    ) -> PipelinePlan:
        """Make all choices of one request; arguments and errors as in :meth:`decode`."""
        self._check(condition)
        wishes = settings or DecodeSettings()
        sizes = ("width_px", "height_px", "num_frames", "duration_s")
        wishes.only(*(name for name in sizes if self._names[name]))
        expect_named(wishes.lora, lora)
        if wishes.scheduler is not None or (wishes.deep_every or 1) > 1:
            raise ValueError(
                f"scheduler is {wishes.scheduler!r} and deep_every {wishes.deep_every!r}; a "
                f"{self.folder.pipeline_class} keeps its own scheduler and computes every step. "
                f"Leave both out, and fast."
            )
        if wishes.strength is not None:
            raise self._no_source()
        if wishes.keep_untouched:
            raise ValueError(
                f"keep_untouched is true; a {self.folder.pipeline_class} runs as a whole, and keeps nothing "
                f"of an earlier {self.modality.value}. Leave keep_untouched out."
            )
        chosen = replace(
            wishes,
            seed=secrets.randbelow(2**32) if wishes.seed is None else wishes.seed,
            **{
                name: getattr(wishes, name) if getattr(wishes, name) is not None else usual
                for name in ("steps", "guidance_scale", *sizes)
                if (usual := getattr(self.defaults, name)) is not None or getattr(wishes, name) is not None
            },
        )
        return PipelinePlan(condition, chosen, self._shape(chosen), lora)

    def run(
        self,
        plan: PipelinePlan,
        on_step: OnStep | None = None,
        stop: threading.Event | None = None,
        *,
        frugal: bool = False,
    ) -> Decoded:
        """Carry out a plan; ``frugal`` sends what it can through the VAE in slices and tiles."""
        check_stop(stop)
        arguments = self._conditions(plan.condition) | self._wishes(plan.settings)
        arguments["generator"] = torch.Generator("cpu").manual_seed(plan.settings.seed or 0)
        arguments["output_type"] = "np"
        arguments |= self._callback(plan.steps, on_step, stop)
        with torch.inference_mode(), self._slices(frugal), self._wearing(plan.lora):
            answer = self.pipeline(
                **{name: value for name, value in arguments.items() if name in self._takes}
            )
        check_stop(stop)
        medium = self._medium(answer, plan.settings)
        return Decoded(medium, self._manifest(medium, plan))

    def _usual(self) -> DecoderDefaults:
        """Return the defaults of the pipeline's own arguments."""
        own: dict[str, Any] = {}
        for setting, name in self._names.items():
            value = None if name is None else self._takes[name].default
            if isinstance(value, int | float) and not isinstance(value, bool):
                own[setting] = value
        usual: dict[str, Any] = {"steps": 50, "guidance_scale": 1.0}
        if self.folder.pipeline_class in _FPS:
            usual["fps"] = _FPS[self.folder.pipeline_class]
        return DecoderDefaults(**usual | own)

    def _read(self, caption: str) -> dict[str, Tensor]:
        """Return what the text encoders give for one caption, without the batch dimension."""
        kind = self.folder.pipeline_class
        reader, names = READERS.get(kind), ENCODED.get(kind, ())
        if reader is None and not names:
            return {}
        self._recall_text_encoders()
        device = getattr(self.pipeline, self.folder.text_encoders[0]).device
        if reader is not None:
            with torch.inference_mode():
                found = reader(self.pipeline, caption, self._layout, device)
                return {name: tensor.clone() for name, tensor in found.items()}
        known = inspect.signature(self.pipeline.encode_prompt).parameters
        wanted = {"prompt": caption, "prompt_2": None, "prompt_3": None, "device": device}
        counts = {"num_images_per_prompt": 1, "num_videos_per_prompt": 1, "do_classifier_free_guidance": True}
        if "max_sequence_length" in self._takes:  # the defaults of encode_prompt may differ from the call's
            counts["max_sequence_length"] = self._takes["max_sequence_length"].default
        given = {name: value for name, value in (wanted | counts).items() if name in known}
        with torch.inference_mode():
            answers = self.pipeline.encode_prompt(**given)
        pairs = zip(names, answers, strict=True)
        return {
            name: answer[0].clone() for name, answer in pairs if answer is not None and name in self._takes
        }

    def _check(self, condition: Condition) -> None:
        specs = self.condition_specs
        if not specs:
            if condition.caption is None:
                raise ValueError(
                    f"The condition holds no caption; a {self.folder.pipeline_class} is conditioned on "
                    f"words. Make it with encode_caption()."
                )
            return
        self.condition_spec.check(condition)
        for name, tensor in condition.named.items():
            if name not in specs or tensor.shape != self._null[name].shape:
                expected = {other: tuple(self._null[other].shape) for other in specs}
                raise ValueError(
                    f"The condition has {name} of shape {tuple(tensor.shape)}; this decoder expects "
                    f"{expected}. Make it with encode_caption()."
                )
        lacking = [name for name in specs if name not in condition.named and not name.endswith("mask")]
        if lacking != ["prompt_embeds"]:
            raise ValueError(
                f"The condition lacks {', '.join(lacking[1:])}, which a {self.folder.pipeline_class} takes "
                f"besides prompt_embeds. Make it with encode_caption()."
            )

    def _conditions(self, condition: Condition) -> dict[str, Any]:
        """Return the arguments that condition the pipeline, negatives included."""
        if not self._null:
            # Those with a true_cfg_scale guide only where something is to be guided away from.
            away = {"negative_prompt": " "} if self._names["guidance_scale"] == "true_cfg_scale" else {}
            return {"prompt": condition.caption, **away}
        found = dict(self._null)
        given = {"prompt_embeds": condition.embeddings, **condition.named}
        for name in self.condition_specs:
            null = self._null[name]
            found[name] = given[name].to(null) if name in given else torch.ones_like(null)
        return {name: tensor[None] for name, tensor in found.items()}

    def _wishes(self, settings: DecodeSettings) -> dict[str, Any]:
        values = {name: getattr(settings, name, None) for name in ARGUMENTS} | {"fps": self.defaults.fps}
        return {
            argument: values[setting]
            for setting, argument in self._names.items()
            if argument is not None and values[setting] is not None
        }

    def _callback(self, steps: int, on_step: OnStep | None, stop: threading.Event | None) -> dict[str, Any]:
        """Return the arguments that have the pipeline report each step, and stop by an exception."""
        done = 0

        def after() -> None:
            nonlocal done
            check_stop(stop)
            done += 1
            if on_step is not None:
                on_step(min(done, steps), steps)

        def after_step(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            after()
            return tensors

        def after_old_step(step: int, timestep: Any, latents: Tensor) -> None:
            after()

        if "callback_on_step_end" in self._takes:
            return {"callback_on_step_end": after_step}
        return {"callback": after_old_step, "callback_steps": 1}

    def _medium(self, answer: Any, settings: DecodeSettings) -> Medium:
        made = getattr(answer, _ANSWERS[self.modality], None)
        if made is None:
            raise ValueError(
                f"A {self.folder.pipeline_class} answers with a {type(answer).__name__}; expected one that "
                f"has {_ANSWERS[self.modality]}. This pipeline makes no {self.modality.value}."
            )
        values = np.asarray(made[0], dtype=np.float32)
        match self.modality:
            case Modality.IMAGE:
                return Image(_eight_bits(values))
            case Modality.VIDEO:
                return Video(_eight_bits(values), float(self.defaults.fps or _USUAL_FPS))
        mono = values.mean(axis=0) if values.ndim == 2 else values
        return Audio(np.ascontiguousarray(mono.clip(-1, 1)), self._rate())

    def _rate(self) -> int:
        """Return the samples per second of a pipeline for sound."""
        for name in ("vocoder", "vae"):
            config = getattr(getattr(self.pipeline, name, None), "config", None)
            if (rate := getattr(config, "sampling_rate", None)) is not None:
                return int(rate)
        raise ValueError(
            f"{self.folder.path}: neither vocoder nor vae of this {self.folder.pipeline_class} says its "
            f"sampling_rate. Add it to its config.json."
        )

    def _shape(self, settings: DecodeSettings) -> tuple[int, ...]:
        """Return what the cost of a request grows with: pixels and frames, or hundredths of a second."""
        if self.modality is Modality.AUDIO:
            return (math.ceil((settings.duration_s or 1.0) * 100),)
        side = getattr(self.pipeline, "default_sample_size", None)
        usual = int(side * getattr(self.pipeline, "vae_scale_factor", 1)) if isinstance(side, int) else 1
        sizes = (settings.height_px or usual, settings.width_px or usual)
        return (settings.num_frames or 1, *sizes) if self.modality is Modality.VIDEO else sizes

    def _manifest(self, medium: Medium, plan: PipelinePlan) -> dict[str, Any]:
        manifest: dict[str, Any] = {
            "modality": self.modality.value,
            "pipeline": self.folder.pipeline_class,
            "weights": self.digest,
            "seed": plan.settings.seed,
            "scheduler": type(self.pipeline.scheduler).__name__,
            "steps": plan.settings.steps,
            "guidance_scale": plan.settings.guidance_scale,
        }
        match medium:
            case Image(pixels=pixels):
                manifest |= {"width_px": pixels.shape[1], "height_px": pixels.shape[0]}
            case Video(frames=frames, fps=fps):
                sizes = {"width_px": frames.shape[2], "height_px": frames.shape[1]}
                manifest |= sizes | {"num_frames": len(frames), "fps": fps}
            case Audio():
                manifest |= {"duration_s": medium.seconds, "rate_hz": medium.rate}
        if self._null:
            manifest["condition"] = digest(plan.condition.embeddings)
        if plan.lora is not None:
            manifest["lora"] = {"name": plan.lora.name, "digest": plan.lora.digest}
        return manifest

    def _wearing(self, lora: DecoderLora | None) -> AbstractContextManager[None]:
        return nullcontext() if self._worn is None else self._worn.wearing(lora)

    @contextmanager
    def _slices(self, frugal: bool) -> Iterator[None]:
        """Let the VAE work in slices and tiles, where it knows how."""
        vae = getattr(self.pipeline, "vae", None)
        switches = [name for name in ("slicing", "tiling") if frugal and hasattr(vae, f"enable_{name}")]
        for name in switches:
            getattr(vae, f"enable_{name}")()
        try:
            yield
        finally:
            for name in switches:
                getattr(vae, f"disable_{name}")()
            if switches:
                self.use_vae(self._vae_use)


def _silent(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _other_scheduler(folder: PipelineFolder) -> dict[str, Any]:
    """Return the scheduler that takes the place of the folder's own, if that is one of those replaced."""
    entry = folder.index.get("scheduler")
    other = _SCHEDULERS.get(str(entry[1])) if isinstance(entry, list) and len(entry) == 2 else None
    if other is None:
        return {}
    kind = getattr(diffusers, other)
    known = inspect.signature(kind.__init__).parameters
    settings = {name: value for name, value in folder.scheduler_config().items() if name in known}
    return {"scheduler": kind(**settings)}


def _eight_bits(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return pixels in [0, 1] as uint8."""
    pixels: NDArray[np.uint8] = (values.clip(0, 1) * 255).round().astype(np.uint8)
    return pixels
