"""Opens shards and encoded clips: seekable, hashed, in memory or on the disk."""

from __future__ import annotations

import errno
import io
import os
import tempfile
from typing import Any, BinaryIO, cast

import xxhash

from transforms.manifest import shown
from transforms.meter import Meter
from transforms.records import Shard
from transforms.storage import (
    CLOUD_STORAGE,
    DEFAULT_ACCESS,
    Access,
    StorageError,
    etag_of,
    find_cloud,
    is_local,
    open_file_system,
    open_remote,
    patiently,
)

FILES_AHEAD = 8  # remote files fetched at a time, in memory or on disk as `_IN_MEMORY_BYTES` says
BLOCK_BYTES = 1 << 20
_IN_MEMORY_BYTES = 32 << 20  # a larger encoded clip waits on disk while it is decoded


def open_shard(
    shard: Shard,
    access: Access = DEFAULT_ACCESS,
    meter: Meter | None = None,
    in_order: bool | None = None,
) -> BinaryIO:
    """The file of a shard that is one, open for reading.

    Args:
        shard: whose.
        access: how remote storage is used.
        meter: counts `read_retries`.
        in_order: whether it will be read from start to end; None: as its kind is.

    Raises:
        OSError: it cannot be opened.
    """
    fs, path = open_file_system(shard.uri, access)
    if is_local(shard.uri):
        return cast(BinaryIO, fs.open(path, "rb"))
    size = shard.file_sizes[0] if shard.file_sizes else shard.size_bytes
    if in_order is None:
        in_order = shard.kind in ("tar", "arrow", "tfrecord")
    return open_remote(fs, path, size, checksum=shard.checksum, in_order=in_order, meter=meter)


def seekable(stream: BinaryIO) -> tuple[BinaryIO, str, int]:
    """(a seekable file at its start, xxh128, bytes) of an open file, copied only if remote."""
    if not hasattr(stream, "fileno"):
        return spool(stream)
    digest, size = xxhash.xxh128(), 0
    while block := stream.read(BLOCK_BYTES):
        digest.update(block)
        size += len(block)
    stream.seek(0)
    return stream, digest.hexdigest(), size


def spool(stream: BinaryIO) -> tuple[BinaryIO, str, int]:
    """(a seekable copy at its start, xxh128, bytes); large ones go to a temporary file.

    Not a `SpooledTemporaryFile`, whose methods are Python's: a decoder asks a dozen times a clip.
    """
    digest, size = xxhash.xxh128(), 0
    copy: BinaryIO = io.BytesIO()
    while block := stream.read(BLOCK_BYTES):
        digest.update(block)
        if size <= _IN_MEMORY_BYTES < size + len(block):
            with cast(io.BytesIO, copy) as small:
                copy = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115
                copy.write(small.getbuffer())
        size += len(block)
        copy.write(block)
    copy.seek(0)
    return copy, digest.hexdigest(), size


def fetch(url: str, access: Access, meter: Meter | None) -> tuple[BinaryIO, str, int]:
    """A remote file of which nothing is known but its place, as `spool` gives it.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: the scheme is unknown.
        OSError: storage refuses, or does not answer.
    """
    try:
        fs, path = open_file_system(url, access)
    except ImportError as error:
        raise StorageError(f"{url.partition('://')[0]}:// cannot be read here: {error}") from None
    if url.startswith(CLOUD_STORAGE):
        stored = find_cloud(path, access, meter)
        if stored is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url)
        size, checksum = stored.size, stored.checksum
    else:
        info = patiently(lambda: _info(fs, path), shown(url), "read_retries", meter)
        size, checksum = info.get("size"), etag_of(info)
    if size is None:  # a web server that does not say
        content = patiently(lambda: fs.cat_file(path), shown(url), "read_retries", meter)
        return spool(io.BytesIO(content))
    with open_remote(fs, path, size, checksum=checksum, in_order=True, meter=meter) as stream:
        return spool(stream)


def _info(fs: Any, path: str) -> dict[str, Any]:
    try:
        return dict(fs.info(path))
    except FileNotFoundError as error:
        # On the web, fsspec says so whatever the matter is.
        cause = error.__cause__
        status = getattr(cause, "status", 0)
        if cause is None or status in (404, 410):
            raise
        if 400 <= status < 500 and status not in (408, 429):
            raise PermissionError(errno.EACCES, f"HTTP {status}") from None
        raise cause from None
