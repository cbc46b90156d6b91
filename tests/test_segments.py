"""Segments: neighbouring chunks that reach a label's threshold, merged."""

import numpy as np
import pyarrow as pa
import pytest

from student.labels import Label
from transforms.segments import chunks_of_clips, merge_chunks
from transforms.write import RowOptions, segments_of

LABELS = (Label(0, "/m/a", "A"), Label(1, "/m/b", "B"), Label(2, "", "C"))


def merged(spans, *scores, thresholds=(0.5, 0.5, 0.5)):
    """(name, start_s, end_s, score) of each segment, of `scores` by label."""
    starts, ends = zip(*spans, strict=True)
    matrix = np.array(scores, np.float32).T
    found = merge_chunks(starts, ends, matrix, np.array(thresholds, np.float32), LABELS)
    return [(s["name"], s["start_s"], s["end_s"], pytest.approx(s["score"])) for s in found]


def test_touching_chunks_join_and_others_do_not():
    spans = [(0, 10), (10, 20), (20, 30), (30, 40)]
    none = [0, 0, 0, 0]
    assert merged(spans, [0.6, 0.9, 0.1, 0.7], none, none) == [
        ("A", 0, 20, 0.9),
        ("A", 30, 40, 0.7),
    ]
    assert merged(spans, [0.5] * 4, none, none) == [("A", 0, 40, 0.5)]  # at the threshold
    assert merged(spans, none, none, none) == []


def test_the_last_chunk_overlaps_the_one_before():
    spans = [(0, 10), (10, 20), (15, 25)]
    assert merged(spans, [0.1, 0.6, 0.8], [0, 0, 0], [0, 0, 0.9]) == [
        ("A", 10, 25, 0.8),
        ("C", 15, 25, 0.9),
    ]


def test_chunks_that_overlap_over_a_quiet_one_join():
    spans = [(0, 10), (4, 14), (8, 18), (12, 22)]
    assert merged(spans, [0.9, 0.1, 0.6, 0.1], [0.9, 0.1, 0.1, 0.8], [0] * 4) == [
        ("A", 0, 18, 0.9),
        ("B", 0, 10, 0.9),
        ("B", 12, 22, 0.8),
    ]


def test_labels_do_not_run_into_each_other_and_the_order_is_by_start_then_index():
    spans = [(0, 10), (10, 20)]
    assert merged(spans, [0.1, 0.9], [0.7, 0.1], [0.8, 0.8]) == [
        ("B", 0, 10, 0.7),
        ("C", 0, 20, 0.8),
        ("A", 10, 20, 0.9),
    ]


def test_each_label_has_its_own_threshold_and_one_may_have_none():
    spans = [(0, 10), (10, 20)]
    found = merged(spans, [0.3, 0.3], [0.3, 0.3], [1, 1], thresholds=(0.2, 0.4, np.nan))
    assert found == [("A", 0, 20, 0.3)]


def test_against_a_plain_loop():
    random = np.random.default_rng(1)
    for _ in range(100):
        chunks, hop = int(random.integers(1, 12)), int(random.integers(1, 11))
        starts = np.arange(chunks) * hop / 10
        ends = (np.arange(chunks) * hop + 10) / 10  # as integers over a rate, like real ones
        scores = random.random((chunks, 3)).astype(np.float32)
        expected = []
        for label in LABELS:
            at = None
            for start, end, score in zip(starts, ends, scores[:, label.index], strict=True):
                if score < 0.6:
                    continue
                if at is not None and start <= at["end_s"]:
                    at["end_s"], at["score"] = end, max(at["score"], score)
                else:
                    at = {"index": label.index, "mid": label.mid, "name": label.name,
                          "start_s": start, "end_s": end, "score": score}  # fmt: skip
                    expected.append(at)
        expected.sort(key=lambda segment: (segment["start_s"], segment["index"]))
        thresholds = np.full(3, 0.6, np.float32)
        assert merge_chunks(starts, ends, scores, thresholds, LABELS) == expected


def test_the_score_as_it_is_stored_decides():
    scores = np.array([[0.49999, 0.0, 0.0]], np.float32)  # 0.5 in half precision
    whole, half = (RowOptions((0.5,) * 3, score_type=kind) for kind in ("float32", "float16"))
    assert segments_of([0.0], [1.0], scores, LABELS, whole) == []
    (segment,) = segments_of([0.0], [1.0], scores, LABELS, half)
    assert segment["score"] == 0.5


@pytest.mark.parametrize("kind", [pa.float32(), pa.float16()])
def test_chunks_are_read_from_their_column_slices_and_nulls_too(kind):
    column = pa.array(
        [
            [{"start_s": 0.0, "end_s": 1.0, "scores": [0.5, 0.25]}],
            None,
            [],
            [
                {"start_s": 0.0, "end_s": 1.0, "scores": [0.75, 0.125]},
                {"start_s": 1.0, "end_s": 2.0, "scores": [0.5, 1.0]},
            ],
        ],
        pa.list_(
            pa.struct(
                [("start_s", pa.float64()), ("end_s", pa.float64()), ("scores", pa.list_(kind, 2))]
            )
        ),
    )
    for first in range(4):
        read = list(chunks_of_clips(column.slice(first)))
        assert [None if clip is None else len(clip[0]) for clip in read] == [1, None, 0, 2][first:]
        starts, ends, scores = read[-1]
        assert (starts.tolist(), ends.tolist()) == ([0.0, 1.0], [1.0, 2.0])
        assert scores.dtype == np.float32 and scores.tolist() == [[0.75, 0.125], [0.5, 1.0]]
