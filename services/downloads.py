"""Files of a hub repository, or the one at an address, brought into a folder and held against their digests.

What was broken off goes on where it stopped. A file that is whole is not asked for again.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, urlsplit

from services.errors import PresetProblem
from services.origins import Download, Origin
from services.weight_files import UNFINISHED

logger = logging.getLogger(__name__)

CHUNK_BYTES = 2**20
TIMEOUT_S = 30.0
PAUSES_S = (1.0, 5.0, 20.0)
"""Seconds before a broken connection is tried again, as long as nothing more comes."""
BROKEN = (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError)


@dataclass(frozen=True)
class RemoteFile:
    """One file as its origin describes it; ``size`` None where that is not told.

    ``sha256`` is that of its bytes, ``git_id`` the name that git gives to them; None where not known.
    """

    name: str
    size: int | None = None
    sha256: str | None = None
    git_id: str | None = None

    def is_whole(self, path: Path) -> bool:
        """Whether ``path`` holds this file. One without a SHA-256 may have been edited since it came."""
        if not path.is_file():
            return False
        if self.sha256 is not None:
            return self.size in (None, path.stat().st_size) and sha256_of(path) == self.sha256
        if path.suffix == ".json":
            return _is_json(path)
        return path.stat().st_size == self.size

    def fault(self, path: Path) -> str | None:
        """Say in what ``path``, which has just come, is another file than this; None if in nothing."""
        size = path.stat().st_size
        if self.size not in (None, size):
            return f"has {size:,} bytes; expected {self.size:,}"
        if self.sha256 is not None and sha256_of(path) != self.sha256:
            return f"has another SHA-256 than {self.sha256}"
        if self.sha256 is None and self.git_id is not None and _git_id(path) != self.git_id:
            return f"has another digest than {self.git_id}"
        return None


def listing(origin: Origin) -> list[RemoteFile]:
    """Ask an origin what of it is to be downloaded.

    Raises:
        PresetProblem: it cannot be reached, is not there, lets nobody in, or lacks a file.

    """
    download = _download(origin)
    if origin.is_address:
        return [_at_address(origin, download)]
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    with _in_words(origin):
        api = HfApi()
        if origin.gated:
            api.auth_check(origin.source)
        tree = list(api.list_repo_tree(origin.source, recursive=True, revision=origin.revision))
    files = {
        entry.path: RemoteFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
        for entry in tree
        if isinstance(entry, RepoFile) and _is_safe(entry.path)
    }
    wanted = [name for name in files if not any(fnmatch(name, pattern) for pattern in download.without)]
    for pattern in download.files:
        if not any(fnmatch(name, pattern) for name in wanted):
            raise PresetProblem(
                f"{origin.source} has no {pattern} at {_revision(origin)}; expected one for {origin.model}. "
                f"Look at https://huggingface.co/{origin.source}, and correct files in the preset.",
                code="not_on_hub",
            )
    return [files[name] for name in wanted if any(fnmatch(name, pattern) for pattern in download.files)]


def bring(origin: Origin, files: Sequence[RemoteFile], folder: Path) -> None:
    """Download ``files`` into ``folder``, and hold each against what its origin said of it.

    Raises:
        PresetProblem: as :func:`listing`; or the disk is full, or what came is another file. That is removed.

    """
    for file in files:
        path = folder / file.name
        with _in_words(origin):
            path.parent.mkdir(parents=True, exist_ok=True)
            _get(*_request(origin, file), file, path)
        if (fault := file.fault(path)) is not None:
            path.unlink()
            raise PresetProblem(
                f"{file.name} of {origin.source} {fault}. It was removed; run the same command again. If "
                f"that does not help, {origin.model} has changed where it is published.",
                code="damaged_download",
            )


def begun_bytes(file: RemoteFile, folder: Path) -> int:
    """Return how much of a broken-off download is there."""
    path = _unfinished(folder / file.name)
    return path.stat().st_size if path.is_file() else 0


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _git_id(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return False
    return True


def _is_safe(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _download(origin: Origin) -> Download:
    assert origin.download is not None, f"{origin.model} is not downloaded"
    return origin.download


def _revision(origin: Origin) -> str:
    return f"revision {origin.revision}" if origin.revision else "its newest revision"


# --- bytes --------------------------------------------------------------------------------------------
# The hub's own client begins a file anew when it was broken off, which may be ten gigabytes; this goes on.


def _at_address(origin: Origin, download: Download) -> RemoteFile:
    name = PurePosixPath(urlsplit(origin.source).path).name
    with _in_words(origin), _opened(origin.source, method="HEAD") as response:
        told = response.headers.get("Content-Length")
    size = int(told) if told and told.isdigit() else None
    if download.size_bytes is not None and size not in (None, download.size_bytes):
        raise PresetProblem(
            f"{origin.source} has {size:,} bytes; expected {download.size_bytes:,}. {origin.model} has "
            f"changed where it is published, or something stands between; nothing was downloaded. Put the "
            f"right file into {download.into} of the weights by hand.",
            code="damaged_download",
        )
    return RemoteFile(name, download.size_bytes or size, download.sha256)


def _request(origin: Origin, file: RemoteFile) -> tuple[str, dict[str, str]]:
    """Return the address of a file, and the headers that go with it."""
    if origin.is_address:
        return origin.source, {}
    from huggingface_hub import HfApi, get_token

    place = f"{origin.source}/resolve/{origin.revision or 'main'}/{quote(file.name)}"
    token = get_token()
    return f"{HfApi().endpoint}/{place}", {"Authorization": f"Bearer {token}"} if token else {}


def _get(address: str, headers: dict[str, str], file: RemoteFile, path: Path) -> None:
    """Download one file; when the connection breaks, go on after a pause as long as that helps."""
    partial = _unfinished(path)
    pauses = list(PAUSES_S)
    while True:
        begun = partial.stat().st_size if partial.is_file() else 0
        try:
            _go_on(address, headers, file, partial, begun)
        except urllib.error.HTTPError:
            raise
        except BROKEN as error:
            if partial.is_file() and partial.stat().st_size > begun:
                pauses = list(PAUSES_S)
            if not pauses:
                raise
            logger.info("%s: %s; going on", address, error)
            time.sleep(pauses.pop(0))
        else:
            partial.replace(path)
            return


def _go_on(address: str, headers: dict[str, str], file: RemoteFile, partial: Path, begun: int) -> None:
    from huggingface_hub.utils.tqdm import tqdm

    if file.size is not None and begun > file.size:
        begun = 0  # of another file
    if begun and begun == file.size:
        return
    ranged = {"Range": f"bytes={begun}-"} if begun else {}
    with _opened(address, headers | ranged) as response:
        if response.status != http.client.PARTIAL_CONTENT:
            begun = 0  # it sends everything again
        with (
            partial.open("ab" if begun else "wb") as target,
            tqdm(desc=file.name, total=file.size, initial=begun, unit="B", unit_scale=True) as bar,
        ):
            for chunk in _chunks(response):
                target.write(chunk)
                bar.update(len(chunk))
    if file.size is not None and (came := partial.stat().st_size) < file.size:
        raise http.client.IncompleteRead(b"", file.size - came)


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + UNFINISHED)


def _chunks(response: Any) -> Iterator[bytes]:
    while chunk := response.read(CHUNK_BYTES):
        yield chunk


class _WithoutToken(urllib.request.HTTPRedirectHandler):
    """Follows redirections, and tells no other host who asks."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        found = super().redirect_request(req, fp, code, msg, headers, newurl)
        if found is not None and urlsplit(newurl).netloc != urlsplit(req.full_url).netloc:
            found.remove_header("Authorization")
        return found


def _opened(address: str, headers: dict[str, str] | None = None, method: str = "GET") -> Any:
    request = urllib.request.Request(
        address, headers={"User-Agent": "patchbay"} | (headers or {}), method=method
    )
    return urllib.request.build_opener(_WithoutToken).open(request, timeout=TIMEOUT_S)


# --- what can go wrong --------------------------------------------------------------------------------


@contextmanager
def _in_words(origin: Origin) -> Iterator[None]:
    """Turn the errors of the network and of the hub's client into one that says what to do."""
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except errors.OfflineModeIsEnabled as error:
        raise PresetProblem(
            f"{origin.source} cannot be asked for, as HF_HUB_OFFLINE is set. Unset it, and run this again.",
            code="no_connection",
        ) from error
    except errors.HfHubHTTPError as error:
        raise _refused(origin, error.response.status_code, dict(error.response.headers)) from error
    except urllib.error.HTTPError as error:
        with error:
            raise _refused(origin, error.code, dict(error.headers)) from error
    except (httpx2.TransportError, *BROKEN) as error:
        reason = str(getattr(error, "reason", error)) or type(error).__name__
        raise PresetProblem(
            f"The connection to {origin.source} failed ({reason:.200}). What has come is kept: look at your "
            f"network, and run the same command again.",
            code="no_connection",
        ) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise PresetProblem(
                f"The disk became full while {origin.model} was downloaded. What has come is kept: make "
                f"room, and run the same command again.",
                code="disk_full",
            ) from error
        raise


def _refused(origin: Origin, status: int, headers: Mapping[str, str]) -> PresetProblem:
    """Return what to tell about an answer of the hub or of a server that is none of success."""
    page = f"https://huggingface.co/{origin.source}"
    code = next((value for name, value in headers.items() if name.lower() == "x-error-code"), None)
    match code, status:
        case "GatedRepo", _:
            return PresetProblem(
                f"{origin.source} is gated, and lets nobody in who did not accept its terms. First "
                f"{origin.gate}. Then run the same command again.",
                code="gated",
            )
        case "RevisionNotFound", _:
            return PresetProblem(
                f"{origin.source} has no {_revision(origin)}; expected the one that the preset names. See "
                f"which there are on {page}/commits/main, and correct it in the preset.",
                code="not_on_hub",
            )
        case ("RepoNotFound", _) | (None, 401) if not origin.is_address:
            return PresetProblem(
                f"The hub knows no {origin.source}, or hides it from you; expected {origin.model} there. "
                f"Look at {page}; if you may see it only when signed in: hf auth login",
                code="not_on_hub",
            )
    what = f"{origin.source} answered {status}; expected {origin.model}. "
    if status in (401, 403):
        what += f"You may not have it as you are: {origin.gate}. Then run the same command again."
    elif status == 404:
        what += "It is not there any more. Look where it is published now, and correct the preset."
    else:
        what += "The server has trouble. What has come is kept: run the same command again later."
    return PresetProblem(what, code="not_on_hub")
