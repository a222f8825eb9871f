"""Files over HTTP: up, described, fetched in ranges, deleted, refused at the door."""

from __future__ import annotations

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
