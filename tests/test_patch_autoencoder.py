from pathlib import Path

import pytest
import torch
from torch import Tensor

from decoders.patch_autoencoder import PatchAutoencoderKL


def tiny(latent_channels: int = 16) -> PatchAutoencoderKL:
    torch.manual_seed(0)
    return PatchAutoencoderKL(
        block_out_channels=(3, 12, 16, 16), num_folds=2, latent_channels=latent_channels, norm_num_groups=4
    ).eval()


def stripes(number: int) -> Tensor:
    """Pictures that vary along eight directions only, so that eight components tell all."""
    generator = torch.Generator().manual_seed(1)
    basis = torch.randn(8, 3 * 64, generator=generator)
    cells = torch.randn(number, 4, 8, generator=generator) @ basis  # (B, cells, 192)
    return torch.nn.functional.pixel_shuffle(cells.transpose(1, 2).unflatten(2, (2, 2)), 8)


def test_eight_by_eight_pixels_become_one_cell() -> None:
    model = tiny()
    latents = model.encode(torch.zeros(2, 3, 16, 24)).latent_dist.mode()
    assert latents.shape == (2, 16, 2, 3)
    assert model.decode(latents).sample.shape == (2, 3, 16, 24)


def test_pipelines_read_the_scale_factor_from_the_number_of_levels() -> None:
    assert 2 ** (len(tiny().config.block_out_channels) - 1) == 8


def test_it_starts_as_the_principal_components() -> None:
    model = tiny(latent_channels=8)
    pictures = stripes(64)
    for network in (model.encoder, model.decoder):
        torch.nn.init.zeros_(network.conv_out.weight)
    torch.nn.init.zeros_(model.quant_conv.weight)
    torch.nn.init.zeros_(model.quant_conv.bias)
    model.start_from_components(pictures)

    rebuilt = model.decode(model.encode(pictures).latent_dist.mode()).sample

    assert (rebuilt - pictures).abs().max() < 1e-3


def test_a_saved_one_loads_again_with_its_own_configuration(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    loaded = PatchAutoencoderKL.from_pretrained(tmp_path)
    assert loaded.config.block_out_channels == (3, 12, 16, 16)
    pictures = stripes(2)
    torch.testing.assert_close(
        loaded.encode(pictures).latent_dist.mode(), model.encode(pictures).latent_dist.mode()
    )


def test_levels_that_do_not_begin_with_the_folds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must start with \(3, 12\)"):
        PatchAutoencoderKL(block_out_channels=(16, 16, 16, 16))


def test_levelling_its_channels_changes_nothing_that_comes_out() -> None:
    model, pictures = tiny(latent_channels=8), stripes(64)
    with torch.no_grad():
        model.linear_in.weight.mul_(torch.arange(1.0, 9).view(8, 1, 1, 1))
        model.linear_in.bias.add_(torch.arange(8.0))  # means to be taken away
        before = model.encode(pictures).latent_dist
        rebuilt = model.decode(before.mode()).sample

        model.level_channels(before.mode())

        after = model.encode(pictures).latent_dist
        again = model.decode(after.mode()).sample
    spread = before.mode().std((0, 2, 3))
    assert spread.max() > 2 * spread.min()
    torch.testing.assert_close(again, rebuilt, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after.mode().mean((0, 2, 3)), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(after.mode().std((0, 2, 3)), spread.sqrt())
    torch.testing.assert_close(after.std / before.std, spread.rsqrt().view(1, -1, 1, 1).expand(64, 8, 2, 2))
