"""Contact sheets and a gallery: what was made, with its words, and whether it is right."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import torch

from decoders.mel import log_mel
from encoders.media import Audio, Image, Medium, read_media

if TYPE_CHECKING:
    from alignment.samples import Sample

CELL_PX, CAPTION_PX, COLUMNS, ROWS = 132, 40, 8, 4
GALLERY_PX, GALLERY_SAMPLES = 96, 2
RIGHT, WRONG = (20, 130, 60), (190, 30, 30)


def write_sheet(path: Path, samples: Sequence[Sample], right: Sequence[bool]) -> None:
    """Write the first samples of a direction as one picture; sounds appear as spectrograms."""
    shown = list(zip(samples, right, strict=True))[: COLUMNS * ROWS]
    rows = -(-len(shown) // COLUMNS)
    sheet = PIL.Image.new("RGB", (COLUMNS * CELL_PX, rows * (CELL_PX + CAPTION_PX)), "white")
    draw = PIL.ImageDraw.Draw(sheet)
    for place, (sample, verdict) in enumerate(shown):
        x, y = place % COLUMNS * CELL_PX, place // COLUMNS * (CELL_PX + CAPTION_PX)
        media = [read_media(data) for data in sample.made if data] or list(sample.media.values())
        for i, medium in enumerate(media[:3]):
            width = (CELL_PX - 4) // max(1, min(3, len(media)))
            sheet.paste(_thumbnail(medium, width), (x + 2 + i * width, y + 2))
        draw.multiline_text(
            (x + 3, y + CELL_PX),
            _wrapped(sample.text, 24),
            fill=RIGHT if verdict else WRONG,
            font_size=9,
            spacing=1,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(256, PIL.Image.Quantize.FASTOCTREE).save(path, optimize=True)


def write_gallery(folder: Path, name: str, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Write the first samples of a direction one by one, not picked.

    Returns:
        For each sample what was said, what the agent said, which attributes are wrong, and the names of the
        pictures of what was ``shown`` and ``made``, or None where there was nothing.

    """
    from alignment.samples import findings

    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for index, sample in enumerate(samples[:GALLERY_SAMPLES]):
        files: dict[str, str | None] = {}
        made = [read_media(data) for data in sample.made if data]
        for kind, media in (("shown", list(sample.media.values())), ("made", made)):
            files[kind] = f"{name}-{index + 1}-{kind}.png" if media else None
            if media:
                strip = PIL.Image.new("RGB", ((GALLERY_PX + 4) * len(media) - 4, GALLERY_PX), "white")
                for place, medium in enumerate(media):
                    strip.paste(_thumbnail(medium, GALLERY_PX), (place * (GALLERY_PX + 4), 0))
                strip.quantize(256, PIL.Image.Quantize.FASTOCTREE).save(
                    folder / f"{name}-{index + 1}-{kind}.png", optimize=True
                )
        wrong = [key for key, finding in findings(sample).items() if not finding.right]
        entries.append({"said": sample.said, "answer": sample.text, "wrong": wrong, **files})
    return entries


def _thumbnail(medium: Medium, side: int) -> PIL.Image.Image:
    if isinstance(medium, Image):
        pixels = medium.pixels
    elif isinstance(medium, Audio):
        mel = log_mel(torch.from_numpy(np.ascontiguousarray(medium.samples))).numpy()  # (frames, 64)
        pixels = np.clip((mel.T[::-1] + 11.5) / 13 * 255, 0, 255).astype(np.uint8)
    else:
        picked = medium.frames[np.linspace(0, len(medium.frames) - 1, 4).round().astype(int)]
        top, bottom = np.concatenate(picked[:2], axis=1), np.concatenate(picked[2:], axis=1)
        pixels = np.concatenate([top, bottom])
    return PIL.Image.fromarray(pixels).convert("RGB").resize((side, side), PIL.Image.Resampling.BOX)


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width)[:3])
