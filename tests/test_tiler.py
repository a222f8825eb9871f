"""How pictures are cut: plans of whole numbers, held against other planners, and what becomes of them."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import MiniCPMV4_6ImageProcessorPil
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution

from encoders.media import Image, Modality
from encoders.tiler import AnyRes, CentreCrop, Plan, Slice, Slices, Tiler, Tiling, Whole, cut
from encoders.towers import TowerEncoder
from llm.model import LanguageModel
from llm.projectors import ProjectorConfig
from llm.template import MediaTokens, Message
from tests.tiny import tiny_encoder
from tests.tiny_llm import ENCODER_WIDTH, WIDTH, llama, tiny_tokenizer
from tests.tiny_towers import write_towers

SIDE = 16
CROP = CentreCrop(SIDE)
TILERS: dict[str, Tiler] = {
    "whole": Whole(),
    "crop": CROP,
    "any_res": AnyRes(SIDE, 6, CROP),
    "slices": Slices(SIDE, 7, CROP),
}


def sizes(count: int, longest: int = 2000) -> list[tuple[int, int]]:
    rng = random.Random(5)
    return [(rng.randint(1, longest), rng.randint(1, longest)) for _ in range(count)]


def noise(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(3).integers(0, 256, (height, width, 3), np.uint8)


def test_any_res_chooses_what_the_library_chooses() -> None:
    tiler = AnyRes(336, 6, CentreCrop(336))
    grids = [(r, total // r) for total in range(1, 7) for r in range(1, total + 1) if total % r == 0]
    several = 0
    for height, width in sizes(3000):
        tall, wide = select_best_resolution((height, width), [(r * 336, c * 336) for r, c in grids])
        plan = tiler.plan(height, width)
        if (tall, wide) == (336, 336):
            assert plan == tiler.whole.plan(height, width)
            continue
        several += 1
        assert len(plan.slices) == 1 + tall * wide // 336**2
        picture = np.broadcast_to(np.uint8(0), (height, width, 3))
        theirs = get_patch_output_size(picture, (tall, wide), "channels_last")
        # theirs rounds 240.00000000000003 up
        assert all(0 <= b - a <= 1 for a, b in zip(plan.slices[1].scaled, theirs, strict=True))
    assert several > 2000


def test_slices_are_those_of_the_library() -> None:
    library = MiniCPMV4_6ImageProcessorPil()
    tiler = Slices(336, 7, CentreCrop(336))
    several = 0
    for height, width in sizes(2000):
        grid = library.get_sliced_grid((height, width), 7, 336)
        plan = tiler.plan(height, width)
        if grid is None:
            assert plan == tiler.whole.plan(height, width)
            continue
        several += 1
        rows, columns = grid
        assert plan.slices[0].scaled == (rows * 336, columns * 336)
        assert len(plan.slices) == rows * columns + 1
        assert plan.layout.count("\n") == rows
        assert plan.layout.count(",") == rows * (columns - 1)
    assert several > 1000


def test_the_layout_of_slices_says_where_rows_end_and_the_overview_comes_last() -> None:
    plan = Slices(336, 7, CentreCrop(336)).plan(1008, 672)

    assert plan.layout == (0, ",", 1, "\n", 2, ",", 3, "\n", 4, ",", 5, "\n", 6)
    assert plan.overview == 6
    assert plan.blocks(64) == (64, ",", 64, "\n", 64, ",", 64, "\n", 64, ",", 64, "\n", 64)
    turned = Slices(336, 7, CentreCrop(336)).plan(672, 1008)
    assert [step for step in turned.layout if isinstance(step, str)] == [",", ",", "\n", ",", ",", "\n"]


def test_the_layout_of_any_res_begins_with_the_overview() -> None:
    plan = AnyRes(336, 6, CentreCrop(336)).plan(500, 672)

    assert plan.layout == (0, 1, 2, 3, 4)
    assert plan.slices[0] == Slice((336, 336), (0, 0, 336, 336))
    assert {part.scaled for part in plan.slices[1:]} == {(500, 672)}
    assert [part.box[:2] for part in plan.slices[1:]] == [(-86, 0), (-86, 336), (250, 0), (250, 336)]


@pytest.mark.parametrize("name", TILERS)
def test_every_plan_emits_each_slice_once_and_as_many_tokens_as_it_says(name: str) -> None:
    for height, width in [*sizes(200, 150), (1, 1), (1, 500), (500, 1), (16, 16), (17, 16)]:
        plan = TILERS[name].plan(height, width)

        pieces = cut(noise(height, width), plan)

        assert sorted(plan.order) == list(range(len(pieces)))
        assert len(pieces) <= 8
        assert sum(step for step in plan.blocks(9) if isinstance(step, int)) == 9 * len(pieces)
        for part, piece in zip(plan.slices, pieces, strict=True):
            assert piece.shape == (*part.box[2:], 3)
            assert name == "whole" or piece.shape == (SIDE, SIDE, 3)


@pytest.mark.parametrize("name", ["any_res", "slices"])
def test_a_picture_that_fits_one_square_is_not_cut(name: str) -> None:
    assert TILERS[name].plan(16, 16) == CROP.plan(16, 16)
    assert TILERS[name].plan(9, 9) == CROP.plan(9, 9)


def test_a_whole_picture_is_that_picture() -> None:
    pixels = noise(20, 30)

    (piece,) = cut(pixels, Whole().plan(20, 30))

    np.testing.assert_array_equal(piece, pixels)


def test_squares_of_any_res_put_together_are_the_picture_between_black_borders() -> None:
    pixels = noise(32, 44)  # fits 2 x 3 squares as it is, but for a border
    plan = AnyRes(SIDE, 6, CROP).plan(32, 44)
    tall, wide = plan.slices[1].scaled
    assert (tall, wide) == (32, 44)

    squares = cut(pixels, plan)[1:]

    rows = [np.concatenate(squares[start : start + 3], axis=1) for start in (0, 3)]
    whole = np.concatenate(rows)
    np.testing.assert_array_equal(whole[:, 2:46], pixels)
    assert not whole[:, :2].any()
    assert not whole[:, 46:].any()


def test_slices_put_together_are_the_picture() -> None:
    pixels = noise(32, 48)
    plan = Slices(SIDE, 7, CROP).plan(32, 48)

    squares = cut(pixels, plan)[:-1]

    rows = [np.concatenate(squares[start : start + 3], axis=1) for start in (0, 3)]
    np.testing.assert_array_equal(np.concatenate(rows), pixels)


def test_a_plan_of_another_picture_is_refused() -> None:
    with pytest.raises(ValueError, match=r"looks at 40 x 40 pixels and 20 x 30 are there"):
        cut(noise(20, 30), Whole().plan(40, 40))


def test_a_layout_that_loses_a_slice_is_refused() -> None:
    part = Slice((4, 4), (0, 0, 4, 4))
    with pytest.raises(ValueError, match=r"does not fit 2 slices; expected each of them once"):
        Plan(kept=(0, 0, 4, 4), slices=(part, part), layout=(0, ",", 0))


def test_one_square_is_no_tiling() -> None:
    with pytest.raises(ValueError, match=r"most is 1; expected at least 2 squares"):
        Tiling("slices", 1)


@pytest.mark.parametrize("name", ["any_res", "slices"])
def test_imagebind_reads_every_slice_as_a_picture_of_its_own(name: str) -> None:
    torch.manual_seed(0)
    plain = tiny_encoder()
    encoder = type(plain)(plain.model, plain.preprocessing, None, tiling=Tiling(name))  # type: ignore[arg-type]
    small, large = Image(noise(16, 16)), Image(noise(30, 50))

    features = encoder.encode_batch([large, small])

    plan = encoder.tiler.plan(30, 50)
    alone = [plain.encode(Image(piece)) for piece in cut(large.pixels, plan)]
    torch.testing.assert_close(features[0].tokens, torch.cat([alone[i].tokens for i in plan.order]))
    torch.testing.assert_close(features[0].pooled, alone[plan.overview].pooled)
    assert features[0].grid == (len(plan.slices), 2, 2)
    assert features[0].blocks == plan.blocks(4)
    assert len(plan.slices) > 3
    torch.testing.assert_close(features[1].tokens, plain.encode(small).tokens)
    assert (features[1].grid, features[1].blocks) == ((2, 2), (4,))


class Halves:
    """Looks at the right half of a picture first."""

    def plan(self, height: int, width: int) -> Plan:
        halves = tuple(Slice((SIDE, 2 * SIDE), (0, left, SIDE, SIDE)) for left in (0, SIDE))
        return Plan(kept=(0, 0, height, width), slices=halves, layout=(1, "|", 0))


def test_tokens_come_in_the_order_of_the_layout_and_the_vector_is_the_overviews(tmp_path: Path) -> None:
    torch.manual_seed(0)
    picture = Image(noise(SIDE, 2 * SIDE))
    for encoder in (tiny_encoder(), TowerEncoder.from_pretrained(write_towers(tmp_path))):
        left, right = (encoder.encode(Image(picture.pixels[:, start : start + SIDE])) for start in (0, SIDE))
        encoder.tiler = Halves()

        features = encoder.encode(picture)

        torch.testing.assert_close(features.tokens, torch.cat([right.tokens, left.tokens]))
        torch.testing.assert_close(features.pooled, left.pooled)
        count = len(left.tokens)
        assert features.blocks == (count, "|", count)


def test_a_tower_reads_every_slice_as_a_picture_of_its_own(tmp_path: Path) -> None:
    plain = TowerEncoder.from_pretrained(write_towers(tmp_path))
    encoder = TowerEncoder.from_pretrained(tmp_path, tiling=Tiling("slices"))
    large = Image(noise(30, 50))

    features = encoder.encode(large)

    plan = encoder.tiler.plan(30, 50)
    alone = [plain.encode(Image(piece)) for piece in cut(large.pixels, plan)]
    torch.testing.assert_close(features.tokens, torch.cat([alone[i].tokens for i in plan.order]))
    torch.testing.assert_close(features.pooled, alone[plan.overview].pooled)
    assert features.blocks == plan.blocks(16)


def model(kind: str) -> LanguageModel:
    torch.manual_seed(0)
    config = ProjectorConfig(kind=kind, encoder_width=ENCODER_WIDTH, llm_width=WIDTH, num_queries=3)  # type: ignore[arg-type]
    tokenizer = tiny_tokenizer()
    return LanguageModel(llama(tokenizer.base_vocabulary), tokenizer, {Modality.IMAGE: config}).eval()


def shown(plan: Plan, cells: int) -> MediaTokens:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(cells * len(plan.slices), ENCODER_WIDTH, generator=generator)
    return MediaTokens(Modality.IMAGE, tokens, tokens[0], plan.blocks(cells))


@pytest.mark.parametrize(("kind", "per_slice"), [("resampler", 3), ("mlp", 5)])
def test_as_many_positions_are_emitted_as_planned(kind: str, per_slice: int) -> None:
    llm = model(kind)
    for height, width in [(16, 16), *sizes(20, 90)]:
        plan = TILERS["slices"].plan(height, width)
        row = llm.encode([Message("user", ["look", shown(plan, 5), "well"])])

        opened, closed = (
            row.ids.index(i) for i in (llm.tokenizer.media_open_id, llm.tokenizer.media_close_id)
        )
        words = [i for step in plan.layout if isinstance(step, str) for i in llm.tokenizer.encode_text(step)]
        assert closed - opened - 1 == per_slice * len(plan.slices) + len(words)
        assert [slot.length for slot in row.media] == [per_slice] * len(plan.slices)
        filled = {p for slot in row.media for p in range(slot.start, slot.start + slot.length)}
        assert [row.ids[p] for p in range(opened + 1, closed) if p not in filled] == words


def test_each_slice_is_projected_apart_in_the_order_of_the_layout() -> None:
    llm = model("resampler")
    plan = TILERS["slices"].plan(32, 48)
    media = shown(plan, 4)
    batch = llm.collate([[Message("user", [media])]])

    embeddings = llm.embed_batch(batch)[0]

    projector = llm.projectors[str(Modality.IMAGE)]
    for index, (_, slot) in enumerate(batch.media):
        own = media.tokens[4 * index : 4 * index + 4]
        expected = projector(own[None], torch.ones(1, 4, dtype=torch.bool))[0]
        torch.testing.assert_close(embeddings[slot.start : slot.start + slot.length], expected)


def test_a_projector_of_whole_pictures_refuses_pieces() -> None:
    with pytest.raises(ValueError, match=r"have no pooled vector.* leave `tiling` out of the preset"):
        model("linear").encode([Message("user", [shown(TILERS["slices"].plan(32, 48), 4)])])


@pytest.mark.parametrize("blocks", [(3, ",", 2), (4, 0)])
def test_blocks_that_do_not_add_up_are_refused(blocks: tuple[int | str, ...]) -> None:
    with pytest.raises(ValueError, match=r"do not cut up 4 tokens"):
        MediaTokens(Modality.IMAGE, torch.zeros(4, 2), None, blocks)


def test_the_grid_of_slices_has_nearly_the_shape_of_the_picture() -> None:
    for height, width in sizes(300):
        plan = Slices(64, 7, CentreCrop(64)).plan(height, width)
        tall, wide = plan.slices[0].scaled
        if 1 / 3 < height / width < 3 and len(plan.slices) > 4:
            assert abs(math.log(height / width) - math.log(tall / wide)) < math.log(2)
