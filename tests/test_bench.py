import json
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
from services.bench import BenchRow, decode, run_bench, table
from services.cli import main
from services.presets import load_preset
from tests import tiny_pipelines

KINDS: dict[str, tuple[type[LatentDecoder], Callable[[], Any], dict[str, Any]]] = {
    "image": (ImageDecoder, tiny_pipelines.image_pipeline, {}),
    "unet video": (VideoDecoder, tiny_pipelines.unet_video_pipeline, {"num_frames": 3}),
    "stacked video": (VideoDecoder, tiny_pipelines.stacked_video_pipeline, {}),
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
    condition = decoder.encode_caption(decode.CAPTION)

    theirs: Any = decode._peer(decoder, condition)(5)
    ours: Any = decoder.decode(condition, DecodeSettings(seed=5)).medium

    if kind == "image":
        np.testing.assert_array_equal(ours.pixels, np.asarray(theirs.images[0]))
    elif kind == "audio":
        np.testing.assert_allclose(ours.samples, theirs.audios[0].clip(-1, 1), atol=1e-4)
    else:
        frames = np.asarray(getattr(theirs, "frames", theirs)[0])
        np.testing.assert_allclose(ours.frames / 255, frames, atol=0.01)


def test_each_row_of_the_decode_bench_holds_both_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "AT_ONCE", (1, 3))

    rows = decode.measure(tiny_decoder("image", tmp_path), rounds=1)

    assert [row.case for row in rows] == ["image 1 at once", "image 3 at once"]
    for row in rows:
        assert row.value > 0
        assert row.ratio == pytest.approx(row.value / row.peer_value)


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


def test_an_unknown_bench_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "dcode"])
    assert "invalid choice: 'dcode' (choose from" in capsys.readouterr().err
