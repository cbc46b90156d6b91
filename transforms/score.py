"""Turns decoded clips into scored clips: score each chunk, pool."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from student.model import Result, Student
from transforms.meter import Meter
from transforms.records import Chunk, ClipEnd, ScoredClip

Pool = Literal["max", "mean"]

_CLIPS_AT_ONCE = 1_024  # so that a run of failed clips, which have no chunks, is written too


def score_clips(
    decoded: Iterable[Chunk | ClipEnd],
    student: Student,
    pool: Pool = "max",
    *,
    keep_chunks: bool = False,
    keep_embeddings: bool = False,
    meter: Meter | None = None,
) -> Iterator[ScoredClip]:
    """Yields each clip with its scores, in order.

    Chunks of many clips share a batch. Batches depend on nothing but the chunks
    given here, so the same shard has the same batches, and bit for bit the same
    scores, in every run on one machine.

    Args:
        decoded: chunks, each clip's followed by its `ClipEnd`.
        pool: a clip's score is the maximum or the mean over its chunks.
        keep_chunks: whether to keep the scores of every chunk.
        keep_embeddings: whether to compute embeddings, averaged over the chunks.
        meter: counts chunks and observes each batch.
    """
    pooled = _Pooled(pool, keep_chunks)
    begun: deque[_Begun] = deque()
    for events in _batches(decoded, student.max_batch):
        begun.append(_begin(events, student))
        # A GPU computes this one while the rows of the one before are written.
        if len(begun) == student.under_way:
            yield from _finish(begun.popleft(), pooled, keep_embeddings, meter)
    while begun:
        yield from _finish(begun.popleft(), pooled, keep_embeddings, meter)


def _batches(decoded: Iterable[Chunk | ClipEnd], max_batch: int) -> Iterator[list[Chunk | ClipEnd]]:
    """Events in order, with `max_batch` chunks at a time."""
    waiting: list[Chunk | ClipEnd] = []
    chunks = 0
    for event in decoded:
        waiting.append(event)
        chunks += isinstance(event, Chunk)
        if chunks == max_batch or len(waiting) - chunks >= _CLIPS_AT_ONCE:
            yield waiting
            waiting, chunks = [], 0
    yield waiting


@dataclass(frozen=True)
class _Begun:
    """A batch that the student is at."""

    events: list[Chunk | ClipEnd]
    chunks: int
    size_bytes: int  # of the waveforms
    result: Result | None  # None where no event is a chunk
    at: float  # time.perf_counter


def _begin(events: list[Chunk | ClipEnd], student: Student) -> _Begun:
    started = time.perf_counter()
    waveforms = [event.waveform for event in events if isinstance(event, Chunk)]
    result = student.begin(waveforms) if waveforms else None
    return _Begun(events, len(waveforms), sum(w.nbytes for w in waveforms), result, started)


def _finish(
    begun: _Begun, pooled: _Pooled, keep_embeddings: bool, meter: Meter | None
) -> Iterator[ScoredClip]:
    scores: Iterator[NDArray[np.float32]] = iter(())
    embeddings: Iterator[NDArray[np.float32]] = iter(())
    if begun.result is not None:
        matrix, vectors = begun.result()
        scores, embeddings = iter(matrix), iter(vectors)
        if meter is not None:
            latency_s = time.perf_counter() - begun.at
            meter.add("num_inferences", begun.chunks)
            meter.observe("inference_batch_latency_micro_secs", 1e6 * latency_s)
            meter.observe("inference_request_batch_size", begun.chunks)
            meter.observe("inference_request_batch_byte_size", begun.size_bytes)
    for event in begun.events:
        if isinstance(event, Chunk):
            embedding = next(embeddings)
            pooled.add(event, next(scores), embedding if keep_embeddings else None)
        else:
            yield pooled.finish(event)


class _Pooled:
    """What is known so far of the clip whose chunks are coming in."""

    def __init__(self, pool: Pool, keep_chunks: bool) -> None:
        self._pool = pool
        self._keep_chunks = keep_chunks
        self._reset()

    def _reset(self) -> None:
        self._count = 0
        self._scores: NDArray[np.float64] | None = None  # float64: sums of many chunks
        self._embedding: NDArray[np.float64] | None = None
        self._chunks: list[tuple[float, float, NDArray[np.float32]]] = []

    def add(
        self, chunk: Chunk, scores: NDArray[np.float32], embedding: NDArray[np.float32] | None
    ) -> None:
        self._count += 1
        if self._scores is None:
            self._scores = scores.astype(np.float64)
        elif self._pool == "max":
            np.maximum(self._scores, scores, out=self._scores)
        else:
            self._scores += scores
        if embedding is not None:
            self._embedding = embedding + (0 if self._embedding is None else self._embedding)
        if self._keep_chunks:
            self._chunks.append((chunk.start_s, chunk.end_s, scores))

    def finish(self, clip: ClipEnd) -> ScoredClip:
        failed = clip.error is not None and not clip.error.partial
        if failed or self._scores is None:
            scored = ScoredClip(clip, None, None, [])
        else:
            scores = self._scores / (self._count if self._pool == "mean" else 1)
            embedding = None if self._embedding is None else self._embedding / self._count
            scored = ScoredClip(
                clip,
                scores.astype(np.float32),
                None if embedding is None else embedding.astype(np.float32),
                self._chunks,
            )
        self._reset()
        return scored
