"""Projectors: the tokens of an encoder become tokens of the language model.

Shape letters in this file:
    B media   S encoder tokens (padded)   Q output tokens
    E encoder width   D LLM width   H heads   P prompt tokens
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ProjectorKind = Literal["linear", "mlp", "resampler"]
_KINDS = ("linear", "mlp", "resampler")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProjectorConfig:
    """What a projector is and how large. Immutable; checked when it is made.

    ``num_queries`` and ``num_heads`` are the resampler's. ``grid`` says how its source tokens lie: the
    sizes of the trailing axes, the first axis being open. ``(8, 8)`` reads token 70 as frame 1, row 0,
    column 6; ``()`` reads it as the 70th of a line.
    """

    kind: ProjectorKind
    encoder_width: int
    llm_width: int
    num_queries: int = 8
    num_heads: int = 4
    grid: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"kind is {self.kind!r}; expected one of {', '.join(_KINDS)}.")
        object.__setattr__(self, "grid", tuple(self.grid))
        sizes = {"encoder_width": self.encoder_width, "llm_width": self.llm_width}
        sizes |= {"num_queries": self.num_queries, "num_heads": self.num_heads}
        sizes |= {f"grid[{i}]": size for i, size in enumerate(self.grid)}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1.")
        if self.llm_width % self.num_heads:
            raise ValueError(
                f"llm_width ({self.llm_width}) is not a multiple of num_heads ({self.num_heads}). "
                f"Pick num_heads from the divisors of llm_width."
            )


@dataclass(frozen=True, eq=False, slots=True)
class Prompt:
    """The words beside a medium: LLM input embeddings ``(B, P, D)`` and which are real, ``(B, P)`` bool."""

    embeddings: Tensor
    present: Tensor


class Projector(Protocol):
    """What the language model asks of a projector (which is also an ``nn.Module``).

    ``needs_prompt``: the words of the message are given to it. ``reads_pooled``: it reads the
    encoder's global vector, as a single token, and not the tokens.
    """

    needs_prompt: bool
    reads_pooled: bool

    def num_slots(self, num_tokens: int) -> int:
        """Return how many positions a medium of ``num_tokens`` encoder tokens takes."""
        ...

    def __call__(self, tokens: Tensor, present: Tensor, prompt: Prompt | None = None) -> Tensor:
        """Project ``(B, S, E)`` with ``present`` ``(B, S)`` bool to ``(B, Q, D)``.

        Of each row the first ``num_slots(present.sum())`` tokens are used.
        """
        ...


class LinearProjector(nn.Module):
    """One linear layer on the global vector: one token per medium.

    Source: NExT-GPT's released weights (arXiv 2309.05519; ``llama_proj`` in its legacy code).
    """

    needs_prompt = False
    reads_pooled = True

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        self.project = nn.Linear(config.encoder_width, config.llm_width)

    def num_slots(self, num_tokens: int) -> int:
        """Return 1."""
        return 1

    def forward(self, tokens: Tensor, present: Tensor, prompt: Prompt | None = None) -> Tensor:
        """Project ``(B, 1, E)`` to ``(B, 1, D)``."""
        out: Tensor = self.project(tokens)  # (B, 1, D)
        return out


class MLPProjector(nn.Module):
    """Linear, GELU, linear on every token: as many tokens as the encoder gave.

    Source: Liu et al. 2023, "Improved Baselines with Visual Instruction Tuning" (LLaVA-1.5), section 3.
    """

    needs_prompt = False
    reads_pooled = False

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        self.enter = nn.Linear(config.encoder_width, config.llm_width)
        self.leave = nn.Linear(config.llm_width, config.llm_width)

    def num_slots(self, num_tokens: int) -> int:
        """Return ``num_tokens``."""
        return num_tokens

    def forward(self, tokens: Tensor, present: Tensor, prompt: Prompt | None = None) -> Tensor:
        """Project ``(B, S, E)`` to ``(B, S, D)``."""
        out: Tensor = self.leave(F.gelu(self.enter(tokens)))  # (B, S, D)
        return out


class ResamplerProjector(nn.Module):
    """Learned queries read the encoder's tokens through one cross-attention block and a feed-forward.

    Source tokens carry sinusoidal codes of their place in ``config.grid``, in keys and in values alike,
    so that a query can ask both what is at a place and where a thing is.
    Source: after Bai et al. 2023 (Qwen-VL, arXiv 2308.12966), section 2.1, with pre-norm and feed-forward.
    """

    needs_prompt = False
    reads_pooled = False

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        self.config = config
        D = config.llm_width
        self.queries = nn.Parameter(torch.randn(config.num_queries, D) * 0.02)
        self.source_norm = nn.LayerNorm(config.encoder_width)
        self.enter = nn.Linear(config.encoder_width, D)
        self.query_norm = nn.LayerNorm(D)
        self.to_query = nn.Linear(D, D, bias=False)
        self.to_key_value = nn.Linear(D, 2 * D, bias=False)
        self.to_out = nn.Linear(D, D, bias=False)
        self.feed_norm = nn.LayerNorm(D)
        self.feed = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))

    def num_slots(self, num_tokens: int) -> int:
        """Return ``num_queries``."""
        return self.config.num_queries

    def forward(self, tokens: Tensor, present: Tensor, prompt: Prompt | None = None) -> Tensor:
        """Resample ``(B, S, E)`` to ``(B, Q, D)``. Every row of ``present`` needs a True."""
        B, S, _ = tokens.shape
        H = self.config.num_heads
        place = grid_code(S, self.config.grid, self.config.llm_width).to(tokens.device)
        source = self.enter(self.source_norm(tokens)) + place  # (B, S, D)

        q = self.to_query(self.query_norm(self.queries)).expand(B, -1, -1)  # (B, Q, D)
        k, v = self.to_key_value(source).chunk(2, dim=-1)  # 2 x (B, S, D)
        q, k, v = (x.unflatten(-1, (H, -1)).transpose(1, 2) for x in (q, k, v))  # (B, H, Q or S, D / H)
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=present[:, None, None, :])
        x = self.queries + self.to_out(read.transpose(1, 2).flatten(-2))  # (B, Q, D)
        out: Tensor = x + self.feed(self.feed_norm(x))  # (B, Q, D)
        return out


AnyProjector = LinearProjector | MLPProjector | ResamplerProjector


def build_projector(config: ProjectorConfig) -> AnyProjector:
    """Return a fresh projector of the kind that ``config`` names."""
    if config.kind == "linear":
        return LinearProjector(config)
    if config.kind == "mlp":
        return MLPProjector(config)
    return ResamplerProjector(config)


def grid_code(num_tokens: int, grid: tuple[int, ...], width: int, base: float = 10_000.0) -> Tensor:
    """Return sinusoidal codes ``(num_tokens, width)`` of places on a grid, float32 in [-1, 1].

    Each axis has its own share of the channels, half sines and half cosines, with wavelengths in
    geometric progression from 2 pi to 2 pi * ``base`` steps; channels left over are 0.
    Source of the code: Vaswani et al. 2017, section 3.5.
    """
    index = torch.arange(num_tokens)
    places: list[Tensor] = []
    for size in reversed(grid):
        places.append(index % size)
        index = index // size
    places.append(index)
    half = width // (2 * len(places))
    if half < 1:
        raise ValueError(f"width is {width}; a grid of {len(places)} axes needs at least {2 * len(places)}.")
    rates = torch.exp(-math.log(base) * torch.arange(half) / half)  # (half,)
    codes = []
    for place in reversed(places):
        angles = place[:, None] * rates  # (num_tokens, half)
        codes += [angles.sin(), angles.cos()]
    code = torch.cat(codes, dim=-1)
    return F.pad(code, (0, width - code.shape[-1]))
