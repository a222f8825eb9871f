"""ImageBind's preprocessing: media values to the tensors that its towers read.

It gives what the released code gives: the resizing, the choice of clips and frames and the numbers
below are parts of the model. It does not decode files (:mod:`encoders.media` does).

Shape letters in this file:
    N items   S clips   F frames of one clip   Z side of the square crop   M mel bins   R mel frames
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from encoders.filter_banks import RATE_HZ, WINDOW, log_mel_bank
from encoders.media import Audio, Image, Video, resample
from encoders.tiler import CentreCrop, cut, middle

# Statistics of CLIP's training pictures (Radford et al. 2021, arXiv 2103.00020).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# Statistics of AudioSet's filter banks (Gong et al. 2021, arXiv 2104.01778).
BANK_MEAN = -4.268
BANK_STD = 9.138


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessConfig:
    """What the towers were trained on.

    Attributes:
        image_size: side of the square crop, in pixels.
        video_clips: clips taken from a video, evenly spread.
        video_clip_seconds: length of one of them.
        video_clip_frames: frames taken from one of them, evenly spread.
        video_crops: 1 for the centre, 3 for both ends of the longer side too.
        audio_clips: clips taken from a sound, evenly spread.
        audio_clip_seconds: length of one of them.
        num_mel_bins: bands of the filter bank.
        num_mel_frames: frames that a clip is cut or padded to.

    """

    image_size: int
    video_clips: int
    video_clip_seconds: float
    video_clip_frames: int
    video_crops: int
    audio_clips: int
    audio_clip_seconds: float
    num_mel_bins: int
    num_mel_frames: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"{field.name} is {value!r}; expected a number above 0.")
        if self.video_crops not in (1, 3):
            raise ValueError(f"video_crops is {self.video_crops}; expected 1 or 3.")

    @classmethod
    def huge(cls) -> PreprocessConfig:
        """Return the numbers of the released model."""
        return cls(
            image_size=224,
            video_clips=5,
            video_clip_seconds=2.0,
            video_clip_frames=2,
            video_crops=3,
            audio_clips=3,
            audio_clip_seconds=2.0,
            num_mel_bins=128,
            num_mel_frames=204,
        )

    @classmethod
    def toybox(cls) -> PreprocessConfig:
        """Return the numbers of the embedded model: eight frames of a second, 2.56 s of sound.

        The two frames of a clip are half a second apart: things have moved on by then, and what swings
        twice a second is back where it was.
        """
        return cls(
            image_size=64,
            video_clips=4,
            video_clip_seconds=0.625,
            video_clip_frames=2,
            video_crops=1,
            audio_clips=1,
            audio_clip_seconds=2.56,
            num_mel_bins=128,
            num_mel_frames=256,
        )

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> PreprocessConfig:
        """Rebuild a config from :meth:`to_json`.

        Raises:
            ValueError: a missing, unknown or impossible entry, named in the message.

        """
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"This is not a configuration of the preprocessing: {error}.") from error

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def prepare_images(images: Sequence[Image], config: PreprocessConfig) -> Tensor:
    """Scale the short side, crop the centre, normalise.

    Returns:
        ``(N, 3, Z, Z)`` float32.

    """
    tiler = CentreCrop(config.image_size)
    return prepare_slices(
        [part for image in images for part in cut(image.pixels, tiler.plan(*image.pixels.shape[:2]))]
    )


def prepare_slices(slices: Sequence[NDArray[np.uint8]]) -> Tensor:
    """Normalise pictures that are ``(Z, Z, 3)`` already, as a tiler cuts them.

    Returns:
        ``(N, 3, Z, Z)`` float32.

    """
    return _normalise(torch.from_numpy(np.stack(slices)).permute(0, 3, 1, 2).float() / 255.0)


def prepare_videos(videos: Sequence[Video], config: PreprocessConfig) -> Tensor:
    """Take clips, frames of the clips and crops of the frames; normalise.

    Returns:
        ``(N, S, 3, F, Z, Z)`` float32 with ``S = video_clips * video_crops``, crops within clips.

    """
    return torch.stack([_prepare_video(video, config) for video in videos])


def prepare_sounds(sounds: Sequence[Audio], config: PreprocessConfig) -> Tensor:
    """Take clips, and the filter bank of each.

    Returns:
        ``(N, S, 1, M, R)`` float32. What a short sound lacks is filled as the release fills it: with
        zeros before the mean is taken off, so that it stands out from silence.

    """
    clips = [clip for sound in sounds for clip in _sound_clips(sound, config)]
    if len({len(clip) for clip in clips}) == 1:
        banks = [*log_mel_bank(torch.from_numpy(np.stack(clips)), config.num_mel_bins)]
    else:
        banks = [log_mel_bank(torch.from_numpy(clip), config.num_mel_bins) for clip in clips]
    wanted = config.num_mel_frames
    fitted = [F.pad(bank[:wanted], (0, 0, 0, wanted - len(bank[:wanted]))) for bank in banks]
    batch = ((torch.stack(fitted) - BANK_MEAN) / BANK_STD).transpose(1, 2)  # (N * S, M, R)
    return batch.reshape(len(sounds), config.audio_clips, 1, *batch.shape[1:])  # (N, S, 1, M, R)


def clip_spans(length: float, clip_length: float, num_clips: int) -> list[tuple[float, float]]:
    """Spread clips evenly, the first at the start and the last at the end.

    Returns:
        Start and end of each clip, in the unit of the arguments. All clips start at 0 when the
        medium is shorter than one of them.

    """
    step = max(length - clip_length, 0.0) / max(num_clips - 1, 1)
    return [(i * step, i * step + clip_length) for i in range(num_clips)]


def clip_frames(num_frames: int, fps: float, config: PreprocessConfig) -> list[list[int]]:
    """Choose the frames of each clip of a video, as indices in time order."""
    chosen = []
    for start, end in clip_spans(num_frames / fps, config.video_clip_seconds, config.video_clips):
        first = min(_ceil(start * fps), num_frames - 1)
        last = max(min(_ceil(end * fps), num_frames) - 1, first)
        places = torch.linspace(0, last - first, config.video_clip_frames).long()
        chosen.append([first + int(place) for place in places])
    return chosen


def _ceil(value: float) -> int:
    return math.ceil(value - 1e-6)  # 0.1 * 3 * 10 frames are three, not four


def _prepare_video(video: Video, config: PreprocessConfig) -> Tensor:
    Z = config.image_size
    chosen = clip_frames(len(video.frames), video.fps, config)
    distinct = sorted({index for clip in chosen for index in clip})
    top, left, height, width = middle(*video.frames.shape[1:3])
    kept = torch.from_numpy(video.frames[distinct, top : top + height, left : left + width])
    frames = kept.permute(0, 3, 1, 2).float() / 255.0
    height, width = frames.shape[2:]
    if min(height, width) != Z:
        height, width = (
            (math.floor(height / width * Z), Z) if width < height else (Z, math.floor(width / height * Z))
        )
        frames = F.interpolate(frames, size=(height, width), mode="bilinear", align_corners=False)
    frames = _normalise(frames)

    place = {index: row for row, index in enumerate(distinct)}
    clips = []
    for clip in chosen:
        picked = frames[[place[index] for index in clip]].transpose(0, 1)  # (3, F, height, width)
        for top, left in _crop_corners(height, width, Z, config.video_crops):
            clips.append(picked[:, :, top : top + Z, left : left + Z])
    return torch.stack(clips)  # (S, 3, F, Z, Z)


def _crop_corners(height: int, width: int, size: int, crops: int) -> list[tuple[int, int]]:
    top, left = math.ceil((height - size) / 2), math.ceil((width - size) / 2)
    if crops == 1:
        return [(top, left)]
    if height > width:
        return [(0, left), (top, left), (height - size, left)]
    return [(top, 0), (top, left), (top, width - size)]


def _sound_clips(sound: Audio, config: PreprocessConfig) -> list[NDArray[np.float32]]:
    samples = resample(sound.samples, sound.rate, RATE_HZ)
    spans = clip_spans(len(samples) / RATE_HZ, config.audio_clip_seconds, config.audio_clips)
    clips = []
    for start, end in spans:
        clip = samples[int(start * RATE_HZ + 1e-6) : int(end * RATE_HZ + 1e-6)]
        clip = clip - clip.mean() if len(clip) else clip
        clips.append(np.pad(clip, (0, max(0, WINDOW - len(clip)))))
    return clips


def _normalise(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std
