"""Metrics against scikit-learn, and against what a hand can compute."""

import math

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    label_ranking_average_precision_score,
    roc_auc_score,
)

from evaluation import metrics


def draw(clips, labels, seed, decimals):
    """A truth, and scores that know something of it; few decimals make many ties."""
    random = np.random.default_rng(seed)
    truth = random.random((clips, labels)) < 0.15
    scores = np.round(random.random((clips, labels)) * 0.8 + truth * 0.2, decimals)
    return truth, scores


RANDOM = pytest.mark.parametrize(
    ("clips", "labels", "decimals"), [(40, 6, 1), (300, 11, 1), (300, 11, 9), (9_000, 2, 2)]
)


@RANDOM
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_labels_are_measured_as_scikit_learn_does(clips, labels, decimals, dtype):
    truth, scores = draw(clips, labels, 1, decimals)
    scores = scores.astype(dtype)
    wide = scores.astype(np.float64)
    precisions = [average_precision_score(truth[:, k], wide[:, k]) for k in range(labels)]
    areas = [roc_auc_score(truth[:, k], wide[:, k]) for k in range(labels)]
    assert metrics.average_precision(truth, scores) == pytest.approx(precisions, abs=1e-12)
    assert metrics.roc_auc(truth, scores) == pytest.approx(areas, abs=1e-12)


@RANDOM
def test_all_pairs_and_rankings_are_measured_as_scikit_learn_does(clips, labels, decimals):
    truth, scores = draw(clips, labels, 2, decimals)
    by_labels = {"sample_weight": truth.sum(axis=1)}
    ranking = label_ranking_average_precision_score(truth, scores, **by_labels)
    assert metrics.lwlrap(truth, scores) == pytest.approx(ranking, abs=1e-12)
    micro = average_precision_score(truth, scores, average="micro")
    assert metrics.micro_average_precision(truth, scores) == pytest.approx(micro, abs=1e-12)


@RANDOM
def test_the_card_is_what_scikit_learn_says_of_predictions_at_a_half(clips, labels, decimals):
    truth, scores = draw(clips, labels, 3, decimals)
    predicted = scores >= 0.5
    card = metrics.card_metrics(truth, scores)
    assert metrics.as_dict(card) == pytest.approx(
        {
            "f1": f1_score(truth, predicted, average="micro"),
            "roc_auc": roc_auc_score(truth, predicted, average="micro"),
            "accuracy": accuracy_score(truth, predicted),
            "mAP": average_precision_score(truth, scores, average="micro"),
        },
        abs=1e-12,
    )


def test_the_fields_means_are_of_the_labels_that_have_positives():
    truth, scores = draw(200, 8, 4, 2)
    truth[:, 5] = False
    kept = np.arange(8) != 5
    positives = truth.sum(axis=0)[kept]
    precisions = [average_precision_score(truth[:, k], scores[:, k]) for k in np.flatnonzero(kept)]
    area = roc_auc_score(truth[:, kept], scores[:, kept], average="macro")
    field = metrics.field_metrics(truth, scores)
    assert field.labels == 7
    assert field.macro_map == pytest.approx(np.mean(precisions))
    assert field.weighted_map == pytest.approx(np.average(precisions, weights=positives))
    assert field.macro_auc == pytest.approx(area)
    assert field.d_prime == pytest.approx(metrics.d_prime(area))


# Four clips of one label. From the highest score down: true, false and true tied, false.
TIED_TRUTH = np.array([[True], [False], [True], [False]])
TIED_SCORES = np.array([[0.9], [0.6], [0.6], [0.1]])


def test_a_tie_by_hand():
    # At 0.9: 1 of 1 is true, and 1 of 2 positives is found: 1/1 * 1/2.
    # At 0.6, both at once: 2 of 3 are true, and the other half is found: 2/3 * 1/2.
    assert metrics.average_precision(TIED_TRUTH, TIED_SCORES)[0] == pytest.approx(1 / 2 + 1 / 3)
    # Pairs of positive and negative: 0.9 > 0.6, 0.9 > 0.1, 0.6 > 0.1 are right, 0.6 = 0.6 is half.
    assert metrics.roc_auc(TIED_TRUTH, TIED_SCORES)[0] == pytest.approx(3.5 / 4)


# Two clips, three labels.
TWO_TRUTH = np.array([[True, False, True], [False, True, False]])
TWO_SCORES = np.array([[0.7, 0.6, 0.2], [0.5, 0.9, 0.1]])


def test_the_card_by_hand():
    card = metrics.card_metrics(TWO_TRUTH, TWO_SCORES)
    # Predicted: labels 0 and 1 of clip 0, labels 0 and 1 of clip 1: 4, of which 2 are right;
    # 3 pairs are true. F1 = 2 * 2 / (4 + 3).
    assert card.f1 == pytest.approx(4 / 7)
    # 2 of 3 true pairs are predicted, and 1 of 3 false ones is not: (2/3 + 1/3) / 2.
    assert card.roc_auc == pytest.approx(1 / 2)
    assert card.accuracy == 0  # neither clip has every label right
    # By falling score: 0.9 true, 0.7 true, 0.6, 0.5 false, 0.2 true, 0.1.
    # Precisions where a third is found: 1/1, 2/2, 3/5.
    assert card.mAP == pytest.approx((1 + 1 + 3 / 5) / 3)


def test_lwlrap_by_hand():
    # Clip 0: 0.7 is first (1/1), 0.2 is third, with 2 true ones down to it (2/3).
    # Clip 1: 0.9 is first (1/1). Three true labels in all.
    assert metrics.lwlrap(TWO_TRUTH, TWO_SCORES) == pytest.approx((1 + 2 / 3 + 1) / 3)


def test_d_prime_by_hand():
    # The normal quantile of 0.8413447 is 1, and sqrt(2) times that is d'.
    assert metrics.d_prime(0.841344746) == pytest.approx(math.sqrt(2), abs=1e-6)
    assert metrics.d_prime(0.5) == pytest.approx(0)
    # As published for AST: an AUC of 0.97856 and a d' of 2.8637.
    assert metrics.d_prime(0.97856) == pytest.approx(2.8637, abs=2e-3)
    assert metrics.d_prime(np.array([1.0, 0.0])).tolist() == [math.inf, -math.inf]
    assert math.isnan(metrics.d_prime(math.nan))


def test_what_is_not_defined_is_nan():
    truth = np.array([[True, False, True], [True, False, False]])
    scores = np.array([[0.9, 0.5, 0.3], [0.1, 0.5, 0.2]])
    # All true, all false, one of each.
    assert np.isnan(metrics.average_precision(truth, scores)).tolist() == [False, True, False]
    assert np.isnan(metrics.roc_auc(truth, scores)).tolist() == [True, True, False]
    nothing = np.zeros_like(truth)
    assert math.isnan(metrics.lwlrap(nothing, scores))
    field = metrics.field_metrics(nothing, scores)
    assert field.labels == 0
    assert math.isnan(field.macro_map) and math.isnan(field.weighted_map)
    assert math.isnan(metrics.card_metrics(nothing, scores).mAP)
    draws = metrics.bootstrap(nothing, scores, 5)
    assert np.isnan(draws.average_precision).all() and np.isnan(draws.values["lwlrap"]).all()


@pytest.mark.parametrize(("clips", "labels", "decimals"), [(30, 5, 1), (9_000, 2, 2)])
def test_a_replicate_is_the_metrics_of_the_clips_it_drew(clips, labels, decimals):
    """Counting by weights, across the blocks that ranks are read in, is measuring copies of clips."""
    truth, scores = draw(clips, labels, 5, decimals)
    truth[:, 0] = np.arange(clips) < 2  # so few positives that some replicates lose them
    draws = metrics.bootstrap(truth, scores, 60 if clips < 100 else 3, seed=7)
    random = np.random.default_rng(7)
    lost = 0
    for replicate in range(len(draws.average_precision)):
        chosen = random.integers(0, clips, clips)
        direct = metrics.as_dict(metrics.card_metrics(truth[chosen], scores[chosen]))
        direct |= metrics.as_dict(metrics.field_metrics(truth[chosen], scores[chosen]))
        lost += direct.pop("labels") < labels
        got = {name: values[replicate] for name, values in draws.values.items()}
        assert got == pytest.approx(direct, nan_ok=True, abs=1e-12)
        precisions = metrics.average_precision(truth[chosen], scores[chosen])
        assert draws.average_precision[replicate] == pytest.approx(precisions, nan_ok=True)
    assert clips > 100 or 0 < lost < 30


def test_an_interval_holds_what_it_should():
    """Of many samples of one population, 95 % intervals hold its value in about 95 %."""
    held = 0
    for seed in range(60):
        random = np.random.default_rng(seed)
        truth = random.random((150, 4)) < 0.5
        scores = random.random((150, 4))  # knows nothing: the area is 0.5
        draws = metrics.bootstrap(truth, scores, 100, seed)
        low, high = metrics.interval(
            draws.values["macro_auc"], metrics.field_metrics(truth, scores).macro_auc
        )
        held += low <= 0.5 <= high
    assert 50 <= held < 60


def test_equal_seeds_draw_equal_clips():
    truth, scores = draw(50, 3, 8, 2)
    one, same = metrics.bootstrap(truth, scores, 9, 1), metrics.bootstrap(truth, scores, 9, 1)
    other = metrics.bootstrap(truth, scores, 9, 2)
    assert np.array_equal(one.values["mAP"], same.values["mAP"])
    assert not np.array_equal(one.values["mAP"], other.values["mAP"])


def test_copies_of_one_clip_that_are_drawn_together_say_no_more_than_it():
    """Four copies of each clip: drawn one by one, they would halve the intervals."""
    truth, scores = draw(50, 3, 8, 9)
    once = metrics.bootstrap(truth, scores, 200, 1)
    copies = np.repeat(truth, 4, axis=0), np.repeat(scores, 4, axis=0)
    groups = np.repeat(np.arange(50), 4)
    together = metrics.bootstrap(*copies, 200, 1, groups)
    for name, values in once.values.items():
        np.testing.assert_allclose(together.values[name], values, atol=1e-12)
    np.testing.assert_allclose(together.average_precision, once.average_precision, atol=1e-12)
    alone = metrics.bootstrap(*copies, 200, 1)
    spread = alone.values["accuracy"].std() / once.values["accuracy"].std()
    assert 0.4 < spread < 0.62


def test_an_interval_holds_the_value_of_rare_labels():
    """Their replicates lie higher than the value: the plain percentiles often miss it."""
    for seed in range(4):
        random = np.random.default_rng(seed)
        truth = random.random((400, 200)) < 0.01
        scores = random.normal(size=(400, 200)) + truth
        draws = metrics.bootstrap(truth, scores, 60, seed).values["weighted_map"]
        value = metrics.field_metrics(truth, scores).weighted_map
        plain_low, plain_high = np.quantile(draws, [0.025, 0.975])
        assert value < plain_low
        low, high = metrics.interval(draws, value)
        assert low < value < high
        assert high - low == pytest.approx(plain_high - plain_low)


def test_intervals_of_odd_values():
    # Percentiles 5 and 95 of 0 to 100, whose mean is 50, moved to a value of 60.
    assert metrics.interval(np.arange(101.0), 60, level=0.9) == pytest.approx((15, 105))
    bounded = metrics.interval(np.arange(101.0), 60, level=0.9, bounds=(20, 100))
    assert bounded == (20, 100)
    assert metrics.interval(np.array([1.0, np.nan, 3.0]), 2, level=1) == (1, 3)
    assert metrics.interval(np.array([1.0, 2.0, np.inf]), 1) == (1, np.inf)
    assert all(map(math.isnan, metrics.interval(np.array([]), 1)))


def test_reliability_by_hand():
    # Two ranges, below 0.5 and from it: scores 0.2 and 0.4 of which one is true, 1.0 of which all is.
    truth = np.array([[True, False, True]])
    r = metrics.reliability(truth, np.array([[0.2, 0.4, 1.0]]), bins=2)
    assert r.pairs.tolist() == [2, 1]
    assert r.mean_score == pytest.approx([0.3, 1.0])
    assert r.share_true == pytest.approx([0.5, 1.0])
    assert r.ece == pytest.approx((2 * 0.2 + 1 * 0.0) / 3)
    with pytest.raises(ValueError, match="sigmoid"):
        metrics.reliability(truth, np.array([[-3.0, 0.4, 1.0]]))


def test_the_area_below_a_curve_is_average_precision():
    truth, scores = draw(200, 3, 9, 1)
    precision, recall = metrics.precision_recall(truth, scores)
    area = (np.diff(recall) * precision[1:]).sum()
    assert area == pytest.approx(metrics.micro_average_precision(truth, scores))
    assert recall[0] == 0 and recall[-1] == 1


@pytest.mark.parametrize(
    ("truth", "scores", "said"),
    [
        (np.ones((2, 3)), np.ones((2, 3)), "must be bool"),
        (np.ones((2, 3), bool), np.ones((2, 4)), r"\[2, 3\] and scores are \[2, 4\]"),
        (np.ones(3, bool), np.ones(3), r"\[clips, labels\]"),
        (np.ones((1, 2), bool), np.array([[1.0, np.nan]]), "label 1 of clip 0 is nan"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(truth, scores, said):
    for measure in (
        metrics.average_precision,
        metrics.roc_auc,
        metrics.lwlrap,
        metrics.card_metrics,
        metrics.field_metrics,
        metrics.bootstrap,
        metrics.reliability,
    ):
        with pytest.raises(ValueError, match=said):
            measure(truth, scores)
