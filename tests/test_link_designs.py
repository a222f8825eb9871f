"""Designs of links: what they train, what they are measured with, and what is printed of them."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from alignment.embedded import captions
from alignment.embedded.captions import CAPTION_TOKENS, WIDTH, CaptionEncoder
from alignment.embedded.denoisers import ConditionedDenoiser, build
from alignment.embedded.language import SIGNALS, build_base, kept_tokenizer, with_signals
from alignment.fitting import FitConfig
from alignment.link_designs import MAKERS, READERS, Maker, Reader, designs, measuring, table, train, training
from alignment.link_designs.designs import SEEDS, Joined, made_by, run_heard
from alignment.link_designs.folders import NULLS_FILE, folder_of
from alignment.link_designs.measuring import guided_away, heard_again
from alignment.link_designs.training import denoised, train_maker
from alignment.samples import converse, prepare
from alignment.system import Folders, System
from alignment.toybox.directions import make
from alignment.toybox.exercise import FreshScenes
from alignment.toybox.world import Scene, sample_look, sample_sound
from alignment.training import TrainOptions
from decoders.pipeline_folder import PipelineFolder
from decoders.projection import OutputProjection, OutputProjectionConfig
from encoders.media import Modality
from llm.model import LanguageModel
from llm.signals import Signal, SignalVocabulary
from llm.template import Message, SignalPart
from services import cli
from services.measuring import folders_of
from services.presets import load_preset
from tests.tiny_llm import WIDTH as TINY
from tests.tiny_llm import tiny_model

WEIGHTS = Path(__file__).resolve().parent.parent / "deploy" / "weights" / "toybox"
MEDIA = (Modality.IMAGE, Modality.VIDEO, Modality.AUDIO)


def joined(way: Maker) -> Joined:
    llm = tiny_model(max_position_embeddings=512)
    config = OutputProjectionConfig(
        llm_width=TINY, out_width=6, num_queries=3, hidden_width=8, ffn_width=8, num_encoder_layers=1,
        num_decoder_layers=1,
    )  # fmt: skip
    model = Joined(way, llm)
    for modality in MEDIA:
        model.projections[str(modality)] = OutputProjection(config)
    return model


@pytest.mark.parametrize(
    "name", ["signal", "signal, three layers", "signal, and denoising", "denoising alone"]
)
def test_a_design_trains_signals_and_connectors_with_its_own_losses(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    way = MAKERS[name] if MAKERS[name].heard == (-1,) else Maker(heard=(1, -1))
    model = joined(way)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    denoised_scenes: list[Scene] = []

    def wrong(
        scenes: Sequence[Scene], conditions: Tensor, rng: random.Random, noise: torch.Generator
    ) -> Tensor:
        assert len(scenes) == len(conditions) <= training.DENOISED
        denoised_scenes.extend(scenes)
        return conditions.square().mean()

    def target(texts: Sequence[str]) -> Tensor:
        return torch.ones(len(texts), 3, 6)

    config = FitConfig(num_steps=2, learning_rate=0.01, warmup_steps=1, log_every_steps=1)
    train_maker(way, model, dict.fromkeys(MEDIA, target), dict.fromkeys(MEDIA, wrong), tmp_path, config)

    changed = {key for key, value in model.named_parameters() if not torch.equal(before[key], value)}
    assert changed
    assert all(key.startswith(("llm.signal_rows.", "projections.")) for key in changed)
    row = json.loads((tmp_path / "losses.jsonl").read_text().splitlines()[-1])
    kinds = {key.split()[-1] for key in row if key.startswith(("image", "video", "audio"))}
    assert kinds == ({"distance"} if way.distance else set()) | ({"denoising"} if way.denoising else set())
    assert bool(denoised_scenes) is bool(way.denoising)


def test_a_learned_null_is_trained_by_denoising_without_a_condition(tmp_path: Path) -> None:
    torch.manual_seed(0)
    way = MAKERS["signal, and a learned null"]
    model = joined(way)
    model.learn_nulls(dict.fromkeys(MEDIA, torch.full((3, 6), 7.0)))
    under_null: list[bool] = []

    def wrong(
        scenes: Sequence[Scene], conditions: Tensor, rng: random.Random, noise: torch.Generator
    ) -> Tensor:
        under_null.extend((condition > 5).all().item() is True for condition in conditions.detach())
        return conditions.square().mean()

    def target(texts: Sequence[str]) -> Tensor:
        return torch.ones(len(texts), 3, 6)

    config = FitConfig(num_steps=6, learning_rate=0.01, warmup_steps=1)
    train_maker(way, model, dict.fromkeys(MEDIA, target), dict.fromkeys(MEDIA, wrong), tmp_path, config)

    assert any(under_null)
    assert not all(under_null)
    assert all((null < 7).all() for null in model.nulls.values())


def test_states_of_several_layers_are_averaged_and_the_words_stay_what_they_are() -> None:
    llm = tiny_model(max_position_embeddings=512)
    llm.train(False)
    batch = llm.collate([[Message("user", ["a bell"]), Message("assistant", ["here", SignalPart(MEDIA[0])])]])
    with torch.no_grad():
        last, both, first = (run_heard(llm, batch, heard) for heard in ((-1,), (1, -1), (1,)))

    torch.testing.assert_close(both.hidden, (last.hidden + first.hidden) / 2)
    torch.testing.assert_close(first.hidden.square().mean(-1), torch.ones(batch.ids.shape), rtol=1e-3, atol=0)
    assert not torch.allclose(first.hidden, last.hidden, atol=0.1)
    torch.testing.assert_close(both.logits, last.logits)
    assert not llm.causal_lm.base_model._forward_hooks


def test_signals_heard_again_at_the_last_layer_are_those_that_were_said() -> None:
    system = System(folders_of(load_preset("toybox")))
    rng = random.Random(0)
    sample = prepare(make("text-to-image", rng, FreshScenes(rng)), rng)
    converse(system, sample)
    deaf = [
        replace(part, hidden=torch.zeros_like(part.hidden)) if isinstance(part, Signal) else part
        for part in sample.spoken
    ]
    again = heard_again(system.llm, replace(sample, spoken=deaf), (-1,))

    assert len(again.signals) == 1
    assert again.signals == again.replies[-1]
    torch.testing.assert_close(again.signals[0].hidden, sample.signals[0].hidden, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(again.signals[0].embeddings, sample.signals[0].embeddings)


def test_a_decoder_guides_away_from_the_null_of_a_design(tmp_path: Path) -> None:
    decoders = Folders.of_weights(WEIGHTS).decoders
    usual = PipelineFolder(decoders[Modality.IMAGE]).saved_null()
    assert usual is not None
    (tmp_path / "scratch").mkdir()
    save_file({"image": usual + 1}, tmp_path / NULLS_FILE)

    found = guided_away(decoders, tmp_path / NULLS_FILE, tmp_path / "scratch")

    changed = PipelineFolder(found[Modality.IMAGE]).saved_null()
    assert changed is not None
    torch.testing.assert_close(changed, usual + 1)
    assert guided_away(decoders, tmp_path / "nothing", tmp_path) is decoders
    again = PipelineFolder(decoders[Modality.IMAGE]).saved_null()
    assert again is not None
    torch.testing.assert_close(again, usual)


@pytest.mark.parametrize("kind", ["look", "sound"])
def test_denoising_teaches_the_condition_and_leaves_the_decoder_alone(
    kind: captions.Kind, tmp_path: Path
) -> None:
    tokenizer = captions.kept_tokenizer(kind, tmp_path / "tokenizer")
    encoder = CaptionEncoder(kind, tokenizer, captions.build(kind, tokenizer).eval())
    model = ConditionedDenoiser(kind, encoder, build(kind)).eval().requires_grad_(False)
    scenes: list[Scene] = [
        (sample_look if kind == "look" else sample_sound)(random.Random(i)) for i in range(2)
    ]
    conditions = torch.randn(2, CAPTION_TOKENS if kind == "look" else 1, WIDTH, requires_grad=True)
    seen: list[Tensor] = []

    def encode(rows: Tensor) -> Tensor:
        seen.append(rows)
        return torch.zeros(2, 16, 8, 8) if kind == "look" else torch.zeros(2, 16, 16, 4)

    def loss() -> Tensor:
        return denoised(model, encode, scenes, conditions, random.Random(0), torch.Generator().manual_seed(0))

    loss().backward()

    assert conditions.grad is not None
    assert conditions.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.parameters())
    assert seen[0].shape == ((2, 64, 64, 3) if kind == "look" else (2, *seen[0].shape[1:]))
    torch.testing.assert_close(loss(), loss())


def test_a_base_gets_signals_of_any_length_and_stays_as_it_is(tmp_path: Path) -> None:
    base = build_base(kept_tokenizer(tmp_path / "tokenizer")).eval()
    longer = with_signals(base, SignalVocabulary(image=32, video=32, audio=32))

    assert longer.causal_lm is base.causal_lm
    assert len(longer.tokenizer.signal_ids(Modality.AUDIO)) == 32
    assert len(base.tokenizer.signal_ids(Modality.AUDIO)) == SIGNALS.audio
    said = "draw a big red bell, please"
    assert longer.tokenizer.encode_text(said) == base.tokenizer.encode_text(said)


def test_every_design_has_a_block_for_each_medium_and_conditions_of_the_decoders(tmp_path: Path) -> None:
    build_base(kept_tokenizer(tmp_path / "tokenizer")).save_pretrained(tmp_path / "llm")
    for way in (MAKERS["signal, 1 token"], MAKERS["query"]):
        model = made_by(way, tmp_path / "llm")
        for modality in MEDIA:
            projection = model.projections[str(modality)]
            assert isinstance(projection, OutputProjection)
            assert model.llm.tokenizer.signals.count(modality) == way.tokens
            assert projection.config.num_queries == (1 if modality is Modality.AUDIO else CAPTION_TOKENS)
            config = projection.config
            assert (config.num_encoder_layers, config.num_decoder_layers) == way.connector


def test_other_signals_leave_the_tokenizer_that_a_base_was_trained_with() -> None:
    base = LanguageModel.from_pretrained(WEIGHTS / "llm")
    longer = with_signals(base, SignalVocabulary(image=32, video=32, audio=32))

    assert longer.tokenizer.base_vocabulary == base.tokenizer.base_vocabulary
    rng = random.Random(0)
    for _ in range(100):
        text = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz .,[]<>", k=40))
        assert longer.tokenizer.encode_text(text) == base.tokenizer.encode_text(text)
    dialogue = [Message("user", ["a bell"]), Message("assistant", ["a big red bell", SignalPart(MEDIA[0])])]
    ids, before = longer.encode(dialogue).ids, base.encode(dialogue).ids
    known = base.tokenizer.base_vocabulary
    assert [i for i in ids if i < known] == [i for i in before if i < known]
    assert len(ids) == len(before) + 32 - base.tokenizer.signals.image


def test_a_base_with_more_tokens_than_signals_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_model()
    more = (*base.tokenizer.added_tokens, "<|more|>")
    monkeypatch.setattr(base.tokenizer, "added_tokens", more)  # other tests have this tokenizer, too
    with pytest.raises(ValueError, match="Only the base that `patchbay train language` makes"):
        with_signals(base, SIGNALS)


def test_a_run_without_all_its_parts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="First run `patchbay train imagebind`"):
        train(tmp_path / "toy", TrainOptions(runs=tmp_path))


@pytest.fixture
def run(tiny_preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with one design of each sort, both the language model of the tiny preset."""
    monkeypatch.setattr(measuring, "DESIGNS", {"signal": Maker(), "one linear token": Reader(kind="linear")})
    monkeypatch.setattr(measuring, "SEEDS", (0, 1))
    preset = load_preset(str(tiny_preset))
    for seed in (0, 1):
        for name in ("signal", "one linear token"):
            shutil.copytree(preset.language_model_folder, folder_of(tmp_path, name, seed) / "llm")
        projections = folder_of(tmp_path, "signal", seed) / "projections"
        shutil.copytree(preset.projections_folder, projections)
    return tmp_path


def test_designs_are_measured_by_seed_beside_captions_and_the_ceiling(
    run: Path, tiny_preset: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    keep = tmp_path_factory.mktemp("kept") / "results"
    words = ["eval", "link-designs", "--preset", str(tiny_preset), "--run", str(run), "--samples", "1"]
    words += ["--keep", str(keep), "--json"]
    assert cli.main(words) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)

    assert list(result["makers"]) == ["signal", "caption", "ceiling"]
    assert list(result["readers"]) == ["one linear token"]
    assert list(result["makers"]["signal"]) == ["text-to-image", "text-to-video", "text-to-audio"]
    assert list(result["readers"]["one linear token"]) == ["image-to-text", "video-to-text", "audio-to-text"]
    for row in (*result["makers"].values(), *result["readers"].values()):
        for shares in row.values():
            assert len(shares["seen"]) == len(shares["held_out"]) == 2

    assert cli.main(words) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["makers"], again["readers"]) == (result["makers"], result["readers"])


def test_a_design_that_is_missing_is_one_line(
    run: Path, tiny_preset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(folder_of(run, "signal", 1))
    words = ["eval", "link-designs", "--preset", str(tiny_preset), "--run", str(run), "--samples", "1"]
    assert cli.main(words) == 1
    assert "First run `patchbay train link-designs`" in capsys.readouterr().err


def test_the_tables_have_means_and_half_the_spread_over_seeds() -> None:
    row = {
        "text-to-image": {"seen": [0.8, 0.9, 1.0], "held_out": [0.5, 0.5, 0.5]},
        "text-to-audio": {"seen": [0.6, 0.7, 0.8], "held_out": [0.7, 0.7, 0.7]},
    }
    result = {
        "samples": 40, "seeds": list(SEEDS), "seconds": 1.0,
        "makers": {"signal": row}, "readers": {"one linear token": {"image-to-text": row["text-to-image"]}},
    }  # fmt: skip
    printed = table(result)
    assert "| signal | 90.0% ± 10.0% | 70.0% ± 10.0% | 80.0% ± 10.0% | 60.0% ± 0.0% |" in printed
    assert "| one linear token | 90.0% ± 10.0% | 90.0% ± 10.0% | 50.0% ± 0.0% |" in printed
    assert "40 samples of each direction and seed" in printed


def test_the_embedded_model_has_designs_that_are_compared() -> None:
    assert MAKERS["signal, 16 tokens"].signals == SIGNALS
    assert READERS["resampler, 8 tokens"] == Reader(tokens=8)
    assert set(designs.DESIGNS) == {*MAKERS, *READERS}
