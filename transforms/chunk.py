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
        blocks: float32 [any number of samples] each, in order, at `sample_rate` Hz.
        chunk_samples: length of a chunk.
    """

    def chunk(end: int, waveform: NDArray[np.float32]) -> Chunk:
        return Chunk((end - len(waveform)) / sample_rate, end / sample_rate, waveform)

    previous = np.zeros(0, np.float32)  # the last full chunk, for the overlap
    pending = np.zeros(0, np.float32)
    end = 0  # samples in the chunks so far
    for block in blocks:
        pending = np.concatenate([pending, block])
        while len(pending) >= chunk_samples:
            previous, pending = pending[:chunk_samples], pending[chunk_samples:]
            end += chunk_samples
            yield chunk(end, previous)
    if len(pending):
        whole = np.concatenate([previous, pending])[-chunk_samples:]
        yield chunk(end + len(pending), whole)
