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
            ``(clips, rows, columns)`` for video and for sound (rows are mel bands, columns time), and
            ``(slices, rows, columns)`` for an image that was cut.
        blocks: how the tokens are laid out for a language model: numbers of tokens that are projected
            together, and words between them. One block of all tokens unless given.

    Raises:
        ValueError: the shapes disagree with each other.

    """

    modality: Modality
    tokens: Tensor
    pooled: Tensor
    grid: tuple[int, ...]
    blocks: tuple[int | str, ...] = ()

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
        if not self.blocks:
            object.__setattr__(self, "blocks", (cells,))
        elif sum(block for block in self.blocks if isinstance(block, int)) != cells:
            raise ValueError(f"blocks {self.blocks} do not add up to the {cells} tokens that there are.")

    @property
    def width(self) -> int:
        """Size of one token."""
        return self.tokens.shape[1]
