"""ImageBind: six towers that put media into one embedding space.

Written anew from the paper (Girdhar et al. 2023, arXiv 2305.05665) and the layout of the released
``imagebind_huge.pth``: names and shapes in the state dict are those of that file, so it loads
unchanged once it is stored as safetensors. Any subset of the towers can be configured.

Shape letters in this file:
    N items   S clips per item   L tokens   D tower width   E embedding width   H heads   K = D / H
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.imagebind_config import TOWER_CONFIGS, ImageBindConfig, TrunkConfig
from encoders.imagebind_stems import make_stem

__all__ = ["ImageBind", "ImageBindConfig"]

MAX_LOGIT_SCALE = 100.0
FIXED_LOGIT_SCALES = {"audio": 20.0, "depth": 5.0, "thermal": 10.0, "imu": 5.0}
TEXT_LOGIT_SCALE_START = 1 / 0.07
TRUNK_NORM_EPS = 1e-6


class ImageBind(nn.Module):
    """Up to six towers with one embedding space. Inputs and outputs are dicts by tower name.

    Inputs, with the sizes of the config:
        vision: ``(N, 3, height, width)`` images, or clips ``(N, S, 3, frames, height, width)``.
        text: ``(N, context_length)`` int64; zeros after the end token.
        audio: ``(N, 1, mel_bins, frames)``, or clips ``(N, S, 1, mel_bins, frames)``.
        depth, thermal: ``(N, 1, height, width)``. imu: ``(N, channels, samples)``.
    """

    def __init__(self, config: ImageBindConfig) -> None:
        super().__init__()
        self.config = config
        self.modality_preprocessors = nn.ModuleDict()
        self.modality_trunks = nn.ModuleDict()
        self.modality_heads = nn.ModuleDict()
        self.modality_postprocessors = nn.ModuleDict()
        for name in TOWER_CONFIGS:
            tower: TrunkConfig | None = getattr(config, name)
            if tower is None:
                continue
            self.modality_preprocessors[name] = make_stem(name, tower)
            self.modality_trunks[name] = Trunk(
                tower, norm_first=name == "vision", learned_key=name not in ("vision", "text")
            )
            self.modality_heads[name] = _head(name, tower.width, config.out_width)
            self.modality_postprocessors[name] = _scale(name)

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Embed one or several modalities.

        Returns:
            ``(N, E)`` per modality: unit length times the tower's logit scale (vision has none),
            averaged over the clips if there are any.

        Raises:
            ValueError: an unknown tower, or an input of the wrong shape.

        """
        outputs = {}
        for name, value in inputs.items():
            items, clips = self._split_clips(name, value)
            tokens = self._run_trunk(name, items)  # (N * S, L, D)
            first = tokens[:, 0] if name != "text" else _at_end_token(tokens, items)  # (N * S, D)
            embedding = self._finish(name, self._project(name, first))  # (N * S, E)
            outputs[name] = embedding.unflatten(0, (-1, clips)).mean(dim=1) if clips else embedding
        return outputs

    def embed_tokens(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Apply the head to every token of the trunk, not only to the one that stands for all.

        Returns:
            ``(N, L, E)`` per modality, or ``(N, S, L, E)`` for clips, neither normalised nor scaled.
            Token 0 stands for all (except in text, where the end token does); the others are the
            patches in row order.

        Raises:
            ValueError: an unknown tower, or an input of the wrong shape.

        """
        outputs = {}
        for name, value in inputs.items():
            items, clips = self._split_clips(name, value)
            tokens = self._project(name, self._run_trunk(name, items))  # (N * S, L, E)
            outputs[name] = tokens.unflatten(0, (-1, clips)) if clips else tokens
        return outputs

    def prefer_plain_attention(self) -> None:
        """Attend in single operations from now on, in place of PyTorch's fused one.

        On a CPU its backward pass takes more than half of a training step where rows are short.
        """
        for module in self.modules():
            if isinstance(module, Attention):
                module.plain = True

    def logit_scale(self, name: str) -> float:
        """Factor that ``forward`` puts on the unit embedding of a tower."""
        scales = (m for m in self.modality_postprocessors[name].modules() if isinstance(m, LogitScale))
        return next((scale.factor().item() for scale in scales), 1.0)

    def _split_clips(self, name: str, value: Tensor) -> tuple[Tensor, int]:
        if name not in self.modality_trunks:
            raise ValueError(
                f"There is no tower {name!r} in this model; it has {', '.join(self.modality_trunks)}."
            )
        if value.ndim < 5:
            return value, 0
        return value.flatten(0, 1), value.shape[1]

    def _run_trunk(self, name: str, items: Tensor) -> Tensor:
        tokens = self.modality_preprocessors[name](items)
        out: Tensor = self.modality_trunks[name](tokens, causal=name == "text")
        return out

    def _project(self, name: str, tokens: Tensor) -> Tensor:
        out: Tensor = self.modality_heads[name](tokens)
        return out

    def _finish(self, name: str, embedding: Tensor) -> Tensor:
        out: Tensor = self.modality_postprocessors[name](embedding)
        return out


class Trunk(nn.Module):
    """Pre-norm transformer blocks, in the order and with the names of the release."""

    def __init__(self, config: TrunkConfig, *, norm_first: bool, learned_key: bool) -> None:
        super().__init__()
        self.pre_transformer_layer = nn.Sequential(
            nn.LayerNorm(config.width, eps=TRUNK_NORM_EPS) if norm_first else nn.Identity()
        )
        steps = max(config.num_blocks - 1, 1)
        self.blocks = nn.ModuleList(
            Block(config.width, config.num_heads, learned_key, config.drop_path * i / steps)
            for i in range(config.num_blocks)
        )

    def forward(self, tokens: Tensor, causal: bool = False) -> Tensor:
        """Map ``(N, L, D)`` to ``(N, L, D)``."""
        tokens = self.pre_transformer_layer(tokens)
        for block in self.blocks:
            tokens = block(tokens, causal)
        return tokens


class Block(nn.Module):
    """Attention and MLP, each with its norm before and a residual around."""

    def __init__(self, width: int, num_heads: int, learned_key: bool, drop_path: float) -> None:
        super().__init__()
        self.attn = Attention(width, num_heads, learned_key)
        self.norm_1 = nn.LayerNorm(width, eps=TRUNK_NORM_EPS)
        self.mlp = Mlp(width)
        self.norm_2 = nn.LayerNorm(width, eps=TRUNK_NORM_EPS)
        self.drop_path = drop_path

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        """Map ``(N, L, D)`` to ``(N, L, D)``."""
        x = x + self._dropped(self.attn(self.norm_1(x), causal))
        return x + self._dropped(self.mlp(self.norm_2(x)))

    def _dropped(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0.0:
            return branch
        kept = 1.0 - self.drop_path
        return branch * branch.new_empty(branch.shape[0], 1, 1).bernoulli_(kept) / kept


class Attention(nn.Module):
    """Multi-head self-attention, stored like ``torch.nn.MultiheadAttention``.

    With ``learned_key``, one learned key and value that belong to no token can be attended to.
    """

    def __init__(self, width: int, num_heads: int, learned_key: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.plain = False
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.bias_k = nn.Parameter(torch.empty(1, 1, width)) if learned_key else None
        self.bias_v = nn.Parameter(torch.empty(1, 1, width)) if learned_key else None
        nn.init.xavier_uniform_(self.in_proj_weight)
        _reset_linear(self.out_proj)
        for extra in (self.bias_k, self.bias_v):
            if extra is not None:
                nn.init.xavier_normal_(extra)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        """Map ``(N, L, D)`` to ``(N, L, D)``."""
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)  # 3 x (N, L, D)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(len(x), -1, -1)], dim=1)  # (N, L + 1, D)
            v = torch.cat([v, self.bias_v.expand(len(x), -1, -1)], dim=1)  # (N, L + 1, D)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # (N, H, *, K)
        attend = _attend_plainly if self.plain else F.scaled_dot_product_attention
        x = attend(q, k, v, is_causal=causal)  # (N, H, L, K)
        out: Tensor = self.out_proj(x.transpose(1, 2).flatten(2))  # (N, L, D)
        return out


def _attend_plainly(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    """Return the same as the fused attention, from ``(N, H, L, K)`` each."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (N, H, L, L or L + 1)
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    mixed: Tensor = scores.softmax(-1).to(v.dtype) @ v
    return mixed


class Mlp(nn.Module):
    """Two linear maps with the exact GELU between, four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        _reset_linear(self.fc1)
        _reset_linear(self.fc2)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, L, D)`` to ``(N, L, D)``."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class UnitLength(nn.Module):
    """Scale rows to L2 norm 1."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, E)`` to ``(N, E)``."""
        return F.normalize(x, dim=-1)


class LogitScale(nn.Module):
    """Multiply by a factor that is stored as its logarithm and never exceeds 100."""

    def __init__(self, start: float, *, learned: bool) -> None:
        super().__init__()
        self.log_logit_scale: Tensor
        if learned:
            self.log_logit_scale = nn.Parameter(torch.tensor(math.log(start)))
        else:
            self.register_buffer("log_logit_scale", torch.tensor(math.log(start)))

    def factor(self) -> Tensor:
        """Return the factor, a scalar."""
        return self.log_logit_scale.exp().clamp(max=MAX_LOGIT_SCALE)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, E)`` to ``(N, E)``."""
        return x * self.factor()


class TextHead(nn.Module):
    """Norm and projection, under the name that the release gives them."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(width, eps=TRUNK_NORM_EPS), nn.Linear(width, out_width, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., D)`` to ``(..., E)``."""
        out: Tensor = self.proj(x)
        return out


def _head(name: str, width: int, out_width: int) -> nn.Module:
    if name == "text":
        return TextHead(width, out_width)
    between: list[nn.Module] = [nn.Identity()]  # where the release picks the class token; keeps its numbering
    if name == "imu":
        between.append(nn.Dropout(0.5))
    return nn.Sequential(
        nn.LayerNorm(width, eps=TRUNK_NORM_EPS), *between, nn.Linear(width, out_width, bias=False)
    )


def _scale(name: str) -> nn.Module:
    if name == "vision":
        return UnitLength()
    if name == "text":
        return nn.Sequential(UnitLength(), LogitScale(TEXT_LOGIT_SCALE_START, learned=True))
    return nn.Sequential(UnitLength(), LogitScale(FIXED_LOGIT_SCALES[name], learned=False))


def _reset_linear(linear: nn.Linear) -> None:
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)


def _at_end_token(tokens: Tensor, ids: Tensor) -> Tensor:
    return tokens[torch.arange(len(ids), device=ids.device), ids.argmax(dim=-1)]
