"""An ImageBind with its preprocessing and tokenizer, as one thing that reads media and text.

Folder layout:
    config.json: ``{"model": sizes, "preprocessing": numbers}``, and perhaps ``"pooled": "mean"``
    model.safetensors: the state dict of :class:`~encoders.imagebind.ImageBind` with the towers of the config
    tokenizer.json: when there is a text tower; or CLIP's vocab.json and merges.txt

Shape letters in this file:
    N items   S clips per item   L patches per clip   E embedding width
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from encoders.features import Features
from encoders.imagebind import ImageBind, ImageBindConfig
from encoders.imagebind_config import TOWER_CONFIGS
from encoders.media import Audio, Image, Medium, Modality, Video
from encoders.preprocess import (
    PreprocessConfig,
    prepare_images,
    prepare_slices,
    prepare_sounds,
    prepare_videos,
)
from encoders.text_tokens import TextTokens
from encoders.tiler import CentreCrop, Tiler, Tiling, cut

Pooled = Literal["unit", "mean"]
"""What stands for a medium: the mean of its clips' unit embeddings, made unit again or left as it is."""

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TOWER_OF = {Modality.IMAGE: "vision", Modality.VIDEO: "vision", Modality.AUDIO: "audio"}


class ImageBindEncoder:
    """Reads images, videos and sounds into :class:`~encoders.features.Features`; embeds texts.

    The model is an ordinary module and can be trained through :attr:`model` with the tensors of
    :meth:`prepare` and :attr:`tokens`. Methods here run without gradients.
    """

    def __init__(
        self,
        model: ImageBind,
        preprocessing: PreprocessConfig,
        tokens: TextTokens | None,
        pooled: Pooled = "unit",
        tiling: Tiling | None = None,
    ) -> None:
        """Join the parts. Images are cropped at their centre unless ``tiling`` says how to cut them.

        Raises:
            ValueError: they do not fit together.

        """
        self.pooled = pooled
        crop = CentreCrop(preprocessing.image_size)
        self.tiler: Tiler = tiling.tiler(crop.side, crop) if tiling else crop
        _check_fit(model.config, preprocessing, tokens)
        self.model = model
        self.preprocessing = preprocessing
        self.tokens = tokens

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        tiling: Tiling | None = None,
    ) -> ImageBindEncoder:
        """Read an encoder from a folder, frozen and in evaluation mode.

        Args:
            folder: see the layout at the top of this file.
            device: where the model runs.
            dtype: what its weights are converted to, whatever they are stored as.
            tiling: how large images are cut; a bridge has to be trained to it.

        Raises:
            FileNotFoundError: the folder or one of its files, named in the message.
            ValueError: a file that does not fit: the tensor, its shape and the expected one.

        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder; expected one with {CONFIG_FILE}.")
        values = _read_config(folder / CONFIG_FILE)
        config = ImageBindConfig.from_json(values["model"])
        preprocessing = PreprocessConfig.from_json(values["preprocessing"])
        with torch.device("meta"):
            model = ImageBind(config)
        weights = _read_weights(folder / WEIGHTS_FILE, model)
        model.load_state_dict(weights, strict=True, assign=True)
        model.to(device=device, dtype=dtype).eval().requires_grad_(False)
        tokens = TextTokens.load(folder, config.text.context_length) if config.text else None
        return cls(model, preprocessing, tokens, values["pooled"], tiling)

    def save_pretrained(
        self,
        folder: str | Path,
        dtype: torch.dtype = torch.float16,
        towers: Sequence[str] | None = None,
    ) -> None:
        """Write the encoder into a folder, which is made if needed.

        Args:
            folder: see the layout at the top of this file.
            dtype: of the weights written.
            towers: those to write; None writes all. Without the text tower, the tokenizer stays away too.

        Raises:
            ValueError: no tower is named, or one that this encoder does not have.

        """
        config = self.model.config if towers is None else self.model.config.with_towers(towers)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_config(folder, config, self.preprocessing, self.pooled)
        state = {
            name: value.to(dtype).contiguous()
            for name, value in self.model.state_dict().items()
            if name.split(".")[1] in config.towers  # modality_trunks.vision.blocks...
        }
        save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        if self.tokens is not None and config.text is not None:
            self.tokens.save(folder)

    @property
    def joint(self) -> bool:
        """True: all towers end in one space, which is what ImageBind is for."""
        return True

    @property
    def width(self) -> int:
        """Size of one token, and of the pooled embedding."""
        return self.model.config.out_width

    def width_of(self, modality: Modality) -> int:
        """Return :attr:`width`: all towers end in one space."""
        return self.width

    def grid_of(self, modality: Modality) -> tuple[int, ...]:
        """Return rows and columns of patches; for a sound, bands and time steps."""
        return self._grid(modality, 1)[-2:]

    @property
    def modalities(self) -> frozenset[Modality]:
        """What this encoder can read."""
        readable = {m for m, tower in TOWER_OF.items() if tower in self.model.modality_trunks}
        return frozenset(readable | ({Modality.TEXT} if self.tokens else set()))

    def prepare(self, media: Sequence[Medium]) -> Tensor:
        """Turn media of one modality into the input of their tower, on the CPU.

        Returns:
            ``(N, 3, size, size)`` for images, ``(N, S, 3, frames, size, size)`` for videos and
            ``(N, S, 1, mel_bins, frames)`` for sounds, float32.

        Raises:
            ValueError: no media, several modalities, or one that this encoder does not read.

        """
        self._check_batch(media)
        images = [m for m in media if isinstance(m, Image)]
        videos = [m for m in media if isinstance(m, Video)]
        sounds = [m for m in media if isinstance(m, Audio)]
        if images:
            return prepare_images(images, self.preprocessing)
        if videos:
            return prepare_videos(videos, self.preprocessing)
        return prepare_sounds(sounds, self.preprocessing)

    def encode(self, medium: Medium) -> Features:
        """Encode one medium. Raises like :meth:`encode_batch`."""
        return self.encode_batch([medium])[0]

    @torch.inference_mode()
    def encode_batch(self, media: Sequence[Medium]) -> list[Features]:
        """Encode media of one modality together.

        Returns:
            One :class:`~encoders.features.Features` per medium, on the CPU: its patch tokens (not the
            class token), and the unit class embeddings averaged over the clips and, unless the config says
            ``"pooled": "mean"``, made unit again. Of an image that was cut, the tokens are those of its
            slices in the order of their plan, and the embedding is that of its overview.

        Raises:
            ValueError: no media, several modalities, or one that this encoder does not read.

        """
        self._check_batch(media)
        if images := [medium for medium in media if isinstance(medium, Image)]:
            return self._encode_images(images)
        return self.encode_prepared(self.prepare(media), media[0].modality)

    @torch.inference_mode()
    def encode_prepared(self, prepared: Tensor, modality: Modality) -> list[Features]:
        """Encode what :meth:`prepare` returned, as :meth:`encode_batch` does; images are not cut."""
        tower = TOWER_OF[modality]
        tokens = self.model.embed_tokens({tower: self._on_device(prepared)})[tower].float().cpu()
        clips = tokens if tokens.ndim == 4 else tokens.unsqueeze(1)  # (N, S, 1 + L, E)
        pooled = F.normalize(clips[:, :, 0], dim=-1).mean(dim=1)  # (N, E)
        if self.pooled == "unit":
            pooled = F.normalize(pooled, dim=-1)
        patches = clips[:, :, 1:].flatten(1, 2)  # (N, S * L, E)
        grid = self._grid(modality, clips.shape[1])
        return [Features(modality, t.clone(), p.clone(), grid) for t, p in zip(patches, pooled, strict=True)]

    def _encode_images(self, images: Sequence[Image]) -> list[Features]:
        plans = [self.tiler.plan(*image.pixels.shape[:2]) for image in images]
        slices = [part for image, plan in zip(images, plans, strict=True) for part in cut(image.pixels, plan)]
        vision = self._on_device(prepare_slices(slices))  # (N * slices, 3, Z, Z)
        states = self.model.embed_tokens({"vision": vision})["vision"].float().cpu()  # (.., 1 + L, E)
        grid, features, start = self._grid(Modality.IMAGE, 1), [], 0
        for plan in plans:
            of_one = states[start : start + len(plan.slices)]
            start += len(plan.slices)
            patches = of_one[plan.order, 1:].flatten(0, 1)  # (slices * L, E)
            pooled = F.normalize(of_one[plan.overview, 0], dim=-1)
            whole_grid = grid if len(of_one) == 1 else (len(of_one), *grid)
            blocks = plan.blocks(of_one.shape[1] - 1)
            features.append(Features(Modality.IMAGE, patches, pooled.clone(), whole_grid, blocks))
        return features

    @torch.inference_mode()
    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Embed texts.

        Returns:
            ``(len(texts), E)`` float32 on the CPU, rows of L2 norm 1, comparable with ``pooled``.

        Raises:
            ValueError: this encoder has no text tower.

        """
        if self.tokens is None:
            raise ValueError("This encoder has no text tower. Load one whose config.json has a text entry.")
        if not texts:
            return torch.zeros(0, self.width)
        embedded = self.model({"text": self.tokens(texts).to(self._device)})["text"]
        return F.normalize(embedded.float(), dim=-1).cpu()

    def _check_batch(self, media: Sequence[Medium]) -> None:
        found = {medium.modality for medium in media}
        if len(found) != 1:
            names = ", ".join(sorted(found)) or "nothing"
            raise ValueError(f"The batch holds {names}; expected media of one modality.")
        if not found <= self.modalities:
            raise ValueError(
                f"This encoder cannot read {', '.join(found)}; it reads {', '.join(sorted(self.modalities))}."
            )

    def _grid(self, modality: Modality, clips: int) -> tuple[int, ...]:
        vision, audio = self.model.config.vision, self.model.config.audio
        if modality is Modality.AUDIO:
            assert audio is not None
            return (clips, *audio.grid)
        assert vision is not None
        return vision.grid if modality is Modality.IMAGE else (clips, *vision.grid)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _on_device(self, value: Tensor) -> Tensor:
        return value.to(self._device, next(self.model.parameters()).dtype)


def write_config(
    folder: Path, model: ImageBindConfig, preprocessing: PreprocessConfig, pooled: Pooled = "unit"
) -> None:
    """Write ``config.json``, which :meth:`ImageBindEncoder.from_pretrained` reads."""
    values: dict[str, Any] = {"model": model.to_json(), "preprocessing": preprocessing.to_json()}
    if pooled != "unit":
        values["pooled"] = pooled
    (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _check_fit(model: ImageBindConfig, numbers: PreprocessConfig, tokens: TextTokens | None) -> None:
    pairs: list[tuple[str, object, object]] = []
    if model.vision:
        pairs += [
            ("image_size", model.vision.image_size, numbers.image_size),
            ("frames of a clip", model.vision.num_frames, numbers.video_clip_frames),
        ]
    if model.audio:
        pairs += [
            ("num_mel_bins", model.audio.num_mel_bins, numbers.num_mel_bins),
            ("mel frames", model.audio.num_frames, numbers.num_mel_frames),
        ]
    if model.text:
        size = tokens.vocabulary_size if tokens else None
        pairs += [("vocabulary", model.text.vocabulary_size, size)]
    for name, ours, theirs in pairs:
        if ours != theirs:
            raise ValueError(
                f"{name} is {ours} in the model and {theirs} in its preprocessing or tokenizer; expected the "
                f"same. Correct {CONFIG_FILE}, or use the tokenizer of this model."
            )


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; it holds the sizes of the encoder.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    for name in ("model", "preprocessing"):
        if not isinstance(values, dict) or not isinstance(values.get(name), dict):
            raise ValueError(f"{path} has no object {name!r}; expected the entries model and preprocessing.")
    pooled = values.get("pooled", "unit")
    if pooled not in get_args(Pooled):
        raise ValueError(f"{path} has pooled {pooled!r}; expected {' or '.join(get_args(Pooled))}.")
    return {"model": values["model"], "preprocessing": values["preprocessing"], "pooled": pooled}


def _read_weights(path: Path, model: ImageBind) -> dict[str, Tensor]:
    """Read the tensors that ``model`` has. Those of towers that are not configured are left out."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; it holds the weights of the encoder.")
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    absent = tuple(f".{tower}." for tower in TOWER_CONFIGS if tower not in model.modality_trunks)
    try:
        with safe_open(path, framework="pt") as file:
            given = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or is cut off: {error}.") from error
    unknown = [name for name in given if name not in expected and not any(a in name for a in absent)]
    missing = [name for name in expected if name not in given]
    if missing or unknown:
        raise ValueError(
            f"{path} does not fit {CONFIG_FILE}: it lacks {_some(missing)} and has besides {_some(unknown)}."
        )
    for name, shape in expected.items():
        if given[name] != shape:
            raise ValueError(
                f"{path}: tensor {name} has shape {given[name]}; expected {shape}. "
                f"The file and {CONFIG_FILE} belong to different models."
            )
    return {name: value for name, value in load_file(path).items() if name in expected}


def _some(names: list[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
