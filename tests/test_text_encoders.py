"""A whole pipeline that is given embeddings alone keeps no text encoders."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from decoders.condition import Condition
from decoders.pipeline_arguments import WITHOUT_TEXT_ENCODERS
from decoders.pipeline_folder import NULL_FILE
from decoders.settings import DecodeSettings
from decoders.whole_pipeline import WholePipeline
from encoders.media import Modality
from services.artefacts import ArtefactStore
from services.footprint import boxes_of, decoder_bytes, missing_files
from services.local_decoder import LocalDecoder
from services.presets import Preset, load_preset
from tests import tiny_current
from tests.lora_files import change_json
from tests.test_condition_layouts import WISHES, values
from tests.tiny import tiny_values

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
CAPTION = "a big red bell"
LET_GO = sorted(tiny_current.PIPELINES.keys() - {"audioldm2"})


@pytest.fixture(scope="module", params=LET_GO)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_current.write(name, tmp_path_factory.mktemp(name))


@pytest.fixture(scope="module")
def reader(folder: Path) -> WholePipeline:
    return WholePipeline.load(folder)


@pytest.fixture(scope="module")
def spare(folder: Path) -> WholePipeline:
    return WholePipeline.load(folder, reads_captions=False)


def text_encoders(decoder: WholePipeline) -> list[Any]:
    parts = [name for name in decoder.pipeline.components if name.startswith("text_encoder")]
    assert parts
    return [getattr(decoder.pipeline, part) for part in parts]


def made(decoder: WholePipeline, condition: Condition, name: str, guidance: float) -> Any:
    settings = DecodeSettings(seed=1, steps=2, guidance_scale=guidance, **WISHES[name])
    medium = decoder.decode(Condition(condition.embeddings, condition.named), settings).medium
    return getattr(medium, values(medium))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_media_are_the_same_with_and_without_text_encoders(
    name: str, reader: WholePipeline, spare: WholePipeline, guidance: float
) -> None:
    condition = reader.encode_caption(CAPTION)

    np.testing.assert_array_equal(
        made(spare, condition, name, guidance), made(reader, condition, name, guidance)
    )

    assert text_encoders(spare) == [None] * len(text_encoders(reader))
    assert all(isinstance(part, nn.Module) for part in text_encoders(reader))


def test_a_pipeline_that_guides_itself_is_given_the_empty_caption(tmp_path: Path) -> None:
    folder = tiny_current.write("klein", tmp_path)
    change_json(folder / "model_index.json", is_distilled=False)
    reader, spare = WholePipeline.load(folder), WholePipeline.load(folder, reads_captions=False)
    condition = reader.encode_caption(CAPTION)

    guided, plain = (made(spare, condition, "klein", guidance) for guidance in (3.0, 1.0))

    expected = reader.pipeline(
        prompt=CAPTION, generator=torch.Generator("cpu").manual_seed(1), num_inference_steps=2,
        guidance_scale=3.0, width=32, height=32, output_type="np",
    ).images[0]  # fmt: skip
    np.testing.assert_array_equal(guided, (expected.clip(0, 1) * 255).round().astype(np.uint8))
    assert not np.array_equal(guided, plain)


def test_the_engine_can_be_calibrated_without_them(spare: WholePipeline, reader: WholePipeline) -> None:
    empty = spare.encode_caption("")

    assert torch.equal(empty.embeddings, reader.encode_caption("").embeddings)
    assert not any(text_encoders(spare))


def test_what_was_made_of_the_empty_caption_is_kept_beside_the_weights(
    name: str, folder: Path, spare: WholePipeline, reader: WholePipeline, tmp_path: Path
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert (copy / NULL_FILE).is_file()
    for weights in copy.glob("text_encoder*/*.safetensors"):
        weights.unlink()

    again = WholePipeline.load(copy, reads_captions=False)

    condition = reader.encode_caption(CAPTION)
    np.testing.assert_array_equal(made(again, condition, name, 3.0), made(reader, condition, name, 3.0))
    assert again.condition_specs == spare.condition_specs == reader.condition_specs


def test_a_caption_after_all_loads_them_again(folder: Path, reader: WholePipeline) -> None:
    decoder = WholePipeline.load(folder, reads_captions=False)

    late = decoder.encode_caption(CAPTION)

    expected = reader.encode_caption(CAPTION)
    assert torch.equal(late.embeddings, expected.embeddings)
    assert all(torch.equal(late.named[each], tensor) for each, tensor in expected.named.items())
    assert all(isinstance(part, nn.Module) for part in text_encoders(decoder))


def test_what_other_text_encoders_or_another_dtype_made_is_made_anew(tmp_path: Path) -> None:
    copy = tiny_current.write("wan", tmp_path)
    WholePipeline.load(copy, reads_captions=False)
    first = (copy / NULL_FILE).read_bytes()
    WholePipeline.load(copy, reads_captions=False)
    assert (copy / NULL_FILE).read_bytes() == first

    half = WholePipeline.load(copy, dtype=torch.bfloat16, reads_captions=False)
    second = (copy / NULL_FILE).read_bytes()
    assert half.encode_caption("").embeddings.dtype == torch.bfloat16
    assert second != first

    (weights,) = (copy / "text_encoder").glob("*.safetensors")
    other = bytearray(weights.read_bytes())
    other[-1] ^= 1
    weights.write_bytes(other)
    WholePipeline.load(copy, dtype=torch.bfloat16, reads_captions=False)
    assert (copy / NULL_FILE).read_bytes() != second

    (copy / NULL_FILE).write_bytes(b"cut off")
    WholePipeline.load(copy, dtype=torch.bfloat16, reads_captions=False)
    assert len((copy / NULL_FILE).read_bytes()) == len(second)


def test_a_folder_that_cannot_be_written_to_is_used_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    copy = tiny_current.write("xl", tmp_path)

    def refuse(*args: object, **named: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("decoders.pipeline_folder.save_file", refuse)
    assert not any(text_encoders(WholePipeline.load(copy, reads_captions=False)))
    assert sorted(path.name for path in copy.glob("null*")) == []


def test_a_pipeline_that_asks_its_text_encoders_all_the_same_keeps_them(tmp_path: Path) -> None:
    folder = tiny_current.write("audioldm2", tmp_path)
    assert "AudioLDM2Pipeline" not in WITHOUT_TEXT_ENCODERS

    assert all(text_encoders(WholePipeline.load(folder, reads_captions=False)))


@pytest.mark.parametrize("link", ["signal", "caption"])
def test_doctor_counts_what_a_whole_pipeline_holds(
    folder: Path, reader: WholePipeline, spare: WholePipeline, link: str
) -> None:
    decoder, modality = {"signal": spare, "caption": reader}[link], reader.modality
    decoders = {modality: {"folder": str(folder), "link": link}}
    values_: dict[str, Any] = tiny_values() | {"decoders": decoders, "weights": str(folder / "none")}
    preset = Preset(**values_, file=folder / "tiny.yaml")

    networks = [part for part in decoder.pipeline.components.values() if isinstance(part, nn.Module)]
    held = sum(p.numel() * p.element_size() for network in networks for p in network.parameters())
    assert decoder_bytes(preset, modality) == held
    assert [path for path in missing_files(preset) if not path.is_relative_to(folder / "none")] == []


@pytest.mark.parametrize("link", ["signal", "caption"])
def test_the_box_keeps_text_encoders_where_captions_go_to_it(tmp_path: Path, link: str) -> None:
    folder = tiny_current.write("xl", tmp_path / "xl")
    decoders = {"image": {"folder": str(folder), "link": link}}
    preset = Preset(**tiny_values() | {"decoders": decoders}, file=tmp_path / "tiny.yaml")
    box = LocalDecoder(preset, Modality.IMAGE, ArtefactStore(tmp_path.as_uri()))

    decoder = box._engine().decoder

    assert isinstance(decoder, WholePipeline)
    assert [part is not None for part in text_encoders(decoder)] == [link == "caption"] * 2


def test_the_open_preset_needs_no_room_for_the_text_encoders_of_its_decoders() -> None:
    parts = {
        f"{box.name}/{part.name}": part
        for box in boxes_of(load_preset("open-8b"))
        for part in box.parts
        if box.modality in (Modality.IMAGE, Modality.VIDEO, Modality.AUDIO)
    }

    text = [part for name, part in parts.items() if "text_encoder" in name]
    assert len(text) == 3
    assert [part.in_memory for part in text] == [0, 0, 0]
    assert sum(part.parameters or 0 for part in text) > 9_000_000_000
    assert all(part.in_memory for name, part in parts.items() if "text_encoder" not in name)
