"""Reads the clips of a shard, one after the other, as they lie in it."""

from __future__ import annotations

import errno
import json
import os
import posixpath
import stat
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from typing import Any, BinaryIO, cast

from fsspec.implementations.local import LocalFileSystem

from transforms.meter import Meter
from transforms.opening import FILES_AHEAD, fetch, open_shard, seekable, spool
from transforms.read_manifest import read_manifest
from transforms.read_table import OpenFile, read_arrow, read_parquet
from transforms.read_tar import read_tar
from transforms.read_tfrecord import read_tfrecord
from transforms.read_zip import read_zip
from transforms.records import ClipError, EncodedClip, Shard, UnreadableClip, as_text
from transforms.storage import (
    DEFAULT_ACCESS,
    Access,
    is_local,
    open_file_system,
    open_remote,
    patiently,
    public_name,
    public_url,
    refuse_scheme,
)
from transforms.suffixes import is_audio

Clips = Iterator[EncodedClip | UnreadableClip]


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
    if shard.kind == "manifest":
        yield from read_manifest(shard, access, meter)
        return
    with open_shard(shard, access, meter) as stream:
        if shard.kind == "tar":
            yield from read_tar(stream)
        elif shard.kind == "tfrecord":
            yield from read_tfrecord(stream)
        elif shard.kind == "zip":
            yield from read_zip(stream, is_audio, spool)
        elif shard.kind == "arrow":
            yield from read_arrow(stream, _files_beside(shard, access, meter))
        else:
            yield from read_parquet(stream, shard.row_groups, _files_beside(shard, access, meter))


# --------------------------------------------------------------------- files


def _read_files(shard: Shard) -> Clips:
    fs, root = open_file_system(shard.uri)
    for name, metadata in zip(shard.files, _file_metadata(shard), strict=True):
        member = as_text(name)
        try:
            path = posixpath.join(root, name)
            if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would never end
                error = ClipError(
                    "read", "NoFile", "it is a folder, a pipe or a device, and no file"
                )
                yield UnreadableClip(member, error, metadata)
                continue
            with fs.open(path, "rb") as stream:
                audio, digest, size = seekable(stream)
                yield EncodedClip(member, audio, size, digest, metadata)
        except FileNotFoundError:
            error = ClipError("read", "FileNotFound", "the file is gone")
            yield UnreadableClip(member, error, metadata)
        except PermissionError as error:
            message = f"the file cannot be opened: {error.strerror}"
            yield UnreadableClip(member, ClipError("read", type(error).__name__, message), metadata)


def _file_metadata(shard: Shard) -> Iterator[dict[str, Any]]:
    """What a metadata file beside them says of a shard's files."""
    for text in shard.file_metadata or ("",) * len(shard.files):
        yield json.loads(text) if text else {}


def _read_remote_files(shard: Shard, access: Access, meter: Meter | None) -> Clips:
    """As `_read_files`, with a few small files on their way at a time.

    Each costs a round trip, which is longer than its decoding takes.
    """
    fs, root = open_file_system(shard.uri, access)

    def fetched_file(name: str, size: int, checksum: str | None) -> tuple[BinaryIO, str, int]:
        path = f"{root.rstrip('/')}/{name}"
        if size < 0:
            return fetch(fs.unstrip_protocol(path), access, meter)
        with open_remote(fs, path, size, checksum=checksum, in_order=True, meter=meter) as stream:
            return spool(stream)

    coming: deque[tuple[str, Future[tuple[BinaryIO, str, int]]]] = deque()
    checksums = shard.file_checksums or (None,) * len(shard.files)
    left = iter(zip(shard.files, shard.file_sizes, checksums, strict=True))
    all_metadata = _file_metadata(shard)
    with ThreadPoolExecutor(FILES_AHEAD, "earmark-fetch") as pool:
        try:
            while True:
                for name, size, checksum in islice(left, FILES_AHEAD - len(coming)):
                    coming.append((name, pool.submit(fetched_file, name, size, checksum)))
                if not coming:
                    return
                name, fetched = coming.popleft()
                member, metadata = as_text(public_name(shard.uri, name)), next(all_metadata)
                try:
                    audio, digest, size = fetched.result()
                except ClipError as error:
                    yield UnreadableClip(member, error, metadata)
                    continue
                except FileNotFoundError:
                    error = ClipError("read", "FileNotFound", "the file is gone")
                    yield UnreadableClip(member, error, metadata)
                    continue
                with closing(audio):
                    yield EncodedClip(member, audio, size, digest, metadata)
        finally:
            for _, fetched in coming:
                fetched.cancel()


def _files_beside(shard: Shard, access: Access, meter: Meter | None) -> OpenFile:
    """Opens the files that a table names: relative to its folder, absolute, or at URLs."""
    folder = posixpath.dirname(shard.uri)

    def open_file(path: str) -> tuple[BinaryIO, str, int]:
        place = path if "://" in path else posixpath.join(folder, path)
        if path.startswith(("/", "file:", "local:")) and not is_local(folder):
            raise ClipError("read", "NotReachable", "the path is one of another machine")
        try:
            if not path.startswith(("file://", "local://")):
                refuse_scheme(place, shard.uri)
            fs, name = open_file_system(place, access)
            if isinstance(fs, LocalFileSystem):
                if not stat.S_ISREG(os.stat(name).st_mode):  # a pipe would never end
                    raise ClipError("read", "NoFile", "the path names a folder or device, no file")
                return seekable(cast(BinaryIO, fs.open(name, "rb")))
            size = patiently(lambda: fs.info(name), place, "read_retries", meter)["size"]
            if size is None:
                raise ValueError(f"the server does not say how large {public_url(place)} is")
            with open_remote(fs, name, size, in_order=True, meter=meter) as stream:
                return spool(stream)
        except (FileNotFoundError, NotADirectoryError) as error:
            message = "the row holds no audio bytes, and the file that its path names is not there"
            raise ClipError("read", "FileNotFound", message) from error
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP):
                raise
            message = f"the file that the path names cannot be opened: {error.strerror}"
            raise ClipError("read", type(error).__name__, message) from error
        except (ImportError, ValueError) as error:
            message = f"the place that the path names cannot be opened: {error}"
            raise ClipError("read", "NotReachable", message) from error

    return open_file
