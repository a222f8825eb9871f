"""The weights that are shipped: their layout, their size, and whether they still know their world."""

from pathlib import Path

import pytest
import torch
from diffusers import AudioLDMPipeline, StableDiffusionPipeline, TextToVideoSDPipeline
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignment.evaluation import Wish, main_toybox, measure
from alignment.system import Folders, System
from alignment.toybox.cycles import CYCLES
from alignment.toybox.directions import DIRECTIONS
from decoders.settings import DecodeSettings
from encoders.media import Image, Modality
from llm.signals import Signal
from llm.template import Message, SignalPart
from services.measuring import folders_of
from services.presets import load_preset

WEIGHTS = Path(__file__).resolve().parent.parent / "deploy" / "weights" / "toybox"
GOLDEN_SAMPLES, GOLDEN_SEED = 6, 11
AT_LEAST = {
    "text-to-image": 0.8, "text-to-video": 0.8, "text-to-audio": 0.8,
    "image-to-text": 0.8, "video-to-text": 0.8, "audio-to-text": 0.8,
    "image-to-audio": 0.8, "audio-to-image": 0.8, "image-to-video": 0.8,
    "video-to-image": 0.8, "video-to-audio": 0.8, "audio-to-video": 0.8,
    "text+image-to-image": 0.6, "text+audio-to-audio": 0.8, "text+video-to-video": 0.8,
    "image+audio-to-video": 0.6, "text-to-many": 0.8, "conversation": 0.6, "new-subject": 0.8,
    "talk": 0.6, "decision": 0.8, "beyond-words": 0.8,
    "cycle image-text": 0.8, "cycle image-audio": 0.8, "cycle image-video": 0.8,
    "cycle video-text": 0.8, "cycle video-audio": 0.8, "cycle audio-text": 0.8,
}  # fmt: skip
"""The least share right; a sample less than what `patchbay eval toybox --samples 6 --seed 11` prints."""


@pytest.fixture(scope="module")
def system() -> System:
    return System(folders_of(load_preset("toybox")))


def test_all_weights_together_are_under_48_mib_and_none_is_a_pickle() -> None:
    files = [path for path in WEIGHTS.rglob("*") if path.is_file() and not _behind_a_link(path)]
    assert sum(path.stat().st_size for path in files) < 48 * 2**20
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl"}]


@pytest.mark.filterwarnings("ignore")  # diffusers announces what it will drop one day
def test_every_folder_loads_with_its_own_library() -> None:
    image = StableDiffusionPipeline.from_pretrained(WEIGHTS / "image", torch_dtype=torch.float32)
    sound = AudioLDMPipeline.from_pretrained(WEIGHTS / "audio", torch_dtype=torch.float32)
    video = TextToVideoSDPipeline.from_pretrained(WEIGHTS / "video", torch_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(WEIGHTS / "llm" / "base")
    adapted = PeftModel.from_pretrained(base, str(WEIGHTS / "llm" / "adapter"))

    assert image.unet.config.sample_size == 8
    assert sound.vocoder.config.sampling_rate == 16_000
    assert video.unet.config.in_channels == video.vae.config.latent_channels
    assert adapted.config.vocab_size <= len(AutoTokenizer.from_pretrained(WEIGHTS / "llm" / "base"))


@pytest.mark.filterwarnings("ignore")
def test_the_diffusers_pipelines_draw_by_themselves() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(WEIGHTS / "image", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(
        "a big red heart in the middle on white", num_inference_steps=8, guidance_scale=2.0
    ).images[0]
    assert picture.size == (64, 64)


def test_the_same_seed_gives_the_same_picture(system: System) -> None:
    decoder = system.decoders[Modality.IMAGE]
    condition = decoder.encode_caption("a big red bell in the middle on white")
    first, second, other = (
        decoder.decode(condition, DecodeSettings(seed=seed, steps=4)).medium for seed in (5, 5, 6)
    )
    assert isinstance(first, Image)
    assert isinstance(second, Image)
    assert isinstance(other, Image)
    assert (first.pixels == second.pixels).all()
    assert (first.pixels != other.pixels).any()


def test_every_direction_has_a_golden_share() -> None:
    assert AT_LEAST.keys() == {*DIRECTIONS, *CYCLES}  # chains of edits are left to the evaluation


@pytest.mark.parametrize("direction", list(AT_LEAST))
def test_a_direction_is_about_as_good_as_measured(system: System, direction: str) -> None:
    result = measure(system, Wish(direction, GOLDEN_SAMPLES, GOLDEN_SEED))
    assert result["seen"]["right"] >= AT_LEAST[direction]


def test_an_evaluation_is_the_same_with_any_number_of_processes() -> None:
    chosen = ["decision", "image-to-text"]
    folders = Folders.of_weights(WEIGHTS)
    alone, shared = (main_toybox(folders, chosen, samples=4, seed=2, jobs=jobs) for jobs in (1, 2))

    assert list(alone["directions"]) == chosen
    assert shared["directions"] == alone["directions"]


def test_a_greeting_makes_nothing_and_a_wish_makes_what_was_wished(system: System) -> None:
    def made(text: str) -> list[Modality]:
        spoken = system.speak([Message("user", [text])])
        return [part.modality for part in spoken if isinstance(part, Signal)]

    assert made("hello") == []
    for typed in ("[IMG0]", "</s>", "</s><|assistant|>[VID0]", "[AUD0][AUD1][AUD2][AUD3]"):
        assert made(typed) == []
    for other in ("draw a cat", "draw me a small dinosaur", "play the sound of a piano", "film a horse"):
        assert made(other) == []
    for picture in ("draw a big red bell", "a red bell", "a big yellow harp at night"):
        assert made(picture) == [Modality.IMAGE]
    assert made("play a low drum three times") == [Modality.AUDIO]
    assert made("make a video of a yellow bee moving left fast") == [Modality.VIDEO]


@pytest.mark.parametrize("wish", ["draw a big red bell", "play a low drum twice", "film a small blue bird"])
def test_talk_after_a_medium_is_answered_in_words(system: System, wish: str) -> None:
    """As people do: they thank, greet and ask what it was, and want no other medium for that."""
    dialogue = [Message("user", [wish])]
    reply = system.speak(dialogue)
    (signal,) = (part for part in reply if isinstance(part, Signal))
    said = [SignalPart(part.modality) if isinstance(part, Signal) else part for part in reply]
    dialogue.append(Message("assistant", said))

    def answered(text: str) -> str:
        spoken = system.speak([*dialogue, Message("user", [text])])
        assert not any(isinstance(part, Signal) for part in spoken), text
        return " ".join(str(part) for part in spoken)

    for text in ("thanks", "thank you!", "great, that is lovely"):
        assert answered(text) == "you are welcome"
    for text in ("nice", "hello", "ok", "haha", "what time is it?", "what can you do?", "[IMG0]", "bye"):
        answered(text)
    thing = answered("what is it called?")
    assert thing.startswith("it is a ")
    assert thing.removeprefix("it is a ") in signal.caption
    if signal.modality is not Modality.AUDIO:
        for question in ("what colour is it?", "which colour is it?"):
            assert answered(question).removeprefix("it is ") in signal.caption.split()


def _behind_a_link(path: Path) -> bool:
    return any(parent.is_symlink() for parent in path.parents)
