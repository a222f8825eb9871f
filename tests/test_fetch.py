"""One command brings the weights of a preset from where they are published, and says why if it cannot."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from services.cli import main
from services.doctor import expect_files, survey
from services.errors import PresetProblem
from services.fetch import expect_disk, fetchable, plan
from services.presets import SHIPPED, load_preset
from tests.fake_hub import FakeHub, fake_hub
from tests.published import (
    DELTA,
    IMAGEBIND,
    LLAMA,
    NEXTGPT,
    PIPELINES,
    expect_small_releases,
    publish,
    write_preset,
)
from tests.tiny import tiny_values

IMAGE = next(iter(PIPELINES))
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[FakeHub, dict[str, torch.Tensor]]:
    """What is on the hub, made once."""
    hub = FakeHub()
    return hub, publish(hub, tmp_path_factory.mktemp("hub"))


@pytest.fixture
def hub(published: tuple[FakeHub, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    expect_small_releases(monkeypatch)
    with fake_hub(monkeypatch) as own:
        own.repositories = {name: dict(files) for name, files in published[0].repositories.items()}
        own.at_address = dict(published[0].at_address)
        yield own


@pytest.fixture
def path(hub: FakeHub, tmp_path: Path) -> Path:
    return write_preset(hub, tmp_path / "my.yaml")


def images_only(path: Path) -> Path:
    """Take all origins but that of the pictures out of a preset."""
    values = yaml.safe_load(path.read_text())
    values["encoder"]["origins"] = values["language_model"]["origins"] = []
    values["decoders"] = {"image": values["decoders"]["image"]}
    path.write_text(yaml.safe_dump(values))
    return path


def refusal(capsys: pytest.CaptureFixture[str], path: Path) -> str:
    capsys.readouterr()
    assert main(["fetch", "--preset", str(path)]) == 1
    return capsys.readouterr().err


def test_one_command_brings_and_converts_all_that_the_published_preset_needs(
    hub: FakeHub,
    published: tuple[FakeHub, dict[str, torch.Tensor]],
    path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(PresetProblem, match=rf"lacks .*: `patchbay fetch --preset {path}`\."):
        expect_files(load_preset(str(path)))
    assert f"patchbay fetch --preset {path}" in survey(load_preset(str(path))).next_steps

    assert main(["fetch", "--preset", str(path)]) == 0

    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("ImageBind-Huge: CC-BY-NC-4.0; NOT for commercial use.")
    assert said[-1] == f"next: patchbay serve --preset {path}"
    assert said.index(f"1 of 7: {said[7]}") > 7  # terms come first, of all seven
    preset = load_preset(str(path))
    expect_files(preset)
    assert fetchable(preset) == ()
    base = load_file(preset.base_folder / "model-00001.safetensors")
    vicuna = published[1]
    assert base.keys() == vicuna.keys()
    for name, value in vicuna.items():
        torch.testing.assert_close(base[name], value, rtol=0, atol=0)
    sent = {path for path, _ in hub.downloaded()}
    assert not any(
        "fp16" in name or "non_ema" in name or name.endswith(("ckpt", "README.md")) for name in sent
    )
    assert not any(name.startswith(f"/{LLAMA}") and name.endswith(".bin") for name in sent)
    assert not (preset.weights_folder / "downloads").exists()

    hub.asked.clear()
    assert main(["fetch", "--preset", str(path)]) == 0
    assert hub.asked == []  # nothing is missing, so nobody is asked


def test_a_conversion_begins_from_downloads_that_are_there_and_keeps_them_if_asked(
    hub: FakeHub, path: Path
) -> None:
    weights = path.parent / "w"
    assert main(["fetch", "--preset", str(path), "--keep-downloads"]) == 0
    kept = {folder.name for folder in (weights / "downloads").iterdir()}
    assert kept == {"imagebind", "llama-7b", "vicuna-7b-delta-v0", "vicuna-7b-v0", "nextgpt"}
    for name in ("llm", "projections"):
        shutil.rmtree(weights / name)
    (weights / "converted.json").unlink()
    hub.asked.clear()

    assert main(["fetch", "--preset", str(path)]) == 0

    assert hub.downloaded() == []
    assert not any(LLAMA in asked or DELTA in asked for _, asked, _ in hub.asked)  # Vicuna is made already
    expect_files(load_preset(str(path)))


def test_a_download_that_breaks_off_goes_on_where_it_stopped(
    hub: FakeHub, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images_only(path)
    hub.cut[UNET] = [5000, 0]

    assert "What has come is kept: look at your network, and run the same" in refusal(capsys, path)
    folder = path.parent / "w" / "image"
    assert (folder / f"{UNET}.incomplete").stat().st_size == 5000
    with pytest.raises(PresetProblem, match=r"A download into .*/w/image was broken off"):
        expect_files(load_preset(str(path)))
    hub.asked.clear()
    main(["fetch", "--preset", str(path)])

    assert (folder / UNET).read_bytes() == hub.repositories[IMAGE][UNET]
    assert (
        f"/{IMAGE}/resolve/451f4fe16113bff5a5d2269ed5ad43b0592e9a14/{UNET}",
        "bytes=5000-",
    ) in hub.downloaded()
    assert len([name for name, _ in hub.downloaded() if name.endswith(".safetensors")]) < 3


def test_a_file_at_an_address_that_breaks_off_goes_on_where_it_stopped(
    hub: FakeHub, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.cut[IMAGEBIND] = [2000, 1000, 0]
    assert "imagebind_huge.pth failed" in refusal(capsys, path)
    partial = path.parent / "w/downloads/imagebind/imagebind_huge.pth.incomplete"
    assert partial.stat().st_size == 3000
    preset = load_preset(str(path))
    whole, data = plan(preset), hub.at_address[IMAGEBIND]
    assert whole.steps[0].bytes_to_come == len(data) - 3000
    assert "imagebind, of which 0.0 MB wait for the rest" in survey(preset).table()
    hub.asked.clear()

    assert main(["fetch", "--preset", str(path)]) == 0

    assert (IMAGEBIND, "bytes=3000-") in hub.downloaded()
    expect_files(load_preset(str(path)))


def test_another_file_than_the_one_that_was_published_is_removed(
    hub: FakeHub, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = hub.at_address[IMAGEBIND]
    hub.instead[IMAGEBIND] = data[:-1] + b"?"
    assert "imagebind_huge.pth of http" in (said := refusal(capsys, path))
    assert "has another SHA-256 than" in said
    assert "It was removed; run the same command again" in said
    assert list((path.parent / "w/downloads/imagebind").iterdir()) == []

    hub.instead.clear()
    hub.at_address[IMAGEBIND] = data + b"more"
    assert f"has {len(data) + 4:,} bytes; expected {len(data):,}" in refusal(capsys, path)
    assert list((path.parent / "w/downloads/imagebind").iterdir()) == []


def test_a_hub_that_sends_other_bytes_is_found_out(
    hub: FakeHub, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images_only(path)
    hub.instead[UNET] = hub.repositories[IMAGE][UNET][:-1] + b"?"
    assert f"{UNET} of {IMAGE} has another SHA-256" in refusal(capsys, path)
    assert not (path.parent / "w/image" / UNET).exists()
    hub.instead = {"vae/config.json": b"?" * len(hub.repositories[IMAGE]["vae/config.json"])}
    assert f"vae/config.json of {IMAGE} has another digest" in refusal(capsys, path)


def test_a_file_that_is_damaged_here_is_brought_again_and_an_edited_one_is_left(
    hub: FakeHub, path: Path
) -> None:
    images_only(path)
    folder = path.parent / "w" / "image"
    main(["fetch", "--preset", str(path)])
    (folder / UNET).write_bytes((folder / UNET).read_bytes()[:-9])
    (folder / "scheduler" / "scheduler_config.json").write_text('{"mine": true}')
    hub.asked.clear()
    with pytest.raises(PresetProblem, match=r"lacks"):
        expect_files(load_preset(str(path)))

    main(["fetch", "--preset", str(path)])

    assert [name.split("/")[-1] for name, _ in hub.downloaded()] == [UNET.split("/")[-1]]
    assert (folder / UNET).read_bytes() == hub.repositories[IMAGE][UNET]
    assert (folder / "scheduler" / "scheduler_config.json").read_text() == '{"mine": true}'


def test_a_file_that_the_hub_lacks_is_named_before_anything_is_downloaded(
    hub: FakeHub, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del hub.repositories[NEXTGPT]["pytorch_model.pt"]
    said = refusal(capsys, path)
    assert f"{NEXTGPT} has no pytorch_model.pt at revision f28bea33714c810ef6cb9b9e440edcddb93297a4" in said
    assert hub.downloaded() == []

    del hub.repositories[NEXTGPT]
    assert f"The hub knows no {NEXTGPT}, or hides it from you" in refusal(capsys, path)


def test_a_revision_that_the_hub_does_not_know_is_named(
    hub: FakeHub, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = yaml.safe_load(path.read_text())
    values["language_model"]["origins"][1]["revision"] = "f" * 40
    path.write_text(yaml.safe_dump(values))
    assert f"{DELTA} has no revision {'f' * 40}; expected the one that the preset" in refusal(capsys, path)


def test_a_gated_repository_says_what_to_accept_and_where(
    hub: FakeHub, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images_only(path)
    hub.gated.add(IMAGE)  # without the preset knowing: it shows when the first file is refused
    said = refusal(capsys, path)
    assert f"https://huggingface.co/{IMAGE} and sign in: hf auth login" in said

    values = yaml.safe_load(path.read_text())
    values["decoders"]["image"]["origins"][0]["gated"] = True
    path.write_text(yaml.safe_dump(values))
    hub.asked.clear()
    assert "is gated, and lets nobody in who did not accept its terms" in refusal(capsys, path)
    assert hub.downloaded() == []


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "hf auth login"), (403, "hf auth login"), (404, "correct the preset"), (503, "again later")],
)
def test_a_server_that_refuses_is_quoted_with_what_to_do(
    hub: FakeHub, path: Path, capsys: pytest.CaptureFixture[str], status: int, words: str
) -> None:
    images_only(path)
    hub.failing = status
    assert words in refusal(capsys, path)


def test_without_a_connection_one_line_says_so(
    hub: FakeHub, path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert f"The connection to {LLAMA} failed" in refusal(capsys, path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set. Unset it" in refusal(capsys, path)
    values = yaml.safe_load(path.read_text())
    values["encoder"]["origins"][0]["source"] = "http://127.0.0.1:9/imagebind_huge.pth"
    path.write_text(yaml.safe_dump(values))
    assert "The connection to http://127.0.0.1:9/imagebind_huge.pth failed" in refusal(capsys, path)


def test_a_disk_too_small_is_said_before_anything_is_downloaded(
    hub: FakeHub, path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    most = plan(load_preset(str(path))).most_bytes
    free = SimpleNamespace(free=500 * 2**20 + most - 1)
    monkeypatch.setattr("services.fetch.shutil.disk_usage", lambda place: free)

    said = refusal(capsys, path)

    assert f"takes up to {most / 1e6:.1f} MB, with 0.52 GB to spare. Nothing was downloaded" in said
    assert hub.downloaded() == []
    free.free += 1
    expect_disk(plan(load_preset(str(path))))


def test_the_disk_that_is_asked_for_is_the_most_that_lies_there_at_once(hub: FakeHub, path: Path) -> None:
    preset = load_preset(str(path))
    steps = plan(preset).steps
    imagebind, llama, delta, nextgpt, *pipelines = (step.bytes_to_come for step in steps)
    vicuna = sum(len(data) for name, data in hub.repositories[DELTA].items() if name.endswith(".bin"))
    moments = [
        2 * imagebind,
        imagebind + llama + delta + vicuna,
        imagebind + vicuna + nextgpt + nextgpt,
        imagebind + vicuna + nextgpt + sum(pipelines),  # Vicuna's files are linked to, so they stay
    ]
    assert plan(preset).most_bytes == max(moments)
    kept = 2 * imagebind + llama + delta + vicuna + 2 * nextgpt + sum(pipelines)
    assert plan(preset, keep_downloads=True).most_bytes == kept


def test_a_disk_that_becomes_full_keeps_what_came(
    hub: FakeHub, path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(response: Any) -> Iterator[bytes]:
        yield response.read(100)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("services.downloads._chunks", full)
    assert "The disk became full while ImageBind-Huge was downloaded" in refusal(capsys, path)
    assert (path.parent / "w/downloads/imagebind/imagebind_huge.pth.incomplete").stat().st_size == 100


def test_what_a_conversion_would_write_over_is_named_before_anything_is_downloaded(
    hub: FakeHub, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (path.parent / "w" / "llm" / "base").mkdir(parents=True)
    assert "w/llm is there, though llm, projections are not whole" in refusal(capsys, path)
    assert hub.asked == []


def test_a_dry_run_tells_terms_and_sizes_and_downloads_nothing(
    hub: FakeHub, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fetch", "--preset", str(path), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "NExT-GPT 7B v0: CC-BY-NC-SA-4.0; NOT for commercial use" in said
    assert "NExT-GPT 7B v0: 1 file to download, 0.4 MB; then patchbay convert nextgpt" in said
    assert "Stable Diffusion 1.5: " in said
    assert hub.downloaded() == []
    assert not (path.parent / "w").exists()


OPEN = {
    "google/siglip2-so400m-patch14-384": (
        {"config.json", "preprocessor_config.json", "model.safetensors"},
        {"tokenizer.json", "README.md"},
    ),
    "laion/larger_clap_general": (
        {"config.json", "preprocessor_config.json", "pytorch_model.bin"},
        {"tokenizer.json", "README.md"},
    ),
    "Qwen/Qwen3-8B": (
        {"config.json", "tokenizer.json", "merges.txt", "model.safetensors.index.json"}
        | {f"model-{i:05}-of-00005.safetensors" for i in range(1, 6)},
        {"README.md", "LICENSE"},
    ),
    "black-forest-labs/FLUX.2-klein-4B": (
        {"model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"}
        | {f"{part}/config.json" for part in ("text_encoder", "transformer", "vae")}
        | {"transformer/diffusion_pytorch_model.safetensors"},
        {"flux-2-klein-4b.safetensors", "README.md"},
    ),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": (
        {"model_index.json", "scheduler/scheduler_config.json", "tokenizer/spiece.model"}
        | {f"{part}/config.json" for part in ("text_encoder", "transformer", "vae")},
        {"assets/logo.png", "README.md"},
    ),
    "stabilityai/stable-audio-open-1.0": (
        {"model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"}
        | {f"{part}/config.json" for part in ("text_encoder", "projection_model", "transformer", "vae")},
        {"model.safetensors", "model.ckpt", "vae_model.ckpt"},
    ),
}


def test_of_each_repository_of_the_open_preset_only_what_is_read_is_downloaded(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "clap.bin")
    for repository, (wanted, other) in OPEN.items():
        hub.repositories[repository] = dict.fromkeys(wanted | other, b"{}")
    hub.repositories["laion/larger_clap_general"]["pytorch_model.bin"] = (tmp_path / "clap.bin").read_bytes()
    values = yaml.safe_load((SHIPPED / "open-8b.yaml").read_text())
    path = tmp_path / "open.yaml"
    path.write_text(yaml.safe_dump(values | {"weights": "w", "sizes": str(SHIPPED / "open-8b")}))

    steps = plan(load_preset(str(path))).steps
    assert {step.origin.source: {file.name for file in step.to_come} for step in steps} == {
        repository: wanted for repository, (wanted, _) in OPEN.items()
    }
    assert main(["fetch", "--preset", str(path)]) == 0
    assert "next: patchbay train bridge --part language_model" in capsys.readouterr().out
    made = load_file(tmp_path / "w" / "encoder" / "audio" / "model.safetensors")
    assert torch.equal(made["weight"], torch.ones(2))


def test_a_token_is_told_to_the_hub_and_to_no_other_host(
    hub: FakeHub, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "secret")
    hub.elsewhere = hub.url.replace("127.0.0.1", "localhost")

    assert main(["fetch", "--preset", str(images_only(path))]) == 1  # the other parts have no origin now

    assert set(hub.tokens) == {("hub", "Bearer secret"), ("elsewhere", None)}
    assert (path.parent / "w/image" / UNET).read_bytes() == hub.repositories[IMAGE][UNET]


def test_a_preset_that_no_origin_can_complete_says_what_to_do_instead(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump(tiny_values()))

    for words in ([], ["--dry-run"]):
        assert main(["fetch", "--preset", str(path), *words]) == 1
        captured = capsys.readouterr()
        assert "lacks" in captured.err
        assert "Put it there, or correct the folders in" in captured.err
        assert captured.out == ""
