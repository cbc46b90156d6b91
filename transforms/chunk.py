"""Cuts a stream of audio into the pieces that the student hears."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from transforms.records import Chunk


def cut_chunks(
    blocks: Iterable[NDArray[np.float32]], chunk_samples: int, sample_rate: int
) -> Iterator[Chunk]:
    """Yields full chunks one after the other, and a last one aligned to the end.

    A clip of at most one chunk is yielded whole. In a longer clip the last chunk
    overlaps the one before it, so that no padding is ever scored.

    Args:
        blocks: float32 [any number of samples] each, in order, at `sample_rate` Hz. They are
            kept, so nothing may be written into them later.
        chunk_samples: length of a chunk.
    """

    def chunk(end: int, waveform: NDArray[np.float32]) -> Chunk:
        return Chunk((end - len(waveform)) / sample_rate, end / sample_rate, waveform)

    previous = np.zeros(0, np.float32)  # the last full chunk, for the overlap
    pending: list[NDArray[np.float32]] = []
    waiting = end = 0  # samples in `pending`, and in the chunks so far
    for block in blocks:
        pending.append(block)
        waiting += len(block)
        if waiting >= chunk_samples:  # joined only now: at each block it takes 20 times as long
            whole = np.concatenate(pending)
            while len(whole) >= chunk_samples:
                previous, whole = whole[:chunk_samples], whole[chunk_samples:]
                end += chunk_samples
                yield chunk(end, previous)
            pending, waiting = [whole], len(whole)
    if waiting:
        whole = np.concatenate([previous, *pending])[-chunk_samples:]
        yield chunk(end + waiting, whole)
