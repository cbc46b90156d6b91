"""Reads the clips of a shard, one after the other, as they lie in it."""

from __future__ import annotations

import gzip
import io
import json
import math
import posixpath
import sys
import tarfile
import tempfile
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from typing import Any, BinaryIO, Literal, cast

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from transforms.meter import Meter
from transforms.records import ClipError, EncodedClip, Shard, UnreadableClip, as_text
from transforms.storage import DEFAULT_ACCESS, Access, is_local, open_file_system, open_remote

AUDIO_SUFFIXES = frozenset(
    ".3gp .aac .ac3 .aif .aifc .aiff .amr .ape .au .caf .flac .m4a .m4b .mka .mkv .mov .mp2 .mp3 "
    ".mp4 .mpga .oga .ogg .opus .rf64 .snd .tta .w64 .wav .wave .webm .wma .wv".split()
)
METADATA_SUFFIXES = (".json", ".txt", ".cls")
MAX_METADATA_BYTES = 1 << 20  # a sibling file larger than this is no metadata

_BLOCK_BYTES = 1 << 20
_IN_MEMORY_BYTES = 32 << 20  # a larger encoded clip waits on disk while it is decoded
_FILES_AHEAD = 8  # remote files fetched at a time, in memory or on disk as `_IN_MEMORY_BYTES` says
_PARQUET_ROWS = 16  # rows of a Parquet file held at a time
_MAX_SAMPLE_CLIPS = 16  # clips of one key held while their metadata may still come

Clips = Iterator[EncodedClip | UnreadableClip]


def is_audio(name: str) -> bool:
    """Whether a file's last suffix is that of an audio format; hidden files are none."""
    hidden = posixpath.basename(name).startswith(".")
    return not hidden and posixpath.splitext(name)[1].lower() in AUDIO_SUFFIXES


def read_clips(shard: Shard, access: Access = DEFAULT_ACCESS, meter: Meter | None = None) -> Clips:
    """Yields every clip of a shard, in the shard's order.

    A broken shard yields the clips before the break and then one
    `UnreadableClip` that says where it broke.

    Args:
        shard: what to read.
        access: how remote storage is used.
        meter: counts `read_retries`.

    Raises:
        OSError: the shard cannot be opened or read at all (a missing file, a
            network fault that stays): nothing that would be the same on a second try.
    """
    if shard.kind == "files":
        local = is_local(shard.uri)
        yield from _read_files(shard) if local else _read_remote_files(shard, access, meter)
        return
    with open_shard(shard, access, meter) as stream:
        if shard.kind == "tar":
            yield from _read_tar(stream)
        else:
            yield from _read_parquet(stream, shard.row_groups)


def open_shard(
    shard: Shard, access: Access = DEFAULT_ACCESS, meter: Meter | None = None
) -> BinaryIO:
    """The tar or Parquet file of a shard, open for reading.

    Raises:
        OSError: it cannot be opened.
    """
    fs, path = open_file_system(shard.uri, access)
    if is_local(shard.uri):
        return cast(BinaryIO, fs.open(path, "rb"))
    size = shard.file_sizes[0] if shard.file_sizes else shard.size_bytes
    in_order = shard.kind == "tar"
    return open_remote(fs, path, size, checksum=shard.checksum, in_order=in_order, meter=meter)


def count_tar_clips(stream: BinaryIO, enough: int) -> int:
    """How many clips a tar gives, counting no further than `enough`."""
    return sum(1 for _ in islice(_read_tar(stream), enough))


def read_tar_from(stream: BinaryIO) -> Clips:
    """The clips of a tar from the header of a member on, at which an open file stands."""
    start = stream.tell()
    return _read_tar(cast(BinaryIO, _From(stream, start)))


class _From(io.RawIOBase):
    """A file from a place on, which is its beginning."""

    def __init__(self, stream: BinaryIO, start: int) -> None:
        self._stream, self._start = stream, start

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As any file's."""
        offset += self._start if whence == io.SEEK_SET else 0
        return self._stream.seek(offset, whence) - self._start

    def read(self, size: int = -1) -> bytes:
        """As any file's."""
        return self._stream.read(size)


# --------------------------------------------------------------------- files


def _read_files(shard: Shard) -> Clips:
    fs, root = open_file_system(shard.uri)
    for name in shard.files:
        member = as_text(name)
        try:
            with fs.open(posixpath.join(root, name), "rb") as stream:
                audio, digest, size = _seekable(stream)
                yield EncodedClip(member, audio, size, digest, {})
        except FileNotFoundError:
            yield UnreadableClip(member, ClipError("read", "FileNotFound", "the file is gone"), {})
        except (PermissionError, IsADirectoryError) as error:
            message = f"the file cannot be opened: {error.strerror}"
            yield UnreadableClip(member, ClipError("read", type(error).__name__, message), {})


def _read_remote_files(shard: Shard, access: Access, meter: Meter | None) -> Clips:
    """As `_read_files`, with a few small files on their way at a time.

    Each costs a round trip, which is longer than its decoding takes.
    """
    fs, root = open_file_system(shard.uri, access)

    def fetch(name: str, size: int, checksum: str | None) -> tuple[BinaryIO, str, int]:
        path = f"{root.rstrip('/')}/{name}"
        with open_remote(fs, path, size, checksum=checksum, in_order=True, meter=meter) as stream:
            return _spool(stream)

    coming: deque[tuple[str, Future[tuple[BinaryIO, str, int]]]] = deque()
    checksums = shard.file_checksums or (None,) * len(shard.files)
    left = iter(zip(shard.files, shard.file_sizes, checksums, strict=True))
    with ThreadPoolExecutor(_FILES_AHEAD, "earmark-fetch") as pool:
        try:
            while True:
                for name, size, checksum in islice(left, _FILES_AHEAD - len(coming)):
                    coming.append((name, pool.submit(fetch, name, size, checksum)))
                if not coming:
                    return
                name, fetched = coming.popleft()
                member = as_text(name)
                try:
                    audio, digest, size = fetched.result()
                except FileNotFoundError:
                    error = ClipError("read", "FileNotFound", "the file is gone")
                    yield UnreadableClip(member, error, {})
                    continue
                with closing(audio):
                    yield EncodedClip(member, audio, size, digest, {})
        finally:
            for _, fetched in coming:
                fetched.cancel()


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
        except (ValueError, OverflowError) as error:  # numbers in extended headers
            raise tarfile.ReadError("a header is damaged") from error


def _read_tar(stream: BinaryIO) -> Clips:
    """Clips of a WebDataset tar: members with one key make a sample, each audio member a clip.

    The key is the member's folder and its base name up to the first dot.
    """
    sample = _Sample("")
    members, reading, name = 0, False, None
    plain, mode = _uncompressed(stream)
    try:
        with tarfile.open(
            fileobj=plain, mode=mode, tarinfo=_StrictTarInfo, errors="surrogateescape"
        ) as tar:
            for info in tar:
                members += 1
                name = as_text(info.name)
                if key_of(name) != sample.key:
                    yield from sample.take_all()
                    sample = _Sample(key_of(name))
                reading = is_audio(name)
                if info.issym() or info.islnk():
                    if reading:
                        target = as_text(info.linkname)
                        message = (
                            f"the member is a link to {target!r}; links in tars are not followed"
                        )
                        yield UnreadableClip(name, ClipError("read", "Link", message), {})
                elif info.isreg() and reading:
                    sample.add_audio(name, *_spool(cast(BinaryIO, tar.extractfile(info))))
                    yield from sample.take_surplus()
                elif info.isreg() and _is_metadata(name) and info.size <= MAX_METADATA_BYTES:
                    content = cast(BinaryIO, tar.extractfile(info))
                    sample.add_metadata(name, content.read())
                reading = False
        while plain.read(_BLOCK_BYTES):  # to the end, where gzip keeps its checksum
            pass
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield from sample.take_all()
        # To the end, where a remote file's checksum is compared: what broke may be the way here.
        while stream.read(_BLOCK_BYTES):
            pass
        place = f"inside member {members}" if reading else f"after {members} members"
        yield UnreadableClip(
            name if reading else None,
            ClipError("read", "BrokenShard", f"the tar is broken {place}: {_reason(error)}"),
            {},
        )
    else:
        yield from sample.take_all()


def key_of(name: str) -> str:
    """The key of a member: its folder, and its base name up to the first dot."""
    return posixpath.join(posixpath.dirname(name), posixpath.basename(name).partition(".")[0])


class _Sample:
    """The members of a tar that share a key, until the next key comes.

    Metadata may stand before or after its audio. Where the names have dots beyond
    the key (`a_0.5.wav`, `a_0.5.json`, `a_1.5.wav`, ...), metadata goes to the
    audio of the same stem; else to all audio of the sample.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._audio: list[tuple[str, BinaryIO, str, int]] = []
        self._stems: set[str] = set()
        self._metadata: dict[str, dict[str, Any]] = {}

    def add_audio(self, member: str, file: BinaryIO, digest: str, size: int) -> None:
        self._audio.append((member, file, digest, size))
        self._stems.add(posixpath.splitext(member)[0])

    def add_metadata(self, member: str, content: bytes) -> None:
        stem, suffix = posixpath.splitext(member)
        self._metadata.setdefault(stem, {}).update(_sibling(suffix.lower(), content))

    def take_all(self) -> Clips:
        """The clips; none is left."""
        return self._take(len(self._audio))

    def take_surplus(self) -> Clips:
        """All but the last clip where there are many: names with a dot early may all share a key."""
        return self._take(len(self._audio) - 1 if len(self._audio) >= _MAX_SAMPLE_CLIPS else 0)

    def _take(self, count: int) -> Clips:
        taken, self._audio = self._audio[:count], self._audio[count:]
        for member, file, digest, size in taken:
            metadata: dict[str, Any] = {}
            own = posixpath.splitext(member)[0]
            for stem, entries in self._metadata.items():
                if stem == own or stem not in self._stems:
                    metadata.update(entries)
            with closing(file):
                yield EncodedClip(member, file, size, digest, metadata)


class _Gzip(gzip.GzipFile):
    """Gives what can be unpacked of a gzip that is cut, before it raises EOFError."""

    def read(self, size: int | None = -1) -> bytes:
        pieces: list[bytes] = []
        left = sys.maxsize if size is None or size < 0 else size
        while left > 0:
            try:
                piece = self.read1(min(left, _BLOCK_BYTES))
            except EOFError:
                if not pieces:
                    raise
                break
            if not piece:
                break
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)


def _uncompressed(stream: BinaryIO) -> tuple[BinaryIO, Literal["r|", "r|*"]]:
    """The stream and tarfile's mode for it. gzip is unpacked here: tarfile reads only the
    first member of a concatenated one, and checks no checksum."""
    magic = stream.read(2)
    stream.seek(0)
    if magic == b"\x1f\x8b":
        return cast(BinaryIO, _Gzip(fileobj=stream)), "r|"
    return stream, "r|*"


def _reason(error: Exception) -> str:
    text = str(error)
    if "unexpected end of data" in text:
        return "it ends inside a member"
    return text or type(error).__name__


def _is_metadata(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in METADATA_SUFFIXES


def _sibling(suffix: str, content: bytes) -> dict[str, Any]:
    """Metadata of a sample: the entries of a `.json` object; the text of `.txt` and `.cls`."""
    text = content.decode("utf-8", "replace")
    if suffix == ".json":
        try:
            parsed = json.loads(text, parse_constant=lambda _: None)  # NaN is no JSON
        except (ValueError, RecursionError):
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


def is_damage(error: Exception) -> bool:
    """Whether pyarrow failed over the content of a file, rather than over reaching it.

    For damaged pages and footers it raises OSError too, then without an errno.
    """
    return isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None)


def _read_parquet(stream: BinaryIO, row_groups: tuple[int, int] | None) -> Clips:
    """Clips row by row. A damaged row group is one `UnreadableClip`; the next ones are read."""
    try:
        # Arrow's threads must not hold a Python file: one could abort the process as it ends.
        parquet = pq.ParquetFile(stream, pre_buffer=False)
        column = audio_column(parquet.schema_arrow)
        if column is None:
            raise pa.ArrowInvalid("it has no audio column")
    except (pa.ArrowException, OSError) as error:
        if not is_damage(error):
            raise
        yield _broken_parquet("the Parquet file is broken", error)
        return
    rows = [parquet.metadata.row_group(g).num_rows for g in range(parquet.metadata.num_row_groups)]
    first, end = row_groups or (0, len(rows))
    for group in range(first, end):
        row = sum(rows[:group])
        try:
            for batch in parquet.iter_batches(
                batch_size=_PARQUET_ROWS, row_groups=[group], use_threads=False
            ):
                for position in range(batch.num_rows):
                    yield _parquet_clip(row, batch, position, column)
                    row += 1
        except (pa.ArrowException, OSError) as error:
            if not is_damage(error):
                raise
            lost = f"rows {row} to {sum(rows[: group + 1]) - 1}"
            yield _broken_parquet(f"row group {group} is broken, {lost} are lost", error)


def _broken_parquet(what: str, error: Exception) -> UnreadableClip:
    reason = (str(error).splitlines() or [""])[0]
    return UnreadableClip(None, ClipError("read", "BrokenShard", f"{what}: {reason}"), {})


def _parquet_clip(
    row: int, batch: pa.RecordBatch, position: int, column: str
) -> EncodedClip | UnreadableClip:
    cell = batch.column(column)[position]
    content = cell["bytes"].as_py() if cell.is_valid else None
    path = _value(cell["path"]) if cell.is_valid and "path" in cell else None
    member = as_text(str(path)) if path else f"row-{row:08d}"
    metadata = {
        name: _value(batch.column(name)[position])
        for name in batch.schema.names
        if name != column
        and not pa.types.is_binary(batch.schema.field(name).type)
        and not pa.types.is_large_binary(batch.schema.field(name).type)
    }
    if content is None:
        holds = "only a path: write the Parquet with the bytes embedded" if path else "and no path"
        error = ClipError("read", "NoBytes", f"the row holds no audio bytes, {holds}")
        return UnreadableClip(member, error, metadata)
    digest = xxhash.xxh128_hexdigest(content)
    return EncodedClip(member, io.BytesIO(content), len(content), digest, metadata)


def _value(scalar: pa.Scalar) -> Any:
    """A Parquet value as JSON can hold it; None where it cannot be one of Python's."""
    try:
        return _plain(scalar.as_py())
    except (
        ValueError,
        OverflowError,
        pa.ArrowException,
    ):  # text that is no UTF-8, the year 31,000,000
        return None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items() if not isinstance(entry, bytes)}
    if isinstance(value, list):
        return [_plain(entry) for entry in value if not isinstance(entry, bytes)]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)


# -------------------------------------------------------------------- shared


def _seekable(stream: BinaryIO) -> tuple[BinaryIO, str, int]:
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
    """(a seekable copy at its start, xxh128, bytes); large ones go to a temporary file.

    Not a `SpooledTemporaryFile`, whose methods are Python's: a decoder asks a dozen times a clip.
    """
    digest, size = xxhash.xxh128(), 0
    copy: BinaryIO = io.BytesIO()
    while block := stream.read(_BLOCK_BYTES):
        digest.update(block)
        if size <= _IN_MEMORY_BYTES < size + len(block):
            with cast(io.BytesIO, copy) as small:
                copy = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115
                copy.write(small.getbuffer())
        size += len(block)
        copy.write(block)
    copy.seek(0)
    return copy, digest.hexdigest(), size
