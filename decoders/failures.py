"""How a decoder says that it cannot, for whoever must tell a person. Loads no torch."""

import math


class QueueFull(Exception):
    """So much work waits that this request would be done too late; it was not taken.

    ``retry_after_s`` is when it would be taken, in whole seconds from now, as far as can be known.
    """

    def __init__(self, wait_s: float, allowed_s: float) -> None:
        self.retry_after_s = max(1, math.ceil(wait_s - allowed_s))
        super().__init__(
            f"This request would wait {wait_s:.0f} s for others; at most {allowed_s:g} s are allowed. "
            f"Try again in {self.retry_after_s} s, or ask for fewer steps or a smaller size."
        )


class DecoderOutOfMemory(MemoryError):
    """The request does not fit into memory, not even alone and in slices."""
