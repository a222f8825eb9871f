from pathlib import Path

import pytest

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
