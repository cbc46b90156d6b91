"""Turns what the user names into shards, in an order that never changes."""

from __future__ import annotations

import dataclasses
import json
import os
import posixpath
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from fsspec.implementations.local import LocalFileSystem

from transforms.meter import Meter
from transforms.read import audio_column, count_tar_clips, is_audio, is_damage, open_shard
from transforms.records import Shard
from transforms.storage import (
    CLOUD_STORAGE,
    DEFAULT_ACCESS,
    Access,
    StorageError,
    StoredFile,
    etag_of,
    explain,
    find_cloud,
    glob_cloud,
    list_cloud,
    mtime_of,
    open_file_system,
)

FILES_PER_SHARD = 256
PARQUET_SHARD_BYTES = 512 << 20  # of row groups; larger Parquet files are split
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
PACKED_SHARDS = 1_000


class InputError(ValueError):
    """An input cannot be used; the message names it and says what to do."""


@dataclass(frozen=True)
class Plan:
    """The shards to annotate, and what was found beside them and left out."""

    shards: list[Shard]
    ignored: Counter[str]  # files that are no audio, by suffix


def plan_shards(
    patterns: Sequence[str],
    files_per_shard: int = FILES_PER_SHARD,
    access: Access = DEFAULT_ACCESS,
    meter: Meter | None = None,
) -> Plan:
    """The shards of `find_shards`, as a list, and what was left out."""
    ignored: Counter[str] = Counter()
    found = list(find_shards(patterns, ignored, files_per_shard, access, meter))
    return Plan(found, ignored)


def find_shards(
    patterns: Sequence[str],
    ignored: Counter[str],
    files_per_shard: int = FILES_PER_SHARD,
    access: Access = DEFAULT_ACCESS,
    meter: Meter | None = None,
    leave_out: str | None = None,
) -> Iterator[Shard]:
    """Yields the shards behind files, folders (walked recursively) and globs.

    Tars and Parquet files come as they are found, loose files at the end. One pattern in
    Cloud Storage is listed once and held a page at a time, whatever it matches.

    Args:
        patterns: paths or URLs of any fsspec file system. A tar or a Parquet file
            is a shard (a large Parquet file several, by row groups). Audio files
            are grouped by the folder that was named, in sorted order.
        ignored: receives the files that are no audio, by suffix.
        files_per_shard: audio files in one shard at most.
        access: how remote storage is used.
        meter: counts `list_retries`.
        leave_out: a folder whose files are no input: the output, where it lies among them.

    Raises:
        InputError: a pattern matches nothing that earmark reads.
    """
    seen: set[str] = set()  # shard ids and files, so that overlapping inputs give none twice
    loose: dict[str, dict[str, StoredFile]] = {}  # root -> relative path -> file
    flushed: Counter[str] = Counter()  # root -> shards of loose files yielded already
    in_order = False

    def is_new(name: str) -> bool:
        if in_order:
            return True
        known = name in seen
        seen.add(name)
        return not known

    output = leave_out and f"{_uri(*_file_system(leave_out, access))}/"
    for pattern in patterns:
        if not pattern:
            raise InputError("an input is an empty string; is a shell variable unset?")
        fs, path = _file_system(pattern, access)
        remote = not isinstance(fs, LocalFileSystem)
        # A single listing of Cloud Storage names nothing twice, and has an order: nothing
        # of it needs to be kept.
        in_order = pattern.startswith(CLOUD_STORAGE) and len(patterns) == 1
        passed_over: Counter[str] = Counter()
        found = 0
        looked_at = False  # into a Parquet file that this pattern names
        for root, file, named in _matches(fs, path, pattern, access, meter):
            uri = _uri(fs, file.path)
            if output and uri.startswith(output):
                continue
            if file.path.lower().endswith(TAR_SUFFIXES):
                shards = [Shard(_id(uri), uri, "tar", file.size, checksum=file.checksum)]
            elif file.path.lower().endswith(".parquet"):
                whole = Shard(_id(uri), uri, "parquet", file.size, checksum=file.checksum)
                if remote and named and looked_at and file.size <= PARQUET_SHARD_BYTES:
                    # A look costs a round trip or two. Where the user says `*.parquet`, one
                    # tells whether it is audio that they mean.
                    shards = [whole]
                else:
                    shards = list(_parquet_shards(whole, must_have_audio=named, access=access))
                    looked_at = True
                if not shards:
                    passed_over[".parquet without audio"] += 1
                    continue
            elif named or is_audio(file.path):
                shards = []
                if is_new(uri):
                    url = _uri(fs, root)
                    files = loose.setdefault(url, {})
                    files[_below(root, file.path)] = file
                    if in_order and len(files) == files_per_shard:
                        shards = [_file_shard(url, flushed[url], loose.pop(url))]
                        flushed[url] += 1
            else:
                passed_over[posixpath.splitext(file.path)[1] or "no suffix"] += 1
                continue
            found += 1
            yield from (shard for shard in shards if is_new(shard.id))
        if not found:
            only = ", ".join(f"{count} {suffix}" for suffix, count in passed_over.most_common(5))
            raise InputError(
                f"{pattern!r} matches no tar, no Parquet with an audio column and no audio file"
                + (f" (only {only})" if only else "")
                + "; check the path, and quote globs so that the shell leaves them alone"
            )
        ignored += passed_over
    for root in sorted(loose):
        files = sorted(loose[root].items())
        for start in range(0, len(files), files_per_shard):
            group = dict(files[start : start + files_per_shard])
            yield _file_shard(root, flushed[root], group)
            flushed[root] += 1


def pack_shards(shards: Iterable[Shard]) -> Iterator[bytes]:
    """Shards in packets of `PACKED_SHARDS`, compressed.

    Names in one listing are much alike: a million tars take about 28 MB so, in a job's
    description and in memory, instead of some hundred.
    """
    left = iter(shards)
    while packet := list(islice(left, PACKED_SHARDS)):
        text = json.dumps([list(vars(shard).values()) for shard in packet])
        yield zlib.compress(text.encode(), 6)


def unpack_shards(packet: bytes) -> Iterator[Shard]:
    """The shards of one packet."""
    for values in json.loads(zlib.decompress(packet)):
        yield Shard(*(tuple(value) if isinstance(value, list) else value for value in values))


def limit_shards(
    shards: Iterable[Shard], max_clips: int, access: Access = DEFAULT_ACCESS
) -> list[Shard]:
    """The first shards that together hold `max_clips` clips; the last one is cut short."""
    limited: list[Shard] = []
    left = max_clips
    for shard in shards:
        if left <= 0:
            break
        clips = min(left, _count_clips(shard, left, access))
        limited.append(dataclasses.replace(shard, max_clips=clips))
        left -= clips
    return limited


def outdated(sources: set[str], not_planned: Iterable[str]) -> list[str]:
    """Finished shards of a folder or Parquet file that has been divided differently since.

    Their rows would stand beside those of the new division, some of them twice.

    Args:
        sources: `source_of` each planned shard.
        not_planned: ids of finished shards that are not among the planned ones.
    """
    return sorted(shard_id for shard_id in not_planned if source_of(shard_id) in sources)


def source_of(shard_id: str) -> str:
    """The part of an id that names the tar, Parquet file or folder."""
    return re.sub(r"(-rg\d{5}-\d{5}|-\d{5}-[0-9a-f]{12})$", "", shard_id)


def _file_system(pattern: str, access: Access) -> tuple[Any, str]:
    try:
        fs, path = open_file_system(pattern, access)
    except (ImportError, ValueError) as error:
        raise InputError(f"{pattern!r} cannot be opened: {error}") from error
    return fs, path.rstrip("/") or path


def _uri(fs: Any, path: str) -> str:
    return path if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(path)


def _matches(
    fs: Any, path: str, pattern: str, access: Access, meter: Meter | None
) -> Iterator[tuple[str, StoredFile, bool]]:
    """Yields (root, file, whether the user named this kind of file), sorted."""
    try:
        if pattern.startswith(CLOUD_STORAGE):
            yield from _cloud_matches(path, pattern, access, meter)
        else:
            yield from _fsspec_matches(fs, path, pattern)
    except InputError:
        raise
    except ValueError as error:  # fsspec's, for a glob such as `a**.tar`
        raise InputError(f"{pattern!r} cannot be understood: {error}") from error
    except StorageError as error:
        raise InputError(f"{pattern!r} cannot be listed: {error}") from error
    except Exception as error:  # each library behind fsspec has its own
        if isinstance(fs, LocalFileSystem):
            raise
        raise InputError(explain(error, repr(pattern))) from error


def _cloud_matches(
    path: str, pattern: str, access: Access, meter: Meter | None
) -> Iterator[tuple[str, StoredFile, bool]]:
    # Tried in this order, because a name may hold a glob's marks.
    if (file := find_cloud(path, access, meter)) is not None:
        yield posixpath.dirname(path), file, True
        return
    found = False
    for file in list_cloud(f"{path}/", access, meter=meter):
        found = True
        if not _is_hidden(file.path, path) and not file.path.endswith("/"):
            yield path, file, False
    if found:
        return
    if not _is_glob(path):
        raise InputError(f"{pattern!r} does not exist")
    root, named_suffix = _root_of_glob(path)
    for file in glob_cloud(path, access, meter):
        if not _is_hidden(file.path, root) and not file.path.endswith("/"):
            yield root, file, file.path.endswith(named_suffix)


def _fsspec_matches(fs: Any, path: str, pattern: str) -> Iterator[tuple[str, StoredFile, bool]]:
    try:
        info = fs.info(path)
    except FileNotFoundError:
        if not _is_glob(path):
            raise InputError(f"{pattern!r} does not exist") from None
        root, named_suffix = _root_of_glob(path)
        for match, details in sorted(fs.glob(path, detail=True).items()):
            if _is_hidden(match, root):
                continue
            if details["type"] == "directory":
                yield from _walk(fs, match, root)
            else:
                named = match.endswith(named_suffix)
                yield root, _stored(fs, match, details), named
        return
    except OSError as error:
        raise InputError(f"{pattern!r} cannot be read: {error.strerror or error}") from error
    if info["type"] == "directory":
        yield from _walk(fs, path, path)
    else:
        yield posixpath.dirname(path), _stored(fs, path, info), True


def _stored(fs: Any, path: str, details: dict[str, Any]) -> StoredFile:
    local = isinstance(fs, LocalFileSystem)
    version = mtime_of(path, details) if local else etag_of(details)
    return StoredFile(path, details["size"] or 0, version)


def _is_glob(path: str) -> bool:
    return any(mark in path for mark in "*?[")


def _root_of_glob(path: str) -> tuple[str, str]:
    """(the folder above the first mark, the suffix that the glob names, or one that no name has)."""
    root = posixpath.dirname(re.split(r"[*?\[]", path, maxsplit=1)[0])
    suffix = posixpath.splitext(path)[1]
    return root, suffix if suffix and not any(mark in suffix for mark in "*?[]") else "\0"


def _walk(fs: Any, folder: str, root: str) -> Iterator[tuple[str, StoredFile, bool]]:
    for file, details in sorted(fs.find(folder, detail=True).items()):
        if not _is_hidden(file, folder):
            yield root, _stored(fs, file, details), False


def _is_hidden(file: str, folder: str) -> bool:
    return any(part.startswith(".") for part in _below(folder, file).split("/"))


def _below(folder: str, file: str) -> str:
    """A path relative to a folder above it, to the letter: `a//b` and `a/b` are two objects."""
    return file.removeprefix(f"{folder.rstrip('/')}/")


def _parquet_shards(whole: Shard, *, must_have_audio: bool, access: Access) -> Iterator[Shard]:
    """One shard, or several where the row groups are large; none where there is no audio."""
    size = whole.size_bytes
    try:
        with open_shard(whole, access) as stream:
            parquet = pq.ParquetFile(stream, pre_buffer=False)
            schema, footer = parquet.schema_arrow, parquet.metadata
    except (pa.ArrowException, OSError) as error:
        if not is_damage(error):
            raise
        yield whole  # reading it gives the row that says what is broken
        return
    if audio_column(schema) is None:
        if must_have_audio:
            columns = ", ".join(f"{field.name}: {field.type}" for field in schema)[:300]
            raise InputError(
                f"{whole.uri!r} has no audio column: expected a struct<bytes, path> as Hugging Face "
                f"stores audio, found {columns}"
            )
        return
    if size <= PARQUET_SHARD_BYTES or footer.num_row_groups < 2:
        yield whole
        return
    first, group_bytes = 0, 0
    for group in range(footer.num_row_groups):
        columns = footer.row_group(group)
        group_bytes += sum(
            columns.column(c).total_compressed_size for c in range(columns.num_columns)
        )
        if group_bytes >= PARQUET_SHARD_BYTES or group == footer.num_row_groups - 1:
            yield dataclasses.replace(
                whole,
                id=f"{whole.id}-rg{first:05d}-{group + 1:05d}",
                size_bytes=group_bytes,
                row_groups=(first, group + 1),
                file_sizes=(size,),
            )
            first, group_bytes = group + 1, 0


def _file_shard(root: str, number: int, found: dict[str, StoredFile]) -> Shard:
    files, sizes = tuple(found), tuple(file.size for file in found.values())
    return Shard(
        id=f"{_id(root)}-{number:05d}-{_hash(chr(0).join(files))}",
        uri=root,
        kind="files",
        size_bytes=sum(sizes),
        files=files,
        file_sizes=sizes,
        file_checksums=tuple(file.checksum for file in found.values()),
    )


def _count_clips(shard: Shard, enough: int, access: Access) -> int:
    if shard.kind == "files":
        return len(shard.files)
    with open_shard(shard, access) as stream:
        if shard.kind == "tar":
            return count_tar_clips(stream, enough)
        try:
            footer = pq.ParquetFile(stream).metadata
        except (pa.ArrowException, OSError) as error:
            if not is_damage(error):
                raise
            return 1  # the row that says that the file is broken
        first, end = shard.row_groups or (0, footer.num_row_groups)
        return sum(footer.row_group(group).num_rows for group in range(first, end))


def _id(uri: str) -> str:
    """A file name for a URI: its stem to read, its hash to be unique."""
    stem = os.path.basename(uri.rstrip("/"))
    for suffix in (*TAR_SUFFIXES[::-1], ".parquet"):
        stem = stem.removesuffix(suffix)
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", stem).lstrip("._")[:80] or "shard"
    return f"{readable}-{_hash(uri)}"


def _hash(text: str) -> str:
    """12 hex digits: among a million equal stems, two collide with a chance of 0.2 %."""
    return xxhash.xxh3_64_hexdigest(text.encode("utf-8", "surrogateescape"))[:12]
