"""Turns encoded clips into scored clips: decode, chunk, score, pool."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from student.features import FRAME_SAMPLES, FeatureSpec
from student.model import Student
from transforms.chunk import cut_chunks
from transforms.decode import AudioDecoder
from transforms.meter import Meter
from transforms.records import (
    Chunk,
    ClipEnd,
    ClipError,
    EncodedClip,
    ScoredClip,
    UnreadableClip,
)

Pool = Literal["max", "mean"]

_CLIPS_AT_ONCE = 1_024  # so that a run of failed clips, which have no chunks, is written too


def decode_clips(
    clips: Iterable[EncodedClip | UnreadableClip], features: FeatureSpec
) -> Iterator[Chunk | ClipEnd]:
    """Yields the chunks of each clip, then its `ClipEnd`, clip after clip.

    A clip that cannot be decoded ends with its error; chunks that came before the
    fault do not count.
    """
    for clip in clips:
        if isinstance(clip, UnreadableClip):
            yield ClipEnd(clip.member, 0, None, clip.metadata, error=clip.error)
        else:
            yield from _decode_clip(clip, features)


def _decode_clip(clip: EncodedClip, features: FeatureSpec) -> Iterator[Chunk | ClipEnd]:
    decoder, error, samples = AudioDecoder(clip.audio), None, 0
    try:
        blocks = decoder.mono(features.sample_rate)
        for chunk in cut_chunks(blocks, features.chunk_samples, features.sample_rate):
            samples += len(chunk.waveform)
            if samples >= FRAME_SAMPLES:
                yield chunk
        if samples < FRAME_SAMPLES:
            raise ClipError(
                "decode",
                "TooShort",
                f"{samples} samples at {features.sample_rate} Hz are less than one analysis "
                f"frame of {FRAME_SAMPLES}",
            )
    except ClipError as fault:
        error = fault
    facts = decoder.facts
    whole = error is None or error.type == "TooShort"
    yield ClipEnd(
        member=clip.member,
        size_bytes=clip.size_bytes,
        xxh128=clip.xxh128,
        metadata=clip.metadata,
        codec=facts.codec if facts else None,
        sample_rate=facts.sample_rate if facts else None,
        channels=facts.channels if facts else None,
        duration_s=facts.duration_s if facts and whole else None,
        peak_dbfs=facts.peak_dbfs if facts and whole else None,
        rms_dbfs=facts.rms_dbfs if facts and whole else None,
        error=error,
    )


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
    waiting: list[Chunk | ClipEnd] = []
    chunks = 0
    for event in decoded:
        waiting.append(event)
        chunks += isinstance(event, Chunk)
        if chunks == student.max_batch or len(waiting) - chunks >= _CLIPS_AT_ONCE:
            yield from _score_waiting(waiting, student, pooled, keep_embeddings, meter)
            waiting, chunks = [], 0
    yield from _score_waiting(waiting, student, pooled, keep_embeddings, meter)


def _score_waiting(
    waiting: list[Chunk | ClipEnd],
    student: Student,
    pooled: _Pooled,
    keep_embeddings: bool,
    meter: Meter | None,
) -> Iterator[ScoredClip]:
    waveforms = [event.waveform for event in waiting if isinstance(event, Chunk)]
    started = time.perf_counter()
    embeddings: Iterator[NDArray[np.float32] | None]
    if not waveforms:
        scores, embeddings = iter(()), iter(())
    elif keep_embeddings:
        matrix, vectors = student.score(waveforms, embeddings=True)
        scores, embeddings = iter(matrix), iter(vectors)
    else:
        scores, embeddings = iter(student.score(waveforms)), iter([None] * len(waveforms))
    if meter is not None and waveforms:
        latency_s = time.perf_counter() - started
        meter.add("num_inferences", len(waveforms))
        meter.observe("inference_batch_latency_micro_secs", 1e6 * latency_s)
        meter.observe("inference_request_batch_size", len(waveforms))
        meter.observe("inference_request_batch_byte_size", sum(w.nbytes for w in waveforms))
    for event in waiting:
        if isinstance(event, Chunk):
            pooled.add(event, next(scores), next(embeddings))
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
        if clip.error is not None or self._scores is None:
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
