"""Finds the audio of some clips where it lies, and reads no more of a shard than it must.

Of loose files only those that are wanted are opened, of a Parquet file the row groups in which
they are, and of a tar the headers, with the bodies between them passed over. What has no such
order (a compressed tar) is read from its start until all is found.
"""

from __future__ import annotations

import dataclasses
import os
import posixpath
import tarfile
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import closing
from typing import Any, BinaryIO, cast

from fsspec.implementations.local import LocalFileSystem

from transforms.opening import open_shard, spool
from transforms.read import read_clips
from transforms.read_table import open_parquet, parquet_audio_column, parquet_members
from transforms.records import EncodedClip, Shard, as_text
from transforms.shards import find_shards
from transforms.storage import (
    CLOUD_STORAGE,
    DEFAULT_ACCESS,
    Access,
    StorageError,
    explain,
    find_cloud,
    is_local,
    open_file_system,
    open_remote,
)
from transforms.suffixes import is_audio

# Files that are shards, but name audio which lies elsewhere.
_MANIFESTS = (".csv", ".tsv", ".json", ".jsonl", ".scp", ".txt")

# Of a remote tar whose members are larger only the headers are fetched; else it is streamed.
_RANGED_FROM_BYTES = 1 << 20


def find_clips(
    shard: str,
    members: Collection[str],
    access: Access = DEFAULT_ACCESS,
    *,
    clips: int = 0,
    audio_root: str | None = None,
) -> Iterator[EncodedClip]:
    """Yields the clips of these members, each open until the next is asked for.

    A member that a shard names twice comes twice; one that is not there does not come.

    Args:
        shard: the `shard` of rows: a tar, a Parquet file, a manifest or a folder.
        members: the `member` of rows.
        access: how remote storage is used.
        clips: how many the shard has, where it is known.
        audio_root: what relative paths in a manifest lie under; by default its folder.

    Raises:
        OSError: the shard cannot be read, or is not there.
        ValueError: it is nothing that earmark reads.
    """
    wanted = frozenset(members)
    name = shard.lower()
    if name.endswith(".tar"):
        yield from _in_tar(_known(shard, "tar", access), wanted, access, clips)
    elif name.endswith(".parquet"):
        yield from _in_parquet(_known(shard, "parquet", access), wanted, access, audio_root)
    elif name.removesuffix(".gz").endswith(_MANIFESTS) and not _is_folder(shard):
        yield from _loose(audio_root or posixpath.dirname(shard), wanted, access)
    elif _is_folder(shard) or (not is_local(shard) and not posixpath.splitext(name)[1]):
        yield from _loose(shard, wanted, access)
    else:
        yield from _in_order(shard, wanted, access)


def _is_folder(shard: str) -> bool:
    return is_local(shard) and os.path.isdir(shard)


def _known(url: str, kind: Any, access: Access) -> Shard:
    """A file as a shard, with its size.

    Raises:
        OSError: it is not there.
    """
    fs, path = open_file_system(url, access)
    return Shard(posixpath.basename(url), url, kind, _size(fs, path, url, access))


def _size(fs: Any, path: str, url: str, access: Access) -> int:
    if url.startswith(CLOUD_STORAGE):
        stored = find_cloud(path, access)
        if stored is None:
            raise FileNotFoundError(f"{url} is not there")
        return stored.size
    try:
        return fs.size(path) or 0
    except FileNotFoundError:
        raise FileNotFoundError(f"{url} is not there") from None
    except Exception as error:  # each library behind fsspec has its own
        if isinstance(fs, LocalFileSystem):
            raise
        raise StorageError(explain(error, url)) from error


def _loose(root: str, wanted: frozenset[str], access: Access) -> Iterator[EncodedClip]:
    """Files below `root`, or wherever their names say themselves."""
    for member in sorted(wanted):
        itself = "://" in member or posixpath.isabs(member)
        url = member if itself else f"{root.rstrip('/') or '/'}/{member}" if root else member
        if is_local(url):
            url = _as_on_disk(url)
        folder, _, name = url.rpartition("/")
        try:
            fs, path = open_file_system(url, access)
            size = _size(fs, path, url, access)
        except FileNotFoundError:
            continue
        # As a shard of its own, and not one of all: each may lie in another folder.
        one = Shard(name, folder or ("/" if url[0] == "/" else "."), "files", size, (name,))
        if not is_local(url):
            one = dataclasses.replace(one, file_sizes=(size,), file_checksums=(None,))
        for clip in read_clips(one, access):
            if isinstance(clip, EncodedClip):
                yield dataclasses.replace(clip, member=member)


def _as_on_disk(path: str) -> str:
    """A path whose name may not be UTF-8, which `as_text` made readable in the row."""
    if os.path.exists(path) or "\\x" not in path:
        return path
    there = "/" if path.startswith("/") else "."
    for part in path.strip("/").split("/"):
        try:
            names = os.listdir(there)
        except OSError:
            return path
        there = posixpath.join(there, next((n for n in names if as_text(n) == part), part))
    return there


def _in_tar(
    shard: Shard, wanted: frozenset[str], access: Access, clips: int
) -> Iterator[EncodedClip]:
    local = is_local(shard.uri)
    ranged = local or shard.size_bytes >= _RANGED_FROM_BYTES * max(1, clips)
    fs, path = open_file_system(shard.uri, access)
    stream = (
        cast(BinaryIO, fs.open(path, "rb"))
        if local
        else open_remote(fs, path, shard.size_bytes, in_order=not ranged)
    )
    with stream:
        try:
            tar = tarfile.open(  # noqa: SIM115
                fileobj=stream, mode="r:" if ranged else "r|", errors="surrogateescape"
            )
        except tarfile.ReadError:  # packed, whatever its name says
            tar = None
        if tar is not None:
            with tar:
                yield from _of_tar(tar, wanted)
            return
    yield from _in_order(shard.uri, wanted, access)


def _of_tar(tar: tarfile.TarFile, wanted: frozenset[str]) -> Iterator[EncodedClip]:
    while True:
        try:
            info = tar.next()
            if info is None:
                return
            tar.members = []  # type: ignore[attr-defined]  # it would keep them all
            member = as_text(info.name)
            if member not in wanted or not info.isreg() or not is_audio(member):
                continue
            audio, digest, _ = spool(cast(BinaryIO, tar.extractfile(info)))
        except (tarfile.TarError, EOFError, ValueError, OverflowError):
            return  # what comes after the damage has no row
        with closing(audio):
            yield EncodedClip(member, audio, info.size, digest, {})


def _in_parquet(
    shard: Shard, wanted: frozenset[str], access: Access, audio_root: str | None
) -> Iterator[EncodedClip]:
    groups: list[int] = []
    with open_shard(shard, access) as stream:
        parquet = open_parquet(stream)
        column = parquet_audio_column(parquet)
        if column is None:  # it names files
            return (yield from _loose(audio_root or posixpath.dirname(shard.uri), wanted, access))
        row = 0
        for group in range(parquet.num_row_groups):
            members = parquet_members(parquet, column, group, row)
            if members is None or not wanted.isdisjoint(members):
                groups.append(group)
            row += parquet.metadata.row_group(group).num_rows
    for group in groups:
        part = dataclasses.replace(shard, row_groups=(group, group + 1))
        for clip in read_clips(part, access):
            if isinstance(clip, EncodedClip) and clip.member in wanted:
                yield clip


def _in_order(shard: str, wanted: frozenset[str], access: Access) -> Iterator[EncodedClip]:
    for part in find_shards([shard], Counter(), access=access):
        for clip in read_clips(part, access):
            if isinstance(clip, EncodedClip) and clip.member in wanted:
                yield clip
