"""Processes of a pool end when the one that started them is gone, whatever ended it."""

from __future__ import annotations

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """Let this process end as soon as its parent has. Call it once, at the beginning of a child.

    Without it, a parent that is killed leaves children that work on for nobody, and then wait for ever.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("This is no child: no process of multiprocessing started it.")

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="end-with-parent", daemon=True).start()
