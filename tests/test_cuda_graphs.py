"""Captured networks. A recording stands in for a CUDA graph, as it keeps shapes and numbers as they were."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from decoders.image import ImageDecoder
from decoders.quick_network import GRAPH_ROWS
from llm.engine import Engine
from llm.generate import GenerationOptions
from llm.slots import SlotModel
from services.compiling import compile_if_possible
from services.cuda_graphs import capture
from tests import tiny_pipelines
from tests.lora_files import write_unet_lora
from tests.test_compiling import pixels
from tests.test_language_engine import assert_same, run
from tests.tiny_llm import tiny_model, user


class Captures:
    """Captures as a GPU would, and notes the rows of every capture and of every replay."""

    def __init__(self) -> None:
        self.captured: list[int] = []
        self.replayed: list[int] = []
        self.broken = False

    def __call__(self, work: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Callable[..., Tensor]:
        if self.broken:
            raise RuntimeError("operation not permitted when stream is capturing")

        class Work(nn.Module):
            def forward(self, *tensors: Tensor) -> Tensor:
                return work(*tensors)

        shapes = [tensor.shape for tensor in inputs]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated, and shapes are not to change
            graph: Any = torch.jit.trace(Work(), tuple(inputs), check_trace=False)
        self.captured.append(len(inputs[0]))

        def replay(*given: Tensor) -> Tensor:
            assert [tensor.shape for tensor in given] == shapes
            self.replayed.append(len(given[0]))
            result: Tensor = graph(*given)
            return result

        return replay


@pytest.fixture
def decoder(tmp_path: Path) -> ImageDecoder:
    return ImageDecoder.load(tiny_pipelines.saved(tiny_pipelines.image_pipeline(), tmp_path / "image"))


def test_a_captured_decoder_makes_the_same_media_and_runs_plain_where_a_graph_would_be_wrong(
    decoder: ImageDecoder, tmp_path: Path
) -> None:
    write_unet_lora(decoder.unet, tmp_path / "ink", seed=1)
    lora = decoder.read_lora("ink", tmp_path / "ink")
    wide = 2 * decoder.plan(decoder.encode_caption("")).shape[-1] * decoder._factor
    ways: list[dict[str, Any]] = [{}, {"deep_every": 3}, {"lora": lora}, {"width_px": wide}]
    expected = [pixels(decoder, **way) for way in ways]
    graphs = Captures()

    decoder.graph(graphs)

    assert graphs.captured == list(GRAPH_ROWS)
    replays = []
    for way, wanted in zip(ways, expected, strict=True):
        graphs.replayed.clear()
        assert np.abs(pixels(decoder, **way) - wanted).max() <= 1
        replays.append(list(graphs.replayed))
    assert replays == [[2, 2, 2], [], [], []]


def test_graphs_are_gone_when_the_weights_have_moved(decoder: ImageDecoder) -> None:
    graphs = Captures()
    decoder.graph(graphs)
    graphs.replayed.clear()
    for weight in decoder.unet.parameters():
        weight.data = weight.data * 0.5
    expected = pixels(decoder)

    assert graphs.replayed == []
    assert decoder._quick._graphs == {}
    np.testing.assert_array_equal(pixels(decoder), expected)


@pytest.mark.parametrize("num_slots", [3, 4])
def test_a_captured_engine_says_the_same(num_slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm.slots.GRAPH_POSITIONS", 16)
    model = tiny_model()
    options = GenerationOptions(max_new_tokens=30, temperature=1.5, seed=3, allowed=frozenset())
    plain, captured = (Engine(model, slots=num_slots, context=128) for _ in range(2))
    graphs = Captures()
    captured.graph(graphs)
    found = []
    for engine in (captured, plain):
        texts = [f"draw a bell {'and a drum ' * number}" for number in range(5)]
        requests = [engine.prepare([user(text)], options) for text in texts]
        found.append(list(run(engine, requests).values()))

    for ours, theirs in zip(*found, strict=True):
        assert_same(ours, theirs)
    assert {1, num_slots} <= set(graphs.replayed) <= {1, 2, num_slots}
    assert len(graphs.captured) == len(captured._slot_model._graphs) > len(set(graphs.captured))


def test_passes_that_cannot_be_captured_any_more_go_on_plain(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    plain, captured = (SlotModel(model, 2, 64) for _ in range(2))
    graphs = Captures()
    captured.graph(graphs)
    graphs.broken = True
    for start, length in ((0, 5), (5, 1), (6, 1)):
        embeddings = torch.randn(2, length, model.width)
        wanted = plain.run(embeddings, [0, 1], [start] * 2)
        again = captured.run(embeddings, [0, 1], [start] * 2)
        torch.testing.assert_close(again, wanted, atol=1e-5, rtol=0)

    assert caplog.text.count("from now on none is replayed") == 1


def test_without_a_gpu_a_box_says_so_and_runs_as_it_is(
    decoder: ImageDecoder, caplog: pytest.LogCaptureFixture
) -> None:
    expected = pixels(decoder)
    engine = Engine(tiny_model(), slots=2, context=64)

    with caplog.at_level("WARNING", "services.compiling"):
        compile_if_possible("image decoder", "graphs", decoder)
        compile_if_possible("language model", "graphs", engine)

    np.testing.assert_array_equal(pixels(decoder), expected)
    assert run(engine, [engine.prepare([user("hello")], GenerationOptions(max_new_tokens=2))])
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    for message in told:
        assert "could not be captured and runs as it is: CUDA graphs are for an NVIDIA GPU" in message
        assert message.endswith("the network is on the cpu. Take compile out of the preset.")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_repeats_its_work_for_other_numbers() -> None:
    weight = torch.randn(8, 8, device="cuda")
    one, other = (torch.randn(3, 8, device="cuda") for _ in range(2))
    graph = capture(lambda given: given @ weight, [one])

    first, second = graph(one), graph(other)

    torch.testing.assert_close(first, one @ weight)
    torch.testing.assert_close(second, other @ weight)
