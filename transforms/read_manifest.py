"""Reads the clips that a manifest's rows name, wherever they lie."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import groupby, islice
from typing import BinaryIO, cast

import xxhash

from transforms.manifest import ManifestRow, rows_of
from transforms.meter import Meter
from transforms.opening import FILES_AHEAD, fetch, open_shard, seekable
from transforms.records import (
    ClipError,
    EncodedClip,
    ManifestSlice,
    Shard,
    UnreadableClip,
    as_text,
)
from transforms.storage import (
    Access,
    StorageError,
    is_local,
    is_passing,
    public_url,
    refuse_scheme,
)

Clips = Iterator[EncodedClip | UnreadableClip]


def read_manifest(shard: Shard, access: Access, meter: Meter | None) -> Clips:
    """A clip for each row. Consecutive rows of one file share it: it is fetched once.

    The next few remote files are on their way meanwhile.
    """
    part = cast(ManifestSlice, shard.manifest)
    rows = rows_of(part, slice_of(shard, access, meter), shard.files)
    groups = (list(group) for _, group in groupby(rows, key=lambda row: row.url))
    coming: deque[tuple[list[ManifestRow], Future[tuple[BinaryIO, str, int]] | None]] = deque()
    with ThreadPoolExecutor(FILES_AHEAD, "earmark-fetch") as pool:
        try:
            while True:
                for group in islice(groups, FILES_AHEAD - len(coming)):
                    url = group[0].url
                    remote = url is not None and not is_local(url)
                    coming.append(
                        (
                            group,
                            pool.submit(_fetched, url, part.root, access, meter)
                            if remote
                            else None,
                        )
                    )
                if not coming:
                    return
                group, fetched = coming.popleft()
                if group[0].url is None:
                    yield from (_unreadable(row, cast(ClipError, row.error)) for row in group)
                elif fetched is None and not _may_be_local(group[0].url, part.root, shard.uri):
                    error = ClipError("read", "NotReachable", "the path is one of another machine")
                    yield from (_unreadable(row, error) for row in group)
                elif fetched is None:
                    yield from _local_rows(group, group[0].url)
                else:
                    yield from _fetched_rows(group, group[0].url, fetched)
        finally:
            for _, fetched in coming:
                if fetched is not None:
                    fetched.cancel()


def _fetched(url: str, root: str, access: Access, meter: Meter | None) -> tuple[BinaryIO, str, int]:
    refuse_scheme(url, root)
    return fetch(url, access, meter)


def _may_be_local(path: str, root: str, manifest: str) -> bool:
    """Whether a manifest may name a file of this machine: one from elsewhere, below the root at most."""
    if is_local(manifest):
        return True
    below = os.path.join(os.path.normpath(root), "")
    return is_local(root) and os.path.normpath(path).startswith(below)


def slice_of(shard: Shard, access: Access, meter: Meter | None) -> bytes:
    """The bytes of a shard's rows.

    Raises:
        StorageError: they are not those with which the run was planned.
    """
    part = cast(ManifestSlice, shard.manifest)
    if part.text is not None:
        return part.text.encode("utf-8", "surrogateescape")
    with open_shard(shard, access, meter) as stream:
        stream.seek(part.start)
        content = stream.read(part.end - part.start)
    if xxhash.xxh3_64_hexdigest(content) != part.digest:
        raise StorageError(
            f"{as_text(public_url(shard.uri))} has changed since the run was planned (bytes {part.start} to "
            f"{part.end} are others): run again"
        )
    return content


def _unreadable(row: ManifestRow, error: ClipError) -> UnreadableClip:
    return UnreadableClip(row.member, error, row.metadata, row.start_s, row.end_s, row.name)


def _local_rows(group: list[ManifestRow], path: str) -> Clips:
    facts: tuple[str, int] | None = None  # of the file, read through once
    for row in group:
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would never end
                error = ClipError(
                    "read", "NoFile", "what lies there is a folder or device, no file"
                )
                yield _unreadable(row, error)
                continue
            # A descriptor of its own: of another's, decode processes would share the position.
            with open(path, "rb") as stream:
                if facts is None:
                    facts = seekable(stream)[1:]
                digest, size = facts
                yield EncodedClip(
                    row.member, stream, size, digest, row.metadata, row.start_s, row.end_s, row.name
                )
        except (FileNotFoundError, NotADirectoryError):
            yield _unreadable(row, ClipError("read", "FileNotFound", "there is no such file"))
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP):
                raise
            message = f"the file cannot be opened: {error.strerror}"
            yield _unreadable(row, ClipError("read", type(error).__name__, message))


def _fetched_rows(
    group: list[ManifestRow], url: str, fetched: Future[tuple[BinaryIO, str, int]]
) -> Clips:
    try:
        audio, digest, size = fetched.result()
    except ClipError as fault:
        error = fault
    except FileNotFoundError:
        error = ClipError("read", "FileNotFound", "there is no such file")
    except ValueError as fault:
        error = ClipError("read", "BadManifestRow", f"the URL cannot be opened: {fault}")
    except OSError as fault:
        cause = fault.__cause__ or fault
        of_the_web = url.startswith(("http://", "https://"))
        if is_passing(cause) and of_the_web:  # not all of the web ever answers
            error = ClipError("read", "Unreachable", "the server does not answer")
        elif is_passing(cause) or (cause is fault and not isinstance(fault, PermissionError)):
            raise  # another try may find the storage well
        else:
            reason = getattr(cause, "strerror", None) or type(cause).__name__
            what = f"the server refuses the file ({reason})"
            error = ClipError("read", "Refused", what)
    else:
        with closing(audio):
            for row in group:
                with _reopened(audio) as copy:
                    yield EncodedClip(
                        row.member,
                        copy,
                        size,
                        digest,
                        row.metadata,
                        row.start_s,
                        row.end_s,
                        row.name,
                    )
        return
    yield from (_unreadable(row, error) for row in group)


def _reopened(audio: BinaryIO) -> BinaryIO:
    """The same bytes under a position of their own, which decode processes do not share."""
    if isinstance(audio, io.BytesIO):
        return io.BytesIO(audio.getvalue())  # CPython shares what is not written to
    return cast(BinaryIO, open(f"/dev/fd/{audio.fileno()}", "rb"))
