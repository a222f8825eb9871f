"""``/v1/adapters``: what LoRA there is, which of it is in memory, and the command that puts one away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from fastapi import APIRouter

from services.adapters import AdapterState
from services.errors import NotFound
from services.presets import AdapterPreset


class AdapterKeeper(Protocol):
    """Who knows all boxes."""

    async def adapters(self) -> Sequence[AdapterState]:
        """Return the adapters of every replica of every box."""
        ...

    async def unload_adapter(self, name: str) -> int:
        """Put an adapter away; return in how many replicas it was loaded."""
        ...


def adapter_routes(known: Mapping[str, AdapterPreset], keeper: AdapterKeeper) -> APIRouter:
    """Return the routes."""
    router = APIRouter(prefix="/v1/adapters")

    @router.get("")
    async def adapters() -> dict[str, Any]:
        states = await keeper.adapters()
        return {"object": "list", "data": [_described(name, known[name], states) for name in known]}

    @router.post("/{name}/unload")
    async def unload(name: str) -> dict[str, Any]:
        if name not in known:
            raise NotFound(
                f"There is no adapter {name!r:.80}; there are: {', '.join(known) or 'none'}.",
                code="adapter_not_found",
            )
        return {"id": name, "object": "adapter", "unloaded": await keeper.unload_adapter(name)}

    return router


def _described(name: str, adapter: AdapterPreset, states: Sequence[AdapterState]) -> dict[str, Any]:
    own = [state for state in states if state.name == name]
    return {
        "id": name,
        "object": "adapter",
        "box": adapter.box,
        "loaded": sum(state.loaded for state in own),
        "bytes": max((state.num_bytes for state in own), default=0),
        "in_use": sum(state.users for state in own),
    }
