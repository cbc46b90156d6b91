"""What a worker counts while it annotates; the names are the metrics' names everywhere.

Those that `RunInference` has too are named and measured as it does.
docs/operations.md says what each tells.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")

NAMESPACE = "earmark"

COUNTERS = {
    "shards": "shards whose file is published",
    "clips": "clips that became rows",
    "clips_failed": "clips whose row says why they have no scores",
    "clips_failed_read": "of these, those that could not be read from their shard",
    "clips_failed_decode": "of these, those that could not be decoded",
    "clips_partial": "clips that have scores of a part of their audio, and whose row says why",
    "audio_seconds": "seconds of audio scored, whole seconds a shard",
    "bytes_read": "bytes of encoded audio",
    "bytes_written": "bytes of published Parquet",
    "num_inferences": "chunks that went through the model",
    "batch_halvings": "batches cut in two because they did not fit the GPU's memory",
    "shards_published_by_another": "shards whose file another worker, or try, had published first",
    "shards_not_retried": "shards whose failed rows earmark retry left alone: their clips are others by now",
    "read_retries": "reads from remote storage that were tried again",
    "write_retries": "writes to remote storage that were tried again",
    "list_retries": "listings of remote storage that were tried again",
}

DISTRIBUTIONS = {
    "inference_batch_latency_micro_secs": "microseconds a batch took, features and copies included; on a GPU with its wait for the one before",
    "inference_request_batch_size": "chunks in a batch",
    "inference_request_batch_byte_size": "bytes of the batch's waveforms",
    "load_model_latency_milli_secs": "milliseconds to load the student",
    "model_byte_size": "bytes of the student's weights",
    "wait_for_audio_msec": "milliseconds a shard's model waited for decoded audio",
    "wait_for_model_msec": "milliseconds a shard's decoder waited for the model",
    "shard_msec": "milliseconds a shard took",
    "list_usec": "microseconds the launcher took to list the inputs and what is finished",
    "read_usec": "of a shard's microseconds on the decoding side: reading, unpacking, hashing",
    "decode_usec": "of these: decoding",
    "resample_usec": "of these: resampling",
    "decoding_idle_usec": "of these: waiting for the model, or done before it",
    "features_usec": "of a shard's microseconds on the model's side: features",
    "transfer_usec": "of these: copies to the device and back",
    "model_usec": "of these: the model",
    "write_usec": "of these: making rows, Parquet, publishing",
    "model_idle_usec": "of these: waiting for decoded audio",
}


@dataclass
class Meter:
    """Counts of one worker, safe to fill from several threads.

    Beam's own metrics can only be set by the thread that runs a DoFn, and
    `student` and the plain steps know no Beam: they fill a meter, and the DoFn
    empties it into Beam.
    """

    counts: Counter[str] = field(default_factory=Counter)
    values: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, name: str, count: int = 1) -> None:
        """Adds to a counter of `COUNTERS`."""
        if name not in COUNTERS:
            raise KeyError(f"{name!r} is no counter of transforms.meter")
        with self._lock:
            self.counts[name] += count

    def observe(self, name: str, value: float) -> None:
        """Adds a value to a distribution of `DISTRIBUTIONS`."""
        if name not in DISTRIBUTIONS:
            raise KeyError(f"{name!r} is no distribution of transforms.meter")
        with self._lock:
            self.values[name].append(round(value))

    def take(self) -> tuple[dict[str, int], dict[str, list[int]]]:
        """(counts, values) since the last call."""
        with self._lock:
            taken = dict(self.counts), dict(self.values)
            self.counts, self.values = Counter(), defaultdict(list)
        return taken


class Stopwatch:
    """Seconds that a thread has spent in something that is done again and again.

    Costs a third of a microsecond each time.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def making(self, items: Iterable[T]) -> Iterator[T]:
        """Yields `items`; counts what making them takes, not what is done with them."""
        source = iter(items)
        clock = time.perf_counter
        try:
            while True:
                started = clock()
                try:
                    item = next(source)
                except StopIteration:
                    return
                finally:
                    self.seconds += clock() - started
                yield item
        finally:
            if hasattr(source, "close"):
                source.close()
