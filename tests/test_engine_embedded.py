"""The engine on the embedded model, against transformers' own ``generate()``."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from llm.engine import Engine
from llm.model import LanguageModel
from llm.plain import plain_model
from llm.reply import Finished, GenerationOptions
from llm.template import Message
from services import cli
from services.bench.llm import Peer, prompts, run_engine
from services.presets import load_preset

FOLDER = Path(__file__).resolve().parent.parent / "deploy" / "weights" / "toybox" / "llm"
PROMPTS = 200


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    model = LanguageModel.from_pretrained(FOLDER)
    model.merge_adapter()
    return model


def test_greedy_replies_are_those_of_transformers_token_for_token(model: LanguageModel) -> None:
    peer = Peer(model)
    texts = prompts(PROMPTS, seed=3)

    ours = run_engine(model, texts, 8, load_preset("toybox").language_model.compile).replies
    theirs = peer.one_by_one(texts, streams=1).replies

    ties = 0
    for text, one, other in zip(texts, ours, theirs, strict=True):
        if one == other:
            continue
        place = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
        (prompt,) = peer._rows([text])
        with torch.no_grad():
            logits = peer.model(torch.tensor([[*prompt, *one[:place]]])).logits[0, -1]
        assert abs(float(logits[one[place]] - logits[other[place]])) < 1e-4, text
        ties += 1
    assert ties <= PROMPTS // 20
    assert {token for reply in ours for token in reply} >= model.tokenizer.signal_starts.keys()


def test_logits_in_company_are_those_of_one_full_pass(model: LanguageModel) -> None:
    texts = prompts(8, seed=4)
    engine = Engine(model, slots=4, step_tokens=24)
    requests = [engine.prepare([Message("user", [t])], GenerationOptions(max_new_tokens=40)) for t in texts]
    seen: dict[int, list[torch.Tensor]] = {}
    choose = engine._sampler.choose

    def noted(logits: torch.Tensor, replies: list[object]) -> object:
        for row, reply in zip(logits, replies, strict=True):
            seen.setdefault(id(reply), []).append(row)
        return choose(logits, replies)  # type: ignore[arg-type]

    engine._sampler.choose = noted  # type: ignore[method-assign, assignment]
    for request in requests:
        engine.submit(request)
    while engine.busy:
        assert not any(isinstance(event, Exception) for _, event in engine.step())

    for request in requests:
        ids = torch.tensor([[*request.row.ids, *request.reply.ids]])
        with torch.no_grad():
            expected, _ = model.forward_embeddings(model.embed(ids))
        starts = model.tokenizer.signal_starts
        spoken = [len(request.row.ids) - 1]
        position = len(request.row.ids)
        for _ in seen[id(request.reply)][1:]:
            token = int(ids[0, position])
            position += model.tokenizer.signals.count(starts[token]) if token in starts else 1
            spoken.append(position - 1)
        torch.testing.assert_close(
            torch.stack(seen[id(request.reply)]), expected[0, spoken], atol=1e-4, rtol=0
        )
        assert isinstance(request.reply.finish("stop")[-1], Finished)


def test_the_yardstick_wants_lora_inside_the_base() -> None:
    with pytest.raises(ValueError, match=r"call merge_adapter\(\) first"):
        plain_model(LanguageModel.from_pretrained(FOLDER))


def test_the_bench_prints_ours_beside_the_peers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.bench.llm.STREAMS", (1, 2))
    monkeypatch.setattr("services.bench.llm.MAX_NEW_TOKENS", 4)

    assert cli.main(["bench", "llm", "--quick", "--json"]) == 0

    result = json.loads(capsys.readouterr().out)
    assert result["bench"] == "llm"
    assert result["machine"]["cores"] == os.cpu_count()
    assert [row["case"] for row in result["rows"]] == [
        "1 stream",
        "1 stream, first token",
        "2 streams",
        "2 streams, padded",
        "2 streams, first token",
        "2 streams, padded, first token",
    ]
    for row in result["rows"]:
        assert set(row) == {"case", "value", "unit", "peer", "peer_value", "ratio"}
        assert row["value"] > 0
        assert row["ratio"] == pytest.approx(row["value"] / row["peer_value"], abs=1e-3)
