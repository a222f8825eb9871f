import asyncio
import io
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray

from decoders.engine import DenoisingEngine, EngineConfig
from decoders.settings import DecodeSettings
from decoders.writing import read_manifest, to_png, to_wav
from encoders.media import Audio, Image, Modality, read_media
from services.artefacts import ArtefactStore
from services.boxes import Made, Preview, Progress, SpokenSignal, Step
from services.errors import NotFound, PresetProblem, translate
from services.local_decoder import LocalDecoder
from services.presets import load_preset
from tests import tiny_pipelines
from tests.tiny import LLM_WIDTH, write_tiny_preset
from tests.tiny_decoders import ScriptedClock

STEPS = 3


@pytest.fixture(scope="module")
def preset_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_preset(tmp_path_factory.mktemp("preset"))


@pytest.fixture
def box(preset_file: Path, tmp_path: Path) -> LocalDecoder:
    return LocalDecoder(load_preset(str(preset_file)), Modality.IMAGE, ArtefactStore(tmp_path.as_uri()))


def box_of(preset_file: Path, store: Path, name: str, image: str) -> LocalDecoder:
    """Return the box of a copy of the preset, called ``name``, whose picture decoder is ``image``."""
    copy = preset_file.with_name(f"{name}.yaml")
    copy.write_text(preset_file.read_text().replace("folder: image", image))
    return LocalDecoder(load_preset(str(copy)), Modality.IMAGE, ArtefactStore(store.as_uri()))


def signal(number: int) -> SpokenSignal:
    rng = np.random.default_rng(number)
    states = rng.normal(size=(4, LLM_WIDTH)).astype(np.float32)
    return SpokenSignal(Modality.IMAGE, f"bell {number}", states, states)


async def heard(box: LocalDecoder, number: int, settings: DecodeSettings, **wishes: Any) -> list[Step]:
    async with aclosing(box.decode(signal(number), settings, **wishes)) as stream:
        return [value async for value in stream]


def read_image(box: LocalDecoder, made: Made) -> NDArray[np.uint8]:
    image = read_media(box.store.read(made.artefact.id))
    assert isinstance(image, Image)
    return image.pixels


def one_at_a_time(box: LocalDecoder) -> None:
    box.load()
    assert box.engine is not None
    box.engine.config = EngineConfig(max_batch=1)
    box.engine._batch_limit = 1


async def steps_in_order(box: LocalDecoder, *demands: tuple[str, int, int]) -> list[str]:
    """Return whose steps were taken, in order; each demand is a user, a number of media and their steps."""
    order: list[str] = []

    async def ask(user: str, steps: int) -> None:
        settings = DecodeSettings(steps=steps, guidance_scale=1.0, seed=0)
        async with aclosing(box.decode(signal(0), settings, user=user)) as stream:
            async for value in stream:
                if isinstance(value, Progress) and 0 < value.step < value.total:
                    order.append(user)

    tasks = [asyncio.create_task(ask(user, steps)) for user, media, steps in demands for _ in range(media)]
    await asyncio.gather(*tasks)
    return order


async def test_an_edit_takes_its_part_of_the_steps_only_and_stays_near_its_source(box: LocalDecoder) -> None:
    pixels = np.full((40, 24, 3), 200, np.uint8)
    pixels[:20] = 30
    source = box.store.put(to_png(Image(pixels), {}), media_type="image/png", filename="a.png").id

    async def edited(strength: float) -> tuple[list[tuple[int, int]], float, Made]:
        settings = DecodeSettings(seed=1, steps=10, guidance_scale=1.0, strength=strength)
        *progress, made = await heard(box, 0, settings, source=source)
        assert isinstance(made, Made)
        image = read_media(box.store.read(made.artefact.id))
        assert isinstance(image, Image)
        wanted = np.where(np.arange(16)[:, None, None] < 8, 30.0, 200.0)
        steps = [(step.step, step.total) for step in progress if isinstance(step, Progress)]
        return steps, float(np.abs(image.pixels - wanted).mean()), made

    few, near, made = await edited(0.2)
    many, far, _ = await edited(1.0)

    assert few == [(0, 2), (1, 2), (2, 2)]
    assert many[-1] == (10, 10)
    assert near < far
    assert (made.manifest["steps"], made.manifest["strength"]) == (10, 0.2)


async def test_a_preset_may_start_every_medium_from_the_newest_one_of_its_kind(box: LocalDecoder) -> None:
    picture = to_png(Image(np.zeros((16, 16, 3), np.uint8)), {})
    source = box.store.put(picture, media_type="image/png", filename="a.png").id
    box.chosen = box.chosen.model_copy(update={"edit_strength": 0.5})

    async def made(strength: float | None = None, **wishes: Any) -> tuple[int, float | None]:
        *progress, last = await heard(box, 0, DecodeSettings(steps=10, strength=strength), **wishes)
        assert isinstance(last, Made)
        steps = max(step.step for step in progress if isinstance(step, Progress))
        return steps, last.manifest.get("strength")

    assert await made(source=source) == (5, 0.5)
    assert await made(0.2, source=source) == (2, 0.2)  # what the request says comes first
    assert await made() == (10, None)


async def test_what_nobody_asked_to_start_from_may_be_gone_or_unfit(box: LocalDecoder) -> None:
    sound = box.store.put(
        to_wav(Audio(np.zeros(1600, np.float32), 16_000), {}), media_type="audio/wav", filename="a.wav"
    ).id
    box.chosen = box.chosen.model_copy(update={"edit_strength": 0.5})
    for source in (sound, "file-00000000000000000000000000000000"):
        made = (await heard(box, 0, DecodeSettings(), source=source))[-1]
        assert isinstance(made, Made)
        assert made.manifest.get("strength") is None
        with pytest.raises(Exception, match=r"audio|file-0000") as refused:
            await heard(box, 0, DecodeSettings(strength=0.5), source=source)
        assert translate(refused.value).status in (400, 404)


async def test_a_preset_may_keep_what_an_edit_does_not_touch(box: LocalDecoder) -> None:
    settings = DecodeSettings(seed=1, steps=2)
    anew = (await heard(box, 0, settings))[-1]
    assert isinstance(anew, Made)
    pixels = read_image(box, anew) ^ 1
    source = box.store.put(to_png(Image(pixels), {}), media_type="image/png", filename="a.png").id

    async def made(settings: DecodeSettings, source: str = source) -> Made:
        last = (await heard(box, 0, settings, source=source))[-1]
        assert isinstance(last, Made)
        return last

    assert "original" not in (await made(settings)).manifest
    np.testing.assert_array_equal(read_image(box, await made(replace(settings, keep_untouched=True))), pixels)
    box.chosen = box.chosen.model_copy(update={"keep_untouched": True})
    kept = await made(settings)
    np.testing.assert_array_equal(read_image(box, kept), pixels)
    assert "strength" not in kept.manifest
    assert "original" not in (await made(replace(settings, keep_untouched=False))).manifest
    gone = "file-00000000000000000000000000000000"
    assert "original" not in (await made(settings, gone)).manifest
    with pytest.raises(NotFound):
        await made(replace(settings, keep_untouched=True), gone)
    both = (await made(replace(settings, strength=0.5))).manifest
    assert (both["strength"], len(both["original"])) == (0.5, 16)


async def test_the_previews_of_an_edit_are_spread_over_the_steps_that_it_takes(box: LocalDecoder) -> None:
    picture = to_png(Image(np.zeros((16, 16, 3), np.uint8)), {})
    source = box.store.put(picture, media_type="image/png", filename="a.png").id
    settings = DecodeSettings(seed=1, steps=8, strength=0.5)
    heard_of = await heard(box, 0, settings, source=source, previews=1)
    assert [(look.step, look.total) for look in heard_of if isinstance(look, Preview)] == [(2, 4)]


async def test_a_source_of_another_kind_is_refused(box: LocalDecoder) -> None:
    sound = to_wav(Audio(np.zeros(1600, np.float32), 16_000), {})
    source = box.store.put(sound, media_type="audio/wav", filename="a.wav").id
    with pytest.raises(ValueError, match="audio") as refused:
        await heard(box, 0, DecodeSettings(strength=0.5), source=source)
    assert translate(refused.value).status == 400


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


async def test_fast_media_reuse_features_as_the_preset_says(box: LocalDecoder) -> None:
    made = [(await heard(box, 0, DecodeSettings(steps=STEPS, fast=fast)))[-1] for fast in (True, None)]

    assert [step.manifest.get("deep_every") for step in made if isinstance(step, Made)] == [2, None]


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
    box = box_of(preset_file, tmp_path, "other", "folder: image\n    max_batch: 2")
    box.load()

    await asyncio.gather(*(heard(box, i, DecodeSettings(seed=i)) for i in range(5)))

    assert box.engine is not None
    assert box.engine.config.max_batch == box.engine.stats().most_stepping == 2


async def test_a_preset_may_name_a_pipeline_that_no_decoder_takes_apart(
    preset_file: Path, tmp_path: Path
) -> None:
    tiny_pipelines.saved(tiny_pipelines.xl_pipeline(), preset_file.parent / "weights" / "xl")
    box = box_of(preset_file, tmp_path, "xl", "folder: xl\n    link: caption")
    box.warm_up()

    streams = await asyncio.gather(*(heard(box, i, DecodeSettings(seed=i)) for i in range(2)))

    for i, seen in enumerate(streams):
        assert [value.step for value in seen if isinstance(value, Progress)] == [0, 1, 2, 3]
        assert isinstance(made := seen[-1], Made)
        assert made.manifest["pipeline"] == "StableDiffusionXLPipeline"
        assert (made.manifest["caption"], made.manifest["seed"]) == (f"bell {i}", i)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ("edit_strength: 0.9", r"edit_strength is 0\.9; a StableDiffusionXLPipeline"),
        ("keep_untouched: true", r"keep_untouched is true; a StableDiffusionXLPipeline"),
    ],
)
def test_a_pipeline_that_runs_as_a_whole_edits_nothing(
    preset_file: Path, tmp_path: Path, wish: str, message: str
) -> None:
    tiny_pipelines.saved(tiny_pipelines.xl_pipeline(), preset_file.parent / "weights" / "xl-edits")
    box = box_of(preset_file, tmp_path, "xl-edits", f"folder: xl-edits\n    {wish}")
    with pytest.raises(PresetProblem, match=message):
        box.load()


def test_a_pipeline_of_another_modality_is_a_problem_of_the_preset(preset_file: Path, tmp_path: Path) -> None:
    box = box_of(preset_file, tmp_path, "wrong", "folder: audio")

    with pytest.raises(
        PresetProblem, match="AudioLDMPipeline, which makes audio; expected one that makes image"
    ):
        box.load()


async def test_users_who_ask_for_equally_much_get_equally_much(
    box: LocalDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_at_a_time(box)
    assert isinstance(box.engine, DenoisingEngine)
    ScriptedClock(box.engine.decoder, monkeypatch)

    order = await steps_in_order(box, ("ann", 5, 13), ("bob", 5, 13))

    both = order[order.index("bob") : len(order) - order[::-1].index("ann")]  # while both had something to do
    assert len(both) > len(order) / 2
    assert 1 / 1.2 < both.count("ann") / both.count("bob") < 1.2


async def test_a_short_medium_is_not_stuck_behind_a_long_one_of_somebody_else(box: LocalDecoder) -> None:
    one_at_a_time(box)

    order = await steps_in_order(box, ("ann", 2, 150), ("bob", 1, 6))

    assert len(order) - order[::-1].index("bob") < len(order) / 2


@pytest.mark.parametrize("modality", [Modality.IMAGE, Modality.VIDEO, Modality.AUDIO])
async def test_previews_are_pictures_and_come_only_when_asked_for(
    preset_file: Path, tmp_path: Path, modality: Modality
) -> None:
    box = LocalDecoder(load_preset(str(preset_file)), modality, ArtefactStore(tmp_path.as_uri()))

    with_previews = await heard(box, 0, DecodeSettings(steps=6, seed=0), previews=2)
    without = await heard(box, 0, DecodeSettings(steps=6, seed=0))

    looks = [value for value in with_previews if isinstance(value, Preview)]
    assert [(look.step, look.total) for look in looks] == [(2, 6), (4, 6)]
    for look in looks:
        picture = PIL.Image.open(io.BytesIO(look.data))
        assert look.media_type == PIL.Image.MIME[picture.format or ""]
        assert min(picture.size) >= 8
    assert not any(isinstance(value, Preview) for value in without)
    assert len(list(tmp_path.glob("*.bin"))) == 2  # previews are not kept


async def test_it_counts_what_it_has_to_do(box: LocalDecoder) -> None:
    assert await box.counts() == {}
    box.warm_up()
    stream = box.decode(signal(0), DecodeSettings(steps=1000))
    await anext(stream)
    busy = (await box.counts())["local"]
    await stream.aclose()
    idle = (await box.counts())["local"]

    assert (busy["requests"], idle["requests"]) == (1, 0)
    assert busy["queue_seconds"] > 0 == idle["queue_seconds"]
