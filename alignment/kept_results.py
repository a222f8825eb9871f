"""Results of a long measurement, kept as they come, so that it goes on where it was interrupted."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_ABOUT = "about.json"
_BLOCK = 1 << 20


class KeptResults:
    """A folder with one JSON file for each task that is done.

    Args:
        folder: made when it is not there.
        measured: folders of the weights that are measured; results of others are refused.
        settings: how they are measured; results of other settings are refused too.

    Raises:
        ValueError: ``folder`` holds something else, or results of other weights or settings.

    """

    def __init__(self, folder: Path, measured: Iterable[Path], settings: str = "") -> None:
        self.folder = folder
        self._began = time.monotonic()
        own = {"weights": digest_of(measured), "settings": settings}
        self._about: dict[str, Any] = {**own, "seconds": 0.0}
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / _ABOUT
        if path.is_file():
            there = json.loads(path.read_text(encoding="utf-8"))
            if other := [name for name in own if there.get(name) != own[name]]:
                raise ValueError(
                    f"{folder} holds results of other {' and '.join(other)}; expected those of this preset "
                    f"as it is now. Name another folder, or remove this one."
                )
            self._about = there
        elif any(folder.iterdir()):
            raise ValueError(f"{folder} holds other files; expected an empty folder. Name another one.")
        self._before_s = float(self._about["seconds"])
        self._write(path, self._about)

    @property
    def seconds(self) -> float:
        """How long the measurement has taken, interrupted runs included up to their last result."""
        return self._before_s + time.monotonic() - self._began

    def get(self, title: str, task: Any) -> Any | None:
        """Return the result of a task, None where it is not there yet."""
        path = self._path(title, task)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def put(self, title: str, task: Any, result: Any) -> None:
        """Keep the result of a task, as JSON has it."""
        self._write(self._path(title, task), result)
        self._write(self.folder / _ABOUT, {**self._about, "seconds": round(self.seconds, 1)})

    def _path(self, title: str, task: Any) -> Path:
        name = hashlib.sha256(f"{title}: {task!r}".encode()).hexdigest()[:24]
        return self.folder / f"{name}.json"

    @staticmethod
    def _write(path: Path, value: Any) -> None:
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(value), encoding="utf-8")
        partial.replace(path)


def digest_of(folders: Iterable[Path]) -> str:
    """Return one SHA-256 digest of everything in some folders; which order they come in does not matter."""
    digests = []
    for folder in folders:
        whole = hashlib.sha256()
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            whole.update(f"{path.relative_to(folder)}\n{path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    whole.update(block)
        digests.append(whole.hexdigest())
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()
