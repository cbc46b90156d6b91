"""Cuts a stream of audio into the pieces that the student hears."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from student.feature_spec import FeatureSpec
from transforms.records import Chunk


def cut_chunks(
    blocks: Iterable[NDArray[np.float32]],
    chunk_samples: int,
    sample_rate: int,
    hop_samples: int | None = None,
) -> Iterator[Chunk]:
    """Yields full chunks one after the other, and a last one aligned to the end.

    A clip of at most one chunk is yielded whole. In a longer clip the last chunk
    overlaps the one before it, so that no padding is ever scored. About one chunk and
    one block are in memory at a time.

    Args:
        blocks: float32 [any number of samples] each, in order, at `sample_rate` Hz. They are
            kept, so nothing may be written into them later.
        chunk_samples: length of a chunk.
        hop_samples: from one chunk's start to the next one's, 1 to `chunk_samples`; None is
            `chunk_samples`. The last chunk is nearer where the clip ends sooner.
    """
    hop = chunk_samples if hop_samples is None else hop_samples

    def chunk(end: int, waveform: NDArray[np.float32]) -> Chunk:
        return Chunk((end - len(waveform)) / sample_rate, end / sample_rate, waveform)

    previous = np.zeros(0, np.float32)  # the last full chunk, for the overlap
    pending: list[NDArray[np.float32]] = []  # from where the next chunk starts
    waiting = start = 0  # samples in `pending`, and before it
    for block in blocks:
        pending.append(block)
        waiting += len(block)
        if waiting >= chunk_samples:  # joined only now: at each block it takes 20 times as long
            whole = np.concatenate(pending)
            while len(whole) >= chunk_samples:
                previous, whole = whole[:chunk_samples], whole[hop:]
                yield chunk(start + chunk_samples, previous)
                start += hop
            pending, waiting = [whole], len(whole)
    heard = len(previous) and chunk_samples - hop  # samples of `pending` that are in a chunk
    if waiting > heard:
        whole = np.concatenate([previous[:hop], *pending])[-chunk_samples:]
        yield chunk(start + waiting, whole)


def hop_samples_of(hop_s: float | None, features: FeatureSpec) -> int | None:
    """`hop_samples` of `cut_chunks` for seconds; None for a hop as long as a chunk.

    Raises:
        ValueError: it is less than a sample, or longer than a chunk.
    """
    if hop_s is None:
        return None
    # A chunk's length as people write it may be a hair above its float.
    if not 0 < hop_s <= features.chunk_s + 1e-9:
        raise ValueError(
            f"a chunk hop of {hop_s:g} s would leave audio unheard or never end; expected more than 0 "
            f"and at most {features.chunk_s:g} s, the length of this student's chunk"
        )
    hop = round(hop_s * features.sample_rate)
    if hop < 1:
        raise ValueError(
            f"a chunk hop of {hop_s:g} s is less than one sample at {features.sample_rate} Hz"
        )
    return None if hop >= features.chunk_samples else hop
