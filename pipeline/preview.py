"""A clip as a page can hold it: a small MP3 and a picture of its spectrum."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from transforms.decode import AudioDecoder
from transforms.find import find_clips
from transforms.records import ClipError, EncodedClip
from transforms.storage import DEFAULT_ACCESS, Access

SAMPLE_RATE = 16_000  # Hz
MP3_BITS_PER_S = 32_000
PIECE_S = 10.0
LOOKED_S = 600.0  # of a clip without chunk scores, in which the loudest piece is looked for
FETCH_S = 120.0  # no shard is opened after that

# Not Opus in Ogg, half the size: Safari plays it only since 2025.
_BANDS, _COLUMNS, _COLOURS = 64, 256, 64
_RANGE_DB = 70.0


@dataclass(frozen=True)
class Wanted:
    """A clip that is to be seen and heard."""

    shard: str
    member: str
    xxh128: str | None
    start_s: float | None = None  # the part of the recording that the clip is; None: from its start
    end_s: float | None = None
    best_s: float | None = None  # where in the clip the piece begins; None: where it is loudest
    best_end_s: float | None = None


@dataclass(frozen=True)
class Preview:
    """A piece of a clip."""

    mp3: bytes
    png: bytes
    start_s: float  # in the clip
    end_s: float


@dataclass
class Previews:
    """What was found of the clips that were wanted."""

    found: dict[Wanted, Preview] = field(default_factory=dict)
    absent: dict[Wanted, str] = field(default_factory=dict)  # why


def previews(
    wanted: Sequence[Wanted], access: Access = DEFAULT_ACCESS, limit_s: float = FETCH_S
) -> Previews:
    """Fetches clips from their shards, shard by shard. What is gone is told, and is no error."""
    result = Previews()
    by_shard: dict[str, list[Wanted]] = {}
    for clip in wanted:
        by_shard.setdefault(clip.shard, []).append(clip)
    started = monotonic()
    for shard, clips in by_shard.items():
        if monotonic() - started > limit_s:
            why = f"not fetched: the clips before it took {limit_s:.0f} s"
            result.absent |= dict.fromkeys(clips, why)
            continue
        why = "its source no longer holds it"
        changed: set[Wanted] = set()
        try:
            for encoded in find_clips(shard, {clip.member for clip in clips}, access):
                of_member = [clip for clip in clips if clip.member == encoded.member]
                same = [c for c in of_member if c.xxh128 in (None, encoded.xxh128)]
                changed.update(clip for clip in of_member if clip not in same)
                for clip in same:
                    encoded.audio.seek(0)
                    try:
                        result.found[clip] = preview(encoded, clip)
                    except ClipError as error:
                        result.absent[clip] = f"not decoded: {error.message}"
                if all(clip in result.found or clip in result.absent for clip in clips):
                    break
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or (str(error).splitlines() or [""])[0]
            why = f"its source cannot be read: {reason or type(error).__name__}"
        for clip in clips:
            if clip not in result.found:
                said = "its source holds other audio by now" if clip in changed else why
                result.absent.setdefault(clip, said)
    return result


def preview(encoded: EncodedClip, wanted: Wanted) -> Preview:
    """Decodes the piece of a clip that is to be heard.

    Raises:
        ClipError: the audio cannot be decoded.
    """
    first_s = wanted.start_s or 0.0
    from_s = first_s + (wanted.best_s or 0.0)
    looked_s = LOOKED_S
    if wanted.best_s is not None:
        until = wanted.best_s + PIECE_S if wanted.best_end_s is None else wanted.best_end_s
        looked_s = min(PIECE_S + 0.5, until - wanted.best_s)
    until_s = min(from_s + looked_s, wanted.end_s if wanted.end_s is not None else float("inf"))
    samples = _part(
        AudioDecoder(encoded.audio).mono(SAMPLE_RATE),
        round(from_s * SAMPLE_RATE),
        None if until_s == float("inf") else round(until_s * SAMPLE_RATE),
    )
    start, piece = 0, samples
    if wanted.best_s is None:
        start = _loudest(samples)
        piece = samples[start : start + round(PIECE_S * SAMPLE_RATE)]
    if not len(piece):
        raise ClipError("decode", "NoAudio", "no audio is there")
    start_s = (wanted.best_s or 0.0) + start / SAMPLE_RATE
    return Preview(as_mp3(piece), spectrogram(piece), start_s, start_s + len(piece) / SAMPLE_RATE)


def _part(blocks: Iterable[NDArray[np.float32]], start: int, end: int | None) -> NDArray[Any]:
    """Samples `start` to `end`; what came before a fault, if that is not nothing."""
    kept: list[NDArray[np.float32]] = []
    at = 0
    try:
        for block in blocks:
            stop = at + len(block)
            if stop > start:
                kept.append(block[max(0, start - at) : None if end is None else max(0, end - at)])
            at = stop
            if end is not None and at >= end:
                break
    except ClipError:
        if not kept:
            raise
    return np.concatenate(kept) if kept else np.zeros(0, np.float32)


def _loudest(samples: NDArray[np.float32]) -> int:
    """Where the loudest piece begins, on a grid of half a second."""
    length, step = round(PIECE_S * SAMPLE_RATE), SAMPLE_RATE // 2
    if len(samples) <= length:
        return 0
    power = np.concatenate([[0.0], np.cumsum(np.square(samples, dtype=np.float64))])
    starts = np.arange(0, len(samples) - length + 1, step)
    return int(starts[np.argmax(power[starts + length] - power[starts])])


def as_mp3(samples: NDArray[np.float32]) -> bytes:
    """Mono float32 at `SAMPLE_RATE` as MP3."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp3") as container:
        stream = container.add_stream("libmp3lame", rate=SAMPLE_RATE, layout="mono")
        stream.bit_rate = MP3_BITS_PER_S
        stream.options = {"compression_level": "7"}  # LAME's faster search: half the time
        clipped = np.ascontiguousarray(np.clip(samples, -1, 1)[None], np.float32)
        frame = av.AudioFrame.from_ndarray(clipped, format="fltp", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    return file.getvalue()


def spectrogram(samples: NDArray[np.float32]) -> bytes:
    """PNG of 64 mel bands from 0 to 8 kHz, `_RANGE_DB` below the loudest; time from left to right."""
    from matplotlib import colormaps
    from PIL import Image

    frame = 512
    padded = np.pad(samples, (frame // 2, frame))
    hop = max(80, len(samples) // _COLUMNS)
    starts = np.arange(0, max(1, len(samples)), hop)
    frames = np.lib.stride_tricks.sliding_window_view(padded, frame)[starts]
    power = np.abs(np.fft.rfft(frames * np.hanning(frame).astype(np.float32), axis=1)) ** 2
    level = 10 * np.log10(power @ _mel_bands(frame) + 1e-10)
    top = max(float(level.max()), -60.0)  # what is silent is not made to look loud
    shade = np.clip((level - top) / _RANGE_DB + 1, 0, 1)
    image = Image.fromarray((shade.T[::-1] * (_COLOURS - 1)).astype(np.uint8), "P")
    palette = (colormaps["magma"](np.linspace(0, 1, _COLOURS))[:, :3] * 255).astype(np.uint8)
    image.putpalette(palette.tobytes())
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def _mel_bands(frame: int) -> NDArray[np.float64]:
    """[frame // 2 + 1, bands] triangles that are even in mel, as HTK has it."""
    edges = 700 * (np.exp(np.linspace(0, np.log1p(SAMPLE_RATE / 2 / 700), _BANDS + 2)) - 1)
    bins = np.fft.rfftfreq(frame, 1 / SAMPLE_RATE)[:, None]
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    # The lowest triangles are narrower than a bin.
    width = SAMPLE_RATE / frame
    rising = (bins - low) / np.maximum(middle - low, width)
    falling = (high - bins) / np.maximum(high - middle, width)
    bands: NDArray[np.float64] = np.clip(np.minimum(rising, falling), 0, None)
    empty = np.flatnonzero(bands.sum(axis=0) == 0)
    nearest = np.round(middle / width).astype(int)
    bands[nearest[empty], empty] = 1.0
    return bands / np.maximum(bands.sum(axis=0), 1e-9)
