"""What ``patchbay serve`` says when it cannot start."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve
from ray.exceptions import ActorDiedError

from deploy.serve import _why


def status(**deployments: str) -> Any:
    found = {name: SimpleNamespace(message=message) for name, message in deployments.items()}
    return SimpleNamespace(applications={"patchbay": SimpleNamespace(deployments=found)})


def test_a_proxy_that_never_came_up_is_one_sentence_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> None:
        raise ActorDiedError

    monkeypatch.setattr(serve, "status", nobody)
    told = _why(ActorDiedError())
    assert told.code == "not_started"
    assert told.message.startswith("The service could not start: The actor died unexpectedly")
    assert told.message.endswith("try again, or run `patchbay doctor` to see what is wrong.")
    assert "\n" not in told.message


def test_a_box_whose_weights_do_not_load_is_told_in_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    report = (
        "Traceback (most recent call last):\n  ...\nThe encoder cannot be loaded: x has shape (1,).\n more"
    )
    monkeypatch.setattr(serve, "status", lambda: status(Agent="", Encoder=report))
    told = _why(RuntimeError("Deploying application patchbay failed."))
    assert told.message == "The service could not start: The encoder cannot be loaded: x has shape (1,)."
