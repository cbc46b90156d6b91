"""Writes a clip, or a piece of it, as an audio file of its own at the source's rate and channels."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
import soundfile
from numpy.typing import NDArray

from transforms.records import ClipError

# A clip may be a playlist; what it names is not opened.
_NO_OTHER_FILES = {"protocol_whitelist": "none"}

# Sources whose samples have more than 16 bits, by ffmpeg's sample format; what an encoder that
# loses has made is floating point there, and is worth 16.
_WIDE = ("s32", "s32p", "dbl", "dblp", "s64", "s64p")
_LOSSY = ("mp1", "mp2", "mp3", "aac", "vorbis", "opus", "ac3", "eac3", "wma", "amr", "speex", "gsm")

_MAX_FLAC_CHANNELS = 8
_MAX_FLAC_RATE = 655_350


def write_clip(
    audio: BinaryIO,
    target: Path,
    format: str = "flac",
    start_s: float | None = None,
    end_s: float | None = None,
) -> tuple[float, str | None]:
    """Decodes `audio` and writes what is between `start_s` and `end_s`: (seconds, what is amiss).

    A source of 16 bits or less, or of a codec that loses, gives 16 bits, any other 24. Where a
    source breaks off, what came before is written, and the second value says why.

    Args:
        audio: encoded, seekable.
        target: the file to make; it is replaced.
        format: `flac` or `wav`.
        start_s: of the piece, in seconds from the beginning of the source; None: its beginning.
        end_s: of the piece; None: its end.

    Raises:
        ClipError: nothing can be decoded there, or the format cannot hold it.
        OSError: `target` cannot be written.
    """
    audio.seek(0)
    sound: soundfile.SoundFile | None = None
    position = written = 0
    start = end = rate = 0
    amiss = None
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(target.open("w+b"))
        try:
            for rate, samples in _blocks(audio):
                if sound is None:
                    _check(format, rate, samples.shape[1])
                    start = round((start_s or 0.0) * rate)
                    end = 1 << 62 if end_s is None else round(end_s * rate)
                    subtype = "PCM_16" if samples.dtype == np.int16 else "PCM_24"
                    sound = stack.enter_context(
                        soundfile.SoundFile(
                            file, "w", rate, samples.shape[1], subtype, format=format.upper()
                        )
                    )
                piece = samples[max(0, start - position) : max(0, end - position)]
                if piece.shape[1] != sound.channels:
                    raise ClipError(
                        "decode", "Channels", "the number of channels changes within the clip"
                    )
                sound.write(piece)
                written += len(piece)
                position += len(samples)
                if position >= end:
                    break
        except (av.FFmpegError, soundfile.LibsndfileError) as error:
            if not written:
                raise ClipError("decode", type(error).__name__, _reason(error)) from error
            amiss = f"the source breaks off after {written / rate:.2f} s: {_reason(error)}"
    if not written:
        raise ClipError("decode", "NoAudio", "the source holds no samples there")
    return written / rate, amiss


def _check(format: str, rate: int, channels: int) -> None:
    if format == "flac" and (channels > _MAX_FLAC_CHANNELS or rate > _MAX_FLAC_RATE):
        raise ClipError(
            "write",
            "NoFlac",
            f"FLAC holds no {channels} channels at {rate} Hz: take wav or original",
        )


def _blocks(audio: BinaryIO) -> Iterator[tuple[int, NDArray[Any]]]:
    """(Hz, int16 or int32 [samples, channels]) of ffmpeg, or of libsndfile where ffmpeg has none."""
    begun = False
    magic = audio.read(4)
    audio.seek(0)
    if magic != b"RIFX":  # whose samples ffmpeg takes for little-endian
        try:
            for block in _ffmpeg_blocks(audio):
                begun = True
                yield block
            if begun:
                return
        # IndexError: no audio stream; AttributeError: a codec that this build lacks.
        except (av.FFmpegError, IndexError, AttributeError, UnicodeDecodeError):
            if begun:
                raise
    audio.seek(0)
    with soundfile.SoundFile(audio) as sound:
        dtype = (
            "int16" if sound.subtype in ("PCM_S8", "PCM_U8", "PCM_16", "ULAW", "ALAW") else "int32"
        )
        while len(block := sound.read(1 << 16, dtype=dtype, always_2d=True)):
            yield sound.samplerate, block


def _ffmpeg_blocks(audio: BinaryIO) -> Iterator[tuple[int, NDArray[Any]]]:
    with av.open(audio, mode="r", metadata_errors="replace", options=_NO_OTHER_FILES) as container:
        stream = container.streams.audio[0]
        converter: av.AudioResampler | None = None
        rate = channels = 0
        dtype: type[np.generic] = np.int16
        for frame in container.decode(stream):
            if converter is None:
                codec = stream.codec_context.codec.canonical_name
                wide = frame.format.name in _WIDE or (
                    frame.format.name in ("flt", "fltp") and not codec.startswith(_LOSSY)
                )
                dtype = np.int32 if wide else np.int16
                rate, channels = frame.sample_rate, frame.layout.nb_channels
                # One layout and rate throughout, also where a stream changes its own.
                converter = av.AudioResampler("s32" if wide else "s16", frame.layout, rate)
            for converted in converter.resample(frame):
                yield rate, _interleaved(converted, dtype, channels)
        if converter is not None:
            for converted in converter.resample(None):
                yield rate, _interleaved(converted, dtype, channels)


def _interleaved(frame: av.AudioFrame, dtype: type[np.generic], channels: int) -> NDArray[Any]:
    count = frame.samples * channels
    return np.frombuffer(frame.planes[0], dtype, count).reshape(-1, channels).copy()


def _reason(error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    # libsndfile's names an object here, and no file of the user's.
    return re.sub(r"^Error opening <.*?>: ", "", reason).strip()
