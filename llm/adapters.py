"""The seam for parts that live inside the language model's layers.

An adapter changes an unforked Hugging Face model in place: it registers new modules and wraps or
hooks what is there. Before every forward pass it is told what the pass feeds, and after it, it forgets.
LoRA is not one of these; it comes from peft.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

PREFIX = "adapter"


@dataclass(frozen=True, eq=False, slots=True)
class Step:
    """What one forward pass feeds, in training and in generation alike.

    ``media`` ``(B, T)`` bool is True where tokens of a medium lie, False at words, signals and padding. A
    pass that feeds one token after another, as generation does, has positions of media in the passes of
    the prompt alone.
    """

    media: Tensor


class LMAdapter(Protocol):
    """Something that installs itself into a causal language model.

    The contract: every new parameter has a path component named ``adapter`` (a child module of that name,
    at any depth); the names of all others stay; the logits are unchanged until the adapter is trained.
    """

    def install(self, lm: nn.Module) -> None:
        """Change ``lm`` in place."""
        ...

    def bind(self, step: Step) -> AbstractContextManager[None]:
        """Know ``step`` for as long as the context lasts, which is one pass; know nothing outside of it."""
        ...


@contextmanager
def bound(adapters: Sequence[LMAdapter], step: Step) -> Iterator[None]:
    """Let all ``adapters`` know ``step`` while the context lasts, also where the pass fails."""
    with ExitStack() as stack:
        for adapter in adapters:
            stack.enter_context(adapter.bind(step))
        yield


def install_adapters(lm: nn.Module, adapters: Sequence[LMAdapter]) -> None:
    """Install ``adapters`` in order.

    Raises:
        ValueError: one of them renamed or removed a parameter, or named a new one against the contract.

    """
    for adapter in adapters:
        before = {name for name, _ in lm.named_parameters()}
        adapter.install(lm)
        after = {name for name, _ in lm.named_parameters()}
        lost = before - after
        foreign = {name for name in after - before if not is_adapter_name(name)}
        if lost or foreign:
            raise ValueError(
                f"{type(adapter).__name__} lost the parameters {sorted(lost)} and added {sorted(foreign)}; "
                f"expected all old names to stay and new ones under a module named {PREFIX!r}."
            )


def is_adapter_name(name: str) -> bool:
    """Return whether a parameter of this name belongs to an adapter."""
    return PREFIX in name.split(".")


def adapter_parameters(lm: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters that adapters brought, with their names in ``lm``."""
    for name, parameter in lm.named_parameters():
        if is_adapter_name(name):
            yield name, parameter
