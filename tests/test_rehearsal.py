from pathlib import Path

import pytest

from alignment.rehearsal import Estimate, critical_path_s, estimate, in_order, table
from alignment.training import NEEDS, TrainOptions


def took(name: str, seconds: float) -> Estimate:
    return Estimate(name, 100, 0.0, seconds / 100, 2**30)


def test_a_rehearsal_times_a_step_reads_its_memory_and_leaves_nothing_behind(tmp_path: Path) -> None:
    rows = estimate("sound-captions", TrainOptions(runs=tmp_path / "runs", num_steps=1000))
    pools, step = rows
    assert (pools.name, step.name, step.num_steps) == ("pools", "sound-captions", 1000)
    assert 0 < step.step_s < 60
    assert step.seconds >= 1000 * step.step_s
    assert step.memory_bytes > 100 * 2**20
    assert not list(tmp_path.iterdir())


def test_only_training_can_be_rehearsed() -> None:
    with pytest.raises(ValueError, match="no training to rehearse for 'export'"):
        estimate("export", TrainOptions())


def test_a_step_comes_after_all_that_it_builds_on() -> None:
    order = in_order(["clip-denoiser"])
    assert order[-1] == "clip-denoiser"
    for step in order:
        assert all(order.index(earlier) < order.index(step) for earlier in NEEDS[step])
    assert "language" not in order


def test_steps_that_build_on_one_another_take_their_sum_and_others_share_the_time() -> None:
    chain = [took("language", 10), took("imagebind", 10), took("encoder-side", 5)]
    assert critical_path_s(chain, 1) == pytest.approx(25)
    assert critical_path_s(chain, 2) == pytest.approx(15)
    assert critical_path_s(chain, 9) == pytest.approx(15)
    rendering = Estimate("pools", 0, 7.0, 0.0, 0)
    assert critical_path_s([rendering, *chain], 2) == pytest.approx(22)


def test_the_table_says_time_and_memory_of_every_step_and_of_all() -> None:
    printed = table([took("language", 3600), took("imagebind", 7200)], jobs=2)
    assert "| language | 100 | 36.000 | 0 s | 60 min | 1.0 GB |" in printed
    assert "2 h 00 min in all with --jobs 2" in printed
    assert "up to 2.0 GB for 2 steps at once" in printed
