import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from decoders.settings import DecodeSettings
from encoders.media import Modality
from services.bench import GPUS, full_size
from services.bench.full_size import Device, Sizes, Work
from tests import tiny_pipelines
from tests.tiny_llm import llama


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Sizes:
    """Configurations of tiny models, in the layout of the full ones."""
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
    llama(400).config.save_pretrained(folder / "llm" / "base")
    return Sizes(
        folder=folder,
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


CASES = ["1 stream", "2 streams"]
CASES += [f"{name} {count} at once" for name in ("image", "video", "audio") for count in (1, 2)]
CASES += ["1 turn, three media"]


def test_a_dry_run_counts_every_case_without_weights(small: Sizes) -> None:
    rows = full_size.run(None, False, "h100", small)

    assert [row.case for row in rows] == CASES
    assert all(row.value > 0 and row.peer_value > 0 for row in rows)
    by_case = {row.case: row for row in rows}
    one, two = by_case["image 1 at once"], by_case["image 2 at once"]
    assert one.value == pytest.approx(two.value)  # arithmetic does not get cheaper in a batch
    assert two.peer_value == pytest.approx(2 * one.peer_value)  # weights are read once for both


def test_a_real_run_holds_the_same_cases_against_the_limits_of_its_device(small: Sizes) -> None:
    rows = full_size.run("cpu", False, "h100", small)

    assert [row.case for row in rows] == CASES
    for row in rows[:-1]:
        assert row.peer in (full_size.COMPUTE, full_size.MEMORY)
        assert 0 < row.ratio < 2  # a real run is not faster than what it needs at least


@pytest.mark.parametrize("modality", [Modality.IMAGE, Modality.VIDEO, Modality.AUDIO])
def test_operations_counted_without_numbers_are_those_of_a_real_pass(
    small: Sizes, modality: Modality
) -> None:
    with sdpa_kernel(SDPBackend.MATH):  # the operations of the CPU's own attention are not counted
        works = [
            full_size.medium_work(full_size.build_decoder(small, modality, device), small.wish(modality))
            for device in ("meta", "cpu")
        ]

    assert works[0] == works[1]
    assert works[0].flop > 0


def test_a_token_reads_all_weights_but_the_table_it_looks_up_in(small: Sizes) -> None:
    base = full_size.build_base(small, "meta")
    table = base.get_input_embeddings().weight.numel()
    weights = sum(p.numel() for p in base.parameters()) - table

    empty, later = full_size.step_work(base, 2, 0), full_size.step_work(base, 2, 10)

    assert empty.bytes == 4 * weights
    cache = 2 * 2 * 2 * 8 * 10 * 4  # keys and values, layers, shared heads, head width, positions, bytes
    assert later.bytes - empty.bytes == 2 * cache
    matrices = sum(p.numel() for p in base.parameters() if p.ndim == 2) - table
    assert empty.flop == pytest.approx(2 * 2 * matrices, rel=0.05)


def test_the_limit_that_binds_is_the_one_that_takes_longer() -> None:
    work = Work(flop=4.0, bytes=3.0)
    assert work.least_s(Device("slow memory", 1.0, 2.0)) == 3.0
    assert work.least_s(Device("slow arithmetic", 3.0, 1.0)) == 4.0


def test_the_full_sizes_are_the_papers() -> None:
    sizes = Sizes()
    decoder = full_size.build_decoder(sizes, Modality.IMAGE, "meta")
    base = full_size.build_base(sizes, "meta")

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


def test_every_gpu_of_the_command_line_has_limits() -> None:
    assert set(GPUS) == set(full_size.GPUS)
