"""How a picture is cut for an encoder that reads squares of one size.

A tiler plans with whole numbers only: which pictures go through the encoder, and in what order their tokens,
and words between them, reach the language model. The plan of a picture follows from its height and width, so
every count can be known, and tested, without a pixel. :func:`cut` then does what the plan says.

All sizes are (height, width), all boxes (top, left, height, width), in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import PIL.Image
from numpy.typing import NDArray

Size = tuple[int, int]
Box = tuple[int, int, int, int]
TilingName = Literal["any_res", "slices"]

LONGEST_STRIP = 16
"""Of a longer picture, in short sides, the ends are cut off before it is scaled: they lie far outside of the
crop, and a strip of one pixel's width would grow to gigabytes."""


@dataclass(frozen=True, slots=True)
class Slice:
    """One picture for the encoder: ``box`` of the picture ``scaled`` to a size, black where it leaves it."""

    scaled: Size
    box: Box


@dataclass(frozen=True, slots=True)
class Plan:
    """What becomes of one picture.

    Attributes:
        kept: the part of the picture that is looked at; everything else follows from it.
        slices: the pictures that go through the encoder.
        layout: the order for the language model: the place of a slice in ``slices``, or words.
        overview: the place in ``slices`` of the one that shows the whole.

    Raises:
        ValueError: a slice that is not in the layout exactly once, or no such overview.

    """

    kept: Box
    slices: tuple[Slice, ...]
    layout: tuple[int | str, ...] = (0,)
    overview: int = 0

    def __post_init__(self) -> None:
        if sorted(self.order) != list(range(len(self.slices))) or self.overview not in self.order:
            raise ValueError(
                f"The layout {self.layout} with the overview {self.overview} does not fit {len(self.slices)} "
                f"slices; expected each of them once, and the overview among them."
            )

    @property
    def order(self) -> list[int]:
        """The slices as they come in the layout."""
        return [step for step in self.layout if isinstance(step, int)]

    def blocks(self, num_cells: int) -> tuple[int | str, ...]:
        """Return the layout with the number of encoder tokens, ``num_cells``, in place of each slice."""
        return tuple(num_cells if isinstance(step, int) else step for step in self.layout)


class Tiler(Protocol):
    """Plans how pictures are cut."""

    def plan(self, height: int, width: int) -> Plan:
        """Return what becomes of a picture of that size; the same for the same numbers."""
        ...


def cut(pixels: NDArray[np.uint8], plan: Plan) -> list[NDArray[np.uint8]]:
    """Cut a picture ``(height, width, 3)`` into the slices of its plan, in their order in ``plan.slices``."""
    top, left, height, width = plan.kept
    pixels = pixels[top : top + height, left : left + width]
    if pixels.shape[:2] != (height, width):
        raise ValueError(
            f"The plan looks at {height} x {width} pixels and {pixels.shape[0]} x {pixels.shape[1]} are "
            f"there; expected the picture that it was made for."
        )
    at_size = {(height, width): pixels}
    for size in {part.scaled for part in plan.slices} - at_size.keys():
        picture = PIL.Image.fromarray(pixels).resize((size[1], size[0]), PIL.Image.Resampling.BICUBIC)
        at_size[size] = np.asarray(picture)
    return [_boxed(at_size[part.scaled], part.box) for part in plan.slices]


def _boxed(pixels: NDArray[np.uint8], box: Box) -> NDArray[np.uint8]:
    top, left, height, width = box
    inside = pixels[max(0, top) : max(0, top + height), max(0, left) : max(0, left + width)]
    if inside.shape[:2] == (height, width):
        return inside
    out = np.zeros((height, width, 3), np.uint8)
    down, right = max(0, -top), max(0, -left)
    out[down : down + inside.shape[0], right : right + inside.shape[1]] = inside
    return out


class Whole:
    """The picture as it is, for an encoder that brings it to its own size."""

    def plan(self, height: int, width: int) -> Plan:
        """Return one slice that is the picture."""
        return Plan(kept=(0, 0, height, width), slices=(Slice((height, width), (0, 0, height, width)),))


@dataclass(frozen=True, slots=True)
class CentreCrop:
    """The middle of the picture, its short side scaled to ``side``: what ImageBind was trained on."""

    side: int

    def plan(self, height: int, width: int) -> Plan:
        """Return one square slice."""
        kept = middle(height, width)
        height, width = kept[2:]
        short, side = min(height, width), self.side
        scaled = (
            side if height == short else int(side * height / short),
            side if width == short else int(side * width / short),
        )
        box = (round((scaled[0] - side) / 2), round((scaled[1] - side) / 2), side, side)
        return Plan(kept=kept, slices=(Slice(scaled, box),))


def middle(height: int, width: int) -> Box:
    """Return what is left of a picture when a strip has lost its ends."""
    most = LONGEST_STRIP * min(height, width)
    top, left = (max(0, (side - most) // 2) for side in (height, width))
    return top, left, min(height, most), min(width, most)


@dataclass(frozen=True, slots=True)
class AnyRes:
    """An overview, then squares of a larger, padded picture row by row.

    Of the grids with at most ``most`` squares the one is taken that keeps most of the picture's pixels, and
    of those the smallest. A picture that fits into one square is left to ``whole``.

    Source: LLaVA-NeXT (Liu et al. 2024) and ``select_best_resolution`` of its code, for all grids and without
    its learned row ends; there, a picture of one square is read twice.
    """

    side: int
    most: int
    whole: Tiler

    def plan(self, height: int, width: int) -> Plan:
        """Return the overview and the squares, or the plan of ``whole``."""
        rows, columns = best_grid(height, width, self.side, self.most)
        if rows * columns == 1:
            return self.whole.plan(height, width)
        scaled = _fitted(height, width, rows * self.side, columns * self.side)
        above, before = (rows * self.side - scaled[0]) // 2, (columns * self.side - scaled[1]) // 2
        squares = _squares(rows, columns, self.side, scaled, above, before)
        return Plan(
            kept=(0, 0, height, width),
            slices=(_overview(self.side), *squares),
            layout=tuple(range(1 + len(squares))),
        )


def best_grid(height: int, width: int, side: int, most: int) -> Size:
    """Return rows and columns, at most ``most`` squares, that keep most pixels and waste fewest."""
    best, best_score = (1, 1), (-1, 0)
    for rows, columns in sorted(_grids(most), key=lambda grid: (grid[0] * grid[1], grid[0])):
        tall, wide = rows * side, columns * side
        scale = min(tall / height, wide / width)
        kept = min(int(height * scale) * int(width * scale), height * width)
        score = (kept, kept - tall * wide)
        if score > best_score:
            best, best_score = (rows, columns), score
    return best


def _grids(most: int) -> list[Size]:
    return [(rows, columns) for rows in range(1, most + 1) for columns in range(1, most // rows + 1)]


def _fitted(height: int, width: int, tall: int, wide: int) -> Size:
    """Return the largest size of the same shape that fits."""
    if wide / width < tall / height:
        return min(math.ceil(height * wide / width), tall), wide
    return tall, min(math.ceil(width * tall / height), wide)


@dataclass(frozen=True, slots=True)
class Slices:
    """Slices with a comma after each and a line break after each row, then the overview.

    There are as many as the picture has pixels for, one more or one fewer, in the grid whose shape is next to
    the picture's. A picture with pixels for one is left to ``whole``.

    Source: LLaVA-UHD (Guo et al. 2024, arXiv 2403.11703) sections 3.1 and 3.3. Its slices keep the picture's
    shape; here they are squares, which every encoder reads, so that the picture is stretched a little.
    """

    side: int
    most: int
    whole: Tiler

    def plan(self, height: int, width: int) -> Plan:
        """Return the slices and the overview, or the plan of ``whole``."""
        wanted = min(math.ceil(height * width / self.side**2), self.most)
        if wanted <= 1:
            return self.whole.plan(height, width)
        rows, columns = nearest_grid(height, width, wanted, self.most)
        squares = _squares(rows, columns, self.side, (rows * self.side, columns * self.side))
        layout: list[int | str] = []
        for index in range(len(squares)):
            layout += [index, "\n" if (index + 1) % columns == 0 else ","]
        return Plan(
            kept=(0, 0, height, width),
            slices=(*squares, _overview(self.side)),
            layout=(*layout, len(squares)),
            overview=len(squares),
        )


def nearest_grid(height: int, width: int, wanted: int, most: int) -> Size:
    """Return rows and columns, ``wanted`` in all or one more or fewer, shaped most like the picture."""
    numbers = [number for number in (wanted - 1, wanted, wanted + 1) if 1 < number <= most]
    grids = [(n // columns, columns) for n in numbers for columns in range(1, n + 1) if n % columns == 0]
    shape = math.log(width / height)
    return min(grids, key=lambda grid: abs(shape - math.log(grid[1] / grid[0])))


def _squares(
    rows: int, columns: int, side: int, scaled: Size, above: int = 0, before: int = 0
) -> tuple[Slice, ...]:
    return tuple(
        Slice(scaled, (row * side - above, column * side - before, side, side))
        for row in range(rows)
        for column in range(columns)
    )


def _overview(side: int) -> Slice:
    return Slice((side, side), (0, 0, side, side))


@dataclass(frozen=True, slots=True)
class Tiling:
    """Which tiler an encoder gets, and the most squares of one picture, the overview not counted."""

    name: TilingName
    most: int = 6

    def __post_init__(self) -> None:
        if self.most < 2:
            raise ValueError(f"most is {self.most}; expected at least 2 squares, or no tiling.")

    def tiler(self, side: int, whole: Tiler) -> Tiler:
        """Return a tiler for squares of ``side``, with ``whole`` for what fits into one."""
        return (AnyRes if self.name == "any_res" else Slices)(side, self.most, whole)
