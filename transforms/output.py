"""Where an output lies, and how a file in it is published: whole and in one step, or not at all.

A file is built on the local disk and then published under its final name. On a local
disk that is a rename; in Cloud Storage an upload that succeeds only where no object of
that name is (`if_generation_match=0`), so that the first writer wins and a worker that
was thought dead changes nothing; elsewhere fsspec's upload, likewise where it can.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import functools
import logging
import os
import posixpath
import re
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import google_crc32c

from transforms.meter import Meter
from transforms.storage import (
    CLOUD_STORAGE,
    DEFAULT_ACCESS,
    Access,
    ShortRead,
    StorageError,
    cloud_bucket,
    counted_retry,
    etag_of,
    explain,
    find_cloud,
    is_local,
    list_cloud,
    open_file_system,
    open_remote,
    patiently,
)

logger = logging.getLogger(__name__)

PARTIAL_SUFFIX = ".partial"  # and a dot before: no reader of Parquet folders takes it for data
_REMOVED_AT_ONCE = 32  # each is a round trip
_WRITE_TIMEOUT_S = (10, 60)  # to connect, and without a byte


class Output(Protocol):
    """A folder of files, named relative to it (`run.json`, `clips/a.parquet`)."""

    uri: str

    def names(self, folder: str = "") -> Iterator[str]:
        """The files directly in `folder`, as names relative to it; none if it is not there."""

    def read(self, name: str) -> bytes | None:
        """A file's bytes, or None where there is none."""

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""

    def tail(self, name: str, size: int) -> bytes:
        """The last `size` bytes of a file, or all of a smaller one."""

    def open(self, name: str) -> BinaryIO:
        """A file, seekable."""

    def scratch(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """A local file to build `name` in; it is gone afterwards unless published."""

    def version(self, name: str) -> str | None:
        """What tells this content of a file from another, or None where there is no file."""

    def publish(self, file: Path, name: str, *, replace: bool | str = False) -> bool:
        """Makes a scratch file `name`, complete and in one step.

        Args:
            file: what `scratch` gave, closed.
            name: where it is to appear.
            replace: True takes the place of a file of this name, a version (of `version`)
                only of that one; else the first one stays.

        Returns:
            Whether the file is there with this content (False: another had made it before;
            on a local disk also where that one is equal).

        Raises:
            OSError: it cannot be written.
        """

    def remove(self, *names: str) -> None:
        """Deletes files; those that are not there do not matter."""


def open_output(uri: str, access: Access = DEFAULT_ACCESS, meter: Meter | None = None) -> Output:
    """The output at a local path or URL; nothing is read or written yet.

    Raises:
        ImportError, ValueError: the scheme is unknown or its library is absent.
    """
    if is_local(uri) or uri.startswith("file://"):
        return LocalOutput(uri.removeprefix("file://"))
    if not re.match(r"[a-z0-9+]+://[^/]", uri):
        raise ValueError("the URL names no bucket: expected such as gs://BUCKET/FOLDER")
    if uri.startswith(CLOUD_STORAGE):
        return CloudOutput(uri, access, meter)
    return ObjectOutput(uri, access, meter)


def publish_bytes(output: Output, name: str, content: bytes, *, replace: bool = True) -> bool:
    """Publishes a small file; see `Output.publish`."""
    with output.scratch(name) as file:
        file.write_bytes(content)
        return output.publish(file, name, replace=replace)


def partial_of(file: Path) -> Path:
    """A hidden name beside `file` to write it under; it tells which process of which host."""
    mark = f"{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
    return file.with_name(f".{file.stem}.{mark}{PARTIAL_SUFFIX}")


def remove_abandoned(*folders: Path) -> None:
    """Deletes the partial files and folders of processes of this host that are gone."""
    host = re.escape(socket.gethostname())
    ours = re.compile(rf"\..*\.{host}\.(\d+)\.[0-9a-f]{{8}}{re.escape(PARTIAL_SUFFIX)}")
    for folder in folders:
        for partial in folder.glob(f".*{PARTIAL_SUFFIX}"):
            mark = ours.fullmatch(partial.name)
            if mark and not _is_running(int(mark.group(1))):
                if partial.is_dir():
                    shutil.rmtree(partial, ignore_errors=True)
                else:
                    partial.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


class LocalOutput:
    """A folder of this machine, or one that workers share."""

    def __init__(self, uri: str) -> None:
        self.uri = str(Path(uri).absolute())
        self._folder = Path(self.uri)

    def names(self, folder: str = "") -> Iterator[str]:
        """As `Output.names`."""
        try:
            with os.scandir(self._folder / folder) as found:
                yield from (entry.name for entry in found if entry.is_file())
        except (FileNotFoundError, NotADirectoryError):
            return

    def read(self, name: str) -> bytes | None:
        """As `Output.read`."""
        try:
            return (self._folder / name).read_bytes()
        except FileNotFoundError:
            return None

    def exists(self, name: str) -> bool:
        """As `Output.exists`."""
        return (self._folder / name).exists()

    def tail(self, name: str, size: int) -> bytes:
        """As `Output.tail`."""
        with self.open(name) as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - size))
            return stream.read()

    def open(self, name: str) -> BinaryIO:
        """As `Output.open`."""
        return (self._folder / name).open("rb")

    @contextlib.contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """A hidden file beside the final one: a rename within one folder is one step."""
        final = self._folder / name
        final.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_of(final)
        try:
            yield partial
        finally:
            partial.unlink(missing_ok=True)

    def publish(self, file: Path, name: str, *, replace: bool | str = False) -> bool:
        """As `Output.publish`; the file is on disk before it has its name."""
        final = self._folder / name
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
        if isinstance(replace, str):
            return self._replace(file, final, replace)
        if replace:
            file.replace(final)
            return True
        try:
            os.link(file, final)  # fails where another process was first
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            if final.exists():
                return False
            file.replace(final)
        return True

    def version(self, name: str) -> str | None:
        """As `Output.version`: the file's number and when it was written."""
        try:
            found = (self._folder / name).stat()
        except FileNotFoundError:
            return None
        return f"{found.st_ino}-{found.st_size}-{found.st_mtime_ns}"

    def _replace(self, file: Path, final: Path, version: str) -> bool:
        """A look and a rename, which processes of one host do one after the other."""
        folder = os.open(final.parent, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(folder, fcntl.LOCK_EX)
            if self.version(str(final.relative_to(self._folder))) != version:
                return False
            file.replace(final)
            return True
        finally:
            os.close(folder)

    def remove(self, *names: str) -> None:
        """As `Output.remove`."""
        for name in names:
            (self._folder / name).unlink(missing_ok=True)


class CloudOutput:
    """A prefix in a Cloud Storage bucket."""

    def __init__(self, uri: str, access: Access, meter: Meter | None = None) -> None:
        self.uri = uri.rstrip("/")
        self._access, self._meter = access, meter
        self._path = self.uri.partition("://")[2]

    def names(self, folder: str = "") -> Iterator[str]:
        """As `Output.names`; a request for every 1,000."""
        prefix = posixpath.join(self._path, folder, "")
        for file in list_cloud(prefix, self._access, folders=True, meter=self._meter):
            name = file.path.removeprefix(prefix)
            if name and not name.endswith("/"):
                yield name

    def read(self, name: str) -> bytes | None:
        """As `Output.read`; one request."""
        from google.api_core.exceptions import NotFound

        retry = counted_retry("read_retries", self._meter)

        def whole() -> bytes | None:
            # The client takes an answer that is too short for the whole object where its
            # first try was cut off; so the checksum is compared once more here.
            blob = self._blob(name)
            try:
                content = bytes(blob.download_as_bytes(retry=retry))
            except NotFound:
                return None
            if blob.crc32c is not None and crc32c(content) != blob.crc32c:
                raise ShortRead(f"{len(content)} bytes do not have its crc32c {blob.crc32c}")
            return content

        with self._explained(name):
            content: bytes | None = patiently(
                whole, f"{self.uri}/{name}", "read_retries", self._meter
            )
            return content

    def exists(self, name: str) -> bool:
        """As `Output.exists`; one request."""
        return find_cloud(f"{self._path}/{name}", self._access, self._meter) is not None

    def tail(self, name: str, size: int) -> bytes:
        """As `Output.tail`; one request, or two where the file is smaller than `size`."""
        retry = counted_retry("read_retries", self._meter)
        with self._explained(name):
            # A part has no checksum of its own.
            blob = self._blob(name)
            end = bytes(blob.download_as_bytes(start=-size, checksum=None, retry=retry))
        # Fewer bytes: a small file, or an answer that was cut. The whole can be checked.
        return end if len(end) == size else (self.read(name) or b"")[-size:]

    def open(self, name: str) -> BinaryIO:
        """As `Output.open`."""
        retry = counted_retry("read_retries", self._meter)
        with self._explained(name):
            blob = self._blob(name)
            blob.reload(retry=retry)
        fs, path = open_file_system(f"{self.uri}/{name}", self._access)
        return open_remote(fs, path, blob.size, meter=self._meter)

    @contextlib.contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """A file in the temporary folder."""
        with tempfile.TemporaryDirectory(prefix="earmark-") as folder:
            yield Path(folder) / posixpath.basename(name)

    def publish(self, file: Path, name: str, *, replace: bool | str = False) -> bool:
        """As `Output.publish`: one upload, its crc32c checked by Cloud Storage and here."""
        from google.api_core.exceptions import PreconditionFailed

        checksum = _crc32c_of(file)
        blob = self._blob(name)
        with self._explained(name):
            try:
                blob.upload_from_filename(
                    str(file),
                    if_generation_match=None if replace is True else int(replace),
                    checksum="crc32c",
                    timeout=_WRITE_TIMEOUT_S,
                    retry=counted_retry("write_retries", self._meter),
                )
            except PreconditionFailed:
                # Another worker was first, or an earlier try of ours whose answer was lost.
                stored = find_cloud(f"{blob.bucket.name}/{blob.name}", self._access, self._meter)
                return stored is not None and stored.checksum == checksum
        if blob.crc32c != checksum:
            blob.delete(if_generation_match=blob.generation)
            raise StorageError(
                f"{self.uri}/{name} arrived with crc32c {blob.crc32c}, was sent with {checksum}; "
                "it was removed again"
            )
        return True

    def version(self, name: str) -> str | None:
        """As `Output.version`: the object's generation; one request."""
        from google.api_core.exceptions import NotFound

        blob = self._blob(name)
        with self._explained(name):
            try:
                blob.reload(retry=counted_retry("read_retries", self._meter))
            except NotFound:
                return None
        return str(blob.generation)

    def remove(self, *names: str) -> None:
        """As `Output.remove`; a request for each, `_REMOVED_AT_ONCE` at a time."""
        from google.api_core.exceptions import NotFound

        retry = counted_retry("write_retries", self._meter)

        def remove_one(name: str) -> None:
            with self._explained(name), contextlib.suppress(NotFound):
                self._blob(name).delete(retry=retry)

        with ThreadPoolExecutor(_REMOVED_AT_ONCE) as pool:
            for start in range(0, len(names), 1_024):  # so that no more wait in memory
                for _ in pool.map(remove_one, names[start : start + 1_024]):
                    pass

    def _blob(self, name: str) -> Any:
        bucket, path = cloud_bucket(posixpath.join(self._path, name), self._access)
        return bucket.blob(path, kms_key_name=self._access.kms_key)

    @contextlib.contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        from google.api_core.exceptions import GoogleAPICallError, RetryError
        from google.auth.exceptions import GoogleAuthError

        try:
            yield
        except (GoogleAPICallError, RetryError, GoogleAuthError) as error:
            raise StorageError(explain(error, f"{self.uri}/{name}")) from error


class ObjectOutput:
    """A folder of any other fsspec file system, such as `s3://`.

    On S3 the first writer wins (`If-None-Match`); on a file system that cannot say
    so, the last one does, with the same rows.
    """

    def __init__(self, uri: str, access: Access, meter: Meter | None = None) -> None:
        self.uri = uri.rstrip("/")
        self._fs, path = open_file_system(self.uri, access)
        self._path = path.rstrip("/")
        self._meter = meter

    def names(self, folder: str = "") -> Iterator[str]:
        """As `Output.names`."""
        path = posixpath.join(self._path, folder)
        self._fs.invalidate_cache()
        try:
            found = patiently(
                lambda: self._fs.ls(path, detail=True), path, "list_retries", self._meter
            )
        except FileNotFoundError:
            return
        for entry in found:
            name = posixpath.basename(entry["name"].rstrip("/"))
            if entry["type"] == "file" and name:
                yield name

    def read(self, name: str) -> bytes | None:
        """As `Output.read`."""
        path = posixpath.join(self._path, name)
        try:
            return bytes(
                patiently(lambda: self._fs.cat_file(path), path, "read_retries", self._meter)
            )
        except FileNotFoundError:
            return None

    def exists(self, name: str) -> bool:
        """As `Output.exists`."""
        path = posixpath.join(self._path, name)
        self._fs.invalidate_cache(path)
        return bool(patiently(lambda: self._fs.exists(path), path, "read_retries", self._meter))

    def tail(self, name: str, size: int) -> bytes:
        """As `Output.tail`."""
        path = posixpath.join(self._path, name)

        def get() -> bytes:
            return bytes(self._fs.cat_file(path, start=-size))

        return bytes(patiently(get, path, "read_retries", self._meter))

    def open(self, name: str) -> BinaryIO:
        """As `Output.open`."""
        path = posixpath.join(self._path, name)
        size = patiently(lambda: self._fs.size(path), path, "read_retries", self._meter)
        return open_remote(self._fs, path, size, meter=self._meter)

    @contextlib.contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """A file in the temporary folder."""
        with tempfile.TemporaryDirectory(prefix="earmark-") as folder:
            yield Path(folder) / posixpath.basename(name)

    def publish(self, file: Path, name: str, *, replace: bool | str = False) -> bool:
        """As `Output.publish`."""
        path = posixpath.join(self._path, name)
        # No file system of fsspec's replaces one version alone: a look, and then the upload.
        if isinstance(replace, str) and self.version(name) != replace:
            return False
        mode = {} if replace else {"mode": "create"}

        def put() -> None:
            self._fs.put_file(str(file), path, **mode)

        try:
            patiently(put, path, "write_retries", self._meter)
        except FileExistsError:
            return False
        except OSError as error:
            if "PreconditionFailed" in str(error) or "At least one of the pre-cond" in str(error):
                return False
            raise
        return True

    def version(self, name: str) -> str | None:
        """As `Output.version`: the ETag, or what else is shown of the file."""
        path = posixpath.join(self._path, name)
        self._fs.invalidate_cache(path)
        try:
            info = patiently(lambda: self._fs.info(path), path, "read_retries", self._meter)
        except FileNotFoundError:
            return None
        return etag_of(info) or repr(sorted(info.items()))

    def remove(self, *names: str) -> None:
        """As `Output.remove`."""
        for name in names:
            remove_one = functools.partial(self._fs.rm_file, posixpath.join(self._path, name))
            with contextlib.suppress(FileNotFoundError):
                patiently(remove_one, f"{self.uri}/{name}", "write_retries", self._meter)


def remove_output(output: Output, folder: str, names: tuple[str, ...]) -> None:
    """Deletes all files in `folder` and then `names`, in this order."""
    output.remove(*(posixpath.join(folder, name) for name in output.names(folder)))
    if isinstance(output, LocalOutput):
        shutil.rmtree(Path(output.uri) / folder, ignore_errors=True)
    for name in names:
        output.remove(name)


def check_writable(output: Output) -> str | None:
    """Writes a file into `output` and removes it; says so where it could not be removed.

    Raises:
        OSError: it cannot be written.
    """
    left = None
    name = f".earmark-probe-{uuid.uuid4().hex[:8]}"
    there = isinstance(output, LocalOutput) and Path(output.uri).exists()
    publish_bytes(output, name, b"A test of whether this place can be written to.\n")
    try:
        output.remove(name)
    except OSError as error:
        left = f"{name} was written to try it, and may not be removed here: {error}"
    if isinstance(output, LocalOutput) and not there:
        with contextlib.suppress(OSError):
            Path(output.uri).rmdir()
    return left


def crc32c(content: bytes) -> str:
    """The checksum as Cloud Storage writes it: base64, big-endian."""
    return base64.b64encode(google_crc32c.Checksum(content).digest()).decode()


def _crc32c_of(file: Path) -> str:
    digest = google_crc32c.Checksum()
    with file.open("rb") as stream:
        for _ in digest.consume(stream, 1 << 20):
            pass
    return base64.b64encode(digest.digest()).decode()
