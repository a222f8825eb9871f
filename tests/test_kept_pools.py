"""What training makes of its pools once, and keeps."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from alignment.embedded import pools


def test_what_a_model_made_of_a_pool_is_kept_until_the_model_or_the_pool_changes(tmp_path: Path) -> None:
    rows, calls = np.arange(40, dtype=np.float32)[:, None], list[int]()

    def made_with(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
        def encode(batch: torch.Tensor) -> torch.Tensor:
            calls.append(len(batch))
            return batch * factor

        return encode

    path = tmp_path / "features.npy"

    for factor, number, batches in [
        (2.0, 40, [16, 16, 8]), (2.0, 40, [16]), (2.002, 40, [16]),
        (3.0, 40, [16, 16, 8]), (3.0, 20, [16, 4]),
    ]:  # fmt: skip
        calls.clear()
        found = pools.encoded(path, rows[:number], made_with(factor), 16)
        assert calls == batches
        np.testing.assert_allclose(found, rows[:number] * round(factor), rtol=1e-2)
