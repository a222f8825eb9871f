"""The adapters that a preset allows, and the shelf on which a box keeps those that it has loaded.

A request names an adapter; which folder that is, only the preset says. An adapter is loaded when it is first
asked for and stays until others need its place, or until it is told to go; never while a request uses it.
Loads no torch.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, Self, TypeVar

from services.errors import BadRequest, Conflict, PresetProblem, ServiceError, Unavailable
from services.presets import AdapterPreset, Preset

RETRY_AFTER_S = 5


class Adapter(Protocol):
    """What a box reads from an adapter's folder."""

    @property
    def num_bytes(self) -> int:
        """What it takes in memory."""
        ...

    def to(self, device: str, /) -> Self:
        """Return it on a device."""
        ...


A = TypeVar("A", bound=Adapter)


@dataclass(frozen=True)
class AdapterState:
    """One adapter of a box: whether it is in memory, how large it is there, and how many requests use it."""

    name: str
    box: str
    loaded: bool
    num_bytes: int
    users: int


class AdapterShelf(Generic[A]):
    """The adapters of one box. Any thread may use it."""

    def __init__(self, preset: Preset, box: str) -> None:
        self.preset, self.box = preset, box
        self.device = preset.device
        self.folders = {
            name: preset.weights_folder / adapter.folder
            for name, adapter in preset.adapters.items()
            if adapter.box == box
        }
        self.most_bytes = preset.limits.max_adapter_mb * 2**20
        self._loaded: OrderedDict[str, A] = OrderedDict()  # the one used last comes last
        self._users = dict.fromkeys(self.folders, 0)
        self._lock = threading.Lock()  # never held for long: event loops wait for it
        self._reading = threading.Lock()

    @contextmanager
    def holding(self, name: str) -> Iterator[None]:
        """Keep an adapter from being put away, whether it is loaded already or not."""
        self._expect(name)
        with self._lock:
            self._users[name] += 1
        try:
            yield
        finally:
            with self._lock:
                self._users[name] -= 1

    def get(self, name: str, read: Callable[[str, Path], A]) -> A:
        """Return an adapter that is being held; ``read`` makes it from its name and folder if need be.

        Raises PresetProblem if it cannot be loaded, and Unavailable if those in use leave no room for it.
        """
        self._expect(name)
        with self._reading:
            if name not in self._loaded:
                try:
                    adapter = read(name, self.folders[name])
                except ValueError as error:
                    raise PresetProblem(
                        self._hidden(f"The adapter {name!r} cannot be loaded: {error}"),
                        code="adapter_invalid",
                    ) from error
                except (ArithmeticError, AttributeError, KeyError, OSError, TypeError) as error:
                    raise PresetProblem(
                        self._hidden(
                            f"The adapter {name!r} cannot be loaded: {type(error).__name__}: {error}. "
                            f"Expected files in {self.folders[name]} as peft or diffusers write them; copy "
                            f"them again."
                        ),
                        code="adapter_invalid",
                    ) from error
                with self._lock:
                    self._make_room(name, adapter.num_bytes)
                placed = adapter.to(self.device)
                with self._lock:
                    self._loaded[name] = placed
            with self._lock:
                self._loaded.move_to_end(name)
                return self._loaded[name]

    def _hidden(self, message: str) -> str:
        """Return a message without the place of the weights: whoever sent the request reads it."""
        return message.replace(f"{self.preset.weights_folder}/", "")

    def unload(self, name: str) -> bool:
        """Put an adapter away; return whether it was loaded. Raises Conflict while requests use it."""
        self._expect(name)
        with self._lock:
            if users := self._users[name]:
                raise Conflict(
                    f"The adapter {name!r} is used by {users} requests now. Try again when they have ended.",
                    code="adapter_in_use",
                    retry_after_s=RETRY_AFTER_S,
                )
            return self._loaded.pop(name, None) is not None

    def states(self) -> list[AdapterState]:
        """Return what there is, in the order of the preset."""
        with self._lock:
            return [
                AdapterState(
                    name,
                    self.box,
                    name in self._loaded,
                    self._loaded[name].num_bytes if name in self._loaded else 0,
                    self._users[name],
                )
                for name in self.folders
            ]

    def _make_room(self, name: str, num_bytes: int) -> None:
        """Put away what was not used for the longest time until ``num_bytes`` more fit. The lock is held."""
        if num_bytes > self.most_bytes:
            raise PresetProblem(
                f"The adapter {name!r} takes {num_bytes / 2**20:.1f} MB; at most "
                f"{self.most_bytes / 2**20:g} MB are kept. Raise limits.max_adapter_mb in the preset.",
                code="adapter_invalid",
            )
        idle = [other for other in self._loaded if not self._users[other]]
        while sum(adapter.num_bytes for adapter in self._loaded.values()) + num_bytes > self.most_bytes:
            if not idle:
                raise Unavailable(
                    f"There is no room for the adapter {name!r} beside those in use. Try again soon.",
                    code="adapters_full",
                    retry_after_s=RETRY_AFTER_S,
                )
            del self._loaded[idle.pop(0)]

    def _expect(self, name: str) -> None:
        if name not in self.folders:
            raise no_adapter(name, self.box, self.preset.adapters)


def chosen_adapters(names: Collection[str], adapters: Mapping[str, AdapterPreset]) -> dict[str, str]:
    """Return, by box, the adapters that a request names: known ones only, and at most one per box."""
    chosen: dict[str, str] = {}
    for name in dict.fromkeys(names):
        if name not in adapters:
            raise no_adapter(name, None, adapters).at("lora")
        box = adapters[name].box
        if box in chosen:
            raise BadRequest(
                f"The adapters {chosen[box]!r} and {name!r} are both for {_spoken(box)}, which can have one "
                f"at a time. Leave one out.",
                code="invalid_value",
                param="lora",
            )
        chosen[box] = name
    return chosen


def no_adapter(name: str, box: str | None, adapters: Mapping[str, AdapterPreset]) -> ServiceError:
    """Return the error for a name that the preset does not have, or not for this box."""
    known = [each for each, adapter in adapters.items() if box in (None, adapter.box)]
    for_box = f" for {_spoken(box)}" if box else ""
    return BadRequest(
        f"There is no adapter {name!r:.80}{for_box}; expected "
        f"{', '.join(known) or 'none at all'}. Leave lora out, or name one that is there.",
        code="adapter_not_found",
    )


def _spoken(box: str) -> str:
    return "the language model" if box == "language_model" else box


def split_model(model: str, adapters: Mapping[str, AdapterPreset]) -> tuple[str, str | None]:
    """Return preset and adapter of a model's name: ``toybox:pirate`` is the preset toybox with pirate."""
    name, colon, adapter = model.partition(":")
    return (name, adapter) if colon and adapter in adapters else (model, None)
