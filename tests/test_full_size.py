import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel

from decoders.projection import OutputProjectionConfig
from decoders.settings import DecodeSettings
from encoders.imagebind_encoder import write_config
from encoders.media import Modality
from services.bench import GPUS, BenchRow, forward_work, full_size, residence
from services.bench.forward_work import Device, Work
from services.bench.full_size_models import Sizes, build_base, build_decoder
from services.errors import PresetProblem
from services.footprint import boxes_of, missing_files, needed
from services.presets import SHIPPED, load_preset
from services.session import Session
from tests import tiny_pipelines
from tests.tiny import tiny_encoder, tiny_values
from tests.tiny_llm import llama


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Sizes:
    """A preset of tiny models of the same classes, of which there are configurations only."""
    folder = tmp_path_factory.mktemp("sizes")
    pipelines = {
        Modality.IMAGE: tiny_pipelines.image_pipeline,
        Modality.VIDEO: tiny_pipelines.video_pipeline,
        Modality.AUDIO: tiny_pipelines.audio_pipeline,
    }
    for modality, pipeline in pipelines.items():
        tiny_pipelines.saved(pipeline(), folder / modality.value)
        for weights in (folder / modality.value).rglob("*.safetensors"):
            weights.unlink()
        projection = OutputProjectionConfig(
            llm_width=32,
            out_width=tiny_pipelines.WIDTH,
            num_queries=1 if modality is Modality.AUDIO else tiny_pipelines.TOKENS,
            hidden_width=16,
            ffn_width=16,
        )
        (folder / "projections" / modality.value).mkdir(parents=True)
        (folder / "projections" / modality.value / "config.json").write_text(json.dumps(projection.to_json()))
    encoder = tiny_encoder()
    (folder / "encoder").mkdir()
    write_config(folder / "encoder", encoder.model.config, encoder.preprocessing)
    llama(400, max_position_embeddings=160).config.save_pretrained(folder / "llm" / "base")
    manifest = json.loads((SHIPPED / "nextgpt-7b" / "llm" / "bridge.json").read_text())
    for projector in manifest["projectors"].values():
        projector |= {"encoder_width": encoder.width, "llm_width": 32}
    (folder / "llm" / "bridge.json").write_text(
        json.dumps(manifest | {"llm_width": 32, "base_vocabulary": 400, "lora": False, "base_tables": False})
    )
    values: Any = tiny_values() | {"weights": "nowhere", "sizes": "."}
    values["decoders"]["image"] |= {"width_px": 16, "height_px": 16}
    values["decoders"]["video"] |= {"width_px": 16, "height_px": 16, "num_frames": 2}
    values["decoders"]["audio"] |= {"duration_s": 0.05}
    (folder / "small.yaml").write_text(yaml.safe_dump(values))
    return Sizes(
        preset=load_preset(str(folder / "small.yaml")),
        dtype=torch.float32,
        streams=(1, 2),
        at_once=(1, 2),
        prompt_tokens=8,
        new_tokens=6,
        steps=2,
        rounds=1,
        probe=32,
        settings=(
            (Modality.IMAGE, DecodeSettings(width_px=16, height_px=16)),
            (Modality.VIDEO, DecodeSettings(width_px=16, height_px=16, num_frames=2)),
            (Modality.AUDIO, DecodeSettings(duration_s=0.05)),
        ),
    )


CASES = ["1 stream", "2 streams", "first token", "image read", "video read", "audio read"]
CASES += [f"{name} {count} at once" for name in ("image", "video", "audio") for count in (1, 2)]
CASES += ["1 turn, three media"]
BOXES = ["encoder", "language model", "audio decoder", "image decoder", "video decoder"]
MEMORY = [f"memory, {box}" for box in (*BOXES, "all resident")]


@pytest.fixture(scope="module")
def rows_by_case(small: Sizes, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, BenchRow], Path]:
    """What a run on the CPU found, and where it wrote its weights."""
    folder = tmp_path_factory.mktemp("run") / "weights"
    return {row.case: row for row in full_size.run("cpu", False, "h100", small, folder)}, folder


@pytest.fixture(scope="module")
def counted_rows(small: Sizes) -> list[BenchRow]:
    return full_size.run(None, False, "l4", small)


def test_a_dry_run_counts_every_case_without_weights(counted_rows: list[BenchRow]) -> None:
    rows = counted_rows
    moved = [f"load, {box}, moved" for box in BOXES]
    assert [row.case for row in rows] == [*CASES, *MEMORY, "memory, all at work", *moved]
    assert all(row.value > 0 and row.peer_value > 0 for row in rows)
    by_case = {row.case: row for row in rows}
    one, two = by_case["image 1 at once"], by_case["image 2 at once"]
    assert one.value == pytest.approx(two.value)  # arithmetic does not get cheaper in a batch
    assert two.peer_value == pytest.approx(2 * one.peer_value)  # weights are read once for both


def test_a_dry_run_tells_what_doctor_predicts_beside_the_memory_of_the_gpu(
    small: Sizes, counted_rows: list[BenchRow]
) -> None:
    rows = {row.case: row for row in counted_rows}

    preset = small.asked_of_doctor("cuda")
    boxes = {box.name: box for box in boxes_of(preset)}
    speaker = boxes["language model"]
    assert rows["memory, language model"].value == (speaker.in_memory + (speaker.working or 0)) / 1e9
    assert rows["memory, all resident"].value == sum(box.in_memory for box in boxes.values()) / 1e9
    assert rows["memory, all at work"].value == needed(preset, [*boxes.values()]) / 1e9
    assert {row.peer_value for case, row in rows.items() if case.startswith("memory")} == {24.0}
    weights = speaker.in_memory - speaker.cache
    assert rows["load, language model, moved"].value == weights / 32e9


def test_a_real_run_holds_the_same_cases_against_the_limits_of_its_device(
    rows_by_case: tuple[dict[str, BenchRow], Path],
) -> None:
    rows, _ = rows_by_case

    ways = ("built", "moved", "read")
    loads = [f"load, {box}, {way}" for box in BOXES for way in ways]
    assert [*rows] == [*CASES, *MEMORY, *loads]
    for case in CASES:
        if case in ("1 turn, three media", "first token"):
            assert rows[case].ratio > 1  # a real run takes longer than what it needs at least
        else:
            assert rows[case].peer in (forward_work.COMPUTE, forward_work.MEMORY)
            assert 0 < rows[case].ratio < 2
    assert all(rows[case].value > 0 and rows[case].unit == "s" for case in loads)


def test_boxes_take_what_doctor_predicts(rows_by_case: tuple[dict[str, BenchRow], Path]) -> None:
    rows, _ = rows_by_case

    for case in MEMORY:
        # Kernels of a CPU keep copies that count much where a network has eight channels.
        within = 1.0 if case in ("memory, audio decoder", "memory, image decoder") else 0.1
        assert rows[case].peer == "doctor's prediction"
        assert rows[case].ratio == pytest.approx(1, abs=within), case
        assert rows[case].ratio > 0.95, case


def test_what_was_written_is_read_as_the_service_reads_it(
    small: Sizes, rows_by_case: tuple[dict[str, BenchRow], Path]
) -> None:
    _, folder = rows_by_case
    preset = small.preset.model_copy(update={"weights": str(folder), "sizes": None})

    assert missing_files(preset) == []
    with Session(preset) as session:
        reply = session.chat([{"role": "user", "content": "b"}], max_new_tokens=4)
    assert reply.usage["completion_tokens"] == 4


def test_a_folder_that_holds_something_is_not_written_to(small: Sizes, tmp_path: Path) -> None:
    boxes = boxes_of(small.preset)
    (tmp_path / "mine").write_text("mine")

    with pytest.raises(PresetProblem, match=r"is not an empty folder; expected one, or none, .* --weights"):
        residence.expect_room(tmp_path, boxes)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    small: Sizes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=1000))

    with pytest.raises(PresetProblem, match=r"are free in .*; the random weights take .* Make room, or"):
        residence.expect_room(tmp_path / "new", boxes_of(small.preset))
    assert not (tmp_path / "new").exists()


def test_a_gpu_is_asked_for_what_stays_and_for_the_most_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = {"now": 100, "peak": 0}
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: None)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: levels["now"])
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: levels["peak"])
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda device: levels.update(peak=0))

    made, taken = residence.taken("cuda", lambda: levels.update(now=130, peak=190) or "made")

    assert (made, taken.held, taken.most) == ("made", 30, 90)


def test_a_turn_on_a_gpu_is_held_against_what_all_boxes_need_at_work(small: Sizes) -> None:
    preset = small.asked_of_doctor("cpu")
    boxes = boxes_of(preset)
    held = sum(box.in_memory for box in boxes)
    resident: Any = SimpleNamespace(preset=preset, boxes=boxes, held=held)

    row = residence.together_row(resident, residence.Taken(0, needed(preset, boxes) - held, 1.0))

    assert (row.case, row.peer) == ("memory, all at work", "doctor's prediction")
    assert row.ratio == pytest.approx(1)


@pytest.mark.parametrize("modality", [Modality.IMAGE, Modality.VIDEO, Modality.AUDIO])
def test_operations_counted_without_numbers_are_those_of_a_real_pass(
    small: Sizes, modality: Modality
) -> None:
    with sdpa_kernel(SDPBackend.MATH):  # the operations of the CPU's own attention are not counted
        works = [
            forward_work.medium_work(build_decoder(small, modality, device), small.wish(modality))
            for device in ("meta", "cpu")
        ]

    assert works[0] == works[1]
    assert works[0].flop > 0


def test_a_token_reads_all_weights_but_the_table_it_looks_up_in(small: Sizes) -> None:
    base = build_base(small, "meta")
    table = base.get_input_embeddings().weight.numel()
    weights = sum(p.numel() for p in base.parameters()) - table

    empty, later = forward_work.step_work(base, 2, 0), forward_work.step_work(base, 2, 10)

    assert empty.bytes == 4 * weights
    cache = 2 * 2 * 2 * 8 * 10 * 4  # keys and values, layers, shared heads, head width, positions, bytes
    assert later.bytes - empty.bytes == 2 * cache
    matrices = sum(p.numel() for p in base.parameters() if p.ndim == 2) - table
    assert empty.flop == pytest.approx(2 * 2 * matrices, rel=0.05)


def test_the_limit_that_binds_is_the_one_that_takes_longer() -> None:
    work = Work(flop=4.0, bytes=3.0)
    assert work.least_s(Device("slow memory", 1.0, 2.0, 1.0)) == 3.0
    assert work.least_s(Device("slow arithmetic", 3.0, 1.0, 1.0)) == 4.0


def test_the_full_sizes_are_the_papers() -> None:
    sizes = Sizes()
    decoder = build_decoder(sizes, Modality.IMAGE, "meta")
    base = build_base(sizes, "meta")

    assert sum(p.numel() for p in base.parameters()) == 6_738_423_808  # Vicuna 7B v0
    assert sum(p.numel() for p in decoder._network.parameters()) == 859_520_964  # Stable Diffusion 1.5
    assert base.dtype == torch.bfloat16
    wishes = {modality: sizes.wish(modality) for modality in (Modality.VIDEO, Modality.AUDIO)}
    assert (wishes[Modality.VIDEO].width_px, wishes[Modality.VIDEO].num_frames) == (576, 24)
    assert wishes[Modality.AUDIO].duration_s == 10


def test_the_dry_command_says_for_which_gpu_it_counted(
    monkeypatch: pytest.MonkeyPatch, small: Sizes, capsys: pytest.CaptureFixture[str]
) -> None:
    from services.cli import main

    monkeypatch.setattr(full_size, "Sizes", lambda: small)

    assert main(["bench", "--full-size", "--dry", "--gpu", "a100", "--json"]) == 0

    result = json.loads(capsys.readouterr().out)
    assert result["bench"] == "full-size"
    assert result["machine"]["counted_for"] == "NVIDIA A100 SXM 80 GB"
    assert result["rows"][0]["details"]["gflop each"] > 0


@pytest.mark.parametrize("words", [["--dry"], []])
def test_weights_are_not_written_where_all_is_only_counted(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from services.cli import main

    folder = tmp_path / "weights"

    assert main(["bench", "--full-size", *words, "--weights", str(folder)]) == 1

    assert "models without numbers have no weights to write" in capsys.readouterr().err
    assert not folder.exists()


def test_every_gpu_of_the_command_line_has_limits() -> None:
    assert set(GPUS) == set(forward_work.GPUS)
