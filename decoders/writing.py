"""Media values to the bytes of a file, with the manifest inside, and the manifest back out again.

The manifest is JSON in plain ASCII: a ``tEXt`` chunk of a PNG, the comment tag of an MP4, the ICMT
entry of a WAV's INFO list. Players and editors that know nothing of it ignore it.
"""

import io
import json
import struct
import tempfile
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
from PIL.PngImagePlugin import PngInfo

from encoders.media import Audio, Image, Video

MANIFEST_KEY = "patchbay"
PREVIEW_QUALITY = 85
SMALL_VIDEO_PX = 256
BT601 = 6
"""What ITU-T H.273 calls SMPTE 170M: the colour matrix that swscale converts with."""

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def to_png(image: Image, manifest: Mapping[str, Any]) -> bytes:
    """Return a PNG with the same pixels as ``image`` and with ``manifest`` in a text chunk."""
    text = PngInfo()
    text.add_text(MANIFEST_KEY, _to_json(manifest))
    buffer = io.BytesIO()
    PIL.Image.fromarray(image.pixels).save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()


def to_jpeg(image: Image) -> bytes:
    """Return a small JPEG that looks like ``image``: for previews, without a manifest."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(image.pixels).save(buffer, "JPEG", quality=PREVIEW_QUALITY)
    return buffer.getvalue()


def to_mp4(video: Video, manifest: Mapping[str, Any]) -> bytes:
    """Return an MP4 that every browser plays: H.264, yuv420p, index first, manifest as the comment.

    A side of odd length gets its last row or column twice, because yuv420p has no odd sides. Small
    videos are stored nearly without loss (CRF 12), others at CRF 18. The same video gives the same
    bytes on one machine.
    """
    pad = [(0, 0), (0, video.frames.shape[1] % 2), (0, video.frames.shape[2] % 2), (0, 0)]
    frames = np.pad(video.frames, pad, mode="edge")  # (F, H, W, 3), H and W even
    height, width = frames.shape[1:3]
    crf = "12" if max(height, width) <= SMALL_VIDEO_PX else "18"
    with tempfile.TemporaryDirectory(prefix="patchbay-") as folder:
        path = Path(folder) / "video.mp4"  # libavformat moves the index by reopening the file
        with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            container.metadata["comment"] = _to_json(manifest)
            rate = Fraction(video.fps).limit_denominator(1001)
            stream: Any = container.add_stream("libx264", rate=rate)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            codec = stream.codec_context
            codec.color_primaries = codec.color_trc = codec.colorspace = BT601
            stream.options = {"crf": crf, "preset": "medium", "threads": "1"}
            for frame in frames:
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
        return path.read_bytes()


def to_wav(audio: Audio, manifest: Mapping[str, Any]) -> bytes:
    """Return a mono 16-bit PCM WAV; ``manifest`` follows the samples, where no reader trips over it.

    Samples outside [-1, 1] are clipped.
    """
    pcm = np.round(np.clip(audio.samples, -1.0, 1.0) * 32767.0).astype("<i2").tobytes()
    layout = struct.pack("<HHIIHH", 1, 1, audio.rate, 2 * audio.rate, 2, 16)
    comment = _to_json(manifest).encode("ascii") + b"\0"
    body = _riff(b"fmt ", layout) + _riff(b"data", pcm) + _riff(b"LIST", b"INFO" + _riff(b"ICMT", comment))
    return _riff(b"RIFF", b"WAVE" + body)


def read_manifest(data: bytes) -> dict[str, Any] | None:
    """Return the manifest inside a PNG, MP4 or WAV file, or None when there is none.

    Pixels and samples are not decoded. Damaged files and foreign comments give None.
    """
    if data.startswith(_PNG_MAGIC):
        text = _png_text(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        text = _wav_comment(data)
    elif data[4:8] == b"ftyp":
        text = _mp4_comment(data)
    else:
        return None
    if text is None:
        return None
    try:
        manifest = json.loads(text)
    except ValueError:
        return None
    return manifest if isinstance(manifest, dict) else None


def _to_json(manifest: Mapping[str, Any]) -> str:
    return json.dumps(dict(manifest), ensure_ascii=True, allow_nan=False)


def _png_text(data: bytes) -> str | None:
    """Walk the chunks up to the pixels; return the text under our key."""
    at = len(_PNG_MAGIC)
    while at + 8 <= len(data):
        (size,) = struct.unpack_from(">I", data, at)
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        key, _, text = body.partition(b"\0")
        if kind == b"tEXt" and key == MANIFEST_KEY.encode():
            return text.decode("latin-1")
        if kind in (b"IDAT", b"IEND"):
            return None
        at += size + 12
    return None


def _riff(name: bytes, body: bytes) -> bytes:
    """Return one RIFF chunk, padded to an even length."""
    return name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


def _riff_chunks(data: bytes, at: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield (name, body) of the chunks from offset ``at`` on."""
    while at + 8 <= len(data):
        (size,) = struct.unpack_from("<I", data, at + 4)
        yield data[at : at + 4], data[at + 8 : at + 8 + size]
        at += 8 + size + size % 2


def _wav_comment(data: bytes) -> str | None:
    for name, body in _riff_chunks(data, 12):
        if name == b"LIST" and body[:4] == b"INFO":
            for key, value in _riff_chunks(body, 4):
                if key == b"ICMT":
                    return value.rstrip(b"\0").decode("utf-8", "replace")
    return None


def _mp4_comment(data: bytes) -> str | None:
    try:
        with av.open(io.BytesIO(data)) as container:
            return container.metadata.get("comment")
    except av.error.FFmpegError:
        return None
