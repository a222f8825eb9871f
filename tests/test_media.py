import io
import math
import re
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
import soundfile

from encoders.media import Audio, Image, MediaBudget, MediaError, Modality, Video, read_media, resample


def picture(width: int = 20, height: int = 10) -> PIL.Image.Image:
    """Red, with a blue left quarter, so that turns and mirrors show."""
    made = PIL.Image.new("RGB", (width, height), (250, 10, 10))
    made.paste((10, 10, 250), (0, 0, width // 4, height))
    return made


def saved(made: PIL.Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    made.save(file, kind, **options)
    return file.getvalue()


def sound(samples: np.ndarray, rate: int = 16_000, kind: str = "WAV", subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


def tone(seconds: float = 0.5, rate: int = 16_000, hz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def movie(
    frames: int = 8,
    *,
    kind: str = "mp4",
    size: tuple[int, int] = (64, 48),
    audio: bool = False,
    video: bool = True,
    fps: int = 8,
    left_half: int | None = None,
) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        if video:
            pictures = container.add_stream("libx264" if kind == "mp4" else "libvpx", rate=fps)
            pictures.width, pictures.height, pictures.pix_fmt = *size, "yuv420p"
        if audio:
            track = container.add_stream("aac" if kind == "mp4" else "libopus", rate=48_000, layout="stereo")
        for i in range(frames if video else 0):
            level = np.full((size[1], size[0], 3), 30 * (i % 8), np.uint8)
            if left_half is not None:
                level[:, : size[0] // 2] = left_half
            frame = av.VideoFrame.from_ndarray(level, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, fps)
            container.mux(pictures.encode(frame))
        if video:
            container.mux(pictures.encode())
        if audio:
            wave = np.stack([tone(1.0, 48_000)] * 2)
            frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="stereo")
            frame.sample_rate, frame.pts, frame.time_base = 48_000, 0, Fraction(1, 48_000)
            fifo = av.AudioFifo()
            fifo.write(frame)
            for part in fifo.read_many(960):
                container.mux(track.encode(part))
            container.mux(track.encode())
    return file.getvalue()


def code_of(data: bytes, budget: MediaBudget | None = None, expect: Modality | None = None) -> str:
    with pytest.raises(MediaError) as caught:
        read_media(data, budget, expect)
    return caught.value.code


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG", "GIF"])
def test_pictures_keep_their_size_and_colours(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    image = read_media(saved(picture(), kind, **options))
    assert isinstance(image, Image)
    assert image.pixels.shape == (10, 20, 3)
    assert np.abs(image.pixels[5, 15].astype(int) - (250, 10, 10)).max() <= 10
    assert np.abs(image.pixels[5, 1].astype(int) - (10, 10, 250)).max() <= 10


def test_lossy_and_lossless_and_extended_webp_headers_are_understood() -> None:
    for options in ({"quality": 80}, {"lossless": True}, {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"}):
        image = read_media(saved(picture(30, 16), "WEBP", **options))
        assert isinstance(image, Image)
        assert image.pixels.shape == (16, 30, 3)


def test_exif_orientation_is_applied() -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it turned by 90 degrees clockwise
    image = read_media(saved(picture(), "PNG", exif=exif))
    assert isinstance(image, Image)
    assert image.pixels.shape == (20, 10, 3)
    assert tuple(image.pixels[1, 5]) == (10, 10, 250)
    assert tuple(image.pixels[15, 5]) == (250, 10, 10)


def test_transparency_becomes_white_and_sixteen_bits_become_eight() -> None:
    clear = PIL.Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image = read_media(saved(clear, "PNG"))
    assert isinstance(image, Image)
    assert (image.pixels == 255).all()

    deep = PIL.Image.fromarray(np.full((4, 4), 128 * 257, np.uint16))
    image = read_media(saved(deep, "PNG"))
    assert isinstance(image, Image)
    assert (image.pixels == 128).all()


def test_first_frame_of_a_gif_is_read() -> None:
    first, second = picture().convert("P"), PIL.Image.new("RGB", (20, 10), (0, 255, 0)).convert("P")
    image = read_media(saved(first, "GIF", save_all=True, append_images=[second]))
    assert isinstance(image, Image)
    assert tuple(image.pixels[5, 1]) != (0, 255, 0)


def png_claiming(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk


def test_huge_pictures_are_refused_from_the_header() -> None:
    with pytest.raises(MediaError, match=r"30,000 x 30,000 pixels; at most 40,000,000") as caught:
        read_media(png_claiming(30_000, 30_000))
    assert caught.value.code == "media_limit_exceeded"
    assert code_of(b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + b"\0" * 20) == "media_limit_exceeded"
    webp = b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + (16_382).to_bytes(3, "little") * 2
    assert code_of(webp) == "media_limit_exceeded"
    jpeg = saved(picture(), "JPEG")
    at = jpeg.index(b"\xff\xc0") + 5
    assert code_of(jpeg[:at] + b"\xff\xff\xff\xff" + jpeg[at + 4 :]) == "media_limit_exceeded"


def test_endless_strips_are_refused_from_the_header() -> None:
    for size in ((1, 65_536), (65_536, 1)):
        with pytest.raises(MediaError, match=r"sides of at most 65,535 pixels are read") as caught:
            read_media(png_claiming(*size))
        assert caught.value.code == "media_limit_exceeded"
    assert code_of(png_claiming(65_535, 1)) == "invalid_media"  # nothing behind its header


def test_budget_on_pixels_is_exact() -> None:
    data = saved(picture(20, 10), "PNG")
    assert read_media(data, MediaBudget(max_pixels=200)).modality is Modality.IMAGE
    assert code_of(data, MediaBudget(max_pixels=199)) == "media_limit_exceeded"


def test_budget_beyond_pillows_own_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="Pillow refuses"):
        MediaBudget(max_pixels=10**9)
    with pytest.raises(ValueError, match="max_seconds is 0"):
        MediaBudget(max_seconds=0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_cut_pictures_are_invalid(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = saved(PIL.Image.fromarray(noise), kind)
    assert code_of(data[: len(data) // 2]) == "invalid_media"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "WAV", "FLAC", "OGG", "mp4", "webm"])
def test_no_prefix_of_a_file_raises_anything_else(kind: str) -> None:
    if kind in ("mp4", "webm"):
        data = movie(3, kind=kind)
    elif kind in ("WAV", "FLAC", "OGG"):
        data = sound(tone(0.1), kind=kind)
    else:
        data = saved(picture(), kind)
    for length in [*range(min(80, len(data))), *range(80, len(data), max(1, len(data) // 25))]:
        try:
            read_media(data[:length])
        except MediaError as error:
            assert error.code in ("invalid_media", "unsupported_media")  # noqa: PT017


def test_empty_and_tiny_and_foreign_files_say_what_they_are() -> None:
    with pytest.raises(MediaError, match=r"empty \(0 bytes\)"):
        read_media(b"")
    with pytest.raises(MediaError, match=r"only 1 byte"):
        read_media(b"\x89")
    assert code_of(b"\x89") == "invalid_media"
    with pytest.raises(MediaError, match="begins with the text 'This is a text f'"):
        read_media(b"This is a text file, renamed to film.mp4")
    assert code_of(b"This is a text file, renamed to film.mp4") == "unsupported_media"
    with pytest.raises(MediaError, match="A file of the kind PDF is not read here"):
        read_media(b"%PDF-1.7 and more")


def test_too_many_bytes_are_refused() -> None:
    assert code_of(saved(picture(), "PNG"), MediaBudget(max_bytes=50)) == "media_limit_exceeded"


def test_other_modality_than_expected_is_refused() -> None:
    with pytest.raises(MediaError, match="PNG file is of modality image; expected audio"):
        read_media(saved(picture(), "PNG"), expect=Modality.AUDIO)
    assert code_of(sound(tone()), expect=Modality.VIDEO) == "unsupported_media"
    assert code_of(movie(), expect=Modality.IMAGE) == "unsupported_media"
    assert code_of(movie(), expect=Modality.AUDIO) == "unsupported_media"


@pytest.mark.parametrize(("kind", "tolerance"), [("WAV", 1e-4), ("FLAC", 1e-4), ("OGG", 0.05), ("MP3", 0.05)])
def test_sounds_keep_their_rate_and_samples(kind: str, tolerance: float) -> None:
    wave = tone(0.5, 16_000)
    audio = read_media(sound(wave, kind=kind))
    assert isinstance(audio, Audio)
    assert audio.rate == 16_000
    assert audio.samples.dtype == np.float32
    length = min(len(audio.samples), len(wave))
    assert abs(len(audio.samples) - len(wave)) <= (2_500 if kind == "MP3" else 0)
    if kind != "MP3":  # which shifts its samples
        assert np.abs(audio.samples[:length] - wave[:length])[500:-500].max() < tolerance
    assert abs(np.sqrt(np.mean(audio.samples**2)) - 0.5 / math.sqrt(2)) < 0.03


def test_channels_are_averaged() -> None:
    stereo = np.stack([np.full(800, 0.5), np.full(800, -0.1)], axis=1)
    audio = read_media(sound(stereo, subtype="FLOAT"))
    assert isinstance(audio, Audio)
    assert audio.samples.shape == (800,)
    assert np.allclose(audio.samples, 0.2)


def test_samples_beyond_one_are_clipped_and_nan_is_refused() -> None:
    audio = read_media(sound(np.array([2.0, -3.0, 0.25] * 100), subtype="FLOAT"))
    assert isinstance(audio, Audio)
    assert audio.samples[:3].tolist() == [1.0, -1.0, 0.25]
    assert code_of(sound(np.array([np.nan] * 300), subtype="FLOAT")) == "invalid_media"


def wav_claiming(seconds: int, rate: int = 16_000) -> bytes:
    size = seconds * rate * 2
    layout = struct.pack("<HHIIHH", 1, 1, rate, rate * 2, 2, 16)
    return (
        b"RIFF"
        + struct.pack("<I", 36 + size)
        + b"WAVEfmt "
        + struct.pack("<I", 16)
        + layout
        + (b"data" + struct.pack("<I", size))
    )


def test_three_hours_of_wav_are_refused_from_the_header() -> None:
    with pytest.raises(MediaError, match=r"10,800\.0 s long; at most 300 s") as caught:
        read_media(wav_claiming(10_800))
    assert caught.value.code == "media_limit_exceeded"


def test_cut_sounds_are_invalid() -> None:
    with pytest.raises(MediaError, match=r"cut off, 8,000 bytes of samples lack"):
        read_media(sound(tone())[:-8_000])
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 60_000)
    flac = sound(noise, kind="FLAC")
    assert code_of(flac[: len(flac) // 2]) == "invalid_media"
    assert code_of(wav_claiming(1)[:30]) == "invalid_media"
    assert code_of(wav_claiming(0)) == "invalid_media"


def test_a_cut_mp3_ends_where_it_is_cut() -> None:
    whole = sound(tone(4.0), kind="MP3")
    first = read_media(whole)
    cut = read_media(whole[: len(whole) // 2])
    assert isinstance(first, Audio)
    assert isinstance(cut, Audio)
    assert len(cut.samples) < 0.6 * len(first.samples)
    assert np.array_equal(cut.samples[:20_000], first.samples[:20_000])


@pytest.mark.parametrize(
    "subtype", ["PCM_U8", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "IMA_ADPCM", "GSM610"]
)
def test_wav_is_read_however_its_samples_are_stored(subtype: str) -> None:
    wave = tone(0.5)
    audio = read_media(sound(wave, subtype=subtype))
    assert isinstance(audio, Audio)
    assert len(audio.samples) == pytest.approx(len(wave), rel=0.05)
    tolerance = {"PCM_U8": 0.01, "ULAW": 0.02, "IMA_ADPCM": 0.1, "GSM610": 0.15}.get(subtype, 1e-4)
    assert np.abs(audio.samples[: len(wave)] - wave)[200:].max() < tolerance


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (
            b"\x89PNG\r\n\x1a\n" + b"\0" * 8 + struct.pack(">II", 4, 4) + b"\0" * 40,
            "cannot identify image file",
        ),
        (sound(tone()).replace(b"\x01\0\x01\0", b"\x99\x99\x01\0", 1), "Malformed 'fmt ' chunk"),
        (movie(3)[:32], "Invalid data found when processing input"),
    ],
    ids=["png", "wav", "mp4"],
)
def test_what_a_library_says_is_told_without_addresses_and_numbers(data: bytes, reason: str) -> None:
    with pytest.raises(MediaError, match=reason) as caught:
        read_media(data)
    assert not re.search(r"0x|Errno|BytesIO|<none>|\.\.", str(caught.value))


def test_streamed_wav_without_a_length_is_read() -> None:
    whole = sound(tone())
    at = whole.index(b"data") + 4
    audio = read_media(whole[:at] + b"\xff\xff\xff\xff" + whole[at + 4 :])
    assert isinstance(audio, Audio)
    assert len(audio.samples) == 8_000


def test_budget_on_seconds_of_compressed_sound() -> None:
    data = sound(np.zeros(16_000 * 5), kind="FLAC")
    assert len(data) < 20_000
    assert code_of(data, MediaBudget(max_seconds=4)) == "media_limit_exceeded"
    assert read_media(data, MediaBudget(max_seconds=5)).modality is Modality.AUDIO


def test_unreasonable_rate_is_unsupported() -> None:
    assert code_of(sound(tone(), rate=400_000)) == "unsupported_media"


@pytest.mark.parametrize("kind", ["mp4", "webm"])
def test_videos_keep_frames_and_speed(kind: str) -> None:
    video = read_media(movie(8, kind=kind, audio=True))
    assert isinstance(video, Video)
    assert video.frames.shape == (8, 48, 64, 3)
    assert video.fps == pytest.approx(8.0, rel=1e-3)
    levels = video.frames[:, 24, 32, 0].astype(int)
    assert np.abs(levels - 30 * np.arange(8)).max() <= 12


@pytest.mark.parametrize("kind", ["mp4", "webm"])
def test_container_with_sound_only_is_a_sound(kind: str) -> None:
    audio = read_media(movie(kind=kind, audio=True, video=False))
    assert isinstance(audio, Audio)
    assert audio.rate == 48_000
    assert audio.seconds == pytest.approx(1.0, abs=0.05)
    assert np.abs(audio.samples[10_000:20_000]).max() == pytest.approx(0.5, abs=0.05)


def test_sound_track_of_a_video_is_read_on_demand() -> None:
    assert isinstance(read_media(movie(audio=True), expect=Modality.AUDIO), Audio)


def test_sound_only_container_is_no_video() -> None:
    with pytest.raises(MediaError, match="no pictures that can be decoded"):
        read_media(movie(audio=True, video=False), expect=Modality.VIDEO)


def test_video_without_frames_is_invalid() -> None:
    assert code_of(movie(0)) == "invalid_media"


def with_index_first(data: bytes, folder: Path) -> bytes:
    """Move the index of an mp4 to its front, as files made for the web have it."""
    (folder / "plain.mp4").write_bytes(data)
    moved = folder / "moved.mp4"
    with (
        av.open(folder / "plain.mp4") as source,
        av.open(moved, "w", options={"movflags": "faststart"}) as out,
    ):
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    return moved.read_bytes()


def test_cut_videos_are_invalid(tmp_path: Path) -> None:
    index_last = movie(30)
    index_first = with_index_first(index_last, tmp_path)
    assert index_last.index(b"moov") > index_last.index(b"mdat")
    assert index_first.index(b"moov") < index_first.index(b"mdat")
    for data in (index_first, index_last):
        assert isinstance(read_media(data), Video)
        with pytest.raises(MediaError, match="cut off") as caught:
            read_media(data[:-20])
        assert caught.value.code == "invalid_media"


def test_what_is_appended_to_a_video_does_not_matter() -> None:
    for tail in (b"\0" * 40, b"appended by some program, with no meaning"):
        assert isinstance(read_media(movie(3) + tail), Video)


def test_rotation_of_a_phone_video_is_applied() -> None:
    data = bytearray(movie(2, left_half=255))
    at = data.index(b"tkhd") + 4 + 40  # the matrix of a version 0 header
    one = 0x10000
    struct.pack_into(">6i", data, at, 0, one, 0, -one, 0, 0)  # shown turned clockwise
    video = read_media(bytes(data))
    assert isinstance(video, Video)
    assert video.frames.shape == (2, 64, 48, 3)
    assert video.frames[0, 8].min() > 230
    assert video.frames[0, 56].max() < 20


def test_cut_webm_is_invalid() -> None:
    data = movie(30, kind="webm")
    assert code_of(data[: int(len(data) * 0.7)]) == "invalid_media"


def test_budgets_of_video() -> None:
    data = movie(16)
    assert code_of(data, MediaBudget(max_frames=15)) == "media_limit_exceeded"
    assert code_of(data, MediaBudget(max_video_pixels=16 * 64 * 48 - 1)) == "media_limit_exceeded"
    assert code_of(data, MediaBudget(max_seconds=1.5)) == "media_limit_exceeded"
    assert code_of(data, MediaBudget(max_pixels=64 * 48 - 1)) == "media_limit_exceeded"
    assert isinstance(read_media(data, MediaBudget(max_frames=16, max_pixels=64 * 48)), Video)


def test_large_videos_are_scaled_and_thinned() -> None:
    video = read_media(movie(16), MediaBudget(video_short_side_px=24, max_kept_pixels=5 * 24 * 32))
    assert isinstance(video, Video)
    assert video.frames.shape == (4, 24, 32, 3)
    assert video.fps == pytest.approx(2.0)
    assert video.seconds == pytest.approx(2.0)


def test_values_refuse_wrong_arrays() -> None:
    with pytest.raises(ValueError, match=r"float64 of shape \(4, 4\)"):
        Image(np.zeros((4, 4)))
    with pytest.raises(ValueError, match="float32 of shape"):
        Audio(np.zeros(4), 16_000)
    with pytest.raises(ValueError, match="fps is 0"):
        Video(np.zeros((1, 4, 4, 3), np.uint8), 0.0)


@pytest.mark.parametrize(
    ("rate", "tolerance"), [(8_000, 1e-3), (22_050, 1e-3), (44_100, 1e-3), (48_000, 1e-3), (44_101, 4e-3)]
)
def test_resampling_keeps_a_tone_and_its_length(rate: int, tolerance: float) -> None:
    made = resample(tone(1.0, rate, 1_000.0), rate, 16_000)
    assert made.dtype == np.float32
    assert len(made) == 16_000
    wanted = tone(1.0, 16_000, 1_000.0)
    assert np.abs(made - wanted)[500:-500].max() < tolerance


def test_resampling_removes_what_the_new_rate_cannot_hold() -> None:
    made = resample(tone(1.0, 48_000, 9_000.0), 48_000, 16_000)
    assert np.abs(made[500:-500]).max() < 5e-5  # 80 dB under 0.5


def test_resampling_passes_nearly_the_whole_band() -> None:
    made = resample(tone(1.0, 48_000, 7_300.0), 48_000, 16_000)
    assert np.abs(made[500:-500]).max() == pytest.approx(0.5, abs=1e-3)


def test_resampling_refuses_a_rate_of_zero() -> None:
    with pytest.raises(ValueError, match="at least 1 per second"):
        resample(tone(), 16_000, 0)
