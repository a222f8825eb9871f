from __future__ import annotations

import asyncio
import gc
import weakref
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from decoders.settings import DecodeSettings
from encoders.media import Audio, Image, Modality, Video, read_media
from services.artefacts import ArtefactStore
from services.boxes import Made, SpokenSignal
from services.decoder_pool import DecoderKey, DecoderPool
from services.errors import PresetProblem
from services.footprint import decoder_bytes
from services.local_decoder import LocalDecoder
from services.memory_plan import changed
from services.presets import load_preset
from tests.tiny import LLM_WIDTH, tiny_values

IMAGE, VIDEO, AUDIO = Modality.IMAGE, Modality.VIDEO, Modality.AUDIO
SIZE = 10


class Decoder:
    """Where a decoder's weights are, without weights."""

    def __init__(self) -> None:
        self.place = "gpu"

    def move(self, device: str) -> None:
        self.place = device


class Engine:
    def __init__(self) -> None:
        self.decoder = Decoder()
        self.closed = False

    def close(self) -> None:
        self.closed = True


class Bench:
    """A pool of such decoders, and how often each was loaded."""

    def __init__(self, budget: int | None, waits_in: Any = "device") -> None:
        self.pool = DecoderPool(budget)
        self.waits_in = waits_in
        self.loads: list[str] = []
        self.made: dict[str, Any] = {}
        self.fails = False

    def key(self, name: str) -> DecoderKey:
        return DecoderKey(folder=Path(name), device="gpu", dtype=torch.float32, waits_in=self.waits_in)

    def use(self, name: str, need: int = SIZE) -> Any:
        def load() -> Any:
            self.loads.append(name)
            if self.fails:
                raise ValueError("the weights are damaged")
            self.made[name] = Engine()
            return self.made[name]

        return self.pool.use(self.key(name), need, load)

    def here(self) -> list[str]:
        self.pool.settle()
        return [key.folder.name for key in self.pool.on_device()]


async def test_a_decoder_is_loaded_at_its_first_use_and_once() -> None:
    bench = Bench(None)
    assert bench.loads == []

    async def work() -> Any:
        async with bench.use("image") as engine:
            await asyncio.sleep(0)
            return engine

    engines = await asyncio.gather(*(work() for _ in range(5)))

    assert bench.loads == ["image"]
    assert len(set(map(id, engines))) == 1
    assert bench.here() == ["image"]


async def test_room_is_made_by_the_decoder_used_longest_ago() -> None:
    bench = Bench(2 * SIZE)
    for name in ("image", "video", "image", "audio"):
        async with bench.use(name):
            pass

    assert bench.here() == ["image", "audio"]
    assert bench.made["video"].closed
    async with bench.use("video"):
        assert bench.here() == ["audio", "video"]
    assert bench.loads == ["image", "video", "audio", "video"]


async def test_a_decoder_in_use_stays_and_who_needs_its_room_waits() -> None:
    bench = Bench(SIZE)
    async with bench.use("image") as engine:
        waiting = asyncio.create_task(bench.use("video").__aenter__())
        for _ in range(20):
            await asyncio.sleep(0.005)
        assert not waiting.done()
        assert not engine.closed
        assert bench.here() == ["image"]

    await asyncio.wait_for(waiting, 60)

    assert bench.here() == ["video"]
    assert bench.made["image"].closed


async def test_nobody_overtakes_who_waits_for_room() -> None:
    bench = Bench(SIZE)
    order: list[str] = []

    async def work(name: str) -> None:
        async with bench.use(name):
            order.append(name)

    async with bench.use("image"):
        tasks = []
        for name in ("video", "image", "video"):
            tasks.append(asyncio.create_task(work(name)))
            await asyncio.sleep(0.01)
    await asyncio.wait_for(asyncio.gather(*tasks), 60)

    assert order == ["video", "image", "video"]
    assert bench.loads == ["image", "video", "image", "video"]


async def test_a_cancelled_waiter_takes_no_room() -> None:
    bench = Bench(SIZE)
    async with bench.use("image"):
        waiting = asyncio.create_task(bench.use("video").__aenter__())
        await asyncio.sleep(0.02)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    async with asyncio.timeout(60), bench.use("audio"):
        assert bench.here() == ["audio"]
    assert bench.loads == ["image", "audio"]


async def test_a_failed_load_is_everybodys_error_and_the_next_use_tries_again() -> None:
    bench = Bench(SIZE)
    bench.fails = True

    async def work() -> None:
        async with bench.use("image"):
            raise AssertionError("there is no decoder")

    errors = await asyncio.gather(work(), work(), return_exceptions=True)
    assert [str(error) for error in errors] == ["the weights are damaged"] * 2

    bench.fails = False
    async with bench.use("image"):
        assert bench.here() == ["image"]


async def test_weights_that_wait_in_the_cpu_leave_when_idle_and_come_back_for_use() -> None:
    bench = Bench(None, "cpu")
    async with bench.use("image") as engine:
        assert engine.decoder.place == "gpu"
    assert bench.here() == []
    assert engine.decoder.place == "cpu"

    async with bench.use("image") as again:
        assert again is engine
        assert engine.decoder.place == "gpu"
    assert bench.loads == ["image"]


async def test_with_a_budget_weights_wait_in_the_cpu_only_when_others_need_the_room() -> None:
    bench = Bench(2 * SIZE, "cpu")
    for name in ("image", "video"):
        async with bench.use(name):
            pass
    assert bench.here() == ["image", "video"]

    async with bench.use("audio"):
        assert bench.made["image"].decoder.place == "cpu"
    assert bench.here() == ["video", "audio"]
    assert {key.folder.name for key in bench.pool.in_memory()} == {"image", "video", "audio"}


async def test_weights_that_wait_on_the_disk_are_gone_when_idle() -> None:
    bench = Bench(None, "disk")
    async with bench.use("image"):
        pass
    assert bench.here() == []
    assert bench.pool.in_memory() == []
    assert bench.made["image"].closed


async def test_what_is_larger_than_the_budget_is_refused_with_both_sizes() -> None:
    bench = Bench(3 * 10**9)
    with pytest.raises(PresetProblem, match=r"video needs 4\.00 GB.*may take 3\.00 GB\. Raise decoders_gb"):
        async with bench.use("video", 4 * 10**9):
            pass
    assert bench.loads == []


# --- with real decoders ------------------------------------------------------------------------------


def other_preset(tiny_preset: Path, name: str, **changes: Any) -> Path:
    path = tiny_preset.with_name(f"{name}.yaml")
    path.write_text(yaml.safe_dump({**tiny_values(), "name": name, **changes}))
    return path


def boxes(path: Path, store: ArtefactStore, pool: DecoderPool | None = None) -> dict[Modality, LocalDecoder]:
    preset = load_preset(str(path))
    return {modality: LocalDecoder(preset, modality, store, pool) for modality in preset.decoders}


async def made(box: LocalDecoder) -> Made:
    states = np.ones((4, LLM_WIDTH), np.float32)
    signal = SpokenSignal(box.modality, "a bell", states, states)
    async with aclosing(box.decode(signal, DecodeSettings(seed=1))) as stream:
        *_, last = [value async for value in stream]
    assert isinstance(last, Made)
    return last


def pixels_or_samples(store: ArtefactStore, made: Made) -> bytes:
    match read_media(store.read(made.artefact.id)):
        case Image(pixels=pixels):
            return pixels.tobytes()
        case Video(frames=frames):
            return np.asarray(frames).tobytes()
        case Audio(samples=samples):
            return samples.tobytes()


async def test_two_presets_with_the_same_weights_share_one_decoder(tiny_preset: Path, tmp_path: Path) -> None:
    store, pool = ArtefactStore(tmp_path.as_uri()), DecoderPool()
    one = boxes(tiny_preset, store, pool)
    values: Any = tiny_values()["decoders"]
    values["image"]["steps"] = 2
    values["video"]["dtype"] = "bfloat16"
    two = boxes(other_preset(tiny_preset, "second", decoders=values), store, pool)

    first, second = [await made(box[IMAGE]) for box in (one, two)]

    assert one[IMAGE].engine is two[IMAGE].engine is not None
    assert (first.manifest["steps"], second.manifest["steps"]) == (3, 2)
    assert (first.manifest["preset"], second.manifest["preset"]) == ("tiny", "second")
    one[VIDEO].load()
    two[VIDEO].load()
    assert one[VIDEO].engine is not two[VIDEO].engine  # another dtype is another decoder
    assert len(pool.in_memory()) == 3


async def test_with_a_budget_three_decoders_make_their_media_in_the_room_of_one(
    tiny_preset: Path, tmp_path: Path
) -> None:
    preset = load_preset(str(tiny_preset))
    largest = max(decoder_bytes(preset, modality) for modality in preset.decoders)
    path = other_preset(tiny_preset, "narrow", decoders_gb=largest / 1e9 + 1e-9)
    store = ArtefactStore(tmp_path.as_uri())
    wide = boxes(tiny_preset, store)
    pool = DecoderPool(largest)
    narrow = boxes(path, store, pool)

    expected = [await made(box) for box in wide.values()]
    found = await asyncio.gather(*(made(box) for box in narrow.values()))

    assert len(pool.in_memory()) == 1
    for whole, fitted in zip(expected, found, strict=True):
        assert pixels_or_samples(store, whole) == pixels_or_samples(store, fitted)


async def test_memory_of_a_decoder_that_is_put_aside_is_free_again(tiny_preset: Path, tmp_path: Path) -> None:
    path = other_preset(
        tiny_preset, "lazy", decoders={"image": {"folder": "image", "steps": 1, "waits_in": "disk"}}
    )
    (box,) = boxes(path, ArtefactStore(tmp_path.as_uri())).values()
    box.load()
    box.pool.settle()
    with box.pool.use_now(box.key, 0, box._engine) as engine:
        network = weakref.ref(engine.decoder._network)
        del engine

    box.pool.settle()
    gc.collect()

    assert network() is None


@pytest.mark.parametrize("modality", [IMAGE, VIDEO, AUDIO])
def test_all_weights_of_a_decoder_move(modality: Modality, tiny_preset: Path, tmp_path: Path) -> None:
    box = boxes(tiny_preset, ArtefactStore(tmp_path.as_uri()))[modality]
    box.load()
    assert box.engine is not None
    decoder = box.engine.decoder
    decoder.embed_captions(["a bell"])
    assert decoder.weight_bytes() > decoder_bytes(box.preset, modality)  # with the text encoder
    modules = [module for module in vars(decoder).values() if isinstance(module, torch.nn.Module)]
    assert decoder._text is not None
    modules.append(decoder._text[1])

    decoder.move("meta")

    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert len(modules) >= 3


async def test_a_caption_link_still_works_after_the_text_encoder_was_let_go(
    tiny_preset: Path, tmp_path: Path
) -> None:
    path = other_preset(
        tiny_preset, "spoken", decoders={"image": {"folder": "image", "steps": 1, "link": "caption"}}
    )
    (box,) = boxes(path, ArtefactStore(tmp_path.as_uri())).values()
    box.load()
    assert box.engine is not None
    assert box.engine.decoder._text is None
    before = box.engine.decoder.weight_bytes()

    await made(box)

    assert box.engine.decoder.weight_bytes() > before
    assert box.engine.decoder.weight_bytes() == decoder_bytes(box.preset, IMAGE)


# --- in a replica -------------------------------------------------------------------------------------


async def test_a_replica_with_a_budget_loads_at_first_use_and_makes_several_kinds(
    tiny_preset: Path, tmp_path: Path
) -> None:
    from services.deployments import DecoderReplica, ReplicaArgs

    preset = load_preset(str(tiny_preset))
    largest = max(decoder_bytes(preset, modality) for modality in preset.decoders)
    path = other_preset(tiny_preset, "one-room", decoders_gb=largest / 1e9 + 1e-9)
    replica = DecoderReplica(ReplicaArgs(preset=str(path), store=tmp_path.as_uri()), [IMAGE, AUDIO])
    assert [box.engine for box in replica.boxes.values()] == [None, None]

    for modality in (IMAGE, AUDIO):
        states = np.ones((4, LLM_WIDTH), np.float32)
        signal = SpokenSignal(modality, "a bell", states, states)
        stream = replica.decode(signal, DecodeSettings(seed=1), user="ann", previews=0)
        *_, last = [value async for value in stream]
        assert isinstance(last, Made)
        assert last.artefact.modality is modality
        assert [m for m, box in replica.boxes.items() if box.engine is not None] == [modality]


def test_with_a_budget_all_decoders_are_one_deployment(tiny_preset: Path) -> None:
    from deploy.app import AppArgs, build_app

    def names(path: Path) -> set[str]:
        agent = build_app(AppArgs(preset=str(path)))._bound_deployment.init_args[1]
        decoders = agent._bound_deployment.init_args[3]
        assert set(decoders) == {IMAGE, VIDEO, AUDIO}
        return {decoder._bound_deployment.name for decoder in decoders.values()}

    assert names(tiny_preset) == {"ImageDecoder", "VideoDecoder", "AudioDecoder"}
    assert names(other_preset(tiny_preset, "together", decoders_gb=1)) == {"Decoders"}


# --- the VAE ------------------------------------------------------------------------------------------


async def test_slices_do_not_change_the_picture_and_tiles_are_in_its_manifest(
    tiny_preset: Path, tmp_path: Path
) -> None:
    store = ArtefactStore(tmp_path.as_uri())
    found = {}
    for vae in ("whole", "sliced", "tiled"):
        values = {"image": {"folder": "image", "steps": 2, "vae": vae}}
        (box,) = boxes(other_preset(tiny_preset, vae, decoders=values), store).values()
        found[vae] = await made(box)

    assert pixels_or_samples(store, found["sliced"]) == pixels_or_samples(store, found["whole"])
    assert [made.manifest.get("vae") for made in found.values()] == [None, None, "tiled"]


def test_a_large_picture_goes_through_the_vae_in_tiles(tiny_preset: Path, tmp_path: Path) -> None:
    values = {"image": {"folder": "image", "vae": "tiled"}}
    (box,) = boxes(
        other_preset(tiny_preset, "large", decoders=values), ArtefactStore(tmp_path.as_uri())
    ).values()
    box.load()
    assert box.engine is not None
    vae: Any = box.engine.decoder.vae
    sizes = []
    vae.decoder.register_forward_hook(lambda module, args, out: sizes.append(tuple(args[0].shape[2:])))
    side = vae.tile_latent_min_size

    vae.decode(torch.zeros(1, 4, 2 * side, side))

    assert len(sizes) > 1
    assert max(max(size) for size in sizes) <= side


def test_a_folded_vae_cannot_be_tiled() -> None:
    preset = changed(load_preset("toybox"), {"decoders.image.vae": "tiled"})
    box = LocalDecoder(preset, IMAGE, ArtefactStore("memory://"))

    with pytest.raises(PresetProblem, match=r"PatchAutoencoderKL cannot be tiled.*Choose sliced"):
        box.load()


def test_sound_has_no_pictures_to_tile(tiny_preset: Path) -> None:
    path = other_preset(tiny_preset, "sound", decoders={"audio": {"folder": "audio", "vae": "sliced"}})
    with pytest.raises(PresetProblem, match="audio has no pictures to slice or tile; leave vae out"):
        load_preset(str(path))
