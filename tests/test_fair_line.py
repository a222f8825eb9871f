import random

from llm.fair_line import FairLine


def served_of(line: FairLine[str], slots: int, turns: int, cost: int = 3) -> list[str]:
    """Serve ``turns`` requests in ``slots`` slots, each for ``cost`` positions, and return them in order."""
    order: list[str] = []
    running: list[str] = []
    while len(order) < turns and (len(line) or running):
        while len(line) and len(running) < slots:
            running.append(line.next())
            order.append(running[-1])
        for request in running:
            line.charge(request[0], cost)
        line.leave(running.pop(0)[0])
    return order


def test_requests_of_one_user_go_in_the_order_in_which_they_came() -> None:
    line: FairLine[str] = FairLine()
    for number in range(5):
        line.add("a", f"a{number}")
    assert len(line) == 5
    assert served_of(line, 2, 5) == ["a0", "a1", "a2", "a3", "a4"]
    assert len(line) == 0


def test_users_take_turns_however_many_requests_each_has() -> None:
    line: FairLine[str] = FairLine()
    for number in range(50):
        line.add("a", f"a{number}")
    for number in range(3):
        line.add("b", f"b{number}")
    assert served_of(line, 1, 6) == ["a0", "b0", "a1", "b1", "a2", "b2"]


def test_who_asks_for_more_per_request_gets_fewer_of_them() -> None:
    line: FairLine[str] = FairLine()
    for number in range(12):
        line.add("a", f"a{number}")
        line.add("b", f"b{number}")
    order = []
    for _ in range(12):
        request = line.next()
        order.append(request[0])
        line.charge(request[0], 30 if request[0] == "a" else 10)
        line.leave(request[0])
    assert order.count("a") == 3


def test_a_pause_saves_nothing_up() -> None:
    line: FairLine[str] = FairLine()
    line.add("a", "a0")
    line.add("b", "b0")
    for user in (line.next()[0], line.next()[0]):
        line.charge(user, 100)
    line.leave("a")  # a goes away, b works on
    line.charge("b", 900)
    for number in range(1, 5):
        line.add("a", f"a{number}")
        line.add("b", f"b{number}")
    line.leave("b")
    assert served_of(line, 1, 4) == ["a1", "b1", "a2", "b2"]


def test_users_who_have_gone_are_forgotten() -> None:
    draw = random.Random(0)
    line: FairLine[str] = FairLine()
    for number in range(200):
        line.add(str(number), f"{number}")
        if draw.random() < 0.3:
            assert line.drop(lambda request: True) == [str(number)]
        else:
            line.charge(line.next(), draw.randint(1, 9))
            line.leave(str(number))
    assert not line._virtual
    assert not line._served
