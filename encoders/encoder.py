"""What the rest of the program asks of an encoder, and which one a folder holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from encoders.features import Features
from encoders.imagebind_encoder import ImageBindEncoder
from encoders.media import Medium, Modality
from encoders.tiler import Tiling
from encoders.towers import TOWER_FOLDERS, TowerEncoder


class Encoder(Protocol):
    """Reads media into :class:`~encoders.features.Features`; each modality may have a width of its own."""

    @property
    def modalities(self) -> frozenset[Modality]:
        """What it can read."""
        ...

    @property
    def joint(self) -> bool:
        """Whether the pooled vectors of all that it reads lie in one space and can be compared."""
        ...

    def width_of(self, modality: Modality) -> int:
        """Return the size of one token, and of the pooled vector, of a medium of ``modality``."""
        ...

    def grid_of(self, modality: Modality) -> tuple[int, ...]:
        """Return the trailing axes of the grid of ``modality``: rows and columns."""
        ...

    def encode(self, medium: Medium) -> Features:
        """Encode one medium."""
        ...

    def encode_batch(self, media: Sequence[Medium]) -> list[Features]:
        """Encode media of one modality together."""
        ...


def load_encoder(
    folder: Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    tiling: Tiling | None = None,
) -> ImageBindEncoder | TowerEncoder:
    """Load the encoder in ``folder``: towers of transformers in folders of their own, or an ImageBind.

    ``tiling`` says how large images are cut.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file that does not fit.

    """
    if any((folder / name / "config.json").is_file() for name in TOWER_FOLDERS):
        return TowerEncoder.from_pretrained(folder, device, dtype, tiling)
    return ImageBindEncoder.from_pretrained(folder, device, dtype, tiling)
