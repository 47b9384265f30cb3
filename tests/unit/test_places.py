"""From where a consumer walks its queues, by a clock of the test's."""

from __future__ import annotations

import pytest

from rhesis_tasks.postgres.places import Places
from rhesis_tasks.postgres.queue import Claimed, Place


class Clock:
    """Seconds that go by when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def message(id: int, queue: str = "a", priority: int = 0) -> Claimed:
    return Claimed(id, queue, id, 1, "{}", b"", Place(-priority, 0.0, id))


class Walker:
    """A consumer that claims, and its clock."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.places = Places(self.clock)

    def claim(self, *messages: Claimed, takes: float) -> dict[str, Place]:
        """Claim messages, which takes seconds; returns from where it was walked."""
        starts, began = self.places.starts(["a", "b"]), self.clock.now
        self.clock.now += takes
        self.places.claimed(starts, messages, began)
        return starts


def test_as_long_as_it_is_quick_queues_are_walked_from_the_beginning() -> None:
    walker = Walker()

    for number in range(100):
        assert walker.claim(message(number), takes=0.015) == {}


def test_when_it_takes_long_queues_are_walked_from_where_one_was_a_moment_ago() -> None:
    walker = Walker()
    for number in range(20):
        walker.claim(message(number), message(number + 1000, "b"), takes=0.1)
        if walker.places.starts(["a"]):
            break

    starts = walker.claim(message(50), takes=0.001)

    assert starts.keys() == {"a", "b"}
    assert starts["a"].id < 50
    walker.clock.now += 0.6
    walker.claim(message(60), takes=0.001)
    walker.clock.now += 0.6
    assert walker.places.starts(["a"])["a"].id == 60, "but not from later than half a second ago"


def test_from_the_beginning_it_is_walked_for_a_twentieth_of_the_time() -> None:
    walker = Walker()
    walker.claim(message(1), takes=0.001)
    walker.clock.now += 1
    walker.claim(message(2), takes=0.2)

    whole = 0
    until = walker.clock.now + 60
    while walker.clock.now < until:
        if walker.claim(message(3), takes=0.01) == {}:
            walker.clock.now += 0.2 - 0.01
            walker.places._cost = 0.2  # what it took
            whole += 1

    assert 10 <= whole <= 16


@pytest.mark.parametrize(("took", "later"), [(0.1, 3), (30, 5)], ids=["long", "kept waiting"])
def test_after_a_long_claim_it_is_soon_walked_from_the_beginning_and_then_as_it_was(took: float, later: float) -> None:
    walker = Walker()
    walker.claim(message(1), takes=0.001)
    walker.clock.now += 1
    walker.claim(message(2), takes=took)
    assert walker.claim(message(3), takes=0.001) != {}
    walker.clock.now += later

    assert walker.claim(message(4), takes=0.001) == {}
    assert walker.claim(message(5), takes=0.001) == {}


def test_a_queue_in_which_nothing_was_found_yet_is_walked_from_the_beginning() -> None:
    walker = Walker()
    walker.claim(message(1, "a"), takes=0.001)
    walker.clock.now += 1
    walker.claim(takes=0.1)

    assert walker.claim(takes=0.001).keys() == {"a"}
