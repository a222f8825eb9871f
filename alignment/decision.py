"""How sure the agent is of the media that it makes, and how often it is right to be.

A reply is a row of choices. Before each token the language model gives every signal's first token a
probability h; a modality m has come by the end of the reply unless it was passed over everywhere, so

    P(m) = 1 - (1 - h_1)(1 - h_2) ... (1 - h_t)

over the choices up to the one that began it, or up to the end. That is a probability given the words of
this very reply. Where the mistake is in the words themselves (a caption where one word was asked for) it
is too sure; a line through its log-odds, fitted to other dialogues (Platt 1999), takes that back.

The running agent asks back by less: by the share of the medium that it has spoken in the h of all media
at that place, which is the confidence that the engine tells.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from encoders.media import Modality
from llm.batch import collate_rows
from llm.model import LanguageModel
from llm.template import Dialogue
from llm.tokenizer import ConversationTokenizer

MEDIA = (Modality.IMAGE, Modality.VIDEO, Modality.AUDIO)
BINS = 15
ASK_BELOW = (0.99, 0.999, 0.9995, 0.9998, 0.9999)
_MOST_LOG_ODDS = 12.0


@dataclass(frozen=True, slots=True)
class Decided:
    """One reply: the media that were wanted and made, how likely each was, and broken signals."""

    wanted: tuple[Modality, ...]
    made: tuple[Modality, ...]
    probability: Mapping[Modality, float]
    malformed: int


@dataclass(frozen=True, slots=True)
class Calibration:
    """A line through log-odds: ``slope * log-odds + shift``."""

    slope: float = 1.0
    shift: float = 0.0

    def __call__(self, probability: float) -> float:
        """Return the probability as it should be read."""
        return 1 / (1 + math.exp(-(self.slope * _log_odds(probability) + self.shift)))


@torch.inference_mode()
def media_probabilities(llm: LanguageModel, heard: Dialogue, ids: Sequence[int]) -> dict[Modality, float]:
    """Return how likely each medium was to come in the reply ``ids`` to the conversation ``heard``."""
    if not ids:
        return dict.fromkeys(MEDIA, 0.0)
    tokenizer = llm.tokenizer
    row = llm.encode(heard, open_reply=True)
    start = len(row.ids)
    row.add(list(ids), True)
    batch = collate_rows([row], tokenizer.pad_id).to(llm.device)
    hidden = llm.run(llm.embed_batch(batch), media=batch.media_places())[0, start - 1 : -1]  # (tokens, D)
    logits = llm.logits(hidden)  # (tokens, V)
    logits[:, list(tokenizer.unspeakable_ids)] = float("-inf")
    chosen = [i for i, token in enumerate(ids) if token not in tokenizer.unspeakable_ids]
    chances = logits[chosen].softmax(dim=-1).double()  # (choices, V)
    found = dict.fromkeys(MEDIA, 0.0)
    for first, modality in tokenizer.signal_starts.items():
        places = [place for place, i in enumerate(chosen) if ids[i] == first]
        end = places[0] + 1 if places else len(chosen)
        found[modality] = float(1 - (1 - chances[:end, first]).prod())
    return found


def malformed_signals(tokenizer: ConversationTokenizer, ids: Sequence[int]) -> int:
    """Count signals that are not whole blocks, and tokens of signals outside of any."""
    place = count = 0
    inner = {i for m in tokenizer.signals.modalities for i in tokenizer.signal_ids(m)}
    while place < len(ids):
        modality = tokenizer.signal_starts.get(ids[place])
        if modality is None:
            count += ids[place] in inner
            place += 1
            continue
        block = tokenizer.signal_ids(modality)
        whole = tuple(ids[place : place + len(block)]) == tuple(block)
        count += not whole
        place += len(block) if whole else 1
    return count


def calibrate(decided: Sequence[Decided], modality: Modality) -> Calibration:
    """Fit the line for one modality; a weak pull to the line that changes nothing holds it on few data."""
    odds = np.array([_log_odds(d.probability[modality]) for d in decided])
    truth = np.array([float(modality in d.wanted) for d in decided])
    design = np.stack([odds, np.ones_like(odds)], axis=1)  # (N, 2)
    prior, pull = np.array([1.0, 0.0]), 1.0
    line = prior.copy()
    for _ in range(50):
        guess = 1 / (1 + np.exp(-design @ line))
        slope = design.T @ (guess - truth) + pull * (line - prior)
        bend = (design * (guess * (1 - guess))[:, None]).T @ design + pull * np.eye(2)
        step = np.linalg.solve(bend, slope)
        line -= step * min(1.0, 1.0 / max(1e-9, float(np.abs(step).max())))
        if np.abs(step).max() < 1e-9:
            break
    return Calibration(float(line[0]), float(line[1]))


def calibration_error(probabilities: Sequence[float], truth: Sequence[bool]) -> float:
    """Return the expected calibration error: bins of equal width, weighted by how many fall in.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", section 2.
    """
    p, y = np.asarray(probabilities), np.asarray(truth, dtype=float)
    bins = np.minimum((p * BINS).astype(int), BINS - 1)
    gaps = [abs(float((p - y)[bins == b].sum())) for b in range(BINS)]
    return sum(gaps) / max(1, len(p))


def decision_figures(decided: Sequence[Decided], calibration: Sequence[Decided]) -> dict[str, Any]:
    """Return F1, calibration and false media of some replies.

    Args:
        decided: the replies that are measured.
        calibration: other replies, to which the reading of probabilities is fitted.

    Returns:
        ``f1`` per modality and for "words alone", ``macro_f1`` over the modalities, ``ece`` as it comes
        and ``ece_calibrated``, per modality; ``false_generation``, the share of replies with a medium
        among those that should be words alone; ``malformed``, a count.

    """
    lines = {m: calibrate(calibration, m) for m in MEDIA}
    truth = {m: [m in d.wanted for d in decided] for m in MEDIA}
    f1 = {str(m): _f1(truth[m], [m in d.made for d in decided]) for m in MEDIA}
    words = [not d.wanted for d in decided]
    raw = {str(m): calibration_error([d.probability[m] for d in decided], truth[m]) for m in MEDIA}
    read = {m: [lines[m](d.probability[m]) for d in decided] for m in MEDIA}
    figures: dict[str, Any] = _rounded(
        {
            "n": len(decided),
            "macro_f1": _mean(f1.values()),
            "f1": f1 | {"words alone": _f1(words, [not d.made for d in decided])},
            "ece": raw | {"mean": _mean(raw.values())},
            "ece_calibrated": (found := {str(m): calibration_error(read[m], truth[m]) for m in MEDIA})
            | {"mean": _mean(found.values())},
            "calibration": {str(m): {"slope": line.slope, "shift": line.shift} for m, line in lines.items()},
            "false_generation": _share(bool(d.made) for d in decided if not d.wanted),
            "malformed": sum(d.malformed for d in decided),
        }
    )
    return figures


def asking_figures(
    confidences: Sequence[Sequence[float]], wrong: Sequence[bool]
) -> dict[str, int | dict[str, int]]:
    """Count how often the agent would ask back, and how often with reason.

    Args:
        confidences: of every signal of each reply; one that is below a threshold is asked about.
        wrong: whether other media than the wanted ones came in a reply, or the wanted ones in another order.

    Returns:
        ``n`` replies, of which ``wrong``; for each threshold ``asked``, the replies with a question, and
        ``caught``, the wrong ones among them.

    """
    least = [min(each, default=1.0) for each in confidences]
    pairs = list(zip(least, wrong, strict=True))
    return {
        "n": len(pairs),
        "wrong": sum(wrong),
        "asked": {str(t): sum(sure < t for sure, _ in pairs) for t in ASK_BELOW},
        "caught": {str(t): sum(sure < t for sure, is_wrong in pairs if is_wrong) for t in ASK_BELOW},
    }


def _log_odds(probability: float) -> float:
    p = min(max(probability, 1e-15), 1 - 1e-15)
    return min(max(math.log(p) - math.log1p(-p), -_MOST_LOG_ODDS), _MOST_LOG_ODDS)


def _f1(truth: Sequence[bool], said: Sequence[bool]) -> float:
    hits = sum(t and s for t, s in zip(truth, said, strict=True))
    either = sum(truth) + sum(said)
    return 2 * hits / either if either else 1.0


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / max(1, len(listed))


def _share(flags: Iterable[bool]) -> float:
    return _mean(float(flag) for flag in flags)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return round(value, 4) if isinstance(value, float) else value
