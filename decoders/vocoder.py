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
from functools import cache

import torch
from diffusers import ModelMixin  # diffusers looks for this name here when it loads a pipeline
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor

from decoders.mel import HOP, NUM_BANDS, PADDING, RATE_HZ, WINDOW, log_mel, mel_filterbank, stft

_TINY = 1e-8
_KNEE = 0.8


class GriffinLimVocoder(ModelMixin, ConfigMixin):
    """A vocoder without learned weights; the same frames always give the same samples.

    Args:
        num_iterations: Griffin-Lim steps.
        momentum: of the fast variant, in [0, 1); 0 is the classic algorithm.
        num_unmixing_steps: multiplicative updates of the least squares problem.
        peak: no band gets louder than a tone of this amplitude, from above 0 to 1. Diffusion models overshoot
            in single cells of a mel picture, by up to three nepers, and a click is all that comes of it.
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
        peak: float = 1.0,
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
        if not 0 < peak <= 1:
            raise ValueError(f"peak is {peak}; expected an amplitude above 0, and 1 at most.")
        self.num_iterations = num_iterations
        self.momentum = momentum
        self.log_peak = math.log(peak)
        self.num_unmixing_steps = num_unmixing_steps
        self.register_buffer("filterbank", mel_filterbank().clone())

    @torch.no_grad()
    def forward(self, mel: Tensor) -> Tensor:
        """Turn log-mel frames into samples.

        Args:
            mel: ``(B, N, 64)`` or ``(N, 64)`` natural log magnitudes as of :func:`decoders.mel.log_mel`.

        Returns:
            ``(B, T)`` or ``(T,)`` float32 in [-1, 1]; crests beyond are bent, and nothing else changes.

        """
        frames = mel.float().reshape(-1, *mel.shape[-2:])
        frames = frames.minimum(_full_scale().to(frames.device) + self.log_peak)
        samples = _limited(self._find_phases(self._unmix(frames.exp())))  # (B, T)
        shaped: Tensor = samples.reshape(*mel.shape[:-2], samples.shape[-1])
        return shaped

    def _unmix(self, mel: Tensor) -> Tensor:
        """Find non-negative STFT magnitudes (B, N, K) whose mel bands come near ``mel``."""
        bank = self.filterbank.float()
        magnitude: Tensor = (mel @ torch.linalg.pinv(bank).T).clamp(min=_TINY)  # (B, N, K)
        target = mel @ bank
        for _ in range(self.num_unmixing_steps):
            # By way of the 64 bands: an eighth of the work of the product of the bank with itself.
            magnitude = magnitude * target / (magnitude @ bank.T @ bank + _TINY)
        return magnitude

    def _find_phases(self, magnitude: Tensor) -> Tensor:
        _, N, K = magnitude.shape
        generator = torch.Generator().manual_seed(0)
        angle = 2 * torch.pi * torch.rand(1, N, K, generator=generator).to(magnitude.device)
        phase = torch.polar(torch.ones_like(angle), angle)
        window = torch.hann_window(WINDOW, device=magnitude.device)
        # What lies over each sample, of the windows of analysis and synthesis.
        weight = _lay((window**2).expand(1, N, WINDOW)).clamp(min=1e-3)  # (1, T + 864)
        spectra = magnitude * phase
        previous = torch.zeros(*spectra.shape, 2, device=spectra.device)
        for _ in range(self.num_iterations):
            # In real numbers, as complex ones are added, measured and divided several times slower on a CPU.
            rebuilt = torch.view_as_real(stft(_lay(torch.fft.irfft(spectra) * window) / weight))
            ahead = torch.lerp(previous, rebuilt, 1 + self.momentum)  # (B, N, K, 2)
            real, imaginary = ahead.unbind(-1)
            size = torch.addcmul(real.square(), imaginary, imaginary).sqrt_()  # (B, N, K)
            spectra = torch.view_as_complex(ahead * (magnitude / size.add_(_TINY))[..., None])
            previous = rebuilt
        laid = _lay(torch.fft.irfft(spectra) * window) / weight
        return laid[:, PADDING:-PADDING]


@cache
def _full_scale() -> Tensor:
    """Log magnitude ``(64,)`` of each band at the tone of amplitude 1 that it hears loudest."""
    seconds = torch.arange(20 * HOP) / RATE_HZ
    loudest = torch.full((NUM_BANDS,), -torch.inf)
    for k in range(1, WINDOW // 2):
        tone = torch.sin(2 * torch.pi * RATE_HZ / WINDOW * k * seconds)
        loudest = loudest.maximum(log_mel(tone)[10])
    return loudest


def _limited(samples: Tensor) -> Tensor:
    """Bend what is beyond :data:`_KNEE` towards 1, as the tanh at the end of HiFi-GAN does."""
    room = 1 - _KNEE
    bent = _KNEE + room * torch.tanh((samples.abs() - _KNEE) / room)
    return torch.where(samples.abs() > _KNEE, bent * samples.sign(), samples)


def _lay(pieces: Tensor) -> Tensor:
    """Sum pieces (B, N, 1024) laid 160 samples apart: (B, T + 864)."""
    B, N, _ = pieces.shape
    whole = -(-WINDOW // HOP)  # hops that a piece reaches over
    laid = pieces.new_zeros(B, N + whole, HOP)
    for start in range(0, WINDOW, HOP):
        part = pieces[..., start : start + HOP]
        laid[:, start // HOP : start // HOP + N, : part.shape[-1]] += part
    return laid.flatten(1)[:, : (N - 1) * HOP + WINDOW]
