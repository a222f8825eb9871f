import math
import random

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from alignment.toybox.draw import BODY_RGB, Stance, draw_clip, draw_look, paint_picture
from alignment.toybox.judge_visual import judge_clip, judge_look, measure_look
from alignment.toybox.world import THINGS, Clip, Look, attributes, sample_clip, sample_look


def softened(pixels: np.ndarray, seed: int) -> np.ndarray:
    sigma = (*(0,) * (pixels.ndim - 3), 0.7, 0.7, 0)
    noise = np.random.default_rng(seed).normal(0, 4, pixels.shape)
    return np.clip(np.rint(gaussian_filter(pixels.astype(float), sigma) + noise), 0, 255).astype(np.uint8)


def expected(look: Look) -> dict[str, str | int | None]:
    return {"place": None, **attributes(look)}


def test_fresh_pictures_are_judged_right() -> None:
    rng = random.Random(11)
    for _ in range(60):
        look = sample_look(rng)
        assert judge_look(draw_look(look, rng)) == expected(look)


def test_blurred_and_noisy_pictures_are_judged_right() -> None:
    rng = random.Random(12)
    for seed in range(40):
        look = sample_look(rng, held_out=seed % 4 == 0)
        assert judge_look(softened(draw_look(look, rng), seed)) == expected(look)


def test_fresh_clips_are_judged_right() -> None:
    rng = random.Random(13)
    for _ in range(24):
        clip = sample_clip(rng)
        assert judge_clip(draw_clip(clip, rng)) == attributes(clip)


def test_blurred_and_noisy_clips_are_judged_right() -> None:
    rng = random.Random(14)
    for seed in range(12):
        clip = sample_clip(rng, held_out=seed % 4 == 0)
        assert judge_clip(softened(draw_clip(clip, rng), seed)) == attributes(clip)


@pytest.mark.parametrize(("thing", "other"), list(zip(THINGS, THINGS[1:] + THINGS[:1], strict=True)))
def test_a_picture_of_another_thing_is_judged_wrong(thing: str, other: str) -> None:
    pixels = draw_look(Look(other, "red", "medium", 1, "left", "sky"), random.Random(1))
    verdict = judge_look(pixels)
    assert verdict["thing"] == other != thing
    assert verdict["colour"] == "red"


def test_an_empty_picture_shows_nothing_on_its_ground() -> None:
    nothing = {"thing": None, "colour": None, "size": None, "count": None, "place": None}
    empty = paint_picture("bell", "red", "night", [])
    assert judge_look(empty) == {**nothing, "ground": "night"}
    assert measure_look(empty) is None


def test_an_empty_clip_shows_nothing_on_its_ground() -> None:
    verdict = judge_clip(np.stack([paint_picture("bell", "red", "sky", [])] * 8))
    assert verdict.pop("ground") == "sky"
    assert set(verdict.values()) == {None}


def test_colour_noise_shows_nothing() -> None:
    blobs = gaussian_filter(np.random.default_rng(0).normal(0, 1, (64, 64, 3)), (4, 4, 0)) * 1500 + 128
    assert judge_look(np.clip(blobs, 0, 255).astype(np.uint8))["thing"] is None


def test_a_further_thing_is_counted() -> None:
    spots = [(17, 17), (47, 17), (17, 47), (47, 47)]
    stances = [Stance(x_px=x, y_px=y, radius_px=8.5) for x, y in spots]
    verdict = judge_look(paint_picture("bee", "yellow", "sky", stances))
    assert (verdict["thing"], verdict["place"]) == ("bee", None)
    assert verdict["count"] not in (1, 2, 3)


def test_two_things_one_above_the_other_are_not_one() -> None:
    stances = [Stance(x_px=32, y_px=y, radius_px=8.5) for y in (17, 47)]
    verdict = judge_look(paint_picture("bee", "yellow", "sky", stances))
    assert (verdict["count"], verdict["place"]) == (2, None)


def test_a_still_clip_tells_its_tempo_by_the_small_movement() -> None:
    for thing in THINGS:
        for tempo in ("slow", "fast"):
            clip = Clip(thing, "green", "small", "grey", "still", tempo)
            assert judge_clip(draw_clip(clip, random.Random(4)))["tempo"] == tempo


def test_shade_centre_and_radius_are_measured_closely() -> None:
    stance = Stance(x_px=30.3, y_px=33.6, radius_px=12.4, tilt=0.05)
    shade = (205, 44, 30)
    figures = measure_look(paint_picture("rocket", "red", "sky", [stance], body=shade))
    assert figures is not None
    assert figures.body_rgb == pytest.approx(shade, abs=3)
    assert figures.hue_degrees == pytest.approx(4.8, abs=2)
    assert math.dist(figures.centre_px, (30.3, 33.6)) < 0.3
    assert figures.radius_px == pytest.approx(12.4, abs=0.3)


def test_shade_is_measured_through_blur_and_noise() -> None:
    stance = Stance(x_px=32, y_px=32, radius_px=8.5)
    for colour, shade in BODY_RGB.items():
        ground = "grey" if colour in ("white", "black") else "white"
        figures = measure_look(softened(paint_picture("drum", colour, ground, [stance]), 0))
        assert figures is not None
        assert figures.body_rgb == pytest.approx(shade, abs=12)


def test_the_centre_of_mass_moves_with_the_thing() -> None:
    def mass(x_px: float) -> tuple[float, float]:
        figures = measure_look(
            paint_picture("bird", "blue", "white", [Stance(x_px=x_px, y_px=32, radius_px=12)])
        )
        assert figures is not None
        return figures.mass_px

    (x0, y0), (x1, y1) = mass(30), mass(33)
    assert x1 - x0 == pytest.approx(3, abs=0.05)
    assert y1 == pytest.approx(y0, abs=0.05)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \(64, 64, 3\) uint8"):
        judge_look(np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="dtype float32"):
        measure_look(np.zeros((64, 64, 3), np.float32))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected \(8, 64, 64, 3\) uint8"):
        judge_clip(np.zeros((4, 64, 64, 3), np.uint8))
