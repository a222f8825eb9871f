import math
from collections import Counter
from dataclasses import replace

import pytest

from decoders.cost import CostModel
from decoders.fair_queue import FairQueue, Work, rows_by_kind

SHAPE, VIDEO = (4, 8, 8), (4, 6, 8, 8)
STEP_S, ROW_S, FINISH_S = 0.1, 0.05, 0.2


def queue(step_s: float = STEP_S, row_s: float = ROW_S, finish_s: float = FINISH_S) -> FairQueue:
    """Return a queue in which a step takes 0.1 s and 0.05 s per row, and a medium 0.2 s.

    One that keeps deep features takes a tenth more, and one that reuses them less than half.
    """
    cost = CostModel()
    line = [(1, step_s + row_s), (4, step_s + 4 * row_s)]
    keeping, reusing = ([(rows, share * seconds) for rows, seconds in line] for share in (1.1, 0.4))
    cost.calibrate(SHAPE, {"plain": line, "keeping": keeping, "reusing": reusing}, finish_s)
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
        line.charge(dict.fromkeys(works, 1.0 / len(works)))
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
    line.charge({mine: 5.0})
    line.remove(mine)
    line.add(work("ann"))

    assert [picked[0].user for picked in served(line, 1, 4)] == ["ben"] * 4


def test_users_who_left_are_forgotten_when_the_queue_is_empty() -> None:
    line = queue()
    for number in range(50):
        item = work(f"user {number}")
        line.add(item)
        line.charge({item: 1.0})
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


def test_free_rows_stay_empty_where_they_would_slow_down_somebody_who_is_behind() -> None:
    works = [work("ann"), work("ann"), work("ben"), work("ann")]
    line = filled(*works)
    line.charge({works[0]: FINISH_S + 1.0})

    assert line.pick(4) == [works[2]]


def test_clean_latents_go_before_steps() -> None:
    clean = work("ann", steps=0)
    line = filled(work("ben"), clean)
    line.charge({clean: 100.0})

    assert line.pick(4) == [clean]


def test_a_turn_is_worth_what_it_would_take_in_ones_own_company() -> None:
    guided, plain, other, long = work("ann", rows=2), work("ben"), work("ben"), work("ben", shape=VIDEO)
    line = filled(guided, plain, other, long)

    prices = line.prices([guided, plain], 4)

    assert prices == {
        guided: pytest.approx(STEP_S + 2 * ROW_S),
        plain: pytest.approx((STEP_S + 2 * ROW_S) / 2),
    }
    assert line.prices([guided, plain], 1)[plain] == pytest.approx(STEP_S + ROW_S)
    line.charge(prices)
    assert line._virtual_s == {"ann": prices[guided], "ben": prices[plain]}


def test_a_turn_that_was_not_as_foreseen_is_paid_for_by_the_clock() -> None:
    guided, plain = work("ann", rows=2), work("ben")
    line = filled(guided, plain)

    line.charge({guided: 0.2, plain: 0.1}, 3.0)
    assert line._virtual_s == {"ann": pytest.approx(2.0), "ben": pytest.approx(1.0)}
    line.charge({guided: 0.0, plain: 0.0}, 3.0)  # as long as nothing is known
    assert line._virtual_s == {"ann": pytest.approx(4.0), "ben": pytest.approx(2.0)}


def test_while_nothing_is_known_a_turn_is_worth_nothing() -> None:
    line = FairQueue(CostModel())
    item = work()
    line.add(item)

    assert line.prices(line.pick(4), 4) == {item: 0.0}
    assert line.prices([], 4) == {}


def test_who_asks_again_at_once_keeps_what_is_due_to_them() -> None:
    short, long = work("ann"), work("ben", shape=VIDEO)
    line = filled(short, long)
    line.charge({long: 50.0})
    assert line.pick(1) == [short]
    line.charge({short: 1.0})
    line.remove(short)
    line.add(again := work("ann"))

    assert line.pick(1) == [again]
    assert line._virtual_s["ann"] == 1.0


# --- equal service -----------------------------------------------------------------------------------


def demand(
    user: str,
    media: int = 1,
    steps: int = 10,
    *,
    shape: tuple[int, ...] = SHAPE,
    rows: int = 1,
    every: int = 1,
) -> tuple[Work, int]:
    """Return what a user wants at any time: so many media like this one."""
    return Work(user, shape, rows, steps, None, every), media


def speeds(costs: tuple[float, float], most: int, *demands: tuple[Work, int]) -> dict[str, float]:
    """Return how many steps per second each user gets while all go on asking."""
    line = queue(*costs, finish_s=3 * sum(costs))
    steps: Counter[str] = Counter()
    now_s = 0.0
    for wanted, media in demands:
        for _ in range(media):
            line.add(replace(wanted))
    usual = {wanted.user: wanted for wanted, _ in demands}
    while now_s < 1000 * sum(costs):
        picked = line.pick(most)
        prices = line.prices(picked, most)
        shape = picked[0].shape
        if picked[0].steps_left:
            now_s += line.cost.batch_step_s(shape, rows_by_kind(picked))
            for item in picked:
                item.advance(1)
                steps[item.user] += 1
            line.charge(prices)
            continue
        now_s += line.cost.finish_s(shape, len(picked))
        line.charge(prices)
        for item in picked:
            line.remove(item)
            line.add(replace(usual[item.user]))
    return {user: number / now_s for user, number in steps.items()}


COMPANY = {
    "pictures": [demand("ann"), demand("ben")],
    "many pictures each": [demand("ann", 8), demand("ben", 8)],
    "a picture and a video": [demand("ann"), demand("ben", shape=VIDEO)],
    "many pictures and a video": [demand("ann", 8), demand("ben", shape=VIDEO)],
    "many and one": [demand("ann", 8), demand("ben")],
    "many and two": [demand("ann", 8), demand("ben", 2)],
    "guided and not": [demand("ann", rows=2), demand("ben")],
    "many guided and one not": [demand("ann", 8, rows=2), demand("ben")],
    "long and short": [demand("ann", 8, 50), demand("ben", 1, 2)],
    "fast and exact": [demand("ann", every=5), demand("ben")],
    "many fast and one exact": [demand("ann", 8, every=5), demand("ben")],
    "many, one, and a video": [demand("ann", 8), demand("ben"), demand("cat", shape=VIDEO)],
    "eight people": [demand(user) for user in "abcdefgh"],
}


@pytest.mark.parametrize("costs", [(0.0, 1.0), (2.0, 1.0), (20.0, 1.0)], ids=["rows", "both", "steps"])
@pytest.mark.parametrize("most", [1, 4, 16])
@pytest.mark.parametrize("company", COMPANY)
def test_company_slows_everybody_down_by_the_same_factor(
    company: str, most: int, costs: tuple[float, float]
) -> None:
    """An equal share of the seconds where a row is all that a step costs; where it is not, sharing pays."""
    demands = COMPANY[company]
    together = speeds(costs, most, *demands)

    kept = {
        wanted.user: together[wanted.user] / speeds(costs, most, (wanted, media))[wanted.user]
        for wanted, media in demands
    }

    assert max(kept.values()) < 1.1 * min(kept.values())
    assert min(kept.values()) > 0.93 / len(demands)


# --- the time left -----------------------------------------------------------------------------------


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


def test_media_that_take_longer_than_a_step_are_made_and_foreseen_one_by_one() -> None:
    works = [work(steps=1) for _ in range(4)]
    line = filled(*works)
    step_s = STEP_S + 4 * ROW_S
    done = line.forecast(4)

    assert [done[item] for item in works] == pytest.approx([step_s + n * FINISH_S for n in (1, 2, 3, 4)])
    for item in works:
        item.advance(1)
    assert line.pick(4) == works[:1]


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


@pytest.mark.parametrize("every", [2, 3, 5])
def test_the_forecast_counts_which_steps_reuse_deep_features(every: int) -> None:
    item = replace(work(steps=11), deep_every=every)
    line = filled(item)
    assert line.forecast(4)[item] == pytest.approx(line.cost.request_s(SHAPE, 1, 11, every))

    item.advance(4)
    left_s = line.cost.steps_s(SHAPE, 1, 7, every, done=4) + FINISH_S
    assert line.forecast(4)[item] == pytest.approx(left_s)

    other = work(steps=3)
    line.add(other)
    kinds = [rows_by_kind([item, other], later) for later in range(3)]
    together_s = sum(line.cost.batch_step_s(SHAPE, rows) for rows in kinds)
    assert line.forecast(4)[other] == pytest.approx(together_s + FINISH_S)


def test_steps_that_keep_features_compute_those_of_all_rows_in_one_call() -> None:
    plain, third, second = work(rows=2), replace(work(), deep_every=3), replace(work(), deep_every=2)
    batch = [plain, third, second]

    assert rows_by_kind(batch) == {"keeping": 4}
    assert rows_by_kind(batch, 1) == {"plain": 2, "reusing": 2}
    assert rows_by_kind(batch, 2) == {"keeping": 3, "reusing": 1}
    second.advance(1)
    assert rows_by_kind(batch) == {"keeping": 3, "reusing": 1}


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
    assert calls < 500
    assert max(done.values()) > 1000 * math.ceil(100 / 16) * STEP_S
