"""Where media live: bytes under ids that nobody can guess, in a folder or any fsspec file system.

Processes hand each other the ids and read the bytes here, so that no medium travels through a
deployment handle.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import fsspec

from encoders.media import Modality
from services.errors import NotFound

logger = logging.getLogger(__name__)

ID_PATTERN = re.compile(r"file-[0-9a-f]{32}")


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """One stored file. ``sha256`` names its content, ``id`` this copy of it.

    A medium that a decoder made carries its ``caption`` and ``manifest``.
    """

    id: str
    sha256: str
    bytes: int
    media_type: str
    filename: str
    created_at: int
    purpose: str = "user_data"
    modality: Modality | None = None
    caption: str | None = None
    manifest: Mapping[str, Any] | None = field(default=None, hash=False)


class ArtefactStore:
    """Keeps artefacts under one URL, for example ``file:///var/lib/patchbay``."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.files, self.root = fsspec.core.url_to_fs(url)
        self.files.makedirs(self.root, exist_ok=True)

    def put(
        self,
        data: bytes,
        *,
        media_type: str,
        filename: str,
        purpose: str = "user_data",
        modality: Modality | None = None,
        caption: str | None = None,
        manifest: Mapping[str, Any] | None = None,
        artefact_id: str | None = None,
    ) -> Artefact:
        """Store ``data`` under a new id, or under ``artefact_id`` in place of what is there."""
        artefact = Artefact(
            id=artefact_id or f"file-{secrets.token_hex(16)}",
            sha256=hashlib.sha256(data).hexdigest(),
            bytes=len(data),
            media_type=media_type,
            filename=filename,
            created_at=int(time.time()),
            purpose=purpose,
            modality=modality,
            caption=caption,
            manifest=manifest,
        )
        self._write(self._path(artefact.id, "bin"), data)
        # The description comes last: an id that can be looked up always has its bytes.
        self._write(self._path(artefact.id, "json"), json.dumps(asdict(artefact)).encode())
        return artefact

    def _write(self, path: str, data: bytes) -> None:
        """Write a file at one stroke: who reads it meanwhile sees what was there before, and all of it."""
        self.files.pipe_file(f"{path}.part", data)
        self.files.mv(f"{path}.part", path)

    def get(self, artefact_id: str) -> Artefact:
        """Return the description of an artefact."""
        if not ID_PATTERN.fullmatch(artefact_id):
            raise self._unknown(artefact_id)
        try:
            values = json.loads(self.files.cat_file(self._path(artefact_id, "json")))
        except FileNotFoundError:
            raise self._unknown(artefact_id) from None
        if values["modality"] is not None:
            values["modality"] = Modality(values["modality"])
        return Artefact(**values)

    def read(self, artefact_id: str, start: int | None = None, end: int | None = None) -> bytes:
        """Return the bytes of an artefact from ``start`` up to, not including, ``end``."""
        if not ID_PATTERN.fullmatch(artefact_id):
            raise self._unknown(artefact_id)
        try:
            data: bytes = self.files.cat_file(self._path(artefact_id, "bin"), start=start, end=end)
        except FileNotFoundError:
            raise self._unknown(artefact_id) from None
        return data

    def delete(self, artefact_id: str) -> None:
        """Remove an artefact for good."""
        self.get(artefact_id)
        try:
            self.files.rm_file(self._path(artefact_id, "json"))
            self.files.rm_file(self._path(artefact_id, "bin"))
        except FileNotFoundError:  # somebody else removed it at the same moment
            raise self._unknown(artefact_id) from None

    def of_purpose(self, purpose: str) -> list[Artefact]:
        """Return all artefacts that were stored for ``purpose``."""
        found = []
        for name in self._ids():
            try:
                artefact = self.get(name)
            except (NotFound, ValueError, KeyError, TypeError):  # removed meanwhile, or no file of ours
                continue
            if artefact.purpose == purpose:
                found.append(artefact)
        return found

    def _ids(self) -> list[str]:
        names = (str(path).rsplit("/", 1)[-1] for path in self.files.ls(self.root, detail=False))
        return [name.removesuffix(".json") for name in names if name.endswith(".json")]

    def sweep(self, older_than_s: float) -> int:
        """Remove what was stored longer ago than ``older_than_s`` seconds; return how many artefacts."""
        limit = time.time() - older_than_s
        removed = 0
        for name in self._ids():
            try:
                artefact = self.get(name)
                if artefact.created_at < limit:
                    self.delete(artefact.id)
                    removed += 1
            except NotFound:  # removed meanwhile, or no file of ours
                continue
            except (ValueError, KeyError, TypeError):
                path = self._path(name, "json")
                logger.warning("%s describes no file and stays. Remove it by hand.", path)
        return removed

    def _path(self, artefact_id: str, suffix: str) -> str:
        return f"{self.root}/{artefact_id}.{suffix}"

    @staticmethod
    def _unknown(artefact_id: str) -> NotFound:
        return NotFound(
            f"No file has the id {artefact_id[:64]!r}. Upload it with POST /v1/files and use the id "
            "of the answer; files expire.",
            code="file_not_found",
        )
