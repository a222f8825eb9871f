import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from decoders.audio import AudioDecoder
from decoders.image import ImageDecoder
from decoders.latent_decoder import LatentDecoder
from decoders.settings import DecodeSettings
from decoders.video import VideoDecoder
from encoders.media import Modality
from services.bench import BenchRow, caching, decode, run_bench, table, write_tables
from services.bench import compile as compile_bench
from services.bench.pipelines import CAPTION, medium_of, parts_from_disk, parts_of, pipeline
from services.cli import main
from services.compiling import Compile
from services.presets import load_preset
from tests import tiny_pipelines
from tests.tiny_llm import tiny_model

KINDS: dict[str, tuple[type[LatentDecoder], Callable[[], Any], dict[str, Any]]] = {
    "image": (ImageDecoder, tiny_pipelines.image_pipeline, {}),
    "video": (VideoDecoder, tiny_pipelines.video_pipeline, {"num_frames": 3}),
    "audio": (AudioDecoder, tiny_pipelines.audio_pipeline, {"duration_s": 0.05}),
}


def tiny_decoder(kind: str, folder: Path) -> LatentDecoder:
    """Return a decoder that takes two steps and makes little."""
    decoder, pipeline, sizes = KINDS[kind]
    tiny_pipelines.saved(pipeline(), folder)
    (folder / "patchbay.json").write_text(json.dumps({"steps": 2, "guidance_scale": 3.0, **sizes}))
    return decoder.load(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_the_peer_makes_the_same_medium_as_the_decoder(kind: str, tmp_path: Path) -> None:
    decoder = tiny_decoder(kind, tmp_path)
    condition = decoder.encode_caption(CAPTION)

    theirs: Any = pipeline(decoder, parts_of(decoder))(condition, 5)
    ours: Any = decoder.decode(condition, DecodeSettings(seed=5)).medium

    if kind == "image":
        np.testing.assert_array_equal(ours.pixels, np.asarray(theirs.images[0]))
    elif kind == "audio":
        np.testing.assert_allclose(ours.samples, theirs.audios[0].clip(-1, 1), atol=1e-4)
    else:
        np.testing.assert_allclose(ours.frames / 255, theirs.frames[0], atol=0.01)


def test_each_row_of_the_decode_bench_holds_both_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "AT_ONCE", (1, 3))

    rows = decode.measure(tiny_decoder("image", tmp_path), rounds=1)

    assert [(row.case, row.unit) for row in rows] == [
        ("image 1 at once", "media/s"),
        ("image 1 at once, latency", "s"),
        ("image 3 at once", "media/s"),
        ("image 3 at once, latency", "s"),
    ]
    for row in rows:
        assert row.value > 0
        assert row.ratio == pytest.approx(row.value / row.peer_value)
    rate, latency = rows[2:]
    assert latency.peer_value == pytest.approx(2 / rate.peer_value)  # the mean of 1, 2 and 3 media
    assert 1 / rate.value <= latency.value <= 3 / rate.value + 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_read_again_from_disk_makes_the_same_medium(kind: str, tmp_path: Path) -> None:
    decoder = tiny_decoder(kind, tmp_path)
    condition = decoder.encode_caption(CAPTION)
    again = parts_from_disk(decoder.folder, parts_of(decoder))

    theirs = medium_of(decoder.modality, pipeline(decoder, again)(condition, 5), decoder)
    ours: Any = decoder.decode(condition, DecodeSettings(seed=5)).medium

    assert again.unet is not parts_of(decoder).unet
    name = {"image": "pixels", "audio": "samples"}.get(kind, "frames")
    np.testing.assert_allclose(
        getattr(theirs, name).astype(float),
        getattr(ours, name).astype(float),
        atol=1 if kind != "audio" else 1e-4,
    )


@pytest.mark.parametrize("kind", ["image", "video"])
def test_the_caching_rows_show_speed_and_accuracy_of_every_setting(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caching, "QUICK_SAMPLES", 2)
    monkeypatch.setattr(caching, "_right", lambda scene, seen: True)

    rows = {row.case: row for row in caching.measure(tiny_decoder(kind, tmp_path), quick=True)}

    assert len(rows) == 3 * len(caching.QUICK_SETTINGS)
    assert rows[f"{kind} 1 at once, deep_every 2"].unit == "media/s"
    accuracy = rows[f"{kind} accuracy, deep_every 3"]
    assert accuracy.value == accuracy.peer_value == 1.0


def test_accuracy_is_that_of_the_media_that_were_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caching, "QUICK_SAMPLES", 2)

    rows = caching.measure(tiny_decoder("image", tmp_path), quick=True)

    assert [row.value for row in rows if row.unit == "right"] == [0.0, 0.0]  # random weights draw nothing


def test_a_network_without_deep_features_has_no_caching_rows(tmp_path: Path) -> None:
    folder = tiny_pipelines.saved(tiny_pipelines.image_pipeline(levels=1), tmp_path)

    assert caching.measure(ImageDecoder.load(folder), quick=True) == []


def test_the_compile_rows_hold_both_sides_and_the_time_of_compiling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_bench, "BACKEND", "eager")
    monkeypatch.setattr(compile_bench, "ROWS", (2,))
    monkeypatch.setattr(compile_bench, "STREAMS", (1,))
    monkeypatch.setattr(compile_bench, "prompts", lambda count, seed: ["draw a bell"] * 2)

    decoder, model = tiny_decoder("image", tmp_path), tiny_model()
    hows: list[Compile] = ["trace", True]
    rows = [row for how in hows for row in compile_bench.decoder_rows(decoder, how, rounds=1)]
    rows += [row for how in hows for row in compile_bench.model_rows(model, how, rounds=1)]

    assert [row.case for row in rows] == [
        "image step of 2 rows, recorded",
        "image step of 2 rows",
        "1 stream, recorded",
        "1 stream",
    ]
    for row in rows:
        assert row.value > 0
        assert row.details is not None
        assert row.details["compile_s"] > 0


def test_what_is_not_compiled_in_time_has_a_rate_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {
        Modality.IMAGE: BenchRow("image step of 2 rows, recorded", 3.0, "steps/s", "plain", 2.0),
        None: BenchRow("1 stream, recorded", 30.0, "tokens/s", "plain", 20.0),
    }
    monkeypatch.setattr(compile_bench, "box_rows", lambda preset, box, how, rounds: [made[box]])
    monkeypatch.setattr(compile_bench, "QUICK_LIMIT_S", 0.01)
    preset = load_preset("toybox")
    one = preset.model_copy(update={"decoders": {Modality.IMAGE: preset.decoders[Modality.IMAGE]}})

    rows = compile_bench.run(one, quick=True)

    assert rows[:2] == list(made.values())
    assert [(row.case, row.value, row.peer_value) for row in rows[2:]] == [
        ("image step of 2 rows", 0.0, 2.0),
        ("1 stream", 0.0, 20.0),
    ]
    assert all(row.details == {"compile_s": 0.01} for row in rows[2:])
    assert not multiprocessing.active_children()


def test_a_bench_prints_one_object_that_programs_can_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = BenchRow(case="image 4 at once", value=3.0, unit="media/s", peer="one by one", peer_value=2.0)
    asked: list[tuple[str, bool]] = []
    monkeypatch.setattr(decode, "run", lambda preset, quick: asked.append((preset.name, quick)) or [row])

    assert main(["bench", "decode", "--quick", "--json"]) == 0

    result = json.loads(capsys.readouterr().out)
    assert asked == [("toybox", True)]
    assert result["bench"] == "decode"
    assert result["rows"] == [
        {
            "case": "image 4 at once",
            "value": 3.0,
            "unit": "media/s",
            "peer": "one by one",
            "peer_value": 2.0,
            "ratio": 1.5,
        }
    ]
    assert result["machine"]["cores"] >= 1


def test_the_table_shows_the_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    row = BenchRow(case="image 4 at once", value=3.0, unit="media/s", peer="one by one", peer_value=2.0)
    monkeypatch.setattr(decode, "run", lambda preset, quick: [row])

    text = table(run_bench("decode", load_preset("toybox"), quick=False))

    assert "image 4 at once" in text
    assert "| media/s | 1.50 | one by one |" in text


def test_tables_are_written_between_their_comments(tmp_path: Path) -> None:
    row = BenchRow("turn", 3.0, "s", "one by one", 2.0, {"gflop each": 7.0}).as_json()
    (tmp_path / "turn.json").write_text(json.dumps({"rows": [row], "machine": {"cores": 2}}))
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- turn.json -->\nold\n<!-- end -->\nafter\n")

    assert main(["bench", "--tables", str(tmp_path)]) == 0
    assert main(["bench", "--tables", str(tmp_path)]) == 0

    text = page.read_text()
    assert text.startswith(
        "before\n<!-- turn.json -->\n| case | ours | peer's | unit | ratio | peer | gflop each |\n"
    )
    assert "| turn | 3 | 2 | s | 1.50 | one by one | 7 |\n\ncores 2\n<!-- end -->\nafter\n" in text
    assert "old" not in text


def test_a_table_of_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("<!-- turn.json -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match=r"names turn.json, which is not in .* Run that bench first"):
        write_tables(tmp_path)


@pytest.mark.parametrize("words", [[], ["llm", "--full-size"], ["turn", "--tables", "docs"]])
def test_one_thing_is_measured_at_a_time(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", *words])
    assert (
        "choose one: compile, decode, llm, service, turn, --full-size or --tables DIR"
        in capsys.readouterr().err
    )


def test_an_unknown_bench_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "dcode"])
    assert "invalid choice: 'dcode' (choose from" in capsys.readouterr().err
