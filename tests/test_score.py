from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from student.feature_spec import FeatureSpec
from student.model import Student
from transforms.decode_clip import decode_clips
from transforms.records import (
    Chunk,
    ClipEnd,
    ClipError,
    EncodedClip,
    ScoredClip,
    UnreadableClip,
)
from transforms.score import score_clips

Noise = Callable[..., NDArray[np.float32]]
Encoded = Callable[..., bytes]
Event = Chunk | ClipEnd

CHUNK = 128 * 160  # samples of the tiny student: 1.28 s
FEATURES = FeatureSpec(num_mel_bins=32, max_length=128)


def clip(member: str, content: bytes, **metadata: Any) -> EncodedClip:
    return EncodedClip(member, io.BytesIO(content), len(content), f"hash of {member}", metadata)


def events(member: str, *waveforms: NDArray[np.float32], error: ClipError | None = None):
    """A clip's chunks, each of a second, and its end."""
    chunks = [Chunk(float(n), n + 1.0, waveform) for n, waveform in enumerate(waveforms)]
    return [*chunks, ClipEnd(member, 1, "hash", {}, error=error)]


def scored(student: Student, decoded: Sequence[Event], **options: Any) -> list[ScoredClip]:
    return list(score_clips(iter(decoded), student, **options))


def close(ours: NDArray[np.float32] | None, expected: NDArray[np.float32]) -> bool:
    assert ours is not None
    assert ours.dtype == np.float32
    assert ours.shape == expected.shape
    return bool(np.abs(ours - expected).max() <= 1e-6)


# --------------------------------------------------------------------- decoding


def test_a_clip_gives_its_chunks_and_then_its_end(noise: Noise, encoded: Encoded) -> None:
    waveform = noise(int(2.5 * CHUNK))
    content = encoded(waveform, subtype="FLOAT")
    *chunks, end = decode_clips([clip("a.wav", content, speaker="x")], FEATURES)
    starts = [0, CHUNK, len(waveform) - CHUNK]
    assert [(chunk.start_s, chunk.end_s) for chunk in chunks] == [
        (start / 16_000, (start + CHUNK) / 16_000) for start in starts
    ]
    for chunk, start in zip(chunks, starts, strict=True):
        assert np.array_equal(chunk.waveform, waveform[start : start + CHUNK])
    assert end == ClipEnd(
        member="a.wav",
        size_bytes=len(content),
        xxh128="hash of a.wav",
        metadata={"speaker": "x"},
        codec="pcm_f32le",
        sample_rate=16_000,
        channels=1,
        duration_s=3.2,
        peak_dbfs=pytest.approx(20 * np.log10(np.abs(waveform).max()), abs=1e-6),
        rms_dbfs=pytest.approx(10 * np.log10(np.square(waveform).mean()), abs=1e-4),
    )


def test_clips_are_decoded_one_after_the_other(noise: Noise, encoded: Encoded) -> None:
    clips = [clip(f"{n}.flac", encoded(noise(8_000 + n, n), format="flac")) for n in range(3)]
    decoded = list(decode_clips(clips, FEATURES))
    assert [
        event.member if isinstance(event, ClipEnd) else len(event.waveform) for event in decoded
    ] == [8_000, "0.flac", 8_001, "1.flac", 8_002, "2.flac"]


def test_a_clip_at_another_rate_is_cut_at_the_students(noise: Noise, encoded: Encoded) -> None:
    content = encoded(noise((2 * 44_100, 2)), 44_100)
    first, second, end = decode_clips([clip("a.wav", content)], FEATURES)
    assert [len(first.waveform), len(second.waveform)] == [CHUNK, CHUNK]
    assert (second.start_s, second.end_s) == (2 - 1.28, 2.0)
    assert (end.sample_rate, end.channels, end.duration_s) == (44_100, 2, 2.0)


def test_a_place_that_cannot_be_read_is_a_clip_that_ends_at_once() -> None:
    error = ClipError("read", "BrokenShard", "the tar is broken")
    decoded = list(decode_clips([UnreadableClip(None, error, {"n": 1})], FEATURES))
    assert decoded == [ClipEnd(None, 0, None, {"n": 1}, error=error)]


def test_a_clip_that_is_no_audio_ends_with_its_error() -> None:
    (end,) = decode_clips([clip("a.wav", b"no audio", n=1)], FEATURES)
    assert isinstance(end, ClipEnd)
    assert end.error is not None
    assert (end.error.stage, end.error.type) == ("decode", "InvalidDataError")
    assert dataclasses.replace(end, error=None) == ClipEnd("a.wav", 8, "hash of a.wav", {"n": 1})


@pytest.mark.parametrize(
    ("samples", "rate", "heard"), [(399, 16_000, 399), (1, 16_000, 1), (199, 8_000, 398)]
)
def test_a_clip_shorter_than_a_frame_is_too_short(
    noise: Noise, encoded: Encoded, samples: int, rate: int, heard: int
) -> None:
    content = encoded(noise(samples), rate, subtype="FLOAT")
    (end,) = decode_clips([clip("a.wav", content)], FEATURES)
    assert isinstance(end, ClipEnd)
    assert end.error is not None
    assert (end.error.stage, end.error.type, end.error.message) == (
        "decode",
        "TooShort",
        f"{heard} samples at 16000 Hz are less than one analysis frame of 400",
    )
    assert (end.codec, end.sample_rate, end.channels) == ("pcm_f32le", rate, 1)
    assert end.duration_s == samples / rate
    assert end.peak_dbfs == pytest.approx(20 * np.log10(np.abs(noise(samples)).max()), abs=1e-5)


def test_a_clip_of_one_frame_is_long_enough(noise: Noise, encoded: Encoded) -> None:
    chunk, end = decode_clips([clip("a.wav", encoded(noise(400), subtype="FLOAT"))], FEATURES)
    assert np.array_equal(chunk.waveform, noise(400))
    assert end.error is None


def test_of_a_clip_that_breaks_on_its_way_that_is_told_which_decodes(
    noise: Noise, encoded: Encoded
) -> None:
    content = encoded(noise(80_000), format="flac")
    *chunks, end = decode_clips([clip("a.flac", content[: len(content) * 9 // 10])], FEATURES)
    assert isinstance(end, ClipEnd)
    assert end.error is not None
    assert (end.error.stage, end.error.type) == ("decode", "Truncated")
    assert (end.codec, end.sample_rate, end.channels) == ("flac", 16_000, 1)
    assert end.duration_s is not None and 4.0 < end.duration_s < 4.6
    # The last chunk reaches to the end of what decoded.
    assert isinstance(chunks[-1], Chunk) and chunks[-1].end_s == end.duration_s
    waveform = np.concatenate([chunk.waveform for chunk in chunks[:-1]])
    assert np.abs(waveform - noise(80_000)[: len(waveform)]).max() <= 2**-15
    assert end.peak_dbfs is not None and end.rms_dbfs is not None


def test_clips_after_a_broken_one_are_decoded(noise: Noise, encoded: Encoded) -> None:
    clips = [
        clip("a.wav", encoded(noise(5_000))),
        clip("b.wav", b"no audio"),
        clip("c.wav", encoded(noise(6_000))),
    ]
    decoded = list(decode_clips(clips, FEATURES))
    ends = [event for event in decoded if isinstance(event, ClipEnd)]
    assert [(end.member, end.error is None) for end in ends] == [
        ("a.wav", True),
        ("b.wav", False),
        ("c.wav", True),
    ]


# ---------------------------------------------------------------------- pooling


def test_a_clips_scores_are_the_maximum_over_its_chunks(
    tiny_student: Student, noise: Noise
) -> None:
    waveforms = [noise(CHUNK), 30 * noise(CHUNK, 1), noise(5_000, 2)]
    (result,) = scored(tiny_student, events("a", *waveforms))
    each = tiny_student.score(waveforms)
    assert close(result.scores, each.max(axis=0))
    assert not np.array_equal(each.max(axis=0), each[0])
    assert result.clip == ClipEnd("a", 1, "hash", {})
    assert (result.embedding, result.chunks) == (None, [])


def test_a_clips_scores_are_the_mean_over_its_chunks_if_asked(
    tiny_student: Student, noise: Noise
) -> None:
    waveforms = [noise(CHUNK), 30 * noise(CHUNK, 1), noise(5_000, 2)]
    (result,) = scored(tiny_student, events("a", *waveforms), pool="mean")
    assert close(result.scores, tiny_student.score(waveforms).mean(axis=0))


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_a_clip_of_one_chunk_has_that_chunks_scores(
    tiny_student: Student, noise: Noise, pool: str
) -> None:
    (result,) = scored(tiny_student, events("a", noise(CHUNK)), pool=pool)
    assert result.scores is not None
    assert np.array_equal(result.scores, tiny_student.score([noise(CHUNK)])[0])


def test_the_scores_of_every_chunk_are_kept_if_asked(tiny_student: Student, noise: Noise) -> None:
    waveforms = [noise(CHUNK), noise(CHUNK, 1)]
    a, b = scored(
        tiny_student, events("a", *waveforms) + events("b", noise(CHUNK, 2)), keep_chunks=True
    )
    expected = tiny_student.score([*waveforms, noise(CHUNK, 2)])
    assert [(start, end) for start, end, _ in a.chunks] == [(0.0, 1.0), (1.0, 2.0)]
    assert [(start, end) for start, end, _ in b.chunks] == [(0.0, 1.0)]
    for (_, _, scores), row in zip(a.chunks + b.chunks, expected, strict=True):
        assert np.array_equal(scores, row)
    assert close(a.scores, expected[:2].max(axis=0))


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_embeddings_are_averaged_over_the_chunks(
    tiny_student: Student, noise: Noise, pool: str
) -> None:
    waveforms = [noise(CHUNK), 30 * noise(CHUNK, 1), noise(5_000, 2)]
    decoded = events("a", *waveforms) + events("b", noise(CHUNK, 3))
    a, b = scored(tiny_student, decoded, pool=pool, keep_embeddings=True)
    vectors = tiny_student.score([*waveforms, noise(CHUNK, 3)], embeddings=True)[1]
    assert close(a.embedding, vectors[:3].mean(axis=0))
    assert close(b.embedding, vectors[3])


# --------------------------------------------------------------------- failures


def test_a_failed_clip_between_good_ones_has_no_scores(tiny_student: Student, noise: Noise) -> None:
    fault = ClipError("decode", "NoAudio", "the audio holds no samples")
    decoded = [
        *events("a", noise(CHUNK)),
        *events("b", error=fault),
        *events("c", noise(CHUNK, 1)),
    ]
    a, b, c = scored(tiny_student, decoded, keep_chunks=True, keep_embeddings=True)
    expected = tiny_student.score([noise(CHUNK), noise(CHUNK, 1)])
    assert close(a.scores, expected[0])
    assert close(c.scores, expected[1])
    assert b == ScoredClip(ClipEnd("b", 1, "hash", {}, error=fault), None, None, [])


@pytest.mark.parametrize("max_batch", [1, 2, 3, 100])
def test_chunks_before_a_fault_count_for_no_clip(
    tiny_student: Student, noise: Noise, monkeypatch: pytest.MonkeyPatch, max_batch: int
) -> None:
    monkeypatch.setattr(tiny_student, "max_batch", max_batch)
    fault = ClipError("decode", "InvalidDataError", "the data is damaged")
    decoded = [
        *events("a", 30 * noise(CHUNK), 30 * noise(CHUNK, 1), error=fault),
        *events("b", noise(CHUNK, 2), noise(CHUNK, 3)),
    ]
    for pool in ("max", "mean"):
        a, b = scored(tiny_student, decoded, pool=pool, keep_chunks=True, keep_embeddings=True)
        assert (a.scores, a.embedding, a.chunks) == (None, None, [])
        expected = tiny_student.score([noise(CHUNK, 2), noise(CHUNK, 3)])
        pooled = expected.max(axis=0) if pool == "max" else expected.mean(axis=0)
        assert b.scores is not None
        assert np.abs(b.scores - pooled).max() <= 1e-5
        assert [start for start, _, _ in b.chunks] == [0.0, 1.0]


def test_nothing_decoded_gives_nothing(tiny_student: Student) -> None:
    assert scored(tiny_student, []) == []


def test_from_bytes_to_scores_over_good_and_bad_clips(
    tiny_student: Student, noise: Noise, encoded: Encoded
) -> None:
    broken_flac = encoded(noise(80_000), format="flac")[:-20_000]
    clips = [
        clip("good.wav", encoded(noise(30_000), subtype="FLOAT")),
        clip("short.wav", encoded(noise(300))),
        clip("broken.flac", broken_flac),
        UnreadableClip("gone.wav", ClipError("read", "FileNotFound", "the file is gone"), {}),
        clip("last.wav", encoded(noise(9_000, 1), subtype="FLOAT")),
    ]
    results = list(score_clips(decode_clips(clips, FEATURES), tiny_student))
    assert [(r.clip.member, r.clip.error and r.clip.error.type) for r in results] == [
        ("good.wav", None),
        ("short.wav", "TooShort"),
        ("broken.flac", "Truncated"),
        ("gone.wav", "FileNotFound"),
        ("last.wav", None),
    ]
    waveform = noise(30_000)
    expected = tiny_student.score([waveform[:CHUNK], waveform[-CHUNK:], noise(9_000, 1)])
    assert np.abs(results[0].scores - expected[:2].max(axis=0)).max() <= 1e-5
    assert np.abs(results[4].scores - expected[2]).max() <= 1e-5
    assert [results[1].scores, results[3].scores] == [None, None]
    assert results[2].scores is not None and results[2].clip.duration_s > 3


# ---------------------------------------------------------------------- batches


@pytest.fixture
def batches(tiny_student: Student, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that the tiny student is given."""
    sizes: list[int] = []
    begin = tiny_student.begin

    def counting(waveforms: Any) -> Any:
        sizes.append(len(waveforms))
        return begin(waveforms)

    monkeypatch.setattr(tiny_student, "begin", counting)
    return sizes


def test_chunks_of_many_clips_share_full_batches(
    tiny_student: Student, noise: Noise, monkeypatch: pytest.MonkeyPatch, batches: list[int]
) -> None:
    monkeypatch.setattr(tiny_student, "max_batch", 4)
    decoded: list[Event] = []
    for number, chunks in enumerate([3, 0, 2, 5]):
        decoded += events(str(number), *(noise(1_000, 10 * number + n) for n in range(chunks)))
    results = scored(tiny_student, decoded)
    assert batches == [4, 4, 2]
    assert [result.clip.member for result in results] == ["0", "1", "2", "3"]
    assert [result.scores is None for result in results] == [False, True, False, False]


def test_many_short_clips_fill_the_largest_batches(
    tiny_student: Student, noise: Noise, batches: list[int]
) -> None:
    assert tiny_student.max_batch == 227
    decoded = [event for n in range(300) for event in events(str(n), noise(400))]
    results = scored(tiny_student, decoded)
    assert [result.clip.member for result in results] == [str(n) for n in range(300)]
    assert batches == [227, 73]


def test_the_same_clips_have_the_same_scores_bit_for_bit(
    tiny_student: Student, noise: Noise, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_student, "max_batch", 3)
    decoded: list[Event] = []
    for number in range(5):
        decoded += events(str(number), *(noise(CHUNK, 10 * number + n) for n in range(number)))
    once = scored(tiny_student, decoded, keep_embeddings=True)
    again = scored(tiny_student, decoded, keep_embeddings=True)
    for one, other in zip(once[1:], again[1:], strict=True):
        assert np.array_equal(one.scores, other.scores)
        assert np.array_equal(one.embedding, other.embedding)
    assert once[0].scores is again[0].scores is None


def test_clips_without_chunks_do_not_wait_for_a_batch(tiny_student: Student) -> None:
    fault = ClipError("read", "NoBytes", "the row holds no audio bytes")
    taken = 0

    def failed() -> Iterator[Event]:
        nonlocal taken
        for number in range(10_000):
            taken += 1
            yield ClipEnd(str(number), 0, None, {}, error=fault)

    results = score_clips(failed(), tiny_student)
    assert next(results).clip.member == "0"
    assert taken <= 2_000
    assert [result.clip.member for result in results] == [str(n) for n in range(1, 10_000)]
