"""Turns what the user names into shards, in an order that never changes."""

from __future__ import annotations

import dataclasses
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from fsspec.implementations.local import LocalFileSystem

from transforms.read import audio_column, count_tar_clips, is_audio, is_damage, open_file_system
from transforms.records import Shard

FILES_PER_SHARD = 256
PARQUET_SHARD_BYTES = 512 << 20  # of row groups; larger Parquet files are split
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")


class InputError(ValueError):
    """An input cannot be used; the message names it and says what to do."""


@dataclass(frozen=True)
class Plan:
    """The shards to annotate, and what was found beside them and left out."""

    shards: list[Shard]
    ignored: Counter[str]  # files that are no audio, by suffix


def plan_shards(patterns: Sequence[str], files_per_shard: int = FILES_PER_SHARD) -> Plan:
    """The shards behind files, folders (walked recursively) and globs.

    Args:
        patterns: paths or URLs of any fsspec file system. A tar or a Parquet file
            is a shard (a large Parquet file several, by row groups). Audio files
            are grouped by the folder that was named, in sorted order.
        files_per_shard: audio files in one shard at most.

    Raises:
        InputError: a pattern matches nothing that earmark reads.
    """
    shards: dict[str, Shard] = {}
    loose: dict[str, dict[str, int]] = {}  # root -> relative path -> bytes
    taken: set[str] = set()  # audio files, so that overlapping inputs give no file twice
    ignored: Counter[str] = Counter()
    for pattern in patterns:
        if not pattern:
            raise InputError("an input is an empty string; is a shell variable unset?")
        fs, path = _file_system(pattern)
        passed_over: Counter[str] = Counter()
        found = 0
        for root, file, size, named in _matches(fs, path, pattern):
            uri = _uri(fs, file)
            if file.lower().endswith(TAR_SUFFIXES):
                shards[uri] = Shard(_id(uri), uri, "tar", size)
            elif file.lower().endswith(".parquet"):
                split = list(_parquet_shards(fs, file, uri, size, must_have_audio=named))
                shards.update((shard.id, shard) for shard in split)
                if not split:
                    passed_over[".parquet without audio"] += 1
                    continue
            elif named or is_audio(file):
                if uri not in taken:
                    taken.add(uri)
                    relative = posixpath.relpath(file, root)
                    loose.setdefault(_uri(fs, root), {})[relative] = size
            else:
                passed_over[posixpath.splitext(file)[1] or "no suffix"] += 1
                continue
            found += 1
        if not found:
            seen = ", ".join(f"{count} {suffix}" for suffix, count in passed_over.most_common(5))
            raise InputError(
                f"{pattern!r} matches no tar, no Parquet with an audio column and no audio file"
                + (f" (only {seen})" if seen else "")
                + "; check the path, and quote globs so that the shell leaves them alone"
            )
        ignored += passed_over
    planned = list(shards.values())
    for root in sorted(loose):
        planned += _file_shards(root, loose[root], files_per_shard)
    return Plan(planned, ignored)


def limit_shards(shards: Iterable[Shard], max_clips: int) -> list[Shard]:
    """The first shards that together hold `max_clips` clips; the last one is cut short."""
    limited: list[Shard] = []
    left = max_clips
    for shard in shards:
        if left <= 0:
            break
        clips = min(left, _count_clips(shard, left))
        limited.append(dataclasses.replace(shard, max_clips=clips))
        left -= clips
    return limited


def outdated(planned: Iterable[Shard], finished_ids: Iterable[str]) -> list[str]:
    """Finished shards of a folder or Parquet file that has been divided differently since.

    Their rows would stand beside those of the new division, some of them twice.
    """
    planned_ids = {shard.id for shard in planned}
    sources = {_source(shard_id) for shard_id in planned_ids}
    return sorted(i for i in finished_ids if i not in planned_ids and _source(i) in sources)


def _source(shard_id: str) -> str:
    """The part of an id that names the tar, Parquet file or folder."""
    return re.sub(r"(-rg\d{5}-\d{5}|-\d{5}-[0-9a-f]{12})$", "", shard_id)


def _file_system(pattern: str) -> tuple[Any, str]:
    try:
        fs, path = open_file_system(pattern)
    except (ImportError, ValueError) as error:
        raise InputError(f"{pattern!r} cannot be opened: {error}") from error
    return fs, path.rstrip("/") or path


def _uri(fs: Any, path: str) -> str:
    return path if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(path)


def _matches(fs: Any, path: str, pattern: str) -> Iterator[tuple[str, str, int, bool]]:
    """Yields (root, file, bytes, whether the user named this kind of file), sorted."""
    try:
        info = fs.info(path)
    except FileNotFoundError:
        if not any(mark in path for mark in "*?["):
            raise InputError(f"{pattern!r} does not exist") from None
        fixed = re.split(r"[*?\[]", path, maxsplit=1)[0]
        root = posixpath.dirname(fixed)
        suffix = posixpath.splitext(path)[1]
        named_suffix = suffix if suffix and not any(mark in suffix for mark in "*?[]") else None
        for match, details in sorted(fs.glob(path, detail=True).items()):
            if details["type"] == "directory":
                yield from _walk(fs, match, root)
            else:
                yield root, match, details["size"] or 0, match.endswith(named_suffix or "\0")
        return
    except OSError as error:
        raise InputError(f"{pattern!r} cannot be read: {error.strerror or error}") from error
    if info["type"] == "directory":
        yield from _walk(fs, path, path)
    else:
        yield posixpath.dirname(path), path, info["size"] or 0, True


def _walk(fs: Any, folder: str, root: str) -> Iterator[tuple[str, str, int, bool]]:
    for file, details in sorted(fs.find(folder, detail=True).items()):
        hidden = any(part.startswith(".") for part in posixpath.relpath(file, folder).split("/"))
        if not hidden:
            yield root, file, details["size"] or 0, False


def _parquet_shards(
    fs: Any, file: str, uri: str, size: int, *, must_have_audio: bool
) -> Iterator[Shard]:
    """One shard, or several where the row groups are large; none where there is no audio."""
    whole = Shard(_id(uri), uri, "parquet", size)
    try:
        with fs.open(file, "rb") as stream:
            parquet = pq.ParquetFile(stream)
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
                f"{uri!r} has no audio column: expected a struct<bytes, path> as Hugging Face "
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
            )
            first, group_bytes = group + 1, 0


def _file_shards(root: str, sizes: dict[str, int], files_per_shard: int) -> Iterator[Shard]:
    files = sorted(sizes)
    for number, start in enumerate(range(0, len(files), files_per_shard)):
        group = tuple(files[start : start + files_per_shard])
        shard_id = f"{_id(root)}-{number:05d}-{_hash(chr(0).join(group))}"
        yield Shard(shard_id, root, "files", sum(sizes[file] for file in group), files=group)


def _count_clips(shard: Shard, enough: int) -> int:
    if shard.kind == "files":
        return len(shard.files)
    fs, path = open_file_system(shard.uri)
    with fs.open(path, "rb") as stream:
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
