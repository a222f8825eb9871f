"""Facts read from the first bytes of media files, without decoding anything.

Nothing here allocates in proportion to what a header claims, so these functions are safe on
hostile input. They return None where a header is not there or makes no sense.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

_UNKNOWN_WAV_SIZES = (0, 0xFFFFFFFF)  # what programs write that stream to a pipe
_MP4_BOXES = frozenset(b"ftyp styp pdin moov moof mfra mdat free skip wide meta udta uuid sidx emsg".split())
_JPEG_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_BARE_MARKERS = frozenset({0x01, *range(0xD0, 0xD9)})


def recognise(data: bytes) -> str | None:
    """Name the file format by its first bytes, or None.

    Names: ``png jpeg webp gif wav flac ogg mp3 mp4 webm``, and for some formats that are not
    read, so that an error can name them: ``bmp tiff avif heic pdf avi zip svg``.
    """
    if data[:4] in (b"RIFF", b"RF64"):
        return {b"WAVE": "wav", b"WEBP": "webp", b"AVI ": "avi"}.get(data[8:12])
    if data[4:8] == b"ftyp":
        brand = data[8:12]
        if brand in (b"avif", b"avis"):
            return "avif"
        if brand in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
            return "heic"
        return "mp4"
    for magic, name in (
        (b"\x89PNG\r\n\x1a\n", "png"),
        (b"\xff\xd8\xff", "jpeg"),
        (b"GIF87a", "gif"),
        (b"GIF89a", "gif"),
        (b"fLaC", "flac"),
        (b"OggS", "ogg"),
        (b"ID3", "mp3"),
        (b"\x1a\x45\xdf\xa3", "webm"),
        (b"II*\0", "tiff"),
        (b"MM\0*", "tiff"),
        (b"%PDF", "pdf"),
        (b"PK\x03\x04", "zip"),
        (b"<svg", "svg"),
    ):
        if data.startswith(magic):
            return name
    if data[:2] == b"BM" and data[6:10] == b"\0\0\0\0":
        return "bmp"
    return "mp3" if _is_mpeg_audio_frame(data) else None


def _is_mpeg_audio_frame(data: bytes) -> bool:
    if len(data) < 4 or data[0] != 0xFF or data[1] & 0xE0 != 0xE0:
        return False
    version, layer = data[1] >> 3 & 3, data[1] >> 1 & 3
    bit_rate, sample_rate = data[2] >> 4, data[2] >> 2 & 3
    return version != 1 and layer == 1 and bit_rate not in (0, 15) and sample_rate != 3


def image_size(data: bytes, name: str) -> tuple[int, int] | None:
    """Return ``(width_px, height_px)`` that the header of a png, jpeg, gif or webp claims."""
    try:
        if name == "png":
            width, height = struct.unpack_from(">II", data, 16)
        elif name == "gif":
            width, height = struct.unpack_from("<HH", data, 6)
        elif name == "jpeg":
            width, height = _jpeg_size(data)
        else:
            width, height = _webp_size(data)
    except (struct.error, IndexError):
        return None
    return (width, height) if width > 0 and height > 0 else None


def _jpeg_size(data: bytes) -> tuple[int, int]:
    at = 2
    while True:
        if data[at] != 0xFF:
            return (0, 0)
        marker = data[at + 1]
        if marker == 0xFF:  # padding before a marker
            at += 1
        elif marker in _JPEG_BARE_MARKERS:
            at += 2
        elif marker in _JPEG_FRAME_MARKERS:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return (width, height)
        else:
            (length,) = struct.unpack_from(">H", data, at + 2)
            at += 2 + max(length, 2)


def _webp_size(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X":
        width = int.from_bytes(data[24:27], "little") + 1
        height = int.from_bytes(data[27:30], "little") + 1
        return (width, height) if len(data) >= 30 else (0, 0)
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return ((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return (width & 0x3FFF, height & 0x3FFF)
    return (0, 0)


@dataclass(frozen=True, slots=True)
class WavHeader:
    """What a WAV header claims: ``claimed_bytes`` of samples, and how many of them are there."""

    rate_hz: int
    channels: int
    bytes_per_second: int
    claimed_bytes: int
    present_bytes: int

    @property
    def seconds(self) -> float:
        """Length that the header claims."""
        return self.claimed_bytes / self.bytes_per_second


def wav_header(data: bytes) -> WavHeader | None:
    """Walk the chunks of a WAV file up to its samples; None when it has no format or no samples."""
    at, layout, long_size = 12, None, None
    while at + 8 <= len(data):
        name, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8
        if name == b"fmt " and at + 16 <= len(data):
            _, channels, rate, byte_rate, block = struct.unpack_from("<HHIIH", data, at)
            layout = (rate, channels, byte_rate or rate * block)
        elif name == b"ds64" and at + 16 <= len(data):
            long_size = int.from_bytes(data[at + 8 : at + 16], "little")
        elif name == b"data":
            present = len(data) - at
            if long_size is not None and size == 0xFFFFFFFF:
                size = long_size
            elif size in _UNKNOWN_WAV_SIZES:
                size = present
            if layout is None or min(layout) < 1:
                return None
            return WavHeader(*layout, claimed_bytes=size, present_bytes=min(present, size))
        at += size + size % 2
    return None


def missing_bytes(data: bytes, name: str) -> int:
    """Count the bytes that an mp4 or webm file says it has and does not have; 0 when none or unknown."""
    return _missing_mp4_bytes(data) if name == "mp4" else _missing_webm_bytes(data)


def _missing_mp4_bytes(data: bytes) -> int:
    at = 0
    while at < len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if kind not in _MP4_BOXES:  # padding, or what some program appended
            return 0
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        if size == 0:  # this box reaches to the end of the file
            return 0
        at += max(size, 8)
    return at - len(data)


def _missing_webm_bytes(data: bytes) -> int:
    at = 0
    while at < len(data):
        head = _ebml_element(data, at)
        if head is None or head[1] is None:  # unknown size: written by a live recorder
            return 0
        at = head[0] + head[1]
    return at - len(data)


def _ebml_element(data: bytes, at: int) -> tuple[int, int | None] | None:
    """Return where the content of the element at ``at`` starts, and its size (None: unknown)."""
    if data[at] == 0:
        return None
    at += 9 - data[at].bit_length()
    if at >= len(data) or data[at] == 0:
        return None
    width = 9 - data[at].bit_length()
    value = int.from_bytes(data[at : at + width], "big") & ((1 << 7 * width) - 1)
    unknown = value == (1 << 7 * width) - 1
    return at + width, None if unknown else value
