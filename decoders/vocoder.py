"""Turn AudioLDM's log-mel frames into samples without a trained network.

Non-negative least squares undoes the mel bands, and the fast Griffin-Lim algorithm (Perraudin, Balazs
and Sondergaard 2013, "A fast Griffin-Lim algorithm") finds phases. :class:`GriffinLimVocoder` stands
where ``AudioLDMPipeline`` expects HiFi-GAN: saved in a pipeline folder, it is found again through
``model_index.json`` once this module has been imported.

Shape letters in this file:
    B batch   N frames   M mel bands, M = 64   K frequency bins, K = 513   T samples, T = 160 N
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers import ModelMixin  # diffusers looks for this name here when it loads a pipeline
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor

from decoders.mel import HOP, NUM_BANDS, PADDING, RATE_HZ, WINDOW, mel_filterbank, stft

_TINY = 1e-8


class GriffinLimVocoder(ModelMixin, ConfigMixin):
    """A vocoder without learned weights; the same frames always give the same samples.

    Args:
        num_iterations: Griffin-Lim steps.
        momentum: of the fast variant, in [0, 1); 0 is the classic algorithm.
        num_unmixing_steps: multiplicative updates of the least squares problem.
        sampling_rate, model_in_dim, upsample_rates: read by ``AudioLDMPipeline``; other values than those of
            :mod:`decoders.mel` raise ValueError.

    """

    filterbank: Tensor

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_iterations: int = 32,
        momentum: float = 0.99,
        num_unmixing_steps: int = 16,
        sampling_rate: int = RATE_HZ,
        model_in_dim: int = NUM_BANDS,
        upsample_rates: tuple[int, ...] = (5, 4, 2, 2, 2),
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        hop = math.prod(upsample_rates)
        if (sampling_rate, model_in_dim, hop) != (RATE_HZ, NUM_BANDS, HOP):
            raise ValueError(
                f"the vocoder was asked for {model_in_dim} bands and a hop of {hop} samples at "
                f"{sampling_rate} Hz; it knows {NUM_BANDS} bands and {HOP} samples at {RATE_HZ} Hz only. "
                "Leave these settings out."
            )
        self.num_iterations = num_iterations
        self.momentum = momentum
        self.num_unmixing_steps = num_unmixing_steps
        self.register_buffer("filterbank", mel_filterbank().clone())

    @torch.no_grad()
    def forward(self, mel: Tensor) -> Tensor:
        """Turn log-mel frames into samples.

        Args:
            mel: ``(B, N, 64)`` or ``(N, 64)`` natural log magnitudes as of :func:`decoders.mel.log_mel`.

        Returns:
            ``(B, T)`` or ``(T,)`` float32 in [-1, 1]; a sound whose crests went beyond is scaled down whole.

        """
        frames = mel.float().reshape(-1, *mel.shape[-2:])
        samples = self._find_phases(self._unmix(frames.exp()))  # (B, T)
        samples = samples / samples.abs().amax(-1, keepdim=True).clamp(min=1)
        return samples.reshape(*mel.shape[:-2], samples.shape[-1])

    def _unmix(self, mel: Tensor) -> Tensor:
        """Find non-negative STFT magnitudes (B, N, K) whose mel bands come near ``mel``."""
        bank = self.filterbank.float()
        magnitude: Tensor = (mel @ torch.linalg.pinv(bank).T).clamp(min=_TINY)  # (B, N, K)
        target, gram = mel @ bank, bank.T @ bank
        for _ in range(self.num_unmixing_steps):
            magnitude = magnitude * target / (magnitude @ gram + _TINY)
        return magnitude

    def _find_phases(self, magnitude: Tensor) -> Tensor:
        _, N, K = magnitude.shape
        generator = torch.Generator().manual_seed(0)
        angle = 2 * torch.pi * torch.rand(1, N, K, generator=generator).to(magnitude.device)
        phase = torch.polar(torch.ones_like(angle), angle)
        previous = torch.zeros_like(magnitude, dtype=phase.dtype)
        for _ in range(self.num_iterations):
            rebuilt = stft(_overlap_add(magnitude * phase))
            ahead = rebuilt + self.momentum * (rebuilt - previous)
            phase = ahead / (ahead.abs() + _TINY)
            previous = rebuilt
        return _overlap_add(magnitude * phase)[:, PADDING:-PADDING]


def _overlap_add(spectra: Tensor) -> Tensor:
    """Least-squares inverse of :func:`decoders.mel.stft`: (B, N, K) to (B, T + 864)."""
    N = spectra.shape[1]
    window = torch.hann_window(WINDOW, device=spectra.device)
    pieces = torch.fft.irfft(spectra) * window  # (B, N, 1024)
    weight = (window**2).expand(1, N, WINDOW)
    return _lay(pieces) / _lay(weight).clamp(min=1e-3)


def _lay(pieces: Tensor) -> Tensor:
    """Sum pieces (B, N, 1024) laid 160 samples apart."""
    length = (pieces.shape[1] - 1) * HOP + WINDOW
    folded = F.fold(pieces.transpose(1, 2), (1, length), (1, WINDOW), stride=(1, HOP))  # (B, 1, 1, length)
    return folded[:, 0, 0]
