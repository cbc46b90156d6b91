"""Runs an iterator ahead of its consumer, in a thread."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from transforms.meter import Meter

T = TypeVar("T")

_JOIN_S = 10.0  # a read that has stalled is not waited for; the thread ends when it does
_POLL_S = 0.2  # how soon the thread notices that its consumer has gone


def read_ahead(items: Iterable[T], max_items: int, meter: Meter | None = None) -> Iterator[T]:
    """Yields `items`, made by a thread that is at most `max_items` ahead.

    Decoding releases the GIL, so it overlaps the model. An exception of the
    thread is raised here, in its place. When the consumer stops early, the thread
    stops too, before this returns unless it hangs in a read; what it reads it closes itself.

    Args:
        items: made in the thread.
        max_items: how far ahead.
        meter: observes at the end how long the consumer waited for items
            (`wait_for_audio_msec`) and the thread for room (`wait_for_model_msec`).
    """
    made: queue.SimpleQueue[tuple[str, T | BaseException | None]] = queue.SimpleQueue()
    room = threading.Semaphore(max_items)
    abandoned = threading.Event()
    source = iter(items)
    waited_for_room_s = waited_for_item_s = 0.0

    def produce() -> None:
        nonlocal waited_for_room_s
        try:
            while True:
                if not room.acquire(blocking=False):
                    started = time.monotonic()
                    while not room.acquire(timeout=_POLL_S):
                        if abandoned.is_set():
                            return
                    waited_for_room_s += time.monotonic() - started
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
            started = time.monotonic()
            kind, value = made.get()
            waited_for_item_s += time.monotonic() - started
            room.release()
            if kind == "end":
                return
            if kind == "error":
                assert isinstance(value, BaseException)
                raise value
            yield value  # type: ignore[misc]  # kind "item" carries a T
    finally:
        abandoned.set()
        thread.join(_JOIN_S)
        if meter is not None:
            meter.observe("wait_for_audio_msec", 1_000 * waited_for_item_s)
            meter.observe("wait_for_model_msec", 1_000 * waited_for_room_s)
