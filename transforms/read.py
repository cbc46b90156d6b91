"""Reads the clips of a shard, one after the other, as they lie in it."""

from __future__ import annotations

import io
import json
import posixpath
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import closing
from typing import Any, BinaryIO, cast

import fsspec.core
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from transforms.records import ClipError, EncodedClip, Shard, UnreadableClip

AUDIO_SUFFIXES = frozenset(
    ".3gp .aac .ac3 .aif .aifc .aiff .amr .ape .au .caf .flac .m4a .m4b .mka .mkv .mov .mp2 .mp3 "
    ".mp4 .mpga .oga .ogg .opus .rf64 .snd .tta .w64 .wav .wave .webm .wma .wv".split()
)
METADATA_SUFFIXES = (".json", ".txt", ".cls")
MAX_METADATA_BYTES = 1 << 20  # a sibling file larger than this is no metadata

_BLOCK_BYTES = 1 << 20
_IN_MEMORY_BYTES = 32 << 20  # a larger encoded clip waits on disk while it is decoded
_PARQUET_ROWS = 16  # rows of a Parquet file held at a time

Clips = Iterator[EncodedClip | UnreadableClip]


def is_audio(name: str) -> bool:
    """Whether a file's last suffix is that of an audio format."""
    return posixpath.splitext(name)[1].lower() in AUDIO_SUFFIXES


def read_clips(shard: Shard) -> Clips:
    """Yields every clip of a shard, in the shard's order.

    A broken shard yields the clips before the break and then one
    `UnreadableClip` that says where it broke.

    Raises:
        OSError: the shard cannot be opened or read at all (a missing file, a
            network fault): nothing that would be the same on a second try.
    """
    if shard.kind == "files":
        yield from _read_files(shard)
        return
    fs, path = fsspec.core.url_to_fs(shard.uri)
    with fs.open(path, "rb") as stream:
        if shard.kind == "tar":
            yield from _read_tar(stream)
        else:
            yield from _read_parquet(stream, shard.row_groups)


def count_tar_clips(stream: BinaryIO, enough: int) -> int:
    """How many clips a tar gives, counting no further than `enough`."""
    count = 0
    for _ in _read_tar(stream):
        count += 1
        if count == enough:
            break
    return count


# --------------------------------------------------------------------- files


def _read_files(shard: Shard) -> Clips:
    fs, root = fsspec.core.url_to_fs(shard.uri)
    for name in shard.files:
        member = _text(name)
        try:
            with fs.open(posixpath.join(root, name), "rb") as stream:
                audio, digest, size = _seekable(stream, member)
                yield EncodedClip(member, audio, size, digest, {})
        except FileNotFoundError:
            yield UnreadableClip(member, ClipError("read", "FileNotFound", "the file is gone"), {})
        except (PermissionError, IsADirectoryError) as error:
            message = f"the file cannot be opened: {error.strerror}"
            yield UnreadableClip(member, ClipError("read", type(error).__name__, message), {})


# ---------------------------------------------------------------------- tars


class _StrictTarInfo(tarfile.TarInfo):
    """Makes a damaged header an error.

    tarfile takes a damaged or missing header anywhere but at the start for the
    end of the archive, and stops without a word.
    """

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _StrictTarInfo:
        try:
            return cast(_StrictTarInfo, super().fromtarfile(tar))
        except tarfile.EOFHeaderError:
            raise  # the zero block that ends an archive
        except tarfile.HeaderError as error:
            reason = {
                "EmptyHeaderError": "it ends without tar's end marker",
                "TruncatedHeaderError": "it ends inside a header",
            }.get(type(error).__name__, "a header is damaged")
            raise tarfile.ReadError(reason) from error


def _read_tar(stream: BinaryIO) -> Clips:
    """Clips of a WebDataset tar: members with one key make a sample, each audio member a clip.

    The key is the member's folder and its base name up to the first dot.
    """
    sample_key: str | None = None
    audio: list[tuple[str, BinaryIO, str, int]] = []
    metadata: dict[str, Any] = {}
    members, reading, name = 0, False, None

    def sample() -> Clips:
        for member, file, digest, size in audio:
            with closing(file):
                yield EncodedClip(member, file, size, digest, metadata)

    try:
        with tarfile.open(
            fileobj=stream, mode="r|*", tarinfo=_StrictTarInfo, errors="surrogateescape"
        ) as tar:
            for info in tar:
                members += 1
                if not info.isreg():
                    continue
                name = _text(info.name)
                key = posixpath.join(
                    posixpath.dirname(name), posixpath.basename(name).partition(".")[0]
                )
                if key != sample_key:
                    yield from sample()
                    sample_key, audio, metadata = key, [], {}
                suffix = posixpath.splitext(name)[1].lower()
                reading = is_audio(name)
                if reading:
                    content = cast(BinaryIO, tar.extractfile(info))
                    audio.append((name, *_spool(content)))
                elif suffix in METADATA_SUFFIXES and info.size <= MAX_METADATA_BYTES:
                    content = cast(BinaryIO, tar.extractfile(info))
                    metadata.update(_sibling(suffix, content.read()))
                reading = False
    except (tarfile.TarError, EOFError, zlib.error) as error:
        yield from sample()
        place = f"after {members} members" if not reading else f"inside member {members}"
        yield UnreadableClip(
            name if reading else None,
            ClipError("read", "BrokenShard", f"the tar is broken {place}: {_reason(error)}"),
            {},
        )
    else:
        yield from sample()


def _reason(error: Exception) -> str:
    text = str(error)
    if "unexpected end of data" in text:
        return "it ends inside a member"
    return text or type(error).__name__


def _sibling(suffix: str, content: bytes) -> dict[str, Any]:
    """Metadata of a sample: the entries of a `.json` object; the text of `.txt` and `.cls`."""
    text = content.decode("utf-8", "replace")
    if suffix == ".json":
        try:
            parsed = json.loads(text)
        except ValueError:
            return {"json": text}
        return parsed if isinstance(parsed, dict) else {"json": parsed}
    return {suffix[1:]: text.strip()}


# ------------------------------------------------------------------- Parquet


def audio_column(schema: pa.Schema) -> str | None:
    """The column that holds encoded audio as Hugging Face stores it: struct<bytes, path>.

    Of several, the one named `audio`, else the first.
    """
    columns = [
        field.name
        for field in schema
        if pa.types.is_struct(field.type)
        and field.type.get_field_index("bytes") >= 0
        and (
            pa.types.is_binary(field.type.field("bytes").type)
            or pa.types.is_large_binary(field.type.field("bytes").type)
        )
    ]
    return "audio" if "audio" in columns else next(iter(columns), None)


def _read_parquet(stream: BinaryIO, row_groups: tuple[int, int] | None) -> Clips:
    row = 0
    try:
        parquet = pq.ParquetFile(stream)
        column = audio_column(parquet.schema_arrow)
        if column is None:
            raise pa.ArrowInvalid("it has no audio column")
        first, end = row_groups or (0, parquet.metadata.num_row_groups)
        row = sum(parquet.metadata.row_group(group).num_rows for group in range(first))
        batches = parquet.iter_batches(batch_size=_PARQUET_ROWS, row_groups=range(first, end))
        for batch in batches:
            for record in batch.to_pylist():
                yield _parquet_clip(row, record, column)
                row += 1
    # pyarrow raises OSError for damaged pages too, then without an errno.
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        message = f"the Parquet file is broken at row {row}: {str(error).splitlines()[0]}"
        yield UnreadableClip(None, ClipError("read", "BrokenShard", message), {})


def _parquet_clip(row: int, record: dict[str, Any], column: str) -> EncodedClip | UnreadableClip:
    cell = record.pop(column) or {}
    member = str(cell.get("path") or f"row-{row:08d}")
    metadata = {name: value for name, value in record.items() if not _holds_bytes(value)}
    content = cell.get("bytes")
    if content is None:
        return UnreadableClip(
            member, ClipError("read", "NoBytes", "the row holds no audio bytes"), metadata
        )
    return EncodedClip(
        member, io.BytesIO(content), len(content), xxhash.xxh128_hexdigest(content), metadata
    )


def _holds_bytes(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_holds_bytes(entry) for entry in value.values())
    return isinstance(value, bytes)


# -------------------------------------------------------------------- shared


def _text(name: str) -> str:
    """A member's name as valid Unicode; bytes that are not UTF-8 become \\xNN."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _seekable(stream: BinaryIO, member: str) -> tuple[BinaryIO, str, int]:
    """(a seekable file at its start, xxh128, bytes) of an open file, copied only if remote."""
    if not hasattr(stream, "fileno"):
        return _spool(stream)
    digest, size = xxhash.xxh128(), 0
    while block := stream.read(_BLOCK_BYTES):
        digest.update(block)
        size += len(block)
    stream.seek(0)
    return stream, digest.hexdigest(), size


def _spool(stream: BinaryIO) -> tuple[BinaryIO, str, int]:
    """(a seekable copy at its start, xxh128, bytes); large ones go to a temporary file."""
    digest, size = xxhash.xxh128(), 0
    copy = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES)  # noqa: SIM115
    while block := stream.read(_BLOCK_BYTES):
        digest.update(block)
        size += len(block)
        copy.write(block)
    copy.seek(0)
    return cast(BinaryIO, copy), digest.hexdigest(), size
