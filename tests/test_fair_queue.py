import math

import pytest

from decoders.cost import CostModel
from decoders.fair_queue import FairQueue, Work

SHAPE = (4, 8, 8)
STEP_S, ROW_S, FINISH_S = 0.1, 0.05, 0.2


def queue() -> FairQueue:
    """Return a queue in which a step takes 0.1 s and 0.05 s per row, and a medium 0.2 s."""
    cost = CostModel()
    cost.calibrate(SHAPE, [(1, STEP_S + ROW_S), (4, STEP_S + 4 * ROW_S)], FINISH_S)
    return FairQueue(cost)


def work(user: str = "ann", steps: int = 10, shape: tuple[int, ...] = SHAPE, rows: float = 1) -> Work:
    return Work(user, shape, rows, steps)


def filled(*works: Work) -> FairQueue:
    line = queue()
    for item in works:
        line.add(item)
    return line


def served(line: FairQueue, most: int, turns: int) -> list[list[Work]]:
    """Take turns of one second each."""
    picked = []
    for _ in range(turns):
        works = line.pick(most)
        line.charge(works, 1.0)
        picked.append(works)
    return picked


def test_an_empty_queue_picks_nothing() -> None:
    assert queue().pick(4) == []


def test_one_users_requests_are_served_in_the_order_in_which_they_came() -> None:
    works = [work() for _ in range(3)]

    assert filled(*works).pick(2) == works[:2]


def test_two_users_get_the_same_share_however_many_requests_they_have() -> None:
    many, one = [work("ann") for _ in range(8)], work("ben")
    line = filled(*many, one)

    turns = served(line, 1, 10)

    assert [picked[0].user for picked in turns].count("ben") == 5


def test_a_user_who_comes_late_is_served_next_and_not_paid_for_the_time_before() -> None:
    line = filled(work("ann"), work("ann"))
    served(line, 1, 20)
    late = work("ben")
    line.add(late)

    turns = [picked[0].user for picked in served(line, 1, 10)]

    assert "ben" in turns[:2]
    assert 4 <= turns.count("ben") <= 6


def test_leaving_and_coming_back_does_not_erase_what_was_used() -> None:
    mine = work("ann")
    line = filled(mine, work("ben"))
    line.charge([mine], 5.0)
    line.remove(mine)
    line.add(work("ann"))

    assert [picked[0].user for picked in served(line, 1, 4)] == ["ben"] * 4


def test_users_who_left_are_forgotten_when_the_queue_is_empty() -> None:
    line = queue()
    for number in range(50):
        item = work(f"user {number}")
        line.add(item)
        line.charge([item], 1.0)
        line.remove(item)

    assert len(line._virtual_s) <= 1


def test_a_step_holds_one_latent_shape_and_the_others_get_their_turns() -> None:
    small, large = [work("ann"), work("ann")], work("ben", shape=(4, 16, 16))
    line = filled(*small, large)

    turns = served(line, 4, 4)

    assert turns[0] == small
    assert [large] in turns
    assert all(len({item.shape for item in picked}) == 1 for picked in turns)


def test_free_rows_go_to_whoever_has_the_shape() -> None:
    works = [work("ann"), work("ann"), work("ben"), work("ann")]

    assert set(filled(*works).pick(4)) == set(works)
    assert {item.user for item in filled(*works).pick(2)} == {"ann", "ben"}


def test_clean_latents_go_before_steps() -> None:
    clean = work("ann", steps=0)
    line = filled(work("ben"), clean)
    line.charge([clean], 100.0)

    assert line.pick(4) == [clean]


def test_guidance_is_paid_for_twice() -> None:
    guided, plain = work("ann", rows=2), work("ben")
    line = filled(guided, plain)

    line.charge([guided, plain], 3.0)

    assert line._virtual_s == {"ann": 2.0, "ben": 1.0}


def test_the_forecast_of_a_request_alone_is_its_cost() -> None:
    only = work(steps=10, rows=2)
    line = filled(only)

    assert line.forecast(4) == {only: pytest.approx(10 * (STEP_S + 2 * ROW_S) + FINISH_S)}
    assert line.cost.request_s(SHAPE, 2, 10) == pytest.approx(line.forecast(4)[only])


def test_the_forecast_of_a_batch_shortens_when_one_leaves() -> None:
    short, long = work(steps=2), work(steps=5)

    done = filled(short, long).forecast(4)

    assert done[short] == pytest.approx(2 * (STEP_S + 2 * ROW_S) + FINISH_S)
    assert done[long] == pytest.approx(done[short] + 3 * (STEP_S + ROW_S) + FINISH_S)


def test_the_forecast_of_a_full_queue_holds_the_wait() -> None:
    first, second = work(steps=10), work(steps=10)

    done = filled(first, second).forecast(1)

    assert done[second] == pytest.approx(2 * done[first])


def test_the_forecast_lets_a_short_request_of_another_user_pass() -> None:
    long, short = work("ann", steps=500), work("ben", steps=5)
    line = filled(long, short)
    alone = line.cost.request_s(SHAPE, 1, 5)

    done = line.forecast(1)

    assert alone < done[short] < 4 * alone
    assert done[long] > 500 * (STEP_S + ROW_S)
    assert long.steps_left == 500  # foreseeing changes nothing


def test_a_forecast_of_many_requests_ends_soon() -> None:
    line = filled(*(work(f"user {number % 7}", steps=1000) for number in range(100)))
    calls = 0
    pick = FairQueue.pick

    def counted(self: FairQueue, most: int) -> list[Work]:
        nonlocal calls
        calls += 1
        return pick(self, most)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FairQueue, "pick", counted)
        done = line.forecast(16)

    assert len(done) == 100
    assert calls < 400
    assert max(done.values()) > 1000 * math.ceil(100 / 16) * STEP_S
