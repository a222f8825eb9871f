"""ImageBind's release becomes a folder that the encoder loads, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from encoders.imagebind_encoder import ImageBindEncoder
from encoders.media import Image, Modality, Video
from services.convert import convert_imagebind
from tests.imagebind_files import imagebind_file, tiny_preprocessing
from tests.test_imagebind import TINY

IMAGE, VIDEO, AUDIO = Modality.IMAGE, Modality.VIDEO, Modality.AUDIO


def test_imagebind_keeps_the_towers_that_are_asked_for(tmp_path: Path) -> None:
    state = imagebind_file(tmp_path / "imagebind_huge.pth")
    sizes: Any = {"release": TINY, "preprocessing": tiny_preprocessing()}

    record = convert_imagebind(tmp_path / "imagebind_huge.pth", tmp_path / "w", **sizes)

    encoder = ImageBindEncoder.from_pretrained(tmp_path / "w" / "encoder")
    assert encoder.modalities == {IMAGE, VIDEO, AUDIO}
    kept = [name for name in state if name.split(".")[1] in ("vision", "audio")]
    assert record["tensors"] == {
        "kept": len(kept),
        "left out with their towers": len(state) - len(kept),
    }
    for name, value in encoder.model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert record["files"].keys() == {"config.json", "model.safetensors"}


def test_imagebind_stands_for_a_video_by_the_plain_mean_of_its_clips(tmp_path: Path) -> None:
    imagebind_file(tmp_path / "i.pth")
    sizes: Any = {"release": TINY, "preprocessing": tiny_preprocessing()}
    convert_imagebind(tmp_path / "i.pth", tmp_path / "w", dtype=torch.float32, **sizes)
    encoder = ImageBindEncoder.from_pretrained(tmp_path / "w" / "encoder")
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (8, 16, 16, 3), generator=generator, dtype=torch.uint8).numpy()
    video = Video(frames, 8.0)

    pooled = encoder.encode(video).pooled

    with torch.inference_mode():
        expected = encoder.model({"vision": encoder.prepare([video])})["vision"][0]
    torch.testing.assert_close(pooled, expected)
    assert pooled.norm() < 0.999
    assert encoder.encode(Image(frames[0])).pooled.norm().item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "options", "complaint"),
    [
        ({"extra.weight": torch.zeros(1)}, {}, r"holds extra.weight, which this layout has no place for"),
        ({"modality_heads.imu.3.weight": None}, {}, r"lacks modality_heads.imu.3.weight of its ImageBind"),
        (
            {"modality_heads.imu.3.weight": torch.zeros(2, 2)},
            {},
            r"modality_heads.imu.3.weight has shape \(2, 2\); expected \(12, 8\)",
        ),
        ({}, {"towers": ("vision", "smell")}, r"towers is vision, smell; choose from vision, text, audio"),
        (
            {"modality_heads.imu.3.weight": torch.full((12, 8), torch.inf)},
            {},
            r"modality_heads.imu.3.weight holds values that are not finite",
        ),
        (
            {"modality_heads.audio.0.weight": torch.full((12,), 70_000.0)},
            {"dtype": torch.float16},
            r"modality_heads.audio.0.weight holds 70000, which float16 cannot hold\. Choose bfloat16 or",
        ),
        ({}, {"towers": ("text",)}, r"needs CLIP's vocabulary"),
        ({}, {"towers": ("text",), "tokenizer": Path("nowhere")}, r"nowhere has no tokenizer: expected"),
    ],
)
def test_an_imagebind_that_does_not_fit_is_refused(
    tmp_path: Path, change: dict[str, Tensor | None], options: dict[str, Any], complaint: str
) -> None:
    state = {**imagebind_file(tmp_path / "i.pth"), **change}
    torch.save({name: v for name, v in state.items() if v is not None}, tmp_path / "i.pth")

    with pytest.raises(ValueError, match=complaint):
        convert_imagebind(tmp_path / "i.pth", tmp_path / "w", release=TINY, **options)
    assert not (tmp_path / "w" / "encoder").exists()


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"tokenizer.json": "{"}, r"tokenizer.json is not JSON: .* Copy it again"),
        ({"tokenizer.json": '{"model": 3}'}, r"tokenizer.json is no tokenizer: .* Copy it again"),
        (
            {"vocab.json": "[1]", "merges.txt": "a b c"},
            r"vocab.json and merges.txt in .* are no tokenizer: .*",
        ),
    ],
)
def test_a_vocabulary_that_is_damaged_is_named(tmp_path: Path, files: dict[str, str], complaint: str) -> None:
    imagebind_file(tmp_path / "i.pth")
    for name, content in files.items():
        (tmp_path / name).write_text(content)

    with pytest.raises(ValueError, match=complaint):
        convert_imagebind(tmp_path / "i.pth", tmp_path / "w", ("text",), tmp_path, release=TINY)
