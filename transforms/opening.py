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
from transforms.records import ClipError, Shard
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
MAX_UNSIZED_BYTES = 4 << 30  # of a file whose server does not say how large it is
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


def spool(stream: BinaryIO, max_bytes: int | None = None) -> tuple[BinaryIO, str, int]:
    """(a seekable copy at its start, xxh128, bytes); large ones go to a temporary file.

    Nothing is read beyond the block in which `max_bytes` are exceeded.

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
        if max_bytes is not None and size > max_bytes:
            break
    copy.seek(0)
    return copy, digest.hexdigest(), size


def fetch(url: str, access: Access, meter: Meter | None) -> tuple[BinaryIO, str, int]:
    """A remote file of which nothing is known but its place, as `spool` gives it.

    Raises:
        ClipError: it is larger than `MAX_UNSIZED_BYTES`, which nobody said before.
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
        return _fetch_unsized(fs, path, url, meter)
    with open_remote(fs, path, size, checksum=checksum, in_order=True, meter=meter) as stream:
        return spool(stream)


def _fetch_unsized(fs: Any, path: str, url: str, meter: Meter | None) -> tuple[BinaryIO, str, int]:
    """As `fetch`, in one answer that is read to its end."""

    def once() -> tuple[BinaryIO, str, int]:
        with fs.open(path, "rb", block_size=0) as stream:
            return spool(stream, MAX_UNSIZED_BYTES)

    copy, digest, size = patiently(once, shown(url), "read_retries", meter)
    if size > MAX_UNSIZED_BYTES:
        copy.close()
        message = f"the server does not say how large the file is, and more than {MAX_UNSIZED_BYTES:,} bytes came"
        raise ClipError("read", "TooLarge", message)
    return copy, digest, size


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
