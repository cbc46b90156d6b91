"""What an output holds, measured in one pass over its rows: what `earmark report` shows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

from evaluation.scores import EvaluationError, Source, open_parquet
from student.labels import Label, ancestors, audioset_ontology
from transforms.readahead import read_ahead
from transforms.write import read_summary

# Scores are counted in bins that are even in their logit. Edges lie on the grid of bfloat16, so
# that the upper 16 bits of a float32 decide its bin, by a table.
BINS = 48
_LOGITS = np.linspace(-8, 8, BINS + 1)
_EDGES = (
    (1 / (1 + np.exp(-_LOGITS))).astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
).view(np.float32)
_BIN_OF = np.clip(
    np.searchsorted(
        _EDGES[1:-1], (np.arange(1 << 15, dtype=np.uint32) << 16).view(np.float32), "right"
    ),
    0,
    BINS - 1,
).astype(np.int32)

NEAR_LOGIT = 0.5  # a score is "just below" where its logit is at most so far below the threshold's
PAIRED_TAGS = 16  # tags of a clip, highest first, that count as there together
FULL_SCALE_DBFS = -0.01  # a peak from here on: 16-bit full scale is -0.0003
QUIET_DBFS = -60.0

SIMILAR_DIMENSIONS = 32  # of the projection that near-duplicates are looked for in
SIMILAR_CLIPS = 1_000_000  # at most so many are held against each other, of 66 bytes each
_SIMILAR_TABLES, _SIMILAR_KEYS = 4, 8  # tables, and dimensions that make a table's key
# One sound as FLAC, Vorbis and Opus, by the bundled student: 0.07 and 0.004.
SCORES_ALIKE = 0.08  # root mean square difference of the logits
EMBEDDINGS_ALIKE = 0.005  # 1 - cosine
LENGTHS_ALIKE = 0.05  # of the logarithm of the duration
_LOGIT_LIMIT = 6.0  # beyond it a logit is noise

_ROWS_AT_ONCE = 4_096  # 9 MB of 527 float32 scores
_AHEAD = 2
_EXAMPLES = 5
_GROUPS = 10
_TABLE_CLIPS = 2_000

Place = tuple[int, int]  # (file, row in it)
Histogram = tuple[NDArray[np.float64], NDArray[np.int64]]  # edges, counts

_DURATION_EDGES = np.geomspace(0.01, 100_000, 141)
_LEVEL_EDGES = np.arange(-100.0, 7.0)


@dataclass(frozen=True)
class Reason:
    """Clips with one kind of error."""

    stage: str
    type: str
    clips: int
    partly: int  # of them, those that have scores all the same
    examples: tuple[tuple[str, str], ...]  # (clip_id, message)


@dataclass(frozen=True)
class LabelFacts:
    """One label over all clips with scores."""

    label: Label
    threshold: float | None
    clips: int  # that have it as a tag
    mean: float
    highest: float
    just_below: int  # clips whose score lies within NEAR_LOGIT below the threshold
    counts: NDArray[np.int64]  # [BINS] clips by score, even in the logit from -8 to 8


@dataclass(frozen=True)
class Alike:
    """Clips that are the same, or nearly."""

    looked_at: int
    groups: int
    clips: int  # in these groups
    examples: tuple[tuple[int, tuple[str, ...]], ...]  # (clips of the group, some clip_ids)


@dataclass(frozen=True)
class Shown:
    """A clip that a label shows."""

    row: dict[str, Any]  # its columns
    score: float
    kind: str  # "best", "borderline" or "random"


@dataclass
class Report:
    """What an output holds. Clips are counted by rows; a row may be the word of a broken shard."""

    clips: int = 0
    scored: int = 0
    failed: int = 0  # without scores
    partly: int = 0  # with scores and an error
    audio_s: float = 0.0
    untagged: int = 0  # scored, without a tag
    tags: int = 0
    reasons: list[Reason] = field(default_factory=list)
    labels: list[LabelFacts] = field(default_factory=list)  # by index
    pairs: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    nodes: dict[str, int] = field(default_factory=dict)  # mid -> clips with it or one below it
    tags_per_clip: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    durations: Histogram = (_DURATION_EDGES, np.zeros(0, np.int64))
    peaks: Histogram = (_LEVEL_EDGES, np.zeros(0, np.int64))
    levels: Histogram = (_LEVEL_EDGES, np.zeros(0, np.int64))
    sample_rates: Counter[int] = field(default_factory=Counter)
    channels: Counter[int] = field(default_factory=Counter)
    codecs: Counter[str] = field(default_factory=Counter)
    longest_s: float = 0.0
    silent: int = 0  # digital silence
    quiet: int = 0  # below QUIET_DBFS, digital silence apart
    full_scale: int = 0  # peak at full scale or beyond
    equal: Alike = Alike(0, 0, 0, ())
    similar: Alike = Alike(0, 0, 0, ())
    similar_by: str = "scores"  # or "embedding"
    shown: dict[int, list[Shown]] = field(default_factory=dict)  # label index -> clips
    table: list[dict[str, Any]] = field(default_factory=list)  # all clips, or some at random
    unreadable: list[str] = field(default_factory=list)  # files, with why
    has_chunks: bool = False


def measure(source: Source, *, labels: int = 12, each: int = 3, seed: int = 0) -> Report:
    """Reads an output once, and some rows a second time.

    Args:
        source: of `evaluation.scores.open_source`.
        labels: how many of the most frequent labels show clips.
        each: best, borderline and random clips of each.
        seed: of what is drawn at random.
    """
    random = np.random.default_rng(seed)
    files, tagged, unreadable = _readable(source)
    by_count = [label for label in source.labels if tagged[label.name]]
    by_count.sort(key=lambda label: (-tagged[label.name], label.index))
    tally = _Tally(source, [label.index for label in by_count[:labels]], each, random)
    for file, first, batch in read_ahead(_batches(source, files, unreadable), _AHEAD):
        tally.add(file, first, batch)
    report = tally.report()
    report.unreadable = sorted(unreadable.values())
    _name_clips(report, source, tally)
    return report


def thresholds_of(source: Source) -> list[float | None]:
    """The thresholds of an output's tags, one a label."""
    stated = source.run.get("thresholds", {})
    return [stated.get(label.name) for label in source.labels]


def rows_at(
    source: Source, places: Iterable[Place], columns: Sequence[str]
) -> dict[Place, dict[str, Any]]:
    """Some rows of an output, those of `columns` that it has."""
    by_file: dict[int, list[int]] = {}
    for file, row in sorted(set(places)):
        by_file.setdefault(file, []).append(row)
    found: dict[Place, dict[str, Any]] = {}
    for file, rows in by_file.items():
        with source.output.open(source.files[file]) as stream, open_parquet(stream) as parquet:
            wanted = [name for name in columns if name in parquet.schema_arrow.names]
            if not wanted:
                found |= {(file, row): {} for row in rows}
                continue
            first = 0
            for group in range(parquet.metadata.num_row_groups):
                end = first + parquet.metadata.row_group(group).num_rows
                inside = [row for row in rows if first <= row < end]
                if inside:
                    table = parquet.read_row_group(group, wanted, use_threads=False)
                    taken = table.take(pa.array([row - first for row in inside]))
                    for row, values in zip(inside, taken.to_pylist(), strict=True):
                        found[file, row] = values
                first = end
    return found


def clip_name(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells a clip by its bytes: hash, member, and the part of a recording that it is."""
    return row.get("audio_xxh128"), row.get("member"), row.get("start_s"), row.get("end_s")


def _readable(source: Source) -> tuple[list[int], Counter[str], dict[int, str]]:
    """(the files that can be read, clips by tag as their footers say, what is wrong with others)."""
    files, tagged, unreadable = [], Counter[str](), {}
    for file, name in enumerate(source.files):
        try:
            summary, making = read_summary(source.output, name)
        except (OSError, ValueError) as error:
            unreadable[file] = f"{name}: {_reason(error)}"
            continue
        if making != source.run.get("fingerprint"):
            unreadable[file] = f"{name}: it is of another making than run.json"
            continue
        tagged.update(summary.tags)
        files.append(file)
    return files, tagged, unreadable


_COLUMNS = (
    "member", "duration_s", "sample_rate", "channels", "codec", "audio_xxh128", "peak_dbfs", "rms_dbfs",
    "start_s", "end_s", "tags.list.element.index", "scores", "error", "embedding",
)  # fmt: skip


def _batches(
    source: Source, files: Sequence[int], unreadable: dict[int, str]
) -> Iterator[tuple[int, int, pa.RecordBatch]]:
    """(file, first row, rows); a file that cannot be read to its end is noted."""
    for file in files:
        name, first = source.files[file], 0
        try:
            with source.output.open(name) as stream, open_parquet(stream) as parquet:
                names = parquet.schema_arrow.names
                wanted = [column for column in _COLUMNS if column.partition(".")[0] in names]
                for batch in parquet.iter_batches(_ROWS_AT_ONCE, columns=wanted, use_threads=False):
                    yield file, first, batch
                    first += batch.num_rows
        except (OSError, pa.ArrowException) as error:
            unreadable[file] = f"{name}: from row {first} on: {_reason(error)}"


class _Best:
    """The few rows of the lowest cost so far."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.rows: list[tuple[float, Place, float]] = []  # cost, place, score

    def offer(
        self, file: int, rows: NDArray[Any], costs: NDArray[Any], scores: NDArray[Any]
    ) -> None:
        """Takes those of some rows of a file that are among the best."""
        if len(self.rows) == self._count:
            better = costs < self.rows[-1][0]
            rows, costs, scores = rows[better], costs[better], scores[better]
        if len(costs) > self._count:
            lowest = np.argpartition(costs, self._count - 1)[: self._count]
            rows, costs, scores = rows[lowest], costs[lowest], scores[lowest]
        added = zip(costs.tolist(), rows.tolist(), scores.tolist(), strict=True)
        self.rows += [(cost, (file, row), score) for cost, row, score in added]
        self.rows = sorted(self.rows)[: self._count]


class _Tally:
    """Adds up batch after batch; memory does not grow with them but for the hashes and
    projections of clips."""

    def __init__(
        self, source: Source, shown: Sequence[int], each: int, random: np.random.Generator
    ) -> None:
        count = len(source.labels)
        self._source, self._each, self._random = source, each, random
        self._labels = count
        self._report = Report(tags_per_clip=np.zeros(count + 1, np.int64))
        self._errors: dict[tuple[str, str], list[Any]] = {}
        thresholds = np.array(thresholds_of(source), np.float64)  # None is NaN
        self._thresholds = np.where(np.isnan(thresholds), np.inf, thresholds).astype(np.float32)
        logits = _logit(np.clip(np.where(np.isnan(thresholds), 0.5, thresholds), 1e-6, 1 - 1e-6))
        below = 1 / (1 + np.exp(NEAR_LOGIT - logits))
        self._below = np.where(np.isnan(thresholds), np.inf, below).astype(np.float32)
        self._just_below = np.zeros(count, np.int64)
        self._bins = np.zeros(count * BINS, np.int64)
        self._offsets = (np.arange(count) * BINS).astype(np.int64)
        self._sums, self._highest = np.zeros(count), np.zeros(count, np.float32)
        self._tagged = np.zeros(count, np.int64)
        self._pairs = np.zeros(count * count, np.int64)
        self._up, self._up_start, self._nodes = _closure(source.labels)
        self._node_clips = np.zeros(len(self._nodes), np.int64)
        # Three times as many as are shown: some will be the same audio.
        self.best = {i: _Best(3 * each) for i in shown}
        self.borderline = {i: _Best(3 * each) for i in shown}
        self.random = {i: _Best(3 * each) for i in shown}
        self.table = _Best(_TABLE_CLIPS)
        self._hashes: list[NDArray[np.bytes_]] = []
        self._hash_places: list[NDArray[np.int64]] = []  # [rows, 2] file, row
        self._projection: NDArray[np.float32] | None = None
        self._points: list[NDArray[np.float16]] = []
        self._point_places: list[NDArray[np.int64]] = []
        self._points_held = 0
        self.equal_examples: list[tuple[int, list[Place]]] = []
        self.similar_examples: list[tuple[int, list[Place]]] = []

    def add(self, file: int, first: int, batch: pa.RecordBatch) -> None:
        """Adds rows `first` and following of a file."""
        report = self._report
        rows = np.arange(first, first + batch.num_rows)
        report.clips += batch.num_rows
        self._add_facts(batch)
        self.table.offer(file, rows, self._random.random(batch.num_rows), np.zeros(batch.num_rows))
        scores, scored = self._scores_of(batch)
        self._add_errors(file, first, batch, scored)
        report.scored += len(scores)
        self._add_hashes(file, rows, batch)
        if not len(scores):
            return
        self._add_scores(scores)
        tags, starts = self._add_tags(batch, scored)
        self._add_points(file, rows[scored], batch, scored, scores)
        draws = self._random.random(len(scores))
        tag_rows = np.repeat(np.arange(len(scores)), np.diff(starts))
        for index, best in self.best.items():
            of_label = scores[:, index]
            has = np.zeros(len(scores), bool)
            has[tag_rows[tags == index]] = True
            best.offer(file, rows[scored][has], -of_label[has], of_label[has])
            self.random[index].offer(file, rows[scored][has], draws[has], of_label[has])
            far = np.abs(of_label - self._thresholds[index])
            self.borderline[index].offer(file, rows[scored], far, of_label)

    def _scores_of(self, batch: pa.RecordBatch) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """(scores [scored, labels], which rows have them): a failed row's are a list of nulls."""
        column = batch.column("scores")
        present = np.ones(len(column), bool)
        if column.null_count:
            present = column.is_valid().to_numpy(zero_copy_only=False)
            column = column.drop_null()
        flat = column.flatten()
        if len(flat) != len(column) * self._labels:
            raise EvaluationError(
                f"{self._source.uri!r} has rows of another number of scores than its labels.parquet has "
                f"labels ({self._labels}); take the folder as earmark annotate wrote it"
            )
        matrix = flat.to_numpy(zero_copy_only=False).reshape(len(column), self._labels)
        matrix = matrix.astype(np.float32, copy=False)
        if flat.null_count:
            known = ~np.isnan(matrix[:, 0])
            matrix = matrix[known]
            present[present] = known
        return matrix, present

    def _add_facts(self, batch: pa.RecordBatch) -> None:
        report = self._report

        def numbers(name: str) -> NDArray[np.float64]:
            values = batch.column(name).drop_null().to_numpy(zero_copy_only=False)
            return values.astype(np.float64)

        durations, peaks, levels = map(numbers, ("duration_s", "peak_dbfs", "rms_dbfs"))
        report.audio_s += float(durations.sum())
        report.longest_s = max(report.longest_s, float(durations.max(initial=0)))
        report.durations = _counted(report.durations, durations)
        report.silent += int((peaks == -math.inf).sum())
        report.full_scale += int((peaks >= FULL_SCALE_DBFS).sum())
        report.quiet += int(((levels < QUIET_DBFS) & (levels > -math.inf)).sum())
        report.peaks = _counted(report.peaks, peaks[peaks > -math.inf])
        report.levels = _counted(report.levels, levels[levels > -math.inf])
        for counter, name in (
            (report.sample_rates, "sample_rate"),
            (report.channels, "channels"),
            (report.codecs, "codec"),
        ):
            for cell in pc.value_counts(batch.column(name).drop_null()).to_pylist():
                counter[cell["values"]] += cell["counts"]

    def _add_errors(
        self, file: int, first: int, batch: pa.RecordBatch, scored: NDArray[np.bool_]
    ) -> None:
        column = batch.column("error")
        if column.null_count == len(column):
            return
        at = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
        for row, error in zip(at.tolist(), column.take(pa.array(at)).to_pylist(), strict=True):
            found = self._errors.setdefault((error["stage"] or "", error["type"] or ""), [0, 0, []])
            found[0] += 1
            found[1] += int(scored[row])
            if len(found[2]) < _EXAMPLES:
                found[2].append(((file, first + row), error["message"] or ""))
            self._report.partly += int(scored[row])

    def _add_scores(self, scores: NDArray[np.float32]) -> None:
        scores = np.ascontiguousarray(scores)
        bins = _BIN_OF[np.minimum(scores.view(np.uint32) >> 16, len(_BIN_OF) - 1)]
        self._bins += np.bincount((bins + self._offsets).ravel(), minlength=self._labels * BINS)
        self._sums += scores.sum(axis=0, dtype=np.float64)
        np.maximum(self._highest, scores.max(axis=0), out=self._highest)
        near = (scores >= self._below) & (scores < self._thresholds)
        self._just_below += np.count_nonzero(near, axis=0)

    def _add_tags(
        self, batch: pa.RecordBatch, scored: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(label indices, where each scored row's begin); counts them, their pairs and ancestors."""
        column = batch.column("tags")
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        tags = pc.struct_field(column.flatten(), "index").to_numpy(zero_copy_only=False)
        tags = tags.astype(np.int64)
        if len(tags) and not 0 <= tags.min() <= tags.max() < self._labels:
            raise EvaluationError(
                f"{self._source.uri!r} has tags whose index is not within its {self._labels} labels: "
                "is its labels.parquet that of another checkpoint?"
            )
        lengths = lengths[scored].astype(np.int64)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        report = self._report
        report.tags += len(tags)
        report.untagged += int((lengths == 0).sum())
        report.tags_per_clip += np.bincount(lengths, minlength=self._labels + 1)
        self._tagged += np.bincount(tags, minlength=self._labels)

        row_of = np.repeat(np.arange(len(lengths)), lengths)
        rank = np.arange(len(tags)) - starts[row_of]
        top = rank < PAIRED_TAGS
        few, few_rows = tags[top], row_of[top]
        for apart in range(1, PAIRED_TAGS):
            if apart >= len(few):
                break
            together = few_rows[apart:] == few_rows[:-apart]
            one, other = few[:-apart][together], few[apart:][together]
            if not len(one):
                break
            self._pairs += np.bincount(
                one * self._labels + other, minlength=self._labels * self._labels
            )

        # Each tag marks its ancestors, each clip a node once.
        counts = np.diff(self._up_start)[tags]
        total = int(counts.sum())
        ends = np.cumsum(counts)
        within = np.arange(total) - np.repeat(ends - counts, counts)
        above = self._up[np.repeat(self._up_start[tags], counts) + within]
        marked = np.zeros((len(lengths), len(self._nodes)), bool)
        marked[np.repeat(row_of, counts), above] = True
        self._node_clips += np.count_nonzero(marked, axis=0)
        return tags, starts

    def _add_hashes(self, file: int, rows: NDArray[Any], batch: pa.RecordBatch) -> None:
        column = batch.column("audio_xxh128")
        valid = column.is_valid().to_numpy(zero_copy_only=False)
        hashes = np.array(column.drop_null().to_numpy(zero_copy_only=False), "S32")
        if "start_s" in batch.schema.names:
            # A part of a recording has the hash of the whole: it is told by where it lies.
            parts = zip(
                batch.column("start_s").to_pylist(), batch.column("end_s").to_pylist(), strict=True
            )
            of_rows = [part for part, has in zip(parts, valid, strict=True) if has]
            for place, (start_s, end_s) in enumerate(of_rows):
                if start_s is not None or end_s is not None:
                    text = f"{hashes[place].decode()} {start_s} {end_s}"
                    hashes[place] = xxhash.xxh128_hexdigest(text.encode()).encode()
        self._hashes.append(hashes)
        self._hash_places.append(_places(file, rows[valid]))

    def _add_points(
        self,
        file: int,
        rows: NDArray[Any],
        batch: pa.RecordBatch,
        scored: NDArray[np.bool_],
        scores: NDArray[np.float32],
    ) -> None:
        """Projects what a clip sounds like: its embedding where there is one, else its logits."""
        left = SIMILAR_CLIPS - self._points_held
        if left <= 0:
            return
        if "embedding" in batch.schema.names:
            column = batch.column("embedding")
            vectors = column.flatten().to_numpy(zero_copy_only=False)
            vectors = vectors.reshape(len(column), -1)[scored].astype(np.float32)
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
            self._report.similar_by = "embedding"
        else:
            vectors = np.clip(_logit(np.clip(scores, 1e-4, 1 - 1e-4)), -_LOGIT_LIMIT, _LOGIT_LIMIT)
            vectors /= np.float32(math.sqrt(self._labels))  # distances are root mean squares
        if self._projection is None:
            # Of a fixed seed: which clips are alike does not depend on what is drawn to be shown.
            matrix = np.random.default_rng(0).standard_normal(
                (vectors.shape[1], SIMILAR_DIMENSIONS), np.float32
            )
            self._projection = matrix / np.float32(math.sqrt(SIMILAR_DIMENSIONS))
        points = np.empty((min(left, len(vectors)), SIMILAR_DIMENSIONS + 1), np.float16)
        points[:, 1:] = vectors[:left] @ self._projection
        # How long a clip is counts as one more dimension.
        durations = pc.fill_null(batch.column("duration_s"), 0).to_numpy(zero_copy_only=False)
        lengths = np.log(np.maximum(durations[scored][:left], 0.01))
        points[:, 0] = lengths * (self._near() / LENGTHS_ALIKE)
        self._points.append(points)
        self._point_places.append(_places(file, rows[:left]))
        self._points_held += len(points)

    def _near(self) -> float:
        """The distance up to which two clips are alike."""
        if self._report.similar_by == "scores":
            return SCORES_ALIKE
        return math.sqrt(2 * EMBEDDINGS_ALIKE)  # of unit vectors

    def report(self) -> Report:
        """What was added up."""
        report, count = self._report, self._labels
        report.failed = report.clips - report.scored
        report.reasons = [
            Reason(stage, kind, clips, partly, tuple(examples))
            for (stage, kind), (clips, partly, examples) in sorted(
                self._errors.items(), key=lambda item: -item[1][0]
            )
        ]
        bins = self._bins.reshape(count, BINS)
        thresholds = thresholds_of(self._source)
        report.labels = [
            LabelFacts(
                label,
                thresholds[label.index],
                int(self._tagged[label.index]),
                float(self._sums[label.index] / max(1, report.scored)),
                float(self._highest[label.index]),
                int(self._just_below[label.index]),
                bins[label.index],
            )
            for label in self._source.labels
        ]
        pairs = self._pairs.reshape(count, count)
        report.pairs = pairs + pairs.T
        report.nodes = {
            mid: int(clips)
            for mid, clips in zip(self._nodes, self._node_clips, strict=True)
            if clips
        }
        report.equal, self.equal_examples = self._equal()
        report.similar, self.similar_examples = self._similar()
        return report

    def _equal(self) -> tuple[Alike, list[tuple[int, list[Place]]]]:
        if not self._hashes:
            return Alike(0, 0, 0, ()), []
        hashes, places = np.concatenate(self._hashes), np.concatenate(self._hash_places)
        _, group, counts = np.unique(hashes, return_inverse=True, return_counts=True)
        return _alike(group, counts, places)

    def _similar(self) -> tuple[Alike, list[tuple[int, list[Place]]]]:
        if not self._points:
            return Alike(0, 0, 0, ()), []
        points, places = np.concatenate(self._points), np.concatenate(self._point_places)
        group = similar_groups(points.astype(np.float32), self._near())
        _, group, counts = np.unique(group, return_inverse=True, return_counts=True)
        return _alike(group, counts, places)


def similar_groups(points: NDArray[np.float32], near: float) -> NDArray[np.int64]:
    """Groups points that lie close together, in a time that grows with n log n.

    Four tables, each with a grid over eight of the dimensions, wide as four times `near` and moved
    at random: close points mostly share a cell in one of them. In a cell they are put in order
    along one more direction, and each is held against the next two. What is found so is joined;
    some pairs are missed.

    Args:
        points: [clips, dimensions].
        near: the distance up to which two are alike.

    Returns:
        [clips] a number that those of a group share.
    """
    random = np.random.default_rng(0)
    pairs: list[NDArray[np.int64]] = []
    for table in range(_SIMILAR_TABLES):
        of_table = np.arange(table * _SIMILAR_KEYS, (table + 1) * _SIMILAR_KEYS) % points.shape[1]
        cells = np.floor(points[:, of_table] / (4 * near) + random.random(_SIMILAR_KEYS))
        factors = random.integers(1, 1 << 62, _SIMILAR_KEYS, dtype=np.int64) | 1
        key = (cells.astype(np.int64) * factors).sum(axis=1)  # wraps around, as hashes do
        along = points @ random.standard_normal(points.shape[1]).astype(np.float32)
        order = np.lexsort((along, key))
        for apart in (1, 2):
            one, other = order[:-apart], order[apart:]
            same = key[one] == key[other]
            one, other = one[same], other[same]
            distance = np.linalg.norm(points[one] - points[other], axis=1)
            pairs.append(np.stack([one, other], axis=1)[distance <= near])
    joined = np.concatenate(pairs) if pairs else np.zeros((0, 2), np.int64)
    group = np.arange(len(points))
    while True:  # each takes the lowest number of what it is joined to
        before = group.copy()
        lowest = np.minimum(group[joined[:, 0]], group[joined[:, 1]])
        np.minimum.at(group, joined[:, 0], lowest)
        np.minimum.at(group, joined[:, 1], lowest)
        group = group[group]
        if np.array_equal(group, before):
            return group


def _alike(
    group: NDArray[Any], counts: NDArray[Any], places: NDArray[np.int64]
) -> tuple[Alike, list[tuple[int, list[Place]]]]:
    several = np.flatnonzero(counts > 1)
    largest = several[np.argsort(-counts[several], kind="stable")][:_GROUPS]
    examples = []
    for one in largest.tolist():
        members = np.flatnonzero(group == one)[:_EXAMPLES]
        examples.append((int(counts[one]), [(int(f), int(r)) for f, r in places[members]]))
    found = Alike(len(group), len(several), int(counts[several].sum()), ())
    return found, examples


def _name_clips(report: Report, source: Source, tally: _Tally) -> None:
    """Reads the rows that are to be seen, and puts them into the report."""
    of_labels = {
        place
        for kind in (tally.best, tally.borderline, tally.random)
        for best in kind.values()
        for _, place, _ in best.rows
    }
    columns = [
        "clip_id", "shard", "member", "start_s", "end_s", "duration_s", "sample_rate", "channels",
        "codec", "audio_xxh128", "peak_dbfs", "rms_dbfs", "tags", "error",
    ]  # fmt: skip
    in_table = [place for _, place, _ in tally.table.rows]
    rows = rows_at(source, {*of_labels, *in_table}, columns)
    chunks = rows_at(source, of_labels, ["chunks"])
    for place, row in chunks.items():
        if "chunks" in row:
            report.has_chunks = True
            rows[place]["chunks"] = row["chunks"]
    report.table = [rows[place] for place in sorted(in_table)]
    for index in tally.best:
        report.shown[index] = _chosen(index, tally, rows)
    examples = [place for reason in report.reasons for place, _ in reason.examples]
    for _, places in (*tally.equal_examples, *tally.similar_examples):
        examples += places
    names = {p: row["clip_id"] for p, row in rows_at(source, examples, ["clip_id"]).items()}
    report.reasons = [
        Reason(r.stage, r.type, r.clips, r.partly, tuple((names[p], m) for p, m in r.examples))
        for r in report.reasons
    ]
    for of, found in (("equal", tally.equal_examples), ("similar", tally.similar_examples)):
        alike: Alike = getattr(report, of)
        named = tuple((count, tuple(names[p] for p in places)) for count, places in found)
        setattr(report, of, Alike(alike.looked_at, alike.groups, alike.clips, named))


def _chosen(index: int, tally: _Tally, rows: dict[Place, dict[str, Any]]) -> list[Shown]:
    """The clips that a label shows, each audio once."""
    seen: set[Any] = set()
    chosen: list[Shown] = []
    for kind, best in (
        ("best", tally.best[index]),
        ("borderline", tally.borderline[index]),
        ("random", tally.random[index]),
    ):
        left = tally._each
        for _, place, score in best.rows:
            row = rows[place]
            name = (row["audio_xxh128"], row.get("start_s"), row.get("end_s"))
            if left and name not in seen:
                seen.add(name)
                chosen.append(Shown(row, score, kind))
                left -= 1
    return chosen


def _closure(labels: Sequence[Label]) -> tuple[NDArray[np.int64], NDArray[np.int64], list[str]]:
    """(nodes at and above each label, flat; where each label's begin; the nodes by mid)."""
    ontology = audioset_ontology()
    number = {mid: place for place, mid in enumerate(ontology)}
    flat: list[int] = []
    starts = [0]
    for label in labels:
        if label.mid in ontology:
            flat += [number[mid] for mid in (label.mid, *ancestors(label.mid))]
        starts.append(len(flat))
    return np.array(flat, np.int64), np.array(starts, np.int64), list(ontology)


def _counted(so_far: Histogram, values: NDArray[np.float64]) -> Histogram:
    """A histogram with more values; what lies beyond an end counts in the last bin there."""
    edges, counts = so_far
    inside = np.clip(values, edges[0], edges[-1])
    more = np.histogram(inside, edges)[0]
    return edges, more if not len(counts) else counts + more


def _places(file: int, rows: NDArray[Any]) -> NDArray[np.int64]:
    return np.stack([np.full(len(rows), file, np.int64), rows.astype(np.int64)], axis=1)


def _logit(scores: NDArray[Any]) -> NDArray[Any]:
    return np.log(scores / (1 - scores))


def _reason(error: BaseException) -> str:
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(said).splitlines()[0]
