"""Kaldi's log mel filter banks, computed for many sounds at once.

Source: the Kaldi toolkit's ``compute-fbank-feats`` (kaldi-asr.org), with the options that AST and
ImageBind use: HTK layout, no energy, no dither, Hann window, 25 ms every 10 ms.

Shape letters in this file:
    T samples   R frames   M mel bins
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

RATE_HZ = 16_000
WINDOW = 400  # 25 ms
HOP = 160  # 10 ms
FFT_SIZE = 512
PRE_EMPHASIS = 0.97
LOWEST_HZ = 20.0
POWER_FLOOR = torch.finfo(torch.float32).eps


def log_mel_bank(samples: Tensor, num_mel_bins: int) -> Tensor:
    """Return the natural log of the power in mel bands.

    Args:
        samples: ``(..., T)`` float32 in [-1, 1] at 16 000 per second; T at least 400 (25 ms).
        num_mel_bins: bands between 20 Hz and 8 000 Hz.

    Returns:
        ``(..., R, M)`` float32, floored at ``log(2 ** -23)`` (-15.94). ``R = 1 + (T - 400) // 160``:
        a frame is there only when all of its samples are.

    Raises:
        ValueError: fewer than 400 samples.

    """
    if samples.shape[-1] < WINDOW:
        raise ValueError(
            f"samples have shape {tuple(samples.shape)}; expected (..., T) with T >= {WINDOW} (25 ms). "
            "Pad the sound with zeros."
        )
    frames = samples.unfold(-1, WINDOW, HOP)  # (..., R, 400)
    frames = frames - frames.mean(dim=-1, keepdim=True)
    before = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
    window = torch.hann_window(WINDOW, periodic=False, device=samples.device)
    frames = (frames - PRE_EMPHASIS * before) * window
    spectrum = torch.fft.rfft(F.pad(frames, (0, FFT_SIZE - WINDOW)))  # (..., R, 257)
    power = spectrum.real.square() + spectrum.imag.square()
    bands: Tensor = power[..., :-1] @ _mel_triangles(num_mel_bins).to(samples.device)  # (..., R, M)
    return bands.clamp(min=POWER_FLOOR).log()


def centres_hz(num_mel_bins: int) -> Tensor:
    """Return where each band is loudest, ``(M,)`` float64, in hertz."""
    edges = _edges(num_mel_bins)
    return 700.0 * torch.expm1(edges[1:-1] / 1127.0)


def bands_at(hz: Tensor, num_mel_bins: int) -> Tensor:
    """Return the bands, counted from 0 and with fractions, whose centres lie at ``hz``, of any shape."""
    edges = _edges(num_mel_bins)
    return (_mel(hz.double()) - edges[1]) / (edges[1] - edges[0])


@lru_cache(maxsize=4)
def _mel_triangles(num_mel_bins: int) -> Tensor:
    """Triangles that are straight on the mel scale, ``(256, M)``; the Nyquist bin is not used."""
    edges = _edges(num_mel_bins)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    bins = _mel(torch.arange(FFT_SIZE // 2, dtype=torch.float64) * RATE_HZ / FFT_SIZE)[:, None]
    rising, falling = (bins - left) / (centre - left), (right - bins) / (right - centre)
    return torch.minimum(rising, falling).clamp(min=0.0).float()


def _edges(num_mel_bins: int) -> Tensor:
    lowest, highest = (_mel(torch.tensor(hz, dtype=torch.float64)) for hz in (LOWEST_HZ, RATE_HZ / 2))
    return torch.linspace(0, 1, num_mel_bins + 2, dtype=torch.float64) * (highest - lowest) + lowest


def _mel(hz: Tensor) -> Tensor:
    return 1127.0 * torch.log1p(hz / 700.0)
