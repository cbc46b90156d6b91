from __future__ import annotations

import tracemalloc
from collections.abc import Iterable

import numpy as np
import pytest
from numpy.typing import NDArray

from student.feature_spec import FeatureSpec
from transforms.chunk import cut_chunks, hop_samples_of

CHUNK = 100  # samples
RATE = 50  # Hz, so that a chunk takes 2 s


def ramp(samples: int) -> NDArray[np.float32]:
    """Every sample is its own position."""
    return np.arange(samples, dtype=np.float32)


def cut(
    blocks: Iterable[NDArray[np.float32]], hop: int | None = None
) -> list[tuple[float, float, list[float]]]:
    chunks = list(cut_chunks(blocks, CHUNK, RATE, hop))
    assert all(chunk.waveform.dtype == np.float32 for chunk in chunks)
    return [(chunk.start_s, chunk.end_s, chunk.waveform.tolist()) for chunk in chunks]


def expected(*spans: tuple[int, int]) -> list[tuple[float, float, list[float]]]:
    """Chunks of a ramp, by their first and one past their last sample."""
    return [
        (first / RATE, end / RATE, [float(value) for value in range(first, end)])
        for first, end in spans
    ]


@pytest.mark.parametrize(
    ("samples", "spans"),
    [
        (0, []),
        (1, [(0, 1)]),
        (99, [(0, 99)]),
        (100, [(0, 100)]),
        (101, [(0, 100), (1, 101)]),
        (199, [(0, 100), (99, 199)]),
        (200, [(0, 100), (100, 200)]),
        (250, [(0, 100), (100, 200), (150, 250)]),
        (300, [(0, 100), (100, 200), (200, 300)]),
        (301, [(0, 100), (100, 200), (200, 300), (201, 301)]),
    ],
)
@pytest.mark.parametrize("block", [1, 7, 50, 99, 100, 101, 250, 1_000])
def test_chunks_are_full_and_the_last_one_ends_with_the_clip(
    samples: int, spans: list[tuple[int, int]], block: int
) -> None:
    blocks = [ramp(samples)[first : first + block] for first in range(0, samples, block)]
    assert cut(blocks) == expected(*spans)


def test_empty_blocks_change_nothing() -> None:
    nothing = ramp(0)
    assert cut([nothing, ramp(150)[:70], nothing, nothing, ramp(150)[70:], nothing]) == expected(
        (0, 100), (50, 150)
    )
    assert cut([nothing, nothing]) == []


def test_start_and_end_are_seconds_of_the_given_rate() -> None:
    chunks = list(cut_chunks([np.zeros(400_000, np.float32)], 163_840, 16_000))
    assert [(chunk.start_s, chunk.end_s) for chunk in chunks] == [
        (0.0, 10.24),
        (10.24, 20.48),
        (14.76, 25.0),
    ]


def test_a_chunk_is_given_as_soon_as_its_samples_are_there() -> None:
    taken = []

    def blocks() -> Iterable[NDArray[np.float32]]:
        for number in range(4):
            taken.append(number)
            yield ramp(400)[100 * number : 100 * (number + 1)]

    seen = []
    for chunk in cut_chunks(blocks(), CHUNK, RATE):
        seen.append((chunk.start_s, list(taken)))
    assert seen == [(0.0, [0]), (2.0, [0, 1]), (4.0, [0, 1, 2]), (6.0, [0, 1, 2, 3])]


def test_chunks_that_are_kept_do_not_change_later() -> None:
    reused = np.zeros(250, np.float32)

    def blocks() -> Iterable[NDArray[np.float32]]:
        reused[:] = 1
        yield reused
        reused[:] = 2
        yield reused

    first, second, third, fourth, fifth = (
        chunk.waveform for chunk in list(cut_chunks(blocks(), CHUNK, RATE))
    )
    assert set(first) == set(second) == {1.0}
    assert third.tolist() == [1.0] * 50 + [2.0] * 50
    assert set(fourth) == set(fifth) == {2.0}


# ------------------------------------------------------------------------ hop


@pytest.mark.parametrize(
    ("samples", "hop", "spans"),
    [
        (100, 40, [(0, 100)]),
        (101, 40, [(0, 100), (1, 101)]),
        (140, 40, [(0, 100), (40, 140)]),
        (150, 40, [(0, 100), (40, 140), (50, 150)]),
        (180, 40, [(0, 100), (40, 140), (80, 180)]),
        (250, 99, [(0, 100), (99, 199), (150, 250)]),
        (103, 1, [(0, 100), (1, 101), (2, 102), (3, 103)]),
        (250, 100, [(0, 100), (100, 200), (150, 250)]),
        (30, 10, [(0, 30)]),
        (0, 10, []),
    ],
)
@pytest.mark.parametrize("block", [1, 7, 50, 99, 100, 101, 250, 1_000])
def test_chunks_overlap_by_what_the_hop_leaves(
    samples: int, hop: int, spans: list[tuple[int, int]], block: int
) -> None:
    blocks = [ramp(samples)[first : first + block] for first in range(0, samples, block)]
    assert cut(blocks, hop) == expected(*spans)


def test_every_sample_is_heard_whatever_the_hop() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        samples, hop = int(random.integers(1, 700)), int(random.integers(1, CHUNK + 1))
        ends = np.sort(random.integers(0, samples, 5))
        spans = [
            (round(start * RATE), round(end * RATE))
            for start, end, _ in cut(np.split(ramp(samples), ends), hop)
        ]
        assert spans[0][0] == 0 and spans[-1][1] == samples
        assert all(end - start == min(CHUNK, samples) for start, end in spans)
        starts = [start for start, _ in spans]
        assert np.diff(starts[:-1]).tolist() == [hop] * (len(starts) - 2)
        assert len(starts) == 1 or 0 < starts[-1] - starts[-2] <= hop


def test_overlapping_chunks_hold_little_of_a_long_stream() -> None:
    block, most = 10, 0

    def blocks() -> Iterable[NDArray[np.float32]]:
        for _ in range(20_000):
            yield np.zeros(block, np.float32)

    tracemalloc.start()
    count = 0
    for _ in cut_chunks(blocks(), CHUNK, RATE, 30):
        count += 1
        if count % 100 == 0:
            most = max(most, tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert count == 1 + -(-(200_000 - CHUNK) // 30)
    assert most < 50_000  # all of it is 800,000 bytes


def test_a_hop_in_seconds() -> None:
    features = FeatureSpec()
    assert hop_samples_of(None, features) is None
    assert hop_samples_of(10.24, features) is None  # as long as a chunk: as without
    assert hop_samples_of(2.5, features) == 40_000
    for wrong in (0.0, -1.0, 10.25, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"expected more than 0 and at most 10.24 s"):
            hop_samples_of(wrong, features)
    with pytest.raises(ValueError, match="less than one sample at 16000 Hz"):
        hop_samples_of(1e-6, features)
