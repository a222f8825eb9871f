import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from alignment.embedded import own_media, pools
from alignment.embedded.captions import Kind
from alignment.embedded.dialogues import MODALITY_OF, PoolScenes, encode_pools
from alignment.embedded.own_media import MOST_EDITS, OwnMedia, edited, made
from alignment.toybox.draw import draw_look
from alignment.toybox.grammar import caption
from alignment.toybox.media import render
from alignment.toybox.world import Look, Scene, attributes, sample_clip, sample_look, sample_sound
from decoders.latent_decoder import LatentDecoder
from decoders.plan import Decoded
from decoders.settings import DecodeSettings
from encoders.encoder import Encoder
from encoders.features import Features
from encoders.media import Image, Medium, Modality
from services.presets import load_preset


class Renderer:
    """A decoder that knows the scenes and what becomes of them, and ends some of them wrong."""

    def __init__(self, kind: Kind, scenes: Sequence[Scene], wrong: Sequence[int] = ()) -> None:
        self.ways = [edited(scene, f"{kind}-{i}", MOST_EDITS[kind]) for i, scene in enumerate(scenes)]
        self.known = {caption(scene): scene for way in self.ways for scene in way}
        self.wrong = {caption(self.ways[i][-1]) for i in wrong}
        self.asked: list[str] = []
        self.seeds: list[int | None] = []
        self.changes: list[Medium] = []

    def encode_caption(self, text: str) -> str:
        return text

    def decode_batch(
        self,
        conditions: Sequence[str],
        wishes: Sequence[DecodeSettings],
        *,
        originals: Sequence[Medium] | None = None,
    ) -> list[Decoded]:
        self.asked += conditions
        if originals is None:
            self.seeds += [wish.seed for wish in wishes]
        else:
            self.changes += originals
        return [Decoded(self._medium(text), {}) for text in conditions]

    def _medium(self, text: str) -> Medium:
        scene = self.known[text]
        if text in self.wrong:
            assert isinstance(scene, Look)
            scene = sample_look(random.Random(1), thing="bell" if scene.thing != "bell" else "drum")
        return render(scene, random.Random(text))

    def loaded(self) -> LatentDecoder:
        return cast(LatentDecoder, self)


def nothing_to_load() -> LatentDecoder:
    raise AssertionError("All is there: the decoder should not be loaded.")


def test_what_came_out_right_is_kept_and_nothing_else(tmp_path: Path):
    scenes: list[Scene] = [sample_look(random.Random(i)) for i in range(6)]
    renderer = Renderer("look", scenes, wrong=(1, 4))

    own = made(renderer.loaded, "look", scenes, tmp_path)

    assert own.scenes == [renderer.ways[i][-1] for i in (0, 2, 3, 5)]
    assert own.rows.shape == (4, 64, 64, 3)
    assert own.rows.dtype == np.uint8
    assert sorted(renderer.asked) == sorted(caption(scene) for way in renderer.ways for scene in way)
    assert renderer.asked[:6] == [caption(scene) for scene in scenes]
    assert len(set(renderer.seeds)) == 6


def test_some_pictures_are_changed_as_an_edit_changes_them_and_sounds_are_not(tmp_path: Path):
    looks: list[Scene] = [sample_look(random.Random(i)) for i in range(8)]
    sounds: list[Scene] = [sample_sound(random.Random(i)) for i in range(8)]
    of_looks, of_sounds = Renderer("look", looks), Renderer("sound", sounds)

    made(of_looks.loaded, "look", looks, tmp_path)
    made(of_sounds.loaded, "sound", sounds, tmp_path)

    assert len(of_looks.changes) == sum(len(way) - 1 for way in of_looks.ways) > 0
    assert all(isinstance(before, Image) for before in of_looks.changes)
    assert of_sounds.changes == []
    assert of_sounds.asked == [caption(scene) for scene in sounds]


def test_edits_change_one_thing_at_a_time_and_nothing_into_what_is_held_out():
    ways = [edited(sample_clip(random.Random(i)), f"clip-{i}", 2) for i in range(60)]

    assert {len(way) for way in ways} == {1, 2, 3}
    for way in ways:
        for before, after in pairwise(way):
            assert not after.held_out
            apart = [name for name, value in attributes(after).items() if attributes(before)[name] != value]
            assert len(apart) == 1


def test_the_preset_edits_as_own_media_were_edited():
    decoders = load_preset("toybox").decoders

    kept = {MODALITY_OF[kind]: most > 0 for kind, most in MOST_EDITS.items()}
    kept[Modality.AUDIO] = (
        True  # a new sound, that is; which in use, and not in training, is tuned to the old
    )
    assert {modality: decoder.keep_untouched for modality, decoder in decoders.items()} == kept
    assert {decoder.edit_strength for decoder in decoders.values()} == {None}


def test_rows_are_like_those_of_the_pools(tmp_path: Path):
    clips: list[Scene] = [sample_clip(random.Random(0))]
    sounds: list[Scene] = [sample_sound(random.Random(0))]

    clip = made(Renderer("clip", clips).loaded, "clip", clips, tmp_path).rows
    sound = made(Renderer("sound", sounds).loaded, "sound", sounds, tmp_path).rows

    like = pools.clip_pixels(tmp_path, 1), pools.sound_samples(tmp_path, 1)
    assert (clip.shape, sound.shape) == tuple(rows.shape for rows in like)
    assert (clip.dtype, sound.dtype) == tuple(rows.dtype for rows in like)
    assert np.abs(sound).max() > 1000


def test_what_is_made_once_is_not_made_again(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(own_media, "CHUNK", 2)
    scenes: list[Scene] = [sample_look(random.Random(i)) for i in range(5)]
    first = made(Renderer("look", scenes).loaded, "look", scenes, tmp_path)
    next(tmp_path.glob("own-look-2-*")).unlink()  # as if it had been broken off there
    renderer = Renderer("look", scenes)

    again = made(renderer.loaded, "look", scenes, tmp_path)

    assert sorted(renderer.asked) == sorted(caption(scene) for way in renderer.ways[2:4] for scene in way)
    assert again.scenes == first.scenes
    assert np.array_equal(again.rows, first.rows)
    made(nothing_to_load, "look", scenes, tmp_path)


def test_what_media_show_does_not_change_with_how_changes_are_asked_for(tmp_path: Path, monkeypatch):
    scenes: list[Scene] = [sample_look(random.Random(i)) for i in range(4)]
    first = made(Renderer("look", scenes).loaded, "look", scenes, tmp_path)
    monkeypatch.setattr(own_media, "edited", lambda scene, name, most: [sample_look(random.Random(99))])

    again = made(nothing_to_load, "look", scenes, tmp_path)

    assert again.scenes == first.scenes


def test_a_decoder_that_makes_nothing_right_leaves_an_empty_pool(tmp_path: Path):
    scenes: list[Scene] = [sample_look(random.Random(i)) for i in range(2)]

    own = made(Renderer("look", scenes, wrong=(0, 1)).loaded, "look", scenes, tmp_path)

    assert own.scenes == []
    assert own.rows.shape == (0, 64, 64, 3)


class Brightness:
    """Reads of a picture how bright it is."""

    modalities = frozenset({Modality.IMAGE})

    def encode_batch(self, media: Sequence[Medium]) -> list[Features]:
        found = []
        for medium in media:
            assert isinstance(medium, Image)
            value = torch.tensor([medium.pixels.mean() / 255], dtype=torch.float32)
            found.append(Features(Modality.IMAGE, value[None], value, (1, 1)))
        return found

    def encode(self, medium: Medium) -> Features:
        return self.encode_batch([medium])[0]


def test_dialogues_show_own_media_too(tmp_path: Path):
    sizes = pools.PoolSizes(looks=3, clips=1, sounds=1)
    scene = sample_look(random.Random(5), ground="white", size="small")
    drawn = draw_look(scene, random.Random(0))
    none = OwnMedia([], np.zeros((0, 1)))
    own: Any = {"look": OwnMedia([scene], drawn[None]), "clip": none, "sound": none}

    pool = encode_pools(cast(Encoder, Brightness()), tmp_path, sizes, own)["look"]

    assert pool.scenes == [*pools.scenes("look", 3), scene]
    assert pool.media(3).pooled.item() == np.float16(drawn.mean() / 255)
    shown = PoolScenes(random.Random(0), {"look": pool})
    assert scene in {shown.look() for _ in range(40)}
