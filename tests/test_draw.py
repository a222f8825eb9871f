import random

import numpy as np
import pytest

from alignment.toybox.draw import (
    BODY_RGB,
    GROUND_RGB,
    PERIOD_FRAMES,
    RADIUS_PX,
    Stance,
    draw_clip,
    draw_look,
    offset_px,
    paint_picture,
)
from alignment.toybox.things import PAINTERS
from alignment.toybox.world import COLOURS, GROUNDS, INVISIBLE, MOTIONS, SIZES, THINGS, Clip, Look


def rng(seed: int = 0) -> random.Random:
    return random.Random(seed)


def inside(pixels: np.ndarray, ground: str = "white") -> np.ndarray:
    return np.abs(pixels.astype(int) - GROUND_RGB[ground][0]).sum(axis=-1) > 60


def extents(pixels: np.ndarray) -> tuple[int, int]:
    rows, columns = np.nonzero(inside(pixels))
    return int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1


def centre(pixels: np.ndarray) -> tuple[float, float]:
    rows, columns = np.nonzero(inside(pixels))
    return float(columns.mean()) + 0.5, float(rows.mean()) + 0.5


def alone(thing: str, radius_px: float, phase: float | None = None) -> np.ndarray:
    return paint_picture(thing, "red", "white", [Stance(x_px=32, y_px=32, radius_px=radius_px, phase=phase)])


def test_there_is_a_painter_for_every_thing() -> None:
    assert tuple(PAINTERS) == THINGS


def test_a_picture_is_64_by_64_bytes_of_rgb() -> None:
    pixels = draw_look(Look("bell", "red", "big", 1, "top", "sky"), rng())
    assert pixels.shape == (64, 64, 3)
    assert pixels.dtype == np.uint8


def test_a_clip_is_eight_pictures() -> None:
    frames = draw_clip(Clip("bell", "red", "big", "sky", "left", "slow"), rng())
    assert frames.shape == (8, 64, 64, 3)
    assert frames.dtype == np.uint8


def test_the_same_seed_draws_the_same() -> None:
    look = Look("frog", "green", "small", 3, None, "grey")
    clip = Clip("frog", "green", "small", "grey", "up", "fast")
    assert np.array_equal(draw_look(look, rng(7)), draw_look(look, rng(7)))
    assert np.array_equal(draw_clip(clip, rng(7)), draw_clip(clip, rng(7)))


def test_another_seed_draws_a_little_differently() -> None:
    look = Look("frog", "green", "small", 3, None, "grey")
    assert not np.array_equal(draw_look(look, rng(1)), draw_look(look, rng(2)))


@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize("size", SIZES)
def test_every_thing_fills_the_box_of_its_size(thing: str, size: str) -> None:
    width, height = extents(alone(thing, RADIUS_PX[size]))
    assert width == pytest.approx(2 * RADIUS_PX[size], abs=2.5)
    assert height == pytest.approx(2 * RADIUS_PX[size], abs=2.5)


@pytest.mark.parametrize("thing", THINGS)
def test_sizes_keep_their_order_under_jitter(thing: str) -> None:
    widest = {}
    narrowest = {}
    for size in SIZES:
        look = Look(thing, "blue", size, 1, "middle", "white")
        widths = [sum(extents(draw_look(look, rng(seed)))) for seed in range(6)]
        widest[size], narrowest[size] = max(widths), min(widths)
    assert widest["small"] < narrowest["medium"]
    assert widest["medium"] < narrowest["big"]


@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize("colour", COLOURS)
def test_more_of_a_thing_has_its_own_colour_than_any_other(thing: str, colour: str) -> None:
    stance = Stance(x_px=32, y_px=32, radius_px=RADIUS_PX["big"])
    pixels = paint_picture(thing, colour, "sky", [stance]).astype(int)
    empty = paint_picture(thing, colour, "sky", []).astype(int)
    body = pixels[np.abs(pixels - empty).sum(axis=-1) > 60]
    away = np.abs(body[:, None] - np.array([BODY_RGB[name] for name in COLOURS])).sum(axis=-1)
    near = np.where(away.min(axis=1) < 60, away.argmin(axis=1), -1)
    counts = [int((near == index).sum()) for index in range(len(COLOURS))]
    assert counts.index(max(counts)) == COLOURS.index(colour)


@pytest.mark.parametrize("ground", GROUNDS)
def test_the_ground_runs_from_its_top_colour_to_its_bottom_colour(ground: str) -> None:
    pixels = paint_picture("bell", "red", ground, []).astype(int)
    assert np.abs(pixels[0] - GROUND_RGB[ground][0]).max() <= 1
    assert np.abs(pixels[-1] - GROUND_RGB[ground][1]).max() <= 1


def test_a_thing_stands_in_its_place() -> None:
    for seed in range(5):
        x, y = centre(draw_look(Look("clock", "red", "small", 1, "bottom left", "white"), rng(seed)))
        assert x == pytest.approx(17, abs=1.5)
        assert y == pytest.approx(47, abs=1.5)


@pytest.mark.parametrize(("count", "columns"), [(2, (17, 47)), (3, (32, 17, 47))])
def test_several_things_cover_as_many_times_the_area(count: int, columns: tuple[int, ...]) -> None:
    one = inside(draw_look(Look("heart", "red", "small", 1, "middle", "white"), rng())).sum()
    several = inside(draw_look(Look("heart", "red", "small", count, None, "white"), rng()))
    assert several.sum() == pytest.approx(count * one, rel=0.1)
    assert all(several[:, column].any() for column in columns)


@pytest.mark.parametrize(("colour", "ground"), sorted(INVISIBLE))
def test_what_cannot_be_seen_cannot_be_drawn(colour: str, ground: str) -> None:
    with pytest.raises(ValueError, match="cannot be seen"):
        draw_look(Look("bell", colour, "big", 1, "middle", ground), rng())
    with pytest.raises(ValueError, match="cannot be seen"):
        draw_clip(Clip("bell", colour, "big", ground, "still", "slow"), rng())


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize(("tempo", "path"), [("slow", 12), ("fast", 26)])
def test_a_clip_moves_the_way_and_the_distance_it_says(motion: str, tempo: str, path: float) -> None:
    frames = draw_clip(Clip("clock", "red", "medium", "white", motion, tempo), rng(3))
    (x0, y0), (x1, y1) = centre(frames[0]), centre(frames[-1])
    dx, dy = {"still": (0, 0), "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[motion]
    assert x1 - x0 == pytest.approx(dx * path, abs=0.7)
    assert y1 - y0 == pytest.approx(dy * path, abs=0.7)


def test_the_path_is_walked_at_constant_speed_through_the_middle() -> None:
    steps = [offset_px("right", "slow", frame) for frame in range(8)]
    assert steps[0] == (-6, 0)
    assert steps[7] == (6, 0)
    assert np.allclose(np.diff([x for x, _ in steps]), 12 / 7)


@pytest.mark.parametrize("thing", THINGS)
def test_every_thing_moves_in_itself(thing: str) -> None:
    poses = [alone(thing, RADIUS_PX["small"], phase).astype(float) for phase in (0, 0.25, 0.5, 0.75)]
    changes = [np.abs(one - other).max(axis=-1) > 60 for one in poses for other in poses]
    assert max(change.sum() for change in changes) >= 10


@pytest.mark.parametrize("thing", THINGS)
def test_a_still_thing_repeats_itself_after_its_period(thing: str) -> None:
    assert PERIOD_FRAMES == {"slow": 8, "fast": 4}
    slow = draw_clip(Clip(thing, "red", "medium", "white", "still", "slow"), rng(5)).astype(int)
    fast = draw_clip(Clip(thing, "red", "medium", "white", "still", "fast"), rng(5)).astype(int)
    assert np.abs(fast[:4] - fast[4:]).max() <= 40
    assert np.abs(slow[:4] - slow[4:]).max() > 80


def test_half_a_second_tells_a_slow_still_thing_from_a_fast_one() -> None:
    def change(tempo: str, seed: int) -> float:
        frames = draw_clip(Clip("bell", "red", "big", "white", "still", tempo), random.Random(seed)).astype(
            float
        )
        return float(np.abs(frames[4] - frames[0]).mean())

    assert min(change("slow", seed) for seed in range(20)) > 10 * max(
        change("fast", seed) for seed in range(20)
    )
