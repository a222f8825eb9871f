"""What the command line takes behind its options, each refused with what is expected."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from encoders.media import Modality


def preset_option(parser: argparse.ArgumentParser) -> None:
    """Let a command take ``--preset``."""
    parser.add_argument(
        "--preset", metavar="P", default="toybox", help="name or YAML file of a preset (default %(default)s)"
    )


def place(text: str) -> str:
    """Read a path or a name; an empty one is what a shell makes of a variable that is not set."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; expected a path. Is a variable of your shell not set?")
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} holds a zero byte; expected a path")
    return text


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def port(text: str) -> int:
    """Read a port, from 1 to 65535."""
    number = _whole(text)
    if not 1 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"{number} is not a port; choose one from 1 to 65535")
    return number


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    number = _whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too few; at least 1")
    return number


def memory_size(text: str) -> int:
    """Read a size such as 24GB, 16GiB or 800MB."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMG])(i?)B?", text.strip(), re.IGNORECASE)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write one like 24GB")
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** (" KMG".index(prefix.upper())))


def strength(text: str) -> tuple[Modality, float | None]:
    """Read a medium and how far to go from its source, such as ``image=0.5``."""
    from services.chat import read_strength

    try:
        return read_strength(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def seed(text: str) -> int:
    """Read a seed."""
    from decoders.settings import MAX_SEED

    number = _whole(text)
    if not 0 <= number <= MAX_SEED:
        raise argparse.ArgumentTypeError(f"{number} is not a seed; choose one from 0 to {MAX_SEED}")
    return number
