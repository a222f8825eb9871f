"""Presets: one YAML names the encoder, the language model, a decoder per modality, and limits.

A preset is looked up by name among the shipped ones, or given as the path of a YAML file. Folders
in it are relative to the file itself. Nothing in the program asks which preset it runs.
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from alignment.second_look import SecondLook
from decoders.settings import DecodeSettings
from encoders.media import MediaBudget, Modality
from encoders.tiler import Tiling, TilingName
from services.compiling import Compile
from services.errors import BadRequest, PresetProblem
from services.origins import DtypeName, Origin, Strict
from services.setting_names import IN_REQUESTS

SHIPPED = Path(__file__).resolve().parent.parent / "deploy" / "presets"


QuantizationName = Literal["int8", "nf4"]


def _nameable(folder: str) -> str:
    if not folder.strip() or "\0" in folder:
        raise ValueError(f"{folder!r} is no folder; expected its path, or '.' for where the preset's file is")
    return folder


SomeFolder = Annotated[str, AfterValidator(_nameable)]


class BoxPreset(Strict):
    """What every box has. ``dtype`` None leaves the choice to the box."""

    folder: SomeFolder
    dtype: DtypeName | None = None
    origins: tuple[Origin, ...] = ()


class TilingPreset(Strict):
    """How pictures larger than the encoder's are cut; see :mod:`encoders.tiler`."""

    name: TilingName
    most: int = Field(default=6, ge=2, le=64, description="squares of one picture, the overview not counted")


class EncoderPreset(BoxPreset):
    """Which encoder reads media, and what it can read.

    ``tiling`` lets the language model see large pictures in detail, for a place in its context per square; a
    bridge has to be trained to it. Without it a picture is seen once, as the encoder was trained.
    """

    folder: SomeFolder = "encoder"
    modalities: tuple[Modality, ...] = (Modality.IMAGE, Modality.VIDEO, Modality.AUDIO)
    cache_mb: int = Field(default=256, ge=0, description="encoded media that are kept, by their content")
    tiling: TilingPreset | None = None


class LanguageModelPreset(BoxPreset):
    """Which language model thinks, and how many replies at once.

    ``base`` is the folder of a causal language model that takes the place of the one in ``folder``; a bridge
    has to be trained to it.
    ``context`` None is all that the model sees; less saves memory. ``step_tokens`` is the most that one
    step of the engine reads; more answers long prompts sooner, less keeps running replies steadier.
    ``quantization`` keeps the weights in 8 or 4 bits, see :mod:`llm.quantization`. ``compile`` true
    has torch.compile make code for the steps of running replies, which takes a while at the start and a C++
    compiler. ``trace`` records the model at the start and repeats that without Python, which pays for small
    models on a CPU; ``graphs`` captures CUDA graphs, for a GPU that waits for Python.
    `patchbay bench compile` says how much.
    """

    folder: SomeFolder = "llm"
    base: SomeFolder | None = None
    quantization: QuantizationName | None = None
    slots: int = Field(default=8, ge=1, description="replies that are made at the same time")
    context: int | None = Field(default=None, ge=1, description="positions of a conversation and its reply")
    step_tokens: int = Field(default=256, ge=2)
    compile: Compile = False


OWN_SIZES = {
    Modality.IMAGE: ("width_px", "height_px"),
    Modality.VIDEO: ("width_px", "height_px", "num_frames"),
    Modality.AUDIO: ("duration_s",),
}
"""The settings of a decoder that say how large its medium is."""


class CostLimits(Strict):
    """The most that one request may ask of a decoder."""

    steps: int = Field(default=100, ge=1)
    side_px: int = Field(default=1024, ge=8, description="width and height of a picture or a video")
    num_frames: int = Field(default=64, ge=1)
    duration_s: float = Field(default=30.0, gt=0)

    def check(self, settings: DecodeSettings, modality: Modality, *, place: str) -> None:
        """Raise BadRequest when ``settings`` ask for more, or for a size that such a medium does not have.

        ``place`` is where in the request they stand.
        """
        own = dict.fromkeys(IN_REQUESTS.get(name, name) for name in OWN_SIZES[modality])
        size = None if settings.width_px is None else f"{settings.width_px}x{settings.height_px}"
        sizes = {"size": size, "num_frames": settings.num_frames, "seconds": settings.duration_s}
        for told, given in sizes.items():
            if given is not None and told not in own:
                raise BadRequest(
                    f"{told} is {given}, and {modality.value} has no such setting; how large it is, "
                    f"{' and '.join(own)} says. Leave {told} out.",
                    code="invalid_value",
                    param=f"{place}{told}",
                )
        for name, wish, most in (
            ("num_inference_steps", settings.steps, self.steps),
            ("size", settings.width_px, self.side_px),
            ("size", settings.height_px, self.side_px),
            ("num_frames", settings.num_frames, self.num_frames),
            ("seconds", settings.duration_s, self.duration_s),
        ):
            if wish is not None and wish > most:
                raise BadRequest(
                    f"{name} is {wish:g}; for {modality.value} this model allows at most {most:g}. "
                    "Ask for less.",
                    code="decoder_limit_exceeded",
                    param=f"{place}{name}",
                )


class DecoderPreset(BoxPreset):
    """One decoder: its pipeline, the link that conditions it, and its defaults.

    ``link`` ``signal`` sends the model's hidden states through the output projection; ``caption``
    sends the words before the medium through the decoder's own text encoder. ``steps``,
    ``guidance_scale`` and sizes of None leave the choice to the pipeline's folder. ``max_batch`` media
    are made at the same time; a request that would wait longer than ``max_wait_s`` for others is refused.
    ``waits_in`` is where the weights are while nobody uses them: on the ``device``, in the memory of the
    ``cpu``, or only on the ``disk``; with ``decoders_gb`` they leave the device only to make room. ``vae``
    ``sliced`` sends pictures and frames through the VAE one at a time, ``tiled`` also in tiles where they are
    larger than it was made for, which shows a little.
    ``deep_every`` above 1 makes media faster and less exact where a request does not say (see
    :mod:`decoders.deep_features`), ``fast_deep_every`` where it says ``fast``; `patchbay bench decode`
    measures both. ``edit_strength`` lets every medium start from the newest one of its kind in the
    conversation, so far away from it, where a request names no ``strength``; None starts from noise.
    ``keep_untouched`` gives every picture or video the pixels of the newest one wherever they agree, and
    every sound the tuning of the newest one, unless a request says otherwise (see :mod:`decoders.untouched`).
    ``compile`` is that of :class:`LanguageModelPreset`, for the denoising network.
    """

    waits_in: Literal["device", "cpu", "disk"] = "device"
    vae: Literal["whole", "sliced", "tiled"] = "whole"
    link: Literal["signal", "caption"] = "signal"
    steps: int | None = Field(default=None, ge=1)
    guidance_scale: float | None = Field(default=None, ge=0)
    max_batch: int = Field(default=16, ge=1)
    max_wait_s: float = Field(default=60.0, gt=0)
    width_px: int | None = Field(default=None, ge=8)
    height_px: int | None = Field(default=None, ge=8)
    num_frames: int | None = Field(default=None, ge=1)
    duration_s: float | None = Field(default=None, gt=0)
    deep_every: int | None = Field(default=None, ge=1, le=16)
    fast_deep_every: int = Field(default=2, ge=2, le=16)
    edit_strength: float | None = Field(default=None, gt=0, le=1)
    keep_untouched: bool = False
    compile: Compile = False
    limits: CostLimits = CostLimits()

    def fill(self, settings: DecodeSettings) -> DecodeSettings:
        """Return ``settings`` with the preset's choice wherever the request made none."""
        if settings.fast is not None and settings.deep_every is None:
            settings = replace(settings, deep_every=self.fast_deep_every if settings.fast else 1)
        sizes = ("width_px", "height_px", "num_frames", "duration_s")
        names = ("steps", "guidance_scale", "deep_every", *sizes)
        silent = [name for name in names if getattr(settings, name) is None]
        return replace(settings, **{name: getattr(self, name) for name in silent})


class VerifyPreset(Strict):
    """How the agent looks again at what decoders made for it.

    The encoder reads the medium, and the language model says how probable its caption is as the answer to
    ``question``. Where some word of it is less probable than ``below``, the medium is made again with another
    seed, at most ``retries`` times, and the best is kept. ``modalities`` None are all that are made and read.
    """

    retries: int = Field(default=1, ge=1, le=8)
    below: float = Field(default=0.5, gt=0, lt=1)
    question: str = Field(default="describe this", pattern=r"\S")
    modalities: tuple[Modality, ...] | None = None


class GenerationDefaults(Strict):
    """How the language model speaks when a request does not say.

    A medium of which it is less sure than ``ask_below`` is asked about instead of made; None never asks.
    ``verify`` None takes media as they come. ``prompts`` says how a request for one medium, without a
    conversation, is put to it: "draw {prompt}". Kinds that are left out are made of the words as they are.
    """

    temperature: float = Field(default=0.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    repetition_penalty: float = Field(default=1.0, gt=0, le=2)
    max_new_tokens: int = Field(default=256, ge=1)
    ask_below: float | None = Field(default=None, gt=0, lt=1)
    verify: VerifyPreset | None = None
    prompts: dict[Modality, Annotated[str, Field(pattern=r"^[^{}]*\{prompt\}[^{}]*$")]] = Field(
        default_factory=dict
    )


class MediaLimits(Strict):
    """What one medium may cost to read."""

    max_mb: int = Field(default=64, ge=1)
    max_pixels: int = Field(default=40_000_000, ge=1)
    max_seconds: float = Field(default=300.0, gt=0)
    max_frames: int = Field(default=18_000, ge=1)

    def budget(self) -> MediaBudget:
        """Return the limits as the readers of media want them."""
        return MediaBudget(
            max_bytes=self.max_mb * 2**20,
            max_pixels=self.max_pixels,
            max_seconds=self.max_seconds,
            max_frames=self.max_frames,
        )


class AdapterPreset(Strict):
    """LoRA that a request may name: for which box it is, and its folder, relative to the weights."""

    box: Literal["language_model", "image", "video", "audio"]
    folder: SomeFolder


class Limits(Strict):
    """What one request may cost."""

    max_request_mb: int = Field(default=96, ge=1, description="size of a request body")
    max_messages: int = Field(default=200, ge=1)
    max_media: int = Field(default=16, ge=1, description="media in one conversation")
    max_decoder_calls: int = Field(default=6, ge=1, description="media in one reply")
    max_adapter_mb: int = Field(default=512, ge=1, description="adapters of one box that stay in memory")
    files_expire_after_h: float = Field(default=24.0, gt=0)
    media: MediaLimits = MediaLimits()


class Example(Strict):
    """Something to try at one click. ``files`` are relative to the preset's file."""

    text: str = ""
    files: tuple[str, ...] = ()


class Preset(Strict):
    """One runnable combination of models."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    description: str
    weights: SomeFolder = Field(description="folder of the weights, relative to the preset's file")
    sizes: SomeFolder | None = Field(
        default=None,
        description="folder of the boxes' configurations, for when the weights are not there yet",
    )
    encoder: EncoderPreset = EncoderPreset()
    language_model: LanguageModelPreset = LanguageModelPreset()
    decoders: dict[Modality, DecoderPreset] = Field(default={})
    decoders_gb: float | None = Field(
        default=None, gt=0, description="most that loaded decoders take; then they make room for each other"
    )
    adapters: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")], AdapterPreset] = (
        Field(default={})
    )
    projections: SomeFolder = "projections"
    generation: GenerationDefaults = GenerationDefaults()
    limits: Limits = Limits()
    examples: tuple[Example, ...] = ()
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:[0-9]+)?)$")
    file: Path = Field(exclude=True)

    @field_validator("decoders")
    @classmethod
    def _only_sizes_of_its_own(cls, decoders: dict[Modality, DecoderPreset]) -> dict[Modality, DecoderPreset]:
        if Modality.TEXT in decoders:
            raise ValueError("text needs no decoder; name image, video or audio")
        for modality, decoder in decoders.items():
            for name in ("width_px", "height_px", "num_frames", "duration_s"):
                if getattr(decoder, name) is not None and name not in OWN_SIZES[modality]:
                    raise ValueError(f"{modality.value} has no {name}; leave it out")
            if modality is Modality.AUDIO and decoder.vae != "whole":
                raise ValueError("audio has no pictures to slice or tile; leave vae out")
        return decoders

    @model_validator(mode="after")
    def _adapters_have_their_box(self) -> Self:
        for name, adapter in self.adapters.items():
            if adapter.box not in ("language_model", *(modality.value for modality in self.decoders)):
                raise ValueError(f"the adapter {name} is for {adapter.box}, and there is no such decoder")
        return self

    @property
    def second_look(self) -> SecondLook | None:
        """How the agent looks again at what was made; None where it does not, or has nothing to look at."""
        verify = self.generation.verify
        if verify is None:
            return None
        looked_at = frozenset(self.decoders) & frozenset(self.encoder.modalities)
        if verify.modalities is not None:
            looked_at &= frozenset(verify.modalities)
        if not looked_at:
            return None
        return SecondLook(
            retries=verify.retries,
            below=verify.below,
            question=verify.question,
            modalities=looked_at,
        )

    @property
    def as_argument(self) -> str:
        """What to write behind ``--preset``: the name of a shipped one, else the path of the file."""
        return self.file.stem if self.shipped else shlex.quote(shown(self.file))

    @property
    def shipped(self) -> bool:
        """Whether it came with the program."""
        return self.file.parent == SHIPPED

    @property
    def weights_folder(self) -> Path:
        """Where the weights are."""
        return (self.file.parent / self.weights).resolve()

    @property
    def sizes_folder(self) -> Path | None:
        """Where configurations of the boxes are, in the folders that the weights have."""
        return None if self.sizes is None else (self.file.parent / self.sizes).resolve()

    def described_in(self, folder: Path, name: str = "config.json") -> Path:
        """Return where the configuration of ``folder`` lies: there, or if it is not, among the sizes."""
        if (folder / name).is_file() or self.sizes_folder is None:
            return folder
        if not folder.is_relative_to(self.weights_folder):
            return folder
        return self.sizes_folder / folder.relative_to(self.weights_folder)

    @property
    def tiling(self) -> Tiling | None:
        """How the encoder cuts pictures, as it takes it."""
        wish = self.encoder.tiling
        return Tiling(wish.name, wish.most) if wish else None

    @property
    def boxes(self) -> tuple[BoxPreset, ...]:
        """The encoder, the language model, and the decoders."""
        return self.encoder, self.language_model, *self.decoders.values()

    @property
    def origins(self) -> tuple[Origin, ...]:
        """Where all the weights come from, in the order in which they are got."""
        return tuple(origin for box in self.boxes for origin in box.origins)

    @property
    def encoder_folder(self) -> Path:
        """The folder of the encoder."""
        return self.weights_folder / self.encoder.folder

    @property
    def language_model_folder(self) -> Path:
        """The folder of the language model."""
        return self.weights_folder / self.language_model.folder

    @property
    def projections_folder(self) -> Path:
        """The folder of the output projections that come with the weights, one folder per modality."""
        return self.weights_folder / self.projections

    @property
    def base_folder(self) -> Path:
        """The folder of the causal language model."""
        own = self.language_model.base
        return self.language_model_folder / "base" if own is None else self.weights_folder / own

    @property
    def bridges_folder(self) -> Path:
        """Where bridges lie that were trained for this preset: beside its file, under its name."""
        return self.file.parent / "bridges" / self.name

    @property
    def bridge_folder(self) -> Path:
        """The folder of the language model's bridge: one trained for this preset, or its own."""
        own = self.bridges_folder / "llm"
        return own if own.is_dir() else self.language_model_folder

    def projection_folder(self, modality: Modality) -> Path:
        """Return the folder of an output projection: one trained for this preset, or that of the weights."""
        own = self.bridges_folder / "projections" / modality.value
        return own if own.is_dir() else self.projections_folder / modality.value

    @property
    def language_model_dtype(self) -> DtypeName:
        """The dtype of the language model, by default the one that suits the device."""
        return self.language_model.dtype or ("float32" if self.device == "cpu" else "bfloat16")

    def decoder_folder(self, modality: Modality) -> Path:
        """Return the folder of one decoder."""
        return self.weights_folder / self.decoders[modality].folder


def shown(path: Path) -> str:
    """Return a path as a person in this folder would write it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def shipped_presets() -> list[str]:
    """Return the names of the presets that come with the program."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load_preset(name: str) -> Preset:
    """Return a shipped preset by name, or the one in a YAML file by path."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else SHIPPED / f"{name}.yaml"
    if path.parent == SHIPPED and path.stem not in shipped_presets():
        raise PresetProblem(
            f"There is no preset {name!r}. Known presets: {', '.join(shipped_presets()) or 'none'}. "
            "Or give the path of a YAML file.",
            code="unknown_preset",
        )
    try:
        values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PresetProblem(
            f"The preset file {path} cannot be read: {error.strerror}. Give a name that `patchbay presets` "
            "lists, or the path of a YAML file.",
            code="unknown_preset",
        ) from error
    except UnicodeDecodeError as error:
        raise PresetProblem(
            f"The preset file {path} is not text in UTF-8 ({error}). Save it as UTF-8.", code="invalid_preset"
        ) from error
    except yaml.YAMLError as error:
        raise PresetProblem(
            f"The preset file {path} is not YAML: {' '.join(str(error).split())}", code="invalid_preset"
        ) from error
    if not isinstance(values, dict) or "file" in values:
        raise PresetProblem(
            f"The preset file {path} must hold keys like name, description and weights.",
            code="invalid_preset",
        )
    try:
        return Preset(**values, file=path.resolve())
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(step) for step in item['loc'])}: {item['msg']}" for item in error.errors()
        )
        raise PresetProblem(
            f"The preset file {path} is wrong: {problems}. Compare it with deploy/presets/toybox.yaml.",
            code="invalid_preset",
        ) from error
