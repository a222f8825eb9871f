import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from decoders.untouched import keep_untouched, with_kept
from encoders.media import Audio, Image, Video

Pixels = NDArray[np.uint8]
SKY, WHITE, RED, BLUE = (146, 202, 244), (252, 252, 252), (218, 34, 40), (40, 98, 226)
SIDE_PX = 64
BODY = (slice(20, 44), slice(24, 40))
STRIPE = (slice(30, 34), slice(24, 40))


def drawn(ground: tuple[int, ...], *things: tuple[tuple[slice, slice], tuple[int, ...]]) -> Pixels:
    pixels = np.full((SIDE_PX, SIDE_PX, 3), ground, np.uint8)
    for place, colour in things:
        pixels[place] = colour
    return pixels


def redrawn(pixels: Pixels, sigma_px: float = 0.7) -> Pixels:
    """Return a picture as a decoder gives it back: soft, and with a grain."""
    grain = np.random.default_rng(0).normal(0, 4, pixels.shape)
    soft = gaussian_filter(pixels.astype(float), (sigma_px, sigma_px, 0)) + grain
    return soft.round().clip(0, 255).astype(np.uint8)


def apart(some: Pixels, others: Pixels) -> NDArray[np.int64]:
    """Return how far each pixel is off in its worst channel."""
    worst: NDArray[np.int64] = np.abs(some.astype(int) - others).max(axis=-1)
    return worst


def moved(place: tuple[slice, slice], down_px: int, right_px: int) -> tuple[slice, slice]:
    rows, columns = place
    return (
        slice(rows.start + down_px, rows.stop + down_px),
        slice(columns.start + right_px, columns.stop + right_px),
    )


def test_a_thing_gets_its_new_colour_on_the_very_ground_it_stood_on() -> None:
    before = drawn(SKY, (BODY, RED), (STRIPE, WHITE))
    edited = redrawn(drawn(SKY, (BODY, BLUE), (STRIPE, WHITE)))

    kept = keep_untouched(before, edited)

    around = np.ones((SIDE_PX, SIDE_PX), bool)
    around[16:48, 20:44] = False
    np.testing.assert_array_equal(kept[around], before[around])
    assert (
        apart(kept, edited)[BODY].max() <= 3
    )  # the stripe is the new thing's, too: no specks of the old one


def test_a_thing_on_a_new_ground_is_the_old_one_however_softly_it_was_redrawn() -> None:
    before = drawn(SKY, (BODY, RED), (STRIPE, WHITE))
    aside = [(moved(place, 1, 0), colour) for place, colour in ((BODY, RED), (STRIPE, WHITE))]
    edited = redrawn(drawn(WHITE, *aside), sigma_px=1.0)
    edited[30, 30] = (0, 255, 0)  # a speck that only the decoder knows why

    kept = keep_untouched(before, edited)

    inside = (slice(23, 41), slice(26, 38))
    assert apart(edited, before)[inside].max() > 60  # the stripe
    np.testing.assert_array_equal(kept[inside], before[inside])
    np.testing.assert_array_equal(kept[:, :12], edited[:, :12])


def test_a_new_thing_on_a_new_ground_owes_nothing_to_the_old_one() -> None:
    """Not even where its colour is between the old ones around it."""
    before = drawn((152, 152, 152), (BODY, WHITE), (STRIPE, (26, 26, 30)))
    edited = drawn(SKY, (BODY, (190, 190, 190)))

    inside = (slice(21, 43), slice(25, 39))
    np.testing.assert_array_equal(keep_untouched(before, edited)[STRIPE], edited[STRIPE])
    assert apart(keep_untouched(before, drawn(SKY)), drawn(SKY))[inside].max() == 0


def test_a_new_ground_may_be_nearly_the_old_one() -> None:
    pale, white = drawn((199, 226, 250), (BODY, RED)), drawn(WHITE, (BODY, RED))

    np.testing.assert_array_equal(keep_untouched(pale, white)[:, :20], white[:, :20])


def test_what_went_away_leaves_no_outline() -> None:
    rim = drawn(SKY, (BODY, tuple(value - 30 for value in SKY)), ((slice(21, 43), slice(25, 39)), RED))
    elsewhere = redrawn(drawn(SKY, (moved(BODY, 0, 22), RED)))

    kept = keep_untouched(rim, elsewhere)

    assert apart(kept, drawn(SKY))[BODY].max() < 20
    np.testing.assert_array_equal(kept[:, :16], rim[:, :16])


def test_what_has_nothing_in_common_with_the_picture_before_is_left_alone() -> None:
    before, edited = drawn(SKY, (BODY, RED)), redrawn(drawn(RED, (BODY, BLUE)))

    np.testing.assert_array_equal(keep_untouched(before, edited), edited)


def test_larger_pictures_may_be_redrawn_farther_aside() -> None:
    """What counts is how much of the picture it is: here a strip as thin as one pixel of 64."""
    before = drawn(SKY, (BODY, RED), (STRIPE, WHITE))
    edited = drawn(WHITE, (BODY, RED), (moved(STRIPE, 1, 0), WHITE))
    large = [pixels.repeat(4, 0).repeat(4, 1) for pixels in (before, edited)]

    small = keep_untouched(before, edited)

    np.testing.assert_array_equal(small[23:41, 26:38], before[23:41, 26:38])
    np.testing.assert_array_equal(keep_untouched(*large)[92:164, 104:152], large[0][92:164, 104:152])


def test_what_is_new_meets_what_is_kept_without_a_seam() -> None:
    """A decoder's ground is a shade off; where a thing stood, it gets the shade of the ground around."""
    before = drawn(SKY, (BODY, RED))
    darker = drawn((136, 192, 234))

    kept = keep_untouched(before, darker)

    assert apart(darker, drawn(SKY))[BODY].min() == 10
    assert apart(kept, drawn(SKY))[BODY].max() <= 4


def test_each_frame_of_a_video_is_compared_with_its_own() -> None:
    paths = ([moved(BODY, 0, 2 * i) for i in range(4)], [moved(BODY, 0, -2 * i) for i in range(4)])
    before, edited = (np.stack([drawn(SKY, (place, RED)) for place in path]) for path in paths)

    kept = with_kept(Video(edited, 8.0), Video(before, 4.0))

    assert isinstance(kept, Video)
    np.testing.assert_array_equal(kept.frames, edited)  # nothing stands where it no longer is
    assert kept.fps == 8.0


def test_a_copy_is_the_original_whatever_was_made() -> None:
    picture, video = Image(drawn(SKY)), Video(np.stack([drawn(SKY)] * 3), 4.0)
    sound = Audio(np.linspace(-1, 1, 50, dtype=np.float32), 8000)

    copied = with_kept(Video(np.stack([drawn(WHITE)] * 3), 8.0), video, copied=True)

    assert with_kept(Image(drawn(WHITE)), picture, copied=True) is picture
    assert with_kept(Audio(np.zeros(90, np.float32), 16000), sound, copied=True) is sound
    assert isinstance(copied, Video)
    np.testing.assert_array_equal(copied.frames, video.frames)
    assert copied.fps == 8.0, "originals are fitted in frames, not in pace"


def test_a_picture_without_an_original_is_itself() -> None:
    picture = Image(drawn(SKY))
    assert with_kept(picture, None) is picture


def test_pictures_of_two_sizes_are_not_compared() -> None:
    with pytest.raises(ValueError, match=r"original has the shape \(64, 64, 3\) and the edit \(32, 64, 3\)"):
        keep_untouched(drawn(SKY), drawn(SKY)[:32])
