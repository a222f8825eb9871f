from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The YAML of a complete preset with tiny models."""
    from tests.tiny import write_tiny_preset

    return write_tiny_preset(tmp_path_factory.mktemp("tiny"))
