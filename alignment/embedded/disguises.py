"""Media that keep some of their attributes and lose others, so that none can be guessed from the rest.

Pictures and clips lose their colours. Sounds are played together with another one that differs in thing and
pitch alone, are put between two pitches and two tempos, or have their spectrum turned upside down: no thing
sounds like that, but it still sounds as often.

Shape letters in this file:
    B batch   S clips   M mel bins   T mel frames
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from alignment.toybox.world import Scene, Sound
from encoders.filter_banks import bands_at, centres_hz

HIDDEN_SHARE = 0.25
"""Of each batch: what is shown without colours, and what sounds together with something else."""
BETWEEN_SHARE, MIRRORED_SHARE = 0.3, 0.25
"""Of sounds, beside these."""
WITHOUT_COLOUR, OF_DUETS, OF_BETWEEN = ("colour", "ground"), ("thing", "pitch"), ("pitch", "tempo")
OF_MIRRORED = ("thing", "pitch", "tempo")
FURTHEST_SEMITONES = 5.5  # pitches are twelve apart: nearer to its own than to the next one
FURTHEST_PACE = 1.35  # tempos are nearly 2 apart
ASKED_OF_DISGUISED = frozenset({"count"})
"""Of sounds: asked of plain ones, too, it would be guessed from which combinations there are."""


class Disguised:
    """A batch of which some rows show less.

    ``media`` is what the tower gets. ``plain`` ``(B,)`` says which rows are as they were, and ``shown``, for
    each attribute that may be lost, which rows ``(B,)`` are asked for it.
    """

    def __init__(self, media: Tensor, plain: Tensor, shown: Mapping[str, Tensor]) -> None:
        self.media, self.plain, self.shown = media, plain, shown


def without_colour(batch: Tensor, noise: torch.Generator) -> Disguised:
    """Take the colours from some pictures ``(B, 3, H, W)`` or clips ``(B, S, 3, F, H, W)``."""
    grey = torch.rand(len(batch), generator=noise) < HIDDEN_SHARE  # (B,)
    return Disguised(_where(grey, greyed(batch), batch), ~grey, dict.fromkeys(WITHOUT_COLOUR, ~grey))


def greyed(batch: Tensor) -> Tensor:
    """Return pictures ``(B, 3, H, W)`` or clips ``(B, S, 3, F, H, W)`` without their colours."""
    return batch.mean(1 if batch.ndim == 4 else 2, keepdim=True).expand_as(batch)


def of_no_thing(batch: Tensor, partners: Tensor, noise: torch.Generator) -> Tensor:
    """Return sounds of which nobody can say what sounds, and how high: half of them duets, half mirrored.

    ``batch`` and ``partners`` are as in :func:`disguised_sounds`. Tempo, count and loudness stay.
    """
    duet = torch.rand(len(batch), generator=noise) < 0.5
    semitones = FURTHEST_SEMITONES * (2 * torch.rand(len(batch), generator=noise) - 1)
    turned = transposed(batch.flip(-2).flatten(1, 2), semitones, torch.ones(len(batch)))
    return _where(duet, torch.maximum(batch, partners), turned.view_as(batch))


def disguised_sounds(
    batch: Tensor, scenes: Sequence[Scene], partners: Tensor, noise: torch.Generator
) -> Disguised:
    """Turn some sounds into duets, put some between two pitches and tempos, and mirror some.

    Args:
        batch: filter banks ``(B, S, 1, M, T)``.
        scenes: what they are.
        partners: for each row one like it, which may have another thing and pitch, like ``batch``.
        noise: decides which rows, and how far.

    """
    B = len(batch)
    drawn = torch.rand(B, generator=noise)
    duet = drawn < HIDDEN_SHARE
    between = ~duet & (drawn < HIDDEN_SHARE + BETWEEN_SHARE)
    mirrored = ~duet & ~between & (drawn < HIDDEN_SHARE + BETWEEN_SHARE + MIRRORED_SHARE)
    semitones = FURTHEST_SEMITONES * (2 * torch.rand(B, generator=noise) - 1)
    pace = FURTHEST_PACE ** torch.rand(B, generator=noise)
    slow = torch.tensor([isinstance(scene, Sound) and scene.tempo == "slow" for scene in scenes])
    turned = _where(mirrored, batch.flip(-2), batch).flatten(1, 2)  # (B, S, M, T)
    moved = transposed(turned, semitones, torch.where(slow, pace, 1 / pace)).view_as(batch)
    both = torch.maximum(batch, partners)  # of log energies, the louder one is nearly their sum
    media = _where(between | mirrored, moved, _where(duet, both, batch))
    shown = {name: torch.ones_like(duet) for name in {*OF_DUETS, *OF_BETWEEN, *OF_MIRRORED}}
    for names, rows in ((OF_DUETS, duet), (OF_BETWEEN, between), (OF_MIRRORED, mirrored)):
        for name in names:
            shown[name] = shown[name] & ~rows
    disguised = duet | between | mirrored
    shown |= dict.fromkeys(ASKED_OF_DISGUISED, disguised)
    return Disguised(media, ~disguised, shown)


def transposed(banks: Tensor, semitones: Tensor, pace: Tensor) -> Tensor:
    """Return log filter banks ``(B, S, M, T)`` as of sounds that are higher and go faster.

    Args:
        banks: of which each row has its own ``semitones`` and ``pace``.
        semitones: how much higher, ``(B,)``.
        pace: how many times as fast, ``(B,)``; what comes after the end is as quiet as the row gets.

    """
    B, _, M, T = banks.shape
    from_hz = centres_hz(M) / 2 ** (semitones[:, None] / 12)  # (B, M)
    rows = bands_at(from_hz, M)  # (B, M)
    columns = torch.arange(T) * pace[:, None]  # (B, T)
    grid = torch.stack(
        [
            (2 * columns / (T - 1) - 1)[:, None, :].expand(B, M, T),
            (2 * rows / (M - 1) - 1)[:, :, None].expand(B, M, T),
        ],
        dim=-1,
    )  # (B, M, T, 2)
    moved = F.grid_sample(banks, grid.float(), padding_mode="border", align_corners=True)
    quietest = banks.amin((2, 3), keepdim=True)
    return torch.where((columns > T - 1)[:, None, None, :], quietest, moved)


def _where(chosen: Tensor, then: Tensor, otherwise: Tensor) -> Tensor:
    return torch.where(chosen.view(-1, *(1 for _ in then.shape[1:])), then, otherwise)
