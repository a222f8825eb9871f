"""The three media values, and reading them from bytes within a budget.

A file is recognised by its content, never by a name or a declared type. What its header claims is
held against the budget before anything is decoded, and the limit is enforced again while decoding,
because a header can lie.

Shape letters in this file:
    H height   W width   F frames   T samples
"""

from __future__ import annotations

import io
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal

import av
import numpy as np
import PIL.Image
import soundfile
from numpy.typing import NDArray
from PIL import ImageOps
from scipy.signal import firwin, resample_poly

from encoders.media_headers import image_size, missing_bytes, recognise, wav_header

IMAGE_FORMATS = ("png", "jpeg", "webp", "gif")
SOUND_FORMATS = ("wav", "flac", "ogg", "mp3")
CONTAINER_FORMATS = ("mp4", "webm")
READABLE = "PNG, JPEG, WebP, GIF, WAV, FLAC, OGG, MP3, MP4 or WebM"
RATES_HZ = (1_000, 384_000)
MAX_SIDE_PX = 65_535  # the most that JPEG and GIF can say; millions of rows are slow to decode
MAX_CHANNELS = 16

ErrorCode = Literal["invalid_media", "media_limit_exceeded", "unsupported_media"]


class Modality(StrEnum):
    """What a part of a conversation is made of."""

    TEXT = "text"
    IMAGE = "image"
    VIDEO = "video"
    AUDIO = "audio"


@dataclass(frozen=True, eq=False)
class Image:
    """A picture: ``pixels`` are uint8 ``(H, W, 3)``, RGB, upright."""

    pixels: NDArray[np.uint8]

    def __post_init__(self) -> None:
        if self.pixels.dtype != np.uint8 or self.pixels.ndim != 3 or self.pixels.shape[2] != 3:
            raise ValueError(f"pixels are {_described(self.pixels)}; expected uint8 of shape (H, W, 3).")

    @property
    def modality(self) -> Modality:
        """Always ``Modality.IMAGE``."""
        return Modality.IMAGE


@dataclass(frozen=True, eq=False)
class Audio:
    """A sound: ``samples`` are float32 ``(T,)`` in [-1, 1], mono, ``rate`` per second."""

    samples: NDArray[np.float32]
    rate: int

    def __post_init__(self) -> None:
        if self.samples.dtype != np.float32 or self.samples.ndim != 1:
            raise ValueError(f"samples are {_described(self.samples)}; expected float32 of shape (T,).")
        if self.rate < 1:
            raise ValueError(f"rate is {self.rate}; expected samples per second, at least 1.")

    @property
    def modality(self) -> Modality:
        """Always ``Modality.AUDIO``."""
        return Modality.AUDIO

    @property
    def seconds(self) -> float:
        """Length of the sound."""
        return len(self.samples) / self.rate


@dataclass(frozen=True, eq=False)
class Video:
    """Moving pictures without sound: ``frames`` are uint8 ``(F, H, W, 3)``, ``fps`` per second."""

    frames: NDArray[np.uint8]
    fps: float

    def __post_init__(self) -> None:
        shape = self.frames.shape
        if self.frames.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or shape[0] < 1:
            raise ValueError(f"frames are {_described(self.frames)}; expected uint8 of shape (F, H, W, 3).")
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise ValueError(f"fps is {self.fps}; expected frames per second, above 0.")

    @property
    def modality(self) -> Modality:
        """Always ``Modality.VIDEO``."""
        return Modality.VIDEO

    @property
    def seconds(self) -> float:
        """Length of the video."""
        return len(self.frames) / self.fps


Medium = Image | Audio | Video


@dataclass(frozen=True, kw_only=True)
class MediaBudget:
    """The most that one medium may cost. Beyond it, :func:`read_media` refuses.

    Attributes:
        max_bytes: size of the file.
        max_pixels: width times height of a picture or of one video frame.
        max_seconds: length of a sound or a video.
        max_frames: frames of a video.
        max_video_pixels: pixels of all frames of a video together, as they are stored.
        video_short_side_px: larger video frames are scaled down to this while they are decoded.
        max_kept_pixels: of a video whose scaled frames hold more pixels than this together, only
            every second (third, ...) frame is kept, and ``fps`` falls accordingly.

    """

    max_bytes: int = 64 * 2**20
    max_pixels: int = 40_000_000
    max_seconds: float = 300.0
    max_frames: int = 18_000
    max_video_pixels: int = 20_000_000_000
    video_short_side_px: int = 360
    max_kept_pixels: int = 120_000_000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0.")
        if PIL.Image.MAX_IMAGE_PIXELS is not None and self.max_pixels > PIL.Image.MAX_IMAGE_PIXELS:
            raise ValueError(
                f"max_pixels is {self.max_pixels}; Pillow refuses more than {PIL.Image.MAX_IMAGE_PIXELS}. "
                "Lower max_pixels, or raise PIL.Image.MAX_IMAGE_PIXELS first."
            )


class MediaError(ValueError):
    """A medium cannot be read. ``code`` is stable and meant for programs.

    ``unsupported_media``: not a format or modality that is read here. ``invalid_media``: a known
    format, damaged or empty. ``media_limit_exceeded``: fine perhaps, but beyond the budget.
    """

    def __init__(self, code: ErrorCode, message: str) -> None:
        self.code: ErrorCode = code
        super().__init__(message)


def read_media(
    data: bytes, budget: MediaBudget | None = None, expect: Modality | None = None
) -> Image | Audio | Video:
    """Decode a picture, a sound or a video.

    Args:
        data: a whole PNG, JPEG, WebP, GIF (its first frame), WAV, FLAC, OGG, MP3, MP4 or WebM file.
        budget: limits, checked before decoding and during it; ``MediaBudget()`` by default.
        expect: the only modality wanted. With ``Modality.AUDIO`` the sound track of a video is read.

    Returns:
        :class:`Image`, :class:`Audio` or :class:`Video`. Transparent pictures are laid on white,
        EXIF and video rotation are applied, channels are averaged to mono at the file's own rate.
        An MP4 or WebM without pictures is an :class:`Audio`.

    Raises:
        MediaError: see its codes.

    """
    budget = budget or MediaBudget()
    if not data:
        raise MediaError("invalid_media", f"The file is empty (0 bytes). Send a {READABLE} file.")
    if len(data) > budget.max_bytes:
        raise MediaError(
            "media_limit_exceeded",
            f"The file has {len(data):,} bytes; at most {budget.max_bytes:,} are read. Send a smaller one.",
        )
    name = recognise(data)
    if name in IMAGE_FORMATS:
        _refuse_unexpected(Modality.IMAGE, name, expect)
        return _read_image(data, name, budget)
    if name in SOUND_FORMATS:
        _refuse_unexpected(Modality.AUDIO, name, expect)
        return _read_sound(data, name, budget)
    if name in CONTAINER_FORMATS:
        return _read_container(data, name, budget, expect)
    if name is not None:
        raise MediaError(
            "unsupported_media", f"A file of the kind {name.upper()} is not read here. Send {READABLE}."
        )
    if len(data) < 12:
        raise MediaError(
            "invalid_media",
            f"The file has only {len(data)} byte(s), too few for any medium. Send a whole {READABLE} file.",
        )
    raise MediaError(
        "unsupported_media",
        f"The content of this file ({_first_bytes(data)}) is no known medium, whatever its name says. "
        f"Send {READABLE}.",
    )


def resample(samples: NDArray[np.float32], rate_from: int, rate_to: int) -> NDArray[np.float32]:
    """Change the sample rate of a mono sound.

    The polyphase filter passes 92 % of the band that both rates can hold and takes what lies beyond
    it down by more than 80 dB.

    Args:
        samples: ``(T,)`` float32.
        rate_from: samples per second of the input.
        rate_to: samples per second of the result.

    Returns:
        ``(ceil(T * rate_to / rate_from),)`` float32. It can overshoot [-1, 1] by a little.

    Raises:
        ValueError: a rate below 1, or samples that are not one-dimensional.

    """
    if min(rate_from, rate_to) < 1:
        raise ValueError(f"rates are {rate_from} and {rate_to}; both must be at least 1 per second.")
    if samples.ndim != 1:
        raise ValueError(f"samples have shape {samples.shape}; expected (T,). Mix channels down first.")
    if rate_from == rate_to or not len(samples):
        return samples
    ratio = Fraction(rate_to, rate_from)
    close = ratio.limit_denominator(2_000) or ratio  # off by less than one sample in a million
    resampled = resample_poly(
        samples, close.numerator, close.denominator, window=_low_pass(close.numerator, close.denominator)
    )
    length = math.ceil(len(samples) * ratio)
    fitted = np.zeros(length, dtype=np.float32)
    fitted[: min(length, len(resampled))] = resampled[:length]
    return fitted


@lru_cache(maxsize=16)
def _low_pass(up: int, down: int) -> NDArray[np.float32]:
    widest = max(up, down)
    taps = firwin(2 * 64 * widest + 1, 0.96 / widest, window=("kaiser", 8.6))
    return np.asarray(taps, dtype=np.float32)


def _read_image(data: bytes, name: str, budget: MediaBudget) -> Image:
    size = image_size(data, name)
    if size is None:
        raise MediaError("invalid_media", _damaged(data, name, "its header has no picture size"))
    _check_pixels(size, name, budget)
    try:
        with PIL.Image.open(io.BytesIO(data), formats=(name,)) as picture:
            _check_pixels(picture.size, name, budget)
            picture.load()
            upright = ImageOps.exif_transpose(picture)
    except MediaError:
        raise
    except (
        OSError,
        ValueError,
        SyntaxError,
        IndexError,
        TypeError,
        KeyError,
        EOFError,
        struct.error,
    ) as error:
        raise MediaError("invalid_media", _damaged(data, name, _reason(error))) from error
    except PIL.Image.DecompressionBombError as error:
        raise MediaError("media_limit_exceeded", _damaged(data, name, str(error))) from error
    return Image(_rgb(upright))


def _rgb(picture: PIL.Image.Image) -> NDArray[np.uint8]:
    if picture.mode.startswith("I"):  # 16 bit grey, which Pillow would clip instead of scale
        grey = np.asarray(picture).astype(np.float64) / 257.0
        return np.repeat(np.clip(np.rint(grey), 0, 255).astype(np.uint8)[..., None], 3, axis=2)
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        white = PIL.Image.new("RGBA", layer.size, (255, 255, 255, 255))
        picture = PIL.Image.alpha_composite(white, layer)
    return np.asarray(picture.convert("RGB"))


def _read_sound(data: bytes, name: str, budget: MediaBudget) -> Audio:
    if name == "wav":
        header = wav_header(data)
        if header is None:
            raise MediaError("invalid_media", _damaged(data, name, "it has no format or no samples"))
        _check_seconds(header.seconds, name, budget)
        if header.present_bytes < header.claimed_bytes:
            lacking = header.claimed_bytes - header.present_bytes
            raise MediaError(
                "invalid_media", _damaged(data, name, f"it is cut off, {lacking:,} bytes of samples lack")
            )
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as sound:
            rate, channels, claimed = sound.samplerate, sound.channels, sound.frames
            _check_layout(rate, channels, name)
            limit = int(budget.max_seconds * rate)
            if claimed < 2**62:  # libsndfile's word for "unknown" is the largest integer
                _check_seconds(claimed / rate, name, budget)
            blocks, total = [], 0
            # Not sound.blocks(): where a file ends early, that hands out memory which nobody has written to.
            while len(block := sound.read(2**16, dtype="float32", always_2d=True)):
                blocks.append(block.mean(axis=1, dtype=np.float32))
                total += len(block)
                _check_seconds(total / rate if total > limit else 0.0, name, budget)
    except MediaError:
        raise
    except (soundfile.SoundFileError, ValueError, OSError) as error:
        raise MediaError("invalid_media", _damaged(data, name, _reason(error))) from error
    if name == "flac" and 0 < claimed < 2**62 and total < claimed:
        raise MediaError(
            "invalid_media", _damaged(data, name, f"it is cut off after {total:,} of {claimed:,} samples")
        )
    return _audio(blocks, rate, data, name)


def _read_container(data: bytes, name: str, budget: MediaBudget, expect: Modality | None) -> Audio | Video:
    if expect not in (None, Modality.AUDIO, Modality.VIDEO):
        _refuse_unexpected(Modality.VIDEO, name, expect)
    demuxer = {"mp4": "mov", "webm": "matroska"}[name]
    lacking = missing_bytes(data, name)
    if lacking:
        raise MediaError("invalid_media", _damaged(data, name, f"it is cut off, {lacking:,} bytes lack"))
    try:
        with av.open(io.BytesIO(data), mode="r", format=demuxer, metadata_errors="replace") as container:
            seconds = container.duration / av.time_base if container.duration else 0.0
            _check_seconds(seconds, name, budget)
            known = [s for s in container.streams if s.codec_context is not None and not _is_cover(s)]
            pictures = [s for s in known if s.type == "video"]
            sounds = [s for s in known if s.type == "audio"]
            if pictures and expect is not Modality.AUDIO:
                return _decode_video(container, pictures[0], data, name, budget)
            if sounds and expect is not Modality.VIDEO:
                return _decode_sound_track(container, sounds[0], data, name, budget)
    except MediaError:
        raise
    except (av.FFmpegError, ValueError, OverflowError) as error:
        raise MediaError("invalid_media", _damaged(data, name, _reason(error))) from error
    wanted = {None: "pictures or sound", Modality.AUDIO: "sound", Modality.VIDEO: "pictures"}[expect]
    code: ErrorCode = "unsupported_media" if pictures or sounds else "invalid_media"
    raise MediaError(
        code, f"This {name.upper()} file has no {wanted} that can be decoded. Send one that has."
    )


def _is_cover(stream: Any) -> bool:
    """Whether a stream is only the cover picture of a sound file."""
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _decode_video(container: Any, stream: Any, data: bytes, name: str, budget: MediaBudget) -> Video:
    width, height = stream.codec_context.width, stream.codec_context.height
    if min(width, height) < 1:
        raise MediaError("invalid_media", _damaged(data, name, "its header has no frame size"))
    _check_pixels((width, height), name, budget)
    _check_frames(stream.frames, (width, height), name, budget)
    shrink = min(1.0, budget.video_short_side_px / min(width, height))
    size = {"width": max(1, round(width * shrink)), "height": max(1, round(height * shrink))}
    room = max(1, budget.max_kept_pixels // (size["width"] * size["height"]))

    kept: list[NDArray[np.uint8]] = []
    every, count, times = 1, 0, []
    stream.thread_type = "AUTO"
    for frame in container.decode(stream):
        _check_frames(count + 1, (frame.width, frame.height), name, budget)
        _check_pixels((frame.width, frame.height), name, budget)
        if frame.pts is not None:
            times.append(frame.pts * frame.time_base)
            _check_seconds(float(times[-1] - times[0]), name, budget)
        if count % every == 0:
            pixels = frame.reformat(**size, format="rgb24").to_ndarray()
            kept.append(np.rot90(pixels, k=frame.rotation // 90, axes=(0, 1)))
            if len(kept) > room:
                kept, every = kept[::2], every * 2
        count += 1
    if not kept:
        raise MediaError("invalid_media", _damaged(data, name, "it holds no video frame"))
    return Video(np.stack(kept), fps=_frame_rate(stream, times, count) / every)


def _frame_rate(stream: Any, times: list[Fraction], count: int) -> float:
    if len(times) == count > 1 and times[-1] > times[0]:
        return float((count - 1) / (times[-1] - times[0]))
    return float(stream.average_rate or 1)


def _decode_sound_track(container: Any, stream: Any, data: bytes, name: str, budget: MediaBudget) -> Audio:
    rate = stream.codec_context.sample_rate
    _check_layout(rate, stream.codec_context.channels, name)
    to_float = av.AudioResampler(format="fltp", rate=rate)
    blocks, total = [], 0
    for frame in _then_flush(container.decode(stream)):
        for part in to_float.resample(frame):
            block = part.to_ndarray().mean(axis=0, dtype=np.float32)
            blocks.append(block)
            total += len(block)
            _check_seconds(total / rate, name, budget)
    return _audio(blocks, rate, data, name)


def _then_flush(frames: Iterator[Any]) -> Iterator[Any]:
    yield from frames
    yield None


def _audio(blocks: list[NDArray[np.float32]], rate: int, data: bytes, name: str) -> Audio:
    samples = np.concatenate(blocks) if blocks else np.zeros(0, dtype=np.float32)
    if not len(samples):
        raise MediaError("invalid_media", _damaged(data, name, "it holds no samples"))
    if not np.isfinite(samples).all():
        raise MediaError("invalid_media", _damaged(data, name, "some samples are infinite or not a number"))
    return Audio(np.clip(samples, -1.0, 1.0), rate)


def _check_pixels(size: tuple[int, int], name: str, budget: MediaBudget) -> None:
    width, height = size
    if max(size) > MAX_SIDE_PX:
        raise MediaError(
            "media_limit_exceeded",
            f"This {name.upper()} is {width:,} x {height:,} pixels; sides of at most {MAX_SIDE_PX:,} pixels "
            "are read. Scale it down first, or cut it.",
        )
    if width * height > budget.max_pixels:
        raise MediaError(
            "media_limit_exceeded",
            f"This {name.upper()} is {width:,} x {height:,} pixels; at most {budget.max_pixels:,} pixels "
            "are read. Scale it down first.",
        )


def _check_seconds(seconds: float, name: str, budget: MediaBudget) -> None:
    if seconds > budget.max_seconds:
        raise MediaError(
            "media_limit_exceeded",
            f"This {name.upper()} is {seconds:,.1f} s long; at most {budget.max_seconds:,.0f} s are read. "
            "Cut out the part that matters.",
        )


def _check_frames(frames: int, size: tuple[int, int], name: str, budget: MediaBudget) -> None:
    most = min(budget.max_frames, budget.max_video_pixels // (size[0] * size[1]))
    if frames > most:
        raise MediaError(
            "media_limit_exceeded",
            f"This {name.upper()} has {frames:,} frames or more of {size[0]:,} x {size[1]:,} pixels; at most "
            f"{most:,} are read. Cut it, or lower its frame rate or size.",
        )


def _check_layout(rate: int, channels: int, name: str) -> None:
    lowest, highest = RATES_HZ
    if not (lowest <= rate <= highest and 1 <= channels <= MAX_CHANNELS):
        raise MediaError(
            "unsupported_media",
            f"This {name.upper()} has {channels} channels at {rate:,} Hz; read are 1 to {MAX_CHANNELS} "
            f"channels at {lowest:,} to {highest:,} Hz. Convert it to 48,000 Hz mono or stereo.",
        )


def _refuse_unexpected(found: Modality, name: str, expect: Modality | None) -> None:
    if expect is not None and expect is not found:
        raise MediaError(
            "unsupported_media",
            f"This {name.upper()} file is of modality {found.value}; expected {expect.value}. "
            f"Send it as {found.value}, or send another file.",
        )


def _damaged(data: bytes, name: str, reason: str) -> str:
    return (
        f"This {name.upper()} file ({len(data):,} bytes) is damaged: {reason}. Check that it opens in "
        "another program, and send it whole."
    )


def _reason(error: Exception) -> str:
    """Return what a library says, without its error numbers and without the address of a file in memory."""
    said = getattr(error, "strerror", None) or getattr(error, "error_string", None) or str(error)
    return re.sub(r" ?<_io\.BytesIO[^>]*>", "", said).rstrip(".") or type(error).__name__


def _first_bytes(data: bytes) -> str:
    head = data[:16]
    if all(32 <= byte < 127 for byte in head):
        return f"it begins with the text {head.decode()!r}"
    return f"it begins with the bytes {head.hex(' ')}"


def _described(array: NDArray[Any]) -> str:
    return f"{array.dtype} of shape {array.shape}"
