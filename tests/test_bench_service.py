import asyncio
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.bench import BenchRow, service
from services.bench.service import CASES, Started, _free_port, family, resident_gb, started
from services.cli import main
from services.client import Client


@pytest.fixture(scope="module")
def running() -> Iterator[Started]:
    port = _free_port()
    command = [sys.executable, "-m", "tests.slow_service", str(port)]
    with started(command, f"http://127.0.0.1:{port}") as found:
        yield found


def test_the_page_is_timed_apart_from_the_decoders(running: Started) -> None:
    assert 0.2 < running.page_s < running.ready_s
    assert 0.6 < running.ready_s < 20


def test_every_case_has_its_median_and_worst_beside_the_wanted(running: Started) -> None:
    rows = service.measure(running.url, quick=True)

    assert [(row.case, row.peer_value, row.unit) for row in rows] == [
        ("first text token", 0.5, "s"),
        ("an image", 3.0, "s"),
        ("a sound", 4.0, "s"),
        ("a video", 6.0, "s"),
        ("three media", 8.0, "s"),
    ]
    for row, least in zip(rows, (0.0, 0.1, 0.1, 0.1, 0.3), strict=True):
        assert row.details is not None
        assert least < row.value <= row.details["worst"]
    assert rows[0].value < 0.1  # words are not made to wait for media


def test_no_request_of_a_case_is_asked_twice() -> None:
    assert all(len(set(case.says)) == len(case.says) == service.ROUNDS + 1 for case in CASES)


def test_a_reply_without_the_medium_that_was_asked_for_is_no_figure(running: Started) -> None:
    async def asked() -> None:
        async with Client(running.url) as client:
            await service._asked(client, service.Case("an image", ("image",), 3.0, ("play a drum",)), 0)

    with pytest.raises(ValueError, match=r"'play a drum' was answered with audio; expected image\."):
        asyncio.run(asked())


def test_a_medium_that_failed_is_no_figure(running: Started) -> None:
    async def asked() -> None:
        async with Client(running.url) as client:
            await service.ask(client, "draw a broken bell", seed=0)

    with pytest.raises(ValueError, match="the image failed: out of paint"):
        asyncio.run(asked())


def test_the_memory_is_that_of_the_service_and_its_children(running: Started) -> None:
    row = asyncio.run(service.memory_row(running))

    members = family(running.pid)
    alone = service._pss_bytes(running.pid, Path("/proc")) / 1e9
    assert len(members) == 2
    assert members[0] == running.pid
    assert alone < resident_gb(running.pid) < 1
    assert row.details is not None
    assert row.value >= row.details["at rest"] > alone
    assert row.details["processes"] == 2


def test_pss_is_summed_over_a_family_and_nobody_else(tmp_path: Path) -> None:
    processes = {1: (0, 900), 20: (1, 100), 21: (20, 30), 22: (21, 7), 30: (1, 5000), 23: (20, None)}
    for pid, (parent, kilobytes) in processes.items():
        folder = tmp_path / str(pid)
        folder.mkdir()
        (folder / "stat").write_text(f"{pid} (ray: (x) {parent}) S {parent} 1 1")
        if kilobytes is not None:  # 23 ends between the two looks
            (folder / "smaps_rollup").write_text(
                f"00400000-7fff rollup\nRss: {9 * kilobytes} kB\nPss:     {kilobytes} kB\nPss_Anon:  1 kB\n"
            )
    (tmp_path / "meminfo").write_text("")

    members = family(20, tmp_path)
    assert (members[0], sorted(members)) == (20, [20, 21, 22, 23])
    assert members.index(21) < members.index(22)
    assert resident_gb(20, tmp_path) == pytest.approx(137 * 1024 / 1e9)


def test_what_was_started_is_ended_with_its_children() -> None:
    port = _free_port()
    with started(
        [sys.executable, "-m", "tests.slow_service", str(port)], f"http://127.0.0.1:{port}"
    ) as found:
        members = family(found.pid)

    assert len(members) == 2
    assert _are_gone(members)


def test_a_service_that_does_not_end_is_killed_with_its_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "END_WITHIN_S", 0.2)
    port = _free_port()
    stubborn = (
        "import runpy, signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        f"sys.argv = ['slow_service', '{port}']; runpy.run_module('tests.slow_service', run_name='__main__')"
    )
    with started([sys.executable, "-c", stubborn], f"http://127.0.0.1:{port}") as found:
        members = family(found.pid)

    assert len(members) == 2
    assert _are_gone(members)


def _are_gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 10
    while any(_lives(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(_lives(pid) for pid in pids)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_service_that_ends_early_is_told_with_its_last_words() -> None:
    command = [sys.executable, "-m", "tests.slow_service", "0", "--mute"]
    with (
        pytest.raises(ValueError, match=r"ended before it was ready\. It said: patchbay: the paint is out\."),
        started(command, "http://127.0.0.1:9"),
    ):
        pass


def test_a_running_service_is_measured_by_its_url(
    running: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "service", "--url", running.url, "--quick", "--json"]) == 0

    result = json.loads(capsys.readouterr().out)
    assert result["bench"] == "service"
    assert [row["case"] for row in result["rows"]] == [case.name for case in CASES]
    assert result["rows"][1]["ratio"] == pytest.approx(result["rows"][1]["value"] / 3.0, abs=1e-3)


def test_a_url_belongs_to_the_bench_of_the_service(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "llm", "--url", "http://127.0.0.1:8000"])

    assert "--url belongs to service" in capsys.readouterr().err


def test_a_run_starts_asks_and_weighs_one_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real way, but for the program that is started."""
    from services.presets import load_preset

    commands: list[list[str]] = []
    port = _free_port()
    real = service.started

    def instead(command: list[str], url: str):  # type: ignore[no-untyped-def]
        commands.append(command)
        return real([sys.executable, "-m", "tests.slow_service", str(port)], url)

    monkeypatch.setattr(service, "_free_port", lambda: port)
    monkeypatch.setattr(service, "started", instead)

    rows: list[BenchRow] = service.run(load_preset("toybox"), quick=True)

    assert commands[0][-6:] == ["--preset", "toybox", "--host", "127.0.0.1", "--port", str(port)]
    assert [row.case for row in rows[:2]] == ["start to the answering page", "start to all decoders ready"]
    assert (rows[-1].case, rows[-1].unit, rows[-1].peer_value) == (
        "memory while three media are made",
        "GB",
        8.0,
    )
    assert len(rows) == 2 + len(CASES) + 1
