"""Tags clips inside someone else's Beam pipeline: `TagClips`, and `StudentModelHandler`.

`tag_clips` does the work of both. What reads, scores and writes whole shards is
`transforms.annotate`; docs/beam.md says when to use which.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import apache_beam as beam
import numpy as np
import xxhash
from apache_beam.metrics import Metrics
from apache_beam.ml.inference.base import ModelHandler, PredictionResult
from apache_beam.utils.shared import Shared
from apache_beam.utils.windowed_value import WindowedValue
from numpy.typing import NDArray

from student.feature_spec import FRAME_SAMPLES, FeatureSpec
from student.model import PADS, Pad, Student
from transforms.annotate import empty_into_beam
from transforms.checkpoint import local_checkpoint
from transforms.chunk import cut_chunks, hop_samples_of
from transforms.decode import SourceFacts
from transforms.decode_clip import decode_clips
from transforms.meter import NAMESPACE, Meter
from transforms.records import Chunk, ClipEnd, ClipError, EncodedClip, ScoredClip
from transforms.score import Pool, score_clips
from transforms.storage import DEFAULT_ACCESS
from transforms.write import RowOptions, tags_of

Audio = bytes | NDArray[np.float32]
Key = TypeVar("Key")

MAX_BATCH_CLIPS = 64  # as many chunks as a GPU takes of Distil-AST at once
_MAX_HELD_BYTES = 64 << 20  # encoded audio that waits for a full batch, per thread


class Tag(NamedTuple):
    """A label whose score reaches its threshold."""

    index: int  # position in the scores
    mid: str  # AudioSet's id; empty for a label that is not AudioSet's
    name: str
    score: float


class Fault(NamedTuple):
    """Why a clip has no scores, or those of a part: the `error` of docs/schema.md."""

    stage: str
    type: str
    message: str


# Frozen, because Beam would otherwise take it for a row of its own and fail on the array.
@dataclass(frozen=True)
class TaggedClip:
    """What is known of one clip; the fields are the columns of docs/schema.md.

    Two are equal when all but their `scores` are: the tags hold what counts of those.
    """

    scores: NDArray[np.float32] | None = field(
        compare=False
    )  # [labels]; None in a clip that failed
    tags: tuple[Tag, ...]  # highest first; empty in a clip that failed
    duration_s: float | None
    sample_rate: int | None  # Hz, of the source
    channels: int | None  # of the source
    codec: str | None  # None for a waveform
    audio_xxh128: str | None  # of the encoded bytes; None for a waveform
    peak_dbfs: float | None
    rms_dbfs: float | None
    error: Fault | None


def tag_clips(
    clips: Iterable[Audio],
    student: Student,
    *,
    thresholds: float | Sequence[float | None] | None = None,
    top_k: int | None = None,
    pool: Pool = "max",
    chunk_hop_s: float | None = None,
    meter: Meter | None = None,
) -> list[TaggedClip]:
    """Tags every clip: as many out as in, in order.

    A clip that cannot be tagged has an `error`, and the others go on. Chunks of
    several clips share a batch of the model; no more of them than a batch holds are
    in memory at a time.

    Args:
        clips: each the bytes of an audio file, or float32 [samples] in [-1, 1], mono,
            at the student's rate.
        student: the model.
        thresholds: score from which a label is a tag: one for all labels, or one each, where
            None means never; None alone is the checkpoint's own.
        top_k: at most so many tags a clip.
        pool: a clip's score is the maximum or the mean over its chunks.
        chunk_hop_s: seconds from one chunk's start to the next one's, less than a chunk's length
            where they are to overlap; None is that length.
        meter: counts chunks and observes each batch.

    Raises:
        ValueError: `thresholds` is neither one number nor one a label, or `chunk_hop_s` is
            longer than a chunk.
    """
    options = RowOptions(_per_label(thresholds, student), top_k)
    hop_samples = hop_samples_of(chunk_hop_s, student.features)
    decoded = _decode(clips, student.features, hop_samples)
    scored = score_clips(decoded, student, pool, meter=meter)
    return [_tagged(clip, student, options) for clip in scored]


class TagClips(beam.PTransform):
    """Turns `(key, bytes of an audio file)` into `(key, TaggedClip)`, one for one.

    Keys, timestamps and windows stay as they are; the order of a bundle too. One
    student a process is loaded, whatever the number of threads.

    There are no resource hints on purpose: a hint on this step alone would end the
    stage before it, and the runner would store or send all audio in between.

    Args:
        checkpoint: `bundled`, a directory that every worker has, a URL (`gs://`), or a Hugging
            Face id.
        device: `auto` (CUDA where a worker has it, else its CPU), `cpu`, `cuda` or
            `cuda:N`. A named device that a worker lacks is an error.
        dtype: what the model computes in; `auto` is float32 on a CPU.
        thresholds: as in `tag_clips`.
        top_k: as in `tag_clips`.
        pool: as in `tag_clips`.
        chunk_hop_s: as in `tag_clips`.
        pad: as in `Student.load`.

    Raises:
        ValueError: an option cannot be right.
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        thresholds: float | Sequence[float | None] | None = None,
        top_k: int | None = None,
        pool: Pool = "max",
        chunk_hop_s: float | None = None,
        pad: Pad = "zero",
    ) -> None:
        super().__init__()
        self._tagger = _Tagger(
            checkpoint, device, dtype, _frozen(thresholds), top_k, pool, chunk_hop_s, pad
        )

    def expand(self, clips: beam.PCollection) -> beam.PCollection:
        """Tags the clips in the workers that hold them."""
        tag = beam.ParDo(_TagClips(self._tagger, Shared()))
        return clips | "TagClips" >> tag.with_input_types(tuple[Key, bytes]).with_output_types(
            tuple[Key, TaggedClip]
        )


class StudentModelHandler(ModelHandler[Audio, PredictionResult, Student]):
    """The student for Beam's `RunInference`, alone or inside a `KeyedModelHandler`.

    Examples are the bytes of an audio file, or mono float32 waveforms [samples] at the
    student's rate. Each result is a `PredictionResult` whose `inference` is a
    `TaggedClip` and whose `model_id` is the checkpoint. Its `example` is None: with
    the audio in it, every later step would carry the audio along. Use keys to tell
    which clip a result is of; `inference.audio_xxh128` tells it too.

    A clip that cannot be tagged is a `TaggedClip` with an `error`: nothing for the
    dead letters of `with_exception_handling`, whose unit is a whole batch.

    Args:
        checkpoint: as in `TagClips`, as the others are.
        device: a named device that a worker lacks is an error.
        dtype: what the model computes in.
        thresholds: as in `tag_clips`.
        top_k: as in `tag_clips`.
        pool: as in `tag_clips`.
        chunk_hop_s: as in `tag_clips`.
        pad: as in `Student.load`.
        min_batch_size: clips that are handed over at once, at least; None is as many as
            `max_batch_size`, which spares Beam its search for a size. The last batch of a
            bundle is what is left.
        max_batch_size: clips that are handed over at once, at most; their encoded
            audio is in memory together, once a thread.

    Raises:
        ValueError: an option cannot be right.
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        thresholds: float | Sequence[float | None] | None = None,
        top_k: int | None = None,
        pool: Pool = "max",
        chunk_hop_s: float | None = None,
        pad: Pad = "zero",
        min_batch_size: int | None = None,
        max_batch_size: int = MAX_BATCH_CLIPS,
    ) -> None:
        least = max_batch_size if min_batch_size is None else min_batch_size
        if not 1 <= least <= max_batch_size:
            raise ValueError(
                f"min_batch_size is {min_batch_size} and max_batch_size {max_batch_size}; expected "
                "1 <= min_batch_size <= max_batch_size"
            )
        # Neither large_model nor model_copies: with them Beam keeps the model in one process
        # and sends every call, audio included, to it over a socket. A student is small.
        super().__init__(min_batch_size=least, max_batch_size=max_batch_size)
        self._tagger = _Tagger(
            checkpoint, device, dtype, _frozen(thresholds), top_k, pool, chunk_hop_s, pad
        )

    def load_model(self) -> Student:
        """Loads the student.

        Raises:
            CheckpointError: the checkpoint is missing or unusable on this worker.
            DeviceError: the device is missing on this worker.
        """
        return self._tagger.load()

    def run_inference(
        self,
        batch: Sequence[Audio],
        model: Student,
        inference_args: Mapping[str, Any] | None = None,
    ) -> list[PredictionResult]:
        """One `PredictionResult` for each example of the batch, in order."""
        name = self._tagger.checkpoint
        return [PredictionResult(None, clip, name) for clip in self._tagger.tag(batch, model)]

    def get_num_bytes(self, batch: Sequence[Audio]) -> int:
        """Bytes of the batch's audio; Beam's own way is to pickle it all and look."""
        return sum(_size_bytes(clip) for clip in batch)

    def get_metrics_namespace(self) -> str:
        """Where RunInference's metrics appear, beside the counts of clips."""
        return NAMESPACE

    def validate_inference_args(self, inference_args: Mapping[str, Any] | None) -> None:
        """Refuses what would be without effect.

        Raises:
            ValueError: there are inference_args.
        """
        if inference_args:
            raise ValueError(
                f"RunInference has inference_args {sorted(inference_args)}, but the student takes none; "
                "thresholds, top_k, pool and the like are options of StudentModelHandler"
            )

    def update_model_path(self, model_path: str | None = None) -> None:
        """Takes another checkpoint from now on (RunInference's automatic model refresh)."""
        if model_path:
            self._tagger = replace(self._tagger, checkpoint=model_path)


@dataclass(frozen=True)
class _Tagger:
    """The options that both ways into Beam share."""

    checkpoint: str
    device: str
    dtype: str
    thresholds: float | tuple[float | None, ...] | None
    top_k: int | None
    pool: Pool
    chunk_hop_s: float | None
    pad: Pad

    def __post_init__(self) -> None:
        if self.pool not in ("max", "mean"):
            raise ValueError(f"pool is {self.pool!r}, expected 'max' or 'mean'")
        if self.pad not in PADS:
            raise ValueError(f"pad is {self.pad!r}, expected {' or '.join(map(repr, PADS))}")
        if self.chunk_hop_s is not None and not self.chunk_hop_s > 0:
            raise ValueError(f"chunk_hop_s is {self.chunk_hop_s}, expected a number above 0")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}, expected at least 1, or None for all tags")
        stated = self.thresholds if isinstance(self.thresholds, tuple) else (self.thresholds,)
        for threshold in stated:
            if threshold is not None and not 0 <= threshold <= 1:
                raise ValueError(f"a threshold is {threshold}, expected 0 to 1")

    def load(self) -> Student:
        checkpoint = local_checkpoint(self.checkpoint, DEFAULT_ACCESS)
        student = Student.load(checkpoint, self.device, self.dtype, self.pad)
        # A wrong number of thresholds, or too long a hop, is told before any clip.
        _per_label(self.thresholds, student)
        hop_samples_of(self.chunk_hop_s, student.features)
        return student

    def tag(
        self, clips: Sequence[Audio], student: Student, meter: Meter | None = None
    ) -> list[TaggedClip]:
        tagged = tag_clips(
            clips,
            student,
            thresholds=self.thresholds,
            top_k=self.top_k,
            pool=self.pool,
            chunk_hop_s=self.chunk_hop_s,
            meter=meter,
        )
        faults = [clip.error for clip in tagged if clip.error is not None and clip.scores is None]
        partial = sum(clip.error is not None for clip in tagged) - len(faults)
        Metrics.counter(NAMESPACE, "clips").inc(len(tagged))
        Metrics.counter(NAMESPACE, "clips_failed").inc(len(faults))
        Metrics.counter(NAMESPACE, "clips_partial").inc(partial)
        for fault in faults:
            Metrics.counter(NAMESPACE, f"clips_failed_{fault.stage}").inc()
        scored_s = sum(clip.duration_s or 0.0 for clip in tagged if clip.scores is not None)
        Metrics.counter(NAMESPACE, "audio_seconds").inc(round(scored_s))
        return tagged


class _TagClips(beam.DoFn):
    """Holds the student, and the clips of a bundle until they fill a batch.

    Not `BatchElements`: it gives a batch one timestamp, the end of its window, for
    all clips in it, and counts clips where it is their bytes that fill the memory.
    """

    def __init__(self, tagger: _Tagger, shared: Shared) -> None:
        self._tagger = tagger
        self._shared = shared

    def setup(self) -> None:
        """Loads the student, unless another thread of this process has."""
        self._meter = Meter()
        self._student = self._shared.acquire(self._load)

    def start_bundle(self) -> None:
        """Begins anew: what a failed bundle held comes again."""
        self._held: list[tuple[Any, Audio, Any, Any, Any]] = []
        self._held_bytes = 0

    def process(
        self,
        keyed: tuple[Any, Audio],
        timestamp: Any = beam.DoFn.TimestampParam,
        window: Any = beam.DoFn.WindowParam,
        pane: Any = beam.DoFn.PaneInfoParam,
    ) -> Iterator[WindowedValue]:
        """Takes a clip; gives those of a batch once it is full."""
        key, audio = keyed
        self._held.append((key, audio, timestamp, window, pane))
        self._held_bytes += _size_bytes(audio)
        if len(self._held) >= self._student.max_batch or self._held_bytes >= _MAX_HELD_BYTES:
            yield from self._tag_held()

    def finish_bundle(self) -> Iterator[WindowedValue]:
        """Gives the clips that are left."""
        yield from self._tag_held()

    def _tag_held(self) -> Iterator[WindowedValue]:
        held, self._held, self._held_bytes = self._held, [], 0
        tagged = self._tagger.tag([audio for _, audio, *_ in held], self._student, self._meter)
        empty_into_beam(self._meter)
        for (key, _, timestamp, window, pane), clip in zip(held, tagged, strict=True):
            yield WindowedValue((key, clip), timestamp, (window,), pane)

    def _load(self) -> Student:
        started = time.perf_counter()
        student = self._tagger.load()
        load_s = time.perf_counter() - started
        self._meter.observe("load_model_latency_milli_secs", 1_000 * load_s)
        self._meter.observe("model_byte_size", student.size_bytes)
        return student


def _decode(
    clips: Iterable[Audio], features: FeatureSpec, hop_samples: int | None
) -> Iterator[Chunk | ClipEnd]:
    """The chunks of each clip and its end, whatever kind of clip it is."""
    for clip in clips:
        if isinstance(clip, bytes):
            digest = xxhash.xxh128_hexdigest(clip)
            encoded = EncodedClip("", io.BytesIO(clip), len(clip), digest, {})
            yield from decode_clips([encoded], features, hop_samples=hop_samples)
            continue
        try:
            waveform = _checked(clip, features)
        except ClipError as fault:
            yield ClipEnd(None, _size_bytes(clip), None, {}, error=fault)
            continue
        rate = features.sample_rate
        yield from cut_chunks([waveform], features.chunk_samples, rate, hop_samples)
        yield _waveform_end(waveform, features.sample_rate)


def _checked(clip: Any, features: FeatureSpec) -> NDArray[np.float32]:
    """A waveform as float32 [samples].

    Raises:
        ClipError: it is none that can be scored.
    """
    if not isinstance(clip, np.ndarray):
        raise ClipError(
            "read",
            "NotAudio",
            f"the clip is of type {type(clip).__name__}, expected the bytes of an audio file or a "
            "float32 array",
        )
    if clip.ndim != 1:
        raise ClipError(
            "read",
            "NotMono",
            f"the waveform has shape {clip.shape}, expected mono audio [samples]; take the mean of "
            "the channels first",
        )
    if not np.issubdtype(clip.dtype, np.floating):
        raise ClipError(
            "read",
            "NotFloat",
            f"the waveform is of dtype {clip.dtype}, expected float32 in [-1, 1]; divide 16-bit "
            "samples by 32768 first",
        )
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, and is told
        waveform = clip.astype(np.float32, copy=False)
    if not np.isfinite(waveform).all():
        raise ClipError("decode", "NonFinite", "the audio holds NaN or infinite samples")
    if len(waveform) < FRAME_SAMPLES:
        raise ClipError(
            "decode",
            "TooShort",
            f"{len(waveform)} samples at {features.sample_rate} Hz are less than one analysis frame "
            f"of {FRAME_SAMPLES}",
        )
    return waveform


def _waveform_end(waveform: NDArray[np.float32], sample_rate: int) -> ClipEnd:
    energy = float(np.square(waveform, dtype=np.float64).sum())
    peak = float(np.abs(waveform).max())
    facts = SourceFacts("", sample_rate, 1, len(waveform), peak, energy)
    return ClipEnd(
        member=None,
        size_bytes=waveform.nbytes,
        xxh128=None,
        metadata={},
        sample_rate=sample_rate,
        channels=1,
        duration_s=facts.duration_s,
        peak_dbfs=facts.peak_dbfs,
        rms_dbfs=facts.rms_dbfs,
    )


def _tagged(scored: ScoredClip, student: Student, options: RowOptions) -> TaggedClip:
    clip, error, tags = scored.clip, scored.clip.error, []
    if scored.scores is not None:
        tags = tags_of(scored.scores, student.labels, options)
    return TaggedClip(
        scores=scored.scores,
        tags=tuple(Tag(**tag) for tag in tags),
        duration_s=clip.duration_s,
        sample_rate=clip.sample_rate,
        channels=clip.channels,
        codec=clip.codec,
        audio_xxh128=clip.xxh128,
        peak_dbfs=clip.peak_dbfs,
        rms_dbfs=clip.rms_dbfs,
        error=None if error is None else Fault(error.stage, error.type, error.message),
    )


def _per_label(
    thresholds: float | Sequence[float | None] | None, student: Student
) -> tuple[float | None, ...]:
    """One threshold a label.

    Raises:
        ValueError: there are neither one nor as many as labels.
    """
    labels = len(student.labels)
    if thresholds is None:
        return student.checkpoint.thresholds
    if np.ndim(thresholds) == 0:
        return (float(thresholds),) * labels
    if len(thresholds) != labels:
        raise ValueError(
            f"there are {len(thresholds)} thresholds, but checkpoint {student.checkpoint.name!r} has "
            f"{labels} labels; give one number for all, or one a label in the order of the scores"
        )
    return _as_floats(thresholds)


def _frozen(
    thresholds: float | Sequence[float | None] | None,
) -> float | tuple[float | None, ...] | None:
    if thresholds is None or np.ndim(thresholds) == 0:
        return thresholds if thresholds is None else float(thresholds)
    return _as_floats(thresholds)


def _as_floats(thresholds: Sequence[float | None]) -> tuple[float | None, ...]:
    return tuple(None if threshold is None else float(threshold) for threshold in thresholds)


def _size_bytes(clip: Any) -> int:
    return (
        clip.nbytes if isinstance(clip, np.ndarray) else len(clip) if isinstance(clip, bytes) else 0
    )
