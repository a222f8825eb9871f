"""What an encoder makes of one medium."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from encoders.media import Modality


@dataclass(frozen=True, eq=False)
class Features:
    """Encoder output of one medium.

    Attributes:
        modality: what was encoded.
        tokens: ``(n, width)`` float32, one row per patch, clip after clip, in the order of ``grid``.
        pooled: ``(width,)`` float32 with L2 norm 1, the medium as a whole.
        grid: sizes that multiply to ``n``, slowest axis first: ``(rows, columns)`` for an image,
            ``(clips, rows, columns)`` for video and for sound (rows are mel bands, columns time).

    Raises:
        ValueError: the shapes disagree with each other.

    """

    modality: Modality
    tokens: Tensor
    pooled: Tensor
    grid: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.tokens.ndim != 2 or self.pooled.shape != self.tokens.shape[1:]:
            raise ValueError(
                f"tokens have shape {tuple(self.tokens.shape)} and pooled {tuple(self.pooled.shape)}; "
                "expected (n, width) and (width,)."
            )
        cells = 1
        for size in self.grid:
            cells *= size
        if cells != self.tokens.shape[0]:
            raise ValueError(
                f"grid {self.grid} has {cells} cells but there are {self.tokens.shape[0]} tokens; "
                "they must be equal."
            )

    @property
    def width(self) -> int:
        """Size of one token."""
        return self.tokens.shape[1]
