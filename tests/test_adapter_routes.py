"""Adapters over HTTP: named in a request, listed, and put away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from services.adapters import AdapterState
from services.artefacts import ArtefactStore
from services.errors import Conflict, ServiceError
from services.gateway import build_gateway
from services.presets import Preset
from tests.scripted_agent import (
    IMAGE,
    FakeAgent,
    ask,
    body,
    client,
    script,
)
from tests.tiny import tiny_values


class FakeKeeper:
    def __init__(self, error: ServiceError | None = None) -> None:
        self.error = error
        self.unloaded: list[str] = []

    async def adapters(self) -> list[AdapterState]:
        return [AdapterState("ink", "image", n < 2, 7 * (n < 2), n) for n in range(3)]

    async def unload_adapter(self, name: str) -> int:
        if self.error is not None:
            raise self.error
        self.unloaded.append(name)
        return 2


@pytest.fixture
def adapted(tmp_path: Path) -> Preset:
    adapters = {"ink": {"box": "image", "folder": "x"}, "pirate": {"box": "language_model", "folder": "y"}}
    return Preset(**{**tiny_values(), "adapters": adapters}, file=tmp_path / "t.yaml")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wish", "names"),
    [
        ({"lora": "ink"}, ("ink",)),
        ({"lora": ["ink", "pirate"]}, ("ink", "pirate")),
        ({"model": "tiny:pirate", "lora": "ink"}, ("pirate", "ink")),
        ({"extra_body": {"lora": "ink"}}, ("ink",)),
        ({}, ()),
    ],
)
async def test_adapters_are_named_in_lora_or_behind_the_model(
    adapted: Preset, store: ArtefactStore, wish: dict[str, Any], names: tuple[str, ...]
) -> None:
    agent = FakeAgent(*script(store))
    answer = await ask(agent, adapted, store, body() | wish)

    assert answer.status_code == 200
    assert agent.options.adapters == names
    assert answer.json()["model"] == wish.get("model", "tiny")


async def test_a_decoder_can_be_told_its_adapter(adapted: Preset, store: ArtefactStore) -> None:
    agent = FakeAgent(*script(store))
    await ask(agent, adapted, store, body(decoders={"image": {"lora": "ink"}}))
    assert agent.options.decoders[IMAGE].lora == "ink"


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"name": "ink", "path": "/x"}, "lora: Input should be a string or a list of strings."),
        (3, "lora: Input should be a string or a list of strings."),
        ([3], "lora.0: Input should be a valid string."),
        ([["ink"]], "lora.0: Input should be a valid string."),
    ],
)
async def test_lora_is_a_name_and_nothing_else(
    adapted: Preset, store: ArtefactStore, lora: Any, message: str
) -> None:
    answer = await ask(FakeAgent(), adapted, store, body(lora=lora))
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == message
    assert answer.json()["error"]["param"] == message.partition(":")[0]


async def test_a_model_with_an_unknown_adapter_is_answered_with_the_known_ones(
    adapted: Preset, store: ArtefactStore
) -> None:
    answer = await ask(FakeAgent(), adapted, store, body() | {"model": "tiny:poet"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert "'tiny', 'tiny:ink', 'tiny:pirate'" in answer.json()["error"]["message"]


async def test_models_are_listed_with_their_adapters(adapted: Preset, store: ArtefactStore) -> None:
    async with client(build_gateway(adapted, FakeAgent(), store)) as http:
        listed = (await http.get("/v1/models")).json()["data"]
        one = (await http.get("/v1/models/tiny:ink")).json()
    assert [(model["id"], model["parent"]) for model in listed] == [
        ("tiny", None),
        ("tiny:ink", "tiny"),
        ("tiny:pirate", "tiny"),
    ]
    assert one == listed[1]


async def test_adapters_are_shown_and_put_away_by_command(adapted: Preset, store: ArtefactStore) -> None:
    keeper = FakeKeeper()
    async with client(build_gateway(adapted, FakeAgent(), store, adapters=keeper)) as http:
        shown = (await http.get("/v1/adapters")).json()["data"]
        gone = await http.post("/v1/adapters/ink/unload")
        unknown = await http.post("/v1/adapters/poet/unload")
    assert shown[0] == {
        "id": "ink",
        "object": "adapter",
        "box": "image",
        "loaded": 2,
        "bytes": 7,
        "in_use": 3,
    }
    assert shown[1]["loaded"] == 0
    assert gone.json() == {"id": "ink", "object": "adapter", "unloaded": 2}
    assert keeper.unloaded == ["ink"]
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "adapter_not_found")

    busy = FakeKeeper(Conflict("It is used.", code="adapter_in_use", retry_after_s=5))
    async with client(build_gateway(adapted, FakeAgent(), store, adapters=busy)) as http:
        refused = await http.post("/v1/adapters/ink/unload")
    assert (refused.status_code, refused.headers["retry-after"]) == (409, "5")
