from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from services.artefacts import ArtefactStore
    from services.presets import Preset


@pytest.fixture(scope="session")
def tiny_preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The YAML of a complete preset with tiny models."""
    from tests.tiny import write_tiny_preset

    return write_tiny_preset(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def preset(tmp_path: Path) -> Preset:
    """The values of that preset, without any weights."""
    from services.presets import Preset
    from tests.tiny import tiny_values

    return Preset(**tiny_values(), file=tmp_path / "tiny.yaml")  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> ArtefactStore:
    """An empty store of files."""
    from services.artefacts import ArtefactStore

    return ArtefactStore((tmp_path / "files").as_uri())
