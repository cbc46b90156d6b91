from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from transforms.meter import COUNTERS, DISTRIBUTIONS, Meter, Stopwatch


def test_counts_and_values_are_those_since_the_last_time() -> None:
    meter = Meter()
    meter.add("clips")
    meter.add("clips", 4)
    meter.add("read_retries", 2)
    meter.observe("shard_msec", 10)
    meter.observe("shard_msec", 7)
    assert meter.take() == ({"clips": 5, "read_retries": 2}, {"shard_msec": [10, 7]})
    assert meter.take() == ({}, {})
    meter.add("clips")
    meter.observe("shard_msec", 1)
    assert meter.take() == ({"clips": 1}, {"shard_msec": [1]})


def test_what_was_taken_does_not_change_any_more() -> None:
    meter = Meter()
    meter.observe("shard_msec", 1)
    counts, values = meter.take()
    meter.add("clips")
    meter.observe("shard_msec", 2)
    assert (counts, values) == ({}, {"shard_msec": [1]})


def test_values_are_whole_numbers_as_beam_wants_them() -> None:
    meter = Meter()
    meter.observe("shard_msec", 2.7)
    (value,) = meter.take()[1]["shard_msec"]
    assert (value, type(value)) == (3, int)


def test_a_count_may_be_a_truth() -> None:
    meter = Meter()
    meter.add("shards_published_by_another", 2 > 1)
    meter.add("shards_published_by_another", 1 > 2)
    assert meter.take()[0] == {"shards_published_by_another": 1}


def test_names_that_nobody_documents_are_refused() -> None:
    meter = Meter()
    with pytest.raises(KeyError, match="'retries' is no counter of transforms"):
        meter.add("retries")
    with pytest.raises(KeyError, match="'clips' is no distribution of transforms"):
        meter.observe("clips", 1)
    with pytest.raises(KeyError):
        meter.add("shard_msec")
    assert meter.take() == ({}, {})


def test_each_name_stands_for_one_thing() -> None:
    assert not COUNTERS.keys() & DISTRIBUTIONS.keys()
    meter = Meter()
    for name in COUNTERS:
        meter.add(name)
    for name in DISTRIBUTIONS:
        meter.observe(name, 1)
    counts, values = meter.take()
    assert (counts.keys(), values.keys()) == (COUNTERS.keys(), DISTRIBUTIONS.keys())


def test_nothing_is_lost_between_threads() -> None:
    meter = Meter()
    threads, times = 8, 2_000
    taken, done = [], threading.Event()

    def fill(_: int) -> None:
        for _ in range(times):
            meter.add("clips")
            meter.observe("shard_msec", 1)

    def empty() -> None:
        while not done.is_set():
            taken.append(meter.take())

    taker = threading.Thread(target=empty)
    taker.start()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(fill, range(threads)))
    done.set()
    taker.join()
    taken.append(meter.take())
    assert sum(counts.get("clips", 0) for counts, _ in taken) == threads * times
    assert sum(len(values.get("shard_msec", ())) for _, values in taken) == threads * times


def test_a_stopwatch_counts_what_making_takes_and_not_what_is_done_with_it() -> None:
    watch, whole = Stopwatch(), time.perf_counter()

    def slow() -> Iterator[int]:
        for item in range(3):
            time.sleep(0.01)
            yield item

    for _ in watch.making(slow()):
        time.sleep(0.05)
    assert 0.03 <= watch.seconds <= time.perf_counter() - whole - 0.15


def test_what_a_stopwatch_measures_fails_and_closes_as_without_it() -> None:
    watch, closed = Stopwatch(), []

    def items() -> Iterator[int]:
        try:
            yield 1
            raise OSError("gone")
        finally:
            closed.append("closed")

    made = watch.making(items())
    assert next(made) == 1
    with pytest.raises(OSError, match="gone"):
        next(made)
    stopped = watch.making(items())
    next(stopped)
    stopped.close()  # type: ignore[attr-defined]
    assert closed == ["closed", "closed"]
    assert list(watch.making([1, None])) == [1, None]
