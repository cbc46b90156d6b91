"""Per-label thresholds and calibration: fitted on a truth, judged on clips the fit did not see.

Three things are fitted: one threshold for all labels, one a label, and a calibration a label.
What is fitted on few clips is drawn toward what was fitted on all labels together. Nothing
here reports how well the fit does on the clips that it was made of: the clips are dealt into
folds, those of a fold are judged by a fit of the other folds, and the numbers are sums over
the folds. docs/thresholds.md says it at length, and describes the file.

Counts do all the work. How many positives and how many clips of a label lie in each step of
the score is counted once; every fit and every number is made of these counts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.provenance import sample_of
from student.checkpoint import DEFAULT_THRESHOLD, THRESHOLDS_FORMAT
from student.labels import Label

MIN_THRESHOLD, MAX_THRESHOLD = 0.05, 0.9
# Of all labels together. Below, the threshold that is best for the clips at hand is mostly luck.
FEWEST_POSITIVES = 100
FIXED_THRESHOLDS = (DEFAULT_THRESHOLD, 0.5)  # reported beside the fitted ones

# A label with so many positives is half its own and half what all labels say together.
THRESHOLD_SHRINKAGE = 5.0
# Ridge on the calibration's distance from that of all labels. A clip of which a label is
# uncertain (p near 0.5) weighs 1/4, so this is worth four of them.
PLATT_SHRINKAGE = 1.0
# Both were chosen on what is told in docs/thresholds.md, where it matters little.
# Of the one-sided lower bounds of a precision: where a threshold is judged, and where it is
# chosen. The lowest threshold that a bound allows lies at the edge of it, so that at the same
# confidence every second good label would be denied what it reaches on clips that were not seen.
CONFIDENCE, CHOICE_CONFIDENCE = 0.9, 0.95

_STEP = 0.001  # between the thresholds that are tried
_GRID = np.round(np.arange(MIN_THRESHOLD, MAX_THRESHOLD + _STEP / 2, _STEP), 3)
# Scores are counted by logit for the calibration, in steps so small that the error
# (at most 1/64 each, half of it up and half down) does not show.
_LOGIT_STEP, _LOGIT_END = 1 / 32, 12.0
_LOGITS = np.arange(-_LOGIT_END, _LOGIT_END + _LOGIT_STEP / 2, _LOGIT_STEP)
_ROWS_AT_ONCE = 2_048
_ECE_BINS = 15
_NEVER = -1  # the index of a threshold that is not there

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class FittedLabel:
    """What was fitted for a label, and how it does on clips that the fit did not see."""

    label: Label
    threshold: float | None  # on the raw score; None: the target is out of reach, never a tag
    a: float  # probability = sigmoid(a * logit + b)
    b: float
    positives: int  # clips of the truth that have the label
    precision: float | None  # cross-fitted; None where nothing was tagged
    precision_low: float | None  # of it, Wilson's lower bound at `CONFIDENCE`, one-sided
    recall: float | None  # cross-fitted; None without positives
    f1: float | None  # cross-fitted; None without positives
    reaches_target: bool | None  # `precision_low` is at the target; None where none was set


@dataclass(frozen=True)
class Total:
    """A way to choose thresholds over all labels and clips, cross-fitted."""

    micro_precision: float | None  # None where nothing was tagged
    micro_recall: float | None  # None where nothing is positive
    micro_f1: float
    # Means over the labels that have positives; of precision, over those of them with tags.
    macro_precision: float | None
    macro_recall: float | None
    macro_f1: float


@dataclass(frozen=True)
class Calibration:
    """How far probabilities are from what is true, over all labels and clips."""

    ece: float  # expected calibration error in 15 steps of equal width, 0 to 1
    log_loss: float  # nats a label and clip


@dataclass(frozen=True)
class FittedThresholds:
    """Thresholds and calibration of a checkpoint's labels; `to_json` is the file."""

    labels: tuple[FittedLabel, ...]  # in the order of the scores
    shared: float | None  # the threshold that suits all labels together; None: out of reach
    a: float  # the calibration of all labels together
    b: float
    totals: Mapping[str, Total]  # "0.2", "0.5", "global", "tuned"
    uncalibrated: Calibration  # the scores as they are
    calibrated: Calibration  # cross-fitted
    clips: int
    groups: int  # of clips that were kept together, those of equal bytes too
    positives: int
    target_precision: float | None  # None: best F1
    folds: int
    seed: int
    weights_sha256: str | None  # of the checkpoint that made the scores, where known
    truth: str | None = None  # by the name that people know
    some_clips: str = ""  # `evaluation.provenance.sample_of` the clips

    @property
    def thresholds(self) -> tuple[float | None, ...]:
        """One a label; None: never a tag."""
        return tuple(fitted.threshold for fitted in self.labels)

    @property
    def default(self) -> float | None:
        """Of a label that the fit did not have. A target was shown for none of those: None."""
        return self.shared if self.target_precision is None else None

    def probabilities(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """Calibrated probabilities, float32 [clips, labels], of scores of that shape."""
        a = np.array([fitted.a for fitted in self.labels])
        b = np.array([fitted.b for fitted in self.labels])
        return _sigmoid(a * _logit(scores) + b).astype(np.float32)

    def to_json(self) -> str:
        """The file: an object with a line a label; `student.checkpoint.parse_thresholds` reads it."""
        head = {
            "format": THRESHOLDS_FORMAT,
            "fitted_on": {
                "clips": self.clips,
                "groups": self.groups,
                "positives": self.positives,
                "target": "best F1"
                if self.target_precision is None
                else f"precision {self.target_precision:g}",
                "target_precision": self.target_precision,
                "folds": self.folds,
                "seed": self.seed,
                "weights_sha256": self.weights_sha256,
                "truth": self.truth,
                "some_clips": self.some_clips,
            },
            "cross_fitted": {
                "note": "Of all numbers here and of precision, recall and f1 below: each clip was "
                f"judged by a fit that did not see it, in {self.folds} folds."
                + (
                    ""
                    if self.target_precision is None
                    else " Which labels reach the target was read off the same numbers, so that "
                    "the precision of those that do leans up: new clips may show less, and "
                    "precision_low is the number to plan with."
                ),
                **{name: asdict(total) for name, total in self.totals.items()},
                "calibration": {
                    "before": asdict(self.uncalibrated),
                    "after": asdict(self.calibrated),
                },
            },
            "shared": self.shared,
            "default": self.default,
            "calibration": {"a": self.a, "b": self.b},
        }
        entries = []
        for fitted in self.labels:
            entry = asdict(fitted)
            del entry["label"]
            if self.target_precision is None:
                del entry["reaches_target"]
            key = fitted.label.mid or fitted.label.name
            entry = {"name": fitted.label.name, **entry}
            entries.append(f"{_json(key)}: {_json(entry)}")
        lines = ",\n    ".join(entries)
        text = json.dumps(head, indent=2, ensure_ascii=False).removesuffix("\n}")
        return f'{text},\n  "labels": {{\n    {lines}\n  }}\n}}\n'


def fit_thresholds(
    truth: NDArray[np.bool_],
    scores: NDArray[np.float32],
    labels: Sequence[Label],
    *,
    target_precision: float | None = None,
    folds: int = 5,
    seed: int = 0,
    groups: Sequence[str] | None = None,
    hashes: Sequence[str | None] | None = None,
    weights_sha256: str | None = None,
    truth_name: str | None = None,
    clip_ids: Sequence[str] | None = None,
) -> FittedThresholds:
    """Fits thresholds and calibration, and judges them on clips that the fit did not see.

    Args:
        truth: bool [clips, labels]; False says that the label is absent, not that nobody
            looked.
        scores: float32 [clips, labels], 0 to 1, as they are stored.
        labels: of the columns, in order.
        target_precision: the lowest threshold of each label whose precision reaches this,
            above 0 and below 1; None: the threshold of the best F1.
        folds: parts that the clips are dealt into, at least 2.
        seed: of the dealing.
        groups: what each clip is of, such as its recording: those of one group are in one
            fold. None: each clip is a group.
        hashes: of each clip's bytes, None where it is not known: groups that share a hash are
            one group.
        weights_sha256: of the checkpoint that made the scores, for the file.
        truth_name: what people call the truth, for the file.
        clip_ids: of the clips. With them the file has a sample of the clips, by which an
            evaluation of the tags tells that it is of clips that tuned them.

    Raises:
        ValueError: the shapes differ, a score is no number from 0 to 1, or there are fewer
            groups than folds.
    """
    _check(truth, scores, labels, target_precision, folds, groups, hashes)
    group = check_folds(folds, len(truth), groups, hashes)
    group_count = len(set(group.tolist()))
    fold = _deal(truth, folds, seed, group)
    by_score = _count(truth, scores, fold, folds, _score_bins, len(_GRID) + 1)
    by_logit = _count(truth, scores, fold, folds, _logit_bins, len(_LOGITS))
    # [folds, labels, thresholds]: positives, and clips, that reach each threshold.
    right, tagged = (_reaching(counts) for counts in by_score)
    positives = by_score[0].sum(2)  # [folds, labels]

    # What each fold's clips are tagged with, by the fit of the other folds.
    hits = _cross_fitted(right, tagged, positives, target_precision)
    calibrated = _Reliability()
    for held in range(folds):
        a, b, _ = _calibrate(*(counts.sum(0) - counts[held] for counts in by_logit))
        calibrated.add(by_logit[0][held], by_logit[1][held], a, b)

    in_all = positives.sum(0)
    for fixed in FIXED_THRESHOLDS:
        index = np.full(len(labels), np.flatnonzero(np.isclose(_GRID, fixed))[0])
        hits[f"{fixed:g}"] = _hits(right.sum(0), tagged.sum(0), index)
    uncalibrated = _Reliability()
    one, zero = np.ones(len(labels)), np.zeros(len(labels))
    uncalibrated.add(by_logit[0].sum(0), by_logit[1].sum(0), one, zero)

    own, shared = _choose(right.sum(0), tagged.sum(0), in_all, target_precision)
    a, b, (shared_a, shared_b) = _calibrate(*(counts.sum(0) for counts in by_logit))
    return FittedThresholds(
        labels=tuple(
            _fitted_label(
                label,
                _threshold(int(own[k])),
                (float(a[k]), float(b[k])),
                (int(hits["tuned"][0, k]), int(hits["tuned"][1, k]), int(in_all[k])),
                target_precision,
            )
            for k, label in enumerate(labels)
        ),
        shared=_threshold(shared),
        a=round(shared_a, 4),
        b=round(shared_b, 4),
        totals={
            name: total_of(hits[name][0], hits[name][1], in_all)
            for name in (*(f"{fixed:g}" for fixed in FIXED_THRESHOLDS), "global", "tuned")
        },
        uncalibrated=uncalibrated.result(),
        calibrated=calibrated.result(),
        clips=len(truth),
        groups=group_count,
        positives=int(in_all.sum()),
        target_precision=target_precision,
        folds=folds,
        seed=seed,
        weights_sha256=weights_sha256,
        truth=truth_name,
        some_clips=""
        if clip_ids is None
        else sample_of(clip_ids, hashes if hashes is not None else [None] * len(clip_ids)),
    )


def check_folds(
    folds: int, clips: int, groups: Sequence[str] | None, hashes: Sequence[str | None] | None
) -> NDArray[np.int64]:
    """The number of each clip's group, int64 [clips]; clips and groups as of `fit_thresholds`.

    Raises:
        ValueError: there are fewer groups than folds.
    """
    group = _united(clips, groups, hashes)
    group_count = len(set(group.tolist()))
    if group_count < folds:
        alone = groups is None and group_count == clips
        raise ValueError(
            f"{group_count} {'clips' if alone else 'groups of clips'} cannot be dealt into {folds} "
            "folds: give more clips, or ask for fewer --folds"
        )
    return group


def highest_target(
    truth: NDArray[np.bool_],
    scores: NDArray[np.float32],
    below: float,
    *,
    folds: int = 5,
    seed: int = 0,
    groups: Sequence[str] | None = None,
    hashes: Sequence[str | None] | None = None,
) -> tuple[float, int] | None:
    """(the highest target precision that any label reaches, how many do); None where none does.

    Args:
        below: targets are tried in steps of 0.05, down from here.
        truth, scores, folds, seed, groups, hashes: as of `fit_thresholds`, which raises where
            they do not fit.
    """
    fold = _deal(truth, folds, seed, check_folds(folds, len(truth), groups, hashes))
    counts = _count(truth, scores, fold, folds, _score_bins, len(_GRID) + 1)
    right, tagged = (_reaching(one) for one in counts)
    positives = counts[0].sum(2)
    for step in range(math.ceil(below * 20) - 1, 0, -1):
        target = step / 20
        hits = _cross_fitted(right, tagged, positives, target)["tuned"]
        own, _ = _choose(right.sum(0), tagged.sum(0), positives.sum(0), target)
        reaching = int(((own != _NEVER) & (wilson_low(hits[0], hits[1]) >= target)).sum())
        if reaching:
            return target, reaching
    return None


def _check(
    truth: NDArray[np.bool_],
    scores: NDArray[np.float32],
    labels: Sequence[Label],
    target_precision: float | None,
    folds: int,
    groups: Sequence[str] | None,
    hashes: Sequence[str | None] | None,
) -> None:
    if truth.dtype != np.bool_ or truth.shape != scores.shape or truth.ndim != 2:
        raise ValueError(
            f"the truth is {truth.dtype} {list(truth.shape)} and the scores {list(scores.shape)}; expected "
            "bool and float32, both [clips, labels]"
        )
    if truth.shape[1] != len(labels):
        raise ValueError(
            f"the truth has {truth.shape[1]} columns, but there are {len(labels)} labels"
        )
    if target_precision is not None and not 0 < target_precision < 1:
        raise ValueError(
            f"the target precision is {target_precision}, expected above 0 and below 1"
        )
    if folds < 2:
        raise ValueError(
            f"there are {folds} folds, expected at least 2: one is judged by the others"
        )
    for what, given in (("groups", groups), ("hashes", hashes)):
        if given is not None and len(given) != len(truth):
            raise ValueError(
                f"there are {len(given)} {what} for {len(truth)} clips, expected one a clip"
            )
    for start in range(0, len(scores), _ROWS_AT_ONCE):
        block = scores[start : start + _ROWS_AT_ONCE]
        odd = np.argwhere(~((block >= 0) & (block <= 1)))  # NaN is odd too
        if len(odd):
            row, column = odd[0]
            raise ValueError(
                f"the score of clip {start + row} for {labels[column].name!r} is {block[row, column]}, "
                "expected 0 to 1: leave out clips without scores"
            )


# ---------------------------------------------------------------------- folds


def _united(
    clips: int, groups: Sequence[str] | None, hashes: Sequence[str | None] | None
) -> NDArray[np.int64]:
    """The number of each clip's group, from 0: groups that have a hash in common are one."""
    group = np.arange(clips)
    if groups is not None:
        group = np.unique(np.asarray(groups, str), return_inverse=True)[1]
    if hashes is None:
        return group
    parent = list(range(clips))

    def root(member: int) -> int:
        while parent[member] != member:
            parent[member] = member = parent[parent[member]]
        return member

    first: dict[str, int] = {}  # hash -> the first group that has it
    for member, of_bytes in zip(group.tolist(), hashes, strict=True):
        if of_bytes is not None:
            parent[root(member)] = root(first.setdefault(of_bytes, member))
    return np.unique([root(member) for member in group.tolist()], return_inverse=True)[1]


def _deal(
    truth: NDArray[np.bool_], folds: int, seed: int, group: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The fold of each clip: groups, of which `group` has the number, whole; rare labels spread.

    Labels come in order of rarity. Each group that has the label and no fold yet goes to the
    fold that has the fewest clips of the label, and among those the fewest clips. It is
    Sechidis, Tsoumakas and Vlahavas' iterative stratification (2011) with the order of
    labels fixed from the start.
    """
    count = int(group.max()) + 1
    sizes = np.bincount(group, minlength=count)
    clips, columns = np.nonzero(truth)
    # positives a group and label, as sorted triples: most groups have few labels
    pairs, amounts = np.unique(
        np.stack([columns, group[clips]]), axis=1, return_counts=True
    )  # fmt: skip
    of_label = np.bincount(columns, minlength=truth.shape[1])
    bounds = np.searchsorted(pairs[0], np.arange(truth.shape[1] + 1))
    labels_of: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    for (column, member), amount in zip(pairs.T, amounts, strict=True):
        labels_of[member].append((column, amount))

    order = np.random.default_rng(seed).permutation(count)
    rank = np.empty(count, np.int64)
    rank[order] = np.arange(count)
    fold_of = np.full(count, -1)
    has = np.zeros((folds, truth.shape[1]), np.int64)
    held = np.zeros(folds, np.int64)

    def put(member: int, fold: int) -> None:
        fold_of[member] = fold
        held[fold] += sizes[member]
        for column, amount in labels_of[member]:
            has[fold, column] += amount

    for column in np.argsort(of_label, kind="stable"):
        span = slice(bounds[column], bounds[column + 1])
        members, own = pairs[1, span], amounts[span]
        # Large groups first, while there is room to even them out.
        for member in members[np.lexsort((rank[members], -own))]:
            if fold_of[member] < 0:
                put(member, np.lexsort((held, has[:, column]))[0])
    for member in order:
        if fold_of[member] < 0:
            put(member, int(held.argmin()))
    return fold_of[group]


# --------------------------------------------------------------------- counts


def _score_bins(scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """How many thresholds of the grid each score reaches, compared as tags are: in float32."""
    return np.searchsorted(_GRID.astype(np.float32), scores, side="right")


def _logit_bins(scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """The index in `_LOGITS` that is nearest to each score's logit."""
    return np.rint((_logit(scores) + _LOGIT_END) / _LOGIT_STEP).astype(np.int64)


def _logit(scores: NDArray[np.float32]) -> Floats:
    """Logits of scores, within ±`_LOGIT_END`: beyond, float32 (and float16 sooner) knows only 0 and 1."""
    end = 1 / (1 + math.exp(_LOGIT_END))
    inside = np.clip(scores.astype(np.float64), end, 1 - end)
    return np.clip(np.log(inside / (1 - inside)), -_LOGIT_END, _LOGIT_END)


def _sigmoid(x: Floats) -> Floats:
    return 0.5 * (1 + np.tanh(0.5 * x))  # without overflow


def _count(
    truth: NDArray[np.bool_],
    scores: NDArray[np.float32],
    fold: NDArray[np.int64],
    folds: int,
    bins_of: Any,
    bins: int,
) -> tuple[Counts, Counts]:
    """(positives, clips) int64 [folds, labels, bins], counted a block of rows at a time."""
    labels = truth.shape[1]
    shape = (folds, labels, bins)
    positives, clips = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    offset = np.arange(labels) * bins
    for held in range(folds):
        rows = np.flatnonzero(fold == held)
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            block = rows[start : start + _ROWS_AT_ONCE]
            index = bins_of(scores[block]) + offset
            size = labels * bins
            clips[held] += np.bincount(index.ravel(), minlength=size).reshape(labels, bins)
            true = np.bincount(index[truth[block]], minlength=size)
            positives[held] += true.reshape(labels, bins)
    return positives, clips


def _reaching(counts: Counts) -> Counts:
    """Counts of `_score_bins` as [folds, labels, thresholds]: how many reach each threshold."""
    return counts[..., :0:-1].cumsum(-1)[..., ::-1]


def _hits(right: Counts, tagged: Counts, index: NDArray[np.int64]) -> Counts:
    """[2, labels]: right tags, and tags, with each label's threshold; none where it has none."""
    at = np.maximum(index, 0)[:, None]
    found = np.stack([np.take_along_axis(counts, at, 1)[:, 0] for counts in (right, tagged)])
    return np.where(index == _NEVER, 0, found)


# ----------------------------------------------------------------- thresholds


def _choose(
    right: Counts, tagged: Counts, positives: Counts, target_precision: float | None
) -> tuple[NDArray[np.int64], int]:
    """(index in the grid of each label's threshold, that of one threshold for all labels).

    Either is `_NEVER` where no threshold reaches the target.

    Args:
        right: [labels, thresholds]: positives that reach each threshold.
        tagged: the same of all clips.
        positives: [labels].
        target_precision: None: best F1.
    """
    if target_precision is None:
        f1 = 2 * right / np.maximum(tagged + positives[:, None], 1)
        has = positives > 0
        shared = _middle_of_best(f1[has].mean(0)) if has.any() else _index_of(DEFAULT_THRESHOLD)
        # A label that nothing is right about says nothing: it takes the shared threshold.
        own = np.array([_middle_of_best(row) if row.any() else shared for row in f1])
        return _shrunk(own, shared, positives), shared
    reaches = wilson_low(right, tagged, CHOICE_CONFIDENCE) >= target_precision
    together = wilson_low(right.sum(0), tagged.sum(0), CHOICE_CONFIDENCE) >= target_precision
    shared = int(together.argmax()) if together.any() else _NEVER
    own = reaches.argmax(1)
    # Never below the label's own: there its precision is not known to reach the target.
    toward = shared if together.any() else len(_GRID) - 1
    chosen = np.maximum(own, _shrunk(own, toward, positives))
    return np.where(reaches.any(1), chosen, _NEVER), shared


def _cross_fitted(
    right: Counts, tagged: Counts, positives: Counts, target_precision: float | None
) -> dict[str, Counts]:
    """Right tags, and tags, [2, labels], of each fold by the fit of the others, added up.

    Args:
        right, tagged: [folds, labels, thresholds], as of `_choose`.
        positives: [folds, labels].
        target_precision: None: best F1.
    """
    labels = positives.shape[1]
    hits = {name: np.zeros((2, labels), np.int64) for name in ("global", "tuned")}
    for held in range(len(right)):
        own, shared = _choose(
            right.sum(0) - right[held],
            tagged.sum(0) - tagged[held],
            positives.sum(0) - positives[held],
            target_precision,
        )
        hits["tuned"] += _hits(right[held], tagged[held], own)
        hits["global"] += _hits(right[held], tagged[held], np.full(labels, shared))
    return hits


def _shrunk(own: NDArray[np.int64], shared: int, positives: Counts) -> NDArray[np.int64]:
    """Thresholds drawn toward the shared one, on the scale of logits, the fewer positives the more."""
    weight = positives / (positives + THRESHOLD_SHRINKAGE)
    logits = np.log(_GRID / (1 - _GRID))
    drawn = _sigmoid(weight * logits[own] + (1 - weight) * logits[shared])
    return np.rint((drawn - MIN_THRESHOLD) / _STEP).astype(np.int64)


def _middle_of_best(values: Floats) -> int:
    """The middle of the first run of largest values: farthest from where it gets worse."""
    best = values >= values.max() - 1e-12
    first = int(best.argmax())
    length = int((~best[first:]).argmax()) or len(best) - first
    return first + (length - 1) // 2


def _threshold(index: int) -> float | None:
    return None if index == _NEVER else float(_GRID[index])


def _index_of(threshold: float) -> int:
    return int(np.abs(_GRID - threshold).argmin())


def wilson_low(right: Counts, tagged: Counts, confidence: float = CONFIDENCE) -> Floats:
    """Wilson's lower bound of right / tagged, one-sided; 0 where nothing is tagged.

    Wilson (1927), doi:10.1080/01621459.1927.10502953.
    """
    z = NormalDist().inv_cdf(confidence)
    n = np.maximum(tagged, 1)
    p = right / n
    spread = z * np.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    low = (p + z**2 / (2 * n) - spread) / (1 + z**2 / n)
    return np.where(tagged > 0, np.maximum(low, 0), 0.0)


def _fitted_label(
    label: Label,
    threshold: float | None,
    platt: tuple[float, float],
    counts: tuple[int, int, int],
    target_precision: float | None,
) -> FittedLabel:
    right, tagged, positives = counts
    low = float(wilson_low(np.array(right), np.array(tagged)))
    reaches = None
    if target_precision is not None:
        # Two proofs: the fit found a threshold, and clips that it did not see agree. Their
        # bound, since of many labels below the target some come out above it by luck.
        reaches = threshold is not None and low >= target_precision
        threshold = threshold if reaches else None
    return FittedLabel(
        label=label,
        threshold=threshold,
        a=round(platt[0], 4),
        b=round(platt[1], 4),
        positives=positives,
        precision=_rounded(right / tagged) if tagged else None,
        precision_low=_rounded(low) if tagged else None,
        recall=_rounded(right / positives) if positives else None,
        f1=_rounded(2 * right / (tagged + positives)) if positives else None,
        reaches_target=reaches,
    )


def total_of(right: Counts, tagged: Counts, positives: Counts) -> Total:
    """Precision, recall and F1 of counts [labels]: right tags, tags, and clips that have the label."""
    f1 = 2 * right / np.maximum(tagged + positives, 1)
    rights, tags, all_positives = int(right.sum()), int(tagged.sum()), int(positives.sum())
    has = positives > 0
    told = has & (tagged > 0)
    return Total(
        micro_precision=_rounded(rights / tags) if tags else None,
        micro_recall=_rounded(rights / all_positives) if all_positives else None,
        micro_f1=round(2 * rights / max(tags + all_positives, 1), 4),
        macro_precision=_rounded(float((right[told] / tagged[told]).mean()))
        if told.any()
        else None,
        macro_recall=_rounded(float((right[has] / positives[has]).mean())) if has.any() else None,
        macro_f1=round(float(f1[has].mean()), 4) if has.any() else 0.0,
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# ---------------------------------------------------------------- calibration


def _calibrate(positives: Counts, clips: Counts) -> tuple[Floats, Floats, tuple[float, float]]:
    """(a [labels], b [labels], (a, b) of all labels together) of counts [labels, logits].

    A label without positives has that of all labels.
    """
    shared = _platt(positives.sum(0)[None], clips.sum(0)[None], (1.0, 0.0), PLATT_SHRINKAGE)
    start = (float(shared[0][0]), float(shared[1][0]))
    a, b = _platt(positives, clips, start, PLATT_SHRINKAGE)
    none = positives.sum(1) == 0
    return np.where(none, start[0], a), np.where(none, start[1], b), start


def _platt(
    positives: Counts, clips: Counts, toward: tuple[float, float], strength: float
) -> tuple[Floats, Floats]:
    """(a, b) [labels] of probability = sigmoid(a * logit + b), by Newton's method.

    The least of the negative log likelihood plus `strength` / 2 times the squared distance
    from `toward`: a convex function, so that damped steps reach its only minimum. Platt
    (1999), "Probabilistic outputs for support vector machines", without his changed targets:
    the ridge does what they are for.
    """
    z = _LOGITS
    labels = len(positives)
    at = np.tile(np.array(toward), (labels, 1))  # [labels, (a, b)]

    def cost(at: Floats) -> Floats:
        x = at[:, :1] * z + at[:, 1:]
        fit = (clips * np.logaddexp(0, x) - positives * x).sum(1)
        return fit + strength / 2 * ((at - toward) ** 2).sum(1)

    now = cost(at)
    for _ in range(50):
        p = _sigmoid(at[:, :1] * z + at[:, 1:])
        error, weight = clips * p - positives, clips * p * (1 - p)
        gradient = np.stack([error @ z, error.sum(1)], 1) + strength * (at - toward)
        aa, ab, bb = weight @ z**2 + strength, weight @ z, weight.sum(1) + strength
        solved = np.stack(
            [bb * gradient[:, 0] - ab * gradient[:, 1], aa * gradient[:, 1] - ab * gradient[:, 0]],
            1,
        )
        step = solved / (aa * bb - ab**2)[:, None]
        if np.abs(step).max() < 1e-7:
            break
        for _ in range(30):
            tried = cost(at - step)
            worse = tried > now + 1e-9 * np.abs(now)
            if not worse.any():
                break
            step[worse] /= 2
        at, now = at - step, tried
    return at[:, 0], at[:, 1]


class _Reliability:
    """Adds up predicted and true positives by predicted probability."""

    def __init__(self) -> None:
        self._clips, self._said, self._true = (np.zeros(_ECE_BINS) for _ in range(3))
        self._loss = 0.0

    def add(self, positives: Counts, clips: Counts, a: Floats, b: Floats) -> None:
        """Takes counts [labels, logits] with a calibration [labels]."""
        x = a[:, None] * _LOGITS + b[:, None]
        p = _sigmoid(x)
        bins = np.minimum((p * _ECE_BINS).astype(np.int64), _ECE_BINS - 1).ravel()
        for total, weights in (
            (self._clips, clips),
            (self._said, clips * p),
            (self._true, positives),
        ):
            total += np.bincount(bins, weights.ravel(), _ECE_BINS)
        self._loss += float((clips * np.logaddexp(0, x) - positives * x).sum())

    def result(self) -> Calibration:
        """The errors of what was added."""
        clips = max(self._clips.sum(), 1)
        error = float(np.abs(self._said - self._true).sum() / clips)
        return Calibration(round(error, 6), round(self._loss / clips, 6))
