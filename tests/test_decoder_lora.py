"""LoRA per request in the decoders: the network wears it for whoever asks, and for nobody else."""

from __future__ import annotations

import asyncio
import copy
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from decoders.condition import Condition
from decoders.engine import DenoisingEngine, EngineConfig
from decoders.image import ImageDecoder
from decoders.lora import DecoderLora, WornLora
from decoders.plan import Decoded
from decoders.settings import DecodeSettings
from decoders.video import VideoDecoder
from encoders.media import Image
from tests import tiny_pipelines
from tests.lora_files import add_to, change_json, change_tensors, write_unet_lora

FILE = "pytorch_lora_weights.safetensors"
Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> ImageDecoder:
    folder = tmp_path_factory.mktemp("image")
    return ImageDecoder.load(tiny_pipelines.saved(tiny_pipelines.image_pipeline(), folder))


@pytest.fixture(scope="module")
def folders(decoder: ImageDecoder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two adapters: their folders, and by name decoders with their product in the weights themselves."""
    found: dict[str, Any] = {}
    for seed, name in enumerate(("ink", "clay"), 1):
        folder = tmp_path_factory.mktemp(name)
        added = write_unet_lora(copy.deepcopy(decoder.unet), folder, seed, peft_layout=name == "clay")
        merged = ImageDecoder.load(decoder.folder.path)
        add_to(merged.unet, added)
        found[name] = folder, merged
    return found


def settings(seed: int, lora: str | None = None, **rest: Any) -> DecodeSettings:
    return DecodeSettings(seed=seed, steps=3, guidance_scale=3.0, lora=lora, **rest)


def pixels(decoded: Decoded) -> Tensor:
    assert isinstance(decoded.medium, Image)
    return torch.from_numpy(decoded.medium.pixels.astype("float32"))


def assert_alike(one: Decoded, other: Decoded) -> None:
    assert (pixels(one) - pixels(other)).abs().max() <= 1


@pytest.mark.parametrize("name", ["ink", "clay"])
def test_a_medium_with_lora_is_that_of_merged_weights(
    decoder: ImageDecoder, folders: dict[str, Any], name: str
) -> None:
    folder, merged = folders[name]
    lora = decoder.read_lora(name, folder)
    condition = decoder.encode_caption("a big red bell")

    plain = decoder.decode(condition, settings(1))
    worn = decoder.decode(condition, settings(1, name), lora=lora)
    after = decoder.decode(condition, settings(1))

    assert_alike(worn, merged.decode(condition, settings(1)))
    assert (pixels(worn) - pixels(plain)).abs().mean() > 2
    assert torch.equal(pixels(after), pixels(plain))
    assert worn.manifest["lora"] == {"name": name, "digest": lora.digest}
    assert "lora" not in plain.manifest
    assert any("conv1" in layer for layer in lora.factors)
    assert any("to_q" in layer for layer in lora.factors)


async def test_requests_with_the_same_lora_share_steps_and_others_take_turns(
    decoder: ImageDecoder, folders: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loras = {name: decoder.read_lora(name, folders[name][0]) for name in folders}
    served: list[list[str | None]] = []
    step = decoder.step

    def noting(runs: Any, plans: Any = None, **rest: Any) -> None:
        served.append([plan.settings.lora for plan in plans])
        step(runs, plans, **rest)

    monkeypatch.setattr(decoder, "step", noting)
    engine = DenoisingEngine(decoder, EngineConfig(max_batch=4, max_wait_s=1e6))
    condition = decoder.encode_caption("a small blue drum")
    names = [None, "ink", "clay", "ink", None, "clay"]

    async def made(seed: int, name: str | None) -> Decoded:
        lora = loras[name] if name else None
        async with aclosing(engine.decode(condition, settings(seed, name), lora=lora)) as stream:
            *_, last = [value async for value in stream]
        assert isinstance(last, Decoded)
        return last

    results = await asyncio.gather(*(made(seed, name) for seed, name in enumerate(names)))
    engine.close()

    for seed, (name, result) in enumerate(zip(names, results, strict=True)):
        alone = folders[name][1] if name else decoder
        assert_alike(result, alone.decode(condition, settings(seed)))
    assert all(len(set(batch)) == 1 for batch in served)
    assert max(len(batch) for batch in served) == 2


def test_features_that_are_kept_for_later_steps_are_those_of_the_lora(
    decoder: ImageDecoder, folders: dict[str, Any]
) -> None:
    folder, merged = folders["ink"]
    lora = decoder.read_lora("ink", folder)
    condition = decoder.encode_caption("bell")

    worn = decoder.decode(condition, settings(4, "ink", deep_every=2), lora=lora)

    assert_alike(worn, merged.decode(condition, settings(4, deep_every=2)))


def test_the_layout_that_diffusers_wrote_before_peft_is_read_too(
    decoder: ImageDecoder, folders: dict[str, Any], tmp_path: Path
) -> None:
    state = load_file(folders["ink"][0] / FILE)
    earlier = {
        name.replace(".to_q.lora_A", ".processor.to_q_lora.down")
        .replace(".to_q.lora_B", ".processor.to_q_lora.up")
        .replace(".to_out.0.lora_A", ".processor.to_out_lora.down")
        .replace(".to_out.0.lora_B", ".processor.to_out_lora.up"): value
        for name, value in state.items()
        if "attn" in name
    }
    save_file(earlier, tmp_path / FILE)

    read, now = decoder.read_lora("ink", tmp_path), decoder.read_lora("ink", folders["ink"][0])

    assert read.factors.keys() == {layer for layer in now.factors if "attn" in layer}
    torch.testing.assert_close(2 * read.factors[Q][1], now.factors[Q][1])  # no alpha, so a scale of 1


def test_a_network_of_three_dimensions_is_adapted_too(tmp_path: Path) -> None:
    pipeline = tiny_pipelines.video_pipeline()
    decoder = VideoDecoder.load(tiny_pipelines.saved(pipeline, tmp_path / "video"))
    network = decoder._network
    targets = r".*(conv1\.2|to_v|resnets\.\d\.conv1)"
    added = write_unet_lora(
        copy.deepcopy(network), tmp_path / "lora", 3, peft_layout=True, target_modules=targets
    )
    lora = decoder.read_lora("x", tmp_path / "lora")
    assert {down.ndim for down, _ in lora.factors.values()} == {2, 4, 5}
    given = torch.randn(1, 4, 2, 8, 8), torch.tensor([5.0]), torch.randn(1, 8, 16)

    with torch.inference_mode():
        plain = network(*given).sample
        with WornLora(network).wearing(lora):
            worn = network(*given).sample
        add_to(network, added)
        merged = network(*given).sample

    torch.testing.assert_close(worn, merged, atol=1e-4, rtol=1e-3)
    assert (worn - plain).abs().max() > 0.01


def test_videos_wear_lora_beside_others_with_guidance_and_with_features_that_are_kept(tmp_path: Path) -> None:
    folder = tiny_pipelines.saved(tiny_pipelines.video_pipeline(), tmp_path / "video")
    decoder, merged = VideoDecoder.load(folder), VideoDecoder.load(folder)
    targets = r".*(conv1\.2|to_v|resnets\.\d\.conv1)"
    add_to(
        merged.unet, write_unet_lora(copy.deepcopy(merged.unet), tmp_path / "lora", 3, target_modules=targets)
    )
    lora = decoder.read_lora("x", tmp_path / "lora")
    condition = decoder.encode_caption("a red drum")
    wishes = [
        DecodeSettings(seed=seed, steps=4, guidance_scale=scale, deep_every=every)
        for seed, (scale, every) in enumerate([(3.0, None), (1.0, 2), (2.0, 3)])
    ]
    plans = [decoder.plan(condition, replace(wish, lora="x"), lora=lora) for wish in wishes]
    runs = [decoder.begin([plan]) for plan in plans]

    while not runs[0].finished:
        decoder.step(runs, plans)

    for run, wish in zip(runs, wishes, strict=True):
        worn, plain = latents_of(merged, condition, wish), latents_of(decoder, condition, wish)
        torch.testing.assert_close(run.latents, worn, atol=1e-3, rtol=1e-3)
        assert (run.latents - plain).abs().max() > 0.1


def latents_of(decoder: VideoDecoder, condition: Condition, wish: DecodeSettings) -> Tensor:
    """Carry out one wish alone."""
    plan = decoder.plan(condition, wish)
    run = decoder.begin([plan])
    while not run.finished:
        decoder.step([run], [plan])
    return run.latents


def test_settings_and_lora_must_be_of_one_name(decoder: ImageDecoder, folders: dict[str, Any]) -> None:
    lora: DecoderLora = decoder.read_lora("ink", folders["ink"][0])
    condition = decoder.encode_caption("bell")
    with pytest.raises(ValueError, match=r"name the LoRA 'clay', and 'ink' was given"):
        decoder.decode(condition, settings(1, "clay"), lora=lora)
    with pytest.raises(ValueError, match=r"name the LoRA 'ink', and None was given"):
        decoder.decode(condition, settings(1, "ink"))


def wider(tensors: dict[str, Tensor]) -> None:
    tensors[f"unet.{Q}.lora_A.weight"] = torch.zeros(2, 20)


def renamed(old: str, new: str) -> Any:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (wider, r"lora_A of .*to_q has shape \(2, 20\); expected \(2, 16\) for rank 2"),
        (
            lambda t: t.update({f"unet.{Q}.lora_B.weight": torch.zeros(16, 3)}),
            r"\(16, 3\); expected \(16, 2\)",
        ),
        (lambda t: t.pop(f"unet.{Q}.lora_A.weight"), r"has only lora_B of"),
        (lambda t: t.update({"text_encoder.x.lora_A.weight": torch.zeros(1)}), r"the unet alone is adapted"),
        (renamed("unet.", "lora_unet_"), r"holds lora_unet_.*; expected names that begin with unet\."),
        (renamed("down_blocks.1.", "down_blocks.5."), r"UNet2DConditionModel has nothing there; .*\.to_q"),
        (renamed(".conv1.", ".norm1."), r"has a GroupNorm there; expected linear or convolutional"),
        (lambda t: t.update({f"unet.{Q}.alpha": torch.tensor(1.0)}), r"to_q.alpha; expected <layer>.lora_A"),
        (lambda t: t.clear(), r"is empty"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_is_expected(
    decoder: ImageDecoder, folders: dict[str, Any], tmp_path: Path, change: Any, complaint: str
) -> None:
    (tmp_path / FILE).write_bytes((folders["ink"][0] / FILE).read_bytes())
    change_tensors(tmp_path / FILE, change)

    with pytest.raises(ValueError, match=complaint):
        decoder.read_lora("x", tmp_path)


def test_what_is_no_plain_lora_is_refused(decoder: ImageDecoder, tmp_path: Path) -> None:
    write_unet_lora(copy.deepcopy(decoder.unet), tmp_path, 1, peft_layout=True)
    change_json(tmp_path / "adapter_config.json", use_dora=True)
    with pytest.raises(ValueError, match=r"asks for use_dora; expected plain LoRA"):
        decoder.read_lora("x", tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"neither pytorch_lora_weights.safetensors nor adapter_model"):
        decoder.read_lora("x", tmp_path)
