import json
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from alignment.second_look import SecondLook
from decoders.settings import DecodeSettings
from encoders.media import Modality
from services.doctor import examine, expect_files, expect_free_port
from services.errors import PresetProblem
from services.footprint import missing_files
from services.presets import SHIPPED, load_preset, shipped_presets
from services.session import Session
from tests.tiny import tiny_values

ROOT = Path(__file__).resolve().parent.parent


def written(folder: Path, **changes: Any) -> str:
    path = folder / "p.yaml"
    path.write_text(yaml.safe_dump({**tiny_values(), **changes}))
    return str(path)


@pytest.fixture
def copy(tiny_preset: Path, tmp_path: Path) -> Path:
    """A copy of the tiny preset that a test may break."""
    shutil.copytree(tiny_preset.parent, tmp_path / "copy")
    return tmp_path / "copy" / tiny_preset.name


def test_every_shipped_preset_is_well_formed_and_named_like_its_file() -> None:
    assert "toybox" in shipped_presets()
    for name in shipped_presets():
        preset = load_preset(name)
        assert preset.name == name
        for example in preset.examples:
            assert all((SHIPPED / file).is_file() for file in example.files)


def test_a_preset_fills_in_what_a_request_leaves_open(tmp_path: Path) -> None:
    decoders = {"image": {"folder": "image", "steps": 7, "deep_every": 2}}
    decoder = load_preset(written(tmp_path, decoders=decoders)).decoders[Modality.IMAGE]

    assert decoder.fill(DecodeSettings()) == DecodeSettings(steps=7, deep_every=2)
    assert decoder.fill(DecodeSettings(deep_every=1)) == DecodeSettings(steps=7, deep_every=1)


def test_fast_means_what_the_preset_says_and_a_number_says_more(tmp_path: Path) -> None:
    decoders = {"image": {"folder": "image", "deep_every": 2, "fast_deep_every": 4}}
    decoder = load_preset(written(tmp_path, decoders=decoders)).decoders[Modality.IMAGE]

    for wish, every in (
        (DecodeSettings(), 2),
        (DecodeSettings(fast=True), 4),
        (DecodeSettings(fast=False), 1),
        (DecodeSettings(fast=True, deep_every=3), 3),
    ):
        assert decoder.fill(wish).deep_every == every


def test_fast_of_the_embedded_model_is_what_its_measurement_says() -> None:
    """The largest setting that loses at most one medium in a hundred."""
    result = json.loads((ROOT / "docs" / "benchmarks" / "decode.json").read_text())
    found = {
        (match[1], int(match[2])): row
        for row in result["rows"]
        if (match := re.fullmatch(r"(\w+) accuracy, deep_every (\d+)", row["case"]))
    }
    for modality, decoder in load_preset("toybox").decoders.items():
        lossless = [
            every
            for (name, every), row in found.items()
            if name == modality.value and row["value"] >= row["peer_value"] - 0.01
        ]
        assert decoder.fast_deep_every == max(lossless)


def test_an_unknown_preset_is_answered_with_the_known_ones() -> None:
    with pytest.raises(PresetProblem, match=r"no preset 'toybx'. Known presets: .*toybox"):
        load_preset("toybx")


@pytest.mark.parametrize("name", ["../toybox", "/etc/passwd", "", "a/b"])
def test_a_preset_name_is_not_a_path(name: str) -> None:
    with pytest.raises(PresetProblem) as caught:
        load_preset(name)
    assert caught.value.code == "unknown_preset"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"encodr": {}}, "encodr: Extra inputs"),
        ({"weights": None}, "weights: Input should be"),
        ({"weights": ""}, r"weights: .* '' is no folder; expected its path"),
        ({"weights": "a\0b"}, r"weights: .* is no folder; expected its path"),
        ({"decoders": {"image": {"folder": " "}}}, r"decoders.image.folder: .* ' ' is no folder"),
        ({"decoders": {"text": {"folder": "x"}}}, "text needs no decoder"),
        ({"decoders": {"image": {"folder": "x", "link": "magic"}}}, "decoders.image.link"),
        ({"generation": {"temperature": 9}}, "generation.temperature"),
        ({"generation": {"ask_below": 0}}, "generation.ask_below"),
        ({"generation": {"ask_below": 1}}, "generation.ask_below"),
        ({"generation": {"verify": {"below": 1}}}, "generation.verify.below"),
        ({"generation": {"verify": {"retries": 0}}}, "generation.verify.retries"),
        ({"generation": {"verify": {"question": " "}}}, "generation.verify.question"),
        ({"decoders": {"audio": {"folder": "x", "width_px": 64}}}, "audio has no width_px"),
        ({"encoder": {"dtype": "int4"}}, "encoder.dtype"),
    ],
)
def test_a_wrong_preset_file_is_refused_with_the_key(
    tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(PresetProblem, match=complaint):
        load_preset(written(tmp_path, **changes))


def test_a_missing_or_broken_preset_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PresetProblem, match="cannot be read: No such file"):
        load_preset(str(tmp_path / "none.yaml"))
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(PresetProblem, match="is not YAML"):
        load_preset(str(tmp_path / "bad.yaml"))


def test_folders_are_relative_to_the_preset_file(tiny_preset: Path) -> None:
    preset = load_preset(str(tiny_preset))
    assert preset.encoder_folder == tiny_preset.parent / "weights" / "encoder"
    assert missing_files(preset) == []


@pytest.mark.parametrize(
    "name",
    [
        "encoder/model.safetensors",
        "llm/base/tokenizer.json",
        "llm/base/model.safetensors",
        "llm/bridge.safetensors",
        "image/unet/diffusion_pytorch_model.safetensors",
        "video/model_index.json",
        "projections/audio/model.safetensors",
    ],
)
def test_a_missing_file_is_named_before_anything_is_loaded(copy: Path, name: str) -> None:
    missing = copy.parent / "weights" / name
    missing.unlink()
    with pytest.raises(PresetProblem, match=r"lacks .*\. Put it there, or correct the folders in ") as caught:
        expect_files(load_preset(str(copy)))
    assert Path(name).parent.name in caught.value.message
    assert caught.value.code == "weights_missing"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("image/unet/diffusion_pytorch_model.safetensors", b""),
        ("llm/base/model.safetensors", b"x" * 100),
        ("audio/model_index.json", b"{oops"),
        ("llm/base/tokenizer.json", b"{oops"),
    ],
)
def test_a_damaged_file_is_named_before_anything_is_loaded(copy: Path, name: str, content: bytes) -> None:
    (copy.parent / "weights" / name).write_bytes(content)
    with pytest.raises(PresetProblem, match=r"is no (JSON|safetensors file).*again") as caught:
        expect_files(load_preset(str(copy)))
    assert str(copy.parent / "weights" / name) in caught.value.message
    assert caught.value.code == "weights_invalid"


def origin(**values: object) -> dict[str, object]:
    whole = {"model": "m", "source": "s/m", "licence": "MIT", "commercial": True, "get": "echo m"}
    return {"encoder": {"origins": [whole | values]}}


def fetched(**values: object) -> dict[str, object]:
    return origin(get=None, download=values)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"decoders_gb": float("inf")}, r"decoders_gb: Input should be a finite number"),
        ({"device": "mps"}, r"device: String should match pattern"),
        (origin(revision="main"), r"encoder.origins.0.revision: String should match"),
        (origin(get="echo {revision}"), r"get has {revision}, and there is no revision"),
        (origin(download={"into": "m", "files": ["*"]}), r"give either download or get, a command to type"),
        (origin(get=None), r"give either download or get"),
        (fetched(into="../m"), r"'../m' must be a folder within the weights"),
        (fetched(into="m"), r"files are patterns of a hub repository; an address is one file"),
        (fetched(into="m", files=["*"], size_bytes=3), r"size_bytes and sha256 are those of an address"),
        (
            origin(get=None, source="https://a/m", download={"into": "m", "about_gb": 1}),
            r"about_gb is that of a hub repository; an address has size_bytes",
        ),
        (fetched(into="m", files=["*"], convert="nextgpt", makes=["llm"]), r"base belongs to the conv"),
        (fetched(into="m", files=["*"], convert="imagebind"), r"makes names the folders that a conversion"),
        (origin(get=None, source="m", download={"into": "m", "files": ["*"]}), r"source must be a hub id"),
        (origin(get="echo {nothing}"), r"get may hold {weights}, {preset}, {source} and {revision}"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(
    tmp_path: Path, values: dict[str, object], complaint: str
) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump({"name": "p", "description": "P.", "weights": "w"} | values))
    with pytest.raises(PresetProblem, match=complaint):
        load_preset(str(path))


def test_a_file_that_is_not_utf8_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_bytes(b"description: caf\xe9")
    with pytest.raises(PresetProblem, match=r"p.yaml is not text in UTF-8 .* Save it as UTF-8"):
        load_preset(str(tmp_path / "p.yaml"))


def test_commands_name_a_preset_as_it_can_be_found() -> None:
    preset = load_preset("toybox")
    assert preset.as_argument == "toybox"
    assert preset.model_copy(update={"file": Path("/a b/p.yaml")}).as_argument == "'/a b/p.yaml'"


def test_weights_of_a_wrong_shape_are_named_when_they_are_loaded(copy: Path) -> None:
    path = copy.parent / "weights" / "llm" / "bridge.safetensors"
    tensors = load_file(path)
    tensors["signal_rows.head"] = tensors["signal_rows.head"][:-1].clone()
    save_file(tensors, path)
    with pytest.raises(PresetProblem, match=r"language model cannot be loaded: .*signal_rows.head has shape"):
        Session.open(str(copy))


def test_a_projection_for_another_decoder_is_refused(copy: Path) -> None:
    weights = copy.parent / "weights" / "projections"
    shutil.rmtree(weights / "image")
    shutil.copytree(weights / "audio", weights / "image")
    with Session.open(str(copy)) as session:
        reply = session.chat([{"role": "user", "content": "draw a bell"}])
    assert reply.parts[0].text == "here is a bell."
    assert "its decoder expects (8, 16)" in (reply.parts[1].error or "")


def test_doctor_finds_a_whole_preset_well_and_a_broken_one_not(tiny_preset: Path, copy: Path) -> None:
    checks = {check.name: check.ok for check in examine(load_preset(str(tiny_preset)), port=0)}
    assert {name for name, ok in checks.items() if not ok} <= {"memory"}
    assert {"encoder", "language model", "image decoder", "video decoder", "audio decoder"} <= checks.keys()
    (copy.parent / "weights" / "encoder" / "config.json").unlink()
    checks = {check.name: check.ok for check in examine(load_preset(str(copy)), port=0)}
    assert checks["weights"] is False


def test_a_port_in_use_is_noticed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(PresetProblem, match=rf"listen on 127.0.0.1:{port}: Address already in use"):
            expect_free_port("127.0.0.1", port)
    expect_free_port("127.0.0.1", port)


def test_a_second_look_is_at_what_is_made_and_read(tmp_path: Path) -> None:
    def looked_at(*named: str, **changes: Any) -> SecondLook | None:
        verify = {"modalities": list(named)} if named else {}
        return load_preset(written(tmp_path, generation={"verify": verify}, **changes)).second_look

    picture = {"image": {"folder": "x"}}
    look = looked_at(decoders=picture)
    assert look is not None
    assert look.modalities == {Modality.IMAGE}
    look = looked_at("video", "image", decoders=picture)
    assert look is not None
    assert look.modalities == {Modality.IMAGE}
    assert looked_at("video", decoders=picture) is None
    assert looked_at("image", decoders=picture, encoder={"modalities": ["audio"]}) is None
