from pathlib import Path

import pytest
import torch

from alignment.training import NEEDS, RECIPES, TrainOptions, run


def test_every_step_has_a_recipe_and_a_place_in_the_order() -> None:
    assert set(NEEDS) == set(RECIPES)


def test_an_unknown_step_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"There is no stage 'images'; expected one of .*look-denoiser"):
        run("images", tmp_path / "weights", TrainOptions(runs=tmp_path))


@pytest.mark.parametrize("step", ["look-denoiser", "encoder-side"])
def test_a_step_without_what_it_builds_on_says_what_to_run_first(step: str, tmp_path: Path) -> None:
    missing = {"look-denoiser": "picture-autoencoder", "encoder-side": "language"}[step]
    with pytest.raises(ValueError, match=f"First run `patchbay train {missing}`"):
        run(step, tmp_path / "weights", TrainOptions(runs=tmp_path, small=True))
    assert not (tmp_path / "weights").exists()


def test_one_seed_repeats_a_step_and_another_does_not(tmp_path: Path) -> None:
    def weights(runs: str, seed: int) -> dict[str, torch.Tensor]:
        run("look-captions", tmp_path / "toy", TrainOptions(runs=tmp_path / runs, num_steps=3, seed=seed))
        folder = tmp_path / runs / (f"toy-seed-{seed}" if seed else "toy") / "look-captions"
        found: dict[str, torch.Tensor] = torch.load(folder / "checkpoint.pt", weights_only=True)["weights"]
        return found

    first, again, other = weights("first", 3), weights("again", 3), weights("other", 4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
