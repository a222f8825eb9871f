import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from encoders.features import Features
from encoders.imagebind import ImageBind, ImageBindConfig
from encoders.imagebind_config import AudioConfig, TextConfig, VisionConfig
from encoders.imagebind_encoder import ImageBindEncoder
from encoders.media import Audio, Image, Medium, Modality, Video
from encoders.preprocess import PreprocessConfig
from encoders.text_tokens import TextTokens

NUMBERS = PreprocessConfig(
    image_size=16,
    video_clips=2,
    video_clip_seconds=0.5,
    video_clip_frames=2,
    video_crops=1,
    audio_clips=2,
    audio_clip_seconds=0.2,
    num_mel_bins=16,
    num_mel_frames=24,
)
CAPTIONS = ["a big red bell", "two small frogs", "A rocket flies up!", "it's raining"] * 5


def made_encoder() -> ImageBindEncoder:
    torch.manual_seed(0)
    tokens = TextTokens.train(CAPTIONS, vocabulary_size=300, context_length=12)
    config = ImageBindConfig(
        out_width=8,
        vision=VisionConfig(width=16, num_blocks=1, num_heads=2, image_size=16, patch_size=8),
        text=TextConfig(
            width=16, num_blocks=1, num_heads=2, vocabulary_size=tokens.vocabulary_size, context_length=12
        ),
        audio=AudioConfig(
            width=16, num_blocks=1, num_heads=2, num_mel_bins=16, num_frames=24, patch_size=8, stride=4
        ),
    )
    return ImageBindEncoder(ImageBind(config).eval(), NUMBERS, tokens)


@pytest.fixture(scope="module")
def encoder() -> ImageBindEncoder:
    return made_encoder()


@pytest.fixture
def folder(tmp_path: Path, encoder: ImageBindEncoder) -> Path:
    encoder.save_pretrained(tmp_path, dtype=torch.float32)
    return tmp_path


def media(modality: Modality, count: int = 1) -> list[Medium]:
    rng = np.random.default_rng(7)
    if modality is Modality.IMAGE:
        return [Image(rng.integers(0, 256, (20, 30, 3), np.uint8)) for _ in range(count)]
    if modality is Modality.VIDEO:
        return [Video(rng.integers(0, 256, (8, 16, 16, 3), np.uint8), 8.0) for _ in range(count)]
    return [Audio(rng.uniform(-0.5, 0.5, 8_000).astype(np.float32), 16_000) for _ in range(count)]


GRIDS = {Modality.IMAGE: (2, 2), Modality.VIDEO: (2, 2, 2), Modality.AUDIO: (2, 3, 5)}


@pytest.mark.parametrize("modality", list(GRIDS))
def test_features_have_patches_of_all_clips_and_a_unit_mean(
    encoder: ImageBindEncoder, modality: Modality
) -> None:
    medium = media(modality)[0]
    features = encoder.encode(medium)
    assert features.modality is modality
    assert features.grid == GRIDS[modality]
    assert features.tokens.shape == (int(np.prod(features.grid)), encoder.width) == (len(features.tokens), 8)
    assert features.tokens.dtype == features.pooled.dtype == torch.float32
    assert features.pooled.norm().item() == pytest.approx(1.0, abs=1e-6)

    tower = "audio" if modality is Modality.AUDIO else "vision"
    prepared = encoder.prepare([medium])
    with torch.inference_mode():
        embedding = encoder.model({tower: prepared})[tower][0]
        tokens = encoder.model.embed_tokens({tower: prepared})[tower][0]
    torch.testing.assert_close(features.pooled, embedding / embedding.norm())
    clips = tokens if tokens.ndim == 3 else tokens[None]
    torch.testing.assert_close(features.tokens, torch.cat([clip[1:] for clip in clips]))


@pytest.mark.parametrize("modality", list(GRIDS))
def test_batch_equals_one_by_one(encoder: ImageBindEncoder, modality: Modality) -> None:
    batch = media(modality, 3)
    for together, medium in zip(encoder.encode_batch(batch), batch, strict=True):
        alone = encoder.encode(medium)
        torch.testing.assert_close(together.tokens, alone.tokens, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(together.pooled, alone.pooled, rtol=1e-5, atol=1e-6)


def test_texts_get_unit_embeddings_whatever_else_is_in_the_batch(encoder: ImageBindEncoder) -> None:
    both = encoder.embed_text(["a bell", "two small frogs and a rocket that flies up"])
    assert both.shape == (2, 8)
    torch.testing.assert_close(both.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(both[:1], encoder.embed_text(["a bell"]), rtol=1e-5, atol=1e-6)
    assert encoder.embed_text([]).shape == (0, 8)


def test_batches_of_several_or_no_modalities_are_refused(encoder: ImageBindEncoder) -> None:
    with pytest.raises(ValueError, match="holds audio, image; expected media of one modality"):
        encoder.encode_batch(media(Modality.IMAGE) + media(Modality.AUDIO))
    with pytest.raises(ValueError, match="holds nothing"):
        encoder.encode_batch([])


def test_encoder_with_fewer_towers_reads_a_fuller_file(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    for tower in ("vision", "text"):
        del values["model"][tower]
    (folder / "config.json").write_text(json.dumps(values))
    encoder = ImageBindEncoder.from_pretrained(folder)
    assert encoder.modalities == {Modality.AUDIO}
    assert encoder.encode(media(Modality.AUDIO)[0]).width == 8
    with pytest.raises(ValueError, match="cannot read image; it reads audio"):
        encoder.encode(media(Modality.IMAGE)[0])
    with pytest.raises(ValueError, match="no text tower"):
        encoder.embed_text(["a bell"])


def test_saved_encoder_loads_the_same_and_frozen(encoder: ImageBindEncoder, folder: Path) -> None:
    loaded = ImageBindEncoder.from_pretrained(folder)
    assert loaded.modalities == set(Modality)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    medium = media(Modality.IMAGE)[0]
    assert torch.equal(loaded.encode(medium).tokens, encoder.encode(medium).tokens)
    assert torch.equal(loaded.embed_text(["a bell"]), encoder.embed_text(["a bell"]))


def test_towers_that_are_left_out_are_on_the_disk_neither_as_weights_nor_as_words(
    tmp_path: Path, encoder: ImageBindEncoder
) -> None:
    encoder.save_pretrained(tmp_path, torch.float32, ["audio", "vision"])

    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    whole, written = encoder.model.state_dict(), load_file(tmp_path / "model.safetensors")
    assert written.keys() == {name for name in whole if ".text." not in name}
    assert all(torch.equal(written[name], whole[name]) for name in written)
    loaded = ImageBindEncoder.from_pretrained(tmp_path)
    assert loaded.modalities == set(Modality) - {Modality.TEXT}
    for modality in loaded.modalities:
        medium = media(modality)[0]
        assert torch.equal(loaded.encode(medium).tokens, encoder.encode(medium).tokens)


@pytest.mark.parametrize(("towers", "given"), [(["vision", "smell"], "vision, smell"), ([], "empty")])
def test_towers_that_are_not_there_cannot_be_saved(
    tmp_path: Path, encoder: ImageBindEncoder, towers: list[str], given: str
) -> None:
    with pytest.raises(ValueError, match=f"towers is {given}; choose from vision, text, audio"):
        encoder.save_pretrained(tmp_path / "some", towers=towers)
    assert not (tmp_path / "some").exists()


def test_half_precision_on_disk_is_full_precision_in_memory(
    tmp_path: Path, encoder: ImageBindEncoder
) -> None:
    encoder.save_pretrained(tmp_path)
    assert {str(v.dtype) for v in load_file(tmp_path / "model.safetensors").values()} == {"torch.float16"}
    loaded = ImageBindEncoder.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    medium = media(Modality.AUDIO)[0]
    assert loaded.encode(medium).pooled @ encoder.encode(medium).pooled > 0.999


def test_missing_files_are_named(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        ImageBindEncoder.from_pretrained(folder / "nowhere")
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            ImageBindEncoder.from_pretrained(folder)


def test_wrong_shapes_name_the_tensor_and_both_shapes(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "modality_heads.audio.2.weight"
    save_file(weights | {name: torch.zeros(9, 16)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"tensor {name} has shape \(9, 16\); expected \(8, 16\)"):
        ImageBindEncoder.from_pretrained(folder)


def test_lacking_and_foreign_tensors_are_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["modality_heads.audio.2.weight"]
    save_file(weights | {"lm_head.weight": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"lacks modality_heads\.audio\.2\.weight and has besides lm_head\.weight"
    ):
        ImageBindEncoder.from_pretrained(folder)


def test_damaged_files_are_named(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a safetensors file, or is cut off"):
        ImageBindEncoder.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(whole)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json has no entry 'model'"):
        ImageBindEncoder.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        ImageBindEncoder.from_pretrained(folder)
    (folder / "config.json").write_text('{"model": {}}')
    with pytest.raises(ValueError, match="no object 'preprocessing'"):
        ImageBindEncoder.from_pretrained(folder)


def test_parts_that_do_not_fit_are_refused(encoder: ImageBindEncoder) -> None:
    with pytest.raises(ValueError, match="image_size is 16 in the model and 64"):
        ImageBindEncoder(encoder.model, PreprocessConfig.toybox(), encoder.tokens)
    with pytest.raises(ValueError, match=r"vocabulary is \d+ in the model and None"):
        ImageBindEncoder(encoder.model, NUMBERS, None)


def test_token_rows_are_start_text_end_and_zeros() -> None:
    tokens = TextTokens.train(CAPTIONS, vocabulary_size=300, context_length=12)
    rows = tokens(["A BELL", "a bell", "", "a bell " * 30])
    assert rows.shape == (4, 12)
    assert torch.equal(rows[0], rows[1])
    assert rows[2].tolist() == [tokens.start, tokens.end] + [0] * 10
    assert rows[3, 0] == tokens.start
    assert rows[3, 11] == tokens.end == tokens.vocabulary_size - 1
    assert (rows == tokens.end).sum(dim=1).tolist() == [1, 1, 1, 1]


def test_end_token_typed_by_a_user_ends_nothing() -> None:
    tokens = TextTokens.train(CAPTIONS, vocabulary_size=300, context_length=48)
    row = tokens(["a bell <|endoftext|> <|startoftext|> a frog"])[0]
    assert (row == tokens.end).sum() == 1
    assert (row == tokens.start).sum() == 1


def test_clip_vocabulary_files_are_read(tmp_path: Path) -> None:
    vocabulary = [
        "a</w>",
        "b",
        "e",
        "l",
        "l</w>",
        "be",
        "bel",
        "bell</w>",
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nb e\nbe l\nbel l</w>\n")
    tokens = TextTokens.load(tmp_path, context_length=6)
    assert tokens(["A  bell"])[0].tolist() == [8, 0, 7, 9, 0, 0]
    tokens.save(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    assert TextTokens.load(tmp_path, context_length=6)(["A  bell"])[0].tolist() == [8, 0, 7, 9, 0, 0]


def test_tokenizer_whose_end_is_not_last_is_refused() -> None:
    tokens = TextTokens.train(CAPTIONS, vocabulary_size=300, context_length=12)
    tokens._tokenizer.add_tokens(["more"])
    with pytest.raises(ValueError, match=r"expected both, <\|endoftext\|> last"):
        TextTokens(tokens._tokenizer, 12)


def test_features_refuse_shapes_that_disagree() -> None:
    with pytest.raises(ValueError, match=r"grid \(2, 2\) has 4 cells but there are 3 tokens"):
        Features(Modality.IMAGE, torch.zeros(3, 8), torch.zeros(8), (2, 2))
    with pytest.raises(ValueError, match=r"pooled \(7,\)"):
        Features(Modality.IMAGE, torch.zeros(4, 8), torch.zeros(7), (2, 2))
