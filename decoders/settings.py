"""What a request may ask of a decoder, and what a decoder does when it does not ask."""

import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

MAX_SEED = 2**53 - 1
"""Largest seed: every JSON reader keeps integers up to here exactly."""

SCHEDULER_NAMES = ("dpmsolver++", "ddim", "euler")

_INTEGERS = {
    "seed": (0, MAX_SEED),
    "steps": (1, 1000),
    "width_px": (8, 4096),
    "height_px": (8, 4096),
    "num_frames": (1, 512),
    "deep_every": (1, 16),
}
USUAL_STRENGTH = 0.6
"""How far a decoder goes away from a source where nobody says."""

_NUMBERS = {"guidance_scale": (0.0, 50.0), "duration_s": (0.05, 120.0), "fps": (0.1, 240.0)}


class WrongSetting(ValueError):
    """A setting that a decoder cannot follow; ``name`` is its field in :class:`DecodeSettings`."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


def _check(name: str, value: object) -> None:
    """Raise ValueError when ``value`` is out of the range of the field ``name``."""
    if value is None:
        return
    if name == "lora":
        if not isinstance(value, str) or not value:
            raise ValueError(f"lora is {value!r}; it must be the name of an adapter. Leave it out for none.")
        return
    if name == "strength":
        check_strength(value)
        return
    if name in ("fast", "keep_untouched"):
        if not isinstance(value, bool):
            raise ValueError(
                f"{name} is {value!r}; it must be true or false. Leave it out for the preset's way."
            )
        return
    if name == "scheduler":
        if value not in SCHEDULER_NAMES:
            raise ValueError(f"scheduler is {value!r}; choose one of {', '.join(SCHEDULER_NAMES)}.")
        return
    if name in _INTEGERS:
        low, high = _INTEGERS[name]
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(
                f"{name} is {value!r}; it must be a whole number from {low} to {high}. "
                f"Leave it out to use the decoder's default."
            )
        return
    least, most = _NUMBERS[name]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not least <= value <= most:  # type: ignore[arg-type, operator]
        raise ValueError(
            f"{name} is {value!r}; it must be a number from {least:g} to {most:g}. "
            f"Leave it out to use the decoder's default."
        )


def check_strength(value: object) -> None:
    """Raise ValueError unless ``value`` is a number in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(
            f"strength is {value!r}; it must be above 0 (keep the source) and at most 1 (ignore it)."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeSettings:
    """The wishes of one request; None means the decoder's default (a drawn seed, for ``seed``).

    ``guidance_scale`` up to 1 turns classifier-free guidance off, as in diffusers. Sizes are in pixels,
    ``duration_s`` in seconds (sound only), ``num_frames`` for video only. ``deep_every`` n above 1 computes
    the deep features of the U-Net in every n-th step only, which is faster and less exact (see
    :mod:`decoders.deep_features`). ``fast`` leaves that n to the preset: a decoder alone knows no such thing.
    ``lora`` names LoRA that the network wears for this request (see :mod:`decoders.lora`). ``strength``, in
    (0, 1], is how far to go away from a source that the request starts from; only that part of the steps is
    taken. ``keep_untouched`` gives the medium the pixels of an original wherever they agree, or its tuning
    (see :mod:`decoders.untouched`). Immutable; checked when made.
    """

    seed: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None
    width_px: int | None = None
    height_px: int | None = None
    num_frames: int | None = None
    duration_s: float | None = None
    deep_every: int | None = None
    fast: bool | None = None
    lora: str | None = None
    strength: float | None = None
    keep_untouched: bool | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            _check(field.name, getattr(self, field.name))

    def with_seed(self, seed: int) -> "DecodeSettings":
        """Return the same wishes with another seed."""
        return replace(self, seed=seed)

    def only(self, *allowed: str) -> None:
        """Raise WrongSetting when a size is given that is not in ``allowed``."""
        for name in ("width_px", "height_px", "num_frames", "duration_s"):
            value = getattr(self, name)
            if value is not None and name not in allowed:
                raise WrongSetting(
                    name,
                    f"{name} is {value}, but this decoder has no {name}; it takes "
                    f"{', '.join(allowed) or 'no size'}. Leave {name} out.",
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderDefaults:
    """What a decoder uses where a request is silent. Immutable; checked when made.

    A size of None is read from the configuration of the pipeline.
    """

    steps: int
    guidance_scale: float
    scheduler: str = "dpmsolver++"
    width_px: int | None = None
    height_px: int | None = None
    num_frames: int | None = None
    duration_s: float | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            _check(field.name, getattr(self, field.name))

    def updated(self, path: Path) -> "DecoderDefaults":
        """Return these defaults with the values of the JSON object in ``path``, if that file exists.

        Raises:
            ValueError: not a JSON object, an unknown key, or a value out of range.

        """
        if not path.is_file():
            return self
        try:
            values = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON ({error}). Repair or remove it.") from None
        known = {field.name for field in fields(self)}
        if not isinstance(values, dict) or not set(values) <= known:
            raise ValueError(
                f"{path} holds {values!r:.200}; expected an object with keys from {', '.join(sorted(known))}."
            )
        try:
            return replace(self, **values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
