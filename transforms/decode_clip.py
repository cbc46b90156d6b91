"""Turns encoded clips into chunks: decode, cut, and say what the clip was.

Loads neither torch nor Beam: `decode_pool` runs it in processes that start fast and stay small.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from student.feature_spec import FRAME_SAMPLES, FeatureSpec
from transforms.chunk import cut_chunks
from transforms.decode import AudioDecoder
from transforms.records import Chunk, ClipEnd, ClipError, EncodedClip, UnreadableClip


def decode_clips(
    clips: Iterable[EncodedClip | UnreadableClip],
    features: FeatureSpec,
    hop_samples: int | None = None,
) -> Iterator[Chunk | ClipEnd]:
    """Yields the chunks of each clip, then its `ClipEnd`, clip after clip.

    A clip that cannot be decoded ends with its error; chunks that came before the
    fault do not count. `hop_samples` is that of `cut_chunks`.
    """
    for clip in clips:
        if isinstance(clip, UnreadableClip):
            yield ClipEnd(clip.member, 0, None, clip.metadata, error=clip.error)
        else:
            yield from decode_clip(clip, features, hop_samples)


def decode_clip(
    clip: EncodedClip, features: FeatureSpec, hop_samples: int | None = None
) -> Iterator[Chunk | ClipEnd]:
    """Yields the chunks of one clip, then its `ClipEnd`, as `decode_clips` does."""
    decoder, error, samples = AudioDecoder(clip.audio), None, 0
    try:
        blocks = decoder.mono(features.sample_rate)
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
                f"frame of {FRAME_SAMPLES}",
            )
    except ClipError as fault:
        error = fault
    facts = decoder.facts
    whole = error is None or error.type == "TooShort"
    yield ClipEnd(
        member=clip.member,
        size_bytes=clip.size_bytes,
        xxh128=clip.xxh128,
        metadata=clip.metadata,
        codec=facts.codec if facts else None,
        sample_rate=facts.sample_rate if facts else None,
        channels=facts.channels if facts else None,
        duration_s=facts.duration_s if facts and whole else None,
        peak_dbfs=facts.peak_dbfs if facts and whole else None,
        rms_dbfs=facts.rms_dbfs if facts and whole else None,
        error=error,
    )
