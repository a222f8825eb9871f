"""``patchbay eval ability``: does the language model keep what its base could do with words alone?

Stage 3 changes the language model for media. Here both the base and the tuned model are given dialogues
of words alone, in which media are told in brackets as in the base's own training, and neither may make a
medium. The base is the very same model with its adapter switched off.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel

from alignment.embedded.language import in_words
from alignment.shared_work import share
from alignment.system import MAX_NEW_TOKENS, Folders
from alignment.toybox.directions import make
from alignment.toybox.exercise import FreshScenes
from llm.generate import GenerationOptions, TextDelta, generate
from llm.model import LanguageModel
from llm.template import Dialogue

TOPICS = {
    "pictures told in words": "image-to-text",
    "videos told in words": "video-to-text",
    "sounds told in words": "audio-to-text",
    "requests repeated as captions": "text-to-image",
    "changes worked out in words": "conversation",
    "talk and questions": "decision",
}
"""What is asked -> the direction whose exercises ask it."""


@dataclass(frozen=True, slots=True)
class Wish:
    """One topic to measure with one seed."""

    topic: str
    samples: int
    seed: int


def main_ability(folders: Folders, samples: int, seed: int, jobs: int = 1) -> dict[str, Any]:
    """Measure base and tuned model on the same dialogues of words.

    Args:
        folders: where the parts of the preset lie; only the language model is loaded.
        samples: dialogues of each topic.
        seed: of scenes and wordings.
        jobs: processes that share the work; the result is the same for every number.

    Returns:
        ``topics``: for base and tuned model the share of replies that are word for word ``right``, and the
        mean ``loss`` of the right reply in nats per token.

    Raises:
        ValueError: the model was saved without an adapter, so that there is no base to compare with.

    """
    started = time.monotonic()
    wishes = [Wish(topic, samples, seed) for topic in TOPICS]
    found = share("ability", wishes, partial(_measurer, folders), jobs)
    topics = {wish.topic: result for wish, result in zip(wishes, found, strict=True)}
    seconds = round(time.monotonic() - started, 1)
    return {"samples": samples, "seed": seed, "topics": topics, "seconds": seconds}


def table(result: Mapping[str, Any]) -> str:
    """Return the result as a Markdown table."""
    lines = [
        f"| words alone, {result['samples']} dialogues each | base right | tuned right | base loss "
        "| tuned loss |",
        "|---|---|---|---|---|",
    ]
    for topic, row in result["topics"].items():
        base, tuned = row["base"], row["tuned"]
        lines.append(
            f"| {topic} | {base['right']:.1%} | {tuned['right']:.1%} | {base['loss']:.4f} "
            f"| {tuned['loss']:.4f} |"
        )
    rows = result["topics"].values()
    means = [
        [sum(row[which][key] for row in rows) / len(rows) for which in ("base", "tuned")]
        for key in ("right", "loss")
    ]
    (base_right, right), (base_loss, loss) = means
    lines.append(f"| **mean** | {base_right:.1%} | {right:.1%} | {base_loss:.4f} | {loss:.4f} |")
    return "\n".join(
        [*lines, f"\n{result['seconds']:.0f} s, seed {result['seed']}; losses in nats per token"]
    )


def _measurer(folders: Folders) -> Callable[[Wish], dict[str, Any]]:
    model = LanguageModel.from_pretrained(folders.language_model, base=folders.base, bridge=folders.bridge)
    if not isinstance(model.base, PeftModel):
        raise ValueError(
            f"{folders.language_model} holds no adapter, so its base cannot be told apart; expected a model "
            "that was tuned with LoRA. Measure the preset `toybox`, or run `patchbay train instruction`."
        )
    return partial(measure, model)


def reader(folders: Folders) -> Callable[[Wish], dict[str, float]]:
    """Return what measures one topic of the language model as it is, whatever it came of."""
    model = LanguageModel.from_pretrained(folders.language_model, base=folders.base, bridge=folders.bridge)
    return lambda wish: _figures(model, _dialogues(wish))


def measure(model: LanguageModel, wish: Wish) -> dict[str, Any]:
    """Return what base and tuned model make of one topic."""
    dialogues = _dialogues(wish)
    assert isinstance(model.base, PeftModel)
    tuned = _figures(model, dialogues)
    with model.base.disable_adapter():
        base = _figures(model, dialogues)
    return {"base": base, "tuned": tuned}


def _dialogues(wish: Wish) -> list[Dialogue]:
    rng = random.Random(f"ability-{wish.seed}-{wish.topic}")
    dialogues: list[Dialogue] = []
    while len(dialogues) < wish.samples:
        exercise = make(TOPICS[wish.topic], rng, FreshScenes(rng), reserved_wordings=True)
        if TOPICS[wish.topic] != "decision" or not exercise.scenes:
            dialogues.append(in_words(exercise))
    return dialogues


def _figures(model: LanguageModel, dialogues: list[Dialogue]) -> dict[str, float]:
    right = losses = 0.0
    for dialogue in dialogues:
        *heard, answer = dialogue
        right += _reply(model, list(heard)) == " ".join(map(str, answer.parts))
        with torch.inference_mode():
            output = model(model.collate([dialogue], loss_on="last_assistant"))
            output.logits[:, list(model.tokenizer.signal_starts)] = float("-inf")  # no medium may be made
            losses += float(F.cross_entropy(output.logits, output.targets))
    return {"right": round(right / len(dialogues), 4), "loss": round(losses / len(dialogues), 4)}


def _reply(model: LanguageModel, heard: Dialogue) -> str:
    options = GenerationOptions(max_new_tokens=MAX_NEW_TOKENS, allowed=frozenset())
    texts = [event.text for event in generate(model, heard, options) if isinstance(event, TextDelta)]
    return "".join(texts).strip()
