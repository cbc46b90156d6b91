"""A few of many things at once, for those that wait for storage most of the time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

_HELD = 64  # things whose results wait in memory

Item = TypeVar("Item")
Result = TypeVar("Result")


def few_at_once(
    one: Callable[[Item], Result], items: Iterable[Item], at_once: int
) -> Iterator[Result]:
    """The results of `one`, in the order of the items; where one fails, what has not begun never does."""
    if at_once == 1:
        yield from map(one, items)
        return
    waiting = iter(items)
    pool = ThreadPoolExecutor(at_once)
    try:
        while held := list(islice(waiting, _HELD)):
            yield from pool.map(one, held)
    finally:
        pool.shutdown(cancel_futures=True)
