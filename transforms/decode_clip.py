"""Turns encoded clips into chunks: decode, cut, and say what the clip was.

Loads neither torch nor Beam: `decode_pool` runs it in processes that start fast and stay small.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from student.feature_spec import FRAME_SAMPLES, FeatureSpec
from transforms.chunk import cut_chunks
from transforms.decode import DEFAULT_LIMITS, AudioDecoder, Limits
from transforms.records import Chunk, ClipEnd, ClipError, EncodedClip, UnreadableClip


def decode_clips(
    clips: Iterable[EncodedClip | UnreadableClip],
    features: FeatureSpec,
    limits: Limits = DEFAULT_LIMITS,
    hop_samples: int | None = None,
) -> Iterator[Chunk | ClipEnd]:
    """Yields the chunks of each clip, then its `ClipEnd`, clip after clip.

    A clip that cannot be decoded ends with its error. Chunks that came before the fault count
    where the error is `partial`, else they do not. `hop_samples` is
    that of `cut_chunks`.
    """
    for clip in clips:
        if isinstance(clip, UnreadableClip):
            yield unreadable_end(clip)
        else:
            yield from decode_clip(clip, features, limits, hop_samples)


def unreadable_end(clip: UnreadableClip) -> ClipEnd:
    """The `ClipEnd` of a clip that cannot be read."""
    return ClipEnd(
        clip.member,
        0,
        None,
        clip.metadata,
        error=clip.error,
        start_s=clip.start_s,
        end_s=clip.end_s,
        name=clip.name,
    )


def undecoded_end(clip: EncodedClip) -> ClipEnd:
    """The `ClipEnd` of a clip of whose audio nothing is known yet."""
    return ClipEnd(
        clip.member,
        clip.size_bytes,
        clip.xxh128,
        clip.metadata,
        start_s=clip.start_s,
        end_s=clip.end_s,
        name=clip.name,
    )


def decode_clip(
    clip: EncodedClip,
    features: FeatureSpec,
    limits: Limits = DEFAULT_LIMITS,
    hop_samples: int | None = None,
) -> Iterator[Chunk | ClipEnd]:
    """Yields the chunks of one clip, then its `ClipEnd`, as `decode_clips` does."""
    decoder: AudioDecoder | None = None
    error: ClipError | None = None
    samples = 0
    try:
        if clip.size_bytes > limits.clip_bytes:
            raise ClipError(
                "decode",
                "TooLarge",
                f"the clip has {clip.size_bytes:,} bytes, more than {limits.clip_bytes:,} "
                "(--max-clip-mb)",
            )
        decoder = AudioDecoder(clip.audio, limits)
        faults: list[ClipError] = []
        blocks = _until_fault(decoder.mono(features.sample_rate, clip.start_s, clip.end_s), faults)
        rate = features.sample_rate
        for chunk in cut_chunks(blocks, features.chunk_samples, rate, hop_samples):
            samples += len(chunk.waveform)
            if samples >= FRAME_SAMPLES:
                yield chunk
        if samples < FRAME_SAMPLES:
            raise ClipError(
                "decode",
                "TooShort",
                f"{samples} samples at {features.sample_rate} Hz are less than one analysis "
                f"frame of {FRAME_SAMPLES}{f'; {faults[0].message}' if faults else ''}",
            )
        if faults:
            raise faults[0]
    except ClipError as fault:
        error = fault
    facts = decoder.facts if decoder else None
    known = error is None or error.partial or error.type == "TooShort"
    yield dataclasses.replace(
        undecoded_end(clip),
        codec=facts.codec if facts else None,
        sample_rate=facts.sample_rate if facts else None,
        channels=facts.channels if facts else None,
        duration_s=facts.duration_s if facts and known else None,
        peak_dbfs=facts.peak_dbfs if facts and known else None,
        rms_dbfs=facts.rms_dbfs if facts and known else None,
        error=error,
    )


def _until_fault(
    blocks: Iterator[NDArray[np.float32]], faults: list[ClipError]
) -> Iterator[NDArray[np.float32]]:
    """Yields `blocks`; a partial fault ends them and goes into `faults`."""
    try:
        yield from blocks
    except ClipError as fault:
        if not fault.partial:
            raise
        faults.append(fault)
