"""Memory is predicted from shapes; predictions are held against what is really allocated."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from encoders.media import Modality
from services.arguments import memory_size
from services.boxes import PromptMessage, SpeechOptions
from services.cli import main
from services.doctor import fitting, survey
from services.footprint import boxes_of, needed
from services.memory_plan import LEFT_FREE, changed, plan_for, rows, table, write_preset
from services.messages import Role
from services.presets import Preset, load_preset
from services.session import Session
from tests.held import held_bytes, storage_bytes

GB = 10**9
DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.fixture(scope="module")
def published() -> Preset:
    return load_preset("nextgpt-7b")


# --- predicted and allocated --------------------------------------------------------------------------


def allocated(session: Session) -> Iterator[tuple[str, int]]:
    """Load every box of the embedded model; yield what its parameters hold."""
    agent: Any = session.agent
    yield "encoder", held_bytes(agent.encode.load().model)
    yield "language model", held_bytes(agent.generate.engine._engine.model)
    for modality, box in agent.decode.items():
        box.load()
        yield (
            f"{modality.value} decoder",
            box.engine.decoder.weight_bytes() + held_bytes(box._projecting.projection),
        )


HALF = {
    "encoder.dtype": "bfloat16",
    "language_model.dtype": "bfloat16",
    "decoders.image.dtype": "bfloat16",
    "decoders.video.dtype": "bfloat16",
    "decoders.audio.dtype": "bfloat16",
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        HALF,
        HALF | {"language_model.quantization": "int8"},
        {"language_model.quantization": "nf4"},
    ],
    ids=["float32", "bfloat16", "int8", "nf4"],
)
def test_every_box_of_the_embedded_model_takes_what_was_predicted(changes: dict[str, Any]) -> None:
    preset = changed(load_preset("toybox"), changes)
    predicted = {box.name: box.in_memory - box.cache for box in boxes_of(preset)}

    with Session.open(preset) as session:
        found = dict(allocated(session))

    assert found.keys() == predicted.keys()
    for name, size in found.items():
        assert predicted[name] == pytest.approx(size, rel=0.02), name


def test_the_caches_take_what_was_predicted_once_a_conversation_is_full() -> None:
    preset = changed(load_preset("toybox"), {"language_model.context": 300, "language_model.slots": 3})
    predicted = boxes_of(preset)[1].cache

    with Session.open(preset) as session:
        agent: Any = session.agent
        session.runner.run(spoken(agent))
        cache = agent.generate.engine._engine._slot_model.cache
        layers = cache.kept
        assert layers[0].num_positions < 300
        cache.reserve(300, 300)

    found = storage_bytes(tensor for layer in layers for tensor in (layer.keys, layer.values))
    assert found == predicted > 0


async def spoken(agent: Any) -> None:
    options = SpeechOptions(
        allowed=frozenset(), max_signals=0, max_new_tokens=4, temperature=0.0, top_p=1.0, seed=0
    )
    async for _ in agent.generate.generate([PromptMessage(Role.USER, ("hello",))], options):
        pass


# --- plans --------------------------------------------------------------------------------------------


SLICED = "pictures and frames go through the VAE one at a time"
IN_TURNS = "decoders take turns within 2.99 GB and wait"


@pytest.mark.parametrize(
    ("room", "spare", "words"),
    [
        (40, 32, []),
        (35, 32, [SLICED, f"{IN_TURNS} in the memory of the CPU"]),
        (30, 4, [SLICED, f"{IN_TURNS} on the disk", "2 replies at a time"]),
        (
            20,
            32,
            [
                SLICED,
                f"{IN_TURNS} in the memory of the CPU",
                "2 replies at a time",
                "the language model in 8 bits",
            ],
        ),
    ],
)
def test_a_plan_changes_no_more_than_it_must(
    published: Preset, room: int, spare: int, words: list[str]
) -> None:
    plan = plan_for(published, room * GB, spare * GB)

    assert list(plan.words) == words
    assert plan.fits
    assert plan.needed == needed(plan.preset, boxes_of(plan.preset)) <= room * GB * (1 - LEFT_FREE)


def test_a_small_memory_costs_quality_first_and_decoders_last(published: Preset) -> None:
    plan = plan_for(published, 16 * GB, None)
    assert plan.fits
    assert plan.preset.language_model.quantization == "nf4"
    assert len(plan.preset.decoders) == 3

    smaller = plan_for(published, int(plan.needed / (1 - LEFT_FREE)) - 10**7, None)
    assert smaller.fits
    assert Modality.VIDEO not in smaller.preset.decoders
    assert smaller.words[-1] == "no video decoder"

    tiny = plan_for(published, 1 * GB, None)
    assert not tiny.fits
    assert tiny.preset.decoders == {}


def test_float32_is_the_first_thing_to_go(tiny_preset: Path) -> None:
    preset = load_preset(str(tiny_preset))
    need = needed(preset, boxes_of(preset))

    plan = plan_for(preset, need, None)

    assert plan.words == ("bfloat16 instead of float32",)
    assert {d.dtype for d in plan.preset.decoders.values()} == {"bfloat16"}
    assert plan.fits


def test_a_budget_counts_only_what_it_lets_in(published: Preset) -> None:
    boxes = boxes_of(published)
    movable = sum(box.movable for box in boxes)
    working = {box.name: box.working or 0 for box in boxes}
    held = sum(box.in_memory for box in boxes)
    assert needed(published, boxes) == held + sum(working.values())

    fitted = changed(published, {"decoders_gb": 3.0})  # the largest decoder, or any other, one at a time

    both = working["encoder"] + working["language model"]
    at_most = both + working["video decoder"]
    assert needed(fitted, boxes_of(fitted)) == held - movable + 3 * GB + at_most


def test_a_written_plan_is_a_preset_that_runs_from_anywhere(tiny_preset: Path, tmp_path: Path) -> None:
    preset = load_preset(str(tiny_preset))
    half = plan_for(preset, needed(preset, boxes_of(preset)), None)
    sliced = plan_for(preset, int(half.needed / (1 - LEFT_FREE)) - 1, None)
    plan = plan_for(preset, int(sliced.needed / (1 - LEFT_FREE)) - 1, None)
    assert plan.words[0] == "bfloat16 instead of float32"
    assert any(words.startswith("decoders take turns within") for words in plan.words[1:])
    assert len(plan.preset.decoders) == 3
    path = tmp_path / "deep" / "fitted.yaml"
    path.parent.mkdir()

    write_preset(plan, path)

    written = load_preset(str(path))
    assert written.weights_folder == preset.weights_folder
    assert written.language_model == plan.preset.language_model
    assert written.decoders == plan.preset.decoders
    assert written.decoders_gb == plan.preset.decoders_gb is not None
    with Session.open(written) as session:
        reply = session.chat([{"role": "user", "content": "draw, play and film a bell"}])
    assert [part.error for part in reply.parts if part.error] == []
    assert [part.type for part in reply.parts if part.data] == [
        Modality.IMAGE,
        Modality.AUDIO,
        Modality.VIDEO,
    ]


def test_examples_of_a_written_plan_find_their_files(tmp_path: Path) -> None:
    preset = load_preset("toybox")
    write_preset(plan_for(preset, 40 * 10**6, None), tmp_path / "fitted.yaml")

    written = load_preset(str(tmp_path / "fitted.yaml"))

    files = [written.file.parent / name for example in written.examples for name in example.files]
    assert len(files) == 3
    assert all(file.is_file() for file in files)


# --- the command --------------------------------------------------------------------------------------


def test_doctor_says_what_would_change_on_another_machine_and_what_to_type(
    published: Preset, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["doctor", "--preset", "nextgpt-7b", "--memory", "20GB", "--port", "8123"]) == 1
    out = capsys.readouterr().out
    assert "to fit: the language model in 8 bits" in out
    assert "next: patchbay doctor --preset nextgpt-7b --memory 20GB --write fitted.yaml" in out

    path = tmp_path / "fitted.yaml"
    assert main(["doctor", "--preset", "nextgpt-7b", "--memory", "20GB", "--write", str(path)]) == 0
    fitted = load_preset(str(path))
    assert fitted.language_model.quantization == "int8"
    assert survey(fitted, 20 * GB).fits.ok

    assert main(["doctor", "--preset", "nextgpt-7b", "--memory", "1GB", "--write", str(path)]) == 1
    assert "are needed at the least, and there are 1.00 GB" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "size"), [("24GB", 24e9), ("24 gb", 24e9), ("1.5GiB", 1.5 * 2**30)])
def test_sizes_are_read(text: str, size: float) -> None:
    assert memory_size(text) == int(size)


def test_a_wrong_size_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["doctor", "--memory", "plenty"])
    assert "'plenty' is not a size; write one like 24GB" in capsys.readouterr().err


def test_a_tenth_is_left_to_what_cannot_be_counted() -> None:
    assert fitting("cpu", 9 * GB, 10 * GB).ok
    short = fitting("cpu", 91 * GB // 10, 10 * GB)
    assert not short.ok
    assert "9.10 GB are needed, 10.00 GB are given" in short.detail
    assert "with 10% left to larger batches and to libraries" in short.detail


def test_training_refuses_to_replace_published_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "all", "--preset", "nextgpt-7b"]) == 1
    err = capsys.readouterr().err
    assert "is made of published weights (ImageBind-Huge and" in err
    assert "Train the preset toybox" in err


# --- the table ----------------------------------------------------------------------------------------


def test_the_committed_tables_are_what_the_command_prints(
    published: Preset, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (DOCS / "memory.md").read_text()
    for name in ("nextgpt-7b", "toybox"):
        assert main(["doctor", "--preset", name, "--table"]) == 0
        assert capsys.readouterr().out in text, name


def test_rows_add_up_and_shrink(published: Preset) -> None:
    found = {row.setting: row for row in rows(published)}
    for row in found.values():
        assert row.total == row.encoder + row.language_model + row.cache + row.decoders + row.working
    whole, eight, four = (
        found[name]
        for name in ("float16", "float16, language model in int8", "float16, language model in nf4")
    )
    assert found["float32"].encoder == 2 * whole.encoder
    sliced, tiled = found["float16, VAE sliced"], found["float16, VAE tiled"]
    assert 0 < tiled.working <= sliced.working < whole.working
    assert "bfloat16, VAE tiled" not in {row.setting for row in rows(load_preset("toybox"))}  # it cannot be
    assert 0.5 < eight.language_model / whole.language_model < 0.55
    assert 0.28 < four.language_model / whole.language_model < 0.33
    assert table(list(found.values())).count("\n") == 1 + len(found)


def test_the_table_as_json_is_in_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--preset", "toybox", "--table", "--json"])
    first = json.loads(capsys.readouterr().out)[0]
    assert first["setting"] == "as the preset says"
    assert first["total"] == needed(load_preset("toybox"), boxes_of(load_preset("toybox")))
