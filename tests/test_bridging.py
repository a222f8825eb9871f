"""A part is exchanged with one line of YAML, and one command trains the bridge to it and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from decoders.writing import to_png
from encoders.media import Image, Modality
from llm.signals import SignalVocabulary
from llm.tokenizer import train_tokenizer
from services.cli import main
from services.doctor import expect_files
from services.footprint import missing_files
from services.presets import SHIPPED, load_preset
from services.session import Session
from tests import tiny_current
from tests.tiny import tiny_values
from tests.tiny_llm import SENTENCES, llama, tiny_tokenizer
from tests.tiny_towers import write_towers

CAPTIONS = ["a big red bell", "a small blue drum", "a red drum"]


def written(preset: Path, values: dict[str, Any], name: str = "swapped") -> Path:
    """Write a preset beside ``preset``, whose folder of weights it shares."""
    path = preset.parent / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values | {"name": name}))
    return path


def train(path: Path, part: str, folder: Path, *more: str) -> int:
    arguments = [
        "train",
        "bridge",
        "--part",
        part,
        "--preset",
        str(path),
        "--runs",
        str(folder),
        "--steps",
        "2",
    ]
    return main([*arguments, *more])


def captions_file(folder: Path, **media: str) -> Path:
    path = folder / "captions.json"
    path.write_text(json.dumps([{"caption": caption, **media} for caption in CAPTIONS]))
    return path


def bridge_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in load_file(folder / "bridge.safetensors").items()}


def test_the_toy_box_draws_with_another_decoder_after_one_line_and_one_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_current.write("xl", tmp_path / "xl")
    lines = (SHIPPED / "toybox.yaml").read_text().replace("../weights", f"{SHIPPED.parent}/weights")
    (line,) = re.findall(r"^  image: {folder: image, .*$", lines, re.MULTILINE)
    path = tmp_path / "toybox.yaml"
    path.write_text(
        lines.replace(line, f"  image: {{folder: {tmp_path}/xl, link: signal, steps: 2}}").partition(
            "examples:"
        )[0]
    )
    request = [{"role": "user", "content": "draw a big red bell"}]
    with Session.open(str(path)) as session:
        before = session.chat(request, seed=1)
    command = f"patchbay train bridge --part image --preset {path}"
    assert f"train one: `{command}`" in str([part.error for part in before.parts])

    assert train(path, "image", tmp_path / "runs") == 0

    assert f"bridge to image: wrote {tmp_path}/bridges/toybox" in capsys.readouterr().out
    expect_files(load_preset(str(path)))
    with Session.open(str(path)) as session:
        reply = session.chat(request, seed=1)
        (made,) = [part for part in reply.parts if part.text is None]
    assert made.error is None
    assert made.manifest is not None
    assert made.manifest["pipeline"] == "StableDiffusionXLPipeline"
    _expect_only_the_signal_of(
        Modality.IMAGE, SHIPPED.parent / "weights/toybox/llm", tmp_path / "bridges/toybox"
    )


@pytest.mark.parametrize(
    ("part", "name", "sizes", "request_", "pipeline"),
    [
        (
            "video",
            "wan",
            {"width_px": 16, "height_px": 16, "num_frames": 5},
            "film a bell",
            "WanPipeline",
        ),
        ("audio", "stable-audio", {"duration_s": 0.5}, "play a bell", "StableAudioPipeline"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_another_decoder_films_or_sounds_after_one_line_and_one_command(
    tiny_preset: Path,
    tmp_path: Path,
    part: str,
    name: str,
    sizes: dict[str, Any],
    request_: str,
    pipeline: str,
) -> None:
    values: Any = tiny_values()
    folder = tiny_current.write(name, tmp_path / name)
    values["decoders"][part] = {"folder": str(folder), "steps": 2, "guidance_scale": 1.0, **sizes}
    path = written(tiny_preset, values, f"other-{part}")
    captions = ["--captions", str(captions_file(tmp_path))] if part == "audio" else []

    assert train(path, part, tmp_path / "runs", *captions) == 0

    preset = load_preset(str(path))
    with Session.open(str(path)) as session:
        reply = session.chat([{"role": "user", "content": request_}], seed=1)
    (made,) = [each for each in reply.parts if each.text is None]
    assert made.error is None
    assert made.manifest is not None
    assert (made.type, made.manifest["pipeline"]) == (part, pipeline)
    _expect_only_the_signal_of(Modality(part), preset.language_model_folder, preset.bridges_folder)


def _expect_only_the_signal_of(modality: Modality, former: Path, bridges: Path) -> None:
    old, new = bridge_tensors(former), bridge_tensors(bridges / "llm")
    signals = SignalVocabulary(**json.loads((former / "bridge.json").read_text())["signals"])
    trained = [signals.tokens.index(name) for name in signals.names(modality)]
    assert old.keys() == new.keys()
    for name in old:
        differing = (
            (old[name] != new[name]).flatten(1).any(dim=1) if old[name].ndim > 1 else old[name] != new[name]
        )
        expected = trained if name.startswith("signal_rows.") else []
        assert differing.nonzero().flatten().tolist() == expected, name
    assert sorted(path.name for path in (bridges / "projections").iterdir()) == [modality]


def test_another_encoder_gets_projectors_of_its_widths_and_a_medium_is_read(
    tiny_preset: Path, tmp_path: Path
) -> None:
    write_towers(tmp_path / "towers")
    values: Any = tiny_values() | {"encoder": {"folder": str(tmp_path / "towers")}}
    path = written(tiny_preset, values, "other-encoder")
    picture = to_png(Image(np.full((20, 20, 3), 90, np.uint8)), {})
    (tmp_path / "a.png").write_bytes(picture)
    captions = captions_file(tmp_path, image_name="a.png")

    assert train(path, "encoder", tmp_path / "runs", "--captions", str(captions)) == 0

    preset = load_preset(str(path))
    old, new = bridge_tensors(preset.language_model_folder), bridge_tensors(preset.bridge_folder)
    assert new["projectors.image.project.weight"].shape == (32, 24)
    assert new["projectors.audio.project.weight"].shape == (32, 64)
    assert all(torch.equal(old[name], new[name]) for name in old if name.startswith("signal_rows."))
    assert not (preset.bridges_folder / "projections").exists()
    with Session.open(str(path)) as session:
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_base64(picture)}"}}
        reply = session.chat(
            [{"role": "user", "content": [image, {"type": "text", "text": "what is this?"}]}]
        )
    assert reply.parts


def _base64(data: bytes) -> str:
    import base64

    return base64.b64encode(data).decode()


def test_another_language_model_gets_rows_projectors_and_projections_of_its_own(
    tiny_preset: Path, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    base = llama(tiny_tokenizer().base_vocabulary, hidden_size=16, max_position_embeddings=512)
    base.save_pretrained(tmp_path / "base")
    train_tokenizer(SENTENCES, 300).save_pretrained(tmp_path / "base")
    values: Any = tiny_values() | {"language_model": {"base": str(tmp_path / "base")}}
    path = written(tiny_preset, values, "other-model")
    assert missing_files(load_preset(str(path))) == []
    with pytest.raises(Exception, match="train a bridge to this one with `patchbay train bridge"):
        Session.open(str(path))

    assert train(path, "language_model", tmp_path / "runs", "--small") == 0

    with Session.open(str(path)) as session:
        reply = session.chat([{"role": "user", "content": "hello"}], seed=1)
    assert reply.finish_reason
    preset = load_preset(str(path))
    assert sorted(p.name for p in (preset.bridges_folder / "projections").iterdir()) == [
        "audio",
        "image",
        "video",
    ]
    manifest = json.loads((preset.bridge_folder / "bridge.json").read_text())
    assert (manifest["llm_width"], manifest["lora"]) == (16, False)


def test_a_part_without_a_bridge_is_refused(tiny_preset: Path, tmp_path: Path, capsys: Any) -> None:
    values: Any = tiny_values()
    values["decoders"] = {"image": {"folder": "image", "link": "caption"}}
    path = written(tiny_preset, values, "words")

    assert train(path, "image", tmp_path) == 1
    assert "has the link caption, which reads words and needs no bridge" in capsys.readouterr().err
    assert train(path, "video", tmp_path) == 1
    assert "has no video decoder; it has image" in capsys.readouterr().err
    assert main(["train", "bridge", "--preset", str(path)]) == 1
    assert "--part belongs to bridge" in capsys.readouterr().err


def test_a_dry_run_trains_no_bridge(tiny_preset: Path, tmp_path: Path, capsys: Any) -> None:
    path = written(tiny_preset, tiny_values(), "dry")
    command = ["train", "bridge", "--part", "image", "--preset", str(path), "--runs", str(tmp_path / "runs")]

    assert main([*command, "--steps", "1", "--dry-run"]) == 1

    assert "--dry-run times the steps of the embedded model, and no bridge" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert not load_preset(str(path)).bridges_folder.exists()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("{", "cannot be read as JSON"), ("[]", "is an empty list"), ('[{"text": "a"}]', "entry 0 is")],
)
def test_a_wrong_file_of_captions_is_refused(
    tiny_preset: Path, tmp_path: Path, capsys: Any, content: str, complaint: str
) -> None:
    (tmp_path / "c.json").write_text(content)
    assert train(tiny_preset, "image", tmp_path, "--captions", str(tmp_path / "c.json")) == 1
    assert complaint in capsys.readouterr().err
