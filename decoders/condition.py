"""What a decoder is conditioned on. Knows shapes, not where the numbers come from."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class ConditionSpec:
    """The shape of the conditions that a decoder accepts.

    ``pooled`` says that the condition is one L2-normalised vector (CLAP and its kin) and not a
    sequence of text states.
    """

    tokens: int
    width: int
    pooled: bool = False

    def check(self, condition: "Condition") -> None:
        """Raise ValueError unless ``condition`` has this shape and only finite numbers."""
        given = tuple(condition.embeddings.shape)
        if given != (self.tokens, self.width):
            raise ValueError(
                f"The condition has shape {given}; this decoder expects ({self.tokens}, {self.width}). "
                f"Use an output projection or a text encoder that was made for this decoder."
            )
        if not bool(torch.isfinite(condition.embeddings).all()):
            raise ValueError(
                "The condition holds NaN or infinity; expected finite numbers. "
                "Check the output projection that made it."
            )


@dataclass(frozen=True, eq=False, slots=True)
class Condition:
    """Embeddings for one request: ``(tokens, width)`` floating point.

    ``named`` are further tensors without a batch dimension, and ``caption`` are words, for pipelines that
    take such (see :mod:`decoders.whole_pipeline`); the latent decoders need the embeddings alone. ``copied``
    says that nothing like the original is wanted, where there is one to keep anything of, but that very one.
    """

    embeddings: Tensor
    named: Mapping[str, Tensor] = field(default_factory=dict)
    caption: str | None = None
    copied: bool = False

    def __post_init__(self) -> None:
        if self.embeddings.ndim != 2:
            raise ValueError(
                f"The condition has shape {tuple(self.embeddings.shape)}; expected (tokens, width). "
                f"Pass one request at a time, without a batch dimension."
            )


def digest(tensor: Tensor) -> str:
    """Return 16 hex digits that name the values of ``tensor`` (its shape and float32 bytes)."""
    values = tensor.detach().to("cpu", torch.float32).contiguous()
    found = hashlib.sha256(str(tuple(values.shape)).encode())
    found.update(values.numpy().tobytes())
    return found.hexdigest()[:16]
