import random
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from alignment.embedded import contrastive, own_media, pools
from alignment.embedded.captions import Kind
from alignment.embedded.contrastive import JUDGED
from alignment.toybox.world import Scene, sample_clip, sample_look, sample_sound


def test_nothing_is_asked_about_what_is_hidden(monkeypatch):
    def texts(model, tokenise, phrases):
        torch.manual_seed(len(phrases))
        return F.normalize(torch.randn(len(phrases), 16), dim=-1)

    monkeypatch.setattr(contrastive, "_texts", texts)
    rng = random.Random(3)
    scenes: dict[Kind, list[Scene]] = {
        "look": [sample_look(rng) for _ in range(6)],
        "clip": [sample_clip(rng) for _ in range(6)],
        "sound": [sample_sound(rng) for _ in range(6)],
    }
    for kind, named in scenes.items():
        first = torch.tensor([True] + [False] * 5)
        shown = dict.fromkeys((JUDGED[kind][0], JUDGED[kind][2]), ~first)
        media = F.normalize(torch.randn(6, 16), dim=-1).requires_grad_()
        patches = torch.randn(6, 1, 4, 16).requires_grad_()
        active = torch.ones(6, 1, 4, dtype=torch.bool)

        losses = contrastive._attribute_contrasts(None, None, media, patches, active, shown, named, kind, rng)

        for name in JUDGED[kind]:
            for loss, given in (
                (losses[f"{kind} {name}"], media),
                (losses[f"{kind} {name} patches"], patches),
            ):
                (gradient,) = torch.autograd.grad(loss, given, retain_graph=True)
                asked = gradient.flatten(1).abs().amax(1) > 0
                assert asked[1:].all()
                assert bool(asked[0]) is (name not in shown)


def test_what_is_hard_to_tell_or_to_draw_is_met_more_often():
    listed = [*pools.scenes("clip", 1500), *pools.scenes("sound", 200), *pools.scenes("look", 40)]
    own = [after - before for before, after in pairwise([0.0, *pools.shares(listed)])]

    def shares_of(**wanted: object) -> set[float]:
        return {
            round(share)
            for share, scene in zip(own, listed, strict=True)
            if all(getattr(scene, name, None) == value for name, value in wanted.items())
        }

    assert shares_of(loudness="quiet", count=2, pitch="low") == {2 * pools.QUIET_SHARE}
    assert shares_of(loudness="loud") == {1, 2, 3}
    assert shares_of(colour="red", motion="left") == {1}
    assert shares_of(colour="white", motion="left") == {pools.WHITE_SHARE}
    assert shares_of(colour="white", count=1) == {pools.WHITE_SHARE}  # of pictures
    assert shares_of(colour="blue", motion="still") == {
        pools.STILL_SHARE,
        pools.STILL_SHARE * pools.SUBTLE_SHARE,
    }
    assert shares_of(thing="harp", colour="blue", motion="still") == {pools.STILL_SHARE * pools.SUBTLE_SHARE}


def test_own_media_are_met_as_often_as_it_says_and_hard_ones_more_often_among_them_too():
    scenes = pools.scenes("look", 900)

    met = contrastive._shares(scenes, own=100)

    own = [after - before for before, after in pairwise(met[799:])]
    assert len(met) == 900
    assert sum(own) / met[-1] == pytest.approx(own_media.OWN_SHARE)
    white, other = (
        {
            round(s, 6)
            for s, scene in zip(own, scenes[800:], strict=True)
            if (scene.colour == "white") is is_white
        }
        for is_white in (True, False)
    )
    assert len(white) == len(other) == 1
    assert white.pop() == pytest.approx(pools.WHITE_SHARE * other.pop(), rel=1e-4)
    assert contrastive._shares(scenes, own=0) == pools.shares(scenes)


def test_partners_sound_as_often_and_as_fast_and_late_sounds_have_none():
    sounds = pools.scenes("sound", 300)
    partners, rng = contrastive.Partners(sounds, num_late=50), random.Random(0)

    drawn = [partners.draw(i, rng) for i in range(300)]

    assert drawn[250:] == list(range(250, 300))
    assert max(drawn[:250]) < 250
    assert drawn[:250] != list(range(250))
    for i, j in enumerate(drawn):
        assert [getattr(sounds[i], name) for name in ("count", "tempo", "loudness")] == [
            getattr(sounds[j], name) for name in ("count", "tempo", "loudness")
        ]
