import asyncio
from contextlib import aclosing
from pathlib import Path

import numpy as np
import pytest

from decoders.engine import EngineConfig
from decoders.settings import DecodeSettings
from decoders.writing import read_manifest
from encoders.media import Image, Modality, read_media
from services.artefacts import ArtefactStore
from services.boxes import Made, Progress, SpokenSignal
from services.errors import PresetProblem, translate
from services.local_decoder import LocalDecoder
from services.presets import load_preset
from tests import tiny_pipelines
from tests.tiny import LLM_WIDTH, write_tiny_preset

STEPS = 3


@pytest.fixture(scope="module")
def preset_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_preset(tmp_path_factory.mktemp("preset"))


@pytest.fixture
def box(preset_file: Path, tmp_path: Path) -> LocalDecoder:
    return LocalDecoder(load_preset(str(preset_file)), Modality.IMAGE, ArtefactStore(tmp_path.as_uri()))


def signal(number: int) -> SpokenSignal:
    rng = np.random.default_rng(number)
    states = rng.normal(size=(4, LLM_WIDTH)).astype(np.float32)
    return SpokenSignal(Modality.IMAGE, f"bell {number}", states, states)


async def heard(box: LocalDecoder, number: int, settings: DecodeSettings) -> list[Progress | Made]:
    async with aclosing(box.decode(signal(number), settings)) as stream:
        return [value async for value in stream]


async def test_several_media_are_made_at_the_same_time_and_stored(box: LocalDecoder) -> None:
    box.warm_up()

    results = await asyncio.gather(*(heard(box, i, DecodeSettings(seed=i)) for i in range(5)))

    for number, (*progress, made) in enumerate(results):
        assert isinstance(made, Made)
        assert [(p.step, p.total) for p in progress if isinstance(p, Progress)] == [
            (step, STEPS) for step in range(STEPS + 1)
        ]
        assert made.artefact.caption == f"bell {number}"
        data = box.store.read(made.artefact.id)
        assert read_manifest(data)["seed"] == number
        image = read_media(data)
        assert isinstance(image, Image)
        assert image.pixels.shape == (16, 16, 3)
    assert box.engine is not None
    assert box.engine.stats().most_stepping > 1
    assert box.engine.cost.known


async def test_a_closed_stream_stops_the_engine(box: LocalDecoder) -> None:
    stream = box.decode(signal(0), DecodeSettings(steps=1000))
    first = await anext(stream)
    await stream.aclose()

    assert isinstance(first, Progress)
    assert box.engine is not None
    assert box.engine.stats().requests == 0


async def test_a_full_queue_is_an_error_that_clients_know(box: LocalDecoder) -> None:
    box.warm_up()
    assert box.engine is not None
    box.engine.config = EngineConfig(max_batch=1, max_wait_s=0.001)
    box.engine._batch_limit = 1
    stream = box.decode(signal(0), DecodeSettings(steps=1000))
    await anext(stream)

    with pytest.raises(Exception, match="would wait") as refused:
        await heard(box, 1, DecodeSettings(steps=1000))
    await stream.aclose()

    known = translate(refused.value)
    assert (known.status, known.code) == (429, "queue_full")
    assert known.retry_after_s >= 1


async def test_the_limits_of_the_engine_are_those_of_the_preset(preset_file: Path, tmp_path: Path) -> None:
    values = preset_file.read_text().replace("folder: image", "folder: image\n    max_batch: 2")
    other = preset_file.with_name("other.yaml")
    other.write_text(values)
    box = LocalDecoder(load_preset(str(other)), Modality.IMAGE, ArtefactStore(tmp_path.as_uri()))
    box.load()

    await asyncio.gather(*(heard(box, i, DecodeSettings(seed=i)) for i in range(5)))

    assert box.engine is not None
    assert box.engine.config.max_batch == box.engine.stats().most_stepping == 2


async def test_a_preset_may_name_a_pipeline_that_no_decoder_takes_apart(
    preset_file: Path, tmp_path: Path
) -> None:
    tiny_pipelines.saved(tiny_pipelines.xl_pipeline(), preset_file.parent / "weights" / "xl")
    values = preset_file.read_text().replace("folder: image", "folder: xl\n    link: caption")
    other = preset_file.with_name("xl.yaml")
    other.write_text(values)
    box = LocalDecoder(load_preset(str(other)), Modality.IMAGE, ArtefactStore(tmp_path.as_uri()))
    box.warm_up()

    streams = await asyncio.gather(*(heard(box, i, DecodeSettings(seed=i)) for i in range(2)))

    for i, seen in enumerate(streams):
        assert [value.step for value in seen if isinstance(value, Progress)] == [0, 1, 2, 3]
        assert isinstance(made := seen[-1], Made)
        assert made.manifest["pipeline"] == "StableDiffusionXLPipeline"
        assert (made.manifest["caption"], made.manifest["seed"]) == (f"bell {i}", i)


def test_a_pipeline_of_another_modality_is_a_problem_of_the_preset(preset_file: Path, tmp_path: Path) -> None:
    values = preset_file.read_text().replace("folder: image", "folder: audio")
    other = preset_file.with_name("wrong.yaml")
    other.write_text(values)
    box = LocalDecoder(load_preset(str(other)), Modality.IMAGE, ArtefactStore(tmp_path.as_uri()))

    with pytest.raises(
        PresetProblem, match="AudioLDMPipeline, which makes audio; expected one that makes image"
    ):
        box.load()
