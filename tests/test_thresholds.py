"""Thresholds and calibration: fitted on worlds whose truth is known, and read back by annotate."""

import json
import math
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from evaluation import thresholds as fitting
from evaluation.thresholds import fit_thresholds, highest_target, wilson_low
from pipeline import ledger
from pipeline.cli import cli
from pipeline.options import UsageError
from pipeline.thresholds import asked_thresholds
from student.checkpoint import (
    CheckpointError,
    parse_thresholds,
    read_checkpoint,
    thresholds_warnings,
)
from student.labels import Label
from transforms.storage import DEFAULT_ACCESS
from transforms.tag import TagClips, tag_clips
from transforms.write import RowOptions, tags_of


def labels_of(count):
    return tuple(Label(index, f"/m/{index}", f"label {index}") for index in range(count))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def drawn(a, b, clips, seed, *, mean=-1.0, spread=2.0):
    """(truth, scores): logits are normal, and a label is there with probability sigmoid(a z + b)."""
    random = np.random.default_rng(seed)
    z = random.normal(mean, spread, (clips, len(a)))
    truth = random.random(z.shape) < sigmoid(np.asarray(a) * z + np.asarray(b))
    return truth, sigmoid(z).astype(np.float32)


def f1(truth, tagged):
    right = (truth & tagged).sum(0)
    return 2 * right / np.maximum(truth.sum(0) + tagged.sum(0), 1)


# ---------------------------------------------------------------- calibration


def test_calibration_finds_what_the_world_was_made_with():
    a, b = [1.0, 0.6, 1.8], [0.0, -1.5, 1.0]
    truth, scores = drawn(a, b, 40_000, seed=1)
    fitted = fit_thresholds(truth, scores, labels_of(3))
    np.testing.assert_allclose([label.a for label in fitted.labels], a, atol=0.05)
    np.testing.assert_allclose([label.b for label in fitted.labels], b, atol=0.06)
    # Probabilities are what they say, on clips that nothing was fitted on.
    truth, scores = drawn(a, b, 40_000, seed=2)
    said = fitted.probabilities(scores)
    assert said.dtype == np.float32 and said.shape == scores.shape
    for low in (0.1, 0.4, 0.7):
        there = (said >= low) & (said < low + 0.1)
        assert truth[there].mean() == pytest.approx(said[there].mean(), abs=0.02)
    assert fitted.calibrated.ece < 0.01 < fitted.uncalibrated.ece
    assert fitted.calibrated.log_loss < fitted.uncalibrated.log_loss


def test_a_calibration_is_logistic_regression():
    """Of a well-populated label with next to no shrinkage: scikit-learn finds the same."""
    from sklearn.linear_model import LogisticRegression

    truth, scores = drawn([1.4], [-0.7], 5_000, seed=3)
    fold = np.zeros(len(truth), np.int64)
    counts = fitting._count(truth, scores, fold, 1, fitting._logit_bins, len(fitting._LOGITS))
    a, b = fitting._platt(*(count[0] for count in counts), (0.0, 0.0), 1e-9)
    logits = np.log(scores / (1 - scores.astype(np.float64)))
    theirs = LogisticRegression(C=1e9, tol=1e-10).fit(logits, truth[:, 0])
    assert a[0] == pytest.approx(theirs.coef_[0, 0], abs=1e-3)
    assert b[0] == pytest.approx(theirs.intercept_[0], abs=1e-3)
    # And with the shrinkage that is used: 2,000 positives hardly feel it.
    fitted = fit_thresholds(truth, scores, labels_of(1))
    assert fitted.labels[0].a == pytest.approx(theirs.coef_[0, 0], abs=0.01)
    assert fitted.labels[0].b == pytest.approx(theirs.intercept_[0], abs=0.01)


def test_the_ridge_is_scikit_learns():
    """A strength of 1 / C in both: the intercept is another matter, so it is held far off."""
    from sklearn.linear_model import LogisticRegression

    truth, scores = drawn([1.2], [0.0], 400, seed=4, mean=0.0)
    fold = np.zeros(len(truth), np.int64)
    counts = fitting._count(truth, scores, fold, 1, fitting._logit_bins, len(fitting._LOGITS))
    logits = fitting._logit(scores)
    columns = np.hstack([logits, np.ones_like(logits)])
    theirs = LogisticRegression(C=1 / 20, fit_intercept=False, tol=1e-10)
    theirs.fit(columns, truth[:, 0])
    a, b = fitting._platt(*(count[0] for count in counts), (0.0, 0.0), 20.0)
    np.testing.assert_allclose([a[0], b[0]], theirs.coef_[0], atol=2e-3)


def test_a_rare_labels_calibration_is_near_that_of_all(monkeypatch):
    a, b = [1.0] * 30 + [1.0, 1.0], [-1.0] * 30 + [-8.0, -8.0]
    truth, scores = drawn(a, b, 2_000, seed=5)
    truth[:, 30:] = False
    truth[:3, 30] = truth[:200, 31] = True  # with 3 and 200 positives, whatever their scores
    distance = {}
    for strength in (1e-6, fitting.PLATT_SHRINKAGE, 1e7):
        monkeypatch.setattr(fitting, "PLATT_SHRINKAGE", strength)
        fitted = fit_thresholds(truth, scores, labels_of(32))
        distance[strength] = np.array(
            [math.hypot(label.a - fitted.a, label.b - fitted.b) for label in fitted.labels]
        )
    free, used, held = distance.values()
    assert used[30] < 0.75 * free[30]
    assert used[31] > 0.9 * free[31]  # what is well known stays its own
    assert held.max() < 1e-2


def test_separable_labels_and_labels_without_positives_have_finite_calibrations():
    truth = np.zeros((100, 3), bool)
    truth[:20, 0] = True
    scores = np.where(truth, 1.0, 0.0).astype(np.float32)  # float32 knows no closer to 0 and 1
    scores[:, 1:] = np.random.default_rng(0).random((100, 2))
    fitted = fit_thresholds(truth, scores, labels_of(3))
    assert all(math.isfinite(label.a) and math.isfinite(label.b) for label in fitted.labels)
    assert fitted.labels[0].f1 == 1.0
    nothing = fitted.labels[1]
    assert (nothing.a, nothing.b, nothing.threshold) == (fitted.a, fitted.b, fitted.default)
    assert (nothing.positives, nothing.recall, nothing.f1) == (0, None, None)
    assert np.isfinite(fitted.probabilities(scores)).all()


# ----------------------------------------------------------------- thresholds


def test_a_threshold_is_where_f1_is_best():
    truth, scores = drawn([2.0, 0.8], [-2.0, -0.5], 6_000, seed=6)
    fitted = fit_thresholds(truth, scores, labels_of(2))
    grid = np.arange(0.05, 0.9, 0.001)
    for column, label in enumerate(fitted.labels):
        of = [
            f1(truth[:, column : column + 1], scores[:, column : column + 1] >= t)[0] for t in grid
        ]
        assert f1(truth, scores >= np.float32(label.threshold))[column] >= max(of) - 0.002


def test_between_well_separated_scores_a_threshold_is_in_the_middle():
    truth = np.zeros((600, 1), bool)
    truth[:300] = True
    scores = np.where(truth, 0.7, 0.3).astype(np.float32)
    (label,) = fit_thresholds(truth, scores, labels_of(1)).labels
    assert label.threshold == pytest.approx(0.5, abs=0.01)


def test_a_rare_labels_threshold_is_drawn_to_that_of_all():
    random = np.random.default_rng(7)
    truth = random.random((4_000, 21)) < 0.1
    scores = sigmoid(random.normal(-3, 1, truth.shape) + 4 * truth).astype(np.float32)
    scores[:, 20] = sigmoid(random.normal(-1, 0.3, 4_000))  # another world: higher scores
    picked = {}
    for positives in (2, 400):
        truth[:, 20] = False
        truth[:positives, 20] = True
        scores[:positives, 20] = 0.8
        fitted = fit_thresholds(truth, scores, labels_of(21))
        picked[positives] = fitted.labels[20].threshold - fitted.default
        assert fitted.labels[20].positives == positives
    # Own optimum: the middle between the highest of the others and 0.8.
    assert abs(picked[2]) < 0.5 * abs(picked[400])


def test_thresholds_stay_in_their_bounds():
    random = np.random.default_rng(8)
    truth = random.random((500, 2)) < 0.3
    scores = np.where(truth, [0.99, 0.02], [0.95, 0.0001]).astype(np.float32)
    for label in fit_thresholds(truth, scores, labels_of(2)).labels:
        assert fitting.MIN_THRESHOLD <= label.threshold <= fitting.MAX_THRESHOLD


# --------------------------------------------------------------------- honesty


@pytest.mark.parametrize("shrinkage", [1e-9, fitting.THRESHOLD_SHRINKAGE])
def test_numbers_are_of_clips_that_the_fit_did_not_see(monkeypatch, shrinkage):
    """Random scores: what is tuned looks good on its own clips, and is worth nothing."""
    monkeypatch.setattr(fitting, "THRESHOLD_SHRINKAGE", shrinkage)
    random = np.random.default_rng(9)
    truth = random.random((400, 300)) < 0.02
    scores = random.random(truth.shape).astype(np.float32)
    fitted = fit_thresholds(truth, scores, labels_of(300))
    # What tagging without knowledge comes to at best: everything is tagged.
    everything = np.ones_like(truth)
    chance = f1(truth, everything).mean()
    if shrinkage < 1:
        in_sample = f1(truth, scores >= np.array(fitted.thresholds, np.float32)).mean()
        assert in_sample > 1.5 * chance
    tuned = fitted.totals["tuned"]
    assert tuned.micro_f1 <= f1(truth.reshape(-1, 1), everything.reshape(-1, 1))[0]
    # A mean over labels of 8 positives leans up a little: docs/thresholds.md says why.
    assert tuned.macro_f1 < 1.2 * chance
    assert fitted.totals["tuned"].macro_f1 == pytest.approx(
        np.mean([label.f1 for label in fitted.labels if label.f1 is not None]), abs=1e-4
    )


def test_cross_fitted_numbers_are_those_of_fits_of_the_other_folds():
    """The same, the long way: fit without a fold, tag its clips, count."""
    truth, scores = drawn([1.0, 1.5, 0.7], [-2.0, -1.0, -3.0], 700, seed=10)
    groups = [str(n // 3) for n in range(700)]
    fitted = fit_thresholds(truth, scores, labels_of(3), folds=4, seed=2, groups=groups)
    fold = fitting._deal(truth, 4, 2, fitting._united(700, groups, None))
    assert fitted.groups == 234
    tagged, said = np.zeros_like(truth), np.zeros(truth.shape)
    for held in range(4):
        rest = fit_thresholds(truth[fold != held], scores[fold != held], labels_of(3), folds=2)
        there = fold == held
        tagged[there] = scores[there] >= np.array(rest.thresholds, np.float32)
        said[there] = rest.probabilities(scores[there])
    np.testing.assert_allclose([label.f1 for label in fitted.labels], f1(truth, tagged), atol=1e-4)
    right = (truth & tagged).sum(0)
    np.testing.assert_allclose(
        [label.precision for label in fitted.labels], right / tagged.sum(0), atol=1e-4
    )
    np.testing.assert_allclose(
        [label.recall for label in fitted.labels], right / truth.sum(0), atol=1e-4
    )
    log_loss = -np.log(np.where(truth, said, 1 - said)).mean()
    assert fitted.calibrated.log_loss == pytest.approx(log_loss, abs=2e-4)
    in_sample = fitted.probabilities(scores).astype(np.float64)
    in_sample = -np.log(np.where(truth, in_sample, 1 - in_sample)).mean()
    assert abs(log_loss - in_sample) > 5e-4  # so that the one is not taken for the other
    for fixed in ("0.2", "0.5"):
        total = fitted.totals[fixed]
        plain = scores >= np.float32(fixed)
        assert total.macro_f1 == pytest.approx(f1(truth, plain).mean(), abs=1e-4)
        micro = f1(truth.reshape(-1, 1), plain.reshape(-1, 1))[0]
        assert total.micro_f1 == pytest.approx(micro, abs=1e-4)
        right = (truth & plain).sum(0)
        macro = (right / plain.sum(0)).mean(), (right / truth.sum(0)).mean()
        assert (total.macro_precision, total.macro_recall) == pytest.approx(macro, abs=1e-4)


def test_a_mean_precision_is_of_labels_that_have_positives_and_tags():
    truth, scores = np.zeros((20, 3), bool), np.full((20, 3), 0.01, np.float32)
    truth[:10, :2] = True
    scores[:14, 0] = scores[:, 2] = 0.8
    total = fit_thresholds(truth, scores, labels_of(3)).totals["0.5"]
    assert total.macro_precision == pytest.approx(10 / 14, abs=1e-4)
    assert (total.macro_recall, total.micro_precision) == (0.5, pytest.approx(10 / 34, abs=1e-4))


def test_clips_of_a_group_stay_together_and_rare_labels_are_spread():
    random = np.random.default_rng(11)
    groups = random.integers(0, 200, 1_000).astype(str)
    truth = random.random((1_000, 40)) < np.geomspace(0.004, 0.3, 40)
    fold = fitting._deal(truth, 5, 0, fitting._united(1_000, list(groups), None))
    for group in set(groups):
        assert len(set(fold[groups == group])) == 1
    sizes = np.bincount(fold, minlength=5)
    assert sizes.min() > 0.75 * 200
    per_fold = np.stack([truth[fold == held].sum(0) for held in range(5)])
    common = truth.sum(0) >= 10
    assert (per_fold[:, common].min(0) >= 1).all()

    every = fitting._united(1_000, None, None)
    alone = fitting._deal(truth, 5, 0, every)
    assert np.ptp(np.bincount(alone)) <= 25
    positives = truth.sum(0)
    of_each = np.stack([truth[alone == held].sum(0) for held in range(5)])
    rare = positives < 15
    assert (np.ptp(of_each[:, rare], axis=0) <= 2).all()
    assert (fitting._deal(truth, 5, 0, every) == alone).all()
    assert (fitting._deal(truth, 5, 1, every) != alone).any()


def test_clips_of_equal_bytes_are_in_one_fold(monkeypatch):
    """Whatever their groups say; and groups that share a clip are one."""
    united = fitting._united(6, ["a", "a", "b", "c", "d", "e"], ["1", "2", "2", "3", None, None])
    assert united[0] == united[1] == united[2]
    assert len(set(united.tolist())) == 4  # of unknown bytes is not of equal bytes
    assert len(set(fitting._united(4, None, ["x", "y", "x", "y"]).tolist())) == 2

    # Random scores, each clip twice: a fit that saw the other copy would know its clips.
    random = np.random.default_rng(21)
    truth = np.repeat(random.random((150, 200)) < 0.02, 2, axis=0)
    scores = np.repeat(random.random((150, 200)).astype(np.float32), 2, axis=0)
    hashes = [str(n // 2) for n in range(300)]
    monkeypatch.setattr(fitting, "THRESHOLD_SHRINKAGE", 1e-9)  # what is learnt by heart shows
    seen, unseen = (fit_thresholds(truth, scores, labels_of(200), hashes=h) for h in (None, hashes))
    assert (seen.groups, unseen.groups) == (300, 150)
    assert seen.totals["tuned"].macro_f1 > 1.3 * unseen.totals["tuned"].macro_f1


def test_labels_that_reach_the_target_reach_it_on_new_clips():
    """Twenty good labels, twenty that no threshold makes precise, five that are good and rare."""
    a, b = [2.5] * 20 + [0.1] * 20 + [2.5] * 5, [-2.0] * 20 + [-2.0] * 20 + [-9.0] * 5
    truth, scores = drawn(a, b, 3_000, seed=12)
    assert truth[:, 40:].sum(0).max() < 60
    fitted = fit_thresholds(truth, scores, labels_of(45), target_precision=0.8)
    reaches = [label.reaches_target for label in fitted.labels]
    assert all(reaches[:20]) and not any(reaches[20:40])
    for label in fitted.labels:
        assert (label.threshold is None) == (not label.reaches_target)
    new_truth, new_scores = drawn(a, b, 20_000, seed=13)
    thresholds = np.array([np.nan if t is None else t for t in fitted.thresholds], np.float32)
    tagged = new_scores >= thresholds
    assert all(label.precision_low >= 0.8 for label in fitted.labels if label.reaches_target)
    precision = (tagged & new_truth)[:, :20].sum(0) / tagged[:, :20].sum(0)
    assert precision.min() > 0.78 and precision.mean() > 0.8
    # No more precise than need be: recall is what is left to win.
    assert precision.mean() < 0.87


def test_of_labels_that_cannot_reach_a_target_few_are_said_to(monkeypatch):
    """200 labels are right three times in four from any threshold; the target is 0.8."""
    random = np.random.default_rng(0)
    high = random.random((1_000, 200)) < 0.05
    truth = random.random(high.shape) < np.where(high, 0.75, 0.005)
    scores = random.uniform(np.where(high, 0.3, 0.0), np.where(high, 0.9, 0.2)).astype(np.float32)
    fitted = fit_thresholds(truth, scores, labels_of(200), target_precision=0.8)
    assert sum(label.reaches_target for label in fitted.labels) <= 3
    assert "leans up" in json.loads(fitted.to_json())["cross_fitted"]["note"]

    # Also where the choice lets more through, of which luck makes many look precise.
    monkeypatch.setattr(fitting, "CHOICE_CONFIDENCE", 0.9)
    fitted = fit_thresholds(truth, scores, labels_of(200), target_precision=0.8)
    right, tagged = (
        fitting._reaching(counts)[0]
        for counts in fitting._count(
            truth, scores, np.zeros(1_000, np.int64), 1, fitting._score_bins, len(fitting._GRID) + 1
        )
    )
    own, _ = fitting._choose(right, tagged, truth.sum(0), 0.8)
    by_luck = [
        label
        for label, index in zip(fitted.labels, own, strict=True)
        if index != fitting._NEVER and (label.precision or 0) >= 0.8
    ]
    assert len(by_luck) >= 15  # so many a cross-fitted precision alone would let through
    reach = [label for label in fitted.labels if label.reaches_target]
    assert len(reach) <= 6 and all(label.precision_low >= 0.8 for label in reach)


def test_good_labels_reach_a_target():
    """A threshold is not chosen so near the target that the unseen clips deny it to every second."""
    truth, scores = drawn([2.5] * 40, [-2.0] * 40, 1_500, seed=24)
    fitted = fit_thresholds(truth, scores, labels_of(40), target_precision=0.8)
    assert sum(label.reaches_target for label in fitted.labels) >= 35
    new_truth, new_scores = drawn([2.5] * 40, [-2.0] * 40, 20_000, seed=25)
    thresholds = np.array([np.nan if t is None else t for t in fitted.thresholds], np.float32)
    tagged = new_scores >= thresholds
    there = tagged.any(0)
    precision = (tagged & new_truth).sum(0)[there] / tagged.sum(0)[there]
    assert (precision >= 0.8).mean() >= 0.85 and precision.min() > 0.76


def test_a_target_out_of_reach_of_all_labels_together_is_said():
    truth, scores = drawn([0.1] * 10, [-2.0] * 10, 600, seed=22)
    fitted = fit_thresholds(truth, scores, labels_of(10), target_precision=0.9)
    assert fitted.shared is None and fitted.totals["global"].micro_precision is None
    assert json.loads(fitted.to_json())["shared"] is None


def test_a_label_with_few_positives_is_not_said_to_reach_a_target():
    truth = np.zeros((500, 3), bool)
    truth[:3, 0] = truth[:60, 1] = True
    scores = np.where(truth, 0.9, 0.01).astype(np.float32)
    fitted = fit_thresholds(truth, scores, labels_of(3), target_precision=0.9)
    few, many, none = fitted.labels
    assert (few.reaches_target, few.threshold) == (False, None)  # 3 of 3 may be luck
    assert many.reaches_target and many.precision == 1.0 and many.precision_low > 0.9
    assert (none.reaches_target, none.threshold) == (False, None)


def test_a_target_that_only_the_fits_own_clips_reach_is_not_reached(monkeypatch):
    """Random scores of few clips: here and there a threshold looks precise, other clips disagree."""
    monkeypatch.setattr(fitting, "CHOICE_CONFIDENCE", 0.9)  # for more of them
    random = np.random.default_rng(14)
    truth = random.random((40, 400)) < 0.25
    scores = random.random(truth.shape).astype(np.float32)
    fitted = fit_thresholds(truth, scores, labels_of(400), target_precision=0.5)
    fold = np.zeros(len(truth), np.int64)
    counts = fitting._count(truth, scores, fold, 1, fitting._score_bins, len(fitting._GRID) + 1)
    right, tagged = (fitting._reaching(count)[0] for count in counts)
    found, _ = fitting._choose(right, tagged, truth.sum(0), 0.5)
    tempted = found != fitting._NEVER
    reaches = np.array([label.reaches_target for label in fitted.labels])
    assert (tempted & ~reaches).sum() >= 3
    assert not (reaches & ~tempted).any() and reaches.mean() < 0.02
    for label in fitted.labels:
        assert (label.threshold is None) == (not label.reaches_target)
        assert not label.reaches_target or label.precision >= 0.5


def test_a_rare_label_is_not_drawn_below_what_its_precision_needs():
    truth = np.zeros((3_000, 6), bool)
    truth[:1_000, :5] = truth[:20, 5] = True
    scores = np.where(truth, 0.9, 0.01).astype(np.float32)  # any threshold will do for five
    scores[20:1_000, 5] = 0.6
    fitted = fit_thresholds(truth, scores, labels_of(6), target_precision=0.8)
    assert fitted.shared < 0.1
    rare = fitted.labels[5]
    assert rare.reaches_target and 0.6 < rare.threshold <= 0.9


def test_a_score_equal_to_the_threshold_counts_as_a_tag():
    """As in the table: both are compared in float32."""
    truth = np.ones((10, 1), bool)
    scores = np.full((10, 1), 0.2, np.float32)
    totals = fit_thresholds(truth, scores, labels_of(1)).totals
    assert (totals["0.2"].micro_recall, totals["0.5"].micro_recall) == (1.0, 0.0)
    assert totals["tuned"].micro_recall == 1.0


def test_wilsons_bound_is_the_one_in_the_books():
    # 15 of 20, one-sided 90 %: by the formula, with z = 1.28155.
    z, n, p = 1.2815515655446004, 20, 0.75
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    right, tagged = np.array([15, 0, 0, 7]), np.array([20, 0, 9, 7])
    low = wilson_low(right, tagged)
    assert low[0] == pytest.approx(centre - half)
    assert (low[1], low[2]) == (0, 0)
    assert low[3] == pytest.approx(7 / (7 + z * z))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"truth": np.zeros((10, 2))}, "the truth is float64"),
        ({"truth": np.zeros((9, 2), bool)}, "[9, 2]"),
        ({"labels": labels_of(3)}, "2 columns, but there are 3 labels"),
        ({"scores": np.full((10, 2), np.nan, np.float32)}, "clip 0 for 'label 0' is nan"),
        ({"scores": np.full((10, 2), 1.5, np.float32)}, "is 1.5, expected 0 to 1"),
        ({"target_precision": 1.0}, "the target precision is 1.0"),
        ({"folds": 1}, "there are 1 folds"),
        ({"folds": 11}, "10 clips cannot be dealt into 11 folds"),
        ({"groups": ["a"] * 10}, "1 groups of clips cannot be dealt into 5 folds"),
        ({"groups": ["a"] * 9}, "9 groups for 10 clips"),
        ({"hashes": ["a"] * 9}, "9 hashes for 10 clips"),
        ({"hashes": ["a"] * 10}, "1 groups of clips cannot be dealt into 5 folds"),
    ],
)
def test_what_cannot_be_fitted_is_refused(change, message):
    given = {
        "truth": np.zeros((10, 2), bool),
        "scores": np.zeros((10, 2), np.float32),
        "labels": labels_of(2),
    } | change
    with pytest.raises(ValueError) as refusal:
        fit_thresholds(**given)
    assert message in str(refusal.value)


# -------------------------------------------------------------------- the file


@pytest.fixture(scope="module")
def fitted():
    truth, scores = drawn([2.0, 0.1, 1.0], [-1.0, -3.0, -1.0], 500, seed=15)
    labels = (Label(0, "/m/0bt9lr", "Dog"), Label(1, "", "hiss"), Label(2, "/m/05tny_", "Bark"))
    return fit_thresholds(truth, scores, labels, target_precision=0.7, weights_sha256="ab" * 32)


def test_a_file_says_what_was_fitted(fitted):
    assert fitted.thresholds[0] is not None and fitted.thresholds[1] is None
    stated = json.loads(fitted.to_json())
    dog = stated["labels"]["/m/0bt9lr"]
    assert (dog["name"], dog["threshold"]) == ("Dog", fitted.thresholds[0])
    assert stated["labels"]["hiss"]["reaches_target"] is False
    assert stated["fitted_on"]["target_precision"] == 0.7
    assert stated["cross_fitted"]["tuned"] == vars(fitted.totals["tuned"])
    assert "did not see" in stated["cross_fitted"]["note"]
    lines = fitted.to_json().splitlines()
    assert sum('"threshold":' in line for line in lines) == 3  # a line a label
    # For no label that the fit did not have was the target shown.
    assert stated["default"] is None and stated["shared"] == fitted.shared

    best_f1 = fit_thresholds(*drawn([1.0], [0.0], 100, seed=1), labels_of(1))
    stated = json.loads(best_f1.to_json())
    assert "reaches_target" not in stated["labels"]["/m/0"]
    assert stated["default"] == stated["shared"] == best_f1.default
    assert "leans up" not in stated["cross_fitted"]["note"]


def test_annotate_reads_the_full_form_as_it_reads_the_flat_one(fitted):
    labels = [label.label for label in fitted.labels]
    stated = json.loads(fitted.to_json())
    assert parse_thresholds(stated, labels, "t.json") == fitted.thresholds
    # A label that the file does not know has its default.
    more = [*labels, Label(3, "/m/09x0r", "Speech")]
    assert parse_thresholds(stated, more, "t.json") == (*fitted.thresholds, fitted.default)
    assert parse_thresholds({"Bark": None}, labels, "t.json") == (0.2, 0.2, None)
    both = {"Dog": 0.4, "/m/0bt9lr": 0.4}
    assert parse_thresholds(both, labels, "t.json") == (0.4, 0.2, 0.2)
    with pytest.raises(
        CheckpointError, match=r"two thresholds for one label: 0\.3 for '/m/0bt9lr'"
    ):
        parse_thresholds(both | {"/m/0bt9lr": 0.3}, labels, "t.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "earmark.thresholds/2"}, "of format 'earmark.thresholds/2', expected 'earmark"),
        ({"labels": [0.5]}, "'labels' is [0.5], expected an object"),
        ({"labels": {"Dog": 0.5}}, "label 'Dog' is 0.5, expected an object with a 'threshold'"),
        ({"labels": {"Dog": {"a": 1}}}, "label 'Dog' is {'a': 1}"),
        ({"labels": {"Dog": {"threshold": 2}}}, "the threshold of 'Dog' is 2, expected 0 to 1"),
        ({"labels": {"Unicorn": {"threshold": 0.5}}}, "'Unicorn', which is no label"),
        (
            {"labels": {"Dog": {"threshold": 0.5}, "/m/0bt9lr": {"threshold": None}}},
            "two thresholds for one label: null for '/m/0bt9lr' and 0.5 for 'Dog'",
        ),
        ({"default": "half"}, "the threshold of 'default' is 'half', expected 0 to 1"),
    ],
)
def test_a_full_form_that_cannot_be_right_is_refused(fitted, change, message):
    labels = [label.label for label in fitted.labels]
    with pytest.raises(CheckpointError) as refusal:
        parse_thresholds(json.loads(fitted.to_json()) | change, labels, "my/t.json")
    assert message in str(refusal.value) and "my/t.json" in str(refusal.value)


def test_thresholds_of_other_weights_are_a_warning(fitted, tmp_path):
    stated = json.loads(fitted.to_json())
    assert thresholds_warnings(stated, [0.5] * 3, "ab" * 32, "t.json") == ()
    assert thresholds_warnings({"Dog": 0.5}, [0.5] * 3, "cd" * 32, "t.json") == ()
    (warning,) = thresholds_warnings(stated, [0.5] * 3, "cd" * 32, "t.json")
    assert "t.json was fitted on scores of other weights" in warning

    (tmp_path / "t.json").write_text(fitted.to_json(), "utf-8")
    labels = tuple(label.label for label in fitted.labels)
    ask = (None, str(tmp_path / "t.json"), labels)
    thresholds, notes = asked_thresholds(*ask, "cd" * 32, DEFAULT_ACCESS)
    assert thresholds == fitted.thresholds
    never = sum(threshold is None for threshold in thresholds)
    assert notes == [
        f"{tmp_path / 't.json'} was fitted on scores of other weights (SHA-256 abababababab..., these "
        "are cdcdcdcdcdcd...): its thresholds may not suit; fit them again for this checkpoint",
        f"{never} of 3 labels have no threshold and never become tags",
    ]
    assert asked_thresholds(*ask, "ab" * 32, DEFAULT_ACCESS)[1] == notes[1:]
    assert asked_thresholds(None, None, labels, "", DEFAULT_ACCESS) is None
    for odd in (float("nan"), -0.1, 1.1):
        with pytest.raises(UsageError, match=f"--threshold is {odd}, expected a score from 0 to 1"):
            asked_thresholds(odd, None, labels, "", DEFAULT_ACCESS)
    (tmp_path / "t.json").write_text('{"Unicorn": 0.5}')
    with pytest.raises(UsageError, match="'Unicorn', which is no label"):
        asked_thresholds(*ask, "", DEFAULT_ACCESS)


def test_a_checkpoint_may_have_the_full_form_as_its_own(make_checkpoint, fitted, tmp_path):
    folder = make_checkpoint(tmp_path / "own", ["Dog", "hiss", "Bark"])
    (folder / "thresholds.json").write_text(fitted.to_json(), "utf-8")
    facts = read_checkpoint(str(folder))
    assert facts.thresholds == fitted.thresholds and facts.has_own_thresholds
    assert "other weights" in facts.warnings[0]
    never = sum(threshold is None for threshold in facts.thresholds)
    assert facts.warnings[1:] == (f"{never} of 3 labels have no threshold and never become tags",)


def test_a_label_without_a_threshold_is_never_a_tag(fitted):
    labels = [label.label for label in fitted.labels]
    tags = tags_of(np.ones(3, np.float32), labels, RowOptions((0.5, None, 1.0)))
    assert [tag["name"] for tag in tags] == ["Dog", "Bark"]
    assert tags_of(np.ones(3, np.float32), labels, RowOptions((None,) * 3)) == []


def test_a_label_without_a_threshold_is_never_a_tag_in_a_pipeline_of_ones_own(tiny_student, noise):
    (every,) = tag_clips([noise(20_000)], tiny_student, thresholds=0)
    allowed = every.tags[3].index
    thresholds = [0.0 if index == allowed else None for index in range(527)]
    (one,) = tag_clips([noise(20_000)], tiny_student, thresholds=thresholds)
    assert [tag.index for tag in one.tags] == [allowed]
    TagClips("bundled", thresholds=thresholds)  # does not mind None
    with pytest.raises(ValueError, match=r"a threshold is 1\.5"):
        TagClips("bundled", thresholds=[None, 1.5])


# ---------------------------------------------------------------- the command


LABELS = tuple(Label(n, f"/m/{n}", name) for n, name in enumerate(["Dog", "Cat", "Rare", "Odd"]))


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """What annotate would have written of 120 clips, of which the last 20 repeat others."""
    folder = tmp_path_factory.mktemp("thresholds") / "out"
    (folder / "clips").mkdir(parents=True)
    random = np.random.default_rng(23)
    truth = random.random((100, 4)) < [0.4, 0.3, 0.02, 0.0]
    truth[0, 2] = True
    scores = sigmoid(random.normal(-2, 1, truth.shape) + 4 * truth).astype(np.float32)
    truth, scores = (np.concatenate([rows, rows[:20]]) for rows in (truth, scores))
    about = [{"labels": [LABELS[k].name for k in np.flatnonzero(row)]} for row in truth]
    for n in range(10):
        about[n]["of"] = f"c{n + 50}" if n > 5 else "one"  # c56 is a clip_id too
    table = pa.table(
        {
            "clip_id": [f"c{n}" for n in range(120)],
            "audio_xxh128": [str(n % 100) for n in range(120)],
            "scores": pa.FixedSizeListArray.from_arrays(pa.array(scores.ravel()), 4),
            "metadata": [json.dumps(of) for of in about],
            "error": pa.nulls(120, pa.struct([("stage", pa.string()), ("type", pa.string())])),
        }
    )
    pq.write_table(table, folder / "clips" / "a.parquet")
    run = {"fingerprint": "f", "checkpoint": {"name": "x/y", "weights_sha256": "ab" * 32}}
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "labels.parquet").write_bytes(ledger.labels_parquet(LABELS, (0.2,) * 4))
    return folder


def evaluated(output, *options):
    """(what was said, the file) of `earmark evaluate --thresholds`."""
    file = output / "t.json"
    asked = ["--truth", "metadata:labels", "--bootstrap", 0, "--thresholds", file, *options]
    done = CliRunner().invoke(cli, ["evaluate", str(output), *map(str, asked)])
    assert done.exit_code == 0, done.output
    return done.output, json.loads(file.read_text())


@pytest.fixture(scope="module")
def teacher(output):
    """Scores of half of the clips."""
    table = pq.read_table(output / "clips" / "a.parquet", columns=["clip_id", "scores"])
    folder = output / "teacher"
    (folder / "clips").mkdir(parents=True)
    for name in ("run.json", "labels.parquet"):
        (folder / name).write_bytes((output / name).read_bytes())
    pq.write_table(table.slice(0, 60), folder / "clips" / "a.parquet")
    return folder


def test_all_labels_and_clips_are_fitted_whatever_is_compared(output, teacher):
    _, whole = evaluated(output, "--target-precision", 0.5)
    options = ["--labels-at-least", 5, "--teacher", teacher, "--target-precision", 0.5]
    said, file = evaluated(output, *options)
    assert "60 of the truth's" in said and "on 2 of 4 labels" in said
    assert file == whole
    assert [of["name"] for of in file["labels"].values()] == [label.name for label in LABELS]
    odd = file["labels"]["/m/3"]
    assert (odd["threshold"], odd["positives"], odd["reaches_target"]) == (None, 0, False)
    assert file["labels"]["/m/0"]["threshold"] is not None and file["default"] is None
    thresholds = parse_thresholds(file, LABELS, "t.json")
    assert (thresholds[3], parse_thresholds(file, [*LABELS, Label(4, "", "New")], "t.json")[4]) == (
        None,
        None,
    )


def test_the_command_says_what_was_fitted(output):
    said, file = evaluated(output, "--target-precision", 0.5)
    assert "2 of 4 labels reach a precision of 0.5; the others have no threshold" in said
    assert f"Fitted on all clips, the one for all is {file['shared']:g}." in said
    names = ("0.2 for all", "one for all, fitted", "one a label, fitted")
    lines = {name: line for line in said.splitlines() for name in names if line.startswith(name)}
    for shown, name in zip(names, ("0.2", "global", "tuned"), strict=True):
        numbers = list(map(float, lines[shown].removeprefix(shown).split()))
        total = file["cross_fitted"][name]
        assert numbers == pytest.approx(
            [total[f"{over}_{what}"] for over in ("micro", "macro")
             for what in ("precision", "recall", "f1")], abs=6e-4,
        )  # fmt: skip
    errors = file["cross_fitted"]["calibration"]
    assert (
        f"Expected calibration error: {errors['before']['ece']:.4f} of the scores, "
        f"{errors['after']['ece']:.4f} calibrated" in said
    )
    said, file = evaluated(output)
    assert "reach a precision" not in said and file["labels"]["/m/3"]["threshold"] is not None


def test_a_target_that_no_label_reaches_writes_nothing(output, tmp_path):
    file = tmp_path / "t.json"
    asked = ["--truth", "metadata:labels", "--bootstrap", "0", "--thresholds", str(file)]
    command = ["evaluate", str(output), *asked, "--target-precision"]
    done = CliRunner().invoke(cli, [*command, "0.99"])
    assert done.exit_code == 2 and not file.exists()
    assert "--target-precision 0.99: no label reaches it" in done.output
    reached, labels = re.search(
        r"The highest target that any label reaches is ([\d.]+) \((\d+) of 4 do\)", done.output
    ).groups()
    assert CliRunner().invoke(cli, [*command, reached]).exit_code == 0
    fitted = json.loads(file.read_text())["labels"].values()
    assert sum(label["reaches_target"] for label in fitted) == int(labels) > 0
    file.unlink()
    above = f"{float(reached) + 0.05:g}"
    assert CliRunner().invoke(cli, [*command, above]).exit_code == 2 and not file.exists()


def test_no_target_is_the_highest_where_nothing_is_right():
    truth = np.zeros((50, 2), bool)
    truth[:3, 0] = True
    scores = np.linspace(0, 1, 100, dtype=np.float32).reshape(50, 2)  # the true ones lowest
    assert highest_target(truth, scores, 0.9, folds=2) is None


def test_copies_stay_in_one_fold_and_a_value_is_no_clip_id(output):
    _, file = evaluated(output)
    assert (file["fitted_on"]["clips"], file["fitted_on"]["groups"]) == (120, 100)
    # c0 to c5 are one recording, and c6 is of "c56", which says nothing of the clip c56.
    said, file = evaluated(output, "--group-by", "of")
    assert "--group-by of: 10 clips in 5 groups; 110 clips without it" in said
    assert file["fitted_on"]["groups"] == 100 - 10 + 5
