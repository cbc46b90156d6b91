"""Annotates shards: one shard in, one Parquet file out."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import apache_beam as beam
import torch
from apache_beam.metrics import Metrics
from apache_beam.utils.shared import Shared

from student.checkpoint import CheckpointError
from student.feature_spec import FeatureSpec
from student.model import Pad, Student, devices_of
from transforms.checkpoint import local_checkpoint
from transforms.claim import claim_number
from transforms.decode import DEFAULT_LIMITS, Limits, take_decode_s
from transforms.decode_clip import decode_clips
from transforms.decode_pool import DecodePool
from transforms.meter import NAMESPACE, Meter, Stopwatch
from transforms.output import Output, open_output
from transforms.progress import ProgressFile
from transforms.read import read_clips
from transforms.readahead import read_ahead
from transforms.records import (
    Chunk,
    ClipEnd,
    EncodedClip,
    ScoredClip,
    Shard,
    UnreadableClip,
    clip_id_of,
    name_of,
)
from transforms.retry import Mending, Retry, RetryError
from transforms.score import Pool, score_clips
from transforms.source import describe_source, what_changed
from transforms.storage import DEFAULT_ACCESS, Access, public_url
from transforms.write import (
    CLIPS_FOLDER,
    RowOptions,
    ShardSummary,
    check_claim,
    clip_row,
    clips_schema,
    read_footer,
    read_summary,
    write_rows,
)

logger = logging.getLogger(__name__)

_BATCHES_AHEAD = 2  # decoded chunks that wait for the model, in batches
_GRACE_S = 5.0
_REPORT_EVERY_S = 60.0  # how often a worker logs which side waits
_METRICS_EVERY_S = 2.0  # how often counts go to Beam while a shard is under way


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
    versions: tuple[tuple[str, str], ...] = ()  # (package, version) that launched, to compare
    access: Access = DEFAULT_ACCESS
    progress_folder: str | None = None  # where local workers leave their counts
    pad: Pad = "zero"  # of `Student.load`
    hop_samples: int | None = None  # of `cut_chunks`
    worker_processes: int = 1  # of one machine
    worker_devices: int = 1  # which these share out among themselves
    decode_processes: int = 0  # of each worker thread; 0: it decodes in a thread beside it
    limits: Limits = DEFAULT_LIMITS  # of one clip
    refresh: bool = False  # shards whose source is another by now take the place of their file
    retry: Retry | None = None  # only rows that failed are done, in files that are there


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
    """Holds the students of its process, whatever the number of threads."""

    def __init__(self, annotation: Annotation, shared: Shared) -> None:
        self._annotation = annotation
        self._shared = shared

    def setup(self) -> None:
        """Loads a student, unless another thread of this process has."""
        check_versions(self._annotation.versions)
        self._meter = Meter()
        self._students = self._shared.acquire(lambda: Students(self._annotation))
        self._student = self._students.take(self._meter)
        self._output = open_output(self._annotation.output, self._annotation.access, self._meter)
        self._progress = ProgressFile(self._annotation.progress_folder)
        self._reported_at = time.monotonic()
        self._pool = pool_of(self._annotation, self._student.features)

    def teardown(self) -> None:
        """Ends the processes that decode."""
        if getattr(self, "_pool", None) is not None:
            self._pool.close()

    def process(self, shard: Shard) -> Iterator[ShardSummary]:
        """Annotates one shard."""
        work = annotate_shard if self._annotation.retry is None else retry_shard
        yield work(
            shard,
            self._student,
            self._annotation,
            self._output,
            self._progress,
            self._meter,
            self._report,
            self._pool,
        )
        self._report(now=True)

    def _report(self, *, now: bool = False) -> None:
        """Hands counts to Beam, now and then."""
        if not now and time.monotonic() - self._reported_at < _METRICS_EVERY_S:
            return
        self._reported_at = time.monotonic()
        self._students.waits.add(empty_into_beam(self._meter))


def pool_of(annotation: Annotation, features: FeatureSpec) -> DecodePool | None:
    """The processes that decode for one worker thread; None where a thread does."""
    if not annotation.decode_processes:
        return None
    return DecodePool(
        features,
        annotation.decode_processes,
        # The process itself ends what is slow; this is for what hangs inside of a codec.
        clip_timeout_s=annotation.limits.clip_timeout_s + _GRACE_S,
        limits=annotation.limits,
        hop_samples=annotation.hop_samples,
    )


def empty_into_beam(meter: Meter) -> dict[str, list[int]]:
    """Moves what a meter holds into Beam's metrics; gives the observed values.

    To be called by the thread that runs a DoFn: Beam ignores the others.
    """
    counts, values = meter.take()
    for name, count in counts.items():
        Metrics.counter(NAMESPACE, name).inc(count)
    for name, observed in values.items():
        for value in observed:
            Metrics.distribution(NAMESPACE, name).update(value)
    return values


class Students:
    """The students of one process: one on each device, shared by its threads.

    Threads are dealt over the devices in turn.
    """

    def __init__(self, annotation: Annotation) -> None:
        self._annotation = annotation
        self._devices = itertools.cycle(_devices_here(annotation))
        self._loaded: dict[str, Student] = {}
        self._lock = threading.Lock()
        self.waits = Waits()

    def take(self, meter: Meter) -> Student:
        """The student for one more thread.

        Raises:
            CheckpointError: the checkpoint here is not the one that the run began with.
            DeviceError: the device is missing.
        """
        with self._lock:
            device = next(self._devices)
            if device not in self._loaded:
                started = time.monotonic()
                student = load_student(self._annotation, device)
                meter.observe("load_model_latency_milli_secs", 1_000 * (time.monotonic() - started))
                meter.observe("model_byte_size", student.size_bytes)
                self._loaded[device] = student
            return self._loaded[device]


def _devices_here(annotation: Annotation) -> list[str]:
    """The devices of this process: all of the machine's, or where there are several processes its
    own or the one that it shares."""
    processes = annotation.worker_processes
    if processes == 1:
        return devices_of(annotation.device)
    assert annotation.progress_folder is not None  # several processes are of a local run
    number = claim_number(Path(annotation.progress_folder), processes)
    if annotation.device.startswith("cuda:"):
        return devices_of(annotation.device)
    if annotation.device == "cuda":
        return devices_of(f"cuda:{number % annotation.worker_devices}")
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
    return devices_of(annotation.device)


class Waits:
    """How long the model and the decoders of a process waited for each other; logged now and then."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._for_audio_msec = self._for_model_msec = self._busy_msec = 0
        self._logged_at = time.monotonic()

    def add(self, values: dict[str, list[int]]) -> None:
        """Adds what a meter observed, and logs at most once in `_REPORT_EVERY_S`."""
        with self._lock:
            self._for_audio_msec += sum(values.get("wait_for_audio_msec", ()))
            self._for_model_msec += sum(values.get("wait_for_model_msec", ()))
            self._busy_msec += sum(values.get("shard_msec", ()))
            if self._busy_msec and time.monotonic() - self._logged_at >= _REPORT_EVERY_S:
                logger.info("%s", self.sentence())
                self._for_audio_msec = self._for_model_msec = self._busy_msec = 0
                self._logged_at = time.monotonic()

    def sentence(self) -> str:
        """Which side waits, in words."""
        audio, model = (
            100 * waited / max(1, self._busy_msec)
            for waited in (self._for_audio_msec, self._for_model_msec)
        )
        if audio > model:
            verdict = (
                "reading and decoding are the bottleneck: more vCPUs or threads for each model"
            )
        else:
            verdict = "the model is the bottleneck: a faster device, or more of them"
        return (
            f"the model waited for audio {audio:.0f} % of the time, "
            f"decoding waited for the model {model:.0f} %; {verdict}"
        )


def check_versions(launched: Iterable[tuple[str, str]]) -> None:
    """Makes sure that this worker runs the code that the job was launched with.

    Raises:
        RuntimeError: it has another version of earmark or Beam.
    """
    for package, expected in launched:
        found = version(package)
        if found != expected:
            raise RuntimeError(
                f"this worker has {package} {found}, the job was launched with {expected}: launch it "
                "from the same image or environment that the workers run (--sdk_container_image)"
            )


def load_student(annotation: Annotation, device: str | None = None) -> Student:
    """The student of an annotation, on its device or on `device`.

    Raises:
        CheckpointError: the checkpoint here is not the one that the run began with.
    """
    student = Student.load(
        local_checkpoint(annotation.checkpoint, annotation.access),
        device or annotation.device,
        annotation.dtype,
        annotation.pad,
    )
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
    shard: Shard,
    student: Student,
    annotation: Annotation,
    output: Output,
    progress: ProgressFile,
    meter: Meter,
    report: Callable[[], None] = lambda: None,
    pool: DecodePool | None = None,
    clips: Iterable[EncodedClip | UnreadableClip] | None = None,
) -> ShardSummary:
    """Reads, decodes, scores and writes one shard, as one stream.

    Decoding runs in a thread beside the model, a few batches ahead of it; at no
    time are more clips in memory than that.

    Args:
        shard: what to read.
        student: scores.
        annotation: how.
        output: where the shard's file is published.
        progress: shows how far a local run is.
        meter: counts what `transforms.meter` names.
        report: called after each clip, in this thread.
        pool: decodes in processes, with the annotation's hop; without it a thread does.
        clips: those of the shard, where they are in memory already; else they are read.

    Raises:
        OSError: the shard cannot be read or its file not be written; then no file
            is published.
    """
    name = f"{CLIPS_FOLDER}/{shard.id}.parquet"
    source = describe_source(shard)
    replaces = output.version(name) if annotation.refresh else None
    if replaces is not None or output.exists(name):
        footer = read_footer(output, name)
        changed = footer.source is not None and what_changed(footer.source, shard)
        if replaces is None or not changed:
            # A runner repeats a whole bundle of shards for one that failed.
            meter.add("shards_published_by_another")
            return footer.summary
    # Where a clip takes the whole process down, this line is what names its shard.
    logger.info("begins %s", public_url(shard.uri))
    watches = _Watches()
    options = annotation.rows
    if clips is None:
        clips = islice(read_clips(shard, annotation.access, meter), shard.max_clips)
    scored = _scored(clips, student, annotation, watches, pool, meter)
    writing_since = time.perf_counter()
    summary, size_bytes = write_rows(
        _rows(_counted(scored, progress, meter, report), shard, student, options),
        clips_schema(len(student.labels), student.embedding_size, options),
        output,
        name,
        annotation.run,
        before_publishing=lambda: check_claim(output, annotation.run),
        source=source,
        replaces=replaces,
    )
    write_s = time.perf_counter() - writing_since - watches.scoring.seconds
    meter.add("audio_seconds", round(summary.audio_s))
    _done(student, watches, write_s, size_bytes, progress, meter)
    return summary


def retry_shard(
    shard: Shard,
    student: Student,
    annotation: Annotation,
    output: Output,
    progress: ProgressFile,
    meter: Meter,
    report: Callable[[], None] = lambda: None,
    pool: DecodePool | None = None,
) -> ShardSummary:
    """As `annotate_shard`, for the rows of a finished file that failed; see `transforms.retry`.

    A shard whose other rows cannot be vouched for any more keeps its file, and says so in
    the log and in `shards_not_retried`.
    """
    assert annotation.retry is not None
    name = f"{CLIPS_FOLDER}/{shard.id}.parquet"
    logger.info("begins %s", public_url(shard.uri))
    watches = _Watches()
    try:
        mending = Mending(output, name, shard, annotation.retry)
        if mending.to_do:
            clips = islice(read_clips(shard, annotation.access, meter), shard.max_clips)
            scored = _scored(mending.failed(clips), student, annotation, watches, pool, meter)
            writing_since = time.perf_counter()
            counted = _counted(scored, progress, meter, report)
            size_bytes = mending.write(
                (clip_row(clip, shard, "", student.labels, annotation.rows) for clip in counted),
                annotation.run,
                before_publishing=lambda: check_claim(output, annotation.run),
            )
            write_s = time.perf_counter() - writing_since - watches.scoring.seconds
            _done(student, watches, write_s, size_bytes, progress, meter)
            return mending.summary
    except RetryError as error:
        logger.error("%s", error)
        meter.add("shards_not_retried")
    progress.counts.shards += 1
    progress.write(now=True)
    return read_summary(output, name)[0]


def _scored(
    clips: Iterable[EncodedClip | UnreadableClip],
    student: Student,
    annotation: Annotation,
    watches: _Watches,
    pool: DecodePool | None,
    meter: Meter,
) -> Iterator[ScoredClip]:
    ahead = _BATCHES_AHEAD * student.max_batch
    decoding = _decoded(
        clips, student.features, annotation.limits, annotation.hop_samples, watches, pool
    )
    scored = score_clips(
        watches.audio.making(read_ahead(decoding, ahead, meter)),
        student,
        annotation.pool,
        keep_chunks=annotation.rows.chunks or annotation.rows.segments,
        keep_embeddings=annotation.rows.embeddings,
        meter=meter,
    )
    return watches.scoring.making(scored)


def _done(
    student: Student,
    watches: _Watches,
    write_s: float,
    size_bytes: int,
    progress: ProgressFile,
    meter: Meter,
) -> None:
    meter.add("shards")
    meter.add("bytes_written", size_bytes)
    meter.add("shards_published_by_another", size_bytes == 0)
    meter.add("batch_halvings", student.take_halvings())
    watches.tell(meter, student.take_stage_s() | {"write": write_s})
    progress.counts.shards += 1
    progress.write(now=True)


class _Watches:
    """Where the time of a shard goes, on its decoding side and on its model's side."""

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self.reading = Stopwatch()
        self.decoding = Stopwatch()  # reading included
        self.decoders_s: dict[str, float] = {}  # of `take_decode_s`
        self.audio = Stopwatch()  # the model's side, waiting for decoded audio
        self.scoring = Stopwatch()  # that included, and the model

    def tell(self, meter: Meter, model_side_s: dict[str, float]) -> None:
        """Observes the stages of a shard that is done, in microseconds.

        Args:
            meter: observes.
            model_side_s: seconds of "features", "transfer", "model" and "write".
        """
        shard_s = time.perf_counter() - self._since
        stages_s = {**self.decoders_s, **model_side_s}
        stages_s["read"] = stages_s.get("read", 0.0) + self.reading.seconds
        stages_s["decoding_idle"] = max(0.0, shard_s - self.decoding.seconds)
        stages_s["model_idle"] = self.audio.seconds
        for stage, seconds in stages_s.items():
            meter.observe(f"{stage}_usec", 1e6 * seconds)
        meter.observe("shard_msec", 1e3 * shard_s)


def _decoded(
    clips: Iterable[EncodedClip | UnreadableClip],
    features: FeatureSpec,
    limits: Limits,
    hop_samples: int | None,
    watches: _Watches,
    pool: DecodePool | None,
) -> Iterator[Chunk | ClipEnd]:
    """Chunks and clips, for the decoding thread: its stages are in `watches` once it ends."""
    reading = watches.reading.making(clips)
    if pool is None:
        decoded = decode_clips(reading, features, limits, hop_samples)
    else:
        decoded = pool.decode(reading)
    take_s = take_decode_s if pool is None else pool.take_decode_s
    take_s()
    try:
        yield from watches.decoding.making(decoded)
    finally:
        watches.decoders_s = take_s()


def _rows(
    scored: Iterable[ScoredClip], shard: Shard, student: Student, options: RowOptions
) -> Iterator[dict[str, Any]]:
    seen: dict[str, int] = {}
    for clip in scored:
        clip_id = clip_id_of(shard.id, name_of(clip.clip), seen)
        yield clip_row(clip, shard, clip_id, student.labels, options)


def _counted(
    scored: Iterable[ScoredClip], progress: ProgressFile, meter: Meter, report: Callable[[], None]
) -> Iterator[ScoredClip]:
    for clip in scored:
        error = clip.clip.error
        failed = error is not None and clip.scores is None
        meter.add("clips")
        meter.add("bytes_read", clip.clip.size_bytes)
        if error is not None and not failed:
            meter.add("clips_partial")
        elif error is not None:
            meter.add("clips_failed")
            meter.add(f"clips_failed_{error.stage}")
        progress.counts.clips += 1
        progress.counts.failed += failed
        progress.counts.audio_s += clip.clip.duration_s or 0.0
        progress.counts.bytes += clip.clip.size_bytes
        progress.write()
        report()
        yield clip
