"""The things that move through the pipeline, in the order in which they appear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

# Errors after which the audio that came before counts: it depends on the clip alone how much it is.
_PARTIAL = ("Truncated", "TooLong")


class ClipError(Exception):
    """Why one clip has no scores, or those of a part only; becomes the `error` of its row.

    `stage` is where it happened ("read" or "decode"), `type` a short stable
    name to group by, `message` one sentence without paths or memory addresses.
    """

    def __init__(self, stage: str, type: str, message: str) -> None:
        super().__init__(message)
        self.stage = stage
        self.type = type
        self.message = message

    @property
    def partial(self) -> bool:
        """Whether what was decoded before is scored all the same."""
        return self.type in _PARTIAL


def as_text(raw: str) -> str:
    """`raw` as valid Unicode: bytes that were not UTF-8 become \\xNN, lone surrogates \\uNNNN."""
    try:
        return raw.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return raw.encode("utf-8", "backslashreplace").decode("utf-8")


def unique(clip_id: str, seen: dict[str, int]) -> str:
    """`clip_id`, with `#2`, `#3`, ... where a shard names a member more than once.

    `seen` holds how often each id was given so far; the answer is added to it.
    """
    number = seen.get(clip_id, 0) + 1
    numbered = clip_id if number == 1 else f"{clip_id}#{number}"
    while number > 1 and numbered in seen:  # a member that is itself named `x#2`
        number += 1
        numbered = f"{clip_id}#{number}"
    seen[clip_id] = number
    seen.setdefault(numbered, 1)
    return numbered


def clip_id_of(shard_id: str, name: str, seen: dict[str, int]) -> str:
    """A clip's id: its shard's, and what `name_of` calls it; see `unique`."""
    return unique(f"{shard_id}/{name}", seen)


BROKEN_SHARD = "(broken shard)"  # the name of what tells where a shard broke

# Kinds of shards that are never a part of their file.
WHOLE_FILES = ("tar", "arrow", "tfrecord", "zip")


def clips_in(shard: Shard) -> int | None:
    """How many clips a shard has, where its description tells; at most so many under a limit."""
    if shard.max_clips is not None:
        return shard.max_clips
    if shard.manifest is not None:
        return shard.manifest.rows
    return len(shard.files) if shard.kind == "files" else None


def audio_bytes_in(shard: Shard) -> int:
    """Bytes of a shard's audio and what is around it; 0 of a manifest, which has none."""
    return 0 if shard.manifest is not None else shard.size_bytes


@dataclass(frozen=True)
class ManifestSlice:
    """Consecutive rows of a manifest, and how they are to be read; `transforms.manifest` does."""

    form: str
    delimiter: str  # of a table
    columns: tuple[str, ...]  # of a table
    path_column: str | None
    id_column: str | None  # this and the next: "" for none, None for the usual names
    start_column: str | None
    end_column: str | None
    root: str = ""  # what relative paths begin at
    first_row: int = 0
    rows: int = 0
    start: int = 0  # bytes, in the manifest as it is unpacked
    end: int = 0
    digest: str = ""  # XXH3 of these bytes
    text: str | None = None  # the bytes, where they cannot be found in the manifest


@dataclass(frozen=True)
class Shard:
    """A unit of work: read as one, published as one Parquet file named `id`.

    `id` depends only on what is in the shard and where, so that the same input
    has the same output name in every run.
    """

    id: str
    uri: str  # the tar, the Parquet file, the manifest, ..., or the folder of the files
    kind: Literal["tar", "parquet", "arrow", "tfrecord", "zip", "files", "manifest"]
    size_bytes: int
    # Paths relative to `uri`, for kind "files"; of a manifest, paths that its rows do not say.
    files: tuple[str, ...] = ()
    row_groups: tuple[int, int] | None = None  # first and one past the last, for kind "parquet"
    max_clips: int | None = None  # stop after so many clips (--limit)
    checksum: str | None = None  # of the file, as `storage.StoredFile` has it
    # Bytes of `files` (-1: nobody has looked), or of the file of which
    # `row_groups` or `manifest` is a part: what spares a worker the question where they are remote.
    file_sizes: tuple[int, ...] = ()
    file_checksums: tuple[str | None, ...] = ()  # of `files`
    file_metadata: tuple[str, ...] = ()  # of `files`: JSON, "" where there is none
    manifest: ManifestSlice | None = None


@dataclass(frozen=True)
class EncodedClip:
    """A clip as it lies in its shard. `audio` is open until the next clip is read."""

    member: str
    audio: BinaryIO  # seekable
    size_bytes: int
    xxh128: str  # of the encoded bytes
    metadata: dict[str, Any]
    # The part of the recording that the clip is, where a manifest cuts it; else all of it.
    start_s: float | None = None
    end_s: float | None = None
    name: str | None = None  # what a manifest calls the clip; None: it goes by `member`


@dataclass(frozen=True)
class UnreadableClip:
    """A place in a shard where a clip should be and none can be read."""

    member: str | None  # None where the shard itself is broken
    error: ClipError
    metadata: dict[str, Any]
    start_s: float | None = None  # as in `EncodedClip`
    end_s: float | None = None
    name: str | None = None


@dataclass(frozen=True)
class Chunk:
    """A piece of a clip, as long as the student hears at once, or the whole of a shorter clip."""

    start_s: float
    end_s: float
    waveform: NDArray[np.float32]  # [samples], mono, at the student's rate


@dataclass(frozen=True)
class ClipEnd:
    """Follows the last chunk of a clip and says what the clip was."""

    member: str | None
    size_bytes: int
    xxh128: str | None
    metadata: dict[str, Any]
    codec: str | None = None
    sample_rate: int | None = None
    channels: int | None = None
    duration_s: float | None = None
    peak_dbfs: float | None = None
    rms_dbfs: float | None = None
    error: ClipError | None = None
    start_s: float | None = None  # as in `EncodedClip`
    end_s: float | None = None
    name: str | None = None


@dataclass(frozen=True)
class ScoredClip:
    """A clip with the scores of its chunks pooled.

    No scores where `clip.error` is set, unless that is of a part (`ClipError.partial`).
    """

    clip: ClipEnd
    scores: NDArray[np.float32] | None  # [labels]
    embedding: NDArray[np.float32] | None  # [embedding_size], mean over the chunks
    chunks: list[tuple[float, float, NDArray[np.float32]]]  # (start_s, end_s, scores [labels])


class Named(Protocol):
    """What `name_of` needs: clips on their way, and rows of manifests, have it."""

    @property
    def member(self) -> str | None: ...  # noqa: D102

    @property
    def name(self) -> str | None: ...  # noqa: D102

    @property
    def start_s(self) -> float | None: ...  # noqa: D102

    @property
    def end_s(self) -> float | None: ...  # noqa: D102


def name_of(clip: Named) -> str:
    """What a clip is called in its shard: by its name, or its member and which part of it."""
    if clip.name is not None:
        return clip.name
    if clip.member is None:
        return BROKEN_SHARD
    if clip.start_s is None and clip.end_s is None:
        return clip.member
    end = "" if clip.end_s is None else f"{clip.end_s:.12g}"
    return f"{clip.member}[{clip.start_s or 0:.12g}-{end}]"
