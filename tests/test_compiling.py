"""Compiled boxes: the same results, plain where compiled code would be wrong, and plain where it fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from decoders.image import ImageDecoder
from decoders.lora import DecoderLora
from decoders.settings import DecodeSettings
from decoders.video import VideoDecoder
from encoders.media import Image, Modality, Video
from llm.engine import Engine
from llm.engine_request import StepEvent
from llm.generate import GenerationOptions
from llm.request_lora import RequestLora, read_request_lora
from services.artefacts import ArtefactStore
from services.compiling import compile_if_possible
from services.local_decoder import LocalDecoder
from services.local_language_model import LocalLanguageModel
from services.presets import load_preset
from tests import tiny_pipelines
from tests.lora_files import write_lm_lora, write_unet_lora
from tests.test_language_engine import assert_same, run
from tests.tiny_llm import tiny_model, user


class Counter:
    """Stands in for compiling, which takes long: what it gives back counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, graph: Any, inputs: list[Any]) -> Callable[..., Any]:
        """Be a backend of torch.compile."""
        return self.compile(graph.forward)

    def compile(self, plain: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """Be torch.compile itself."""

        def counted(*args: Any, **rest: Any) -> Any:
            self.calls += 1
            return plain(*args, **rest)

        return counted


def broken(graph: Any, inputs: list[Any]) -> Callable[..., Any]:
    raise RuntimeError("no g++ was found")


@pytest.fixture
def decoder(tmp_path: Path) -> ImageDecoder:
    return ImageDecoder.load(tiny_pipelines.saved(tiny_pipelines.image_pipeline(), tmp_path / "image"))


@pytest.fixture
def video_decoder(tmp_path: Path) -> VideoDecoder:
    return VideoDecoder.load(tiny_pipelines.saved(tiny_pipelines.video_pipeline(), tmp_path / "video"))


def pixels(
    decoder: ImageDecoder | VideoDecoder, lora: DecoderLora | None = None, **settings: Any
) -> NDArray[np.int64]:
    wish = DecodeSettings(seed=1, steps=3, guidance_scale=2.0, lora=lora and lora.name, **settings)
    medium = decoder.decode(decoder.encode_caption("a bell"), wish, lora=lora).medium
    assert isinstance(medium, Image | Video)
    return (medium.pixels if isinstance(medium, Image) else medium.frames).astype(np.int64)


@pytest.mark.parametrize("kind", ["decoder", "video_decoder"])
def test_a_compiled_decoder_makes_the_same_media_and_runs_plain_where_hooks_are_needed(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder: ImageDecoder | VideoDecoder = request.getfixturevalue(kind)
    write_unet_lora(decoder.unet, tmp_path / "ink", seed=1, target_modules=["to_q"])
    lora = decoder.read_lora("ink", tmp_path / "ink")
    ways: list[dict[str, Any]] = [{}, {"deep_every": 2}, {"lora": lora}, {}]
    weights = decoder.weight_bytes()
    expected = [pixels(decoder, **way) for way in ways]
    backend = Counter()
    monkeypatch.setattr(torch, "compile", backend.compile)

    decoder.compile()

    assert decoder.weight_bytes() == weights
    for way, plain in zip(ways, expected, strict=True):
        before = backend.calls
        assert np.abs(pixels(decoder, **way) - plain).max() <= 1
        assert backend.calls - before == (0 if way else 3)
    assert np.abs(expected[2] - expected[0]).max() > 1  # or the LoRA would be no test


def test_a_compiled_engine_says_the_same_and_runs_plain_where_hooks_are_needed(tmp_path: Path) -> None:
    model = tiny_model()
    write_lm_lora(model.causal_lm, tmp_path, seed=1)
    lora = read_request_lora("pirate", tmp_path, model.causal_lm, torch.float32)
    options = GenerationOptions(max_new_tokens=6, temperature=1.5, seed=3)

    def replies(engine: Engine, *loras: RequestLora | None) -> list[list[StepEvent]]:
        texts = [f"draw a bell {number}" for number in range(len(loras))]
        requests = [
            engine.prepare([user(text)], options, lora) for text, lora in zip(texts, loras, strict=True)
        ]
        return [events for _, events in run(engine, requests).items()]

    plain, compiled = (Engine(model, slots=3, context=128) for _ in range(2))
    backend = Counter()
    compiled.compile(backend)
    for loras in ((None, None), (lora, lora), (None,)):
        before = backend.calls
        for ours, theirs in zip(replies(compiled, *loras), replies(plain, *loras), strict=True):
            assert_same(ours, theirs)
        assert (backend.calls > before) == (loras[0] is None)


def test_what_cannot_be_compiled_says_why_and_runs_as_it_is(
    decoder: ImageDecoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = pixels(decoder)
    engine = Engine(tiny_model(), slots=2, context=64)
    # The trouble is as torch tells it, but from a function that is traced at once.
    failing = torch.compile(lambda *args, **rest: torch.ones(1) + 1, backend=broken)
    monkeypatch.setattr(torch, "compile", lambda module, **options: failing)

    with caplog.at_level("WARNING", "services.compiling"):
        compile_if_possible("image decoder", True, decoder)
        compile_if_possible("language model", True, engine)

    np.testing.assert_array_equal(pixels(decoder), expected)
    assert run(engine, [engine.prepare([user("hello")], GenerationOptions(max_new_tokens=2))])
    told = [record.getMessage() for record in caplog.records if record.name == "services.compiling"]
    for box, message in zip(("image decoder", "language model"), told, strict=True):
        assert message.startswith(f"The {box} could not be compiled and runs as it is")
        assert "no g++ was found" in message
        assert "take compile out of the preset" in message


def test_the_preset_decides_what_is_compiled(
    tiny_preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(Engine, "compile", lambda self: compiled.append("language model"))
    monkeypatch.setattr(ImageDecoder, "compile", lambda self: compiled.append("image"))
    preset = load_preset(str(tiny_preset))
    assert not preset.language_model.compile
    store = ArtefactStore(tmp_path.as_uri())

    LocalLanguageModel(preset).load()
    LocalDecoder(preset, Modality.IMAGE, store).load()
    assert compiled == []

    image = preset.decoders[Modality.IMAGE].model_copy(update={"compile": True})
    words = preset.language_model.model_copy(update={"compile": True})
    wanting = preset.model_copy(update={"language_model": words, "decoders": {Modality.IMAGE: image}})
    LocalLanguageModel(wanting).load()
    LocalDecoder(wanting, Modality.IMAGE, store).load()
    assert compiled == ["language model", "image"]
