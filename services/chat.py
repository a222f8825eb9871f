"""The conversation of ``patchbay chat``: one turn for a program, or many for a person."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from decoders.settings import DecodeSettings, check_strength
from encoders.media import Modality
from services.errors import BadRequest, ServiceError, translate
from services.events import Event, PartAsked, PartDone, PartFailed, PartStarted, TextDelta
from services.presets import load_preset
from services.session import Reply, ReplyPart, Session

SUFFIXES = {Modality.IMAGE: "png", Modality.VIDEO: "mp4", Modality.AUDIO: "wav"}
HELP = (
    "Attach with /image FILE, /audio FILE or /video FILE. /strength image 0.5 makes pictures start from the "
    "newest one, /strength image off anew. /make makes what was asked about in the reply before. Leave with "
    "/quit or Ctrl-D."
)


def say_once(args: argparse.Namespace) -> int:
    """Do one turn, print it, and return the exit code: 1 when a part of the reply failed."""
    messages = [*_earlier(args.messages), _user(args.text, _attachments(args))]
    out = _folder(args.out)
    session, load_s = _open(args.preset)
    with session:
        printer = None if args.json else _Printer()
        wishes = _wishes(args.strength)
        reply = session.chat(
            messages,
            on_event=printer,
            seed=args.seed,
            adapters=args.lora,
            decoders=wishes,
            ask_below=args.ask_below,
            verify=False if args.no_verify else None,
        )
    parts = [_written(part, out) for part in reply.parts]
    if args.json:
        print(json.dumps({"parts": parts, "timings": {"load_s": load_s, **reply.timings}}))
    else:
        _list_media(parts)
    return _report_failures(reply)


def converse(args: argparse.Namespace) -> int:
    """Talk until the person leaves."""
    messages = _earlier(args.messages)
    attached = _attachments(args)
    strengths = dict(args.strength)
    out = _folder(args.out)
    session, _ = _open(args.preset)
    reply: Reply | None = None
    with session:
        if sys.stdin.isatty():
            print(f"{session.preset.description}\n{HELP}")
        while (line := _ask()) is not None:
            try:
                if command := re.fullmatch(r"/(image|audio|video)\s+(.+)", line):
                    attached.append(_attachment(command[1], command[2].strip()))
                    print(f"attached {command[2].strip()}")
                    continue
                if command := re.fullmatch(r"/strength\s+(\w+)\s+(\S+)", line):
                    modality, strength = read_strength(f"{command[1]}={command[2]}")
                    strengths[modality] = strength
                    continue
                if line == "/quit":
                    break
                if line == "/make":
                    reply = _make_asked(session, reply, out)
                    messages[-1] = _assistant(reply)
                    continue
                if line.startswith("/"):
                    print(HELP)
                    continue
                said = [*messages, _user(line, attached)]
                wishes = _wishes(strengths.items())
                reply = session.chat(
                    said,
                    on_event=_Printer(),
                    seed=args.seed,
                    adapters=args.lora,
                    decoders=wishes,
                    ask_below=args.ask_below,
                    verify=False if args.no_verify else None,
                )
            except (ServiceError, ValueError) as error:
                print(f"patchbay: {translate(error).message}", file=sys.stderr)
                continue
            _list_media([_written(part, out) for part in reply.parts])
            _report_failures(reply)
            messages += [_user(line, attached), _assistant(reply)]
            attached = []
    return 0


def _make_asked(session: Session, reply: Reply | None, out: Path) -> Reply:
    """Make the media that a reply asked about; return it with them."""
    asked = [] if reply is None else [i for i, part in enumerate(reply.parts) if part.question is not None]
    if reply is None or not asked:
        raise ValueError("The last reply asked about no medium; /make is for those that it asks about.")
    for index in asked:
        reply = session.make(reply, index)
    _list_media([_written(reply.parts[index], out) for index in asked])
    _report_failures(reply)
    return reply


def read_strength(text: str) -> tuple[Modality, float | None]:
    """Read ``image=0.5``, or ``image=off``; raise ValueError for anything else."""
    name, _, value = text.partition("=")
    if name not in SUFFIXES:
        raise ValueError(
            f"{text!r} names no medium that can be made; expected image=, video= or audio= and a number "
            f"above 0 up to 1, or off."
        )
    if value == "off":
        return Modality(name), None
    try:
        strength = float(value)
    except ValueError:
        raise ValueError(f"{text!r} has no number; expected {name}=0.5 or {name}=off.") from None
    check_strength(strength)
    return Modality(name), strength


def _wishes(strengths: Iterable[tuple[Modality, float | None]]) -> dict[Modality, DecodeSettings]:
    return {
        modality: DecodeSettings(strength=strength)
        for modality, strength in strengths
        if strength is not None
    }


class _Printer:
    """Shows a turn while it happens."""

    def __init__(self) -> None:
        self.index = 0

    def __call__(self, event: Event) -> None:
        match event:
            case TextDelta(index=index, text=text):
                self._newline(index)
                print(text, end="", flush=True)
            case PartStarted(index=index, modality=modality):
                self._newline(index)
                print(f"[{modality.value} ...]", end="", flush=True)
            case PartAsked(index=index, modality=modality):
                self._newline(index)
                print(f"[{modality.value}? {event.confidence:.5g}] {event.question}", end="", flush=True)
            case PartDone() | PartFailed():
                pass

    def _newline(self, index: int) -> None:
        if index != self.index:
            print()
        self.index = index


def _open(preset_name: str) -> tuple[Session, float]:
    from services.doctor import expect_files

    began = time.monotonic()
    preset = load_preset(preset_name)
    expect_files(preset)
    return Session(preset), round(time.monotonic() - began, 3)


def _ask() -> str | None:
    """Return the next line that is not empty, or None when there is none."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        if line:
            return line


def _earlier(path: str | None) -> list[Mapping[str, Any]]:
    if path is None:
        return []
    try:
        messages = json.loads(_read(path))
    except ValueError as error:
        raise BadRequest(
            f"{path} is not JSON: {error}. Expected a list of messages.", code="invalid_json"
        ) from error
    if not isinstance(messages, list):
        raise BadRequest(
            f"{path} holds a JSON {type(messages).__name__}; expected a list of messages.",
            code="invalid_json",
        )
    return messages


def _attachments(args: argparse.Namespace) -> list[dict[str, Any]]:
    kinds = ("image", "audio", "video")
    return [_attachment(kind, path) for kind in kinds for path in getattr(args, kind)]


def _attachment(kind: str, path: str) -> dict[str, Any]:
    return {"type": kind, "data": _read(path)}


def _read(path: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise BadRequest(
            f"{path} cannot be read: {error.strerror}. Give the path of a file that you may read.",
            code="file_not_readable",
        ) from error


def _user(text: str, attached: list[dict[str, Any]]) -> dict[str, Any]:
    return {"role": "user", "content": [*attached, {"type": "text", "text": text}]}


def _assistant(reply: Reply) -> dict[str, Any]:
    return {"role": "assistant", "parts": [_said_again(part) for part in reply.parts]}


def _said_again(part: ReplyPart) -> dict[str, Any]:
    if part.text is not None:
        return {"type": "text", "text": part.text}
    if part.question is not None:
        return {"type": part.type.value, "status": "asked", "question": part.question}
    caption = part.caption or ""
    return {"type": part.type.value, "caption": caption, "file_id": part.file_id, "error": part.error}


def _folder(path: str) -> Path:
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadRequest(
            f"{folder} cannot be made: {error.strerror}. Choose another with --out.", code="out_not_writable"
        ) from error
    return folder


def _written(part: ReplyPart, out: Path) -> dict[str, Any]:
    """Return a part as JSON; a medium is written into ``out`` under a number that is free."""
    if part.type is Modality.TEXT:
        return {"type": "text", "text": part.text}
    values: dict[str, Any] = {"type": part.type.value, "caption": part.caption}
    if part.question is not None:
        return {**values, "status": "asked", "confidence": part.confidence, "question": part.question}
    if part.data is None:
        return {**values, "error": part.error}
    taken = [int(found[1]) for path in out.iterdir() if (found := re.match(r"(\d{4,})-", path.name))]
    for number in itertools.count(max(taken, default=0) + 1):
        path = out / f"{number:04}-{part.type.value}.{SUFFIXES[part.type]}"
        try:
            with path.open("xb") as file:
                file.write(part.data)
        except FileExistsError:  # another conversation took it meanwhile
            continue
        except OSError as error:
            raise BadRequest(
                f"{path} cannot be written: {error.strerror}. Choose another folder with --out.",
                code="out_not_writable",
            ) from error
        break
    return {**values, "path": str(path), "manifest": part.manifest}


def _list_media(parts: list[dict[str, Any]]) -> None:
    print()
    for part in parts:
        if "path" in part:
            print(f"{part['type']}: {part['path']}")


def _report_failures(reply: Reply) -> int:
    failed = [part for part in reply.parts if part.error is not None]
    for part in failed:
        print(f"patchbay: The {part.type.value} could not be made: {part.error}", file=sys.stderr)
    return 1 if failed else 0
