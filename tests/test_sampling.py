"""Sampling: the right distribution, and the same draw in any company."""

from __future__ import annotations

import torch
from transformers import RepetitionPenaltyLogitsProcessor

from llm.generate import GenerationOptions
from llm.reply import Reply
from llm.sampling import Sampler
from tests.tiny_llm import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
WORDS = [i for i in range(len(TOKENIZER)) if i not in TOKENIZER.live_ids][:4]
LOGITS = torch.full((len(TOKENIZER),), -1e9)
LOGITS[WORDS] = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()


def reply(seed: int, **options: float | int) -> Reply:
    wishes = GenerationOptions(**{"seed": seed, "temperature": 1.0, **options})  # type: ignore[arg-type]
    return Reply(TOKENIZER, wishes, [], context=64)


def shares(**options: float | int) -> list[float]:
    """Return how often each of the four words comes in 3000 draws."""
    replies = [reply(seed, **options) for seed in range(3000)]
    said = [token for token, _ in Sampler(TOKENIZER).choose(LOGITS.repeat(len(replies), 1), replies)]
    assert set(said) <= set(WORDS)
    return [said.count(word) / len(said) for word in WORDS]


def close(measured: list[float], expected: list[float]) -> bool:
    return all(abs(a - b) < 0.03 for a, b in zip(measured, expected, strict=True))


def test_words_come_as_often_as_the_model_says() -> None:
    assert close(shares(), [0.5, 0.25, 0.15, 0.1])


def test_temperature_sharpens() -> None:
    squares = [0.5**2, 0.25**2, 0.15**2, 0.1**2]
    assert close(shares(temperature=0.5), [square / sum(squares) for square in squares])


def test_top_k_and_top_p_leave_the_likeliest_in() -> None:
    assert close(shares(top_k=2), [2 / 3, 1 / 3, 0, 0])
    assert close(shares(top_p=0.8), [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0])
    assert close(shares(top_p=0.74), [2 / 3, 1 / 3, 0, 0])
    assert close(shares(top_k=2, top_p=0.6), [1, 0, 0, 0])


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    speakable = [i for i in range(len(TOKENIZER)) if i not in TOKENIZER.live_ids]
    used = speakable[::2]
    torch.manual_seed(0)
    logits = torch.full((50, len(TOKENIZER)), -1e9)
    logits[:, speakable] = torch.randn(50, len(speakable)) * 3
    wishes = GenerationOptions(repetition_penalty=1.7, allowed=frozenset())
    replies = [Reply(TOKENIZER, wishes, used, context=len(used) + 8) for _ in logits]

    said = [token for token, _ in Sampler(TOKENIZER).choose(logits, replies)]

    penalised = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([used] * 50), logits)
    assert said == penalised.argmax(dim=-1).tolist() != logits.argmax(dim=-1).tolist()


def test_words_that_the_reply_has_used_come_less_often_by_presence_or_by_number() -> None:
    def shares_after(first: int, second: int, **options: float) -> list[float]:
        """Return how often words 0 and 1 come after they were said this many times."""
        replies = [reply(seed, **options) for seed in range(3000)]
        for one in replies:
            for word, times in zip(WORDS, (first, second), strict=False):
                for _ in range(times):
                    one.say(word)
        said = [token for token, _ in Sampler(TOKENIZER).choose(LOGITS.repeat(len(replies), 1), replies)]
        return [said.count(word) / len(said) for word in WORDS]

    two = torch.tensor(2.0).log().item()
    assert close(shares_after(3, 1, presence_penalty=two), [0.25 / 0.625, 0.125 / 0.625, 0.24, 0.16])
    assert close(shares_after(2, 1, frequency_penalty=two), [0.125 / 0.5, 0.125 / 0.5, 0.3, 0.2])
    assert close(shares_after(0, 0, frequency_penalty=two), [0.5, 0.25, 0.15, 0.1])
    assert close(shares_after(0, 1, presence_penalty=-two), [0.4, 0.4, 0.12, 0.08])


def test_a_draw_is_the_same_in_any_company() -> None:
    kinds: list[dict[str, float | int]] = [
        {"temperature": 0},
        {},
        {"top_k": 3},
        {"top_p": 0.7},
        {"repetition_penalty": 1.5},
        {"presence_penalty": 1.5, "frequency_penalty": 0.5},
        {"temperature": 3.0},
    ]
    torch.manual_seed(0)
    logits = torch.randn(60, len(TOKENIZER)) * 3
    sampler = Sampler(TOKENIZER)

    def replies() -> list[Reply]:
        return [reply(seed, **kinds[seed % len(kinds)]) for seed in range(len(logits))]

    together = sampler.choose(logits, replies())
    alone = [sampler.choose(row[None], [one])[0] for row, one in zip(logits, replies(), strict=True)]
    assert [token for token, _ in together] == [token for token, _ in alone]
    assert len({token for token, _ in together}) > 20
