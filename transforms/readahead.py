"""Runs an iterator ahead of its consumer, in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

_POLL_S = 0.2  # how soon the thread notices that its consumer has gone


def read_ahead(items: Iterable[T], max_items: int) -> Iterator[T]:
    """Yields `items`, made by a thread that is at most `max_items` ahead.

    Decoding releases the GIL, so it overlaps the model. An exception of the
    thread is raised here, in its place. When the consumer stops early, the thread
    stops too before this returns, so that nothing it reads is closed under it.
    """
    made: queue.SimpleQueue[tuple[str, T | BaseException | None]] = queue.SimpleQueue()
    room = threading.Semaphore(max_items)
    abandoned = threading.Event()
    source = iter(items)

    def produce() -> None:
        try:
            while True:
                while not room.acquire(timeout=_POLL_S):
                    if abandoned.is_set():
                        return
                if abandoned.is_set():
                    return
                made.put(("item", next(source)))
        except StopIteration:
            made.put(("end", None))
        except BaseException as error:  # handed to the consumer, which raises it
            made.put(("error", error))
        finally:
            if hasattr(source, "close"):
                source.close()

    thread = threading.Thread(target=produce, name="earmark-read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = made.get()
            room.release()
            if kind == "end":
                return
            if kind == "error":
                assert isinstance(value, BaseException)
                raise value
            yield value  # type: ignore[misc]  # kind "item" carries a T
    finally:
        abandoned.set()
        thread.join()
