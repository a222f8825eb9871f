"""The seam for parts that live inside the language model's layers.

An adapter changes an unforked Hugging Face model in place: it registers new modules and wraps or
hooks what is there. LoRA is not one of these; it comes from peft.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor, nn

PREFIX = "adapter"


class LMAdapter(Protocol):
    """Something that installs itself into a causal language model.

    The contract: every new parameter has a path component named ``adapter`` (a child module of that name,
    at any depth); the names of all others stay; the logits are unchanged until the adapter is trained.
    """

    def install(self, lm: nn.Module) -> None:
        """Change ``lm`` in place."""
        ...


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
