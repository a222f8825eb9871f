"""Requests for one medium that are put to the language model before a decoder sees them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from decoders.settings import DecodeSettings
from encoders.media import Modality
from services import admission
from services.artefacts import ArtefactStore
from services.boxes import BoxState, Finished, Words
from services.direct_requests import described
from services.errors import TooManyRequests
from services.events import Event, PartDone, PartStarted
from services.messages import Role
from services.presets import GenerationDefaults
from tests.fake_boxes import AUDIO, IMAGE, FakeDecoder, FakeSpeaker, agent, failure, signal

FULL = signal(IMAGE, "a big red bell in the middle")
DRAWS = GenerationDefaults(prompts={IMAGE: "draw {prompt}"}, temperature=0.3)


async def made_by(speaker: FakeSpeaker, decoder: FakeDecoder, store: ArtefactStore) -> list[Event]:
    the_agent = agent(store, speaker, decoder, generation=DRAWS)
    events = the_agent.make(decoder.modality, " a bell ", DecodeSettings(seed=5), user="ann")
    return [event async for event in events]


async def test_the_language_model_says_in_full_what_is_made(store: ArtefactStore) -> None:
    speaker, decoder = FakeSpeaker(Words("here: "), FULL, Words("and more")), FakeDecoder(store, IMAGE)

    events = await made_by(speaker, decoder, store)

    (asked,) = speaker.prompt
    assert (asked.role, asked.parts) == (Role.USER, ("draw a bell",))
    assert speaker.options is not None
    assert speaker.options.allowed == {IMAGE}
    assert (speaker.options.temperature, speaker.options.seed, speaker.options.user) == (0.3, 5, "user ann")
    assert speaker.closed  # it need not say more
    (made,) = decoder.signals
    assert not made.is_words
    assert decoder.settings[0].seed == 5
    captions = [event.caption for event in events if isinstance(event, PartStarted | PartDone)]
    assert captions == [made.caption] * 2 == ["a big red bell in the middle"] * 2


@pytest.mark.parametrize("script", [(Words("a bell rings"), Finished("stop")), ()])
async def test_where_it_makes_nothing_the_decoder_reads_the_words(
    script: tuple[Any, ...], store: ArtefactStore
) -> None:
    decoder = FakeDecoder(store, IMAGE)

    events = await made_by(FakeSpeaker(*script), decoder, store)

    assert isinstance(events[-1], PartDone)
    assert decoder.signals[0].is_words
    assert decoder.signals[0].caption == " a bell "


async def test_kinds_that_the_preset_does_not_name_are_made_of_the_words(store: ArtefactStore) -> None:
    speaker, decoder = FakeSpeaker(signal(AUDIO)), FakeDecoder(store, AUDIO)

    events = await made_by(speaker, decoder, store)

    assert isinstance(events[-1], PartDone)
    assert speaker.prompt == []
    assert decoder.signals[0].is_words


async def test_a_language_model_that_fails_or_is_not_there_is_told(
    store: ArtefactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "PATIENCE_S", 0.01)
    full = FakeSpeaker(TooManyRequests("Full.", code="queue_full"))
    loading = FakeSpeaker(signal(IMAGE))
    loading.now = BoxState.LOADING
    for speaker, code in ((full, "queue_full"), (loading, "model_loading")):
        decoder = FakeDecoder(store, IMAGE)
        assert failure(await made_by(speaker, decoder, store))["code"] == code
        assert decoder.signals == []


@pytest.mark.parametrize("wording", ["draw", "draw {words}", "{prompt} or {prompt}", "draw {prompt"])
def test_a_wording_without_a_place_for_the_prompt_is_refused(wording: str) -> None:
    with pytest.raises(ValidationError, match="prompts"):
        GenerationDefaults(prompts={Modality.IMAGE: wording})


async def test_answers_say_what_the_medium_was_made_of(store: ArtefactStore) -> None:
    events = await made_by(FakeSpeaker(FULL), FakeDecoder(store, IMAGE), store)

    done = events[-1]
    assert isinstance(done, PartDone)
    assert described(done)["revised_prompt"] == "a big red bell in the middle"
