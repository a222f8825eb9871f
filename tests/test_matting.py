from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, zoom

from decoders.matting import even_grounds, on_new_ground

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
WHITE, NIGHT, RED, GREEN = (252, 252, 252), (12, 16, 46), (218, 34, 40), (48, 152, 62)
SIDE_PX = 64
ROWS, COLUMNS = np.indices((SIDE_PX, SIDE_PX))


def disc(radius_px: float, centre: Sequence[float] = (32, 32)) -> Floats:
    """Return how much of each pixel ``(H, W)`` a disc covers, drawn at four times the size."""
    rows, columns = (np.indices((SIDE_PX * 4, SIDE_PX * 4)) + 0.5) / 4
    covered = np.hypot(rows - centre[0], columns - centre[1]) <= radius_px
    share: Floats = covered.reshape(SIDE_PX, 4, SIDE_PX, 4).mean((1, 3))
    return share


def picture(ground: Sequence[float] | Floats, *things: tuple[Floats, Sequence[float]]) -> Floats:
    """Return ``(1, H, W, 3)`` with things laid over a ground, one after the other."""
    pixels = np.zeros((SIDE_PX, SIDE_PX, 3)) + np.asarray(ground)
    for share, colour in things:
        pixels = share[..., None] * np.asarray(colour) + (1 - share[..., None]) * pixels
    laid: Floats = pixels[None]
    return laid


def redrawn(pixels: Floats) -> Floats:
    """Return pictures as a decoder gives them back: soft, and with a grain."""
    soft: Floats = gaussian_filter(pixels, (0, 1.0, 1.0, 0))
    return soft + np.random.default_rng(0).normal(0, 3, pixels.shape)


def all_alike(pixels: Floats) -> Mask:
    return np.ones(pixels.shape[:3], np.bool_)


def test_a_thing_is_itself_inside_and_has_the_rim_that_was_drawn_for_the_new_ground() -> None:
    before, true = picture(WHITE, (disc(14), RED)), picture(NIGHT, (disc(14), RED))
    careless = redrawn(true)

    made = on_new_ground(before, careless, all_alike(true), reach=2)

    assert made is not None
    inside, rim = disc(12) == 1, (disc(17) > 0) & (disc(13) < 1)
    assert np.abs(careless - true)[0, inside].max() > 5
    np.testing.assert_array_equal(made[0, inside], before[0, inside])
    assert np.abs(made - true)[0, rim].max() <= np.abs(careless - true)[0, rim].max()  # no halo of the white
    np.testing.assert_array_equal(made[:, :8], careless[:, :8])


def test_an_outline_as_dark_as_the_old_ground_is_not_lost() -> None:
    """Where it stood at night nobody can see where it ends, so it is drawn as for the new ground."""
    outlined = [(disc(15), NIGHT), (disc(13), RED)]
    true = picture(WHITE, *outlined)

    made = on_new_ground(picture(NIGHT, *outlined), redrawn(true), all_alike(true), reach=2)

    assert made is not None
    outline = (disc(15) == 1) & (disc(13) == 0)
    assert made[0, outline].mean() < 100


def test_a_soft_old_picture_gives_nothing_of_its_ground() -> None:
    """What decoders make is soft itself, and edited once more all the same."""
    soft = gaussian_filter(picture(NIGHT, (disc(14), RED)), (0, 2.5, 2.5, 0))
    true = picture(WHITE, (disc(14), RED))
    careless = redrawn(true)
    alike = np.abs(soft - careless).max(axis=-1) < 60

    made = on_new_ground(soft, careless, alike, reach=2)

    assert made is not None
    assert made[0, disc(10) == 1] == pytest.approx(soft[0, disc(10) == 1])
    assert (made - careless)[0].min() > -150  # -228 with all that is half night


def test_what_was_drawn_aside_is_moved_to_where_it_was() -> None:
    before, true = picture(WHITE, (disc(14), RED)), picture(NIGHT, (disc(14), RED))
    in_place = redrawn(true)
    aside = np.roll(in_place, (2, -1), (1, 2))
    moved, kept = (on_new_ground(before, drawing, all_alike(true), reach=2) for drawing in (aside, in_place))

    assert moved is not None
    assert kept is not None
    near = disc(18) > 0
    assert np.abs(aside - true)[0, near].mean() > 10
    np.testing.assert_allclose(
        np.abs(moved - true)[0, near].mean(), np.abs(kept - true)[0, near].mean(), atol=0.5
    )


def test_a_gap_shows_the_new_ground_and_a_patch_in_the_old_grounds_colour_stays() -> None:
    ring = np.clip(disc(16) - disc(8), 0, 1)
    open_ring = [(ring, RED)]
    patched = [(disc(16), RED), (disc(8), WHITE)]

    for things in (open_ring, patched):
        true = picture(NIGHT, *things)
        made = on_new_ground(picture(WHITE, *things), redrawn(true), all_alike(true), reach=2)
        assert made is not None
        assert np.abs(made - true)[0, 30:34, 30:34].max() < 12


def test_another_thing_of_the_same_colour_does_not_become_the_old_one() -> None:
    before, other = picture(WHITE, (disc(14), RED)), picture(NIGHT, (disc(7, (22, 22)), RED))

    assert on_new_ground(before, redrawn(other), all_alike(other), reach=2) is None


def test_a_thing_in_another_colour_does_not_become_the_old_one() -> None:
    before, other = picture(WHITE, (disc(14), RED)), picture(NIGHT, (disc(14), GREEN))

    assert on_new_ground(before, redrawn(other), ~all_alike(other), reach=2) is None


def test_what_came_beside_the_old_thing_stays_as_it_was_drawn() -> None:
    old, new = (disc(9, (32, 16)), RED), (disc(9, (32, 48)), GREEN)
    true = picture(NIGHT, old, new)
    careless = redrawn(true)

    made = on_new_ground(picture(WHITE, old), careless, all_alike(true), reach=2)

    assert made is not None
    assert (made[0, disc(7, (32, 16)) == 1] == RED).all()
    np.testing.assert_allclose(made[:, :, 38:], careless[:, :, 38:])


def test_a_stain_of_the_old_ground_does_not_come_along() -> None:
    thing, stain = (disc(14), RED), (disc(1.5, (32, 51)), (200, 200, 200))
    true = picture(NIGHT, thing)

    made = on_new_ground(picture(WHITE, thing, stain), redrawn(true), all_alike(true), reach=2)

    assert made is not None
    assert np.abs(made - true)[0, 29:35, 49:54].max() < 20


def test_a_thing_is_followed_through_the_frames_of_a_video() -> None:
    """A frame in which it was drawn badly gets it as well."""
    path = [(32.0, 24.0 + 4 * frame) for frame in range(4)]
    before, true = (
        np.concatenate([picture(ground, (disc(12, centre), RED)) for centre in path])
        for ground in (WHITE, NIGHT)
    )
    careless = redrawn(true)
    alike = all_alike(true)
    alike[2] = False

    made = on_new_ground(before, careless, alike, reach=2)

    assert made is not None
    assert np.abs(made - true)[2][disc(11, path[2]) > 0].max() < 20


def test_grounds_may_be_shaded_evenly_and_hidden_in_part() -> None:
    sky = (ROWS / SIDE_PX)[..., None] * np.array([44.0, 24.0, 6.0]) + np.array([146.0, 202.0, 244.0])
    low = picture(sky, (disc(14, (60, 32)), RED))

    found = even_grounds(low, 2)

    assert found is not None
    assert np.abs(found[0] - sky).max() < 2


def test_a_ground_of_many_colours_is_not_even() -> None:
    blocks = zoom(np.random.default_rng(0).integers(0, 255, (8, 8, 3)), (8, 8, 1), order=0)
    busy, plain = picture(blocks.astype(float), (disc(14), RED)), picture(WHITE, (disc(14), RED))

    assert even_grounds(busy, 2) is None
    assert on_new_ground(plain, busy, all_alike(busy), reach=2) is None
    assert on_new_ground(busy, plain, all_alike(busy), reach=2) is None
