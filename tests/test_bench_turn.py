import asyncio
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from encoders.media import Audio, Image, Video, read_media
from services.artefacts import ArtefactStore
from services.bench import turn
from services.bench.turn import Ask, OneAtATime, OurService
from services.local import local_agent
from services.presets import load_preset

THREE = "draw, play and film a bell"


@pytest.fixture(scope="module")
def sides(
    tiny_preset: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[OurService, OneAtATime, OneAtATime]:
    preset = load_preset(str(tiny_preset))
    agent = local_agent(preset, ArtefactStore(tmp_path_factory.mktemp("store").as_uri()))
    return turn.servers(preset, agent)


def ask(text: str, seed: int = 3, pause_s: float = 0.0) -> Ask:
    return Ask(text, seed, pause_s, "words")


@pytest.mark.parametrize("place", [1, 2], ids=["naive", "reloaded"])
@pytest.mark.parametrize(("text", "count"), [("hello", 0), ("draw a bell", 1), (THREE, 3)])
def test_the_naive_server_gives_the_reply_of_the_agent(
    sides: tuple[OurService, OneAtATime, OneAtATime], text: str, count: int, place: int
) -> None:
    async def both() -> tuple[list[bytes], list[bytes]]:
        return await sides[0](ask(text)), await sides[place](ask(text))

    ours, theirs = asyncio.run(both())

    assert len(ours) == len(theirs) == count
    for one, other in zip(map(read_media, ours), map(read_media, theirs), strict=True):
        assert type(one) is type(other)
        match one, other:
            case Image(), Image():
                np.testing.assert_allclose(one.pixels.astype(int), other.pixels.astype(int), atol=1)
            case Audio(), Audio():
                assert one.rate == other.rate
                length = min(len(one.samples), len(other.samples))
                np.testing.assert_allclose(one.samples[:length], other.samples[:length], atol=1e-3)
            case Video(), Video():
                assert one.frames.shape == other.frames.shape
                assert abs(one.frames.astype(int) - other.frames).mean() < 2  # two encodings of MP4


def test_a_workload_is_the_same_for_the_same_seed_and_mixes_the_kinds_evenly() -> None:
    people = turn.workload(2, 3, seed=5)

    assert people == turn.workload(2, 3, seed=5)
    assert people != turn.workload(2, 3, seed=6)
    assert [len(asks) for asks in people] == [3, 3]
    assert sorted(ask.kind for asks in people for ask in asks) == sorted(2 * list(turn.KINDS))


def test_a_job_counts_from_sending_to_the_end_of_the_reply_and_not_the_reading() -> None:
    async def answer(ask: Ask) -> list[bytes]:
        await asyncio.sleep(0.05)
        return []

    seconds = asyncio.run(turn.waits([[ask("a", pause_s=0.3)], [ask("b")]], answer))

    assert len(seconds) == 2
    assert all(0.05 <= second < 0.25 for second in seconds)


def test_people_wait_in_line_before_a_naive_server(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once: list[int] = []
    running = 0

    def answer(text: str, seed: int) -> list[bytes]:
        nonlocal running
        running += 1
        at_once.append(running)
        running -= 1
        return []

    async def crowd() -> list[float]:
        line = OneAtATime(SimpleNamespace(answer=answer))  # type: ignore[arg-type]
        return await turn.waits([[ask("a")], [ask("b")], [ask("c")]], line)

    asyncio.run(crowd())

    assert at_once == [1, 1, 1]


def test_the_slowest_of_twenty_is_not_the_95th_percentile() -> None:
    assert turn._p95([float(second) for second in range(1, 21)]) == 19.0
    assert turn._p95([7.0]) == 7.0


def test_a_crowd_has_rows_for_both_peers(sides: tuple[OurService, OneAtATime, OneAtATime]) -> None:
    rows = asyncio.run(turn.crowd([[[ask("hello")], [ask("draw a bell")]]], *sides))

    assert [row.case for row in rows] == [
        "2 people median",
        "2 people p95",
        "2 people median, reloaded",
        "2 people p95, reloaded",
    ]
    assert all(row.value > 0 and row.peer_value > 0 for row in rows)


def test_a_recording_holds_every_pass_of_a_turn(sides: tuple[OurService, OneAtATime, OneAtATime]) -> None:
    ours, naive, _ = sides
    with turn.Recording(naive.server) as recording:
        asyncio.run(ours(ask("draw a bell")))
    calls = len(recording.calls)
    recording.replay()

    assert calls == len(recording.calls) == 3 + 1  # three denoising steps, and the way to pixels
    assert len(recording.calls[0][1][0]) == 2  # with guidance


def test_the_bare_language_model_takes_a_block_in_one_pass(
    sides: tuple[OurService, OneAtATime, OneAtATime],
) -> None:
    server = sides[1].server
    said = server.say("draw a bell")
    lengths: list[int] = []
    hook = server.plain.base_model.register_forward_pre_hook(
        lambda module, args, named: lengths.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    turn.speak(server, said)
    hook.remove()

    block = len(server.model.tokenizer.signal_ids(said.signals[0].modality))
    assert lengths[0] == len(said.prompt)
    assert lengths.count(block) == 1
    assert sum(lengths[1:]) == len(said.reply) - 1


def test_a_turn_alone_is_held_against_its_passes(
    sides: tuple[OurService, OneAtATime, OneAtATime], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"words": "hello", "one medium": "draw a bell", "three media": THREE}
    asks = [[Ask(text, 3, 0.0, kind) for kind, text in said.items()]]
    monkeypatch.setattr(turn, "workload", lambda people, requests, seed: asks)

    rows = asyncio.run(turn.overheads(sides[0], sides[1].server, rounds=1))

    assert [row.case for row in rows] == ["1 turn, words", "1 turn, one medium", "1 turn, three media"]
    assert rows[2].peer_value > rows[1].peer_value > rows[0].peer_value > 0
