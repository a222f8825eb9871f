"""The denoising loop that image, video and sound share. Knows schedulers and guidance, not networks.

Shape letters in this file:
    R requests that take every step together   B rows of one call of the network
    ... the latent shape of one request, channels first
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor

from decoders.settings import check_strength

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A network: (latents ``(B, ...)``, timesteps ``(B,)`` float32, conditions ``(B, ...)``) -> ``(B, ...)``."""

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
    """Return standard normal noise ``(R, *shape)`` float32, one row per seed.

    A row depends on its own seed only, and is what a diffusers pipeline draws for a CPU generator
    with that seed, on every device.
    """
    rows = [
        torch.randn((1, *shape), generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32)
        for seed in seeds
    ]
    return torch.cat(rows).to(device)


class Denoising:
    """Latents on their way from noise to clean, with the state of the scheduler that takes them there.

    The requests in one object share a schedule and take every step together. Objects with different
    schedules meet in :func:`step`, as long as their latents have one shape.
    """

    def __init__(
        self,
        scheduler: Any,
        noise: Tensor,
        conditions: Tensor,
        *,
        steps: int,
        guidance: Sequence[float],
        source: Tensor | None = None,
        strength: float = 1.0,
    ) -> None:
        """Begin.

        Args:
            scheduler: of its own for this object; its state is changed.
            noise: ``(R, ...)`` standard normal.
            conditions: ``(R, ...)``, one per request.
            steps: denoising steps of the full schedule.
            guidance: one scale per request. Up to 1 means none, as in diffusers.
            source: ``(R, ...)`` clean latents to start from instead of pure noise (SDEdit).
            strength: with ``source``, the share of the schedule that runs, in (0, 1].

        Raises:
            ValueError: ``strength`` out of range, or shapes of ``source`` and ``noise`` that differ.

        """
        scheduler.set_timesteps(steps, device=noise.device)
        self.scheduler = scheduler
        self.timesteps: Tensor = scheduler.timesteps
        self.conditions = conditions
        self.done = 0
        if source is None:
            self.latents: Tensor = noise * scheduler.init_noise_sigma  # (R, ...)
        else:
            check_source(source[0], noise.shape[1:])
            skipped = steps - steps_run(steps, strength)
            self.timesteps = self.timesteps[skipped:]
            if not isinstance(scheduler, DDIMScheduler):
                scheduler.set_begin_index(skipped)
            self.latents = scheduler.add_noise(source, noise, self.timesteps[:1].repeat(len(source)))
        self.kept: tuple[Tensor, Tensor] | None = None
        """What the network may want back in the next step: for the guided rows, and for all."""
        self.estimate = self.latents
        """What the clean latents seem to be after the last step, ``(R, ...)``."""
        self.guided = [row for row, scale in enumerate(guidance) if scale > 1]
        scales = torch.tensor([guidance[row] for row in self.guided], device=noise.device)
        self.scales = scales.view(-1, *[1] * (noise.ndim - 1))  # (guided, 1, ...)

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return len(self.timesteps)

    @property
    def finished(self) -> bool:
        """Whether :attr:`latents` are clean: still multiplied with the VAE's scaling factor."""
        return self.done == self.total

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Return latents as the network wants them ``(R, ...)`` and their timesteps ``(R,)``."""
        timestep = self.timesteps[self.done]
        latents: Tensor = self.scheduler.scale_model_input(self.latents, timestep)
        return latents, timestep.to(torch.float32).expand(len(latents))

    def advance(self, predicted: Tensor) -> None:
        """Take one step with the network's guided prediction ``(R, ...)``."""
        after = self.scheduler.step(predicted, self.timesteps[self.done], self.latents)
        estimate = getattr(after, "pred_original_sample", None)
        self.estimate = self.scheduler.model_outputs[-1] if estimate is None else estimate
        self.latents = after.prev_sample
        self.done += 1


@torch.inference_mode()
def step(predict: Predict, runs: Sequence[Denoising], null: Tensor, *, halves_apart: bool = False) -> None:
    """Take one step of every run, in one call of the network.

    The unguided half holds only those requests whose guidance scale is above 1. If the network
    raises, no run has changed.

    Args:
        predict: the network. It is asked in the dtype of the conditions; latents keep that of the noise.
        runs: unfinished, with latents of one shape; each is at a step of its own.
        null: the unconditional condition of one request, without the batch dimension.
        halves_apart: call the network once for each half, which takes half the memory.

    """
    parts = [run.inputs() for run in runs]
    latents = torch.cat([part[0] for part in parts])  # (B, ...)
    timesteps = torch.cat([part[1] for part in parts])  # (B,)
    conditions = torch.cat([run.conditions for run in runs])  # (B, ...)
    sizes = [len(run.latents) for run in runs]
    starts = [sum(sizes[:place]) for place in range(len(runs))]
    guided = [start + row for start, run in zip(starts, runs, strict=True) for row in run.guided]

    precision, latents = latents.dtype, latents.to(conditions.dtype)

    if not guided:
        predicted = predict(latents, timesteps, conditions)
    else:
        half = (latents[guided], timesteps[guided], null.expand(len(guided), *null.shape))
        if halves_apart:
            unconditional, predicted = predict(*half), predict(latents, timesteps, conditions)
        else:
            whole = zip(half, (latents, timesteps, conditions), strict=True)
            both = predict(*(torch.cat(pair) for pair in whole))
            unconditional, predicted = both[: len(guided)], both[len(guided) :].clone()
        scales = torch.cat([run.scales for run in runs]).to(predicted)
        predicted[guided] = unconditional + scales * (predicted[guided] - unconditional)

    for run, part in zip(runs, predicted.to(precision).split(sizes), strict=True):
        run.advance(part)


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
    """Turn noise into clean latents: one :class:`Denoising`, from its first step to its last.

    Args:
        predict: the network. It is asked in the dtype of the conditions; latents keep that of the noise.
        scheduler, noise, conditions, steps, guidance, source, strength: as in :class:`Denoising`.
        null: the unconditional condition of one request, without the batch dimension.
        on_step: called after each step.
        stop: checked before each step.

    Returns:
        ``(R, ...)`` clean latents, still multiplied with the VAE's scaling factor.

    Raises:
        Cancelled: ``stop`` was set.
        ValueError: as in :class:`Denoising`.

    Source: the loops of StableDiffusionPipeline, TextToVideoSDPipeline and AudioLDMPipeline (diffusers
    0.42), which this equals for the same noise; start from a source as in their image-to-image kin.

    """
    run = Denoising(
        scheduler, noise, conditions, steps=steps, guidance=guidance, source=source, strength=strength
    )
    while not run.finished:
        check_stop(stop)
        step(predict, [run], null)
        if on_step is not None:
            on_step(run.done, run.total)
    return run.latents


def check_source(source: Tensor, shape: Sequence[int]) -> None:
    """Raise ValueError unless the source latents of one request have the shape of its noise."""
    if tuple(source.shape) != tuple(shape):
        raise ValueError(
            f"The source latents have shape {tuple(source.shape)}; expected {tuple(shape)}. "
            f"Encode the source with the same decoder and size settings."
        )


def steps_run(steps: int, strength: float) -> int:
    """Return how many of ``steps`` a start from a source takes; at least one.

    Raises:
        ValueError: ``strength`` is not in (0, 1].

    """
    check_strength(strength)
    return max(1, min(int(steps * strength), steps))
