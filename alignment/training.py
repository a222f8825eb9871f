"""``patchbay train``: the embedded model from nothing, one command per step or one for all.

Each step leaves its result under ``runs/<preset>/<step>`` and resumes from its last checkpoint when
it is run again; a step that is done is not repeated. ``export`` writes what the preset loads.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from numpy.typing import NDArray

from alignment.embedded import pools
from alignment.embedded.adopting import adopt
from alignment.embedded.autoencoders import (
    encoder_of,
    train_picture_autoencoder,
    train_spectrogram_autoencoder,
)
from alignment.embedded.captions import CAPTION_TOKENS, WIDTH, CaptionEncoder, Kind, train_caption_encoder
from alignment.embedded.contrastive import train_imagebind
from alignment.embedded.denoisers import ConditionedDenoiser, train_denoiser
from alignment.embedded.dialogues import encode_pools, sample_dialogues
from alignment.embedded.export import MODALITIES, export_aligned, export_decoder, export_encoder
from alignment.embedded.language import train_base
from alignment.embedded.late_sounds import also_late, late_sounds
from alignment.embedded.own_media import OwnMedia, made
from alignment.fitting import FitConfig, plot_losses
from alignment.stages import STAGES, Aligned, CaptionTargets, Stage, run_stage
from alignment.step_order import run_in_order
from alignment.system import DECODERS
from decoders.latent_decoder import LatentDecoder
from decoders.patch_autoencoder import PatchAutoencoderKL
from decoders.projection import OutputProjection, OutputProjectionConfig
from encoders.imagebind_encoder import ImageBindEncoder
from encoders.media import Modality
from llm.lora import LoraOptions
from llm.model import LanguageModel
from llm.projectors import ProjectorConfig

GRIDS: Mapping[Modality, tuple[int, ...]] = {
    Modality.IMAGE: (8, 8),
    Modality.VIDEO: (8, 8),
    Modality.AUDIO: (8, 16),
}
QUERIES = 8
LORA = LoraOptions(rank=16, alpha=16)
DIALOGUES_PER_STEP = 32
STAGE_BATCHES = {"encoder-side": 48, "decoder-side": 48, "instruction": DIALOGUES_PER_STEP}

_AUTOENCODER = FitConfig(
    num_steps=4500,
    learning_rate=1.5e-3,
    average_decay=0.995,
    flat_fraction=0.5,
    weight_decay=0.0,
    betas=(0.9, 0.99),
)
_CAPTIONS = FitConfig(num_steps=700, learning_rate=1.5e-3)
_DENOISER = FitConfig(num_steps=4000, learning_rate=1e-3, average_decay=0.999, flat_fraction=0.4)
RECIPES: Mapping[str, FitConfig] = {
    "picture-autoencoder": _AUTOENCODER,
    "spectrogram-autoencoder": replace(_AUTOENCODER, num_steps=3200),
    "look-captions": _CAPTIONS,
    "clip-captions": _CAPTIONS,
    "sound-captions": _CAPTIONS,
    "look-denoiser": replace(_DENOISER, num_steps=8000, average_decay=0.998, muon=True),
    "clip-denoiser": replace(_DENOISER, num_steps=6500, average_decay=0.998, muon=True),
    "sound-denoiser": replace(_DENOISER, num_steps=24000, average_decay=0.998, muon=True),
    "language": FitConfig(
        num_steps=15000, learning_rate=2e-3, average_decay=0.995, flat_fraction=0.4, muon=True
    ),
    "imagebind": FitConfig(
        num_steps=7000,
        learning_rate=1e-3,
        average_decay=0.998,
        flat_fraction=0.4,
        weight_decay=0.02,
        log_every_steps=7,
        muon=True,
    ),
    "encoder-side": FitConfig(
        num_steps=900, learning_rate=1e-3, average_decay=0.99, flat_fraction=0.4, muon=True
    ),
    "decoder-side": FitConfig(
        num_steps=1100, learning_rate=1e-3, average_decay=0.99, flat_fraction=0.4, muon=True
    ),
    "instruction": FitConfig(
        num_steps=5800, learning_rate=1e-3, average_decay=0.995, flat_fraction=0.4, muon=True
    ),
}
"""The steps in their order, with lengths and rates that fit two cores."""
NEEDS: Mapping[str, tuple[str, ...]] = {
    "picture-autoencoder": (),
    "look-captions": (),
    "look-denoiser": ("picture-autoencoder", "look-captions"),
    "clip-captions": (),
    "clip-denoiser": ("look-denoiser", "clip-captions"),
    "spectrogram-autoencoder": (),
    "sound-captions": (),
    "sound-denoiser": ("spectrogram-autoencoder", "sound-captions"),
    "language": (),
    "imagebind": ("look-denoiser", "clip-denoiser", "sound-denoiser"),
    "encoder-side": ("imagebind", "language"),
    "decoder-side": ("encoder-side",),
    "instruction": ("decoder-side",),
}
"""What each step builds on; the longest chains come first, so that two jobs end together."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What the command line may say. None leaves the recipe's length.

    ``seed`` decides first weights and the order of the data; the rendered pools are the same for all.
    ``jobs`` steps of ``all`` run at the same time, each with ``threads`` threads.
    """

    runs: Path = Path("runs")
    num_steps: int | None = None
    max_minutes: float | None = None
    threads: int = 1
    small: bool = False
    seed: int = 0
    jobs: int = 1

    @property
    def pool_sizes(self) -> pools.PoolSizes:
        """How many scenes are rendered."""
        return pools.PoolSizes(looks=400, clips=200, sounds=200) if self.small else pools.PoolSizes()


@dataclass(frozen=True)
class Run:
    """One training run: where it works, what it writes, and how its steps are shortened."""

    folder: Path
    weights: Path
    sizes: pools.PoolSizes
    num_steps: int | None = None
    max_minutes: float | None = None
    seed: int = 0
    logs_every_step: bool = False

    @property
    def cache(self) -> Path:
        """Where rendered and encoded pools are kept."""
        return self.folder / "pools"

    def config(self, step: str) -> FitConfig:
        """Return the recipe of a step, as shortened by the options."""
        recipe = RECIPES[step]
        steps = self.num_steps if self.num_steps is not None else recipe.num_steps
        config = replace(recipe, num_steps=steps, max_minutes=self.max_minutes, seed=self.seed)
        return replace(config, log_every_steps=1) if self.logs_every_step else config

    def as_it_stands(self) -> Run:
        """Return this run without further training: every step gives what its checkpoint holds."""
        return replace(self, num_steps=1, max_minutes=None)


def run_of(weights: Path, options: TrainOptions) -> Run:
    """Return the run that the options name."""
    name = f"{weights.name}-seed-{options.seed}" if options.seed else weights.name
    return Run(
        options.runs / name,
        weights,
        options.pool_sizes,
        options.num_steps,
        options.max_minutes,
        options.seed,
    )


def run(stage: str, weights: Path, options: TrainOptions) -> None:
    """Run one step, ``adopt``, ``export``, or ``all``.

    Args:
        stage: a key of ``RECIPES``, ``adopt``, ``export`` or ``all``.
        weights: the preset's folder of weights; only ``export`` and ``all`` write there.
        options: where to work, and how long.

    Raises:
        ValueError: for an unknown stage; the message lists the known ones.

    """
    known = (*RECIPES, "adopt", "export", "all")
    if stage not in known:
        raise ValueError(
            f"There is no stage {stage!r}; expected one of {', '.join(known)}, ablations, link-designs, "
            "bridge."
        )
    torch.set_num_threads(options.threads)
    work = run_of(weights, options)
    began = time.monotonic()
    if stage == "adopt":
        adopt(weights, work.folder, untrained_bridges, LORA)
        print(f"adopt: {work.folder} goes on from {weights}")
        return
    if stage == "all":
        pools.render(work.cache, work.sizes)
        print(f"pools: {time.monotonic() - began:.0f} s")
        one_step = partial(run, weights=weights, options=options)
        run_in_order(NEEDS, one_step, options.jobs, work.folder / "logs")
    elif stage != "export":
        train_step(stage, work)
        plot = plot_losses(work.folder / stage)
        print(f"{stage}: {time.monotonic() - began:.0f} s, losses in {plot}")
    if stage in ("all", "export"):
        export(work)
        print(f"export: wrote {weights}; {time.monotonic() - began:.0f} s in all")


def train_step(step: str, work: Run) -> None:
    """Train one step of a run, from where it stands; the same seed gives the same weights."""
    torch.manual_seed(work.seed)
    _STEPS[step](work)


def _picture_autoencoder(work: Run) -> PatchAutoencoderKL:
    step = "picture-autoencoder"
    model = train_picture_autoencoder(work.cache, work.folder / step, work.config(step), work.sizes)
    model.save_pretrained(work.folder / step / "vae")
    return model


def _spectrogram_autoencoder(work: Run) -> PatchAutoencoderKL:
    step = "spectrogram-autoencoder"
    model = train_spectrogram_autoencoder(work.cache, work.folder / step, work.config(step), work.sizes)
    model.save_pretrained(work.folder / step / "vae")
    return model


def _captions(work: Run, kind: Kind) -> CaptionEncoder:
    step = f"{kind}-captions"
    return train_caption_encoder(kind, work.folder / step, work.config(step)).eval().requires_grad_(False)


def _trained_captions(work: Run, kind: Kind) -> CaptionEncoder:
    """Return the text encoder as its own step left it, whatever length was asked of the step at hand."""
    if not (work.folder / f"{kind}-captions" / "checkpoint.pt").is_file():
        raise ValueError(
            f"The text encoder of {kind}s is missing. First run `patchbay train {kind}-captions`."
        )
    return _captions(work.as_it_stands(), kind)


def _autoencoder_of(work: Run, kind: Kind) -> PatchAutoencoderKL:
    step = "spectrogram-autoencoder" if kind == "sound" else "picture-autoencoder"
    folder = work.folder / step / "vae"
    if not folder.is_dir():
        raise ValueError(f"{folder} is missing. First run `patchbay train {step}`.")
    vae: PatchAutoencoderKL = PatchAutoencoderKL.from_pretrained(folder)
    return vae


def _denoiser(work: Run, kind: Kind) -> ConditionedDenoiser:
    vae = _autoencoder_of(work, kind)
    encode = encoder_of(vae, "mels" if kind == "sound" else "pixels")
    pool: Mapping[Kind, Callable[[], NDArray[np.generic]]] = {
        "look": lambda: pools.look_pixels(work.cache, work.sizes.looks),
        "clip": lambda: pools.clip_pixels(work.cache, work.sizes.clips),
        "sound": lambda: pools.sound_mels(work.cache, work.sizes.sounds),
    }
    rows = pool[kind]()
    latents = pools.encoded(work.cache / f"latents-{kind}-{len(rows)}.npy", rows, encode, 16)
    step = f"{kind}-denoiser"
    return train_denoiser(
        kind, _trained_captions(work, kind), latents, work.folder / step, work.config(step),
        _trained_pictures(work) if kind == "clip" else None,
        late_sounds(work.cache, pools.sound_mels(work.cache, work.sizes.sounds), encode, WIDTH)
        if kind == "sound" else None,
    )  # fmt: skip


def _trained_pictures(work: Run) -> UNet2DConditionModel:
    """Return the denoiser of pictures as its own step left it."""
    if not (work.folder / "look-denoiser" / "checkpoint.pt").is_file():
        raise ValueError("The denoiser of pictures is missing. First run `patchbay train look-denoiser`.")
    denoiser = _denoiser(work.as_it_stands(), "look").denoiser
    return cast(UNet2DConditionModel, denoiser)


def _imagebind(work: Run) -> ImageBindEncoder:
    step = "imagebind"
    encoder = train_imagebind(work.cache, work.folder / step, work.config(step), work.sizes, _own_media(work))
    encoder.save_pretrained(work.folder / step / "encoder", torch.float32)
    return encoder


def _own_media(work: Run) -> dict[Kind, OwnMedia]:
    """Return what the trained decoders make, and late sounds; what was made before is read from disk."""

    def load(kind: Kind) -> LatentDecoder:
        folder = work.folder / "own-media" / kind
        export_decoder(kind, _denoiser(work.as_it_stands(), kind), _autoencoder_of(work, kind), folder)
        return DECODERS[MODALITIES[kind]].load(folder)

    own = {
        kind: made(partial(load, kind), kind, pools.scenes(kind, work.sizes.own[kind]), work.cache)
        for kind in MODALITIES
    }
    return own | {"sound": also_late(own["sound"], pools.sound_samples(work.cache, work.sizes.sounds))}


def _language(work: Run) -> LanguageModel:
    model = train_base(work.folder / "language", work.config("language"))
    model.save_pretrained(work.folder / "language" / "llm")
    return model


def untrained_bridges(base: Path) -> Aligned:
    """Return the trained base with fresh projectors, signal rows and output projections."""
    llm = LanguageModel.from_pretrained(base)
    llm.add_projectors(
        {
            modality: ProjectorConfig(
                kind="resampler", encoder_width=128, llm_width=llm.width, num_queries=QUERIES, grid=grid
            )
            for modality, grid in GRIDS.items()
        }
    )
    projections = {
        modality: OutputProjection(
            OutputProjectionConfig(
                llm_width=llm.width, out_width=WIDTH, hidden_width=96, ffn_width=256,
                num_encoder_layers=1, num_decoder_layers=2,
                num_queries=1 if modality is Modality.AUDIO else CAPTION_TOKENS, copy_gate=True,
            )
        )
        for modality in MODALITIES.values()
    }  # fmt: skip
    return Aligned(llm, projections)


def _stage(work: Run, name: str) -> Aligned:
    model = unaligned(work)
    order = list(STAGES)
    for earlier in order[: order.index(name)]:
        restore(model, work.folder / earlier)
    if name == "instruction":
        model.llm.add_lora(LORA)
    train_stage(work, model, STAGES[name], work.folder / name, work.config(name))
    return model


def unaligned(work: Run) -> Aligned:
    """Return what the stages of a run begin with: its base, with fresh bridges."""
    base = work.folder / "language" / "llm"
    if not base.is_dir():
        raise ValueError(f"{base} is missing. First run `patchbay train language`.")
    return untrained_bridges(base)


def train_stage(work: Run, model: Aligned, stage: Stage, folder: Path, config: FitConfig) -> None:
    """Train one stage of a run in place, with its encoder, its media and its text encoders."""
    encoder = work.folder / "imagebind" / "encoder"
    if not encoder.is_dir():
        raise ValueError(f"{encoder} is missing. First run `patchbay train imagebind`.")
    encoded = encode_pools(
        ImageBindEncoder.from_pretrained(encoder), work.cache, work.sizes, _own_media(work)
    )
    # A stage of words alone needs no text encoders.
    targets = text_targets(work) if stage.distance else {}
    run_stage(
        stage, model,
        lambda step: sample_dialogues(
            config.randomness(step), stage.directions, encoded, STAGE_BATCHES[stage.name]
        ),
        targets, folder, config,
    )  # fmt: skip


def text_targets(work: Run) -> CaptionTargets:
    """Return what the decoders' own text encoders make of captions, for each modality."""
    return {modality: _as_tokens(_trained_captions(work, kind)) for kind, modality in MODALITIES.items()}


def frozen_decoder(
    work: Run, kind: Kind
) -> tuple[ConditionedDenoiser, Callable[[torch.Tensor], torch.Tensor]]:
    """Return the trained denoiser of a kind, and the function from rows of its pool to its latents."""
    denoiser = _denoiser(work.as_it_stands(), kind).eval().requires_grad_(False)
    return denoiser, encoder_of(_autoencoder_of(work, kind), "mels" if kind == "sound" else "pixels")


def _as_tokens(encoder: CaptionEncoder) -> Callable[[Sequence[str]], torch.Tensor]:
    def embed(captions: Sequence[str]) -> torch.Tensor:
        states: torch.Tensor = encoder(captions)
        return states if states.ndim == 3 else states[:, None]  # (N, Q, E)

    return embed


def restore(model: Aligned, folder: Path) -> None:
    """Load what an earlier stage trained: its averaged parameters."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        raise ValueError(f"{path} is missing. First run `patchbay train {folder.name}`.")
    state = torch.load(path, weights_only=True, map_location="cpu")
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in state["average"].items():
            own[name].copy_(value)


def export(work: Run) -> None:
    """Write every part into the preset's folder of weights, in half precision."""
    whole = work.as_it_stands()
    for kind, modality in MODALITIES.items():
        export_decoder(
            kind, _denoiser(whole, kind), _autoencoder_of(whole, kind), work.weights / str(modality)
        )
    shared = work.weights / str(Modality.VIDEO) / "vae"  # the very same autoencoder: once on disk is enough
    shutil.rmtree(shared)
    shared.symlink_to(Path("..") / str(Modality.IMAGE) / "vae")
    export_encoder(
        ImageBindEncoder.from_pretrained(work.folder / "imagebind" / "encoder"), work.weights / "encoder"
    )
    export_aligned(_stage(whole, "instruction"), work.weights)


_STEPS: Mapping[str, Callable[[Run], object]] = {
    "picture-autoencoder": _picture_autoencoder,
    "spectrogram-autoencoder": _spectrogram_autoencoder,
    "look-captions": lambda work: _captions(work, "look"),
    "clip-captions": lambda work: _captions(work, "clip"),
    "sound-captions": lambda work: _captions(work, "sound"),
    "look-denoiser": lambda work: _denoiser(work, "look"),
    "clip-denoiser": lambda work: _denoiser(work, "clip"),
    "sound-denoiser": lambda work: _denoiser(work, "sound"),
    "imagebind": _imagebind,
    "language": _language,
    "encoder-side": lambda work: _stage(work, "encoder-side"),
    "decoder-side": lambda work: _stage(work, "decoder-side"),
    "instruction": lambda work: _stage(work, "instruction"),
}
