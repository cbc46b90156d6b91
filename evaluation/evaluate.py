"""Holds one model's scores against a truth, or two models' side by side."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from evaluation.metrics import (
    CardMetrics,
    FieldMetrics,
    Floats,
    Reliability,
    Replicates,
    as_dict,
    average_precision,
    bootstrap,
    card_metrics,
    field_metrics,
    interval,
    reliability,
    roc_auc,
)
from evaluation.provenance import Before, learned_from, tuned_on
from evaluation.scores import EvaluationError, Matched, Source, batches, match
from evaluation.thresholds import Total, total_of
from evaluation.truth import Truth, groups_of, resolve
from student.labels import Label

# Labels by their number of positives, from the first to the second (None: and more).
BUCKETS: tuple[tuple[int, int | None], ...] = ((1, 4), (5, 9), (10, 29), (30, 99), (100, None))
# A label with fewer positives has no interval: docs/evaluation.md has how often they would hold.
MIN_POSITIVES_OF_INTERVAL = 10
_EXAMPLES = 20
_Cell = TypeVar("_Cell", np.float32, np.bool_)
_SHARE, _ANY = (0.0, 1.0), (-np.inf, np.inf)  # what a metric cannot leave
_SMALLEST = 1e-7  # a score nearer to 0 or 1 is this near in a logarithm: float16 has both


@dataclass(frozen=True)
class Interval:
    """A value, and where 95 % of values on other clips would be; NaN without a bootstrap."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Availability:
    """What of the truth could be used, and what of the scores."""

    truth_clips: int
    truth_without: int  # rows of the truth that name no clip or state nothing
    scored: int  # what every number is about
    failed: dict[str, int]  # "stage/type" -> clips of the truth whose row is an error
    absent: int  # clips of the truth without a row
    absent_examples: tuple[str, ...]
    only: str | None  # the list of clips that alone were looked at, if there was one
    only_absent: int  # clips of that list without a row
    learned: Before | None  # which of `scored` the student learned from, where that is known
    tuned: Before | None  # on which of them the thresholds of the tags were fitted, likewise
    own_tags_are_truth: bool  # tag for tag: then nothing is measured but what was put in
    teacher_is_student: bool  # score for score
    teacher_lacks: int  # scored clips of the truth that the teacher has not scored
    unasked: int  # scored clips that are not in the truth
    other_bytes: int  # of them, those with the name of a clip of the truth, but other bytes
    repeated: int  # scored rows whose bytes are those of another
    joined_by: dict[str, int]  # kind of name -> clips
    teacher_joined_by: dict[str, int]  # likewise; empty without a teacher
    unknown_labels: dict[str, int]  # as stated -> clips; not labels of the checkpoint
    clips_without_label: int  # scored clips of which no label of the checkpoint is true
    labels: int  # of the checkpoint
    labels_compared: int  # by --labels-at-least, and those that the teacher has too
    labels_without_positives: int  # among those compared


@dataclass(frozen=True)
class Tagging:
    """How good the tags are that an output has, by whatever thresholds it was made with."""

    clips: int  # with a tag
    tags: int
    total: Total


@dataclass(frozen=True)
class Quality:
    """How good one model's scores are."""

    name: str
    uri: str
    card: CardMetrics
    field: FieldMetrics
    intervals: dict[str, Interval]  # by the metrics' names
    label_precision: Floats  # [labels] average precision, NaN without positives
    label_low: Floats  # [labels] of the bootstrap, NaN below MIN_POSITIVES_OF_INTERVAL
    label_high: Floats
    label_auc: Floats  # [labels]
    reliability: Reliability
    tagging: Tagging | None  # None where the scores lie without tags
    clips_per_s: float | None
    audio_s_per_s: float | None


@dataclass(frozen=True)
class Agreement:
    """How near a student is to its teacher on the same clips."""

    top1: float  # share of clips with the same highest label
    top1_in_top5: float  # teacher's highest label among the student's five highest
    top5_jaccard: float  # mean over clips of |common| / |either| of the five highest
    kl: float  # nats a clip: divergence of teacher from student, summed over labels
    bce: float  # nats a clip: cross-entropy of the student to the teacher's scores, likewise
    differences: dict[str, Interval]  # metric -> student less teacher, on the same replicates


@dataclass(frozen=True)
class Bucket:
    """Labels of which the truth has from `low` to `high` positives (None: and more)."""

    low: int
    high: int | None
    labels: int
    student_map: Interval
    teacher_map: Interval | None
    gap: Interval | None  # student less teacher, on the same replicates


@dataclass(frozen=True)
class Own:
    """What the student alone can be held against: all its labels, all its clips of the truth."""

    labels: tuple[Label, ...]
    clip_ids: tuple[str, ...]  # [clips]
    hashes: tuple[str | None, ...]  # [clips] audio_xxh128, where it is known
    truth: NDArray[np.bool_]  # [clips, labels]
    scores: NDArray[np.float32]  # [clips, labels]


@dataclass(frozen=True)
class Evaluation:
    """Everything that is shown, and the arrays that pictures are drawn from."""

    truth_name: str
    availability: Availability
    labels: tuple[Label, ...]  # those compared: the columns of all arrays here
    positives: NDArray[np.int64]  # [labels]
    student: Quality
    teacher: Quality | None
    agreement: Agreement | None
    buckets: tuple[Bucket, ...]
    replicates: int
    groups: int | None  # of clips, that were resampled; None: each clip by itself
    clip_ids: tuple[str, ...]  # [clips] as the student's output has them: the arrays' rows
    truth: NDArray[np.bool_]  # [clips, labels]
    scores: NDArray[np.float32]  # [clips, labels]
    teacher_scores: NDArray[np.float32] | None
    own: Own  # whatever the teacher lacks and `labels_at_least` leaves out

    @property
    def label_gaps(self) -> Floats:
        """[labels] student's average precision less the teacher's; NaN where one has none."""
        if self.teacher is None:
            return np.full(len(self.labels), np.nan)
        return self.student.label_precision - self.teacher.label_precision


def evaluate(
    source: Source,
    truth: Truth,
    *,
    teacher: Source | None = None,
    labels_at_least: int = 0,
    replicates: int = 200,
    seed: int = 0,
    group_by: str | None = None,
    first: Callable[[Own], None] | None = None,
) -> Evaluation:
    """Reads the scores of the truth's clips and measures them.

    With a teacher, every number is of the clips that both have scored and of the labels that
    both have.

    Args:
        source: the scores.
        truth: what is true of which clips.
        teacher: scores to stand beside.
        labels_at_least: labels of which fewer clips are positive are left out of every number;
            0 takes all labels of the checkpoint, those without positives too.
        replicates: of the bootstrap; 0 for none.
        seed: of the bootstrap.
        group_by: a field of the metadata: clips with equal values are resampled together.
        first: is given what was read of the student before anything is measured; what it raises
            ends the evaluation.

    Raises:
        EvaluationError: nothing is left to compare, or the truth and the scores do not fit.
    """
    matched = match(source, truth.names, tags=True)
    _refuse_none(matched, source, truth)
    clips, clip_ids, scores, tags = matched.clips, matched.clip_ids, matched.scores, matched.tags
    hashes = matched.hashes
    known = resolve(truth, source.labels, clips.tolist())
    own = Own(source.labels, clip_ids, hashes, known.matrix, scores)
    if first is not None:
        first(own)
    labels = source.labels
    teacher_scores, teacher_tags, teacher_joined_by, lacking = None, None, Counter[str](), 0
    if teacher is not None:
        source, teacher = _told_apart(source, teacher)
        of_teacher = match(teacher, truth.names, tags=True)
        _refuse_none(of_teacher, teacher, truth)
        common, ours, theirs = np.intersect1d(clips, of_teacher.clips, return_indices=True)
        if not len(common):
            raise EvaluationError(
                f"no clip of the truth is scored both in {source.uri!r} and in {teacher.uri!r}"
            )
        columns, teacher_columns = _common_labels(source, teacher)
        lacking = len(clips) - len(common)
        clip_ids = tuple(clip_ids[row] for row in ours)
        hashes = tuple(hashes[row] for row in ours)
        clips, labels = common, tuple(source.labels[index] for index in columns)
        scores = _part(scores, ours, columns)
        tags = None if tags is None else _part(tags, ours, columns)
        teacher_scores = _part(of_teacher.scores, theirs, teacher_columns)
        if of_teacher.tags is not None:
            teacher_tags = _part(of_teacher.tags, theirs, teacher_columns)
        teacher_joined_by = of_teacher.joined_by
        known = resolve(truth, source.labels, clips.tolist())
    matrix = known.matrix[:, [label.index for label in labels]]
    own_tags_are_truth = tags is not None and bool(tags.any()) and np.array_equal(tags, matrix)
    if labels_at_least:
        kept = np.flatnonzero(matrix.sum(axis=0) >= labels_at_least)
        if not len(kept):
            raise EvaluationError(
                f"no label has {labels_at_least} positives among the {len(clips)} clips; "
                "lower --labels-at-least"
            )
        matrix, scores = matrix[:, kept], scores[:, kept]
        teacher_scores = None if teacher_scores is None else teacher_scores[:, kept]
        tags = None if tags is None else tags[:, kept]
        teacher_tags = None if teacher_tags is None else teacher_tags[:, kept]
        labels = tuple(labels[index] for index in kept)
    positives = matrix.sum(axis=0)

    group: NDArray[np.int64] | None = None
    if group_by is not None and replicates:
        named, _ = groups_of(source, group_by, clip_ids)
        group = np.unique(named, return_inverse=True)[1]
    resampling = (replicates, seed, group)
    student, draws = _quality(source, matrix, scores, tags, *resampling)
    beside, agreement, teacher_draws = None, None, None
    if teacher is not None and teacher_scores is not None:
        beside, teacher_draws = _quality(teacher, matrix, teacher_scores, teacher_tags, *resampling)
        agreement = _agreement(student, beside, scores, teacher_scores, draws, teacher_draws)
    missing = sorted(
        set(range(len(truth.clips))) - set(matched.clips.tolist()) - set(matched.failed)
    )
    return Evaluation(
        truth_name=truth.name,
        availability=Availability(
            truth_clips=len(truth.clips),
            truth_without=truth.without,
            scored=len(clips),
            failed=dict(Counter(matched.failed.values()).most_common()),
            absent=len(missing),
            absent_examples=tuple(truth.clips[place] for place in missing[:_EXAMPLES]),
            only=source.only.name if source.only else None,
            only_absent=source.only.absent if source.only else 0,
            learned=learned_from(source, clip_ids, hashes),
            tuned=None if tags is None else tuned_on(source, clip_ids, hashes),
            own_tags_are_truth=own_tags_are_truth,
            teacher_is_student=teacher_scores is not None
            and np.array_equal(scores, teacher_scores),
            teacher_lacks=lacking,
            unasked=matched.unasked,
            other_bytes=matched.other_bytes,
            repeated=matched.repeated,
            joined_by=dict(matched.joined_by.most_common()),
            teacher_joined_by=dict(teacher_joined_by.most_common()),
            unknown_labels=dict(known.unknown.most_common()),
            clips_without_label=int((~known.matrix.any(axis=1)).sum()),
            labels=len(source.labels),
            labels_compared=len(labels),
            labels_without_positives=int((positives == 0).sum()),
        ),
        labels=labels,
        positives=positives,
        student=student,
        teacher=beside,
        agreement=agreement,
        buckets=_buckets(positives, student, beside, draws, teacher_draws),
        replicates=replicates,
        groups=None if group is None else int(group.max()) + 1,
        clip_ids=clip_ids,
        truth=matrix,
        scores=scores,
        teacher_scores=teacher_scores,
        own=own,
    )


def _refuse_none(matched: Matched, source: Source, truth: Truth) -> None:
    if len(matched.clips):
        return
    failed = f"; {len(matched.failed)} of them have a row that is an error" * bool(matched.failed)
    has = truth.clips[0] if truth.clips else ""
    other = (
        f"; {matched.other_bytes} rows have the name of one of them, but other bytes (audio_xxh128)"
        * bool(matched.other_bytes)
    )
    row = next(
        (batch.column(0)[0].as_py() for batch in batches(source, ["clip_id"]) if batch.num_rows),
        None,
    )
    raise EvaluationError(
        f"none of the {len(truth.clips):,} clips of {truth.name} is scored in {source.uri!r}"
        f"{failed}{other}. The truth names clips such as {has!r}, the output has {row!r}; a name is "
        "compared with clip_id and member, with and without suffix, and may lack folders at its "
        "front. Is --clip-column right?"
    )


def _told_apart(source: Source, teacher: Source) -> tuple[Source, Source]:
    """Both under different names, where one checkpoint made both: the shortest that differ."""
    names = [
        (source.name, teacher.name),
        (f"{source.name}, {_last(source.uri)}", f"{teacher.name}, {_last(teacher.uri)}"),
        (f"{source.name}, {source.uri}", f"{teacher.name}, {teacher.uri}"),
        (f"{source.name}, student", f"{teacher.name}, teacher"),
    ]
    ours, theirs = next(pair for pair in names if pair[0] != pair[1])
    return replace(source, name=ours), replace(teacher, name=theirs)


def _last(uri: str) -> str:
    return posixpath.basename(uri)


def _common_labels(source: Source, teacher: Source) -> tuple[list[int], list[int]]:
    """Columns of both for the labels that both have, in the student's order."""
    if source.labels == teacher.labels:
        every = list(range(len(source.labels)))
        return every, every
    theirs = {label.name: label.index for label in teacher.labels}
    theirs |= {label.mid: label.index for label in teacher.labels if label.mid}
    pairs = [
        (label.index, theirs.get(label.mid, theirs.get(label.name))) for label in source.labels
    ]
    common = [(ours, their) for ours, their in pairs if their is not None]
    if not common:
        raise EvaluationError(f"{source.uri!r} and {teacher.uri!r} have no label in common")
    return [ours for ours, _ in common], [their for _, their in common]


def _part(scores: NDArray[_Cell], rows: NDArray[np.intp], columns: Sequence[int]) -> NDArray[_Cell]:
    """Rows and columns of a matrix; the matrix itself where that is all of it."""
    if len(rows) < len(scores) or (np.diff(rows) < 0).any():
        scores = scores[rows]
    return scores if list(columns) == list(range(scores.shape[1])) else scores[:, columns]


def _quality(
    source: Source,
    truth: NDArray[np.bool_],
    scores: NDArray[np.float32],
    tags: NDArray[np.bool_] | None,
    replicates: int,
    seed: int,
    group: NDArray[np.int64] | None,
) -> tuple[Quality, Replicates | None]:
    try:
        card, field = card_metrics(truth, scores), field_metrics(truth, scores)
        calibrated = reliability(truth, scores)
    except ValueError as error:
        raise EvaluationError(f"{source.uri!r}: {error}") from error
    values = as_dict(card) | as_dict(field)
    del values["labels"]
    precision = average_precision(truth, scores)
    nothing = np.full(truth.shape[1], np.nan)
    low, high, draws = nothing, nothing, None
    if replicates:
        draws = bootstrap(truth, scores, replicates, seed, group)
        ranges = [
            interval(column, value, bounds=_SHARE)
            for column, value in zip(draws.average_precision.T, precision, strict=True)
        ]
        low, high = np.array(ranges).reshape(-1, 2).T
        rare = truth.sum(axis=0) < MIN_POSITIVES_OF_INTERVAL
        low[rare] = high[rare] = np.nan
    quality = Quality(
        name=source.name,
        uri=source.uri,
        card=card,
        field=field,
        intervals={
            name: Interval(
                value,
                *interval(
                    draws.values[name] if draws else nothing[:0],
                    value,
                    bounds=_ANY if name == "d_prime" else _SHARE,
                ),
            )
            for name, value in values.items()
        },
        label_precision=precision,
        label_low=low,
        label_high=high,
        label_auc=roc_auc(truth, scores),
        reliability=calibrated,
        tagging=None if tags is None else _tagging(truth, tags),
        clips_per_s=source.clips_per_s,
        audio_s_per_s=source.audio_s_per_s,
    )
    return quality, draws


def _tagging(truth: NDArray[np.bool_], tags: NDArray[np.bool_]) -> Tagging:
    right, tagged, positives = ((one.sum(axis=0)) for one in (truth & tags, tags, truth))
    return Tagging(
        int(tags.any(axis=1).sum()), int(tagged.sum()), total_of(right, tagged, positives)
    )


def agreement_of(
    student: NDArray[np.float32], teacher: NDArray[np.float32], top: int = 5
) -> tuple[float, float, float, float, float]:
    """(top1, top1 in top, Jaccard of the tops, KL, BCE) of scores [clips, labels], as `Agreement`.

    Of equal scores, the label that comes first is the higher one.
    """
    clips, labels = student.shape
    ours = np.argsort(-student, axis=1, kind="stable")[:, :top]
    theirs = np.argsort(-teacher, axis=1, kind="stable")[:, :top]
    first = theirs[:, :1]
    common = (ours[:, :, None] == theirs[:, None, :]).sum(axis=(1, 2))
    divergence = entropy = 0.0
    for start in range(0, clips, 4_096):
        p = np.clip(teacher[start : start + 4_096].astype(np.float64), _SMALLEST, 1 - _SMALLEST)
        q = np.clip(student[start : start + 4_096].astype(np.float64), _SMALLEST, 1 - _SMALLEST)
        cross = -(p * np.log(q) + (1 - p) * np.log1p(-q)).sum()
        entropy += cross
        divergence += cross + (p * np.log(p) + (1 - p) * np.log1p(-p)).sum()
    return (
        float((ours[:, :1] == first).mean()),
        float((ours == first).any(axis=1).mean()),
        float((common / (2 * min(top, labels) - common)).mean()),
        float(divergence / clips),
        float(entropy / clips),
    )


def _agreement(
    student: Quality,
    teacher: Quality,
    scores: NDArray[np.float32],
    teacher_scores: NDArray[np.float32],
    draws: Replicates | None,
    teacher_draws: Replicates | None,
) -> Agreement:
    differences = {}
    for name, ours in student.intervals.items():
        gap = ours.value - teacher.intervals[name].value
        pairs = np.zeros(0)
        if draws is not None and teacher_draws is not None:
            with np.errstate(invalid="ignore"):  # infinity less infinity: d' of perfect orders
                pairs = draws.values[name] - teacher_draws.values[name]
        differences[name] = Interval(gap, *interval(pairs, gap))
    return Agreement(*agreement_of(scores, teacher_scores), differences)


def _buckets(
    positives: NDArray[np.int64],
    student: Quality,
    teacher: Quality | None,
    draws: Replicates | None,
    teacher_draws: Replicates | None,
) -> tuple[Bucket, ...]:
    buckets = []
    for low, high in BUCKETS:
        inside = (positives >= low) & (positives <= (positives.max() if high is None else high))
        if not inside.any():
            continue
        # Few positives in all tell as little as those of one rare label.
        enough = positives[inside].sum() >= MIN_POSITIVES_OF_INTERVAL
        ours, our_means = _bucket_map(student, inside, draws if enough else None)
        theirs = gap = None
        if teacher is not None:
            theirs, their_means = _bucket_map(teacher, inside, teacher_draws if enough else None)
            difference = ours.value - theirs.value
            gap = Interval(difference, *interval(our_means - their_means, difference))
        buckets.append(Bucket(low, high, int(inside.sum()), ours, theirs, gap))
    return tuple(buckets)


def _bucket_map(
    quality: Quality, inside: NDArray[np.bool_], draws: Replicates | None
) -> tuple[Interval, Floats]:
    """(macro mAP of some labels, that of each replicate)."""
    value = float(quality.label_precision[inside].mean())
    means = np.zeros(0)
    if draws is not None:
        of_labels = draws.average_precision[:, inside]
        found = ~np.isnan(of_labels)  # a replicate may have lost a label
        with np.errstate(invalid="ignore"):
            means = np.where(found, of_labels, 0).sum(axis=1) / found.sum(axis=1)
    return Interval(value, *interval(means, value, bounds=_SHARE)), means
