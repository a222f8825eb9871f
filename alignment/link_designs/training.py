"""Training of every design, on the parts of a run.

Shape letters in this file:
    N signal blocks   Q condition tokens   E condition width   C latent channels
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from alignment.embedded.denoisers import ConditionedDenoiser
from alignment.embedded.dialogues import dialogue_of
from alignment.embedded.export import MODALITIES, export_aligned
from alignment.fitting import FitConfig, fit, half_precision, prefer_plain_attention, training_device
from alignment.link_designs.designs import (
    DESIGNS,
    MADE,
    MAKING,
    READING,
    SEEDS,
    Joined,
    Maker,
    Reader,
    made_by,
    read_by,
)
from alignment.link_designs.folders import NULLS_FILE, home, step_name
from alignment.stages import STAGES, CaptionTargets, caption_distance
from alignment.step_order import run_in_order
from alignment.toybox.directions import make
from alignment.toybox.exercise import FreshScenes
from alignment.toybox.grammar import caption
from alignment.toybox.media import render
from alignment.toybox.world import Scene
from alignment.training import (
    STAGE_BATCHES,
    Run,
    TrainOptions,
    frozen_decoder,
    run_of,
    text_targets,
    train_stage,
)
from decoders.mel import log_mel
from encoders.media import Audio, Image, Modality, Video

NUM_STEPS = 600
DENOISED = 6
"""Media of each kind and step that are denoised; a clip costs as much as a batch of replies."""
NULL_SHARE = 1 / 3
"""Of these, how many are denoised under the learned null, where there is one."""


def train(weights: Path, options: TrainOptions) -> list[Path]:
    """Train every design with every seed, on the parts of a run that is there.

    Args:
        weights: the preset's folder of weights, which names the run; nothing is written there.
        options: of the run; ``num_steps`` is that of every design, ``jobs`` are trained at once.

    Returns:
        Their folders, each with ``llm`` and, where there are any, ``projections``.

    Raises:
        ValueError: the run has no encoder yet, which is the last of the parts that are joined.

    """
    work = run_of(weights, options)
    if not (work.folder / "imagebind" / "encoder").is_dir():
        raise ValueError(
            f"{work.folder} holds no run with all parts to join. First run `patchbay train imagebind`."
        )
    work = replace(work, num_steps=work.num_steps or NUM_STEPS)
    names = [step_name(design, seed) for seed in SEEDS for design in DESIGNS]
    needs: dict[str, tuple[str, ...]] = dict.fromkeys(names, ())
    run_in_order(needs, partial(_train_one, work, options.threads), options.jobs, home(work.folder) / "logs")
    return [home(work.folder) / name for name in names]


def _train_one(work: Run, threads: int, name: str) -> None:
    torch.set_num_threads(threads)
    design, seed = next((d, s) for d in DESIGNS for s in SEEDS if step_name(d, s) == name)
    torch.manual_seed(seed)
    folder, way = home(work.folder) / name, DESIGNS[design]
    base = work.folder / "language" / "llm"
    if isinstance(way, Reader):
        read = read_by(way, base)
        train_stage(work, read, STAGES[READING], folder, replace(work.config(READING), seed=seed))
        export_aligned(read, folder)
        return
    made, targets = made_by(way, base), text_targets(work)
    denoisers = {m: _denoising(work, m) for m in MODALITIES.values()} if way.denoising else {}
    if way.learned_null:
        with torch.no_grad():
            made.learn_nulls({modality: target([""])[0].float() for modality, target in targets.items()})
    train_maker(way, made, targets, denoisers, folder, replace(work.config(MAKING), seed=seed))
    export_aligned(made, folder)
    if way.learned_null:
        nulls = {name: null.detach().contiguous() for name, null in made.nulls.items()}
        save_file(nulls, folder / NULLS_FILE)


Denoising = Callable[[Sequence[Scene], Tensor, random.Random, torch.Generator], Tensor]
"""(scenes, conditions (N, Q, E), chance, noise) -> how wrong the decoder denoises what the scenes show."""


def train_maker(
    way: Maker,
    model: Joined,
    targets: CaptionTargets,
    denoisers: Mapping[Modality, Denoising],
    folder: Path,
    config: FitConfig,
) -> None:
    """Train the signals and connectors of a design, in place.

    Args:
        way: the design.
        model: of that design; at the end it holds averaged weights if ``config`` asks for an average.
        targets: for each modality, captions -> what its decoder's own text encoder makes of them.
        denoisers: for each modality, how wrong its decoder denoises; unless ``way`` has no weight for that.
        folder: for checkpoints and logs.
        config: length, rates and seed.

    """
    model.train_only(STAGES[MAKING])
    prefer_plain_attention(model.llm.causal_lm)

    def losses(step: int) -> dict[str, Tensor]:
        rng, noise = config.randomness(step), config.noise(step)
        exercises = [make(name, rng, FreshScenes(rng)) for name in rng.choices(MADE, k=STAGE_BATCHES[MAKING])]
        asked = {caption(exercise.scenes[0]): exercise.scenes[0] for exercise in exercises}
        with half_precision():
            words, made = model.speak([dialogue_of(exercise, {}) for exercise in exercises])
        found = {"words": words}
        for modality, (captions, conditions) in made.items():
            if way.distance:
                wanted = targets[modality](captions).to(conditions.device)  # (N, Q, E)
                found[f"{modality} distance"] = way.distance * caption_distance(conditions, wanted)
            if way.denoising:
                scenes = [asked[text] for text in captions[:DENOISED]]
                given = conditions[:DENOISED]  # (M, Q, E)
                if way.learned_null:
                    dropped = torch.rand(len(given), 1, 1, generator=noise) < NULL_SHARE
                    given = torch.where(dropped.to(given.device), model.nulls[str(modality)], given)
                wrong = denoisers[modality](scenes, given, rng, noise)
                found[f"{modality} denoising"] = way.denoising * wrong
        return found

    fit("link", model, losses, config, folder)
    model.requires_grad_(False)


def _denoising(work: Run, modality: Modality) -> Denoising:
    kind = next(kind for kind, m in MODALITIES.items() if m is modality)
    model, encode = frozen_decoder(work, kind)
    return partial(denoised, model.to(training_device()), encode)


def denoised(
    model: ConditionedDenoiser,
    encode: Callable[[Tensor], Tensor],
    scenes: Sequence[Scene],
    conditions: Tensor,
    rng: random.Random,
    noise: torch.Generator,
) -> Tensor:
    """Return the velocity loss of a frozen denoiser under conditions ``(N, Q, E)``, on fresh renderings."""
    rows = np.stack([_row(scene, rng) for scene in scenes])
    with torch.no_grad():
        latents = encode(torch.from_numpy(rows)).float().to(conditions.device)  # (N, C, ...)
    if model.kind == "sound":
        conditions = F.normalize(conditions[:, 0], dim=-1)  # (N, E)
    return model.velocity_loss(latents, conditions, noise)


def _row(scene: Scene, rng: random.Random) -> np.ndarray[Any, Any]:
    """Return a rendering like a row of its pool: pixels, frames, or mels."""
    medium = render(scene, rng)
    if isinstance(medium, Image):
        return medium.pixels
    if isinstance(medium, Video):
        return medium.frames
    assert isinstance(medium, Audio)
    return log_mel(torch.from_numpy(medium.samples)[None])[0].numpy()
