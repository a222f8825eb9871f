from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet3DConditionModel

from alignment.embedded.inflation import inflate

COMMON: dict[str, Any] = {
    "sample_size": 4, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "cross_attention_dim": 8,
    "norm_num_groups": 2,
}  # fmt: skip


def pictures_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16), attention_head_dim=2, **COMMON,
    )  # fmt: skip


def videos_unet(inner: int, head_width: int) -> UNet3DConditionModel:
    torch.manual_seed(1)
    return UNet3DConditionModel(
        down_block_types=("DownBlock3D", "CrossAttnDownBlock3D"),
        up_block_types=("CrossAttnUpBlock3D", "UpBlock3D"),
        block_out_channels=(8, inner), attention_head_dim=head_width, **COMMON,
    )  # fmt: skip


@torch.no_grad()
def test_frames_are_at_first_the_pictures_of_the_other_network() -> None:
    pictures, videos = pictures_unet().eval(), videos_unet(16, 8).eval()
    inflate(pictures, videos)
    clips, states = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 5, 8)
    steps = torch.tensor([300, 700])

    made = videos(clips, steps, states).sample
    for frame in range(3):
        one = pictures(clips[:, :, frame], steps, states).sample
        torch.testing.assert_close(made[:, :, frame], one, atol=1e-5, rtol=0)


def test_a_narrower_network_keeps_the_first_channels_of_every_eight() -> None:
    pictures, videos = pictures_unet(), videos_unet(12, 6)
    inflate(pictures, videos)
    kept = [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]

    whole = pictures.get_parameter("mid_block.resnets.0.conv1.weight")
    part = videos.get_parameter("mid_block.resnets.0.conv1.weight")
    torch.testing.assert_close(part, whole[kept][:, kept])
    # The skip connection of the outer level comes after the inner level's channels, and is kept whole.
    whole = pictures.get_parameter("up_blocks.1.resnets.0.conv1.weight")
    part = videos.get_parameter("up_blocks.1.resnets.0.conv1.weight")
    torch.testing.assert_close(part, whole[:, kept + list(range(16, 24))])
    assert videos(torch.randn(1, 4, 2, 4, 4), 5, torch.randn(1, 5, 8)).sample.shape == (1, 4, 2, 4, 4)


def test_a_wider_network_cannot_be_born_from_a_narrower_one() -> None:
    with pytest.raises(ValueError, match="32 channels wide and that of the pictures 16"):
        inflate(pictures_unet(), videos_unet(32, 8))
