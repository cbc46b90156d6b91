"""Audio that is cut, damaged, extreme, too long, or a part of a recording."""

from __future__ import annotations

import io
import itertools
import math
import re
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from bench.fuzz import mutant, row_of, zoo_files
from pipeline.options import AnnotateOptions
from pipeline.run import limits_of
from student.feature_spec import FeatureSpec
from transforms.decode import AudioDecoder, Limits, SourceFacts, _audio_stream
from transforms.decode_clip import decode_clip
from transforms.records import Chunk, ClipEnd, ClipError, EncodedClip

Noise = Callable[..., NDArray[np.float32]]
Encoded = Callable[..., bytes]


def partly(
    content: bytes, sample_rate: int = 16_000, limits: Limits | None = None, **part: float
) -> tuple[NDArray[np.float32], SourceFacts | None, ClipError | None]:
    """(what decodes, facts of it, the error at its end)."""
    decoder = AudioDecoder(io.BytesIO(content), limits or Limits())
    blocks, fault = [np.zeros(0, np.float32)], None
    try:
        for block in decoder.mono(sample_rate, **part):
            blocks.append(block)
    except ClipError as error:
        fault = error
    return np.concatenate(blocks), decoder.facts, fault


def seconds(content: bytes) -> float:
    """Of a file that is whole."""
    _, facts, fault = partly(content)
    assert fault is None and facts is not None, fault
    return facts.duration_s


def muxed(
    format: str,
    encoder: str,
    rate: int = 44_100,
    length_s: float = 4.0,
    streams: int = 1,
    default: int | None = None,
    video: bool = False,
    **options: str,
) -> bytes:
    """Noise over a tone of 400 Hz, 500 Hz in the second stream, in a container of ffmpeg's."""
    # To put the table in front ffmpeg opens the file once more, by its name.
    folder = tempfile.TemporaryDirectory()
    file = Path(folder.name) / "a"
    with folder, av.open(str(file), "w", format=format, options=options) as container:
        made = [container.add_stream(encoder, rate=rate, layout="mono") for _ in range(streams)]
        for number, stream in enumerate(made):
            if default is not None:
                flag = av.stream.Disposition.default if number == default else 0
                stream.disposition = av.stream.Disposition(flag)
        if video:
            picture = container.add_stream("mpeg4", rate=25)
            picture.width, picture.height, picture.pix_fmt = 64, 48, "yuv420p"
            random = np.random.default_rng(0)
            for number in range(int(25 * length_s)):
                image = random.integers(0, 255, (48, 64, 3), np.uint8)
                frame = av.VideoFrame.from_ndarray(image, "rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 25)
                container.mux(picture.encode(frame))
            container.mux(picture.encode(None))
        packets: list[Any] = []
        for number, stream in enumerate(made):
            time_s = np.arange(int(length_s * rate)) / rate
            tone = 0.3 * np.sin(2 * np.pi * (400 + 100 * number) * time_s)
            tone += np.random.default_rng(number).normal(0, 0.02, len(tone))
            frame = av.AudioFrame.from_ndarray(tone.astype(np.float32)[None], "fltp", "mono")
            frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
            size = stream.codec_context.frame_size or 4_096
            resampler = av.AudioResampler(stream.format, "mono", rate, frame_size=size)
            for piece in [*resampler.resample(frame), *resampler.resample(None), None]:
                packets += stream.encode(piece)
        packets.sort(key=lambda packet: packet.dts * packet.time_base)
        for packet in packets:
            container.mux(packet)
        container.close()
        return file.read_bytes()


# ------------------------------------------------------------------------- cut

# (format, encoder, options of the muxer)
CONTAINERS = [
    ("wav", "pcm_s16le", {}),
    ("wav", "adpcm_ms", {}),
    ("w64", "pcm_s16le", {}),
    ("aiff", "pcm_s16be", {}),
    ("caf", "pcm_s16be", {}),
    ("au", "pcm_s16be", {}),
    ("flac", "flac", {}),
    ("ogg", "flac", {}),
    ("ogg", "libopus", {}),
    ("mp3", "libmp3lame", {}),
    ("mp2", "mp2", {}),
    ("adts", "aac", {}),
    ("mp4", "aac", {"movflags": "faststart"}),
    ("ipod", "alac", {"movflags": "faststart"}),
    ("mp4", "aac", {"movflags": "frag_keyframe+empty_moov", "frag_duration": "500000"}),
    ("matroska", "libopus", {}),
    ("matroska", "pcm_s16le", {}),
    ("avi", "libmp3lame", {}),
    ("flv", "aac", {}),
    ("ac3", "ac3", {}),
    ("eac3", "eac3", {}),
    ("tta", "tta", {}),
    ("wv", "wavpack", {}),
]


@pytest.mark.parametrize(
    ("format", "encoder", "options"),
    CONTAINERS,
    ids=[f"{format}-{encoder}{'-' * bool(o)}{len(o) or ''}" for format, encoder, o in CONTAINERS],
)
def test_a_cut_file_gives_what_is_there_and_says_so(
    format: str, encoder: str, options: dict[str, str]
) -> None:
    rate = 48_000 if encoder == "libopus" else 44_100
    content = muxed(format, encoder, rate, **options)
    whole, facts, fault = partly(content)
    assert fault is None and facts is not None
    assert abs(facts.duration_s - 4.0) < 0.06
    for kept in (0.3, 0.62, 0.9):
        samples, facts, fault = partly(content[: int(len(content) * kept)])
        assert fault is not None and fault.type == "Truncated", (kept, fault)
        assert facts is not None and 0 < facts.duration_s < 4.0
        assert abs(len(samples) / 16_000 - facts.duration_s) < 0.001
        same = len(samples) - 2_400  # the last packet may be patched up, the resampler rings
        assert np.abs(samples[:same] - whole[:same]).max() < 0.01


@pytest.mark.parametrize(("format", "encoder"), [("mp4", "aac"), ("wav", "pcm_s16le")])
def test_a_file_of_which_only_the_header_is_left_is_refused(format: str, encoder: str) -> None:
    content = muxed(format, encoder)
    _, _, fault = partly(content[:40])
    assert fault is not None and not fault.partial
    # The table of contents of an MP4 comes last.
    if format == "mp4":
        _, _, fault = partly(content[: len(content) // 2])
        assert fault is not None and fault.message.endswith("; the file ends early")


@pytest.mark.parametrize("format", ["flac", "mp3", "ogg", "adts"])
def test_after_a_fault_in_the_middle_it_goes_on(format: str) -> None:
    encoder = {"flac": "flac", "mp3": "libmp3lame", "ogg": "libopus", "adts": "aac"}[format]
    content = muxed(format, encoder, 48_000)
    whole, _, fault = partly(content)
    assert fault is None
    middle = len(content) // 2
    damaged = content[:middle] + bytes(6_000) + content[middle + 6_000 :]
    samples, facts, fault = partly(damaged)
    assert fault is not None and fault.type == "Truncated" and facts is not None
    assert 0.05 < 4.0 - facts.duration_s < 2.1
    if format in ("flac", "ogg"):  # the others lose their place in the encoder's padding
        assert np.abs(samples[-8_000:-200] - whole[-8_000:-200]).max() < 0.01  # its end is there


def test_a_header_that_states_less_than_there_is_is_not_believed(
    noise: Noise, encoded: Encoded
) -> None:
    content = bytearray(encoded(noise(80_000), format="flac"))
    for stated in (1, 40_000, 0):
        content[22:26] = struct.pack(">I", stated)
        assert seconds(bytes(content)) == 5.0
    wav = bytearray(encoded(noise(80_000)))
    for unknown in (0xFFFF_FFFF, 0x7FFF_FFFF, 0x7FFF_F000):
        wav[40:44] = struct.pack("<I", unknown)
        assert seconds(bytes(wav)) == 5.0


def test_recordings_one_behind_the_other_are_no_fault() -> None:
    for format, encoder in (("mp3", "libmp3lame"), ("adts", "aac"), ("ogg", "libopus")):
        content = muxed(format, encoder, 48_000)
        assert abs(seconds(content + content) - 8.0) < 0.13


def test_an_ogg_without_its_last_page_is_cut() -> None:
    content = muxed("ogg", "libopus", 48_000)
    _, facts, fault = partly(content[: content.rfind(b"OggS")])
    assert fault is not None and facts is not None
    assert fault.message == "an unknown part is missing: the file ends early"


APE = b"APETAGEX" + struct.pack("<IIII", 2_000, 32 + 90, 1, 0) + bytes(8)
ID3V1 = b"TAG" + bytes(125)
ID3V2 = b"ID3\3\0\0" + bytes((0, 0, 40, 16)) + b"\xff\xf1" * 2_568
LYRICS = b"LYRICSBEGIN" + b"x" * 100 + b"000111LYRICS200"


@pytest.mark.parametrize(
    ("before", "after"),
    [(b"", ID3V1), (b"", b"y" * 90 + APE), (ID3V2, b""), (ID3V2 + ID3V2, LYRICS + ID3V1)],
    ids=["ID3v1", "APE", "ID3v2", "several"],
)
@pytest.mark.parametrize(
    ("format", "encoder"),
    [("mp3", "libmp3lame"), ("adts", "aac"), ("ac3", "ac3"), ("flac", "flac"), ("tta", "tta")],
)
def test_tags_around_the_audio_are_not_audio(
    format: str, encoder: str, before: bytes, after: bytes
) -> None:
    content = muxed(format, encoder)
    expected = partly(content)
    samples, facts, fault = partly(before + content + after)
    assert fault is None
    assert np.array_equal(samples, expected[0])
    assert facts == expected[1]


def test_junk_before_a_stream_is_no_fault() -> None:
    for format, encoder in (("mp3", "libmp3lame"), ("adts", "aac"), ("mp2", "mp2")):
        assert abs(seconds(b"\x12\x34" * 300 + muxed(format, encoder)) - 4.0) < 0.06


@pytest.mark.parametrize(("format", "encoder"), [("mp3", "libmp3lame"), ("adts", "aac")])
def test_a_stream_that_poses_as_samples_of_a_low_rate_is_found(format: str, encoder: str) -> None:
    content = muxed(format, encoder)
    header = struct.pack("<HHIIHH", 1, 1, 16_000, 32_000, 2, 16)
    wav = b"WAVEfmt " + struct.pack("<I", 16) + header + b"data" + struct.pack("<I", len(content))
    wav += content
    _, facts, _ = partly(b"RIFF" + struct.pack("<I", len(wav)) + wav)
    assert facts is not None
    assert (facts.codec, facts.sample_rate) == (format.replace("adts", "aac"), 44_100)


# ---------------------------------------------------------------------- streams


@pytest.mark.parametrize("format", ["mp4", "matroska", "avi", "mpegts"])
def test_of_a_video_the_sound_alone_is_read(format: str) -> None:
    encoder = "libmp3lame" if format == "avi" else "aac"
    content = muxed(format, encoder, video=True)
    samples, facts, fault = partly(content)
    assert fault is None and facts is not None
    assert abs(facts.duration_s - 4.0) < 0.06
    assert np.abs(np.fft.rfft(samples[16_000:32_000])).argmax() == 400
    with av.open(io.BytesIO(content)) as container:
        assert _audio_stream(container).type == "audio"
        assert {stream.discard for stream in container.streams.video} == {av.stream.Discard.all}


def test_the_default_stream_is_taken_or_the_first() -> None:
    for default, hertz in ((None, 400), (0, 400), (1, 500)):
        samples, _, fault = partly(muxed("matroska", "flac", streams=2, default=default))
        assert fault is None
        assert np.abs(np.fft.rfft(samples[16_000:32_000])).argmax() == hertz


# ------------------------------------------------------------------------ parts


@pytest.mark.parametrize(
    ("format", "encoder", "seeks"),
    [
        ("wav", "pcm_s16le", True),
        ("aiff", "pcm_s16be", True),
        ("flac", "flac", True),
        ("mp3", "libmp3lame", False),
        ("ogg", "libopus", False),
        ("mp4", "aac", False),
    ],
)
def test_a_part_is_exact_to_the_sample(
    format: str, encoder: str, seeks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate = 48_000 if encoder == "libopus" else 44_100
    content = muxed(format, encoder, rate, 20.0)
    whole, _, _ = partly(content, rate)
    skipped = []
    seek = AudioDecoder._seek
    monkeypatch.setattr(
        AudioDecoder, "_seek", lambda self, *of: (seek(self, *of), skipped.append(self._skipped))
    )
    for start_s, end_s in ((0.0, 1.5), (1.00003, 2.0), (12.3456, 17.8901), (19.0, 20.0)):
        samples, facts, fault = partly(content, rate, start_s=start_s, end_s=end_s)
        start, end = round(start_s * rate), min(round(end_s * rate), len(whole))
        assert fault is None and facts is not None
        assert facts.frames == end - start
        assert np.array_equal(samples, whole[start:end])
    assert len(skipped) == 2
    assert all((place > 4 * rate) == seeks for place in skipped)
    samples, _, fault = partly(content, rate, start_s=12.3456)
    assert fault is None
    assert np.array_equal(samples, whole[round(12.3456 * rate) :])


def test_a_part_that_is_not_there(noise: Noise, encoded: Encoded) -> None:
    content = encoded(noise(160_000), format="flac")
    for start_s in (10.0, 25.0):
        _, _, fault = partly(content, start_s=start_s, end_s=start_s + 2)
        assert fault is not None and fault.type in ("OutOfRange", "NoAudio"), fault
    for part in ({"start_s": -1.0}, {"start_s": 3.0, "end_s": 3.0}, {"start_s": math.nan}):
        _, _, fault = partly(content, **part)
        assert fault is not None and fault.type == "OutOfRange"
    samples, facts, fault = partly(content, start_s=8.0, end_s=12.0)
    assert fault is not None and facts is not None
    assert (fault.type, fault.message) == (
        "Truncated",
        "2.00 s of 4.00 s are missing: the part ends at 12 s, the audio at 10.000 s",
    )
    assert (len(samples), facts.duration_s) == (32_000, 2.0)
    _, facts, fault = partly(content, start_s=8.0, end_s=10.09)
    assert fault is None and facts is not None and facts.duration_s == 2.0


def test_levels_of_a_part_are_its_own(encoded: Encoded) -> None:
    loud = np.concatenate([np.full(16_000, 0.5), np.full(16_000, 0.25)]).astype(np.float32)
    _, facts, _ = partly(encoded(loud, subtype="FLOAT"), start_s=1.0, end_s=2.0)
    assert facts is not None and (facts.peak, facts.rms_dbfs) == (0.25, 20 * math.log10(0.25))


# ----------------------------------------------------------------------- limits


def clip(content: bytes, **part: float) -> EncodedClip:
    return EncodedClip("a", io.BytesIO(content), len(content), "x", {}, **part)


def test_of_audio_that_is_too_long_its_beginning_counts(noise: Noise, encoded: Encoded) -> None:
    content = encoded(noise(80_000))
    *chunks, end = decode_clip(clip(content), FeatureSpec(), Limits(duration_s=3.0))
    assert isinstance(end, ClipEnd) and isinstance(chunks[-1], Chunk)
    assert (end.duration_s, chunks[-1].end_s) == (3.0, 3.0)
    assert end.error is not None and (end.error.type, end.error.partial) == ("TooLong", True)
    (_, end) = decode_clip(clip(content), FeatureSpec(), Limits(duration_s=5.0))
    assert isinstance(end, ClipEnd) and end.error is None
    part = clip(content, start_s=1.0, end_s=4.0)
    (_, end) = decode_clip(part, FeatureSpec(), Limits(duration_s=3.0))
    assert isinstance(end, ClipEnd) and (end.error, end.duration_s) == (None, 3.0)


def test_what_is_too_large_is_not_decoded(noise: Noise, encoded: Encoded) -> None:
    content = encoded(noise(80_000))
    (end,) = decode_clip(clip(content), FeatureSpec(), Limits(clip_bytes=100_000))
    assert isinstance(end, ClipEnd) and end.error is not None and end.codec is None
    assert end.error.message == ("the clip has 160,044 bytes, more than 100,000 (--max-clip-mb)")


def test_a_decoder_that_takes_too_long_is_ended(noise: Noise, encoded: Encoded) -> None:
    class Slow(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            time.sleep(0.1)
            return super().read(size)

    content = encoded(noise(800_000))
    decoder = AudioDecoder(Slow(content), Limits(clip_timeout_s=0.5))
    started = time.monotonic()
    with pytest.raises(ClipError) as ended:
        list(decoder.mono(16_000))
    assert (ended.value.type, ended.value.partial) == ("TimedOut", False)
    assert time.monotonic() - started < 2.0


def test_the_time_of_whoever_takes_the_audio_does_not_count(noise: Noise, encoded: Encoded) -> None:
    decoder = AudioDecoder(io.BytesIO(encoded(noise(160_000))), Limits(clip_timeout_s=1.0))
    for _ in decoder.mono(16_000):
        time.sleep(0.4)


@pytest.mark.parametrize("name", ["clip_bytes", "duration_s", "clip_timeout_s"])
def test_a_limit_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0"):
        Limits(**{name: 0})


def test_the_limits_of_the_command_are_those_of_the_decoder() -> None:
    assert limits_of(AnnotateOptions(inputs=("a",), output="b")) == Limits()


# --------------------------------------------------------------------- extremes


def wav_of(samples: bytes, rate: int, channels: int, bits: int = 16, kind: int = 1) -> bytes:
    width = channels * bits // 8
    header = struct.pack(
        "<HHIIHH", kind, channels, rate, min(rate * width, 0xFFFF_FFFF), width & 0xFFFF, bits
    )
    body = b"WAVEfmt " + struct.pack("<I", 16) + header
    body += b"data" + struct.pack("<I", len(samples)) + samples
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize("rate", [1, 999, 1_000, 8_000, 11_025, 96_000, 192_000, 384_000])
def test_rates(rate: int) -> None:
    samples, facts, fault = partly(wav_of(bytes(2 * 2 * rate), rate, 1))
    if rate < 1_000:
        assert fault is not None and fault.type == "SampleRate"
    else:
        assert fault is None and facts is not None
        assert (facts.sample_rate, facts.duration_s, len(samples)) == (rate, 2.0, 32_000)


def test_a_rate_that_nothing_has_is_refused() -> None:
    _, _, fault = partly(wav_of(bytes(400_000), 2_000_000_000, 1))
    assert fault is not None and fault.type == "SampleRate"


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 8, 9, 16, 24, 32])
def test_channels(channels: int) -> None:
    values = np.arange(channels, dtype="<i2") * 100
    samples, facts, fault = partly(wav_of(np.tile(values, 16_000).tobytes(), 16_000, channels))
    assert fault is None and facts is not None
    assert (facts.channels, facts.frames) == (channels, 16_000)
    assert np.abs(samples - values.mean() / 32_768).max() < 1e-6


@pytest.mark.parametrize("channels", [0, 255, 65_535])
def test_channels_that_nothing_has_take_no_memory(channels: int) -> None:
    _, facts, fault = partly(wav_of(bytes(200_000), 16_000, channels))
    assert fault is not None or (facts is not None and facts.channels == channels)


def test_samples_that_a_header_only_states_take_no_memory(noise: Noise, encoded: Encoded) -> None:
    flac = bytearray(encoded(noise(80_000), format="flac"))
    flac[21] |= 15
    flac[22:26] = b"\xff" * 4  # 2^36 - 1 samples
    samples, _, fault = partly(bytes(flac))
    assert len(samples) == 80_000
    assert fault is not None and fault.type == "Truncated"
    wav = bytearray(encoded(noise(80_000)))
    wav[40:44] = struct.pack("<I", 0x7000_0000)
    samples, _, fault = partly(bytes(wav))
    assert len(samples) == 80_000
    assert fault is not None and fault.type == "Truncated"


def test_levels_and_lengths_at_their_limits() -> None:
    def of(values: list[float] | NDArray[np.float64]) -> tuple[Any, Any, Any]:
        samples = np.asarray(values, "<f8").tobytes()
        return partly(wav_of(samples, 16_000, 1, bits=64, kind=3))

    samples, facts, fault = of(np.full(16_000, 0.25))  # direct current
    assert fault is None and (facts.peak, facts.rms_dbfs) == (0.25, 20 * math.log10(0.25))
    assert (samples == 0.25).all()
    samples, facts, fault = of(16_000.0 * np.sin(np.arange(16_000)))
    assert fault is None and 15_999 < facts.peak <= 16_000
    samples, facts, fault = of([0.5])
    assert fault is None and (len(samples), facts.frames) == (1, 1)
    for bad in (math.nan, math.inf, 1e300):
        values = np.zeros(16_000)
        values[9_000] = bad
        assert of(values)[2].type == "NonFinite"
    assert of([])[2].type == "NoAudio"


# ------------------------------------------------------------------------- fuzz


def test_damaged_files_come_to_one_row_each(shared: Path) -> None:
    files = zoo_files(shared / "audio-zoo")
    assert len(files) == 167
    outcomes = {row_of(mutant(files, 7, number)) for number in range(500)}
    assert {"ok", "Truncated", "InvalidDataError"} <= outcomes


def test_a_mutant_is_the_same_again() -> None:
    files = [bytes(range(256)) * 40, b"RIFF" * 900]
    made = [mutant(files, 3, number) for number in range(30)]
    assert made == [mutant(files, 3, number) for number in range(30)]
    assert len(set(made)) == 30
    assert all(a != b for a, b in itertools.pairwise(made))
    assert sys.getsizeof(made[0]) < 100_000


def test_a_part_behind_what_is_lost_is_found_by_its_time() -> None:
    rate = 16_000
    sound = np.random.default_rng(0).normal(0, 0.02, 20 * rate).astype(np.float32)
    sound[12 * rate : 13 * rate] = 0.5 * np.sin(np.arange(rate) * 0.3)
    file = io.BytesIO()
    soundfile.write(file, sound, rate, format="OGG", subtype="VORBIS")
    content = file.getvalue()
    pages = [match.start() for match in re.finditer(b"OggS", content)]
    # One page is lost, well before the part and after the headers.
    number = len(pages) // 3
    damaged = content[: pages[number]] + content[pages[number + 1] :]

    def part(content: bytes, start_s: float, end_s: float) -> tuple[float, ClipError | None]:
        blocks, fault = [], None
        try:
            for block in AudioDecoder(io.BytesIO(content)).mono(rate, start_s, end_s):
                blocks.append(block)
        except ClipError as error:
            fault = error
        return float(np.sqrt(np.mean(np.square(np.concatenate(blocks))))), fault

    whole, fault = part(content, 12, 13)
    assert whole > 0.3 and fault is None
    found, fault = part(damaged, 12, 13)
    assert found == pytest.approx(whole, rel=0.02) and fault is None
    _, fault = part(damaged, 0, 13)  # it holds the hole
    assert fault is not None and fault.type == "Truncated" and "within the part" in fault.message
