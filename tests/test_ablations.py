"""Ablations: what is trained of each variant, and with what it is measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from alignment import ablations
from alignment.ablations import CAPTIONS, GROUPS, VARIANTS, folder_of, main_ablations, table, train
from alignment.fitting import FitConfig
from alignment.stages import Aligned, Stage
from alignment.toybox.directions import DIRECTIONS
from alignment.training import RECIPES, Run, TrainOptions
from encoders.media import Modality
from llm.lora import LoraOptions
from services import cli
from services.measuring import folders_of
from services.presets import load_preset
from tests.test_stages import aligned
from tests.tiny_llm import tiny_model

RATE = RECIPES["instruction"].learning_rate


@dataclass
class Done:
    """What was trained and what was taken from the run, in order."""

    trained: list[tuple[str, frozenset[str], int, float, Path]] = field(default_factory=list)
    restored: list[str] = field(default_factory=list)
    lora: bool = False


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> Done:
    log = Done()
    model = Aligned(tiny_model(), {})
    add_lora = model.llm.add_lora

    def put(options: LoraOptions) -> None:
        log.lora = True
        add_lora(LoraOptions(rank=2, alpha=2))

    def train_stage(work: Run, model: Aligned, stage: Stage, folder: Path, config: FitConfig) -> None:
        log.trained.append((stage.name, stage.parts, config.num_steps, config.learning_rate, folder))

    monkeypatch.setattr(model.llm, "add_lora", put)
    monkeypatch.setattr(ablations, "unaligned", lambda work: model)
    monkeypatch.setattr(ablations, "train_stage", train_stage)
    monkeypatch.setattr(ablations, "restore", lambda model, folder: log.restored.append(folder.name))
    monkeypatch.setattr(ablations, "export_aligned", lambda model, folder: None)
    return log


@pytest.mark.parametrize(
    ("variant", "restored", "trained", "lora"),
    [
        ("all three stages", ["encoder-side", "decoder-side"], ["instruction"], True),
        ("no stage 1", [], ["decoder-side", "instruction"], True),
        ("no stage 2", ["encoder-side"], ["instruction"], True),
        ("no stage 3", ["encoder-side", "decoder-side"], [], False),
        ("full fine-tuning", ["encoder-side", "decoder-side"], ["instruction"], False),
    ],
)
def test_what_is_the_same_comes_from_the_run_and_the_rest_is_trained_as_long(
    variant: str, restored: list[str], trained: list[str], lora: bool, done: Done, tmp_path: Path
) -> None:
    ablations._train_one(Run(tmp_path, tmp_path, ablations.TrainOptions().pool_sizes, 7), 1, variant)

    assert done.restored == restored
    assert [name for name, *_ in done.trained] == trained
    assert done.lora is lora
    for name, parts, steps, rate, folder in done.trained:
        assert folder == folder_of(tmp_path, variant) / name
        assert steps == (7 if name == "instruction" else RECIPES[name].num_steps)
        if name == "instruction":
            whole = variant == "full fine-tuning"
            assert ("base" in parts, "lora" in parts) == (whole, not whole)
            assert rate == pytest.approx(RATE / 3 if whole else RATE)


def test_without_a_length_of_its_own_the_whole_method_is_the_run_itself(done: Done, tmp_path: Path) -> None:
    ablations._train_one(Run(tmp_path, tmp_path, TrainOptions().pool_sizes), 1, "all three stages")

    assert done.trained == []
    assert done.restored == ["encoder-side", "decoder-side", "instruction"]
    assert done.lora


def test_the_whole_language_model_learns_where_lora_does_not() -> None:
    model = aligned()
    model.train_only(ablations._of_whole_base(ablations.STAGES["instruction"]))

    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    assert not any("lora_" in name for name in learning)
    assert any(name.startswith("llm.base.") for name in learning)
    assert any(name.startswith("projections.") for name in learning)


def test_a_run_that_has_not_come_to_its_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="First run `patchbay train all`"):
        train(tmp_path / "toy", TrainOptions(runs=tmp_path))


def test_every_direction_is_in_one_group() -> None:
    grouped = [name for group in GROUPS.values() for name in group]
    assert sorted(grouped) == sorted(DIRECTIONS)


@pytest.fixture
def run(tiny_preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose variants are all the language model of the tiny preset."""
    monkeypatch.setattr(ablations, "DIRECTIONS", {"text-to-image": None, "decision": None})
    monkeypatch.setattr(ablations, "GROUPS", {"making": ("text-to-image",), "decision": ("decision",)})
    preset = load_preset(str(tiny_preset))
    for name in VARIANTS:
        shutil.copytree(preset.language_model_folder, folder_of(tmp_path, name) / "llm")
        shutil.copytree(preset.projections_folder, folder_of(tmp_path, name) / "projections")
    return tmp_path


def test_every_variant_is_measured_with_the_encoder_and_the_decoders_of_the_preset(
    run: Path, tiny_preset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "ablations", "--preset", str(tiny_preset), "--run", str(run), "--samples", "1"]
    assert cli.main([*words, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)

    assert list(result["variants"]) == [*VARIANTS, CAPTIONS]
    for row in result["variants"].values():
        assert set(row["directions"]) == {"text-to-image", "decision"}
        assert row["directions"]["decision"].keys() == {"seen", "held_out"}
        assert all(0 <= share <= 1 for share in row["words"].values())


def test_captions_alone_send_captions_to_every_decoder(
    run: Path, tiny_preset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    plain: Callable[..., dict[str, Any]] = ablations.main_toybox

    def measured(folders: Any, *args: Any, **named: Any) -> dict[str, Any]:
        seen.append(folders)
        return plain(folders, *args, **named)

    monkeypatch.setattr(ablations, "main_toybox", measured)
    folders = folders_of(load_preset(str(tiny_preset)))
    main_ablations(folders, run, 1, 0)

    assert [set(one.links.values()) for one in seen] == [{"signal"}] * len(VARIANTS) + [{"caption"}]
    assert [one.language_model.parent.name for one in seen[:3]] == [
        "all-three-stages", "no-stage-1", "no-stage-2",
    ]  # fmt: skip
    assert seen[-1].language_model == seen[0].language_model
    assert all(one.decoders == folders.decoders and one.encoder == folders.encoder for one in seen)
    assert seen[1].projections[Modality.IMAGE] == folder_of(run, "no stage 1") / "projections" / "image"


def test_a_variant_that_is_missing_is_one_line(
    run: Path, tiny_preset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(folder_of(run, "no stage 2"))
    words = ["eval", "ablations", "--preset", str(tiny_preset), "--run", str(run), "--samples", "1"]
    assert cli.main(words) == 1
    assert "First run `patchbay train ablations`" in capsys.readouterr().err


def test_the_table_has_a_line_per_variant_with_the_means_of_its_groups() -> None:
    def row(making: float, others: float) -> dict[str, Any]:
        shares = {name: making if name in GROUPS["making"] else others for name in DIRECTIONS}
        return {
            "directions": {name: {"seen": share, "held_out": share / 2} for name, share in shares.items()},
            "words": {"talk": 0.25, "more": 0.75},
        }

    result = {
        "samples": 8, "seed": 0, "seconds": 1.0,
        "variants": {"all three stages": row(1.0, 1.0), "no stage 1": row(0.0, 1.0)},
    }  # fmt: skip
    mean = (len(DIRECTIONS) - 3) / len(DIRECTIONS)
    assert f"| no stage 1 | 0.0% |{' 100.0% |' * 7} {mean:.1%} | {mean / 2:.1%} | 50.0% |" in table(result)
