"""Encoders of the library transformers, one per kind of medium: a SigLIP for pictures, a CLAP for sounds.

Folder layout, each part as ``from_pretrained`` reads it; what is not there is not read by this encoder:
    vision/  config.json, model.safetensors, preprocessor_config.json of a SigLIP or a SigLIP 2
    audio/   the same of a CLAP
    towers.json: numbers of :class:`TowerNumbers`, where they differ from the usual ones

A checkpoint that holds a text tower too is read as it was published; the text tower stays on the disk.

Shape letters in this file:
    N items   S clips or frames of one item   L patches   E width of the tower
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    ClapAudioModelWithProjection,
    ClapFeatureExtractor,
    PreTrainedModel,
    SiglipImageProcessorPil,
    SiglipVisionModel,
)

from encoders.features import Features
from encoders.media import Audio, Image, Medium, Modality, Video, resample
from encoders.preprocess import clip_spans
from encoders.tiler import Tiler, Tiling, Whole, cut

VISION, AUDIO = TOWER_FOLDERS = ("vision", "audio")
NUMBERS_FILE = "towers.json"
KINDS = {VISION: ("siglip", "siglip_vision_model"), AUDIO: ("clap", "clap_audio_model")}
AT_ONCE = 16
"""Pictures or clips that go through a tower at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerNumbers:
    """How much of a long medium is read.

    Attributes:
        video_frames: frames taken from a video, evenly spread; fewer if it has fewer.
        audio_clips: most clips taken from a sound, evenly spread; each as long as the tower hears at once.

    """

    video_frames: int = 8
    audio_clips: int = 3

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{field.name} is {value!r}; expected a whole number of at least 1.")

    @classmethod
    def read(cls, path: Path) -> TowerNumbers:
        """Return the numbers in the JSON object in ``path``, the usual ones without such a file.

        Raises:
            ValueError: not a JSON object, an unknown name, or a number out of range.

        """
        if not path.is_file():
            return cls()
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            known = ", ".join(field.name for field in fields(cls))
            raise ValueError(f"{path}: {error} Expected a JSON object with {known}.") from None


class VisionTower:
    """A SigLIP or SigLIP 2 of fixed resolution: pictures to patch tokens and a pooled vector."""

    def __init__(self, model: SiglipVisionModel, processor: SiglipImageProcessorPil) -> None:
        self.model = model
        self.processor = processor
        config: Any = model.config  # typed as if sides could differ, which they do not in a SigLIP
        self.width = int(config.hidden_size)
        self.side = int(config.image_size)
        cells = self.side // int(config.patch_size)
        self.grid = (cells, cells)
        size, expected = dict(processor.size), self.side
        if (size.get("height"), size.get("width")) != (expected, expected):
            raise ValueError(
                f"The image processor makes pictures of {size}; this tower reads {expected} x {expected}. "
                f"Use the preprocessor_config.json of the same model."
            )

    @torch.inference_mode()
    def read(self, pictures: Sequence[NDArray[np.uint8]]) -> tuple[Tensor, Tensor]:
        """Read pictures ``(H, W, 3)`` uint8 into tokens ``(N, L, E)`` and pooled vectors ``(N, E)``."""
        tokens, pooled = [], []
        for start in range(0, len(pictures), AT_ONCE):
            pixels = self.processor(
                list(pictures[start : start + AT_ONCE]),
                return_tensors="pt",
                input_data_format="channels_last",
            )["pixel_values"]
            output = self.model(pixels.to(self.model.device, self.model.dtype))
            tokens.append(output.last_hidden_state.float().cpu())
            pooled.append(output.pooler_output.float().cpu())
        return torch.cat(tokens), torch.cat(pooled)


class AudioTower:
    """The audio half of a CLAP: clips of sound to patch tokens and a pooled vector.

    Clips are cut here, so the feature extractor never draws a random piece, and the fusion of a long
    sound with itself, which also draws, is not used.
    """

    def __init__(self, model: ClapAudioModelWithProjection, extractor: ClapFeatureExtractor) -> None:
        self.model = model
        self.extractor = extractor
        config = model.config
        self.width = int(config.hidden_size)
        frames = config.spec_size // 2 ** (len(config.depths) - 1)
        stride = config.patch_stride
        rows, columns = (frames // s for s in (stride if isinstance(stride, list | tuple) else [stride] * 2))
        ratio = config.spec_size // config.num_mel_bins  # times that the spectrogram is folded
        self.grid = (rows // ratio, ratio * columns)
        if int(extractor.feature_size) != int(config.num_mel_bins):
            raise ValueError(
                f"The feature extractor makes {extractor.feature_size} mel bands; this tower reads "
                f"{config.num_mel_bins}. Use the preprocessor_config.json of the same model."
            )

    @property
    def rate(self) -> int:
        """Samples per second that the tower hears."""
        return int(self.extractor.sampling_rate)

    @property
    def clip_seconds(self) -> float:
        """Length of what the tower hears at once."""
        return int(self.extractor.nb_max_samples) / self.rate

    @torch.inference_mode()
    def read(self, clips: Sequence[NDArray[np.float32]]) -> tuple[Tensor, Tensor]:
        """Read clips of sound at :attr:`rate` into tokens ``(N, L, E)`` and pooled vectors ``(N, E)``."""
        tokens, pooled = [], []
        for start in range(0, len(clips), AT_ONCE):
            some = list(clips[start : start + AT_ONCE])
            mels = self.extractor(some, sampling_rate=self.rate, return_tensors="pt")["input_features"]
            output = self.model.audio_model(
                input_features=mels.to(self.model.device, self.model.dtype),
                is_longer=torch.zeros(len(some), 1, dtype=torch.bool),
            )
            tokens.append(output.last_hidden_state.flatten(2).transpose(1, 2).float().cpu())  # (N, L, E)
            pooled.append(output.pooler_output.float().cpu())
        return torch.cat(tokens), torch.cat(pooled)


class TowerEncoder:
    """Reads pictures and videos with one tower and sounds with another, each of its own width."""

    def __init__(
        self,
        vision: VisionTower | None,
        audio: AudioTower | None,
        numbers: TowerNumbers | None = None,
        tiling: Tiling | None = None,
    ) -> None:
        if vision is None and audio is None:
            raise ValueError("There is neither a vision nor an audio tower; expected at least one.")
        self.vision = vision
        self.audio = audio
        self.numbers = numbers or TowerNumbers()
        self.tiler: Tiler = Whole()
        if tiling and vision:
            self.tiler = tiling.tiler(vision.side, self.tiler)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        tiling: Tiling | None = None,
    ) -> TowerEncoder:
        """Read the towers that ``folder`` holds, frozen and in evaluation mode.

        ``tiling`` says how large images are cut; without it, the tower sees the whole image only.

        Raises:
            FileNotFoundError: there is no tower, or a file of one is missing.
            ValueError: a model that this encoder does not know, or weights that do not fit.

        """
        folder = Path(folder)
        vision = audio = None
        if _is_there(folder, VISION):
            model = _model(folder / VISION, SiglipVisionModel, VISION, device, dtype)
            vision = VisionTower(model, _processor(folder / VISION, SiglipImageProcessorPil))
        if _is_there(folder, AUDIO):
            model = _model(folder / AUDIO, ClapAudioModelWithProjection, AUDIO, device, dtype)
            audio = AudioTower(model, _processor(folder / AUDIO, ClapFeatureExtractor))
        if vision is None and audio is None:
            raise FileNotFoundError(
                f"{folder / VISION / 'config.json'} is missing; expected the folder of a SigLIP in {VISION}, "
                f"of a CLAP in {AUDIO}, or both."
            )
        return cls(vision, audio, TowerNumbers.read(folder / NUMBERS_FILE), tiling)

    @property
    def modalities(self) -> frozenset[Modality]:
        """What this encoder can read."""
        seen = {Modality.IMAGE, Modality.VIDEO} if self.vision else set()
        return frozenset(seen | ({Modality.AUDIO} if self.audio else set()))

    @property
    def joint(self) -> bool:
        """Whether all that it reads ends in one space: each tower was trained for itself."""
        return self.vision is None or self.audio is None

    def width_of(self, modality: Modality) -> int:
        """Return the size of one token, and of the pooled vector, of a medium of ``modality``.

        Raises:
            ValueError: there is no tower for it.

        """
        return self._tower(modality).width

    def grid_of(self, modality: Modality) -> tuple[int, ...]:
        """Return rows and columns of patches; for a sound, bands and time steps."""
        return self._tower(modality).grid

    def encode(self, medium: Medium) -> Features:
        """Encode one medium. Raises like :meth:`encode_batch`."""
        return self.encode_batch([medium])[0]

    def encode_batch(self, media: Sequence[Medium]) -> list[Features]:
        """Encode media of one modality together.

        Returns:
            One :class:`~encoders.features.Features` per medium, on the CPU: all patch tokens of its frames
            or clips, and the mean of their pooled unit vectors, made unit again. Of an image that was cut,
            the tokens are those of its slices in the order of their plan, the vector is its overview's.

        Raises:
            ValueError: no media, several modalities, or one that this encoder does not read.

        """
        found = {medium.modality for medium in media}
        if len(found) != 1:
            names = ", ".join(sorted(found)) or "nothing"
            raise ValueError(f"The batch holds {names}; expected media of one modality.")
        modality = found.pop()
        tower = self._tower(modality)
        if images := [medium for medium in media if isinstance(medium, Image)]:
            return self._encode_images(images)
        pieces = [self._pieces(medium) for medium in media if not isinstance(medium, Image)]
        tokens, pooled = tower.read([piece for of_one in pieces for piece in of_one])
        features, start = [], 0
        for of_one in pieces:
            end = start + len(of_one)
            one = F.normalize(F.normalize(pooled[start:end], dim=-1).mean(dim=0), dim=-1)  # (E,)
            grid = (len(of_one), *tower.grid)
            features.append(Features(modality, tokens[start:end].flatten(0, 1).clone(), one, grid))
            start = end
        return features

    def _encode_images(self, images: Sequence[Image]) -> list[Features]:
        tower = self.vision
        assert tower is not None
        plans = [self.tiler.plan(*image.pixels.shape[:2]) for image in images]
        slices = [part for image, plan in zip(images, plans, strict=True) for part in cut(image.pixels, plan)]
        tokens, pooled = tower.read(slices)
        features, start = [], 0
        for plan in plans:
            of_one = tokens[start : start + len(plan.slices)]  # (slices, L, E)
            vector = F.normalize(pooled[start + plan.overview], dim=-1)  # (E,)
            start += len(plan.slices)
            grid = tower.grid if len(of_one) == 1 else (len(of_one), *tower.grid)
            blocks = plan.blocks(of_one.shape[1])
            features.append(Features(Modality.IMAGE, of_one[plan.order].flatten(0, 1), vector, grid, blocks))
        return features

    def _tower(self, modality: Modality) -> VisionTower | AudioTower:
        tower = self.audio if modality is Modality.AUDIO else self.vision
        if modality is Modality.TEXT or tower is None:
            raise ValueError(
                f"This encoder cannot read {modality}; it reads {', '.join(sorted(self.modalities))}."
            )
        return tower

    def _pieces(self, medium: Video | Audio) -> list[NDArray[Any]]:
        """Return what goes through the tower for one medium: frames, or clips of sound."""
        if isinstance(medium, Video):
            return [medium.frames[i] for i in spread(len(medium.frames), self.numbers.video_frames)]
        assert self.audio is not None
        return sound_clips(medium, self.audio.rate, self.audio.clip_seconds, self.numbers.audio_clips)


def spread(count: int, wanted: int) -> list[int]:
    """Return the middles of ``wanted`` equal parts of ``count`` frames, all of them if there are no more."""
    if count <= wanted:
        return list(range(count))
    return [int((i + 0.5) * count / wanted) for i in range(wanted)]


def sound_clips(sound: Audio, rate: int, clip_seconds: float, most: int) -> list[NDArray[np.float32]]:
    """Cut a sound into the fewest clips that cover it, at most ``most``, from its start to its end."""
    samples = resample(sound.samples, sound.rate, rate)
    length = round(clip_seconds * rate)
    number = min(most, max(1, math.ceil(len(samples) / length)))
    starts = [round(start) for start, _ in clip_spans(len(samples), length, number)]
    return [np.pad(clip, (0, max(0, 1 - len(clip)))) for clip in (samples[s : s + length] for s in starts)]


def _is_there(folder: Path, part: str) -> bool:
    return (folder / part / "config.json").is_file()


def _model(
    folder: Path, kind: type[PreTrainedModel], part: str, device: str | torch.device, dtype: torch.dtype
) -> Any:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") not in KINDS[part]:
        raise ValueError(
            f"{folder} holds a model of the type {config.get('model_type')!r}; expected "
            f"{' or '.join(KINDS[part])}. A SigLIP 2 of fixed resolution has the type siglip."
        )
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{folder / 'model.safetensors'} is missing; it holds the weights of the tower."
        )
    try:
        model, report = cast(Any, kind).from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that the message below is ours
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be loaded: {' '.join(str(error).split()):.400}") from error
    for name, given, expected in sorted(report["mismatched_keys"]):
        raise ValueError(f"{folder}: {name} has shape {tuple(given)}; expected {tuple(expected)}.")
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"The weights in {folder} lack {len(missing)} tensors, the first is {missing[0]}.")
    return model.to(device).eval().requires_grad_(False)


def _processor(folder: Path, kind: Any) -> Any:
    if not (folder / "preprocessor_config.json").is_file():
        raise FileNotFoundError(f"{folder / 'preprocessor_config.json'} is missing; copy the whole folder.")
    return kind.from_pretrained(folder, local_files_only=True)
