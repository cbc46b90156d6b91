"""Annotates shards: one shard in, one Parquet file out."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.utils.shared import Shared

from student.checkpoint import CheckpointError
from student.model import Student
from transforms.progress import ProgressFile
from transforms.read import read_clips
from transforms.readahead import read_ahead
from transforms.records import ScoredClip, Shard
from transforms.score import Pool, decode_clips, score_clips
from transforms.write import (
    CLIPS_FOLDER,
    RowOptions,
    ShardSummary,
    clip_row,
    clips_schema,
    write_rows,
)

_BATCHES_AHEAD = 2  # decoded chunks that wait for the model, in batches


@dataclass(frozen=True)
class Annotation:
    """How shards are annotated, and where their files go."""

    checkpoint: str
    weights_sha256: str  # a worker that finds other weights stops
    device: str
    dtype: str
    pool: Pool
    rows: RowOptions
    output: str
    run: str  # the run description, JSON, for every file's metadata
    progress_folder: str | None = None  # where local workers leave their counts


class AnnotateShards(beam.PTransform):
    """Scores every clip of every `Shard` and writes a Parquet file for each.

    Gives one `ShardSummary` a shard, once its file is published. Only shard
    descriptions are shuffled: the audio stays in the worker that reads it.
    """

    def __init__(self, annotation: Annotation) -> None:
        super().__init__()
        self._annotation = annotation

    def expand(self, shards: beam.PCollection) -> beam.PCollection:
        """Spreads the shards over the workers and annotates each."""
        return (
            shards
            | "SpreadShards" >> beam.Reshuffle()
            | "AnnotateShard" >> beam.ParDo(_AnnotateShard(self._annotation, Shared()))
        )


class _AnnotateShard(beam.DoFn):
    """Holds the student: one a process, whatever the number of threads."""

    def __init__(self, annotation: Annotation, shared: Shared) -> None:
        self._annotation = annotation
        self._shared = shared

    def setup(self) -> None:
        """Loads the student, unless another thread of this process has."""
        self._student = self._shared.acquire(lambda: load_student(self._annotation))
        self._progress = ProgressFile(self._annotation.progress_folder)

    def process(self, shard: Shard) -> Iterator[ShardSummary]:
        """Annotates one shard."""
        started = time.monotonic()
        summary = annotate_shard(shard, self._student, self._annotation, self._progress)
        Metrics.counter("earmark", "shards").inc()
        Metrics.counter("earmark", "clips").inc(summary.clips)
        Metrics.counter("earmark", "clips-failed").inc(summary.failed)
        Metrics.counter("earmark", "audio-seconds").inc(round(summary.audio_s))
        Metrics.distribution("earmark", "shard-msec").update(
            round(1_000 * (time.monotonic() - started))
        )
        yield summary


def load_student(annotation: Annotation) -> Student:
    """The student of an annotation.

    Raises:
        CheckpointError: the checkpoint here is not the one that the run began with.
    """
    student = Student.load(annotation.checkpoint, annotation.device, annotation.dtype)
    found = student.checkpoint.weights_sha256
    if found != annotation.weights_sha256:
        raise CheckpointError(
            f"checkpoint {annotation.checkpoint!r} has weights {found[:12]}... on this worker, but the "
            f"run was started with {annotation.weights_sha256[:12]}...; give all workers the same files"
        )
    return student


def annotate_shard(
    shard: Shard, student: Student, annotation: Annotation, progress: ProgressFile
) -> ShardSummary:
    """Reads, decodes, scores and writes one shard, as one stream.

    Decoding runs in a thread beside the model, a few batches ahead of it; at no
    time are more clips in memory than that.

    Raises:
        OSError: the shard cannot be read or its file not be written; then no file
            is published.
    """
    options = annotation.rows
    clips = islice(read_clips(shard), shard.max_clips)
    decoded = read_ahead(decode_clips(clips, student.features), _BATCHES_AHEAD * student.max_batch)
    scored = score_clips(
        decoded,
        student,
        annotation.pool,
        keep_chunks=options.chunks,
        keep_embeddings=options.embeddings,
    )
    summary = write_rows(
        _rows(_counted(scored, progress), shard, student, options),
        clips_schema(len(student.labels), student.embedding_size, options),
        Path(annotation.output) / CLIPS_FOLDER / f"{shard.id}.parquet",
        annotation.run,
    )
    progress.counts.shards += 1
    progress.write(now=True)
    return summary


def _rows(
    scored: Iterable[ScoredClip], shard: Shard, student: Student, options: RowOptions
) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    for clip in scored:
        clip_id = unique(f"{shard.id}/{clip.clip.member or '(broken shard)'}", seen)
        yield clip_row(clip, shard, clip_id, student.labels, options)


def unique(clip_id: str, seen: set[str]) -> str:
    """`clip_id`, with `#2`, `#3`, ... where a shard names a member twice; adds it to `seen`."""
    numbered, count = clip_id, 1
    while numbered in seen:
        count += 1
        numbered = f"{clip_id}#{count}"
    seen.add(numbered)
    return numbered


def _counted(scored: Iterable[ScoredClip], progress: ProgressFile) -> Iterator[ScoredClip]:
    for clip in scored:
        progress.counts.clips += 1
        progress.counts.failed += clip.clip.error is not None
        progress.counts.audio_s += clip.clip.duration_s or 0.0
        progress.counts.bytes += clip.clip.size_bytes
        progress.write()
        yield clip
