"""What reusing deep features gains in time and costs in Toybox accuracy, setting by setting.

A setting n computes the deep features of the U-Net in every n-th denoising step. Both sides are the
same decoder; the peer computes everything in every step. Accuracy is that of the decoder on captions of
unseen draws of Toybox, read by its own text encoder: the share of media in which the judge finds every
attribute of the caption.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from statistics import median

from diffusers import UNet2DConditionModel, UNet3DConditionModel

from alignment.toybox.exercise import FreshScenes, judged
from alignment.toybox.grammar import caption
from alignment.toybox.media import judge, to_bytes
from alignment.toybox.world import Scene
from decoders.condition import Condition
from decoders.latent_decoder import LatentDecoder
from decoders.settings import DecodeSettings
from encoders.media import Modality
from services.bench import BenchRow

SETTINGS, QUICK_SETTINGS = (2, 3, 5), (2, 3)
SAMPLES, QUICK_SAMPLES = 200, 8
BATCH = 16
WHOLE = "every step whole"


def measure(decoder: LatentDecoder, quick: bool) -> list[BenchRow]:
    """Measure one decoder; none at all if its network has no features that could be reused."""
    network = getattr(decoder, "_network", None)
    unets = UNet2DConditionModel | UNet3DConditionModel
    if not isinstance(network, unets) or len(network.config.up_block_types) < 2:  # type: ignore[union-attr]
        return []
    settings = QUICK_SETTINGS if quick else SETTINGS
    scenes = draw_scenes(decoder.modality, QUICK_SAMPLES if quick else SAMPLES)
    conditions = [decoder.encode_caption(caption(scene)) for scene in scenes]
    seconds: dict[int, list[float]] = {every: [] for every in (1, *settings)}
    right = dict.fromkeys(seconds, 0)
    for start in range(0, len(scenes), BATCH):
        part = slice(start, start + BATCH)
        for every in seconds:
            spent, verdicts = _made(decoder, conditions[part], scenes[part], start, every)
            seconds[every].append(spent / len(verdicts))
            right[every] += sum(verdicts)
    alone: dict[int, list[float]] = {every: [] for every in seconds}
    for number in range(2 if quick else 9):
        for every in alone:
            spent, _ = _made(decoder, conditions[:1], [], number, every)
            alone[every].append(spent)
    name, rows = decoder.modality.value, []
    for every in settings:
        for case, times in ((f"{name} 1 at once", alone), (f"{name} {BATCH} at once", seconds)):
            rates = [1 / median(times[one]) for one in (every, 1)]
            rows.append(BenchRow(f"{case}, deep_every {every}", rates[0], "media/s", WHOLE, rates[1]))
        shares = [right[one] / len(scenes) for one in (every, 1)]
        rows.append(BenchRow(f"{name} accuracy, deep_every {every}", shares[0], "right", WHOLE, shares[1]))
    return rows


def draw_scenes(modality: Modality, count: int) -> list[Scene]:
    """Return scenes of the whole world, the same ones every time."""
    scenes = FreshScenes(random.Random(f"bench-caching-{modality.value}"))
    draw: dict[Modality, Callable[[], Scene]] = {
        Modality.IMAGE: scenes.look,
        Modality.VIDEO: scenes.clip,
        Modality.AUDIO: scenes.sound,
    }
    return [draw[modality]() for _ in range(count)]


def _made(
    decoder: LatentDecoder, conditions: list[Condition], scenes: list[Scene], seed: int, every: int
) -> tuple[float, list[bool]]:
    """Make media; return the seconds that took and, for each scene, whether all of it can be found."""
    wishes = [DecodeSettings(seed=seed + i, deep_every=every) for i in range(len(conditions))]
    began = time.perf_counter()
    made = decoder.decode_batch(conditions, wishes)
    seconds = time.perf_counter() - began
    found = [judge(to_bytes(one.medium)) for one, _ in zip(made, scenes, strict=False)]
    return seconds, [_right(scene, seen) for scene, seen in zip(scenes, found, strict=True)]


def _right(scene: Scene, seen: Mapping[str, object]) -> bool:
    return all(seen.get(name) == getattr(scene, name) for name in judged(scene))
