"""Numbers that say how well scores agree with a truth; arrays in, arrays out.

Two families, which are not comparable with each other:

* the *card's*: what the published model card of Distil-AST states (`card_metrics`);
* the *field's*: what AudioSet taggers are usually compared by (`field_metrics`).

Everywhere `truth` is bool [clips, labels] and `scores` is float [clips, labels] (higher is
more likely; `card_metrics` compares them with 0.5, the others only use their order). Ties
are handled as scikit-learn's functions of the same names do. What is not defined (the
average precision of a label without positives) is NaN, never 0 and never an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

CARD_THRESHOLD = 0.5

# Ranks that are looked at together when replicates are summed: 8,192 x 200 counts stay near
# the processor.
_RANKS_AT_ONCE = 8_192
# Replicates whose micro-averaged curve is held at once; it has a point for every positive.
_CURVES_AT_ONCE = 50


@dataclass(frozen=True)
class CardMetrics:
    """The published card's four numbers, made as it made them; see `card_metrics`."""

    f1: float
    roc_auc: float
    accuracy: float
    mAP: float


@dataclass(frozen=True)
class FieldMetrics:
    """The numbers that AudioSet taggers are usually compared by; see `field_metrics`."""

    macro_map: float
    macro_auc: float
    d_prime: float
    weighted_map: float
    lwlrap: float
    labels: int  # that have positives: what "macro" is the mean over


@dataclass(frozen=True)
class Replicates:
    """The metrics of resampled clips, one entry a replicate.

    Replicates of equal clips, number and seed are of the same clips, so that those of two
    models can be subtracted: that is the paired interval of their difference.
    """

    values: dict[str, Floats]  # metric name, as in CardMetrics and FieldMetrics -> [replicates]
    average_precision: Floats  # [replicates, labels], NaN where the replicate has no positive


def average_precision(truth: Bools, scores: Floats) -> Floats:
    """Average precision of each label, float64 [labels]; NaN where a label has no positive.

    The sum over the distinct scores, from the highest down, of the precision there times the
    recall gained there, as `sklearn.metrics.average_precision_score` does it (no
    interpolation).

    Raises:
        ValueError: the arrays do not fit together, or a score is not finite.
    """
    _check(truth, scores)
    return np.array([ranked.average_precision(None)[0] for ranked in _ranked_labels(truth, scores)])


def micro_average_precision(truth: Bools, scores: Floats) -> float:
    """Average precision of all (clip, label) pairs taken as one list; NaN without positives.

    Raises:
        ValueError: the arrays do not fit together, or a score is not finite.
    """
    _check(truth, scores)
    return float(_Ranked.of_pairs(truth, scores).average_precision(None)[0])


def roc_auc(truth: Bools, scores: Floats) -> Floats:
    """Area under the ROC curve of each label, float64 [labels].

    The share of (positive, negative) pairs that are ordered rightly, a tie counted half; NaN
    where a label has no positives or no negatives.

    Raises:
        ValueError: the arrays do not fit together, or a score is not finite.
    """
    _check(truth, scores)
    return np.array([ranked.roc_auc(None)[0] for ranked in _ranked_labels(truth, scores)])


def d_prime(auc: float | Floats) -> Any:
    """sqrt(2) times the normal quantile of an AUC (or of each), float64 of the same shape.

    0 is chance. An AUC of 1 gives infinity, one of NaN gives NaN. This is how AudioSet's
    papers and the training code of AST (`src/utilities/stats.py`) state it.
    """
    quantile = NormalDist().inv_cdf

    def one(value: float) -> float:
        if math.isnan(value):
            return math.nan
        if not 0 < value < 1:
            return math.inf if value >= 1 else -math.inf
        return math.sqrt(2) * quantile(value)

    areas = np.asarray(auc, np.float64)
    primes = np.array([one(float(value)) for value in areas.ravel()]).reshape(areas.shape)
    return primes if areas.ndim else float(primes)


def lwlrap(truth: Bools, scores: Floats) -> float:
    """Label-weighted label-ranking average precision; NaN without positives.

    For every positive (clip, label): the share of true labels among those of the clip that
    score at least as high. The mean over all of them, so that a clip counts by the number of
    its labels: scikit-learn's `label_ranking_average_precision_score`, weighted by it. (DCASE
    2019's task 2 introduced the measure.)

    Raises:
        ValueError: the arrays do not fit together, or a score is not finite.
    """
    _check(truth, scores)
    precisions = _ranking_precisions(truth, scores)
    positives = int(truth.sum())
    return float(precisions.sum() / positives) if positives else math.nan


def card_metrics(truth: Bools, scores: Floats) -> CardMetrics:
    """F1, ROC AUC, accuracy and mAP exactly as the published card of Distil-AST made them.

    The card does not define them. Its own numbers do, as far as they can, together with the
    evaluation function that multi-label examples for transformers' Trainer have in common:

    * `f1`: micro-averaged over all (clip, label) pairs, a label being predicted where its
      score is at least 0.5;
    * `roc_auc`: micro-averaged area of the *predictions* (0 or 1), not of the scores, which
      is the mean of the true positive rate and the true negative rate. Scores of such models
      have an area of about 0.97; the card says 0.69 and 0.71;
    * `accuracy`: the share of clips of which all labels are right at once;
    * `mAP`: micro average precision of the scores. The card's 0.56 for the teacher is not the
      macro mAP, which is published as 0.459.

    None is what AudioSet results are usually stated in: micro averages are mostly about
    Music and Speech, a fifth of all positives, and 0.5 is far above the best threshold of
    most labels. Compare them with the card's numbers only; for others see `field_metrics`.

    Raises:
        ValueError: the arrays do not fit together, or a score is not finite.
    """
    _check(truth, scores)
    counts = {name: one.sum()[None] for name, one in _clip_counts(truth, scores).items()}
    clips = np.full(1, len(truth), np.float64)
    card = {name: float(value[0]) for name, value in _of_counts(counts, clips).items()}
    return CardMetrics(**card, mAP=micro_average_precision(truth, scores))


def field_metrics(truth: Bools, scores: Floats) -> FieldMetrics:
    """Macro mAP, macro AUC, d', weighted mAP and lwlrap.

    * `macro_map`, `macro_auc`: the plain mean of `average_precision` and `roc_auc` over the
      labels that have positives (and, for the area, negatives);
    * `d_prime`: of `macro_auc`;
    * `weighted_map`: the mean weighted by each label's number of positives;
    * `lwlrap`: see there.

    "mAP" of AudioSet papers is `macro_map`, over all 527 labels on the evaluation set, where
    each has 59 positives or more. On a truth with fewer labels it is another measure.

    Raises:
        ValueError: the arrays do not fit together, or a score is not finite.
    """
    _check(truth, scores)
    ranked = list(_ranked_labels(truth, scores))
    precisions = np.array([label.average_precision(None) for label in ranked])  # [labels, 1]
    areas = np.array([label.roc_auc(None) for label in ranked])
    positives = truth.sum(axis=0)[:, None]
    means = _macro(precisions.reshape(-1, 1), areas.reshape(-1, 1), positives)
    return FieldMetrics(
        **{name: float(value[0]) for name, value in means.items()},
        lwlrap=lwlrap(truth, scores),
        labels=int((positives > 0).sum()),
    )


def bootstrap(
    truth: Bools,
    scores: Floats,
    replicates: int = 200,
    seed: int = 0,
    groups: NDArray[np.int64] | None = None,
) -> Replicates:
    """Every metric of `card_metrics` and `field_metrics` on resampled clips.

    A replicate draws as many clips as there are, with replacement. A label that has no
    positive among them is left out of that replicate's means. Each label's scores are sorted
    once; a replicate is a count for each clip. Of clips that belong together, such as those of
    one recording, whole groups are drawn: as many as there are.

    Args:
        truth: bool [clips, labels].
        scores: float [clips, labels].
        replicates: how many; 200 are enough for a 95 % interval to about a tenth of its width.
        seed: of the resampling.
        groups: int64 [clips], the number of each clip's group, from 0 without gaps; None: each
            clip is by itself.

    Raises:
        ValueError: the arrays do not fit together, or a score is not finite.
    """
    _check(truth, scores)
    clips = len(truth)
    group = np.arange(clips) if groups is None else groups
    group_count = int(group.max(initial=-1)) + 1
    random = np.random.default_rng(seed)
    # Counts [clips, replicates]: a clip's row is read at once wherever it ranks.
    drawn = np.zeros((clips, replicates), np.int32)
    for replicate in range(replicates):
        chosen = random.integers(0, group_count, group_count) if clips else np.zeros(0, np.int64)
        drawn[:, replicate] = np.bincount(chosen, minlength=group_count)[group]

    precisions = np.full((truth.shape[1], replicates), np.nan)
    areas = np.full((truth.shape[1], replicates), np.nan)
    for label, ranked in enumerate(_ranked_labels(truth, scores)):
        if ranked.positives:
            precisions[label], areas[label] = ranked.both(drawn)

    pairs = _Ranked.of_pairs(truth, scores)
    micro = [
        pairs.average_precision(np.ascontiguousarray(drawn[:, first : first + _CURVES_AT_ONCE]))
        for first in range(0, replicates, _CURVES_AT_ONCE)
    ]
    # Whole numbers below 2**53: exact as floats, and a matrix product of floats is fast.
    weights = drawn.T.astype(np.float64)
    positives = (weights @ truth).T  # [labels, replicates]
    counts = {name: weights @ one for name, one in _clip_counts(truth, scores).items()}
    with np.errstate(invalid="ignore"):
        ranking = weights @ _ranking_precisions(truth, scores) / positives.sum(axis=0)
    values = {
        **_of_counts(counts, weights.sum(axis=1)),
        "mAP": np.concatenate(micro) if micro else np.zeros(0),
        **_macro(precisions, areas, positives),
        "lwlrap": ranking,
    }
    return Replicates(values, precisions.T)


def interval(
    values: Floats,
    value: float,
    level: float = 0.95,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> tuple[float, float]:
    """(low, high): where a metric would be on other clips of this kind and number.

    The percentile interval of its replicates, moved so that their mean is the value measured.
    Resampling repeats positives, and what is repeated finds itself: average precision rises,
    the more so the rarer the label, and the plain percentiles may not even hold the value.
    docs/evaluation.md has how often either holds what it should.

    Args:
        values: of the replicates; those that are NaN are left out.
        value: of the clips as they are.
        level: the share of replicates between low and high.
        bounds: what the metric cannot leave.

    Returns:
        Both are NaN where no replicate is left. Replicates that are infinite (d' of a perfect
        order) have no mean, and are not moved.
    """
    known = np.asarray(values, np.float64)[~np.isnan(values)]
    if not len(known):
        return math.nan, math.nan
    tail = (1 - level) / 2
    if not np.isfinite(known).all() or not math.isfinite(value):
        low, high = np.quantile(known, [tail, 1 - tail], method="nearest")
        return float(low), float(high)
    low, high = np.clip(np.quantile(known, [tail, 1 - tail]) + value - known.mean(), *bounds)
    return float(low), float(high)


@dataclass(frozen=True)
class Reliability:
    """How often labels are true that are given a score, in equally wide ranges of scores."""

    mean_score: Floats  # [bins], NaN where no score is in the range
    share_true: Floats  # [bins], likewise
    pairs: Ints  # [bins] how many (clip, label) pairs
    ece: float  # expected calibration error: the mean |mean_score - share_true| over pairs


def reliability(truth: Bools, scores: Floats, bins: int = 15) -> Reliability:
    """Scores taken as probabilities, held against the truth, over all (clip, label) pairs.

    Nearly all pairs of a tagger lie in the lowest range, and so does most of what the expected
    calibration error is about: look at the ranges too.

    Raises:
        ValueError: the arrays do not fit together, or a score is not finite or not in [0, 1].
    """
    _check(truth, scores)
    if scores.size and not (scores.min() >= 0 and scores.max() <= 1):
        raise ValueError(
            f"scores are {scores.min():g} to {scores.max():g}; probabilities are from 0 to 1: "
            "take the sigmoid of logits first"
        )
    place = np.minimum((scores * bins).astype(np.int64), bins - 1).ravel()
    pairs = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean_score = np.bincount(place, scores.ravel().astype(np.float64), bins) / pairs
        share_true = np.bincount(place, truth.ravel(), bins) / pairs
    gaps = np.abs(mean_score - share_true)
    ece = float(np.nansum(gaps * pairs) / pairs.sum()) if pairs.sum() else math.nan
    return Reliability(mean_score, share_true, pairs, ece)


def precision_recall(truth: Bools, scores: Floats, points: int = 1_000) -> tuple[Floats, Floats]:
    """(precision, recall) from the highest score down, for a picture.

    Drawn in steps, each precision from the recall before to its own, the area below is the
    average precision, but for points left out. The first point is at recall 0.

    Args:
        truth: bool, of any shape with at least one positive; all pairs are one list.
        scores: of the same shape.
        points: at most about so many are given.
    """
    flat = np.ascontiguousarray(scores).ravel()
    ranked = _Ranked.of(truth.ravel(), flat, np.zeros(flat.size, np.int8))
    found = np.cumsum(ranked._hits(None)[:, 0])
    kept = np.unique(np.linspace(0, len(found) - 1, min(points, len(found))).astype(np.int64))
    kept = np.concatenate([kept[:1], kept])
    recall = (found / ranked.positives)[kept]
    recall[0] = 0.0
    return (found / ranked.ends)[kept], recall


# ------------------------------------------------------------------ how it is counted


@dataclass(frozen=True)
class _Ranked:
    """(clip, truth) pairs from the highest score down, and where their ties begin and end.

    Only the distinct scores of positives matter: between them nothing is gained.
    """

    clips: NDArray[np.integer[Any]]  # [pairs] the clip at each rank
    starts: Ints  # [groups] ranks above the group: those of a higher score
    ends: Ints  # [groups] ranks down to the group's end: those of at least its score
    positive_clips: NDArray[np.integer[Any]]  # [positives] by falling score
    firsts: Ints  # [groups] the place in positive_clips where each group begins

    @classmethod
    def of(
        cls, truth: Bools, scores: Floats, clips: NDArray[np.integer[Any]] | None = None
    ) -> _Ranked:
        """Ranks one list of pairs; `clips` says of which clip each is, by default its place."""
        order = np.argsort(-scores)
        falling = -scores[order]  # ascending, for searchsorted
        hits = np.flatnonzero(truth[order])
        distinct, firsts = np.unique(falling[hits], return_index=True)
        ranks = order if clips is None else clips[order]
        return cls(
            clips=ranks,
            starts=np.searchsorted(falling, distinct, side="left"),
            ends=np.searchsorted(falling, distinct, side="right"),
            positive_clips=ranks[hits],
            firsts=firsts,
        )

    @classmethod
    def of_pairs(cls, truth: Bools, scores: Floats) -> _Ranked:
        """Ranks all (clip, label) pairs as one list."""
        clips = np.repeat(np.arange(len(truth), dtype=np.int32), truth.shape[1])
        return cls.of(truth.ravel(), np.ascontiguousarray(scores).ravel(), clips)

    @property
    def positives(self) -> int:
        return len(self.positive_clips)

    def average_precision(self, drawn: NDArray[np.int32] | None) -> Floats:
        """[replicates], or [1] where `drawn` is None: every clip once."""
        hits = self._hits(drawn)
        return _precision(hits, self._ranks_until(self.ends, drawn))

    def roc_auc(self, drawn: NDArray[np.int32] | None) -> Floats:
        """[replicates], or [1] where `drawn` is None: every clip once."""
        return self._area(
            self._hits(drawn),
            self._ranks_until(self.starts, drawn),
            self._ranks_until(self.ends, drawn),
            self._all(drawn),
        )

    def both(self, drawn: NDArray[np.int32]) -> tuple[Floats, Floats]:
        """Average precision and area, counting once."""
        groups = len(self.starts)
        until = self._ranks_until(np.concatenate([self.starts, self.ends]), drawn)
        hits = self._hits(drawn)
        area = self._area(hits, until[:groups], until[groups:], self._all(drawn))
        return _precision(hits, until[groups:]), area

    def _all(self, drawn: NDArray[np.int32] | None) -> Any:
        """How many pairs there are: a replicate of one label has as many as there are clips."""
        return len(self.clips) if drawn is None else drawn.sum(axis=0, dtype=np.int64)

    def _hits(self, drawn: NDArray[np.int32] | None) -> Ints:
        """Positives in each group, [groups, replicates]."""
        if not self.positives:
            return np.zeros((0, 1 if drawn is None else drawn.shape[1]), np.int64)
        if drawn is None:
            return np.diff(self.firsts, append=self.positives)[:, None]
        if len(self.firsts) == self.positives:  # no ties among positives
            return drawn[self.positive_clips].astype(np.int64)
        return np.add.reduceat(drawn[self.positive_clips], self.firsts, axis=0).astype(np.int64)

    def _ranks_until(self, bounds: Ints, drawn: NDArray[np.int32] | None) -> Ints:
        """How many pairs rank before each bound, [bounds, replicates]."""
        if drawn is None:
            return bounds[:, None]
        last = int(bounds.max(initial=0))
        edges = np.union1d(bounds, np.arange(0, last, _RANKS_AT_ONCE))
        edges = np.union1d(edges, [0])
        sums = np.zeros((len(edges), drawn.shape[1]), np.int32)  # between an edge and the next
        for first in range(0, last, _RANKS_AT_ONCE):
            until = min(first + _RANKS_AT_ONCE, last)
            low, high = np.searchsorted(edges, [first, until])
            block = drawn[self.clips[first:until]]
            sums[low + 1 : high + 1] = np.add.reduceat(block, edges[low:high] - first, axis=0)
        return np.cumsum(sums, axis=0, dtype=np.int64)[np.searchsorted(edges, bounds)]

    @staticmethod
    def _area(hits: Ints, before: Ints, until: Ints, pairs: Any) -> Floats:
        positives = hits.sum(axis=0)
        negatives = pairs - positives
        found = np.cumsum(hits, axis=0)
        negatives_above = before - (found - hits)
        negatives_tied = until - before - hits
        right = (hits * (negatives - negatives_above - negatives_tied / 2)).sum(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(
                (positives > 0) & (negatives > 0), right / positives / negatives, np.nan
            )


def _precision(hits: Ints, until: Ints) -> Floats:
    """Average precision from the positives in each group and the ranks until its end."""
    found = np.cumsum(hits, axis=0)
    # Where no pair was drawn so far, none was found either.
    gained = (hits * (found / np.maximum(until, 1))).sum(axis=0)
    positives = hits.sum(axis=0)
    with np.errstate(invalid="ignore"):
        return np.where(positives > 0, gained / positives, np.nan)


def _ranked_labels(truth: Bools, scores: Floats) -> Iterator[_Ranked]:
    for label in range(truth.shape[1]):
        yield _Ranked.of(truth[:, label], np.ascontiguousarray(scores[:, label]))


def _ranking_precisions(truth: Bools, scores: Floats) -> Floats:
    """For each clip the sum of its true labels' precisions in its own ranking, [clips]."""
    sums = np.zeros(len(truth))
    rows, columns = np.nonzero(truth)
    for first in range(0, len(rows), _RANKS_AT_ONCE):
        row, column = rows[first : first + _RANKS_AT_ONCE], columns[first : first + _RANKS_AT_ONCE]
        as_high = scores[row] >= scores[row, column][:, None]
        precision = (as_high & truth[row]).sum(axis=1) / as_high.sum(axis=1)
        np.add.at(sums, row, precision)
    return sums


def _clip_counts(truth: Bools, scores: Floats) -> dict[str, Floats]:
    """What `_of_counts` needs, of each clip: [clips] each."""
    predicted = scores >= CARD_THRESHOLD
    return {
        "hit": (predicted & truth).sum(axis=1).astype(np.float64),
        "predicted": predicted.sum(axis=1).astype(np.float64),
        "true": truth.sum(axis=1).astype(np.float64),
        "pairs": np.full(len(truth), truth.shape[1], np.float64),
        "exact": (predicted == truth).all(axis=1).astype(np.float64),
    }


def _of_counts(counts: Mapping[str, Floats], clips: Floats) -> dict[str, Floats]:
    """F1, ROC AUC of the predictions and accuracy, from sums over clips, and clips [replicates]."""
    hit, predicted, true = counts["hit"], counts["predicted"], counts["true"]
    false = counts["pairs"] - true
    with np.errstate(invalid="ignore", divide="ignore"):
        # scikit-learn calls an F1 without any positive or prediction 0.
        f1 = np.where(predicted + true > 0, 2 * hit / (predicted + true), 0.0)
        area = (hit / true + 1 - (predicted - hit) / false) / 2
        accuracy = counts["exact"] / clips
    return {"f1": f1, "roc_auc": area, "accuracy": accuracy}


def _macro(precisions: Floats, areas: Floats, positives: Floats) -> dict[str, Floats]:
    """Means over labels, [replicates] each; all arguments are [labels, replicates]."""
    area = _mean(areas, np.ones_like(areas))
    return {
        "macro_map": _mean(precisions, np.ones_like(precisions)),
        "macro_auc": area,
        "d_prime": d_prime(area),
        "weighted_map": _mean(precisions, np.asarray(positives, np.float64)),
    }


def _mean(values: Floats, weights: Floats) -> Floats:
    """The weighted mean over the first axis of what is not NaN; NaN where nothing is left."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values * weights, 0).sum(axis=0) / np.where(known, weights, 0).sum(
            axis=0
        )


def _check(truth: Bools, scores: Floats) -> None:
    if truth.dtype != np.bool_:
        raise ValueError(
            f"truth is {truth.dtype}, but must be bool: say where a label counts as present, "
            "such as `truth >= 0.3`"
        )
    if truth.ndim != 2 or truth.shape != scores.shape:
        raise ValueError(
            f"truth is {list(truth.shape)} and scores are {list(scores.shape)}; both must be "
            "[clips, labels]"
        )
    if not np.isfinite(scores).all():
        clip, label = np.argwhere(~np.isfinite(scores))[0]
        raise ValueError(
            f"the score of label {label} of clip {clip} is {scores[clip, label]}; "
            "every score must be finite"
        )


def as_dict(metrics: CardMetrics | FieldMetrics) -> dict[str, float]:
    """A metrics' names and values."""
    return {field.name: getattr(metrics, field.name) for field in fields(metrics)}
