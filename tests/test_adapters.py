"""Adapters: which a request may name, when they are loaded, and when they go."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from decoders.lora import DecoderLora
from decoders.settings import DecodeSettings
from encoders.media import Modality
from services.adapters import AdapterShelf, AdapterState, chosen_adapters, split_model
from services.artefacts import ArtefactStore
from services.boxes import Finished, Made, PromptMessage, SpeechOptions, SpokenSignal, Words
from services.cli import main
from services.errors import BadRequest, Conflict, PresetProblem, ServiceError, Unavailable
from services.local_decoder import LocalDecoder
from services.local_language_model import LocalLanguageModel
from services.memory_plan import changed
from services.messages import Role
from services.presets import AdapterPreset, Preset, load_preset
from services.session import Session
from tests.tiny import LLM_WIDTH, tiny_values, with_adapters

MB = 2**20
IMAGE = Modality.IMAGE


@dataclass(frozen=True)
class Sized:
    num_bytes: int

    def to(self, device: str, /) -> Sized:
        return self


class Shelf(AdapterShelf[Sized]):
    """Holds up to 10 MB of things that take 4 MB each, ``large`` 11 MB, and notes what it reads."""

    def __init__(self) -> None:
        names = ("a", "b", "c", "large")
        adapters = {name: {"box": "image", "folder": f"adapters/{name}"} for name in names}
        values = tiny_values() | {"adapters": adapters, "limits": {"max_adapter_mb": 10}}
        super().__init__(Preset(**values, file=Path("/p/tiny.yaml")), "image")  # type: ignore[arg-type]
        self.read: list[str] = []

    def take(self, name: str) -> Sized:
        def read(name: str, folder: Path) -> Sized:
            assert folder == Path("/p/weights/adapters") / name
            self.read.append(name)
            return Sized(11 * MB if name == "large" else 4 * MB)

        return self.get(name, read)

    def loaded(self) -> set[str]:
        return {state.name for state in self.states() if state.loaded}


def test_an_adapter_is_read_once_and_the_least_used_goes_first() -> None:
    shelf = Shelf()

    first = shelf.take("a")
    shelf.take("b")
    assert shelf.take("a") is first
    shelf.take("c")

    assert shelf.loaded() == {"a", "c"}
    assert shelf.read == ["a", "b", "c"]
    shelf.take("b")
    assert shelf.loaded() == {"b", "c"}


def test_what_is_in_use_neither_goes_for_others_nor_by_command() -> None:
    shelf = Shelf()
    with shelf.holding("a"), shelf.holding("b"):
        shelf.take("a")
        shelf.take("b")
        with pytest.raises(Unavailable, match=r"no room for the adapter 'c' beside those in use") as full:
            shelf.take("c")
        with pytest.raises(Conflict, match=r"'a' is used by 1 requests now") as used:
            shelf.unload("a")
        assert shelf.states()[0] == AdapterState("a", "image", True, 4 * MB, 1)
    assert (full.value.status, full.value.code, full.value.retry_after_s) == (503, "adapters_full", 5)
    assert (used.value.status, used.value.code) == (409, "adapter_in_use")
    assert shelf.loaded() == {"a", "b"}

    assert (shelf.unload("a"), shelf.unload("a")) == (True, False)
    shelf.take("c")
    assert shelf.loaded() == {"b", "c"}


def test_one_that_is_larger_than_the_shelf_is_refused_and_moves_nothing() -> None:
    shelf = Shelf()
    shelf.take("a")
    with pytest.raises(PresetProblem, match=r"takes 11.0 MB; at most 10 MB.*limits.max_adapter_mb"):
        shelf.take("large")
    assert shelf.loaded() == {"a"}


@pytest.mark.parametrize(
    "odd", [TypeError("r is a list"), FileNotFoundError(2, "No such file"), KeyError("r")]
)
def test_an_adapter_that_the_reader_stumbles_over_is_named_with_its_folder(odd: Exception) -> None:
    def read(name: str, folder: Path) -> Sized:
        raise odd

    shelf = Shelf()
    with pytest.raises(PresetProblem, match=r"'a' cannot be loaded: .*Expected files in adapters/a as") as no:
        shelf.get("a", read)
    assert no.value.code == "adapter_invalid"
    assert type(odd).__name__ in no.value.message
    assert isinstance(shelf.take("a"), Sized)  # the next request reads it again


def test_threads_that_want_one_adapter_read_it_once() -> None:
    shelf = Shelf()
    threads = [threading.Thread(target=shelf.take, args=("a",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shelf.read == ["a"]


ADAPTERS = {
    "pirate": AdapterPreset(box="language_model", folder="p"),
    "poet": AdapterPreset(box="language_model", folder="q"),
    "ink": AdapterPreset(box="image", folder="i"),
}


def test_a_request_has_at_most_one_adapter_for_each_box() -> None:
    assert chosen_adapters(["ink", "pirate", "ink"], ADAPTERS) == {"image": "ink", "language_model": "pirate"}
    with pytest.raises(BadRequest, match=r"'pirate' and 'poet' are both for the language model"):
        chosen_adapters(["pirate", "poet"], ADAPTERS)


@pytest.mark.parametrize("name", ["../pirate", "/etc/passwd", "pirat", ""])
def test_a_name_that_the_preset_does_not_list_is_refused_with_those_it_does(name: str) -> None:
    with pytest.raises(BadRequest, match=r"There is no adapter .*; expected pirate, poet, ink\.") as caught:
        chosen_adapters([name], ADAPTERS)
    assert (caught.value.code, caught.value.param) == ("adapter_not_found", "lora")


def test_a_model_may_be_named_with_an_adapter() -> None:
    assert split_model("tiny:ink", ADAPTERS) == ("tiny", "ink")
    assert split_model("tiny", ADAPTERS) == ("tiny", None)
    assert split_model("tiny:nobody", ADAPTERS) == ("tiny:nobody", None)


@pytest.mark.parametrize(
    ("adapters", "complaint"),
    [
        ({"x": {"box": "encoder", "folder": "x"}}, "adapters.x.box"),
        ({"x": {"box": "video"}}, "adapters.x.folder"),
        ({"a/b": {"box": "image", "folder": "x"}}, "adapters.a/b"),
    ],
)
def test_a_preset_lists_adapters_of_its_boxes_only(
    adapters: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    import yaml

    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump(tiny_values() | {"adapters": adapters}))
    with pytest.raises(PresetProblem, match=complaint):
        load_preset(str(path))


# --- in the boxes -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def preset(tiny_preset: Path) -> Preset:
    return load_preset(str(with_adapters(tiny_preset)))


@pytest.fixture(scope="module")
def speaker(preset: Preset) -> LocalLanguageModel:
    box = LocalLanguageModel(preset)
    box.load()
    return box


SPEECH = SpeechOptions(
    allowed=frozenset(), max_signals=0, max_new_tokens=20, temperature=0.0, top_p=1.0, seed=0
)


async def told(box: LocalLanguageModel, adapter: str | None) -> str:
    prompt: Sequence[PromptMessage] = [PromptMessage(Role.USER, ("hello",))]
    options = replace(SPEECH, adapter=adapter)
    return "".join([said.text async for said in box.generate(prompt, options) if isinstance(said, Words)])


async def test_turns_with_other_adapters_speak_at_once_as_they_do_alone(speaker: LocalLanguageModel) -> None:
    names = [None, "pirate", "poet", None]
    alone = [await told(speaker, name) for name in names]
    together = await asyncio.gather(*(told(speaker, name) for name in names * 2))

    assert together == alone * 2
    assert alone[0] == alone[3] == "hello!"
    assert len(set(alone)) == 3


async def test_a_quantised_language_model_wears_adapters_too(preset: Preset) -> None:
    box = LocalLanguageModel(changed(preset, {"language_model.quantization": "int8"}))
    names = ["pirate", None, "pirate"]

    worn, plain, again = await asyncio.gather(*(told(box, name) for name in names))

    assert worn == again != plain == "hello!"


async def test_an_adapter_of_a_turn_that_runs_stays(speaker: LocalLanguageModel) -> None:
    prompt = [PromptMessage(Role.USER, ("hello",))]
    async with aclosing(speaker.generate(prompt, replace(SPEECH, adapter="pirate"))) as stream:
        await anext(stream)
        with pytest.raises(Conflict):
            speaker.adapters.unload("pirate")
        assert [said async for said in stream if isinstance(said, Finished)]
    assert speaker.adapters.unload("pirate")
    assert await told(speaker, "pirate")


async def test_an_adapter_of_another_model_is_refused_and_the_others_go_on(
    speaker: LocalLanguageModel,
) -> None:
    with pytest.raises(
        PresetProblem, match=r"'odd' cannot be loaded: .* has shape .*; expected .*trained for it"
    ):
        await told(speaker, "odd")
    assert await told(speaker, None) == "hello!"
    assert not any(state.users for state in speaker.adapters.states())


async def test_a_picture_tells_its_adapter_and_is_another(preset: Preset, tmp_path: Path) -> None:
    box = LocalDecoder(preset, IMAGE, ArtefactStore(tmp_path.as_uri()))
    states = np.random.default_rng(0).normal(size=(4, LLM_WIDTH)).astype(np.float32)
    signal = SpokenSignal(IMAGE, "bell", states, states)

    async def made(lora: str | None) -> Made:
        async with aclosing(box.decode(signal, DecodeSettings(seed=1, lora=lora))) as stream:
            *_, last = [value async for value in stream]
        assert isinstance(last, Made)
        return last

    results = await asyncio.gather(*(made(name) for name in (None, "ink", "clay", "ink")))

    pictures = [box.store.read(result.artefact.id) for result in results]
    assert results[1].manifest["lora"]["name"] == "ink"
    assert "lora" not in results[0].manifest
    assert len({picture[-2000:] for picture in pictures}) == 3
    assert [state.users for state in box.adapters.states()] == [0, 0, 0]
    with pytest.raises(PresetProblem, match=r"'gone' cannot be loaded: adapters/gone holds neither"):
        await made("gone")


def test_a_turn_sends_each_adapter_to_its_box(preset: Preset) -> None:
    content = [{"role": "user", "content": "draw a bell"}]
    with Session(preset) as session:
        plain = session.chat(content, seed=1)
        worn = session.chat(content, seed=1, adapters=["ink"])
        own = session.chat(content, seed=1, decoders={IMAGE: DecodeSettings(lora="ink")})
        other = session.chat(content, seed=1, adapters=["pirate"])
        with pytest.raises(ServiceError, match=r"no adapter 'pirate' for image; expected clay, gone, ink"):
            session.chat(content, decoders={IMAGE: DecodeSettings(lora="pirate")})

    assert plain.parts[1].manifest is not None
    assert worn.parts[1].manifest is not None
    assert worn.parts[1].data == own.parts[1].data != plain.parts[1].data
    assert worn.parts[1].manifest["condition"] == plain.parts[1].manifest["condition"]
    assert other.text != plain.text


def test_the_command_line_names_adapters(
    preset: Preset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["chat", "--preset", str(preset.file), "--out", str(tmp_path), "--seed", "1", "--json"]

    assert main([*words, "--lora", "ink", "draw a bell"]) == 0
    parts = json.loads(capsys.readouterr().out)["parts"]
    assert parts[1]["manifest"]["lora"]["name"] == "ink"
    assert main([*words, "--lora", "nobody", "draw a bell"]) == 1
    assert "There is no adapter 'nobody'; expected clay, gone, ink" in capsys.readouterr().err


class Replicas:
    """Stands for the handle of a deployment: calls go to the objects in this process."""

    def __init__(self, *replicas: Any) -> None:
        self.replicas = replicas
        self.deployment_name = f"{id(self)}"

    def broadcast(self, method: str, *args: Any) -> Any:
        async def results_async() -> list[Any]:
            return [getattr(replica, method)(*args) for replica in self.replicas]

        return SimpleNamespace(results_async=results_async)

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=getattr(self.replicas[0], method))


async def test_a_command_reaches_every_replica_of_the_box(preset: Preset, tmp_path: Path) -> None:
    from services.cluster import ClusterStatus, Line
    from services.deployments import AgentReplica, DecoderReplica, ReplicaArgs
    from services.remote_boxes import RemoteAgent

    def decoder() -> DecoderReplica:
        replica = object.__new__(DecoderReplica)
        replica.boxes = {IMAGE: LocalDecoder(preset, IMAGE, ArtefactStore(tmp_path.as_uri()))}
        return replica

    decoders = [decoder(), decoder()]
    for each in decoders:
        each.boxes[IMAGE].adapters.get("ink", lambda name, folder: DecoderLora(name, "0", {}))
    args = ReplicaArgs(preset=str(preset.file), store=tmp_path.as_uri())
    speaker = SimpleNamespace(adapters=LocalLanguageModel(preset).adapters.states)
    handles: Any = {IMAGE: Replicas(*decoders)}
    agent: Any = Replicas(AgentReplica(args, Replicas(), Replicas(speaker), handles))  # type: ignore[arg-type]
    remote = RemoteAgent(Line(agent, "agent", "Agent", ClusterStatus()), {})

    with decoders[1].boxes[IMAGE].adapters.holding("ink"), pytest.raises(Conflict, match="'ink' is used"):
        await remote.unload_adapter("ink")
    assert sum(state.loaded for state in await remote.adapters()) == 1
    assert await remote.unload_adapter("ink") == 1
    assert await remote.unload_adapter("ink") == 0
    assert {state.name for state in await remote.adapters()} == set(preset.adapters)
