"""What requests call the settings of a decoder, where that differs from what decoders call them."""

from __future__ import annotations

import re

IN_REQUESTS = {
    "steps": "num_inference_steps",
    "width_px": "size",
    "height_px": "size",
    "duration_s": "seconds",
}


def in_requests(message: str, name: str) -> str:
    """Return a decoder's message about its setting ``name`` as the author of a request understands it."""
    message = message.replace("width_px, height_px", "size")
    if name in ("width_px", "height_px"):
        message = message.replace(f"{name} is", f"the {name.removesuffix('_px')} in size is", 1)
    for inner, told in IN_REQUESTS.items():
        message = re.sub(rf"\b{inner}\b", told, message)
    return message[0].upper() + message[1:] if message.startswith("the ") else message
