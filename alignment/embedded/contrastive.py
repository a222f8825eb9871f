"""The small ImageBind: pictures, clips and sounds are drawn to what is said of them.

Three contrasts are trained together. The usual one (Girdhar et al. 2023, section 3): among the
captions of a batch, find one's own. One within each attribute: among the phrases that name its
values ("something red", "something blue", ...), find the true one; it leaves no attribute unlearnt
merely because the others already tell a batch apart. And the same for every single patch in which
something is seen or heard: without it, shapes stayed at chance for as long as we waited, since the
gradient has to find them through one class token. Language models read the patches, too.

Combinations that training never meets invite a shortcut: from a thing, its pitch and its tempo one can guess
which counts come into question. So a share of each batch hides some attributes: pictures and clips without
colour, and duets of two things that sound together, which are asked only for what is still there.

Shape letters in this file:
    B batch   S clips   L patches   E embedding width   V values of an attribute   A active patches
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from alignment.embedded import pools
from alignment.embedded.captions import CAPTION_TOKENS, CLASSES, SAMPLERS, Kind, spoken
from alignment.fitting import FitConfig, fit, half_precision, training_device
from alignment.toybox import world
from alignment.toybox.draw import draw_look
from alignment.toybox.grammar import describe, phrase
from alignment.toybox.world import Scene, sample_look
from encoders.imagebind import ImageBind
from encoders.imagebind_config import ImageBindConfig
from encoders.imagebind_encoder import ImageBindEncoder
from encoders.media import Audio, Image, Video
from encoders.preprocess import PreprocessConfig
from encoders.text_tokens import TextTokens
from llm.projectors import grid_code

JUDGED: Mapping[Kind, tuple[str, ...]] = {
    "look": ("thing", "colour", "size", "count", "place", "ground"),
    "clip": ("thing", "colour", "size", "ground", "motion", "tempo"),
    "sound": ("thing", "pitch", "count", "tempo", "loudness"),
}
TOWER: Mapping[Kind, str] = {"look": "vision", "clip": "vision", "sound": "audio"}
BATCH: Mapping[Kind, int] = {"look": 64, "clip": 16, "sound": 48}
POSITION_SCALE = 0.7
EASY_STEPS = 700  # so long do big things in the middle of a white ground become rarer
HIDDEN_SHARE = 0.25
HIDDEN: Mapping[Kind, tuple[str, ...]] = {
    "look": ("colour", "ground"), "clip": ("colour", "ground"), "sound": ("thing", "pitch"),
}  # fmt: skip
CYCLE: tuple[Kind, ...] = ("look", "clip", "sound", "look", "clip", "look", "clip", "sound", "look", "clip")


def kept_tokens(folder: Path) -> TextTokens:
    """Return the vocabulary in ``folder``, learning it from the grammar on the first call."""
    if not (folder / "tokenizer.json").is_file():
        rng = random.Random("encoder-vocabulary")
        texts = [describe(SAMPLERS[kind](rng), rng) for _ in range(3000) for kind in JUDGED]
        folder.mkdir(parents=True, exist_ok=True)
        TextTokens.train(texts, vocabulary_size=900, context_length=CAPTION_TOKENS).save(folder)
    return TextTokens.load(folder, CAPTION_TOKENS)


def build_encoder(tokens: TextTokens) -> ImageBindEncoder:
    """Return the untrained encoder of the embedded model."""
    sizes = ImageBindConfig.toybox(tokens.vocabulary_size)
    assert sizes.text is not None
    sizes = replace(sizes, text=replace(sizes.text, context_length=CAPTION_TOKENS))
    model = ImageBind(sizes)
    assert sizes.vision is not None
    assert sizes.audio is not None
    for tower, config in (("vision", sizes.vision), ("audio", sizes.audio)):
        positions = model.get_parameter(f"modality_preprocessors.{tower}.pos_embedding_helper.pos_embed")
        _lay_positions(positions, config.grid)
    return ImageBindEncoder(model, PreprocessConfig.toybox(), tokens)


@torch.no_grad()
def _lay_positions(embedding: nn.Parameter, grid: tuple[int, int]) -> None:
    """Start position embeddings ``(1, 1 + rows * columns, D)`` from sinusoids, so that neighbours are alike.

    From small random ones, places stayed at chance for as long as we waited.
    """
    rows, columns = grid
    embedding.zero_()
    embedding[0, 1:] = POSITION_SCALE * grid_code(rows * columns, (columns,), embedding.shape[2], base=100.0)


def train_imagebind(cache: Path, folder: Path, config: FitConfig, sizes: pools.PoolSizes) -> ImageBindEncoder:
    """Train vision, audio and text towers from nothing, one kind of medium per step."""
    encoder = build_encoder(kept_tokens(folder / "tokenizer"))
    model, tokenise = encoder.model.train(), encoder.tokens
    assert tokenise is not None
    take = _inputs(encoder, cache, sizes)

    def easy_looks(rng: random.Random, number: int) -> tuple[Tensor, list[Scene]]:
        scenes = [sample_look(rng, size="big", place="middle", ground="white") for _ in range(number)]
        return encoder.prepare([Image(draw_look(scene, rng)) for scene in scenes]), list(scenes)

    number: dict[Kind, int] = {"look": sizes.looks, "clip": sizes.clips, "sound": sizes.sounds}
    listed = {kind: pools.scenes(kind, number[kind]) for kind in JUDGED}
    shares = {kind: pools.shares(scenes) for kind, scenes in listed.items()}
    alike: dict[tuple[object, ...], list[int]] = {}
    for index, scene in enumerate(listed["sound"]):
        alike.setdefault(_rest(scene), []).append(index)

    def losses(step: int) -> dict[str, Tensor]:
        kind = CYCLE[step % len(CYCLE)]
        rng = config.randomness(step)
        chosen = sorted(rng.choices(range(number[kind]), cum_weights=shares[kind], k=BATCH[kind]))
        scenes = [listed[kind][i] for i in chosen]
        batch = take[kind](chosen)
        easy = int(len(chosen) * (1 - step / EASY_STEPS)) if kind == "look" else 0
        if easy > 0:
            simple, named = easy_looks(rng, easy)
            batch, scenes = torch.cat([simple, batch[easy:]]), named + scenes[easy:]
        hidden = torch.rand(len(scenes), generator=config.noise(step)) < HIDDEN_SHARE  # (B,)
        partners = [rng.choice(alike[_rest(scene)]) for scene in scenes] if kind == "sound" else []
        batch = hide(batch, hidden, take["sound"](partners) if partners else None)
        batch, hidden = batch.to(training_device()), hidden.to(training_device())
        with half_precision():
            tokens = F.normalize(model.embed_tokens({TOWER[kind]: batch})[TOWER[kind]].float(), dim=-1)
            tokens = tokens if tokens.ndim == 4 else tokens[:, None]  # (B, S, 1 + L, E)
            media = F.normalize(tokens[:, :, 0].mean(1), dim=-1)  # (B, E)
            whole = [scene for scene, hides in zip(scenes, hidden.tolist(), strict=True) if not hides]
            contrast = _caption_contrast(model, tokenise, media[~hidden], whole, rng)
            active = active_patches(batch, kind)  # (B, S, L)
            within = _attribute_contrasts(
                model, tokenise, media, tokens[:, :, 1:], active, hidden, scenes, kind, rng
            )
        return {f"{kind} captions": contrast, **within}

    fit("imagebind", model, losses, config, folder)
    model.eval().requires_grad_(False)
    return encoder


def hide(batch: Tensor, hidden: Tensor, partners: Tensor | None) -> Tensor:
    """Return prepared media of which some rows show less.

    Args:
        batch: the input of a tower: pictures ``(B, 3, H, W)``, clips ``(B, S, 3, F, H, W)`` or filter banks
            ``(B, S, 1, M, T)``.
        hidden: which rows, ``(B,)`` bool.
        partners: for sounds, one for each row that is played with it, like ``batch``. Without, the rows
            lose their colours.

    """
    colours = 1 if batch.ndim == 4 else 2
    if partners is None:
        less = batch.mean(colours, keepdim=True).expand_as(batch)
    else:
        less = torch.maximum(batch, partners)  # of log energies, the louder one is nearly their sum
    return torch.where(hidden.view(-1, *(1 for _ in batch.shape[1:])), less, batch)


def _rest(scene: Scene) -> tuple[object, ...]:
    """Return what is still heard of a sound when its thing and pitch are hidden."""
    return tuple(getattr(scene, name) for name in JUDGED["sound"] if name not in HIDDEN["sound"])


def _inputs(
    encoder: ImageBindEncoder, cache: Path, sizes: pools.PoolSizes
) -> dict[Kind, Callable[[list[int]], Tensor]]:
    """Return, for each kind, the function from pool indices to the input of its tower."""
    looks = pools.look_pixels(cache, sizes.looks)
    clips = pools.clip_pixels(cache, sizes.clips)
    banks = sound_banks(encoder, cache, sizes.sounds)
    return {
        "look": lambda chosen: encoder.prepare([Image(looks[i]) for i in chosen]),
        "clip": lambda chosen: encoder.prepare([Video(clips[i], world.VIDEO_FPS) for i in chosen]),
        "sound": lambda chosen: torch.from_numpy(banks[chosen].astype(np.float32)),
    }


def sound_banks(encoder: ImageBindEncoder, cache: Path, number: int) -> NDArray[np.float16]:
    """Return the prepared filter banks ``(N, 1, 1, mel bins, frames)`` of the sound pool."""
    samples = pools.sound_samples(cache, number)

    def prepare(batch: Tensor) -> Tensor:
        return encoder.prepare([Audio(row.numpy() / np.float32(32767), world.AUDIO_RATE_HZ) for row in batch])

    return pools.encoded(cache / f"banks-{number}.npy", samples, prepare)


def _texts(model: ImageBind, tokenise: TextTokens, texts: list[str]) -> Tensor:
    tokens = tokenise(texts).to(training_device())
    vectors: Tensor = model({"text": tokens})["text"].float()  # (B, E), scaled by the text tower
    return vectors


def _caption_contrast(
    model: ImageBind, tokenise: TextTokens, media: Tensor, scenes: list[Scene], rng: random.Random
) -> Tensor:
    texts = _texts(model, tokenise, [spoken(scene, rng) for scene in scenes])
    logits = media @ texts.T  # (B, B)
    own = torch.arange(len(scenes), device=media.device)
    return 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own))


def active_patches(batch: Tensor, kind: Kind) -> Tensor:
    """Return which patches show or sound something: ``(B, S, L)`` bool, from prepared tower inputs."""
    side = 16 if kind == "sound" else 8
    clips = batch if kind != "look" else batch[:, None, :, None]  # (B, S, 3, F, H, W) or (B, S, 1, M, T)
    planes = clips.flatten(2, -3) if kind != "sound" else clips.flatten(2, 2)  # (B, S, C, H, W)
    cells = F.unfold(planes.flatten(0, 1), side, stride=side)  # (B * S, C * side**2, L)
    if kind == "sound":
        level = cells.mean(1)  # (B * S, L)
        low, high = level.amin(1, keepdim=True), level.amax(1, keepdim=True)
        found = level > low + 0.4 * (high - low)
    else:
        found = cells.unflatten(1, (planes.shape[2], -1)).std(2).amax(1) > 0.3  # (B * S, L)
    active: Tensor = found.unflatten(0, clips.shape[:2])  # (B, S, L)
    return active


def _attribute_contrasts(
    model: ImageBind,
    tokenise: TextTokens,
    media: Tensor,
    patches: Tensor,
    active: Tensor,
    hidden: Tensor,
    scenes: list[Scene],
    kind: Kind,
    rng: random.Random,
) -> dict[str, Tensor]:
    names = JUDGED[kind]
    phrases = [phrase(name, v, rng, heard=kind == "sound") for name in names for v in CLASSES[name]]
    texts = _texts(model, tokenise, phrases).split([len(CLASSES[name]) for name in names])
    losses = {}
    for name, values in zip(names, texts, strict=True):
        truth = torch.tensor(
            [CLASSES[name].index(getattr(scene, name)) for scene in scenes], device=media.device
        )
        shown = ~hidden if name in HIDDEN[kind] else torch.ones_like(hidden)  # (B,)
        asked = active & shown[:, None, None]  # (B, S, L)
        owner = asked.nonzero()[:, 0]  # (A,)
        losses[f"{kind} {name}"] = F.cross_entropy(media[shown] @ values.T, truth[shown])  # over (B, V)
        losses[f"{kind} {name} patches"] = F.cross_entropy(patches[asked] @ values.T, truth[owner])
    return losses
