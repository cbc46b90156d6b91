"""Annotates shards: one shard in, one Parquet file out."""

from __future__ import annotations

import json
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
    RUN_FILE,
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
    weights_sha256: str  # a worker that finds other weights or another config stops
    config_sha256: str
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
    for what in ("weights", "config"):
        found = getattr(student.checkpoint, f"{what}_sha256")
        expected = getattr(annotation, f"{what}_sha256")
        if found != expected:
            raise CheckpointError(
                f"checkpoint {annotation.checkpoint!r} has {what} {found[:12]}... on this worker, but "
                f"the run was started with {expected[:12]}...; give all workers the same files"
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
        before_publishing=lambda: check_claim(Path(annotation.output), annotation.run),
    )
    progress.counts.shards += 1
    progress.write(now=True)
    return summary


def check_claim(output: Path, run: str) -> None:
    """Makes sure that `output` is still of this run's making.

    Raises:
        RuntimeError: another run has emptied it with --overwrite since.
    """
    try:
        claimed = json.loads((output / RUN_FILE).read_text("utf-8"))["fingerprint"]
    except FileNotFoundError:
        claimed = None
    if claimed != json.loads(run)["fingerprint"]:
        raise RuntimeError(
            f"another run has started {output} anew; this one publishes nothing more"
        )


def _rows(
    scored: Iterable[ScoredClip], shard: Shard, student: Student, options: RowOptions
) -> Iterator[dict[str, Any]]:
    seen: dict[str, int] = {}
    for clip in scored:
        clip_id = unique(f"{shard.id}/{clip.clip.member or '(broken shard)'}", seen)
        yield clip_row(clip, shard, clip_id, student.labels, options)


def unique(clip_id: str, seen: dict[str, int]) -> str:
    """`clip_id`, with `#2`, `#3`, ... where a shard names a member more than once.

    `seen` holds how often each id was given so far; the answer is added to it.
    """
    number = seen.get(clip_id, 0) + 1
    numbered = clip_id if number == 1 else f"{clip_id}#{number}"
    while number > 1 and numbered in seen:  # a member that is itself named `x#2`
        number += 1
        numbered = f"{clip_id}#{number}"
    seen[clip_id] = number
    seen.setdefault(numbered, 1)
    return numbered


def _counted(scored: Iterable[ScoredClip], progress: ProgressFile) -> Iterator[ScoredClip]:
    for clip in scored:
        progress.counts.clips += 1
        progress.counts.failed += clip.clip.error is not None
        progress.counts.audio_s += clip.clip.duration_s or 0.0
        progress.counts.bytes += clip.clip.size_bytes
        progress.write()
        yield clip
