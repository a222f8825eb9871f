import io
import struct
import wave
from typing import Any

import av
import numpy as np
import PIL.Image
import pytest
import soundfile

from decoders.writing import read_manifest, to_mp4, to_png, to_wav
from encoders.media import Audio, Image, Video, read_media

MANIFEST: dict[str, Any] = {
    "preset": "toybox",
    "seed": 2**53 - 1,
    "guidance_scale": 3.5,
    "caption": 'ein großer Bär; "quoted" = \\ \n [IMG0] 熊',
    "nested": {"list": [1, None, True]},
}
RANDOM = np.random.default_rng(0)


def picture(height: int = 64, width: int = 64) -> Image:
    return Image(RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8))


def clip(frames: int = 8, height: int = 64, width: int = 64, fps: float = 8.0) -> Video:
    """A bright disc that moves over a smooth ground."""
    y, x = np.mgrid[:height, :width]
    stack = np.zeros((frames, height, width, 3), np.uint8)
    for i in range(frames):
        disc = (x - 8 - i * 5) ** 2 + (y - 30) ** 2 < 100
        stack[i] = np.where(disc[..., None], [230, 40, 40], [120, 160, 200])
    return Video(stack, fps)


def tone(rate: int = 16000) -> Audio:
    return Audio((0.5 * np.sin(np.arange(40960) * 0.1)).astype(np.float32), rate)


def written(kind: str) -> bytes:
    if kind == "png":
        return to_png(picture(), MANIFEST)
    return to_mp4(clip(), MANIFEST) if kind == "mp4" else to_wav(tone(), MANIFEST)


@pytest.mark.parametrize("kind", ["png", "mp4", "wav"])
def test_the_manifest_comes_back_exactly(kind: str) -> None:
    assert read_manifest(written(kind)) == MANIFEST


@pytest.mark.parametrize("kind", ["png", "mp4", "wav"])
def test_the_same_medium_and_manifest_give_the_same_bytes(kind: str) -> None:
    medium: Any = {"png": picture(), "mp4": clip(), "wav": tone()}[kind]
    write: Any = {"png": to_png, "mp4": to_mp4, "wav": to_wav}[kind]

    assert write(medium, MANIFEST) == write(medium, MANIFEST)


def test_png_keeps_every_pixel() -> None:
    image = picture(33, 17)

    data = to_png(image, MANIFEST)

    np.testing.assert_array_equal(np.asarray(PIL.Image.open(io.BytesIO(data))), image.pixels)
    np.testing.assert_array_equal(read_media(data).pixels, image.pixels)


def test_mp4_is_h264_that_browsers_play_with_its_index_first() -> None:
    data = to_mp4(clip(), MANIFEST)

    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.codec_context.colorspace == 6
        assert stream.average_rate == 8
        assert stream.frames == 8
    assert 0 < data.find(b"moov") < data.find(b"mdat")


def test_mp4_keeps_the_frames_nearly_as_they_are() -> None:
    video = clip()

    back = read_media(to_mp4(video, MANIFEST))

    assert back.frames.shape == video.frames.shape
    assert back.fps == 8.0
    difference = np.abs(back.frames.astype(int) - video.frames)
    assert difference.mean() < 4
    assert np.abs(np.median(back.frames[:, :10], axis=(1, 2)) - [120, 160, 200]).max() <= 4


@pytest.mark.parametrize(("frames", "fps"), [(1, 8.0), (3, 29.97), (25, 24.0), (5, 0.5)])
def test_mp4_keeps_count_and_rate(frames: int, fps: float) -> None:
    back = read_media(to_mp4(clip(frames, fps=fps), MANIFEST))

    assert len(back.frames) == frames
    assert back.fps == pytest.approx(fps, rel=1e-3)


def test_mp4_of_odd_size_gets_its_last_row_and_column_twice() -> None:
    back = read_media(to_mp4(clip(2, 33, 31), MANIFEST))

    assert back.frames.shape == (2, 34, 32, 3)


def test_wav_is_read_by_common_readers_with_every_sample() -> None:
    audio = tone()

    data = to_wav(audio, MANIFEST)

    samples, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    assert rate == 16000
    np.testing.assert_allclose(samples, audio.samples, atol=1e-4)
    with wave.open(io.BytesIO(data)) as reader:
        assert (reader.getnchannels(), reader.getsampwidth(), reader.getnframes()) == (1, 2, 40960)
    np.testing.assert_allclose(read_media(data).samples, audio.samples, atol=1e-4)


def test_wav_declares_its_true_size() -> None:
    data = to_wav(tone(), {"odd": "x"})

    assert struct.unpack("<I", data[4:8])[0] == len(data) - 8


def test_wav_clips_instead_of_wrapping() -> None:
    data = to_wav(Audio(np.array([2.0, -2.0, 0.0], np.float32), 16000), MANIFEST)

    samples, _ = soundfile.read(io.BytesIO(data), dtype="int16")
    assert samples.tolist() == [32767, -32767, 0]


@pytest.mark.parametrize("kind", ["png", "mp4", "wav"])
def test_damaged_files_have_no_manifest_and_no_crash(kind: str) -> None:
    data = written(kind)

    for end in (0, 1, 8, 12, 20, 30, len(data) // 2):
        assert read_manifest(data[:end]) in (None, MANIFEST)
    assert read_manifest(bytes(data[:12]) + b"\xff" * 200) is None


def test_files_of_other_programs_have_no_manifest() -> None:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (4, 4)).save(buffer, "PNG")
    assert read_manifest(buffer.getvalue()) is None
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(100), 8000, format="WAV")
    assert read_manifest(buffer.getvalue()) is None
    assert read_manifest(b"GIF89a and so on") is None


def test_a_foreign_comment_is_no_manifest() -> None:
    assert read_manifest(to_wav(tone(), MANIFEST).replace(b'{"preset"', b'!"preset" ', 1)) is None


def test_a_manifest_that_json_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        to_png(picture(), {"guidance_scale": float("nan")})
