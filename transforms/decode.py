"""Decodes any audio file to mono float32 at the student's rate, block by block."""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import av
import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from transforms.meter import Stopwatch
from transforms.records import ClipError

MIN_SAMPLE_RATE = 1_000  # Hz; below it is a damaged header, and hours of nothing
BLOCK_S = 2.0  # decoded audio handled at a time: bounds memory, amortises Python's overhead
RESAMPLE_QUALITY = "HQ"  # soxr's high quality: 20-bit, the usual choice for 16-bit audio

# A clip may be a playlist; what it names is not opened.
_NO_OTHER_FILES = {"protocol_whitelist": "none"}

# ffmpeg's sample formats: numpy's type, the value of silence, and the step of full scale 1.0.
_SAMPLES: dict[str, tuple[type[np.generic], int, float]] = {
    "u8": (np.uint8, 128, 2.0**-7),
    "s16": (np.int16, 0, 2.0**-15),
    "s32": (np.int32, 0, 2.0**-31),
    "flt": (np.float32, 0, 1.0),
    "dbl": (np.float64, 0, 1.0),
}

# In 16-bit PCM WAV ffmpeg looks for a bitstream that poses as samples, through 32 packets of
# up to 0.1 s: 4 to 30 ms of CPU time a clip. At 44.1 kHz stereo and more AC-3, AAC and MP3 show
# in the first two. DTS may follow silence, but not without its sync words, which are searched
# for here.
_PCM16_WAV = re.compile(rb"(?s)R(?:IFF|F64).{4}WAVE.*?fmt .{4}(?:\x01\x00|\xfe\xff).{12}\x10\x00")
_HEADER_BYTES = 4_096  # in which "fmt " is looked for
_DTS_WITHIN_BYTES = 600_000  # ffmpeg's 32 packets of stereo at 48 kHz, and a header
_PROBE_LESS = {"max_probe_packets": "2"}
_DTS_SYNC_WORDS = (  # as 16-bit little-endian samples; ETSI TS 102 114
    (0x7FFE, 0x8001),
    (0xFE7F, 0x0180),
    (0x1FFF, 0xE800),
    (0xFF1F, 0x00E8),
    (0x5864, 0x2520),  # of an extension without a core
)

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


class _Spent(threading.local):
    """What a thread's decoders took since `take_decode_s`."""

    def __init__(self) -> None:
        self.whole = Stopwatch()  # reads and resampling included
        self.read_s = self.resample_s = 0.0


_spent = _Spent()


def take_decode_s() -> dict[str, float]:
    """Seconds that the decoders of this thread took since the last call.

    Returns:
        "read": inside the reads of encoded audio; "resample": in soxr; "decode": the rest.
    """
    whole_s, read_s, resample_s = _spent.whole.seconds, _spent.read_s, _spent.resample_s
    _spent.whole.seconds = _spent.read_s = _spent.resample_s = 0.0
    return {"read": read_s, "decode": whole_s - read_s - resample_s, "resample": resample_s}


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
        self._file = cast(BinaryIO, _TimedReads(file))
        self.facts: SourceFacts | None = None

    def mono(self, sample_rate: int) -> Iterator[NDArray[np.float32]]:
        """Yields float32 [samples], the mean of the channels at `sample_rate` Hz."""
        return _spent.whole.making(self._mono(sample_rate))

    def _mono(self, sample_rate: int) -> Iterator[NDArray[np.float32]]:
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
            mixed = _mixed(block)
            if facts.sample_rate == sample_rate:
                yield mixed
                continue
            if resampler is None:
                resampler = soxr.ResampleStream(
                    facts.sample_rate, sample_rate, 1, dtype="float32", quality=RESAMPLE_QUALITY
                )
            yield _finite(_resampled(resampler, mixed))
        if resampler is not None:
            yield _finite(_resampled(resampler, np.zeros(0, np.float32), last=True))
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

    def _is_certainly_samples(self) -> bool:
        """Whether it is a WAV of 16-bit samples in which no DTS hides."""
        header = self._file.read(_HEADER_BYTES)
        certain = _PCM16_WAV.match(header) is not None and not _holds_dts(
            header + self._file.read(_DTS_WITHIN_BYTES)
        )
        self._file.seek(0)
        return certain

    def _ffmpeg_blocks(self) -> Iterator[NDArray[np.float32]]:
        options = _NO_OTHER_FILES | (_PROBE_LESS if self._is_certainly_samples() else {})
        with av.open(self._file, mode="r", metadata_errors="replace", options=options) as container:
            stream = container.streams.audio[0]
            codec = stream.codec_context.codec.canonical_name
            kind: tuple[str, str, int] | None = None
            converter: av.AudioResampler | None = None
            pending: list[av.AudioFrame] = []
            samples = 0
            for frame in container.decode(stream):
                frame_kind = (frame.format.name, frame.layout.name, frame.sample_rate)
                if frame_kind != kind:  # at the start, and where a stream changes its format
                    if converter is not None:
                        pending += converter.resample(None)
                    if pending:
                        yield _joined(pending)
                        pending, samples = [], 0
                    kind = frame_kind
                    if self.facts is None:
                        # The frame, not the header, says what was really decoded.
                        self.facts = SourceFacts(codec, frame.sample_rate, frame.layout.nb_channels)
                    converter = _converter(frame, self.facts.sample_rate)
                assert self.facts is not None
                for converted in [frame] if converter is None else converter.resample(frame):
                    pending.append(converted)
                    samples += converted.samples
                if samples >= BLOCK_S * self.facts.sample_rate:
                    yield _joined(pending)
                    pending, samples = [], 0
            if converter is not None:
                pending += converter.resample(None)
            if pending:
                yield _joined(pending)

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


class _TimedReads:
    """A file that counts how long its reads take; all else is the file's own."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        started = time.perf_counter()
        content = self._file.read(size)
        _spent.read_s += time.perf_counter() - started
        return content

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


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


def _holds_dts(content: bytes) -> bool:
    samples = np.frombuffer(content, "<u2", len(content) // 2)
    return any(
        (samples[np.flatnonzero(samples[:-1] == first) + 1] == second).any()
        for first, second in _DTS_SYNC_WORDS
    )


def _converter(frame: av.AudioFrame, sample_rate: int) -> av.AudioResampler | None:
    """What makes frames like `frame` fit for `_joined`; None where they are."""
    # PyAV crashes on the planes of 8 channels; libswresample refuses more than 64, which only
    # a damaged header states.
    readable = (
        frame.layout.nb_channels < 8 if frame.format.is_planar else frame.layout.nb_channels <= 64
    )
    known = frame.format.name.removesuffix("p") in _SAMPLES
    if readable and known and frame.sample_rate == sample_rate:
        return None
    return av.AudioResampler("flt", frame.layout, sample_rate)


def _joined(frames: list[av.AudioFrame]) -> NDArray[np.float32]:
    """float32 [channels, samples] of frames of one kind, by the arithmetic of libswresample."""
    format, channels = frames[0].format, frames[0].layout.nb_channels
    dtype, silence, step = _SAMPLES[format.name.removesuffix("p")]
    planes, interleaved = (channels, 1) if format.is_planar else (1, channels)
    # Views of what ffmpeg decoded: `AudioFrame.to_ndarray` copies each frame, in 3 times the time.
    views: list[list[NDArray[np.generic]]] = [[] for _ in range(planes)]
    for frame in frames:
        count = frame.samples * interleaved
        for of_plane, plane in zip(views, frame.planes, strict=True):
            of_plane.append(np.frombuffer(plane, dtype, count))
    joined = np.empty((planes, sum(map(len, views[0]))), np.float32)
    with np.errstate(over="ignore"):  # a float64 beyond float32 is infinite, and refused as such
        for row, of_plane in zip(joined, views, strict=True):
            np.concatenate(of_plane, out=row, casting="same_kind")
    if silence:
        joined -= silence
    if step != 1:
        joined *= step
    return joined if format.is_planar else joined.reshape(-1, channels).T


def _mixed(block: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32 [samples], the mean of the channels as float64 has it, rounded once."""
    if len(block) == 1:
        return block[0]
    if len(block) == 2:
        # The sum of two float32 rounds alike with and without the detour through float64.
        with np.errstate(over="ignore"):
            mixed = block[0] + block[1]
        mixed *= 0.5
        if np.isfinite(mixed).all():
            return mixed
    return block.mean(axis=0, dtype=np.float64).astype(np.float32)


def _resampled(
    resampler: soxr.ResampleStream, samples: NDArray[np.float32], last: bool = False
) -> NDArray[np.float32]:
    started = time.perf_counter()
    resampled: NDArray[np.float32] = resampler.resample_chunk(samples, last=last)
    _spent.resample_s += time.perf_counter() - started
    return resampled


def _finite(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """`samples`, unless one is NaN or infinite: overflown on the way."""
    if not np.isfinite(samples).all():
        raise _not_finite()
    return samples


def _not_finite() -> ClipError:
    return ClipError("decode", "NonFinite", "the audio holds NaN or infinite samples")


def _measure(facts: SourceFacts, block: NDArray[np.float32]) -> None:
    low, high = float(block.min(initial=0.0)), float(block.max(initial=0.0))
    if not (math.isfinite(low) and math.isfinite(high)):  # NaN is the extreme of any that hold it
        raise _not_finite()
    facts.peak = max(facts.peak, high, -low)
    squares = float(np.einsum("cs,cs->", block, block, dtype=np.float64))  # in no array of its own
    facts.mean_square_sum += squares / block.shape[0]
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
