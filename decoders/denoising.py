"""The denoising loop that image, video and sound share. Knows schedulers and guidance, not networks.

Shape letters in this file:
    B requests in the batch   ... the latent shape of one request, channels first
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A network: (latents ``(B, ...)``, timestep scalar, conditions ``(B, ...)``) -> ``(B, ...)``."""

OnStep = Callable[[int, int], None]
"""Called after each step with the steps done so far and the steps of the whole run."""

_CLASSES: dict[str, Any] = {
    "dpmsolver++": DPMSolverMultistepScheduler,
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
}


class Cancelled(Exception):
    """The stop event was set; the work was dropped between two steps."""


def check_stop(stop: threading.Event | None) -> None:
    """Raise :class:`Cancelled` when ``stop`` is set."""
    if stop is not None and stop.is_set():
        raise Cancelled("The decoder was asked to stop.")


def make_scheduler(saved: Mapping[str, Any], name: str) -> Any:
    """Return a fresh scheduler of the kind ``name`` for the noise schedule ``saved``.

    Args:
        saved: the configuration of the scheduler in the pipeline's folder. Betas, prediction type,
            timestep spacing and terminal SNR are taken from it.
        name: ``dpmsolver++``, ``ddim`` or ``euler``.

    Latents have no natural range, so clipping of the predicted sample is always off.
    """
    if name not in _CLASSES:
        raise ValueError(f"scheduler is {name!r}; choose one of {', '.join(_CLASSES)}.")
    config = dict(saved)
    if name == "ddim":
        config["clip_sample"] = False
    if name == "dpmsolver++":
        config |= {"algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}
    return _CLASSES[name].from_config(config)


def draw_noise(shape: Sequence[int], seeds: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Return standard normal noise ``(B, *shape)`` float32, one row per seed.

    A row depends on its own seed only, and is what a diffusers pipeline draws for a CPU generator
    with that seed, on every device.
    """
    rows = [
        torch.randn((1, *shape), generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32)
        for seed in seeds
    ]
    return torch.cat(rows).to(device)


@torch.inference_mode()
def denoise(
    predict: Predict,
    scheduler: Any,
    noise: Tensor,
    conditions: Tensor,
    null: Tensor,
    *,
    steps: int,
    guidance: Sequence[float],
    source: Tensor | None = None,
    strength: float = 1.0,
    on_step: OnStep | None = None,
    stop: threading.Event | None = None,
) -> Tensor:
    """Turn noise into clean latents, guided and unguided halves in one batch.

    Args:
        predict: the network. It is asked in the dtype of ``conditions``; the latents keep that of ``noise``.
        scheduler: a scheduler of its own for this call; its state is changed.
        noise: ``(B, ...)`` standard normal.
        conditions: ``(B, ...)``, one per request.
        null: the unconditional condition of one request, without the batch dimension.
        steps: denoising steps of the full schedule.
        guidance: one scale per request. Up to 1 means none, as in diffusers; if no request wants
            guidance the unconditional half is not computed at all.
        source: ``(B, ...)`` clean latents to start from instead of pure noise (SDEdit).
        strength: with ``source``, the share of the schedule that runs, in (0, 1].
        on_step: called after each step.
        stop: checked before each step.

    Returns:
        ``(B, ...)`` clean latents, still multiplied with the VAE's scaling factor.

    Raises:
        Cancelled: ``stop`` was set.
        ValueError: ``strength`` out of range, or shapes of ``source`` and ``noise`` that differ.

    Source: the loops of StableDiffusionPipeline, TextToVideoSDPipeline and AudioLDMPipeline (diffusers
    0.42), which this equals for the same noise; start from a source as in their image-to-image kin.

    """
    scheduler.set_timesteps(steps, device=noise.device)
    timesteps = scheduler.timesteps
    if source is None:
        latents: Tensor = noise * scheduler.init_noise_sigma
    else:
        skipped = _skipped_steps(steps, strength)
        if source.shape != noise.shape:
            raise ValueError(
                f"The source latents have shape {tuple(source.shape[1:])}; expected "
                f"{tuple(noise.shape[1:])}. "
                f"Encode the source with the same decoder and size settings."
            )
        timesteps = timesteps[skipped:]
        if not isinstance(scheduler, DDIMScheduler):
            scheduler.set_begin_index(skipped)
        latents = scheduler.add_noise(source, noise, timesteps[:1].repeat(len(source)))

    guided = any(scale > 1 for scale in guidance)
    scales = torch.tensor([max(1.0, scale) for scale in guidance], device=noise.device)
    scales = scales.view(-1, *[1] * (noise.ndim - 1))  # (B, 1, ...)
    if guided:
        conditions = torch.cat([null.expand_as(conditions), conditions])  # (2B, ...)

    for step, timestep in enumerate(timesteps):
        check_stop(stop)
        batch = torch.cat([latents, latents]) if guided else latents
        batch = scheduler.scale_model_input(batch, timestep)
        predicted = predict(batch.to(conditions.dtype), timestep, conditions).to(latents.dtype)
        if guided:
            unconditional, conditional = predicted.chunk(2)
            predicted = unconditional + scales * (conditional - unconditional)
        latents = scheduler.step(predicted, timestep, latents, return_dict=False)[0]
        if on_step is not None:
            on_step(step + 1, len(timesteps))
    return latents


def _skipped_steps(steps: int, strength: float) -> int:
    """Return how many of ``steps`` a start from a source leaves out; at least one always runs."""
    if not 0 < strength <= 1:
        raise ValueError(
            f"strength is {strength!r}; it must be above 0 (keep the source) and at most 1 (ignore it)."
        )
    return steps - max(1, min(int(steps * strength), steps))
