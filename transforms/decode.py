"""Decodes any audio file to mono float32 at the student's rate, block by block."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import av
import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from transforms.records import ClipError

MIN_SAMPLE_RATE = 1_000  # Hz; below it is a damaged header, and hours of nothing
BLOCK_S = 2.0  # decoded audio handled at a time: bounds memory, amortises Python's overhead
RESAMPLE_QUALITY = "HQ"  # soxr's high quality: 20-bit, the usual choice for 16-bit audio

# A clip may be a playlist; what it names is not opened.
_NO_OTHER_FILES = {"protocol_whitelist": "none"}

# ffmpeg's names for what libsndfile calls subtype, so that `codec` has one vocabulary.
_SOUNDFILE_CODECS = {
    "PCM_S8": "pcm_s8",
    "PCM_U8": "pcm_u8",
    "PCM_16": "pcm_s16le",
    "PCM_24": "pcm_s24le",
    "PCM_32": "pcm_s32le",
    "FLOAT": "pcm_f32le",
    "DOUBLE": "pcm_f64le",
    "MPEG_LAYER_I": "mp1",
    "MPEG_LAYER_II": "mp2",
    "MPEG_LAYER_III": "mp3",
}


@dataclass
class SourceFacts:
    """What is known of a clip's source; complete once its last block was taken."""

    codec: str
    sample_rate: int  # Hz, of the source
    channels: int  # of the source
    frames: int = 0  # samples per channel decoded so far
    peak: float = 0.0  # largest absolute sample of any channel; 1.0 is full scale
    mean_square_sum: float = 0.0  # over all samples, of the mean square of the channels

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return self.frames / self.sample_rate

    @property
    def peak_dbfs(self) -> float:
        """Peak level in dB relative to full scale; -inf for digital silence."""
        return 20 * math.log10(self.peak) if self.peak > 0 else -math.inf

    @property
    def rms_dbfs(self) -> float:
        """RMS level in dB relative to a full-scale square wave; -inf for silence."""
        if self.frames == 0 or self.mean_square_sum <= 0:
            return -math.inf
        return 10 * math.log10(self.mean_square_sum / self.frames)


class AudioDecoder:
    """One clip's audio, decoded as it is read.

    ffmpeg (PyAV) decodes; what it refuses to begin is tried with libsndfile,
    which reads some files that ffmpeg does not. The format is found from the
    bytes.

    Args:
        file: the encoded audio, seekable, positioned at its start.

    Raises:
        ClipError: (from `mono`) the audio cannot be decoded; stage "decode".
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.facts: SourceFacts | None = None

    def mono(self, sample_rate: int) -> Iterator[NDArray[np.float32]]:
        """Yields float32 [samples], the mean of the channels at `sample_rate` Hz."""
        resampler: soxr.ResampleStream | None = None
        for block in self._first_that_begins():
            facts = self.facts
            assert facts is not None  # set before a decoder's first block
            _measure(facts, block)
            if facts.sample_rate < MIN_SAMPLE_RATE:
                raise ClipError(
                    "decode",
                    "SampleRate",
                    f"the audio states {facts.sample_rate} Hz, less than {MIN_SAMPLE_RATE} Hz",
                )
            mixed = block.mean(axis=0, dtype=np.float64).astype(np.float32)
            if facts.sample_rate == sample_rate:
                yield _finite(mixed)
                continue
            if resampler is None:
                resampler = soxr.ResampleStream(
                    facts.sample_rate, sample_rate, 1, dtype="float32", quality=RESAMPLE_QUALITY
                )
            yield _finite(resampler.resample_chunk(mixed))
        if resampler is not None:
            yield _finite(resampler.resample_chunk(np.zeros(0, np.float32), last=True))
        if self.facts is None or self.facts.frames == 0:
            raise ClipError("decode", "NoAudio", "the audio holds no samples")

    def _first_that_begins(self) -> Iterator[NDArray[np.float32]]:
        """Blocks [channels, samples] of ffmpeg, or of libsndfile where ffmpeg yields none."""
        try:
            if not self._is_big_endian_wav():
                yield from self._ffmpeg_blocks()
            if self.facts is not None:
                return
            refusal = "the audio holds no samples"
        # IndexError: no audio stream; AttributeError: a codec this build lacks;
        # UnicodeDecodeError: tags that are not text. PyAV lets all three escape.
        except (av.FFmpegError, IndexError, AttributeError, UnicodeDecodeError) as error:
            refusal = _refusal(error)
            if self.facts is not None:
                # libsndfile would stop at the same fault, but without a word.
                raise ClipError("decode", _error_type(error), refusal) from error
            refused = error
        else:
            refused = None

        self.facts = None
        self._file.seek(0)
        try:
            yield from self._soundfile_blocks()
        except soundfile.LibsndfileError as error:
            kind = _error_type(refused) if refused is not None else "NoAudio"
            raise ClipError("decode", kind, refusal) from error

    def _is_big_endian_wav(self) -> bool:
        """ffmpeg takes the samples of a RIFX file for little-endian, and gives noise."""
        magic = self._file.read(4)
        self._file.seek(0)
        return magic == b"RIFX"

    def _ffmpeg_blocks(self) -> Iterator[NDArray[np.float32]]:
        with av.open(
            self._file, mode="r", metadata_errors="replace", options=_NO_OTHER_FILES
        ) as container:
            stream = container.streams.audio[0]
            codec = stream.codec_context.codec.canonical_name
            kind: tuple[str, str, int] | None = None
            converter: av.AudioResampler | None = None
            pending: list[av.AudioFrame] = []
            samples = 0
            for frame in container.decode(stream):
                frame_kind = (frame.format.name, frame.layout.name, frame.sample_rate)
                if frame_kind != kind:  # at the start, and where a stream changes its format
                    if pending and converter is not None:
                        yield _interleaved(pending + converter.resample(None))
                        pending, samples = [], 0
                    kind = frame_kind
                    if self.facts is None:
                        # The frame, not the header, says what was really decoded.
                        self.facts = SourceFacts(codec, frame.sample_rate, frame.layout.nb_channels)
                    # Interleaved, because PyAV crashes on planar frames of 8 channels.
                    converter = av.AudioResampler("flt", frame.layout, self.facts.sample_rate)
                assert converter is not None and self.facts is not None
                for converted in converter.resample(frame):
                    pending.append(converted)
                    samples += converted.samples
                if samples >= BLOCK_S * self.facts.sample_rate:
                    yield _interleaved(pending)
                    pending, samples = [], 0
            if converter is not None:
                pending += converter.resample(None)
            if pending:
                yield _interleaved(pending)

    def _soundfile_blocks(self) -> Iterator[NDArray[np.float32]]:
        with soundfile.SoundFile(_Unnamed(self._file)) as sound:
            codec = _SOUNDFILE_CODECS.get(sound.subtype, sound.subtype.lower())
            if sound.endian == "BIG":
                codec = codec.replace("le", "be") if codec.startswith("pcm_") else codec
            self.facts = SourceFacts(
                codec="flac" if sound.format == "FLAC" else codec,
                sample_rate=sound.samplerate,
                channels=sound.channels,
            )
            # Blocks of a fixed size: the header's frame count may be a lie.
            frames = max(1, int(BLOCK_S * sound.samplerate))
            while len(block := sound.read(frames, dtype="float32", always_2d=True)):
                yield np.ascontiguousarray(block.T)


class _Unnamed:
    """A file as libsndfile should see it: without a name, whose suffix soundfile would
    believe, and without positions before the start, which damaged headers ask for."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.read, self.tell = file.read, file.tell

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            return self._file.seek(offset, whence)
        except (ValueError, OSError):
            return self._file.seek(0)

    def readinto(self, buffer: memoryview) -> int:
        content = self._file.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def write(self, _: bytes) -> int:  # soundfile asks that it is there
        raise OSError("the audio is only read")


def _interleaved(frames: list[av.AudioFrame]) -> NDArray[np.float32]:
    """float32 [channels, samples] of packed frames."""
    channels = frames[0].layout.nb_channels
    return np.concatenate([f.to_ndarray() for f in frames], axis=1).reshape(-1, channels).T


def _finite(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """`samples`, unless one is NaN or infinite: read so, or overflown on the way."""
    if not np.isfinite(samples).all():
        raise ClipError("decode", "NonFinite", "the audio holds NaN or infinite samples")
    return samples


def _measure(facts: SourceFacts, block: NDArray[np.float32]) -> None:
    facts.peak = max(facts.peak, float(np.abs(_finite(block)).max(initial=0.0)))
    facts.mean_square_sum += float(np.square(block, dtype=np.float64).sum()) / block.shape[0]
    facts.frames += block.shape[1]


def _error_type(error: Exception) -> str:
    known = {IndexError: "NoAudioStream", AttributeError: "UnknownCodec"}
    return known.get(type(error), type(error).__name__)


def _refusal(error: Exception) -> str:
    """A message that is the same for the same fault: no addresses, no file names."""
    if isinstance(error, IndexError):
        return "the file has no audio stream"
    if isinstance(error, AttributeError):
        return "the audio is in a codec that this build of ffmpeg does not know"
    text = getattr(error, "strerror", None) or str(error)
    return re.sub(r"<[^>]*>|0x[0-9a-fA-F]+", "", text).strip() or type(error).__name__
