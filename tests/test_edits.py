"""Edits with the embedded model: what the words do not name stays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from decoders.settings import DecodeSettings
from decoders.writing import to_png
from encoders.media import Image, Modality, Video, read_media
from services.session import ReplyPart, Session

SEED = 8
TINT = (235, 220, 180)
ENDS = (slice(0, 8), slice(56, 64))


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with Session.open("toybox") as session:
        yield session


def made(
    session: Session, messages: list[dict[str, Any]], kind: Modality, strength: float | None = None
) -> ReplyPart:
    """Make a medium; with a strength, by that alone."""
    decoders = {}
    if strength is not None:
        keep = None if kind is Modality.AUDIO else False
        decoders = {kind: DecodeSettings(strength=strength, keep_untouched=keep)}
    (part,) = [p for p in session.chat(messages, seed=SEED, decoders=decoders).parts if p.type is kind]
    return part


def pixels_of(part: ReplyPart) -> NDArray[np.float64]:
    assert part.data is not None
    medium = read_media(part.data)
    assert isinstance(medium, Image | Video)
    return (medium.pixels if isinstance(medium, Image) else medium.frames).astype(float)


def test_the_ground_of_a_picture_stays_when_its_thing_gets_another_colour(session: Session) -> None:
    bell = made(session, [{"role": "user", "content": "draw a big red bell"}], Modality.IMAGE)
    picture = pixels_of(bell)
    ground = (picture > 240).all(axis=-1)
    picture[ground] = TINT  # no ground of the toy box, so nobody can name it
    content = [
        {"type": "image", "data": to_png(Image(picture.astype(np.uint8)), {})},
        {"type": "text", "text": "make it blue"},
    ]
    messages = [{"role": "user", "content": content}]

    anew, edited = (made(session, messages, Modality.IMAGE, strength) for strength in (1.0, 0.6))

    off = [float(np.abs(pixels_of(part) - picture)[ground].mean()) for part in (anew, edited)]
    assert off[1] < 0.85 * off[0], off
    red, _, blue = pixels_of(edited)[~ground].mean(axis=0)
    assert blue > red  # what was named has changed
    assert edited.manifest is not None
    assert edited.manifest["strength"] == 0.6


@pytest.mark.parametrize(
    ("kind", "wish"), [(Modality.IMAGE, "draw a big red bell"), (Modality.VIDEO, "a video of a big red bell")]
)
def test_without_a_word_an_edit_keeps_the_very_pixels_around_what_it_changes(
    session: Session, kind: Modality, wish: str
) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": wish}]
    before = made(session, messages, kind)
    said = {"type": kind.value, "caption": before.caption, "file_id": before.file_id}
    messages += [{"role": "assistant", "parts": [said]}, {"role": "user", "content": "make it blue"}]

    edited, anew = made(session, messages, kind), made(session, messages, kind, strength=1.0)

    kept, drawn, was = pixels_of(edited), pixels_of(anew), pixels_of(before)
    corners = [(..., rows, columns, slice(None)) for rows in ENDS for columns in ENDS]
    off, off_anew = (
        np.mean([np.abs(pixels[corner] - was[corner]).mean() for corner in corners])
        for pixels in (kept, drawn)
    )
    assert off < 0.8 * off_anew
    assert off == 0 or kind is Modality.VIDEO  # whose file loses some of the colours that it was given
    red, _, blue = kept[..., 24:40, 24:40, :].reshape(-1, 3).mean(axis=0)
    assert blue > red
    assert edited.manifest is not None
    assert len(edited.manifest["original"]) == 16
    assert "strength" not in edited.manifest


@pytest.mark.parametrize("kind", [Modality.VIDEO, Modality.AUDIO])
def test_videos_and_sounds_start_from_the_one_before(session: Session, kind: Modality) -> None:
    first, change = {
        Modality.VIDEO: ("make a video of a big red bell moving left", "make it blue"),
        Modality.AUDIO: ("play a low bell", "make it high"),
    }[kind]
    messages: list[dict[str, Any]] = [{"role": "user", "content": first}]
    before = made(session, messages, kind)
    said = {"type": kind.value, "caption": before.caption, "file_id": before.file_id}
    messages += [{"role": "assistant", "parts": [said]}, {"role": "user", "content": change}]

    anew, edited = (made(session, messages, kind, strength) for strength in (1.0, 0.5))

    def off(part: ReplyPart) -> float:
        values = []
        for each in (before, part):
            assert each.data is not None
            medium: Any = read_media(each.data)
            values.append(np.abs(np.fft.rfft(medium.samples)) if kind is Modality.AUDIO else medium.frames)
        return float(np.abs(values[0].astype(float) - values[1]).mean())

    assert off(edited) < off(anew), (off(edited), off(anew))
