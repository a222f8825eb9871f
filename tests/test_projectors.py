"""Projectors: shapes, padding, place, and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm.projectors import ProjectorConfig, ProjectorKind, build_projector, grid_code

KINDS: list[ProjectorKind] = ["linear", "mlp", "resampler"]


def config(kind: ProjectorKind, **changes: Any) -> ProjectorConfig:
    sizes = {"encoder_width": 6, "llm_width": 16, "num_queries": 3, **changes}
    return ProjectorConfig(kind=kind, **sizes)


@pytest.mark.parametrize(("kind", "slots"), [("linear", 1), ("mlp", 5), ("resampler", 3)])
def test_a_projector_gives_as_many_tokens_as_it_takes_slots(kind: ProjectorKind, slots: int) -> None:
    projector = build_projector(config(kind))
    num_tokens = 1 if projector.reads_pooled else 5

    out = projector(torch.randn(2, num_tokens, 6), torch.ones(2, num_tokens, dtype=torch.bool))

    assert projector.num_slots(num_tokens) == slots
    assert out.shape == (2, slots, 16)


@pytest.mark.parametrize("kind", ["mlp", "resampler"])
def test_padding_does_not_change_the_tokens(kind: ProjectorKind) -> None:
    projector = build_projector(config(kind))
    real = torch.randn(1, 4, 6)
    padded = torch.cat([real, torch.full((1, 3, 6), 1e4)], dim=1)
    present = torch.tensor([[True] * 4 + [False] * 3])

    slots = projector.num_slots(4)
    expected = projector(real, present[:, :4])

    torch.testing.assert_close(projector(padded, present)[:, :slots], expected[:, :slots])


def test_the_resampler_sees_where_a_token_is() -> None:
    projector = build_projector(config("resampler", grid=(2,)))
    tokens = torch.randn(1, 4, 6)
    present = torch.ones(1, 4, dtype=torch.bool)

    there = projector(tokens, present)
    elsewhere = projector(tokens.flip(1), present)

    assert (there - elsewhere).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_a_gradient(kind: ProjectorKind) -> None:
    projector = build_projector(config(kind))

    projector(torch.randn(2, 1, 6), torch.ones(2, 1, dtype=torch.bool)).square().sum().backward()

    without = {name for name, p in projector.named_parameters() if p.grad is None}
    assert not without


def test_grid_codes_share_an_axis_exactly_where_places_do() -> None:
    code = grid_code(12, (2, 3), 18)  # tokens are (frame, row, column)
    frame, row, column = code[:, :6], code[:, 6:12], code[:, 12:]

    assert code.shape == (12, 18)
    assert torch.equal(column[1], column[4])  # row 0 and row 1, column 1
    assert torch.equal(row[0], row[7])  # frame 0 and frame 1, row 0
    assert torch.equal(frame[6], frame[11])
    assert len({tuple(line.tolist()) for line in code}) == 12


def test_the_first_channel_of_a_line_is_the_sine_of_the_index() -> None:
    torch.testing.assert_close(grid_code(9, (), 8)[:, 0], torch.arange(9.0).sin())


def test_channels_that_no_axis_gets_are_zero() -> None:
    assert grid_code(5, (2,), 7)[:, 4:].count_nonzero() == 0


def test_a_width_without_room_for_the_axes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"width is 4; a grid of 3 axes needs at least 6"):
        grid_code(5, (2, 2), 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "qformer"}, r"kind is 'qformer'; expected one of linear, mlp, resampler"),
        ({"num_queries": 0}, r"num_queries is 0; expected at least 1"),
        ({"grid": (8, 0)}, r"grid\[1\] is 0; expected at least 1"),
        ({"num_heads": 3}, r"llm_width \(16\) is not a multiple of num_heads \(3\)"),
    ],
)
def test_wrong_sizes_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProjectorConfig(**{"kind": "mlp", "encoder_width": 6, "llm_width": 16, **change})
