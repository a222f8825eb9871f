"""The small ImageBind: pictures, clips and sounds are drawn to what is said of them.

Three contrasts are trained together. The usual one (Girdhar et al. 2023, section 3): among the
captions of a batch, find one's own. One within each attribute: among the phrases that name its
values ("something red", "something blue", ...), find the true one; it leaves no attribute unlearnt
merely because the others already tell a batch apart. And the same for every single patch in which
something is seen or heard: without it, shapes stayed at chance for as long as we waited, since the
gradient has to find them through one class token. Language models read the patches, too.

Combinations that training never meets invite a shortcut: from a thing, its pitch and its tempo one can guess
which counts come into question. So a share of each batch hides some attributes: pictures and clips without
colour, duets of two things that sound together, and sounds between two pitches and two tempos; they are asked
only for what is still there. How often something sounds is asked of such sounds alone.

Media that the decoders made are among those of the pools, since people go on with what they were given.

Shape letters in this file:
    B batch   S clips   L patches   E embedding width   V values of an attribute   A active patches
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from alignment.embedded import pools
from alignment.embedded.captions import CAPTION_TOKENS, CLASSES, SAMPLERS, Kind, spoken
from alignment.embedded.disguises import ASKED_OF_DISGUISED, OF_DUETS, disguised_sounds, without_colour
from alignment.embedded.own_media import OWN_SHARE, OwnMedia
from alignment.embedded.pools import Number
from alignment.fitting import FitConfig, fit, half_precision, training_device
from alignment.toybox import world
from alignment.toybox.draw import draw_look
from alignment.toybox.grammar import describe, phrase
from alignment.toybox.world import Scene, Sound, sample_look
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


def train_imagebind(
    cache: Path, folder: Path, config: FitConfig, sizes: pools.PoolSizes, own: Mapping[Kind, OwnMedia]
) -> ImageBindEncoder:
    """Train vision, audio and text towers from nothing, one kind of medium per step."""
    encoder = build_encoder(kept_tokens(folder / "tokenizer"))
    model, tokenise = encoder.model.train(), encoder.tokens
    assert tokenise is not None
    if training_device().type == "cpu":
        model.prefer_plain_attention()
    take = _inputs(encoder, cache, sizes, own)

    def easy_looks(rng: random.Random, number: int) -> tuple[Tensor, list[Scene]]:
        scenes = [sample_look(rng, size="big", place="middle", ground="white") for _ in range(number)]
        return encoder.prepare([Image(draw_look(scene, rng)) for scene in scenes]), list(scenes)

    number: dict[Kind, int] = {"look": sizes.looks, "clip": sizes.clips, "sound": sizes.sounds}
    listed = {kind: [*pools.scenes(kind, number[kind]), *own[kind].scenes] for kind in JUDGED}
    shares = {kind: _shares(scenes, len(own[kind].scenes)) for kind, scenes in listed.items()}
    partners = Partners(listed["sound"], own["sound"].num_late)

    def losses(step: int) -> dict[str, Tensor]:
        kind = CYCLE[step % len(CYCLE)]
        rng, noise = config.randomness(step), config.noise(step)
        chosen = sorted(rng.choices(range(len(listed[kind])), cum_weights=shares[kind], k=BATCH[kind]))
        scenes = [listed[kind][i] for i in chosen]
        batch = take[kind](chosen)
        easy = int(len(chosen) * (1 - step / EASY_STEPS)) if kind == "look" else 0
        if easy > 0:
            simple, named = easy_looks(rng, easy)
            batch, scenes = torch.cat([simple, batch[easy:]]), named + scenes[easy:]
        if kind == "sound":
            others = [partners.draw(i, rng) for i in chosen]
            less = disguised_sounds(batch, scenes, take[kind](others), noise)
        else:
            less = without_colour(batch, noise)
        batch, plain = less.media.to(training_device()), less.plain.tolist()
        with half_precision():
            tokens = F.normalize(model.embed_tokens({TOWER[kind]: batch})[TOWER[kind]].float(), dim=-1)
            tokens = tokens if tokens.ndim == 4 else tokens[:, None]  # (B, S, 1 + L, E)
            media = F.normalize(tokens[:, :, 0].mean(1), dim=-1)  # (B, E)
            whole = [scene for scene, told in zip(scenes, plain, strict=True) if told]
            contrast = _caption_contrast(model, tokenise, media[plain], whole, rng)
            active = active_patches(batch, kind)  # (B, S, L)
            within = _attribute_contrasts(
                model, tokenise, media, tokens[:, :, 1:], active, less.shown, scenes, kind, rng
            )
        return {f"{kind} captions": contrast, **within}

    fit("imagebind", model, losses, config, folder)
    model.eval().requires_grad_(False)
    return encoder


class Partners:
    """For each of ``sounds``, those that may be played with it in a duet: they may differ in thing and pitch.

    The last ``num_late`` have no partner but themselves: another one would sound at other times.
    """

    def __init__(self, sounds: Sequence[Scene], num_late: int = 0) -> None:
        self._sounds, self._on_time = sounds, len(sounds) - num_late
        self._alike: dict[tuple[object, ...], list[int]] = {}
        for index, scene in enumerate(sounds[: self._on_time]):
            self._alike.setdefault(_rest(scene), []).append(index)

    def draw(self, index: int, rng: random.Random) -> int:
        """Return the partner of a sound."""
        return rng.choice(self._alike[_rest(self._sounds[index])]) if index < self._on_time else index


def _rest(scene: Scene) -> tuple[object, ...]:
    """Return what two sounds of a duet have in common."""
    return tuple(getattr(scene, name) for name in JUDGED["sound"] if name not in OF_DUETS)


def _shares(scenes: Sequence[Scene], own: int) -> list[float]:
    """Return the shares of a pool of which the last ``own`` scenes were made by a decoder, added up."""
    first = len(scenes) - own
    rendered, made = pools.shares(scenes[:first]), pools.shares(scenes[first:])
    if not made:
        return rendered
    scale = OWN_SHARE / (1 - OWN_SHARE) * rendered[-1] / made[-1]
    return [*rendered, *(rendered[-1] + scale * share for share in made)]


def _inputs(
    encoder: ImageBindEncoder, cache: Path, sizes: pools.PoolSizes, own: Mapping[Kind, OwnMedia]
) -> dict[Kind, Callable[[list[int]], Tensor]]:
    """Return, for each kind, the function from indices to the input of its tower; own media come last."""
    looks = pools.look_pixels(cache, sizes.looks)
    clips = pools.clip_pixels(cache, sizes.clips)
    banks = sound_banks(encoder, cache, sizes.sounds)
    made = own["sound"].rows
    heard = [_banks(encoder, torch.from_numpy(made[i : i + 64])) for i in range(0, len(made), 64)]
    own_banks = np.concatenate([banks[:0], *(part.numpy().astype(np.float16) for part in heard)])
    return {
        "look": lambda chosen: encoder.prepare([Image(_row(looks, own["look"].rows, i)) for i in chosen]),
        "clip": lambda chosen: encoder.prepare(
            [Video(_row(clips, own["clip"].rows, i), world.VIDEO_FPS) for i in chosen]
        ),
        "sound": lambda chosen: torch.from_numpy(
            np.stack([_row(banks, own_banks, i) for i in chosen]).astype(np.float32)
        ),
    }


def _row(rendered: NDArray[Number], made: NDArray[Number], index: int) -> NDArray[Number]:
    row: NDArray[Number] = rendered[index] if index < len(rendered) else made[index - len(rendered)]
    return row


def sound_banks(encoder: ImageBindEncoder, cache: Path, number: int) -> NDArray[np.float16]:
    """Return the prepared filter banks ``(N, 1, 1, mel bins, frames)`` of the sound pool."""
    samples = pools.sound_samples(cache, number)

    return pools.encoded(cache / f"banks-{number}.npy", samples, lambda batch: _banks(encoder, batch))


def _banks(encoder: ImageBindEncoder, samples: Tensor) -> Tensor:
    """Turn 16-bit samples ``(B, L)`` into prepared filter banks."""
    sounds = [Audio(row.numpy() / np.float32(32767), world.AUDIO_RATE_HZ) for row in samples]
    return encoder.prepare(sounds)


def _texts(model: ImageBind, tokenise: TextTokens, texts: list[str]) -> Tensor:
    tokens = tokenise(texts).to(training_device())
    vectors: Tensor = model({"text": tokens})["text"].float()  # (B, E), scaled by the text tower
    return vectors


def _caption_contrast(
    model: ImageBind, tokenise: TextTokens, media: Tensor, scenes: list[Scene], rng: random.Random
) -> Tensor:
    texts = _texts(model, tokenise, [_said(scene, rng) for scene in scenes])
    logits = media @ texts.T  # (B, B)
    own = torch.arange(len(scenes), device=media.device)
    return 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own))


def _said(scene: Scene, rng: random.Random) -> str:
    return describe(scene, rng, ASKED_OF_DISGUISED) if isinstance(scene, Sound) else spoken(scene, rng)


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
    shown: Mapping[str, Tensor],
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
        told = shown.get(name, torch.ones(len(media), dtype=torch.bool)).to(media.device)  # (B,)
        asked = active & told[:, None, None]  # (B, S, L)
        owner = asked.nonzero()[:, 0]  # (A,)
        losses[f"{kind} {name}"] = F.cross_entropy(media[told] @ values.T, truth[told])  # over (B, V)
        losses[f"{kind} {name} patches"] = F.cross_entropy(patches[asked] @ values.T, truth[owner])
    return losses
