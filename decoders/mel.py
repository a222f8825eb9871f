"""The log-mel spectrogram that AudioLDM's autoencoder and vocoder speak.

Settings and framing follow the training code of AudioLDM (Liu et al. 2023, arXiv:2301.12503;
github.com/haoheliu/AudioLDM-training-finetuning, ``mel_spectrogram_train``), which took them from
HiFi-GAN (Kong et al. 2020): 16 kHz, magnitude of a 1024-point Hann STFT every 160 samples, 64
mel bands of the Slaney scale and normalisation from 0 to 8 kHz, natural logarithm clamped at 1e-5.
AudioLDM scales every clip to a peak of 0.5 before this; that step is left to the caller, because
it throws the loudness away.

Shape letters in this file:
    B batch   T samples   N frames, N = T / 160   K frequency bins, K = 513   M mel bands, M = 64
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

RATE_HZ = 16_000
NUM_BANDS = 64
HOP = 160
WINDOW = 1024
MAX_HZ = 8_000.0
FLOOR = 1e-5
PADDING = (WINDOW - HOP) // 2  # samples each side; makes N exactly T / HOP


def log_mel(samples: Tensor) -> Tensor:
    """Turn samples into log-mel frames.

    Args:
        samples: ``(B, T)`` or ``(T,)`` floating point in [-1, 1] at 16 kHz, T a multiple of 160 and
            above 432. Frame n is centred between samples 160 n and 160 (n + 1); the ends are mirrored.

    Returns:
        ``(B, N, 64)`` or ``(N, 64)`` float32, never below ``log(1e-5)``.

    Raises:
        ValueError: the number of samples is not a multiple of 160, or not above 432.

    """
    length = samples.shape[-1]
    if length % HOP or length <= PADDING:
        raise ValueError(
            f"there are {length} samples; expected a multiple of {HOP} above {PADDING}. "
            f"Pad the sound with silence to {max(-(-length // HOP), PADDING // HOP + 1) * HOP} samples."
        )
    batch = samples.float().reshape(-1, 1, length)
    padded = F.pad(batch, (PADDING, PADDING), mode="reflect").squeeze(1)  # (B, T + 864)
    magnitude = stft(padded).abs()  # (B, N, K)
    mel = magnitude @ mel_filterbank().to(samples.device).T  # (B, N, M)
    frames: Tensor = mel.clamp(min=FLOOR).log()
    return frames.reshape(*samples.shape[:-1], length // HOP, NUM_BANDS)


def stft(padded: Tensor) -> Tensor:
    """Short-time spectra of ``(B, T)`` samples without padding: ``(B, (T - 1024) // 160 + 1, K)``."""
    window = torch.hann_window(WINDOW, device=padded.device)
    spectra: Tensor = torch.fft.rfft(padded.unfold(-1, WINDOW, HOP) * window)
    return spectra


@lru_cache(maxsize=1)
def mel_filterbank() -> Tensor:
    """Weights ``(64, 513)`` float32 from STFT magnitudes to mel bands, each triangle of unit area in hertz.

    The scale is linear below 1 kHz (200/3 Hz per mel) and logarithmic above (27 mels per factor
    6.4), as in Slaney's Auditory Toolbox (1998).
    """
    edges_hz = _mel_to_hz(np.linspace(0.0, _hz_to_mel(MAX_HZ), NUM_BANDS + 2))
    bins_hz = np.linspace(0.0, RATE_HZ / 2, WINDOW // 2 + 1)
    lower, centre, upper = edges_hz[:-2, None], edges_hz[1:-1, None], edges_hz[2:, None]
    rising = (bins_hz - lower) / (centre - lower)
    falling = (upper - bins_hz) / (upper - centre)
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    return torch.from_numpy((triangles * 2 / (upper - lower)).astype(np.float32))


def band_centres_hz() -> np.ndarray:
    """Frequency of the top of each of the 64 triangles, in hertz."""
    return _mel_to_hz(np.linspace(0.0, _hz_to_mel(MAX_HZ), NUM_BANDS + 2))[1:-1]


_LINEAR_HZ_PER_MEL = 200 / 3
_LOG_FROM_HZ = 1000.0
_LOG_FROM_MEL = _LOG_FROM_HZ / _LINEAR_HZ_PER_MEL
_LOG_STEP = np.log(6.4) / 27


def _hz_to_mel(hz: float) -> float:
    if hz < _LOG_FROM_HZ:
        return hz / _LINEAR_HZ_PER_MEL
    return float(_LOG_FROM_MEL + np.log(hz / _LOG_FROM_HZ) / _LOG_STEP)


def _mel_to_hz(mel: np.ndarray) -> np.ndarray:
    logarithmic = _LOG_FROM_HZ * np.exp(_LOG_STEP * (mel - _LOG_FROM_MEL))
    return np.where(mel < _LOG_FROM_MEL, mel * _LINEAR_HZ_PER_MEL, logarithmic)
