"""When a label is heard: neighbouring chunks that reach its threshold, merged to segments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from student.labels import Label


def merge_chunks(
    starts_s: ArrayLike,
    ends_s: ArrayLike,
    scores: NDArray[np.float32],
    thresholds: NDArray[np.float32],
    labels: Sequence[Label],
) -> list[dict[str, Any]]:
    """The segments of a clip: per label, chunks that reach its threshold and touch or overlap.

    A segment is the union of their spans, from the first one's start to the last one's end,
    with the highest of their scores. Where chunks overlap, one below the threshold does not
    end a segment if its neighbours touch.

    Args:
        starts_s: [chunks] in order, seconds into the clip, as `cut_chunks` gives them.
        ends_s: [chunks], likewise.
        scores: float32 [chunks, labels].
        thresholds: float32 [labels]; NaN where a label is never heard.
        labels: in the order of the scores.

    Returns:
        `index`, `mid`, `name`, `start_s`, `end_s` and `score` of each, by start, then index.
    """
    starts, ends = np.asarray(starts_s, np.float64), np.asarray(ends_s, np.float64)
    label, chunk = (scores >= thresholds).T.nonzero()  # by label, then by chunk
    if not len(label):
        return []
    # Touching ends are equal numbers: both are the same sample over the same rate.
    apart = (label[1:] != label[:-1]) | (starts[chunk[1:]] > ends[chunk[:-1]])
    first = np.concatenate([[0], apart.nonzero()[0] + 1])
    last = np.append(first[1:], len(label)) - 1
    index, start, end = label[first], starts[chunk[first]], ends[chunk[last]]
    peak = np.maximum.reduceat(scores[chunk, label], first)
    return [
        {
            "index": labels[index[at]].index,
            "mid": labels[index[at]].mid,
            "name": labels[index[at]].name,
            "start_s": float(start[at]),
            "end_s": float(end[at]),
            "score": float(peak[at]),
        }
        for at in np.lexsort((index, start))
    ]


def chunks_of_clips(
    column: pa.ListArray,
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float32]] | None]:
    """(starts_s [chunks], ends_s [chunks], scores [chunks, labels]) of each clip of a column `chunks`.

    None for a clip that has none, because it failed.
    """
    flat = column.flatten()  # without what null lists and slices leave out
    starts, ends = (
        flat.field(name).to_numpy(zero_copy_only=False) for name in ("start_s", "end_s")
    )
    vectors = flat.field("scores")
    scores = vectors.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    matrix = scores.reshape(len(vectors), vectors.type.list_size)
    at = 0
    for length in column.value_lengths().to_pylist():
        if length is None:
            yield None
            continue
        rows = slice(at, at + length)
        at += length
        yield starts[rows], ends[rows], matrix[rows]
