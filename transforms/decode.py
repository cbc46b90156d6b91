"""Decodes any audio file to mono float32 at the student's rate, block by block."""

from __future__ import annotations

import contextlib
import io
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
from transforms.stated import frame_bytes, stated_of, within_tags
from transforms.wav import PlainPcm16, holds_pcm16, plain_pcm16

MIN_SAMPLE_RATE = 1_000  # Hz; below it is a damaged header, and hours of nothing
MAX_SAMPLE_RATE = 6_144_000  # Hz; DSD512 as ffmpeg decodes it is 2,822,400
BLOCK_S = 2.0  # decoded audio handled at a time: bounds memory, amortises Python's overhead
RESAMPLE_QUALITY = "HQ"  # soxr's high quality: 20-bit, the usual choice for 16-bit audio

_MOST_VALUES = 4 << 20  # of a block, over all channels

_SHORT_S = 0.05  # less is an encoder's delay, or a header that counts in frames
_EXACT_S = 0.001  # as long as nothing else says that some is missing
_LATE_END_S = 0.1  # by which a part may end behind the audio
_SEEK_FROM_S = 5.0  # what lies before is decoded and dropped
_TRIES_TO_READ_ON = 8  # after which a container that gives no packet is given up
_FRAMES_UNKNOWN = 1 << 48

# Containers in which ffmpeg finds a sample exactly, by its name for them.
_EXACT_SEEKS = frozenset(("wav", "w64", "flac", "aiff", "caf", "au"))

# Containers of whose header ffmpeg takes a stream's duration as it stands, and those of whose
# header it takes the file's. Of the others it is estimated, or cut to what is there.
_HEADERS_OF_STREAM = frozenset(
    "aiff ape ast au avr brstm caf dsf iff mov mpc mpc8 nistsphere oma pvf shn smjpeg sox svs tak tta "
    "voc wv xwma".split()
)
_HEADERS_OF_FILE = frozenset(("matroska", "flv"))

# Containers with a time in each page or packet, so that a lost one shows.
_TIMED = frozenset(("ogg", "matroska,webm", "mpegts", "mpeg", "asf", "wtv", "rm", "flv"))
_GAP_S = 0.1
_TAGS = (b"ID3", b"TAG", b"APETAGEX")  # between one recording and the next
_LEAP_S = 60.0  # another recording begins, or the clock was set

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

# Of a WAV that holds samples for certain ffmpeg need not look for a bitstream in 32 packets.
_PROBE_LESS = {"max_probe_packets": "2"}

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


@dataclass(frozen=True)
class Limits:
    """How much of one clip is decoded at most; what goes beyond ends in an error of its own.

    Raises:
        ValueError: one is not above 0.
    """

    clip_bytes: int = 4_096 << 20  # encoded
    duration_s: float = 24 * 3_600.0  # decoded
    clip_timeout_s: float = 600.0  # of decoding, waits for the model left out

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} is {value}, expected a number above 0")


DEFAULT_LIMITS = Limits()


class _Doubt(Exception):
    """ffmpeg met a fault before it gave a block: libsndfile may know better."""


@dataclass
class _Loss:
    """What a decoder could not decode, by where that was."""

    packets: int = 0  # that failed, wherever
    first: Exception | None = None
    before_s: float = 0.0  # in packets before the first that decoded
    between: int = 0  # packets that failed and were followed by one that did not
    between_s: float = 0.0
    after: int = 0  # those since the last that decoded
    after_s: float = 0.0
    gaps_s: float = 0.0  # between timestamps
    broken_off: bool = False  # the container could be read no further

    @property
    def seconds(self) -> float:
        """What is lost so far before something that decoded, where packets or their times tell."""
        return max(self.before_s + self.between_s, self.gaps_s)

    def add(self, seconds: float, error: Exception) -> None:
        self.packets += 1
        self.first = self.first or error
        self.after += 1
        self.after_s += seconds

    def decoded(self, *, first: bool) -> None:
        if self.after:
            if first:
                self.before_s += self.after_s
            else:
                self.between += self.after
                self.between_s += self.after_s
            self.after, self.after_s = 0, 0.0


class AudioDecoder:
    """One clip's audio, or a part of it, decoded as it is read.

    ffmpeg (PyAV) decodes all but the samples of a plain WAV, which are read as they are. What it
    refuses to begin is tried with libsndfile, which reads some files that ffmpeg does not; where
    ffmpeg meets a fault at once, the one that gets further decodes. The format is found from the
    bytes. What cannot be decoded in the middle is left out, and told at the end.

    Args:
        file: the encoded audio, seekable.
        limits: what is too long, in samples and in time.

    Raises:
        ClipError: (from `mono`) of stage "decode". When it is `partial`, what came before it is
            all that there is to have, and `facts` are of that.
    """

    def __init__(self, file: BinaryIO, limits: Limits = DEFAULT_LIMITS) -> None:
        self._watch = _Watch(limits.clip_timeout_s)
        self._file = cast(BinaryIO, _WatchedReads(file, self._watch))
        self._limits = limits
        self._begun = False  # whether a block was given
        self._loss = _Loss()
        self._stated_s: float | None = None  # by the decoder's reading of the header
        self._stated_exactly = True
        self._broken_frame = False  # the last one, which is shorter than it says
        self._poses = False  # samples by its header, and a bitstream by what they hold
        self._skipped = 0  # samples that were seeked over
        self._position = 0  # samples decoded so far, those included
        self._lost_s = 0.0  # before the block that was given last
        self.facts: SourceFacts | None = None
        # The one that decoded last: "ffmpeg", "libsndfile" or "numpy".
        self.library: str | None = None

    def mono(
        self, sample_rate: int, start_s: float | None = None, end_s: float | None = None
    ) -> Iterator[NDArray[np.float32]]:
        """Yields float32 [samples], the mean of the channels at `sample_rate` Hz.

        Args:
            sample_rate: of what is yielded, Hz.
            start_s: where the part begins, to the nearest sample of the source; None: at the
                beginning.
            end_s: where it ends; None: at the end.
        """
        decoded = self._mono(sample_rate, start_s or 0.0, math.inf if end_s is None else end_s)
        return _spent.whole.making(self._watch.making(decoded))

    def _mono(
        self, sample_rate: int, start_s: float, end_s: float
    ) -> Iterator[NDArray[np.float32]]:
        if not (0 <= start_s < end_s and math.isfinite(start_s)):
            raise ClipError(
                "decode",
                "OutOfRange",
                f"a part from {start_s:g} s to {end_s:g} s is none; expected 0 <= start < end",
            )
        self._hide_tags()
        resampler: soxr.ResampleStream | None = None
        fault: ClipError | None = None
        blocks = self._part(start_s, end_s)
        while True:
            try:
                block = next(blocks, None)
            except ClipError as error:
                fault = error
                if not fault.partial:
                    raise
                block = None
            if block is None:
                break
            facts = self.facts
            assert facts is not None  # set before a decoder's first block
            _measure(facts, block)
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
        if fault is not None:
            raise fault

    def _hide_tags(self) -> None:
        """Leaves decoders without the tags before and behind the audio, which some take for it."""
        start, end = within_tags(self._file)
        if (start, end) != (0, self._file.seek(0, 2)):
            self._file = cast(BinaryIO, io.BufferedReader(_Part(self._file, start, end)))
        self._file.seek(0)

    def _part(self, start_s: float, end_s: float) -> Iterator[NDArray[np.float32]]:
        """Blocks [channels, samples] of a part of the audio, within the limits."""
        start = end = most = 0
        lost_before_s: float | None = None  # the part
        for block in self._first_that_begins(start_s):
            facts = self.facts
            assert facts is not None
            if not end:
                _check_rate(facts.sample_rate)
                start = round(start_s * facts.sample_rate)
                most = math.ceil(self._limits.duration_s * facts.sample_rate)
                whole = math.isinf(end_s)
                end = (
                    start + most + 1 if whole else max(start + 1, round(end_s * facts.sample_rate))
                )
            self._position = self._position or self._skipped
            # Where it would lie in a recording of which nothing is lost: a part is found by time.
            lost = round(self._lost_s * facts.sample_rate) if start or not whole else 0
            at = self._position + lost
            self._position += block.shape[1]
            if at + block.shape[1] > start:
                lost_before_s = self._lost_s if lost_before_s is None else lost_before_s
                given = block[:, max(0, start - at) : max(0, min(end, start + most) - at)]
                if given.shape[1]:
                    yield given
            if at + block.shape[1] > start + most and end > start + most:
                raise ClipError(
                    "decode",
                    "TooLong",
                    f"the audio is longer than {self._limits.duration_s:g} s (--max-duration-s); what "
                    "comes after is left out",
                )
            if at + block.shape[1] >= end:
                lost_s = self._lost_s - (lost_before_s or 0.0)
                if lost_s > _SHORT_S:
                    raise ClipError(
                        "decode",
                        "Truncated",
                        f"{lost_s:.2f} s of {end_s - start_s:.2f} s are missing: within the part, some "
                        "of the recording cannot be decoded",
                    )
                return
        if self.facts is None:
            return
        seconds = self._position / self.facts.sample_rate + self._loss.seconds
        if start_s and seconds <= start_s:
            raise ClipError(
                "decode",
                "OutOfRange",
                f"the part begins at {start_s:g} s, the audio ends at {seconds:.3f} s",
            )
        self._check_whole()
        if not math.isinf(end_s) and end_s - seconds > _LATE_END_S:
            raise ClipError(
                "decode",
                "Truncated",
                f"{end_s - seconds:.2f} s of {end_s - start_s:.2f} s are missing: the part ends at "
                f"{end_s:g} s, the audio at {seconds:.3f} s",
            )

    def _check_whole(self) -> None:
        """Raises a `ClipError` where less was decoded than the file holds, or held."""
        assert self.facts is not None
        loss, decoded_s = self._loss, self._position / self.facts.sample_rate
        stated = stated_of(self._file)
        duration_s = stated.duration_s or self._stated_s
        if duration_s is not None and decoded_s > duration_s + _SHORT_S:
            duration_s = None  # it is wrong
        missing_s = stated.missing_s
        if missing_s is None and duration_s is not None:
            missing_s = max(0.0, duration_s - decoded_s)
        faulty = stated.cut or loss.broken_off or loss.after or self._broken_frame
        if not loss.between and not loss.gaps_s:
            if missing_s is None:
                if not faulty and loss.before_s <= _SHORT_S:
                    return
            elif missing_s <= (_EXACT_S if faulty and self._stated_exactly else _SHORT_S):
                return
        lost_s = max(missing_s or 0.0, loss.before_s + loss.between_s + loss.after_s, loss.gaps_s)
        whole_s = decoded_s + lost_s
        much = f"{lost_s:.2f} s of {whole_s:.2f} s are" if lost_s else "an unknown part is"
        why = []
        if loss.packets:
            why.append(
                f"{loss.packets} packet{'s' * (loss.packets > 1)} cannot be decoded"
                f" ({_refusal(loss.first)})" * (loss.first is not None)
            )
        if loss.gaps_s:
            why.append("its timestamps jump")
        if stated.cut:
            why.append("the file ends early")
        elif not why:
            why.append("it is damaged" if loss.broken_off else "it ends early")
        raise ClipError("decode", "Truncated", f"{much} missing: {', and '.join(why)}")

    def _first_that_begins(self, start_s: float) -> Iterator[NDArray[np.float32]]:
        """Blocks [channels, samples] of ffmpeg, or of libsndfile where ffmpeg gets less far.

        The samples of a plain WAV need neither.
        """
        refused: Exception | None = None
        try:
            plain = plain_pcm16(self._file) if start_s < _SEEK_FROM_S else None
            if plain is not None:
                yield from self._plain_blocks(plain)
            elif not self._is_big_endian_wav():
                try:
                    yield from self._ffmpeg_blocks(start_s, doubting=True)
                except _Doubt:
                    self._reset()
                    if not self._soundfile_gets_further():
                        yield from self._ffmpeg_blocks(start_s)
            if self._begun:
                return
        # IndexError: no audio stream; AttributeError: a codec this build lacks;
        # UnicodeDecodeError: tags that are not text. PyAV lets all three escape.
        except (av.FFmpegError, IndexError, AttributeError, UnicodeDecodeError) as error:
            if self._begun:
                raise ClipError("decode", _error_type(error), _refusal(error)) from error
            refused = error

        refused = refused or self._loss.first
        if refused is not None and self._poses:
            raise ClipError(
                "decode",
                _error_type(refused),
                "the samples of the WAV are a bitstream of another codec, which cannot be decoded: "
                f"{_refusal(refused)}",
            ) from refused
        self._reset()
        try:
            yield from self._soundfile_blocks()
        except soundfile.LibsndfileError as error:
            self._watch.check()
            if self._begun:
                self._loss.broken_off = True
                return
            kind = _error_type(refused) if refused is not None else "NoAudio"
            reason = "the audio holds no samples" if refused is None else _refusal(refused)
            if stated_of(self._file).cut:
                reason += "; the file ends early"
            raise ClipError("decode", kind, reason) from error

    def _reset(self) -> None:
        """As before the first decoder."""
        self.facts, self._loss, self._stated_s = None, _Loss(), None
        self._skipped, self._broken_frame, self._lost_s = 0, False, 0.0
        self._file.seek(0)

    def _soundfile_gets_further(self) -> bool:
        """Whether libsndfile decodes more of it; both are asked, and nothing is kept."""
        if self._poses:
            return False
        decoded_s = []
        for blocks in (self._soundfile_blocks(), self._ffmpeg_blocks(0.0)):
            frames, rate = 0, 1
            with contextlib.suppress(av.FFmpegError, soundfile.LibsndfileError):
                for block in blocks:
                    frames += block.shape[1]
                    rate = self.facts.sample_rate if self.facts is not None else 1
            decoded_s.append(frames / rate)
            self._reset()
        self._begun = False
        return decoded_s[0] > decoded_s[1] + _SHORT_S

    def _is_big_endian_wav(self) -> bool:
        """ffmpeg takes the samples of a RIFX file for little-endian, and gives noise."""
        magic = self._file.read(4)
        self._file.seek(0)
        return magic == b"RIFX"

    def _ffmpeg_blocks(
        self, start_s: float, *, doubting: bool = False
    ) -> Iterator[NDArray[np.float32]]:
        self.library = "ffmpeg"
        pcm16, certain = holds_pcm16(self._file)
        options = _NO_OTHER_FILES | (_PROBE_LESS if certain else {})
        with av.open(self._file, mode="r", metadata_errors="replace", options=options) as container:
            stream = _audio_stream(container)
            codec = stream.codec_context.codec.canonical_name
            self._poses = pcm16 and not codec.startswith("pcm")
            self._stated_s, self._stated_exactly = _stated_by(container, stream)
            if start_s >= _SEEK_FROM_S:
                self._seek(container, stream, codec, start_s)
            kind: tuple[str, str, int] | None = None
            converter: av.AudioResampler | None = None
            pending: list[av.AudioFrame] = []
            samples = most = 0
            for frame in self._frames(container, stream, doubting):
                frame_kind = (frame.format.name, frame.layout.name, frame.sample_rate)
                if frame_kind != kind:  # at the start, and where a stream changes its format
                    if converter is not None:
                        pending += converter.resample(None)
                    if pending:
                        self._begun = True
                        yield _joined(pending)
                        pending, samples = [], 0
                    kind = frame_kind
                    if self.facts is None:
                        # The frame, not the header, says what was really decoded.
                        self.facts = SourceFacts(codec, frame.sample_rate, frame.layout.nb_channels)
                        _check_rate(frame.sample_rate)
                    converter = _converter(frame, self.facts.sample_rate)
                    most = _block_samples(self.facts.sample_rate, frame.layout.nb_channels)
                assert self.facts is not None
                if self._loss.seconds != self._lost_s:  # what follows lies elsewhere
                    if pending:
                        self._begun = True
                        yield _joined(pending)
                        pending, samples = [], 0
                    self._lost_s = self._loss.seconds
                for converted in [frame] if converter is None else converter.resample(frame):
                    pending.append(converted)
                    samples += converted.samples
                if samples >= most:
                    self._begun = True
                    yield _joined(pending)
                    pending, samples = [], 0
            if converter is not None:
                pending += converter.resample(None)
            if pending:
                self._begun = True
                yield _joined(pending)

    def _frames(
        self, container: av.container.InputContainer, stream: av.AudioStream, doubting: bool
    ) -> Iterator[av.AudioFrame]:
        """The frames of a stream; packets that fail are counted and left out.

        Raises:
            _Doubt: one fails before a block was given, and `doubting`.
        """
        loss, decoded_any, in_vain = self._loss, False, 0
        timed = container.format.name in _TIMED
        tick_s = float(stream.time_base)
        due_s: float | None = None
        last: av.Packet | None = None
        while in_vain < _TRIES_TO_READ_ON:
            try:
                for packet in container.demux(stream):
                    in_vain = 0
                    self._watch.check()
                    try:
                        frames = packet.decode()
                    except av.FFmpegError as error:
                        # Without bytes it marks the end, or a gap.
                        if packet.size and not bytes(packet)[:8].startswith(_TAGS):
                            seconds = float(packet.duration or 0) * float(packet.time_base)
                            loss.add(max(0.0, seconds), error)
                            # Of MPEG audio libsndfile gets no further, and prints about it.
                            if doubting and not self._begun and stream.codec_context.name == "flac":
                                raise _Doubt from error
                        continue
                    if packet.size:
                        last = packet
                    if frames:
                        loss.decoded(first=not decoded_any)
                        decoded_any = True
                        if timed:
                            due_s = self._gap(frames, tick_s, due_s)
                        yield from frames
                break
            except av.FFmpegError as error:
                in_vain += 1
                loss.broken_off = True
                loss.first = loss.first or error
        else:
            with contextlib.suppress(av.FFmpegError):
                yield from stream.codec_context.decode(None)
        if last is not None and not loss.after:
            stated = frame_bytes(stream.codec_context.name, bytes(last)[:6])
            # Of a stream of unknown length the last packet is always called corrupt.
            short = last.is_corrupt and container.format.name not in ("wav", "w64", "caf")
            self._broken_frame = short or stated > last.size

    def _gap(self, frames: list[av.AudioFrame], tick_s: float, due_s: float | None) -> float | None:
        """When the next frame is due; counts how much later than `due_s` these are."""
        for frame in frames:
            pts = frame.pts
            if pts is not None:
                at_s = pts * tick_s
                if due_s is not None and _GAP_S < at_s - due_s < _LEAP_S:
                    self._loss.gaps_s += at_s - due_s
                due_s = at_s
            if due_s is not None:
                due_s += frame.samples / frame.sample_rate
        return due_s

    def _seek(
        self,
        container: av.container.InputContainer,
        stream: av.AudioStream,
        codec: str,
        start_s: float,
    ) -> None:
        """Goes ahead to near `start_s` where that is exact; sets `_skipped`."""
        rate = stream.sample_rate
        if container.format.name not in _EXACT_SEEKS or not (
            codec == "flac" or codec.startswith("pcm_")
        ):
            return
        target = round(start_s * rate)
        step = 1 / (rate * stream.time_base)  # of the time base, a sample
        container.seek(int(max(0, target - rate) * step), stream=stream)
        for packet in container.demux(stream):
            if packet.pts is not None and packet.size:
                skipped = round(packet.pts / step)
                if skipped <= target:
                    container.seek(packet.pts, stream=stream)
                    self._skipped = skipped
                    return
            break
        container.seek(0, stream=stream)

    def _plain_blocks(self, plain: PlainPcm16) -> Iterator[NDArray[np.float32]]:
        self.library = "numpy"
        self.facts = SourceFacts("pcm_s16le", plain.sample_rate, plain.channels)
        self._stated_s = plain.frames / plain.sample_rate
        self._file.seek(plain.start)
        left, most = plain.frames, _block_samples(plain.sample_rate, plain.channels)
        while left > 0:
            content = self._read_whole(2 * plain.channels * min(left, most))
            block = np.frombuffer(
                content, "<i2", len(content) // (2 * plain.channels) * plain.channels
            )
            if not len(block):
                self._loss.broken_off = True
                return
            self._begun = True
            yield np.multiply(block.reshape(-1, plain.channels).T, np.float32(2.0**-15), order="C")
            left -= len(block) // plain.channels

    def _read_whole(self, size: int) -> bytes:
        """As many bytes as there are up to `size`; a file without a buffer may give fewer at once."""
        content = self._file.read(size)
        while len(content) < size and (more := self._file.read(size - len(content))):
            content += more
        return content

    def _soundfile_blocks(self) -> Iterator[NDArray[np.float32]]:
        self.library = "libsndfile"
        with soundfile.SoundFile(_Unnamed(self._file)) as sound:
            codec = _SOUNDFILE_CODECS.get(sound.subtype, sound.subtype.lower())
            if sound.endian == "BIG":
                codec = codec.replace("le", "be") if codec.startswith("pcm_") else codec
            self.facts = SourceFacts(
                codec="flac" if sound.format == "FLAC" else codec,
                sample_rate=sound.samplerate,
                channels=sound.channels,
            )
            _check_rate(sound.samplerate)
            if 0 < sound.frames < _FRAMES_UNKNOWN:
                self._stated_s = sound.frames / sound.samplerate
            # Blocks of a fixed size: the header's frame count may be a lie.
            frames = _block_samples(sound.samplerate, sound.channels)
            if sound.format == "FLAC":
                # Not less than its largest block, on which libsndfile insists where the header
                # has a wrong one.
                frames = max(frames, 131_072 // sound.channels)
            while len(block := sound.read(frames, dtype="float32", always_2d=True)):
                self._watch.check()
                self._begun = True
                yield np.ascontiguousarray(block.T)


def _audio_stream(container: av.container.InputContainer) -> av.AudioStream:
    """The stream to decode: the default one, or the first; the others are not even read.

    Raises:
        IndexError: there is none.
        AttributeError: none is in a codec that is known.
    """
    streams = container.streams.audio
    known = [stream for stream in streams if stream.codec_context is not None] or streams[:1]
    marked = [stream for stream in known if stream.disposition & av.stream.Disposition.default]
    chosen = (marked or known)[0]
    for stream in container.streams:
        if stream is not chosen and stream.index != chosen.index:
            stream.discard = av.stream.Discard.all
    return chosen


def _stated_by(
    container: av.container.InputContainer, stream: av.AudioStream
) -> tuple[float | None, bool]:
    """(seconds that a header states, whether that is of this stream, to the sample).

    None where ffmpeg estimates them.
    """
    names = set(container.format.name.split(","))
    if names & _HEADERS_OF_STREAM and stream.duration is not None:
        return float(stream.duration * stream.time_base) or None, True
    if names & _HEADERS_OF_FILE and container.duration and len(container.streams) == 1:
        return float(container.duration / av.time_base), False
    return None, True


def _block_samples(sample_rate: int, channels: int) -> int:
    return max(1, min(int(BLOCK_S * sample_rate), _MOST_VALUES // channels))


def _check_rate(sample_rate: int) -> None:
    if not MIN_SAMPLE_RATE <= sample_rate <= MAX_SAMPLE_RATE:
        bound = (
            f"less than {MIN_SAMPLE_RATE}"
            if sample_rate < MIN_SAMPLE_RATE
            else f"more than {MAX_SAMPLE_RATE}"
        )
        raise ClipError("decode", "SampleRate", f"the audio states {sample_rate} Hz, {bound} Hz")


class _Watch:
    """Ends a clip on which decoders have spent too long; the time between blocks is not theirs."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = self._left_s = limit_s
        self._until = math.inf

    def making(self, items: Iterator[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
        """Yields `items`, and counts the time that each takes."""
        while True:
            self._until = time.monotonic() + self._left_s
            item = next(items, None)
            if item is None:
                return
            self._left_s = self._until - time.monotonic()
            self._until = math.inf
            yield item

    def check(self) -> None:
        """Raises a `ClipError` once the time is up."""
        if time.monotonic() > self._until:
            raise ClipError(
                "decode",
                "TimedOut",
                f"decoding took longer than {self._limit_s:g} s (--clip-timeout-s)",
            )


class _Part(io.RawIOBase):
    """The bytes of a file from `start` up to `end`, as a file."""

    def __init__(self, file: BinaryIO, start: int, end: int) -> None:
        self._file, self._start, self._size = file, start, end - start
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        position = offset + (0, self._at, self._size)[whence]
        if position < 0:
            raise ValueError(f"position {position} is before the start")
        self._at = position
        return position

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        content = self._file.read(max(0, min(len(buffer), self._size - self._at)))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


class _WatchedReads:
    """A file that counts how long its reads take, and ends them when the time is up.

    It has no name: ffmpeg's guess at the format would heed its suffix.
    """

    def __init__(self, file: BinaryIO, watch: _Watch) -> None:
        self._file = file
        self._check = watch.check
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        self._check()
        started = time.perf_counter()
        content = self._file.read(size)
        _spent.read_s += time.perf_counter() - started
        return content

    def __getattr__(self, name: str) -> Any:
        if name == "name":
            raise AttributeError(name)
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
        try:
            content = self._file.read(len(buffer))
        except ClipError:  # out of time; here it would only be printed, and is raised again
            return 0
        buffer[: len(content)] = content
        return len(content)

    def write(self, _: bytes) -> int:  # soundfile asks that it is there
        raise OSError("the audio is only read")


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
    # A float64 beyond float32 is infinite, and refused as such, like what is no number.
    with np.errstate(over="ignore", invalid="ignore"):
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


def _refusal(error: Exception | None) -> str:
    """A message that is the same for the same fault: no addresses, no file names."""
    if isinstance(error, IndexError):
        return "the file has no audio stream"
    if isinstance(error, AttributeError):
        return "the audio is in a codec that this build of ffmpeg does not know"
    if isinstance(error, av.error.UndefinedError):  # a number of a decoder's own
        return "the decoder gives no reason"
    text = getattr(error, "strerror", None) or str(error)
    return re.sub(r"<[^>]*>|0x[0-9a-fA-F]+", "", text).strip() or type(error).__name__
