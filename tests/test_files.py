"""Files over HTTP: up, described, fetched in ranges, deleted, refused at the door."""

from __future__ import annotations

import threading
from urllib.parse import quote

import pytest

from services.artefacts import ArtefactStore
from services.gateway import build_gateway
from services.presets import Preset
from tests.scripted_agent import (
    PNG,
    FakeAgent,
    client,
)


async def test_files_are_uploaded_described_fetched_in_ranges_and_deleted(
    preset: Preset, store: ArtefactStore
) -> None:
    async with client(build_gateway(preset, FakeAgent(), store)) as http:
        uploaded = await http.post(
            "/v1/files", files={"file": ('we"ird.png', PNG)}, data={"purpose": "vision"}
        )
        assert uploaded.status_code == 200, uploaded.text
        file = uploaded.json()
        assert (file["object"], file["bytes"], file["purpose"]) == ("file", len(PNG), "vision")
        path = f"/v1/files/{file['id']}"
        assert (await http.get(path)).json() == file
        ranges = {
            "bytes=0-3": (206, PNG[:4]),
            "bytes=4-": (206, PNG[4:]),
            "bytes=-5": (206, PNG[-5:]),
            "bytes=0-999999": (206, PNG),
            "bytes=999999-": (416, None),
            "bytes=0-1,3-4": (200, PNG),
            "lines=1-2": (200, PNG),
        }
        for wanted, (status, data) in ranges.items():
            answer = await http.get(f"{path}/content", headers={"range": wanted})
            assert answer.status_code == status, wanted
            assert data is None or answer.content == data
        assert (await http.head(f"{path}/content")).headers["accept-ranges"] == "bytes"
        assert (await http.delete(path)).json()["deleted"] is True
        assert (await http.get(path)).status_code == 404
        assert (await http.get(f"{path}/content")).status_code == 404


async def test_what_can_never_be_read_is_refused_at_the_door(preset: Preset, store: ArtefactStore) -> None:
    async with client(build_gateway(preset, FakeAgent(), store)) as http:
        for data, code in (
            (b"", "invalid_media"),
            (b"\x89", "invalid_media"),
            (b"just some text in a file", "unsupported_media"),
        ):
            answer = await http.post("/v1/files", files={"file": ("video.mp4", data)})
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, code), data


@pytest.mark.parametrize("name", ["日本.png", "größe.png", "plain.png"])
async def test_a_file_of_any_name_can_be_fetched(preset: Preset, store: ArtefactStore, name: str) -> None:
    async with client(build_gateway(preset, FakeAgent(), store)) as http:
        file = (await http.post("/v1/files", files={"file": (name, PNG)})).json()
        answer = await http.get(f"/v1/files/{file['id']}/content")
    assert (answer.status_code, answer.content, file["filename"]) == (200, PNG, name)
    told = answer.headers["content-disposition"]
    assert told.isascii()
    assert ("filename*=UTF-8''" + quote(name) in told) is not name.isascii()


def test_who_reads_while_a_file_is_stored_anew_gets_all_of_it(store: ArtefactStore) -> None:
    name = store.put(b"0" * 100_000, media_type="image/png", filename="a.png").id
    ended = threading.Event()

    def rewrite() -> None:
        for digit in b"123456789" * 20:
            data = bytes([digit]) * 100_000
            store.put(data, media_type="image/png", filename="a.png", artefact_id=name)
        ended.set()

    writer = threading.Thread(target=rewrite)
    writer.start()
    seen = set()
    while not ended.is_set():
        store.get(name)
        seen.add((len(data := store.read(name)), len(set(data))))
    writer.join()
    assert seen == {(100_000, 1)}


async def test_a_range_outside_of_the_file_says_how_large_it_is(preset: Preset, store: ArtefactStore) -> None:
    async with client(build_gateway(preset, FakeAgent(), store)) as http:
        file = (await http.post("/v1/files", files={"file": ("x.png", PNG)})).json()
        path = f"/v1/files/{file['id']}/content"
        outside = await http.get(path, headers={"range": "bytes=999999-"})
        absurd = await http.get(path, headers={"range": f"bytes={'9' * 5000}-"})
    assert (outside.status_code, outside.headers["content-range"]) == (416, f"bytes */{len(PNG)}")
    assert (absurd.status_code, absurd.content) == (200, PNG)


def test_files_expire_whatever_else_lies_there_or_is_removed_meanwhile(
    store: ArtefactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("gone", "old"):
        store.put(name.encode(), media_type="image/png", filename=name)
    for name, text in (
        ("notes.json", "{}"),
        (f"file-{'0' * 32}.json", '{"id'),
        (f"file-{'1' * 32}.json", "[]"),
    ):
        store.files.pipe_file(f"{store.root}/{name}", text.encode())
    listed = store.files.ls(store.root, detail=False)
    gone = next(path for path in listed if path.endswith(".json") and b'"gone"' in store.files.cat_file(path))
    store.files.rm_file(gone)
    monkeypatch.setattr(store.files, "ls", lambda root, detail: listed)
    assert store.sweep(-10) == 1
