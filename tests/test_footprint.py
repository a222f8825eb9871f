"""What a preset takes is known before anything is loaded."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from decoders.settings import DecodeSettings
from encoders.media import Modality
from services import footprint
from services.cli import main
from services.doctor import examine, expect_files, fitting, survey
from services.errors import PresetProblem
from services.fetch import SPARE_BYTES
from services.footprint import boxes_of, missing_files, needed
from services.presets import SHIPPED, Preset, load_preset
from services.session import Session
from tests.tiny import tiny_values, with_adapters

IMAGE, VIDEO, AUDIO = Modality.IMAGE, Modality.VIDEO, Modality.AUDIO


@pytest.fixture(scope="module")
def published() -> Preset:
    return load_preset("nextgpt-7b")


def counts(preset: Preset) -> dict[str, int | None]:
    return {f"{box.name}/{part.name}": part.parameters for box in boxes_of(preset) for part in box.parts}


def test_the_published_preset_has_the_published_sizes(published: Preset) -> None:
    assert counts(published) == {
        "encoder/towers": 632_829_440 + 86_235_648,
        "language model/base": 6_738_423_808,
        "language model/bridge": 3 * (4096 * 1024 + 4096) + 2 * 38 * 4096,
        "language model/LoRA": 32 * 4 * 32 * (4096 + 4096),
        "language model/tables": 2 * 32_000 * 4096,
        "image decoder/text_encoder": 123_060_480,
        "image decoder/unet": 859_520_964,
        "image decoder/vae": 83_653_863,
        "image decoder/projection": 31_958_784,
        "video decoder/text_encoder": 340_387_840,
        "video decoder/unet": 1_411_233_860,
        "video decoder/vae": 83_653_863,
        "video decoder/projection": 32_090_112,
        "audio decoder/text_encoder": 125_302_016,
        "audio decoder/unet": 739_139_080,
        "audio decoder/vae": 55_376_873,
        "audio decoder/vocoder": 55_264_897,
        "audio decoder/projection": 31_788_544,
    }


def test_memory_follows_from_parameters_dtype_and_context(published: Preset) -> None:
    encoder, language_model, *_ = boxes_of(published)

    assert encoder.in_memory == 2 * 719_065_088
    assert language_model.cache == 8 * 2 * 32 * 4096 * 2048 * 2  # slots, keys and values, layers, ...
    base, bridge, lora, tables = language_model.parts
    assert (lora.in_memory, tables.in_memory) == (0, 0)  # they become the base's own weights
    assert (base.dtype, base.in_memory) == ("float16", 2 * 6_738_423_808)
    assert (bridge.dtype, bridge.in_memory) == ("float32", 4 * 12_906_496)


def test_every_part_of_the_published_preset_says_where_it_is_from_and_under_what_terms(
    published: Preset,
) -> None:
    origins = [origin for box in boxes_of(published) for origin in box.origins]

    assert {origin.model for origin in origins if not origin.commercial} >= {
        "ImageBind-Huge",
        "Vicuna-7B v0",
        "NExT-GPT 7B v0",
    }
    assert [origin.model for origin in origins if origin.commercial] == ["Stable Diffusion 1.5"]
    assert all(origin.licence and origin.source and origin.download for origin in origins)


def test_the_published_preset_asks_decoders_for_what_the_demo_asked(published: Preset) -> None:
    wish = DecodeSettings(seed=1, steps=3)

    assert published.decoders[IMAGE].fill(wish) == DecodeSettings(
        seed=1, steps=3, guidance_scale=7.5, width_px=512, height_px=512
    )
    assert published.decoders[VIDEO].fill(DecodeSettings()) == DecodeSettings(
        steps=50, guidance_scale=7.5, width_px=576, height_px=320, num_frames=24
    )
    assert published.decoders[AUDIO].fill(DecodeSettings(duration_s=2.0)).duration_s == 2.0
    assert published.decoders[AUDIO].fill(DecodeSettings()).duration_s == 9
    assert (published.generation.temperature, published.generation.top_p) == (1.0, 0.01)


def test_weights_on_disk_count_what_their_files_hold(tiny_preset: Path) -> None:
    preset = load_preset(str(tiny_preset))
    weights = preset.weights_folder

    for name, count in counts(preset).items():
        box, part = name.split("/")
        folder = {
            "encoder": weights / "encoder",
            "language model": weights / "llm" / ("base" if part == "base" else ""),
        }.get(box, weights / box.split()[0] / part)
        if part == "projection":
            folder = weights / "projections" / box.split()[0]
        held = sum(t.numel() for path in folder.glob("*.safetensors") for t in load_file(path).values())
        assert count == pytest.approx(held, abs=200), name  # buffers are in files and are no parameters


def test_nothing_is_missing_of_a_whole_preset_and_all_of_an_empty_one(
    tiny_preset: Path, published: Preset, tmp_path: Path
) -> None:
    assert missing_files(load_preset(str(tiny_preset))) == []
    preset = published.model_copy(update={"weights": str(tmp_path)})
    assert {str(path.relative_to(tmp_path)) for path in missing_files(preset)} >= {
        "encoder/model.safetensors",
        "llm/bridge.safetensors",
        "llm/base/model.safetensors",
        "image/model_index.json",
        "projections/audio/model.safetensors",
    }


def test_what_the_manifest_promises_is_looked_for(published: Preset, tmp_path: Path) -> None:
    assert published.sizes_folder
    shutil.copytree(published.sizes_folder, tmp_path / "w")
    preset = published.model_copy(update={"weights": str(tmp_path / "w")})

    missing = {str(path.relative_to(tmp_path / "w")) for path in missing_files(preset)}

    assert {"llm/tables.safetensors", "llm/adapter/adapter_model.safetensors"} <= missing
    assert "image/unet/model.safetensors" in missing
    assert "image/unet/config.json" not in missing


def test_no_weights_are_read_for_a_survey(tiny_preset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a survey loaded weights")

    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr("services.local_language_model.LanguageModel.from_pretrained", refuse)

    found = survey(load_preset(str(tiny_preset)))
    assert found.fits.ok
    assert found.next_steps == (f"patchbay serve --preset {tiny_preset}",)


def test_what_does_not_fit_is_said_with_how_much_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.doctor._free_memory", lambda: 10 * 10**9)

    short = fitting("cpu", 24 * 10**9)

    assert not short.ok
    assert short.detail == (
        "24.00 GB are needed, 10.00 GB are free; 15.00 GB are short, with 10% left to larger batches and to "
        "libraries"
    )
    assert fitting("cpu", 9 * 10**9).ok


def test_a_preset_that_does_not_fit_is_not_loaded(
    tiny_preset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("services.doctor._free_memory", lambda: 1000)

    assert main(["doctor", "--preset", str(tiny_preset), "--port", "8123"]) == 1

    out = capsys.readouterr().out
    assert "BAD room on cpu" in out
    assert "loads" not in out
    assert "to fit: no image decoder" in out
    assert "which is still too much" in out
    assert f"next: patchbay doctor --preset {tiny_preset} --table  # and choose a machine with more" in out


def test_doctor_does_not_send_to_serve_where_a_check_fails(
    tiny_preset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["doctor", "--preset", str(tiny_preset), "--port", port]) == 1

    said = capsys.readouterr().out.splitlines()
    assert [line[:8] for line in said if line.startswith("BAD")] == ["BAD port"]
    assert said[-1] == f"next: mend what is marked BAD, then patchbay serve --preset {tiny_preset}"


def test_doctor_says_what_the_published_preset_lacks_and_what_to_type(
    published: Preset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "nextgpt-7b.yaml"
    values = yaml.safe_load(published.file.read_text())
    path.write_text(yaml.safe_dump(values | {"weights": "nowhere", "sizes": str(published.sizes_folder)}))

    assert main(["doctor", "--preset", str(path), "--port", "8123"]) == 1

    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    (row,) = [line for line in lines if line.startswith("language model: base")]
    assert row.split("  ")[1:] != []
    assert "missing, 3 files; takes 13.48 GB in float16 here" in row
    assert "6,738,423,808" in row
    assert "13.48 GB" in row
    (row,) = [line for line in lines if line.startswith("image decoder: unet")]
    assert "missing, 1 file; download about 3.44 GB; takes 1.72 GB in float16 here" in row
    (row,) = [line for line in lines if line.startswith("language model: tables")]
    cells = [cell.strip() for cell in row.split("  ") if cell.strip()]
    assert cells[1:] == ["missing, 1 file; takes 0.52 GB in float16 here", "262,144,000", "none", "float16"]
    (row,) = [line for line in lines if line.startswith("language model: LoRA")]
    assert "missing, 2 files; takes 67.1 MB in float16 here" in row
    assert "ImageBind-Huge: CC-BY-NC-4.0; NOT for commercial use." in captured.out
    assert "NExT-GPT 7B v0: CC-BY-NC-SA-4.0; NOT for commercial use." in captured.out
    assert "language model: bridge" in captured.out
    (whole,) = [line for line in lines if line.startswith("language model: in all")]
    assert whole.split()[4:6] == ["22.15", "GB"]
    (disk,) = [line for line in lines if line[4:].startswith("disk")]
    assert disk.endswith("; downloading and converting what is missing takes up to about 45.24 GB")
    digest = "d6f6c22bedcc90708448d5d2fbb7b2db9c73f505dc89bd0b2e09b23af1b62157"
    assert f"imagebind_huge.pth; SHA-256 {digest}; 4.80 GB to download" in captured.out
    assert "8416d3fefb0cb3ff5775a7b13c1692d10ff1aa16; about 13.48 GB to download" in captured.out
    assert "9707fa44eb3fb539e293ebc682209d0895042aa0; about 3.90 GB to download" in captured.out
    in_all = "to download: about 44.39 GB in all, as pages list it or computed from shapes; exact sizes: "
    assert f"{in_all}patchbay fetch --preset {path} --dry-run" in lines
    assert "From lmsys/vicuna-7b-delta-v0; revision 142d4e179e45304c430e5bf2cf5f9816f1c2be7a" in captured.out
    (working,) = [line for line in lines if line.startswith("video decoder: at work")]
    assert working.split()[4:6] == ["3.91", "GB"]
    steps = [line for line in lines if line.startswith("next: ")]
    assert steps[0] == f"next: patchbay fetch --preset {path}"
    for revision in (
        "f28bea33714c810ef6cb9b9e440edcddb93297a4",
        "142d4e179e45304c430e5bf2cf5f9816f1c2be7a",
        "451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
        "1f35e3dc3350d649f342bb7618fe34ac8fae5c9e",
        "9707fa44eb3fb539e293ebc682209d0895042aa0",
    ):
        assert captured.out.count(f"; revision {revision}") == 1


def elsewhere(preset: Preset, folder: Path, change: Callable[[Any], None] = lambda values: None) -> Preset:
    """Return a copy of a preset whose weights are to lie in ``folder``, after a change."""
    values = yaml.safe_load(preset.file.read_text())
    values |= {"weights": "w", "sizes": str(preset.sizes_folder)}
    change(values)
    (folder / "my.yaml").write_text(yaml.safe_dump(values))
    return load_preset(str(folder / "my.yaml"))


def test_only_what_is_missing_counts_as_download(published: Preset, tmp_path: Path) -> None:
    preset = elsewhere(published, tmp_path)
    shutil.copytree(SHIPPED / "nextgpt-7b" / "image", tmp_path / "w" / "image")
    (tmp_path / "w" / "image" / "unet" / "model.safetensors").write_bytes(b"")

    sizes = {own["model"]: own["bytes"] for own in survey(preset).to_json()["downloads"]}

    assert sizes["Stable Diffusion 1.5"] == 4 * (123_060_480 + 83_653_863)
    assert sizes["Zeroscope v2 576w"] == 2 * (340_387_840 + 1_411_233_860 + 83_653_863)
    assert (sizes["ImageBind-Huge"], sizes["NExT-GPT 7B v0"]) == (4_803_584_173, 790_000_000)


def test_a_download_of_unknown_size_is_said_and_its_weights_are_counted_as_they_are_held(
    published: Preset, tmp_path: Path
) -> None:
    def forget(values: Any) -> None:
        del values["decoders"]["video"]["origins"][0]["published"]

    preset = elsewhere(published, tmp_path, forget)
    lines = survey(preset).table().splitlines()

    (origin,) = [line for line in lines if line.startswith("Zeroscope")]
    assert origin.endswith("; how much there is to download is not known")
    assert any(line.startswith("to download: about 40.72 GB in all at the least, ") for line in lines)
    (disk,) = [check for check in examine(preset, port=8123) if check.name == "disk"]
    assert disk.detail.endswith("; 3.67 GB more are for weights that no download of known size brings")


def test_a_disk_too_small_for_downloads_and_conversions_is_bad(
    published: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = elsewhere(published, tmp_path)
    most = 4_803_584_173 + 3 * 13_480_000_000  # ImageBind, LLaMA, the delta and their sum
    free = SimpleNamespace(free=most + SPARE_BYTES)
    monkeypatch.setattr("services.doctor.shutil.disk_usage", lambda place: free)
    boxes = boxes_of(preset)

    assert not next(check for check in examine(preset, port=8123, boxes=boxes) if check.name == "disk").ok
    free.free += 1
    assert next(check for check in examine(preset, port=8123, boxes=boxes) if check.name == "disk").ok


def test_doctor_prints_one_json_object(tiny_preset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--preset", str(tiny_preset), "--port", "8123", "--json"])

    values: Any = json.loads(capsys.readouterr().out)
    names = [box["name"] for box in values["boxes"]]
    assert names[:2] == ["encoder", "language model"]
    assert sorted(names[2:]) == ["audio decoder", "image decoder", "video decoder"]
    assert all(part["missing"] == [] for box in values["boxes"] for part in box["parts"])
    assert {check["name"] for check in values["checks"]} >= {"torch", "weights", "room on cpu", "encoder"}


def test_an_unknown_network_is_counted_from_its_file(tiny_preset: Path) -> None:
    preset = load_preset(str(tiny_preset))
    folder = preset.decoder_folder(VIDEO) / "unet"

    assert footprint._counted(folder, {"a": 1}, "NobodysModel") == (
        sum(t.numel() for path in folder.glob("*.safetensors") for t in load_file(path).values()),
        (),
    )
    assert footprint._counted(folder / "none", {}, "NobodysModel") == (None, ())


def test_a_whole_turn_runs_with_every_box_in_half_precision(tiny_preset: Path) -> None:
    values: Any = tiny_values()
    for name in ("encoder", "language_model"):
        values[name] = {"dtype": "bfloat16"}
    for decoder in values["decoders"].values():
        decoder["dtype"] = "bfloat16"
    path = tiny_preset.parent / "half.yaml"
    path.write_text(yaml.safe_dump(values))
    preset = load_preset(str(path))
    assert {part.dtype for box in boxes_of(preset) for part in box.parts if part.name != "projection"} == {
        "bfloat16",
        "float32",  # the bridge
    }

    with Session.open(str(path)) as session:
        reply = session.chat([{"role": "user", "content": "draw, play and film a bell"}])

    assert [part.error for part in reply.parts if part.error] == []
    assert [part.type for part in reply.parts if part.text is None] == [IMAGE, AUDIO, VIDEO]


def test_the_open_preset_has_the_sizes_of_the_published_parts() -> None:
    found = counts(load_preset("open-8b"))
    published = {  # bytes of the published weights, by the bytes that one number takes in them
        "language model/base": (16.38e9, 2),
        "image decoder/text_encoder": (8.05e9, 2),
        "image decoder/transformer": (7.75e9, 2),
        "image decoder/vae": (168e6, 2),
        "video decoder/text_encoder": (22.73e9, 4),
        "video decoder/transformer": (5.68e9, 4),
        "video decoder/vae": (508e6, 4),
        "audio decoder/text_encoder": (439e6, 4),
        "audio decoder/projection_model": (1.59e6, 4),
        "audio decoder/transformer": (4.23e9, 4),
        "audio decoder/vae": (624e6, 4),
    }
    parts = {
        f"{box.name}/{part.name}": part for box in boxes_of(load_preset("open-8b")) for part in box.parts
    }
    assert {name for name, part in parts.items() if part.download} == published.keys()
    for name, (size, each) in published.items():
        assert parts[name].download == pytest.approx(size, rel=0.005), name
        assert found[name] == pytest.approx(size / each, rel=0.005), name
    assert found["encoder/vision tower"] == 428_225_600
    assert found["encoder/audio tower"] == 68_611_864
    assert all(count for count in found.values())


def test_the_papers_decoders_are_downloaded_in_the_sizes_that_the_hub_lists(published: Preset) -> None:
    listed = {
        "image decoder/text_encoder": 492e6,
        "image decoder/unet": 3.44e9,
        "image decoder/vae": 335e6,
        "video decoder/unet": 2.82e9,
        "video decoder/vae": 167e6,
        "audio decoder/unet": 2.96e9,
        "audio decoder/vae": 222e6,
    }
    found = {f"{box.name}/{part.name}": part.download for box in boxes_of(published) for part in box.parts}
    for name, size in listed.items():
        assert found[name] == pytest.approx(size, rel=0.005), name


def test_each_preset_prints_the_licence_of_what_it_is_made_of() -> None:
    own = "toybox: Apache-2.0. All of it was trained by this repository"
    tables = {name: survey(load_preset(name)).table().splitlines() for name in ("toybox", "open-8b")}
    assert own in tables["toybox"]
    assert not any("trained by this repository" in line for line in tables["open-8b"])
    assert "on conditions (Stability AI Community License)" in load_preset("open-8b").description


def test_every_part_of_the_open_preset_names_its_licence_and_the_one_with_conditions_says_so() -> None:
    origins = [origin for box in boxes_of(load_preset("open-8b")) for origin in box.origins]

    apache = {origin.model for origin in origins if origin.licence == "Apache-2.0"}
    assert apache == {
        "SigLIP 2 So400m, 384 px",
        "CLAP, larger, general",
        "Qwen3-8B",
        "FLUX.2 klein 4B",
        "Wan 2.1 T2V 1.3B",
    }
    (other,) = [origin for origin in origins if origin.model.startswith("Stable Audio")]
    assert "on its conditions only" in other.licence
    assert [origin.model for origin in origins if origin.gated] == [other.model]
    hub = [origin for origin in origins if origin.download]
    assert len(hub) == 6
    assert all(origin.revision and len(origin.revision) == 40 for origin in hub)


def test_adapters_of_the_allow_list_are_counted_up_to_what_may_stay(tiny_preset: Path) -> None:
    preset = load_preset(str(with_adapters(tiny_preset)))
    folders = {name: preset.weights_folder / own.folder for name, own in preset.adapters.items()}

    def numbers(*names: str) -> int:
        files = [path for name in names for path in folders[name].glob("*.safetensors")]
        return sum(tensor.numel() for path in files for tensor in load_file(path).values())

    plain = boxes_of(load_preset(str(tiny_preset)))
    found = {box.name: box.adapters for box in boxes_of(preset)}

    assert found["language model"] == 4 * numbers("pirate", "poet", "odd")
    assert found["image decoder"] == 4 * numbers("ink", "clay") > 0  # there is no file of "gone"
    assert found["video decoder"] == 0
    assert needed(preset, boxes_of(preset)) == needed(preset, plain) + sum(found.values())
    assert "image decoder: adapters" in survey(preset).table()
    few = preset.model_copy(
        update={
            "adapters": preset.adapters
            | dict.fromkeys((f"more{i}" for i in range(400)), preset.adapters["ink"]),
            "limits": preset.limits.model_copy(update={"max_adapter_mb": 1}),
        }
    )
    assert {box.name: box.adapters for box in boxes_of(few)}["image decoder"] == 2**20


def test_the_open_preset_trains_its_bridge_after_all_downloads(tmp_path: Path) -> None:
    values = yaml.safe_load((SHIPPED / "open-8b.yaml").read_text())
    (tmp_path / "my.yaml").write_text(
        yaml.safe_dump(values | {"weights": "w", "sizes": str(SHIPPED / "open-8b")})
    )

    found = survey(load_preset(str(tmp_path / "my.yaml")))
    steps = found.next_steps

    hub = "https://huggingface.co/stabilityai/stable-audio-open-1.0"
    assert f"accept its terms on {hub} and sign in: hf auth login" in found.table()
    (training,) = [i for i, step in enumerate(steps) if step.startswith("patchbay train bridge")]
    assert f"--preset {tmp_path}/my.yaml" in steps[training]
    assert training > steps.index(f"patchbay fetch --preset {tmp_path}/my.yaml")


def test_a_download_that_was_broken_off_is_said_and_how_to_go_on(
    published: Preset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = yaml.safe_load(published.file.read_text()) | {
        "weights": "w",
        "sizes": str(published.sizes_folder),
    }
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump(values))
    partial = tmp_path / "w/image/.cache/huggingface/download/unet/abc.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(bytes(3_000_000))

    assert (
        f"broken off: a download into {tmp_path}/w/image, of which 3.0 MB"
        in survey(load_preset(str(path))).table()
    )
    with pytest.raises(
        PresetProblem, match=r"lacks .*\. A download into .*/w/image was broken off; the same"
    ):
        expect_files(load_preset(str(path)))


def test_a_budget_too_small_for_a_decoder_is_said_before_anything_is_loaded(
    tiny_preset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny_preset.parent / "tight.yaml"
    path.write_text(tiny_preset.read_text() + "decoders_gb: 0.000001\n")

    assert main(["doctor", "--preset", str(path), "--port", "8123"]) == 1

    out = capsys.readouterr().out
    assert "BAD decoders_gb" in out
    assert "decoders_gb lets all decoders together take 1e-06 GB. Raise it to 0.01 or more" in out
    assert "loads" not in out


def test_an_adapter_that_is_not_there_is_said(tiny_preset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny_preset.parent / "adapted.yaml"
    path.write_text(tiny_preset.read_text() + "adapters: {ink: {box: image, folder: nowhere}}\n")

    assert main(["doctor", "--preset", str(path), "--port", "8123"]) == 1

    assert "nowhere/adapter_config.json is missing" in capsys.readouterr().out


IMPOSSIBLE: list[dict[str, Any]] = [
    {"model_type": "nobody"},
    {"model_type": "llama", "max_position_embeddings": "many", "num_attention_heads": 4, "hidden_size": 8},
    {"model_type": "llama", "hidden_size": -4, "num_attention_heads": 0, "max_position_embeddings": 8},
    {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 4, "num_hidden_layers": [2]},
]


@pytest.mark.parametrize("config", IMPOSSIBLE)
def test_what_cannot_be_counted_is_said_and_not_taken_for_nothing(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "weights" / "llm" / "base").mkdir(parents=True)
    (tmp_path / "weights" / "llm" / "base" / "config.json").write_text(json.dumps(config))
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump(tiny_values()))

    assert main(["doctor", "--preset", str(path), "--port", "8123"]) == 1

    lines = capsys.readouterr().out.splitlines()
    (room,) = [line for line in lines if line.startswith("room on cpu")]
    assert "not counted, as no sizes are known: encoder: towers, language model: base, " in room
    assert main(["doctor", "--preset", str(path), "--table"]) == 0
    assert "as the preset says" in capsys.readouterr().out
