"""The ids of a shard's clips, without decoding, to hold a finished file against its source."""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from itertools import islice
from typing import BinaryIO

import pyarrow as pa

from transforms.manifest import rows_of
from transforms.opening import open_shard
from transforms.read import read_clips
from transforms.read_manifest import slice_of
from transforms.read_table import is_damage, open_parquet, parquet_audio_column, parquet_members
from transforms.read_tar import StrictTarInfo
from transforms.records import (
    EncodedClip,
    Shard,
    as_text,
    clip_id_of,
    name_of,
)
from transforms.storage import DEFAULT_ACCESS, Access, is_local, public_name
from transforms.suffixes import is_audio


def recount(shard: Shard, access: Access = DEFAULT_ACCESS) -> list[str]:
    """The ids that the rows of a shard have, in some order.

    Of a plain tar on a local disk only the headers are read, of a Parquet file only the paths,
    of a folder nothing; what is compressed, remote, damaged or limited is read as a whole.

    Raises:
        OSError: the shard cannot be read.
    """
    seen: dict[str, int] = {}
    names = _names(shard, access)
    if names is not None:
        return [clip_id_of(shard.id, name, seen) for name in names]
    return [clip_id for clip_id, _ in read_ids(shard, access)]


def read_ids(shard: Shard, access: Access = DEFAULT_ACCESS) -> Iterator[tuple[str, str | None]]:
    """(id, XXH128 of the encoded bytes) of each clip, None where it cannot be read."""
    seen: dict[str, int] = {}
    for clip in islice(read_clips(shard, access), shard.max_clips):
        digest = clip.xxh128 if isinstance(clip, EncodedClip) else None
        yield clip_id_of(shard.id, name_of(clip), seen), digest


def _names(shard: Shard, access: Access) -> list[str] | None:
    if shard.max_clips is not None:
        return None
    if shard.kind == "files":
        return [as_text(public_name(shard.uri, name)) for name in shard.files]
    if shard.manifest is not None:
        rows = rows_of(shard.manifest, slice_of(shard, access, None), shard.files)
        return [name_of(row) for row in rows]
    if shard.kind == "parquet":
        with open_shard(shard, access) as stream:
            return _parquet_names(stream, shard.row_groups)
    if shard.kind != "tar" or not is_local(shard.uri):
        return None
    with open_shard(shard, access) as stream:
        return _tar_names(stream)


def _tar_names(stream: BinaryIO) -> list[str] | None:
    """The audio members of a tar, by its headers; None where these do not tell all."""
    try:
        with tarfile.open(
            fileobj=stream, mode="r:", tarinfo=StrictTarInfo, errors="surrogateescape"
        ) as tar:
            return [
                as_text(info.name)
                for info in tar
                if is_audio(as_text(info.name)) and (info.isreg() or info.issym() or info.islnk())
            ]
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile):
        return None  # compressed, or broken somewhere


def _parquet_names(stream: BinaryIO, row_groups: tuple[int, int] | None) -> list[str] | None:
    """The paths of a Parquet file's audio; None where it is damaged, or has none."""
    try:
        parquet = open_parquet(stream)
        column = parquet_audio_column(parquet)
        if column is None:
            return None
        first, end = row_groups or (0, parquet.num_row_groups)
        row = sum(parquet.metadata.row_group(group).num_rows for group in range(first))
        names: list[str] = []
        for group in range(first, end):
            members = parquet_members(parquet, column, group, row)
            if members is None:
                return None
            names += members
            row += len(members)
        return names
    except (pa.ArrowException, OSError) as error:
        if not is_damage(error):
            raise
        return None
