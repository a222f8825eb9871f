"""The signal vocabulary: the added words with which the model reads and asks for media.

A modality's block is k signal tokens in a row. The model chooses the first; the rest follow by
themselves, so a block is whole or absent.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from encoders.media import Modality

MEDIA_OPEN = "<Img>"
MEDIA_CLOSE = "</Img>"
_STEMS = {Modality.IMAGE: "IMG", Modality.VIDEO: "VID", Modality.AUDIO: "AUD"}


@dataclass(frozen=True, kw_only=True, slots=True)
class SignalVocabulary:
    """How many signal tokens each modality's block has; 0 leaves the modality out.

    The defaults, the spelling and the order of the tokens are NExT-GPT's (arXiv 2309.05519,
    legacy code: ``[IMG0]`` .. ``[IMG3]``, ``[VID0]`` .. ``[VID23]``, ``[AUD0]`` .. ``[AUD7]``).
    """

    image: int = 4
    video: int = 24
    audio: int = 8

    def __post_init__(self) -> None:
        for modality in _STEMS:
            if self.count(modality) < 0:
                raise ValueError(f"{modality} has {self.count(modality)} signal tokens; expected 0 or more.")

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """The modalities that have a block, in the order of their tokens."""
        return tuple(modality for modality in _STEMS if self.count(modality))

    def count(self, modality: Modality) -> int:
        """Return the number of tokens in a block of ``modality``; 0 for text."""
        return {Modality.IMAGE: self.image, Modality.VIDEO: self.video, Modality.AUDIO: self.audio}.get(
            modality, 0
        )

    def names(self, modality: Modality) -> tuple[str, ...]:
        """Return the tokens of one block, first to last."""
        return tuple(f"[{_STEMS[modality]}{i}]" for i in range(self.count(modality)))

    @property
    def tokens(self) -> tuple[str, ...]:
        """Every media and signal token, in the order in which they follow the base vocabulary."""
        return (MEDIA_OPEN, MEDIA_CLOSE, *(name for m in self.modalities for name in self.names(m)))


@dataclass(frozen=True, eq=False, slots=True)
class Signal:
    """The model's wish for one medium: what an output projection turns into a decoder's condition.

    ``hidden`` are the last hidden states (after the final norm) at the k signal tokens and
    ``embeddings`` the input embeddings of these tokens; both ``(k, llm_width)`` float32.
    ``caption`` is the reply's text since the previous medium, stripped.
    """

    modality: Modality
    caption: str
    hidden: Tensor
    embeddings: Tensor
