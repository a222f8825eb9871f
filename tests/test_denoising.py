import threading

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from decoders.denoising import Cancelled, denoise, draw_noise, make_scheduler
from decoders.settings import SCHEDULER_NAMES
from tests.tiny_pipelines import scheduler as saved_scheduler

CENTRES = torch.tensor([[3.0, -1.0, 0.5, 2.0], [-2.0, 2.0, 1.0, -1.0], [0.0, 1.0, -3.0, 0.0]])
SPREAD = 0.1


def exact_v(latents: Tensor, timesteps: Tensor, zero_terminal_snr: bool) -> Tensor:
    """Velocity of the best possible denoiser for a mixture of Gaussians at CENTRES."""
    signal = saved_scheduler(rescale_betas_zero_snr=zero_terminal_snr).alphas_cumprod[timesteps.long()]
    a, s = signal.sqrt()[:, None], (1 - signal).sqrt()[:, None]  # (B, 1)
    variance = a**2 * SPREAD**2 + s**2
    offsets = latents[:, None] - a[..., None] * CENTRES  # (B, 3, 4)
    weights = (-(offsets**2).sum(-1) / (2 * variance)).softmax(-1)  # (B, 3)
    means = CENTRES + (a * SPREAD**2 / variance)[..., None] * offsets
    clean = (weights[..., None] * means).sum(1)
    return a * (latents - a * clean) / s - s * clean


@pytest.mark.parametrize("name", SCHEDULER_NAMES)
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_twelve_trailing_steps_land_on_the_data(name: str, zero_terminal_snr: bool) -> None:
    config = saved_scheduler(rescale_betas_zero_snr=zero_terminal_snr).config
    count = 300

    clean = denoise(
        lambda latents, timesteps, _: exact_v(latents, timesteps, zero_terminal_snr),
        make_scheduler(config, name),
        draw_noise((4,), list(range(count))),
        torch.zeros(count, 1),
        torch.zeros(1),
        steps=12,
        guidance=[1.0] * count,
    )

    distance, nearest = torch.cdist(clean, CENTRES).min(1)
    assert distance.median() < 2 * SPREAD
    shares = torch.bincount(nearest, minlength=3) / count
    assert shares.min() > 0.2


def test_noise_is_what_diffusers_draws_for_the_seed() -> None:
    expected = randn_tensor((1, 4, 8, 8), generator=torch.Generator("cpu").manual_seed(9))

    torch.testing.assert_close(draw_noise((4, 8, 8), [9]), expected, rtol=0, atol=0)


def test_noise_of_a_row_depends_on_its_own_seed_only() -> None:
    torch.testing.assert_close(draw_noise((3,), [1, 2])[1:], draw_noise((3,), [2]), rtol=0, atol=0)


def run(guidance: list[float]) -> tuple[Tensor, list[int]]:
    """Denoise with a network that predicts its condition; return results and the batch sizes it saw."""
    sizes: list[int] = []

    def predict(latents: Tensor, timesteps: Tensor, conditions: Tensor) -> Tensor:
        sizes.append(len(latents))
        return conditions.expand_as(latents).clone()

    count = len(guidance)
    latents = denoise(
        predict,
        make_scheduler(saved_scheduler(prediction_type="sample").config, "ddim"),
        draw_noise((5,), list(range(count))),
        torch.full((count, 1), 2.0),
        torch.tensor([1.0]),
        steps=2,
        guidance=guidance,
    )
    return latents, sizes


def test_guidance_moves_away_from_the_null_in_each_row_by_its_own_scale() -> None:
    latents, sizes = run([1.0, 3.0, 0.0])

    torch.testing.assert_close(latents[:, 0], torch.tensor([2.0, 4.0, 2.0]))
    assert sizes == [4, 4]


def test_without_guidance_the_null_is_not_computed() -> None:
    latents, sizes = run([1.0, 0.5])

    torch.testing.assert_close(latents[:, 0], torch.tensor([2.0, 2.0]))
    assert sizes == [2, 2]


def test_a_set_stop_event_ends_the_run_before_the_network_is_called() -> None:
    stop = threading.Event()
    stop.set()

    with pytest.raises(Cancelled):
        denoise(
            lambda *_: pytest.fail("the network was called"),
            make_scheduler(saved_scheduler().config, "ddim"),
            torch.zeros(1, 2),
            torch.zeros(1, 1),
            torch.zeros(1),
            steps=3,
            guidance=[2.0],
            stop=stop,
        )


@pytest.mark.parametrize(("strength", "steps_run"), [(1.0, 10), (0.5, 5), (0.6, 6), (0.05, 1)])
@pytest.mark.parametrize("name", SCHEDULER_NAMES)
def test_strength_is_the_share_of_the_schedule_that_runs(name: str, strength: float, steps_run: int) -> None:
    seen: list[tuple[int, int]] = []

    denoise(
        lambda latents, *_: latents,
        make_scheduler(saved_scheduler().config, name),
        torch.zeros(1, 2),
        torch.zeros(1, 1),
        torch.zeros(1),
        steps=10,
        guidance=[1.0],
        source=torch.ones(1, 2),
        strength=strength,
        on_step=lambda done, total: seen.append((done, total)),
    )

    assert seen == [(done, steps_run) for done in range(1, steps_run + 1)]


@pytest.mark.parametrize("name", SCHEDULER_NAMES)
def test_schedulers_keep_the_schedule_and_prediction_type_of_the_folder(name: str) -> None:
    saved = saved_scheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=500).config

    scheduler = make_scheduler(saved, name)

    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.timestep_spacing == "trailing"
    expected = DDIMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=500).alphas_cumprod
    torch.testing.assert_close(scheduler.alphas_cumprod, expected)


def test_predicted_latents_are_never_clipped() -> None:
    scheduler = make_scheduler(DDIMScheduler(clip_sample=True).config, "ddim")

    assert scheduler.config.clip_sample is False


def test_an_unknown_scheduler_is_named() -> None:
    with pytest.raises(ValueError, match="scheduler is 'pndm'; choose one of"):
        make_scheduler(saved_scheduler().config, "pndm")
