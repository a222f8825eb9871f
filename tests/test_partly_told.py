"""Dialogues about media in disguise: only the words for what is left are learnt."""

from __future__ import annotations

import random

import numpy as np

from alignment.embedded.captions import Kind
from alignment.embedded.dialogues import HIDDEN, EncodedPool, sample_dialogues
from alignment.toybox.grammar import caption, caption_words
from alignment.toybox.world import Scene, sample_clip, sample_look, sample_sound
from llm.template import Given, MediaTokens


def pool(scene: Scene, value: float, disguised: EncodedPool | None = None) -> EncodedPool:
    tokens = np.full((1, 2, 3), value, np.float16)
    return EncodedPool([scene], tokens, tokens[:, 0], (), 0, disguised)


def test_a_caption_is_its_words() -> None:
    rng = random.Random(0)
    for scene in (sample_look(rng, count=3), sample_look(rng, count=1), sample_clip(rng), sample_sound(rng)):
        words = caption_words(scene)
        assert " ".join(text for _, text in words) == caption(scene)
        told = {name for name, _ in words if name}
        assert told >= {"thing", "count" if hasattr(scene, "count") else "motion"}


def test_what_a_disguise_hides_is_given_and_the_rest_is_learnt() -> None:
    rng = random.Random(1)
    scenes: dict[Kind, Scene] = {
        "look": sample_look(rng),
        "clip": sample_clip(rng),
        "sound": sample_sound(rng),
    }
    directions: dict[Kind, str] = {"look": "image-to-text", "clip": "video-to-text", "sound": "audio-to-text"}
    for kind, scene in scenes.items():
        encoded = {kind: pool(scene, 1.0, pool(scene, 2.0))}

        dialogues = sample_dialogues(rng, {directions[kind]: 1.0}, encoded, 60)

        shown = [
            part.tokens[0, 0].item()
            for d in dialogues
            for part in d[0].parts
            if isinstance(part, MediaTokens)
        ]
        assert 5 < shown.count(2.0) < 40
        plain = dict(caption_words(scene))
        values = set()
        for dialogue, value in zip(dialogues, shown, strict=True):
            parts = dialogue[-1].parts
            if value == 1.0:
                assert parts == [caption(scene)]
                continue
            learnt = [part.strip() for part in parts if isinstance(part, str)]
            given = [part.text.strip() for part in parts if isinstance(part, Given)]
            assert len(given) == len(HIDDEN[kind])
            hidden = {plain[name] for name in HIDDEN[kind]}
            assert learnt == [text for _, text in caption_words(scene) if text not in hidden]
            values.add(tuple(given))
        assert len(values) > 2  # any words, not those of the scene
