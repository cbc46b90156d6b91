"""Finds a few clips again where they lie, without reading what is between them where that can be."""

from __future__ import annotations

import io
import os
import tarfile
from collections import Counter
from collections.abc import Collection, Iterator
from typing import BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from transforms.read import audio_column, open_shard, read_clips
from transforms.records import EncodedClip, Shard, as_text
from transforms.shards import TAR_SUFFIXES, InputError, find_shards
from transforms.storage import DEFAULT_ACCESS, Access, is_local, open_file_system

_GZIP = b"\x1f\x8b"


class FetchError(Exception):
    """A shard cannot be read any more; the message says why."""


def fetch_clips(
    uri: str, members: Collection[str], access: Access = DEFAULT_ACCESS
) -> Iterator[EncodedClip]:
    """Yields the clips of a shard that are named, in its order; those that are gone do not come.

    In a tar on a local disk and in Parquet only what is asked for is read; a compressed or
    remote tar is read from its start.

    Args:
        uri: of the shard, as the column `shard` has it.
        members: as the column `member` has them. A member that a shard names twice comes twice.
        access: how remote storage is used.

    Raises:
        FetchError: the shard is gone or cannot be read.
    """
    try:
        if uri.lower().endswith((*TAR_SUFFIXES, ".parquet")):
            yield from _of_container(uri, members, access)
        else:
            yield from _of_folder(uri, members, access)
    except (
        OSError,
        ValueError,
        ImportError,
        InputError,
        tarfile.TarError,
        pa.ArrowException,
    ) as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [""])[0]
        raise FetchError(f"{reason or type(error).__name__}") from error


def _of_folder(uri: str, members: Collection[str], access: Access) -> Iterator[EncodedClip]:
    fs, root = open_file_system(uri, access)
    if not fs.isdir(root):
        raise FetchError("it is not there")
    found = {name: f"{root.rstrip('/')}/{name}" for name in sorted(members)}
    found = {name: path for name, path in found.items() if fs.isfile(path)}
    sizes = () if is_local(uri) else tuple(fs.size(path) for path in found.values())
    shard = Shard("", uri, "files", sum(sizes), tuple(found), file_sizes=sizes)
    yield from _encoded(read_clips(shard, access))


def _of_container(uri: str, members: Collection[str], access: Access) -> Iterator[EncodedClip]:
    if is_local(uri):
        # Not `find_shards`, which looks into a Parquet file first.
        kind = "parquet" if uri.lower().endswith(".parquet") else "tar"
        shard = Shard("", uri, kind, os.stat(uri).st_size)  # type: ignore[arg-type]
    else:
        shard = next(iter(find_shards([uri], Counter(), access=access)))
    with open_shard(shard, access) as stream:
        if shard.kind == "parquet":
            yield from _of_parquet(stream, members)
            return
        if is_local(uri) and stream.read(2) != _GZIP:
            stream.seek(0)
            yield from _of_plain_tar(stream, members)
            return
    yield from (clip for clip in _encoded(read_clips(shard, access)) if clip.member in members)


def _encoded(clips: Iterator[object]) -> Iterator[EncodedClip]:
    return (clip for clip in clips if isinstance(clip, EncodedClip))


def _of_plain_tar(stream: BinaryIO, members: Collection[str]) -> Iterator[EncodedClip]:
    """Reads headers, and jumps over what is between them.

    Plain headers are read here, as `tarfile` takes 0.1 ms for each; it reads those that are not.
    """
    with tarfile.open(fileobj=stream, mode="r:", errors="surrogateescape") as tar:
        at = 0
        while True:
            stream.seek(at)
            header = stream.read(tarfile.BLOCKSIZE)
            if len(header) < tarfile.BLOCKSIZE or header.count(0) == tarfile.BLOCKSIZE:
                return
            size = header[124:136].strip(b" \0")
            if header[257:262] == b"ustar" and header[156] in b"0\0" and size.isdigit():
                name = _text_of(header[:100])
                if prefix := _text_of(header[345:500]):
                    name = f"{prefix}/{name}"
                length = int(size, 8)
                if as_text(name) in members:
                    yield _clip(as_text(name), stream.read(length))
                at += tarfile.BLOCKSIZE * (1 + -(-length // tarfile.BLOCKSIZE))
                continue
            stream.seek(at)
            info = tarfile.TarInfo.fromtarfile(tar)  # and the member that a long name stands before
            if info.isreg() and as_text(info.name) in members:
                yield _clip(as_text(info.name), cast(BinaryIO, tar.extractfile(info)).read())
            at = tar.offset


def _text_of(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _of_parquet(stream: BinaryIO, members: Collection[str]) -> Iterator[EncodedClip]:
    """Reads the column of paths, and of the audio the row groups that hold a clip asked for."""
    parquet = pq.ParquetFile(stream, pre_buffer=False)
    column = audio_column(parquet.schema_arrow)
    if column is None:
        raise FetchError("it has no audio column")
    has_paths = parquet.schema_arrow.field(column).type.get_field_index("path") >= 0
    row = 0
    for group in range(parquet.metadata.num_row_groups):
        rows = parquet.metadata.row_group(group).num_rows
        paths = [None] * rows
        if has_paths:
            table = parquet.read_row_group(group, [f"{column}.path"], use_threads=False)
            paths = [cell and cell["path"] for cell in table[column].to_pylist()]
        names = [
            as_text(str(path)) if path else f"row-{row + place:08d}"
            for place, path in enumerate(paths)
        ]
        row += rows
        wanted = [place for place, name in enumerate(names) if name in members]
        if not wanted:
            continue
        table = parquet.read_row_group(group, [f"{column}.bytes"], use_threads=False)
        for place in wanted:
            cell = table[column][place].as_py()
            if cell and cell["bytes"] is not None:
                yield _clip(names[place], cell["bytes"])


def _clip(member: str, content: bytes) -> EncodedClip:
    digest = xxhash.xxh128_hexdigest(content)
    return EncodedClip(member, io.BytesIO(content), len(content), digest, {})
