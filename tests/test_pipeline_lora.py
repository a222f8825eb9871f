"""LoRA per request on pipelines that run as a whole: as diffusers' own loader has it, and for one request."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_unet_lora_key
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from decoders.denoising import Cancelled
from decoders.pipeline_engine import PipelineEngine
from decoders.plan import Decoded
from decoders.settings import DecodeSettings
from decoders.whole_pipeline import WholePipeline
from encoders.media import Audio, Image, Medium, Video
from tests import tiny_current, tiny_pipelines
from tests.lora_files import add_to, fresh_lora

FILE = "pytorch_lora_weights.safetensors"
ALPHA, TARGETS = 12, ["to_q", "to_v", "to_out.0"]
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
WITH_LOADER = {"xl": "unet", "klein": "transformer", "wan": "transformer", "ltx": "transformer"}
WITHOUT_LOADER = {"stable-audio": "transformer", "audioldm2": "unet"}
SIZES: Mapping[str, Mapping[str, Any]] = {
    "klein": {"width_px": 32, "height_px": 32},
    "wan": {"width_px": 16, "height_px": 16, "num_frames": 5},
    "ltx": {"width_px": 32, "height_px": 32, "num_frames": 9},
    "stable-audio": {"duration_s": 0.5},
    "audioldm2": {"duration_s": 0.05},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    tiny_pipelines.saved(tiny_pipelines.xl_pipeline(), root / "xl")
    others = [*list(WITH_LOADER)[1:], *WITHOUT_LOADER]
    return {"xl": root / "xl"} | {name: tiny_current.write(name, root / name) for name in others}


def settings(name: str, lora: str | None = None) -> DecodeSettings:
    return DecodeSettings(seed=3, steps=2, guidance_scale=3.0, lora=lora, **SIZES.get(name, {}))


def values(medium: Medium) -> NDArray[Any]:
    match medium:
        case Image(pixels=pixels):
            return pixels.astype(np.float32)
        case Video(frames=frames):
            return frames.astype(np.float32)
        case Audio(samples=samples):
            return samples * 255
    raise AssertionError(medium)


def write_lora(decoder: WholePipeline, part: str, folder: Path, peft_layout: bool = False) -> dict[str, Any]:
    """Write LoRA for a part of a pipeline; return what it adds to each weight."""
    network = getattr(WholePipeline.load(decoder.folder.path).pipeline, part)
    config = LoraConfig(r=2, lora_alpha=ALPHA, target_modules=TARGETS)
    wrapped, added = fresh_lora(network, config, seed=5)
    if peft_layout:
        wrapped.save_pretrained(folder)
        return added
    state = get_peft_model_state_dict(wrapped)
    layers = {name.removeprefix("base_model.model."): value for name, value in state.items()}
    metadata = {"r": 2, "lora_alpha": ALPHA, "target_modules": TARGETS}
    type(decoder.pipeline).save_lora_weights(
        folder, **{f"{part}_lora_layers": layers, f"{part}_lora_adapter_metadata": metadata}
    )
    return added


def with_diffusers(decoder: WholePipeline, folder: Path) -> WholePipeline:
    """Load the same pipeline again, and let diffusers' own loader put the LoRA into it for good."""
    other = WholePipeline.load(decoder.folder.path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        other.pipeline.load_lora_weights(folder, adapter_name="own")
        other.pipeline.set_adapters(["own"])
    return other


@pytest.mark.parametrize("name", WITH_LOADER)
def test_a_request_with_lora_gets_what_diffusers_own_loader_makes_and_the_next_gets_none(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    decoder = WholePipeline.load(folders[name])
    write_lora(decoder, WITH_LOADER[name], tmp_path)
    condition = decoder.encode_caption("a big red bell")
    before = values(decoder.decode(condition, settings(name)).medium)

    lora = decoder.read_lora("ink", tmp_path)
    worn = decoder.decode(condition, settings(name, "ink"), lora=lora)
    after = decoder.decode(condition, settings(name))

    expected = values(with_diffusers(decoder, tmp_path).decode(condition, settings(name)).medium)
    np.testing.assert_allclose(values(worn.medium), expected, atol=1.01)  # of 255, which is rounding
    assert np.abs(values(worn.medium) - before).max() > 5
    np.testing.assert_array_equal(values(after.medium), before)
    assert worn.manifest["lora"] == {"name": "ink", "digest": lora.digest}
    assert "lora" not in after.manifest
    tensors = load_file(tmp_path / FILE).values()
    assert lora.num_bytes == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("name", WITHOUT_LOADER)
def test_where_diffusers_has_no_loader_the_layout_of_peft_is_worn_and_the_other_refused(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    decoder = WholePipeline.load(folders[name])
    part = WITHOUT_LOADER[name]
    added = write_lora(decoder, part, tmp_path / "peft", peft_layout=True)
    condition = decoder.encode_caption("a big red bell")

    lora = decoder.read_lora("ink", tmp_path / "peft")
    worn = values(decoder.decode(condition, settings(name, "ink"), lora=lora).medium)
    before = values(decoder.decode(condition, settings(name)).medium)

    merged = WholePipeline.load(folders[name])
    add_to(getattr(merged.pipeline, part), added)
    expected = values(merged.decode(condition, settings(name)).medium)
    assert np.abs(worn - before).max() > 50 * np.abs(worn - expected).max()
    assert np.abs(worn - before).max() > 0.1 * np.abs(before).max()
    (tmp_path / "other").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "other" / FILE)
    with pytest.raises(ValueError, match=r"for which diffusers has no LoRA loader; expected adapter_model"):
        decoder.read_lora("x", tmp_path / "other")


def test_names_and_scales_of_another_program_are_those_of_diffusers(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    decoder = WholePipeline.load(folders["xl"])
    write_lora(decoder, "unet", tmp_path / "own")
    other = {}
    for key, tensor in load_file(tmp_path / "own" / FILE).items():
        layer, _, half = key.removeprefix("unet.").rpartition(".lora_")
        kohya = "lora_unet_" + layer.replace(".", "_")
        assert _convert_unet_lora_key(kohya)
        other[f"{kohya}.lora_{'down' if half.startswith('A') else 'up'}.weight"] = tensor
        other[f"{kohya}.alpha"] = torch.tensor(float(ALPHA))
    (tmp_path / "kohya").mkdir()
    save_file(other, tmp_path / "kohya" / FILE)

    own, read = (decoder.read_lora("ink", tmp_path / folder) for folder in ("own", "kohya"))

    assert read.factors.keys() == own.factors.keys()
    for layer, pair in own.factors.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, read.factors[layer], strict=True)), layer


async def test_a_request_that_is_stopped_or_fails_leaves_no_lora_behind(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = WholePipeline.load(folders["xl"])
    write_lora(decoder, "unet", tmp_path)
    lora = decoder.read_lora("ink", tmp_path)
    condition = decoder.encode_caption("a big red bell")
    before = values(decoder.decode(condition, settings("xl")).medium)
    stop = threading.Event()

    with pytest.raises(Cancelled):
        decoder.decode(condition, settings("xl", "ink"), lambda *step: stop.set(), stop, lora=lora)
    np.testing.assert_array_equal(values(decoder.decode(condition, settings("xl")).medium), before)

    def broken(*step: int) -> None:
        raise ArithmeticError("in the middle")

    with pytest.raises(ArithmeticError, match="in the middle"):
        decoder.decode(condition, settings("xl", "ink"), broken, lora=lora)
    np.testing.assert_array_equal(values(decoder.decode(condition, settings("xl")).medium), before)

    engine = PipelineEngine(decoder)
    made = []
    for name in (None, "ink", None):
        work = engine.decode(condition, settings("xl", name), lora=lora if name else None)
        async with aclosing(work) as stream:
            made += [value async for value in stream if isinstance(value, Decoded)]
    engine.close()
    np.testing.assert_array_equal(values(made[0].medium), before)
    np.testing.assert_array_equal(values(made[2].medium), before)
    assert np.abs(values(made[1].medium) - before).max() > 5


@pytest.fixture(scope="module")
def two_networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan whose second half of the steps is taken by a network of its own, as in version 2.2."""
    pipeline = tiny_current.wan_pipeline()
    second = tiny_current.wan_pipeline().transformer
    torch.manual_seed(7)
    for parameter in second.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    pipeline.register_modules(transformer_2=second)
    pipeline.register_to_config(boundary_ratio=0.9)
    return tiny_pipelines.saved(pipeline, tmp_path_factory.mktemp("two") / "wan")


@pytest.mark.parametrize("parts", [("transformer",), ("transformer_2",), ("transformer", "transformer_2")])
@pytest.mark.parametrize("apart", [True, False])
def test_each_of_two_networks_wears_its_own_lora(
    two_networks: Path, tmp_path: Path, parts: tuple[str, ...], apart: bool
) -> None:
    decoder = WholePipeline.load(two_networks)
    # Of two steps the second would begin with next to no noise.
    condition, wish = decoder.encode_caption("a big red bell"), replace(settings("wan"), steps=4)
    before = values(decoder.decode(condition, wish).medium)
    other, together = WholePipeline.load(two_networks), {}
    for number, part in enumerate(parts):
        network = getattr(WholePipeline.load(two_networks).pipeline, part)
        wrapped, _ = fresh_lora(network, LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS), seed=number)
        state = get_peft_model_state_dict(wrapped)
        layers = {name.removeprefix("base_model.model."): value for name, value in state.items()}
        together |= {f"{part}.{name}": value for name, value in layers.items()}
        folder = tmp_path / "apart" / part  # as such files are published, and as diffusers loads them
        folder.mkdir(parents=True)
        save_file({f"transformer.{name}": value for name, value in layers.items()}, folder / FILE)
        into_second = part == "transformer_2"
        other.pipeline.load_lora_weights(
            folder, adapter_name=f"own-{part}", load_into_transformer_2=into_second
        )
    (tmp_path / "together").mkdir()
    save_file(together, tmp_path / "together" / FILE)

    lora = decoder.read_lora("ink", tmp_path / ("apart" if apart else "together"))
    worn = values(decoder.decode(condition, replace(wish, lora="ink"), lora=lora).medium)

    assert {name.split(".")[0] for name in lora.factors} == set(parts)
    np.testing.assert_allclose(worn, values(other.decode(condition, wish).medium), atol=1.01)
    assert np.abs(worn - before).max() > 5
    np.testing.assert_array_equal(values(decoder.decode(condition, wish).medium), before)


def test_what_does_not_fit_a_pipeline_is_refused_by_name(folders: dict[str, Path], tmp_path: Path) -> None:
    decoder = WholePipeline.load(folders["wan"])
    write_lora(decoder, "transformer", tmp_path)
    tensors = load_file(tmp_path / FILE)
    save_file({f"transformer_2.{key}": value for key, value in tensors.items()}, tmp_path / FILE)
    with pytest.raises(
        ValueError, match=r"holds transformer_2\..*; expected names that begin with transformer"
    ):
        decoder.read_lora("x", tmp_path)
    with pytest.raises(ValueError, match=r"name the LoRA 'ink', and None was given"):
        decoder.decode(decoder.encode_caption("a bell"), settings("wan", "ink"))
