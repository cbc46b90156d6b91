"""Draws clips at random from shards that are too many to read, so that all stand for the rest."""

from __future__ import annotations

import dataclasses
import heapq
import io
import random
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from transforms.opening import open_shard
from transforms.read import read_clips
from transforms.read_table import is_damage
from transforms.read_tar import read_tar_from
from transforms.records import EncodedClip, Shard, UnreadableClip, clips_in
from transforms.storage import DEFAULT_ACCESS, Access

_PLAIN_TAR = ".tar"  # a compressed one cannot be entered in the middle
_TAR_BLOCK_BYTES = 512
_SEARCHED_BYTES = 4 << 20  # for the next header; a longer member is passed over from the start
_IN_MEMORY_BYTES = 4 << 20  # a larger clip waits on disk
_FEWEST_CLIPS = 2  # of a part, else it says nothing of how far clips are apart
_FILES_A_PART = 24  # loose files, each of which is opened on its own


@dataclass(frozen=True)
class Part:
    """What was read of a shard.

    Attributes:
        kind: of the shard.
        extent: how much of the shard it is, in what `extent_of` measures it in.
        clips: how many clips there are in that.
        audio_bytes: encoded bytes of these clips.
        read_s: what reading them took, hashing included, without opening the shard.
        whole: whether it is all of the shard.
    """

    kind: str
    extent: float
    clips: int
    audio_bytes: int
    read_s: float
    whole: bool


@dataclass(frozen=True)
class Taken:
    """A clip that was kept, and the place among the parts of the one that it is from."""

    clip: EncodedClip | UnreadableClip  # its audio is a copy, at its start
    part: int


@dataclass
class Reservoir:
    """Keeps some of the clips that come by, each as likely as any other."""

    size: int
    chance: random.Random
    seen: int = 0
    kept: list[Taken] = field(default_factory=list)

    def offer(self, clip: EncodedClip | UnreadableClip, part: int) -> None:
        """Takes a copy of the clip, or not."""
        self.seen += 1
        if len(self.kept) < self.size:
            self.kept.append(Taken(_copy(clip), part))
        elif (place := self.chance.randrange(self.seen)) < self.size:
            self.kept[place] = Taken(_copy(clip), part)


def extent_of(shard: Shard) -> float:
    """How large a shard is: in clips where they are known (`clips_in`), else in bytes."""
    clips = clips_in(shard)
    return shard.size_bytes if clips is None else clips


def draw_shards(shards: Iterable[Shard], count: int, seed: int) -> list[Shard]:
    """`count` shards at random, larger ones more often, none twice; all, where there are no more.

    One pass, in memory of `count` shards (Efraimidis and Spirakis, 2006). They come in the
    order in which they were drawn: the first few are a smaller sample.
    """
    chance = random.Random(seed)
    drawn: list[tuple[float, int, Shard]] = []
    for number, shard in enumerate(shards):
        extent = extent_of(shard)
        key = chance.random() ** (1 / extent) if extent > 0 else 0.0
        item = key, number, shard
        if len(drawn) < count:
            heapq.heappush(drawn, item)
        elif key > drawn[0][0]:
            heapq.heapreplace(drawn, item)
    return [shard for _, _, shard in sorted(drawn, reverse=True)]


def read_part(
    shard: Shard,
    number: int,
    reservoir: Reservoir,
    *,
    max_bytes: int | None,
    until: float,
    access: Access = DEFAULT_ACCESS,
) -> Part | None:
    """Reads all of a shard, or a part of it that begins anywhere.

    Args:
        shard: what to read.
        number: of the part, for `Taken.part`.
        reservoir: is offered each clip.
        max_bytes: how much of the shard to read, about; None: all of it.
        until: when to stop whatever was read (`time.monotonic`).
        access: how remote storage is used.

    Returns:
        None where too little could be read to tell anything.

    Raises:
        OSError: it cannot be read.
    """
    if max_bytes is None:
        return _read(_Reading(shard, read_clips(shard, access)), number, reservoir, None, until)
    if shard.kind == "files" and shard.max_clips is None:
        return _read_files(shard, number, reservoir, until, access)
    if shard.kind == "parquet" and shard.max_clips is None:
        return _read_row_group(shard, number, reservoir, max_bytes, until, access)
    if shard.kind == "tar" and shard.max_clips is None and shard.size_bytes > max_bytes:
        return _read_within_tar(shard, number, reservoir, max_bytes, until, access)
    # A manifest's own bytes say nothing of those of its audio.
    limit = max_bytes if shard.manifest is not None or shard.size_bytes > max_bytes else None
    return _read(_Reading(shard, read_clips(shard, access)), number, reservoir, limit, until)


@dataclass
class _Reading:
    """Clips of a shard, and where in it they end."""

    shard: Shard
    clips: Iterator[EncodedClip | UnreadableClip]
    stream: BinaryIO | None = None  # tells how far it was read


def _read(
    reading: _Reading,
    number: int,
    reservoir: Reservoir,
    max_bytes: int | None,
    until: float,
) -> Part | None:
    """All clips, or those of the first `max_bytes`."""
    shard = reading.shard
    clips = audio_bytes = 0
    places: list[int] = []  # in the stream, after each clip
    complete = True
    started = time.perf_counter()
    with closing(islice_closing(reading.clips, shard.max_clips)) as source:
        for clip in source:
            clips += 1
            audio_bytes += clip.size_bytes if isinstance(clip, EncodedClip) else 0
            if reading.stream is not None:
                places.append(reading.stream.tell())
            reservoir.offer(clip, number)
            gone = places[-1] - places[0] if places else audio_bytes
            enough = max_bytes is not None and gone >= max_bytes and clips > _FEWEST_CLIPS
            if enough or time.monotonic() > until:
                complete = False
                break
    read_s = time.perf_counter() - started
    whole = complete and reading.stream is None
    in_clips = clips_in(shard) is not None
    if whole or in_clips:
        # What extends as far as its clips.
        extent: float = clips if in_clips else shard.size_bytes
    elif places:
        # Each place lies a little behind its clip, the first as much as the last.
        if len(places) < _FEWEST_CLIPS:
            return None
        extent = (places[-1] - places[0]) * clips / (clips - 1)
    else:
        extent = float(audio_bytes)  # what is around audio is little
    if not extent or (not clips and not whole):
        return None
    return Part(shard.kind, extent, clips, audio_bytes, read_s, whole)


def islice_closing(
    clips: Iterator[EncodedClip | UnreadableClip], count: int | None
) -> Iterator[EncodedClip | UnreadableClip]:
    """The first `count` clips; closes their source when it is closed itself."""
    try:
        yield from islice(clips, count)
    finally:
        if hasattr(clips, "close"):
            clips.close()


def _read_files(
    shard: Shard, number: int, reservoir: Reservoir, until: float, access: Access
) -> Part | None:
    """Some files of a shard of loose files."""
    if len(shard.files) <= _FILES_A_PART:
        return _read(_Reading(shard, read_clips(shard, access)), number, reservoir, None, until)
    chosen = sorted(reservoir.chance.sample(range(len(shard.files)), _FILES_A_PART))

    def of(values: tuple[object, ...]) -> tuple[object, ...]:
        return tuple(values[place] for place in chosen) if values else ()

    some = dataclasses.replace(
        shard,
        files=of(shard.files),
        file_sizes=of(shard.file_sizes),
        file_checksums=of(shard.file_checksums),
        file_metadata=of(shard.file_metadata),
    )
    part = _read(_Reading(some, read_clips(some, access)), number, reservoir, None, until)
    return part and dataclasses.replace(part, whole=False)


def _read_row_group(
    shard: Shard, number: int, reservoir: Reservoir, max_bytes: int, until: float, access: Access
) -> Part | None:
    """A row group of a Parquet file, or the beginning of a large one."""
    with open_shard(shard, access) as stream:
        try:
            footer = pq.ParquetFile(stream, pre_buffer=False).metadata
        except (pa.ArrowException, OSError) as error:
            if not is_damage(error):
                raise
            # What is damaged is one row that says so: `read_clips` makes it.
            return _read(_Reading(shard, read_clips(shard, access)), number, reservoir, None, until)
    first, end = shard.row_groups or (0, footer.num_row_groups)
    rows = [footer.row_group(group).num_rows for group in range(first, end)]
    if not sum(rows):
        return Part(shard.kind, shard.size_bytes, 0, 0, 0.0, True)
    group = reservoir.chance.choices(range(first, end), rows)[0]
    one = dataclasses.replace(shard, row_groups=(group, group + 1))
    part = _read(_Reading(one, read_clips(one, access)), number, reservoir, max_bytes, until)
    if part is None:
        return None
    # The footer knows the rows, so that a part says no more than what is in them.
    return dataclasses.replace(
        part, extent=shard.size_bytes * part.clips / sum(rows), whole=len(rows) == 1 and part.whole
    )


def _read_within_tar(
    shard: Shard, number: int, reservoir: Reservoir, max_bytes: int, until: float, access: Access
) -> Part | None:
    """Clips from a place anywhere in a tar on; from the first, where there are too few behind it."""
    start = 0
    if shard.uri.lower().endswith(_PLAIN_TAR):
        parts = -(-shard.size_bytes // max_bytes)
        start = reservoir.chance.randrange(parts) * max_bytes // _TAR_BLOCK_BYTES * _TAR_BLOCK_BYTES
    for place in (start, 0) if start else (0,):
        with open_shard(shard, access) as stream:
            header = _next_header(stream, place) if place else 0
            if header is None:
                continue
            stream.seek(header)
            reading = _Reading(shard, read_tar_from(stream), stream)
            part = _read(reading, number, reservoir, max_bytes, until)
        if part is not None:
            return part
    return None


def _next_header(stream: BinaryIO, start: int) -> int | None:
    """Where the first header of a tar's member lies, from `start` on.

    A header has "ustar" at its 257th byte and a checksum (POSIX.1-1988).
    """
    stream.seek(start)
    place = start
    while place < start + _SEARCHED_BYTES:
        block = stream.read(_TAR_BLOCK_BYTES)
        if len(block) < _TAR_BLOCK_BYTES:
            return None
        if block[257:262] == b"ustar" and block[156:157] in b"0\0" and _is_header(block):
            return place
        place += _TAR_BLOCK_BYTES
    return None


def _is_header(block: bytes) -> bool:
    try:
        stated = int(block[148:156].split(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        return False
    return stated == sum(block) - sum(block[148:156]) + 8 * ord(" ")


def _copy(clip: EncodedClip | UnreadableClip) -> EncodedClip | UnreadableClip:
    """The clip with audio of its own: that of a reader is gone with the next clip."""
    if isinstance(clip, UnreadableClip):
        return clip
    audio: BinaryIO = io.BytesIO()
    if clip.size_bytes > _IN_MEMORY_BYTES:
        audio = tempfile.TemporaryFile()  # type: ignore[assignment]  # noqa: SIM115
    clip.audio.seek(0)
    while block := clip.audio.read(1 << 20):
        audio.write(block)
    audio.seek(0)
    clip.audio.seek(0)
    return dataclasses.replace(clip, audio=audio)
