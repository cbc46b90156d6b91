from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from transforms.meter import Meter
from transforms.readahead import read_ahead


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "earmark-read-ahead"]


def counted(items: int, made: list[int], ended: list[str] | None = None) -> Iterator[int]:
    """Numbers; `made` holds those given so far, `ended` that the generator was closed."""
    try:
        for item in range(items):
            made.append(item)
            yield item
    finally:
        if ended is not None:
            ended.append("closed")


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("max_items", [1, 2, 7, 1_000])
@pytest.mark.parametrize("items", [0, 1, 2, 100])
def test_all_items_come_in_order(items: int, max_items: int) -> None:
    assert list(read_ahead(range(items), max_items)) == list(range(items))
    assert threads() == []


def test_items_that_are_none_or_errors_are_items() -> None:
    items = [None, ValueError("an item"), "end", "error", ("end", None)]
    assert list(read_ahead(items, 2)) == items


def test_items_are_made_in_another_thread() -> None:
    def names() -> Iterator[str]:
        yield threading.current_thread().name

    assert list(read_ahead(names(), 1)) == ["earmark-read-ahead"]


def test_items_are_made_before_they_are_asked_for() -> None:
    made: list[int] = []
    ahead = read_ahead(counted(10, made), 3)
    assert next(ahead) == 0
    wait_for(lambda: len(made) >= 4)
    assert list(ahead) == list(range(1, 10))


def test_nothing_is_made_before_the_first_is_asked_for() -> None:
    made: list[int] = []
    ahead = read_ahead(counted(10, made), 3)
    time.sleep(0.1)
    assert (made, threads()) == ([], [])
    assert next(ahead) == 0
    ahead.close()


@pytest.mark.parametrize("max_items", [1, 3])
def test_the_thread_is_never_further_ahead_than_allowed(max_items: int) -> None:
    made: list[int] = []
    furthest = []
    with closing(read_ahead(counted(50, made), max_items)) as ahead:
        for asked in range(1, 5):
            next(ahead)
            wait_for(lambda asked=asked: len(made) >= asked + max_items)
            time.sleep(0.05)  # time to go further, if it ever does
            furthest.append(len(made) - asked)
    assert max(furthest) == max_items


def test_an_error_is_raised_in_its_place() -> None:
    fault = ValueError("broken")

    def broken() -> Iterator[int]:
        yield 1
        yield 2
        raise fault

    ahead = read_ahead(broken(), 5)
    time.sleep(0.1)  # the error is known long before it is met
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(ValueError) as raised:
        next(ahead)
    assert raised.value is fault
    assert threads() == []
    assert list(ahead) == []


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, MemoryError])
def test_errors_of_every_kind_reach_the_consumer(kind: type[BaseException]) -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise kind()

    ahead = read_ahead(broken(), 1)
    assert next(ahead) == 1
    with pytest.raises(kind):
        next(ahead)
    assert threads() == []


@pytest.mark.parametrize("taken", [1, 3])
@pytest.mark.parametrize("max_items", [1, 100])
def test_a_consumer_that_stops_stops_the_thread_and_closes_the_items(
    taken: int, max_items: int
) -> None:
    made: list[int] = []
    ended: list[str] = []
    ahead = read_ahead(counted(1_000_000, made, ended), max_items)
    for _ in range(taken):
        next(ahead)
    assert threads() == ["earmark-read-ahead"]
    ahead.close()
    assert threads() == []
    assert ended == ["closed"]
    count = len(made)
    time.sleep(0.05)
    assert len(made) == count < 1_000_000


def test_a_consumer_that_fails_stops_the_thread() -> None:
    ended: list[str] = []

    def consume() -> None:
        for item in read_ahead(counted(1_000_000, [], ended), 2):
            if item == 3:
                raise RuntimeError("the consumer's own")

    with pytest.raises(RuntimeError, match="the consumer's own"):
        consume()
    wait_for(lambda: threads() == [] and ended == ["closed"])


def test_stopping_waits_for_an_item_that_is_being_made() -> None:
    begun, finished = threading.Event(), threading.Event()

    def slow() -> Iterator[int]:
        yield 1
        begun.set()
        time.sleep(0.3)
        finished.set()
        yield 2

    ahead = read_ahead(slow(), 5)
    assert next(ahead) == 1
    assert begun.wait(5)
    assert not finished.is_set()
    ahead.close()
    assert finished.is_set()


def test_items_are_let_go_once_they_are_consumed() -> None:
    class Item:
        alive = 0

        def __init__(self) -> None:
            Item.alive += 1

        def __del__(self) -> None:
            Item.alive -= 1

    most = 0
    for item in read_ahead((Item() for _ in range(50)), 2):
        most = max(most, Item.alive)
        del item
    assert most <= 2 + 3  # the queue, one in each thread's hands, one being made
    assert Item.alive == 0


# ----------------------------------------------------------------------- waits


def waits_of(made_in_s: float, used_in_s: float, items: int = 10) -> tuple[int, int]:
    """(milliseconds the consumer waited, the thread waited) for items so quickly made and used."""
    meter = Meter()

    def slowly() -> Iterator[int]:
        for item in range(items):
            time.sleep(made_in_s)
            yield item

    for _ in read_ahead(slowly(), 2, meter):
        time.sleep(used_in_s)
    counts, values = meter.take()
    assert counts == {}
    (consumer,), (thread,) = values["wait_for_audio_msec"], values["wait_for_model_msec"]
    return consumer, thread


def test_where_items_are_slow_the_consumer_waits() -> None:
    consumer, thread = waits_of(made_in_s=0.03, used_in_s=0)
    assert consumer > 10 * thread
    assert consumer >= 200  # of 10 x 30


def test_where_the_consumer_is_slow_the_thread_waits() -> None:
    consumer, thread = waits_of(made_in_s=0, used_in_s=0.03)
    assert thread > 3 * consumer
    assert thread >= 150  # of 10 x 30, less the two items that have room


def test_waits_are_told_when_the_consumer_stops_early() -> None:
    meter = Meter()
    ahead = read_ahead(range(100), 2, meter)
    next(ahead)
    ahead.close()
    assert {name: len(values) for name, values in meter.take()[1].items()} == {
        "wait_for_audio_msec": 1,
        "wait_for_model_msec": 1,
    }


def test_waits_are_told_when_an_item_fails() -> None:
    meter = Meter()

    def broken() -> Iterator[int]:
        yield 1
        raise ValueError

    with pytest.raises(ValueError):
        list(read_ahead(broken(), 2, meter))
    assert len(meter.take()[1]["wait_for_audio_msec"]) == 1
