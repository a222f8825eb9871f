"""The whole service as a newcomer meets it: started, asked over HTTP, weighed, and ended.

What is started is what ``make run`` starts, on a free port. Every request is one that it has not seen. The
time of a request ends when the last byte of the last medium is here, and a reply that does not hold
exactly the media that were asked for ends the bench. Memory is what the kernel counts as proportional set
size, shared pages divided among those who share them, of the service and all of its children.

The values beside ours are the ones that this project wants to keep on two cores: a ratio below 1 keeps them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx

from services.bench import BenchRow
from services.client import Client
from services.doctor import expect_files
from services.presets import Preset

WANTED = "wanted, at most"
START_S = 360.0
MEMORY_GB = 8.0
ROUNDS, QUICK_ROUNDS = 5, 2
WITHIN_S = 600.0
END_WITHIN_S = 60.0
PORTS = range(20_000, 30_000)  # below those that the system hands out, to Ray's processes too
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
HELLOS = ("hello", "hi there", "good morning", "good evening", "hey", "hello again")


@dataclass(frozen=True)
class Case:
    """Requests of one kind: what the reply must hold, and in how many seconds.

    ``until_text`` counts to the first words of the reply and not to its end. The first of ``says`` warms up.
    """

    name: str
    media: tuple[str, ...]
    wanted_s: float
    says: tuple[str, ...]
    until_text: bool = False


CASES = (
    Case("first text token", (), 0.5, HELLOS, until_text=True),
    Case("an image", ("image",), 3.0, tuple(f"draw a big {colour} bell" for colour in COLOURS)),
    Case(
        "a sound",
        ("audio",),
        4.0,
        tuple(
            f"play a {pitch} {thing} sounding twice"
            for pitch in ("low", "high")
            for thing in ("drum", "bell", "bee")
        ),
    ),
    Case(
        "a video",
        ("video",),
        6.0,
        tuple(f"make a video of a small {colour} frog moving left" for colour in COLOURS),
    ),
    Case(
        "three media",
        ("audio", "image", "video"),
        8.0,
        tuple(
            f"draw a big {colour} bell and play a low drum sounding twice and then make a video of a small "
            f"{colour} frog moving left"
            for colour in COLOURS
        ),
    ),
)


@dataclass(frozen=True)
class Reply:
    """What came back: seconds to the first words and to the last byte, and the kinds of media, sorted."""

    first_text_s: float
    whole_s: float
    media: tuple[str, ...]


@dataclass(frozen=True)
class Started:
    """A service that this bench started, and how long it took."""

    url: str
    pid: int
    page_s: float
    ready_s: float


def run(preset: Preset, quick: bool) -> list[BenchRow]:
    """Start the service, measure, and end it."""
    expect_files(preset)
    port = _free_port()
    command = [sys.executable, "-P", "-m", "services.cli", "serve"]
    command += ["--preset", preset.as_argument, "--host", "127.0.0.1", "--port", str(port)]
    with started(command, f"http://127.0.0.1:{port}") as service:
        rows = [
            BenchRow("start to the answering page", service.page_s, "s", WANTED, START_S),
            BenchRow("start to all decoders ready", service.ready_s, "s", WANTED, START_S),
        ]
        return rows + measure(service.url, quick) + [asyncio.run(memory_row(service))]


def measure(url: str, quick: bool) -> list[BenchRow]:
    """Return a row for each of :data:`CASES`, asked of a service that runs."""
    return asyncio.run(_latencies(url, QUICK_ROUNDS if quick else ROUNDS))


async def _latencies(url: str, rounds: int) -> list[BenchRow]:
    async with Client(url) as client:
        for case in CASES:
            await _asked(client, case, 0)
        rows = []
        for case in CASES:
            replies = [await _asked(client, case, turn) for turn in range(1, rounds + 1)]
            seconds = [reply.first_text_s if case.until_text else reply.whole_s for reply in replies]
            details = {"worst": max(seconds)}
            rows.append(BenchRow(case.name, statistics.median(seconds), "s", WANTED, case.wanted_s, details))
    return rows


async def _asked(client: Client, case: Case, turn: int) -> Reply:
    text = case.says[turn % len(case.says)]
    reply = await ask(client, text, seed=turn)
    if reply.media != case.media:
        raise ValueError(
            f"{text!r} was answered with {_named(reply.media)}; expected {_named(case.media)}. A figure of "
            f"another reply would say nothing. Ask it on the chat page, and see `patchbay doctor`."
        )
    return reply


def _named(media: Sequence[str]) -> str:
    return " and ".join(media) or "no media"


async def ask(client: Client, text: str, seed: int) -> Reply:
    """Send one request; read the stream and fetch the files of its media.

    Raises:
        ValueError: a medium failed, or there were no words.

    """
    began = time.perf_counter()
    first_text_s: float | None = None
    done: list[tuple[str, str]] = []
    async with contextlib.aclosing(client.stream([{"role": "user", "content": text}], seed=seed)) as chunks:
        async for chunk in chunks:
            for choice in chunk["choices"]:
                delta = choice["delta"]
                if delta.get("content") and first_text_s is None:
                    first_text_s = time.perf_counter() - began
                for part in delta.get("parts", ()):
                    if part["status"] == "failed":
                        raise ValueError(f"{text!r}: the {part['type']} failed: {part['error']['message']}")
                    if part["status"] == "done":
                        done.append((part["type"], part["url"]))
    for _, url in done:
        await client.download(url)
    if first_text_s is None:
        raise ValueError(f"{text!r} was answered without words; expected some. See `patchbay doctor`.")
    return Reply(first_text_s, time.perf_counter() - began, tuple(sorted(kind for kind, _ in done)))


async def memory_row(service: Started) -> BenchRow:
    """Weigh the service at rest, and every quarter of a second while it makes three media."""
    at_rest = resident_gb(service.pid)
    async with Client(service.url) as client:
        reply = asyncio.create_task(_asked(client, CASES[-1], 1))
        most = at_rest
        while not reply.done():
            most = max(most, await asyncio.to_thread(resident_gb, service.pid))
            await asyncio.sleep(0.25)
        await reply
    details = {"at rest": at_rest, "processes": float(len(family(service.pid)))}
    return BenchRow("memory while three media are made", most, "GB", WANTED, MEMORY_GB, details)


def resident_gb(pid: int, proc: Path = Path("/proc")) -> float:
    """Return the proportional set size of a process and all of its descendants, in GB of 10^9 bytes."""
    return sum(_pss_bytes(member, proc) for member in family(pid, proc)) / 1e9


def family(pid: int, proc: Path = Path("/proc")) -> list[int]:
    """Return a process and all of its descendants, parents before children."""
    children: dict[int, list[int]] = {}
    for entry in proc.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
                # "12 (a name) S 7 ...": the name may hold anything, brackets too
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    members = [pid]
    for member in members:
        members += children.get(member, [])
    return members


def _pss_bytes(pid: int, proc: Path) -> int:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in (proc / str(pid) / "smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name == "Pss":
                return int(rest.split()[0]) * 1024
    return 0  # it has ended


@contextlib.contextmanager
def started(command: Sequence[str], url: str) -> Iterator[Started]:
    """Start a service, wait until it can do everything, and end it and its children afterwards.

    Raises:
        ValueError: it ended, or was not ready in ten minutes; the message holds the end of its output.

    """
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryFile("w+b") as output:
        began = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C reaches this program, which then ends the other
        )
        try:
            page_s, ready_s = _wait(url, process, output, began)
            yield Started(url, process.pid, page_s, ready_s)
        finally:
            _end(process)


def _wait(url: str, process: subprocess.Popen[bytes], output: IO[bytes], began: float) -> tuple[float, float]:
    page_s = None
    with httpx.Client(base_url=url, timeout=30.0, trust_env=False) as http:
        while time.perf_counter() - began < WITHIN_S:
            if process.poll() is not None:
                raise ValueError(f"The service ended before it was ready. {_last_words(output)}")
            if page_s is None and _answers(http, "/"):
                page_s = time.perf_counter() - began
            if page_s is not None and _answers(http, "/health", lambda said: said.json()["status"] == "ok"):
                return page_s, time.perf_counter() - began
            time.sleep(0.1)
    raise ValueError(f"The service was not ready within {WITHIN_S:.0f} s. {_last_words(output)}")


def _answers(
    http: httpx.Client, path: str, fits: Callable[[httpx.Response], bool] = lambda said: True
) -> bool:
    try:
        said = http.get(path)
    except httpx.HTTPError:
        return False
    return said.status_code == 200 and fits(said)


def _last_words(output: IO[bytes]) -> str:
    output.seek(0)
    said = " ".join(output.read().decode(errors="replace").split())
    return f"It said: {said[-600:] or 'nothing'}. See `patchbay doctor`."


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the service to end, and kill what it leaves behind."""
    with contextlib.ExitStack() as handles:
        members = []
        for pid in family(process.pid) if process.poll() is None else ():
            with contextlib.suppress(ProcessLookupError):
                members.append(os.pidfd_open(pid))  # means this process, also when its number is used again
                handles.callback(os.close, members[-1])
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_WITHIN_S)
        for member in members:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(member, signal.SIGKILL)
        process.wait()


def _free_port() -> int:
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise ValueError(
        f"No port of 127.0.0.1 from {PORTS[0]} to {PORTS[-1]} is free. Free one, then try again."
    )
