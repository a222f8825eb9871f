import asyncio
from collections.abc import Callable
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from decoders.audio import AudioDecoder
from decoders.condition import Condition
from decoders.engine import DenoisingEngine
from decoders.image import ImageDecoder
from decoders.latent_decoder import LatentDecoder
from decoders.plan import Decoded
from decoders.settings import DecodeSettings
from decoders.thrift import Thrift
from decoders.video import VideoDecoder
from tests import tiny_pipelines

KINDS: dict[str, tuple[type[LatentDecoder], Callable[[], Any]]] = {
    "image": (ImageDecoder, tiny_pipelines.image_pipeline),
    "video": (VideoDecoder, tiny_pipelines.video_pipeline),
    "video, attention outside": (
        VideoDecoder,
        partial(tiny_pipelines.video_pipeline, attention_outside=True),
    ),
    "audio": (AudioDecoder, tiny_pipelines.audio_pipeline),
}


@pytest.fixture(scope="module", params=KINDS)
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LatentDecoder:
    kind, pipeline = KINDS[request.param]
    return kind.load(tiny_pipelines.saved(pipeline(), tmp_path_factory.mktemp("decoder")))


@pytest.fixture(scope="module")
def condition(decoder: LatentDecoder) -> Condition:
    return decoder.encode_caption("a big red bell")


def latents_of(decoder: LatentDecoder, plans: list[Any]) -> list[Tensor]:
    """Run plans together, one run each."""
    runs = [decoder.begin([plan]) for plan in plans]
    while not runs[0].finished:
        decoder.step(runs, plans)
    return [run.latents for run in runs]


def test_with_fresh_features_the_shallow_twin_equals_the_whole_network(
    decoder: LatentDecoder, condition: Condition
) -> None:
    deep = decoder._deep_features()
    shape = decoder.plan(condition).shape
    inputs = (
        torch.randn(3, *shape, generator=torch.Generator().manual_seed(1)),
        torch.tensor([900.0, 500.0, 20.0]),
        condition.embeddings.expand(3, -1, -1),
    )
    with torch.inference_mode():
        with deep.recording() as recorded:
            whole = decoder._predict(*inputs)
        deep.recall(torch.cat(recorded))
        first = decoder._run(deep.shallow, *(part[:1] for part in inputs))
        others = decoder._run(deep.shallow, *(part[1:] for part in inputs))

    assert len(recorded) == 1
    torch.testing.assert_close(torch.cat([first, others]), whole, atol=1e-5, rtol=0)


def test_the_deep_part_runs_in_every_nth_step_only(decoder: LatentDecoder, condition: Condition) -> None:
    calls: list[int] = []
    hook = decoder._network.mid_block.register_forward_hook(lambda block, args, out: calls.append(len(out)))

    decoder.decode(condition, DecodeSettings(steps=7, guidance_scale=3.0, deep_every=3))
    hook.remove()

    frames = decoder.plan(condition).shape[1] if isinstance(decoder, VideoDecoder) else 1
    assert calls == [2 * frames] * 3


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_reuse_changes_the_latents_a_little(
    decoder: LatentDecoder, condition: Condition, guidance: float
) -> None:
    def run(every: int | None) -> Tensor:
        wish = DecodeSettings(seed=1, steps=20, guidance_scale=guidance, deep_every=every)
        return latents_of(decoder, [decoder.plan(condition, wish)])[0]

    exact, twice = run(None), run(2)

    torch.testing.assert_close(run(1), exact, rtol=0, atol=0)
    assert (twice != exact).any()
    assert (twice - exact).pow(2).mean() < 0.05 * exact.pow(2).mean()


def test_who_does_not_ask_for_reuse_is_not_touched_by_who_does(
    decoder: LatentDecoder, condition: Condition
) -> None:
    wishes = [
        DecodeSettings(seed=i, steps=6, guidance_scale=scale, deep_every=every)
        for i, (scale, every) in enumerate([(3.0, None), (1.0, 2), (4.0, 3), (2.0, 2), (1.0, None)])
    ]
    plans = [decoder.plan(condition, wish) for wish in wishes]

    together = latents_of(decoder, plans)

    for plan, latents in zip(plans, together, strict=True):
        alone = latents_of(decoder, [plan])[0]
        torch.testing.assert_close(latents, alone, atol=1e-4, rtol=0)


def test_short_memory_calls_give_the_same(decoder: LatentDecoder, condition: Condition) -> None:
    plan = decoder.plan(condition, DecodeSettings(seed=1, steps=4, guidance_scale=3.0, deep_every=2))
    run = decoder.begin([plan])
    while not run.finished:
        decoder.step([run], [plan], thrift=Thrift.SLICED)

    torch.testing.assert_close(run.latents, latents_of(decoder, [plan])[0], atol=1e-5, rtol=0)


async def test_the_engine_reuses_and_says_so(decoder: LatentDecoder, condition: Condition) -> None:
    engine = DenoisingEngine(decoder)
    wishes = [DecodeSettings(seed=i, steps=5, deep_every=every) for i, every in enumerate((2, None, 4))]

    async def made(wish: DecodeSettings) -> Decoded:
        async with aclosing(engine.decode(condition, wish)) as stream:
            heard = [value async for value in stream]
        assert isinstance(heard[-1], Decoded)
        return heard[-1]

    results = await asyncio.gather(*(made(wish) for wish in wishes))
    engine.close()

    assert [result.manifest.get("deep_every") for result in results] == [2, None, 4]
    for result, wish in zip(results, wishes, strict=True):
        assert result.manifest == decoder.decode(condition, wish).manifest


def test_only_what_records_sees_a_hook_as_code_made_without_one_would_be_made_anew(
    decoder: LatentDecoder, condition: Condition
) -> None:
    deep = decoder._deep_features()
    last = decoder._network.up_blocks[-1]

    with deep.recording():
        while_recording = len(last._forward_pre_hooks)
    decoder.decode(condition, DecodeSettings(steps=3, deep_every=2))

    assert (while_recording, len(last._forward_pre_hooks)) == (1, 0)


def test_an_engine_measures_what_reuse_saves(decoder: LatentDecoder, condition: Condition) -> None:
    engine = DenoisingEngine(decoder)
    engine.calibrate()
    shape = decoder.plan(condition).shape
    engine.close()

    kept, reused = (engine.cost.steps_s(shape, 2, 1, 2, done=done) for done in range(2))
    assert 0 < reused < kept


def test_a_network_of_one_level_refuses(tmp_path: Path) -> None:
    decoder = ImageDecoder.load(tiny_pipelines.saved(tiny_pipelines.image_pipeline(levels=1), tmp_path))

    with pytest.raises(ValueError, match="one level only"):
        decoder.plan(decoder.encode_caption("bell"), DecodeSettings(deep_every=2))
