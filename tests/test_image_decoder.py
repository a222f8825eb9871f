import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from decoders.condition import Condition, ConditionSpec
from decoders.denoising import Cancelled, denoise, draw_noise, make_scheduler
from decoders.image import ImageDecoder
from decoders.settings import SCHEDULER_NAMES, DecodeSettings
from encoders.media import Audio, Image
from tests import tiny_pipelines

CAPTION = "a big red bell"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.saved(tiny_pipelines.image_pipeline(), tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="module")
def decoder(folder: Path) -> ImageDecoder:
    return ImageDecoder.load(folder)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.mark.parametrize("name", SCHEDULER_NAMES)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_latents_equal_those_of_the_diffusers_pipeline(
    decoder: ImageDecoder, pipeline: StableDiffusionPipeline, name: str, guidance: float
) -> None:
    pipeline.scheduler = make_scheduler(pipeline.scheduler.config, name)
    expected = pipeline(
        CAPTION,
        num_inference_steps=7,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
    ).images

    latents = denoise(
        decoder._predict,
        make_scheduler(pipeline.scheduler.config, name),
        draw_noise((4, 8, 8), [5]),
        decoder.encode_caption(CAPTION).embeddings[None],
        decoder._null,
        steps=7,
        guidance=[guidance],
    )

    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", SCHEDULER_NAMES)
def test_runs_that_overlap_have_schedulers_of_their_own(decoder: ImageDecoder, name: str) -> None:
    condition = decoder.encode_caption(CAPTION)
    plans = [decoder.plan(condition, DecodeSettings(seed=i, steps=4, scheduler=name)) for i in range(2)]
    expected = [decoder.decode(condition, plan.settings).medium for plan in plans]

    first = decoder.begin(plans[:1])
    decoder.step([first])
    decoder.step([first])
    second = decoder.begin(plans[1:])
    for run in (second, first, second, first, second, second):
        decoder.step([run])

    for plan, run, medium in zip(plans, (first, second), expected, strict=True):
        assert isinstance(medium, Image)
        made = decoder.complete(run.latents, [plan])[0].medium
        assert isinstance(made, Image)
        np.testing.assert_array_equal(made.pixels, medium.pixels)


def test_pixels_equal_those_of_the_diffusers_pipeline(
    decoder: ImageDecoder, pipeline: StableDiffusionPipeline
) -> None:
    pipeline.scheduler = make_scheduler(pipeline.scheduler.config, "dpmsolver++")
    expected = pipeline(
        CAPTION, num_inference_steps=6, guidance_scale=3.0, generator=torch.Generator().manual_seed(5)
    ).images[0]

    settings = DecodeSettings(seed=5, steps=6, guidance_scale=3.0)
    decoded = decoder.decode(decoder.encode_caption(CAPTION), settings)

    assert isinstance(decoded.medium, Image)
    np.testing.assert_array_equal(decoded.medium.pixels, np.asarray(expected))


@pytest.mark.parametrize("name", SCHEDULER_NAMES)
def test_a_start_from_a_source_equals_the_image_to_image_pipeline(
    decoder: ImageDecoder, pipeline: StableDiffusionPipeline, name: str
) -> None:
    editing = StableDiffusionImg2ImgPipeline(
        **pipeline.components, requires_safety_checker=False
    )  # takes (1, 4, h, w) for latents
    editing.set_progress_bar_config(disable=True)
    editing.scheduler = make_scheduler(pipeline.scheduler.config, name)
    source = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = editing(
        CAPTION,
        image=source,
        strength=0.6,
        num_inference_steps=10,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
    ).images

    latents = denoise(
        decoder._predict,
        make_scheduler(pipeline.scheduler.config, name),
        draw_noise((4, 8, 8), [5]),
        decoder.encode_caption(CAPTION).embeddings[None],
        decoder._null,
        steps=10,
        guidance=[3.0],
        source=source,
        strength=0.6,
    )

    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=0)


def test_captions_are_encoded_as_the_pipeline_does(
    decoder: ImageDecoder, pipeline: StableDiffusionPipeline
) -> None:
    wanted, unwanted = pipeline.encode_prompt(CAPTION, "cpu", 1, True)

    assert decoder.condition_spec == ConditionSpec(tokens=8, width=16, pooled=False)
    torch.testing.assert_close(decoder.encode_caption(CAPTION).embeddings, wanted[0])
    torch.testing.assert_close(decoder._null, unwanted[0])


def test_a_captions_end_is_cut_off_like_in_the_pipeline(decoder: ImageDecoder) -> None:
    long = " ".join(["red"] * 50)

    shorter = decoder.encode_caption(" ".join(["red"] * 6))

    torch.testing.assert_close(decoder.encode_caption(long).embeddings, shorter.embeddings)


def test_the_same_seed_gives_the_same_picture_and_another_seed_another(decoder: ImageDecoder) -> None:
    condition = decoder.encode_caption(CAPTION)

    one = decoder.decode(condition, DecodeSettings(seed=1, steps=3)).medium
    again = decoder.decode(condition, DecodeSettings(seed=1, steps=3)).medium
    other = decoder.decode(condition, DecodeSettings(seed=2, steps=3)).medium

    np.testing.assert_array_equal(one.pixels, again.pixels)
    assert (one.pixels != other.pixels).any()


def test_the_manifest_suffices_to_make_the_picture_again(decoder: ImageDecoder) -> None:
    condition = decoder.encode_caption(CAPTION)
    first = decoder.decode(condition, DecodeSettings(steps=3))
    kept = json.loads(json.dumps(first.manifest))

    names = ("seed", "scheduler", "steps", "guidance_scale", "width_px", "height_px")
    again = decoder.decode(condition, DecodeSettings(**{name: kept[name] for name in names}))

    np.testing.assert_array_equal(first.medium.pixels, again.medium.pixels)
    assert again.manifest == kept
    assert kept["pipeline"] == "StableDiffusionPipeline"
    assert kept["scheduler"] == "dpmsolver++"
    assert kept["guidance_scale"] == 7.5
    assert kept["weights"] == decoder.digest


def test_a_batch_equals_single_runs_each_with_its_own_seed_and_guidance(decoder: ImageDecoder) -> None:
    conditions = [decoder.encode_caption(text) for text in (CAPTION, "a small blue drum", "bell")]
    settings = [DecodeSettings(seed=i, steps=4, guidance_scale=g) for i, g in enumerate((0.5, 3.0, 8.0))]

    batch = decoder.decode_batch(conditions, settings)

    for condition, wish, decoded in zip(conditions, settings, batch, strict=True):
        single = decoder.decode(condition, wish)
        assert single.manifest == decoded.manifest
        difference = single.medium.pixels.astype(int) - decoded.medium.pixels
        assert np.abs(difference).max() <= 1


def test_a_batch_with_different_steps_is_refused(decoder: ImageDecoder) -> None:
    conditions = [decoder.encode_caption(CAPTION)] * 2

    with pytest.raises(ValueError, match="differ in steps, scheduler, size or LoRA"):
        decoder.decode_batch(conditions, [DecodeSettings(steps=2), DecodeSettings(steps=3)])


def test_progress_counts_every_step(decoder: ImageDecoder) -> None:
    seen: list[tuple[int, int]] = []

    decoder.decode(
        decoder.encode_caption(CAPTION),
        DecodeSettings(steps=3),
        lambda done, total: seen.append((done, total)),
    )

    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("stop_after", [0, 2, 5])
def test_a_stop_takes_effect_before_the_next_step(decoder: ImageDecoder, stop_after: int) -> None:
    stop = threading.Event()
    seen: list[int] = []

    def on_step(done: int, total: int) -> None:
        seen.append(done)
        if done == stop_after:
            stop.set()

    if stop_after == 0:
        stop.set()
    with pytest.raises(Cancelled):
        decoder.decode(decoder.encode_caption(CAPTION), DecodeSettings(steps=5), on_step, stop)
    assert len(seen) == stop_after


def test_other_sizes_can_be_asked_for(decoder: ImageDecoder) -> None:
    decoded = decoder.decode(
        decoder.encode_caption(CAPTION), DecodeSettings(steps=1, width_px=24, height_px=8)
    )

    assert decoded.medium.pixels.shape == (8, 24, 3)
    assert decoded.manifest["width_px"] == 24


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (DecodeSettings(width_px=25), "width_px is 25; this decoder makes multiples of 2. Ask for 24."),
        (DecodeSettings(duration_s=1.0), "this decoder has no duration_s"),
        (DecodeSettings(num_frames=4), "this decoder has no num_frames"),
    ],
)
def test_sizes_that_cannot_be_made_are_named(
    decoder: ImageDecoder, settings: DecodeSettings, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        decoder.decode(decoder.encode_caption(CAPTION), settings)


def test_a_condition_of_another_decoder_is_refused(decoder: ImageDecoder) -> None:
    with pytest.raises(ValueError, match=r"shape \(77, 16\); this decoder expects \(8, 16\)"):
        decoder.decode(Condition(torch.zeros(77, 16)))
    with pytest.raises(ValueError, match="NaN"):
        decoder.decode(Condition(torch.full((8, 16), torch.nan)))


def test_a_weak_edit_stays_nearer_to_the_source_than_a_strong_one(decoder: ImageDecoder) -> None:
    condition = decoder.encode_caption(CAPTION)
    made = decoder.decode(condition, DecodeSettings(seed=3, steps=4)).medium
    source = decoder.encode_source(made)
    settings = DecodeSettings(seed=4, steps=10, guidance_scale=1.0)

    weak = decoder.decode(condition, replace(settings, strength=0.1), source=source)
    strong = decoder.decode(condition, replace(settings, strength=1.0), source=source)
    unchanged = decoder._media(source[None], [settings])[0]

    def distance(image: Image) -> float:
        return float(np.abs(image.pixels.astype(int) - unchanged.pixels).mean())

    assert source.shape == (4, 8, 8)
    assert distance(weak.medium) < distance(strong.medium)
    assert weak.manifest["strength"] == 0.1
    assert len(weak.manifest["source"]) == 16


def test_a_source_is_resized_to_what_the_decoder_makes(decoder: ImageDecoder) -> None:
    source = decoder.encode_source(Image(np.zeros((30, 50, 3), np.uint8)))

    assert source.shape == (4, 8, 8)


def test_sources_that_do_not_fit_are_refused(decoder: ImageDecoder) -> None:
    condition = decoder.encode_caption(CAPTION)

    with pytest.raises(ValueError, match="The source is audio; this decoder starts from image only"):
        decoder.encode_source(Audio(np.zeros(100, np.float32), 16000))
    with pytest.raises(ValueError, match=r"source latents have shape \(4, 4, 4\)"):
        decoder.decode(condition, source=torch.zeros(4, 4, 4))
    for strength in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="strength is"):
            DecodeSettings(strength=strength)


def test_an_edit_gets_the_pixels_of_its_original_where_they_agree(decoder: ImageDecoder) -> None:
    """Alone and beside others; an original with nothing in common changes nothing."""
    condition, settings = decoder.encode_caption(CAPTION), DecodeSettings(seed=4, steps=4)
    anew = decoder.decode(condition, settings)
    assert isinstance(anew.medium, Image)
    alike, dark = anew.medium.pixels.copy(), np.zeros_like(anew.medium.pixels)
    alike[:8] ^= 1  # one of 255, as far as nobody sees
    originals = [Image(alike), None, Image(dark)]

    alone = decoder.decode(condition, settings, original=originals[0])
    together = decoder.decode_batch([condition] * 3, [settings] * 3, originals=originals)
    unwanted = replace(settings, keep_untouched=False)

    np.testing.assert_array_equal(alone.medium.pixels, alike)
    for made, expected in zip(together, (alike, anew.medium.pixels, anew.medium.pixels), strict=True):
        assert isinstance(made.medium, Image)
        assert np.abs(made.medium.pixels.astype(int) - expected).max() <= 1  # batches round differently
    assert alone.manifest == anew.manifest | {"original": together[0].manifest["original"]}
    assert together[2].manifest["original"] != together[0].manifest["original"]
    refused = decoder.decode(condition, unwanted, original=originals[0])
    np.testing.assert_array_equal(refused.medium.pixels, anew.medium.pixels)
    assert refused.manifest == anew.manifest


def test_a_condition_that_asks_for_a_copy_gets_its_original_if_anything_of_it_is_to_be_kept(
    decoder: ImageDecoder,
) -> None:
    asked = replace(decoder.encode_caption(CAPTION), copied=True)
    settings = DecodeSettings(seed=4, steps=2)
    anew = decoder.decode(asked, settings)
    noise = np.random.default_rng(0).integers(0, 256, anew.medium.pixels.shape, dtype=np.uint8)

    copied = decoder.decode(asked, settings, original=Image(noise))
    unwanted = decoder.decode(asked, replace(settings, keep_untouched=False), original=Image(noise))

    np.testing.assert_array_equal(copied.medium.pixels, noise)
    assert copied.manifest["copied"] is True
    np.testing.assert_array_equal(unwanted.medium.pixels, anew.medium.pixels)
    assert not {"copied"} & (unwanted.manifest.keys() | anew.manifest.keys())


def test_an_original_is_fitted_to_what_the_decoder_makes(decoder: ImageDecoder) -> None:
    condition, original = decoder.encode_caption(CAPTION), Image(np.zeros((30, 50, 3), np.uint8))

    plan = decoder.plan(condition, DecodeSettings(width_px=32), original=original)

    assert plan.original is not None
    assert decoder.decode(condition, DecodeSettings(width_px=32)).medium.pixels.shape == (16, 32, 3)
    assert plan.original.pixels.shape == (16, 32, 3)


def test_originals_that_are_not_there_or_do_not_fit_are_refused(decoder: ImageDecoder) -> None:
    condition = decoder.encode_caption(CAPTION)
    with pytest.raises(ValueError, match="keep_untouched is true, and there is no original"):
        decoder.decode(condition, DecodeSettings(keep_untouched=True))
    with pytest.raises(ValueError, match="The source is audio; this decoder starts from image only"):
        decoder.decode(condition, original=Audio(np.zeros(100, np.float32), 16000))


def test_defaults_come_from_the_folder(copy: Path) -> None:
    (copy / "patchbay.json").write_text('{"steps": 2, "guidance_scale": 2.5, "scheduler": "euler"}')
    decoder = ImageDecoder.load(copy)

    manifest = decoder.decode(decoder.encode_caption(CAPTION)).manifest

    assert (manifest["steps"], manifest["guidance_scale"], manifest["scheduler"]) == (2, 2.5, "euler")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ('{"step": 2}', "expected an object with keys"),
        ('{"steps": 0}', "steps is 0"),
    ],
)
def test_wrong_defaults_in_the_folder_are_named(copy: Path, text: str, message: str) -> None:
    (copy / "patchbay.json").write_text(text)

    with pytest.raises(ValueError, match=message):
        ImageDecoder.load(copy)


def test_with_a_stored_null_the_text_encoder_is_not_needed(decoder: ImageDecoder, copy: Path) -> None:
    ImageDecoder.load(copy).save_null()
    shutil.rmtree(copy / "text_encoder")
    shutil.rmtree(copy / "tokenizer")

    light = ImageDecoder.load(copy)

    condition, settings = decoder.encode_caption(CAPTION), DecodeSettings(seed=1, steps=2)
    expected = decoder.decode(condition, settings).medium.pixels
    np.testing.assert_array_equal(light.decode(condition, settings).medium.pixels, expected)


def test_a_stored_null_of_another_text_encoder_is_refused(copy: Path) -> None:
    ImageDecoder.load(copy).save_null()
    weights = copy / "text_encoder" / "model.safetensors"
    save_file({name: value * 2 for name, value in load_file(weights).items()}, weights, {"format": "pt"})

    with pytest.raises(ValueError, match="made by another text encoder"):
        ImageDecoder.load(copy)


def test_half_precision_weights_run_in_single_precision(copy: Path) -> None:
    for weights in copy.rglob("*.safetensors"):
        halves = {
            name: value.half() for name, value in load_file(weights).items() if value.is_floating_point()
        }
        save_file(load_file(weights) | halves, weights, {"format": "pt"})

    decoder = ImageDecoder.load(copy)

    assert {parameter.dtype for parameter in decoder.unet.parameters()} == {torch.float32}
    assert decoder.encode_caption(CAPTION).embeddings.dtype == torch.float32
    assert decoder.decode(decoder.encode_caption(CAPTION), DecodeSettings(steps=1)).medium.pixels.any()


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer_config.json",
        "scheduler/scheduler_config.json",
    ],
)
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()

    with pytest.raises(FileNotFoundError, match=name.split("/")[0]):
        ImageDecoder.load(copy)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        ImageDecoder.load(tmp_path / "nowhere")


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_weights_of_another_shape_are_named(copy: Path, part: str) -> None:
    weights = copy / part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("conv_in.weight"))
    save_file(tensors | {name: torch.zeros(3, 3)}, weights, {"format": "pt"})

    with pytest.raises(
        ValueError, match=rf"{part} cannot be loaded as \w+: {name} has shape \(3, 3\); expected \(\d+, "
    ) as refused:
        ImageDecoder.load(copy)
    assert str(refused.value).endswith("The weights and the config.json belong to different models.")


def test_a_text_encoder_of_another_shape_is_named(copy: Path) -> None:
    weights = copy / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("token_embedding.weight"))
    save_file(tensors | {name: torch.zeros(3, 3)}, weights, {"format": "pt"})

    with pytest.raises(
        ValueError, match=rf"cannot be loaded as CLIPTextModel: {name} has shape \(3, 3\); exp"
    ):
        ImageDecoder.load(copy)


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model", "text_encoder/model"])
def test_weights_with_a_tensor_missing_are_named(copy: Path, part: str) -> None:
    weights = copy / f"{part}.safetensors"
    tensors = load_file(weights)
    name = sorted(tensors)[-1]
    del tensors[name]
    save_file(tensors, weights, {"format": "pt"})

    with pytest.raises(ValueError, match="lack 1 tensors"):
        ImageDecoder.load(copy)


def test_damaged_weights_are_named(copy: Path) -> None:
    (copy / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"not weights at all")

    with pytest.raises(ValueError, match="vae cannot be loaded"):
        ImageDecoder.load(copy)


def test_pickled_weights_are_never_read(copy: Path) -> None:
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()

    with pytest.raises(FileNotFoundError, match=r"holds no \.safetensors file"):
        ImageDecoder.load(copy)


def test_a_folder_of_another_pipeline_is_refused(copy: Path) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": "AudioLDMPipeline"}))

    with pytest.raises(ValueError, match="holds a AudioLDMPipeline; expected StableDiffusionPipeline"):
        ImageDecoder.load(copy)
