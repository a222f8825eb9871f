"""Sizes of ImageBind's towers, as frozen values that go to JSON and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class TrunkConfig:
    """Sizes of the transformer that every tower has.

    ``drop_path`` is the chance that the last block is left out for a sample in training; earlier
    blocks get proportionally less.
    """

    width: int
    num_blocks: int
    num_heads: int
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{field.name} is {value!r}; expected a whole number, at least 1.")
        if self.width % self.num_heads:
            raise ValueError(
                f"width ({self.width}) is not a multiple of num_heads ({self.num_heads}). "
                "Pick num_heads from the divisors of width."
            )
        if not 0.0 <= self.drop_path < 1.0:
            raise ValueError(f"drop_path is {self.drop_path}; expected a probability in [0, 1).")


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig(TrunkConfig):
    """Images and clips of ``num_frames``, cut into patches of ``patch_size`` that span all frames."""

    image_size: int
    patch_size: int
    num_frames: int = 2

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return (self.image_size // self.patch_size,) * 2


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig(TrunkConfig):
    """Token ids, ``context_length`` of them. The end token must have the highest id of all."""

    vocabulary_size: int
    context_length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioConfig(TrunkConfig):
    """Filter banks, ``num_mel_bins`` by ``num_frames``, in patches that may overlap."""

    num_mel_bins: int
    num_frames: int
    patch_size: int
    stride: int

    @property
    def grid(self) -> tuple[int, int]:
        """Rows (mel bands) and columns (time) of patches."""
        rows, columns = (
            (size - self.patch_size) // self.stride + 1 for size in (self.num_mel_bins, self.num_frames)
        )
        return rows, columns


@dataclass(frozen=True, kw_only=True, slots=True)
class PlaneConfig(TrunkConfig):
    """Pictures with one channel: depth, or thermal."""

    image_size: int
    patch_size: int

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return (self.image_size // self.patch_size,) * 2


@dataclass(frozen=True, kw_only=True, slots=True)
class ImuConfig(TrunkConfig):
    """Readings of motion sensors, ``num_channels`` by ``num_samples``, in pieces of ``patch_size``."""

    num_channels: int = 6
    num_samples: int = 2000
    patch_size: int = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageBindConfig:
    """Sizes of an :class:`ImageBind`. A tower that is None does not exist."""

    out_width: int
    vision: VisionConfig | None = None
    text: TextConfig | None = None
    audio: AudioConfig | None = None
    depth: PlaneConfig | None = None
    thermal: PlaneConfig | None = None
    imu: ImuConfig | None = None

    def __post_init__(self) -> None:
        if self.out_width < 1:
            raise ValueError(f"out_width is {self.out_width}; it must be at least 1.")

    @property
    def towers(self) -> tuple[str, ...]:
        """Names of the towers that exist."""
        return tuple(name for name in TOWER_CONFIGS if getattr(self, name) is not None)

    def with_towers(self, towers: Sequence[str]) -> ImageBindConfig:
        """Return these sizes with some of the towers alone.

        Raises:
            ValueError: no tower is named, or one that does not exist here.

        """
        if not towers or not set(towers) <= set(self.towers):
            given = ", ".join(towers) or "empty"
            raise ValueError(f"towers is {given}; choose from {', '.join(self.towers)}.")
        left_out: dict[str, Any] = {name: None for name in self.towers if name not in towers}
        return replace(self, **left_out)

    @classmethod
    def huge(cls) -> ImageBindConfig:
        """Return the sizes of the released model (1.2 billion parameters)."""
        return cls(
            out_width=1024,
            vision=VisionConfig(width=1280, num_blocks=32, num_heads=16, image_size=224, patch_size=14),
            text=TextConfig(
                width=1024, num_blocks=24, num_heads=16, vocabulary_size=49_408, context_length=77
            ),
            audio=AudioConfig(
                width=768,
                num_blocks=12,
                num_heads=12,
                drop_path=0.1,
                num_mel_bins=128,
                num_frames=204,
                patch_size=16,
                stride=10,
            ),
            depth=PlaneConfig(width=384, num_blocks=12, num_heads=8, image_size=224, patch_size=16),
            thermal=PlaneConfig(width=768, num_blocks=12, num_heads=12, image_size=224, patch_size=16),
            imu=ImuConfig(width=512, num_blocks=6, num_heads=8, drop_path=0.7),
        )

    @classmethod
    def toybox(cls, vocabulary_size: int) -> ImageBindConfig:
        """Return the sizes of the embedded model: vision, text and audio, 128 wide."""
        return cls(
            out_width=128,
            vision=VisionConfig(width=128, num_blocks=6, num_heads=4, image_size=64, patch_size=8),
            text=TextConfig(
                width=128, num_blocks=4, num_heads=4, vocabulary_size=vocabulary_size, context_length=48
            ),
            audio=AudioConfig(
                width=128,
                num_blocks=6,
                num_heads=4,
                num_mel_bins=128,
                num_frames=256,
                patch_size=16,
                stride=16,
            ),
        )

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ImageBindConfig:
        """Rebuild a config from :meth:`to_json`.

        Raises:
            ValueError: a missing, unknown or impossible entry, named in the message.

        """
        towers = {name: kind for name, kind in TOWER_CONFIGS.items() if values.get(name) is not None}
        try:
            built: dict[str, Any] = {name: kind(**values[name]) for name, kind in towers.items()}
            return cls(**(values | built))
        except TypeError as error:
            raise ValueError(f"This is not a configuration of ImageBind: {error}.") from error

    def to_json(self) -> dict[str, Any]:
        """Return plain values, without the towers that do not exist."""
        return {name: value for name, value in asdict(self).items() if value is not None}


TOWER_CONFIGS: dict[str, type[TrunkConfig]] = {
    "vision": VisionConfig,
    "text": TextConfig,
    "audio": AudioConfig,
    "depth": PlaneConfig,
    "thermal": PlaneConfig,
    "imu": ImuConfig,
}
