"""Loading the weights of one box: one at a time, with one kind of error."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from services.errors import PresetProblem

# While transformers or diffusers build a model, modules that other threads build get no weights.
LOADING = threading.RLock()


@contextmanager
def loading(box: str) -> Iterator[None]:
    """Let one box load at a time, and turn what that raises into one error that names the box."""
    if (transformers_logging := sys.modules.get("transformers.utils.logging")) is not None:
        transformers_logging.disable_progress_bar()
    try:
        with LOADING:
            yield
    except (FileNotFoundError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError) or "missing" in str(error)
        raise PresetProblem(
            f"The {box} cannot be loaded: {error}",
            code="weights_missing" if missing else "weights_invalid",
        ) from error
    except (AttributeError, KeyError, OSError, TypeError) as error:  # what libraries raise on odd files
        raise PresetProblem(
            f"The {box} cannot be loaded: {type(error).__name__}: {error}. Its files are not as its library "
            f"expects them; copy or download its folder again.",
            code="weights_invalid",
        ) from error
