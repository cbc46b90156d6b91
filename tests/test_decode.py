from __future__ import annotations

import contextlib
import csv
import io
import math
import re
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import soxr
from numpy.typing import NDArray

from transforms.decode import (
    BLOCK_S,
    RESAMPLE_QUALITY,
    AudioDecoder,
    SourceFacts,
    _converter,
    _joined,
    take_decode_s,
)
from transforms.records import ClipError
from transforms.wav import whole_pcm16

Noise = Callable[..., NDArray[np.float32]]
Encoded = Callable[..., bytes]


def decode(content: bytes, sample_rate: int = 16_000) -> tuple[NDArray[np.float32], SourceFacts]:
    decoder = AudioDecoder(io.BytesIO(content))
    blocks = list(decoder.mono(sample_rate))
    assert {block.dtype for block in blocks} == {np.dtype(np.float32)}
    assert {block.ndim for block in blocks} == {1}
    assert decoder.facts is not None
    return np.concatenate(blocks), decoder.facts


def partly(
    content: bytes, sample_rate: int = 16_000, **part: float
) -> tuple[NDArray[np.float32], SourceFacts, ClipError | None]:
    """(what decodes, facts of it, the error at its end)."""
    decoder, blocks, fault = AudioDecoder(io.BytesIO(content)), [np.zeros(0, np.float32)], None
    try:
        for block in decoder.mono(sample_rate, **part):
            blocks.append(block)
    except ClipError as error:
        assert error.partial, error
        fault = error
    assert decoder.facts is not None
    return np.concatenate(blocks), decoder.facts, fault


def refusal(content: bytes) -> tuple[str, str]:
    """(type, message) of the error that decoding ends with."""
    with pytest.raises(ClipError) as refused:
        list(AudioDecoder(io.BytesIO(content)).mono(16_000))
    assert refused.value.stage == "decode"
    assert "0x" not in refused.value.message
    assert "<" not in refused.value.message
    assert refused.value.message
    return refused.value.type, refused.value.message


def by_soundfile(content: bytes) -> NDArray[np.float32]:
    """float32 [samples, channels]."""
    samples: NDArray[np.float32] = soundfile.read(
        io.BytesIO(content), dtype="float32", always_2d=True
    )[0]
    return samples


def sine(amplitude: float, samples: int = 16_000) -> NDArray[np.float32]:
    """Whole periods of 500 Hz at 16 kHz, so that its RMS is exact and its peak is hit."""
    return (amplitude * np.sin(2 * np.pi * 500 * np.arange(samples) / 16_000)).astype(np.float32)


def contained(format: str, encoder: str, **tags: str) -> bytes:
    """Two seconds of 500 Hz at 48 kHz in a container of video."""
    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        container.metadata.update(tags)
        stream = container.add_stream(encoder, rate=48_000, layout="mono")
        tone = 0.5 * np.sin(2 * np.pi * 500 * np.arange(96_000) / 48_000)
        frame = av.AudioFrame.from_ndarray(tone.astype(np.float32)[None], "fltp", "mono")
        frame.sample_rate = 48_000
        for piece in (frame, None):
            container.mux(stream.encode(piece))
    return file.getvalue()


def dts_in_wav(silence_bytes: int) -> bytes:
    """A WAV of DTS, as on a DTS CD, after some silence: frames of a true header and noise."""
    # Sync word, a normal frame of 512 samples and 2,048 bytes, stereo, 44.1 kHz.
    fields = ((0x7FFE8001, 32), (0b111111, 6), (0, 1), (15, 7), (2_047, 14), (2, 6), (8, 4))
    fields += ((24, 5), (0, 14), (7, 4), (0, 17), (0, 2))
    header = int("".join(f"{value:0{bits}b}" for value, bits in fields), 2).to_bytes(14, "big")
    random = np.random.default_rng(0)
    stream = b"".join(header + random.bytes(2_048 - len(header)) for _ in range(100))
    samples = bytes(silence_bytes) + np.frombuffer(stream, ">i2").astype("<i2").tobytes()
    return pcm_wav(samples, 44_100)


def pcm_wav(samples: bytes, sample_rate: int, channels: int = 2) -> bytes:
    """A WAV that says that `samples` are 16-bit PCM."""
    byte_rate = 2 * channels * sample_rate
    kind = struct.pack("<HHIIHH", 1, channels, sample_rate, byte_rate, 2 * channels, 16)
    chunks = b"WAVEfmt " + struct.pack("<I", len(kind)) + kind
    chunks += b"data" + struct.pack("<I", len(samples)) + samples
    return b"RIFF" + struct.pack("<I", len(chunks)) + chunks


def with_header(wav: bytes, offset: int, value: int) -> bytes:
    """A WAV with one 32-bit number of its header replaced: 24 is the rate, 40 the length."""
    return wav[:offset] + struct.pack("<I", value) + wav[offset + 4 :]


# --------------------------------------------------------------------- formats


@pytest.mark.parametrize(
    ("format", "subtype", "codec", "step"),
    [
        ("wav", "PCM_U8", "pcm_u8", 1 / 128),
        ("wav", "PCM_16", "pcm_s16le", 1 / 32_768),
        ("wav", "PCM_24", "pcm_s24le", 2.0**-23),
        ("wav", "PCM_32", "pcm_s32le", 1e-7),
        ("wav", "FLOAT", "pcm_f32le", 0),
        ("wav", "DOUBLE", "pcm_f64le", 0),
        ("aiff", "PCM_16", "pcm_s16be", 1 / 32_768),
        ("w64", "PCM_16", "pcm_s16le", 1 / 32_768),
        ("flac", "PCM_16", "flac", 1 / 32_768),
        ("flac", "PCM_24", "flac", 2.0**-23),
    ],
)
def test_lossless_audio_is_exact(
    noise: Noise, encoded: Encoded, format: str, subtype: str, codec: str, step: float
) -> None:
    waveform = noise(50_001)
    content = encoded(waveform, format=format, subtype=subtype)
    samples, facts = decode(content)
    assert np.array_equal(samples, by_soundfile(content)[:, 0])
    assert np.abs(samples - waveform).max() <= step
    assert (facts.codec, facts.sample_rate, facts.channels) == (codec, 16_000, 1)
    assert (facts.frames, facts.duration_s) == (50_001, 50_001 / 16_000)


@pytest.mark.parametrize(
    ("format", "subtype", "codec"),
    [
        ("ogg", "VORBIS", "vorbis"),
        ("wav", "ALAW", "pcm_alaw"),
        ("wav", "ULAW", "pcm_mulaw"),
        ("wav", "IMA_ADPCM", "adpcm_ima_wav"),
    ],
)
def test_lossy_audio_equals_libsndfiles(
    noise: Noise, encoded: Encoded, format: str, subtype: str | None, codec: str
) -> None:
    content = encoded(noise(80_000), format=format, subtype=subtype)
    samples, facts = decode(content)
    expected = by_soundfile(content)[:, 0]
    assert len(samples) == len(expected)
    assert np.abs(samples - expected).max() <= 1e-5
    assert (facts.codec, facts.sample_rate, facts.channels) == (codec, 16_000, 1)
    assert facts.duration_s == len(expected) / 16_000


def test_mp3_is_decoded_without_its_encoder_delay(encoded: Encoded) -> None:
    samples, facts = decode(encoded(sine(0.5, 32_000), format="mp3"))
    assert (facts.codec, facts.sample_rate, facts.channels) == ("mp3", 16_000, 1)
    assert (facts.frames, len(samples)) == (32_000, 32_000)
    assert np.abs(samples - sine(0.5, 32_000))[2_000:-2_000].max() < 0.05


def test_opus_is_decoded_at_48_khz(encoded: Encoded) -> None:
    samples, facts = decode(encoded(sine(0.5), format="ogg", subtype="OPUS"))
    assert (facts.codec, facts.sample_rate, facts.channels) == ("opus", 48_000, 1)
    assert facts.duration_s == 1.0
    assert len(samples) == 16_000
    assert np.abs(samples[2_000:-2_000] - sine(0.5)[2_000:-2_000]).max() < 0.05


@pytest.mark.parametrize(
    ("format", "encoder", "codec"), [("mp4", "aac", "aac"), ("matroska", "libopus", "opus")]
)
def test_audio_in_a_video_container_is_decoded(format: str, encoder: str, codec: str) -> None:
    samples, facts = decode(contained(format, encoder))
    assert (facts.codec, facts.sample_rate, facts.channels) == (codec, 48_000, 1)
    assert abs(facts.duration_s - 2.0) <= 0.06
    assert abs(len(samples) - 32_000) <= 0.06 * 16_000
    loudest = np.abs(np.fft.rfft(samples[8_000:24_000])).argmax()
    assert loudest == 500  # one second: bins of 1 Hz


@pytest.mark.parametrize("format", ["wav", "flac", "ogg"])
@pytest.mark.parametrize("channels", [2, 3, 6, 8])
def test_channels_are_averaged(noise: Noise, encoded: Encoded, format: str, channels: int) -> None:
    content = encoded(noise((40_000, channels)), format=format)
    samples, facts = decode(content)
    assert facts.channels == channels
    expected = by_soundfile(content).mean(axis=1)
    assert len(samples) == len(expected)
    assert np.abs(samples - expected).max() <= 1e-6


def test_the_format_is_found_from_the_bytes(noise: Noise, encoded: Encoded, tmp_path: Path) -> None:
    content = encoded(noise(5_000), format="flac")
    file = tmp_path / "wrong.mp3"
    file.write_bytes(content)
    with file.open("rb") as stream:
        samples = np.concatenate(list(AudioDecoder(stream).mono(16_000)))
    assert np.array_equal(samples, decode(content)[0])


def test_a_wav_of_unknown_length_is_read_to_its_end(noise: Noise, encoded: Encoded) -> None:
    content = encoded(noise(20_000))
    samples, facts = decode(with_header(content, 40, 0xFFFFFFFF))
    assert np.array_equal(samples, decode(content)[0])
    assert facts.frames == 20_000


def test_tags_that_are_not_text_do_no_harm() -> None:
    content = contained("mp4", "aac", title="cafe!")
    latin = content.replace(b"cafe!", b"caf\xe9!")
    assert latin != content
    assert np.array_equal(decode(latin)[0], decode(content)[0])
    assert decode(latin)[1] == decode(content)[1]


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "FLOAT"])
def test_a_big_endian_wav_is_not_read_as_little_endian(noise: Noise, subtype: str) -> None:
    file = io.BytesIO()
    soundfile.write(file, noise(40_000), 16_000, subtype, endian="BIG", format="WAV")
    assert file.getvalue()[:4] == b"RIFX"
    samples, facts = decode(file.getvalue())
    assert np.array_equal(samples, by_soundfile(file.getvalue())[:, 0])
    assert (facts.sample_rate, facts.channels, facts.frames) == (16_000, 1, 40_000)


def extremes(kind: np.dtype[np.generic], size: int) -> NDArray[np.generic]:
    """Random values of all magnitudes, and the least and greatest of integers."""
    random = np.random.default_rng(size)
    if kind.kind == "f":
        values = random.normal(size=size) * 10.0 ** random.integers(-30, 4, size)
        return values.astype(kind)
    limits = np.iinfo(kind)
    values = random.integers(limits.min, limits.max, size, kind, endpoint=True)
    values[:2] = limits.min, limits.max
    return values


@pytest.mark.parametrize("layout", ["mono", "stereo", "5.1"])
@pytest.mark.parametrize(
    ("format", "kind"),
    [("u8", "u1"), ("s16", "i2"), ("s32", "i4"), ("flt", "f4"), ("dbl", "f8")],
)
@pytest.mark.parametrize("planar", [False, True])
def test_samples_are_what_libswresample_makes_of_them(
    format: str, kind: str, layout: str, planar: bool
) -> None:
    channels = av.AudioLayout(layout).nb_channels
    frames = []
    for samples in (1_024, 77, 1_024):
        values = extremes(np.dtype(kind), samples * channels)
        values = values.reshape(channels if planar else 1, -1)
        frame = av.AudioFrame.from_ndarray(values, format + "p" * planar, layout)
        frame.sample_rate = 44_100
        frames.append(frame)
    assert _converter(frames[0], 44_100) is None
    converter = av.AudioResampler("flt", layout, 44_100)
    converted = [part for frame in frames for part in converter.resample(frame)]
    expected = np.concatenate([part.to_ndarray() for part in converted], axis=1)
    joined = _joined(frames)
    assert joined.dtype == np.float32
    assert np.array_equal(joined, expected.reshape(-1, channels).T)


@pytest.mark.parametrize(
    ("format", "layout", "sample_rate"),
    [("s64", "mono", 44_100), ("fltp", "7.1", 44_100), ("s16", "mono", 22_050)],
    ids=["a format unknown to numpy", "8 planes", "a rate that changed"],
)
def test_other_frames_go_through_libswresample(format: str, layout: str, sample_rate: int) -> None:
    frame = av.AudioFrame(format, layout, 100)
    frame.sample_rate = sample_rate
    assert _converter(frame, 44_100) is not None


@pytest.mark.parametrize("channels", [1, 2, 3, 6])
def test_the_mean_of_channels_is_rounded_once(encoded: Encoded, channels: int) -> None:
    values = extremes(np.dtype("f4"), 50_000 * channels).reshape(-1, channels)
    values[:4] = np.float32(3.3e38)  # the sum of two is no float32
    samples, _ = decode(encoded(values, format="wav", subtype="FLOAT"))
    assert np.array_equal(samples, values.mean(axis=1, dtype=np.float64).astype(np.float32))


@pytest.mark.parametrize(
    ("format", "subtype", "certain"),
    [
        ("wavex", "PCM_16", True),
        ("rf64", "PCM_16", True),
        ("wav", "PCM_24", False),
        ("wav", "IMA_ADPCM", False),
        ("flac", "PCM_16", False),
    ],
)
def test_ffmpeg_probes_less_where_a_wav_holds_samples(
    noise: Noise,
    encoded: Encoded,
    monkeypatch: pytest.MonkeyPatch,
    format: str,
    subtype: str,
    certain: bool,
) -> None:
    asked: list[dict[str, str]] = []
    av_open = av.open

    def opened(*given: Any, options: dict[str, str], **named: Any) -> Any:
        asked.append(options)
        return av_open(*given, options=options, **named)

    content = encoded(noise((400_000, 2)), 44_100, format, subtype)
    monkeypatch.setattr(av, "open", opened)
    _, facts = decode(content)
    assert facts.frames // 1_000 == 400
    assert ["max_probe_packets" in options for options in asked] == [certain]


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"WAVE" + b"".join(
        name + len(content).to_bytes(4, "little") + content + bytes(len(content) % 2)
        for name, content in chunks
    )
    return b"RIFF" + len(body).to_bytes(4, "little") + body


FMT = (b"fmt ", struct.pack("<HHIIHH", 1, 2, 48_000, 192_000, 4, 16))


@pytest.fixture
def by_ffmpeg(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], Any]:
    """What is decoded of a WAV where it is not looked at for plain samples."""

    def decoded(content: bytes) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr("transforms.wav.whole_pcm16", lambda *_: None)
            return decode(content)

    return decoded


@pytest.mark.parametrize(
    "before",
    [
        [], [(b"LIST", b"INFOx")], [(b"JUNK", bytes(28)), (b"fact", b"")], [(b"bext", bytes(602))],
        [(b"LIST", b"INFOdata\xff\xff\0\0")],  # which libsndfile takes for the samples
    ],
)  # fmt: skip
def test_a_wav_of_plain_samples_is_no_work_for_ffmpeg(
    noise: Noise, by_ffmpeg: Callable[[bytes], Any], before: list[tuple[bytes, bytes]]
) -> None:
    samples = (noise((200_000, 2)) * 32_767).astype("<i2")
    content = riff(FMT, *before, (b"data", samples.tobytes()))
    decoder = AudioDecoder(io.BytesIO(content))
    found = np.concatenate(list(decoder.mono(48_000)))
    expected = samples.astype(np.float32).mean(axis=1) / 32_768
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7)
    assert decoder.library == "numpy" and decoder.facts == by_ffmpeg(content)[1]


def test_a_plain_wav_that_is_given_in_odd_pieces_is_whole(noise: Noise) -> None:
    class Meagre(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(min(size, 10_001) if size is not None and size >= 0 else size)

    content = riff(FMT, (b"data", (noise((100_000, 2)) * 32_767).astype("<i2").tobytes()))
    expected, found = (
        np.concatenate(list(AudioDecoder(file).mono(48_000)))
        for file in (io.BytesIO(content), Meagre(content))
    )
    assert np.array_equal(expected, found) and len(found) == 100_000


def test_a_wav_that_is_not_as_it_says_is_for_ffmpeg(noise: Noise) -> None:
    content = riff(FMT, (b"data", (noise((9_000, 2)) * 32_767).astype("<i2").tobytes()))
    assert whole_pcm16(content[:4_096], len(content)) is not None
    for odd in (
        content[:-1], content + b"\0\0", content[:22] + b"\x03" + content[23:], content[:44],
        content[:24] + b"\0\0" + content[26:], content[:40] + b"\xff" + content[41:], content[:20],
    ):  # fmt: skip
        assert whole_pcm16(odd[:4_096], len(odd)) is None


@pytest.mark.parametrize("silence_bytes", [0, 12_000, 40_000])
@pytest.mark.parametrize("codec", ["mp2", "latm", "spdif ac3"])
def test_a_bitstream_in_a_wav_is_not_taken_for_samples(
    codec: str, silence_bytes: int, by_ffmpeg: Callable[[bytes], Any]
) -> None:
    encoder = {"mp2": "mp2", "latm": "aac", "spdif ac3": "ac3"}[codec]
    stream = io.BytesIO()
    with av.open(stream, "w", format=codec.split()[0]) as container:
        made = container.add_stream(encoder, rate=48_000, layout="stereo")
        fifo, size = av.AudioFifo(), made.codec_context.frame_size or 1_152
        tone = np.tile(sine(0.3, 48_000)[:48_000], 2)
        frame = av.AudioFrame.from_ndarray(np.stack([tone, tone]), "fltp", "stereo")
        frame.sample_rate = 48_000
        for one in av.AudioResampler(
            made.codec_context.format or "fltp", "stereo", 48_000
        ).resample(frame):
            fifo.write(one)
        while (one := fifo.read(size)) is not None:
            container.mux(made.encode(one))
        container.mux(made.encode(None))
    data = bytes(silence_bytes) + stream.getvalue()
    content = riff(FMT, (b"data", data[: len(data) // 4 * 4]))
    decoder = AudioDecoder(io.BytesIO(content))
    with contextlib.suppress(ClipError):
        list(decoder.mono(16_000))
    assert decoder.library != "numpy"


def test_dts_that_poses_as_samples_is_found_behind_silence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content = dts_in_wav(silence_bytes=200_000)
    with av.open(io.BytesIO(content), options={"max_probe_packets": "2"}) as probed_less:
        assert probed_less.streams.audio[0].codec_context.name == "pcm_s16le"
    found: list[str] = []
    av_open = av.open

    def opened(*given: Any, **named: Any) -> Any:
        container = av_open(*given, **named)
        found.append(container.streams.audio[0].codec_context.name)
        return container

    monkeypatch.setattr(av, "open", opened)
    kind, message = refusal(content)  # its frames are noise; and samples it has none
    assert set(found) == {"dca"}
    assert (kind, message) == (
        "InvalidDataError",
        "the samples of the WAV are a bitstream of another codec, which cannot be decoded: Invalid "
        "data found when processing input",
    )


def test_ac3_that_poses_as_samples_is_decoded() -> None:
    ac3 = contained("ac3", "ac3")
    samples, facts = decode(pcm_wav(ac3, 48_000))
    assert (facts.codec, facts.sample_rate, facts.channels) == ("ac3", 48_000, 1)
    assert np.abs(np.fft.rfft(samples[8_000:24_000])).argmax() == 500


# ------------------------------------------------------------------- resampling


@pytest.mark.parametrize("sample_rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000])
def test_resampling_block_by_block_equals_resampling_the_whole(
    noise: Noise, encoded: Encoded, sample_rate: int
) -> None:
    waveform = noise(int(4.7 * sample_rate))  # more than two blocks
    samples, facts = decode(encoded(waveform, sample_rate, "wav", "FLOAT"))
    expected = soxr.resample(waveform, sample_rate, 16_000, quality=RESAMPLE_QUALITY)
    assert abs(len(samples) - len(expected)) <= 1
    common = min(len(samples), len(expected))
    assert np.abs(samples[:common] - expected[:common]).max() <= 1e-4
    assert (facts.sample_rate, facts.frames) == (sample_rate, len(waveform))


def test_another_target_rate(noise: Noise, encoded: Encoded) -> None:
    waveform = noise(30_000)
    samples, _ = decode(encoded(waveform, 16_000, "wav", "FLOAT"), sample_rate=32_000)
    expected = soxr.resample(waveform, 16_000, 32_000, quality=RESAMPLE_QUALITY)
    assert np.abs(samples - expected).max() <= 1e-4


def test_a_tone_keeps_its_pitch_and_level(encoded: Encoded) -> None:
    tone = (0.5 * np.sin(2 * np.pi * 500 * np.arange(88_200) / 44_100)).astype(np.float32)
    samples, _ = decode(encoded(tone, 44_100, "flac", "PCM_24"))
    middle = slice(2_000, -2_000)  # the ends ring
    assert np.abs(samples[middle] - sine(0.5, 32_000)[middle]).max() < 1e-4


@pytest.mark.parametrize("format", ["wav", "flac", "ogg", "mp3"])
def test_long_audio_comes_in_blocks(noise: Noise, encoded: Encoded, format: str) -> None:
    content = encoded(noise(160_000), format=format)
    lengths = [len(block) for block in AudioDecoder(io.BytesIO(content)).mono(16_000)]
    assert sum(lengths) == 160_000
    assert max(lengths) <= 1.5 * BLOCK_S * 16_000


# ----------------------------------------------------------------------- levels


def test_levels_of_a_sine(encoded: Encoded) -> None:
    _, facts = decode(encoded(sine(0.5), subtype="FLOAT"))
    assert facts.peak_dbfs == pytest.approx(20 * math.log10(0.5), abs=1e-6)
    assert facts.rms_dbfs == pytest.approx(20 * math.log10(0.5 / math.sqrt(2)), abs=1e-6)


def test_levels_are_of_the_channels_and_not_of_their_mean(encoded: Encoded) -> None:
    opposed = np.stack([sine(0.5), -sine(0.5)], axis=1)
    samples, facts = decode(encoded(opposed, subtype="FLOAT"))
    assert np.array_equal(samples, np.zeros(16_000, np.float32))
    assert facts.peak_dbfs == pytest.approx(20 * math.log10(0.5), abs=1e-6)
    assert facts.rms_dbfs == pytest.approx(20 * math.log10(0.5 / math.sqrt(2)), abs=1e-6)

    one_sided = np.stack([sine(0.5), np.zeros(16_000, np.float32)], axis=1)
    _, facts = decode(encoded(one_sided, subtype="FLOAT"))
    assert facts.peak_dbfs == pytest.approx(20 * math.log10(0.5), abs=1e-6)
    assert facts.rms_dbfs == pytest.approx(20 * math.log10(0.25), abs=1e-6)


def test_levels_are_of_all_blocks(encoded: Encoded) -> None:
    parts = [sine(0.25, 80_000), sine(0.5), sine(0.125, 80_000), np.zeros(16_000, np.float32)]
    waveform = np.concatenate(parts)
    _, facts = decode(encoded(waveform, subtype="FLOAT"))
    assert facts.peak_dbfs == pytest.approx(20 * math.log10(0.5), abs=1e-6)
    mean_square = np.square(waveform, dtype=np.float64).mean()
    assert facts.rms_dbfs == pytest.approx(10 * math.log10(mean_square), abs=1e-6)


def test_levels_of_a_full_scale_square_wave_are_zero(encoded: Encoded) -> None:
    square = np.where(np.arange(50_000) % 32 < 16, 1, -1).astype(np.float32)
    _, facts = decode(encoded(square, subtype="FLOAT"))
    assert (facts.peak_dbfs, facts.rms_dbfs) == (0.0, 0.0)


def test_levels_do_not_depend_on_the_resampling(noise: Noise, encoded: Encoded) -> None:
    content = encoded(noise(100_000), 44_100, "wav", "FLOAT")
    assert decode(content, 16_000)[1] == decode(content, 44_100)[1]


def test_silence_has_no_level(encoded: Encoded) -> None:
    samples, facts = decode(encoded(np.zeros(5_000, np.float32)))
    assert np.array_equal(samples, np.zeros(5_000, np.float32))
    assert (facts.peak_dbfs, facts.rms_dbfs) == (-math.inf, -math.inf)


def test_audio_above_full_scale_is_not_clipped(encoded: Encoded) -> None:
    samples, facts = decode(encoded(sine(16_411.0), subtype="FLOAT"))
    assert np.array_equal(samples, sine(16_411.0))
    assert facts.peak_dbfs == pytest.approx(20 * math.log10(16_411), abs=1e-4)


# --------------------------------------------------------------------- refusals


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 99_999])
def test_audio_that_is_not_finite_is_refused(
    noise: Noise, encoded: Encoded, value: float, position: int
) -> None:
    waveform = noise(100_000)
    waveform[position] = value
    assert refusal(encoded(waveform, subtype="FLOAT")) == (
        "NonFinite",
        "the audio holds NaN or infinite samples",
    )


@pytest.mark.parametrize(("channels", "sample_rate"), [(2, 16_000), (1, 44_100)])
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_audio_that_overflows_on_its_way_is_refused(
    encoded: Encoded, channels: int, sample_rate: int
) -> None:
    signs = np.where(np.arange(5_000) % 7 < 3, 1, -1).astype(np.float32)
    extreme = np.repeat(signs[:, None] * np.float32(3.4e38), channels, axis=1)
    decoder = AudioDecoder(io.BytesIO(encoded(extreme, sample_rate, "wav", "FLOAT")))
    try:
        blocks = list(decoder.mono(16_000))
    except ClipError as error:
        assert error.type == "NonFinite"
    else:
        assert np.isfinite(np.concatenate(blocks)).all()


@pytest.mark.parametrize("sample_rate", [1, 999])
def test_a_rate_that_cannot_be_right_is_refused(
    noise: Noise, encoded: Encoded, sample_rate: int
) -> None:
    assert refusal(with_header(encoded(noise(3_000)), 24, sample_rate)) == (
        "SampleRate",
        f"the audio states {sample_rate} Hz, less than 1000 Hz",
    )


def test_the_lowest_rate_that_is_taken(noise: Noise, encoded: Encoded) -> None:
    samples, facts = decode(with_header(encoded(noise(3_000)), 24, 1_000))
    assert (facts.duration_s, len(samples)) == (3.0, 48_000)


@pytest.mark.parametrize(
    "playlist",
    [
        "ffconcat version 1.0\nfile 'secret.wav'\n",
        "ffconcat version 1.0\nfile '{folder}/secret.wav'\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{folder}/secret.wav\n#EXT-X-ENDLIST\n",
    ],
)
def test_a_playlist_opens_no_other_file(
    noise: Noise, encoded: Encoded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, playlist: str
) -> None:
    (tmp_path / "secret.wav").write_bytes(encoded(noise(16_000)))
    monkeypatch.chdir(tmp_path)
    _, message = refusal(playlist.format(folder=tmp_path).encode())
    assert "secret" not in message


@pytest.mark.parametrize("name", ["a.raw", "a.g722", "a.flac"])
def test_the_name_of_a_file_says_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no audio" * 100)
    with (tmp_path / name).open("rb") as stream, pytest.raises(ClipError) as refused:
        list(AudioDecoder(stream).mono(16_000))
    assert refused.value.type == "InvalidDataError"


@pytest.mark.parametrize("format", ["wav", "ogg", "aiff"])
def test_audio_without_samples_is_refused(encoded: Encoded, format: str) -> None:
    kind, message = refusal(encoded(np.zeros(0, np.float32), format=format))
    assert (kind, message) == ("NoAudio", "the audio holds no samples")


@pytest.mark.parametrize(
    "content",
    [b"", b"\0", b"RIFF", b"hello world " * 100, np.random.default_rng(0).bytes(5_000)],
    ids=["empty", "one byte", "a magic number", "text", "random"],
)
def test_what_is_no_audio_is_refused(content: bytes) -> None:
    assert refusal(content) == ("InvalidDataError", "Invalid data found when processing input")


def test_a_picture_is_refused_for_having_no_audio() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("mjpeg", rate=1)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuvj420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), "rgb24")
        for piece in (frame, None):
            container.mux(stream.encode(piece))
    assert refusal(file.getvalue()) == ("NoAudioStream", "the file has no audio stream")


@pytest.mark.parametrize("seconds", [0.5, 1.9, 5.0])
@pytest.mark.parametrize("kept", [0.5, 0.9, 0.999])
def test_of_a_truncated_flac_that_is_kept_which_decodes(
    noise: Noise, encoded: Encoded, seconds: float, kept: float
) -> None:
    content = encoded(noise(int(seconds * 44_100)), 44_100, "flac")
    samples, facts, error = partly(content[: int(len(content) * kept)], 44_100)
    assert error is not None and error.type == "Truncated"
    assert np.array_equal(samples, decode(content, 44_100)[0][: len(samples)])
    assert facts.frames == len(samples)
    lost_s = int(seconds * 44_100) / 44_100 - facts.duration_s
    assert lost_s < (1 - kept) * seconds + 0.2
    assert error.message == (
        f"{lost_s:.2f} s of {seconds:.2f} s are missing: 1 packet cannot be decoded (Invalid data "
        "found when processing input)"
    )


@pytest.mark.parametrize("seconds", [0.5, 1.9, 5.0])
def test_a_flac_of_which_nothing_decodes_is_refused(
    noise: Noise, encoded: Encoded, seconds: float
) -> None:
    content = encoded(noise(int(seconds * 44_100)), 44_100, "flac")
    kind, message = refusal(content[:4_000])
    assert (kind, message) == ("InvalidDataError", "Invalid data found when processing input")


def test_a_truncated_flac_is_never_called_another_codec(noise: Noise, encoded: Encoded) -> None:
    content = encoded(noise(20_000), format="flac")
    decoder = AudioDecoder(io.BytesIO(content[: len(content) // 2]))
    with pytest.raises(ClipError):
        list(decoder.mono(16_000))
    assert decoder.facts is None or decoder.facts.codec == "flac"


@pytest.mark.parametrize("format", ["wav", "w64", "rf64", "caf", "aiff", "au"])
def test_of_truncated_samples_those_are_kept_that_are_there(
    noise: Noise, encoded: Encoded, format: str
) -> None:
    content = encoded(noise(50_000), format=format)
    samples, facts, error = partly(content[: len(content) - 2 * 20_000 - 1], 16_000)
    assert abs(facts.frames - 30_000) <= 8  # a chunk behind the samples may have gone first
    assert np.array_equal(samples, decode(content)[0][: facts.frames])
    assert error is not None and error.type == "Truncated"
    assert re.fullmatch("1.25 s of 3.12 s are missing: (the file|it) ends early", error.message)


def test_a_refused_file_prints_nothing(
    noise: Noise,
    encoded: Encoded,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    unraisable: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda hook: unraisable.append(str(hook.exc_value)))
    refusal(encoded(noise(1_000), format="aiff")[:22])
    assert unraisable == []
    assert capfd.readouterr() == ("", "")


# -------------------------------------------------------------------- real files


def reference_duration(row: dict[str, str], file: Path) -> float:
    """The longer of what the index's two decoders found; 0 where neither found audio."""
    if "|" in row["pyav_rate"]:  # the rate changes on the way
        with av.open(str(file)) as container:
            return sum(frame.samples / frame.sample_rate for frame in container.decode(audio=0))
    return max(
        int(row[f"{name}_frames"]) / int(row[f"{name}_rate"])
        if row[f"{name}_ok"] == "True" and row[f"{name}_rate"]
        else 0.0
        for name in ("soundfile", "pyav")
    )


def test_real_files_are_decoded_whole_or_refused_cleanly(shared: Path) -> None:
    zoo = shared / "audio-zoo"
    with (zoo / "index.csv").open(newline="", encoding="utf-8") as index:
        rows = list(csv.DictReader(index))
    assert len(rows) == 167
    wrong: dict[str, tuple[float, float]] = {}
    refused, unreadable, truncated = set(), set(), set()
    for row in rows:
        path = row["path"]
        expected = reference_duration(row, zoo / path)
        if not expected:
            unreadable.add(path)
        with (zoo / path).open("rb") as stream:
            decoder, samples = AudioDecoder(stream), 0
            try:
                for block in decoder.mono(16_000):
                    samples += len(block)
            except ClipError as error:
                assert error.message and not any(mark in error.message for mark in ("0x", "<", "/"))
                (truncated if error.partial else refused).add(path)
                if not error.partial:
                    continue
        assert decoder.facts is not None
        duration = decoder.facts.duration_s
        if path in unreadable:
            continue
        if abs(duration - expected) > 0.06 or abs(samples / 16_000 - duration) > 1 / 16_000:
            wrong[path] = (expected, duration)
    assert wrong == {}
    assert truncated == {
        "flac_test_files-uncommon/04 - changing bitdepth.flac",  # neither decoder knows how
        "scipy_wav/test-44100Hz-le-1ch-4bytes-early-eof.wav",  # 236 samples of 4,410
    }
    assert refused == unreadable - truncated


@pytest.mark.parametrize("name", ["03 - wrong bit depth", "09 - blocksize 1"])
def test_a_flac_that_only_libsndfile_reads_is_called_flac(shared: Path, name: str) -> None:
    content = (shared / "audio-zoo" / "flac_test_files-faulty" / f"{name}.flac").read_bytes()
    samples, facts = decode(content, 24_000)
    assert np.array_equal(samples, by_soundfile(content).mean(axis=1))
    assert facts.codec == "flac"


def test_a_thread_is_told_what_its_decoders_took(encoded: Encoded, noise: Noise) -> None:
    class Slow(io.BytesIO):
        reads = 0

        def read(self, size: int | None = -1) -> bytes:
            self.reads += 1
            time.sleep(0.01)
            return super().read(size)

    take_decode_s()
    file = Slow(encoded(noise(44_100), 44_100))
    started = time.perf_counter()
    for _ in AudioDecoder(file).mono(16_000):
        time.sleep(0.2)  # not the decoder's
    whole_s = time.perf_counter() - started
    took: list[dict[str, float]] = []
    elsewhere = threading.Thread(target=lambda: took.append(take_decode_s()))
    elsewhere.start()
    elsewhere.join()
    took.append(take_decode_s())
    assert set(took[0].values()) == {0.0}
    assert took[1]["read"] >= 0.01 * file.reads
    assert took[1]["resample"] > 0 and took[1]["decode"] > 0
    assert sum(took[1].values()) <= whole_s - 0.2
    assert set(take_decode_s().values()) == {0.0}
